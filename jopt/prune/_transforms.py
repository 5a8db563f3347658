"""Optax transforms that keep pruned weights at zero, and that prune while training.

Both come last in `optax.chain`: they rewrite the finished update, so that whatever momentum, weight
decay or clipping did before, `optax.apply_updates` lands on an exact zero. The masks live in the
optimizer's state: they are arguments of the compiled step and not constants in it, and they are
saved and restored with it. They see no state but their own, so the moments of removed weights go on
unused beside them: where these must be forgotten, since weights grow again or the state is kept
small, wrap the optimizer in `sparse_training`, or call `clear_moments`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jopt._arrays import known_values
from jopt.prune._masks import apply_masks, global_topk_masks, masks_like
from jopt.prune._scores import magnitude_scores

_LATE = (10**8, 10**9)  # updates after which a schedule that settles has settled


class KeepMaskedState(NamedTuple):
    """State of `keep_masked`: the masks, True keeps."""

    masks: Any


class PruneGraduallyState(NamedTuple):
    """State of `prune_gradually`: updates seen so far, and the masks, True keeps."""

    count: jax.Array
    masks: Any


def need_params(params: Any, name: str) -> None:
    """Raise if a transform was called without parameters.

    Example:
      >>> need_params({}, "keep_masked")
    """
    if params is None:
        raise ValueError(f"{name} needs the parameters: call update(updates, state, params).")


def check_every(every: int) -> None:
    """Raise unless `every` is a whole number of updates.

    Example:
      >>> check_every(1)
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every must be a whole number of updates, at least 1, not {every!r}.")


def check_schedule(schedule: optax.Schedule) -> None:
    """Raise unless a schedule starts, and settles where it does, at a sparsity in [0, 1).

    What it gives in between is not known before: there a compiled step clips it.

    Raises:
      ValueError: it starts or settles at another number.
      TypeError: it is no function.

    Example:
      >>> check_schedule(lambda count: 1.5)
      Traceback (most recent call last):
      ...
      ValueError: schedule must give sparsities in [0, 1), not 1.5 at update 0.
    """
    if not callable(schedule):
        raise TypeError(f"schedule must be a function of the update's number, not {schedule!r}.")
    first, late, last = (known_values(schedule(count)) for count in (0, *_LATE))
    for count, level in ((0, first), (_LATE[0], late if late == last else None)):
        if level is not None and not 0.0 <= level < 1.0:
            raise ValueError(
                f"schedule must give sparsities in [0, 1), not {float(level)} at update {count}."
            )


def project(updates: Any, params: Any, masks: Any) -> Any:
    """Replace the update of every pruned weight by the one that takes it to exactly zero.

    Example:
      >>> import jax.numpy as jnp
      >>> project(jnp.array([1.0, 1.0]), jnp.array([5.0, 6.0]), jnp.array([True, False]))
      Array([ 1., -6.], dtype=float32)
    """

    def project(update: jax.Array, param: jax.Array, mask: jax.Array) -> jax.Array:
        wide = jnp.promote_types(update.dtype, param.dtype)
        return jnp.where(mask, update.astype(wide), -param.astype(wide))

    return jax.tree.map(project, updates, params, masks)


def keep_masked(masks: Any) -> optax.GradientTransformation:
    """Hold pruned weights at exactly zero while the others train.

    `u' = where(mask, u, -w)`. It must be the last transform of a chain. Masking gradients instead
    would let Adam's moments and weight decay move pruned weights.

    Args:
      masks: a tree of booleans like the parameters; each broadcasts against its parameter.

    Returns:
      An optax transform; its state is `KeepMaskedState(masks)`.

    Raises:
      ValueError: the masks do not fit the parameters (at `init`), or `update` is called without
        parameters.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> params = {"w": jnp.array([1.0, 0.0])}
      >>> tx = optax.chain(optax.sgd(0.1), keep_masked({"w": jnp.array([True, False])}))
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"w": jnp.array([1.0, 1.0])}, state, params)
      >>> optax.apply_updates(params, updates)
      {'w': Array([0.9, 0. ], dtype=float32)}
    """

    def init(params: Any) -> KeepMaskedState:
        return KeepMaskedState(masks_like(params, masks))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        need_params(params, "keep_masked")
        return project(updates, params, state.masks), state

    return optax.GradientTransformation(init, update)


