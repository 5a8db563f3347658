"""Where a program adds units up, and whether removed ones count there as zeros.

A masked network still computes with its removed units; a shrunk one does not have them. Both agree
where every sum over units meets zeros at the removed ones: then nothing is missing from it. This
follows, through a program whose axes are known, in which leaves an array is zero at removed units,
and locks the leaves of sums that are not. (`mean((x - mean(x))^2)` over units is one: x is zero,
x - mean(x) is not.)
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jax.extend import core

from jopt.layers._interpret import CALLS
from jopt.prune._shrink._axes import Axis, all_leaves, lock
from jopt.prune._shrink._frames import Axes, Frame
from jopt.prune._shrink._rules import CUMULATIVE, REDUCTIONS, WINDOWS

Zeros = (
    frozenset[Axis] | None
)  # the leaves at whose removed units it is zero; None: it is all zeros

# f(0) = 0
_ODD = set(
    """
    abs asin asinh atan atanh cbrt ceil conj convert_element_type copy copy_p erf erf_inv
    expm1 floor imag log1p name neg real reduce_precision round sign sin sinh
    sqrt square stop_gradient tan tanh
    """.split()
)
_ADDED = {"add", "add_any", "atan2", "or", "stack", "sub", "xor"}
_BOUNDED = {"clamp", "max", "min"}
_MULTIPLIED = {"and", "mul"}
_MOVED = set(
    """
    broadcast_in_dim dynamic_slice gather reshape rev slice split squeeze tile transpose unstack
    """.split()
)


def both(values: Iterable[Zeros]) -> Zeros:
    """Return where all of several arrays are zero."""
    found: Zeros = None
    for value in values:
        if value is not None:
            found = value if found is None else found & value
    return found


def either(values: Iterable[Zeros]) -> Zeros:
    """Return where at least one of several arrays is zero."""
    found: Zeros = frozenset()
    for value in values:
        if value is None or found is None:
            return None
        found = found | value
    return found


def _literal(value: Any) -> Zeros:
    return None if np.ndim(value) == 0 and value == 0 else frozenset()


def _restricted(value: Zeros, axes: Axes) -> Zeros:
    return None if value is None else value & frozenset(all_leaves(axes))


def _need(axes: Iterable[Axis], value: Zeros, name: str) -> None:
    """Lock the leaves over which something is summed that is not zero at removed units."""
    if value is not None:
        dirty = [leaf for leaf in all_leaves(axes) if leaf not in value]
        lock(dirty, f"{name} adds up values that are not zero where a unit is masked")


def _dot(equation: core.JaxprEqn, ins: list[Axes], values: list[Zeros]) -> Zeros:
    (summed, _), _ = equation.params["dimension_numbers"]
    value = either(values)
    _need([ins[0][i] for i in summed], value, "dot_general")
    return value


def _conv(equation: core.JaxprEqn, ins: list[Axes], values: list[Zeros]) -> Zeros:
    value = either(values)
    _need([ins[1][equation.params["dimension_numbers"].rhs_spec[1]]], value, "convolution")
    return value


def _concatenated(equation: core.JaxprEqn, ins: list[Axes], values: list[Zeros]) -> Zeros:
    """Count a leaf if each operand that has it is zero at it."""
    del equation
    held = [frozenset(all_leaves(axes)) for axes in ins]
    every = frozenset().union(*held)
    missing = [
        leaves - value for leaves, value in zip(held, values, strict=True) if value is not None
    ]
    return every - frozenset().union(*missing) if missing else None


def _bounds(equation: core.JaxprEqn, values: list[Zeros]) -> list[Zeros]:
    """Count a scalar bound as zero where it leaves zeros as they are: max(x, -1), min(x, 6)."""
    name, atoms = equation.primitive.name, equation.invars
    lower = [name == "max" or (name == "clamp" and place == 0) for place in range(len(atoms))]
    return [
        None
        if isinstance(atom, core.Literal) and (atom.val <= 0 if low else atom.val >= 0)
        else value
        for atom, low, value in zip(atoms, lower, values, strict=True)
    ]


def _padded(ins: list[Axes], out: Axes, values: list[Zeros]) -> Zeros:
    """Return where a padded array is zero: also in the padding, if that is."""
    if values[0] is None or values[1] is not None:
        return both(values)
    return values[0] | (frozenset(all_leaves(out)) - frozenset(all_leaves(ins[0])))


def _one(equation: core.JaxprEqn, ins: list[Axes], values: list[Zeros]) -> Zeros:
    """Return where the outputs of an equation that runs no other program are zero."""
    name = equation.primitive.name
    if name in _ODD or name in _MOVED or name in WINDOWS or name in CUMULATIVE:
        return values[0]
    if name in _ADDED:
        return both(values)
    if name in _MULTIPLIED:
        return either(values)
    if name in ("div", "rem"):
        return values[0]
    if name == "integer_pow":
        return values[0] if equation.params["y"] > 0 else frozenset()
    if name == "select_n":
        return both(values[1:])
    if name in _BOUNDED:
        return both(_bounds(equation, values))
    if name == "dynamic_update_slice":
        return both(values[:2])
    if name in REDUCTIONS:
        if name == "reduce_sum":
            _need([ins[0][i] for i in equation.params["axes"]], values[0], name)
        return frozenset() if name.startswith("arg") else values[0]
    special = {"dot_general": _dot, "conv_general_dilated": _conv, "concatenate": _concatenated}
    return special[name](equation, ins, values) if name in special else frozenset()


def _loop(frame: Frame, consts: list[Zeros], carry: list[Zeros], rest: list[Zeros]) -> Any:
    """Run a loop's body until what is zero after a step is what was zero before it."""
    while True:
        outs = zeros(frame, [*consts, *carry, *rest])
        after = [both(pair) for pair in zip(carry, outs[: len(carry)], strict=True)]
        if after == carry:
            return carry, outs[len(carry) :]
        carry = after


