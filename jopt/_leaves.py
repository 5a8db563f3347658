"""The compressed leaves: data only, so that every other module can know them without their methods.

A compressed model is the user's own pytree with some arrays replaced by the classes of this file.
They are pytrees themselves and carry no static shape, axis or bit-width: what a leaf needs to know
is read from the shapes and dtypes of its arrays, which is why `vmap`, `scan`, `grad`, sharding and
checkpointing work on compressed models unchanged.
"""

import math
from typing import Any

import flax.struct as struct
import jax


class _Shaped:
    """Give what follows from the shape of the array that a leaf stands for."""

    shape: Any

    @property
    def ndim(self) -> int:
        """Return the number of axes of the array that this leaf stands for."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Return the number of elements of the array that this leaf stands for."""
        return math.prod(self.shape)


@struct.dataclass
class QTensor(_Shaped):
    """Hold an array as integer codes and the scale that gives them meaning.

    `x ~ scale * (codes - zero_point)`. `scale` and `zero_point` have as many axes as `codes`, and
    `scale.shape[i]` divides `codes.shape[i]`: each entry covers one block of
    `codes.shape[i] // scale.shape[i]` codes along axis `i`. One scale for everything has shape
    `(1, ..., 1)`, one per output channel of a kernel `(1, ..., channels)`.

    Attributes:
      codes: integers of a native dtype, `int2`, `int4`, `int8` or their unsigned forms. The two
        narrow ones are really packed in memory (see `nbytes`). None in levels that are not yet
        applied to values (see `jopt.quant.Grid`).
      scale: floating-point; its dtype is the dtype of the restored array.
      zero_point: the code that stands for 0.0, of scale's shape, or None for 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import materialize
      >>> leaf = QTensor(jnp.array([[-3, 0, 2]], jnp.int4), jnp.array([[0.5]]), None)
      >>> materialize(leaf)
      Array([[-1.5,  0. ,  1. ]], dtype=float32)
    """

    codes: Any
    scale: jax.Array
    zero_point: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the array that this leaf stands for."""
        return self.codes.shape

    @property
    def dtype(self) -> Any:
        """Return the dtype of the array that this leaf stands for."""
        return self.scale.dtype


@struct.dataclass
class CodebookTensor(_Shaped):
    """Hold an array as indices into a small table of values.

    `x ~ scale * codebook[codes]`. The codebook has one axis more than `codes`: the last one is the
    table, the others count blocks as the axes of a scale do, so one table for everything has shape
    `(1, ..., 1, entries)`. K-means, NF4, logarithmic and any other levels that are not evenly
    spaced are stored so.

    Attributes:
      codes: `uint2`, `uint4` or `uint8`.
      codebook: floating-point; its dtype is the dtype of the restored array.
      scale: of codebook's dtype, one for each block of codes, or None for 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import materialize
      >>> leaf = CodebookTensor(jnp.array([2, 0, 2], jnp.uint2), jnp.array([[-1.0, 0.0, 4.0]]))
      >>> materialize(leaf)
      Array([ 4., -1.,  4.], dtype=float32)
    """

    codes: Any
    codebook: jax.Array
    scale: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the array that this leaf stands for."""
        return self.codes.shape

    @property
    def dtype(self) -> Any:
        """Return the dtype of the array that this leaf stands for."""
        return self.codebook.dtype


