"""Distil a transformer that reads sentences into far smaller networks, then compress these.

    python -m experiments.distill_text                       # three seeds
    python -m experiments.distill_text --dataset imdb_reviews
    python -m experiments.distill_text --smoke               # a trial in a minute

The teacher is a transformer trained from scratch on labelled sentences. The students are a
transformer of one layer and a convolutional network, both of narrow vectors and of the most
frequent words only. Each learns alone; from the teacher; and from the teacher with a hint, the
vector that a sentence is classified by. Networks see the sentences with some words blanked out,
anew in every copy. The teacher is sure of those, which it learned by heart; so it is also asked
about sentences that nobody wrote, spliced from the halves of two, of which only it can say
anything. Each kind that learned best by validation sentences is then pruned and quantized, the
teacher still teaching, and measured as the file that reloads.

Choices are made on a validation part of the training sentences; the test sentences are looked at
once, at the end. Finished trainings are kept: a killed run goes on where it was.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

import jopt
from experiments import (
    _checkpoint,
    _compress,
    _data,
    _distill_methods,
    _distill_report,
    _distill_training,
    _parts,
    _results,
    _text,
    _train,
)
from experiments._text_models import SentenceFeatures, TextCNN, TextTransformer
from jopt import distill

Tree = Any
SMALLER = 20.0  # times, in bytes
KEPT = 0.97  # of the teacher's accuracy
HOW = ("alone", "KD", "KD + hint")
STUDENTS = ("transformer", "cnn")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides the outcome, written into the results."""

    dataset: str = "rotten_tomatoes"
    seeds: tuple[int, ...] = (0, 1, 2)
    length: int = 40
    least: int = 2  # times that a word occurs in training
    batch: int = 64
    teacher: dict[str, Any] = dataclasses.field(
        default_factory=lambda: {"width": 128, "layers": 2, "heads": 4, "hidden": 256}
    )
    transformer: dict[str, Any] = dataclasses.field(
        default_factory=lambda: {"width": 64, "layers": 1, "heads": 4, "hidden": 128}
    )
    cnn: dict[str, Any] = dataclasses.field(default_factory=lambda: {"width": 64, "filters": 64})
    student_words: int = 8000
    teacher_dropout: float = 0.4
    student_dropout: float = 0.3
    teacher_epochs: int = 8
    epochs: int = 16
    rate: float = 1e-3
    student_rate: float = 2e-3
    weight_decay: float = 1e-2
    blanked: float = 0.15  # of the words
    copies: int = 8
    spliced: int = 8  # further copies, of spliced sentences
    temperature: float = 2.0
    soft_weight: float = 0.7
    hint_weight: float = 1.0
    recipe: _compress.Recipe = dataclasses.field(
        default_factory=lambda: _compress.Recipe(0.8, 4, 8, 4, 1e-3)
    )


def make_pool(data: _text.Sentences, settings: Settings) -> _distill_training.Pool:
    """Copy the training sentences with words blanked out at random, then spliced, without labels.

    The first copy is the sentences as they are. The label of what was spliced is -1.
    """
    rows, labels = map(jnp.asarray, data.train)

    def blanked(key: Array, rows: Array) -> Array:
        blank = jax.random.bernoulli(key, settings.blanked, rows.shape)
        return jnp.where(blank & (rows != _text.PADDING), _text.UNKNOWN, rows)

    def spliced(key: Array) -> Array:
        other, blank = jax.random.split(key)
        return blanked(blank, splice(rows, jax.random.permutation(other, rows)))

    own = [blanked(jax.random.key(2000 + copy), rows) for copy in range(1, settings.copies)]
    new = [spliced(jax.random.key(3000 + copy)) for copy in range(settings.spliced)]
    unknown = jnp.full_like(labels, -1)
    return _distill_training.Pool(
        jnp.concatenate([rows, *own, *new]),
        jnp.concatenate([labels] * settings.copies + [unknown] * settings.spliced),
        len(labels),
    )


