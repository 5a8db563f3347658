"""Decide, for each use of a parameter, what computes it."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from jopt._leaves import is_compressed
from jopt.layers._interpret import bind
from jopt.layers._rows import element_order, rows_of
from jopt.layers._uses import GROUP_AXIS, Use
from jopt.run import _convolutions, _probe
from jopt.run._endings import Compute, How, Product
from jopt.run._forms import FLOATS, Form, floats, forms_of
from jopt.run._matrices import Int4Matrix, Int8Matrix, Matrix, TurnedMatrix
from jopt.run._native import After
from jopt.run._pruned import FloatMatrix, NarrowMatrix, SparseMatrix
from jopt.run._uses import GATHER

PLAIN_DOT, PLAIN_CONV, PLAIN_GATHER = "XLA, dot", _convolutions.PLAIN, "XLA, gather"
ROWS = "rows of codes"
NOT_LAID_OUT = "it is not laid out for products: see jopt.run.prepare"
WINDOW = "of kernels with a window int8 codes alone are used, where native kernels run"
RESTORED = "restoring it was measured to be faster"
_WORTH = 0.95  # of the preferred way's time: less decides for another
_WORTH_APART = 0.8  # the same, where the preferred way computes what follows with it


class Choice(NamedTuple):
    """What computes one use.

    Attributes:
      use: which.
      form: the name of what computes it.
      why: why it is not a product of codes, if it is not.
    """

    use: Use
    form: str
    why: str = ""


def _in_order(use: Use) -> bool:
    """Return whether outputs and copies come out in the order of the kernel."""
    layer = use.layer
    leading = {axis: layer.shape[axis] for axis in layer.batch if axis not in layer.scanned}
    if layer.grouped is not None:
        leading[GROUP_AXIS] = layer.groups
    free = {axis: layer.shape[axis] for axis in layer.free}
    return element_order(use.batch, leading) is None and element_order(use.free, free) is None


def obstacle(use: Use, leaf: Any) -> str:
    """Say why a use of a leaf is no product with a matrix; empty where it is one."""
    layer = use.layer
    if layer.groups > 1:
        return "its outputs are in groups with inputs of their own"
    left = leaf.matrix if isinstance(leaf, NarrowMatrix) else leaf
    if _convolutions.wide_window(layer) and not isinstance(left, (Int8Matrix, FloatMatrix)):
        return WINDOW
    if not isinstance(leaf, Matrix):
        return NOT_LAID_OUT
    contracted = tuple(axis - len(layer.shape) for axis in layer.contracted)
    if contracted != leaf.contracted:
        return "it was prepared for a model that sums over other axes"
    if not _in_order(use):
        return "a reshape orders its outputs anew"
    return ""


def fastest(name: str, forms: Sequence[Form], shapes: tuple[Any, ...], rows: int) -> Form:
    """Return the form to take: measured here, or by preference where nothing is measured."""
    if len(forms) == 1:
        return forms[0]
    preferred = next((form for form in forms if rows <= form.few), forms[-1])
    if not _probe.is_on():
        return preferred
    seconds = _probe.seconds_of(name, {form.name: form.product for form in forms}, shapes)
    best = min(forms, key=lambda form: seconds[form.name])
    part = _WORTH if preferred.ended is None or best.ended is not None else _WORTH_APART
    worth = seconds[best.name] <= part * seconds[preferred.name]
    return best if worth else preferred


def _aval_of(equation: core.JaxprEqn) -> Any:
    """Return the shape and dtype of what an operation computes."""
    return equation.outvars[0].aval


def _aval(array: Any) -> Any:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def form_for(matrix: Matrix, rows: Any, rounded: bool) -> Form:
    """Return how to multiply rows, `(..., count, inputs)`, by a matrix."""
    forms = forms_of(matrix, rounded)
    count = rows.shape[-2]
    if 0 in rows.shape or matrix.outputs == 0:
        return forms[-1]
    if isinstance(matrix, SparseMatrix):  # numbers made up for a measurement are no starts
        return next(form for form in forms if count <= form.few)
    shapes = jax.tree.map(_aval, matrix), _aval(rows)
    sizes = [f"{type(matrix).__name__}{matrix.shape}"]
    sizes += [f"{array.dtype}{array.shape}" for array in jax.tree.leaves(matrix)]
    return fastest(f"{' '.join(sizes)} by {rows.shape}", forms, shapes, count)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _product(matrix: Any, rows: jax.Array, form: Form) -> jax.Array:
    return form.product(matrix, rows)


@_product.defjvp
def _product_jvp(form: Form, primals: Any, tangents: Any) -> tuple[Any, Any]:
    # The derivative of the product of floats: rounding passes it straight through.
    return _product(*primals, form), jax.jvp(floats, primals, tangents)[1]


def within(leaf: Matrix) -> Matrix:
    """Return the matrix that is multiplied by: what a turned or a narrow one holds."""
    return leaf.matrix if isinstance(leaf, (TurnedMatrix, NarrowMatrix)) else leaf


def changed(leaf: Matrix, rows: jax.Array) -> jax.Array:
    """Return the rows that it is multiplied by."""
    if isinstance(leaf, TurnedMatrix):
        return leaf.turned(rows)
    return leaf.left(rows) if isinstance(leaf, NarrowMatrix) else rows


def multiply(form: Form, leaf: Matrix, rows: jax.Array, *after: After) -> jax.Array:
    """Multiply rows by a matrix.

    Args:
      form: how.
      leaf: a matrix, perhaps turned or narrow.
      rows: `(..., count, inputs)`.
      *after: what becomes of the outputs, if anything; then there are no derivatives.

    Returns:
      `(..., count, outputs)`, float32.
    """
    matrix, rows = within(leaf), changed(leaf, rows.astype(jnp.float32))
    if after and form.ended is not None:
        return form.ended(matrix, rows, *after)
    values = floats(matrix, rows) if form.name == FLOATS else _product(matrix, rows, form)
    return leaf.spread(values) if isinstance(leaf, NarrowMatrix) else values


def _dot(
    use: Use, equation: core.JaxprEqn, form: Form, leaf: Matrix, x: jax.Array, *after: After
) -> jax.Array:
    out = _aval_of(equation)
    values = multiply(form, leaf, rows_of(use, x), *after)
    layer = use.layer
    taken = (*use.input_batch, *layer.input_axes)
    others = tuple(x.shape[axis] for axis in range(x.ndim) if axis not in taken)
    batch = tuple(x.shape[axis] for axis in use.input_batch)
    free = tuple(out.shape[len(batch) + len(others) :])
    if use.side == 1:
        free = tuple(out.shape[len(batch) : len(out.shape) - len(others)])
        values = values.swapaxes(-1, -2)
        sizes = (*batch, *free, *others)
    else:
        sizes = (*batch, *others, *free)
    return values.reshape(sizes).astype(out.dtype)


def _channels(equation: core.JaxprEqn, x: jax.Array) -> jax.Array:
    """Return the channels of every element that a window of one element sees."""
    seen = _convolutions.seen(x, equation.params["window_strides"])
    return seen.reshape(-1, seen.shape[-1])


def _conv(
    equation: core.JaxprEqn, form: Form, leaf: Matrix, x: jax.Array, *after: After
) -> jax.Array:
    """Multiply the channels of every element that a window of one element sees."""
    out = _aval_of(equation)
    return multiply(form, leaf, _channels(equation, x), *after).reshape(out.shape).astype(out.dtype)


def _held_back(
    equation: core.JaxprEqn, compute: Compute, ended: Compute | None, operands: tuple[Any, ...]
) -> Any:
    """Compute a product, or hold it back if what follows can be computed with it.

    Args:
      equation: the operation, whose outputs belong together along their last axis.
      compute: `(*operands) -> outputs`.
      ended: `(*operands, after) -> outputs`, or None.
      operands: its own.
    """
    out = _aval_of(equation)
    if ended is None or out.dtype != jnp.float32 or not out.shape:
        return compute(*operands)
    return Product(How(compute, ended), operands, out)


def _matrix_product(
    use: Use, equation: core.JaxprEqn, leaf: Matrix, x: jax.Array, rounded: bool
) -> tuple[Any, str]:
    """Multiply by a matrix in the fastest way, and say which it is."""
    is_conv = use.layer.kind == "conv"
    rows_by = partial(_channels, equation) if is_conv else partial(rows_of, use)
    rows = jax.eval_shape(lambda x: changed(leaf, rows_by(x).astype(jnp.float32)), x)
    form = form_for(within(leaf), rows, rounded)
    compute = partial(_conv, equation, form) if is_conv else partial(_dot, use, equation, form)
    last = use.side == 0 and _aval_of(equation).shape[-1:] == (leaf.outputs,)
    whole = form.ended is not None and not isinstance(leaf, NarrowMatrix)
    ended = compute if whole and (is_conv or last) else None
    return _held_back(equation, compute, ended, (leaf, x)), form.name


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _windowed(leaf: Any, x: jax.Array, shapes: _convolutions.Shapes, form: Form) -> jax.Array:
    return form.product(leaf, x)


@_windowed.defjvp
def _windowed_jvp(
    shapes: _convolutions.Shapes, form: Form, primals: Any, tangents: Any
) -> tuple[Any, Any]:
    def reference(leaf: Any, x: jax.Array) -> jax.Array:
        return _convolutions.plain(shapes, x, leaf.restore().astype(jnp.float32))

    return _windowed(*primals, shapes, form), jax.jvp(reference, primals, tangents)[1]


def _window(
    use: Use, equation: core.JaxprEqn, leaf: Int8Matrix, x: jax.Array
) -> tuple[Any, str, str]:
    """Convolve by the codes of a kernel with a window, or by what they stand for."""
    x = x.astype(jnp.float32)
    shapes = _convolutions.Shapes(x.shape, leaf.shape, use.layer.window)

    def restored(way: _convolutions.Way, leaf: Any, x: jax.Array) -> jax.Array:
        return way(shapes, x, leaf.restore().astype(jnp.float32))

    ways = _convolutions.ways_of(shapes)
    forms = [Form(name, partial(restored, way)) for name, way in ways.items()]
    codes, why = "native int8 convolution", WINDOW
    if leaf.panels and _convolutions.takes_codes(shapes.window):
        why = RESTORED
        native = partial(_convolutions.int8_convolution, shapes)
        forms.insert(0, Form(codes, native, ended=native))
    avals = jax.tree.map(_aval, leaf), _aval(x)
    form = fastest(f"int8 convolution {shapes}", forms, avals, 1)
    dtype = _aval_of(equation).dtype

    def compute(leaf: Any, x: jax.Array) -> jax.Array:
        return _windowed(leaf, x, shapes, form).astype(dtype)

    out = _held_back(equation, compute, form.ended, (leaf, x))
    return out, form.name, "" if form.name == codes else why


def _float_conv(use: Use, equation: core.JaxprEqn, values: list[Any]) -> tuple[Any, str]:
    """Convolve floats in the fastest way."""
    x, kernel = values
    if _aval_of(equation).dtype != jnp.float32:
        return None, PLAIN_CONV
    form = _conv_form(use, x, kernel)
    if form.name == PLAIN_CONV:
        return None, PLAIN_CONV
    return _held_back(equation, form.product, form.ended, (x, kernel)), form.name


def _conv_form(use: Use, x: jax.Array, kernel: jax.Array) -> Form:
    """Return how to convolve floats, `(x, kernel) -> outputs`."""
    shapes = _convolutions.Shapes(x.shape, kernel.shape, use.layer.window)
    plain = Form(PLAIN_CONV, partial(_convolutions.plain, shapes))
    single = x.dtype == kernel.dtype == jnp.float32 and jax.default_backend() == "cpu"
    if not single or shapes.window is None or not _convolutions.channels_last(shapes.window):
        return plain
    forms = []
    for name, way in _convolutions.ways_of(shapes).items():
        ended = _convolutions.ENDED.get(name)
        ended = None if ended is None else partial(ended, shapes)
        forms.append(Form(name, partial(way, shapes), ended=ended))
    return fastest(f"convolution {shapes}", forms, (_aval(x), _aval(kernel)), 1)


def _narrow_conv(
    use: Use, equation: core.JaxprEqn, leaf: NarrowMatrix, x: jax.Array
) -> tuple[jax.Array, str]:
    """Convolve the channels that a kernel of floats has left."""
    x, kernel = leaf.left(x), leaf.matrix.kernel
    form = _conv_form(use, x, kernel)
    out = leaf.spread(form.product(x, kernel))
    return out.astype(_aval_of(equation).dtype), form.name


def _gathered(equation: core.JaxprEqn, leaf: Any, indices: jax.Array) -> jax.Array | None:
    """Look rows of codes up, and restore those rows only."""
    if isinstance(leaf, (Int8Matrix, Int4Matrix)) and leaf.contracted == (-1,):
        if leaf.stacked or leaf.shape != (leaf.outputs, leaf.inputs):
            return None
    else:
        return None
    mode = equation.params["mode"]
    count = leaf.shape[0]
    at = indices[..., 0].astype(jnp.int32)
    inside = jnp.clip(at, 0, count - 1)
    rows = leaf.at(inside.ravel())
    values = rows.rows().reshape(*at.shape, leaf.inputs)
    if mode == lax.GatherScatterMode.FILL_OR_DROP:
        fill = equation.params["fill_value"]
        fill = jnp.nan if fill is None else fill
        values = jnp.where((at == inside)[..., None], values, jnp.asarray(fill, values.dtype))
    out = _aval_of(equation)
    offset = equation.params["dimension_numbers"].offset_dims
    if tuple(offset) != (len(out.shape) - 1,):
        values = jnp.moveaxis(values, -1, offset[0])
    return values.astype(out.dtype)


def run_use(
    use: Use, equation: core.JaxprEqn, values: list[Any], leaf: Any, rounded: bool
) -> tuple[list[Any], Choice]:
    """Compute one use of a parameter.

    Args:
      use: which.
      equation: the operation.
      values: its inputs, the kernel as floats.
      leaf: the compressed leaf that the kernel is, or None where it is floats.
      rounded: whether inputs are rounded to int8.

    Returns:
      The outputs, perhaps held back, and what computes them.
    """
    layer = use.layer
    if layer.kind == GATHER:
        out = _gathered(equation, leaf, values[1]) if is_compressed(leaf) else None
        if out is not None:
            return [out], Choice(use, ROWS)
        why = "it is not laid out by rows: see jopt.run.prepare" if is_compressed(leaf) else ""
        return bind(equation, values), Choice(use, PLAIN_GATHER, why)
    why = ""
    if is_compressed(leaf):
        why = obstacle(use, leaf)
        if not why:
            x = values[use.side]
            if not _convolutions.wide_window(layer):
                out, name = _matrix_product(use, equation, leaf, x, rounded)
            elif isinstance(leaf, NarrowMatrix):
                out, name = _narrow_conv(use, equation, leaf, x)
            else:
                out, name, why = _window(use, equation, leaf, x)
            return [out], Choice(use, name, why)
    if layer.kind == "conv":
        out, name = _float_conv(use, equation, values)
        return [out] if out is not None else bind(equation, values), Choice(use, name, why)
    return bind(equation, values), Choice(use, PLAIN_DOT, why)
