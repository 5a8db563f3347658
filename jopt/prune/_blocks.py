"""Structured masks: score whole blocks (channels, groups, layers) and keep the highest."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jopt._arrays import expand_blocks
from jopt._trees import Filter, is_kernel
from jopt.prune._masks import Sparsity, scored, topk_masks

Reduce = Callable[..., jax.Array]
Select = Callable[..., Any]
no_leaf_lost: Select = partial(topk_masks, min_kept=1)


def _block_sizes(path: str, shape: tuple[int, ...], block: tuple[int, ...]) -> tuple[int, ...]:
    if not isinstance(block, tuple) or any(
        isinstance(n, bool) or not isinstance(n, int) or n < -1 or n == 0 for n in block
    ):
        raise ValueError(f"block must be a tuple of positive whole numbers or -1, not {block!r}.")
    if len(block) > len(shape):
        raise ValueError(f"{path}: block {block} has more axes than shape {shape}.")
    asked = (-1,) * (len(shape) - len(block)) + block
    sizes = tuple(n if size == -1 else size for n, size in zip(shape, asked, strict=True))
    if any(n % size for n, size in zip(shape, sizes, strict=True) if size):
        raise ValueError(f"{path}: block {block} does not divide shape {shape}.")
    return sizes


@partial(jax.jit, static_argnames=("sizes", "reduce"))
def _pooled(leaf: jax.Array, sizes: tuple[int, ...], reduce: Reduce) -> jax.Array:
    # No axes of size one, which innermost make XLA's loops on a CPU many times slower.
    dims: list[int] = []
    within: list[int] = []
    for n, size in zip(leaf.shape, sizes, strict=True):
        if n > size or size == 1:
            dims.append(n // size)
        if size > 1:
            within.append(len(dims))
            dims.append(size)
    counts = [n // size if size else 1 for n, size in zip(leaf.shape, sizes, strict=True)]
    return reduce(leaf.reshape(dims), axis=tuple(within)).astype(leaf.dtype).reshape(counts)


def pool_scores(
    scores: Any, block: tuple[int, ...], where: Filter = is_kernel, reduce: Reduce = jnp.mean
) -> Any:
    """Score blocks by what their elements score, by default the mean.

    Blocks are given as in `jopt.quant`: how many elements belong together along each of the last
    axes; axes before them are whole, and -1 is a whole axis. Of a kernel `(..., in, out)`:

    - `(1,)`: an output channel, a filter of a convolution;
    - `(1, -1)`: an input channel;
    - `(1, 1, -1, -1)`: a position of a convolution's window;
    - `(64, 1)`: 64 inputs of an output; `(16, 16)`: a tile;
    - `()`: the whole leaf.

    Args:
      scores: a tree of scores.
      block: the shape of a block.
      where: which leaves to pool, a regex on the path or a predicate; by default
        those that `is_kernel` takes.
      reduce: `(values, axis=axes) -> values` without these axes: `jnp.mean`, `jnp.max`,
        `jnp.sum` or your own. Keep the function: a new one compiles anew.

    Returns:
      The tree with one score for each block of the chosen leaves, all axes kept, in their dtype.

    Raises:
      ValueError: `block` has more axes than a chosen leaf, does not divide its shape, or is no
        tuple of positive whole numbers or -1; or the filter matches nothing.
      TypeError: a chosen score is not a floating-point array.

    Example:
      >>> import jax.numpy as jnp
      >>> scores = {"kernel": jnp.array([[1.0, 4.0], [3.0, 0.0]])}
      >>> (
      ...     pool_scores(scores, (1,))["kernel"],
      ...     pool_scores(scores, (1, -1), reduce=jnp.max)["kernel"],
      ... )
      (Array([[2., 2.]], dtype=float32), Array([[4.],
             [3.]], dtype=float32))
    """
    paths, leaves, chosen, treedef = scored(scores, where)
    pooled = []
    for path, leaf, take in zip(paths, leaves, chosen, strict=True):
        if take:
            leaf = _pooled(leaf, _block_sizes(path, leaf.shape, block), reduce)
        pooled.append(leaf)
    return jax.tree.unflatten(treedef, pooled)


def _spread(mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Leave a mask that broadcasts as it is, and repeat others over their blocks."""
    if all(count in (1, n) for count, n in zip(mask.shape, shape, strict=True)):
        return mask
    return expand_blocks(mask, shape)


def block_topk_masks(
    scores: Any,
    sparsity: Sparsity | Any,
    block: tuple[int, ...],
    where: Filter = is_kernel,
    reduce: Reduce = jnp.mean,
    select: Select = no_leaf_lost,
) -> Any:
    """Keep the blocks of the highest scores: channels, groups, tiles, whole layers.

    Scores are pooled over blocks (`pool_scores`), the blocks selected as elements are. Exactly
    `round(blocks * sparsity)` blocks of a leaf are pruned, or of all leaves together with
    `select=global_topk_masks`; blocks count alike, whatever their sizes.

    Args:
      scores: a tree of scores, higher keeps.
      sparsity: fraction of blocks to prune, 0 to 1: a number, a traced scalar, or whatever else
        `select` takes.
      block: the shape of a block: `(1,)` an output channel, `(1, -1)` an input channel, more in
        `pool_scores`.
      where: which leaves to prune, a regex on the path or a predicate; by default
        those that `is_kernel` takes.
      reduce: how scores of a block become one.
      select: `(scores, sparsity, where=where) -> masks`; by default `topk_masks` with `min_kept=1`,
        so that a layer which would lose every block is an error.

    Returns:
      A tree of booleans that broadcast against the leaves: of size one along whole axes, so an
      output channel's mask is `(1, ..., out)`; of full shape where blocks divide an axis; a scalar
      True for leaves that are not chosen.

    Raises:
      ValueError: `block` does not fit a chosen leaf, `sparsity` is outside [0, 1] or would take
        every block of a leaf, or the filter matches nothing.
      TypeError: a chosen score is not a floating-point array.

    Example:
      >>> import jax.numpy as jnp
      >>> scores = {"kernel": jnp.array([[1.0, 4.0, 0.0], [3.0, 2.0, 1.0]])}
      >>> block_topk_masks(scores, 1 / 3, (1,))["kernel"]
      Array([[ True,  True, False]], dtype=bool)
      >>> block_topk_masks(scores, 0.5, (1, 3))["kernel"].ravel()
      Array([False,  True], dtype=bool)

    References:
      Li et al., "Pruning Filters for Efficient ConvNets", 2017, https://arxiv.org/abs/1608.08710
      (filters by the sum of magnitudes, which their mean orders alike).
      Narang, Undersander, Diamos, "Block-Sparse Recurrent Neural Networks", 2017,
      https://arxiv.org/abs/1711.02782 (tiles by the largest magnitude: `reduce=jnp.max`).
    """
    pooled = pool_scores(scores, block, where, reduce)
    paths, leaves, chosen, treedef = scored(scores, where)
    taken = {path for path, take in zip(paths, chosen, strict=True) if take}
    masks = select(pooled, sparsity, where=lambda path, leaf: path in taken)
    return jax.tree.unflatten(
        treedef,
        [
            _spread(mask, leaf.shape) if take else mask
            for mask, leaf, take in zip(jax.tree.leaves(masks), leaves, chosen, strict=True)
        ],
    )
