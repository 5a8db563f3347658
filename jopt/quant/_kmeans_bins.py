"""Bins for one-dimensional clustering: many values become few (mass, mean) pairs in rising order.

Bins must be fine wherever an optimal codebook may put a boundary, whatever the scale of the data
there. The cells of an optimal quantizer have a width that goes with `density^(-1/3)`, so bins of
such a width are all about the same part of a cell. They are found by splitting twice: the leading
bits of a float make 4096 fixed nodes (eight a power of two), and a sample of the values says into
how many parts each node is to be split, then into how many each of its parts. Short arrays are
sorted instead, and every distinct value is a bin.

References: P. Panter and W. Dite, "Quantization distortion in pulse-count modulation with
nonuniform spacing of levels", 1951, https://doi.org/10.1109/JRPROC.1951.230419.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

_BITS = 20  # bits of a float below a root node: 12 are left, sign, exponent, three of mantissa
_ROOTS = 1 << (32 - _BITS)
_SAMPLE = 1 << 16
_SORTED = 1 << 12  # sorting no more than these costs no more than the other steps
_BINS_PER_CLUSTER = 512  # of which a third is used: splits are rounded down, some parts are empty
_LEAST_BINS = 1 << 13
ROW = 128  # sizes of bins are multiples of it
TINY = 1e-30  # in a divisor, for 0 / 0 = 0


class Bins(NamedTuple):
    """Occupied bins in rising order, padded with empty ones.

    Attributes:
      mass: (size,) float32, how many values (or how much weight) each bin holds, 0 in the padding.
      mean: (size,) float32, their mean; `inf` in the padding.
      used: int32 scalar, how many bins are occupied.
    """

    mass: Array
    mean: Array
    used: Array


class _Nodes(NamedTuple):
    """Intervals of keys: `2 ** below` keys from `first` on."""

    first: Array
    below: Array


@partial(jax.jit, static_argnums=2)
def summarize(values: Array, weights: Array | None, count: int) -> Bins:
    """Reduce values to bins fine enough for an optimal codebook of `count` entries.

    A value that is not finite gives an occupied bin whose mean is not finite. The size of the
    result depends on `count` and `is_short(values)` alone, so that what follows is compiled once.

    Args:
      values: floating-point, any shape, taken as float32.
      weights: of the same shape, or None for one each.
      count: static.

    Returns:
      The bins.
    """
    flat = jnp.asarray(values, jnp.float32).reshape(-1)
    weights = None if weights is None else jnp.asarray(weights, jnp.float32).reshape(-1)
    if is_short(values):
        return _compact(*_sort(flat, weights))
    return _compact(*_histogram(flat, weights, max(_BINS_PER_CLUSTER * count, _LEAST_BINS)))


def is_short(values: Array) -> bool:
    """Return whether each distinct value gets a bin of its own."""
    return jnp.size(values) <= _SORTED


def order_key(values: Array) -> Array:
    """Map float32 to int32 of the same order; -0.0 and 0.0 are both 0."""
    return _flip(lax.bitcast_convert_type(jnp.where(values == 0, 0.0, values), jnp.int32))


def cumulate(parts: Array) -> Array:
    """Return the running sum of a vector, by products with a triangle of ones.

    `jnp.cumsum` is four times as slow here, and takes longer to compile.
    """
    rows = cumulate_rows(jnp.pad(parts, (0, -parts.size % ROW)).reshape(-1, ROW))
    if rows.shape[0] > 1:
        totals = rows[:, -1]
        rows = rows + (cumulate(totals) - totals)[:, None]
    return rows.reshape(-1)[: parts.size]


def cumulate_rows(rows: Array) -> Array:
    """Return the running sums of rows of 128."""
    ones = jnp.triu(jnp.ones((ROW, ROW), rows.dtype))
    return jnp.matmul(rows, ones, precision=lax.Precision.HIGHEST)


def _flip(bits: Array) -> Array:
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _pad(size: int) -> int:
    return -(-size // ROW) * ROW


def _sort(values: Array, weights: Array | None) -> tuple[Array, Array]:
    weights = jnp.ones_like(values) if weights is None else weights
    ordered, weights = lax.sort((values, weights), num_keys=1)
    first = jnp.append(jnp.array([True]), ordered[1:] != ordered[:-1])
    index = cumulate(first.astype(jnp.int32)) - 1
    zeros = jnp.zeros(_SORTED, jnp.float32)
    return zeros.at[index].add(weights), zeros.at[index].set(ordered)


def _histogram(values: Array, weights: Array | None, extra: int) -> tuple[Array, Array]:
    """Return the mass and the mean of every bin; the mean is that of the values, not the middle."""
    keys = order_key(values)
    first, second, nodes = _grow(keys, extra)
    index, offset = _descend(second, *_descend(first, *_root(keys)))
    # Both sums need these: without a barrier each would be computed twice.
    index, offset = lax.optimization_barrier((index, offset.astype(jnp.float32)))
    size = nodes.first.size
    if weights is None:
        mass = _total(index, jnp.ones(keys.shape, jnp.int32), size).astype(jnp.float32)
    else:
        mass, offset = _total(index, weights, size), offset * weights
    moment = _total(index, offset, size)
    # Floats of one exponent are equally spaced, so the mean of keys is the key of the mean.
    low, high = _ends(nodes)
    steps = jnp.maximum((1 << nodes.below) - 1, 1).astype(jnp.float32)
    inside = moment / jnp.where(mass > 0, mass, 1.0) / steps
    return mass, low + (high - low) * inside


def _grow(keys: Array, extra: int) -> tuple[Array, Array, _Nodes]:
    """Return the tables of both splits and the final nodes, suited to a sample of `keys`."""
    # An odd stride, because the rows of a kernel mostly have an even length.
    sample = keys[:: max(1, keys.size // _SAMPLE) | 1]
    ones = jnp.ones(sample.shape, jnp.float32)
    roots = jnp.arange(-_ROOTS // 2, _ROOTS // 2, dtype=jnp.int32) << _BITS
    nodes = _Nodes(roots, jnp.full(_ROOTS, _BITS, jnp.int32))
    index, offset = _root(sample)
    first, nodes = _split(nodes, _total(index, ones, _ROOTS), _ROOTS)
    index, offset = _descend(first, index, offset)
    second, nodes = _split(nodes, _total(index, ones, nodes.first.size), extra)
    return first, second, nodes


def _total(index: Array, parts: Array, size: int) -> Array:
    return jnp.zeros(size, parts.dtype).at[index].add(parts, mode="promise_in_bounds")


def _ends(nodes: _Nodes) -> tuple[Array, Array]:
    last = nodes.first + ((1 << nodes.below) - 1)
    low, high = _flip(nodes.first), _flip(last)
    return lax.bitcast_convert_type(low, jnp.float32), lax.bitcast_convert_type(high, jnp.float32)


def _split(nodes: _Nodes, mass: Array, extra: int) -> tuple[Array, _Nodes]:
    """Split nodes into at most `extra` more parts, by their `width^(2/3) mass^(1/3)`.

    Half of the parts are given without regard to the width, so that a few huge values cannot take
    everything. The table holds, for each node, the index of its first part and the parts' `below`.
    """
    low, high = _ends(nodes)
    finite = jnp.isfinite(low) & jnp.isfinite(high)
    width = jnp.where(finite, jnp.abs(high / 2 - low / 2), 0.0)
    # Neighbours count a little: the sample may have missed what lies beside it.
    root = jnp.cbrt(mass + 0.25 * (jnp.roll(mass, 1) + jnp.roll(mass, -1)))
    scaled = root * jnp.square(jnp.cbrt(width / jnp.max(width)))
    plain = jnp.where(nodes.below > 0, root, 0.0)
    share = scaled / jnp.maximum(jnp.sum(scaled), TINY) + plain / jnp.maximum(jnp.sum(plain), TINY)
    # A power of two: to find the part that holds a value is then one shift.
    depth = jnp.floor(jnp.log2(jnp.maximum(share * (extra / 2), 1.0))).astype(jnp.int32)
    depth = jnp.minimum(depth, nodes.below)
    parts = jnp.int32(1) << depth
    start = cumulate(parts) - parts
    size = _pad(mass.size + extra)
    parent = cumulate(jnp.zeros(size, jnp.int32).at[start].add(1)) - 1
    below = (nodes.below - depth)[parent]
    inside = jnp.arange(size, dtype=jnp.int32) - start[parent]
    table = (start << 5) | (nodes.below - depth)
    return table, _Nodes(nodes.first[parent] + (inside << below), below)


def _root(keys: Array) -> tuple[Array, Array]:
    return (keys >> _BITS) + _ROOTS // 2, keys & ((1 << _BITS) - 1)


def _descend(table: Array, index: Array, offset: Array) -> tuple[Array, Array]:
    """Go from a node, and a key's offset in it, to the part that holds the key."""
    entry = table.at[index].get(mode="promise_in_bounds")
    below = entry & 31
    return (entry >> 5) + (offset >> below), offset & ((1 << below) - 1)


def _compact(mass: Array, mean: Array) -> Bins:
    """Move the occupied bins to the front. A mass of NaN counts as occupied, to be noticed."""
    occupied = ~(mass <= 0)
    index = cumulate(occupied.astype(jnp.int32))
    target = jnp.where(occupied, index - 1, mass.size)
    packed = jnp.zeros(mass.size, jnp.float32).at[target].set(mass, mode="drop")
    means = jnp.full(mass.size, jnp.inf, jnp.float32).at[target].set(mean, mode="drop")
    return Bins(packed, means, index[-1])


def is_sound(bins: Bins) -> Array:
    """Return whether all values and weights were finite."""
    filled = jnp.arange(bins.mass.size, dtype=jnp.int32) < bins.used
    return jnp.all(~filled | (jnp.isfinite(bins.mean) & jnp.isfinite(bins.mass)))
