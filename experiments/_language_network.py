"""Language models as the experiment trains and measures them."""

import dataclasses
import math
from collections.abc import Callable
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

import jopt
from experiments import _checkpoint, _decoder, _distill_training, _language, _parts
from jopt import distill

Tree = Any
Make = TypeVar("Make", bound=Callable[..., Any])
STARTS = 4  # each epoch cuts the text into windows at another place, of so many


@dataclasses.dataclass(frozen=True)
class Shape:
    """Widths of a decoder."""

    width: int = 256
    layers: int = 4
    heads: int = 4
    hidden: int = 1024


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides the outcome, written into the results."""

    dataset: str = "brown"
    seeds: tuple[int, ...] = (0, 1, 2)
    tokens: int = 2048
    length: int = 256
    teacher: Shape = Shape()
    student: Shape = Shape(128, 3, 4, 512)
    dropout: float = 0.1
    batch: int = 16
    epochs: int = 4
    rate: float = 1.5e-3
    weight_decay: float = 0.1


def shared(make: Make) -> Make:
    """Return the same for equal arguments: what was compiled for it serves again."""
    return lru_cache(make)  # pyright: ignore[reportReturnType]


@shared
def shared_decoder(settings: Settings, shape: Shape, vocabulary: int) -> _decoder.Decoder:
    """Return the module of a shape."""
    return _decoder.Decoder(
        vocabulary, settings.length, **dataclasses.asdict(shape), dropout=settings.dropout
    )


@shared
def logits_of(module: _decoder.Decoder) -> Callable[[Tree, Array], Array]:
    """Return `(params, ids) -> logits` of a module."""

    def logits(params: Tree, ids: Array) -> Array:
        return module.apply({"params": params}, ids)[0]  # pyright: ignore[reportReturnType]

    return logits


@partial(jax.jit, static_argnames="apply")
def surprise(apply: Callable[[Tree, Array], Array], params: Tree, rows: Array) -> Array:
    """Return the mean of -log p of the tokens that windows (windows, length + 1) predict.

    `params` may be compressed: they are restored once, inside.
    """
    params = jopt.materialize(params)

    def one(row: Array) -> Array:
        logits = apply(params, row[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, row[:, 1:]).mean()

    return lax.map(one, rows[:, None]).mean()


def perplexity(module: _decoder.Decoder, params: Tree, rows: Array) -> float:
    """Return the perplexity of a token, `exp` of the mean surprise."""
    return round(math.exp(float(surprise(logits_of(module), params, rows))), 4)


class Run:
    """The text of the experiment on the device, and the networks that are trained on it."""

    def __init__(self, settings: Settings, data: _language.Text, work: Path, say: Any) -> None:
        """Cut the text into windows."""
        self.settings, self.data, self.say = settings, data, say
        self.validation, self.test = (
            jnp.asarray(_language.windows(row, settings.length))
            for row in (data.validation, data.test)
        )
        about = dataclasses.asdict(settings) | {"seeds": None}
        self.work = work / _checkpoint.digest([jopt.__version__, about, data.source])

    def module(self, shape: Shape) -> _decoder.Decoder:
        """Return a decoder of a shape."""
        return shared_decoder(self.settings, shape, self.data.vocabulary)

    def initial(self, shape: Shape, seed: int) -> Tree:
        """Return fresh parameters."""
        ids = jnp.zeros((1, 8), jnp.int32)
        return jax.jit(self.module(shape).init)(jax.random.key(seed), ids)["params"]

    @cached_property
    def pool(self) -> _distill_training.Pool:
        """Return the training windows, cut at several places one after the other."""
        length = self.settings.length
        cuts = [
            _language.windows(self.data.train, length, number * length // STARTS)
            for number in range(STARTS)
        ]
        count = min(map(len, cuts))
        rows = jnp.asarray(np.concatenate([cut[:count] for cut in cuts]))
        return _distill_training.Pool(rows, jnp.zeros(len(rows), jnp.int32), count)

    def fit(self, epochs: int | None = None) -> _distill_training.Fit:
        """Return how networks are trained."""
        settings = self.settings
        epochs = settings.epochs if epochs is None else epochs
        return _distill_training.Fit(settings.batch, epochs, settings.rate, settings.weight_decay)

    def trained(self, shape: Shape, seed: int, stem: str) -> Tree:
        """Train a network on the text alone, or read it."""
        file = self.work / f"{stem}-{seed}.ckpt"
        loss = text_loss(self.module(shape))
        return self.fit().run(loss, self.initial(shape, seed), self.pool, seed, file, self.say)

    def teacher(self, seed: int) -> Tree:
        """Train the large network of a seed, or read it."""
        return self.trained(self.settings.teacher, seed, "teacher")

    def perplexities(self, shape: Shape, params: Tree) -> dict[str, float]:
        """Return validation and test perplexity of a token."""
        module = self.module(shape)
        return {
            "validation": perplexity(module, params, self.validation),
            "test": perplexity(module, params, self.test),
        }

    def bits_per_byte(self, perplexity: float) -> float:
        """Return what a perplexity of a test token is in bits for each byte of text."""
        tokens = len(self.data.test)
        return round(math.log2(perplexity) * tokens / self.data.test_bytes, 4)


@shared
def text_loss(module: _decoder.Decoder) -> _distill_training.Loss:
    """Return the mean surprise at the text, with dropout."""

    def loss(params: Tree, state: Tree, batch: _distill_training.Batch) -> tuple[Array, Tree]:
        logits, _ = training_logits(module, params, batch.images[:, :-1], batch.key)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.images[:, 1:])
        return losses.mean(), state

    return loss


def training_logits(
    module: _decoder.Decoder, params: Tree, ids: Array, key: Array
) -> tuple[Array, Any]:
    """Run with dropout."""
    rngs = {"dropout": key}
    return module.apply({"params": params}, ids, None, True, rngs=rngs)  # pyright: ignore


@shared
def taught_loss(
    student: _decoder.Decoder, teacher: _decoder.Decoder, weight: float
) -> _distill_training.Loss:
    """Return the surprise at the text mixed with the divergence from a teacher, word by word.

    The state is the teacher's parameters, which stay as they are.
    """

    def loss(params: Tree, state: Tree, batch: _distill_training.Batch) -> tuple[Array, Tree]:
        ids, words = batch.images[:, :-1], batch.images[:, 1:]
        own, _ = training_logits(student, params, ids, batch.key)
        hard = optax.softmax_cross_entropy_with_integer_labels(own, words).mean()
        soft = distill.word_level_loss(own, logits_of(teacher)(state, ids)).mean()
        return (1 - weight) * hard + weight * soft, state

    return loss


@shared
def on_policy_loss(
    student: _decoder.Decoder,
    teacher: _decoder.Decoder,
    prompt: int,
    count: int,
    fraction: float,
    divergence: Callable[..., Array],
) -> _distill_training.Loss:
    """Return GKD's loss: what the student itself says after a prompt is judged by the teacher.

    Args:
      student: that is trained.
      teacher: whose parameters are the state.
      prompt: tokens of text that are continued.
      count: tokens of a continuation.
      fraction: of sequences that are the student's own; the others are text.
      divergence: of the student's words from the teacher's.
    """

    def loss(params: Tree, state: Tree, batch: _distill_training.Batch) -> tuple[Array, Tree]:
        draw_key, mix_key, drop_key = jax.random.split(batch.key, 3)
        text = batch.images[:, : prompt + count]
        constant = lax.stop_gradient(params)
        said = _decoder.generate(
            student, constant, text[:, :prompt], count, draw_key, _decoder.drawn
        )
        own = jnp.concatenate([text[:, :prompt], said], 1)
        ids = distill.mix_on_policy(mix_key, fraction, text, own)[:, :-1]
        logits, _ = training_logits(student, params, ids, drop_key)
        counted = jnp.broadcast_to(jnp.arange(ids.shape[1]) >= prompt - 1, ids.shape)
        losses = distill.word_level_loss(
            logits, logits_of(teacher)(state, ids), counted, divergence=divergence
        )
        return losses.mean(), state

    return loss


def start(call: _parts.Call) -> tuple[Run, str]:
    """Load the text and make what both parts share: their networks lie in one folder."""
    settings = Settings(dataset=call.dataset or "brown", seeds=call.seeds)
    if call.head is not None:
        tiny = Shape(16, 1, 2, 16)
        settings = dataclasses.replace(
            settings, tokens=300, length=32, teacher=tiny, student=tiny, epochs=1
        )
    data = _language.load_or_exit(settings.dataset, settings.tokens, call.console.print)
    if call.head is not None:
        count = 40 * call.head
        parts = {part: getattr(data, part)[:count] for part in ("train", "validation", "test")}
        data = dataclasses.replace(data, tag=f"{data.tag}-head", **parts)
    tag = "" if data.tag == "brown" else data.tag
    return Run(settings, data, call.shared("networks"), call.console.print), tag


def about(data: _language.Text) -> dict[str, Any]:
    """Return what results say of the text."""
    return {"name": data.name, "source": data.source, "test_bytes": data.test_bytes}
