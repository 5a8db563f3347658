"""Inputs of a layer as rows, and its kernel as the matrix that they are multiplied by.

For every layer, whatever the order of its axes, `rows @ to_matrix(layer, kernel)` is what the layer
computes before its bias.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jopt.layers._uses import GROUP_AXIS, Layer, Use, Window
from jopt.layers._views import Atom


def element_order(atoms: Sequence[Atom], axes: dict[int, int]) -> np.ndarray | None:
    """Return where each element of `axes` (sizes by axis) is among the atoms, None if in order."""
    sizes = [atom.size for atom in atoms]
    steps = np.indices(sizes).reshape(len(atoms), math.prod(sizes))
    coordinates = {axis: np.zeros(steps.shape[1], np.int64) for axis in axes}
    for atom, step in zip(atoms, steps, strict=True):
        if atom.axis in axes:  # others have one step
            along = atom.size - 1 - step if atom.flipped else step
            coordinates[atom.axis] += atom.stride * along
    flat = np.zeros(steps.shape[1], np.int64)
    for axis, size in axes.items():
        flat = flat * size + coordinates[axis]
    order = np.argsort(flat)
    return None if np.array_equal(order, np.arange(order.size)) else order


def _reordered(values: jax.Array, order: np.ndarray | None, axis: int) -> jax.Array:
    return values if order is None else jnp.take(values, order, axis=axis)


def _taps(values: jax.Array, axis: int, size: int, stride: int, dilation: int) -> jax.Array:
    """Stack along a new last axis what each tap of a one-dimensional kernel sees."""
    count = max((values.shape[axis] - (size - 1) * dilation - 1) // stride + 1, 0)
    reach = (count - 1) * stride + 1 if count else 0
    starts = [tap * dilation if count else 0 for tap in range(size)]
    return jnp.stack(
        [lax.slice_in_dim(values, low, low + reach, stride, axis) for low in starts], axis=-1
    )


def patches(values: jax.Array, window: Window) -> jax.Array:
    """Cut out of a convolution's input what each of its outputs sees.

    Only copies, axis by axis: exact in every dtype, with as many slices as the sides sum to.

    Args:
      values: the input, in the layout of `window.dimension_numbers`.
      window: how the kernel moves.

    Returns:
      `(feature groups, outputs, kernel positions * channels of a group)`, channels fastest.
    """
    values = values.transpose(window.dimension_numbers.lhs_spec)
    edges = [(0, 0, 0)] * 2 + [
        (low, high, dilation - 1)
        for (low, high), dilation in zip(window.padding, window.input_dilation, strict=True)
    ]
    values = lax.pad(values, jnp.zeros((), values.dtype), edges)
    for i, size in enumerate(window.size):
        values = _taps(values, 2 + i, size, window.strides[i], window.kernel_dilation[i])
    images, channels, *sizes = values.shape
    groups, rank = window.feature_group_count, len(window.size)
    values = values.reshape(images, groups, channels // groups, *sizes)
    values = jnp.moveaxis(jnp.moveaxis(values, 1, 0), 2, -1)
    count = images * math.prod(sizes[:rank])
    return values.reshape(groups, count, math.prod(sizes[rank:]) * (channels // groups))


def rows_of(use: Use, values: jax.Array) -> jax.Array:
    """Bring an input into rows in the order of the kernel.

    Args:
      use: the layer.
      values: its input, as the product has it.

    Returns:
      `(leading..., count, features)`; the axes that scans loop over are not among the leading.
    """
    layer = use.layer
    if layer.window is not None:
        rows = patches(values, layer.window)
    else:
        taken = (*use.input_batch, *layer.input_axes)
        others = tuple(axis for axis in range(values.ndim) if axis not in taken)
        sizes = [
            math.prod(values.shape[axis] for axis in axes)
            for axes in (use.input_batch, others, layer.input_axes)
        ]
        rows = values.transpose(*use.input_batch, *others, *layer.input_axes).reshape(sizes)
    rows = _reordered(
        rows, element_order(use.summed, {axis: layer.shape[axis] for axis in layer.contracted}), -1
    )
    leading = {axis: layer.shape[axis] for axis in layer.batch if axis not in layer.scanned}
    if layer.grouped is not None:
        leading[GROUP_AXIS] = layer.groups
    rows = _reordered(rows, element_order(use.batch, leading), 0)
    return rows.reshape(*leading.values(), *rows.shape[1:])


def with_scans_in_order(use: Use, rows: jax.Array) -> jax.Array:
    """Bring the axes of finished scans, which lie first, among the leading axes of the kernel."""
    layer = use.layer
    if not use.scanned:
        return rows
    depth = len(use.scanned)
    scanned = {axis: layer.shape[axis] for axis in layer.scanned}
    rows = rows.reshape(math.prod(rows.shape[:depth]), *rows.shape[depth:])
    rows = _reordered(
        rows, element_order([atom for dim in use.scanned for atom in dim], scanned), 0
    )
    rows = rows.reshape(*scanned.values(), *rows.shape[1:])
    now = layer.scanned + tuple(axis for axis in layer.batch if axis not in layer.scanned)
    order = [now.index(axis) for axis in layer.batch]
    return rows.transpose(*order, *range(len(order), rows.ndim))


def to_matrix(layer: Layer, kernel: jax.Array) -> jax.Array:
    """Arrange a kernel as the matrix that the recorded rows are multiplied by.

    rows @ to_matrix(layer, kernel) is what the layer computes before its bias. The features are
    the contracted axes flattened in the kernel's own order.

    Args:
      layer: what `find_layers` says of the kernel.
      kernel: an array of `layer.shape`.

    Returns:
      `(leading..., features, outputs)`, the leading axes those of the recorded rows.

    Raises:
      ValueError: the kernel has another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> table = jnp.array([[1, 2], [3, 4], [5, 6]])  # an embedding used transposed
      >>> layer = Layer("embed", "dot", (3, 2), (1,), (), (), 1, None, (1,), None)
      >>> to_matrix(layer, table)
      Array([[1, 3, 5],
             [2, 4, 6]], dtype=int32)
    """
    if kernel.shape != layer.shape:
        raise ValueError(f"kernel has shape {kernel.shape}; layer {layer.path!r}, {layer.shape}.")
    order, sizes = _matrix_order(layer)
    outputs = kernel.size // max(math.prod(layer.leading) * layer.features, 1)
    return kernel.reshape(sizes).transpose(order).reshape(*layer.leading, layer.features, outputs)


def from_matrix(layer: Layer, matrix: jax.Array) -> jax.Array:
    """Undo `to_matrix`.

    Args:
      layer: what `find_layers` says of the kernel.
      matrix: `(leading..., features, outputs)`.

    Returns:
      An array of `layer.shape`.

    Raises:
      ValueError: the matrix has another number of elements.

    Example:
      >>> import jax.numpy as jnp
      >>> layer = Layer("embed", "dot", (3, 2), (1,), (), (), 1, None, (1,), None)
      >>> from_matrix(layer, jnp.array([[1, 3, 5], [2, 4, 6]]))
      Array([[1, 2],
             [3, 4],
             [5, 6]], dtype=int32)
    """
    if matrix.size != math.prod(layer.shape):
        raise ValueError(f"matrix has shape {matrix.shape}; layer {layer.path!r}, {layer.shape}.")
    order, sizes = _matrix_order(layer)
    spread = matrix.reshape([sizes[axis] for axis in order])
    return spread.transpose(np.argsort(order).tolist()).reshape(layer.shape)


def _matrix_order(layer: Layer) -> tuple[list[int], list[int]]:
    """Return the order of the kernel's axes in its matrix, and their sizes, groups split off."""
    sizes = list(layer.shape)
    if layer.grouped is None:
        return [*layer.batch, *layer.contracted, *layer.free], sizes
    # The groups become an axis of their own, in front of the axis that they divide.
    split = layer.grouped
    sizes[split : split + 1] = [layer.groups, sizes[split] // layer.groups]
    batch, contracted, free = (
        [axis + (axis >= split) for axis in axes]
        for axes in (layer.batch, layer.contracted, layer.free)
    )
    return [*batch, split, *contracted, *free], sizes
