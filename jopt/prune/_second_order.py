"""Pruning with the statistics of layers' inputs over whole trees, with a report of every leaf."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jopt._trees import Filter, flatten_with_paths, is_floating, is_kernel, naming_leaf, select
from jopt.layers._calibrate import map_over
from jopt.layers._outcome import Outcome, stacked_axes
from jopt.layers._statistics import InputStatistics
from jopt.prune._masks import Sparsity, apply_masks
from jopt.prune._n_m import n_m_mask
from jopt.prune._one_shot import Pattern, magnitude_mask, pruned_count, split_pattern
from jopt.prune._reconstruct import reconstruct
from jopt.prune._sparse_gpt import sparse_gpt

Amount = Sparsity | Pattern
Method = Callable[[jax.Array, InputStatistics, Any], tuple[jax.Array, jax.Array, Outcome]]
Report = dict[str, Outcome | str]


def _by_magnitude(leaf: jax.Array, amount: Amount, reason: str) -> tuple[Any, Any, str]:
    """Prune a leaf by magnitude, along the last axis but one; leave it dense where m cannot."""
    sparsity, pattern = split_pattern(amount)
    if pattern is None:
        mask = magnitude_mask(leaf, pruned_count(leaf.size, sparsity), None)
    else:
        try:
            mask = n_m_mask(jnp.abs(leaf), *pattern)
        except ValueError as error:
            return leaf, jnp.array(True), f"left dense: {error}"
    return jnp.where(mask, leaf, jnp.zeros_like(leaf)), mask, f"pruned by magnitude: {reason}"


def _prune_leaf(
    leaf: jax.Array, statistics: InputStatistics | None, amount: Amount, method: Method
) -> tuple[Any, Any, Outcome | str]:
    """Prune one leaf by a method, or by magnitude with the reason in words."""
    if statistics is None:
        return _by_magnitude(leaf, amount, "no statistics")
    try:
        depth = stacked_axes(leaf.shape, statistics.gram.shape)
    except ValueError as error:
        return _by_magnitude(leaf, amount, str(error))
    pattern = split_pattern(amount)[1]
    inputs = leaf.shape[depth:-1]
    if pattern is not None and pattern[1] > 0 and inputs and inputs[-1] % pattern[1]:
        return _by_magnitude(leaf, amount, f"m does not divide the inputs {inputs}")
    return map_over(lambda weights, each: method(weights, each, amount), depth)(leaf, statistics)


def _named(path: str, leaf: Any, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function of a leaf; errors name it."""
    if not is_floating(leaf):
        raise TypeError(f"{path}: weights must be a floating-point array, not {leaf!r}.")
    return naming_leaf(function)(path, leaf, *args)


