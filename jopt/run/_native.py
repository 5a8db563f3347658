"""Products by native kernels: plain arrays in, plain arrays out, under jit and vmap.

Weights lie by outputs, or in panels of sixteen outputs (`_packing.into_panels`); x is
`(rows, inputs)`, float32. The library must be there: `_build.problem()` is None.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def _call(target: str, shape: tuple[int, ...], *args: jax.Array, **attributes: Any) -> jax.Array:
    out = jax.ShapeDtypeStruct(shape, jnp.float32)
    call = jax.ffi.ffi_call(f"jopt_{target}", out, vmap_method="expand_dims")
    return call(*args, **attributes)


def _or_none(array: jax.Array | None, *shape: int) -> jax.Array:
    return jnp.zeros(shape, jnp.float32) if array is None else array.astype(jnp.float32)


def int8_product(
    x: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None = None,
    fixed: jax.Array | None = None,
    *,
    rounded: bool,
) -> jax.Array:
    """Multiply by int8 codes; inputs are rounded to int8 by row, by a fixed step, or not at all.

    Args:
      x: `(rows, inputs)`.
      codes: int8, `(panels, words, 16, 4)`, the inputs filled up to a multiple of 32.
      scale: `(outputs,)`.
      zero: `(outputs,)`, or None for 0.
      fixed: `(1,)`, or None for a step for each row.
      rounded: whether inputs are rounded.
    """
    shape = (x.shape[0], scale.shape[0])
    ends = _or_none(zero, 0), _or_none(fixed, 0)
    return _call("int8", shape, x, codes, scale, *ends, round=rounded)


def int4_product(
    x: jax.Array,
    packed: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None = None,
    *,
    outputs: int,
    group: int,
    rounded: bool,
) -> jax.Array:
    """Multiply by packed 4-bit codes that are evenly spaced: `scale * (code - 8 - zero)`.

    Args:
      x: `(rows, inputs)`.
      packed: uint8, `(panels, words, 16, 4)`, eight words for 64 inputs.
      scale: `(panels, groups, 16, 1)`.
      zero: of scale's shape, or None for 0.
      outputs: how many there are.
      group: how many codes share a scale.
      rounded: whether inputs are rounded.
    """
    shape = (x.shape[0], outputs)
    more = {"group": np.int64(group), "round": rounded}
    return _call("int4", shape, x, packed, scale, _or_none(zero, 0, 0, 0, 0), **more)


def codebook_product(
    x: jax.Array,
    packed: jax.Array,
    scale: jax.Array,
    table: jax.Array,
    *,
    group: int,
    rounded: bool,
) -> jax.Array:
    """Multiply by packed indices into tables: `scale * table[code]`.

    Args:
      x: `(rows, inputs)`.
      packed: uint8, `(outputs, 32 * ceil(inputs / 64))`.
      scale: `(outputs, groups)`.
      table: `(1 or outputs, 16)`.
      group: how many codes share a scale.
      rounded: whether inputs are rounded, and tables with them.
    """
    shape = (x.shape[0], packed.shape[0])
    more = {"group": np.int64(group), "round": rounded}
    return _call("codebook", shape, x, packed, scale, table, **more)


def signs_product(x: jax.Array, bits: jax.Array, scale: jax.Array) -> jax.Array:
    """Multiply by signs, `(outputs, 4 * ceil(inputs / 32))`, uint8."""
    return _call("signs", (x.shape[0], bits.shape[0]), x, bits, scale)


def binary_product(x: jax.Array, bits: jax.Array, scale: jax.Array) -> jax.Array:
    """Multiply the signs of x by signs: exact counts."""
    return _call("binary", (x.shape[0], bits.shape[0]), x, bits, scale)


def sparse_product(
    x: jax.Array, values: jax.Array, columns: jax.Array, starts: jax.Array, outputs: int
) -> jax.Array:
    """Multiply by sparse weights in compressed rows by output, and there by blocks of inputs."""
    return _call("sparse", (x.shape[0], outputs), x, values, columns, starts)


def floats_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiply by floats; the kernel is `(inputs, outputs)`."""
    return _call("floats", (x.shape[0], kernel.shape[1]), x, kernel)


Pair = tuple[int, int]
Edges = tuple[Pair, Pair]  # padding before and after, along height and width; none is negative


def convolution(x: jax.Array, kernel: jax.Array, strides: Pair, padding: Edges) -> jax.Array:
    """Convolve all channels.

    Args:
      x: float32, `(images, height, width, channels)`.
      kernel: `(rows, columns, channels, outputs)`.
      strides: along height and width.
      padding: before and after, along height and width.
    """
    size = kernel.shape[0], kernel.shape[1]
    return _windows("convolution", x, size, kernel.shape[3], strides, padding, kernel)


def int8_convolution(
    x: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None = None,
    *,
    size: Pair,
    strides: Pair,
    padding: Edges,
) -> jax.Array:
    """Convolve all channels by int8 codes.

    Args:
      x: float32, `(images, height, width, channels)`.
      codes: int8, in panels; those of an output in the order of its window.
      scale: `(outputs,)`.
      zero: `(outputs,)`, or None for 0.
      size: of the window, rows and columns.
      strides: along height and width.
      padding: before and after, along height and width.
    """
    arrays = codes, scale, _or_none(zero, 0)
    attributes = {"size": np.array(size, np.int64)}
    outputs = scale.shape[0]
    return _windows("int8convolution", x, size, outputs, strides, padding, *arrays, **attributes)


def depthwise(x: jax.Array, kernel: jax.Array, strides: Pair, padding: Edges) -> jax.Array:
    """Convolve every channel by itself; the kernel is `(rows, columns, channels)`."""
    size = kernel.shape[0], kernel.shape[1]
    return _windows("depthwise", x, size, kernel.shape[2], strides, padding, kernel)


def _windows(
    target: str,
    x: jax.Array,
    size: Pair,
    outputs: int,
    strides: Pair,
    padding: Edges,
    /,
    *arrays: jax.Array,
    **attributes: Any,
) -> jax.Array:
    ends = zip(x.shape[1:3], padding, size, strides, strict=True)
    sizes = [max(0, (side + sum(pad) - length) // step + 1) for side, pad, length, step in ends]
    before = np.array([padding[0][0], padding[1][0]], np.int64)
    attributes |= {"strides": np.array(strides, np.int64), "padding": before}
    return _call(target, (x.shape[0], *sizes, outputs), x, *arrays, **attributes)
