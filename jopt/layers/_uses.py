"""Where a product uses a parameter as its kernel, and how its axes take part.

A dot or a convolution multiplies an input by a kernel. Each axis of the kernel is contracted
(summed over: the axes of the features), free (the outputs), or batched (each index has inputs of
its own); an output axis may be divided into groups with inputs of their own.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from jopt.layers._views import Atom, Dim, View, dim_size, take

GROUP_AXIS = -1


class Window(NamedTuple):
    """How a convolution's kernel moves over its input, as `lax.conv_general_dilated` says it.

    Attributes:
      size: the kernel's extent along each spatial axis.
      strides: steps between outputs.
      padding: `(low, high)` for each spatial axis.
      input_dilation: steps between elements of the input, 1 for none.
      kernel_dilation: steps between elements of the kernel, 1 for none.
      dimension_numbers: a `jax.lax.ConvDimensionNumbers`.
      feature_group_count: groups of input channels; more than the layer's own `groups` where `vmap`
        turned copies of the layer into groups.
    """

    size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    dimension_numbers: Any
    feature_group_count: int


@dataclasses.dataclass(frozen=True)
class Layer:
    """Describe one use of a parameter as the kernel of a product. Static and hashable.

    Attributes:
      path: where the kernel is in the tree of parameters.
      kind: `"dot"` or `"conv"`.
      shape: the kernel's shape.
      contracted: the kernel's axes that the product sums over, ascending: the features. `(0,)` for
        a dense kernel, `(0, 1, 2)` for a convolution's (height, width, in, out), `(1,)` for an
        embedding used transposed.
      batch: the kernel's axes along which each index has inputs of its own, ascending: layers
        stacked by `scan` or copied by `vmap`.
      scanned: those axes of `batch` that a scan loops over; inside it `x` is one slice's input.
      groups: into how many parts the axis `grouped` is divided, each with inputs of its own.
      grouped: the kernel's axis that is divided into groups, or None.
      input_axes: the axes of the input that the product sums over (a convolution's channels).
      window: for a convolution, how the kernel moves; None for a dot.

    Example:
      >>> layer = Layer("w", "conv", (3, 3, 8, 16), (0, 1, 2), (), (), 1, None, (3,), None)
      >>> layer.features, layer.free
      (72, (3,))
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    contracted: tuple[int, ...]
    batch: tuple[int, ...]
    scanned: tuple[int, ...]
    groups: int
    grouped: int | None
    input_axes: tuple[int, ...]
    window: Window | None

    @property
    def features(self) -> int:
        """Return how many inputs each output sums over."""
        return math.prod(self.shape[axis] for axis in self.contracted)

    @property
    def free(self) -> tuple[int, ...]:
        """Return the kernel's axes that are outputs, ascending; `grouped` is one of them."""
        taken = self.contracted + self.batch
        return tuple(axis for axis in range(len(self.shape)) if axis not in taken)

    @property
    def leading(self) -> tuple[int, ...]:
        """Return the leading axes' sizes of recorded inputs: `batch`, then groups if any."""
        groups = () if self.grouped is None else (self.groups,)
        return tuple(self.shape[axis] for axis in self.batch) + groups


class Use(NamedTuple):
    """A layer and what is needed to bring its input into the order of the kernel. Static.

    Attributes:
      layer: what users see.
      side: which operand of the product is the input.
      input_batch: the input's batch dimensions, in the order of `batch`.
      batch: the kernel's atoms that have inputs of their own, groups as axis `GROUP_AXIS`.
      summed: the kernel's atoms in the order in which the product sums over them.
      free: the kernel's atoms that are outputs, in the order in which they come out.
      scanned: the dimensions that scans took off, outermost first.
      scans: as in `View`.
    """

    layer: Layer
    side: int
    input_batch: tuple[int, ...]
    batch: Dim
    summed: Dim
    free: Dim
    scanned: tuple[Dim, ...]
    scans: tuple[bool, ...]


class _Roles(NamedTuple):
    contracted: tuple[int, ...]
    batch: tuple[int, ...]
    scanned: tuple[int, ...]
    groups: int
    grouped: int | None
    batch_atoms: Dim


def _group(dims: dict[str, Dim], axis: int) -> tuple[int, Dim] | None:
    """Return the number of groups and the batch atoms renamed, if groups are outermost."""
    inner = math.prod(atom.size for atom in dims["free"] if atom.axis == axis)
    outer = [atom for atom in dims["batch"] if atom.axis == axis]
    if any(atom.stride < inner for atom in outer if atom.size > 1):
        return None
    renamed = tuple(
        atom._replace(axis=GROUP_AXIS, stride=atom.stride // inner) if atom.axis == axis else atom
        for atom in dims["batch"]
    )
    return dim_size(outer), renamed


def _roles(view: View, dims: dict[str, Dim], name: str, grouping: bool) -> _Roles | str:
    """Decide the role of each axis of the kernel, or say why it cannot be done."""
    found: list[set[str]] = [set() for _ in view.shape]
    for role, dim in dims.items():
        for atom in dim:
            found[atom.axis].add(role)
    last = len(view.shape) - 1
    # An axis of size one that a reshape dropped has no atom: any role would do.
    roles = [roles or {"free" if axis == last else "summed"} for axis, roles in enumerate(found)]
    axes = {
        role: tuple(axis for axis in range(len(roles)) if roles[axis] == {role}) for role in dims
    }
    mixed = [axis for axis in range(len(roles)) if len(roles[axis]) > 1]
    if grouping and not mixed and not axes["free"] and dims["batch"]:
        # A depthwise kernel: one output in each group.
        mixed = [[atom for atom in dims["batch"] if view.shape[atom.axis] > 1][-1].axis]
    elif mixed and (len(mixed) > 1 or roles[mixed[0]] != {"batch", "free"}):
        return f"{name} after a reshape that divides its axis {mixed[0]}"
    if not any(atom.axis in axes["summed"] for atom in dims["summed"]):
        return f"{name} without a sum over any of its axes"
    grouped = mixed[0] if mixed else None
    groups, batch_atoms = 1, dims["batch"]
    if grouped is not None:
        divided = _group(dims, grouped)
        if divided is None:
            return f"{name} after a reshape that interleaves groups of its axis {grouped}"
        groups, batch_atoms = divided
    batch = tuple(axis for axis in sorted(axes["batch"] + axes["scan"]) if axis != grouped)
    return _Roles(axes["summed"], batch, axes["scan"], groups, grouped, batch_atoms)


def _flat(dims: Iterable[Dim]) -> tuple[Atom, ...]:
    return tuple(atom for dim in dims for atom in dim)


def _use(
    view: View,
    dims: dict[str, Dim],
    side: int,
    input_batch: tuple[int, ...],
    input_axes: tuple[int, ...],
    window: Window | None,
) -> Use | str:
    kind, name = ("conv", "conv_general_dilated") if window else ("dot", "dot_general")
    grouping = window is not None and window.feature_group_count > 1
    roles = _roles(view, dims, name, grouping)
    if isinstance(roles, str):
        return roles
    layer = Layer(
        path=view.path,
        kind=kind,
        shape=view.shape,
        contracted=roles.contracted,
        batch=roles.batch,
        scanned=roles.scanned,
        groups=roles.groups,
        grouped=roles.grouped,
        input_axes=input_axes,
        window=window,
    )
    return Use(
        layer=layer,
        side=side,
        input_batch=input_batch,
        batch=roles.batch_atoms,
        summed=dims["summed"],
        free=dims["free"],
        scanned=view.scanned,
        scans=view.scans,
    )


def dot_use(params: dict[str, Any], views: list[View | None]) -> Use | str:
    """Read a `dot_general` with a parameter on one side.

    Returns:
      The use, or the reason why there is none.
    """
    left, right = views
    view = right if left is None else left
    if view is None or (left is not None and right is not None):
        return "dot_general multiplies it by another parameter"
    side = 0 if left is None else 1
    summed, batch = params["dimension_numbers"]
    taken = {*summed[1 - side], *batch[1 - side]}
    dims = {
        "scan": _flat(view.scanned),
        "batch": _flat(view.dims[i] for i in batch[1 - side]),
        "summed": _flat(view.dims[i] for i in summed[1 - side]),
        "free": _flat(dim for i, dim in enumerate(view.dims) if i not in taken),
    }
    return _use(view, dims, side, tuple(batch[side]), tuple(summed[side]), None)


def conv_use(params: dict[str, Any], views: list[View | None]) -> Use | str:
    """Read a `conv_general_dilated` whose kernel is a parameter.

    Returns:
      The use, or the reason why there is none.
    """
    view = views[1]
    if view is None:
        return "conv_general_dilated has it as its input"
    if views[0] is not None:
        return "conv_general_dilated multiplies it by another parameter"
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    out, channels, *spatial = (view.dims[i] for i in numbers.rhs_spec)
    split = take(out, groups) if groups > 1 else ((), out)
    if params["batch_group_count"] != 1 or split is None:
        return "conv_general_dilated groups it in a way not followed here"
    dims = {
        "scan": _flat(view.scanned),
        "batch": split[0],
        "summed": (*_flat(spatial), *channels),
        "free": split[1],
    }
    window = Window(
        size=tuple(dim_size(dim) for dim in spatial),
        strides=tuple(params["window_strides"]),
        padding=tuple((low, high) for low, high in params["padding"]),
        input_dilation=tuple(params["lhs_dilation"]),
        kernel_dilation=tuple(params["rhs_dilation"]),
        dimension_numbers=numbers,
        feature_group_count=groups,
    )
    return _use(view, dims, 0, (), (numbers.lhs_spec[1],), window)
