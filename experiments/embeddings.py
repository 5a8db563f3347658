"""MiniLM as an encoder of sentences, quantized without training: does it still find neighbours?

    python -m experiments.embeddings                         # rotten_tomatoes
    python -m experiments.embeddings --checkpoint DIR        # another BERT, as Hugging Face has it
    python -m experiments.embeddings --smoke                 # a trial in a minute

Every kernel is quantized to 8, 4 and 3 bits in groups of 64 inputs, by rounding to nearest and by
the methods after training, which see a few hundred training sentences, and at 4 bits by GPTQ kernel
after kernel, each for what those before it leave of its inputs; the tables of words and places have
8 bits in every row; biases, layer norms and the table of segments stay floats, and the results name
them. The network is then what its file gives back. Against the float network stand the cosine of
each sentence's two embeddings, and how many of its ten nearest neighbours among the sentences stay.

The best method is chosen by the cosine of validation sentences; seeds draw the sentences that the
methods see. Finished rows are kept: a killed run goes on where it was.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jopt
from experiments import (
    _bert,
    _checkpoint,
    _compress,
    _data,
    _embeddings_report,
    _parts,
    _post_training,
    _results,
    _rows,
    _sentences,
    _text,
)
from jopt import layers

Tree = Any
KERNELS = "layer.*/kernel"
TABLES = "(words|places)/embedding"
SURE = 0.99  # mean cosine at 4 bits


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides the outcome, written into the results."""

    dataset: str = "rotten_tomatoes"
    seeds: tuple[int, ...] = (0, 1, 2)
    bits: tuple[int, ...] = (8, 4, 3)
    group: int = 64  # of inputs, or the largest that divides 64 and the widths
    length: int = 64  # tokens of a sentence
    calibration: int = 256  # sentences
    calibration_length: int = 24  # tokens of each
    neighbours: int = 10


class Run:
    """The encoder, the sentences, and what the float network makes of them."""

    def __init__(
        self, settings: Settings, texts: _text.Texts, checkpoint: Path, work: Path, say: Any
    ) -> None:
        """Read the checkpoint and split the sentences into tokens."""
        self.settings, self.texts, self.say = settings, texts, say
        self.bert = _bert.load(checkpoint, settings.length)
        self.tokenizer = (checkpoint if checkpoint.is_dir() else checkpoint.parent) / (
            "tokenizer.json"
        )
        self.tokens = {
            "validation": self.bert.tokenize(texts.validation[0]),
            "test": self.bert.tokenize(texts.test[0]),
        }
        about = [jopt.__version__, dataclasses.asdict(settings) | {"seeds": None}, texts.source]
        self.work = work / _checkpoint.digest([*about, _size_of(checkpoint)])
        model = self.bert.model

        @jax.jit
        def embed(params: Tree, ids: Array, real: Array) -> Array:
            hidden = model.apply({"params": params}, ids, real)
            return _bert.sentence_embedding(hidden, real)  # pyright: ignore[reportArgumentType]

        def encode(params: Tree, ids: Array) -> Array:
            return model.apply({"params": params}, ids)  # pyright: ignore[reportReturnType]

        self.embed, self.encode = embed, encode
        self.group = math.gcd(settings.group, model.width, model.hidden)
        self.whole = self.embeddings(self.bert.params)

    def embeddings(self, params: Tree) -> dict[str, Array]:
        """Return the embeddings of all sentences, (sentences, width), by part."""
        run = partial(self.embed, params)
        return {
            part: jnp.asarray(_sentences.through(run, tokens))
            for part, tokens in self.tokens.items()
        }

    def sentences(self, seed: int, times: int = 1) -> list[np.ndarray]:
        """Return batches of training sentences, drawn by a seed, of so many times the usual."""
        length, count = self.settings.calibration_length, times * self.settings.calibration
        return _sentences.drawn_rows(self.tokenizer, self.texts, seed, length, count)

    def statistics(self, seed: int) -> _post_training.Statistics:
        """Return what calibration gathers from training sentences, drawn by a seed."""
        return layers.calibrate(self.encode, self.bert.params, self.sentences(seed))

    def in_order(self, bits: int, seed: int) -> tuple[Tree, list[str]]:
        """Quantize kernel after kernel, each for the inputs that those before it leave."""
        how, batches = _post_training.spec(bits, self.group), self.sentences(seed, 2)
        return _post_training.in_order(self.encode, self.bert.params, batches, how, KERNELS, TABLES)

    def row(self, form: str, method: str, tree: Tree, lost: list[str]) -> dict[str, Any]:
        """Write a network to a file, and compare what comes back with the float network."""
        written, params = _compress.written(tree, self.work / "packed.jopt")
        own = self.embeddings(params)
        row: dict[str, Any] = {"bytes": written, "not_improved": len(lost)}
        for part, embeddings in own.items():
            cosines = jnp.sum(embeddings * self.whole[part], 1)
            row[part] = round(float(cosines.mean()), 6)
            if part == "test":
                row["worst_hundredth"] = round(float(jnp.quantile(cosines, 0.01)), 6)
        count = min(self.settings.neighbours, len(own["test"]) - 1)
        row["overlap"] = round(float(overlap(self.whole["test"], own["test"], count)), 6)
        self.say(
            f"{form}, {method}: {written:,} bytes, validation cosine {row['validation']:.4f}, "
            f"{row['overlap']:.1%} of neighbours"
        )
        return row


