"""Divergences between the teacher's and the student's softened distributions.

Losses are per example, the caller reduces (`.mean()`), and no gradient flows into the teacher. All
are zero, with a gradient of zero, where the student agrees with the teacher, and all carry the
factor T^2 of Hinton et al., which keeps the size of the gradient the same for every temperature.
Classes with a logit of -inf have probability zero and do not count.
"""

import jax
import jax.numpy as jnp

from jopt.distill._checks import Scalar, check_number, check_positive, paired, widened


def log_distribution(logits: jax.Array, temperature: Scalar = 1.0) -> jax.Array:
    """Return `log softmax(z / T)` over the last axis, in float32 or wider and finite.

    A logit of -inf, which forbids a class, is taken as a very low one: its probability is zero all
    the same, and differences of two of them are numbers.
    """
    scaled = widened(logits) / temperature
    lowest = float(jnp.finfo(scaled.dtype).min) / 4
    return jax.nn.log_softmax(jnp.maximum(scaled, lowest), axis=-1)


def softened(
    student_logits: jax.Array, teacher_logits: jax.Array, temperature: Scalar
) -> tuple[jax.Array, jax.Array]:
    """Return both log-distributions at a temperature; the teacher's is a constant.

    Args:
      student_logits: floats, (..., classes).
      teacher_logits: floats, the same shape.
      temperature: positive; larger is softer.

    Raises:
      ValueError: the shapes differ, or a temperature known at trace time is not positive.
    """
    student, teacher = paired(student_logits, teacher_logits, "logits")
    check_positive("temperature", temperature)
    return log_distribution(student, temperature), log_distribution(teacher, temperature)


def relative_entropy(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """Return `sum_i p_i (log p_i - log q_i)` over the last axis; where p is zero, it adds zero."""
    p = jnp.exp(log_p)
    return jnp.sum(p * jnp.where(p > 0, log_p - log_q, 0.0), axis=-1)


def kd_loss(
    student_logits: jax.Array, teacher_logits: jax.Array, temperature: Scalar = 4.0
) -> jax.Array:
    """Measure how far the student's softened distribution is from the teacher's.

    `T^2 * sum_i p_i (log p_i - log q_i)`, `p = softmax(t / T)`, `q = softmax(s / T)`: the forward
    divergence KL(teacher || student), which makes the student cover all that the teacher allows. It
    is `soft_cross_entropy` less the entropy of the teacher, so that agreement costs nothing; the
    gradients of both are the same.

    Args:
      student_logits: floats, (..., classes).
      teacher_logits: floats, the same shape; taken as constants.
      temperature: positive; larger is softer.

    Returns:
      Floats of shape (...), one loss for each example, at least zero up to rounding.

    Raises:
      ValueError: the shapes differ, or a temperature known at trace time is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> teacher = jnp.log(jnp.array([[0.75, 0.25]]))  # 0.75 log 1.5 + 0.25 log 0.5
      >>> print(kd_loss(jnp.zeros((1, 2)), teacher, temperature=1.0).round(4))
      [0.1308]

    References:
      Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015,
      https://arxiv.org/abs/1503.02531, section 2.
    """
    log_student, log_teacher = softened(student_logits, teacher_logits, temperature)
    return temperature**2 * relative_entropy(log_teacher, log_student)


def reverse_kd_loss(
    student_logits: jax.Array, teacher_logits: jax.Array, temperature: Scalar = 1.0
) -> jax.Array:
    """Measure the reverse divergence: what the student says that the teacher would not.

    `T^2 * sum_i q_i (log q_i - log p_i)`, KL(student || teacher). It lets a student too small for
    the whole distribution keep to the teacher's main answers.

    Args:
      student_logits: floats, (..., classes).
      teacher_logits: floats, the same shape; taken as constants.
      temperature: positive; larger is softer.

    Returns:
      Floats of shape (...), one loss for each example, at least zero up to rounding.

    Raises:
      ValueError: the shapes differ, or a temperature known at trace time is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> teacher = jnp.log(jnp.array([[0.75, 0.25]]))  # 0.5 log (2/3) + 0.5 log 2
      >>> round(reverse_kd_loss(jnp.zeros((1, 2)), teacher).item(), 4)
      0.1438

    References:
      Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models", 2023,
      https://arxiv.org/abs/2306.08543, section 2.
    """
    log_student, log_teacher = softened(student_logits, teacher_logits, temperature)
    return temperature**2 * relative_entropy(log_student, log_teacher)


def jensen_shannon_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    beta: Scalar = 0.5,
    temperature: Scalar = 1.0,
) -> jax.Array:
    """Measure the generalised Jensen-Shannon divergence of GKD.

    `T^2 * (b KL(p || m) + (1 - b) KL(q || m))`, `m = b p + (1 - b) q`, with p the teacher's and q
    the student's distribution. It is bounded. Divided by b it tends to the forward divergence as b
    falls to 0, and divided by 1 - b to the reverse one as b rises to 1; at 0 and 1 themselves it is
    zero everywhere, so neither is allowed: use `kd_loss` and `reverse_kd_loss` there.

    Args:
      student_logits: floats, (..., classes).
      teacher_logits: floats, the same shape; taken as constants.
      beta: weight of the teacher in the mixture, between 0 and 1.
      temperature: positive; larger is softer.

    Returns:
      Floats of shape (...), one loss for each example, at least zero up to rounding.

    Raises:
      ValueError: the shapes differ, or a `beta` or `temperature` known at trace time is out of
        range.

    Example:
      >>> import jax.numpy as jnp
      >>> sure = jnp.array([[50.0, 0.0]])  # against the opposite answer: log 2
      >>> print(jensen_shannon_loss(sure, sure[:, ::-1]).round(4))
      [0.6931]

    References:
      Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated
      Mistakes", 2024, https://arxiv.org/abs/2306.13649, section 3.
    """
    rule = "lie between 0 and 1, with kd_loss and reverse_kd_loss for the ends"
    check_number("beta", beta, rule, lambda known: (known > 0) & (known < 1))
    log_student, log_teacher = softened(student_logits, teacher_logits, temperature)
    mixture = jnp.logaddexp(log_teacher + jnp.log(beta), log_student + jnp.log1p(-beta))
    forward = relative_entropy(log_teacher, mixture)
    backward = relative_entropy(log_student, mixture)
    return temperature**2 * (beta * forward + (1 - beta) * backward)
