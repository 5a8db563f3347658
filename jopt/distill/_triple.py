"""DistilBERT's loss: soft targets, masked words and the direction of the last hidden states."""

import jax
import jax.numpy as jnp
import optax

from jopt.distill._checks import (
    Scalar,
    check_labels,
    check_mask,
    masked_mean,
    paired,
    zero_padding,
)
from jopt.distill._divergences import kd_loss
from jopt.distill._hidden_states import cosine_loss


def _masked_word_loss(logits: jax.Array, labels: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Average the cross-entropy of labels over the real tokens that have one."""
    labelled = labels >= 0 if mask is None else (labels >= 0) & mask
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    return masked_mean(losses, labelled, (1,))


def triple_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    student_states: jax.Array,
    teacher_states: jax.Array,
    mask: jax.Array | None = None,
    temperature: Scalar = 2.0,
    weights: tuple[Scalar, Scalar, Scalar] = (5.0, 2.0, 1.0),
) -> jax.Array:
    """Add up what DistilBERT learns from: soft targets, masked words and hidden states.

    `a * T^2 KL(teacher || student) + b * cross_entropy(s, label) + c * (1 - cos)`, `(a, b, c)`
    being `weights`. Each part is a mean over the real tokens of a sequence, the second over those
    that have a label; a sequence without a label has none of the second part, and one with labels
    is taught by them even where student and teacher agree: the loss is not zero there. The authors
    average over the tokens of the whole batch, so long sequences weigh more there. The paper does
    not give the weights: the defaults are those of the training command in the README of the
    authors' code.

    Args:
      student_logits: floats, (batch, tokens, vocabulary).
      teacher_logits: floats, the same shape; taken as constants.
      labels: whole numbers, (batch, tokens): the word that was masked, or any negative number,
        such as -100, where none was.
      student_states: floats, (batch, tokens, width), of the last layer.
      teacher_states: floats, the same shape; taken as constants.
      mask: booleans, (batch, tokens), True for a real token; None if all are.
      temperature: of the soft targets, positive.
      weights: of the soft targets, the masked words and the hidden states.

    Returns:
      Floats of shape (batch,), one loss for each sequence.

    Raises:
      ValueError: the shapes do not fit, there are not three weights, a known label is no word, or a
        known temperature is not positive.
      TypeError: the labels are not whole numbers, or the mask is not booleans.

    Example:
      >>> import jax.numpy as jnp
      >>> logits, states = jnp.zeros((1, 2, 2)), jnp.ones((1, 2, 3))
      >>> triple_loss(logits, logits, jnp.array([[1, -100]]), states, states)  # 2 * log 2
      Array([1.3862944], dtype=float32)

    References:
      Sanh, Debut, Chaumond, Wolf, "DistilBERT, a distilled version of BERT: smaller, faster,
      cheaper and lighter", 2019, https://arxiv.org/abs/1910.01108, section 2.
      The authors' code, `--alpha_ce 5.0 --alpha_mlm 2.0 --alpha_cos 1.0`, temperature 2, in
      huggingface/transformers, examples/research_projects/distillation/README.md and train.py.
    """
    student_logits, teacher_logits = paired(student_logits, teacher_logits, "logits", least=3)
    tokens, vocabulary = student_logits.shape[:2], student_logits.shape[2]
    check_labels(labels, tokens, vocabulary, negative=True)
    check_mask(mask, tokens)
    if student_states.shape[:2] != tokens:
        raise ValueError(
            f"student_states must have batch and tokens {tokens} like the logits, not "
            f"{student_states.shape[:2]}."
        )
    if len(weights) != 3:
        raise ValueError(f"weights must be three, for soft, hard and cosine, not {len(weights)}.")
    soft_weight, hard_weight, cosine_weight = weights
    student_logits = zero_padding(student_logits, mask)
    teacher_logits = zero_padding(teacher_logits, mask)
    soft = masked_mean(kd_loss(student_logits, teacher_logits, temperature), mask, (1,))
    hard = _masked_word_loss(student_logits, labels, mask)
    cosine = cosine_loss(student_states, teacher_states, mask)
    return soft_weight * soft + hard_weight * hard + cosine_weight * cosine
