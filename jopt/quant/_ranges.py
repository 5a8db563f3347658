"""Ranges: which interval of the real line the codes of a block must cover.

A range is a function `(values, axes) -> (low, high)`: it reduces `values` over `axes` (kept with
size one), so it sees one block per remaining index. Any function of that form can be used.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Range = Callable[[jax.Array, tuple[int, ...]], tuple[jax.Array, jax.Array]]


def minmax(values: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Return the smallest and the largest value of each block.

    Args:
      values: floating-point array.
      axes: the axes within a block; they are reduced and kept with size one.

    Returns:
      `(low, high)`, floats of the reduced shape.

    Example:
      >>> import jax.numpy as jnp
      >>> minmax(jnp.array([[-1.0, 2.0]]), (1,))
      (Array([[-1.]], dtype=float32), Array([[2.]], dtype=float32))
    """
    return jnp.min(values, axes, keepdims=True), jnp.max(values, axes, keepdims=True)


def absmax(values: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Return the interval `(-a, a)` with `a = max |x|` of each block.

    Args:
      values: floating-point array.
      axes: the axes within a block; they are reduced and kept with size one.

    Returns:
      `(low, high)`, floats of the reduced shape, `low == -high`.

    Example:
      >>> import jax.numpy as jnp
      >>> absmax(jnp.array([[-3.0, 2.0]]), (1,))
      (Array([[-3.]], dtype=float32), Array([[3.]], dtype=float32))
    """
    high = jnp.max(jnp.abs(values), axes, keepdims=True)
    return -high, high
