"""What each operation on arrays demands of the axes that go in, and which come out.

A rule is a function `(equation, axes of the inputs, frames) -> axes of the outputs`; operations
that run other programs are in `_infer`.
"""

from collections.abc import Callable

from jax.extend import core

from jopt.prune._shrink._axes import Axis, cut, lock, product, regroup, total, unify
from jopt.prune._shrink._frames import Axes, Frame, fresh, shape_of, unknown

Rule = Callable[[core.JaxprEqn, list[Axes], list[Frame]], list[Axes]]

# Each element of the outputs is made of the elements at the same place of the inputs.
ELEMENTWISE = set(
    """
    abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp conj
    convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2
    expm1 floor ge gt imag integer_pow is_finite le lgamma log log1p logistic lt max min mul name ne
    neg nextafter not or pow population_count real reduce_precision rem round
    rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square
    stop_gradient sub tan tanh xor
    """.split()
)
# Reductions over `axes`; of these only a sum is neutral to zeros.
REDUCTIONS = set(
    """
    argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor
    """.split()
)
CUMULATIVE = {"cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum"}
WINDOWS = {"reduce_window_max", "reduce_window_min", "reduce_window_sum"}


def _elementwise(equation: core.JaxprEqn, ins: list[Axes], inner: list[Frame]) -> list[Axes]:
    """Unify place by place; scalars, and axes of size one beside longer ones, are broadcast."""
    del inner
    rank = max((len(axes) for axes in ins), default=0)
    out: Axes = []
    for aligned in zip(*(axes for axes in ins if len(axes) == rank), strict=True):
        longest = max(aligned, key=lambda axis: axis.size)
        for axis in aligned:
            if axis.size == longest.size:
                unify(longest, axis, equation.primitive.name)
        out.append(longest)
    return [out for _ in equation.outvars]


def _tuple(equation: core.JaxprEqn, ins: list[Axes], inner: list[Frame]) -> list[Axes]:
    del equation, inner
    return ins


def _reshape(equation: core.JaxprEqn, ins: list[Axes], inner: list[Frame]) -> list[Axes]:
    params = equation.params
    axes = ins[0]
    if params.get("dimensions"):
        axes = [axes[i] for i in params["dimensions"]]
    if 0 in params["new_sizes"]:
        return unknown(equation, ins, inner)
    return [regroup(axes, params["new_sizes"])]


def _transpose(equation: core.JaxprEqn, ins: list[Axes], inner: list[Frame]) -> list[Axes]:
    del inner
    return [[ins[0][i] for i in equation.params["permutation"]]]


def _squeeze(equation: core.JaxprEqn, ins: list[Axes], inner: list[Frame]) -> list[Axes]:
    del inner
    dropped = {i % len(ins[0]) for i in equation.params["dimensions"]}
    return [[axis for i, axis in enumerate(ins[0]) if i not in dropped]]


def _broadcast(equation: core.JaxprEqn, ins: list[Axes], inner: list[Frame]) -> list[Axes]:
    del inner
    params = equation.params
    out = [Axis(size) for size in params["shape"]]
    for i, axis in zip(params["broadcast_dimensions"], ins[0], strict=True):
        if axis.size == params["shape"][i]:
            out[i] = axis
    return [out]


def _rev(equation: core.JaxprEqn, ins: list[Axes], inner: list[Frame]) -> list[Axes]:
    del inner
    lock([ins[0][i] for i in equation.params["dimensions"]], "rev turns its order round")
    return ins


def _iota(equation: core.JaxprEqn, ins: list[Axes], inner: list[Frame]) -> list[Axes]:
    del ins, inner
    (axes,) = [fresh(variable) for variable in equation.outvars]
    lock([axes[equation.params["dimension"]]], "iota counts its places")
    return [axes]


def _random(equation: core.JaxprEqn, ins: list[Axes], inner: list[Frame]) -> list[Axes]:
    """Let fewer numbers be drawn: others, for what is left, than before."""
    del ins, inner
    return [fresh(variable) for variable in equation.outvars]


def _bitcast(equation: core.JaxprEqn, ins: list[Axes], inner: list[Frame]) -> list[Axes]:
    same = len(ins[0]) == len(shape_of(equation.outvars[0]))
    return (_elementwise if same else unknown)(equation, ins, inner)


