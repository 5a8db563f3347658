"""Deep mutual learning: students that teach each other, without a teacher."""

import jax
import jax.numpy as jnp
import optax

from jopt.distill._checks import Scalar, check_labels, check_positive, widened
from jopt.distill._divergences import log_distribution, relative_entropy


def mutual_loss(logits: jax.Array, labels: jax.Array, temperature: Scalar = 1.0) -> jax.Array:
    """Add each student's cross-entropy and its mean distance from all the other students.

    `cross_entropy(z_k, y) + T^2 / (K - 1) * sum over l != k of KL(p_l || p_k)`, the others' p_l
    taken as constants. All students step at once, where the paper updates one after the other.

    Args:
      logits: floats, (students, ..., classes), two students or more, such as of `jax.vmap` over
        `stack_params`.
      labels: whole numbers, (...), each in [0, classes).
      temperature: of the second part, positive.

    Returns:
      Floats of shape (students, ...): sum over students, and average over examples.

    Raises:
      ValueError: there are fewer than two students, the labels do not fit, a known label is no
        class, or a known temperature is not positive. A traced label that is no class makes its
        losses NaN.
      TypeError: the labels are not whole numbers.

    Example:
      >>> import jax.numpy as jnp
      >>> same = jnp.zeros((2, 1, 2))  # students that agree have only their cross-entropy
      >>> print(mutual_loss(same, jnp.array([1])).round(4))
      [[0.6931]
       [0.6931]]

    References:
      Zhang et al., "Deep Mutual Learning", 2018, https://arxiv.org/abs/1706.00384, equation 9.
    """
    if logits.ndim < 2 or logits.shape[0] < 2:
        raise ValueError(
            f"logits must have shape (2 or more students, ..., classes), not {logits.shape}."
        )
    check_labels(labels, logits.shape[1:-1], logits.shape[-1])
    check_positive("temperature", temperature)
    students = logits.shape[0]
    logits = widened(logits)
    log_probs = log_distribution(logits, temperature)
    others = jax.lax.stop_gradient(log_probs)
    # Row l, column k: KL(p_l || p_k); zero, with a gradient of zero, where l is k.
    pairs = relative_entropy(
        jnp.broadcast_to(others[:, None], (students, *log_probs.shape)),
        jnp.broadcast_to(log_probs[None], (students, *log_probs.shape)),
    )
    apart = jnp.sum(pairs, axis=0) / (students - 1)
    labels = jnp.broadcast_to(labels, (students, *labels.shape))
    hard = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return hard + temperature**2 * apart
