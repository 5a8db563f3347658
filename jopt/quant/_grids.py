"""Grids: which levels lie between the two ends of a range, and the codes that name them.

A grid is a function `(values, low, high, bits) -> (codes, scale, zero_point)`; `low` and `high`
broadcast against `values`, the codes are whole numbers still of a floating dtype.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Codes = tuple[jax.Array, jax.Array, jax.Array | None]
Grid = Callable[[jax.Array, jax.Array, jax.Array, int], Codes]


def _step(width: jax.Array, levels: int) -> tuple[jax.Array, jax.Array]:
    """Return `width / levels` and whether it is usable; 1 where a block has no width."""
    step = width / levels
    usable = step >= jnp.finfo(width.dtype).tiny
    return jnp.where(usable, step, 1.0), usable


def symmetric(values: jax.Array, low: jax.Array, high: jax.Array, bits: int) -> Codes:
    """Put the levels at whole multiples of one step, the same number on each side of zero.

    `q = clip(round(x / scale), -n, n)`, `scale = max(|low|, |high|) / n`, `n = 2^(bits-1) - 1`.
    Zero has the code 0, so pruned weights stay zero. At one bit there is no level beside zero, so
    the levels are `-scale` and `scale` and only an exact zero (a pruned weight) keeps the code 0.
    A block of zeros gets scale 1. Values outside the range take the nearest end. Ties are rounded
    to even, as everywhere in XLA.

    Args:
      values: floating-point array.
      low: lower end of the range, broadcast against `values`.
      high: upper end of the range, broadcast against `values`.
      bits: 1 to 8.

    Returns:
      `(codes, scale, None)`; the codes are whole numbers in `values.dtype`.

    Example:
      >>> import jax.numpy as jnp
      >>> codes, scale, _ = symmetric(
      ...     jnp.array([-7.0, 0.0, 3.4]), jnp.array([-7.0]), jnp.array([7.0]), 4
      ... )
      >>> codes, scale
      (Array([-7.,  0.,  3.], dtype=float32), Array([1.], dtype=float32))

    References:
      Nagel et al., "A White Paper on Neural Network Quantization", 2021,
      https://arxiv.org/abs/2106.08295, equations 7 and 8.
    """
    levels = max(2 ** (bits - 1) - 1, 1)
    scale, _ = _step(jnp.maximum(jnp.abs(low), jnp.abs(high)), levels)
    if bits == 1:
        return jnp.sign(values), scale, None
    return jnp.clip(jnp.round(values / scale), -levels, levels), scale, None


def affine(values: jax.Array, low: jax.Array, high: jax.Array, bits: int) -> Codes:
    """Spread the `2^bits` levels evenly from `low` to `high`, both ends included.

    `q = round((x - low) / (high - low) * (2^bits - 1))`, restored as `low + scale * q` with
    `scale = (high - low) / (2^bits - 1)`; the zero point `-low / scale` is a real number. Both ends
    are met, zero in general is not: for pruned weights use `symmetric` or `affine_zero`. A block
    whose values are all equal gets scale 1 and is restored exactly.

    Args:
      values: floating-point array.
      low: lower end of the range, broadcast against `values`.
      high: upper end of the range, broadcast against `values`.
      bits: 1 to 8.

    Returns:
      `(codes, scale, zero_point)`; the codes are whole numbers from 0 to `2^bits - 1`.

    Example:
      >>> import jax.numpy as jnp
      >>> codes, scale, zero = affine(
      ...     jnp.array([-1.0, 0.1, 2.0]), jnp.array([-1.0]), jnp.array([2.0]), 2
      ... )
      >>> codes, scale, zero
      (Array([0., 1., 3.], dtype=float32), Array([1.], dtype=float32), Array([1.], dtype=float32))

    References:
      Jacob et al., "Quantization and Training of Neural Networks for Efficient
      Integer-Arithmetic-Only Inference", 2018, https://arxiv.org/abs/1712.05877, equation 12
      (without its rounding of the zero point, which is `affine_zero`).
    """
    levels = 2**bits - 1
    scale, usable = _step(high - low, levels)
    width = jnp.where(usable, high - low, 1.0)
    codes = jnp.clip(jnp.round((values - low) / width * levels), 0, levels)
    return jnp.where(usable, codes, 0.0), scale, -low / scale


def affine_zero(values: jax.Array, low: jax.Array, high: jax.Array, bits: int) -> Codes:
    """Spread the levels evenly and move them so that zero is exactly one of them.

    The range is first widened to hold zero, then `q = clip(round(x / scale) + z, 0, 2^bits - 1)`
    with the whole zero point `z = round(-low / scale)`. Pruned weights stay zero.

    Args:
      values: floating-point array.
      low: lower end of the range, broadcast against `values`.
      high: upper end of the range, broadcast against `values`.
      bits: 1 to 8.

    Returns:
      `(codes, scale, zero_point)`; the codes are whole numbers from 0 to `2^bits - 1`.

    Example:
      >>> import jax.numpy as jnp
      >>> codes, scale, zero = affine_zero(
      ...     jnp.array([-1.0, 0.0, 2.0]), jnp.array([-1.0]), jnp.array([2.0]), 2
      ... )
      >>> codes, scale, zero
      (Array([0., 1., 3.], dtype=float32), Array([1.], dtype=float32), Array([1.], dtype=float32))

    References:
      Jacob et al., "Quantization and Training of Neural Networks for Efficient
      Integer-Arithmetic-Only Inference", 2018, https://arxiv.org/abs/1712.05877, section 3.
    """
    levels = 2**bits - 1
    low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    scale, _ = _step(high - low, levels)
    zero_point = jnp.clip(jnp.round(-low / scale), 0, levels)
    return jnp.clip(jnp.round(values / scale) + zero_point, 0, levels), scale, zero_point
