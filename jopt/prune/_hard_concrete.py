"""L0 regularization: gates that are exactly zero or one with some probability, and learned."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jopt._arrays import working_dtype
from jopt._trees import Filter, is_kernel
from jopt.prune._by_path import (
    Entries,
    Shape,
    init_entries,
    map_entries,
    masks_of,
    one_each,
    weights_per_entry,
)


def _check(temperature: float, low: float, high: float) -> None:
    if not (temperature > 0 and low < 0 and high > 1):
        raise ValueError(
            "temperature must be above 0, low below 0 and high above 1, not "
            f"{temperature!r}, {low!r} and {high!r}."
        )


def _stretched(concrete: jax.Array, low: float, high: float, dtype: Any) -> jax.Array:
    return jnp.clip(concrete * (high - low) + low, 0, 1).astype(dtype)


def hard_concrete_sample(
    key: jax.Array,
    log_alpha: jax.Array,
    temperature: float = 2 / 3,
    low: float = -0.1,
    high: float = 1.1,
) -> jax.Array:
    """Draw gates from the hard concrete distribution, differentiable in log_alpha.

    `s = sigmoid((log u - log(1 - u) + log_alpha) / temperature)`, u uniform, and
    `z = min(1, max(0, s (high - low) + low))`.

    Args:
      key: a key from `jax.random.key`.
      log_alpha: location, any shape; higher is open.
      temperature: beta, above 0.
      low: gamma, below 0.
      high: zeta, above 1.

    Returns:
      Gates in [0, 1], of the shape and dtype of `log_alpha`; some are exactly 0, some exactly 1.

    Raises:
      ValueError: `temperature`, `low` or `high` is out of its range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> hard_concrete_sample(jax.random.key(0), jnp.array([-20.0, 20.0]))
      Array([0., 1.], dtype=float32)

    References:
      Louizos et al., "Learning Sparse Neural Networks through L0 Regularization", 2018,
      https://arxiv.org/abs/1712.01312, equations 10 and 11.
    """
    _check(temperature, low, high)
    exact = working_dtype(log_alpha.dtype)
    noise = jax.random.logistic(key, log_alpha.shape, exact)
    concrete = jax.nn.sigmoid((noise + log_alpha.astype(exact)) / temperature)
    return _stretched(concrete, low, high, log_alpha.dtype)


def hard_concrete_gates(log_alpha: jax.Array, low: float = -0.1, high: float = 1.1) -> jax.Array:
    """Return the gates to use after training: `min(1, max(0, sigmoid(log_alpha)(high-low)+low))`.

    Args:
      log_alpha: location, any shape.
      low: gamma, below 0.
      high: zeta, above 1.

    Returns:
      Gates in [0, 1], of the shape and dtype of `log_alpha`.

    Raises:
      ValueError: `low` or `high` is out of its range.

    Example:
      >>> import jax.numpy as jnp
      >>> hard_concrete_gates(jnp.array([-3.0, 0.0, 3.0]))
      Array([0. , 0.5, 1. ], dtype=float32)

    References:
      Louizos et al., "Learning Sparse Neural Networks through L0 Regularization", 2018,
      https://arxiv.org/abs/1712.01312, equation 13.
    """
    _check(1.0, low, high)
    exact = working_dtype(log_alpha.dtype)
    return _stretched(jax.nn.sigmoid(log_alpha.astype(exact)), low, high, log_alpha.dtype)


def hard_concrete_penalty(
    log_alpha: jax.Array, temperature: float = 2 / 3, low: float = -0.1, high: float = 1.1
) -> jax.Array:
    """Return the probability of a gate above zero: the expected L0 norm, gate by gate.

    `P(z > 0) = sigmoid(log_alpha - temperature log(-low / high))`.

    Args:
      log_alpha: location, any shape.
      temperature: beta, above 0.
      low: gamma, below 0.
      high: zeta, above 1.

    Returns:
      Probabilities, of the shape and dtype of `log_alpha`.

    Raises:
      ValueError: `temperature`, `low` or `high` is out of its range.

    Example:
      >>> import jax.numpy as jnp
      >>> hard_concrete_penalty(jnp.array([-10.0, 0.0, 10.0])).round(2)
      Array([0.  , 0.83, 1.  ], dtype=float32)

    References:
      Louizos et al., "Learning Sparse Neural Networks through L0 Regularization", 2018,
      https://arxiv.org/abs/1712.01312, equation 12.
    """
    _check(temperature, low, high)
    return jax.nn.sigmoid(log_alpha - temperature * math.log(-low / high))


def l0_init(
    key: jax.Array,
    params: Any,
    where: Filter = is_kernel,
    shape: Shape = one_each,
    closed: float = 0.5,
) -> dict[str, jax.Array]:
    """Make the trainable gates of `l0_params`: log_alpha around `log(1 - closed) - log(closed)`.

    Args:
      key: a key from `jax.random.key`; log_alpha gets normal noise of deviation 0.01.
      params: any pytree of arrays.
      where: which leaves, a regex on the path or a predicate; by default
        those that `is_kernel` takes.
      shape: from a leaf to the shape of its gates: `one_each` weight, `one_per_output`,
        `one_per_input` or your own, which broadcasts against the leaf.
      closed: the paper's rate of dropout at the start, above 0 and below 1.

    Returns:
      log_alpha by path, of the dtype of their leaves.

    Raises:
      ValueError: `closed` is out of its range, nothing was chosen, or a shape does not broadcast.
      TypeError: a chosen leaf is not a floating-point array.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> gates = l0_init(jax.random.key(0), {"w": jnp.ones((2, 3))}, shape=lambda leaf: (1, 3))
      >>> gates["w"].shape
      (1, 3)
    """
    if not 0.0 < closed < 1.0:
        raise ValueError(f"closed must lie in (0, 1), not {closed!r}.")
    middle = math.log(1 - closed) - math.log(closed)

    def make(index: int, size: tuple[int, ...], dtype: Any) -> jax.Array:
        noise = jax.random.normal(jax.random.fold_in(key, index), size, working_dtype(dtype))
        return (middle + 0.01 * noise).astype(dtype)

    return init_entries(params, where, shape, make)


def l0_params(key: jax.Array, params: Any, log_alphas: Entries) -> Any:
    """Multiply weights by gates drawn at random, for a step of training.

    Args:
      key: a key from `jax.random.key`, a new one for each step; gates are shared over the batch.
      params: any pytree of arrays.
      log_alphas: by path, from `l0_init`.

    Returns:
      Parameters to run the model with; leaves without gates are unchanged.

    Raises:
      ValueError: gates have no leaf, or do not broadcast to it.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params, gates = {"w": jnp.array([[2.0, 3.0]])}, {"w": jnp.array([[20.0, -20.0]])}
      >>> l0_params(jax.random.key(0), params, gates)
      {'w': Array([[2., 0.]], dtype=float32)}

    References:
      Louizos et al., "Learning Sparse Neural Networks through L0 Regularization", 2018,
      https://arxiv.org/abs/1712.01312, equation 9.
    """

    def gated(index: int, leaf: jax.Array, log_alpha: jax.Array) -> jax.Array:
        gates = hard_concrete_sample(jax.random.fold_in(key, index), log_alpha)
        return leaf * gates.astype(leaf.dtype)

    return map_entries(gated, params, log_alphas)


def l0_gated_params(params: Any, log_alphas: Entries) -> Any:
    """Multiply weights by their gates without chance: the network after training.

    Args:
      params: any pytree of arrays.
      log_alphas: by path, from `l0_init`.

    Returns:
      Parameters with exact zeros where gates are closed.

    Raises:
      ValueError: gates have no leaf, or do not broadcast to it.

    Example:
      >>> import jax.numpy as jnp
      >>> l0_gated_params({"w": jnp.array([[2.0, 3.0]])}, {"w": jnp.array([[0.0, -3.0]])})
      {'w': Array([[1., 0.]], dtype=float32)}
    """
    return map_entries(
        lambda index, leaf, entry: leaf * hard_concrete_gates(entry).astype(leaf.dtype),
        params,
        log_alphas,
    )


def l0_penalty(params: Any, log_alphas: Entries) -> jax.Array:
    """Return the expected number of weights that are not gated to zero.

    `sum over gates of P(z > 0) (weights behind the gate)`. The paper divides it by the number of
    training examples and multiplies by lambda.

    Args:
      params: any pytree of arrays; only shapes matter.
      log_alphas: by path, from `l0_init`.

    Returns:
      A float32 scalar.

    Raises:
      ValueError: gates have no leaf, or do not broadcast to it.

    Example:
      >>> import jax.numpy as jnp
      >>> float(l0_penalty({"w": jnp.ones((5, 2))}, {"w": jnp.array([[30.0, -30.0]])}))
      5.0

    References:
      Louizos et al., "Learning Sparse Neural Networks through L0 Regularization", 2018,
      https://arxiv.org/abs/1712.01312, equation 9; groups as in section 2.
    """

    def expected(index: int, leaf: Any, log_alpha: jax.Array) -> jax.Array:
        open_ = hard_concrete_penalty(log_alpha.astype(jnp.float32))
        return open_.sum() * weights_per_entry(leaf, log_alpha)

    terms = map_entries(expected, params, log_alphas, lambda leaf: jnp.zeros(()))
    return sum(jax.tree.leaves(terms), jnp.zeros(()))


def l0_masks(params: Any, log_alphas: Entries) -> Any:
    """Say which gates stay open after training, `z > 0`.

    Args:
      params: any pytree of arrays; only structure and shapes matter.
      log_alphas: by path, from `l0_init`.

    Returns:
      A tree of booleans: of the shape of the gates where there are any, a scalar True elsewhere.
      They remove what `l0_gated_params` sets to zero; the gates between 0 and 1 are in its values.

    Raises:
      ValueError: gates have no leaf, or do not broadcast to it.

    Example:
      >>> import jax.numpy as jnp
      >>> l0_masks({"w": jnp.ones((5, 2))}, {"w": jnp.array([[3.0, -3.0]])})
      {'w': Array([[ True, False]], dtype=bool)}
    """
    return masks_of(lambda leaf, entry: hard_concrete_gates(entry) > 0, params, log_alphas)
