"""Teachers made of several networks, or of none."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jopt.distill._checks import (
    Scalar,
    check_number,
    check_positive,
    check_range,
    check_whole,
    widened,
)


def stack_params(params: Sequence[Any]) -> Any:
    """Stack the parameters of equal networks along a new first axis, for `vmap`.

    `jax.vmap(apply, (0, None))(stack_params(teachers), inputs)` are the logits of all teachers,
    (teachers, ..., classes), in one program; students of one shape are trained at once likewise.

    Args:
      params: trees of one structure, shapes and dtypes.

    Returns:
      A tree whose leaves have one axis more.

    Raises:
      ValueError: there is none, or two differ in paths, shapes or dtypes.

    Example:
      >>> import jax.numpy as jnp
      >>> stack_params([{"w": jnp.array([1.0])}, {"w": jnp.array([2.0])}])
      {'w': Array([[1.],
             [2.]], dtype=float32)}
    """
    if not params:
        raise ValueError("params must hold at least one tree.")
    kinds = [jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), p) for p in params]
    for number, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise ValueError(
                f"params[{number}] differs from params[0] in paths, shapes or dtypes: only equal "
                "networks can be stacked."
            )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)


def ensemble_logits(
    teacher_logits: jax.Array, weights: jax.Array | None = None, temperature: Scalar = 1.0
) -> jax.Array:
    """Join teachers into one: logits whose softened distribution is the mean of the teachers'.

    `T * log(sum_k w_k softmax(t_k / T))`. Use the loss with the same temperature: the average is
    taken after softening, as in the paper, and not of the logits.

    Args:
      teacher_logits: floats, (teachers, ..., classes), such as of `jax.vmap` over stacked
        parameters.
      weights: floats, (teachers,), not negative; they are divided by their sum. None: equal.
      temperature: positive, that of the loss.

    Returns:
      Floats of shape (..., classes).

    Raises:
      ValueError: there are fewer than two axes, the weights are not one per teacher, known ones are
        negative or all zero, or a known temperature is not positive.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> both = jnp.log(jnp.array([[0.9, 0.1], [0.5, 0.5]]))
      >>> [round(x, 4) for x in jax.nn.softmax(ensemble_logits(both)).tolist()]
      [0.7, 0.3]

    References:
      Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015,
      https://arxiv.org/abs/1503.02531, section 3.
      You et al., "Learning from Multiple Teacher Networks", 2017, section 3.1.
    """
    if teacher_logits.ndim < 2:
        raise ValueError(
            f"teacher_logits must have shape (teachers, ..., classes), not {teacher_logits.shape}."
        )
    check_positive("temperature", temperature)
    teacher_logits = widened(teacher_logits)
    count = teacher_logits.shape[0]
    if weights is None:
        shares = jnp.full((count,), 1 / count, teacher_logits.dtype)
    elif weights.shape != (count,):
        raise ValueError(
            f"weights must have shape ({count},), one per teacher, not {weights.shape}."
        )
    else:
        rule = "not be negative, nor all zero"
        check_number("weights", weights, rule, lambda known: (known >= 0) & (known.sum() > 0))
        shares = (weights / jnp.sum(weights)).astype(teacher_logits.dtype)
    log_probs = jax.nn.log_softmax(teacher_logits / temperature, axis=-1)
    shares = jnp.reshape(shares, (count,) + (1,) * (teacher_logits.ndim - 1))
    return temperature * jax.nn.logsumexp(log_probs, axis=0, b=shares)


def smoothed_label_logits(labels: jax.Array, classes: int, correct: float = 0.9) -> jax.Array:
    """Return the logits of a teacher without a network: sure of the label, blind to the rest.

    Its distribution at temperature 1 is `correct` for the label and `(1 - correct) / (classes - 1)`
    for every other class. A loss at temperature 1 is then label smoothing; at a higher one it is
    the teacher-free distillation of Yuan et al., who take 0.99 and a temperature of 20.

    Args:
      labels: whole numbers, (...), each in [0, classes).
      classes: number of classes, at least 2.
      correct: probability of the label, over 1 / classes and below 1.

    Returns:
      Floats of shape (..., classes).

    Raises:
      ValueError: `classes`, `correct` or a known label is out of range. A traced label that is no
        class gives logits of NaN.
      TypeError: the labels are not whole numbers.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> found = jax.nn.softmax(smoothed_label_logits(jnp.array([1]), 3, 0.8))
      >>> [round(x, 4) for x in found[0].tolist()]
      [0.1, 0.8, 0.1]

    References:
      Yuan et al., "Revisiting Knowledge Distillation via Label Smoothing Regularization", 2020,
      https://arxiv.org/abs/1909.11723, section 4.
    """
    check_whole("labels", labels)
    if classes < 2:
        raise ValueError(f"classes must be at least 2, not {classes}.")
    check_range("labels", labels, classes)
    if not 1 / classes < correct < 1:
        raise ValueError(f"correct must lie between 1/{classes} and 1, not {correct!r}.")
    gap = jnp.log(correct * (classes - 1) / (1 - correct)).astype(jnp.float32)
    logits = gap * jax.nn.one_hot(labels, classes, dtype=jnp.float32)
    is_class = (labels >= 0) & (labels < classes)
    return jnp.where(is_class[..., None], logits, jnp.nan)
