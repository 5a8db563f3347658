"""Distillation from logits: a student learns the teacher's softened distribution.

Losses are per example, the caller reduces (`.mean()`), and no gradient flows into the teacher.
"""

import jax
import jax.numpy as jnp
import optax

from jopt.distill._checks import Scalar, check_fraction, check_labels, widened
from jopt.distill._divergences import softened


def soft_cross_entropy(
    student_logits: jax.Array, teacher_logits: jax.Array, temperature: Scalar = 1.0
) -> jax.Array:
    """Measure the cross-entropy of the student's softened distribution under the teacher's.

    `T^2 * sum_i -softmax(t / T)_i * log softmax(s / T)_i`. The factor T^2 is included: it keeps the
    size of the gradient the same for every temperature. The least value is the entropy of the
    teacher's distribution, times T^2; the gradient there is zero.

    Args:
      student_logits: floats, (..., classes).
      teacher_logits: floats, the same shape; taken as constants.
      temperature: positive; larger is softer.

    Returns:
      Floats of shape (...), one loss for each example.

    Raises:
      ValueError: the shapes differ, or a temperature known at trace time is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> soft_cross_entropy(jnp.array([[0.0, 0.0]]), jnp.array([[5.0, -5.0]]), 1.0)
      Array([0.6931472], dtype=float32)

    References:
      Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015,
      https://arxiv.org/abs/1503.02531, section 2.
    """
    log_probs, log_targets = softened(student_logits, teacher_logits, temperature)
    targets = jnp.exp(log_targets)
    return -(temperature**2) * jnp.sum(targets * jnp.where(targets > 0, log_probs, 0.0), axis=-1)


def distillation_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    temperature: Scalar = 4.0,
    soft_weight: Scalar = 0.9,
) -> jax.Array:
    """Mix the teacher's soft targets with the hard labels.

    `a * soft_cross_entropy(s, t, T) + (1 - a) * cross_entropy(s, y)`, `a = soft_weight`; the hard
    part has temperature 1. Where student and teacher agree the hard part still teaches: neither
    the loss nor its gradient is zero there.

    Args:
      student_logits: floats, (..., classes).
      teacher_logits: floats, the same shape; taken as constants.
      labels: whole numbers, (...), each in [0, classes).
      temperature: of the soft part, positive.
      soft_weight: weight of the soft part, 0 to 1.

    Returns:
      Floats of shape (...), one loss for each example.

    Raises:
      ValueError: the shapes do not fit, or a known `temperature`, `soft_weight` or label is out of
        range. A traced label that is no class makes its loss NaN.
      TypeError: the labels are not whole numbers.

    Example:
      >>> import jax.numpy as jnp
      >>> logits = jnp.zeros((1, 2))
      >>> distillation_loss(logits, logits, jnp.array([1]), temperature=1.0, soft_weight=0.5)
      Array([0.6931472], dtype=float32)

    References:
      Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015,
      https://arxiv.org/abs/1503.02531, section 2.
    """
    check_labels(labels, student_logits.shape[:-1], student_logits.shape[-1])
    check_fraction("soft_weight", soft_weight)
    soft = soft_cross_entropy(student_logits, teacher_logits, temperature)
    hard = optax.softmax_cross_entropy_with_integer_labels(widened(student_logits), labels)
    return soft_weight * soft + (1 - soft_weight) * hard
