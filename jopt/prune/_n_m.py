"""Keep n of every m: the pattern that sparse matrix units read, 2:4 for one."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jopt._trees import Filter, is_kernel
from jopt.prune._masks import scored

Axis = int | Callable[[str, Any], int]

# Each pair compared once is fastest up to here; the program grows with the square of m.
_PAIRS_UP_TO = 8


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Skipped:
    """Say which chosen leaves stayed dense, and why. Static, so it passes through `jit`.

    Attributes:
      reasons: pairs of a path and a reason.
    """

    reasons: tuple[tuple[str, str], ...] = ()


def _rank_by_pairs(groups: Array, axis: int) -> Array:
    """Count for each entry the entries of its group that beat it, by comparing each pair once."""
    entries = jnp.unstack(groups, axis=axis)
    beaten = [jnp.zeros(entries[0].shape, jnp.int8)] * len(entries)
    for later in range(len(entries)):
        for earlier in range(later):
            wins = (entries[earlier] >= entries[later]).astype(jnp.int8)
            beaten[later] += wins
            beaten[earlier] += 1 - wins
    return jnp.stack(beaten, axis=axis)


def _rank_by_entries(groups: Array, axis: int) -> Array:
    """Count the same, by comparing each entry of a group with the whole group."""
    beaten = jnp.zeros(groups.shape, jnp.int32)
    places = lax.broadcasted_iota(jnp.int32, groups.shape, axis)
    for place in range(groups.shape[axis]):
        entry = lax.slice_in_dim(groups, place, place + 1, axis=axis)
        wins = jnp.where(places > place, entry >= groups, entry > groups)
        beaten += wins.astype(jnp.int32)
    return beaten


@partial(jax.jit, static_argnames=("n", "m", "axis"))
def _n_m_mask(scores: Array, n: int, m: int, axis: int) -> Array:
    # A second axis of m, and no sort: ranks are counts of comparisons, which XLA vectorises.
    shape = scores.shape
    split = (*shape[:axis], shape[axis] // m, m, *shape[axis + 1 :])
    groups = jnp.where(jnp.isnan(scores), -jnp.inf, scores).reshape(split)
    rank = _rank_by_pairs if m <= _PAIRS_UP_TO else _rank_by_entries
    return (rank(groups, axis + 1) < n).reshape(shape)


def _check_pattern(n: int, m: int) -> None:
    for name, value in (("n", n), ("m", m)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be a whole number, not {value!r}.")
    if m < 1:
        raise ValueError(f"m must be at least 1, not {m}.")
    if not 0 <= n <= m:
        raise ValueError(f"n must lie in 0 to m = {m}, not {n}.")


def _positive(axis: int, ndim: int) -> int:
    if not -ndim <= axis < ndim:
        raise ValueError(f"axis {axis} is out of range for scores of {ndim} axes.")
    return axis % ndim


def n_m_mask(scores: Array, n: int, m: int, axis: int = -2) -> Array:
    """Keep the n highest of every m consecutive scores along an axis.

    mask[i] = True iff fewer than n of the m scores of its group beat score i. A score beats another
    if it is higher, or equal and at the lower index. NaN counts as minus infinity, and a CPU
    compares denormals as zeros.

    Args:
      scores: floating-point array.
      n: how many to keep, 0 to m.
      m: how many make a group, at least 1.
      axis: along which axis groups run; by default the inputs of a kernel, `(in, out)` or
        `(height, width, in, out)`, which is what a product sums over.

    Returns:
      A boolean array of the shape of `scores`, exactly n True in each group.

    Raises:
      ValueError: m does not divide the axis, n is not in 0 to m, m is below 1, or there is no
        such axis.
      TypeError: `scores` is not floating-point, or n or m is not a whole number.

    Example:
      >>> import jax.numpy as jnp
      >>> n_m_mask(jnp.array([4.0, 1.0, 3.0, 2.0, 0.0, 0.0, 0.0, 5.0]), 2, 4, axis=0).astype(int)
      Array([1, 0, 1, 0, 1, 0, 0, 1], dtype=int32)

    References:
      Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021,
      https://arxiv.org/abs/2104.08378, section 3 (2:4).
      Zhou et al., "Learning N:M Fine-Grained Structured Sparse Neural Networks From Scratch", 2021,
      https://arxiv.org/abs/2102.04010.
    """
    _check_pattern(n, m)
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        raise TypeError(f"scores must be floating-point, got {scores.dtype}.")
    axis = _positive(axis, scores.ndim)
    if scores.shape[axis] % m:
        raise ValueError(f"m = {m} does not divide axis {axis} of shape {scores.shape}.")
    return _n_m_mask(lax.stop_gradient(scores), n, m, axis)


def n_m_masks(
    scores: Any, n: int, m: int, axis: Axis = -2, where: Filter = is_kernel
) -> tuple[Any, Skipped]:
    """Keep the n highest of every m consecutive scores of each chosen leaf.

    A leaf whose axis m does not divide stays dense, and is listed with the reason: three input
    channels, or a single one in a depthwise convolution.

    Args:
      scores: a tree of scores, higher keeps.
      n: how many to keep, 0 to m.
      m: how many make a group, at least 1.
      axis: along which axis groups run, or a function `(path, scores) -> axis`; by default the
        inputs of a kernel, the last axis but one.
      where: which leaves to prune, a regex on the path or a predicate; by default
        those that `is_kernel` takes.

    Returns:
      A tree of booleans: full-shape masks, a scalar True for leaves not chosen or skipped; and
      `Skipped`, the pairs of path and reason.

    Raises:
      ValueError: n is not in 0 to m, m is below 1, a leaf has no such axis, or the filter matches
        nothing.
      TypeError: a chosen score is not a floating-point array, or n or m is not a whole number.

    Example:
      >>> import jax.numpy as jnp
      >>> scores = {"a": jnp.array([[1.0], [4.0], [3.0], [2.0]]), "b": jnp.ones((3, 2))}
      >>> masks, skipped = n_m_masks(scores, 2, 4)
      >>> masks["a"].ravel()
      Array([False,  True,  True, False], dtype=bool)
      >>> skipped.reasons
      (('b', 'm = 4 does not divide axis 0 of shape (3, 2)'),)

    References:
      Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021,
      https://arxiv.org/abs/2104.08378.
    """
    _check_pattern(n, m)
    paths, leaves, chosen, treedef = scored(scores, where)
    masks, skipped = [], []
    for path, leaf, take in zip(paths, leaves, chosen, strict=True):
        mask = jnp.array(True)
        if take:
            along = _positive(axis(path, leaf) if callable(axis) else axis, leaf.ndim)
            if leaf.shape[along] % m:
                reason = f"m = {m} does not divide axis {along} of shape {leaf.shape}"
                skipped.append((path, reason))
            else:
                mask = n_m_mask(leaf, n, m, along)
        masks.append(mask)
    return jax.tree.unflatten(treedef, masks), Skipped(tuple(skipped))
