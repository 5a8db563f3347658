"""Binary weights: one bit each and one scale for each filter."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jopt._arrays import expand_blocks, working_dtype
from jopt._leaves import BitTensor, QTensor
from jopt._trees import Filter, is_kernel, map_selected, naming_leaf
from jopt.quant._bits import pack_signs
from jopt.quant._blocks import merge_blocks, split_blocks
from jopt.quant._by_path import refuse_non_finite
from jopt.quant._grids import Grid, symmetric
from jopt.quant._quantize import check_values
from jopt.quant._spec import QuantSpec, block_sizes

Slope = Callable[[jax.Array, jax.Array, int], jax.Array]
"""`(weights, scale, count) -> slope`: what the gradient of each weight is multiplied by."""


def block_axes(values: jax.Array, reduced: jax.Array) -> tuple[int, ...]:
    """Return the axes of a block: those along which its range has one entry."""
    return tuple(axis for axis in range(values.ndim) if reduced.shape[axis] == 1)


def positive_scale(scale: jax.Array) -> jax.Array:
    """Return 1 for the scale of a block that has no magnitude."""
    return jnp.where(scale >= jnp.finfo(scale.dtype).tiny, scale, 1.0)


def _binary_fit(values: jax.Array, low: jax.Array, high: jax.Array, bits: int) -> QTensor:
    del high
    if bits != 1:
        raise ValueError(f"bits must be 1 for the grid binary, not {bits}.")
    axes = block_axes(values, low)
    count = jnp.sum((values != 0).astype(values.dtype), axes, keepdims=True)
    total = jnp.sum(jnp.abs(values), axes, keepdims=True)
    return QTensor(None, positive_scale(total / jnp.maximum(count, 1.0)))  # type: ignore


binary = Grid(_binary_fit, symmetric.encode, symmetric.neighbours)
"""Put one level at each side of zero, `-a` and `a`, with `a` the mean of `|x|`.

