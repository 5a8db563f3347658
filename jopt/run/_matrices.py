"""Kernels as the matrices that products read: outputs first, inputs last, one run of memory each.

A matrix may have axes before those two, one for each axis that stacks kernels (a scan's layers, the
copies of a `vmap`). All matrices restore the kernel that they stand for.
"""

import math
from typing import Any

import flax.struct as struct
import jax
import jax.numpy as jnp

from jopt._arrays import expand_blocks, hadamard
from jopt._leaves import Prepared

BLOCK = 64  # 4-bit codes that are packed together, into 32 bytes
WORD = 32  # signs that are packed together


class Matrix(Prepared):
    """What all matrices share.

    Attributes:
      trailing: static; the shape of the kernel without axes that stack kernels.
      contracted: static; which axes of the kernel are inputs, counted from the last, ascending.
    """

    trailing: tuple[int, ...]
    contracted: tuple[int, ...]

    def rows(self) -> jax.Array:
        """Return the matrix as floats, `(..., outputs, inputs)`."""
        raise NotImplementedError

    @property
    def stacked(self) -> tuple[int, ...]:
        """Return the sizes of the axes that stack kernels."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the array that this leaf stands for."""
        return self.stacked + self.trailing

    @property
    def inputs(self) -> int:
        """Return how many inputs each output sums over."""
        return math.prod(self.trailing[axis] for axis in self.contracted)

    @property
    def outputs(self) -> int:
        """Return how many outputs a product has."""
        return math.prod(self.trailing) // max(self.inputs, 1) if self.inputs else self._free()

    def _free(self) -> int:
        axes = range(-len(self.trailing), 0)
        return math.prod(self.trailing[axis] for axis in axes if axis not in self.contracted)

    def restore(self) -> jax.Array:
        """Return the array that this leaf stands for."""
        rank = len(self.trailing)
        contracted = [axis + rank for axis in self.contracted]
        order = [axis for axis in range(rank) if axis not in contracted] + contracted
        spread = self.rows().reshape(*self.stacked, *(self.trailing[axis] for axis in order))
        ahead = len(self.stacked)
        back = [order.index(axis) + ahead for axis in range(rank)]
        return spread.transpose(*range(ahead), *back)


@struct.dataclass
class Int8Matrix(Matrix):
    """Hold a kernel as int8 codes: `x ~ scale * (codes - zero_point)`.

    Attributes:
      codes: int8, `(..., outputs, inputs)`.
      scale: float32, `(..., outputs, groups)`: each covers `inputs // groups` codes in a row.
      zero_point: the code that stands for 0.0, of scale's shape, or None for 0.
      input_scale: float32, `(..., 1)`, or None: the step to which inputs are rounded where they
        are rounded at all; without it each row of inputs has its own.
      trailing: as in `Matrix`.
      contracted: as in `Matrix`.
      dtype: static; that of the restored array.

    Example:
      >>> import jax.numpy as jnp
      >>> codes, scale = jnp.array([[1, 2, 3]], jnp.int8), jnp.array([[0.5]])
      >>> Int8Matrix(codes, scale, trailing=(3, 1), contracted=(-2,)).restore().ravel()
      Array([0.5, 1. , 1.5], dtype=float32)
    """

    codes: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None = None
    input_scale: jax.Array | None = None
    trailing: tuple[int, ...] = struct.field(pytree_node=False, default=())
    contracted: tuple[int, ...] = struct.field(pytree_node=False, default=(-2,))
    dtype: Any = struct.field(pytree_node=False, default=jnp.dtype(jnp.float32))

    @property
    def stacked(self) -> tuple[int, ...]:
        """Return the sizes of the axes that stack kernels."""
        return self.codes.shape[:-2]

    def centred(self) -> jax.Array:
        """Return the codes less their zero points, float32, `(..., outputs, inputs)`."""
        codes = self.codes.astype(jnp.float32)
        if self.zero_point is None:
            return codes
        return codes - expand_blocks(self.zero_point.astype(jnp.float32), codes.shape)

    def rows(self) -> jax.Array:
        """Return the matrix as floats, `(..., outputs, inputs)`."""
        return (expand_blocks(self.scale, self.codes.shape) * self.centred()).astype(self.dtype)


