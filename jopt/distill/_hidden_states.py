"""Distillation from hidden states: a student layer learns what a teacher layer computes.

States are (batch, tokens, width). Losses are per sequence, the caller reduces, and no gradient
flows into the teacher. A student of another width projects its states first.
"""

import jax
import jax.numpy as jnp

from jopt.distill._checks import check_mask, masked_mean, paired, unit_vectors, zero_padding


def _real_states(
    student_states: jax.Array, teacher_states: jax.Array, mask: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Check the states and return both with zeros for padding, the teacher's as constants."""
    student, teacher = paired(student_states, teacher_states, "states", least=3)
    check_mask(mask, student.shape[:2])
    return zero_padding(student, mask), zero_padding(teacher, mask)


def hidden_state_loss(
    student_states: jax.Array, teacher_states: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """Measure the mean squared error of hidden states or of embeddings.

    `mean over real tokens and width of (s - t)^2`. TinyBERT's s is `H W`, projected by a learned W;
    here the caller projects. A sequence of padding only has loss zero. The authors' code averages
    over padded tokens as well; here they do not count.

    Args:
      student_states: floats, (batch, tokens, width).
      teacher_states: floats, the same shape; taken as constants.
      mask: booleans, (batch, tokens), True for a real token; None if all are.

    Returns:
      Floats of shape (batch,), one loss for each sequence.

    Raises:
      ValueError: the shapes do not fit.
      TypeError: the mask is not booleans.

    Example:
      >>> import jax.numpy as jnp
      >>> student = jnp.array([[[1.0, 3.0], [9.0, 9.0]]])
      >>> teacher = jnp.array([[[1.0, 1.0], [0.0, 0.0]]])
      >>> hidden_state_loss(student, teacher, jnp.array([[True, False]]))
      Array([2.], dtype=float32)

    References:
      Jiao, Yin, Shang, Jiang, Chen, Li, Wang, Liu, "TinyBERT: Distilling BERT for Natural Language
      Understanding", 2020, https://arxiv.org/abs/1909.10351, section 3.1, L_hidn and L_embd.
    """
    student, teacher = _real_states(student_states, teacher_states, mask)
    return masked_mean(jnp.mean((student - teacher) ** 2, axis=-1), mask, (1,))


def normalized_state_loss(
    student_states: jax.Array, teacher_states: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """Measure the squared distance of hidden states scaled to length one.

    `mean over real tokens of || s / ||s|| - t / ||t|| ||^2`, 0 to 4: only the direction of a state
    counts. A state of zeros has no direction: it stays zero and gets no gradient. The paper takes
    the states of the first token, [CLS], alone, and sums over layers: pass `states[:, :1]` of each
    layer and add.

    Args:
      student_states: floats, (batch, tokens, width).
      teacher_states: floats, the same shape; taken as constants.
      mask: booleans, (batch, tokens), True for a real token; None if all are.

    Returns:
      Floats of shape (batch,), one loss for each sequence.

    Raises:
      ValueError: the shapes do not fit.
      TypeError: the mask is not booleans.

    Example:
      >>> import jax.numpy as jnp
      >>> normalized_state_loss(jnp.array([[[5.0, 0.0]]]), jnp.array([[[0.0, 7.0]]]))
      Array([2.], dtype=float32)

    References:
      Sun, Cheng, Gan, Liu, "Patient Knowledge Distillation for BERT Model Compression", 2019,
      https://arxiv.org/abs/1908.09355, section 3.2, L_PT.
    """
    student, teacher = _real_states(student_states, teacher_states, mask)
    squares = (unit_vectors(student) - unit_vectors(teacher)) ** 2
    return masked_mean(jnp.sum(squares, axis=-1), mask, (1,))


def cosine_loss(
    student_states: jax.Array, teacher_states: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """Measure one minus the cosine of the angle between hidden states.

    `mean over real tokens of 1 - s . t / (||s|| ||t||)`, 0 to 2. This is half the squared distance
    of the states scaled to length one, and is computed so: states that agree cost exactly zero. A
    state of zeros costs 1/2 against a teacher's state and nothing against zeros.

    Args:
      student_states: floats, (batch, tokens, width).
      teacher_states: floats, the same shape; taken as constants.
      mask: booleans, (batch, tokens), True for a real token; None if all are.

    Returns:
      Floats of shape (batch,), one loss for each sequence.

    Raises:
      ValueError: the shapes do not fit.
      TypeError: the mask is not booleans.

    Example:
      >>> import jax.numpy as jnp
      >>> cosine_loss(jnp.array([[[5.0, 0.0]]]), jnp.array([[[0.0, 7.0]]]))
      Array([1.], dtype=float32)

    References:
      Sanh, Debut, Chaumond, Wolf, "DistilBERT, a distilled version of BERT: smaller, faster,
      cheaper and lighter", 2019, https://arxiv.org/abs/1910.01108, section 2.
    """
    return 0.5 * normalized_state_loss(student_states, teacher_states, mask)
