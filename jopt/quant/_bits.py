"""Arithmetic on packed bits: products of signs and of ternary codes by counting bits.

Eight signs lie in one byte, the first in its lowest bit. A sum of products of signs is then the
number of equal bits less the number of different ones, which a processor counts a word at a time.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

_ROWS_AT_ONCE = 64
"""Rows of the left operand in one step: it bounds memory, and fits the cache of a processor."""
_WORDS_AT_ONCE = 16
"""Words of a sum in one step: compilers write longer loops of this kind without vectors."""


class TernaryBits(NamedTuple):
    """Hold codes -1, 0 and 1 as two planes of bits.

    Attributes:
      signs: uint8, 1 where the code is 1.
      nonzero: uint8 of the same shape, 1 where the code is not 0. Bits of padding are 0.
    """

    signs: jax.Array
    nonzero: jax.Array


@partial(jax.jit, static_argnames="axis")
def _packed(flags: jax.Array, axis: int) -> jax.Array:
    return jnp.packbits(flags, axis=axis, bitorder="little")


def pack_signs(values: ArrayLike, axis: int = -2) -> jax.Array:
    """Pack the signs of an array along one axis, eight to a byte.

    Element i along the axis is bit `i % 8` of byte `i // 8`, 1 where `x >= 0`. So the sign of 0 and
    of -0.0 is +1, that of NaN is -1, and the bits beyond the end are 0.

    Args:
      values: array of one or more axes; a kernel of more than two is reshaped to (rows, columns)
        first.
      axis: which axis is packed: -2, the inputs of a kernel, or -1, the features of activations.

    Returns:
      uint8, with `ceil(n / 8)` in place of the n elements of that axis.

    Raises:
      ValueError: there is no such axis.

    Example:
      >>> import jax.numpy as jnp
      >>> pack_signs(jnp.array([[3.0, -2.0], [0.0, 5.0], [-1.0, 1.0]]))
      Array([[3, 6]], dtype=uint8)
    """
    array = jnp.asarray(values)
    _check_axis(array, axis, "values")
    return _packed(array >= 0, axis)


def _check_axis(array: jax.Array, axis: int, name: str) -> None:
    if not -array.ndim <= axis < array.ndim:
        raise ValueError(f"{name} of shape {array.shape} have no axis {axis}.")


@partial(jax.jit, static_argnames=("rows", "axis"))
def _unpacked(bits: jax.Array, rows: int, axis: int) -> jax.Array:
    flags = jnp.unpackbits(bits, axis=axis, count=rows, bitorder="little")
    return 2 * flags.astype(jnp.int8) - 1


def unpack_signs(bits: ArrayLike, rows: int, axis: int = -2) -> jax.Array:
    """Undo `pack_signs`.

    Args:
      bits: uint8.
      rows: how many elements the axis had.
      axis: which axis is packed.

    Returns:
      int8, -1 and 1, with `rows` elements along the axis.

    Raises:
      ValueError: `rows` elements do not take as many bytes as the axis has.
      TypeError: `bits` is not uint8.

    Example:
      >>> import jax.numpy as jnp
      >>> unpack_signs(jnp.array([[3, 6]], jnp.uint8), 3)
      Array([[ 1, -1],
             [ 1,  1],
             [-1,  1]], dtype=int8)
    """
    array = jnp.asarray(bits)
    _check_axis(array, axis, "bits")
    _check_bits(array, "bits", rows, axis)
    return _unpacked(array, rows, axis)


def _check_bits(bits: jax.Array, name: str, rows: int, axis: int) -> None:
    if bits.dtype != jnp.uint8:
        raise TypeError(f"{name} must be uint8, not {bits.dtype}.")
    if rows < 0 or -(-rows // 8) != bits.shape[axis]:
        raise ValueError(
            f"rows={rows} take {-(-rows // 8)} bytes, but axis {axis} of {name} has "
            f"{bits.shape[axis]}."
        )


def pack_ternary(values: ArrayLike, axis: int = -2) -> TernaryBits:
    """Pack the signs of an array, zero included, along one axis, eight to a byte.

    Args:
      values: array of one or more axes; only `sign(x)` counts: -1, 0 or 1. NaN counts as -1.
      axis: which axis is packed, as for `pack_signs`.

    Returns:
      Two planes of uint8, with `ceil(n / 8)` in place of the n elements of that axis.

    Raises:
      ValueError: there is no such axis.

    Example:
      >>> import jax.numpy as jnp
      >>> pack_ternary(jnp.array([2.0, 0.0, -1.0]), axis=-1)
      TernaryBits(signs=Array([1], dtype=uint8), nonzero=Array([5], dtype=uint8))
    """
    array = jnp.asarray(values)
    _check_axis(array, axis, "values")
    return TernaryBits(_packed(array > 0, axis), _packed(array != 0, axis))


def _words(bits: jax.Array) -> jax.Array:
    """Join the bytes of the first axis to groups of words of 32 bits, zeros at the end."""
    words = -(-bits.shape[0] // 4)
    groups = max(1, -(-words // _WORDS_AT_ONCE))
    size = -(-words // groups)
    whole = jnp.pad(bits, ((0, 4 * groups * size - bits.shape[0]), (0, 0)))
    parts = whole.reshape(groups, size, 4, bits.shape[1]).astype(jnp.uint32)
    first, second, third, fourth = (parts[:, :, at] << (8 * at) for at in range(4))
    return first | second | third | fourth


def _count(words: jax.Array) -> jax.Array:
    return lax.population_count(words).astype(jnp.int32)


def _sums(score: Callable[[Any, Any], jax.Array], inputs: Any, kernel: Any) -> jax.Array:
    """Add up `score(words of an input, words of an output)` for every pair of the two.

    Loops over rows and over groups of words keep what is not yet added up small.
    """
    left = jax.tree.map(lambda bits: jnp.moveaxis(_words(bits.T), -1, 0), inputs)
    right = jax.tree.map(_words, kernel)  # (groups, words, columns)
    columns = jax.tree.leaves(kernel)[0].shape[-1]

    def one(row: Any) -> jax.Array:
        def step(total: jax.Array, group: Any) -> tuple[jax.Array, None]:
            words, others = group
            words = jax.tree.map(lambda each: each[:, None], words)
            return total + score(words, others).sum(0), None

        return lax.scan(step, jnp.zeros(columns, jnp.int32), (row, right))[0]

    return lax.map(one, left, batch_size=_ROWS_AT_ONCE)


@jax.jit
def _different_bits(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
    return _sums(lambda words, others: _count(words ^ others), inputs, kernel)


def binary_matmul(inputs: ArrayLike, kernel: ArrayLike, rows: int) -> jax.Array:
    """Multiply two matrices of signs that are packed in bits.

    `out = rows - 2 * popcount(inputs xor kernel)`, exactly the product of the matrices of -1 and 1:
    of `rows` products those of different bits are -1. Padding is 0 on both sides and never differs.
    Made for CPUs, on which it beats the float32 product; memory is bounded, since 64 rows of the
    inputs are multiplied at a time.

    Args:
      inputs: uint8, (..., ceil(rows / 8)), packed along the last axis: `pack_signs(x, axis=-1)`.
      kernel: uint8, (ceil(rows / 8), outputs), packed along the first axis, the `bits` of a
        `BitTensor`.
      rows: the number of products in a sum, which bytes alone do not tell.

    Returns:
      int32, (..., outputs).

    Raises:
      ValueError: the shapes do not fit each other, or `rows`.
      TypeError: an operand is not uint8.

    Example:
      >>> import jax.numpy as jnp
      >>> x, w = jnp.array([[1.0, -1.0, 1.0]]), jnp.array([[1.0], [1.0], [1.0]])
      >>> binary_matmul(pack_signs(x, axis=-1), pack_signs(w), 3)
      Array([[1]], dtype=int32)

    References:
      Rastegari et al., "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural
      Networks", 2016, https://arxiv.org/abs/1603.05279, section 3.2.
    """
    left, right = jnp.asarray(inputs), jnp.asarray(kernel)
    _check_operands(left, right)
    _check_bits(right, "kernel", rows, 0)
    different = _different_bits(_as_matrix(left), right)
    return (rows - 2 * different).reshape(*left.shape[:-1], right.shape[1])


def _check_operands(inputs: jax.Array, kernel: jax.Array) -> None:
    if inputs.dtype != jnp.uint8 or kernel.dtype != jnp.uint8:
        raise TypeError(f"operands must be uint8, not {inputs.dtype} and {kernel.dtype}.")
    if kernel.ndim != 2 or inputs.ndim < 1 or inputs.shape[-1] != kernel.shape[0]:
        raise ValueError(f"inputs {inputs.shape} and kernel {kernel.shape} do not multiply.")


def _as_matrix(bits: jax.Array) -> jax.Array:
    return bits.reshape(math.prod(bits.shape[:-1]), bits.shape[-1])


def _agreement(words: TernaryBits, others: TernaryBits) -> jax.Array:
    both = words.nonzero & others.nonzero
    return _count(both) - 2 * _count(both & (words.signs ^ others.signs))


@jax.jit
def _ternary_product(inputs: TernaryBits, kernel: TernaryBits) -> jax.Array:
    return _sums(_agreement, inputs, kernel)


def ternary_matmul(inputs: TernaryBits, kernel: TernaryBits) -> jax.Array:
    """Multiply two matrices of -1, 0 and 1 that are packed in two planes of bits.

    `out = popcount(m) - 2 * popcount(m & (signs xor signs))` with `m` where neither is 0, exactly
    the product of the integers. It costs two counts where signs alone cost one.

    Args:
      inputs: planes of (..., ceil(rows / 8)) bytes: `pack_ternary(x, axis=-1)`.
      kernel: planes of (ceil(rows / 8), outputs) bytes: `pack_ternary(w)`.

    Returns:
      int32, (..., outputs).

    Raises:
      ValueError: the shapes do not fit each other.
      TypeError: a plane is not uint8.

    Example:
      >>> import jax.numpy as jnp
      >>> x, w = jnp.array([[1, 0, -1]]), jnp.array([[1], [1], [-1]])
      >>> ternary_matmul(pack_ternary(x, axis=-1), pack_ternary(w))
      Array([[2]], dtype=int32)

    References:
      Wan et al., "TBN: Convolutional Neural Network with Ternary Inputs and Binary Weights",
      ECCV 2018, section 3.2, here with zeros on both sides.
    """
    left = TernaryBits(*(jnp.asarray(plane) for plane in inputs))
    right = TernaryBits(*(jnp.asarray(plane) for plane in kernel))
    for first, second in zip(left, right, strict=True):
        _check_operands(first, second)
    if left.signs.shape != left.nonzero.shape or right.signs.shape != right.nonzero.shape:
        raise ValueError("the two planes of an operand must have one shape.")
    out = _ternary_product(TernaryBits(*(_as_matrix(plane) for plane in left)), right)
    return out.reshape(*left.signs.shape[:-1], right.signs.shape[1])
