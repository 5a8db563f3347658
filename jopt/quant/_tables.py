"""Search in sorted tables: what every format that is stored as a `CodebookTensor` shares."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jopt._arrays import materialize
from jopt._leaves import CodebookTensor
from jopt.quant._grids import code_dtype

# Up to here each value is compared with every bound (no gather, so that it vectorizes); a binary
# search is quicker beyond.
_COMPARED = 48


def count_reached(
    values: jax.Array, bounds: jax.Array, reaches: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
    """Return how many of the sorted bounds each value reaches.

    Args:
      values: floating-point array.
      bounds: of the dtype of `values`, sorted along the last axis; the axes before it broadcast
        against the axes of `values`.
      reaches: `jnp.greater` or `jnp.greater_equal`.

    Returns:
      An int32 array of the shape of `values`.

    Example:
      >>> import jax.numpy as jnp
      >>> count_reached(jnp.array([1.0, 2.0, 9.0]), jnp.array([[2.0, 3.0]]), jnp.greater)
      Array([0, 0, 2], dtype=int32)
    """
    length = bounds.shape[-1]
    if length <= _COMPARED:
        count = jnp.zeros(values.shape, jnp.int32)
        for index in range(length):
            count = count + reaches(values, bounds[..., index]).astype(jnp.int32)
        return count
    half = 2 ** (length.bit_length() - 1)
    padding = [(0, 0)] * (bounds.ndim - 1) + [(0, 2 * half - 1 - length)]
    bounds = jnp.pad(bounds, padding, constant_values=jnp.inf)
    count = jnp.where(reaches(values, bounds[..., half - 1]), half, 0).astype(jnp.int32)
    while half > 1:
        half //= 2
        reached = reaches(values, _entries(bounds, count + (half - 1)))
        count = count + jnp.where(reached, half, 0).astype(jnp.int32)
    return jnp.minimum(count, length)  # an infinite value reaches the padding as well


def _entries(table: jax.Array, at: jax.Array) -> jax.Array:
    """Return `table[..., at]`, each place from the row that it lies in."""
    if table.size == table.shape[-1]:
        return table.reshape(-1).at[at].get(mode="promise_in_bounds")
    return jnp.take_along_axis(table, at[..., None], -1, mode="promise_in_bounds")[..., 0]


def midpoints(table: jax.Array) -> jax.Array:
    """Return the halfway points between the entries of a sorted table."""
    return 0.5 * table[..., :-1] + 0.5 * table[..., 1:]  # the sum of two large ones could overflow


def scale_to(low: jax.Array, high: jax.Array, largest: float) -> jax.Array:
    """Return the scale at which `largest` meets the farther end of a range.

    `max(|low|, |high|) / largest`, at least the smallest normal number; 1 where the range is zero.
    """
    end = jnp.maximum(jnp.abs(low), jnp.abs(high))
    return jnp.where(end > 0, jnp.maximum(end / largest, jnp.finfo(end.dtype).tiny), 1.0)


def shared_table(values: np.ndarray, scale: jax.Array) -> CodebookTensor:
    """Return the levels of one table for all blocks and a scale for each."""
    table = jnp.asarray(values, scale.dtype).reshape((1,) * scale.ndim + (-1,))
    return CodebookTensor(None, table, scale)  # pyright: ignore[reportArgumentType]


def normalise(values: jax.Array, levels: CodebookTensor) -> jax.Array:
    """Return the values in the units of the codebook."""
    return values if levels.scale is None else values / levels.scale


def with_codes(levels: CodebookTensor, codes: jax.Array) -> CodebookTensor:
    """Return the levels with codes, in the narrowest dtype that names every entry."""
    dtype = code_dtype(levels.codebook.shape[-1])
    return CodebookTensor(codes.astype(dtype), levels.codebook, levels.scale)


def encode_nearest(values: jax.Array, levels: CodebookTensor, bits: int) -> CodebookTensor:
    """Give each value the nearest entry; the lower one, if it lies exactly between two."""
    del bits
    bounds = midpoints(levels.codebook)
    return with_codes(levels, count_reached(normalise(values, levels), bounds, jnp.greater))


def around(values: jax.Array, leaf: CodebookTensor) -> tuple[CodebookTensor, CodebookTensor]:
    """Return the entries below and above each value, if that of `leaf` is one of the two."""
    codes = leaf.codes.astype(jnp.int32)
    restored = materialize(leaf)
    last = leaf.codebook.shape[-1] - 1
    below = jnp.maximum(codes - (restored > values).astype(jnp.int32), 0)
    above = jnp.minimum(codes + (restored < values).astype(jnp.int32), last)
    return with_codes(leaf, below), with_codes(leaf, above)


def nearest_neighbours(
    values: jax.Array, levels: CodebookTensor, bits: int
) -> tuple[CodebookTensor, CodebookTensor]:
    """Return the entries below and above each value, both the same at an entry."""
    return around(values, encode_nearest(values, levels, bits))


def encode_sign(values: jax.Array, levels: CodebookTensor) -> CodebookTensor:
    """Give each value the end of the table -1, 0, 1 on its side, and only a zero the middle."""
    return with_codes(levels, jnp.sign(values).astype(jnp.int32) + 1)


def sign_neighbours(
    values: jax.Array, levels: CodebookTensor
) -> tuple[CodebookTensor, CodebookTensor]:
    """Return the two ends; the nearer one twice beyond them, the middle twice for a zero."""
    ratio = normalise(values, levels)
    below = jnp.where(ratio == 0, 1, jnp.where(ratio >= 1, 2, 0))
    above = jnp.where(ratio == 0, 1, jnp.where(ratio > -1, 2, 0))
    return with_codes(levels, below), with_codes(levels, above)