def _size_of(checkpoint: Path) -> int:
    file = checkpoint / "model.safetensors" if checkpoint.is_dir() else checkpoint
    return file.stat().st_size if file.is_file() else 0


@partial(jax.jit, static_argnames="count")
def overlap(first: Array, second: Array, count: int) -> Array:
    """Return which part of each row's nearest rows in `first` are so in `second`, on average.

    Args:
      first: unit vectors, (sentences, width).
      second: others of the same sentences.
      count: neighbours of each, itself left out.
    """

    def nearest(vectors: Array) -> Array:
        similar = vectors @ vectors.T
        similar = jnp.where(jnp.eye(len(vectors), dtype=bool), -jnp.inf, similar)
        return jax.lax.top_k(similar, count)[1]

    same = nearest(first)[:, :, None] == nearest(second)[:, None, :]
    return same.any(2).mean()


def measure(run: Run, seed: int, first: bool) -> list[dict[str, Any]]:
    """Make and score every network of one seed; only the first has those that see no sentence."""
    rows = _rows.Rows(run.work / f"rows-{seed}.json", ("form", "method"))
    statistics: dict[str, Any] = {}

    def row(form: str, method: str, make: Callable[[], tuple[Tree, list[str]]]) -> None:
        rows.add({"form": form, "method": method}, lambda: run.row(form, method, *make()))

    def quantized(bits: int, method: str) -> tuple[Tree, list[str]]:
        chosen = _post_training.METHODS[method]
        if chosen is not None and not statistics:
            statistics.update(run.statistics(seed))
        how = _post_training.spec(bits, run.group)
        return _post_training.quantized(run.bert.params, statistics, how, chosen, KERNELS, TABLES)

    if first:
        row("float", "", lambda: (run.bert.params, []))
    for bits in run.settings.bits:
        for method, chosen in _post_training.METHODS.items():
            if first or chosen is not None:
                row(f"{bits} bits", method, partial(quantized, bits, method))
        if bits in _post_training.ORDERED:
            row(f"{bits} bits", _post_training.IN_ORDER, partial(run.in_order, bits, seed))
    return rows.list()


LISTED = ("bytes", "not_improved", "validation", "test", "worst_hundredth", "overlap")


def joined(by_seed: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Join the rows of all seeds by form and method."""
    found = []
    for row in by_seed[0]:
        name = row["form"], row["method"]
        own = [each for rows in by_seed for each in rows if (each["form"], each["method"]) == name]
        lists = {key: [each[key] for each in own] for key in LISTED}
        means = {
            f"mean_{key}": round(float(np.mean(lists[key])), 6)
            for key in ("validation", "test", "overlap")
        }
        found.append({"form": name[0], "method": name[1]} | lists | means)
    return found


def targets_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Hold the best method at 4 bits, chosen by validation sentences, against rounding."""
    four = {row["method"]: row for row in rows if row["form"] == "4 bits"}
    if not four:
        return []
    best = max(four, key=lambda method: four[method]["mean_validation"])
    found, nearest = four[best]["mean_test"], four["RTN"]["mean_test"]
    closer = (1 - nearest) / max(1 - found, 1e-9)
    return [
        _results.target(f"4 bits, {best}: mean cosine", found, SURE, "higher"),
        _results.target(f"4 bits, {best}: times nearer than RTN", round(closer, 3), 1.0, "higher"),
    ]


def floats_left(params: Tree, group: int) -> dict[str, int]:
    """Count the weights that no row quantizes, by kind of leaf."""
    tree, _ = _post_training.quantized(
        params, {}, _post_training.spec(8, group), None, KERNELS, TABLES
    )
    found: dict[str, int] = {}
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=jopt.is_compressed)
    for keys, leaf in pairs:
        if not jopt.is_compressed(leaf):
            path = jax.tree_util.keystr(keys, simple=True, separator="/")
            kind = path if "/embedding" in path else path.rsplit("/", 1)[-1]
            found[kind] = found.get(kind, 0) + leaf.size
    return found


def run(call: _parts.Call) -> dict[str, Any]:
    """Run or resume the experiment; returns its tag, data, settings, figures and targets."""
    texts, folder, tag = _sentences.start(call)
    settings = Settings(dataset=texts.name, seeds=call.seeds)
    if call.head is not None:
        settings = dataclasses.replace(
            settings, bits=(4,), calibration=16, calibration_length=7, length=12
        )
    try:
        each = Run(settings, texts, folder, call.work, call.console.print)
    except (_data.DataUnavailable, ValueError) as problem:
        raise SystemExit(str(problem)) from None
    rows = joined([measure(each, seed, number == 0) for number, seed in enumerate(call.seeds)])
    targets = [] if tag else targets_of(rows)
    _embeddings_report.table(rows, targets, call.console)
    _embeddings_report.plot(rows, call.plot(tag))
    return {
        "tag": tag,
        "data": _data.about(texts),
        "settings": dataclasses.asdict(settings),
        "figures": {"rows": rows, "left_in_floats": floats_left(each.bert.params, each.group)},
        "targets": targets,
    }


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    words = "another TFDS set of sentences than rotten_tomatoes, such as imdb_reviews"
    checkpoint = "folder of a BERT in Hugging Face's layout, instead of MiniLM"
    _parts.main("embeddings", {"sentences": run}, words, arguments, {"checkpoint": checkpoint})


if __name__ == "__main__":
    main()
