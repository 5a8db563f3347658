"""What the pruning methods that read a layer's inputs share: patterns, counts, the baseline."""

import numbers
from typing import Any

import jax
import jax.numpy as jnp

from jopt.layers._outcome import Outcome, from_rows, keep_lower, output_error, row_axes
from jopt.layers._statistics import InputStatistics
from jopt.prune._masks import Sparsity, pruned_count
from jopt.prune._n_m import n_m_mask
from jopt.prune._threshold import keep_largest

Pattern = tuple[int, int]


def split_pattern(sparsity: Sparsity | Pattern) -> tuple[Any, Pattern | None]:
    """Return the sparsity as an array-like, or None and the pattern n:m.

    Raises:
      ValueError: the sparsity is outside [0, 1], or not a scalar, or the pattern not two numbers.

    Example:
      >>> split_pattern(0.5), split_pattern((2, 4))
      ((0.5, None), (None, (2, 4)))
    """
    if isinstance(sparsity, tuple):
        if len(sparsity) != 2:
            raise ValueError(f"a pattern must be two numbers (n, m), not {sparsity!r}.")
        return None, sparsity
    if isinstance(sparsity, numbers.Number) or jnp.ndim(sparsity):
        pruned_count(1, sparsity, 0)  # pyright: ignore[reportArgumentType]
    return sparsity, None


def check_kernel(weights: jax.Array, statistics: InputStatistics, pattern: Pattern | None) -> None:
    """Refuse what cannot be pruned.

    Raises:
      ValueError: the statistics do not fit the kernel, or m does not divide its inputs.
      TypeError: the kernel is not floating-point.

    Example:
      >>> statistics = InputStatistics(None, None, None, None, jnp.eye(6))
      >>> check_kernel(jnp.ones((6, 1)), statistics, (2, 4))
      Traceback (most recent call last):
      ...
      ValueError: m = 4 does not divide the inputs, axis 0 of shape (6, 1).
    """
    if not jnp.issubdtype(weights.dtype, jnp.floating):
        raise TypeError(f"weights must be floating-point, not {weights.dtype}.")
    last = row_axes(weights.shape, statistics.gram.shape[-1]) - 1
    if pattern is not None:
        n_m_mask(jnp.zeros(pattern[1] or 1), *pattern, axis=0)  # raises for bad numbers
        if last < 0 or weights.shape[last] % pattern[1]:
            raise ValueError(
                f"m = {pattern[1]} does not divide the inputs, axis {max(last, 0)} of shape "
                f"{weights.shape}."
            )


def magnitude_mask(rows: jax.Array, count: Any, pattern: Pattern | None) -> jax.Array:
    """Keep the largest weights of a kernel, or n of every m inputs of each output.

    Args:
      rows: `(..., features, outputs)`.
      count: how many to prune; not used with a pattern.
      pattern: n and m, or None.

    Returns:
      Booleans of the same shape.

    Example:
      >>> rows = jnp.array([[3.0, 2.0], [1.0, 4.0]])
      >>> magnitude_mask(rows, 3, None).sum(0), magnitude_mask(rows, None, (1, 2)).sum(0)
      (Array([0, 1], dtype=int32), Array([1, 1], dtype=int32))
    """
    if pattern is not None:
        return n_m_mask(jnp.abs(rows), *pattern, axis=-2)
    return keep_largest(jnp.abs(rows), jnp.asarray(rows.size - count))


def better_than_magnitude(
    weights: jax.Array,
    statistics: InputStatistics,
    found: tuple[jax.Array, jax.Array],
    plain: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, Outcome]:
    """Return the pruned kernel, its mask and the outcome: the plain one where no worse.

    Args:
      weights: the kernel.
      statistics: of its inputs.
      found: pruned rows and their mask, as `to_rows` arranges them.
      plain: those of the baseline.
    """

    def shaped(rows: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        pruned = from_rows(rows, weights.shape).astype(weights.dtype)
        return pruned, from_rows(mask, weights.shape)

    candidate, nearest = shaped(*found), shaped(*plain)
    errors = [output_error(weights, each[0], statistics) for each in (candidate, nearest)]
    (pruned, mask), outcome = keep_lower(candidate, nearest, errors[0], errors[1])
    return pruned, mask, outcome
