"""Distillation from logits: a student learns the teacher's softened distribution.

Losses are per example, the caller reduces (`.mean()`), and no gradient flows into the teacher.
"""

import jax
import jax.numpy as jnp


def _check_logits(student_logits: jax.Array, teacher_logits: jax.Array) -> None:
    if student_logits.shape != teacher_logits.shape or student_logits.ndim == 0:
        raise ValueError(
            "student_logits and teacher_logits must have the same shape (..., classes), not "
            f"{student_logits.shape} and {teacher_logits.shape}."
        )


def soft_cross_entropy(
    student_logits: jax.Array, teacher_logits: jax.Array, temperature: float | jax.Array = 1.0
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
    _check_logits(student_logits, teacher_logits)
    if isinstance(temperature, (int, float)) and not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature!r}.")
    targets = jax.nn.softmax(jax.lax.stop_gradient(teacher_logits) / temperature, axis=-1)
    log_probs = jax.nn.log_softmax(student_logits / temperature, axis=-1)
    return -(temperature**2) * jnp.sum(targets * log_probs, axis=-1)


def distillation_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    temperature: float | jax.Array = 4.0,
    soft_weight: float | jax.Array = 0.9,
) -> jax.Array:
    """Mix the teacher's soft targets with the hard labels.

    `a * soft_cross_entropy(s, t, T) + (1 - a) * cross_entropy(s, y)`, `a = soft_weight`; the hard
    part has temperature 1.

    Args:
      student_logits: floats, (..., classes).
      teacher_logits: floats, the same shape; taken as constants.
      labels: whole numbers, (...), each in [0, classes).
      temperature: of the soft part, positive.
      soft_weight: weight of the soft part, 0 to 1.

    Returns:
      Floats of shape (...), one loss for each example.

    Raises:
      ValueError: the shapes do not fit, or a known `temperature` or `soft_weight` is out of range.
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
    if labels.shape != student_logits.shape[:-1]:
        raise ValueError(
            f"labels must have shape {student_logits.shape[:-1]}, one per example, "
            f"not {labels.shape}."
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be whole numbers, not {labels.dtype}.")
    if isinstance(soft_weight, (int, float)) and not 0 <= soft_weight <= 1:
        raise ValueError(f"soft_weight must lie in [0, 1], not {soft_weight!r}.")
    soft = soft_cross_entropy(student_logits, teacher_logits, temperature)
    log_probs = jax.nn.log_softmax(student_logits, axis=-1)
    hard = -jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0]
    return soft_weight * soft + (1 - soft_weight) * hard
