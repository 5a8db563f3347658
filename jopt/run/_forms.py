"""The ways to multiply rows by a matrix: in XLA alone, and by native kernels.

Each is a function `(matrix, rows) -> outputs`, `(..., rows, inputs)` to `(..., rows, outputs)` in
float32, the axes in front those of the matrix. Inputs are kept as they are, or rounded to int8,
each row in steps of its largest magnitude / 127 or in a fixed step; sums of integers are exact.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jopt.run import _build, _native, _pallas
from jopt.run._matrices import (
    Int4Matrix,
    Int8Matrix,
    Matrix,
    SignMatrix,
)
from jopt.run._native import AS_IT_IS, After
from jopt.run._packing import pack_bits
from jopt.run._pruned import FloatMatrix, SparseMatrix

Product = Callable[[Any, jax.Array], jax.Array]
LONGEST = 1 << 16  # inputs: sums of products of bytes stay within int32
FLOATS = "XLA, floats"


class Form(NamedTuple):
    """A way to multiply.

    Attributes:
      name: what `explain` calls it.
      product: `(matrix, rows) -> outputs`.
      few: up to how many rows it is taken where nothing was measured.
      ended: the product with what becomes of its outputs, `(..., after) -> outputs`, or None.
    """

    name: str
    product: Product
    few: float = math.inf
    ended: Callable[..., jax.Array] | None = None


# --- XLA alone ------------------------------------------------------------------------------------


def floats(matrix: Matrix, rows: jax.Array) -> jax.Array:
    """Multiply by the matrix restored."""
    if isinstance(matrix, FloatMatrix):  # as it lies: XLA is slow at one row by its transpose
        return rows @ matrix.kernel.reshape(matrix.inputs, matrix.outputs)
    return _contract(rows, matrix.rows().astype(jnp.float32), jnp.float32)


def _contract(rows: jax.Array, matrix: jax.Array, dtype: Any) -> jax.Array:
    stacked = tuple(range(matrix.ndim - 2))
    dims = (((rows.ndim - 1,), (matrix.ndim - 1,)), (stacked, stacked))
    return lax.dot_general(rows, matrix, dims, preferred_element_type=dtype)


def round_rows(rows: jax.Array, fixed: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Round rows to int8 in steps of their own, or in a fixed one.

    A row that holds a NaN or an infinity has the step NaN, so that its outputs are NaN; so has
    every row where the fixed step is no normal number. Codes are `round(x * (1 / step))`.

    Args:
      rows: `(..., rows, inputs)`, float32.
      fixed: `(..., 1)`, or None.

    Returns:
      int8 codes of the shape of `rows`, and steps, `(..., rows, 1)`.

    Example:
      >>> import jax.numpy as jnp
      >>> codes, step = round_rows(jnp.array([[1.27, -0.5]]))
      >>> codes, step.round(4)
      (Array([[127, -50]], dtype=int8), Array([[0.01]], dtype=float32))
    """
    most = jnp.max(jnp.abs(rows), -1, keepdims=True, initial=0.0)
    if fixed is None:
        step = most / 127
        usable = step >= jnp.finfo(jnp.float32).tiny
        step = jnp.where(usable, step, jnp.where(jnp.isnan(most), jnp.nan, 0))
        step = jnp.where(jnp.isinf(most), jnp.nan, step)
    else:
        step = jnp.broadcast_to(fixed[..., None, :], most.shape)
        usable = (step >= jnp.finfo(jnp.float32).tiny) & jnp.isfinite(step)
        step = jnp.where(jnp.isnan(most) | ~usable, jnp.nan, step)
    inverse = 1 / jnp.where(step > 0, step, 1)
    scaled = jnp.where(step > 0, rows * inverse, 0)
    codes = jnp.clip(jnp.round(scaled), -127, 127)
    return codes.astype(jnp.int8), step


def _integer_dot(codes: jax.Array, matrix: jax.Array) -> jax.Array:
    """Multiply int8 by int8, `(..., rows, n)` by `(..., outputs, n)`, exactly."""
    rows = codes.shape[-2]
    if rows == 1:  # XLA has a fast product of int8 matrices on a CPU, but none of a vector
        codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 2) + [(0, 1), (0, 0)])
    return _contract(codes, matrix, jnp.int32)[..., :rows, :]


def _grouped_dot(codes: jax.Array, matrix: jax.Array, size: int) -> jax.Array:
    """Sum products of int8 by groups of inputs, `(..., groups, rows, outputs)`, float32."""
    groups = matrix.shape[-1] // size

    def split(values: jax.Array) -> jax.Array:
        spread = values.reshape(*values.shape[:-1], groups, size)
        return jnp.moveaxis(spread, -2, -3)

    return _integer_dot(split(codes), split(matrix)).astype(jnp.float32)


