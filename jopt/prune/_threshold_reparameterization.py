"""Soft threshold weight reparameterization: each layer learns how much of it is pruned."""

from typing import Any

import jax
import jax.numpy as jnp

from jopt._trees import Filter, is_kernel
from jopt.prune._by_path import Entries, Shape, init_entries, map_entries, masks_of, one_per_layer


def soft_threshold(weights: jax.Array, threshold: jax.Array) -> jax.Array:
    """Shrink weights towards zero, `sign(w) max(|w| - threshold, 0)`.

    Gradients, where `|w| > threshold`: 1 to the weight and `-sign(w)` to the threshold; elsewhere
    0, on the edge too.

    Args:
      weights: a floating-point array.
      threshold: 0 or more; broadcasts against the weights, same dtype.

    Returns:
      An array like the weights.

    Example:
      >>> import jax.numpy as jnp
      >>> soft_threshold(jnp.array([-3.0, 0.5, 2.0]), jnp.array(1.0))
      Array([-2.,  0.,  1.], dtype=float32)
    """
    left = jax.nn.relu(jnp.abs(weights) - threshold)
    return jnp.where(left > 0, jnp.sign(weights) * left, jnp.zeros_like(left))


def str_init(
    params: Any, initial: float, where: Filter = is_kernel, shape: Shape = one_per_layer
) -> dict[str, jax.Array]:
    """Make the trainable thresholds s of `str_params`.

    Weight decay on s, with the optimizer of the weights, pulls `sigmoid(s)` up towards 1/2 and so
    prunes: the decay and `initial` together set the final sparsity.

    Args:
      params: any pytree of arrays.
      initial: s at the start, well below zero so that nothing much is pruned; at -10 the threshold
        is 4.5e-5. The paper starts as low as -12800, where only the decay moves s at first.
      where: which leaves, a regex on the path or a predicate; by default
        those that `is_kernel` takes.
      shape: from a leaf to the shape of its thresholds: `one_per_layer`, `one_per_output` or
        your own, which broadcasts against the leaf.

    Returns:
      The thresholds by path, of the dtype of their leaves.

    Raises:
      ValueError: nothing was chosen, or a shape does not broadcast.
      TypeError: a chosen leaf is not a floating-point array.

    Example:
      >>> import jax.numpy as jnp
      >>> str_init({"w": jnp.ones((2, 2)), "b": jnp.ones(2)}, -10.0)
      {'w': Array(-10., dtype=float32)}
    """
    return init_entries(
        params, where, shape, lambda index, size, dtype: jnp.full(size, initial, dtype)
    )


def str_params(params: Any, thresholds: Entries) -> Any:
    """Shrink weights by their learned thresholds, `sign(w) max(|w| - sigmoid(s), 0)`.

    Differentiable in both. To finish, keep the result: its zeros are exact.

    Args:
      params: any pytree of arrays.
      thresholds: s, by path, from `str_init`.

    Returns:
      Parameters to run the model with; leaves without a threshold are unchanged.

    Raises:
      ValueError: a threshold has no leaf, or does not broadcast to it.

    Example:
      >>> import jax.numpy as jnp
      >>> str_params({"w": jnp.array([[2.0, -0.2]])}, {"w": jnp.array(0.0)})
      {'w': Array([[1.5, 0. ]], dtype=float32)}

    References:
      Kusupati et al., "Soft Threshold Weight Reparameterization for Learnable Sparsity", 2020,
      https://arxiv.org/abs/2002.03231, equation 2, with the sigmoid as g.
    """
    return map_entries(
        lambda index, leaf, entry: soft_threshold(leaf, jax.nn.sigmoid(entry)), params, thresholds
    )


def str_masks(params: Any, thresholds: Entries) -> Any:
    """Say which weights `str_params` leaves: `|w| > sigmoid(s)`.

    Args:
      params: any pytree of arrays.
      thresholds: s, by path, from `str_init`.

    Returns:
      A tree of booleans: full-shape masks where there is a threshold, a scalar True elsewhere.

    Raises:
      ValueError: a threshold has no leaf, or does not broadcast to it.

    Example:
      >>> import jax.numpy as jnp
      >>> str_masks({"w": jnp.array([[2.0, -0.2]])}, {"w": jnp.array(0.0)})
      {'w': Array([[ True, False]], dtype=bool)}
    """
    return masks_of(
        lambda leaf, entry: soft_threshold(leaf, jax.nn.sigmoid(entry)) != 0, params, thresholds
    )
