"""Which axes of which arrays of a program lose their units together.

`infer` walks through a jaxpr once and gives every array a list of axes, unified, divided and locked
as each operation demands. What has no rule is locked, with the operation's name: nothing is
guessed.
"""

from collections.abc import Sequence
from typing import Any

from jax.extend import core

from jopt.layers._interpret import CALLS, inner_jaxprs
from jopt.prune._shrink._axes import Axis, lock, unify
from jopt.prune._shrink._frames import Axes, Frame, fresh, unknown
from jopt.prune._shrink._rules import ARRAY_RULES, Rule


def infer(
    jaxpr: core.Jaxpr, consts: Sequence[Any], inputs: Sequence[Axes]
) -> tuple[Frame, list[Axes]]:
    """Give every array of a program its axes.

    Args:
      jaxpr: the program.
      consts: the values of its constants.
      inputs: the axes of its inputs.

    Returns:
      The frame, and the axes of the outputs.
    """
    frame = Frame(jaxpr, consts)
    frame.axes |= {variable: fresh(variable) for variable in jaxpr.constvars}
    frame.axes |= zip(jaxpr.invars, inputs, strict=True)
    for number, equation in enumerate(jaxpr.eqns):
        inner: list[Frame] = []
        rule = RULES.get(equation.primitive.name, unknown)
        outs = rule(equation, frame.read(equation.invars), inner)
        frame.inner[number] = inner
        frame.axes |= zip(equation.outvars, outs, strict=True)
    return frame, frame.read(jaxpr.outvars)


def _call(equation: core.JaxprEqn, ins: list[Axes], inner: list[Frame]) -> list[Axes]:
    found = [pair for value in equation.params.values() for pair in inner_jaxprs(value)][:1]
    if not found or len(found[0][0].invars) != len(ins):
        return unknown(equation, ins, inner)
    frame, outs = infer(*found[0], ins)
    inner.append(frame)
    return outs


def _scan(equation: core.JaxprEqn, ins: list[Axes], inner: list[Frame]) -> list[Axes]:
    params = equation.params
    first, last = params["num_consts"], params["num_consts"] + params["num_carry"]
    ((body, consts),) = inner_jaxprs(params["jaxpr"])
    steps = [axes[0] for axes in ins[last:]]
    lock(steps, "scan runs along it")
    frame, outs = infer(body, consts, ins[:last] + [axes[1:] for axes in ins[last:]])
    inner.append(frame)
    carried = last - first
    for start, end in zip(ins[first:last], outs[:carried], strict=True):
        for one, other in zip(start, end, strict=True):
            unify(one, other, "scan")
    collected = [[Axis(params["length"], "scan made it"), *axes] for axes in outs[carried:]]
    return ins[first:last] + collected


def _cond(equation: core.JaxprEqn, ins: list[Axes], inner: list[Frame]) -> list[Axes]:
    results = []
    for jaxpr, consts in inner_jaxprs(equation.params["branches"]):
        frame, outs = infer(jaxpr, consts, ins[1:])
        inner.append(frame)
        results.append(outs)
    for outs in results[1:]:
        for one, other in zip(results[0], outs, strict=True):
            for left, right in zip(one, other, strict=True):
                unify(left, right, "cond")
    return results[0]


def _while(equation: core.JaxprEqn, ins: list[Axes], inner: list[Frame]) -> list[Axes]:
    params = equation.params
    tests, bodies = params["cond_nconsts"], params["body_nconsts"]
    carry = ins[tests + bodies :]
    frame, _ = infer(*inner_jaxprs(params["cond_jaxpr"])[0], ins[:tests] + carry)
    inner.append(frame)
    frame, outs = infer(*inner_jaxprs(params["body_jaxpr"])[0], ins[tests : tests + bodies] + carry)
    inner.append(frame)
    for start, end in zip(carry, outs, strict=True):
        for one, other in zip(start, end, strict=True):
            unify(one, other, "while")
    return carry


RULES: dict[str, Rule] = {
    **ARRAY_RULES,
    **dict.fromkeys(CALLS, _call),
    "cond": _cond,
    "scan": _scan,
    "while": _while,
}
