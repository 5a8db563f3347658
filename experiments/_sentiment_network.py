"""A BERT that tells good sentences from bad ones: fine-tuned, scored and timed."""

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import jopt
from experiments import _bert, _checkpoint, _distill_training, _sentences, _text, _timing
from experiments._text_models import SentenceFeatures

Tree = Any
KERNELS = "encoder/layer.*/kernel"
TABLES = "encoder/(words|places)/embedding"


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
        self.work = work / _checkpoint.digest([*about, len(texts.train[1]), str(self.bert.model)])
        self.padding = _padding(self.tokens["train"])
        self.pool = _distill_training.Pool(
            jnp.asarray(self.tokens["train"].ids),
            jnp.asarray(texts.train[1]),
            len(texts.train[1]),
        )
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

    def training(self, params: Tree, ids: Array, key: Array) -> SentenceFeatures:
        """Run with dropout."""
        rngs = {"dropout": key}
        real = ids != self.padding
        return self.module.apply({"params": params}, ids, real, None, True, rngs=rngs)  # pyright: ignore

    def teacher(self, seed: int) -> Tree:
        """Fine-tune the classifier of a seed, or read it."""
        settings = self.settings

        def loss(params: Tree, state: Tree, batch: _distill_training.Batch) -> tuple[Array, Tree]:
            logits = self.training(params, batch.images, batch.key).logits
            found = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
            return found.mean(), state

        start = _bert.classifier_params(jax.random.key(seed), self.module, self.bert.params)
        fit = _distill_training.Fit(
            settings.batch, settings.epochs, settings.rate, settings.weight_decay
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

    def full_rows(self, seed: int) -> list[np.ndarray]:
        """Return training sentences without filling, drawn by a seed, for calibration."""
        length, count = self.settings.calibration_length, self.settings.calibration
        return _sentences.drawn_rows(self.tokenizer, self.texts, seed, length, count)

    def latencies(self, params: Tree, predict: Any = None, repeats: int = 20) -> dict[str, float]:
        """Time one sentence and 64 of 32 tokens, in milliseconds."""
        sides = {}
        for count in (1, 64):
            ids = np.resize(self.tokens["test"].ids, (count, min(32, self.settings.length)))
            real = np.ones(ids.shape, bool)
            sides[str(count)] = partial(predict or self.predict, params, ids, real)
        rows = _timing.interleaved(sides, repeats)
        return {count: round(1e3 * row["median_s"], 4) for count, row in rows.items()}


def _padding(tokens: _bert.Tokens) -> int:
    """Return the token that fills sentences up; -1 if none is."""
    filling = tokens.ids[~tokens.real]
    return int(filling[0]) if filling.size else -1
