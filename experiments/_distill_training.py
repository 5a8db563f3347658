"""Training of students: what the teacher said of the images is read, never asked again.

A `Pool` holds copies of the training images, each mirrored and shifted at random once and for all,
with the teacher's outputs on each: so the teacher, many times the student's size, is paid for once
and not at every step of every student. The outputs are kept by `jopt.distill.cache_teacher`.
"""

import dataclasses
import time
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from experiments import _checkpoint, _data, _train, quantize_images
from jopt import distill

Tree = Any
SAVE_EVERY = 30.0  # seconds


@dataclasses.dataclass(frozen=True)
class Pool:
    """Training images and what a teacher says of them.

    Attributes:
      images: uint8, (copies * count, height, width, channel); the first copy is the plain images.
      labels: int32, (copies * count,); -1 where nobody knows.
      count: examples in one copy.
      teacher: a tree of the teacher's outputs with a row for each image, or None.
    """

    images: Array
    labels: Array
    count: int
    teacher: Tree = None

    @property
    def copies(self) -> int:
        """Return how many copies there are."""
        return len(self.labels) // self.count


def make_pool(data: _data.Dataset, copies: int, max_shift: int) -> Pool:
    """Copy the training images, all but the first time mirrored and shifted at random."""
    first = jnp.asarray(data.train[0])
    change = jax.jit(quantize_images.augment(max_shift))
    changed = [change(jax.random.key(1000 + copy), first) for copy in range(1, copies)]
    labels = jnp.tile(jnp.asarray(data.train[1]), copies)
    return Pool(jnp.concatenate([first, *changed]), labels, len(first))


def ask(pool: Pool, apply: Callable[[Tree, Array], Tree], params: Tree, folder: Path) -> Pool:
    """Return the pool with a teacher's outputs, which are read if it was asked before."""

    def normalized(params: Tree, images: Array) -> Tree:
        return apply(params, _train.normalize(images))

    chunk = min(1000, len(pool.labels))
    cache = distill.cache_teacher(folder, normalized, params, np.asarray(pool.images), chunk)
    return dataclasses.replace(pool, teacher=jax.tree.map(jnp.asarray, cache.outputs))


def labelled(pool: Pool, fraction: float, batch: int, seed: int) -> Array:
    """Return the places of the examples with labels where these are few, a batch at least."""
    key = jax.random.fold_in(jax.random.key(seed), 11)
    return jax.random.permutation(key, pool.count)[: max(batch, round(fraction * pool.count))]


def without_labels(pool: Pool, known: Array) -> Pool:
    """Return the pool without the labels of all other examples than these."""
    some = jnp.zeros(pool.count, bool).at[known].set(True)
    labels = jnp.where(jnp.tile(some, pool.copies), pool.labels, -1)
    return dataclasses.replace(pool, labels=labels)


class Batch(NamedTuple):
    """What a loss sees.

    Attributes:
      images: normalized, (batch, height, width, channel).
      labels: (batch,).
      teacher: rows of the pool's outputs.
      examples: which training examples these are, (batch,).
      key: random key of the step.
    """

    images: Array
    labels: Array
    teacher: Tree
    examples: Array
    key: Array


class Carry(NamedTuple):
    """All that a step changes: `state` is what a loss remembers, without gradients."""

    params: Tree
    opt_state: Tree
    key: Array
    state: Tree


Loss = Callable[[Tree, Tree, Batch], tuple[Array, Tree]]


# What is compiled for one seed serves the others: the same functions give the same step.
_optimizer = lru_cache(quantize_images.optimizer)


@lru_cache(64)
def _step(
    loss: Loss, tx: optax.GradientTransformation, count: int, augment: Any
) -> Callable[..., tuple[Carry, Array]]:
    @partial(jax.jit, donate_argnums=0)
    def step(carry: Carry, images: Array, labels: Array, index: Array, teacher: Tree):
        key, loss_key, augment_key = jax.random.split(carry.key, 3)
        batch = Batch(
            _train.normalize(augment(augment_key, images[index])),
            labels[index],
            _train.rows(teacher, index),
            index % count,
            loss_key,
        )
        (value, state), gradients = jax.value_and_grad(loss, has_aux=True)(
            carry.params, carry.state, batch
        )
        updates, opt_state = tx.update(gradients, carry.opt_state, carry.params)
        params = optax.apply_updates(carry.params, updates)
        return Carry(params, opt_state, key, state), value

    return step


