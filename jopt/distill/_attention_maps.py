"""Distillation from self-attention: a student attends to what its teacher attends to.

Losses are per sequence, the caller reduces, and no gradient flows into the teacher. Padded tokens
count neither as queries nor as keys.
"""

import math

import jax
import jax.numpy as jnp

from jopt.distill._checks import (
    check_mask,
    constant,
    masked_mean,
    paired,
    widened,
    zero_padding,
)
from jopt.distill._divergences import relative_entropy


def _paired_maps(
    student: jax.Array, teacher: jax.Array, mask: jax.Array | None, what: str
) -> tuple[jax.Array, jax.Array]:
    student, teacher = paired(student, teacher, what, least=4)
    batch, _, queries, keys = student.shape
    if mask is not None and queries != keys:
        raise ValueError(
            f"mask needs as many queries as keys, but {what} have {queries} and {keys}."
        )
    check_mask(mask, (batch, queries))
    return student, teacher


def _real_pairs(mask: jax.Array | None, shape: tuple[int, ...]) -> jax.Array | None:
    """Say of a query and a key in (batch, heads, queries, keys) whether both are real."""
    if mask is None:
        return None
    return jnp.broadcast_to(mask[:, None, :, None] & mask[:, None, None, :], shape)


def _keep_pairs(values: jax.Array, pairs: jax.Array | None, other: float) -> jax.Array:
    return values if pairs is None else jnp.where(pairs, values, other)


def _softmax_divergence(
    student_scores: jax.Array, teacher_scores: jax.Array, mask: jax.Array | None
) -> jax.Array:
    """Average KL(softmax(t) || softmax(s)) over heads and real queries, with real keys only."""
    pairs = _real_pairs(mask, student_scores.shape)
    # Half of the lowest number, so that no difference of two scores leaves the range of floats.
    lowest = float(jnp.finfo(student_scores.dtype).min) / 2
    log_student = jax.nn.log_softmax(_keep_pairs(student_scores, pairs, lowest), axis=-1)
    log_teacher = jax.nn.log_softmax(_keep_pairs(teacher_scores, pairs, lowest), axis=-1)
    rows = relative_entropy(log_teacher, log_student)
    return masked_mean(rows, None if mask is None else mask[:, None, :], (1, 2))


