"""Trained ternary quantization: levels -n, 0 and p, with n and p learned by gradient descent."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jopt._arrays import expand_blocks, working_dtype
from jopt._leaves import CodebookTensor
from jopt._trees import Filter, is_kernel, naming_leaf
from jopt.quant._binary import with_slope
from jopt.quant._blocks import merge_blocks, split_blocks
from jopt.quant._by_path import in_both, map_with, refuse_non_finite, selected
from jopt.quant._quantize import check_values
from jopt.quant._spec import QuantSpec

_ZERO_CODE = 1


class TernaryScales(NamedTuple):
    """Hold the two learned levels of a kernel.

    Attributes:
      positive: the level p of the weights above the threshold, one for each block.
      negative: the level of those below is `-negative`.
    """

    positive: jax.Array
    negative: jax.Array


def _regions(
    weights: jax.Array, counts: tuple[int, ...], threshold: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """Return where the weights lie above and below the threshold of their block."""
    if len(counts) != weights.ndim or any(
        count < 1 or size % count for count, size in zip(counts, weights.shape, strict=True)
    ):
        raise ValueError(f"scales of shape {counts} do not divide weights {weights.shape}.")
    block = tuple(size // count for size, count in zip(weights.shape, counts, strict=True))
    blocks, within = split_blocks(weights, QuantSpec(2, block))
    largest = jnp.max(jnp.abs(blocks), within, keepdims=True)
    limits = jnp.asarray(threshold, weights.dtype) * largest
    limits = merge_blocks(limits, weights.shape, QuantSpec(2, block))
    limit = expand_blocks(limits, weights.shape)
    return weights > limit, weights < -limit


def _check(weights: ArrayLike, positive: ArrayLike, negative: ArrayLike) -> tuple[jax.Array, ...]:
    arrays = jnp.asarray(weights), jnp.asarray(positive), jnp.asarray(negative)
    check_values(arrays[0], QuantSpec(2, ()))
    if arrays[1].shape != arrays[2].shape or len({array.dtype for array in arrays}) > 1:
        raise ValueError(
            f"positive {arrays[1].dtype}{arrays[1].shape} and negative "
            f"{arrays[2].dtype}{arrays[2].shape} must have one shape, and the dtype "
            f"{arrays[0].dtype} of the weights."
        )
    return arrays


@jax.jit
def _ttq(
    weights: jax.Array, positive: jax.Array, negative: jax.Array, threshold: ArrayLike
) -> jax.Array:
    held = jax.lax.stop_gradient(weights)
    above, below = _regions(held, positive.shape, threshold)
    high = expand_blocks(positive, weights.shape)
    low = expand_blocks(negative, weights.shape)
    zero, one = jnp.zeros_like(held), jnp.ones_like(held)
    levels = jnp.where(above, high, jnp.where(below, -low, zero))
    slope = jnp.where(above, high, jnp.where(below, low, one))
    return levels + with_slope(weights, zero, slope)


def ttq(
    weights: ArrayLike, positive: ArrayLike, negative: ArrayLike, threshold: ArrayLike = 0.05
) -> jax.Array:
    """Round weights to two learned levels and zero, with gradients to all three arguments.

    `d = threshold * max |w|`; `w' = p where w > d, -n where w < -d, else 0`. With g the gradient
    of w': that of w is `p g`, `n g` and `g` in the three regions (the latent weights are trained by
    it and change their region), that of p is the sum of g over `w > d`, and that of n is minus the
    sum over `w < -d`. The paper leaves out the minus sign, though its level is -n. The threshold
    counts as a constant. Nothing keeps p and n positive.

    Args:
      weights: the latent weights, floating-point, not empty.
      positive: p, one for each block: as many axes as `weights`, its shape divides theirs; one for
        the layer, as in the paper, is `(1, ..., 1)`.
      negative: n, of the same shape.
      threshold: share of the largest magnitude of a block, from 0 to 1.

    Returns:
      An array of the shape and dtype of `weights`.

    Raises:
      ValueError: the shapes do not fit, the dtypes differ, or the array is empty.
      TypeError: `weights` is not floating-point.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> w, p, n = jnp.array([2.0, -1.0, 0.5, 0.01]), jnp.array([3.0]), jnp.array([4.0])
      >>> ttq(w, p, n)
      Array([ 3., -4.,  3.,  0.], dtype=float32)
      >>> jax.grad(lambda *args: ttq(*args).sum(), (0, 1, 2))(w, p, n)
      (Array([3., 4., 3., 1.], dtype=float32), Array([2.], dtype=float32),
       Array([-1.], dtype=float32))

    References:
      Zhu et al., "Trained Ternary Quantization", 2017, https://arxiv.org/abs/1612.01064,
      equations 6 to 9.
    """
    return _ttq(*_check(weights, positive, negative), threshold)


@partial(jax.jit, static_argnames="block")
def _ttq_init(weights: jax.Array, block: tuple[int, ...], threshold: ArrayLike) -> TernaryScales:
    exact = working_dtype(weights.dtype)
    spec = QuantSpec(2, block)
    blocks, axes = split_blocks(weights.astype(exact), spec)
    largest = jnp.max(jnp.abs(blocks), axes, keepdims=True)
    limit = jnp.asarray(threshold, exact) * largest

    def mean(kept: jax.Array) -> jax.Array:
        count = jnp.sum(kept.astype(exact), axes, keepdims=True)
        total = jnp.sum(jnp.where(kept, jnp.abs(blocks), 0.0), axes, keepdims=True)
        level = jnp.where(count > 0, total / jnp.maximum(count, 1.0), largest)
        return merge_blocks(level, weights.shape, spec).astype(weights.dtype)

    return TernaryScales(mean(blocks > limit), mean(blocks < -limit))


def ttq_init(
    weights: ArrayLike, block: tuple[int, ...] = (), threshold: ArrayLike = 0.05
) -> TernaryScales:
    """Choose the levels to start trained ternary quantization from.

    The mean magnitude of the weights on each side beyond the threshold, which has the least squared
    error; where there is none, the largest magnitude of the block. The paper does not say.

    Args:
      weights: floating-point array, not empty.
      block: which weights share their levels, as in `QuantSpec`; by default all, as in the paper.
      threshold: as for `ttq`.

    Returns:
      The levels, of the dtype of `weights`.

    Raises:
      ValueError: `block` does not divide the shape, or the array is empty.
      TypeError: the array is not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> ttq_init(jnp.array([3.0, 1.0, -5.0, 0.1]))
      TernaryScales(positive=Array([2.], dtype=float32), negative=Array([5.], dtype=float32))
    """
    array = jnp.asarray(weights)
    check_values(array, QuantSpec(2, block))
    return _ttq_init(array, block, threshold)


@jax.jit
def _ttq_quantize(
    weights: jax.Array, positive: jax.Array, negative: jax.Array, threshold: ArrayLike
) -> CodebookTensor:
    above, below = _regions(weights, positive.shape, threshold)
    codes = _ZERO_CODE + above.astype(jnp.int32) - below.astype(jnp.int32)
    table = jnp.stack([-negative, jnp.zeros_like(positive), positive], axis=-1)
    return CodebookTensor(codes.astype(jnp.uint2), table)


def ttq_quantize(
    weights: ArrayLike, positive: ArrayLike, negative: ArrayLike, threshold: ArrayLike = 0.05
) -> CodebookTensor:
    """Replace trained weights by codes of two bits and the table of their levels.

    Args:
      weights: the latent weights.
      positive: as for `ttq`.
      negative: as for `ttq`.
      threshold: as for `ttq`.

    Returns:
      A CodebookTensor that is restored to exactly `ttq(weights, positive, negative, threshold)`.

    Raises:
      ValueError: the shapes do not fit, the dtypes differ, or the array is empty.
      TypeError: `weights` is not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> leaf = ttq_quantize(jnp.array([2.0, -1.0, 0.01]), jnp.array([3.0]), jnp.array([4.0]))
      >>> leaf.codes, leaf.codebook
      (Array([2, 0, 1], dtype=uint2), Array([[-4.,  0.,  3.]], dtype=float32))
    """
    return _ttq_quantize(*_check(weights, positive, negative), threshold)


def ttq_init_params(
    params: Any,
    block: tuple[int, ...] = (),
    threshold: ArrayLike = 0.05,
    where: Filter = is_kernel,
) -> dict[str, TernaryScales]:
    """Choose the levels of the chosen kernels of a tree, by path.

    The result is a tree of its own, to be trained in the same optimizer as the parameters.

    Args:
      params: a linen dict, an `nnx.State` or any other pytree.
      block: as for `ttq_init`.
      threshold: as for `ttq`.
      where: a regex on the path or a predicate `(path, leaf) -> bool`; the paper leaves the first
        and the last layer out.

    Returns:
      The levels of each chosen leaf, by its path.

    Raises:
      ValueError: the filter matches nothing, or a block does not divide a leaf.
      TypeError: a chosen leaf is not a floating-point array.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> params = {"kernel": jnp.array([[2.0, -1.0]]), "bias": jnp.zeros(2)}
      >>> trained = {"params": params, "scales": ttq_init_params(params)}
      >>> def loss(trained):
      ...     return jnp.sum(ttq_params(trained["params"], trained["scales"])["kernel"] ** 2)
      >>> optimizer = optax.adam(0.1)
      >>> updates, _ = optimizer.update(jax.grad(loss)(trained), optimizer.init(trained))
      >>> optax.apply_updates(trained, updates)["scales"]["kernel"].positive.round(2)
      Array([[1.9]], dtype=float32)
    """
    start = naming_leaf(ttq_init, block, threshold)
    return {path: start(path, leaf) for path, leaf in selected(params, where).items()}


def ttq_params(params: Any, scales: dict[str, TernaryScales], threshold: ArrayLike = 0.05) -> Any:
    """Round the kernels that have learned levels to these, with gradients to both.

    Put it between the parameters and `apply` in the loss.

    Args:
      params: a linen dict, an `nnx.State` or any other pytree; it is not changed.
      scales: from `ttq_init_params`; leaves without an entry stay as they are.
      threshold: as for `ttq`.

    Returns:
      A tree of the same structure, shapes and dtypes.

    Raises:
      ValueError: a path of `scales` is not in `params`, `scales` is empty, or shapes do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.array([[2.0, -1.0, 3.0]])}
      >>> ttq_params(params, ttq_init_params(params))
      {'kernel': Array([[ 2.5, -1. ,  2.5]], dtype=float32)}
    """

    def round_leaf(leaf: Any, pair: TernaryScales) -> jax.Array:
        return ttq(leaf, *pair, threshold)

    return map_with(naming_leaf(round_leaf), params, scales, "scales")


def ttq_quantize_params(
    params: Any, scales: dict[str, TernaryScales], threshold: ArrayLike = 0.05
) -> Any:
    """Replace the kernels that have learned levels by codes, with exactly the values trained with.

    Args:
      params: a linen dict, an `nnx.State` or any other pytree; it is not changed.
      scales: as for `ttq_params`.
      threshold: as for `ttq`.

    Returns:
      The tree with a `CodebookTensor` at each path of `scales`.

    Raises:
      ValueError: a path of `scales` is not in `params`, `scales` is empty, shapes do not fit,
        or there is NaN or infinity (outside jit).

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.array([[2.0, -1.0, 3.0]])}
      >>> ttq_quantize_params(params, ttq_init_params(params))["kernel"].codes
      Array([[2, 0, 2]], dtype=uint2)
    """

    def replace_leaf(leaf: Any, pair: TernaryScales) -> CodebookTensor:
        return ttq_quantize(leaf, *pair, threshold)

    small = map_with(naming_leaf(replace_leaf), params, scales, "scales")
    refuse_non_finite({"params": params, "scales": scales}, in_both("scales", scales))
    return small
