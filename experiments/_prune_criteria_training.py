"""Trainings of the criteria: dense, with masks held, while weights go, or sparse from the start."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

import jopt
from experiments import _checkpoint, _cnn, _convolution, _data, _models, _train
from jopt import prune

Tree = Any
LEVELS = (0.8, 0.9, 0.95, 0.98, 0.99)
CHUNK = 60  # steps in a compiled call
EXAMPLES = 1024  # training images that scores and statistics are taken from
SCORE_RATE = 1e-2  # Adam's, of the scores of movement pruning, as in the paper


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides the outcome, written into the results."""

    seeds: tuple[int, ...] = (0, 1, 2)
    levels: tuple[float, ...] = LEVELS
    batch: int = 32
    dense_steps: int = 1200
    after_steps: int = 600  # of pruning and fine-tuning
    rate: float = 2e-3
    tuning_rate: float = 2e-3
    prune_every: int = 10
    rewire_every: int = 50


@dataclasses.dataclass(frozen=True)
class Network:
    """A network as this part needs it.

    Attributes:
      name: of its rows.
      dataset: that it is trained on.
      initial: key to fresh parameters.
      logits: `(params, images) -> logits` in training.
      visible: the same function with XLA's convolutions, whose kernels `calibrate` sees.
      steady: `(params, images or None) -> apply` with each example for itself: batch norms use the
        averages of these images, or do nothing.
      errors: `(params, estimation images, parts) -> error rates` of parts (images, labels).
    """

    name: str
    dataset: str
    initial: Callable[[Array], Tree]
    logits: Callable[[Tree, Array], Array]
    visible: Callable[[Tree, Array], Array]
    steady: Callable[[Tree, Array | None], Callable[[Tree, Array], Array]]
    errors: Callable[[Tree, Array, Sequence[Any]], list[float]]


_lenet = _models.LeNet5()
_direct = _models.LeNet5(conv_pool=_convolution.conv_pool_direct)


def _lenet_logits(params: Tree, images: Array) -> Array:
    return _lenet.apply({"params": params}, images)  # pyright: ignore[reportReturnType]


def _lenet_visible(params: Tree, images: Array) -> Array:
    return _direct.apply({"params": params}, images)  # pyright: ignore[reportReturnType]


def _cnn_visible(params: Tree, images: Array) -> Array:
    return _cnn.training_logits(params, images, network=_cnn.traced_normed)


def _cnn_steady(params: Tree, images: Array | None) -> Callable[[Tree, Array], Array]:
    averages = _cnn.fresh_averages(params)
    if images is not None:
        averages = _cnn.estimate(params, _models.unchanged_inputs, images)

    def apply(params: Tree, images: Array) -> Array:
        variables = {"params": params, "batch_stats": averages}
        return _cnn.traced_normed.apply(variables, images, False)  # pyright: ignore[reportReturnType]

    return apply


def _lenet_errors(params: Tree, images: Array, parts: Sequence[Any]) -> list[float]:
    return [_train.error_rate(_lenet_logits, params, *part) for part in parts]


def _cnn_errors(params: Tree, images: Array, parts: Sequence[Any]) -> list[float]:
    averages = _cnn.estimate(params, _models.unchanged_inputs, _train.normalize(images))
    folded = {"params": _cnn.fold(params, averages), "inputs": {}}
    return [_cnn.error(folded, part) for part in parts]


NETWORKS = {
    "lenet5": Network(
        "lenet5",
        "mnist",
        lambda key: jax.jit(_lenet.init)(key, jnp.zeros((1, *_cnn.SHAPE)))["params"],
        _lenet_logits,
        _lenet_visible,
        lambda params, images: _lenet_visible,
        _lenet_errors,
    ),
    "cnn": Network(
        "cnn",
        "fashion_mnist",
        lambda key: _cnn.initial(key)[0],
        _cnn.training_logits,
        _cnn_visible,
        _cnn_steady,
        _cnn_errors,
    ),
}


