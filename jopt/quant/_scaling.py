"""Factors on the inputs of a layer: what AWQ and SmoothQuant share.

A layer computes the same from `x * factor` and `W / factor` as from `x` and `W`; a factor for each
input decides which of the two is easier to round.
"""

import jax

from jopt._arrays import working_dtype
from jopt._leaves import ScaledTensor
from jopt.layers._outcome import row_axes
from jopt.quant._quantize import quantize
from jopt.quant._spec import QuantSpec


def by_channel(figures: jax.Array, shape: tuple[int, ...], inputs: int) -> jax.Array:
    """Split figures of features by the last input axis of a kernel, `(others, channels)`.

    The positions of a convolution, and its groups, see the same channels, so they share a factor,
    which can then be multiplied into the activations.

    Args:
      figures: (features,), or (groups, features).
      shape: of the kernel.
      inputs: how many leading axes of the kernel are its inputs.

    Example:
      >>> import jax.numpy as jnp
      >>> by_channel(jnp.ones((2, 18)), (3, 3, 2, 8), 3).shape
      (18, 2)
    """
    return figures.reshape(-1, shape[inputs - 1] if inputs else 1)


def as_factor(
    scales: jax.Array, shape: tuple[int, ...], features: int, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Turn what multiplies the channels of a kernel into the factor that undoes it.

    Args:
      scales: (channels,), positive.
      shape: of the kernel.
      features: of its statistics.
      dtype: of the kernel.

    Returns:
      `1 / scales` in `dtype`, with as many axes as the kernel.

    Example:
      >>> import jax.numpy as jnp
      >>> as_factor(jnp.array([2.0, 4.0]), (3, 3, 2, 8), 18, jnp.float32).shape
      (1, 1, 2, 1)
    """
    inputs = row_axes(shape, features)
    axes = [1] * len(shape)
    if inputs:
        axes[inputs - 1] = shape[inputs - 1]
    return (1 / scales).astype(dtype).reshape(axes)


def quantize_scaled(weights: jax.Array, factor: jax.Array, spec: QuantSpec) -> ScaledTensor:
    """Quantize `weights / factor`, and keep the factor.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import materialize
      >>> leaf = quantize_scaled(
      ...     jnp.array([[7.0], [0.25]]), jnp.array([[1.0], [0.25]]), QuantSpec(4)
      ... )
      >>> materialize(leaf).ravel(), materialize(leaf.tensor).ravel()
      (Array([7.  , 0.25], dtype=float32), Array([7., 1.], dtype=float32))
    """
    exact = working_dtype(weights.dtype)
    scaled = weights.astype(exact) / factor.astype(exact)
    return ScaledTensor(quantize(scaled.astype(weights.dtype), spec), factor)