@struct.dataclass
class Int4Matrix(Matrix):
    """Hold a kernel as 4-bit codes, two to a byte: evenly spaced levels, or a codebook.

    `x ~ scale * (code - 8 - zero_point)`, or `x ~ scale * table[code]`. Codes are packed in blocks
    of 64: byte i of a block holds code i in its low half and code 32 + i in its high half. What
    fills up the last block is 8.

    Attributes:
      packed: uint8, `(..., outputs, 32 * ceil(inputs / 64))`.
      scale: float32, `(..., outputs, groups)`: each covers `group` codes in a row.
      zero_point: of scale's shape, or None for 0; not with a table.
      table: float32, `(..., 1 or outputs, 16)`, or None.
      group: static; how many codes share a scale: 32, or a multiple of 64.
      trailing: as in `Matrix`.
      contracted: as in `Matrix`.
      dtype: static; that of the restored array.

    Example:
      >>> import jax.numpy as jnp
      >>> packed, scale = pack4(jnp.array([[9, 10, 11]])), jnp.array([[0.5]])
      >>> leaf = Int4Matrix(packed, scale, trailing=(3, 1), contracted=(-2,))
      >>> leaf.restore().ravel()
      Array([0.5, 1. , 1.5], dtype=float32)
    """

    packed: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None = None
    table: jax.Array | None = None
    group: int = struct.field(pytree_node=False, default=BLOCK)
    trailing: tuple[int, ...] = struct.field(pytree_node=False, default=())
    contracted: tuple[int, ...] = struct.field(pytree_node=False, default=(-2,))
    dtype: Any = struct.field(pytree_node=False, default=jnp.dtype(jnp.float32))

    @property
    def stacked(self) -> tuple[int, ...]:
        """Return the sizes of the axes that stack kernels."""
        return self.packed.shape[:-2]

    def codes(self) -> jax.Array:
        """Return the codes, uint8, 0 to 15, `(..., outputs, inputs)`."""
        return unpack4(self.packed, self.inputs)

    def spread(self, values: jax.Array) -> jax.Array:
        """Repeat what each group has until every input has its own."""
        return jnp.repeat(values, self.group, axis=-1)[..., : self.inputs]

    def rows(self) -> jax.Array:
        """Return the matrix as floats, `(..., outputs, inputs)`."""
        codes = self.codes()
        if self.table is not None:
            tables = jnp.broadcast_to(self.table, (*codes.shape[:-1], 16))
            levels = jnp.take_along_axis(tables, codes.astype(jnp.int32), axis=-1)
        else:
            levels = codes.astype(jnp.float32) - 8
            if self.zero_point is not None:
                levels = levels - self.spread(self.zero_point.astype(jnp.float32))
        return (self.spread(self.scale) * levels).astype(self.dtype)


@struct.dataclass
class SignMatrix(Matrix):
    """Hold a kernel as signs, eight inputs to a byte: `x ~ scale * (2 * bit - 1)`.

    Attributes:
      bits: uint8, `(..., outputs, 4 * ceil(inputs / 32))`: input i is bit `i % 8` of byte `i // 8`;
        the bits beyond the last input are 0.
      scale: float32, `(..., outputs)`.
      trailing: as in `Matrix`.
      contracted: as in `Matrix`.
      dtype: static; that of the restored array.

    Example:
      >>> import jax.numpy as jnp
      >>> bits = jnp.array([[5, 0, 0, 0]], jnp.uint8)
      >>> SignMatrix(bits, jnp.array([2.0]), trailing=(3, 1), contracted=(-2,)).restore().ravel()
      Array([ 2., -2.,  2.], dtype=float32)
    """

    bits: jax.Array
    scale: jax.Array
    trailing: tuple[int, ...] = struct.field(pytree_node=False, default=())
    contracted: tuple[int, ...] = struct.field(pytree_node=False, default=(-2,))
    dtype: Any = struct.field(pytree_node=False, default=jnp.dtype(jnp.float32))

    @property
    def stacked(self) -> tuple[int, ...]:
        """Return the sizes of the axes that stack kernels."""
        return self.bits.shape[:-2]

    def rows(self) -> jax.Array:
        """Return the matrix as floats, `(..., outputs, inputs)`."""
        signs = 2 * unpack_bits(self.bits, self.inputs).astype(jnp.float32) - 1
        return (self.scale[..., None] * signs).astype(self.dtype)


