"""Relational distillation: the student keeps the teacher's distances and angles between examples.

Losses are per example, the caller reduces (`.mean()`), and no gradient flows into the teacher.
"""

import jax
import jax.numpy as jnp
import optax

from jopt.distill._checks import paired_features, safe_norm, unit_vectors


def _differences(features: jax.Array) -> jax.Array:
    """Return `out[j, i] = x_i - x_j`; a difference loses less to rounding than a Gram matrix."""
    return features[None, :, :] - features[:, None, :]


@jax.custom_jvp
def _distances(features: jax.Array) -> jax.Array:
    """Return the distances of all pairs.

    Values are sums of squared differences, which a compiler fuses. Their derivative is taken from
    products of matrices, `(x_i - x_j) . (v_i - v_j) / d_ij`, multiplied out: of the differences
    themselves it would need a whole array of batch * batch * width.
    """
    return safe_norm(_differences(features))


@_distances.defjvp
def _distances_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (features,), (moves,) = primals, tangents
    distances = _distances(features)
    # Distances do not change with the origin, but rounding does.
    features = features - jax.lax.stop_gradient(jnp.mean(features, axis=0, keepdims=True))
    own = jnp.sum(features * moves, axis=-1)
    cross = jnp.matmul(features, moves.T, precision=jax.lax.Precision.HIGHEST)
    products = own[:, None] + own[None, :] - cross - cross.T
    apart = distances > 0
    return distances, jnp.where(apart, products / jnp.where(apart, distances, 1.0), 0.0)


def _relative_distances(features: jax.Array) -> jax.Array:
    """Return the distances of all pairs over their mean; where all examples coincide, zeros."""
    batch = features.shape[0]
    distances = _distances(features)
    mean = jnp.sum(distances) / (batch * (batch - 1))
    return distances / jnp.where(mean > 0, mean, 1.0)


def _cosines(features: jax.Array) -> jax.Array:
    """Return `out[j, i, k]`, the cosine of the angle at example j between examples i and k."""
    directions = unit_vectors(_differences(features))
    return jnp.einsum("jid,jkd->jik", directions, directions, precision=jax.lax.Precision.HIGHEST)


def rkd_distance_loss(student_features: jax.Array, teacher_features: jax.Array) -> jax.Array:
    """Compare the student's relative distances between examples with the teacher's.

    Row i: `mean over j != i of huber(|s_i - s_j| / mu_s - |t_i - t_j| / mu_t)`, delta 1, where mu
    is the mean distance over all ordered pairs of distinct places in the batch. Two identical
    examples are a pair with distance zero, and their gradient on each other is zero. With 2
    examples both relative distances are always one; so 3 are needed.

    The mean over the rows is the mean over the paper's pairs, `batch * (batch - 1)` of them. The
    authors' code also counts the pairs of an example with itself, which are zero: its value is
    this one times `(batch - 1) / batch`. The paper's weight for the loss is 25.

    Args:
      student_features: floats, (batch, ...); all axes after the first are flattened.
      teacher_features: floats, (batch, ...), of any width; taken as constants.

    Returns:
      Floats of shape (batch,), one loss for each example.

    Raises:
      ValueError: the numbers of examples differ, or there are fewer than 3.

    Example:
      >>> import jax.numpy as jnp
      >>> student = jnp.array([[0.0], [1.0], [3.0]])  # distances 1, 2, 3: over the mean 1/2, 1, 3/2
      >>> teacher = jnp.array(
      ...     [[0.0], [1.0], [2.0]]
      ... )  # distances 1, 1, 2: over the mean 3/4, 3/4, 3/2
      >>> rkd_distance_loss(student, teacher)
      Array([0.015625, 0.03125 , 0.015625], dtype=float32)

    References:
      Park, Kim, Lu, Cho, "Relational Knowledge Distillation", 2019,
      https://arxiv.org/abs/1904.05068, section 3.2.1.
    """
    student, teacher = paired_features(student_features, teacher_features, least=3)
    errors = optax.losses.huber_loss(_relative_distances(student), _relative_distances(teacher))
    return jnp.sum(errors, axis=1) / (errors.shape[0] - 1)


def rkd_angle_loss(student_features: jax.Array, teacher_features: jax.Array) -> jax.Array:
    """Compare the angles that examples form in the student's space with the teacher's.

    Row j: `mean over i != k, both != j, of huber(cos_s(i, j, k) - cos_t(i, j, k))`, delta 1, where
    `cos(i, j, k) = <(x_i - x_j) / |x_i - x_j|, (x_k - x_j) / |x_k - x_j|>` is the cosine of the
    angle at j. Where x_i = x_j the cosine is zero, and so is its gradient.

    The mean over the rows is the mean over the paper's triplets of distinct places in the batch,
    `batch * (batch - 1) * (batch - 2)` of them. The authors' code divides the sum by `batch^3`: its
    value is this one times `(batch - 1) * (batch - 2) / batch^2`, as long as no two examples are
    identical. The paper's weight for the loss is 50.

    Needs `batch^2 * width + batch^3` floats of memory for each network.

    Args:
      student_features: floats, (batch, ...); all axes after the first are flattened.
      teacher_features: floats, (batch, ...), of any width; taken as constants.

    Returns:
      Floats of shape (batch,), one loss for each example.

    Raises:
      ValueError: the numbers of examples differ, or there are fewer than 3.

    Example:
      >>> import jax.numpy as jnp
      >>> student = jnp.array(
      ...     [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
      ... )  # cosines 0, sqrt(1/2), sqrt(1/2)
      >>> teacher = jnp.array([[0.0], [1.0], [2.0]])  # on a line: cosines 1, -1, 1
      >>> [round(x, 4) for x in rkd_angle_loss(student, teacher).tolist()]
      [0.5, 1.2071, 0.0429]

    References:
      Park, Kim, Lu, Cho, "Relational Knowledge Distillation", 2019,
      https://arxiv.org/abs/1904.05068, section 3.2.2.
    """
    student, teacher = paired_features(student_features, teacher_features, least=3)
    batch = student.shape[0]
    errors = optax.losses.huber_loss(_cosines(student), _cosines(teacher))
    # Where i or k is j, both cosines are zero. Only i = k is left to take out.
    errors = jnp.where(jnp.eye(batch, dtype=bool)[None], 0.0, errors)
    return jnp.sum(errors, axis=(1, 2)) / ((batch - 1) * (batch - 2))
