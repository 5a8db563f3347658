"""Compiled training on data that stays on the device.

A step takes whole arrays and one batch of indices, so nothing but indices ever comes from Python:

    step = make_step(loss, optax.adam(1e-3))
    carry = start(params, tx, key)
    carry, losses = run_epoch(step, carry, images, labels, epoch_order(key, len(labels), 128))
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

Tree = Any
Loss = Callable[[Tree, Array, Array, Array, Tree], Array]
Apply = Callable[[Tree, Array], Array]


class Carry(NamedTuple):
    """All that a step changes."""

    params: Tree
    opt_state: Tree
    key: Array


class Step(Protocol):
    """One update on the examples that `index` names; returns the new carry and the loss."""

    def __call__(
        self, carry: Carry, images: Array, labels: Array, index: Array, extras: Tree
    ) -> tuple[Carry, Array]:
        """Update once."""
        ...


def normalize(images: Array) -> Array:
    """Turn uint8 pixels into float32 from 0 to 1; floats pass unchanged."""
    return images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images


def start(params: Tree, tx: optax.GradientTransformation, key: Array) -> Carry:
    """Return the first carry, with its own copy of params: a step gives its carry's memory away."""
    params = jax.tree.map(jnp.copy, params)
    return Carry(params, jax.jit(tx.init)(params), jnp.copy(key))


def whole(extras: Tree, index: Array) -> Tree:
    """Hand the extras to the loss as they are (a teacher's parameters, say)."""
    return extras


def rows(extras: Tree, index: Array) -> Tree:
    """Hand the loss the rows of the batch (a teacher's logits on all the examples, say)."""
    return jax.tree.map(lambda leaf: leaf[index], extras)


def unchanged(key: Array, images: Array) -> Array:
    """Return the images: no augmentation."""
    return images


def make_step(
    loss: Loss,
    tx: optax.GradientTransformation | Callable[[Tree], optax.GradientTransformation],
    *,
    augment: Callable[[Array, Array], Array] = unchanged,
    select: Callable[[Tree, Array], Tree] = whole,
) -> Step:
    """Return the compiled step of a loss and an optimizer.

    A step reuses the memory of the carry that it is given: do not touch that carry again.

    Args:
        loss: (params, images, labels, key, extras) -> scalar, with images already normalized.
        tx: the optimizer, whose update gets the parameters too; or a function of the extras to it,
            so that one compiled step serves all values of a setting.
        augment: (key, uint8 images of a batch) -> images.
        select: (extras, index) -> what the loss gets of them: `whole` or `rows`.
    """

    @partial(jax.jit, donate_argnums=0)
    def step(carry: Carry, images: Array, labels: Array, index: Array, extras: Tree):
        key, augment_key, loss_key = jax.random.split(carry.key, 3)
        batch = normalize(augment(augment_key, images[index]))
        value, gradients = jax.value_and_grad(loss)(
            carry.params, batch, labels[index], loss_key, select(extras, index)
        )
        own = tx(extras) if callable(tx) else tx
        updates, opt_state = own.update(gradients, carry.opt_state, carry.params)
        return Carry(optax.apply_updates(carry.params, updates), opt_state, key), value

    return step


def epoch_order(key: Array, count: int, batch: int) -> Array:
    """Return a random order as (steps, batch) indices; an incomplete last batch is left out."""
    steps = count // batch
    return jax.random.permutation(key, count)[: steps * batch].reshape(steps, batch)


