"""One run through a program, and the axes of its arrays."""

from collections.abc import Sequence
from typing import Any

from jax.extend import core

from jopt.prune._shrink._axes import Axis, lock

Axes = list[Axis]


class Frame:
    """The axes of one run through a jaxpr; the same jaxpr called twice has two.

    Attributes:
      jaxpr: the program.
      consts: the values of its constants.
      axes: for each variable an axis for each of its dimensions.
      inner: for each equation, by its number, the frames of the jaxprs that it calls.
    """

    def __init__(self, jaxpr: core.Jaxpr, consts: Sequence[Any]) -> None:
        """Start with nothing known."""
        self.jaxpr, self.consts = jaxpr, consts
        self.axes: dict[Any, Axes] = {}
        self.inner: dict[int, list[Frame]] = {}

    def read(self, atoms: Sequence[Any]) -> list[Axes]:
        """Return the axes of variables; literals are scalars and have none."""
        return [[] if isinstance(atom, core.Literal) else self.axes[atom] for atom in atoms]


def shape_of(variable: Any) -> tuple[int, ...]:
    """Return the shape of a variable; what is no array counts as a scalar."""
    return tuple(getattr(variable.aval, "shape", ()))


def fresh(variable: Any, reason: str | None = None) -> Axes:
    """Return new axes for a variable."""
    return [Axis(size, reason) for size in shape_of(variable)]


def unknown(equation: core.JaxprEqn, ins: list[Axes], inner: list[Frame]) -> list[Axes]:
    """Lock every axis that goes in or comes out: the rule of operations that have none."""
    del inner
    reason = f"{equation.primitive.name} is not known"
    lock([axis for axes in ins for axis in axes], reason)
    return [fresh(variable, reason) for variable in equation.outvars]
