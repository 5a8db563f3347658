"""Sparse evolutionary training: drop the smallest weights, grow others at random."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jopt._trees import flatten_with_paths
from jopt.prune._ranking import among, exchange, is_trainable_mask, part_of
from jopt.prune._sparse_training import SparseChange, SparseRule, SparseStep, regularly
from jopt.prune._threshold import keep_largest
from jopt.prune._transforms import check_every


def _of_largest(weights: jax.Array, among_them: jax.Array, fraction: float) -> jax.Array:
    number = among_them.sum(dtype=jnp.int32)
    keep = number - part_of(number, fraction)
    return keep_largest(among(among_them, jnp.abs(weights)), keep) & among_them


def _evolve(
    key: jax.Array, weights: jax.Array, mask: jax.Array, fraction: float
) -> tuple[jax.Array, jax.Array]:
    """Return the new mask of a layer, and the weights that it grew."""
    kept = _of_largest(weights, mask & (weights >= 0), fraction) | _of_largest(
        weights, mask & (weights < 0), fraction
    )
    number = mask.sum(dtype=jnp.int32) - kept.sum(dtype=jnp.int32)
    return exchange(kept, jax.random.uniform(key, weights.shape), number)


def set_rule(
    key: jax.Array,
    masks: Any,
    every: int,
    fraction: float = 0.3,
    initializer: Callable[..., jax.Array] | None = None,
    end: int | None = None,
) -> SparseRule:
    """Let the connections of every layer evolve: sparse evolutionary training (SET).

    At updates `every`, 2 `every`, ... the step is taken; then each layer loses the fraction
    `fraction` of its smallest positive weights and the same of its largest negative ones (both
    rounded down), and grows as many at random among all that are then absent, the ones just lost
    too. Its density never changes. Grown weights start at small random numbers and without moments.

    The masks at the start are sparse random ones (Erdos-Renyi in the paper). Only full-shape masks
    of floating leaves evolve; scalar and per-channel ones stay as they are. To train with fixed
    masks, use `keep_masked`.

    Args:
      key: a key from `jax.random.key`; update number t uses `fold_in(key, t)`.
      masks: at the start, a tree of booleans like the parameters.
      every: updates between two changes, at least 1; the paper's is an epoch.
      fraction: zeta, the part of the weights to replace, 0 to 1.
      initializer: `(key, shape, dtype)` to the values of grown weights; by default
        `jax.nn.initializers.normal(0.1)`. The paper says only that new weights are random.
      end: updates after which the masks stay, at least 1; None: they never do, and a network whose
        training ends soon after a change has new weights that have learned nothing yet. (The paper
        grows none after the last epoch.)

    Returns:
      A rule for `sparse_training`.

    Raises:
      ValueError: `every` or `end` is below 1, or `fraction` outside [0, 1].

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jopt.prune import current_masks, sparse_training
      >>> params = {"w": jnp.array([3.0, -0.1, 0.0, -2.0, 0.2])}
      >>> rule = set_rule(jax.random.key(0), {"w": params["w"] != 0}, every=1, fraction=0.5)
      >>> tx = sparse_training(optax.sgd(0.1), rule)
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, state = tx.update({"w": jnp.zeros(5)}, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> int(current_masks(state)["w"].sum()), params["w"][0].item(), params["w"][3].item()
      (4, 3.0, -2.0)

    References:
      Mocanu et al., "Scalable Training of Artificial Neural Networks with Adaptive Sparse
      Connectivity Inspired by Network Science", 2018, https://arxiv.org/abs/1707.04780,
      algorithm 1.
    """
    check_every(every)
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction must lie in [0, 1], not {fraction!r}.")
    if end is not None and end < 1:
        raise ValueError(f"end must be None or a number of updates, at least 1, not {end!r}.")
    draw = jax.nn.initializers.normal(0.1) if initializer is None else initializer

    def grow(key: jax.Array, weights: Any, mask: Any, param: Any, update: Any) -> Any:
        if not is_trainable_mask(weights, mask):
            return mask, jnp.zeros_like(mask), update
        places, values = jax.random.split(key)
        new, grown = _evolve(places, weights, mask, fraction)
        wide = jnp.promote_types(update.dtype, param.dtype)
        start = draw(values, param.shape, param.dtype).astype(wide) - param.astype(wide)
        return new, grown, jnp.where(grown, start.astype(update.dtype), update)

    def change(state: Any, step: SparseStep) -> tuple[SparseChange, Any]:
        after = optax.apply_updates(step.params, step.updates)
        _, weights, treedef = flatten_with_paths(after)
        trees = (step.masks, step.params, step.updates)
        leaves = zip(weights, *(treedef.flatten_up_to(tree) for tree in trees), strict=True)
        now = jax.random.fold_in(key, step.count)
        done = [grow(jax.random.fold_in(now, i), *each) for i, each in enumerate(leaves)]
        new, grown, updates = (
            jax.tree.unflatten(treedef, list(part)) for part in zip(*done, strict=True)
        )
        return SparseChange(new, grown, updates, step.inner), state

    return SparseRule(
        init=lambda params: (jax.tree.map(jnp.asarray, masks), ()),
        observe=lambda state, params, gradients: state,
        due=regularly(every, end),
        change=change,
    )
