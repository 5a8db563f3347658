"""DoReFa-Net: few-bit weights, activations and gradients.

All three are `quantize_k(r) = round((2^k - 1) r) / (2^k - 1)` of something first brought to [0, 1],
with the gradient of the identity for the rounding.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jopt._arrays import materialize, working_dtype
from jopt._leaves import QTensor
from jopt._trees import Filter, is_kernel, map_selected, naming_leaf
from jopt.quant._blocks import split_blocks
from jopt.quant._by_path import refuse_non_finite
from jopt.quant._code_ranges import block_counts
from jopt.quant._grids import code_dtype
from jopt.quant._quantize import check_values
from jopt.quant._spec import QuantSpec

# --- weights --------------------------------------------------------------------------------------


def _squashed(values: jax.Array, spec: QuantSpec) -> jax.Array:
    """Return the weights brought to [-1, 1], before rounding."""
    exact = working_dtype(values.dtype)
    blocks, axes = split_blocks(values.astype(exact), spec)
    blocks = jnp.tanh(blocks)
    largest = jnp.max(jnp.abs(blocks), axes, keepdims=True)
    return (blocks / jnp.where(largest > 0, largest, 1.0)).reshape(values.shape)


@partial(jax.jit, static_argnames="spec")
def _dorefa_quantize(values: jax.Array, spec: QuantSpec) -> QTensor:
    exact = working_dtype(values.dtype)
    if spec.bits == 1:
        blocks, axes = split_blocks(values.astype(exact), spec)
        scale = jnp.mean(jnp.abs(blocks), axes).reshape(block_counts(values.shape, spec))
        scale = scale.astype(values.dtype)
        return QTensor(jnp.sign(values).astype(code_dtype(2, signed=True)), scale)
    top = 2**spec.bits - 1
    codes = jnp.round((_squashed(values, spec) * 0.5 + 0.5) * top)
    ones = (1,) * values.ndim
    return QTensor(
        codes.astype(code_dtype(2**spec.bits)),
        jnp.full(ones, 2 / top, values.dtype),
        jnp.full(ones, top / 2, values.dtype),
    )


def dorefa_quantize(values: ArrayLike, spec: QuantSpec) -> QTensor:
    """Quantize weights to what `dorefa_weights` trained.

    Args:
      values: floating-point array, the weights that were trained, not empty.
      spec: bits and block, as in training.

    Returns:
      A `QTensor` that is restored to exactly `dorefa_weights(values, spec)`: codes from 0 to
      `2^k - 1`, scale `2 / (2^k - 1)` and zero point `(2^k - 1) / 2` for the whole array; at one
      bit codes -1 and 1 and a scale for each block.

    Raises:
      ValueError: `spec.block` does not divide the shape, or the array is empty.
      TypeError: the array is not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.quant import QuantSpec
      >>> from jopt.quant import dorefa_quantize
      >>> leaf = dorefa_quantize(jnp.array([-5.0, 0.1, 5.0]), QuantSpec(2, block=()))
      >>> leaf.codes, leaf.zero_point
      (Array([0, 2, 3], dtype=uint2), Array([1.5], dtype=float32))
    """
    array = jnp.asarray(values)
    check_values(array, spec)
    return _dorefa_quantize(array, spec)


@partial(jax.jit, static_argnames="spec")
def _dorefa_weights(values: jax.Array, spec: QuantSpec) -> jax.Array:
    rounded = materialize(_dorefa_quantize(jax.lax.stop_gradient(values), spec))
    smooth = values if spec.bits == 1 else _squashed(values, spec).astype(values.dtype)
    return _with_gradient_of(jnp.where(jnp.isnan(smooth), smooth, rounded), smooth)


@jax.custom_jvp
def _with_gradient_of(rounded: jax.Array, smooth: jax.Array) -> jax.Array:
    """Return `rounded` with the gradient of `smooth`."""
    del smooth
    return rounded


@_with_gradient_of.defjvp
def _with_gradient_of_jvp(primals: Any, tangents: Any) -> Any:
    return primals[0], tangents[1]


def dorefa_weights(values: ArrayLike, spec: QuantSpec) -> jax.Array:
    """Squash weights to [-1, 1] and round them, with the gradient of the squashing.

    `2 quantize_k(tanh(w) / (2 max |tanh(w)|) + 1/2) - 1`; at one bit `sign(w) mean(|w|)` with the
    gradient of the identity. The largest weight of a block becomes 1 or -1 whatever its size, so a
    layer needs normalisation after it. With two and more bits there are as many levels below zero
    as above and none at it: pruned weights do not stay zero (use `lsq` for them); at one bit an
    exact zero does.

    Args:
      values: floating-point array, not empty.
      spec: bits k and block; `block=()`, one maximum for the layer, is the paper's. Range and grid
        are not used.

    Returns:
      An array of the shape and dtype of `values`.

    Raises:
      ValueError: `spec.block` does not divide the shape, or the array is empty.
      TypeError: the array is not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.quant import QuantSpec
      >>> from jopt.quant import dorefa_weights
      >>> dorefa_weights(jnp.array([-5.0, 0.1, 5.0]), QuantSpec(2, block=()))
      Array([-1. , 0.33333334, 1. ], dtype=float32)
      >>> dorefa_weights(jnp.array([-5.0, 0.5, 0.5]), QuantSpec(1, block=()))
      Array([-2., 2., 2.], dtype=float32)

    References:
      Zhou et al., "DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low
      Bitwidth Gradients", 2016, https://arxiv.org/abs/1606.06160, section 2.3, equation 9.
    """
    array = jnp.asarray(values)
    check_values(array, spec)
    return _dorefa_weights(array, spec)


def dorefa_params(params: Any, spec: QuantSpec, where: Filter = is_kernel) -> Any:
    """Apply `dorefa_weights` to the chosen leaves of a tree.

    Args:
      params: a linen dict, an `nnx.State` or any other pytree; it is not changed.
      spec: bits and block.
      where: a regex on the path or a predicate `(path, leaf) -> bool`.

    Returns:
      A tree of the same structure, shapes and dtypes.

    Raises:
      ValueError: the filter matches nothing, or a block does not divide a leaf.
      TypeError: a chosen leaf is compressed already or is not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.quant import QuantSpec
      >>> from jopt.quant import dorefa_params
      >>> dorefa_params({"kernel": jnp.array([[2.0, -2.0]])}, QuantSpec(2, block=()))
      {'kernel': Array([[ 1., -1.]], dtype=float32)}
    """
    return map_selected(naming_leaf(dorefa_weights, spec), params, where)


def dorefa_quantize_params(params: Any, spec: QuantSpec, where: Filter = is_kernel) -> Any:
    """Apply `dorefa_quantize` to the chosen leaves of a tree.

    Args:
      params: a linen dict, an `nnx.State` or any other pytree; it is not changed.
      spec: bits and block, as in training.
      where: as for `dorefa_params`.

    Returns:
      The tree with a `QTensor` at each chosen leaf.

    Raises:
      ValueError: the filter matches nothing, a block does not divide a leaf, or a leaf holds NaN
        or infinity (outside jit).
      TypeError: a chosen leaf is compressed already or is not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.quant import QuantSpec
      >>> from jopt.quant import dorefa_quantize_params
      >>> params = {"kernel": jnp.array([[2.0, -2.0]])}
      >>> dorefa_quantize_params(params, QuantSpec(2, block=()))["kernel"].codes
      Array([[3, 0]], dtype=uint2)
    """
    refuse_non_finite(params, where)
    return map_selected(naming_leaf(dorefa_quantize, spec), params, where)


# --- activations ----------------------------------------------------------------------------------


@partial(jax.jit, static_argnames="top")
def _dorefa_activations(values: jax.Array, top: int) -> jax.Array:
    exact = working_dtype(values.dtype)
    clipped = jnp.clip(jax.lax.stop_gradient(values).astype(exact), 0, 1)
    inside = (values >= 0) & (values <= 1)
    smooth = jnp.where(inside, values, jnp.zeros_like(values))
    return _with_gradient_of((jnp.round(clipped * top) / top).astype(values.dtype), smooth)


def dorefa_activations(values: ArrayLike, bits: int) -> jax.Array:
    """Clip activations to [0, 1] and round them.

    `quantize_k(clip(x, 0, 1))`; the gradient is that of the identity where `0 <= x <= 1` and zero
    elsewhere.

    Args:
      values: floating-point array.
      bits: k, 1 to 8.

    Returns:
      An array of the shape and dtype of `values`.

    Raises:
      ValueError: `bits` is out of range.
      TypeError: the array is not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.quant import dorefa_activations
      >>> dorefa_activations(jnp.array([-0.2, 0.4, 3.0]), 2)
      Array([0. , 0.33333334, 1. ], dtype=float32)

    References:
      Zhou et al., 2016, https://arxiv.org/abs/1606.06160, section 2.4, equation 11.
    """
    array, top = _checked(values, bits)
    return _dorefa_activations(array, top)


def _checked(values: ArrayLike, bits: int) -> tuple[jax.Array, int]:
    array = jnp.asarray(values)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"values must be floating-point, not {array.dtype}.")
    return array, 2 ** QuantSpec(bits).bits - 1  # QuantSpec refuses bits that are out of range


# --- gradients ------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _quantize_gradient(key: jax.Array, values: jax.Array, top: int) -> jax.Array:
    del key, top
    return values


def _forward(key: jax.Array, values: jax.Array, top: int) -> Any:
    del top
    return values, key


@partial(jax.jit, static_argnums=0)
def _quantized(top: int, key: jax.Array, gradient: jax.Array) -> jax.Array:
    exact = working_dtype(gradient.dtype)
    wide = gradient.astype(exact)
    largest = jnp.max(jnp.abs(wide), tuple(range(1, wide.ndim)), keepdims=True, initial=0)
    noise = jax.random.uniform(key, wide.shape, exact, -0.5, 0.5) / top
    share = wide / (2 * jnp.where(largest > 0, largest, 1.0)) + 0.5
    rounded = jnp.round(jnp.clip(share + noise, 0, 1) * top) / top
    return (2 * largest * (rounded - 0.5)).astype(gradient.dtype)


def _backward(top: int, key: jax.Array, gradient: jax.Array) -> Any:
    # A key has no gradient: float0 is the dtype of the tangents of what is not a real number.
    return np.zeros(key.shape, jax.dtypes.float0), _quantized(top, key, gradient)


_quantize_gradient.defvjp(_forward, _backward)


def dorefa_gradients(key: jax.Array, values: ArrayLike, bits: int) -> jax.Array:
    """Return the array as it is, and quantize the gradient that comes back through it.

    `2 m (quantize_k(g / (2 m) + 1/2 + N) - 1/2)` with `m = max |g|` over each example and the noise
    `N = u / (2^k - 1)`, u uniform in (-1/2, 1/2), so that the mean is g. An example with zero
    gradient gets zero. What noise moves out of [0, 1] is clipped to it. Only reverse mode.

    Args:
      key: a random key; take a new one at each step.
      values: floating-point array whose first axis counts examples; under `vmap` over examples
        give each one an axis of length one.
      bits: k, 1 to 8.

    Returns:
      `values`.

    Raises:
      ValueError: `bits` is out of range, or `values` has no axis.
      TypeError: the array is not floating-point.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jopt.quant import dorefa_gradients
      >>> def loss(values):
      ...     return (
      ...         jnp.array([[4.0, -4.0]]) * dorefa_gradients(jax.random.key(0), values, 1)
      ...     ).sum()
      >>> jax.grad(loss)(jnp.ones((1, 2)))
      Array([[ 4., -4.]], dtype=float32)

    References:
      Zhou et al., 2016, https://arxiv.org/abs/1606.06160, section 2.5, equation 12.
    """
    array, top = _checked(values, bits)
    if not array.ndim:
        raise ValueError("values must have an axis of examples, but it is a scalar.")
    return _quantize_gradient(key, array, top)
