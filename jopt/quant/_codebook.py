"""Codebooks: grids whose levels are any numbers, named one by one.

`codebook` takes a table from the user, `normal_float` computes the tables of QLoRA (`nf4` is the
one with 16 entries) and `kmeans` fits a table to the values of each block.
"""

import functools
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from jopt._leaves import CodebookTensor
from jopt.quant._grids import Grid
from jopt.quant._kmeans import optimal_codebook_with_zero
from jopt.quant._tables import (
    count_reached,
    encode_nearest,
    nearest_neighbours,
    scale_to,
    shared_table,
    with_codes,
)


@functools.lru_cache
def _table_grid(values: tuple[float, ...], name: str) -> Grid:
    """Return the grid of a sorted table that errors call by `name`."""
    table = np.asarray(values, np.float64)
    largest = float(np.abs(table).max())

    def fit(blocks: jax.Array, low: jax.Array, high: jax.Array, bits: int) -> CodebookTensor:
        del blocks
        if 2**bits < table.size:
            raise ValueError(
                f"grid {name} has {table.size} levels; bits={bits} names only {2**bits}."
            )
        return shared_table(table, scale_to(low, high, largest))

    return Grid(fit, encode_nearest, nearest_neighbours)


def codebook(values: tuple[float, ...]) -> Grid:
    """Make a grid of any table of levels.

    The levels of a block are `scale * values` with `scale = max(|low|, |high|) / max |values|`, so
    that the entry farthest from zero meets the farther end of the range; a block of zeros gets
    scale 1. A value takes the nearest level, and the lower one if it lies exactly between two.
    Zeros stay zero only if the table has a zero.

    Args:
      values: 2 to 256 different finite numbers in any order, as a tuple so that it can be hashed.

    Returns:
      A grid that makes `CodebookTensor` leaves with one table for the whole array and one scale
      for each block. Equal tables give the identical grid.

    Raises:
      TypeError: values is not a tuple of numbers.
      ValueError: there are too few or too many values, one is not finite or occurs twice. At use:
        the bits of the spec name fewer codes than there are values.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import quant
      >>> spec = quant.QuantSpec(2, (), grid=quant.codebook((-1, 0, 2)))
      >>> leaf = quant.quantize(jnp.array([6.0, 2.0, -0.5]), spec)
      >>> leaf.codes, leaf.scale
      (Array([2, 1, 1], dtype=uint2), Array([3.], dtype=float32))
    """
    if not isinstance(values, tuple) or any(
        isinstance(value, bool) or not isinstance(value, int | float) for value in values
    ):
        raise TypeError(f"values must be a tuple of numbers, not {values!r}.")
    if not 2 <= len(values) <= 256:
        raise ValueError(f"values must be 2 to 256 numbers, not {len(values)}.")
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"values must be finite, not {values!r}.")
    if len(set(np.asarray(values, np.float32).tolist())) < len(values):
        raise ValueError(f"values must differ from each other in float32: {values!r}.")
    return _table_grid(tuple(sorted(map(float, values))), "codebook")


def normal_float_values(bits: int) -> tuple[float, ...]:
    """Return the levels of a normal float of `bits` bits, sorted, from -1 to 1.

    With `n = 2^(bits-1)` and the end `t = 1 - (1/(2n - 1) + 1/(2n)) / 4`, half way between the
    two that would leave half a step of probability beyond the last level, there are n levels above
    zero, the quantiles of the normal distribution at n + 1 even steps from t to 1/2 without 1/2,
    and n - 1 below, the negated quantiles at n even steps; then zero, and all are divided by the
    largest. One level more lies above zero than below.

    Args:
      bits: 2 to 8.

    Returns:
      `2^bits` floats.

    Raises:
      ValueError: bits is out of range.

    Example:
      >>> [round(value, 4) for value in normal_float_values(2)]
      [-1.0, 0.0, 0.4358, 1.0]

    References:
      Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023,
      https://arxiv.org/abs/2305.14314, equation 4 and appendix E. The paper gives the 16 numbers
      of NF4; this construction, that of the authors' code, meets them.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"bits of a normal float must be 2 to 8, not {bits!r}.")
    half = 2 ** (bits - 1)
    end = 1 - (1 / (2 * half - 1) + 1 / (2 * half)) / 4
    normal = statistics.NormalDist()

    def quantiles(count: int) -> list[float]:
        return [normal.inv_cdf(end + (0.5 - end) * i / count) for i in range(count)]

    largest = normal.inv_cdf(end)
    above = [value / largest for value in quantiles(half)]
    below = [-value / largest for value in quantiles(half - 1)]
    return tuple([*below, 0.0, *reversed(above)])


def normal_float(bits: int) -> Grid:
    """Make the grid of a normal float: levels that are equally often the nearest to normal values.

    See `normal_float_values` for the levels; they are scaled so that 1 meets the farther end of the
    range. Zero is a level.

    Args:
      bits: 2 to 8; a spec with fewer bits is refused.

    Returns:
      A grid that makes `CodebookTensor` leaves.

    Raises:
      ValueError: bits is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import quant
      >>> spec = quant.QuantSpec(2, (), grid=quant.normal_float(2))
      >>> quant.quantize(jnp.array([-4.0, 0.1, 2.0]), spec).codes
      Array([0, 1, 2], dtype=uint2)

    References:
      Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023,
      https://arxiv.org/abs/2305.14314, section 3.
    """
    return _table_grid(normal_float_values(bits), f"nf{bits}")


nf4 = normal_float(4)
"""The 4-bit normal float of QLoRA: 16 levels, zero among them, seven below it and eight above.

The paper scales by the largest magnitude of each 64 values: `QuantSpec(4, (64, 1), absmax, nf4)`.
"""


# --- k-means --------------------------------------------------------------------------------------


def _kmeans_fit(values: jax.Array, low: jax.Array, high: jax.Array, bits: int) -> CodebookTensor:
    blocked = [axis for axis in range(values.ndim) if low.shape[axis] > 1]
    within = [axis for axis in range(values.ndim) if low.shape[axis] == 1]
    rows = jnp.clip(values, low, high).transpose(blocked + within).reshape(low.size, -1)
    tables = jax.vmap(lambda row: optimal_codebook_with_zero(row, 2**bits))(rows)
    tables = tables.astype(values.dtype).reshape(*low.shape, 2**bits)
    return CodebookTensor(None, tables)  # pyright: ignore[reportArgumentType]


def _kmeans_neighbours(
    values: jax.Array, levels: CodebookTensor, bits: int
) -> tuple[CodebookTensor, CodebookTensor]:
    del bits
    # Entries may be repeated (a block of few different values), so that the neighbour of a code is
    # not always the neighbour of its level.
    table = levels.codebook
    below = jnp.maximum(count_reached(values, table, jnp.greater_equal) - 1, 0)
    above = jnp.minimum(count_reached(values, table, jnp.greater), table.shape[-1] - 1)
    return with_codes(levels, below), with_codes(levels, above)


kmeans = Grid(_kmeans_fit, encode_nearest, _kmeans_neighbours)
"""Fit the table to the values of each block: `2^bits` levels of the least sum of squared errors.

Each block gets its own table, without a scale, by one-dimensional k-means of its values (clipped to
the range); see `optimal_codebook`. Where there are zeros, one level is exactly zero, so that pruned
weights stay zero. A block of fewer different values than levels is restored exactly. A table costs
`2^bits` floats: choose blocks that are much larger, such as `block=()`. Han, Mao, Dally, "Deep
Compression", 2016, https://arxiv.org/abs/1510.00149, section 3; there the optimum is a local one.
"""
