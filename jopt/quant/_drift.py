"""What a layer can do about inputs that have drifted because layers before it were quantized."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jopt._arrays import materialize, working_dtype
from jopt.layers._outcome import from_rows, output_error, to_rows
from jopt.layers._statistics import InputStatistics


class Drift(NamedTuple):
    """Describe how the inputs x^ of a quantized network differ from the float ones, `d = x - x^`.

    Attributes:
      cross: `E[x^ d^T]`, (features, features).
      square: `E[d d^T]`, (features, features).
    """

    cross: jax.Array
    square: jax.Array


def _solve_target(
    rows: jax.Array, gram: jax.Array, cross: jax.Array, damping: jax.Array
) -> jax.Array:
    """Return the matrix that makes of x^ what `rows` makes of x, as nearly as it can."""
    diagonal = jnp.diagonal(gram)
    raised = diagonal + damping * jnp.mean(diagonal)
    where = jnp.arange(len(diagonal))
    damped = gram.at[where, where].set(jnp.where(raised > 0, raised, 1.0))
    factor = jax.scipy.linalg.cho_factor(damped, lower=True)
    product = jnp.matmul(cross, rows, precision="highest")
    return rows + jax.scipy.linalg.cho_solve(factor, product)


@jax.jit
def corrected_weights(
    weights: jax.Array, statistics: InputStatistics, drift: Drift, damping: float = 0.01
) -> jax.Array:
    """Return the float kernel whose outputs on the drifted inputs are nearest to the wanted ones.

    Minimise `E|x W - x^ V|^2 + damping * mean(diag(gram)) * |V - W|^2` over V:
    `V = W + (gram + damping * mean(diag(gram)) I)^-1 E[x^ (x - x^)^T] W`. Without drift V = W.

    Args:
      weights: the kernel W, its inputs on the leading axes.
      statistics: of the drifted inputs x^.
      drift: from them to the wanted ones.
      damping: how strongly V is held to W.

    Returns:
      An array of the shape and dtype of `weights`.

    Raises:
      ValueError: the statistics do not fit the kernel.

    Example:
      >>> import jax.numpy as jnp
      >>> statistics = InputStatistics(None, None, None, None, jnp.array([[4.0]]))
      >>> drift = Drift(jnp.array([[2.0]]), jnp.array([[1.0]]))  # x = 1.5 x^
      >>> corrected_weights(jnp.array([[1.0]]), statistics, drift, 0.0)
      Array([[1.5]], dtype=float32)
    """
    exact = working_dtype(weights.dtype)
    gram, cross = statistics.gram.astype(exact), drift.cross.astype(exact)
    rows, share = to_rows(weights.astype(exact), gram), jnp.asarray(damping, exact)
    solve = jax.vmap(_solve_target, (0, 0, 0, None)) if gram.ndim == 3 else _solve_target
    return from_rows(solve(rows, gram, cross, share), weights.shape).astype(weights.dtype)


def drifted_error(
    weights: jax.Array, leaf: Any, statistics: InputStatistics, drift: Drift
) -> jax.Array:
    """Return the mean squared difference of `x W` and `x^ V`, summed over outputs.

    With `D = V - W` it is the trace of `D^T gram D - 2 D^T cross W + W^T square W`.

    Args:
      weights: the kernel W that the float network uses.
      leaf: the kernel V of the quantized one, a compressed leaf or an array.
      statistics: of the quantized network's inputs x^.
      drift: from them to the float ones.

    Returns:
      A floating-point scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> statistics = InputStatistics(None, None, None, None, jnp.array([[4.0]]))
      >>> drift = Drift(jnp.array([[2.0]]), jnp.array([[1.0]]))  # x^ is 2 or -2, and x 3 or -3
      >>> drifted_error(jnp.array([[1.0]]), jnp.array([[1.0]]), statistics, drift)
      Array(1., dtype=float32)
    """
    exact = working_dtype(weights.dtype)
    gram = statistics.gram.astype(exact)
    rows = to_rows(weights.astype(exact), gram)
    delta = to_rows(materialize(leaf).astype(exact), gram) - rows
    cross = jnp.matmul(drift.cross.astype(exact), rows, precision="highest")
    square = jnp.matmul(drift.square.astype(exact), rows, precision="highest")
    linear = jnp.sum(rows * square) - 2 * jnp.sum(delta * cross)
    return output_error(weights, leaf, statistics) + linear
