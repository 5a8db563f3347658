"""Distillation of language models: word by word, on given sequences or on the student's own."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jopt.distill._checks import (
    Scalar,
    check_fraction,
    check_mask,
    check_positive,
    check_whole,
    masked_mean,
    paired,
    zero_padding,
)
from jopt.distill._divergences import kd_loss


def token_mean(losses: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Average the losses of each sequence's real tokens.

    `sum(losses * mask) / sum(mask)` over tokens; zero where no token is real. The loss of a padded
    token never counts, but where it is NaN the gradient of what made it may be NaN too: compute it
    from finite numbers.

    Args:
      losses: floats, (batch, tokens).
      mask: booleans, (batch, tokens), True for a real token; None if all are.

    Returns:
      Floats of shape (batch,), one mean for each sequence.

    Raises:
      ValueError: the shapes do not fit.
      TypeError: the mask is not booleans.

    Example:
      >>> import jax.numpy as jnp
      >>> losses = jnp.array([[1.0, 3.0, 8.0], [5.0, 0.0, 0.0]])
      >>> token_mean(losses, jnp.array([[True, True, False], [True, False, False]]))
      Array([2., 5.], dtype=float32)
    """
    if losses.ndim != 2:
        raise ValueError(f"losses must have shape (batch, tokens), not {losses.shape}.")
    check_mask(mask, losses.shape)
    return masked_mean(losses, mask, (1,))


def word_level_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    mask: jax.Array | None = None,
    temperature: Scalar = 1.0,
    divergence: Callable[..., jax.Array] = kd_loss,
) -> jax.Array:
    """Measure how far the student's distribution of each next word is from the teacher's.

    `mean over real tokens of divergence(s, t, temperature=T)`; by default
    `T^2 KL(teacher || student)`. Kim and Rush take the cross-entropy at temperature 1, summed over
    words: the same gradient up to the number of words, since KL is the cross-entropy less the
    teacher's entropy, which is constant.
    Logits at position i speak of word i + 1, so a mask of words is shifted by one.

    Args:
      student_logits: floats, (batch, tokens, vocabulary).
      teacher_logits: floats, the same shape; taken as constants.
      mask: booleans, (batch, tokens), True where the word that is predicted counts; None if all do.
      temperature: handed to `divergence`.
      divergence: a function of student logits, teacher logits and `temperature`, by that name, that
        gives a loss for each position, finite for logits of zero: `kd_loss`, `reverse_kd_loss`,
        `jensen_shannon_loss` (a `partial` of it for another beta) or another of their kind.

    Returns:
      Floats of shape (batch,), one loss for each sequence.

    Raises:
      ValueError: the shapes do not fit.
      TypeError: the mask is not booleans.

    Example:
      >>> import jax.numpy as jnp
      >>> student = jnp.zeros((1, 2, 2))
      >>> teacher = jnp.log(jnp.array([[[3.0, 1.0], [1.0, 0.1]]]))
      >>> word_level_loss(student, teacher, jnp.array([[True, False]])).round(4)
      Array([0.1308], dtype=float32)

    References:
      Kim, Rush, "Sequence-Level Knowledge Distillation", 2016, https://arxiv.org/abs/1606.07947,
      section 3.1.
    """
    student, teacher = paired(student_logits, teacher_logits, "logits", least=3)
    check_mask(mask, student.shape[:2])
    student, teacher = zero_padding(student, mask), zero_padding(teacher, mask)
    return token_mean(divergence(student, teacher, temperature=temperature), mask)


