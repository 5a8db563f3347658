"""A traced function whose arrays have axes, and the leaves of its parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jopt._leaves import is_compressed
from jopt._trees import flatten_with_paths
from jopt.prune._shrink._axes import Axis, all_leaves, lock
from jopt.prune._shrink._frames import Axes, Frame
from jopt.prune._shrink._infer import infer
from jopt.prune._shrink._zeros import zero_leaves, zeros

Apply = Callable[..., Any]


class Trace(NamedTuple):
    """What is known of one program.

    Attributes:
      frame: the program with its axes.
      paths: of the leaves of the parameters.
      axes: the axes of each of these leaves; none for a compressed one.
      places: which input of the program each of these leaves is, the first if it has several.
      out_tree: the structure of the outputs.
    """

    frame: Frame
    paths: list[str]
    axes: list[Axes]
    places: list[int]
    out_tree: Any


def _input_axes(leaf: Any, reason: str | None) -> list[Axes]:
    return [[Axis(size, reason) for size in array.shape] for array in jax.tree.leaves(leaf)]


def as_shape(array: Any) -> jax.ShapeDtypeStruct:
    """Return the shape and dtype of an array without its values."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def trace(apply: Apply, params: Any, args: tuple[Any, ...], same_outputs: bool = True) -> Trace:
    """Trace a function and find the axes of all its arrays; nothing is computed.

    Args:
      apply: `(params, *args) -> outputs`.
      params: arrays or shapes.
      args: arrays or shapes.
      same_outputs: whether the outputs keep their shapes.

    Raises:
      TypeError: `apply` is not callable.
      ValueError: `params` holds no array.
    """
    if not callable(apply):
        raise TypeError(f"apply must be a function (params, *args) -> outputs, not {apply!r}.")
    paths, parts, _ = flatten_with_paths(params)
    if not jax.tree.leaves(params):
        raise ValueError(f"params must hold at least one array, not {params!r}.")
    closed, out_shapes = jax.make_jaxpr(apply, return_shape=True)(params, *args)
    axes, inputs, places = [], [], []
    for path, leaf in zip(paths, parts, strict=True):
        small = is_compressed(leaf)
        own = _input_axes(leaf, f"{path} is compressed" if small else None)
        axes.append([] if small else own[0])
        places.append(len(inputs))
        inputs += own
    inputs += _input_axes(args, "it belongs to an argument of apply")
    frame, outs = infer(closed.jaxpr, closed.consts, inputs)
    if same_outputs:
        lock([axis for out in outs for axis in out], "it belongs to an output of apply")
    # Masks reach parameters only: all others may hold anything at removed units.
    masked = {place for place, own in zip(places, axes, strict=True) if own}
    zeros(
        frame,
        [zero_leaves(own) if at in masked else frozenset() for at, own in enumerate(inputs)],
    )
    return Trace(frame, paths, axes, places, jax.tree.structure(out_shapes))


def order_of_use(frame: Frame) -> list[int]:
    """Number the inputs of a program in the order in which it first uses them, unused ones last."""
    first: dict[Any, int] = {}

    def visit(frame: Frame, outer: dict[Any, Any]) -> None:
        for number, equation in enumerate(frame.jaxpr.eqns):
            given = [None if hasattr(a, "val") else outer.get(a) for a in equation.invars]
            for inner in frame.inner[number]:
                # Branches and loops hand over the last of their operands.
                last = given[len(given) - len(inner.jaxpr.invars) :]
                visit(inner, dict(zip(inner.jaxpr.invars, last, strict=False)))
            for source in given:
                if source is not None:
                    first.setdefault(source, len(first))

    visit(frame, {variable: variable for variable in frame.jaxpr.invars})
    return [first.get(variable, len(first)) for variable in frame.jaxpr.invars]


def free_leaves(axes: list[Axes]) -> list[Axis]:
    """List the leaves that nothing has locked, each once, in order of first occurrence."""
    every = all_leaves(axis for own in axes for axis in own)
    return list(dict.fromkeys(leaf for leaf in every if leaf.reason is None and leaf.size > 1))