@struct.dataclass
class SparseMatrix(Matrix):
    """Hold the weights of a pruned kernel that are not zero, in compressed rows by output.

    Attributes:
      values: float32, `(entries,)`: those of output 0, then of output 1, and so on.
      columns: uint16 or uint32, `(entries,)`: which input each is multiplied by.
      starts: int32, `(outputs + 1,)`: where the entries of each output begin and end.
      trailing: as in `Matrix`.
      contracted: as in `Matrix`.
      dtype: static; that of the restored array.

    Example:
      >>> import jax.numpy as jnp
      >>> leaf = SparseMatrix(
      ...     jnp.array([5.0]),
      ...     jnp.array([1], jnp.uint16),
      ...     jnp.array([0, 1], jnp.int32),
      ...     trailing=(3, 1),
      ...     contracted=(-2,),
      ... )
      >>> leaf.restore().ravel()
      Array([0., 5., 0.], dtype=float32)
    """

    values: jax.Array
    columns: jax.Array
    starts: jax.Array
    trailing: tuple[int, ...] = struct.field(pytree_node=False, default=())
    contracted: tuple[int, ...] = struct.field(pytree_node=False, default=(-2,))
    dtype: Any = struct.field(pytree_node=False, default=jnp.dtype(jnp.float32))

    @property
    def stacked(self) -> tuple[int, ...]:
        """Return the sizes of the axes that stack kernels: none."""
        return ()

    def rows(self) -> jax.Array:
        """Return the matrix as floats, `(outputs, inputs)`."""
        counts = jnp.diff(self.starts)
        output = jnp.repeat(
            jnp.arange(self.outputs), counts, total_repeat_length=self.values.shape[0]
        )
        dense = jnp.zeros((self.outputs, self.inputs), self.values.dtype)
        return dense.at[output, self.columns.astype(jnp.int32)].set(self.values).astype(self.dtype)


@struct.dataclass
class TurnedMatrix(Matrix):
    """Hold a matrix whose inputs are scaled, and rotated, before it: AWQ, SmoothQuant, rotations.

    `x ~ factor * signs * hadamard(matrix)` along the inputs.

    Attributes:
      matrix: an `Int8Matrix` or another.
      factor: one for each input, `(..., inputs)`, or None for 1.
      signs: int8, -1 or 1 (all 0 for no rotation), `(..., inputs)`, or None for no rotation.

    Example:
      >>> import jax.numpy as jnp
      >>> codes, scale = jnp.array([[1, 2]], jnp.int8), jnp.array([[0.5]])
      >>> inner = Int8Matrix(codes, scale, trailing=(2, 1), contracted=(-2,))
      >>> TurnedMatrix(inner, jnp.array([10.0, 1.0])).restore().ravel()
      Array([5., 1.], dtype=float32)
    """

    matrix: Any
    factor: jax.Array | None = None
    signs: jax.Array | None = None

    @property
    def trailing(self) -> tuple[int, ...]:
        """Return the shape of the kernel without axes that stack kernels."""
        return self.matrix.trailing

    @property
    def contracted(self) -> tuple[int, ...]:
        """Return which axes of the kernel are inputs, counted from the last."""
        return self.matrix.contracted

    @property
    def stacked(self) -> tuple[int, ...]:
        """Return the sizes of the axes that stack kernels."""
        return self.matrix.stacked

    @property
    def dtype(self) -> Any:
        """Return the dtype of the array that this leaf stands for."""
        return self.matrix.dtype

    def turned(self, x: jax.Array) -> jax.Array:
        """Return what the inner matrix is multiplied by, `(..., inputs)`, for inputs `x`.

        Args:
          x: `(..., rows, inputs)`.
        """
        if self.factor is not None:
            x = x * self.factor[..., None, :].astype(x.dtype)
        if self.signs is not None:
            x = _rotated(x, self.signs[..., None, :])
        return x

    def rows(self) -> jax.Array:
        """Return the matrix as floats, `(..., outputs, inputs)`."""
        values = self.matrix.rows()
        if self.signs is not None:
            signs = self.signs[..., None, :].astype(values.dtype)
            whole = hadamard(values.swapaxes(-1, -2)).swapaxes(-1, -2)
            values = jnp.where(signs == 0, values, signs * whole)
        return values if self.factor is None else self.factor[..., None, :] * values