def prune_calibrated_params(
    params: Any,
    statistics: Mapping[str, InputStatistics],
    sparsity: Amount | Mapping[str, Amount],
    method: Method = sparse_gpt,
    where: Filter = is_kernel,
) -> tuple[Any, Any, Report]:
    """Prune the chosen leaves of a tree so that the outputs of layers change least.

    Leaves of equal shape are compiled once; layers stacked on leading axes, as a scan over layers
    keeps them, are mapped over, each with the sparsity given. A leaf without statistics, or whose
    statistics are not those of its leading axes, is pruned by magnitude, and the report says so.
    With a pattern (n, m) a leaf whose inputs m does not divide stays dense, and the report says so.

    Args:
      params: a linen dict, an `nnx.State` or any other pytree; it is not changed.
      statistics: by path, of the inputs of layers, as `jopt.layers.calibrate` gives them.
      sparsity: fraction to prune or a pattern (n, m), for every leaf or by path.
      method: `(weights, statistics, sparsity) -> (weights, mask, Outcome)`: `sparse_gpt`, `obc` or
        one with its own options.
      where: a regex on the path or a predicate `(path, leaf) -> bool`; by default
        those that `is_kernel` takes.

    Returns:
      The pruned tree; a tree of masks, a scalar True for leaves not chosen or left dense; and a
      report: for each chosen path its `Outcome` (with an axis for stacked layers), or words.

    Raises:
      ValueError: the filter matches nothing, a sparsity is outside [0, 1], a pattern is none, or
        `sparsity` has no entry for a chosen leaf.
      TypeError: a chosen leaf is compressed or is not floating-point. The message names the leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.layers import InputStatistics
      >>> params = {"dense": {"kernel": jnp.array([[1.0], [1.1]])}, "table": jnp.eye(2)}
      >>> twins = InputStatistics(None, None, None, None, jnp.array([[1.0, 0.9], [0.9, 1.0]]))
      >>> pruned, masks, report = prune_calibrated_params(params, {"dense/kernel": twins}, 0.5)
      >>> masks["dense"]["kernel"].ravel(), report["table"]
      (Array([False,  True], dtype=bool), 'pruned by magnitude: no statistics')
    """
    paths, leaves, treedef = flatten_with_paths(params)
    chosen = jax.tree.leaves(select(params, where))
    pruned, masks, report = list(leaves), [jnp.array(True) for _ in leaves], {}
    for place, (path, leaf, take) in enumerate(zip(paths, leaves, chosen, strict=True)):
        if not take:
            continue
        amount = sparsity
        if isinstance(sparsity, Mapping):
            if path not in sparsity:
                raise ValueError(f"{path}: sparsity has no entry for this leaf.")
            amount = sparsity[path]
        pruned[place], masks[place], report[path] = _named(
            path, leaf, _prune_leaf, statistics.get(path), amount, method
        )
    return jax.tree.unflatten(treedef, pruned), jax.tree.unflatten(treedef, masks), report


def _reconstruct_leaf(
    leaf: jax.Array, masked: Any, mask: Any, statistics: InputStatistics | None, damping: ArrayLike
) -> tuple[jax.Array, Outcome | str]:
    """Solve one leaf, or say why it is only masked."""
    if not is_floating(leaf):
        return masked, "only masked: not a floating-point array"
    if statistics is None:
        return masked, "only masked: no statistics"
    try:
        depth = stacked_axes(leaf.shape, statistics.gram.shape)
    except ValueError as error:
        return masked, f"only masked: {error}"
    solve = map_over(lambda w, m, each: reconstruct(w, m, each, damping), depth)
    return solve(leaf, jnp.broadcast_to(mask, leaf.shape), statistics)


def reconstruct_params(
    params: Any, masks: Any, statistics: Mapping[str, InputStatistics], damping: ArrayLike = 0.01
) -> tuple[Any, Report]:
    """Apply masks to a tree, and solve the weights kept in each layer anew by least squares.

    Leaves with a scalar mask are masked and not mentioned. Of the others, one without statistics
    that fit is only masked, and the report says so.

    Args:
      params: any pytree, before pruning.
      masks: a tree of booleans of the same structure, from any criterion; each broadcasts.
      statistics: by path, of the inputs of layers.
      damping: as for `reconstruct`.

    Returns:
      The pruned tree, and a report by path, as `prune_calibrated_params` gives it.

    Raises:
      ValueError: the trees differ or a mask does not fit its leaf.
      TypeError: a mask is not boolean, or its leaf is compressed to codes that may have no zero.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.layers import InputStatistics
      >>> params, masks = {"w": jnp.ones((2, 1))}, {"w": jnp.array([[False], [True]])}
      >>> gram = jnp.array([[2.0, 1.0], [1.0, 2.0]])
      >>> statistics = {"w": InputStatistics(None, None, None, None, gram)}
      >>> reconstruct_params(params, masks, statistics, damping=0.0)[0]["w"].ravel()
      Array([0. , 1.5], dtype=float32)
    """
    paths, leaves, treedef = flatten_with_paths(params)
    mask_leaves = flatten_with_paths(masks)[1]
    masked = flatten_with_paths(apply_masks(params, masks))[1]
    solved, report = list(masked), {}
    for place, (path, leaf, mask) in enumerate(zip(paths, leaves, mask_leaves, strict=True)):
        if jnp.ndim(mask):
            solved[place], report[path] = _reconstruct_leaf(
                leaf, masked[place], mask, statistics.get(path), damping
            )
    return jax.tree.unflatten(treedef, solved), report
