"""Select exactly the `keep` largest scores of one array or of many, without sorting them.

Scores become integers of the same order (their float bits), and the cut is found by counting: a
sample brackets it, secant steps close in on it, and even splits make sure that it ends. Equal
scores at the cut are shared out by the same search, run on positions instead of scores.

Counting is where the time goes. XLA on CPU vectorises neither `sum(x >= t)` nor a sort, but it does
vectorise sums of slices; compiled once per leaf, these would take minutes. So on CPU a loop copies
the leaves, whatever their shapes, chunk by chunk through the cache into one counting kernel, and
holds no more than a chunk beside the scores. Elsewhere a plain sum is fast and is used.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

_CHUNK = 1 << 17  # half a megabyte: in cache, with the counters beside it
_SLICES = 16  # rows of a tile, added up element by element
_SAMPLE = 1 << 14


class _Bracket(NamedTuple):
    """Where the cut lies: count(values >= low) >= keep > count(values >= high)."""

    low: Array
    low_count: Array
    high: Array
    high_count: Array
    keep: Array
    probes: Array  # (6,), where to count next


class _Query(NamedTuple):
    """What a pass looks for, in keys or, if `ties`, in positions of the keys equal to threshold."""

    ties: Array
    threshold: Array
    probes: Array
    low: Array
    high: Array


class _Seen(NamedTuple):
    """What it finds: how many reach each probe, the least from low on, the greatest below high."""

    counts: Array
    least: Array
    greatest: Array


@jax.jit
def keep_largest(scores: Array, keep: Array | int) -> Array:
    """Mark exactly the `keep` largest scores of one array.

    mask[i] = True iff fewer than `keep` entries precede i in the order of falling score, then
    rising flat index. -0.0 equals 0.0, denormals are told apart, and NaN comes after -inf.

    Args:
        scores: floating-point, any shape, fewer than 2**31 elements. No gradient flows.
        keep: how many to mark, an integer that may be traced; clipped to 0 .. scores.size.

    Returns:
        A boolean array of the shape of `scores` with `keep` True entries, whatever the ties.

    Raises:
        TypeError: `scores` is not floating-point, or `keep` not an integer.
        ValueError: there are 2**31 scores or more.

    Example:
        >>> keep_largest(jnp.array([0.5, 2.0, 0.5, -1.0]), 2).tolist()
        [True, True, False, False]

    References:
        Zhu and Gupta, "To prune, or not to prune", 2017, https://arxiv.org/abs/1710.01878.
    """
    return keep_largest_global([scores], keep)[0]


@jax.jit
def keep_largest_global(scores_leaves: Sequence[Array], keep: Array | int) -> list[Array]:
    """Mark exactly the `keep` largest scores among all leaves together.

    The masks are those of `keep_largest` on the concatenation of the flattened leaves, which is
    never made: equal scores are kept in order of leaf, then of flat index. Leaves of different
    dtypes are compared exactly, as float32; if one is float64, as float64, where float32 denormals
    count as 0.

    Args:
        scores_leaves: floating-point, any shapes, fewer than 2**31 elements. No gradient flows.
        keep: how many to mark in all, an integer that may be traced; clipped to 0 .. their number.

    Returns:
        A list of boolean arrays, one for each leaf and of its shape.

    Raises:
        TypeError: a leaf is not floating-point, or `keep` not an integer.
        ValueError: there are 2**31 scores or more.

    Example:
        >>> masks = keep_largest_global([jnp.array([1.0, 3.0]), jnp.array([[2.0], [3.0]])], 3)
        >>> [m.tolist() for m in masks]
        [[False, True], [[True], [True]]]

    References:
        Frankle and Carbin, "The Lottery Ticket Hypothesis", 2019, https://arxiv.org/abs/1803.03635,
        section 4: one threshold for all layers.
    """
    leaves = [lax.stop_gradient(jnp.asarray(leaf)) for leaf in scores_leaves]
    size = sum(leaf.size for leaf in leaves)
    _check(leaves, size, keep)
    if size == 0:
        return [jnp.zeros(leaf.shape, bool) for leaf in leaves]
    flats = [leaf.reshape(-1) for leaf in leaves]
    threshold, last = _find_cut(flats, jnp.clip(keep, 0, size).astype(jnp.int32))
    masks = []
    for leaf, flat, first in zip(leaves, flats, _firsts(flats), strict=True):
        keys = _order_keys(flat, threshold.dtype)
        tie = (keys == threshold) & (first - lax.iota(threshold.dtype, flat.size) >= last)
        masks.append(((keys > threshold) | tie).reshape(leaf.shape))
    return masks


def _check(leaves: list[Array], size: int, keep: Array | int) -> None:
    for leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"scores must be floating-point, got {leaf.dtype}.")
    if not jnp.issubdtype(jnp.result_type(keep), jnp.integer):
        raise TypeError(f"keep must be an integer, got {jnp.result_type(keep)}.")
    if size >= 2**31:
        raise ValueError(f"scores must number fewer than 2**31, got {size}.")


def _order_keys(scores: Array, dtype: jnp.dtype) -> Array:
    """Map floats to integers of the same order: NaN lowest, both zeros 0, every denormal itself.

    All on bits, since XLA on CPU flushes denormals to zero in float comparisons.
    """
    info = jnp.iinfo(dtype)
    if scores.dtype == jnp.bfloat16:
        # The upper half of a float32; shifted here, as a conversion might flush denormals.
        bits = lax.bitcast_convert_type(scores, jnp.int16).astype(jnp.int32) << 16
        scores = lax.bitcast_convert_type(bits, jnp.float32)
    wide = jnp.float64 if dtype == jnp.int64 else jnp.float32
    bits = lax.bitcast_convert_type(scores.astype(wide), dtype)
    magnitude = bits & info.max
    keys = jnp.where(bits < 0, -magnitude, magnitude)
    infinity = np.array(np.inf, wide).view(dtype)
    return jnp.where(magnitude > infinity, jnp.array(info.min, dtype), keys)


def _firsts(flats: list[Array]) -> list[int]:
    """Return the position of each leaf's first entry; they fall, so the largest are kept."""
    sizes = [flat.size for flat in flats]
    return [sum(sizes[index:]) - 1 for index in range(len(sizes))]


