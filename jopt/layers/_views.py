"""Views: which element of a parameter each element of a traced array is.

Between the parameter and the product that uses it a model may transpose, reshape or convert. Such
an array still holds the parameter's values, each once, in another order: it is a *view*. A view
is kept as factors and not as an array of indices, so that following it costs nothing: each of its
dimensions is a list of atoms, an atom being a range of steps along one axis of the parameter.
Reshaping splits and merges atoms; what mixes values (multiplying, padding, slicing) ends the view.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp


class Atom(NamedTuple):
    """A loop over one axis of a parameter: `size` steps of `stride` along `axis`."""

    axis: int
    stride: int
    size: int
    flipped: bool = False


Dim = tuple[Atom, ...]


class View(NamedTuple):
    """A parameter in another order.

    Attributes:
      path: where the parameter is in the tree.
      shape: the shape of the parameter itself.
      dims: for each dimension of the view the atoms that it runs through, slowest first.
      scanned: the dimensions that enclosing scans took off the front, outermost first.
      scans: for each enclosing scan, outermost first, whether it slices this parameter (True) or
        hands the same one to each step (False).
    """

    path: str
    shape: tuple[int, ...]
    dims: tuple[Dim, ...]
    scanned: tuple[Dim, ...] = ()
    scans: tuple[bool, ...] = ()


def whole(path: str, shape: tuple[int, ...]) -> View:
    """View a parameter as it is.

    Example:
      >>> whole("w", (4, 2)).dims
      ((Atom(axis=0, stride=1, size=4, flipped=False),),
       (Atom(axis=1, stride=1, size=2, flipped=False),))
    """
    return View(path, shape, tuple((Atom(axis, 1, size),) for axis, size in enumerate(shape)))


def dim_size(dim: Sequence[Atom]) -> int:
    """Return how many steps a dimension has.

    Example:
      >>> dim_size((Atom(0, 2, 3), Atom(1, 1, 4)))
      12
    """
    return math.prod(atom.size for atom in dim)


def take(atoms: Sequence[Atom], size: int) -> tuple[Dim, Dim] | None:
    """Take the slowest `size` steps off a list of atoms, splitting the last one if need be.

    Returns:
      The atoms taken and those left, or None if the atoms do not divide so.

    Example:
      >>> take((Atom(0, 1, 6),), 2)
      ((Atom(axis=0, stride=3, size=2, flipped=False),),
       (Atom(axis=0, stride=1, size=3, flipped=False),))
      >>> take((Atom(0, 1, 6),), 4) is None
      True
    """
    taken, left, need = [], list(atoms), size
    if need == 1 and left and left[0].size == 1:
        return (left[0],), tuple(left[1:])
    while need > 1:
        if not left:
            return None
        atom = left.pop(0)
        if need % atom.size == 0:
            taken.append(atom)
            need //= atom.size
        elif atom.size % need == 0:
            rest = atom.size // need
            taken.append(atom._replace(stride=atom.stride * rest, size=need))
            left.insert(0, atom._replace(size=rest))
            need = 1
        else:
            return None
    return tuple(taken), tuple(left)


def _reshape(view: View, params: dict[str, Any]) -> View | None:
    order = params["dimensions"] or range(len(view.dims))
    left: Dim = tuple(atom for i in order for atom in view.dims[i])
    dims: list[Dim] = []
    for size in params["new_sizes"]:
        split = take(left, size)
        if split is None:
            return None
        dims.append(split[0])
        left = split[1]
    if dims:
        dims[-1] += left  # only atoms of one step can be left; keep them for their axis's sake
    return view._replace(dims=tuple(dims))


def _transpose(view: View, params: dict[str, Any]) -> View:
    return view._replace(dims=tuple(view.dims[i] for i in params["permutation"]))


def _squeeze(view: View, params: dict[str, Any]) -> View:
    dropped = {i % len(view.dims) for i in params["dimensions"]}
    return view._replace(dims=tuple(dim for i, dim in enumerate(view.dims) if i not in dropped))


def _broadcast(view: View, params: dict[str, Any]) -> View | None:
    sources = {out: i for i, out in enumerate(params["broadcast_dimensions"])}
    dims = tuple(view.dims[sources[i]] if i in sources else () for i in range(len(params["shape"])))
    same = all(dim_size(dim) == size for dim, size in zip(dims, params["shape"], strict=True))
    return view._replace(dims=dims) if same else None


def _rev(view: View, params: dict[str, Any]) -> View:
    dims = list(view.dims)
    for i in params["dimensions"]:
        dims[i] = tuple(atom._replace(flipped=not atom.flipped) for atom in dims[i])
    return view._replace(dims=tuple(dims))


def _convert(view: View, params: dict[str, Any]) -> View | None:
    # To integers is rounding, after which the values are no longer the parameter's.
    return view if jnp.issubdtype(params["new_dtype"], jnp.floating) else None


def _same(view: View, params: dict[str, Any]) -> View:
    del params
    return view


VIEW_RULES: dict[str, Callable[[View, dict[str, Any]], View | None]] = {
    "reshape": _reshape,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "rev": _rev,
    "convert_element_type": _convert,
    "copy": _same,
    "copy_p": _same,
    "name": _same,
    "reduce_precision": _same,
    "reshard": _same,
    "sharding_constraint": _same,
    "stop_gradient": _same,
}


def looped(view: View | None) -> View | None:
    """Enter a scan that hands the same parameter to each of its steps."""
    return view and view._replace(scans=(*view.scans, False))


def sliced(view: View | None) -> View | None:
    """Enter a scan that hands each of its steps one slice along the first dimension."""
    return view and view._replace(
        dims=view.dims[1:],
        scanned=(*view.scanned, view.dims[0]),
        scans=(*view.scans, True),
    )
