"""DIST: the student keeps the relations of the teacher's predictions, not their values."""

import jax
import jax.numpy as jnp

from jopt.distill._checks import Scalar, check_positive, paired, unit_vectors


def dist_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    beta: Scalar = 1.0,
    gamma: Scalar = 1.0,
    temperature: Scalar = 1.0,
) -> jax.Array:
    """Ask for predictions that correlate with the teacher's, over classes and over examples.

    `T^2 * (b (1 - corr of rows) + g mean over classes (1 - corr of columns))` of the softened
    probabilities, (examples, classes), with Pearson's correlation: between classes within one
    example, and between the examples of the batch within one class. Where the teacher's row or
    column is constant it relates nothing, and that part is zero; where the student's alone is, the
    correlation is zero and the part is one. In a batch of one example all columns are constant.

    Args:
      student_logits: floats, (examples, classes).
      teacher_logits: floats, the same shape; taken as constants.
      beta: weight of the part within examples.
      gamma: weight of the part within classes.
      temperature: positive; larger is softer.

    Returns:
      Floats of shape (examples,). The part within classes is the same for all of a batch, so that
      the mean is the paper's loss; zero where the student agrees.

    Raises:
      ValueError: the shapes differ or have not two axes, or a temperature known at trace time is
        not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> teacher = jnp.array([[2.0, 0.0], [0.0, 2.0]])
      >>> dist_loss(3 * teacher, teacher).round(4) + 0.0  # all relations are the teacher's
      Array([0., 0.], dtype=float32)
      >>> dist_loss(-teacher, teacher).round(4)
      Array([4., 4.], dtype=float32)

    References:
      Huang et al., "Knowledge Distillation from A Stronger Teacher", 2022,
      https://arxiv.org/abs/2205.10536, section 4. T^2 is the authors' code's.
    """
    student_logits, teacher_logits = paired(student_logits, teacher_logits, "logits", least=2)
    if student_logits.ndim != 2:
        raise ValueError(
            f"student_logits must have shape (examples, classes), not {student_logits.shape}."
        )
    check_positive("temperature", temperature)
    student, teacher = (
        jax.nn.softmax(logits / temperature, axis=-1) for logits in (student_logits, teacher_logits)
    )
    within_examples = _unrelated(student, teacher, 1)
    within_classes = jnp.mean(_unrelated(student, teacher, 0))
    return temperature**2 * (beta * within_examples + gamma * within_classes)


def _unrelated(student: jax.Array, teacher: jax.Array, axis: int) -> jax.Array:
    """Return one minus the correlation along an axis, zero where the teacher is constant.

    It is half the squared distance of the directions, exactly zero where both are the same.
    """
    ours, theirs = (_direction(values, axis) for values in (student, teacher))
    apart = 0.5 * jnp.sum((ours - theirs) ** 2, axis=axis)
    lengths = [jnp.sum(each**2, axis=axis) for each in (ours, theirs)]
    apart = jnp.where(lengths[0] > 0, apart, 1.0)
    return jnp.where(lengths[1] > 0, apart, 0.0)


def _direction(values: jax.Array, axis: int) -> jax.Array:
    """Return the unit vectors of what differs from the mean, zeros where that is rounding."""
    centred = values - jnp.mean(values, axis=axis, keepdims=True)
    spread, size = (jnp.max(jnp.abs(each), axis=axis, keepdims=True) for each in (centred, values))
    rounding = 2 * float(jnp.finfo(values.dtype).eps) * size
    return unit_vectors(jnp.where(spread > rounding, centred, 0.0), axis)
