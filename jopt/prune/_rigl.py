"""RigL: drop the smallest weights, grow those with the largest gradients."""

from typing import Any

import jax
import jax.numpy as jnp

from jopt._trees import flatten_with_paths
from jopt.prune._ranking import among, exchange, is_trainable_mask, part_of
from jopt.prune._sparse_training import SparseChange, SparseRule, SparseStep, regularly
from jopt.prune._threshold import keep_largest
from jopt.prune._transforms import check_every


def _rewire(
    weights: jax.Array, mask: jax.Array, gradients: jax.Array, fraction: jax.Array
) -> jax.Array:
    active = mask.sum(dtype=jnp.int32)
    dropped = part_of(active, fraction)
    kept = keep_largest(among(mask, jnp.abs(weights)), active - dropped) & mask
    return exchange(kept, jnp.abs(gradients), dropped)[0]


def rigl(masks: Any, end: int, every: int = 100, fraction: float = 0.3) -> SparseRule:
    """Move the connections of every layer to where the gradient is largest: RigL.

    At updates `every`, 2 `every`, ... before `end`, and in place of a step, each layer of n weights
    drops the `floor(n f(t))` of smallest magnitude, with
    `f(t) = fraction / 2 (1 + cos(pi t / end))`, and grows as many where `|dL/dW|` is largest among
    those that are not kept. Its density never changes. Grown weights start at zero without moments;
    one that is dropped and at once grown again keeps its value and its moments, as in the authors'
    code (in the paper's algorithm it starts at zero).

    Gradients must be dense. They are if the loss is taken at parameters which hold zeros, not
    multiplied by masks: `jax.grad(loss)(params)`. With data in parallel, average them first.

    Only full-shape masks of floating leaves move; scalar and per-channel ones stay as they are. A
    layer's masks at the start are random, of the density that it shall have.

    Args:
      masks: at the start, a tree of booleans like the parameters.
      end: updates after which masks stay, at least 1; in the paper three quarters of the training.
      every: updates between two changes, at least 1.
      fraction: alpha, the part of the weights to replace at first, 0 to 1.

    Returns:
      A rule for `sparse_training`.

    Raises:
      ValueError: `every` or `end` is below 1, or `fraction` outside [0, 1].

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jopt.prune import sparse_training
      >>> params = {"w": jnp.array([3.0, 0.1, 0.0, 0.0])}
      >>> tx = sparse_training(optax.sgd(1.0), rigl({"w": params["w"] != 0}, 100, 1, 0.6))
      >>> gradients, state = {"w": jnp.array([0.0, 0.0, 1.0, -2.0])}, tx.init(params)
      >>> for _ in range(2):  # a step, then a change: 0.1 goes, the gradient -2 comes
      ...     updates, state = tx.update(gradients, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> state.masks["w"].tolist(), params["w"].tolist()
      ([True, False, False, True], [3.0, 0.0, 0.0, 0.0])

    References:
      Evci et al., "Rigging the Lottery: Making All Tickets Winners", 2020,
      https://arxiv.org/abs/1911.11134, algorithm 1.
    """
    check_every(every)
    if end < 1:
        raise ValueError(f"end must be a number of updates, at least 1, not {end!r}.")
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction must lie in [0, 1], not {fraction!r}.")

    def change(state: Any, step: SparseStep) -> tuple[SparseChange, Any]:
        angle = jnp.pi / end * step.count.astype(jnp.float32)
        level = 0.5 * fraction * (1 + jnp.cos(angle))

        def rewire(weights: Any, mask: Any, gradients: Any) -> Any:
            trainable = is_trainable_mask(weights, mask)
            return _rewire(weights, mask, gradients, level) if trainable else mask

        _, weights, treedef = flatten_with_paths(step.params)
        leaves = zip(
            weights,
            treedef.flatten_up_to(step.masks),
            treedef.flatten_up_to(step.gradients),
            strict=True,
        )
        new = jax.tree.unflatten(treedef, [rewire(*each) for each in leaves])
        grown = jax.tree.map(lambda now, before: now & ~before, new, step.masks)
        still = jax.tree.map(jnp.zeros_like, step.updates)
        return SparseChange(new, grown, still, step.inner_before), state

    return SparseRule(
        init=lambda params: (jax.tree.map(jnp.asarray, masks), ()),
        observe=lambda state, params, gradients: state,
        due=regularly(every, end),
        change=change,
    )
