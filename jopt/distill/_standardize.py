"""Logit standardisation: only the shape of the teacher's logits is learned, not their size."""

import jax
import jax.numpy as jnp

from jopt.distill._checks import safe_norm, widened


def standardize_logits(logits: jax.Array, epsilon: float = 1e-7) -> jax.Array:
    """Shift and scale the logits of every example to mean zero and standard deviation one.

    `(z - mean(z)) / (std(z) + epsilon)`, the deviation without Bessel's correction. Given to a loss
    in the place of both logits, it makes the temperature an example's own: a student need not reach
    the range of the teacher's logits, only their relations. The loss is then zero for every student
    whose logits are the teacher's up to a shift and a positive scale.

    Args:
      logits: floats, (..., classes).
      epsilon: keeps equal logits, which become zeros, from dividing by zero.

    Returns:
      Floats of the same shape.

    Raises:
      ValueError: there is no axis.

    Example:
      >>> import jax.numpy as jnp
      >>> standardize_logits(jnp.array([1.0, 5.0])).round(4)
      Array([-1.,  1.], dtype=float32)

    References:
      Sun et al., "Logit Standardization in Knowledge Distillation", 2024,
      https://arxiv.org/abs/2403.01427, algorithm 1. There the base temperature is 2 and the weight
      of the loss, T^2 included, is 9.
    """
    if logits.ndim == 0:
        raise ValueError("logits must have shape (..., classes), not ().")
    logits = widened(logits)
    centred = logits - jnp.mean(logits, axis=-1, keepdims=True)
    deviation = safe_norm(centred, keepdims=True) / logits.shape[-1] ** 0.5
    return centred / (deviation + epsilon)
