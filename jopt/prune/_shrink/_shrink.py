"""Take masked units out of a network, and prove that nothing else has changed."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jopt._leaves import is_compressed
from jopt._trees import flatten_with_paths, path_string
from jopt.prune._masks import apply_masks
from jopt.prune._matching import Path, entries, map_matching
from jopt.prune._shrink._axes import Axis, kept, leaves
from jopt.prune._shrink._groups import Group, groups_of
from jopt.prune._shrink._narrow import narrowed, run
from jopt.prune._shrink._trace import Apply, Trace, as_shape, trace

Units = Mapping[str, Any]  # by group which units stay: booleans


class Shrunk(NamedTuple):
    """A network with units removed.

    Attributes:
      params: the smaller parameters, in a tree of the same structure.
      apply: `(params, *args) -> outputs` on the smaller parameters, jitted; for other arguments
        than those that it was shrunk with too.
      removed: by path and axis, the indices that are gone: `{"conv1/kernel": {3: array([0, 5])}}`.
      units: by group, which units stay; all that `shrunk_apply` needs to make `apply` again.
      narrow: takes the same indices out of any tree that holds trees like the parameters:
        an optimizer's state, averages of the parameters, masks.
      widen: puts zeros back at those indices, in any tree that holds trees like the smaller
        parameters: what was trained small is a network of the original shapes again.
    """

    params: Any
    apply: Apply
    removed: dict[str, dict[int, np.ndarray]]
    units: dict[str, np.ndarray]
    narrow: Callable[[Any], Any]
    widen: Callable[[Any], Any]


def _keep(named: Mapping[str, Axis], units: Units) -> dict[Axis, np.ndarray]:
    missing = [name for name in units if name not in named]
    if missing:
        raise ValueError(f"units has {missing}; the groups of this program are {list(named)}.")
    for name, stays in units.items():
        if np.shape(stays) != (named[name].size,):
            raise ValueError(
                f"units[{name!r}] must be {named[name].size} booleans, not an array of shape "
                f"{np.shape(stays)}."
            )
    return {named[name]: np.asarray(stays, bool) for name, stays in units.items()}


def shrunk_apply(apply: Apply, like: Any, units: Units) -> Apply:
    """Make the function that runs a shrunk network.

    It runs the operations of `apply` on smaller arrays: `apply` is traced with parameters of the
    original shapes, and the sizes in the trace are taken anew. Modules that know their widths need
    not be built again. It may be another function of the same parameters than the one that was
    shrunk, the training step's with its batch statistics: what it returns shrinks as well, where it
    holds units. Numbers computed from widths (the divisor of a mean, the scale of attention)
    stay those of the original network, and so do its outputs.

    Args:
      apply: `(params, *args) -> outputs`, the original function.
      like: parameters of the original shapes; arrays or `jax.ShapeDtypeStruct`s.
      units: by group which units stay, as `Shrunk.units` has it.

    Returns:
      `(params, *args) -> outputs`, jitted; differentiable as `apply` is. A function with a
      derivative of its own (`jax.custom_jvp`) is differentiated through its operations, except
      ReLU.

    Raises:
      ValueError: when called, the program has no such group, or the parameters have other shapes
        than what `units` leaves of `like`.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> apply = lambda params, x: x @ params["w"] @ params["v"]
      >>> like = {"w": jnp.ones((1, 3)), "v": jnp.ones((3, 1))}
      >>> small = shrunk_apply(apply, like, {"w[1]": np.array([True, False, True])})
      >>> small({"w": jnp.ones((1, 2)), "v": jnp.ones((2, 1))}, jnp.ones((1, 1)))
      Array([[2.]], dtype=float32)
    """
    shapes = jax.tree.map(as_shape, like)
    units = {name: np.asarray(stays, bool) for name, stays in units.items()}

    @jax.jit
    def small_apply(params: Any, *args: Any) -> Any:
        found = trace(apply, shapes, args, same_outputs=False)
        named, _ = groups_of(found)
        keep = _keep(named, units)
        _refuse_other_shapes(found, params, keep)
        outs = run(found.frame, jax.tree.leaves((params, args)), keep)
        return jax.tree.unflatten(found.out_tree, outs)

    return small_apply


def _refuse_other_shapes(found: Trace, params: Any, keep: Mapping[Axis, np.ndarray]) -> None:
    paths, parts, _ = flatten_with_paths(params)
    if paths != found.paths:
        raise ValueError(f"params must have the leaves {found.paths}, not {paths}.")
    for path, part, axes in zip(paths, parts, found.axes, strict=True):
        wanted = tuple(int(kept(axis, keep).sum()) for axis in axes)
        if not is_compressed(part) and part.shape != wanted:
            raise ValueError(f"{path}: the shrunk network needs shape {wanted}, not {part.shape}.")


def _any_kept(mask: Any, shape: tuple[int, ...], axis: int) -> np.ndarray:
    """Return for each index along an axis whether the mask keeps anything there."""
    mask = np.asarray(mask)
    if mask.ndim != len(shape):
        mask = mask.reshape((1,) * len(shape))
    along = mask.any(axis=tuple(i for i in range(mask.ndim) if i != axis))
    return np.broadcast_to(along, (shape[axis],))


def _living(group: Group, masks: Mapping[str, Any], shapes: Mapping[str, Any]) -> np.ndarray:
    """Return which units of a group have a weight that is kept in any member."""
    alive = np.zeros(group.size, bool)
    for path, axis, owners in group.members:
        keeps = _any_kept(masks[path], shapes[path], axis) & (owners >= 0)
        alive[owners[keeps]] = True
    return alive


def _refuse_unknown(found: Trace, masks: Mapping[str, Any]) -> None:
    """Name the operation without a rule that keeps a masked unit from being removed."""
    for path, axes in zip(found.paths, found.axes, strict=True):
        for dimension, axis in enumerate(axes):
            reasons = [leaf.reason for leaf in leaves(axis)]
            unknown = [reason for reason in reasons if reason and reason.endswith("is not known")]
            shape = tuple(each.size for each in axes)
            if unknown and len(shape) > 1 and not _any_kept(masks[path], shape, dimension).all():
                raise ValueError(
                    f"{path}: whole indices of axis {dimension} are masked, but they cannot be "
                    f"removed: {unknown[0]}, so what it does with them is not either."
                )


def _removed(found: Trace, keep: Mapping[Axis, np.ndarray]) -> dict[str, dict[int, np.ndarray]]:
    removed: dict[str, dict[int, np.ndarray]] = {}
    for path, axes in zip(found.paths, found.axes, strict=True):
        for dimension, axis in enumerate(axes):
            stays = kept(axis, keep)
            if not stays.all():
                removed.setdefault(path, {})[dimension] = np.flatnonzero(~stays)
    return removed


def _refuse_different(masked: Any, small: Any, tolerance: float) -> None:
    for number, (one, other) in enumerate(
        zip(jax.tree.leaves(masked), jax.tree.leaves(small), strict=True)
    ):
        one, other = np.asarray(one), np.asarray(other)
        if not np.issubdtype(one.dtype, np.inexact):
            difference, allowed = float((one != other).sum()), 0.0
        else:
            wide = np.float64
            difference = float(np.max(np.abs(one.astype(wide) - other.astype(wide)), initial=0.0))
            allowed = tolerance * float(np.max(np.abs(one.astype(wide)), initial=0.0))
        if not difference <= allowed:
            raise ValueError(
                f"output {number} of the shrunk network differs from the masked network's by "
                f"{difference:.3g}; allowed is {allowed:.3g}. The function computes with removed "
                "units in a way that is not followed, or makes NaN of them."
            )


def shrink(apply: Apply, params: Any, masks: Any, *args: Any, tolerance: float = 1e-4) -> Shrunk:
    """Remove the units that masks have emptied, and return a network that is really smaller.

    A unit goes when every weight of it in every parameter of its group is masked, which is what
    `unit_masks` makes; other masked weights stay as zeros. The masked and the shrunk network are
    both run on `args` and must give the same outputs.

    Args:
      apply: `(params, *args) -> outputs`, any pure function; see `find_groups` for what it may do
        with its parameters.
      params: the tree of parameters: a linen dict, an `nnx.State`, any pytree.
      masks: a tree of booleans like params, True keeps.
      *args: a batch to prove it on.
      tolerance: the largest difference allowed, as a share of the largest output.

    Returns:
      `Shrunk`: smaller parameters, the function that runs them, the indices removed, `narrow`,
      which makes an optimizer's state smaller likewise, and `widen`, which undoes it with zeros.

    Raises:
      ValueError: the masks do not fit, an operation without a rule stands in the way of a masked
        unit (the message names it), or the outputs differ.
      TypeError: `apply` is not callable, or a mask is not boolean.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.prune import find_groups, unit_masks
      >>> apply = lambda params, x: x @ params["w"] @ params["v"]
      >>> params = {"w": jnp.array([[1.0, 2.0, 3.0]]), "v": jnp.ones((3, 1))}
      >>> found = find_groups(apply, params, jnp.ones((1, 1)))
      >>> masks = unit_masks(found, params, {"w[1]": jnp.array([True, False, True])})
      >>> shrunk = shrink(apply, params, masks, jnp.ones((1, 1)))
      >>> shrunk.params["w"], shrunk.apply(shrunk.params, jnp.ones((1, 1)))
      (Array([[1., 3.]], dtype=float32), Array([[4.]], dtype=float32))
      >>> shrunk.removed
      {'v': {0: array([1])}, 'w': {1: array([1])}}
    """
    jax.eval_shape(apply_masks, params, masks)
    found = trace(apply, params, args)
    named, groups = groups_of(found)
    paths, parts, treedef = flatten_with_paths(params)
    by_path = dict(zip(paths, jax.tree.leaves(masks), strict=True))
    _refuse_unknown(found, by_path)
    shapes = {path: part.shape for path, part in zip(paths, parts, strict=True)}
    units = {name: _living(group, by_path, shapes) for name, group in groups.groups.items()}
    units = {name: alive for name, alive in units.items() if not alive.all()}
    keep = _keep(named, units)

    @jax.jit
    def cut(params: Any, masks: Any) -> tuple[Any, Any]:
        masked = apply_masks(params, masks)
        pairs = zip(flatten_with_paths(masked)[1], found.axes, strict=True)
        small = [narrowed(part, axes, keep) for part, axes in pairs]
        return masked, jax.tree.unflatten(treedef, small)

    masked, small = cut(params, masks)
    small_apply = shrunk_apply(apply, params, units)
    _refuse_different(jax.jit(apply)(masked, *args), small_apply(small, *args), tolerance)
    removed = _removed(found, keep)
    narrow, widen = _narrower(params, removed), _widener(params, small, removed)
    return Shrunk(small, small_apply, removed, units, narrow, widen)


def _is_single(path: Path, leaf: Any, shape: tuple[int, ...]) -> bool:
    """Return whether an entry is one number, so that it stays as it is.

    Raises:
      ValueError: it has other axes than its parameter, so that no one knows what to remove.
    """
    if jnp.size(leaf) == 1:
        return True
    if jnp.ndim(leaf) != len(shape):
        raise ValueError(
            f"the tree has an entry of shape {jnp.shape(leaf)} for {path_string(path)!r}, whose "
            f"shape is {shape}: axes that are not the parameter's (factored or flattened "
            "statistics) cannot be changed; start the optimizer anew with init(shrunk.params)."
        )
    return False


def _narrower(params: Any, removed: dict[str, dict[int, np.ndarray]]) -> Callable[[Any], Any]:
    """Return the function that takes the removed indices out of trees like the parameters."""
    shapes = jax.tree.map(as_shape, params, is_leaf=is_compressed)
    by_key = {
        path: (leaf.shape, removed.get(path_string(path), {})) for path, leaf in entries(shapes)[0]
    }

    def cut(path: Path, leaf: Any) -> Any:
        shape, gone = by_key[path]
        if not gone or _is_single(path, leaf, shape):
            return leaf
        for axis, indices in gone.items():
            if leaf.shape[axis] == shape[axis]:
                stays = np.setdiff1d(np.arange(shape[axis]), indices)
                leaf = jnp.take(leaf, stays, axis=axis)
        return leaf

    return jax.jit(lambda tree: map_matching(cut, tree, shapes))


def _widener(params: Any, small: Any, removed: dict[str, dict[int, np.ndarray]]) -> Any:
    """Return the function that puts zeros where indices were removed from trees like `small`."""
    pairs = zip(entries(small)[0], entries(params)[0], strict=True)
    by_key = {
        path: (leaf.shape, whole.shape, removed.get(path_string(path), {}))
        for (path, leaf), (_, whole) in pairs
    }

    def put_back(path: Path, leaf: Any) -> Any:
        shape, whole, gone = by_key[path]
        if not gone or _is_single(path, leaf, shape):
            return leaf
        for axis, indices in gone.items():
            if leaf.shape[axis] == shape[axis]:
                stays = np.setdiff1d(np.arange(whole[axis]), indices)
                wide = (*leaf.shape[:axis], whole[axis], *leaf.shape[axis + 1 :])
                at = (slice(None),) * axis
                leaf = jnp.zeros(wide, leaf.dtype).at[(*at, stays)].set(leaf)
        return leaf

    return jax.jit(lambda tree: map_matching(put_back, tree, small))
