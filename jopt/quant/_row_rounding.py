"""Rounding of single rows of a kernel to the levels that `quantize` gives their blocks."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jax.typing import ArrayLike

from jopt._arrays import expand_blocks, materialize, working_dtype
from jopt.layers._feedback import RoundRow
from jopt.layers._outcome import row_axes, to_rows
from jopt.layers._statistics import InputStatistics
from jopt.quant._grids import Leaf, Levels
from jopt.quant._quantize import check_values, quantize
from jopt.quant._spec import QuantSpec


def _block_of_row(counts: tuple[int, ...], sizes: tuple[int, ...]) -> np.ndarray:
    """Return which block each row lies in, rows and blocks numbered in the order of memory."""
    indices = np.indices(sizes).reshape(len(sizes), math.prod(sizes))
    blocks = [
        index // (size // count) for index, size, count in zip(indices, sizes, counts, strict=True)
    ]
    return np.ravel_multi_index(blocks, counts) if counts else np.zeros(1, np.int64)


def _field_by_row(
    field: jax.Array, shape: tuple[int, ...], inputs: int
) -> tuple[jax.Array, np.ndarray]:
    """Return a field as (blocks of rows, outputs or 1, ...), and the block of each row."""
    ndim = len(shape)
    counts, outputs = field.shape[:inputs], field.shape[inputs:ndim]
    extra = field.shape[ndim:]
    if math.prod(outputs) > 1 and outputs != shape[inputs:]:
        spread = (*counts, *shape[inputs:], *extra)
        field = expand_blocks(field, spread)
        outputs = shape[inputs:]
    flat = field.reshape(math.prod(counts), math.prod(outputs), *extra)
    return flat, _block_of_row(counts, shape[:inputs])


def levels_by_row(
    levels: Levels, shape: tuple[int, ...], inputs: int, groups: int
) -> tuple[Levels, list[np.ndarray]]:
    """Return the levels with the groups leading, and for each field the block of each row.

    Args:
      levels: of a kernel, without codes.
      shape: of the kernel.
      inputs: how many leading axes of it are inputs.
      groups: into how many parts the outputs are divided.
    """
    leaves, treedef = jax.tree.flatten(levels)
    pairs = [_field_by_row(field, shape, inputs) for field in leaves]
    columns = math.prod(shape[inputs:])

    def grouped(field: jax.Array) -> jax.Array:
        blocks, outputs, *extra = field.shape
        if outputs == 1:
            return jnp.broadcast_to(field[None], (groups, *field.shape))
        return field.reshape(blocks, groups, columns // groups, *extra).swapaxes(0, 1)

    fields = [grouped(field) for field, _ in pairs]
    return jax.tree.unflatten(treedef, fields), [block for _, block in pairs]


def widened_levels(nearest: Leaf, narrow: Any, wide: Any) -> Levels:
    """Return levels whose scales and codebooks have the dtype in which rounding is done."""

    def widen(field: jax.Array) -> jax.Array:
        return field.astype(wide) if field.dtype == narrow else field

    return jax.tree.map(widen, nearest).replace(codes=None)


def rounding(levels: Levels, blocks: list[jax.Array], spec: QuantSpec) -> RoundRow:
    """Return the function that rounds a row to the levels of its blocks.

    It is a pytree of its levels, so that it can be an argument of compiled functions.
    """
    return Partial(_to_levels(spec), levels, blocks)


@functools.lru_cache(maxsize=256)
def _to_levels(spec: QuantSpec) -> Any:
    """Return the same function for the same spec: what has its levels is compiled once."""

    def round_row(
        levels: Levels, blocks: list[jax.Array], index: jax.Array, values: jax.Array
    ) -> jax.Array:
        fields, treedef = jax.tree.flatten(levels)
        row = [
            jax.lax.dynamic_slice_in_dim(field, block.at[index].get(mode="clip"), 1)
            for field, block in zip(fields, blocks, strict=True)
        ]
        leaf = spec.grid.encode(values[None], jax.tree.unflatten(treedef, row), spec.bits)
        return materialize(leaf)[0].astype(values.dtype)

    return round_row


@functools.partial(jax.jit, static_argnames="spec")
def _row_rounding(weights: jax.Array, gram: jax.Array, spec: QuantSpec) -> RoundRow:
    to_rows(weights, gram)
    wide = working_dtype(weights.dtype)
    levels = widened_levels(quantize(weights, spec), weights.dtype, wide)
    inputs = row_axes(weights.shape, gram.shape[-1])
    groups = gram.shape[0] if gram.ndim == 3 else 1
    by_row, numbers = levels_by_row(levels, weights.shape, inputs, groups)
    blocks = [jnp.asarray(number) for number in numbers]
    if gram.ndim == 2:
        return rounding(jax.tree.map(lambda field: field[0], by_row), blocks, spec)
    return rounding(by_row, [jnp.broadcast_to(each, (groups, len(each))) for each in blocks], spec)


def row_rounding(weights: ArrayLike, statistics: InputStatistics, spec: QuantSpec) -> RoundRow:
    """Make the function that rounds one input of a kernel, to be used within other methods.

    The levels are those of `quantize(weights, spec)`: with `jopt.prune.sparse_gpt` weights are
    pruned and quantized in one pass, and `encode(pruned, fit_levels(weights, spec), spec)` finds
    the codes of the result, which restore to it exactly. Choose a grid that has a zero, such as
    `symmetric` or `affine_zero`: `affine` and `binary` have none, and with them pruned weights
    would not stay zero. Weights that make up for pruned ones grow beyond the range of the
    original: levels of the kernel as a first pass of pruning leaves it fit better.

    Args:
      weights: floating-point kernel whose levels are taken, its inputs on the leading axes.
      statistics: of the layer's inputs; only the shape of `gram` is used.
      spec: bits, block, range and grid.

    Returns:
      `(index, values) -> values`, from an input's number and its values, `(outputs,)`, to their
      nearest levels. It is a pytree, whose arrays have a leading axis of groups if gram has one.

    Raises:
      ValueError: the statistics do not fit the kernel, or `spec.block` does not divide it.
      TypeError: the kernel is not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import quant
      >>> from jopt.layers import InputStatistics
      >>> statistics = InputStatistics(None, None, None, None, jnp.eye(2))
      >>> round_row = row_rounding(jnp.array([[3.0], [-1.0]]), statistics, quant.QuantSpec(3))
      >>> round_row(jnp.int32(1), jnp.array([1.7]))
      Array([2.], dtype=float32)
    """
    array = jnp.asarray(weights)
    check_values(array, spec)
    return _row_rounding(array, statistics.gram, spec)
