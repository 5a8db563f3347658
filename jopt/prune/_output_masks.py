"""Masks with the same sparsity in every output of a layer."""

from typing import Any

import jax
import jax.numpy as jnp

from jopt._trees import Filter, is_kernel
from jopt.prune._masks import Sparsity, check_min_kept, kept_count, scored
from jopt.prune._threshold import keep_largest


def output_topk_masks(
    scores: Any,
    sparsity: Sparsity,
    where: Filter = is_kernel,
    axis: int | tuple[int, ...] = -1,
    min_kept: int = 1,
) -> Any:
    """Keep the highest scores of every output: the same sparsity in each column of a kernel.

    Exactly `round(size * sparsity)` of an output's weights are pruned. Of equal scores the one with
    the lower index (in C order) is kept.

    Args:
      scores: a tree of scores, higher keeps.
      sparsity: fraction to prune, 0 to 1; a number, or a traced scalar (then clipped).
      where: which leaves to prune, a regex on the path or a predicate; by default
        those that `is_kernel` takes.
      axis: the axis of outputs, -1 in kernels of dense layers and convolutions; or several, as
        `(-2, -1)` where an attention's outputs are (heads, dimensions), `(0, -1)` where layers are
        stacked on the first.
      min_kept: how many weights every output must keep: fewer are an error, or, where the sparsity
        is traced, not pruned. With 0 an output may lose them all.

    Returns:
      A tree of booleans: full-shape masks for the chosen leaves, a scalar True for the others.

    Raises:
      ValueError: `sparsity` is outside [0, 1] or leaves an output fewer than `min_kept`, the filter
        matches nothing, or a chosen leaf lacks an axis.
      TypeError: a chosen score is not a floating-point array.

    Example:
      >>> import jax.numpy as jnp
      >>> output_topk_masks({"kernel": jnp.array([[3.0, 1.0], [4.0, 2.0]])}, 0.5)["kernel"]
      Array([[False, False],
             [ True,  True]], dtype=bool)

    References:
      Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2024,
      https://arxiv.org/abs/2306.11695, section 3.
    """
    check_min_kept(min_kept)
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    paths, leaves, chosen, treedef = scored(scores, where)
    masks = []
    for path, leaf, take in zip(paths, leaves, chosen, strict=True):
        if take and not all(-leaf.ndim <= each < leaf.ndim for each in axes):
            raise ValueError(f"{path}: axis {axis} does not fit scores of shape {leaf.shape}.")
        masks.append(_by_output(path, leaf, sparsity, axes, min_kept) if take else jnp.array(True))
    return jax.tree.unflatten(treedef, masks)


def _by_output(
    path: str, scores: jax.Array, sparsity: Sparsity, axes: tuple[int, ...], min_kept: int
) -> jax.Array:
    front = tuple(range(len(axes)))
    moved = jnp.moveaxis(scores, axes, front)
    outputs = moved.shape[: len(axes)]
    rows = moved.reshape(*outputs, -1) if scores.size else moved.reshape(*outputs, 0)
    keep = kept_count(path, rows.shape[-1], sparsity, min_kept)
    kept = _keep_in_rows(rows.reshape(-1, rows.shape[-1]), keep)
    return jnp.moveaxis(kept.reshape(moved.shape), front, axes)


_keep_in_rows = jax.jit(jax.vmap(keep_largest, in_axes=(0, None)))