def order(key: Array, examples: Array, pool: Pool, first: int, steps: int, batch: int) -> Array:
    """Return the (steps, batch) places of an epoch, on the copy of a number.

    Fewer examples than that are gone through again, in another order and on the next copy.
    """
    found, passed, needed = [], 0, steps * batch
    while passed * len(examples) < needed:
        copy = (first + passed) % pool.copies
        shuffled = jax.random.permutation(jax.random.fold_in(key, passed), examples)
        found.append(shuffled + copy * pool.count)
        passed += 1
    return jnp.concatenate(found)[:needed].reshape(steps, batch)


@dataclasses.dataclass(frozen=True)
class Fit:
    """How a network is trained.

    Attributes:
      batch: examples in a step.
      epochs: passes over as many examples as the training images are.
      rate: AdamW's learning rate: a warm-up, then a cosine to a hundredth.
      weight_decay: of kernels, times the learning rate.
      augment: `(key, uint8 images) -> images` at every step: for a teacher only.
      loop: runs the steps of an epoch, as `_train.scan_steps` does.
      plain_last: whether the copies of the pool are gone through backwards, so that the last epoch
        is on the first copy, which is the plain examples.
    """

    batch: int
    epochs: int
    rate: float
    weight_decay: float
    augment: Callable[[Array, Array], Array] = _train.unchanged
    loop: Callable[..., tuple[Any, Array]] = _train.scan_steps
    plain_last: bool = False

    def run(
        self,
        loss: Loss,
        params: Tree,
        pool: Pool,
        seed: int,
        file: Path,
        say: Callable[[str], Any],
        *,
        state: Tree = (),
        examples: Array | None = None,
        tx: optax.GradientTransformation | None = None,
    ) -> Tree:
        """Train, or go on from the checkpoint, or read what is finished.

        Args:
          loss: `(params, state, batch) -> (scalar, new state)`.
          params: whatever is trained.
          pool: of images.
          seed: of the order.
          file: of the checkpoint.
          say: told of each epoch.
          state: what the loss remembers at first.
          examples: places of the training examples that are used; None for all.
          tx: another optimizer than AdamW.
        """
        steps = max(1, pool.count // self.batch)
        if tx is None:
            tx = _optimizer(self.rate, steps * self.epochs, self.weight_decay)
        key = jax.random.fold_in(jax.random.key(seed), 7)
        params, state = jax.tree.map(jnp.copy, (params, state))  # their memory is given away
        fresh = Carry(params, jax.jit(tx.init)(params), jnp.copy(key), state)
        carry, done = _checkpoint.restore(file, (fresh, np.int32(0))) or (fresh, np.int32(0))
        if int(done) >= self.epochs:
            return carry.params
        step = _step(loss, tx, pool.count, self.augment)
        examples = jnp.arange(pool.count) if examples is None else examples
        saved = began = time.monotonic()
        for epoch in range(int(done), self.epochs):
            first = self.epochs - 1 - epoch if self.plain_last else epoch
            places = order(jax.random.fold_in(key, epoch), examples, pool, first, steps, self.batch)
            carry, losses = self.loop(step, carry, pool.images, pool.labels, places, pool.teacher)
            mean = float(losses.mean())
            if epoch + 1 == self.epochs or time.monotonic() - saved > SAVE_EVERY:
                saved = time.monotonic()
                _checkpoint.save(file, (carry, np.int32(epoch + 1)))
                spent = saved - began
                say(f"{file.stem}: epoch {epoch + 1}, loss {mean:.4f}, {spent:.0f} s")
        return carry.params