def _find_cut(flats: list[Array], keep: Array) -> tuple[Array, Array]:
    """Return threshold and last: kept are keys above, and those equal at positions from last on."""
    dtype = jnp.dtype(jnp.int64 if any(f.dtype == jnp.float64 for f in flats) else jnp.int32)
    size = sum(flat.size for flat in flats)
    info = jnp.iinfo(dtype)
    # No key is info.max, so starting there means that nothing is kept.
    low = jnp.where(keep == 0, info.max, info.min).astype(dtype)
    low_count = jnp.where(keep == 0, 0, jnp.int32(size))
    high, zero = jnp.array(info.max, dtype), jnp.int32(0)
    bracket = _Bracket(low, low_count, high, zero, keep, _first_probes(flats, keep, dtype))

    def phase(index: Array, state: tuple[Array, _Bracket]) -> tuple[Array, _Bracket]:
        threshold, bracket = state
        found = _search(partial(_count, flats, index == 1, threshold), bracket)
        # Found in the first phase: `ties` scores equal the threshold, `keep` of them are wanted.
        ties, wanted = found.low_count - found.high_count, keep - found.high_count
        start, end = jnp.zeros((), dtype), jnp.array(size, dtype)
        second = _next_probes(
            _Bracket(start, ties, end, zero, wanted, found.probes), jnp.array(False)
        )
        return jax.tree.map(partial(jnp.where, index == 0), (found.low, second), (threshold, found))

    # One loop for both phases: the counting is compiled once.
    threshold, found = lax.fori_loop(0, 2, phase, (low, bracket))
    return threshold, found.low