def _rotated(x: jax.Array, signs: jax.Array) -> jax.Array:
    whole = hadamard((x * signs.astype(x.dtype))[..., None])[..., 0]
    return jnp.where(signs == 0, x, whole)


def pack4(codes: jax.Array) -> jax.Array:
    """Pack codes 0 to 15 in blocks of 64; what fills up the last block is 8.

    Args:
      codes: `(..., inputs)`, any integers 0 to 15.

    Returns:
      uint8, `(..., 32 * ceil(inputs / 64))`.

    Example:
      >>> import jax.numpy as jnp
      >>> [hex(byte) for byte in pack4(jnp.arange(16))[:3].tolist()]
      ['0x80', '0x81', '0x82']
    """
    *before, inputs = codes.shape
    fill = -inputs % BLOCK
    edges = [(0, 0)] * len(before) + [(0, fill)]
    filled = jnp.pad(codes.astype(jnp.uint8), edges, constant_values=8)
    halves = filled.reshape(*before, (inputs + fill) // BLOCK, 2, BLOCK // 2)
    return (halves[..., 0, :] | (halves[..., 1, :] << 4)).reshape(*before, (inputs + fill) // 2)


def unpack4(packed: jax.Array, inputs: int) -> jax.Array:
    """Undo `pack4`.

    Example:
      >>> import jax.numpy as jnp
      >>> unpack4(pack4(jnp.arange(5)), 5).tolist()
      [0, 1, 2, 3, 4]
    """
    *before, width = packed.shape
    blocks = packed.reshape(*before, width // (BLOCK // 2), 1, BLOCK // 2)
    halves = jnp.concatenate([blocks & 15, blocks >> 4], axis=-2)
    return halves.reshape(*before, 2 * width)[..., :inputs]


def pack_bits(flags: jax.Array) -> jax.Array:
    """Pack booleans along the last axis into bytes, the lowest bit first, whole words of 32.

    Example:
      >>> import jax.numpy as jnp
      >>> pack_bits(jnp.array([True, False, True])).tolist()
      [5, 0, 0, 0]
    """
    fill = -flags.shape[-1] % WORD
    filled = jnp.pad(flags, [(0, 0)] * (flags.ndim - 1) + [(0, fill)])
    return jnp.packbits(filled, axis=-1, bitorder="little")


def unpack_bits(bits: jax.Array, inputs: int) -> jax.Array:
    """Undo `pack_bits`: uint8, 0 or 1.

    Example:
      >>> import jax.numpy as jnp
      >>> unpack_bits(jnp.array([5, 0, 0, 0], jnp.uint8), 3).tolist()
      [1, 0, 1]
    """
    return jnp.unpackbits(bits, axis=-1, count=inputs, bitorder="little")