def sample_tokens(
    key: jax.Array,
    logits_fn: Callable[[jax.Array], jax.Array],
    prompt: jax.Array,
    length: int,
    temperature: Scalar = 1.0,
) -> jax.Array:
    """Let a causal language model continue its prompts.

    `x_i ~ softmax(logits_fn(x)[i - 1] / T)` for i from the prompt's end on. Every step runs the
    model on the full length, tokens from i on being zeros that stand for padding: they must not
    matter to position i - 1, as in every causal model. There is no cache, so the work is `length`
    forward passes; and no end token: what follows one is for the caller to mask. No gradient flows
    through the draws. Call it inside a jitted training step: the loop is compiled anew for each
    new `logits_fn`.

    Args:
      key: a random key.
      logits_fn: from tokens, (batch, total), to logits, (batch, total, vocabulary).
      prompt: whole numbers, (batch, prompt tokens), at least one token.
      length: number of tokens to draw, at least 1.
      temperature: positive; below 1 is closer to the likeliest token, above 1 to chance.

    Returns:
      Whole numbers of the prompt's dtype, (batch, prompt tokens + length): prompt and continuation.

    Raises:
      ValueError: a shape does not fit, `length` is below 1, or a temperature known at trace time is
        not positive.
      TypeError: the prompt is not whole numbers.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> def count(tokens):  # is sure that n + 1 follows n
      ...     return 100 * jax.nn.one_hot(tokens + 1, 10)
      >>> sample_tokens(jax.random.key(0), count, jnp.array([[3], [5]]), length=3)
      Array([[3, 4, 5, 6], [5, 6, 7, 8]], dtype=int32)

    References:
      Agarwal, Vieillard, Zhou, Stanczyk, Ramos, Geist, Bachem, "On-Policy Distillation of Language
      Models: Learning from Self-Generated Mistakes", 2024, https://arxiv.org/abs/2306.13649,
      section 3.
    """
    if prompt.ndim != 2 or prompt.shape[1] < 1:
        raise ValueError(f"prompt must have shape (batch, at least 1), not {prompt.shape}.")
    check_whole("prompt", prompt)
    if length < 1:
        raise ValueError(f"length must be at least 1, not {length}.")
    check_positive("temperature", temperature)

    def draw(position: jax.Array, tokens: jax.Array) -> jax.Array:
        logits = jax.lax.stop_gradient(logits_fn(tokens))
        if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
            raise ValueError(
                f"logits_fn must return shape {(*tokens.shape, 'vocabulary')}, not {logits.shape}."
            )
        last = jax.lax.dynamic_index_in_dim(logits, position - 1, axis=1, keepdims=False)
        drawn = jax.random.categorical(jax.random.fold_in(key, position), last / temperature)
        drawn = drawn.astype(tokens.dtype)
        return jax.lax.dynamic_update_index_in_dim(tokens, drawn, position, axis=1)

    start = prompt.shape[1]
    padded = jnp.concatenate([prompt, jnp.zeros((prompt.shape[0], length), prompt.dtype)], axis=1)
    return jax.lax.fori_loop(start, start + length, draw, padded)


def mix_on_policy(
    key: jax.Array, fraction: Scalar, given: jax.Array, sampled: jax.Array
) -> jax.Array:
    """Replace some sequences of a batch by the student's own.

    Each sequence is the student's with probability `fraction`, GKD's lambda: 0 is distillation on
    given sequences, 1 is on-policy. The paper draws once for a whole batch; here each sequence is
    drawn, with the same mean. The same key makes the same choice, so call it again for the masks.

    Args:
      key: a random key.
      fraction: probability of the student's own, 0 to 1.
      given: (batch, ...), such as the tokens of data or of a teacher.
      sampled: the same shape and dtype, drawn from the student.

    Returns:
      An array like `given`, each of whose rows is that of `given` or of `sampled`.

    Raises:
      ValueError: the shapes differ, or a `fraction` known at trace time is out of range.
      TypeError: the dtypes differ.

    Example:
      A whole step of GKD: the student continues prompts, the teacher judges each of its words. A
      model here is a table of logits of the next token, given the last.

      >>> import jax, jax.numpy as jnp
      >>> def model(table, tokens):
      ...     return table[tokens]
      >>> teacher = jnp.array([[0.0, 2.0], [2.0, 0.0]])  # 0 and 1 alternate
      >>> prompt, given = jnp.array([[0], [1]]), jnp.array([[0, 1, 0, 1], [1, 0, 1, 0]])
      >>> @jax.jit
      ... def step(table, key):
      ...     sample_key, mix_key = jax.random.split(key)
      ...     sampled = sample_tokens(sample_key, lambda tokens: model(table, tokens), prompt, 3)
      ...     tokens = mix_on_policy(mix_key, 0.5, given, sampled)[:, :-1]
      ...
      ...     def loss(table):
      ...         return word_level_loss(model(table, tokens), model(teacher, tokens)).mean()
      ...
      ...     value, gradient = jax.value_and_grad(loss)(table)
      ...     return table - 2.0 * gradient, value
      >>> table = jnp.zeros((2, 2))
      >>> for key in jax.random.split(jax.random.key(0), 50):
      ...     table, value = step(table, key)
      >>> bool(value < 1e-4)
      True

    References:
      Agarwal, Vieillard, Zhou, Stanczyk, Ramos, Geist, Bachem, "On-Policy Distillation of Language
      Models: Learning from Self-Generated Mistakes", 2024, https://arxiv.org/abs/2306.13649,
      section 3, algorithm 1.
    """
    check_fraction("fraction", fraction)
    if given.shape != sampled.shape or given.ndim == 0:
        raise ValueError(
            f"given and sampled must have the same shape (batch, ...), not {given.shape} and "
            f"{sampled.shape}."
        )
    if given.dtype != sampled.dtype:
        raise TypeError(
            f"given and sampled must have the same dtype, not {given.dtype} and {sampled.dtype}."
        )
    own = jax.random.bernoulli(key, fraction, given.shape[:1])
    return jnp.where(own.reshape(-1, *(1,) * (given.ndim - 1)), sampled, given)