def _first_probes(flats: list[Array], keep: Array, dtype: jnp.dtype) -> Array:
    """Probe three standard errors around the cut of a sorted sample, and close to it."""
    size = sum(flat.size for flat in flats)
    stride = max(1, size // _SAMPLE)
    sample = jnp.sort(jnp.concatenate([_order_keys(flat[::stride], dtype) for flat in flats]))
    below = 1 - keep.astype(jnp.float32) / size
    error = jnp.sqrt(below * (1 - below) * sample.size)
    ranks = below * sample.size + jnp.array([-3.0, -1.2, -0.4, 0.4, 1.2, 3.0]) * (error + 1)
    ranks = jnp.clip(ranks, 0, sample.size - 1).astype(jnp.int32)
    # One above: where the cut falls among many ties (zeros), that ends the search at once.
    return sample[ranks] + jnp.array([0, 0, 0, 1, 0, 0], dtype)


def _search(count: Callable[[Array, Array, Array], _Seen], bracket: _Bracket) -> _Bracket:
    """Narrow the bracket until low keeps exactly `keep`, or is the one value left.

    It ends for any values: a pass that leaves over half of the candidates is followed by one that
    leaves a fifth of the span, so at most 31 passes of one kind and 15 (64-bit: 29) of the other.
    """

    def unfinished(bracket: _Bracket) -> Array:
        return (bracket.low_count > bracket.keep) & (bracket.high - bracket.low != 1)

    def step(bracket: _Bracket) -> _Bracket:
        probes = jnp.clip(bracket.probes, bracket.low + 1, bracket.high - 1)
        seen = count(probes, bracket.low, bracket.high)
        # The outermost values within the bracket have known counts: they close gaps at once.
        probes = jnp.append(probes, jnp.stack([seen.least, seen.greatest + 1]))
        counts = jnp.append(seen.counts, jnp.stack([bracket.low_count, bracket.high_count]))
        enough = counts >= bracket.keep
        narrowed = _Bracket(
            jnp.max(jnp.where(enough, probes, bracket.low)),
            jnp.min(jnp.where(enough, counts, bracket.low_count)),
            jnp.min(jnp.where(enough, bracket.high, probes)),
            jnp.max(jnp.where(enough, bracket.high_count, counts)),
            bracket.keep,
            bracket.probes,
        )
        left = narrowed.low_count - narrowed.high_count
        stalled = left > (bracket.low_count - bracket.high_count) // 2
        return _next_probes(narrowed, stalled)

    return lax.while_loop(unfinished, step, bracket)


def _next_probes(bracket: _Bracket, stalled: Array) -> _Bracket:
    """Probe around where a straight line puts the cut; if stalled, split the span evenly."""
    unsigned = jnp.uint64 if bracket.low.dtype == jnp.int64 else jnp.uint32
    # The difference may overflow; modulo the word size it is right.
    span = (bracket.high - bracket.low).astype(unsigned)
    inside = jnp.maximum(bracket.low_count - bracket.high_count, 1).astype(jnp.float32)
    at = ((bracket.low_count - bracket.keep).astype(jnp.float32) + 0.5) / inside
    noise = jnp.sqrt(jnp.maximum(at * (1 - at), 0) / inside)
    reach = 2.5 * noise + 1 / 128  # the second part: density is not constant over the bracket
    spread = jnp.stack([-reach, -0.9 * noise, -0.3 * noise, 0.3 * noise, 0.9 * noise, reach])
    line = jnp.clip(at + spread, 0, 0.999) * span.astype(jnp.float32)
    fifth = span // 5
    # The first becomes low + 1: it ends the search where low itself is a value of many ties.
    even = jnp.stack([fifth * 0, span >> 5, fifth, fifth * 2, fifth * 3, fifth * 4])
    steps = jnp.where(stalled, even, line.astype(unsigned))
    return bracket._replace(probes=bracket.low + steps.astype(bracket.low.dtype))


def _count(
    flats: list[Array], ties: Array, threshold: Array, probes: Array, low: Array, high: Array
) -> _Seen:
    query = _Query(ties, threshold, probes, low, high)
    cpu, default = partial(_count_chunks, flats), partial(_count_plain, flats)
    return lax.platform_dependent(query, cpu=cpu, default=default)


def _values(flat: Array, first: Array | int, query: _Query) -> Array:
    keys = _order_keys(flat, query.low.dtype)
    positions = first - lax.iota(keys.dtype, flat.size)
    return jnp.where(query.ties, jnp.where(keys == query.threshold, positions, -1), keys)


def _within(values: Array, query: _Query) -> tuple[Array, Array]:
    """Replace what lies below low by high, and what reaches high by low: neither wins then."""
    from_low = jnp.where(values >= query.low, values, query.high)
    return from_low, jnp.where(values < query.high, values, query.low)


def _count_plain(flats: list[Array], query: _Query) -> _Seen:
    seen = _Seen(jnp.zeros(query.probes.shape, jnp.int32), query.high, query.low)
    for flat, first in zip(flats, _firsts(flats), strict=True):
        if flat.size:
            values = _values(flat, first, query)
            counts = (values[None, :] >= query.probes[:, None]).sum(axis=1, dtype=jnp.int32)
            from_low, to_high = _within(values, query)
            least, greatest = from_low.min(), to_high.max()
            seen = _Seen(
                seen.counts + counts,
                jnp.minimum(seen.least, least),
                jnp.maximum(seen.greatest, greatest),
            )
    return seen


def _count_chunks(flats: list[Array], query: _Query) -> _Seen:
    size = sum(flat.size for flat in flats)
    width = 256 if size >= _SLICES * 256 else 8
    tiles = min(_CHUNK // (_SLICES * width), -(-size // (_SLICES * width)))
    branches, table = _plan_chunks(flats, tiles * _SLICES * width, query)

    def body(index: Array, seen: _Seen) -> _Seen:
        chunk = lax.switch(table[index, 0], branches, table[index, 1])
        counts, least, greatest = seen
        for values in jnp.unstack(chunk.reshape(tiles, _SLICES, width), axis=1):
            counts += (values[:, None, :] >= query.probes[None, :, None]).astype(jnp.int32)
            from_low, to_high = _within(values, query)
            least, greatest = jnp.minimum(least, from_low), jnp.maximum(greatest, to_high)
        return _Seen(counts, least, greatest)

    none = jnp.zeros((tiles, query.probes.size, width), jnp.int32)
    ends = jnp.zeros((tiles, width), query.low.dtype)
    start = _Seen(none, ends + query.high, ends + query.low)
    seen = lax.fori_loop(0, table.shape[0], body, start)
    counts = seen.counts.sum(axis=(0, 2), dtype=jnp.int32)
    return _Seen(counts, seen.least.min(), seen.greatest.max())


def _plan_chunks(
    flats: list[Array], length: int, query: _Query
) -> tuple[list[Callable[[Array], Array]], Array]:
    """List what makes chunks (windows of a large leaf, small leaves packed) and the calls."""
    branches: list[Callable[[Array], Array]] = []
    calls: list[tuple[int, int]] = []
    packed: list[list[tuple[Array, int]]] = [[]]
    for flat, first in zip(flats, _firsts(flats), strict=True):
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


def _window(flat: Array, first: int, length: int, query: _Query, offset: Array) -> Array:
    """Take `length` values from offset on; the last window of a leaf is shifted back to fit."""
    begin = jnp.minimum(offset, flat.size - length)
    part = lax.dynamic_slice(flat, (begin,), (length,))
    values = _values(part, (first - begin).astype(query.low.dtype), query)
    already = lax.iota(jnp.int32, length) < offset - begin  # in the window before
    return jnp.where(already, jnp.iinfo(values.dtype).min, values)


def _pack(parts: list[tuple[Array, int]], length: int, query: _Query, _: Array) -> Array:
    values = [_values(flat, first, query) for flat, first in parts]
    rest = length - sum(flat.size for flat, _ in parts)
    return jnp.pad(
        jnp.concatenate(values), (0, rest), constant_values=jnp.iinfo(query.low.dtype).min
    )
