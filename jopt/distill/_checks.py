"""What the losses share: checks on static values, norms whose gradient exists at zero, means."""

import jax
import jax.numpy as jnp

Scalar = float | jax.Array


def check_same_shape(student: jax.Array, teacher: jax.Array, what: str, least: int = 1) -> None:
    """Raise unless both arrays have one shape of at least `least` axes.

    Args:
      student: of the student.
      teacher: of the teacher.
      what: the word both are called by, as in `student_<what>` and `teacher_<what>`.
      least: number of axes.
    """
    if student.shape != teacher.shape or student.ndim < least:
        raise ValueError(
            f"student_{what} and teacher_{what} must have the same shape, of {least} axes or more, "
            f"not {student.shape} and {teacher.shape}."
        )


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
            f"this loss compares relations between examples: it needs at least {least} examples "
            f"in a batch, not {batch}."
        )
    rows = jax.lax.stop_gradient(teacher).reshape(batch, -1)
    return student.reshape(batch, -1), rows


def check_positive(name: str, value: Scalar) -> None:
    """Raise if a value known at trace time is not positive."""
    if isinstance(value, (int, float)) and not value > 0:
        raise ValueError(f"{name} must be positive, not {value!r}.")


def check_fraction(name: str, value: Scalar) -> None:
    """Raise if a value known at trace time lies outside [0, 1]."""
    if isinstance(value, (int, float)) and not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], not {value!r}.")


def check_labels(labels: jax.Array, shape: tuple[int, ...]) -> None:
    """Raise unless there is one whole number for each example."""
    if labels.shape != shape:
        raise ValueError(f"labels must have shape {shape}, one per example, not {labels.shape}.")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be whole numbers, not {labels.dtype}.")


def safe_norm(values: jax.Array, axis: int = -1, keepdims: bool = False) -> jax.Array:
    """Return Euclidean norms whose gradient is zero, not NaN, where the norm is zero."""
    squares = jnp.sum(values**2, axis=axis, keepdims=keepdims)
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1.0)), 0.0)


def unit_vectors(values: jax.Array, axis: int = -1) -> jax.Array:
    """Scale vectors to length one; a vector of zeros stays one, with a gradient of zero."""
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
