"""The dynamic program of one-dimensional k-means, on bins, by sweeps of ever finer windows.

The cells of an optimal codebook are intervals, so a codebook of k entries is k - 1 boundaries
between bins. A sweep offers every boundary a window of positions and finds the best choice of all
boundaries together by dynamic programming over the clusters. Coarse sweeps cut every present
cluster into a few parts and let boundaries move past many clusters; the last sweeps move them by
single bins. Each sweep starts from the boundaries of the one before, which are among its
candidates, so the error never rises.

References: H. Wang and M. Song, "Ckmeans.1d.dp: Optimal k-means Clustering in One Dimension by
Dynamic Programming", 2011, https://doi.org/10.32614/RJ-2011-015, whose recurrence (equation 1) is
solved here; the windows are jopt's own, so that a global optimum is usual but not proven.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jopt.quant._kmeans_bins import ROW, TINY, Bins, cumulate, cumulate_rows

_MOST_SWEEPS = 16
_FINE_WINDOW = 256
_ROUNDING = 1e-7


class _Sums(NamedTuple):
    """Running sums (2, size + 1) of mass and moment; two floats each, so differences are exact."""

    high: Array
    low: Array

    def between(self, lower: Array, upper: Array) -> Array:
        """Return the mass and the moment of what lies between two positions."""
        high, low = (
            self.high[:, upper] - self.high[:, lower],
            self.low[:, upper] - self.low[:, lower],
        )
        return high + low


def _iota(size: int) -> Array:
    return jnp.arange(size, dtype=jnp.int32)


class _Data(NamedTuple):
    """Bins with means about their common mean; a moment is the sum of mass * mean.

    If `spare`, the first cluster is to be left empty.
    """

    mass: Array
    mean: Array
    share: Array  # density^(1/3) over the width of the bin: what part of a codebook it asks for
    sums: _Sums
    spare: Array


class _Sweep(NamedTuple):
    """One kind of sweep: parts of a cluster, parts that a cluster may have after it, window."""

    cut: int
    span: int
    window: int


@partial(jax.jit, static_argnums=1)
def optimal_means(bins: Bins, clusters: int, spare: Array | bool = False) -> Array:
    """Return the means (clusters,) of an optimal partition of `bins`, in rising order.

    With `spare`, which may be traced, there is one cluster less, and the last entry repeats the one
    before. Where there are no more bins than clusters, the means are those of the bins, exactly.
    """
    filled = _iota(bins.mass.size) < bins.used
    reach = jnp.max(jnp.where(filled, jnp.abs(bins.mean), 0.0))
    scale = _towards_one(reach)
    scaled = jnp.where(filled, bins.mean * scale, 0.0)
    mass = bins.mass * _towards_one(jnp.max(bins.mass))
    origin = jnp.sum(scaled * (mass / jnp.maximum(jnp.sum(mass), TINY)))
    mean = jnp.where(filled, scaled - origin, 0.0)
    spare = jnp.asarray(spare)
    sums = _running(jnp.stack([mass, mean * mass]))
    last = jnp.where(_iota(mean.size) < bins.used - 1, jnp.roll(mean, -1), mean)
    share = jnp.cbrt(jnp.square(last - mean) * mass)
    data = _Data(mass, mean, share, sums, spare)
    bounds = _optimize(data, _first_bounds(data, bins.used, clusters))
    means = (origin + _clusters(data, bounds)[1]) / scale
    first = bins.mean[jnp.minimum(bounds[:-1], bins.used - 1)]
    means = jnp.where(bounds[1:] - bounds[:-1] == 1, first, means)
    # An empty cluster repeats the one before; if there is none, the last.
    means = lax.cummax(jnp.where(bounds[1:] > bounds[:-1], means, -jnp.inf))
    means = jnp.sort(jnp.where(means == -jnp.inf, means[-1], means))
    few = bins.used <= clusters - spare.astype(jnp.int32)
    place = jnp.minimum(_iota(clusters), bins.used - 1)
    return jnp.where(few, bins.mean[place], means)


def _towards_one(size: Array) -> Array:
    """Return a power of two that brings `size` close to 1: to scale by it is exact.

    It is made from bits (`exp2` is not exact), so that squares neither overflow nor vanish.
    """
    exponent = jnp.clip(lax.bitcast_convert_type(size, jnp.int32) >> 23, 1, 253)
    return lax.bitcast_convert_type((254 - exponent) << 23, jnp.float32)


def _optimize(data: _Data, bounds: Array) -> Array:
    """Sweep until nothing is gained, on three levels."""
    clusters = bounds.size - 1
    wide = _Sweep(max(4, 128 // clusters), 128 if clusters <= 32 else 64, 512)
    for sweep, enough in ((wide, 0.03), (_Sweep(32, 96, 256), 0.003)):
        bounds = _repeat(partial(_coarse_sweep, data, sweep), bounds, enough)
    return _repeat(partial(_fine_sweep, data), bounds, 1e-5)


def _repeat(sweep: Callable[[Array], tuple[Array, Array]], bounds: Array, enough: float) -> Array:
    """Repeat a sweep, which returns new bounds and its relative gain, while it gains `enough`."""

    def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        return *sweep(state[0]), state[2] + 1

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        return (state[1] > enough) & (state[2] < _MOST_SWEEPS)

    start = (bounds, jnp.array(jnp.inf, jnp.float32), jnp.int32(0))
    return lax.while_loop(unfinished, step, start)[0]


def _add(total: _Sums, part: Array) -> _Sums:
    """Add without losing the rounding error (Knuth's two-sum)."""
    high = total.high + part
    back = high - total.high
    return _Sums(high, total.low + ((total.high - (high - back)) + (part - back)))


def _running(parts: Array) -> _Sums:
    """Return the sums before each position, and after the last, of each row."""
    rows = cumulate_rows(parts.reshape(len(parts), -1, ROW))
    zero = jnp.zeros(len(parts), jnp.float32)
    whole, before = lax.scan(
        lambda total, row: (_add(total, row), total), _Sums(zero, zero), rows[:, :, -1].T, unroll=8
    )
    inside = jnp.pad(rows[:, :, :-1], ((0, 0), (0, 0), (1, 0)))
    sums = _add(jax.tree.map(lambda part: jnp.repeat(part.T[:, :, None], ROW, 2), before), inside)
    return jax.tree.map(
        lambda part, last: jnp.append(part.reshape(len(parts), -1), last[:, None], 1), sums, whole
    )


def _first_bounds(data: _Data, used: Array, clusters: int) -> Array:
    """Give each cluster the same share, as the optimum of many clusters would."""
    running = cumulate(data.share)
    spare = data.spare.astype(jnp.int32)
    part = (_iota(clusters - 1) + 1 - spare).astype(jnp.float32)
    part = part / jnp.maximum(clusters - spare, 1).astype(jnp.float32)
    wanted = running[-1] * part
    inner = jnp.minimum(jnp.searchsorted(running, wanted).astype(jnp.int32), used)
    return jnp.concatenate([jnp.zeros(1, jnp.int32), inner, used[None]])


def _clusters(data: _Data, bounds: Array) -> tuple[Array, Array]:
    """Return the mass and the mean of what lies between neighbouring positions."""
    mass, moment = data.sums.between(bounds[:-1], bounds[1:])
    return mass, moment / jnp.maximum(mass, TINY)


def _owners(data: _Data, bounds: Array) -> Array:
    """Return the cluster of each bin."""
    starts = jnp.zeros(data.mass.size + 1, jnp.int32).at[bounds[1:-1]].add(1)
    return cumulate(starts[:-1])


def _error(data: _Data, bounds: Array) -> Array:
    nearest = _clusters(data, bounds)[1][_owners(data, bounds)]
    return jnp.sum(data.mass * jnp.square(data.mean - nearest))


def _coarse_sweep(data: _Data, sweep: _Sweep, bounds: Array) -> tuple[Array, Array]:
    """Find the best boundaries among marks that cut each cluster into `cut` parts.

    The windows of neighbours overlap on one grid of marks, so that the error of every interval of
    up to `span` parts is computed once, by adding parts one at a time: no cancellation.
    """
    cut, span, _ = sweep
    clusters = bounds.size - 1
    half = min(sweep.window, 2 * cut * clusters) // 2
    window = 2 * half
    marks = _marks(data, bounds, cut)
    errors = _interval_errors(data, marks, span)
    ends = (_iota(clusters) + 1) * cut
    before = jnp.sum(errors[cut][ends])
    errors = jnp.pad(errors, ((0, 0), (half, half)), constant_values=jnp.inf)
    # Mark v has the offset v - cut m + half in the window of boundary m.
    offsets = _iota(window)[None, :] - _iota(span + 1)[:, None] + (span + cut)

    def forward(best: Array, boundary: Array) -> tuple[Array, Array]:
        padded = jnp.pad(best, (span, cut), constant_values=jnp.inf)
        last = lax.dynamic_slice_in_dim(errors, boundary * cut, window, 1)
        best = jnp.min(padded[offsets] + last, 0)
        forbidden = data.spare & (boundary == 1) & (_iota(window) + cut - half > cut)
        return jnp.where(forbidden, jnp.inf, best), padded

    def backward(offset: Array, layer: tuple[Array, Array]) -> tuple[Array, Array]:
        padded, boundary = layer
        first = lax.dynamic_slice(padded, (offset + cut,), (span + 1,))[::-1]
        last = lax.dynamic_index_in_dim(errors, boundary * cut + offset, 1, False)
        offset = offset + cut - jnp.argmin(first + last).astype(jnp.int32)
        return offset, marks[(boundary - 1) * cut + offset - half]

    nowhere = jnp.full(window, jnp.inf, jnp.float32).at[half].set(0.0)
    layers = _iota(clusters) + 1
    best, padded = lax.scan(forward, nowhere, layers)
    _, chosen = lax.scan(backward, jnp.int32(half), (padded, layers), reverse=True)
    gain = (before - best[half]) / jnp.maximum(before, TINY)
    return jnp.append(chosen, bounds[-1]), gain


def _marks(data: _Data, bounds: Array, cut: int) -> Array:
    """Cut each cluster into parts with as much of its bins and of its share, taken together.

    The number alone would leave rare values beside a dense mode uncut, the share alone a mode
    beside a gap.
    """
    owner = _owners(data, bounds)
    width = (bounds[1:] - bounds[:-1]).astype(jnp.float32)
    share = jnp.zeros(width.size, jnp.float32).at[owner].add(data.share)
    each = 1 / jnp.maximum(width, 1.0)[owner] + data.share / jnp.maximum(share, TINY)[owner]
    running = jnp.pad(cumulate(each), (1, 0))
    start, end = running[bounds[:-1]][:, None], running[bounds[1:]][:, None]
    part = _iota(cut).astype(jnp.float32)[None, :] / cut
    marks = jnp.searchsorted(running, start + (end - start) * part).astype(jnp.int32)
    marks = jnp.clip(marks, bounds[:-1, None], bounds[1:, None]).at[:, 0].set(bounds[:-1])
    return jnp.append(marks.reshape(-1), bounds[-1])


def _interval_errors(data: _Data, marks: Array, span: int) -> Array:
    """Return (span + 1, marks) errors: of one cluster of the `l` parts before mark `v`."""
    count, means = _clusters(data, marks)
    count, means = jnp.pad(count, (span, 0)), jnp.pad(means, (span, 0))
    inside = _iota(marks.size)

    def widen(state: tuple[Array, Array, Array], length: Array) -> tuple[Any, Array]:
        mass, centre, error = state
        more = lax.dynamic_slice(count, (span - length,), marks.shape)
        part = more / jnp.maximum(mass + more, TINY)
        gap = lax.dynamic_slice(means, (span - length,), marks.shape) - centre
        error = error + gap * gap * mass * part
        return (mass + more, centre + gap * part, error), jnp.where(
            length <= inside, error, jnp.inf
        )

    zero = jnp.zeros(marks.size, jnp.float32)
    _, errors = lax.scan(widen, (zero, zero, zero), _iota(span) + 1)
    return jnp.concatenate([zero[None], errors])


def _fine_sweep(data: _Data, bounds: Array) -> tuple[Array, Array]:
    """Find the best boundaries within 128 bins of the present ones, bin by bin.

    With any reference r_m for cluster m, the error of a partition is
    `sum_m sum_x (x - r_m)^2 - sum_m N_m (mean_m - r_m)^2`. With the present means as references,
    the first term changes only by what crosses a boundary: numbers as small as the change itself.
    """
    clusters = bounds.size - 1
    count, centre = _clusters(data, bounds)
    here = _iota(_FINE_WINDOW)[None, :] - _FINE_WINDOW // 2
    places = jnp.clip(bounds[:, None] + here, 0, bounds[-1]).at[0].set(0)
    places = places.at[1].set(jnp.where(data.spare, 0, places[1])).at[-1].set(bounds[-1])
    moved, moment = data.sums.between(bounds[:, None], places)
    # Moments of what crosses a boundary, about the mean to its right and about that to its left.
    right = moment[:-1] - centre[:, None] * moved[:-1]
    left = moment[1:] - centre[:, None] * moved[1:]
    swap = (centre[1:] - centre[:-1])[:, None] * (left[:-1] + right[1:])
    error = _error(data, bounds)
    # Moves over a wide gap are for the coarse sweeps: here their rounding would hide the gain.
    noise = jnp.square(jnp.maximum(jnp.abs(left[:-1]), jnp.abs(right[1:]))) * _ROUNDING
    swap = jnp.where(noise > jnp.abs(moved[1:-1]) * (0.01 * error / clusters), jnp.inf, swap)
    swap = jnp.concatenate([swap, jnp.zeros((1, _FINE_WINDOW), jnp.float32)])
    layers = (places[:-1], places[1:], moved[:-1], moved[1:], right, left, count)

    def gain(layer: tuple[Array, ...], end: Any) -> Array:
        place, next_place, leaving, entering, right, left, mass = layer
        inside = mass + entering[end][None, :] - leaving[:, None]
        value = jnp.square(left[end][None, :] - right[:, None]) / jnp.maximum(inside, TINY)
        value = jnp.where(inside > 0, value, 0.0)
        return jnp.where(next_place[end][None, :] >= place[:, None], value, -jnp.inf)

    def forward(best: Array, layer: Any) -> tuple[Array, Array]:
        return jnp.min(best[:, None] - gain(layer[0], slice(None)), 0) + layer[1], best

    def backward(end: Array, layer: Any) -> tuple[Array, Array]:
        values = layer[1] - gain(layer[0], end[None])[:, 0]
        end = jnp.argmin(values).astype(jnp.int32)
        return end, layer[0][0][end]

    _, best = lax.scan(forward, jnp.zeros(_FINE_WINDOW, jnp.float32), (layers, swap))
    stay = jnp.int32(_FINE_WINDOW // 2)
    _, chosen = lax.scan(backward, stay, (layers, best), reverse=True)
    chosen = jnp.append(chosen, bounds[-1])
    now = _error(data, chosen)
    gained = (error - now) / jnp.maximum(error, TINY)
    return jnp.where(now < error, chosen, bounds), gained