def attention_score_loss(
    student_scores: jax.Array, teacher_scores: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """Measure the mean squared error of attention scores before the softmax.

    `mean over heads and real (query, key) pairs of (s - t)^2`, s and t being `Q K^T / sqrt(d)`
    before any mask is added: a score of -inf makes the loss NaN. A sequence of padding only has
    loss zero. The authors' code sets scores below -100 to zero and counts padded pairs; here only
    real pairs count.

    Args:
      student_scores: floats, (batch, heads, queries, keys).
      teacher_scores: floats, the same shape; taken as constants.
      mask: booleans, (batch, tokens), True for a real token, which is both query and key; None if
        all are.

    Returns:
      Floats of shape (batch,), one loss for each sequence.

    Raises:
      ValueError: the shapes do not fit, or there is a mask and not as many queries as keys.
      TypeError: the mask is not booleans.

    Example:
      >>> import jax.numpy as jnp
      >>> student = jnp.array([[[[1.0, 3.0], [0.0, 0.0]]]])
      >>> attention_score_loss(student, jnp.zeros((1, 1, 2, 2)))
      Array([2.5], dtype=float32)

    References:
      Jiao, Yin, Shang, Jiang, Chen, Li, Wang, Liu, "TinyBERT: Distilling BERT for Natural Language
      Understanding", 2020, https://arxiv.org/abs/1909.10351, section 3.1, L_attn.
    """
    student, teacher = _paired_maps(student_scores, teacher_scores, mask, "scores")
    pairs = _real_pairs(mask, student.shape)
    squares = (_keep_pairs(student, pairs, 0.0) - _keep_pairs(teacher, pairs, 0.0)) ** 2
    return masked_mean(squares, pairs, (1, 2, 3))


def attention_distribution_loss(
    student_probs: jax.Array, teacher_probs: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """Measure the divergence of the student's attention probabilities from the teacher's.

    `mean over heads and real queries of sum_k t_k * log(t_k / s_k)`. Both are divided by their sums
    over real keys, which changes nothing where padded keys have probability zero already. A student
    at zero is taken as the least normal float, so the loss stays finite, and has no gradient there.
    A sequence of padding only has loss zero.

    Args:
      student_probs: floats >= 0, (batch, heads, queries, keys): after the softmax.
      teacher_probs: floats >= 0, the same shape; taken as constants.
      mask: booleans, (batch, tokens), True for a real token, which is both query and key; None if
        all are.

    Returns:
      Floats of shape (batch,), one loss for each sequence.

    Raises:
      ValueError: the shapes do not fit, or there is a mask and not as many queries as keys.
      TypeError: the mask is not booleans.

    Example:
      >>> import jax.numpy as jnp
      >>> student, teacher = jnp.array([[[[0.5, 0.5]]]]), jnp.array([[[[1.0, 0.0]]]])
      >>> attention_distribution_loss(student, teacher)  # 1 * log(1 / 0.5)
      Array([0.6931472], dtype=float32)

    References:
      Wang, Wei, Dong, Bao, Yang, Zhou, "MiniLM: Deep Self-Attention Distillation for Task-Agnostic
      Compression of Pre-Trained Transformers", 2020, https://arxiv.org/abs/2002.10957, section 3.1,
      L_AT.
    """
    student, teacher = _paired_maps(student_probs, teacher_probs, mask, "probs")
    pairs = _real_pairs(mask, student.shape)
    least = float(jnp.finfo(student.dtype).tiny)
    student = jnp.maximum(_keep_pairs(student, pairs, 1.0), least)
    teacher = jnp.maximum(_keep_pairs(teacher, pairs, 1.0), least)
    return _softmax_divergence(jnp.log(student), jnp.log(teacher), mask)


def _relation_scores(vectors: jax.Array, heads: int) -> jax.Array:
    """Multiply each token's vector with every token's, within each head, over sqrt(d_head)."""
    batch, tokens, width = vectors.shape
    split = vectors.reshape(batch, tokens, heads, width // heads)
    return jnp.einsum("bqhd,bkhd->bhqk", split, split) / math.sqrt(width // heads)


def relation_loss(
    student_vectors: jax.Array,
    teacher_vectors: jax.Array,
    heads: int,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Measure the divergence of the relations between a layer's tokens from the teacher's.

    `mean over heads and real queries of KL(R_t || R_s)` with `R = softmax(V V^T / sqrt(d_head))`,
    where V is one head's part of the vectors and the softmax runs over real keys. With values and
    the model's own heads this is MiniLM's value relation; with queries, keys and values in turn
    and more heads, whatever the models' own are, it is MiniLMv2. Relations have no width, so
    student and teacher may differ in theirs. A sequence of padding only has loss zero.

    Args:
      student_vectors: floats, (batch, tokens, student width): values, queries or keys of all heads
        joined.
      teacher_vectors: floats, (batch, tokens, teacher width); taken as constants.
      heads: number of relation heads, a divisor of both widths.
      mask: booleans, (batch, tokens), True for a real token; None if all are.

    Returns:
      Floats of shape (batch,), one loss for each sequence.

    Raises:
      ValueError: the shapes do not fit, or `heads` does not divide a width.
      TypeError: the mask is not booleans.

    Example:
      >>> import jax.numpy as jnp
      >>> teacher = jnp.zeros((1, 2, 4))  # every relation is 1/2
      >>> root = jnp.log(3.0) ** 0.5
      >>> student = jnp.array([[[root], [0.0]]])  # relations 3/4, 1/4 and 1/2, 1/2
      >>> relation_loss(student, teacher, heads=1).round(4)  # log(4/3) / 4
      Array([0.0719], dtype=float32)

    References:
      Wang, Wei, Dong, Bao, Yang, Zhou, "MiniLM: Deep Self-Attention Distillation for Task-Agnostic
      Compression of Pre-Trained Transformers", 2020, https://arxiv.org/abs/2002.10957, section 3.2,
      L_VR.
      Wang, Bao, Huang, Dong, Wei, "MiniLMv2: Multi-Head Self-Attention Relation Distillation for
      Compressing Pretrained Transformers", 2021, https://arxiv.org/abs/2012.15828, section 3.
    """
    if student_vectors.ndim != 3 or teacher_vectors.ndim != 3:
        raise ValueError(
            "student_vectors and teacher_vectors must have shape (batch, tokens, width), not "
            f"{student_vectors.shape} and {teacher_vectors.shape}."
        )
    if student_vectors.shape[:2] != teacher_vectors.shape[:2]:
        raise ValueError(
            "student_vectors and teacher_vectors must have the same batch and tokens, not "
            f"{student_vectors.shape[:2]} and {teacher_vectors.shape[:2]}."
        )
    for name, vectors in (("student", student_vectors), ("teacher", teacher_vectors)):
        if heads < 1 or vectors.shape[2] % heads:
            raise ValueError(
                f"heads must divide the {name}'s width {vectors.shape[2]}, but {heads} does not."
            )
    check_mask(mask, student_vectors.shape[:2])
    return _softmax_divergence(
        _relation_scores(zero_padding(widened(student_vectors), mask), heads),
        _relation_scores(zero_padding(constant(teacher_vectors), mask), heads),
        mask,
    )