def _inner(equation: core.JaxprEqn, frames: list[Frame], values: list[Zeros]) -> list[Zeros]:
    name, params = equation.primitive.name, equation.params
    if name in CALLS:
        return zeros(frames[0], values)
    if name == "cond":
        results = [zeros(frame, values[1:]) for frame in frames]
        return [both(each) for each in zip(*results, strict=True)]
    if name == "scan":
        first, last = params["num_consts"], params["num_consts"] + params["num_carry"]
        carry, collected = _loop(frames[0], values[:first], values[first:last], values[last:])
        return carry + collected
    tests, bodies = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    carry, _ = _loop(frames[1], values[tests:bodies], values[bodies:], [])
    zeros(frames[0], values[:tests] + carry)
    return carry


def zeros(frame: Frame, inputs: Sequence[Zeros]) -> list[Zeros]:
    """Follow zeros through a program, and lock the leaves of sums that need them in vain.

    Args:
      frame: from `infer`, which must be finished: no leaf is divided any more.
      inputs: for each input of the program where it is zero.

    Returns:
      For each output where it is zero.
    """
    known: dict[Any, Zeros] = {variable: frozenset() for variable in frame.jaxpr.constvars}
    known |= zip(frame.jaxpr.invars, inputs, strict=True)

    def read(atoms: Sequence[Any]) -> list[Zeros]:
        return [
            _literal(atom.val) if isinstance(atom, core.Literal) else known[atom] for atom in atoms
        ]

    for number, equation in enumerate(frame.jaxpr.eqns):
        values, frames = read(equation.invars), frame.inner[number]
        if frames:
            outs = _inner(equation, frames, values)
        elif equation.primitive.name == "pad":
            out = frame.axes[equation.outvars[0]]
            outs = [_padded(frame.read(equation.invars), out, values)]
        elif equation.primitive.name in ("device_put", "optimization_barrier"):
            outs = values
        else:
            found = _one(equation, frame.read(equation.invars), values)
            outs = [found for _ in equation.outvars]
        for variable, value in zip(equation.outvars, outs, strict=True):
            known[variable] = _restricted(value, frame.axes[variable])
    return read(frame.jaxpr.outvars)


def zero_leaves(axes: Axes) -> Zeros:
    """Return where a masked parameter is zero: at the removed units of all of its leaves."""
    return frozenset(all_leaves(axes))