def _reduce(equation: core.JaxprEqn, ins: list[Axes], inner: list[Frame]) -> list[Axes]:
    del inner
    name, reduced = equation.primitive.name, equation.params["axes"]
    if name != "reduce_sum":  # a sum is judged by `zeros`
        lock([ins[0][i] for i in reduced], f"{name} reduces it")
    return [[axis for i, axis in enumerate(ins[0]) if i not in reduced]]


def _cumulative(equation: core.JaxprEqn, ins: list[Axes], inner: list[Frame]) -> list[Axes]:
    del inner
    lock([ins[0][equation.params["axis"]]], f"{equation.primitive.name} runs along it")
    return ins


def _sort(equation: core.JaxprEqn, ins: list[Axes], inner: list[Frame]) -> list[Axes]:
    lock([axes[equation.params["dimension"]] for axes in ins], "sort runs along it")
    return _elementwise(equation, ins, inner)


def _window(equation: core.JaxprEqn, ins: list[Axes], inner: list[Frame]) -> list[Axes]:
    del inner
    (variable,) = equation.outvars
    sizes = equation.params["window_dimensions"]
    out = []
    for axis, window, size in zip(ins[0], sizes, shape_of(variable), strict=True):
        if window == 1 and axis.size == size:
            out.append(axis)
        else:
            lock([axis], f"{equation.primitive.name} moves along it")
            out.append(Axis(size, f"{equation.primitive.name} moves along it"))
    return [out]


def _dot(equation: core.JaxprEqn, ins: list[Axes], inner: list[Frame]) -> list[Axes]:
    del inner
    (left_sum, right_sum), (left_batch, right_batch) = equation.params["dimension_numbers"]
    left, right = ins
    for one, other in zip((*left_sum, *left_batch), (*right_sum, *right_batch), strict=True):
        unify(left[one], right[other], "dot_general")
    free = [
        axis
        for axes, taken in ((left, (*left_sum, *left_batch)), (right, (*right_sum, *right_batch)))
        for i, axis in enumerate(axes)
        if i not in taken
    ]
    return [[left[i] for i in left_batch] + free]