def long_order(key: Array, count: int, batch: int, steps: int) -> Array:
    """Return (steps, batch) indices of as many random orders, one after the other, as that takes.

    Where one order ends and the next begins, a batch may hold an example twice.
    """
    passes = -(-steps * batch // count)
    keys = jax.random.split(key, passes)
    orders = jax.vmap(lambda key: jax.random.permutation(key, count))(keys)
    return orders.reshape(-1)[: steps * batch].reshape(steps, batch)


@partial(jax.jit, static_argnames="step", donate_argnames="carry")
def scan_steps(
    step: Step, carry: Carry, images: Array, labels: Array, order: Array, extras: Tree
) -> tuple[Carry, Array]:
    """Run all the steps in one compiled call."""
    return lax.scan(lambda carry, index: step(carry, images, labels, index, extras), carry, order)


def dispatch_steps(
    step: Step, carry: Carry, images: Array, labels: Array, order: Array, extras: Tree
) -> tuple[Carry, Array]:
    """Run the steps one call each, without waiting for any of them."""
    losses = []
    for index in order:
        carry, value = step(carry, images, labels, index, extras)
        losses.append(value)
    return carry, jnp.stack(losses)


def run_epoch(
    step: Step,
    carry: Carry,
    images: Array,
    labels: Array,
    order: Array,
    extras: Tree = None,
    loop: Callable[..., tuple[Carry, Array]] = scan_steps,
) -> tuple[Carry, Array]:
    """Run a step over an epoch; returns the carry and the loss of each step, still on the device.

    Args:
        step: from `make_step`.
        carry: from `start` or the epoch before; its memory is reused, so do not touch it again.
        images: all the examples, uint8 (examples, height, width, channel).
        labels: (examples,).
        order: (steps, batch) indices, from `epoch_order`.
        extras: any tree, passed to the loss through the step's `select`.
        loop: `scan_steps`, or `dispatch_steps` for a model that calls XLA's own convolution on a
            CPU, where it runs several times slower inside a loop. (The models of
            `experiments._models` do not: their convolutions are matrix products.)
    """
    return loop(step, carry, images, labels, order, extras)


def run_epochs(
    step: Step,
    carry: Carry,
    examples: tuple[Array, Array],
    batch: int,
    epochs: int,
    key: Array,
    extras: Tree = None,
    say: Callable[[int, Array], None] = lambda epoch, losses: None,
) -> Carry:
    """Run several epochs, each in a random order of its own.

    Args:
        step: from `make_step`.
        carry: from `start`; its memory is reused.
        examples: images and labels.
        batch: examples in a step; all of them if there are fewer.
        epochs: how many.
        key: of the orders; the epoch's number is folded in.
        extras: any tree, passed to the loss through the step's `select`.
        say: called after each epoch with its number, from 1, and its losses.
    """
    images, labels = examples
    batch = min(batch, len(labels))
    for epoch in range(epochs):
        order = epoch_order(jax.random.fold_in(key, epoch), len(labels), batch)
        carry, losses = run_epoch(step, carry, images, labels, order, extras)
        say(epoch + 1, losses)
    return carry


@partial(jax.jit, static_argnames=("apply", "batch"))
def count_correct(apply: Apply, params: Tree, images: Array, labels: Array, batch: int) -> Array:
    """Count the examples whose largest logit is the label's: an exact int32 scalar."""

    def correct(images: Array, labels: Array) -> Array:
        best = jnp.argmax(apply(params, normalize(images)), axis=-1)
        return jnp.sum(best == labels, dtype=jnp.int32)

    full = len(labels) // batch * batch
    split = (full // batch, batch)
    blocks = (
        images[:full].reshape(*split, *images.shape[1:]),
        labels[:full].reshape(split),
    )
    total = jnp.sum(lax.map(lambda block: correct(*block), blocks), dtype=jnp.int32)
    return total + correct(images[full:], labels[full:]) if full < len(labels) else total


def accuracy(apply: Apply, params: Tree, images: Array, labels: Array, batch: int = 500) -> float:
    """Return the fraction of examples classified rightly; it waits for the count.

    Args:
        apply: (params, normalized images) -> logits. Pass the same function each time, not a new
            lambda, or it is compiled anew.
        params: its parameters.
        images: uint8 (examples, height, width, channel).
        labels: (examples,).
        batch: how many examples are run at once.
    """
    correct = count_correct(apply, params, images, labels, min(batch, len(labels)))
    return int(correct) / len(labels)


def error_rate(apply: Apply, params: Tree, images: Array, labels: Array, batch: int = 500) -> float:
    """Return the fraction of examples classified wrongly; see `accuracy`."""
    correct = count_correct(apply, params, images, labels, min(batch, len(labels)))
    return (len(labels) - int(correct)) / len(labels)


def in_parts(apply: Callable[[Any], Array], images: Any, size: int = 1000) -> Array:
    """Apply to some images at a time, so that memory stays bounded, and join what comes."""
    return jnp.concatenate([apply(images[at : at + size]) for at in range(0, len(images), size)])


# --- Augmentation ---------------------------------------------------------------------------------


def random_shift(key: Array, images: Array, max_shift: int) -> Array:
    """Move each image by up to max_shift pixels along both axes; zeros come in at the edge.

    Args:
        key: random key.
        images: (batch, height, width, channel), any dtype.
        max_shift: whole pixels, 0 or more; each image draws its own two shifts evenly from
            -max_shift to max_shift.
    """
    margin = (max_shift, max_shift)
    padded = jnp.pad(images, ((0, 0), margin, margin, (0, 0)))
    offsets = jax.random.randint(key, (len(images), 2), 0, 2 * max_shift + 1)

    def crop(image: Array, offset: Array) -> Array:
        return lax.dynamic_slice(image, (offset[0], offset[1], 0), images.shape[1:])

    return jax.vmap(crop)(padded, offsets)


@contextmanager
def quick_compilation() -> Iterator[None]:
    """Compile without optimizing: a trial of a few steps does little else than compile."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
