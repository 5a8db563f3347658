"""The `percentile` range: cut off the largest magnitudes of each block.

The threshold is an exact order statistic, found by counting and not by sorting: XLA sorts a million
floats on a CPU in half a second, and counts those below a threshold in two milliseconds.
"""

import functools
import math
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp

from jopt.quant._ranges import Range, Restore, clip_range, minmax

_BISECT_EVERY = 3  # of three steps, one halves the interval whatever the interpolation says


def share_rank(percent: float, size: int) -> int:
    """Return how many of `size` elements make `percent` of them, rounded up, at least one.

    Example:
      >>> share_rank(99.9, 1000), share_rank(99.9, 1001), share_rank(1e-9, 10)
      (999, 1000, 1)
    """
    # As a decimal fraction: in floats 99.9 / 100 * 1000 may come out above 999.
    return max(math.ceil(Fraction(repr(float(percent))) * size / 100), 1)


def check_percent(percent: float) -> None:
    """Raise a ValueError unless `percent` is above 0 and at most 100."""
    if not 0 < percent <= 100:
        raise ValueError(f"percent must be above 0 and at most 100, not {percent!r}.")


def order_statistic(magnitudes: jax.Array, axes: tuple[int, ...], rank: int) -> jax.Array:
    """Return the `rank`-th smallest element of each block.

    Non-negative floats are in the order of their bits, so a threshold is searched for among the
    whole numbers that are such bits: interpolation by the counts below it, and a bisection now and
    then so that no distribution takes long. Exact; equal elements count one by one.

    Args:
      magnitudes: non-negative floats.
      axes: the axes within a block.
      rank: 1 is the smallest; not above the number of elements of a block.

    Returns:
      An array of the reduced shape (axes kept with size one) and the same dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> order_statistic(jnp.array([[3.0, 1.0, 2.0]]), (1,), 2)
      Array([[2.]], dtype=float32)
    """
    bits = jnp.int64 if magnitudes.dtype.itemsize == 8 else jnp.int32

    def key_of(value: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(value, bits)

    def below(key: jax.Array) -> jax.Array:
        threshold = jax.lax.bitcast_convert_type(key, magnitudes.dtype)
        return jnp.sum(magnitudes <= threshold, axes, keepdims=True, dtype=jnp.int32)

    def unfinished(state: Any) -> jax.Array:
        _, low, high, _, _ = state
        return jnp.any(high - low > 1)

    def narrow(state: Any) -> Any:
        step, low, high, low_count, high_count = state
        width = high - low
        real = jnp.float32
        share = (rank - low_count.astype(real) - 0.5) / (high_count - low_count).astype(real)
        guess = low + (share * width.astype(real)).astype(bits)
        middle = jnp.where(step % _BISECT_EVERY == 0, low + width // 2, guess)
        middle = jnp.clip(middle, low + 1, jnp.maximum(high - 1, low + 1))
        count = below(middle)
        open_ = width > 1
        enough = open_ & (count >= rank)
        short = open_ & (count < rank)
        return (
            step + 1,
            jnp.where(short, middle, low),
            jnp.where(enough, middle, high),
            jnp.where(short, count, low_count),
            jnp.where(enough, count, high_count),
        )

    # count(<= low) < rank <= count(<= high) throughout; -1 is below the bits of 0.0.
    high = key_of(jnp.max(magnitudes, axes, keepdims=True))
    low = jnp.minimum(key_of(jnp.min(magnitudes, axes, keepdims=True)), high) - 1
    size = math.prod(magnitudes.shape[axis] for axis in axes)
    counts = jnp.zeros_like(high, jnp.int32), jnp.full_like(high, size, jnp.int32)
    start = (jnp.ones((), jnp.int32), low, high, *counts)
    found = jax.lax.while_loop(unfinished, narrow, start)[2]
    return jax.lax.bitcast_convert_type(found, magnitudes.dtype)


@functools.lru_cache
def percentile(percent: float) -> Range:
    """Make the range that holds the smallest `percent` of the magnitudes of each block.

    `T = the ceil(percent / 100 * n)-th smallest |x|` of the n values of the block, exactly; the
    range is `(min, max)` cut at -T and T. Where T is 0 (a block of mostly pruned weights) nothing
    is cut, as no step could follow from it.

    Args:
      percent: above 0, at most 100; 100 is `minmax`.

    Returns:
      A range for `QuantSpec`; equal arguments give the same function.

    Raises:
      ValueError: percent is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> percentile(75)(jnp.array([[-0.5, 1.0, 2.0, 9.0]]), (1,), None)
      (Array([[-0.5]], dtype=float32), Array([[2.]], dtype=float32))

    References:
      Wu et al., "Integer Quantization for Deep Learning Inference: Principles and Empirical
      Evaluation", 2020, https://arxiv.org/abs/2004.09602, section 5.
    """
    check_percent(percent)

    def cut(
        values: jax.Array, axes: tuple[int, ...], restore: Restore | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Cut each block at a percentile of its magnitudes: see `percentile`."""
        del restore
        low, high = minmax(values, axes)
        rank = share_rank(percent, math.prod(values.shape[axis] for axis in axes))
        threshold = order_statistic(jnp.abs(values), axes, rank)
        return clip_range(low, high, jnp.where(threshold > 0, threshold, jnp.inf))

    return cut
