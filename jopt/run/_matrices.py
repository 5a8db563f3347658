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
from jopt.run._packing import (
    BLOCK,
    BYTES,
    into_panels,
    out_of_panels,
    rows_at,
    unpack4,
    unpack_bits,
)


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

    def in_panels(self) -> Any:
        """Return the matrix in panels, as native kernels read it, if its kind has them."""
        return self

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
      codes: int8, `(..., outputs, inputs)`; in panels `(..., panels, words, 16, 4)`, the inputs
        filled up to a multiple of 32.
      scale: float32, `(..., outputs, groups)`: each covers `inputs // groups` codes in a row.
      zero_point: the code that stands for 0.0, of scale's shape, or None for 0.
      input_scale: float32, `(..., 1)`, or None: the step to which inputs are rounded where they
        are rounded at all; without it each row of inputs has its own.
      panels: static; whether the codes lie in panels, as native kernels read them.
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
    panels: bool = struct.field(pytree_node=False, default=False)
    trailing: tuple[int, ...] = struct.field(pytree_node=False, default=())
    contracted: tuple[int, ...] = struct.field(pytree_node=False, default=(-2,))
    dtype: Any = struct.field(pytree_node=False, default=jnp.dtype(jnp.float32))

    @property
    def stacked(self) -> tuple[int, ...]:
        """Return the sizes of the axes that stack kernels."""
        return self.codes.shape[: -4 if self.panels else -2]

    def in_panels(self) -> "Int8Matrix":
        """Return the matrix in panels, which only one with one scale an output has."""
        if self.panels or self.scale.shape[-1] != 1:
            return self
        fill = [(0, 0)] * (self.codes.ndim - 1) + [(0, -self.inputs % 32)]
        codes = into_panels(jnp.pad(self.codes, fill), BYTES)
        return self.replace(codes=codes, panels=True)  # pyright: ignore[reportAttributeAccessIssue]

    def by_rows(self) -> jax.Array:
        """Return the codes, int8, `(..., outputs, inputs)`."""
        if not self.panels:
            return self.codes
        return out_of_panels(self.codes, self.outputs)[..., : self.inputs]

    def at(self, index: jax.Array) -> "Int8Matrix":
        """Return outputs of a matrix that is not stacked, as one by rows."""
        codes = rows_at(self.codes, index) if self.panels else self.codes[index]
        zero = None if self.zero_point is None else self.zero_point[index]
        about = {"trailing": (len(index), self.inputs), "contracted": (-1,), "dtype": self.dtype}
        return Int8Matrix(codes[:, : self.inputs], self.scale[index], zero, **about)

    def centred(self) -> jax.Array:
        """Return the codes less their zero points, float32, `(..., outputs, inputs)`."""
        codes = self.by_rows().astype(jnp.float32)
        if self.zero_point is None:
            return codes
        return codes - expand_blocks(self.zero_point.astype(jnp.float32), codes.shape)

    def rows(self) -> jax.Array:
        """Return the matrix as floats, `(..., outputs, inputs)`."""
        centred = self.centred()
        return (expand_blocks(self.scale, centred.shape) * centred).astype(self.dtype)


