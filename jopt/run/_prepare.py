"""Lay compressed kernels out once as the matrices that fast products read."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jopt._arrays import dtype_bits, expand_blocks, materialize, nbytes
from jopt._leaves import (
    BitTensor,
    CodebookTensor,
    FloatTensor,
    Prepared,
    QTensor,
    RotatedTensor,
    ScaledTensor,
    is_compressed,
)
from jopt._trees import flatten_with_paths, is_kernel
from jopt.layers import Layer
from jopt.run._axes import Axes, axes_of
from jopt.run._convolutions import channels_last, takes_codes, wide_window
from jopt.run._forms import native_here
from jopt.run._matrices import (
    Int4Matrix,
    Int8Matrix,
    Matrix,
    SignMatrix,
    TurnedMatrix,
)
from jopt.run._packing import BLOCK, pack4, pack_bits
from jopt.run._pruned import SPARSE, SPARSE_CODES, SPARSE_STREAMED, narrowed, pruned, thinned
from jopt.run._uses import Apply, dense_avals, trace_uses

_ENTRIES = 16  # of a table that 4 bits index


def _by_runs(values: jax.Array, shape: tuple[int, ...], axes: Axes) -> jax.Array:
    """Spread one value a block of the kernel to one a run of inputs, `(..., outputs, groups)`.

    Args:
      values: as many axes as the kernel, each dividing it, as the scale of a `QTensor`.
      shape: of the kernel.
      axes: what its axes are.
    """
    counted = [axis for axis in axes.contracted if values.shape[axis] > 1]
    last = counted[-1] if counted else -1
    target = tuple(
        values.shape[axis] if axis in axes.contracted and axis >= last else size
        for axis, size in enumerate(shape)
    )
    return axes.as_matrix(expand_blocks(values, target))


def _group(inputs: int, groups: int) -> int | None:
    """Return how many inputs share a scale, as packed codes need it, or None where they cannot."""
    if groups == 1:
        return -(-max(inputs, 1) // BLOCK) * BLOCK
    group = inputs // groups
    return group if group == BLOCK // 2 or group % BLOCK == 0 else None


def _integers(leaf: QTensor, axes: Axes, input_scale: jax.Array | None) -> Matrix | str:
    shape, bits = leaf.codes.shape, dtype_bits(leaf.codes.dtype)
    if bits > 8:
        return f"its codes have {bits} bits"
    wide = leaf.codes.astype(jnp.int32)
    codes = axes.as_matrix(wide)
    scale = _by_runs(leaf.scale.astype(jnp.float32), shape, axes)
    unsigned = jnp.issubdtype(leaf.codes.dtype, jnp.unsignedinteger)
    zero = None
    if leaf.zero_point is not None:
        zero = leaf.zero_point.astype(jnp.float32)
        zero = _by_runs(jnp.broadcast_to(zero, leaf.scale.shape), shape, axes)
    group = _group(codes.shape[-1], scale.shape[-1])
    statics = axes.statics(shape, leaf.dtype)
    if bits <= 4 and group is not None:
        middle = 8
        if unsigned:
            zero = (jnp.zeros_like(scale) if zero is None else zero) - middle
        packed = pack4(codes if unsigned else codes + middle)
        return Int4Matrix(packed, scale, zero, None, group=group, **statics)
    if unsigned and bits == 8:
        codes, middle = codes - 128, 128
        zero = (jnp.zeros_like(scale) if zero is None else zero) - middle
    return Int8Matrix(codes.astype(jnp.int8), scale, zero, input_scale, **statics)


def _table(leaf: CodebookTensor, axes: Axes) -> Matrix | str:
    *counts, entries = leaf.codebook.shape
    if entries > _ENTRIES:
        return f"its table has {entries} entries; kernels look up {_ENTRIES} at most"
    if any(counts[axis] > 1 for axis in axes.contracted):
        return "an output has several tables"
    shape = leaf.codes.shape
    if leaf.scale is None:
        scale = jnp.ones((*(1 for _ in shape),), jnp.float32)
    else:
        scale = leaf.scale.astype(jnp.float32)
    scale = _by_runs(scale, shape, axes)
    group = _group(math.prod(shape[axis] for axis in axes.contracted), scale.shape[-1])
    if group is None:
        return "its scales are not for 32 inputs or a multiple of 64"
    tables = jnp.pad(
        leaf.codebook.astype(jnp.float32), [(0, 0)] * len(counts) + [(0, _ENTRIES - entries)]
    )
    shared = all(count == 1 for count in counts[axes.stacked :])
    if shared:
        stacked = shape[: axes.stacked]
        full = (*stacked, *(1 for _ in shape[axes.stacked :]), _ENTRIES)
        tables = jnp.broadcast_to(tables, full).reshape(*stacked, 1, _ENTRIES)
    else:
        whole = tuple(1 if axis in axes.contracted else size for axis, size in enumerate(shape))
        each = [expand_blocks(tables[..., entry], whole) for entry in range(_ENTRIES)]
        tables = jnp.concatenate([axes.as_matrix(every) for every in each], axis=-1)
    packed = pack4(axes.as_matrix(leaf.codes.astype(jnp.int32)))
    statics = axes.statics(shape, leaf.dtype)
    return Int4Matrix(packed, scale, None, tables, group=group, **statics)


def _signs(leaf: BitTensor, axes: Axes) -> Matrix | str:
    if any(leaf.scale.shape[axis] > 1 for axis in axes.contracted):
        return "an output has several scales"
    ones = jnp.ones((1,) * leaf.ndim, jnp.float32)
    flags = materialize(leaf.replace(scale=ones)) > 0  # pyright: ignore[reportAttributeAccessIssue]
    scale = _by_runs(leaf.scale.astype(jnp.float32), leaf.shape, axes)[..., 0]
    statics = axes.statics(leaf.shape, leaf.dtype)
    return SignMatrix(pack_bits(axes.as_matrix(flags)), scale, **statics)


def _along_inputs(values: jax.Array, shape: tuple[int, ...], axes: Axes) -> jax.Array | None:
    """Return one value for each input, `(stacked..., inputs)`, where outputs share them."""
    free = [a for a in range(axes.stacked, len(shape)) if a not in axes.contracted]
    if any(values.shape[axis] > 1 for axis in free):
        return None
    whole = tuple(1 if axis in free else size for axis, size in enumerate(shape))
    return axes.as_matrix(expand_blocks(values, whole))[..., 0, :]


def _scaled(leaf: ScaledTensor, axes: Axes, input_scale: jax.Array | None) -> Matrix | str:
    inner = matrix_of(leaf.tensor, axes, input_scale)
    factor = _along_inputs(leaf.factor.astype(jnp.float32), leaf.shape, axes)
    if isinstance(inner, str):
        return inner
    if factor is None:
        return "its factors are not by input"
    if isinstance(inner, TurnedMatrix):
        if inner.factor is not None:
            factor = factor * inner.factor
        return TurnedMatrix(inner.matrix, factor, inner.signs)
    return TurnedMatrix(inner, factor)


def _rotated(leaf: RotatedTensor, axes: Axes, input_scale: jax.Array | None) -> Matrix | str:
    inner = matrix_of(leaf.tensor, axes, input_scale)
    if isinstance(inner, str):
        return inner
    if isinstance(inner, TurnedMatrix):
        return "it is scaled or rotated before it is rotated"
    if axes.contracted != (leaf.ndim - 2,):
        return "it is rotated along one of its inputs only"
    signs = _along_inputs(leaf.signs, leaf.shape, axes)
    return "its signs are not by input" if signs is None else TurnedMatrix(inner, None, signs)


def matrix_of(leaf: Any, axes: Axes, input_scale: jax.Array | None = None) -> Matrix | str:
    """Lay a compressed leaf out as a matrix, or say why there is none for it.

    Args:
      leaf: a compressed leaf.
      axes: what its axes are.
      input_scale: the step of its inputs, or None.

    Example:
      >>> import jax.numpy as jnp
      >>> leaf = QTensor(jnp.array([[1, 2], [3, 4], [5, 6]], jnp.int8), jnp.ones((1, 1)))
      >>> matrix_of(leaf, Axes(0, (0,))).codes.tolist()
      [[1, 3, 5], [2, 4, 6]]
    """
    if isinstance(leaf, QTensor):
        return _integers(leaf, axes, input_scale)
    if isinstance(leaf, CodebookTensor):
        return _table(leaf, axes)
    if isinstance(leaf, BitTensor):
        return _signs(leaf, axes)
    if isinstance(leaf, ScaledTensor):
        return _scaled(leaf, axes, input_scale)
    if isinstance(leaf, RotatedTensor):
        return _rotated(leaf, axes, input_scale)
    if isinstance(leaf, FloatTensor):
        return "there is no product for narrow floats"
    return f"there is no product for a {type(leaf).__name__}"


def why_not(leaf: Any, layers: tuple[Layer, ...]) -> str:
    """Say why `prepare` lays a compressed leaf out as no matrix; empty where it does."""
    axes = axes_of(layers)
    if isinstance(axes, str):
        return axes
    found: list[Matrix | str] = []
    jax.eval_shape(lambda leaf: found.append(matrix_of(leaf, axes)), leaf)
    return next((each for each in found if isinstance(each, str)), "")


def _step_of(ends: tuple[ArrayLike, ArrayLike], stacked: tuple[int, ...]) -> jax.Array:
    """Return the step that rounds inputs of a range to int8, symmetric, `(stacked..., 1)`."""
    low, high = (jnp.abs(jnp.asarray(end, jnp.float32)) for end in ends)
    step = jnp.maximum(low, high) / 127
    step = step.reshape(stacked if step.size > 1 else (1,) * len(stacked))
    return jnp.broadcast_to(step, stacked)[..., None]


def prepare(
    apply: Apply,
    params: Any,
    *args: Any,
    ranges: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
    sparse: float | None = None,
) -> Any:
    """Lay the compressed kernels of a model out as its products read them, once.

    Which axes of a kernel are inputs is read from the model itself, so that dense layers of any
    layout, attention's projections, convolutions, tables of embeddings and stacked layers of scans
    all become matrices `(outputs, inputs)`, in panels of 16 outputs where native kernels run; of
    convolutions with a window those of int8, where such kernels run. A leaf that no product reads
    stays as it is; `explain` says why. `materialize` takes what comes out, too.

    Of float32 kernels, and of integers and codebooks in products of matrices, inputs and outputs
    that are zeros are left out, where at most half of the weights are left: what `jopt.prune`
    empties by whole units is not multiplied, in the shapes that the model has. (Nor are zeros by
    inputs that are not finite, which would make outputs NaN.)

    Args:
      apply: `(params, *args) -> outputs`, any pure function.
      params: the tree of parameters, compressed leaves in it.
      *args: what else `apply` takes; arrays or `jax.ShapeDtypeStruct`s. Only shapes matter.
      ranges: by path `(low, high)` of the inputs of a layer, as `jopt.quant.activation_ranges`
        finds them: rounded inputs of int8 kernels then have one step, and not one for each row. A
        layer whose path is left out finds its steps when it runs.
      sparse: a part of the weights; a float32 kernel of a dense layer that has as many zeros is
        kept in compressed rows, unless they are whole inputs and outputs, of what is left fewer.
        So are codes with one scale for an output, and as floats what has no product of its own,
        such as a table of more than 16 entries. By default 0.75, of codes 0.88 if those of the tree
        have more than 8 MB (fewer stay in a cache, where all of them are multiplied faster with
        int8 inputs, if not with floats); where native kernels run, and never elsewhere. Only for
        arrays whose values are known, so not within `jit`.

    Returns:
      A tree like `params`, for `compressed`.

    Raises:
      TypeError: `apply` is not callable.
      ValueError: `ranges` has a path that is no compressed kernel of a layer, or `sparse` lies
        outside (0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import quant, run
      >>> params = quant.quantize_params({"w": jnp.ones((3, 2))}, quant.QuantSpec(8))
      >>> type(run.prepare(lambda params, x: x @ params["w"], params, jnp.ones((1, 3)))["w"])
      <class 'jopt.run._matrices.Int8Matrix'>
    """
    if sparse is not None and not 0 < sparse <= 1:
        raise ValueError(f"sparse must lie in (0, 1], not {sparse}.")
    paths, leaves, treedef = flatten_with_paths(params)
    found = trace_uses(apply, dense_avals(params), args)
    layers = found.layers()
    ranges = dict(ranges or {})
    unknown = [
        path
        for path in ranges
        if path not in layers or not is_compressed(leaves[paths.index(path)])
    ]
    if unknown:
        raise ValueError(f"ranges has {unknown}, which are no compressed kernels of layers.")
    limits: _Limits = (sparse, sparse)
    if sparse is None and native_here() is None:
        codes = [leaf for path, leaf in zip(paths, leaves, strict=True) if path in layers]
        streamed = sum(map(nbytes, filter(is_compressed, codes))) > SPARSE_STREAMED
        limits = SPARSE, SPARSE_CODES if streamed else None
    new = [
        _prepared(leaf, layers.get(path), path in found.gathered, ranges.get(path), limits)
        for path, leaf in zip(paths, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, new)


_Limits = tuple[float | None, float | None]  # zeros that are left out, of floats and of codes


def _prepared(
    leaf: Any,
    layers: tuple[Layer, ...] | None,
    gathered: bool,
    ends: tuple[ArrayLike, ArrayLike] | None,
    limits: _Limits,
) -> Any:
    of_floats, of_codes = limits
    if isinstance(leaf, Prepared):
        return leaf
    if is_compressed(leaf):
        if layers:
            axes = axes_of(layers)
        elif gathered and len(leaf.shape) == 2:
            axes = Axes(0, (1,))  # the rows of a table, as if each were an output
        else:
            return leaf
        windows = list(filter(None, map(wide_window, layers or ())))
        if isinstance(axes, str) or 0 in leaf.shape or not all(map(takes_codes, windows)):
            return leaf
        step = None if ends is None else _step_of(ends, tuple(leaf.shape[: axes.stacked]))
        matrix = matrix_of(leaf, axes, step)
        by_output = isinstance(matrix, Int8Matrix) and matrix.scale.shape[-1] == 1
        product = layers and not windows and not gathered
        if isinstance(matrix, str):
            found = pruned(materialize(leaf), axes, 1, of_floats) if product else None
            return leaf if found is None else found
        if windows and not by_output:
            return leaf
        if product:
            matrix = narrowed(matrix)
            matrix = matrix if of_codes is None else thinned(matrix, of_codes)
        return matrix.in_panels() if layers and native_here() is None else matrix
    if not layers or not is_kernel("", leaf) or gathered:
        return leaf
    axes = axes_of(layers)
    windows = list(filter(None, map(wide_window, layers)))
    if isinstance(axes, str) or (windows and not all(map(channels_last, windows))):
        return leaf
    elements = {math.prod(window.size) for window in windows} or {1}
    found = pruned(leaf, axes, elements.pop(), of_floats) if len(elements) == 1 else None
    return leaf if found is None else found