def _conv(equation: core.JaxprEqn, ins: list[Axes], inner: list[Frame]) -> list[Axes]:
    params, (image, kernel) = equation.params, ins
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    if params["batch_group_count"] != 1:
        return unknown(equation, ins, inner)
    batch, channels, *places = (image[i] for i in numbers.lhs_spec)
    outputs, inputs, *window = (kernel[i] for i in numbers.rhs_spec)
    lock([*places, *window], "conv_general_dilated moves along it")
    group = Axis(groups)
    unify(channels, product([group, inputs]), "conv_general_dilated")
    unify(outputs, product([group, Axis(outputs.size // groups)]), "conv_general_dilated")
    (variable,) = equation.outvars
    out = fresh(variable, "conv_general_dilated moves along it")
    out[numbers.out_spec[0]], out[numbers.out_spec[1]] = batch, outputs
    return [out]


def _concatenate(equation: core.JaxprEqn, ins: list[Axes], inner: list[Frame]) -> list[Axes]:
    del inner
    along = equation.params["dimension"]
    for axes in ins[1:]:
        for i, (one, other) in enumerate(zip(ins[0], axes, strict=True)):
            if i != along:
                unify(one, other, "concatenate")
    joined = total([axes[along] for axes in ins])
    return [[joined if i == along else axis for i, axis in enumerate(ins[0])]]


def _stack(equation: core.JaxprEqn, ins: list[Axes], inner: list[Frame]) -> list[Axes]:
    out = _elementwise(equation, ins, inner)[0]
    at = equation.params["axis"]
    return [[*out[:at], Axis(len(ins), "stack made it"), *out[at:]]]


def _unstack(equation: core.JaxprEqn, ins: list[Axes], inner: list[Frame]) -> list[Axes]:
    del inner
    at = equation.params["axis"]
    lock([ins[0][at]], "unstack takes it apart")
    rest = [axis for i, axis in enumerate(ins[0]) if i != at]
    return [rest for _ in equation.outvars]


def _tile(equation: core.JaxprEqn, ins: list[Axes], inner: list[Frame]) -> list[Axes]:
    del inner
    out = []
    for axis, times in zip(ins[0], equation.params["reps"], strict=True):
        out.append(axis if times == 1 else total([axis] * times))
    return [out]


def _cut_or_lock(axis: Axis, start: int, stop: int, name: str) -> Axis:
    part = cut(axis, start, stop)
    if part is None:
        lock([axis], f"{name} takes a part of it")
        return Axis(stop - start, f"{name} takes a part of another axis")
    return part


def _slice(equation: core.JaxprEqn, ins: list[Axes], inner: list[Frame]) -> list[Axes]:
    del inner
    params = equation.params
    strides = params["strides"] or (1,) * len(ins[0])
    out = []
    bounds = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    for axis, (start, stop, stride) in zip(ins[0], bounds, strict=True):
        if stride == 1:
            out.append(_cut_or_lock(axis, start, stop, "slice"))
        else:
            lock([axis], "slice takes steps along it")
            out.append(Axis(-(-(stop - start) // stride), "slice takes steps along another axis"))
    return [out]


def _split(equation: core.JaxprEqn, ins: list[Axes], inner: list[Frame]) -> list[Axes]:
    del inner
    along, outs, start = equation.params["axis"], [], 0
    for size in equation.params["sizes"]:
        part = _cut_or_lock(ins[0][along], start, start + size, "split")
        outs.append([part if i == along else axis for i, axis in enumerate(ins[0])])
        start += size
    return outs


def _pad(equation: core.JaxprEqn, ins: list[Axes], inner: list[Frame]) -> list[Axes]:
    del inner
    out = []
    for axis, (low, high, within) in zip(ins[0], equation.params["padding_config"], strict=True):
        if within or min(low, high) < 0:
            lock([axis], "pad changes it")
            size = axis.size + low + high + within * max(axis.size - 1, 0)
            out.append(Axis(size, "pad made it"))
        else:
            out.append(total([Axis(low), axis, Axis(high)]))
    return [out]


def _gather(equation: core.JaxprEqn, ins: list[Axes], inner: list[Frame]) -> list[Axes]:
    del inner
    table, indices = ins
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    sliced = []
    for i, axis in enumerate(table):
        whole = axis.size == sizes[i] and i not in dropped
        if not whole:
            lock([axis], "gather picks places of it")
        if i not in dropped:
            sliced.append(axis if whole else Axis(sizes[i], "gather made it"))
    lock(indices[-1:], "gather reads places from it")
    lock([indices[i] for i in numbers.start_indices_batching_dims], "gather reads places from it")
    (variable,) = equation.outvars
    batch = iter(indices[:-1])
    parts = iter(sliced)
    rank = len(shape_of(variable))
    return [[next(parts) if i in numbers.offset_dims else next(batch) for i in range(rank)]]


def _dynamic_slice(equation: core.JaxprEqn, ins: list[Axes], inner: list[Frame]) -> list[Axes]:
    del inner
    out = []
    for axis, size in zip(ins[0], equation.params["slice_sizes"], strict=True):
        if axis.size != size:
            lock([axis], "dynamic_slice picks places of it")
        out.append(axis if axis.size == size else Axis(size, "dynamic_slice made it"))
    return [out]


def _dynamic_update(equation: core.JaxprEqn, ins: list[Axes], inner: list[Frame]) -> list[Axes]:
    del equation, inner
    for axis, new in zip(ins[0], ins[1], strict=True):
        if axis.size == new.size:
            unify(axis, new, "dynamic_update_slice")
        else:
            lock([axis, new], "dynamic_update_slice writes to places of it")
    return [ins[0]]


ARRAY_RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(REDUCTIONS, _reduce),
    **dict.fromkeys(CUMULATIVE, _cumulative),
    **dict.fromkeys(WINDOWS, _window),
    "bitcast_convert_type": _bitcast,
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "conv_general_dilated": _conv,
    "device_put": _tuple,
    "dot_general": _dot,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update,
    "gather": _gather,
    "iota": _iota,
    "optimization_barrier": _tuple,
    "pad": _pad,
    "random_bits": _random,
    "reshape": _reshape,
    "rev": _rev,
    "slice": _slice,
    "sort": _sort,
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "transpose": _transpose,
    "unstack": _unstack,
}