@struct.dataclass
class FloatTensor(_Shaped):
    """Hold an array as narrow floats with scales by block: FP8, MXFP and NVFP4.

    `x ~ global_scale * scale * codes`.

    Attributes:
      codes: `float8_e4m3fn`, `float8_e5m2` or `float4_e2m1fn`. Six-bit floats are held in
        `float8_e4m3fn`, which has all their values; a file codes them in six bits or fewer.
      scale: one for each block of codes, of any floating dtype (`float8_e8m0fnu` in MX formats).
      global_scale: `(1, ..., 1)`, or None for 1. The dtype of the restored array is its dtype, or
        scale's where it is None.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import materialize
      >>> codes = jnp.array([1.5, -6.0]).astype(jnp.float4_e2m1fn)
      >>> materialize(FloatTensor(codes, jnp.array([0.5])))
      Array([ 0.75, -3.  ], dtype=float32)
    """

    codes: Any
    scale: jax.Array
    global_scale: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the array that this leaf stands for."""
        return self.codes.shape

    @property
    def dtype(self) -> Any:
        """Return the dtype of the array that this leaf stands for."""
        return (self.scale if self.global_scale is None else self.global_scale).dtype


@struct.dataclass
class BitTensor(_Shaped):
    """Hold the signs of a kernel as single bits, eight inputs of an output channel to a byte.

    `x ~ scale * (2 * bit - 1)`. All axes of a kernel but the last are flattened to its rows, and
    row r of a column is bit `r % 8` of byte `r // 8`; the bits beyond the last row are 0.

    Attributes:
      bits: uint8, `(ceil(rows / 8), columns)`, after any axes of stacked kernels.
      scale: floating-point, as many axes as the kernel; its dtype is that of the restored array.
      extent: no elements: the shape of the kernel, with a last axis of length zero, so that the
        shape is not lost in the padding.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import materialize
      >>> leaf = BitTensor(
      ...     jnp.array([[1, 2]], jnp.uint8), jnp.array([[0.5, 3.0]]), jnp.zeros((2, 2, 0), bool)
      ... )
      >>> materialize(leaf)
      Array([[ 0.5, -3. ],
             [-0.5,  3. ]], dtype=float32)
    """

    bits: jax.Array
    scale: jax.Array
    extent: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the array that this leaf stands for."""
        return self.extent.shape[:-1]

    @property
    def dtype(self) -> Any:
        """Return the dtype of the array that this leaf stands for."""
        return self.scale.dtype


@struct.dataclass
class ScaledTensor(_Shaped):
    """Hold a compressed kernel and one factor for each of its inputs.

    `x ~ factor * tensor`. Methods that scale the inputs of a layer before rounding its kernel
    (AWQ, SmoothQuant) leave the inverse here; a fast forward pass multiplies the activations.

    Attributes:
      tensor: a compressed leaf.
      factor: as many axes as the kernel, one on the last: `(inputs, 1)`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import materialize
      >>> inner = QTensor(jnp.array([[3], [4]], jnp.int8), jnp.array([[1.0]]))
      >>> materialize(ScaledTensor(inner, jnp.array([[1.0], [0.5]])))
      Array([[3.],
             [2.]], dtype=float32)
    """

    tensor: Any
    factor: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the array that this leaf stands for."""
        return self.tensor.shape

    @property
    def dtype(self) -> Any:
        """Return the dtype of the array that this leaf stands for."""
        return self.tensor.dtype


@struct.dataclass
class RotatedTensor(_Shaped):
    """Hold a compressed kernel whose inputs were rotated by a random Hadamard matrix.

    `x ~ signs * hadamard(tensor)` along the input axis, the last but one (see
    `jopt._arrays.hadamard`); where the signs are 0, `x ~ tensor`: it was not rotated.

    Attributes:
      tensor: a compressed leaf, of the rotated kernel.
      signs: int8, -1 or 1 (or all 0), as many axes as the kernel: `(..., inputs, 1)`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import materialize
      >>> inner = QTensor(jnp.array([[1], [1]], jnp.int8), jnp.array([[2.0]]))
      >>> materialize(RotatedTensor(inner, jnp.array([[-1], [1]], jnp.int8))).round(3)
      Array([[-2.828],
             [ 0.   ]], dtype=float32)
    """

    tensor: Any
    signs: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the array that this leaf stands for."""
        return self.tensor.shape

    @property
    def dtype(self) -> Any:
        """Return the dtype of the array that this leaf stands for."""
        return self.tensor.dtype


COMPRESSED_CLASSES: tuple[type, ...] = (
    QTensor,
    CodebookTensor,
    FloatTensor,
    BitTensor,
    ScaledTensor,
    RotatedTensor,
)


class Prepared(_Shaped):
    """Hold a kernel in the order in which a fast product reads it (see `jopt.run.prepare`).

    For running and not for keeping: a file stores the leaf that it was made of.
    """

    def restore(self) -> jax.Array:
        """Return the array that this leaf stands for."""
        raise NotImplementedError


def is_compressed(leaf: Any) -> bool:
    """Return whether `leaf` is a compressed leaf; made to be passed as `is_leaf`.

    Example:
      >>> is_compressed(3.0)
      False
    """
    return isinstance(leaf, (*COMPRESSED_CLASSES, Prepared))
