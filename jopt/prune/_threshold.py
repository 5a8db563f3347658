"""Select exactly the `keep` largest scores of one array or of many, without sorting them.

On CPU a kernel does it where there is a compiler (`_natively`), and elsewhere XLA. There scores
become integers of the same order (their float bits), and the cut is found by counting: a sample
brackets it, secant steps close in on it, and even splits make sure that it ends. Equal scores at
the cut are shared out by the same search, run on positions instead of scores.

Counting, which is where the time goes, is in `_counting`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jopt.prune import _natively
from jopt.prune._counting import Seen, as_float32, count, firsts, order_keys

_SAMPLE = 1 << 14
_FILLED_FROM, _FILLED_UP_TO = 1 << 12, 1 << 18


class _Bracket(NamedTuple):
    """Where the cut lies: count(values >= low) >= keep > count(values >= high)."""

    low: Array
    low_count: Array
    high: Array
    high_count: Array
    keep: Array
    probes: Array  # (6,), where to count next


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


def keep_largest_of_leaf(scores: Array, keep: Array | int) -> Array:
    """Do what `keep_largest` does, compiled for few lengths instead of for every shape.

    A network may have fifty shapes, and each takes a second or two to compile. So leaves of up to
    2^18 scores are filled up with NaN, which comes last, to the next power of two. The kernel takes
    any length as it is.

    Example:
        >>> keep_largest_of_leaf(jnp.array([[0.5, 2.0], [jnp.nan, -1.0]]), 3).tolist()
        [[True, True], [False, True]]
    """
    if not 0 < scores.size <= _FILLED_UP_TO or _natively.problem() is None:
        return keep_largest(scores, keep)
    length = max(_FILLED_FROM, 1 << (scores.size - 1).bit_length())
    filled = jnp.pad(scores.reshape(-1), (0, length - scores.size), constant_values=jnp.nan)
    mask = keep_largest(filled, jnp.clip(keep, 0, scores.size))
    return mask[: scores.size].reshape(scores.shape)


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
    keep = jnp.clip(keep, 0, size).astype(jnp.int32)
    if any(flat.dtype == jnp.float64 for flat in flats) or _natively.problem():
        masks = _by_counting(keep, *flats)
    else:
        singles = map(as_float32, flats)
        masks = lax.platform_dependent(keep, *singles, cpu=_by_kernel, default=_by_counting)
    return [mask.reshape(leaf.shape) for mask, leaf in zip(masks, leaves, strict=True)]


def _by_kernel(keep: Array, *flats: Array) -> list[Array]:
    return _natively.keep_largest(flats, keep)


def _by_counting(keep: Array, *flats: Array) -> list[Array]:
    scores = list(flats)
    threshold, last = _find_cut(scores, keep)
    masks = []
    for flat, first in zip(scores, firsts(scores), strict=True):
        keys = order_keys(flat, threshold.dtype)
        tie = (keys == threshold) & (first - lax.iota(threshold.dtype, flat.size) >= last)
        masks.append((keys > threshold) | tie)
    return masks


def _check(leaves: list[Array], size: int, keep: Array | int) -> None:
    for leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"scores must be floating-point, got {leaf.dtype}.")
    if not jnp.issubdtype(jnp.result_type(keep), jnp.integer):
        raise TypeError(f"keep must be an integer, got {jnp.result_type(keep)}.")
    if size >= 2**31:
        raise ValueError(f"scores must number fewer than 2**31, got {size}.")


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
        found = _search(partial(count, flats, index == 1, threshold), bracket)
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
    sample = jnp.sort(jnp.concatenate([order_keys(flat[::stride], dtype) for flat in flats]))
    below = 1 - keep.astype(jnp.float32) / size
    error = jnp.sqrt(below * (1 - below) * sample.size)
    ranks = below * sample.size + jnp.array([-3.0, -1.2, -0.4, 0.4, 1.2, 3.0]) * (error + 1)
    ranks = jnp.clip(ranks, 0, sample.size - 1).astype(jnp.int32)
    # One above: where the cut falls among many ties (zeros), that ends the search at once.
    return sample[ranks] + jnp.array([0, 0, 0, 1, 0, 0], dtype)


def _search(counting: Callable[[Array, Array, Array], Seen], bracket: _Bracket) -> _Bracket:
    """Narrow the bracket until low keeps exactly `keep`, or is the one value left.

    It ends for any values: a pass that leaves over half of the candidates is followed by one that
    leaves a fifth of the span, so at most 31 passes of one kind and 15 (64-bit: 29) of the other.
    """

    def unfinished(bracket: _Bracket) -> Array:
        return (bracket.low_count > bracket.keep) & (bracket.high - bracket.low != 1)

    def step(bracket: _Bracket) -> _Bracket:
        probes = jnp.clip(bracket.probes, bracket.low + 1, bracket.high - 1)
        seen = counting(probes, bracket.low, bracket.high)
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