def prune_gradually(
    schedule: optax.Schedule,
    every: int = 1,
    score: Callable[[Any], Any] = magnitude_scores,
    select: Callable[[Any, Any], Any] = global_topk_masks,
) -> optax.GradientTransformation:
    """Prune while training, to a sparsity that follows a schedule.

    At updates 0, `every`, 2 `every`, ... the weights as they will be after this update are scored
    and the masks taken anew at sparsity `schedule(count)`; in between they are held. A pruned
    weight stays pruned: it is scored as the zero that it is. It must be the last transform of a
    chain. The cubic schedule of Zhu and Gupta is
    `optax.polynomial_schedule(0.0, final, power=3, transition_steps=n, transition_begin=begin)`.

    Args:
      schedule: sparsity after `count` updates, 0 to 1.
      every: updates between two prunings, at least 1.
      score: parameters to scores, higher keeps; `magnitude_scores` by default.
      select: `(scores, sparsity)` to masks; `global_topk_masks` by default. To prune some leaves
        only: `functools.partial(jopt.prune.topk_masks, where="conv.*kernel")`.

    Returns:
      An optax transform; its state is `PruneGraduallyState(count, masks)`. Find the masks in the
      state of a chain with `current_masks`.

    Raises:
      ValueError: `every` is below 1, the schedule starts or settles outside [0, 1), or `update` is
        called without parameters.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = optax.chain(optax.sgd(0.1), prune_gradually(optax.constant_schedule(0.5)))
      >>> params = {"w": jnp.array([[1.0, 0.2]])}
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"w": jnp.array([[1.0, 1.0]])}, state, params)
      >>> optax.apply_updates(params, updates)
      {'w': Array([[0.9, 0. ]], dtype=float32)}

    References:
      Zhu, Gupta, "To Prune, or Not to Prune: Exploring the Efficacy of Pruning for Model
      Compression", 2017, https://arxiv.org/abs/1710.01878, equation 1.
    """
    check_every(every)
    check_schedule(schedule)

    def init(params: Any) -> PruneGraduallyState:
        # Masks of the final shapes from the start, so that the state keeps one structure.
        shapes = jax.eval_shape(lambda p: select(score(p), jnp.zeros(())), params)
        masks = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, jnp.bool_), shapes)
        return PruneGraduallyState(jnp.zeros((), jnp.int32), masks)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        need_params(params, "prune_gradually")

        def prune() -> Any:
            candidate = apply_masks(optax.apply_updates(params, updates), state.masks)
            level = jnp.asarray(schedule(state.count), jnp.float32)
            chosen = select(score(candidate), level)
            return jax.tree.map(jnp.logical_and, chosen, state.masks)

        masks = jax.lax.cond(state.count % every == 0, prune, lambda: state.masks)
        count = jnp.asarray(optax.safe_increment(state.count))
        return project(updates, params, masks), PruneGraduallyState(count, masks)

    return optax.GradientTransformation(init, update)


def _holds_masks(node: Any) -> bool:
    return isinstance(node, tuple) and "masks" in getattr(node, "_fields", ())


def current_masks(state: Any) -> Any:
    """Return the masks held in an optimizer's state, however deep in chains.

    Args:
      state: the state of a transform that contains `keep_masked`, `prune_gradually`,
        `sparse_training`, `network_surgery` or any other whose state is a named tuple with a field
        `masks`.

    Returns:
      The tree of masks, True keeps.

    Raises:
      ValueError: the state holds no masks, or the masks of more than one transform.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = optax.chain(optax.sgd(0.1), keep_masked({"w": jnp.array(True)}))
      >>> current_masks(tx.init({"w": jnp.ones(2)}))
      {'w': Array(True, dtype=bool)}
    """
    nodes = jax.tree.leaves(state, is_leaf=_holds_masks)
    found = [node.masks for node in nodes if _holds_masks(node)]
    if len(found) != 1:
        raise ValueError(f"state must hold the masks of one transform, not of {len(found)}.")
    return found[0]
