"""Count how many scores reach each of a few thresholds: the hot loop of `_threshold`.

XLA on CPU vectorises neither `sum(x >= t)` nor a sort, but it does
vectorise sums of slices; compiled once per leaf, these would take minutes. So on CPU a loop copies
the leaves, whatever their shapes, chunk by chunk through the cache into one counting kernel, and
holds no more than a chunk beside the scores. Elsewhere a plain sum is fast and is used.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

_CHUNK = 1 << 17  # half a megabyte: in cache, with the counters beside it
_SLICES = 16  # rows of a tile, added up element by element


class Query(NamedTuple):
    """What a pass looks for, in keys or, if `ties`, in positions of the keys equal to threshold."""

    ties: Array
    threshold: Array
    probes: Array
    low: Array
    high: Array


class Seen(NamedTuple):
    """What it finds: how many reach each probe, the least from low on, the greatest below high."""

    counts: Array
    least: Array
    greatest: Array


def as_float32(scores: Array) -> Array:
    """Return floats as float32, every denormal itself; float64 loses places."""
    if scores.dtype != jnp.bfloat16:
        return scores.astype(jnp.float32)
    # The upper half of a float32; shifted here, as a conversion might flush denormals.
    bits = lax.bitcast_convert_type(scores, jnp.int16).astype(jnp.int32) << 16
    return lax.bitcast_convert_type(bits, jnp.float32)


def order_keys(scores: Array, dtype: jnp.dtype) -> Array:
    """Map floats to integers of the same order: NaN lowest, both zeros 0, every denormal itself.

    All on bits, since XLA on CPU flushes denormals to zero in float comparisons.
    """
    info = jnp.iinfo(dtype)
    wide = jnp.float64 if dtype == jnp.int64 else jnp.float32
    if scores.dtype != jnp.float64:
        scores = as_float32(scores)
    bits = lax.bitcast_convert_type(scores.astype(wide), dtype)
    magnitude = bits & info.max
    keys = jnp.where(bits < 0, -magnitude, magnitude)
    infinity = np.array(np.inf, wide).view(dtype)
    return jnp.where(magnitude > infinity, jnp.array(info.min, dtype), keys)


def firsts(flats: list[Array]) -> list[int]:
    """Return the position of each leaf's first entry; they fall, so the largest are kept."""
    sizes = [flat.size for flat in flats]
    return [sum(sizes[index:]) - 1 for index in range(len(sizes))]


def count(
    flats: list[Array], ties: Array, threshold: Array, probes: Array, low: Array, high: Array
) -> Seen:
    """Count the scores that reach each probe, by the method that suits the device.

    Args:
      flats: the scores, one flat array a leaf.
      ties: whether to count positions of scores whose key is `threshold` instead of keys.
      threshold: that key.
      probes: (n,), where to count.
      low: lower end of the bracket.
      high: upper end of the bracket.

    Returns:
      Counts by probe, and the outermost values within the bracket.
    """
    query = Query(ties, threshold, probes, low, high)
    cpu, default = partial(_count_chunks, flats), partial(_count_plain, flats)
    return lax.platform_dependent(query, cpu=cpu, default=default)


def _values(flat: Array, first: Array | int, query: Query) -> Array:
    keys = order_keys(flat, query.low.dtype)
    positions = first - lax.iota(keys.dtype, flat.size)
    return jnp.where(query.ties, jnp.where(keys == query.threshold, positions, -1), keys)


def _within(values: Array, query: Query) -> tuple[Array, Array]:
    """Replace what lies below low by high, and what reaches high by low: neither wins then."""
    from_low = jnp.where(values >= query.low, values, query.high)
    return from_low, jnp.where(values < query.high, values, query.low)


def _count_plain(flats: list[Array], query: Query) -> Seen:
    seen = Seen(jnp.zeros(query.probes.shape, jnp.int32), query.high, query.low)
    for flat, first in zip(flats, firsts(flats), strict=True):
        if flat.size:
            values = _values(flat, first, query)
            counts = (values[None, :] >= query.probes[:, None]).sum(axis=1, dtype=jnp.int32)
            from_low, to_high = _within(values, query)
            least, greatest = from_low.min(), to_high.max()
            seen = Seen(
                seen.counts + counts,
                jnp.minimum(seen.least, least),
                jnp.maximum(seen.greatest, greatest),
            )
    return seen


def _count_chunks(flats: list[Array], query: Query) -> Seen:
    size = sum(flat.size for flat in flats)
    width = 256 if size >= _SLICES * 256 else 8
    tiles = min(_CHUNK // (_SLICES * width), -(-size // (_SLICES * width)))
    branches, table = _plan_chunks(flats, tiles * _SLICES * width, query)

    def body(index: Array, seen: Seen) -> Seen:
        chunk = lax.switch(table[index, 0], branches, table[index, 1])
        counts, least, greatest = seen
        for values in jnp.unstack(chunk.reshape(tiles, _SLICES, width), axis=1):
            counts += (values[:, None, :] >= query.probes[None, :, None]).astype(jnp.int32)
            from_low, to_high = _within(values, query)
            least, greatest = jnp.minimum(least, from_low), jnp.maximum(greatest, to_high)
        return Seen(counts, least, greatest)

    none = jnp.zeros((tiles, query.probes.size, width), jnp.int32)
    ends = jnp.zeros((tiles, width), query.low.dtype)
    start = Seen(none, ends + query.high, ends + query.low)
    seen = lax.fori_loop(0, table.shape[0], body, start)
    counts = seen.counts.sum(axis=(0, 2), dtype=jnp.int32)
    return Seen(counts, seen.least.min(), seen.greatest.max())


def _plan_chunks(
    flats: list[Array], length: int, query: Query
) -> tuple[list[Callable[[Array], Array]], Array]:
    """List what makes chunks (windows of a large leaf, small leaves packed) and the calls."""
    branches: list[Callable[[Array], Array]] = []
    calls: list[tuple[int, int]] = []
    packed: list[list[tuple[Array, int]]] = [[]]
    for flat, first in zip(flats, firsts(flats), strict=True):
        if flat.size >= length:
            calls += [(len(branches), offset) for offset in range(0, flat.size, length)]
            branches.append(partial(_window, flat, first, length, query))
        elif flat.size:
            if sum(part.size for part, _ in packed[-1]) + flat.size > length:
                packed.append([])
            packed[-1].append((flat, first))
    for parts in filter(None, packed):
        calls.append((len(branches), 0))
        branches.append(partial(_pack, parts, length, query))
    return branches, jnp.array(calls, jnp.int32)


def _window(flat: Array, first: int, length: int, query: Query, offset: Array) -> Array:
    """Take `length` values from offset on; the last window of a leaf is shifted back to fit."""
    begin = jnp.minimum(offset, flat.size - length)
    part = lax.dynamic_slice(flat, (begin,), (length,))
    values = _values(part, (first - begin).astype(query.low.dtype), query)
    already = lax.iota(jnp.int32, length) < offset - begin  # in the window before
    return jnp.where(already, jnp.iinfo(values.dtype).min, values)


def _pack(parts: list[tuple[Array, int]], length: int, query: Query, _: Array) -> Array:
    values = [_values(flat, first, query) for flat, first in parts]
    rest = length - sum(flat.size for flat, _ in parts)
    return jnp.pad(
        jnp.concatenate(values), (0, rest), constant_values=jnp.iinfo(query.low.dtype).min
    )