def _by_output(values: jax.Array) -> jax.Array:
    """Turn `(..., outputs, groups)` into `(..., groups, 1, outputs)`."""
    return jnp.moveaxis(values, -1, -2)[..., None, :]


def _xla_rounded(matrix: Any, rows: jax.Array) -> jax.Array:
    """Round the inputs, and sum integers by groups of inputs that share a scale."""
    fixed = matrix.input_scale if isinstance(matrix, Int8Matrix) else None
    codes, step = round_rows(rows, fixed)
    if isinstance(matrix, Int4Matrix):
        matrix = matrix.by_rows()
        weights = matrix.codes().astype(jnp.int8) - 8
    else:
        weights = matrix.by_rows()
    groups = matrix.scale.shape[-1]
    if groups == 1:
        sums = _integer_dot(codes, weights).astype(jnp.float32)[..., None, :, :]
        size = codes.shape[-1]
    else:
        size = matrix.group if isinstance(matrix, Int4Matrix) else matrix.inputs // groups
        fill = [(0, 0)] * (codes.ndim - 1) + [(0, groups * size - codes.shape[-1])]
        codes, weights = jnp.pad(codes, fill), jnp.pad(weights, fill)
        sums = _grouped_dot(codes, weights, size)
    if matrix.zero_point is not None:
        parts = codes.reshape(*codes.shape[:-1], groups, size).astype(jnp.float32)
        totals = jnp.moveaxis(parts.sum(-1), -1, -2)[..., None]  # (..., groups, rows, 1)
        sums = sums - totals * _by_output(matrix.zero_point.astype(jnp.float32))
    return step * jnp.sum(sums * _by_output(matrix.scale), axis=-3)


# --- Native kernels -------------------------------------------------------------------------------


def _over_stacked(product: Callable[..., jax.Array], stacked: int) -> Callable[..., jax.Array]:
    for _ in range(stacked):
        product = jax.vmap(product)
    return product


def _with_arrays(
    product: Callable[..., jax.Array], matrix: Matrix, rows: jax.Array, arrays: dict[str, Any]
) -> jax.Array:
    """Call a product with the arrays that are there, over the axes that stack matrices."""
    given = {name: array for name, array in arrays.items() if array is not None}

    def run(rows: jax.Array, given: dict[str, jax.Array]) -> jax.Array:
        return product(rows, **given)

    return _over_stacked(run, len(matrix.stacked))(rows, given)


def _native_int8(
    matrix: Int8Matrix, rows: jax.Array, after: After = AS_IT_IS, *, rounded: bool
) -> jax.Array:
    zero = None if matrix.zero_point is None else matrix.zero_point[..., 0]
    fixed = matrix.input_scale if rounded else None
    arrays = {"codes": matrix.codes, "scale": matrix.scale[..., 0], "zero": zero, "fixed": fixed}
    product = partial(_native.int8_product, rounded=rounded, after=after)
    return _with_arrays(product, matrix, rows, arrays)


def _native_int4(
    matrix: Int4Matrix, rows: jax.Array, after: After = AS_IT_IS, *, rounded: bool
) -> jax.Array:
    about: dict[str, Any] = {"outputs": matrix.outputs, "group": matrix.group}
    about |= {"rounded": rounded, "after": after}
    arrays = {"packed": matrix.packed, "scale": matrix.scale, "zero": matrix.zero_point}
    return _with_arrays(partial(_native.int4_product, **about), matrix, rows, arrays)


def _native_codebook(matrix: Int4Matrix, rows: jax.Array, *, rounded: bool) -> jax.Array:
    product = partial(_native.codebook_product, group=matrix.group, rounded=rounded)
    arrays = {"packed": matrix.packed, "scale": matrix.scale, "table": matrix.table}
    return _with_arrays(product, matrix, rows, arrays)


def _native_signs(matrix: SignMatrix, rows: jax.Array) -> jax.Array:
    arrays = {"bits": matrix.bits, "scale": matrix.scale}
    return _with_arrays(_native.signs_product, matrix, rows, arrays)


def _native_sparse(matrix: SparseMatrix, rows: jax.Array, *, rounded: bool) -> jax.Array:
    arrays = matrix.values, matrix.columns, matrix.starts, matrix.scale
    return _native.sparse_product(rows, *arrays, outputs=matrix.outputs, rounded=rounded)


# --- What there is for a matrix -------------------------------------------------------------------


def native_here() -> str | None:
    """Say why native kernels do not run here, or None where they do."""
    backend = jax.default_backend()
    return _build.problem() if backend == "cpu" else f"the backend is {backend}, not cpu"


