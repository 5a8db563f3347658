"""What follows a native product and is computed with it: biases, batch norms, residuals, bounds.

Such operations read every output once more, which takes as long as a small product. A native kernel
does them to outputs that are still in the first level of the cache. A product is therefore held
back until something reads it that it cannot be computed with.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jopt.layers._interpret import Pending, bind, inner_jaxprs
from jopt.run._native import After

_FUNCTIONS = {"jit", "pjit", "custom_jvp_call"}
Compute = Callable[..., jax.Array]


class Step(NamedTuple):
    """An operation after a product.

    Attributes:
      equation: it.
      place: of the outputs among its inputs.
    """

    equation: core.JaxprEqn
    place: int

    def run(self, value: Any, other: Any) -> Any:
        """Compute it; `other` is its other input, if that is no number."""
        atoms = self.equation.invars
        inputs = [atom.val if isinstance(atom, core.Literal) else other for atom in atoms]
        inputs[self.place] = value
        return bind(self.equation, inputs)[0]


class How(NamedTuple):
    """How a product is computed with what follows it.

    Attributes:
      plain: `(*operands) -> outputs`, which can be derived.
      ended: `(*operands, after) -> outputs`, which cannot.
      steps: what follows.
    """

    plain: Compute
    ended: Compute
    steps: tuple[Step, ...] = ()

    def apart(self, operands: Any, others: Any) -> Any:
        """Compute the product, then what follows."""
        value = self.plain(*operands)
        for step, other in zip(self.steps, others, strict=True):
            value = step.run(value, other)
        return value

    def together(self, operands: Any, others: Any) -> Any:
        """Compute the product with what follows."""
        less = times = plus = more = None
        low, high = -math.inf, math.inf
        for step, other in zip(self.steps, others, strict=True):
            limits = bounds(step)
            if limits is not None:
                low, high = _narrowed((low, high), limits)
                continue
            if not _is_by_output(other, other.shape):
                more = other
                continue
            numbers, name = other.reshape(-1), step.equation.primitive.name
            if name == "mul":
                times = numbers if times is None else times * numbers
                plus = None if plus is None else plus * numbers
            elif name == "add":
                plus = numbers if plus is None else plus + numbers
            elif times is None and plus is None:
                less = numbers if less is None else less + numbers
            else:
                plus = -numbers if plus is None else plus - numbers
        return self.ended(*operands, After(less, times, plus, more, low, high))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _together(how: How, operands: Any, others: Any) -> Any:
    return how.together(operands, others)


@_together.defjvp
def _together_jvp(how: How, primals: Any, tangents: Any) -> tuple[Any, Any]:
    return jax.jvp(how.apart, primals, tangents)


def _narrowed(ends: tuple[float, float], limits: tuple[float, float]) -> tuple[float, float]:
    """Return the bounds of what lies within some bounds, then within others."""
    low, high = (min(max(end, limits[0]), limits[1]) for end in ends)
    return low, high


def _limits(name: str, number: Any) -> tuple[float, float] | None:
    value = np.asarray(number)
    if value.shape or np.isnan(value):
        return None
    if name == "max":
        return float(value), math.inf
    return (-math.inf, float(value)) if name == "min" else None


def bounds(step: Step) -> tuple[float, float] | None:
    """Return the bounds within which an operation keeps its input, if that is all that it does.

    Args:
      step: perhaps a call of a function, such as relu6.
    """
    equation = step.equation
    name = equation.primitive.name
    if name in ("max", "min"):
        other = equation.invars[1 - step.place]
        return _limits(name, other.val) if isinstance(other, core.Literal) else None
    if name not in _FUNCTIONS or len(equation.invars) != 1:
        return None
    jaxpr, consts = next(pair for value in equation.params.values() for pair in inner_jaxprs(value))
    if consts or len(jaxpr.outvars) != 1:
        return None
    low, high, at = -math.inf, math.inf, jaxpr.invars[0]
    for each in jaxpr.eqns:
        places = [place for place, atom in enumerate(each.invars) if atom is at]
        limits = bounds(Step(each, places[0])) if len(places) == 1 else None
        if limits is None:
            return None
        low, high = _narrowed((low, high), limits)
        at = each.outvars[0]
    return (low, high) if jaxpr.outvars[0] is at else None


def _is_by_output(other: Any, shape: tuple[int, ...]) -> bool:
    """Return whether an array has one number for each output, which all rows share."""
    return jnp.shape(other) == (1,) * (len(shape) - 1) + shape[-1:]


class Product(Pending):
    """A native product, and what follows it so far."""

    def __init__(
        self, how: How, operands: tuple[Any, ...], aval: Any, others: tuple[Any, ...] = ()
    ) -> None:
        """Hold a product back.

        Args:
          how: how it is computed.
          operands: its own.
          aval: the shape and dtype of its outputs; what belongs together lies along the last axis.
          others: the other input of each step, or None.
        """
        self.how, self.operands, self.aval, self.others = how, operands, aval, others
        self._value: Any = None

    def then(self, equation: core.JaxprEqn, values: list[Any]) -> "Product | None":
        """Return this with an operation after it, or None where the two are computed apart."""
        avals: list[Any] = [out.aval for out in equation.outvars]
        outs = [(aval.shape, aval.dtype) for aval in avals]
        if outs != [(self.aval.shape, self.aval.dtype)]:
            return None
        step = Step(equation, next(i for i, value in enumerate(values) if value is self))
        other = None
        if bounds(step) is None:
            other = self._added_or_scaled(step, values)
            if other is None:
                return None
        how = self.how._replace(steps=(*self.how.steps, step))
        return Product(how, self.operands, self.aval, (*self.others, other))

    def _added_or_scaled(self, step: Step, values: list[Any]) -> Any:
        """Return what an operation adds to the outputs, or multiplies them by, if that is it."""
        name, shape = step.equation.primitive.name, self.aval.shape
        known = name in ("add", "mul") or (name == "sub" and step.place == 0)
        if not known or len(values) != 2 or any(bounds(each) for each in self.how.steps):
            return None
        other = values[1 - step.place]
        if isinstance(other, Product):
            other = other.value()
        if jnp.result_type(other) != jnp.float32:
            return None
        residual = any(not _is_by_output(each, shape) for each in self.others)
        if _is_by_output(other, shape):
            return None if residual and name == "mul" else other
        return other if name == "add" and not residual and jnp.shape(other) == shape else None

    def value(self) -> Any:
        """Compute it, with what follows, once."""
        if self._value is None and self.how.steps:
            self._value = _together(self.how, self.operands, self.others)
        elif self._value is None:
            self._value = self.how.plain(*self.operands)
        return self._value
