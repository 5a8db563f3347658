"""Distillation of similarities: what is alike for the teacher shall be alike for the student.

Each loss compares two (batch, batch) matrices of similarities between the examples, so the student
and the teacher may have features of different widths. Losses are per example, the caller reduces
(`.mean()`), and no gradient flows into the teacher.
"""

import jax
import jax.numpy as jnp

from jopt.distill._checks import Scalar, check_positive, paired_features, unit_vectors
from jopt.distill._divergences import relative_entropy

_LEAST_KERNEL = 1e-7  # of float32's rounding of (cosine + 1) / 2


def _gram(rows: jax.Array) -> jax.Array:
    return jnp.matmul(rows, rows.T, precision=jax.lax.Precision.HIGHEST)


def similarity_preserving_loss(
    student_features: jax.Array, teacher_features: jax.Array
) -> jax.Array:
    """Compare the directions of the rows of the two Gram matrices.

    Row i: `1/b * sum_j (G_t[i, j] - G_s[i, j])^2` with `G[i] = (X X^T)[i] / |(X X^T)[i]|` and b
    examples. The mean over the rows is the paper's `1/b^2 * |G_t - G_s|_F^2`. A row of zeros stays
    one, and its gradient is zero. One example has always the Gram matrix 1; so 2 are needed.

    Args:
      student_features: floats, (batch, ...); all axes after the first are flattened.
      teacher_features: floats, (batch, ...), of any width; taken as constants.

    Returns:
      Floats of shape (batch,), one loss for each example.

    Raises:
      ValueError: the numbers of examples differ, or there are fewer than 2.

    Example:
      >>> import jax.numpy as jnp
      >>> student = jnp.array([[2.0], [2.0]])  # G is sqrt(1/2) everywhere
      >>> teacher = jnp.eye(2)  # G is the identity
      >>> losses = similarity_preserving_loss(student, teacher)
      >>> [round(x, 4) for x in losses.tolist()]  # 1 - sqrt(1/2)
      [0.2929, 0.2929]

    References:
      Tung, Mori, "Similarity-Preserving Knowledge Distillation", 2019,
      https://arxiv.org/abs/1907.09682, equations 1 to 4.
    """
    student, teacher = paired_features(student_features, teacher_features, least=2)
    difference = unit_vectors(_gram(student)) - unit_vectors(_gram(teacher))
    return jnp.mean(difference**2, axis=1)


def _gaussian_kernel(features: jax.Array, gamma: Scalar) -> jax.Array:
    """Return `exp(-gamma * |x_i - x_j|^2)` of the features scaled to length one."""
    products = _gram(unit_vectors(features))
    squares = jnp.diagonal(products)  # ones, but zeros for vectors of zeros
    return jnp.exp(-gamma * (squares[:, None] + squares[None, :] - 2 * products))


def correlation_congruence_loss(
    student_features: jax.Array, teacher_features: jax.Array, gamma: Scalar = 0.4
) -> jax.Array:
    """Compare the two matrices of Gaussian similarities between the examples.

    Row i: `1/b * sum_j (C_s[i, j] - C_t[i, j])^2` with `C[i, j] = exp(-gamma * |x_i - x_j|^2)`, b
    examples and x scaled to length one. The mean over the rows is the paper's
    `1/b^2 * |C_s - C_t|^2`. A vector of zeros stays one, and its gradient is zero. One example has
    always the matrix 1; so 2 are needed.

    The paper replaces the kernel by its Taylor series `exp(-2 gamma) * sum_p (2 gamma)^p / p! *
    <x_i, x_j>^p` up to p = 2. Here it is exact. It is the paper's loss of congruence alone: the
    authors add it to those of the labels and logits.

    Args:
      student_features: floats, (batch, ...); all axes after the first are flattened.
      teacher_features: floats, (batch, ...), of any width; taken as constants.
      gamma: positive; larger sees only closer examples. The paper's is 0.4.

    Returns:
      Floats of shape (batch,), one loss for each example.

    Raises:
      ValueError: the numbers of examples differ, or there are fewer than 2, or a `gamma` known at
        trace time is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> student = jnp.array([[3.0], [3.0]])  # C is 1 everywhere
      >>> teacher = jnp.eye(2)  # |x_0 - x_1|^2 = 2, so C is 1 / e off the diagonal
      >>> losses = correlation_congruence_loss(student, teacher, gamma=0.5)
      >>> [round(x, 4) for x in losses.tolist()]  # (1 - 1 / e)^2 / 2
      [0.1998, 0.1998]

    References:
      Peng, Jin, Liu, Li, Wu, Liu, Zhou, Zhang, "Correlation Congruence for Knowledge
      Distillation", 2019, https://arxiv.org/abs/1904.01802, section 3.
    """
    check_positive("gamma", gamma)
    student, teacher = paired_features(student_features, teacher_features, least=2)
    difference = _gaussian_kernel(student, gamma) - _gaussian_kernel(teacher, gamma)
    return jnp.mean(difference**2, axis=1)


def _log_neighbours(features: jax.Array) -> jax.Array:
    """Return the log of each example's distribution over the others, (batch, batch - 1)."""
    batch = features.shape[0]
    others = (jnp.arange(batch)[:, None] + jnp.arange(1, batch)[None, :]) % batch
    cosines = jnp.take_along_axis(_gram(unit_vectors(features)), others, axis=1)
    return jax.nn.log_softmax(jnp.log(jnp.maximum((cosines + 1) / 2, _LEAST_KERNEL)), axis=1)


def pkt_loss(student_features: jax.Array, teacher_features: jax.Array) -> jax.Array:
    """Compare each example's distribution over its neighbours with the teacher's.

    Row i: `sum over j != i of p_t(j | i) * log(p_t(j | i) / p_s(j | i))` with `p(j | i) = K(i, j) /
    sum over k != i of K(i, k)` and the kernel `K = (cosine + 1) / 2`. Kernels are at least 1e-7, so
    opposite examples give a finite loss; a vector of zeros has the cosine zero with all, and its
    gradient is zero. With 2 examples both probabilities are always one; so 3 are needed.

    An example is no neighbour of its own, as in the paper. The authors' code counts it as one, and
    averages over all `batch^2` pairs, where here a row is a sum and the caller averages the rows:
    its values are smaller, about by the factor `1 / batch`. It adds the 1e-7 inside the logarithm,
    which leaves a small gradient where student and teacher agree.

    Args:
      student_features: floats, (batch, ...); all axes after the first are flattened.
      teacher_features: floats, (batch, ...), of any width; taken as constants.

    Returns:
      Floats of shape (batch,), one loss for each example.

    Raises:
      ValueError: the numbers of examples differ, or there are fewer than 3.

    Example:
      >>> import jax.numpy as jnp
      >>> student = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
      >>> teacher = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
      >>> [round(x, 4) for x in pkt_loss(student, teacher).tolist()]  # the second is log(2) / 3
      [0.0566, 0.231, 0.0589]

    References:
      Passalis, Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", 2018,
      https://arxiv.org/abs/1803.10837, section 3.
    """
    student, teacher = paired_features(student_features, teacher_features, least=3)
    return relative_entropy(_log_neighbours(teacher), _log_neighbours(student))