def _native_forms(matrix: Matrix, rounded: bool) -> list[Form]:
    product, kind = None, ""
    if isinstance(matrix, Int8Matrix) and matrix.panels:
        product, kind = _native_int8, "int8"
    elif isinstance(matrix, Int4Matrix) and matrix.panels:
        product, kind = _native_int4, "int4"
    elif isinstance(matrix, Int4Matrix) and matrix.table is not None:
        product, kind = _native_codebook, "codebook"
    if product is not None:
        few = 16 if not rounded else 64 if kind == "codebook" else math.inf
        to = "int8" if rounded else "float"
        product = partial(product, rounded=rounded)
        ended = None if kind == "codebook" or matrix.stacked else product
        return [Form(f"native {kind} x {to}", product, few, ended)]
    if isinstance(matrix, SignMatrix):
        return [Form("native signs x float", _native_signs, 16)]
    if isinstance(matrix, SparseMatrix):
        forms = [Form("native sparse x float", partial(_native_sparse, rounded=False))]
        if rounded and matrix.values.dtype == jnp.int8 and "VBMI" in _build.instructions():
            few = Form("native sparse x int8", partial(_native_sparse, rounded=True), 2)
            forms.insert(0, few)  # others pick inputs one by one, floats as fast as bytes
        return forms
    return []


def _pallas_forms(matrix: Matrix, rounded: bool) -> list[Form]:
    """Return the kernels for TPUs and GPUs: never taken unmeasured."""
    if rounded or matrix.stacked or jax.default_backend() == "cpu":
        return []
    if isinstance(matrix, Int8Matrix):
        return [Form("Pallas int8 x float", _pallas.int8_product, 0)]
    if isinstance(matrix, Int4Matrix) and matrix.table is None:
        return [Form("Pallas int4 x float", _pallas.int4_product, 0)]
    return []


def forms_of(matrix: Matrix, rounded: bool) -> list[Form]:
    """Return the ways to multiply by a matrix, the one that is preferred unmeasured first.

    Args:
      matrix: not a `TurnedMatrix`, but what is within it.
      rounded: whether inputs may be rounded to int8; then ways that do so come first, and those
        that do not may be faster still, or the only ones.

    Returns:
      At least one.
    """
    forms = []
    if matrix.inputs <= LONGEST:
        if native_here() is None:
            forms += _native_forms(matrix, rounded)
        forms += _pallas_forms(matrix, rounded)
        integers = isinstance(matrix, Int8Matrix) or (
            isinstance(matrix, Int4Matrix) and matrix.table is None
        )
        if rounded and integers:
            forms.append(Form("XLA, int8 x int8", _xla_rounded))
            if native_here() is None:
                forms += [form._replace(few=0) for form in _native_forms(matrix, False)]
    return [*forms, Form(FLOATS, floats)]


def binary_product(inputs: jax.Array, kernel: SignMatrix) -> jax.Array:
    """Multiply the signs of activations by a binary kernel, by counting bits that differ.

    `y = (sign(x) . sign(w)) * scale`, the sum exact, where sign(0) is 1 and that of NaN -1: the
    product of an XNOR network without the mean magnitude of its inputs.

    Args:
      inputs: floating-point, `(..., inputs)`.
      kernel: of a dense layer, from `prepare`; none stacked.

    Returns:
      `(..., outputs)`, float32.

    Raises:
      ValueError: the shapes do not fit.
      TypeError: `kernel` is no `SignMatrix`.

    Example:
      >>> import jax.numpy as jnp
      >>> kernel = SignMatrix(jnp.array([[1, 0, 0, 0]], jnp.uint8), jnp.ones(1), (2, 1), (-2,))
      >>> binary_product(jnp.array([[5.0, -2.0]]), kernel)
      Array([[2.]], dtype=float32)

    References:
      Rastegari et al., "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural
      Networks", 2016, https://arxiv.org/abs/1603.05279.
    """
    if not isinstance(kernel, SignMatrix):
        raise TypeError(f"kernel must be a SignMatrix, from jopt.run.prepare, not {kernel!r}.")
    values = jnp.asarray(inputs)
    if kernel.stacked or values.ndim < 1 or values.shape[-1] != kernel.inputs:
        raise ValueError(f"inputs {values.shape} and kernel {kernel.shape} do not multiply.")
    rows = values.reshape(-1, values.shape[-1]).astype(jnp.float32)
    if native_here() is None:
        found = _native.binary_product(rows, kernel.bits, kernel.scale)
    else:
        bits = pack_bits(rows >= 0)
        differing = lax.population_count(bits[:, None] ^ kernel.bits[None])
        counts = jnp.sum(differing.astype(jnp.int32), -1)
        found = (kernel.inputs - 2 * counts).astype(jnp.float32) * kernel.scale[None]
    return found.reshape(*values.shape[:-1], kernel.outputs)
