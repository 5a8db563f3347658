"""Groups of units that live and die together: channels, heads, hidden units."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jopt._arrays import on_host
from jopt._trees import Filter, flatten_with_paths, is_floating, is_kernel, select
from jopt.prune._shrink._axes import Axis, leaves, units
from jopt.prune._shrink._trace import Apply, Trace, free_leaves, order_of_use, trace


class Member(NamedTuple):
    """One axis of one parameter that loses indices with its group.

    Attributes:
      path: where the parameter is in the tree.
      axis: which of its axes.
      units: for each index of the axis the unit that it belongs to, -1 for one that stays anyway.
    """

    path: str
    axis: int
    units: np.ndarray


class Group(NamedTuple):
    """Units that can be removed, each with its share of every member.

    Attributes:
      size: how many units there are.
      members: the axes that hold them.
    """

    size: int
    members: tuple[Member, ...]


class Groups(NamedTuple):
    """Say what can be removed from a network, and why the rest cannot.

    Attributes:
      groups: by name, which is that of the axis where the units are first made,
        `"conv1/kernel[3]"`; where an axis is divided, `"query/kernel[1]:0"` is its slowest part.
      locked: by name of an axis of a parameter, why units of it stay.
    """

    groups: dict[str, Group]
    locked: dict[str, str]


def _members(found: Trace, leaf: Axis) -> tuple[Member, ...]:
    members = []
    for path, axes in zip(found.paths, found.axes, strict=True):
        for number, axis in enumerate(axes):
            owners = units(axis, leaf)
            if (owners >= 0).any():
                members.append(Member(path, number, owners))
    return tuple(members)


def _names(found: Trace) -> dict[Axis, str]:
    """Name each free leaf after the parameter that the program uses first, whole axes before."""
    order = order_of_use(found.frame)
    candidates: dict[Axis, list[tuple[bool, int, int, str]]] = {}
    free = set(free_leaves(found.axes))
    for path, axes, place_in_order in zip(found.paths, found.axes, found.places, strict=True):
        number = order[place_in_order]
        for dimension, axis in enumerate(axes):
            own = [leaf for leaf in leaves(axis) if leaf.size > 1]
            for place, leaf in enumerate(own):
                if leaf in free:
                    name = f"{path}[{dimension}]" + (f":{place}" if len(own) > 1 else "")
                    key = (len(own) > 1, number, dimension, name)
                    candidates.setdefault(leaf, []).append(key)
    return {leaf: min(keys)[-1] for leaf, keys in candidates.items()}


def groups_of(found: Trace) -> tuple[dict[str, Axis], Groups]:
    """Return the free leaves by name, and what users see of them."""
    named = {name: leaf for leaf, name in _names(found).items()}
    groups = {name: Group(leaf.size, _members(found, leaf)) for name, leaf in named.items()}
    locked = {}
    for path, axes in zip(found.paths, found.axes, strict=True):
        for dimension, axis in enumerate(axes):
            reasons = dict.fromkeys(leaf.reason for leaf in leaves(axis) if leaf.reason)
            if reasons:
                locked[f"{path}[{dimension}]"] = "; ".join(reasons)
    return named, Groups(groups, locked)


def find_groups(apply: Apply, params: Any, *args: Any) -> Groups:
    """Find which axes of which parameters lose their units together.

    The program (jaxpr) of `apply` is followed operation by operation; nothing is computed, and
    nothing is guessed from names or tried with random numbers. A channel that a convolution makes,
    a batch norm scales, a residual connection adds and a dense layer reads after a flattening is
    one unit of one group. Units are removable if every sum over them meets zeros at masked ones,
    so that the masked and the shrunk network agree.

    Args:
      apply: `(params, *args) -> outputs`, any pure function. Batch statistics belong to `params`
        (`{"params": ..., "batch_stats": ...}`) or are closed over; as an argument they would keep
        the size of everything that they touch.
      params: the tree of parameters; arrays or `jax.ShapeDtypeStruct`s.
      *args: what else `apply` takes; arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      `Groups`: every axis of every parameter is in a group or among the locked ones, or both where
      it is divided.

    Raises:
      TypeError: `apply` is not callable.
      ValueError: `params` holds no array.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> apply = lambda params, x: jax.nn.relu(x @ params["w"] + params["b"]) @ params["v"]
      >>> params = {"w": jnp.ones((3, 4)), "b": jnp.ones((1, 4)), "v": jnp.ones((4, 2))}
      >>> found = find_groups(apply, params, jnp.ones((5, 3)))
      >>> [(name, group.size) for name, group in found.groups.items()]
      [('w[1]', 4)]
      >>> [(member.path, member.axis) for member in found.groups["w[1]"].members]
      [('b', 1), ('v', 0), ('w', 1)]
      >>> found.locked["w[0]"], found.locked["v[1]"]
      ('it belongs to an argument of apply', 'it belongs to an output of apply')

    References:
      Fang, Ma, Song, Mi, Wang, "DepGraph: Towards Any Structural Pruning", 2023,
      https://arxiv.org/abs/2301.12900, whose dependency graph between layers this replaces by one
      between axes.
    """
    return groups_of(trace(apply, params, args))[1]


def _mean_by_unit(scores: jax.Array, member: Member, size: int) -> jax.Array:
    others = tuple(axis for axis in range(scores.ndim) if axis != member.axis)
    counts = np.bincount(member.units[member.units >= 0], minlength=size)
    spare = np.where(member.units >= 0, member.units, size)
    if on_host(scores):
        wide = np.asarray(scores, np.result_type(scores.dtype, np.float32))
        sums = np.zeros(size + 1, wide.dtype)
        np.add.at(sums, spare, wide.mean(axis=others))
        return jnp.asarray((sums[:size] / counts).astype(scores.dtype))
    by_index = jnp.mean(scores, axis=others)
    sums = jnp.zeros(size + 1, by_index.dtype).at[spare].add(by_index)[:size]
    return sums / jnp.asarray(counts).astype(by_index.dtype)


def unit_scores(
    groups: Groups,
    scores: Any,
    where: Filter = is_kernel,
    combine: Callable[[jax.Array], jax.Array] = lambda members: jnp.mean(members, axis=0),
) -> dict[str, jax.Array]:
    """Score the units of every group by the scores of their weights.

    `score[u] = combine over members (mean over the weights of unit u in the member)`. The result is
    a tree of scores like any other: `topk_masks(scores, 0.5, ".*")` says which units of each group
    stay, `global_topk_masks` lets groups compete, and `unit_masks` turns that into masks.

    Args:
      groups: from `find_groups`.
      scores: a tree like the parameters, of any criterion; higher keeps.
      where: which parameters count; by default those that `is_kernel` takes.
      combine: `(members, units) -> (units,)`; the mean over members by default.

    Returns:
      `{name: (units,) scores}`; a group none of whose members counts is absent.

    Raises:
      ValueError: `where` matches nothing.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"w": jnp.array([[1.0, 3.0]]), "v": jnp.array([[2.0], [4.0]])}
      >>> found = find_groups(lambda p, x: x @ p["w"] @ p["v"], params, jnp.ones((1, 1)))
      >>> unit_scores(found, params)
      {'w[1]': Array([1.5, 3.5], dtype=float32)}
    """
    paths, leaves, _ = flatten_with_paths(scores)
    chosen = dict(zip(paths, jax.tree.leaves(select(scores, where)), strict=True))
    by_path = dict(zip(paths, leaves, strict=True))
    result = {}
    for name, group in groups.groups.items():
        parts = [
            _mean_by_unit(by_path[member.path], member, group.size)
            for member in group.members
            if chosen.get(member.path) and is_floating(by_path[member.path])
        ]
        if parts:
            dtype = jnp.result_type(*parts)
            result[name] = combine(jnp.stack([part.astype(dtype) for part in parts]))
    return result


def _refuse_bad_units(groups: Groups, keep: Mapping[str, Any], at_least: int) -> None:
    for name, stays in keep.items():
        if name not in groups.groups:
            raise ValueError(f"keep has {name!r}; the groups are {list(groups.groups)}.")
        size = groups.groups[name].size
        if jnp.shape(stays) not in ((), (size,)) or jnp.result_type(stays) != jnp.bool_:
            raise ValueError(
                f"keep[{name!r}] must be {size} booleans, not {jnp.result_type(stays)}"
                f"{list(jnp.shape(stays))}."
            )
        try:
            left = int(np.count_nonzero(np.broadcast_to(stays, (size,))))
        except jax.errors.TracerArrayConversionError:  # chosen under jit
            continue
        if left < at_least:
            raise ValueError(
                f"keep[{name!r}] leaves {left} of {size} units; at_least={at_least} must stay."
            )


def unit_masks(
    groups: Groups, params: Any, keep: Mapping[str, jax.Array], at_least: int = 1
) -> Any:
    """Turn a choice of units into masks of all the parameters that hold them.

    Args:
      groups: from `find_groups`.
      params: the tree of parameters; only shapes matter.
      keep: by group which units stay, `(units,)` booleans, or a scalar for all of them, as
        `topk_masks` has it for groups that its filter does not match; a group that is absent
        keeps all.
      at_least: how many units each group must keep; 0 lets whole layers go, whose residual branch
        then adds nothing.

    Returns:
      A tree of masks like params, for `apply_masks`, `keep_masked` and `shrink`: a scalar True, or
      booleans that broadcast against the parameter.

    Raises:
      ValueError: a name is no group, a choice has the wrong shape or dtype, or a group would keep
        fewer units than `at_least`.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"w": jnp.array([[1.0, 3.0]]), "v": jnp.array([[2.0], [4.0]])}
      >>> found = find_groups(lambda p, x: x @ p["w"] @ p["v"], params, jnp.ones((1, 1)))
      >>> unit_masks(found, params, {"w[1]": jnp.array([False, True])})["w"]
      Array([[False,  True]], dtype=bool)
    """
    _refuse_bad_units(groups, keep, at_least)
    paths, parts, treedef = flatten_with_paths(params)
    masks: dict[str, Any] = {path: np.array(True) for path in paths}
    ranks = {path: len(part.shape) for path, part in zip(paths, parts, strict=True)}
    for name, stays in keep.items():
        for member in groups.groups[name].members:
            numpy = np if on_host(stays) else jnp
            at = member.units
            each = numpy.broadcast_to(numpy.asarray(stays), (groups.groups[name].size,))
            own = numpy.where(at >= 0, each[np.maximum(at, 0)], True)
            shape = [1] * ranks[member.path]
            shape[member.axis] = own.size
            mask = masks[member.path]
            if mask.ndim == 0:
                mask = mask.reshape([1] * ranks[member.path])
            masks[member.path] = mask & own.reshape(shape)
    return jax.tree.unflatten(treedef, [jnp.asarray(masks[path]) for path in paths])
