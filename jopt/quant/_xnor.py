"""Binary activations: products of signs with one scale for each position."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jopt._arrays import working_dtype
from jopt._leaves import BitTensor
from jopt.quant._binary import with_slope
from jopt.quant._bits import TernaryBits, binary_matmul, pack_signs, pack_ternary, ternary_matmul

Padding = str | tuple[tuple[int, int], ...]
"""`"SAME"`, `"VALID"`, or how much is put before and after each spatial axis."""


def sign_activations(inputs: ArrayLike) -> jax.Array:
    """Round activations to -1 and 1, with a straight-through gradient.

    `sign(x)`, with `sign(0) = +1`; `d sign / dx = [|x| <= 1]`. Normalise before it: its gradient
    dies where activations are large.

    Args:
      inputs: floating-point array.

    Returns:
      An array of the same shape and dtype.

    Raises:
      TypeError: the array is not floating-point.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> sign_activations(jnp.array([-0.3, 0.0, 2.0]))
      Array([-1.,  1.,  1.], dtype=float32)
      >>> jax.grad(lambda x: sign_activations(x).sum())(jnp.array([-0.3, 0.0, 2.0]))
      Array([1., 1., 0.], dtype=float32)

    References:
      Courbariaux et al., "Binarized Neural Networks", 2016, https://arxiv.org/abs/1602.02830,
      equation 4.
    """
    values = _floating(inputs)
    held = lax.stop_gradient(values)
    signs = jnp.where(held >= 0, jnp.ones_like(held), -jnp.ones_like(held))
    return with_slope(values, signs, (jnp.abs(held) <= 1).astype(held.dtype))


def _floating(inputs: ArrayLike) -> jax.Array:
    values = jnp.asarray(inputs)
    if not jnp.issubdtype(values.dtype, jnp.floating) or values.ndim == 0:
        raise TypeError(
            f"inputs must be a floating-point array, not {values.dtype} of shape {values.shape}."
        )
    return values


def xnor_scaling(
    inputs: ArrayLike,
    window: tuple[int, ...] = (),
    strides: tuple[int, ...] | None = None,
    padding: Padding = "SAME",
) -> jax.Array:
    """Return the scale K of the activations that each output position of a layer sees.

    `K = A * k`: `A` is the mean of `|x|` over the channels, convolved with `k = 1 / (w h)`
    everywhere. Padding counts as zeros, and the divisor is `w h` at the edge as well. Without a
    window it is the mean magnitude of each row, for a dense layer.

    Args:
      inputs: floating-point, (batch, *spatial, channels), or (..., features) without a window.
      window: size of the filter along each spatial axis.
      strides: of the convolution, 1 by default.
      padding: of the convolution, `"SAME"`, `"VALID"` or pairs of numbers.

    Returns:
      (batch, *outputs, 1), to multiply the product of signs by; of the dtype of `inputs`.

    Raises:
      ValueError: the number of axes does not fit the window.
      TypeError: the array is not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> xnor_scaling(jnp.array([[1.0, -3.0]]))
      Array([[2.]], dtype=float32)
      >>> xnor_scaling(jnp.array([[[1.0], [-3.0], [5.0]]]), (2,), padding="VALID").ravel()
      Array([2., 4.], dtype=float32)

    References:
      Rastegari et al., "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural
      Networks", 2016, https://arxiv.org/abs/1603.05279, section 3.2 and equation 11.
    """
    values = _floating(inputs)
    means = jnp.mean(jnp.abs(values), -1, keepdims=True)
    if not window:
        return means
    if values.ndim != len(window) + 2:
        raise ValueError(
            f"inputs of shape {values.shape} are not (batch, {len(window)} spatial axes, channels)."
        )
    steps = strides or (1,) * len(window)
    around = padding if isinstance(padding, str) else ((0, 0), *padding, (0, 0))
    sums = lax.reduce_window(means, 0.0, lax.add, (1, *window, 1), (1, *steps, 1), around)
    return sums / math.prod(window)


def _output_scale(kernel: BitTensor) -> jax.Array:
    """Return one scale an output, or one for all."""
    *before, last = kernel.scale.shape
    if math.prod(before) != 1 or last not in (1, kernel.shape[-1]):
        raise ValueError(
            f"kernel has scales of shape {kernel.scale.shape}; the product of signs needs one for "
            "each output or one in all, block (1,) or ()."
        )
    return kernel.scale.reshape(last)


@jax.jit
def xnor_dense(inputs: jax.Array, kernel: BitTensor) -> jax.Array:
    """Multiply activations by a binary kernel, both as signs, by counting bits.

    `y = (sign(x) . sign(w)) * mean |x| * a`, the product of signs exact.

    Args:
      inputs: floating-point, (..., features).
      kernel: from `binarize`, of shape (features, outputs), with block `(1,)` or `()`.

    Returns:
      (..., outputs), of the dtype of `inputs`.

    Raises:
      ValueError: the shapes do not fit, or the kernel has scales by group.
      TypeError: `inputs` is not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.quant import binarize
      >>> xnor_dense(jnp.array([[1.0, -3.0]]), binarize(jnp.array([[0.5], [1.5]])))
      Array([[0.]], dtype=float32)

    References:
      Rastegari et al., "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural
      Networks", 2016, https://arxiv.org/abs/1603.05279, section 3.2.
    """
    values = _floating(inputs)
    if len(kernel.shape) != 2 or values.shape[-1] != kernel.shape[0]:
        raise ValueError(f"inputs {values.shape} and kernel {kernel.shape} do not multiply.")
    product = binary_matmul(pack_signs(values, axis=-1), kernel.bits, kernel.shape[0])
    return _scaled(product, xnor_scaling(_widened(values)), kernel).astype(values.dtype)


def _widened(values: jax.Array) -> jax.Array:
    """Return at least float32, which holds the counts of a product exactly."""
    return values.astype(working_dtype(values.dtype))


def _scaled(product: jax.Array, positions: jax.Array, kernel: BitTensor) -> jax.Array:
    scale = _output_scale(kernel).astype(positions.dtype)
    scale = scale.reshape((1,) * (product.ndim - 1) + scale.shape)
    return product.astype(positions.dtype) * positions * scale


@partial(jax.jit, static_argnames=("strides", "padding"))
def xnor_conv(
    inputs: jax.Array,
    kernel: BitTensor,
    strides: tuple[int, ...] | None = None,
    padding: Padding = "SAME",
) -> jax.Array:
    """Convolve activations with a binary kernel, both as signs, by counting bits.

    `y = (sign(x) * sign(w)) K a`, the convolution of signs exact, with `K` from `xnor_scaling`.
    Padding counts as 0, which is neither sign, as it does where `sign_activations` is convolved in
    floats: a plane of bits says which inputs are there. A reference: the windows are laid out in
    floats before they are packed.

    Args:
      inputs: floating-point, (batch, *spatial, channels).
      kernel: from `binarize`, of shape (*window, channels, outputs), with block `(1,)` or `()`.
      strides: 1 by default.
      padding: `"SAME"`, `"VALID"` or pairs of numbers.

    Returns:
      (batch, *outputs, outputs), of the dtype of `inputs`.

    Raises:
      ValueError: the shapes do not fit, or the kernel has scales by group.
      TypeError: `inputs` is not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.quant import binarize
      >>> image, kernel = jnp.full((1, 2, 2, 1), -2.0), jnp.full((2, 2, 1, 1), 0.5)
      >>> xnor_conv(image, binarize(kernel), padding="VALID").ravel()
      Array([-4.], dtype=float32)

    References:
      Rastegari et al., "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural
      Networks", 2016, https://arxiv.org/abs/1603.05279, equation 11.
    """
    values = _floating(inputs)
    *window, channels, outputs = kernel.shape
    if (
        values.ndim != len(kernel.shape)
        or values.shape[-1] != channels
        or len(window) not in (1, 2, 3)
    ):
        raise ValueError(f"kernel {kernel.shape} does not convolve inputs {values.shape}.")
    steps = strides or (1,) * len(window)
    patches = _windows(jnp.where(values >= 0, 1.0, -1.0), tuple(window), steps, padding)
    every = pack_signs(jnp.ones((math.prod(kernel.shape[:-1]), outputs)))
    product = ternary_matmul(pack_ternary(patches, axis=-1), TernaryBits(kernel.bits, every))
    positions = xnor_scaling(_widened(values), tuple(window), steps, padding)
    return _scaled(product, positions, kernel).astype(values.dtype)


def _windows(
    values: jax.Array, window: tuple[int, ...], strides: tuple[int, ...], padding: Padding
) -> jax.Array:
    """Lay out what each output position sees, in the order of the rows of a kernel."""
    spatial = "DHW"[-len(window) :]
    layout = ("N" + spatial + "C", spatial + "IO", "N" + spatial + "C")
    patches = lax.conv_general_dilated_patches(
        values, window, strides, padding, dimension_numbers=layout
    )
    parts = patches.reshape(*patches.shape[:-1], values.shape[-1], math.prod(window))
    return jnp.swapaxes(parts, -1, -2).reshape(patches.shape)