class Run:
    """One network: its data, its compiled steps, its finished rows."""

    def __init__(
        self, network: Network, data: _data.Dataset, settings: Settings, work: Path, say: Any
    ) -> None:
        """Put the data on the device."""
        self.network, self.settings, self.say = network, settings, say
        self.train, self.validation, self.test = (
            (jnp.asarray(images), jnp.asarray(labels))
            for images, labels in (data.train, data.validation, data.test)
        )
        about = dataclasses.asdict(settings) | {"seeds": None, "levels": None}
        about = [jopt.__version__, about, data.source, len(data.train[1])]
        self.work = work / f"{network.name}-{_checkpoint.digest(about)}"
        self.steps: dict[Any, _train.Step] = {}

    def loss(self, params: Tree, images: Array, labels: Array, *unused: Any) -> Array:
        """Return the mean cross-entropy."""
        logits = self.network.logits(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def visible_loss(
        self, params: Tree, images: Array, labels: Array, temperature: float = 1.0
    ) -> Array:
        """Return the same with convolutions that scores may differentiate twice."""
        logits = self.network.visible(params, images) / temperature
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def adam(self, rate: float, steps: int) -> optax.GradientTransformation:
        """Return Adam with a short warm-up and a cosine to a hundredth of the rate."""
        warm = min(200, max(1, steps // 10))
        return optax.adam(
            optax.warmup_cosine_decay_schedule(rate / 20, rate, warm, steps, rate / 100)
        )

    def fit(
        self, name: str, tx: Any, params: Tree, steps: int, seed: int, at: int, level: Any = None
    ) -> Tree:
        """Train for some steps; a step of one name is compiled once, for all levels."""
        step = self.steps.setdefault(name, _train.make_step(self.loss, tx))
        key = jax.random.fold_in(jax.random.key(seed), at)
        own: Any = tx(level) if callable(tx) else tx
        carry = _train.start(params, own, key)
        for some in self.batches(key, steps, CHUNK):
            carry, _ = _train.run_epoch(step, carry, *self.train, some, level)
        return carry.params

    def batches(self, key: Array, steps: int, each: int) -> list[Array]:
        """Return the indices of some steps, cut into pieces of a few."""
        order = _train.long_order(key, len(self.train[1]), self.settings.batch, steps)
        return [order[at : at + each] for at in range(0, steps, each)]

    def dense(self, seed: int) -> Tree:
        """Train the dense network of a seed, or read it."""
        params = self.network.initial(jax.random.key(seed))
        file = self.work / f"dense-{seed}.ckpt"
        restored = _checkpoint.restore(file, params)
        if restored is not None:
            return restored
        steps = self.settings.dense_steps
        params = self.fit("dense", self.adam(self.settings.rate, steps), params, steps, seed, 1)
        _checkpoint.save(file, params)
        return params

    def held(self, masks: Tree, params: Tree, seed: int) -> Tree:
        """Fine-tune with the masks held."""
        steps = self.settings.after_steps
        tx = optax.chain(self.adam(self.settings.tuning_rate, steps), prune.keep_masked(masks))
        return self.fit("held", tx, prune.apply_masks(params, masks), steps, seed, 2)

    def gradually(self, name: str, criterion: Any, level: float, params: Tree, seed: int) -> Tree:
        """Remove weights over half of the steps after the dense training."""
        steps = self.settings.after_steps
        rising = prune.cubic_schedule(1.0, 0, steps // 2)

        def tx(level: Array) -> optax.GradientTransformation:
            rule = prune.gradual(
                lambda count: level * rising(count), self.settings.prune_every, criterion
            )
            return prune.sparse_training(self.adam(self.settings.tuning_rate, steps), rule)

        return self.fit(name, tx, params, steps, seed, 2, jnp.float32(level))

    def moved(self, level: float, params: Tree, seed: int) -> Tree:
        """Remove as `gradually` does, by scores that are trained along: weights may come back."""
        steps, every = self.settings.after_steps, self.settings.prune_every
        schedule = prune.cubic_schedule(level, 0, steps // 2)

        def loss(both: Tree, images: Array, labels: Array, key: Array, level: Array) -> Array:
            params, scores = both
            return self.loss(
                prune.movement_params(params, scores, level, prune.global_topk_masks),
                images,
                labels,
            )

        rates: dict[Any, optax.GradientTransformation] = {
            "params": self.adam(self.settings.tuning_rate, steps),
            "scores": optax.adam(SCORE_RATE),
        }
        tx = optax.multi_transform(rates, ("params", "scores"))
        step = self.steps.setdefault("moved", _train.make_step(loss, tx))
        key = jax.random.fold_in(jax.random.key(seed), 2)
        carry = _train.start((params, jax.tree.map(jnp.zeros_like, params)), tx, key)
        for n, some in enumerate(self.batches(key, steps, every)):
            now = jnp.float32(schedule(n * every))
            carry, _ = _train.run_epoch(step, carry, *self.train, some, now)
        params, scores = carry.params
        return prune.apply_masks(params, prune.global_topk_masks(scores, level))

    @property
    def all_steps(self) -> int:
        """Return the steps of a network that is sparse from the start."""
        return self.settings.dense_steps + self.settings.after_steps

    def from_scratch(self, name: str, tx: Any, params: Tree, seed: int) -> Tree:
        """Train a network that is sparse from the start."""
        return self.fit(name, tx, params, self.all_steps, seed, 1)

    def examples(self) -> tuple[Array, Array]:
        """Return the images, normalized, and labels that scores are taken from."""
        images, labels = self.train
        return _train.normalize(images[:EXAMPLES]), labels[:EXAMPLES]
