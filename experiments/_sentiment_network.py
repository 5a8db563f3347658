"""A BERT that tells good sentences from bad ones: fine-tuned, scored and timed."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import jopt
from experiments import (
    _bert,
    _checkpoint,
    _compress,
    _distill_training,
    _parts,
    _rows,
    _sentences,
    _text,
    _timing,
)
from experiments._text_models import SentenceFeatures

Tree = Any
KERNELS = "encoder/layer.*/kernel"
TABLES = "encoder/(words|places)/embedding"
Latencies = dict[str, dict[str, float]]  # by network and number of sentences
Made = tuple[Tree, dict[str, Any], Any]
SAME = ("kind", "form", "method")  # what names a network


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides the outcome of fine-tuning, written into the results."""

    dataset: str = "rotten_tomatoes"
    seeds: tuple[int, ...] = (0, 1, 2)
    length: int = 48  # tokens of a sentence
    batch: int = 32
    epochs: int = 3
    rate: float = 1e-4
    weight_decay: float = 1e-2
    dropout: float = 0.1
    group: int = 64  # of inputs, or the largest that divides 64 and the widths
    calibration: int = 256  # sentences
    calibration_length: int = 24  # tokens of each


class Run:
    """The checkpoint, the sentences as tokens, and the classifiers that are fine-tuned on them."""

    def __init__(
        self, settings: Settings, texts: _text.Texts, checkpoint: Path, work: Path, say: Any
    ) -> None:
        """Read the checkpoint and split the sentences into tokens."""
        self.settings, self.texts, self.say = settings, texts, say
        self.bert = _bert.load(checkpoint, settings.length, dropout=settings.dropout)
        folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
        self.tokenizer = folder / "tokenizer.json"
        self.tokens = {
            part: self.bert.tokenize(getattr(texts, part)[0])
            for part in ("train", "validation", "test")
        }
        self.module = _bert.BertClassifier(self.bert.model, texts.num_classes)
        self.group = math.gcd(settings.group, self.bert.model.width, self.bert.model.hidden)
        about = [jopt.__version__, dataclasses.asdict(settings) | {"seeds": None}, texts.source]
        about += [len(texts.train[1]), _bert.sizes(self.bert.model)]
        self.work = work / _checkpoint.digest(about)
        self.padding = _padding(self.tokens["train"])
        self.unknown = _bert.token_number(self.tokenizer, ("[MASK]", "[UNK]"))
        self.pool = _distill_training.Pool(
            jnp.asarray(self.tokens["train"].ids),
            jnp.asarray(texts.train[1]),
            len(texts.train[1]),
        )
        self.loop = _sentences.cut_steps(self.tokens["train"].real.sum(1))
        self.predict = jax.jit(self.logits)

    def features(self, params: Tree, ids: Array, real: Array | None = None) -> SentenceFeatures:
        """Run without dropout; without `real` every token counts."""
        return self.module.apply({"params": params}, ids, real)  # pyright: ignore

    def logits(self, params: Tree, ids: Array, real: Array) -> Array:
        """Return logits."""
        return self.features(params, ids, real).logits

    def plain(self, params: Tree, ids: Array) -> Array:
        """Return logits of sentences that are full, which is what calibration runs."""
        return self.features(params, ids).logits

    def training_of(self, module: _bert.BertClassifier) -> Callable[[Tree, Array, Array], Array]:
        """Return `(params, ids, key) -> logits` with dropout."""

        def run(params: Tree, ids: Array, key: Array) -> Array:
            rngs, real = {"dropout": key}, ids != self.padding
            found: Any = module.apply({"params": params}, ids, real, None, True, rngs=rngs)
            return found.logits

        return run

    def predict_of(self, module: _bert.BertClassifier) -> Callable[[Tree, Array, Array], Array]:
        """Return a compiled `(params, ids, real) -> logits`."""

        @jax.jit
        def run(params: Tree, ids: Array, real: Array) -> Array:
            found: Any = module.apply({"params": params}, ids, real)
            return found.logits

        return run

    @cached_property
    def training_logits(self) -> Callable[[Tree, Array, Array], Array]:
        """Return `(params, ids, key) -> logits` of the whole network with dropout."""
        return self.training_of(self.module)

    def teacher(self, seed: int) -> Tree:
        """Fine-tune the classifier of a seed, or read it."""
        settings = self.settings

        def loss(params: Tree, state: Tree, batch: _distill_training.Batch) -> tuple[Array, Tree]:
            logits = self.training_logits(params, batch.images, batch.key)
            found = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
            return found.mean(), state

        start = _bert.classifier_params(jax.random.key(seed), self.module, self.bert.params)
        fit = _distill_training.Fit(
            settings.batch, settings.epochs, settings.rate, settings.weight_decay, loop=self.loop
        )
        file = self.work / f"teacher-{seed}.ckpt"
        return fit.run(loss, start, self.pool, seed, file, self.say)

    def accuracies(self, params: Tree, predict: Any = None) -> dict[str, float]:
        """Return validation and test accuracy; `predict` is another `(params, ids, real)`."""
        found = {}
        for part in ("validation", "test"):
            labels = getattr(self.texts, part)[1]

            def run(ids: np.ndarray, real: np.ndarray) -> Array:
                return (predict or self.predict)(params, ids, real)

            logits = _sentences.through(run, self.tokens[part])
            found[part] = round(float(np.mean(logits.argmax(1) == labels)), 6)
        return found

    def full_rows(self, seed: int, times: int = 1) -> list[np.ndarray]:
        """Return so many times the usual training sentences, full ones, drawn by a seed."""
        length, count = self.settings.calibration_length, times * self.settings.calibration
        return _sentences.drawn_rows(self.tokenizer, self.texts, seed, length, count)

    @cached_property
    def rounding(self) -> Callable[[Tree, Array, Array], Array]:
        """Return the classifier as `jopt.run` runs it, inputs of layers in 8 bits a token."""
        return jopt.run.compressed(self.logits, activations="int8")

    def laid_out(self, tree: Tree, predict: Any = None) -> Tree:
        """Return a tree as `jopt.run` reads it; `predict` is another `(params, ids, real)`."""
        ids = self.tokens["test"].ids[:1]
        return jopt.run.prepare(predict or self.logits, tree, ids, np.ones(ids.shape, bool))

    def latencies(self, sides: Mapping[str, tuple[Any, Tree]], repeats: int) -> Latencies:
        """Time networks in turns on one sentence and on 64, of 32 tokens, in milliseconds.

        Args:
          sides: by name a compiled `(params, ids, real) -> logits` and its parameters.
          repeats: how often.
        """
        found: Latencies = {name: {} for name in sides}
        tokens = self.tokens["test"].ids[:, :32]
        for count in (1, 64):
            ids = np.resize(tokens, (count, tokens.shape[1]))  # of few sentences, some again
            real = np.ones(ids.shape, bool)
            runs = {name: partial(side[0], side[1], ids, real) for name, side in sides.items()}
            for name, row in _timing.interleaved(runs, repeats).items():
                found[name][str(count)] = round(1e3 * row["median_s"], 4)
        return found


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one seed says.

    Attributes:
      rows: of its networks.
      latencies: takes how often to time them, and returns milliseconds.
    """

    rows: list[dict[str, Any]]
    latencies: Callable[[int], Latencies]


class Scores:
    """The networks of one seed: scored as their files give them back, and timed in `jopt.run`.

    Finished scores and times are read.
    """

    def __init__(
        self, run: Run, part: str, seed: int, held: _parts.Held, listed: tuple[str, ...]
    ) -> None:
        """Read what is finished of a part of the experiment, or what its results hold."""
        self.run, self.seed = run, seed
        known = held.rows(seed, listed), held.facts(seed)
        self.rows = _rows.Rows(run.work / f"{part}-{seed}.json", SAME, *known)
        self._sides: dict[str, Callable[[], tuple[Any, Tree]]] = {}

    def add(
        self, kind: str, form: str, method: str, make: Callable[[], Made], coded: bool = False
    ) -> None:
        """Score a network that is not among the finished ones.

        Args:
          kind: first word of its name.
          form: second.
          method: third.
          make: returns its tree, more figures, and what runs it if not the classifier.
          coded: whether it runs on its codes, as `jopt.run` lays them out, and not on floats.
        """
        about = {"kind": kind, "form": form, "method": method}

        def measured() -> dict[str, Any]:
            tree, more, predict = make()
            size, back = _compress.packed(tree, self.run.work / f"packed-{self.seed}.jopt")
            params = self.run.laid_out(back) if coded else jopt.materialize(back)
            found = self.run.accuracies(params, predict)
            words = " ".join(about.values())
            validation = f"validation {found['validation']:.2%}"
            self.run.say(f"seed {self.seed}: {words}: {size:,} bytes, {validation}")
            return {"bytes": size} | more | found

        def side() -> tuple[Any, Tree]:
            tree, _, predict = make()
            if kind == "float":
                return self.run.predict, tree
            laid_out = self.run.laid_out(tree, None if coded else predict)
            return (predict if coded else jopt.run.compressed(predict or self.run.logits)), laid_out

        self.rows.add(about, measured)
        self._sides["float" if kind == "float" else f"{form}, {method}"] = side

    def measured(self) -> Measured:
        """Return all rows, and how to time their networks, whose trees are made again for that."""

        def times(repeats: int) -> Latencies:
            return self.run.latencies({name: side() for name, side in self._sides.items()}, repeats)

        def latencies(repeats: int) -> Latencies:
            known = set(self.rows.done.get("latency_ms", {}))
            if known != set(self._sides):  # other networks were timed together
                self.rows.done.pop("latency_ms", None)
            return self.rows.once("latency_ms", lambda: times(repeats))

        return Measured(self.rows.list(), latencies)


def _padding(tokens: _bert.Tokens) -> int:
    """Return the token that fills sentences up; -1 if none is."""
    filling = tokens.ids[~tokens.real]
    return int(filling[0]) if filling.size else -1
