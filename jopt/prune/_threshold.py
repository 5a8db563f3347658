"""Select exactly the `keep` largest scores of one array or of many, without sorting them.

Scores become integers of the same order (their float bits), and the cut is found by counting: a sample
brackets it, secant steps close in on it, and steps that split the bracket evenly make sure it ends.
Equal scores at the cut are shared out by the same search, run on positions instead of scores.

Counting is where the time goes. XLA on CPU vectorises neither `sum(x >= t)` nor a sort, but it does
vectorise sums of slices, and compiling one large loop per leaf is slow. So on CPU one small loop copies
the leaves, whatever their shapes, chunk by chunk through the cache into one counting kernel: no more than
a chunk is ever held beside the scores. Elsewhere a plain sum is fast and is used.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

_CHUNK = 1 << 17  # elements in flight: half a megabyte, in cache with the counters beside it
_SLICES = 16  # rows of a tile that are added up element by element before any counter is touched
_SAMPLE = 1 << 14

_Branch = Callable[[Array], Array]


class _Bracket(NamedTuple):
    """Where the cut lies: count(values >= low) >= keep > count(values >= high)."""

    low: Array
    low_count: Array
    high: Array
    high_count: Array
    keep: Array
    probes: Array  # (4,), where to count next


@jax.jit
def keep_largest(scores: Array, keep: Array | int) -> Array:
    """Mark exactly the `keep` largest scores of one array.

    mask[i] = True iff fewer than `keep` entries come before i, ordered by falling score and, among equal
    scores, by rising flat index. -0.0 equals 0.0, denormals are told apart, and NaN comes after -inf.
    The number of True entries is `keep` always, also when every score is the same.

    Args:
        scores: floating-point array of any shape, fewer than 2**31 elements. No gradient flows.
        keep: how many to mark, an integer that may be traced; clipped to 0 .. scores.size.

    Returns:
        A boolean array of the shape of `scores`.

    Raises:
        TypeError: `scores` is not floating-point, or `keep` not an integer.

    Example:
        >>> keep_largest(jnp.array([0.5, 2.0, 0.5, -1.0]), 2).tolist()
        [True, True, False, False]

    References:
        Zhu and Gupta, "To prune, or not to prune", 2017, https://arxiv.org/abs/1710.01878 (magnitude masks).
    """
    return keep_largest_global([scores], keep)[0]


@jax.jit
def keep_largest_global(scores_leaves: Sequence[Array], keep: Array | int) -> list[Array]:
    """Mark exactly the `keep` largest scores among all leaves together.

    The masks are those of `keep_largest` on the concatenation of the flattened leaves, which is never
    made: equal scores are kept in order of leaf, then of flat index. Leaves may differ in shape and dtype;
    they are compared as float32, exactly, or as float64 where a leaf is float64 (then float32 denormals in
    other leaves count as 0).

    Args:
        scores_leaves: floating-point arrays of any shapes, fewer than 2**31 elements in all. No gradient flows.
        keep: how many to mark in all, an integer that may be traced; clipped to 0 .. the number of scores.

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
        Han, Pool, Tran and Dally, "Learning both weights and connections", 2015,
        https://arxiv.org/abs/1506.02626 (one threshold for a whole network: Frankle and Carbin, 2019).
    """
    leaves = [lax.stop_gradient(jnp.asarray(leaf)) for leaf in scores_leaves]
    size = sum(leaf.size for leaf in leaves)
    _check(leaves, size, keep)
    if size == 0:
        return [jnp.zeros(leaf.shape, bool) for leaf in leaves]
    flats = [leaf.reshape(-1) for leaf in leaves]
    threshold, last = _find_cut(flats, jnp.clip(keep, 0, size).astype(jnp.int32))
    masks, start = [], 0
    for leaf, flat in zip(leaves, flats, strict=True):
        keys = _order_keys(flat, threshold.dtype)
        tie = (keys == threshold) & (_positions(start, flat.size, size, threshold.dtype) >= last)
        masks.append(((keys > threshold) | tie).reshape(leaf.shape))
        start += flat.size
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
    wide = jnp.float64 if dtype == jnp.int64 else jnp.float32
    if scores.dtype == jnp.bfloat16 and dtype == jnp.int32:
        bits = lax.bitcast_convert_type(scores, jnp.int16).astype(dtype) << 16
    else:
        bits = lax.bitcast_convert_type(scores.astype(wide), dtype)
    info = jnp.iinfo(dtype)
    magnitude = bits & info.max
    keys = jnp.where(bits < 0, -magnitude, magnitude)
    infinity = np.array(np.inf, wide).view(dtype)
    return jnp.where(magnitude > infinity, jnp.array(info.min, dtype), keys)


def _positions(start: int, length: int, size: int, dtype: jnp.dtype) -> Array:
    """Positions counted from the end, so that among ties the largest are kept, as with scores."""
    return (size - 1 - start) - lax.iota(dtype, length)


def _find_cut(flats: list[Array], keep: Array) -> tuple[Array, Array]:
    """Return (threshold, last): kept are keys above threshold, and those equal to it from `last` on."""
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
    ranks = below * sample.size + jnp.array([-3.0, -0.6, 0.6, 3.0]) * (error + 1)
    ranks = jnp.clip(ranks, 0, sample.size - 1).astype(jnp.int32)
    # One above the third: where the cut falls among many ties (zeros), that ends the search at once.
    return sample[ranks] + jnp.array([0, 0, 1, 0], dtype)


def _search(count: Callable[[Array], Array], bracket: _Bracket) -> _Bracket:
    """Narrow the bracket until low keeps exactly `keep`, or is the one value left.

    It ends for any values: a pass that leaves more than an eighth of the candidates is followed by one
    that quarters the span. So there are at most 11 passes of one kind and 16 (64-bit: 32) of the other.
    """

    def unfinished(bracket: _Bracket) -> Array:
        return (bracket.low_count > bracket.keep) & (bracket.high - bracket.low != 1)

    def step(bracket: _Bracket) -> _Bracket:
        probes = jnp.clip(bracket.probes, bracket.low + 1, bracket.high - 1)
        counts = count(probes)
        enough = counts >= bracket.keep
        narrowed = _Bracket(
            jnp.max(jnp.where(enough, probes, bracket.low)),
            jnp.min(jnp.where(enough, counts, bracket.low_count)),
            jnp.min(jnp.where(enough, bracket.high, probes)),
            jnp.max(jnp.where(enough, bracket.high_count, counts)),
            bracket.keep,
            probes,
        )
        left = narrowed.low_count - narrowed.high_count
        stalled = left > (bracket.low_count - bracket.high_count) // 8
        return _next_probes(narrowed, stalled)

    return lax.while_loop(unfinished, step, bracket)


def _next_probes(bracket: _Bracket, stalled: Array) -> _Bracket:
    """Probe around where a straight line puts the cut; if stalled, quarter the span."""
    unsigned = jnp.uint64 if bracket.low.dtype == jnp.int64 else jnp.uint32
    span = (bracket.high - bracket.low).astype(
        unsigned
    )  # modular: right although the int may overflow
    inside = jnp.maximum(bracket.low_count - bracket.high_count, 1).astype(jnp.float32)
    at = ((bracket.low_count - bracket.keep).astype(jnp.float32) + 0.5) / inside
    noise = jnp.sqrt(jnp.maximum(at * (1 - at), 0) / inside)
    reach = 2.5 * noise + 1 / 128  # the second part: density is not constant over the bracket
    spread = jnp.stack([-reach, -0.4 * noise, 0.4 * noise, reach])
    line = jnp.clip(at + spread, 0, 0.999) * span.astype(jnp.float32)
    quarters = jnp.stack([jnp.ones((), unsigned), span >> 2, span >> 1, (span >> 1) + (span >> 2)])
    steps = jnp.where(stalled, quarters, line.astype(unsigned))
    return bracket._replace(probes=bracket.low + steps.astype(bracket.low.dtype))


def _count(flats: list[Array], ties: Array, threshold: Array, probes: Array) -> Array:
    """Count, for each probe, the values at or above it.

    The values are the keys of the scores or, if `ties`, the positions of those equal to the threshold.
    """
    return lax.platform_dependent(
        ties,
        threshold,
        probes,
        cpu=partial(_count_chunks, flats),
        default=partial(_count_plain, flats),
    )


def _values(flat: Array, positions: Array, ties: Array, threshold: Array) -> Array:
    keys = _order_keys(flat, threshold.dtype)
    return jnp.where(ties, jnp.where(keys == threshold, positions, -1), keys)


def _count_plain(flats: list[Array], ties: Array, threshold: Array, probes: Array) -> Array:
    size = sum(flat.size for flat in flats)
    total, start = jnp.zeros(probes.shape, jnp.int32), 0
    for flat in flats:
        positions = _positions(start, flat.size, size, probes.dtype)
        values = _values(flat, positions, ties, threshold)
        total += jnp.sum(values[None, :] >= probes[:, None], axis=1, dtype=jnp.int32)
        start += flat.size
    return total


def _count_chunks(flats: list[Array], ties: Array, threshold: Array, probes: Array) -> Array:
    size = sum(flat.size for flat in flats)
    width = 256 if size >= _SLICES * 256 else 8
    tile = _SLICES * width
    length = min(_CHUNK, -(-size // tile) * tile)
    branches, table = _plan_chunks(flats, length, ties, threshold)

    def body(index: Array, counts: Array) -> Array:
        chunk = lax.switch(table[index, 0], branches, table[index, 1])
        tiles = chunk.reshape(-1, _SLICES, width)
        for row in range(_SLICES):
            counts += (tiles[:, row, None, :] >= probes[None, :, None]).astype(jnp.int32)
        return counts

    counts = jnp.zeros((length // tile, probes.size, width), jnp.int32)
    counts = lax.fori_loop(0, table.shape[0], body, counts)
    return counts.sum(axis=(0, 2), dtype=jnp.int32)


def _plan_chunks(
    flats: list[Array], length: int, ties: Array, threshold: Array
) -> tuple[list[_Branch], Array]:
    """List what makes a chunk (a window of a large leaf, or small leaves packed) and when to call it."""
    size = sum(flat.size for flat in flats)
    branches: list[_Branch] = []
    calls: list[tuple[int, int]] = []
    packed: list[list[tuple[Array, int]]] = []
    room, start = 0, 0
    for flat in flats:
        if flat.size >= length:
            calls += [(len(branches), offset) for offset in range(0, flat.size, length)]
            first = size - 1 - start
            branches.append(partial(_window, flat, first, length, ties, threshold))
        else:
            if not packed or flat.size > room:
                packed.append([])
                room = length
            packed[-1].append((flat, start))
            room -= flat.size
        start += flat.size
    for parts in packed:
        calls.append((len(branches), 0))
        branches.append(partial(_pack, parts, size, length, ties, threshold))
    return branches, jnp.array(calls, jnp.int32)


def _window(
    flat: Array, first: int, length: int, ties: Array, threshold: Array, offset: Array
) -> Array:
    """Take `length` values from `offset` on; the last window of a leaf is shifted back to fit."""
    begin = jnp.minimum(offset, flat.size - length)
    steps = lax.iota(threshold.dtype, length)
    positions = (first - begin).astype(threshold.dtype) - steps
    values = _values(lax.dynamic_slice(flat, (begin,), (length,)), positions, ties, threshold)
    counted = steps < (offset - begin).astype(threshold.dtype)  # by the window before
    return jnp.where(counted, jnp.iinfo(threshold.dtype).min, values)


def _pack(
    parts: list[tuple[Array, int]],
    size: int,
    length: int,
    ties: Array,
    threshold: Array,
    offset: Array,
) -> Array:
    del offset
    values = [
        _values(flat, _positions(start, flat.size, size, threshold.dtype), ties, threshold)
        for flat, start in parts
    ]
    rest = length - sum(flat.size for flat, _ in parts)
    values.append(jnp.full(rest, jnp.iinfo(threshold.dtype).min, threshold.dtype))
    return jnp.concatenate(values)
