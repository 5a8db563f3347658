"""The stages of compressing an image classifier: one loop that trains, shows progress and resumes.

Every stage after the teacher learns from a `Pool`: copies of the training images, shifted at random
once and for all, with the teacher's logits on each. Augmentation and teacher are then paid for once
and not at every step of every network.
"""

import dataclasses
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from rich.progress import Progress

from experiments import _checkpoint, _train
from jopt import distill

Tree = Any
View = Callable[[Tree], Tree]
SAVE_EVERY = 10.0  # seconds


@dataclasses.dataclass(frozen=True)
class Pool:
    """Training images and what the teacher says of them.

    Attributes:
      images: uint8, (copies * count, height, width, channel); the first copy is the plain images.
      labels: int32, (copies * count,).
      logits: the teacher's, (copies * count, classes), or None before there is a teacher.
      count: examples in one copy: an epoch visits one copy.
    """

    images: Array
    labels: Array
    logits: Array | None
    count: int

    @property
    def copies(self) -> int:
        """Return how many copies there are."""
        return len(self.labels) // self.count


def make_pool(
    key: Array,
    images: np.ndarray,
    labels: np.ndarray,
    apply: _train.Apply,
    params: Tree,
    copies: int,
    max_shift: int,
) -> Pool:
    """Shift the images `copies - 1` times, each anew, and ask the teacher about all of them."""
    first = jnp.asarray(images)
    shift = jax.jit(lambda key: _train.random_shift(key, first, max_shift))
    keys = jax.random.split(key, max(copies - 1, 1))[: copies - 1]
    every = jnp.concatenate([first, *map(shift, keys)])
    forward = jax.jit(lambda params, part: apply(params, _train.normalize(part)))
    logits = _train.in_parts(partial(forward, params), every)
    return Pool(every, jnp.tile(jnp.asarray(labels), copies), logits, len(labels))


def hard_loss(apply: _train.Apply) -> _train.Loss:
    """Return the plain cross-entropy with the labels."""

    def loss(params: Tree, images: Array, labels: Array, key: Array, extras: Tree) -> Array:
        logits = apply(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss


def distilled_loss(
    apply: _train.Apply, view: View, temperature: float, soft_weight: float
) -> _train.Loss:
    """Return the loss against teacher and labels of the network as `view` lets it be seen.

    `view` is the identity, or the rounding of parameters when they are trained through it.
    """

    def loss(params: Tree, images: Array, labels: Array, key: Array, extras: Tree) -> Array:
        logits = apply(view(params), images)
        return distill.distillation_loss(logits, extras, labels, temperature, soft_weight).mean()

    return loss


@dataclasses.dataclass
class Trainer:
    """Where stages keep their checkpoints, what they are checked on, and where progress is shown.

    Attributes:
      folder: of the checkpoints.
      key: random key of the whole run; stage and epoch are folded in.
      validation: images and labels, on the device.
      progress: a bar for each stage.
      batch: examples in a step.
      history: validation error after each epoch, by stage.
      seconds: time spent in each stage, before and after it was resumed.
    """

    folder: Path
    key: Array
    validation: tuple[Array, Array]
    progress: Progress
    batch: int = 128
    history: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    def train(
        self,
        stage: str,
        params: Tree,
        tx: optax.GradientTransformation,
        loss: _train.Loss,
        pool: Pool,
        epochs: int,
        check: Callable[[Tree, Array, Array], float],
        augment: Callable[[Array, Array], Array] = _train.unchanged,
    ) -> _train.Carry:
        """Train for some epochs; go on from the checkpoint if the stage was begun before.

        The order of an epoch depends on the key, the stage and the epoch alone, so a run that was
        killed and resumed ends where an unbroken one does.
        """
        began = time.monotonic()
        select = _train.whole if pool.logits is None else _train.rows
        step = _train.make_step(loss, tx, augment=augment, select=select)
        key = jax.random.fold_in(self.key, zlib.crc32(stage.encode()))
        carry = _train.start(params, tx, key)
        file = self.folder / f"{stage.replace(' ', '-')}.ckpt"
        nothing, zero = np.full(epochs, np.nan, np.float32), np.zeros((), np.float32)
        fresh = (carry, np.zeros((), np.int32), nothing, zero)
        carry, done, errors, spent = _checkpoint.restore(file, fresh) or fresh
        errors = np.array(errors)
        bar = self.progress.add_task(stage, total=epochs, completed=int(done), note="")
        saved = time.monotonic()
        for epoch in range(int(done), epochs):
            order_key = jax.random.fold_in(key, epoch)
            order = _train.epoch_order(order_key, pool.count, min(self.batch, pool.count))
            order = order + pool.count * (epoch % pool.copies)
            carry, losses = _train.run_epoch(
                step, carry, pool.images, pool.labels, order, pool.logits
            )
            errors[epoch] = check(carry.params, *self.validation)
            note = f"loss {float(losses.mean()):.3f}  validation error {errors[epoch]:.2%}"
            self.progress.update(bar, advance=1, note=note)
            if epoch + 1 == epochs or time.monotonic() - saved > SAVE_EVERY:
                saved = time.monotonic()
                seconds = np.float32(float(spent) + saved - began)
                _checkpoint.save(file, (carry, np.int32(epoch + 1), errors, seconds))
        self.progress.update(bar, note=f"validation error {errors[-1]:.2%}")
        self.history[stage] = [round(float(error), 6) for error in errors]
        self.seconds[stage] = round(float(spent) + time.monotonic() - began, 1)
        return carry
