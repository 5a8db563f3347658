"""The `entropy` range: cut where quantization changes the distribution of the values least."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jopt._arrays import materialize
from jopt.quant._grids import Grid, symmetric
from jopt.quant._histogram import Histogram, bin_centres, bin_width, histogram
from jopt.quant._ranges import Range, Restore, clip_range, minmax


def _divergence(figures: Histogram, places: jax.Array, grid: Grid, bits: int) -> jax.Array:
    """Return the divergence of the histogram cut at `places` bins on each side of zero."""
    bins = figures.counts.shape[0]
    half = bins // 2
    centres, width = bin_centres(figures), bin_width(figures.exponent)
    threshold = places.astype(jnp.float32) * width
    low, high = clip_range(figures.low, figures.high, threshold)
    levels = grid.fit(centres, low[None], high[None], bits)
    restored = materialize(grid.encode(centres, levels, bits))

    counts = figures.counts.astype(jnp.float32)
    index = jnp.arange(bins, dtype=jnp.int32)
    first, last = half - places, half + places - 1
    kept = jnp.where((index >= first) & (index <= last), counts, 0.0)
    cut_low = jnp.sum(jnp.where(index < first, counts, 0.0))
    cut_high = jnp.sum(jnp.where(index > last, counts, 0.0))
    reference = jnp.where(index == first, kept + cut_low, kept)
    reference = jnp.where(index == last, reference + cut_high, reference)

    # Runs of bins that are restored to the same level share their counts evenly.
    changes = jnp.concatenate([jnp.zeros(1, bool), restored[1:] != restored[:-1]])
    runs = jnp.cumsum(changes, dtype=jnp.int32)
    sums = jax.ops.segment_sum(kept, runs, bins)
    occupied = jax.ops.segment_sum((kept > 0).astype(jnp.float32), runs, bins)
    shared = jnp.where(kept > 0, (sums / jnp.maximum(occupied, 1.0))[runs], 0.0)

    total = jnp.maximum(jnp.sum(reference), 1.0)
    p = reference / total
    q = jnp.maximum(shared / jnp.maximum(jnp.sum(shared), 1.0), 1.0 / total)
    return jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0) / q), 0.0))


def entropy_threshold(figures: Histogram, grid: Grid, bits: int, candidates: int) -> jax.Array:
    """Return the threshold at which quantization keeps most of a histogram's information.

    `T = argmin_T sum_i P_i log(P_i / Q_i)`: P is the histogram cut at -T and T, its first and last
    bin holding also what was cut off; Q is the histogram inside, the bins that are rounded to one
    level sharing their counts evenly among those that are not empty. Thresholds are whole numbers
    of bins, from `2^(bits - 1)`, below which there are fewer bins than levels, up to all.

    Deviations from the reference: the levels are those of the grid, each bin going to the nearest,
    and not the bins cut into `2^(bits - 1)` equal runs; both signs are counted apart; exact zeros
    are left out; where a bin holds only what was cut off, Q is one count and not zero.

    Args:
      figures: of one tensor.
      grid: the levels.
      bits: of a code.
      candidates: how many thresholds are tried, evenly spaced.

    Returns:
      T, a float32 scalar; of equals the largest, so that an empty histogram is not cut.

    References:
      Migacz, "8-bit Inference with TensorRT", 2017,
      https://www.cse.iitd.ac.in/~rijurekha/course/tensorrt.pdf, pages 36 to 40.
    """
    half = figures.counts.shape[0] // 2
    smallest = min(2 ** (bits - 1), half)
    places = np.unique(np.linspace(smallest, half, candidates).round().astype(np.int32))[::-1]
    if places[0] != half:
        places = np.concatenate([[np.int32(half)], places])
    losses = jax.lax.map(
        lambda place: _divergence(figures, place, grid, bits), jnp.asarray(places, jnp.int32)
    )
    best = jnp.asarray(places, jnp.float32)[jnp.argmin(losses)]
    return best * bin_width(figures.exponent)


@functools.lru_cache
def entropy(bits: int = 8, bins: int = 2048, candidates: int = 64) -> Range:
    """Make the range that changes the distribution of each block's values least.

    `entropy_threshold` on a histogram of the block, with symmetric levels; the range is
    `(min, max)` cut at -T and T. Meant for blocks of thousands of values (`()` or `(1,)`): the
    distribution of a few says little, and each block takes milliseconds, one after the other.

    Args:
      bits: of the codes: give the spec's own number.
      bins: of the histogram, a power of two.
      candidates: how many thresholds are tried.

    Returns:
      A range for `QuantSpec`; equal arguments give the same function.

    Raises:
      ValueError: an argument is out of range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> values = jnp.concatenate(
      ...     [jax.random.normal(jax.random.key(0), (5000,)), jnp.full(1, 30.0)]
      ... )
      >>> bool(entropy(8)(values, (0,), None)[1][0] < 10)
      True
    """
    statistic = histogram(bins)
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(f"bits must be a whole number from 1 to 8, not {bits!r}.")
    if isinstance(candidates, bool) or not isinstance(candidates, int) or candidates < 1:
        raise ValueError(f"candidates must be a whole number of at least 1, not {candidates!r}.")

    def threshold(block: jax.Array) -> jax.Array:
        figures = statistic.finalise(statistic.update(statistic.init(1), block[:, None]))
        return entropy_threshold(figures, symmetric, bits, candidates)

    def search(
        values: jax.Array, axes: tuple[int, ...], restore: Restore | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Cut each block where the divergence is least: see `entropy`."""
        del restore
        low, high = minmax(values, axes)
        last = tuple(range(values.ndim - len(axes), values.ndim))
        blocks = jnp.moveaxis(values, axes, last)
        size = math.prod(values.shape[axis] for axis in axes)
        found = jax.lax.map(threshold, blocks.reshape(-1, size).astype(jnp.float32))
        return clip_range(low, high, found.reshape(low.shape).astype(values.dtype))

    return search
