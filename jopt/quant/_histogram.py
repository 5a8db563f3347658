"""Histograms of activations whose shards merge without any rounding.

The bins are `2^e` wide with an edge at zero, and e is the smallest exponent whose bins hold all
values seen. When a batch needs a larger one, neighbouring bins are merged in pairs, which loses
nothing: bin i of width w is exactly inside bin floor(i / 2) of width 2w. So the counts depend on
the values alone, not on the order of batches nor on how shards were merged.
"""

import functools
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jopt.layers._statistics import (
    Extremes,
    Statistic,
    joined_extremes,
    known_extremes,
    no_extremes,
    rows_extremes,
)

_SMALLEST_EXPONENT = -126  # of a normal float32


class Histogram(NamedTuple):
    """Count values by magnitude and sign.

    Attributes:
      counts: uint32, (bins,): how many values lie in `[j * w, (j + 1) * w)`, `j = i - bins / 2` for
        the i-th bin and `w = 2^exponent`; zeros are left out.
      zeros: uint32, how many values are 0 (or subnormal, below 2^-126).
      exponent: int32, the binary logarithm of the width of a bin.
      low: float32, the smallest value, exactly.
      high: float32, the largest.
    """

    counts: jax.Array
    zeros: jax.Array
    exponent: jax.Array
    low: jax.Array
    high: jax.Array


def bin_width(exponent: jax.Array) -> jax.Array:
    """Return `2^exponent` exactly, from the bits of a float32.

    Example:
      >>> import jax.numpy as jnp
      >>> bin_width(jnp.array([3]))
      Array([8.], dtype=float32)
    """
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _exponent_for(ends: Extremes, half: int) -> jax.Array:
    """Return the smallest exponent whose bins hold all finite values between the ends."""
    high = jnp.where(jnp.isfinite(ends.high), jnp.maximum(ends.high, 0.0), 0.0)
    depth = jnp.where(jnp.isfinite(ends.low), jnp.maximum(-ends.low, 0.0), 0.0)
    _, above = jnp.frexp(high)  # high < 2^above
    mantissa, below = jnp.frexp(depth)
    below = jnp.where(mantissa == 0.5, below - 1, below)  # -2^k is the lower edge of a bin
    reach = jnp.maximum(jnp.where(high > 0, above, -1000), jnp.where(depth > 0, below, -1000))
    return jnp.maximum(reach - (half.bit_length() - 1), _SMALLEST_EXPONENT)


def _coarsened(state: Histogram, exponent: jax.Array) -> jax.Array:
    """Return the counts of a histogram in bins of a larger width."""
    bins = state.counts.shape[0]
    shift = jnp.minimum(exponent - state.exponent, 31)
    places = ((jnp.arange(bins, dtype=jnp.int32) - bins // 2) >> shift) + bins // 2
    return jnp.zeros_like(state.counts).at[places].add(state.counts)


@jax.jit
def _merge(first: Histogram, second: Histogram) -> Histogram:
    exponent = jnp.maximum(first.exponent, second.exponent)
    ends = joined_extremes(Extremes(first.low, first.high), Extremes(second.low, second.high))
    counts = _coarsened(first, exponent) + _coarsened(second, exponent)
    return Histogram(counts, first.zeros + second.zeros, exponent, *ends)


def _finite_extremes(rows: jax.Array) -> Extremes:
    finite = jnp.isfinite(rows)
    return Extremes(
        jnp.min(jnp.where(finite, rows, jnp.inf), initial=jnp.inf),
        jnp.max(jnp.where(finite, rows, -jnp.inf), initial=-jnp.inf),
    )


@partial(jax.jit, static_argnames="bins")
def _of_rows(rows: jax.Array, bins: int) -> Histogram:
    values = rows.astype(jnp.float32).reshape(-1)
    exponent = _exponent_for(_finite_extremes(values), bins // 2)
    place = jnp.floor(values * bin_width(-exponent)).astype(jnp.int32)
    place = jnp.where(values < 0, jnp.minimum(place, -1), place)  # -0.0 after underflow
    # Subnormal numbers are zeros to some devices, and to some instructions: so they are to all.
    is_zero = jnp.abs(values) < jnp.finfo(jnp.float32).tiny
    counted = jnp.isfinite(values) & ~is_zero
    place = jnp.where(counted, place + bins // 2, bins)  # past the end: dropped
    one = jnp.ones((), jnp.uint32)
    counts = jnp.zeros(bins, jnp.uint32).at[place].add(one, mode="drop")
    zeros = jnp.sum(is_zero, dtype=jnp.uint32)
    return Histogram(counts, zeros, exponent, *rows_extremes(values))


@functools.lru_cache
def histogram(bins: int = 2048) -> Statistic:
    """Make the statistic that counts values in bins around zero.

    Memory is `4 * bins` bytes a layer whatever the data. `merge` equals one pass exactly: the
    counts are bit for bit the same. At least a quarter of the bins lies within the larger end.
    NaN and infinities are not counted and show in `low` and `high`; a count wraps at 2^32.

    Args:
      bins: how many, a power of two, at least 16.

    Returns:
      A `Statistic` whose figures are a `Histogram`, ends 0 and 0 where no value was seen.

    Raises:
      ValueError: bins is not such a number.

    Example:
      >>> import jax.numpy as jnp
      >>> statistic = histogram(16)
      >>> state = statistic.update(statistic.init(1), jnp.array([[0.0], [-1.0], [5.5], [7.0]]))
      >>> state.counts[7:], state.zeros, int(state.exponent)
      (Array([1, 0, 0, 0, 0, 0, 1, 0, 1], dtype=uint32), Array(1, dtype=uint32), 0)
    """
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 16 or bins & (bins - 1):
        raise ValueError(f"bins must be a power of two of at least 16, not {bins!r}.")

    def init(features: int) -> Histogram:
        del features
        smallest = jnp.full((), _SMALLEST_EXPONENT, jnp.int32)
        none = jnp.zeros((), jnp.uint32)
        return Histogram(jnp.zeros(bins, jnp.uint32), none, smallest, *no_extremes())

    def update(state: Histogram, rows: jax.Array) -> Histogram:
        return _merge(state, _of_rows(rows, bins))

    def finalise(state: Histogram) -> Histogram:
        ends = known_extremes(Extremes(state.low, state.high))
        return state._replace(low=ends.low, high=ends.high)

    return Statistic(init, update, _merge, finalise)


def bin_centres(figures: Histogram) -> jax.Array:
    """Return the middle of each bin, float32, (bins,).

    Example:
      >>> import jax.numpy as jnp
      >>> state = histogram(16).update(histogram(16).init(1), jnp.array([[7.0]]))
      >>> bin_centres(state)[8:11]
      Array([0.5, 1.5, 2.5], dtype=float32)
    """
    bins = figures.counts.shape[0]
    places = jnp.arange(bins, dtype=jnp.float32) - (bins // 2 - 0.5)
    return places * bin_width(figures.exponent)


def folded_counts(figures: Histogram) -> jax.Array:
    """Return the counts by magnitude, uint32, (bins / 2,): both signs added.

    Example:
      >>> import jax.numpy as jnp
      >>> state = histogram(16).update(histogram(16).init(1), jnp.array([[7.0], [-0.5], [0.5]]))
      >>> folded_counts(state)
      Array([2, 0, 0, 0, 0, 0, 0, 1], dtype=uint32)
    """
    half = figures.counts.shape[0] // 2
    return figures.counts[half:] + figures.counts[:half][::-1]
