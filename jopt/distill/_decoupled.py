"""Decoupled distillation: the target class and the other classes weighted each for itself."""

import jax
import jax.numpy as jnp

from jopt.distill._checks import Scalar, check_labels, check_positive, paired
from jopt.distill._divergences import relative_entropy


def dkd_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    alpha: Scalar = 1.0,
    beta: Scalar = 8.0,
    temperature: Scalar = 4.0,
) -> jax.Array:
    """Weight how sure the teacher is of the label apart from how it ranks the other classes.

    `T^2 * (a KL(b_t || b_s) + b KL(r_t || r_s))`: b is the pair (probability of the label, all the
    rest), r the distribution over the other classes only. In `kd_loss` the second part is weighted
    by the teacher's doubt of the label, `1 - p_label`, so that a sure teacher teaches little of it;
    with `alpha = 1` and `beta = 1 - p_label` both losses are the same.

    Args:
      student_logits: floats, (..., classes), two classes or more.
      teacher_logits: floats, the same shape; taken as constants.
      labels: whole numbers, (...), each in [0, classes).
      alpha: weight of the target part.
      beta: weight of the other classes; the paper takes 1 to 8, more for surer teachers.
      temperature: positive; larger is softer.

    Returns:
      Floats of shape (...), one loss for each example, zero where the student agrees. The labels'
      own cross-entropy is not part of it.

    Raises:
      ValueError: the shapes do not fit, there is one class only, a known label is no class, or a
        known temperature is not positive. A traced label that is no class makes its loss NaN.
      TypeError: the labels are not whole numbers.

    Example:
      >>> import jax.numpy as jnp
      >>> teacher = jnp.log(jnp.array([[0.5, 0.25, 0.25]]))
      >>> student = jnp.log(jnp.array([[0.5, 0.375, 0.125]]))  # 0.5 log (2/3) + 0.5 log 2
      >>> print(dkd_loss(student, teacher, jnp.array([0]), beta=2.0, temperature=1.0).round(4))
      [0.2877]

    References:
      Zhao et al., "Decoupled Knowledge Distillation", 2022, https://arxiv.org/abs/2203.08679,
      equation 7.
    """
    both = paired(student_logits, teacher_logits, "logits")
    classes = student_logits.shape[-1]
    if classes < 2:
        raise ValueError(f"student_logits must have at least 2 classes, not {classes}.")
    check_labels(labels, student_logits.shape[:-1], classes)
    check_positive("temperature", temperature)
    is_target = jax.nn.one_hot(labels, classes, dtype=bool)
    student, teacher = (_split(logits / temperature, is_target) for logits in both)
    target, others = (relative_entropy(t, s) for t, s in zip(teacher, student, strict=True))
    losses = temperature**2 * (alpha * target + beta * others)
    return jnp.where(jnp.any(is_target, axis=-1), losses, jnp.nan)


def _split(logits: jax.Array, is_target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the log-distributions (target, rest) and over the rest, where the target has none."""
    lowest = float(jnp.finfo(logits.dtype).min) / 4  # no probability, and no NaN in differences
    logits = jnp.maximum(logits, lowest)
    own = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    rest = jax.nn.logsumexp(jnp.where(is_target, lowest, logits), axis=-1)
    binary = jax.nn.log_softmax(jnp.stack([own, rest], axis=-1), axis=-1)
    others = jnp.where(is_target, lowest, logits - rest[..., None])
    return binary, others