@struct.dataclass
class Int4Matrix(Matrix):
    """Hold a kernel as 4-bit codes, two to a byte: evenly spaced levels, or a codebook.

    `x ~ scale * (code - 8 - zero_point)`, or `x ~ scale * table[code]`. Codes are packed in blocks
    of 64: byte i of a block holds code i in its low half and code 32 + i in its high half. What
    fills up the last block is 8.

    In panels, which a matrix without a table may lie in, `packed` is `(..., panels, words, 16, 4)`,
    and `scale` and `zero_point` are `(..., panels, groups, 16, 1)`.

    Attributes:
      packed: uint8, `(..., outputs, 32 * ceil(inputs / 64))`.
      scale: float32, `(..., outputs, groups)`: each covers `group` codes in a row.
      zero_point: of scale's shape, or None for 0; not with a table.
      table: float32, `(..., 1 or outputs, 16)`, or None.
      panels: static; whether all of it lies in panels, as native kernels read it.
      group: static; how many codes share a scale: 32, or a multiple of 64.
      trailing: as in `Matrix`.
      contracted: as in `Matrix`.
      dtype: static; that of the restored array.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.run._packing import pack4
      >>> packed, scale = pack4(jnp.array([[9, 10, 11]])), jnp.array([[0.5]])
      >>> leaf = Int4Matrix(packed, scale, trailing=(3, 1), contracted=(-2,))
      >>> leaf.restore().ravel()
      Array([0.5, 1. , 1.5], dtype=float32)
    """

    packed: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None = None
    table: jax.Array | None = None
    panels: bool = struct.field(pytree_node=False, default=False)
    group: int = struct.field(pytree_node=False, default=BLOCK)
    trailing: tuple[int, ...] = struct.field(pytree_node=False, default=())
    contracted: tuple[int, ...] = struct.field(pytree_node=False, default=(-2,))
    dtype: Any = struct.field(pytree_node=False, default=jnp.dtype(jnp.float32))

    @property
    def stacked(self) -> tuple[int, ...]:
        """Return the sizes of the axes that stack kernels."""
        return self.packed.shape[: -4 if self.panels else -2]

    def in_panels(self) -> "Int4Matrix":
        """Return the matrix in panels, which none with a table has."""
        if self.panels or self.table is not None:
            return self
        arrays = {
            "packed": into_panels(self.packed, BYTES),
            "scale": into_panels(self.scale, 1),
            "zero_point": None if self.zero_point is None else into_panels(self.zero_point, 1),
        }
        return self.replace(panels=True, **arrays)  # pyright: ignore[reportAttributeAccessIssue]

    def by_rows(self) -> "Int4Matrix":
        """Return the matrix by rows."""
        if not self.panels:
            return self
        rows: Any = jax.tree.map(lambda array: out_of_panels(array, self.outputs), self)
        return rows.replace(panels=False)

    def at(self, index: jax.Array) -> "Int4Matrix":
        """Return outputs of a matrix that is not stacked, as one by rows."""

        def rows(array: jax.Array) -> jax.Array:
            if self.panels:
                return rows_at(array, index)
            return array if array.shape[0] == 1 else array[index]  # a table that all share

        found: Any = jax.tree.map(rows, self)
        return found.replace(panels=False, trailing=(len(index), self.inputs), contracted=(-1,))

    def codes(self) -> jax.Array:
        """Return the codes, uint8, 0 to 15, `(..., outputs, inputs)`."""
        return unpack4(self.by_rows().packed, self.inputs)

    def spread(self, values: jax.Array) -> jax.Array:
        """Repeat what each group has until every input has its own."""
        return jnp.repeat(values, self.group, axis=-1)[..., : self.inputs]

    def rows(self) -> jax.Array:
        """Return the matrix as floats, `(..., outputs, inputs)`."""
        whole = self.by_rows()
        codes = whole.codes()
        if self.table is not None:
            tables = jnp.broadcast_to(self.table, (*codes.shape[:-1], 16))
            levels = jnp.take_along_axis(tables, codes.astype(jnp.int32), axis=-1)
        else:
            levels = codes.astype(jnp.float32) - 8
            if whole.zero_point is not None:
                levels = levels - self.spread(whole.zero_point.astype(jnp.float32))
        return (self.spread(whole.scale) * levels).astype(self.dtype)


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

    def in_panels(self) -> "TurnedMatrix":
        """Return the matrix with the inner one as native kernels read it."""
        return TurnedMatrix(self.matrix.in_panels(), self.factor, self.signs)

    def turned(self, x: jax.Array) -> jax.Array:
        """Return what the inner matrix is multiplied by, `(..., inputs)`, for inputs `x`.

        Args:
          x: `(..., rows, inputs)`.
        """
        if self.factor is not None:
            x = x * self.factor[..., None, :].astype(x.dtype)
        if self.signs is not None:
            signs = self.signs[..., None, :]
            whole = hadamard((x * signs.astype(x.dtype))[..., None])[..., 0]
            x = jnp.where(signs == 0, x, whole)
        return x

    def rows(self) -> jax.Array:
        """Return the matrix as floats, `(..., outputs, inputs)`."""
        values = self.matrix.rows()
        if self.signs is not None:
            signs = self.signs[..., None, :].astype(values.dtype)
            whole = hadamard(values.swapaxes(-1, -2)).swapaxes(-1, -2)
            values = jnp.where(signs == 0, values, signs * whole)
        return values if self.factor is None else self.factor[..., None, :] * values
