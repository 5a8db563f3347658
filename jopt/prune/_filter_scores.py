"""Scores of whole filters (output channels): their norms, their neighbours, their scales."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jopt._arrays import working_dtype
from jopt._trees import Filter, flatten_with_paths, is_floating, select
from jopt.prune._gradient_scores import other_axes, sum_filters
from jopt.prune._scores import map_products

_BLOCK = 256  # filters whose distances to all others are held at a time


def filter_norm_scores(params: Any, axis: int = -1, order: int = 1) -> Any:
    """Score every filter by the norm of its weights.

    `sum of |w|`, or `sqrt(sum of w^2)`. A filter is all weights of one index along `axis`. Norms
    are compared within a layer, as in the paper: over layers, larger filters have larger norms.

    Args:
      params: any pytree of arrays.
      axis: the axis of filters; -1, the outputs, for kernels of dense layers and convolutions.
      order: 1 or 2.

    Returns:
      A tree of scores in float32 or wider. Those of a leaf of two or more axes have length 1 along
      all axes but `axis`, so that masks made of them broadcast; those of other leaves are
      magnitudes. Infinity for leaves that are not floating-point.

    Raises:
      ValueError: `order` is neither 1 nor 2, or a leaf of two or more axes has no such axis.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.array([[3.0, 0.0], [-4.0, 6.0]])}
      >>> filter_norm_scores(params), filter_norm_scores(params, order=2)
      ({'kernel': Array([[7., 6.]], dtype=float32)}, {'kernel': Array([[5., 6.]], dtype=float32)})

    References:
      Li et al., "Pruning Filters for Efficient ConvNets", 2017, https://arxiv.org/abs/1608.08710,
      section 3.1.
    """
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, not {order!r}.")

    def norms(leaf: jax.Array) -> jax.Array:
        if order == 1 or leaf.ndim < 2:
            return sum_filters(jnp.abs(leaf), axis)
        return jnp.sqrt(sum_filters(jnp.square(leaf), axis))

    return map_products(norms, params)


def fpgm_scores(params: Any, axis: int = -1) -> Any:
    """Score every filter by the sum of its distances to the other filters of its leaf.

    `s_i = sum over j of ||x_i - x_j||_2`. The filter of the lowest sum lies nearest to the
    geometric median, so that others can best stand in for it. Distances come from inner products,
    `||x_i||^2 + ||x_j||^2 - 2 x_i x_j`, of filters less their mean, which changes no distance and
    keeps digits: pairs are never laid out feature by feature, and no more than 256 rows of the
    matrix of distances are held. Distances far below the filters' size are rounded, to about 3e-4
    of it.

    Args:
      params: any pytree of arrays.
      axis: the axis of filters; -1, the outputs, for kernels of dense layers and convolutions.

    Returns:
      A tree of scores in float32 or wider. Those of a leaf of two or more axes have length 1 along
      all axes but `axis`, so that masks made of them broadcast; those of other leaves are
      magnitudes. Infinity for leaves that are not floating-point.

    Raises:
      ValueError: a leaf of two or more axes has no such axis.

    Example:
      >>> import jax.numpy as jnp
      >>> fpgm_scores({"kernel": jnp.array([[0.0, 3.0, 6.0], [0.0, 4.0, 8.0]])})
      {'kernel': Array([[15., 10., 15.]], dtype=float32)}

    References:
      He et al., "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks
      Acceleration", 2019, https://arxiv.org/abs/1811.00250, section 3.
    """
    return map_products(partial(_distance_sums, axis=axis), params)


@partial(jax.jit, static_argnames="axis")
def _distance_sums(leaf: jax.Array, axis: int) -> jax.Array:
    if leaf.ndim < 2 or not leaf.size:
        return jnp.abs(sum_filters(leaf, axis))
    others = other_axes(leaf.ndim, axis)
    count = leaf.shape[axis]
    filters = jnp.moveaxis(leaf, axis, 0).reshape(count, -1)
    filters -= filters.mean(0, keepdims=True)
    squares = jnp.sum(jnp.square(filters), axis=1)

    def distance_sum(index: jax.Array) -> jax.Array:
        products = jnp.matmul(filters, filters[index], precision="highest")
        squared = jnp.maximum(squares + squares[index] - 2 * products, 0)
        return jnp.sum(jnp.sqrt(jnp.where(jnp.arange(count) == index, 0, squared)))

    sums = jax.lax.map(distance_sum, jnp.arange(count), batch_size=min(_BLOCK, count))
    return jnp.expand_dims(sums, others)


def batch_norm_scale_scores(params: Any, where: Filter = "(.*/)?scale") -> Any:
    """Score every channel by the size of its batch norm's scale, `|gamma|`.

    Take channels away with the masks of these scores, and give the same `where` to what makes them:
    `global_topk_masks(scores, 0.5, where)`, as the paper does, over all layers together. Train with
    `scale_penalty` first. A masked scale leaves the channel at its offset beta.

    Args:
      params: any pytree of arrays.
      where: which leaves are scales of batch norms, a regex on the path or a predicate; by default
        all leaves named `scale`, as linen and nnx name them (layer norms too).

    Returns:
      A tree of scores in float32 or wider for the chosen leaves; infinity for all others.

    Raises:
      ValueError: the filter matches nothing.
      TypeError: a chosen leaf is not a floating-point array.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"norm": {"scale": jnp.array([0.5, -1.0]), "bias": jnp.zeros(2)}}
      >>> batch_norm_scale_scores(params)["norm"]
      {'bias': inf, 'scale': Array([0.5, 1. ], dtype=float32)}

    References:
      Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", 2017,
      https://arxiv.org/abs/1708.06519, section 3.
    """
    leaves, chosen, treedef = _scales(params, where)
    scores = [_size(leaf) if take else jnp.inf for leaf, take in zip(leaves, chosen, strict=True)]
    return jax.tree.unflatten(treedef, scores)


def scale_penalty(params: Any, where: Filter = "(.*/)?scale") -> jax.Array:
    """Return the sum of `|gamma|` over scales of batch norms, to be added to the loss.

    Its gradient is the sign of gamma, 0 at 0. The paper's factor lies between 1e-5 and 1e-4.

    Args:
      params: any pytree of arrays.
      where: as for `batch_norm_scale_scores`.

    Returns:
      A float32 scalar.

    Raises:
      ValueError: the filter matches nothing.
      TypeError: a chosen leaf is not a floating-point array.

    Example:
      >>> import jax.numpy as jnp
      >>> scale_penalty({"norm": {"scale": jnp.array([0.5, -1.0]), "bias": jnp.ones(2)}})
      Array(1.5, dtype=float32)

    References:
      Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", 2017,
      https://arxiv.org/abs/1708.06519, equation 1.
    """
    leaves, chosen, _ = _scales(params, where)
    taken = [leaf for leaf, take in zip(leaves, chosen, strict=True) if take]
    return jnp.stack([jnp.sum(_size(leaf)).astype(jnp.float32) for leaf in taken]).sum()


def _size(leaf: jax.Array) -> jax.Array:
    return jnp.abs(leaf).astype(working_dtype(leaf.dtype))


def _scales(params: Any, where: Filter) -> tuple[list[Any], list[bool], Any]:
    paths, leaves, treedef = flatten_with_paths(params)
    chosen = jax.tree.leaves(select(params, where))
    for path, leaf, take in zip(paths, leaves, chosen, strict=True):
        if take and not is_floating(leaf):
            raise TypeError(f"{path}: a scale must be a floating-point array, not {leaf!r}.")
    return leaves, chosen, treedef