def splice(first: Array, second: Array, padding: int = _text.PADDING) -> Array:
    """Join the first half of each sentence with the second half of another's, (batch, length)."""
    lengths = [jnp.sum(rows != padding, 1, keepdims=True) for rows in (first, second)]
    cut, start = (length // 2 for length in lengths)
    places = jnp.arange(first.shape[1])[None]
    later = places - cut + start
    inside = (later >= 0) & (later < second.shape[1])
    tail = jnp.take_along_axis(second, jnp.clip(later, 0, second.shape[1] - 1), 1)
    return jnp.where(places < cut, first, jnp.where(inside, tail, padding))


def labelled(pool: _distill_training.Pool) -> _distill_training.Pool:
    """Return the copies of a pool that have labels."""
    copies = int(jnp.sum(pool.labels >= 0)) // pool.count
    rows = slice(0, copies * pool.count)
    teacher = jax.tree.map(lambda leaf: leaf[rows], pool.teacher)
    return _distill_training.Pool(pool.images[rows], pool.labels[rows], pool.count, teacher)


class Network:
    """A network that reads sentences, as this experiment runs it."""

    def __init__(self, module: nn.Module, length: int) -> None:
        """Take a module."""
        self.module, self.length = module, length

    def initial(self, key: Array) -> Tree:
        """Return fresh parameters."""
        ids = jnp.zeros((1, self.length), jnp.int32)
        return jax.jit(self.module.init)(key, ids)["params"]

    def training(self, params: Tree, ids: Array, key: Array) -> SentenceFeatures:
        """Run with dropout."""
        rngs = {"dropout": key}
        return self.module.apply({"params": params}, ids, True, rngs=rngs)  # pyright: ignore

    def features(self, params: Tree, ids: Array) -> SentenceFeatures:
        """Run without dropout."""
        return self.module.apply({"params": params}, ids)  # pyright: ignore[reportReturnType]

    def logits(self, params: Tree, ids: Array) -> Array:
        """Run without dropout, for logits alone."""
        return self.features(params, ids).logits

    def scores(self, params: Tree, data: _text.Sentences) -> dict[str, float]:
        """Return validation and test accuracy."""
        parts = {"validation": data.validation, "test": data.test}
        return {
            name: round(
                _train.accuracy(self.logits, params, jnp.asarray(rows), jnp.asarray(labels)), 6
            )
            for name, (rows, labels) in parts.items()
        }


def losses(
    settings: Settings,
    network: Network,
    how: str,
    params: Tree,
    projector: Tree,
    batch: _distill_training.Batch,
) -> Array:
    """Return the loss of each sentence, (batch,); `projector` serves the hint alone."""
    own = network.training(params, batch.images, batch.key)
    if how == "alone":
        return optax.softmax_cross_entropy_with_integer_labels(own.logits, batch.labels)
    found = _distill_methods.mixed_loss(
        own.logits, batch.teacher.logits, batch.labels, settings.temperature, settings.soft_weight
    )
    if how == "KD + hint":
        hint = distill.project(projector, own.embedding)
        found = found + settings.hint_weight * distill.hint_loss(hint, batch.teacher.embedding)
    return found


class Run:
    """One seed: its teacher, what it said, and its students."""

    def __init__(
        self, settings: Settings, data: _text.Sentences, seed: int, work: Path, say: Any
    ) -> None:
        """Make the networks."""
        self.settings, self.data, self.seed, self.say = settings, data, seed, say
        self.work = work / f"seed-{seed}"
        words = len(data.vocabulary) + 2
        few = min(settings.student_words, words)
        common: dict[str, Any] = {"num_classes": data.num_classes}
        shape: dict[str, Any] = common | {"positions": settings.length}
        drop: dict[str, Any] = {"dropout": settings.student_dropout}
        modules: dict[str, Any] = {
            "teacher": TextTransformer(
                **shape, vocabulary=words, dropout=settings.teacher_dropout, **settings.teacher
            ),
            "transformer": TextTransformer(**shape, vocabulary=few, **drop, **settings.transformer),
            "cnn": TextCNN(**common, vocabulary=few, **drop, **settings.cnn),
        }
        self.networks = {name: Network(module, settings.length) for name, module in modules.items()}
        self.pool = make_pool(data, settings)

    def train(self, name: str, how: str, pool: _distill_training.Pool) -> Tree:
        """Train one network; returns its parameters."""
        settings, network = self.settings, self.networks[name]
        teaching = name == "teacher"
        key = jax.random.key(10 * self.seed + list(self.networks).index(name))
        params = network.initial(key)
        trained: Tree = {"student": params}
        if how == "KD + hint":
            width = params["classifier"]["kernel"].shape[0]
            trained["projector"] = distill.init_projector(
                jax.random.fold_in(key, 1), width, settings.teacher["width"]
            )
        fit = _distill_training.Fit(
            settings.batch,
            settings.teacher_epochs if teaching else settings.epochs,
            settings.rate if teaching else settings.student_rate,
            settings.weight_decay,
        )
        pool = labelled(pool) if how == "alone" else pool
        file = self.work / f"{name}-{how.replace(' + ', '-')}.ckpt"

        def loss(trained: Tree, state: Tree, batch: _distill_training.Batch) -> tuple[Array, Tree]:
            own, projector = trained["student"], trained.get("projector")
            return losses(settings, network, how, own, projector, batch).mean(), state

        return fit.run(loss, trained, pool, self.seed, file, self.say)["student"]

    def compress(self, name: str, how: str, params: Tree, pool: _distill_training.Pool) -> Tree:
        """Prune and quantize a trained student, with the labels alone or with the teacher."""
        settings, network = self.settings, self.networks[name]

        def make_loss(view: Callable[[Tree], Tree]) -> _distill_training.Loss:
            def loss(params: Tree, state: Tree, batch: Any) -> tuple[Array, Tree]:
                return losses(settings, network, how, view(params), None, batch).mean(), state

            return loss

        pool = labelled(pool) if how == "alone" else pool
        stem = self.work / f"{name}-{how}-packed"
        return _compress.compress(
            settings.recipe, params, make_loss, pool, settings.batch, self.seed, stem, self.say
        )

    def row(self, name: str, how: str, tree: Tree) -> dict[str, Any]:
        """Write a network to a file, reload it, and score what came back."""
        written, params = _compress.written(tree, self.work / "packed.jopt")
        row = {
            "network": name,
            "how": how,
            "bytes": written,
            "parameters": _compress.size(params),
            "left": _compress.nonzero(params),
        }
        row |= self.networks[name].scores(params, self.data)
        self.say(
            f"seed {self.seed}: {name}, {how}: {written:,} bytes, "
            f"validation {row['validation']:.2%}"
        )
        return row

    def measure(self) -> list[dict[str, Any]]:
        """Train, compress and score every network, or read what is finished."""
        file = self.work / "rows.json"
        if file.exists():
            return json.loads(file.read_text())
        teacher = self.train("teacher", "alone", self.pool)
        rows = [self.row("teacher", "alone", teacher)]
        network = self.networks["teacher"]
        taught = _distill_training.ask(self.pool, network.features, teacher, self.work / "answers")
        for name in STUDENTS:
            trees = {how: self.train(name, how, taught) for how in HOW}
            found = {how: self.row(name, how, tree) for how, tree in trees.items()}
            rows += found.values()
            best = max(HOW[1:], key=lambda how: found[how]["validation"])
            for how, start in (("alone", trees["alone"]), ("KD", trees[best])):
                tree = self.compress(name, how, start, taught)
                rows.append(self.row(name, f"{how}, pruned, quantized", tree))
        _results.write_atomically(file, json.dumps(rows).encode())
        return rows


def smoke(settings: Settings) -> Settings:
    """Shorten everything to an epoch of small networks."""
    small = {"width": 8, "layers": 1, "heads": 2, "hidden": 8}
    return dataclasses.replace(
        settings,
        teacher=small,
        transformer=small,
        cnn={"width": 4, "filters": 4},
        teacher_epochs=1,
        epochs=1,
        copies=2,
        spliced=1,
        batch=16,
        recipe=dataclasses.replace(settings.recipe, prune_epochs=1, quantize_epochs=1),
    )


def run(call: _parts.Call) -> dict[str, Any]:
    """Run or resume the experiment; returns its tag, data, settings, figures and targets."""
    settings = Settings(dataset=call.dataset or "rotten_tomatoes", seeds=call.seeds)
    settings = settings if call.head is None else smoke(settings)
    length, least = settings.length, settings.least
    data = _text.load_or_exit(settings.dataset, length, least, call.console.print)
    data = call.cut(data)
    about = dataclasses.asdict(settings) | {"seeds": None}
    work = call.work / _checkpoint.digest(
        [jopt.__version__, about, data.source, len(data.train[1])]
    )
    by_seed = [Run(settings, data, seed, work, call.console.print).measure() for seed in call.seeds]
    same, listed = ("network", "how", "parameters"), ("bytes", "left", "validation", "test")
    rows = _results.join_seeds(by_seed, same, listed)
    tag = "" if data.tag == "rotten_tomatoes" else data.tag
    targets = [] if tag else targets_of(rows)
    _distill_report.text_table(rows, targets, call.console)
    _distill_report.text_plot(rows, call.plot(tag))
    return {
        "tag": tag,
        "data": _data.about(data),
        "settings": dataclasses.asdict(settings) | {"vocabulary": len(data.vocabulary)},
        "figures": rows,
        "targets": targets,
    }


def targets_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Hold the compressed students against the teacher: bytes, and accuracy kept, seed by seed."""
    by_name = {(row["network"], row["how"]): row for row in rows}
    teacher = by_name["teacher", "alone"]
    found = []
    for name in STUDENTS:
        row = by_name[name, "KD, pruned, quantized"]
        smaller = min(a / b for a, b in zip(teacher["bytes"], row["bytes"], strict=True))
        kept = row["mean_test"] / teacher["mean_test"]
        found += [
            _results.target(f"{name}: times smaller file", round(smaller, 2), SMALLER, "higher"),
            _results.target(f"{name}: accuracy kept", round(kept, 5), KEPT, "higher"),
        ]
    return found


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    words = "another TFDS set of labelled sentences than rotten_tomatoes, such as imdb_reviews"
    _parts.main("distill_text", {"sentences": run}, words, arguments)


if __name__ == "__main__":
    main()
