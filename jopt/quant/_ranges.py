"""Ranges: which interval of the real line the codes of a block must cover.

A range is a function `(values, axes, restore) -> (low, high)`: it reduces `values` over `axes`
(kept with size one), so it sees one block per remaining index. `restore(low, high)` gives the
values as they would come back from the codes of that range: what a search for the best range needs,
and the others ignore. Any function of that form can be used.

`minmax` and `absmax` are here. Those that cut off outliers, `percentile`, `mse` and `entropy`, have
files of their own; all of them choose one threshold T and return `minmax` cut at -T and T, so that
they serve grids with and without symmetry alike.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Restore = Callable[[jax.Array, jax.Array], jax.Array]
Range = Callable[[jax.Array, tuple[int, ...], Any], tuple[jax.Array, jax.Array]]


def minmax(
    values: jax.Array, axes: tuple[int, ...], restore: Restore | None = None
) -> tuple[jax.Array, jax.Array]:
    """Return the smallest and the largest value of each block.

    Args:
      values: floating-point array.
      axes: the axes within a block; they are reduced and kept with size one.
      restore: not used.

    Returns:
      `(low, high)`, floats of the reduced shape.

    Example:
      >>> import jax.numpy as jnp
      >>> minmax(jnp.array([[-1.0, 2.0]]), (1,))
      (Array([[-1.]], dtype=float32), Array([[2.]], dtype=float32))
    """
    del restore
    return jnp.min(values, axes, keepdims=True), jnp.max(values, axes, keepdims=True)


def absmax(
    values: jax.Array, axes: tuple[int, ...], restore: Restore | None = None
) -> tuple[jax.Array, jax.Array]:
    """Return the interval `(-a, a)` with `a = max |x|` of each block.

    Args:
      values: floating-point array.
      axes: the axes within a block; they are reduced and kept with size one.
      restore: not used.

    Returns:
      `(low, high)`, floats of the reduced shape, `low == -high`.

    Example:
      >>> import jax.numpy as jnp
      >>> absmax(jnp.array([[-3.0, 2.0]]), (1,))
      (Array([[-3.]], dtype=float32), Array([[3.]], dtype=float32))
    """
    del restore
    high = jnp.max(jnp.abs(values), axes, keepdims=True)
    return -high, high


def clip_range(
    low: jax.Array, high: jax.Array, threshold: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cut a range off at `-threshold` and `threshold`.

    For a grid symmetric about zero the result spans `(-threshold, threshold)`; for others it leaves
    alone an end that is nearer to zero, such as the 0 of what comes out of a ReLU.

    Args:
      low: lower ends.
      high: upper ends, of the same shape.
      threshold: positive, of the same shape.

    Returns:
      `(low, high)`, cut.

    Example:
      >>> import jax.numpy as jnp
      >>> clip_range(jnp.array([-0.1]), jnp.array([9.0]), jnp.array([3.0]))
      (Array([-0.1], dtype=float32), Array([3.], dtype=float32))
    """
    return jnp.clip(low, -threshold, threshold), jnp.clip(high, -threshold, threshold)
