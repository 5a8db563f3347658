"""What the losses share: checks of known values, precision, norms with a gradient at zero, means.

Losses are computed, and returned, in float32 or wider: in half precision the differences of
logarithms that they are made of would be rounding, and squares of features would overflow.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jopt._arrays import known_values, working_dtype

Scalar = float | jax.Array


def widened(values: jax.Array) -> jax.Array:
    """Return floats of at least 32 bits."""
    floating = jnp.issubdtype(values.dtype, jnp.floating)
    return jnp.asarray(values, working_dtype(values.dtype) if floating else jnp.float32)


def constant(values: jax.Array) -> jax.Array:
    """Return floats of at least 32 bits through which no gradient flows: a teacher's."""
    return jax.lax.stop_gradient(widened(values))


def paired(
    student: jax.Array, teacher: jax.Array, what: str, least: int = 1
) -> tuple[jax.Array, jax.Array]:
    """Return two arrays of one shape in float32 or wider, the teacher's as a constant.

    Args:
      student: of the student.
      teacher: of the teacher.
      what: the word both are called by, as in `student_<what>` and `teacher_<what>`.
      least: number of axes.

    Raises:
      ValueError: the shapes differ, or have too few axes.
    """
    if student.shape != teacher.shape or student.ndim < least:
        raise ValueError(
            f"student_{what} and teacher_{what} must have the same shape, of {least} axes or more, "
            f"not {student.shape} and {teacher.shape}."
        )
    return widened(student), constant(teacher)


def check_same_batch(student: jax.Array, teacher: jax.Array, what: str, least: int = 2) -> None:
    """Raise unless both arrays have as many examples and at least `least` axes."""
    if min(student.ndim, teacher.ndim) < least or student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"student_{what} and teacher_{what} must have the same number of examples and at "
            f"least {least} axes, not {student.shape} and {teacher.shape}."
        )


def paired_features(
    student: jax.Array, teacher: jax.Array, least: int
) -> tuple[jax.Array, jax.Array]:
    """Return the features of a batch as rows, the teacher's as constants.

    Args:
      student: floats, (batch, ...).
      teacher: floats, (batch, ...); the axes after the first may differ.
      least: number of examples with which a loss on relations can be other than zero.
    """
    check_same_batch(student, teacher, "features")
    batch = student.shape[0]
    if batch < least:
        raise ValueError(
            f"student_features and teacher_features are compared by relations between examples: "
            f"there must be at least {least} examples in a batch, not {batch}."
        )
    return widened(student).reshape(batch, -1), constant(teacher).reshape(batch, -1)


def check_number(name: str, value: Scalar, rule: str, holds: Callable[[Any], Any]) -> None:
    """Raise if a value is no number, or one that is known does not hold to a rule.

    Args:
      name: of the argument.
      value: a number, or an array, which may be traced.
      rule: the words after "must", such as "be positive".
      holds: says of a NumPy array, elementwise, whether the rule holds.
    """
    if not isinstance(value, (int, float, np.generic, np.ndarray, jax.Array)):
        hint = ": call the schedule with the step" if callable(value) else ""
        raise TypeError(f"{name} must be a number or an array, not {value!r}{hint}.")
    known = known_values(value)
    if known is not None and not np.all(holds(known)):
        raise ValueError(f"{name} must {rule}, not {known.tolist()!r}.")


def check_positive(name: str, value: Scalar) -> None:
    """Raise if a value is no number, or one that is known is not positive."""
    check_number(name, value, "be positive", lambda known: known > 0)


def check_fraction(name: str, value: Scalar) -> None:
    """Raise if a value is no number, or one that is known lies outside [0, 1]."""
    check_number(name, value, "lie in [0, 1]", lambda known: (known >= 0) & (known <= 1))


def check_whole(name: str, values: jax.Array) -> None:
    """Raise unless an array holds whole numbers."""
    if not jnp.issubdtype(values.dtype, jnp.integer):
        raise TypeError(f"{name} must be whole numbers, not {values.dtype}.")


def check_range(name: str, values: jax.Array, stop: int, start: int | None = 0) -> None:
    """Raise if whole numbers that are known lie outside [start, stop); None is no start."""
    known = known_values(values)
    if known is None or known.size == 0:
        return
    least, most = int(known.min()), int(known.max())
    rule = f"be below {stop}" if start is None else f"lie in [{start}, {stop})"
    if start is not None and least < start:
        raise ValueError(f"{name} must {rule}, but there is {least}.")
    if most >= stop:
        raise ValueError(f"{name} must {rule}, but there is {most}.")


def check_labels(
    labels: jax.Array, shape: tuple[int, ...], classes: int, negative: bool = False
) -> None:
    """Raise unless there is one whole number for each example, each known one a class.

    Args:
      labels: of the examples.
      shape: of the examples.
      classes: number of them.
      negative: whether a negative number may say that there is no label.
    """
    if labels.shape != shape:
        raise ValueError(f"labels must have shape {shape}, one per example, not {labels.shape}.")
    check_whole("labels", labels)
    check_range("labels", labels, classes, start=None if negative else 0)


def safe_norm(values: jax.Array, axis: int = -1, keepdims: bool = False) -> jax.Array:
    """Return Euclidean norms whose gradient is zero, not NaN, where the norm is zero."""
    squares = jnp.sum(values**2, axis=axis, keepdims=keepdims)
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1.0)), 0.0)


def unit_vectors(values: jax.Array, axis: int = -1) -> jax.Array:
    """Scale vectors to length one; a vector of zeros stays one, with a gradient of zero.

    The largest element is divided by first: squares of very small or large ones leave the range.
    """
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(values), axis=axis, keepdims=True))
    values = values / jnp.where(largest > 0, largest, 1.0)
    norms = safe_norm(values, axis, keepdims=True)
    return jnp.where(norms > 0, values / jnp.where(norms > 0, norms, 1.0), 0.0)


def example_mean(values: jax.Array) -> jax.Array:
    """Average over all axes but the first."""
    return jnp.mean(values, axis=tuple(range(1, values.ndim)))


def masked_mean(values: jax.Array, mask: jax.Array | None, axes: tuple[int, ...]) -> jax.Array:
    """Average over axes where a mask is true; where nothing is, the mean is zero.

    Args:
      values: floats.
      mask: booleans that broadcast against `values`, or None for all.
      axes: that are averaged over.
    """
    if mask is None:
        return jnp.mean(values, axis=axes)
    mask = jnp.broadcast_to(mask, values.shape)
    count = jnp.sum(mask, axis=axes)
    total = jnp.sum(jnp.where(mask, values, 0.0), axis=axes)
    return total / jnp.maximum(count, 1).astype(values.dtype)


def check_mask(mask: jax.Array | None, shape: tuple[int, ...]) -> None:
    """Raise unless a mask is None or has one boolean for each token."""
    if mask is None:
        return
    if mask.shape != shape:
        raise ValueError(f"mask must have shape {shape}, (batch, tokens), not {mask.shape}.")
    if mask.dtype != jnp.bool_:
        raise TypeError(f"mask must be booleans, True for a real token, not {mask.dtype}.")


def zero_padding(values: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Put zeros where a mask of the leading axes is false: no value there, not even a NaN, counts.

    To drop a loss afterwards is not enough: the gradient of a dropped NaN is NaN.
    """
    if mask is None:
        return values
    return jnp.where(mask.reshape(mask.shape + (1,) * (values.ndim - mask.ndim)), values, 0.0)