`q = sign(x)`, `a = mean |x|`: of all such pairs the one with the least squared error. The range is
not used, and the bits of the spec must be 1. An exact zero keeps the code 0, so that pruned weights
stay pruned, and does not count in the mean; `binarize` has no third state and makes it `+a`. A
block of zeros gets scale 1. Rastegari et al., "XNOR-Net: ImageNet Classification Using Binary
Convolutional Neural Networks", 2016, https://arxiv.org/abs/1603.05279, equations 3 to 6.
"""


def _scale(weights: jax.Array, block: tuple[int, ...]) -> jax.Array:
    """Return the mean magnitude of each block, in the dtype of the weights."""
    exact, spec = weights.astype(working_dtype(weights.dtype)), _of(block)
    blocks, within = split_blocks(exact, spec)
    means = jnp.mean(jnp.abs(blocks), within, keepdims=True)
    return merge_blocks(means, weights.shape, spec).astype(weights.dtype)


def _of(block: tuple[int, ...]) -> QuantSpec:
    return QuantSpec(1, block, grid=binary)


def _checked(weights: ArrayLike, block: tuple[int, ...]) -> jax.Array:
    array = jnp.asarray(weights)
    check_values(array, _of(block))
    if array.ndim < 2:
        raise ValueError(f"weights of shape {array.shape} are no kernel; it has two or more axes.")
    return array


@partial(jax.jit, static_argnames="block")
def _binarize(weights: jax.Array, block: tuple[int, ...]) -> BitTensor:
    bits = pack_signs(weights.reshape(-1, weights.shape[-1]))
    return BitTensor(bits, _scale(weights, block), jnp.zeros((*weights.shape, 0), bool))


def binarize(weights: ArrayLike, block: tuple[int, ...] = (1,)) -> BitTensor:
    """Round a kernel to signs and one scale for each block, and pack the signs in bits.

    `w ~ a * sign(w)`, `a = mean |w|`, which has the least squared error of all binary kernels. The
    sign of 0 is +1: a bit has no third state, so pruning and this do not go together.

    Args:
      weights: floating-point, two or more axes, the last one the outputs; not empty and finite.
      block: which weights share a scale, as in `QuantSpec`: `(1,)` those of an output channel, the
        filter of the paper, `()` all.

    Returns:
      A BitTensor whose scale has the dtype of `weights`.

    Raises:
      ValueError: `block` does not divide the shape, or the array is empty or has one axis.
      TypeError: the array is not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import materialize
      >>> leaf = binarize(jnp.array([[1.0, -2.0], [-3.0, 0.0]]))
      >>> leaf.bits, materialize(leaf)
      (Array([[1, 2]], dtype=uint8),
       Array([[ 2., -1.],
              [-2.,  1.]], dtype=float32))

    References:
      Rastegari et al., "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural
      Networks", 2016, https://arxiv.org/abs/1603.05279, equations 3 to 6.
    """
    return _binarize(_checked(weights, block), block)


def xnor_slope(weights: jax.Array, scale: jax.Array, count: int) -> jax.Array:
    """Return the slope of XNOR-Net, `1 / n + a * [|w| <= 1]`.

    Args:
      weights: the weights before rounding.
      scale: the scale of each, of the same shape.
      count: the number n of weights that share a scale.

    Returns:
      An array of the shape and dtype of `weights`.

    Example:
      >>> import jax.numpy as jnp
      >>> xnor_slope(jnp.array([0.5, -2.0]), jnp.array([1.25, 1.25]), 2)
      Array([1.75, 0.5 ], dtype=float32)
    """
    return 1 / count + jnp.where(jnp.abs(weights) <= 1, scale, jnp.zeros_like(scale))


def clipped_slope(weights: jax.Array, scale: jax.Array, count: int) -> jax.Array:
    """Return the plain straight-through slope, `[|w| <= 1]`; the other arguments are not used.

    Example:
      >>> import jax.numpy as jnp
      >>> clipped_slope(jnp.array([0.5, -2.0]), jnp.array([1.25, 1.25]), 2)
      Array([1., 0.], dtype=float32)

    References:
      Courbariaux et al., "Binarized Neural Networks", 2016, https://arxiv.org/abs/1602.02830,
      equation 4.
    """
    del scale, count
    return (jnp.abs(weights) <= 1).astype(weights.dtype)


@jax.custom_jvp
def with_slope(values: jax.Array, rounded: jax.Array, slope: jax.Array) -> jax.Array:
    """Return `rounded`, with a gradient to `values` that is multiplied by `slope`, and no other."""
    del values, slope
    return rounded


@with_slope.defjvp
def _with_slope_jvp(primals: Any, tangents: Any) -> Any:
    _, rounded, slope = primals
    return rounded, slope * tangents[0]


@partial(jax.jit, static_argnames=("block", "slope"))
def _fake_binarize(weights: jax.Array, block: tuple[int, ...], slope: Slope) -> jax.Array:
    held = jax.lax.stop_gradient(weights)
    scale = expand_blocks(_scale(held, block), held.shape)
    count = math.prod(block_sizes(held.shape, block))
    return with_slope(weights, jnp.where(held >= 0, scale, -scale), slope(held, scale, count))


def fake_binarize(
    weights: ArrayLike, block: tuple[int, ...] = (1,), slope: Slope = xnor_slope
) -> jax.Array:
    """Round a kernel to signs and scales, with a gradient to the weights before rounding.

    The value is exactly `materialize(binarize(weights, block))`. The gradient is
    `dC/dw = dC/dw' * slope`, by default XNOR-Net's `1 / n + a * [|w| <= 1]`, which takes each
    weight by itself: the derivative of `a` through the signs of the other weights is left out, as
    in the paper.

    The recipe of the paper: keep the weights in floats and update those; binarize them in the loss
    at each step; leave the first and the last layer in floats; order a block as normalisation,
    `sign_activations`, binary convolution, pooling; decay no weights through this function, since
    the optimum of a binary weight is not at zero. `binarize_params` at the end gives the leaves
    with exactly the values trained with.

    Args:
      weights: floating-point, two or more axes, the last one the outputs; not empty.
      block: which weights share a scale, as for `binarize`.
      slope: `xnor_slope`, `clipped_slope` or any function `(weights, scale, count) -> slope`.

    Returns:
      An array of the shape and dtype of `weights`.

    Raises:
      ValueError: `block` does not divide the shape, or the array is empty or has one axis.
      TypeError: the array is not floating-point.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> weights = jnp.array([[0.5], [-2.0]])
      >>> fake_binarize(weights).ravel()
      Array([ 1.25, -1.25], dtype=float32)
      >>> jax.grad(lambda w: fake_binarize(w).sum())(weights).ravel()
      Array([1.75, 0.5 ], dtype=float32)

    References:
      Rastegari et al., "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural
      Networks", 2016, https://arxiv.org/abs/1603.05279, section 3.1 and algorithm 1. The paper
      writes `r * [|r| <= 1]` for the derivative of sign(r), but cites Courbariaux et al. for it,
      who have `[|r| <= 1]`, as here.
    """
    return _fake_binarize(_checked(weights, block), block, slope)


def binarize_params(params: Any, block: tuple[int, ...] = (1,), where: Filter = is_kernel) -> Any:
    """Replace the chosen kernels of a tree by packed signs and scales.

    Args:
      params: a linen dict, an `nnx.State` or any other pytree; it is not changed.
      block: which weights share a scale, as for `binarize`.
      where: a regex on the path or a predicate `(path, leaf) -> bool`; by default
        those that `is_kernel` takes.

    Returns:
      The tree with a `BitTensor` at each chosen leaf.

    Raises:
      ValueError: the filter matches nothing, a block does not divide a leaf, or a leaf holds NaN
        or infinity (outside jit).
      TypeError: a chosen leaf is compressed already or is not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> small = binarize_params({"kernel": jnp.ones((20, 2)), "bias": jnp.ones(2)})
      >>> small["kernel"].bits.shape
      (3, 2)
    """
    refuse_non_finite(params, where)
    return map_selected(naming_leaf(binarize, block), params, where)


def fake_binarize_params(
    params: Any,
    block: tuple[int, ...] = (1,),
    slope: Slope = xnor_slope,
    where: Filter = is_kernel,
) -> Any:
    """Round the chosen kernels of a tree to signs and scales, with a gradient.

    Put it between the parameters and `apply` in the loss; see `fake_binarize` for the recipe.

    Args:
      params: a linen dict, an `nnx.State` or any other pytree; it is not changed.
      block: which weights share a scale, as for `binarize`.
      slope: as for `fake_binarize`.
      where: as for `binarize_params`.

    Returns:
      A tree of the same structure, shapes and dtypes.

    Raises:
      ValueError: the filter matches nothing, or a block does not divide a leaf.
      TypeError: a chosen leaf is compressed already or is not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> fake_binarize_params({"kernel": jnp.array([[3.0], [-1.0]])})["kernel"].ravel()
      Array([ 2., -2.], dtype=float32)
    """
    return map_selected(naming_leaf(fake_binarize, block, slope), params, where)
