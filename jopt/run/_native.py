"""Products by native kernels: plain arrays in, plain arrays out, under jit and vmap.

Weights lie by outputs, or in panels of sixteen outputs (`_packing.into_panels`); x is
`(rows, inputs)`, float32. The library must be there: `_build.problem()` is None.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class After(NamedTuple):
    """What becomes of outputs: `clip((y - less) * times + plus + more, low, high)`.

    Attributes:
      less: `(outputs,)`, or None for 0.
      times: `(outputs,)`, or None for 1.
      plus: `(outputs,)`, or None for 0.
      more: one for each output of each row, or None for 0.
      low: what outputs are at least.
      high: what they are at most.
    """

    less: jax.Array | None = None
    times: jax.Array | None = None
    plus: jax.Array | None = None
    more: jax.Array | None = None
    low: float = -math.inf
    high: float = math.inf

    def operands(self, shape: tuple[int, ...]) -> list[jax.Array]:
        """Return the arrays that are there, for outputs of a shape."""
        more = None if self.more is None else self.more.reshape(shape)
        arrays = self.less, self.times, self.plus, more
        return [array.astype(jnp.float32) for array in arrays if array is not None]

    def attributes(self) -> dict[str, Any]:
        """Return which arrays are there, by bits, and the bounds."""
        arrays = self.less, self.times, self.plus, self.more
        which = sum((array is not None) << place for place, array in enumerate(arrays))
        bounds = {"low": np.float32(self.low), "high": np.float32(self.high)}
        return {"which": np.int64(which)} | bounds


AS_IT_IS = After()


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
    after: After = AS_IT_IS,
) -> jax.Array:
    """Multiply by int8 codes; inputs are rounded to int8 by row, by a fixed step, or not at all.

    Args:
      x: `(rows, inputs)`.
      codes: int8, `(panels, words, 16, 4)`, the inputs filled up to a multiple of 32.
      scale: `(outputs,)`.
      zero: `(outputs,)`, or None for 0.
      fixed: `(1,)`, or None for a step for each row.
      rounded: whether inputs are rounded.
      after: what becomes of the outputs.
    """
    shape = (x.shape[0], scale.shape[0])
    arrays = codes, scale, _or_none(zero, 0), _or_none(fixed, 0), *after.operands(shape)
    return _call("int8", shape, x, *arrays, round=rounded, **after.attributes())


def int4_product(
    x: jax.Array,
    packed: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None = None,
    *,
    outputs: int,
    group: int,
    rounded: bool,
    after: After = AS_IT_IS,
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
      after: what becomes of the outputs.
    """
    shape = (x.shape[0], outputs)
    more = {"group": np.int64(group), "round": rounded} | after.attributes()
    arrays = packed, scale, _or_none(zero, 0, 0, 0, 0), *after.operands(shape)
    return _call("int4", shape, x, *arrays, **more)


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
    x: jax.Array,
    values: jax.Array,
    columns: jax.Array,
    starts: jax.Array,
    scale: jax.Array | None = None,
    *,
    outputs: int,
    rounded: bool = False,
) -> jax.Array:
    """Multiply by sparse weights in compressed rows by output, and there by blocks of inputs.

    Args:
      x: `(rows, inputs)`.
      values: float32 or int8, `(entries,)`.
      columns: uint8, `(entries,)`, from the first input of their block on.
      starts: int32, `(outputs * blocks + 1,)`, by blocks of 256 inputs.
      scale: `(outputs,)`, or None for 1.
      outputs: how many there are.
      rounded: whether inputs are rounded; only for int8.
    """
    arrays = values, columns, starts, _or_none(scale, 0)
    return _call("sparse", (x.shape[0], outputs), x, *arrays, round=rounded)


def floats_product(x: jax.Array, kernel: jax.Array, after: After = AS_IT_IS) -> jax.Array:
    """Multiply by floats; the kernel is `(inputs, outputs)`."""
    shape = (x.shape[0], kernel.shape[1])
    return _call("floats", shape, x, kernel, *after.operands(shape), **after.attributes())


Pair = tuple[int, int]
Edges = tuple[Pair, Pair]  # padding before and after, along height and width; none is negative


def convolution(
    x: jax.Array, kernel: jax.Array, strides: Pair, padding: Edges, after: After = AS_IT_IS
) -> jax.Array:
    """Convolve all channels.

    Args:
      x: float32, `(images, height, width, channels)`.
      kernel: `(rows, columns, channels, outputs)`.
      strides: along height and width.
      padding: before and after, along height and width.
      after: what becomes of the outputs.
    """
    size = kernel.shape[0], kernel.shape[1]
    return _windows("convolution", x, size, kernel.shape[3], strides, padding, after, kernel)


def int8_convolution(
    x: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None = None,
    *,
    size: Pair,
    strides: Pair,
    padding: Edges,
    after: After = AS_IT_IS,
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
      after: what becomes of the outputs.
    """
    arrays = codes, scale, _or_none(zero, 0)
    attributes = {"size": np.array(size, np.int64)}
    about = size, scale.shape[0], strides, padding, after
    return _windows("int8convolution", x, *about, *arrays, **attributes)


def depthwise(
    x: jax.Array, kernel: jax.Array, strides: Pair, padding: Edges, after: After = AS_IT_IS
) -> jax.Array:
    """Convolve every channel by itself; the kernel is `(rows, columns, channels)`."""
    size = kernel.shape[0], kernel.shape[1]
    return _windows("depthwise", x, size, kernel.shape[2], strides, padding, after, kernel)


def _windows(
    target: str,
    x: jax.Array,
    size: Pair,
    outputs: int,
    strides: Pair,
    padding: Edges,
    after: After,
    /,
    *arrays: jax.Array,
    **attributes: Any,
) -> jax.Array:
    ends = zip(x.shape[1:3], padding, size, strides, strict=True)
    sizes = [max(0, (side + sum(pad) - length) // step + 1) for side, pad, length, step in ends]
    before = np.array([padding[0][0], padding[1][0]], np.int64)
    attributes |= {"strides": np.array(strides, np.int64), "padding": before} | after.attributes()
    shape = x.shape[0], *sizes, outputs
    return _call(target, shape, x, *arrays, *after.operands(shape), **attributes)
