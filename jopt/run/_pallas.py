"""Products with int8 and 4-bit weights as Pallas kernels, for TPUs and GPUs.

Codes travel to the processor as they lie and become floats beside it, so that what is read is what
is stored. Run here in interpret mode they give the same figures as the matrix restored; how fast
they are where they are compiled is for the probe to find (see `jopt.run._probe`), and a processor
that refuses one of them takes XLA's product instead.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas

from jopt.run._matrices import Int4Matrix, Int8Matrix
from jopt.run._packing import BLOCK

ROWS, OUTPUTS = 128, 128  # of a tile


def _dot(rows: jax.Array, weights: jax.Array) -> jax.Array:
    """Multiply `(rows, inputs)` by `(outputs, inputs)`."""
    dims = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(rows, weights, dims, preferred_element_type=jnp.float32)


def _level(codes: jax.Array, zero: Any, group: int, middle: int) -> jax.Array:
    """Return what codes of one group stand for, their scale left out."""
    levels = codes.astype(jnp.float32) - middle
    return levels if zero is None else levels - zero[:, group : group + 1]


def _int8_kernel(x: Any, codes: Any, scale: Any, *rest: Any) -> None:
    zero, out = (rest[0][...], rest[1]) if len(rest) == 2 else (None, rest[0])
    inputs, groups = codes.shape[1], scale.shape[1]
    size = inputs // groups
    scales, total = scale[...], jnp.zeros(out.shape, jnp.float32)
    for group in range(groups):
        part = slice(group * size, (group + 1) * size)
        sums = _dot(x[:, part], _level(codes[:, part], zero, group, 0))
        total += sums * scales[:, group][None]
    out[...] = total


def _int4_kernel(x: Any, packed: Any, scale: Any, *rest: Any, group: int) -> None:
    zero, out = (rest[0][...], rest[1]) if len(rest) == 2 else (None, rest[0])
    scales, total = scale[...], jnp.zeros(out.shape, jnp.float32)
    width, half = packed.shape[1], BLOCK // 2
    for start in range(0, width, half):
        block = packed[:, start : start + half]
        for place, codes in ((0, block & 15), (half, block >> 4)):
            first = 2 * start + place
            number = first // group
            if number >= scale.shape[1]:  # what fills the last block up
                continue
            sums = _dot(x[:, first : first + half], _level(codes, zero, number, 8))
            total += sums * scales[:, number][None]
    out[...] = total


def _tiled(
    kernel: Any, x: jax.Array, weights: jax.Array, by_group: list[jax.Array], interpret: bool
) -> jax.Array:
    rows, outputs = x.shape[0], weights.shape[0]
    tall, wide = min(rows, ROWS), min(outputs, OUTPUTS)

    def by_output(array: jax.Array) -> pallas.BlockSpec:
        return pallas.BlockSpec((wide, array.shape[1]), lambda i, j: (j, 0))

    return pallas.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((rows, outputs), jnp.float32),
        grid=(pallas.cdiv(rows, tall), pallas.cdiv(outputs, wide)),
        in_specs=[
            pallas.BlockSpec((tall, x.shape[1]), lambda i, j: (i, 0)),
            by_output(weights),
            *map(by_output, by_group),
        ],
        out_specs=pallas.BlockSpec((tall, wide), lambda i, j: (i, j)),
        interpret=interpret,
    )(x, weights, *by_group)


def int8_product(matrix: Int8Matrix, rows: jax.Array, interpret: bool = False) -> jax.Array:
    """Multiply by int8 codes, inputs as they are.

    Args:
      matrix: not stacked.
      rows: `(rows, inputs)`, float32.
      interpret: whether Pallas interprets the kernel, which runs anywhere.

    Returns:
      `(rows, outputs)`, float32.

    Example:
      >>> import jax.numpy as jnp
      >>> codes, scale = jnp.array([[1, 2, 3]], jnp.int8), jnp.array([[0.5]])
      >>> matrix = Int8Matrix(codes, scale, trailing=(3, 1), contracted=(-2,))
      >>> int8_product(matrix, jnp.ones((2, 3)), interpret=True).ravel()
      Array([3., 3.], dtype=float32)
    """
    by_group = [matrix.scale] + ([] if matrix.zero_point is None else [matrix.zero_point])
    return _tiled(_int8_kernel, rows, matrix.by_rows(), by_group, interpret)


def int4_product(matrix: Int4Matrix, rows: jax.Array, interpret: bool = False) -> jax.Array:
    """Multiply by packed codes of 4 bits, evenly spaced, inputs as they are.

    Args:
      matrix: not stacked, without a table.
      rows: `(rows, inputs)`, float32.
      interpret: as for `int8_product`.

    Returns:
      `(rows, outputs)`, float32.

    Raises:
      ValueError: the matrix has a table.
    """
    if matrix.table is not None:
        raise ValueError("matrix has a table; this product is for evenly spaced codes.")
    matrix = matrix.by_rows()
    fill = -rows.shape[-1] % BLOCK
    filled = jnp.pad(rows, [(0, 0), (0, fill)])
    by_group = [matrix.scale] + ([] if matrix.zero_point is None else [matrix.zero_point])
    kernel = partial(_int4_kernel, group=matrix.group)
    return _tiled(kernel, filled, matrix.packed, by_group, interpret)
