"""Run a program with units removed from its arrays.

The operations are those of the original program, one by one, on smaller arrays; only the sizes
written into them (of a reshape, a broadcast, a slice) are taken anew from the axes. Numbers that
the original program computed from sizes, such as the divisor of a mean, stay as they were: so the
result is that of the masked network.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from jopt.layers._interpret import CALLS, REMAT, bind
from jopt.prune._shrink._axes import Axis, kept
from jopt.prune._shrink._frames import Axes, Frame

Keep = Mapping[Axis, np.ndarray]


def narrowed(array: Any, axes: Axes, keep: Keep) -> Any:
    """Take the units that stay out of an array.

    Args:
      array: any array with a dimension for each of the axes.
      axes: its axes.
      keep: which units of which leaves stay.
    """
    for dimension, axis in enumerate(axes):
        stays = kept(axis, keep)
        if not stays.all():
            array = jnp.take(array, np.flatnonzero(stays), axis=dimension)
    return array


def new_shape(axes: Axes, keep: Keep) -> tuple[int, ...]:
    """Return the shape that an array with these axes has."""
    return tuple(int(kept(axis, keep).sum()) for axis in axes)


def _counts(axis: Axis, places: Sequence[int], keep: Keep) -> list[int]:
    """Return how many of the indices before each place stay."""
    stays = kept(axis, keep)
    return [int(stays[:place].sum()) for place in places]


def _sliced(params: dict[str, Any], ins: list[Axes], keep: Keep) -> dict[str, Any]:
    bounds = [
        (start, stop) if kept(axis, keep).all() else _counts(axis, (start, stop), keep)
        for axis, start, stop in zip(
            ins[0], params["start_indices"], params["limit_indices"], strict=True
        )
    ]
    starts, stops = zip(*bounds, strict=True) if bounds else ((), ())
    return {"start_indices": tuple(starts), "limit_indices": tuple(stops)}


def _padded(
    params: dict[str, Any], ins: list[Axes], outs: list[Axes], keep: Keep
) -> dict[str, Any]:
    config = []
    for (low, high, within), axis, out in zip(
        params["padding_config"], ins[0], outs[0], strict=True
    ):
        if not kept(out, keep).all():
            low, through = _counts(out, (low, low + axis.size), keep)
            high = int(kept(out, keep).sum()) - through
        config.append((low, high, within))
    return {"padding_config": tuple(config)}


def _gathered(params: dict[str, Any], ins: list[Axes], keep: Keep) -> dict[str, Any]:
    sizes = [
        int(kept(axis, keep).sum()) if size == axis.size else size
        for axis, size in zip(ins[0], params["slice_sizes"], strict=True)
    ]
    return {"slice_sizes": tuple(sizes)}


def _convolved(params: dict[str, Any], ins: list[Axes], keep: Keep) -> dict[str, Any]:
    numbers = params["dimension_numbers"]
    (channels,) = new_shape([ins[0][numbers.lhs_spec[1]]], keep)
    (inputs,) = new_shape([ins[1][numbers.rhs_spec[1]]], keep)
    return {"feature_group_count": channels // inputs} if inputs else {}


def _new_params(
    equation: core.JaxprEqn, ins: list[Axes], outs: list[Axes], keep: Keep
) -> dict[str, Any]:
    """Return the parameters of an equation for the smaller arrays."""
    name, params = equation.primitive.name, dict(equation.params)
    if name == "reshape":
        params |= {"new_sizes": new_shape(outs[0], keep)}
    elif name in ("broadcast_in_dim", "iota", "random_bits"):
        params |= {"shape": new_shape(outs[0], keep)}
    elif name == "split":
        along = params["axis"]
        params |= {"sizes": tuple(new_shape([axes[along] for axes in outs], keep))}
    elif name == "slice":
        params |= _sliced(params, ins, keep)
    elif name == "pad":
        params |= _padded(params, ins, outs, keep)
    elif name in ("gather", "dynamic_slice"):
        params |= _gathered(params, ins, keep)
    elif name == "conv_general_dilated":
        params |= _convolved(params, ins, keep)
    return params


def _run(frame: Frame, keep: Keep) -> Callable[..., list[Any]]:
    return lambda *values: run(frame, values, keep)


def _is_relu(frame: Frame) -> bool:
    equations = frame.jaxpr.eqns
    while len(equations) == 1 and equations[0].primitive.name in CALLS:
        frame = frame.inner[0][0]
        equations = frame.jaxpr.eqns
    if len(equations) != 1 or equations[0].primitive.name != "max":
        return False
    atom = equations[0].invars[1]
    return isinstance(atom, core.Literal) and np.ndim(atom.val) == 0 and atom.val == 0


def _call(equation: core.JaxprEqn, frames: list[Frame], values: list[Any], keep: Keep) -> list[Any]:
    name, params = equation.primitive.name, equation.params
    if name.startswith("custom_") and _is_relu(frames[0]):
        return [jax.nn.relu(values[0])]  # whose derivative at zero is its own
    function = _run(frames[0], keep)
    if name in REMAT:
        function = jax.checkpoint(
            function, prevent_cse=params["prevent_cse"], policy=params["policy"]
        )
    return function(*values)


def _scan(equation: core.JaxprEqn, frames: list[Frame], values: list[Any], keep: Keep) -> list[Any]:
    params = equation.params
    first, last = params["num_consts"], params["num_consts"] + params["num_carry"]
    body = _run(frames[0], keep)

    def step(carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
        outs = body(*values[:first], *carry, *slices)
        return outs[: last - first], outs[last - first :]

    carry, collected = lax.scan(
        step,
        values[first:last],
        values[last:],
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *collected]


def _while(
    equation: core.JaxprEqn, frames: list[Frame], values: list[Any], keep: Keep
) -> list[Any]:
    tests = equation.params["cond_nconsts"]
    bodies = tests + equation.params["body_nconsts"]
    test, body = _run(frames[0], keep), _run(frames[1], keep)
    return lax.while_loop(
        lambda carry: test(*values[:tests], *carry)[0],
        lambda carry: body(*values[tests:bodies], *carry),
        values[bodies:],
    )


def _control(
    equation: core.JaxprEqn, frames: list[Frame], values: list[Any], keep: Keep
) -> list[Any]:
    name = equation.primitive.name
    if name == "cond":
        return lax.switch(values[0], [_run(frame, keep) for frame in frames], *values[1:])
    runners = {"scan": _scan, "while": _while}
    return runners.get(name, _call)(equation, frames, values, keep)


def _empty(equation: core.JaxprEqn, values: list[Any], outs: list[Axes], keep: Keep) -> Any:
    """Return the zeros that a convolution without channels or outputs amounts to, or None."""
    if equation.primitive.name != "conv_general_dilated" or all(np.size(v) for v in values):
        return None
    aval: Any = equation.outvars[0].aval
    return jnp.zeros(new_shape(outs[0], keep), aval.dtype)


def run(frame: Frame, values: Sequence[Any], keep: Keep) -> list[Any]:
    """Run a program on smaller arrays.

    Args:
      frame: from `infer`.
      values: of its inputs, narrowed already.
      keep: which units of which leaves stay.

    Returns:
      The outputs.
    """
    env: dict[Any, Any] = {
        variable: narrowed(const, frame.axes[variable], keep)
        for variable, const in zip(frame.jaxpr.constvars, frame.consts, strict=True)
    }
    env |= zip(frame.jaxpr.invars, values, strict=True)

    def read(atoms: Sequence[Any]) -> list[Any]:
        return [atom.val if isinstance(atom, core.Literal) else env[atom] for atom in atoms]

    for number, equation in enumerate(frame.jaxpr.eqns):
        inputs, frames = read(equation.invars), frame.inner[number]
        ins, outs = frame.read(equation.invars), [frame.axes[v] for v in equation.outvars]
        if frames:
            results = _control(equation, frames, inputs, keep)
        else:
            empty = _empty(equation, inputs, outs, keep)
            params = _new_params(equation, ins, outs, keep)
            results = bind(equation, inputs, params) if empty is None else [empty]
        env |= zip(equation.outvars, results, strict=True)
    return read(frame.jaxpr.outvars)
