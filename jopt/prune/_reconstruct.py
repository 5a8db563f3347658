"""Solve the weights that a mask keeps anew, by least squares: masks from anywhere."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jopt._arrays import working_dtype
from jopt.layers._feedback import damped_gram
from jopt.layers._outcome import Outcome, from_rows, keep_lower, output_error, to_rows
from jopt.layers._statistics import InputStatistics

_ELEMENTS = 1 << 24  # of the matrices, one for each output, that are held at once


def by_output(function: Callable[..., Any], features: int, *columns: jax.Array) -> Any:
    """Map a function over outputs, as many at once as there is room for.

    Args:
      function: of one column of each array, `(features,)`; it may hold a square matrix.
      features: number of inputs.
      *columns: `(features, outputs)`.

    Returns:
      What it returns, with a leading axis of outputs.

    Example:
      >>> by_output(jnp.sum, 2, jnp.array([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]]))
      Array([2., 3., 4.], dtype=float32)
    """
    outputs = columns[0].shape[1]
    room = max(1, _ELEMENTS // max(features * features, 1))
    if outputs <= room:
        return jax.vmap(function)(*(array.T for array in columns))
    rounds = -(-outputs // room)
    size = -(-outputs // rounds)

    def split(array: jax.Array) -> jax.Array:
        padded = jnp.pad(array.T, ((0, rounds * size - outputs), (0, 0)))
        return padded.reshape(rounds, size, features)

    results = lax.map(lambda parts: jax.vmap(function)(*parts), tuple(map(split, columns)))
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:outputs], results)


def solve_kept(rows: jax.Array, keep: jax.Array, gram: jax.Array) -> jax.Array:
    """Return the kept weights that make up best for the others, and zeros.

    Args:
      rows: `(features, outputs)`.
      keep: booleans of the same shape.
      gram: `(features, features)`, positive definite.

    Returns:
      `(features, outputs)`.

    Example:
      >>> keep = jnp.array([[False], [True]])
      >>> solve_kept(jnp.ones((2, 1)), keep, jnp.array([[2.0, 1.0], [1.0, 2.0]])).ravel()
      Array([0. , 1.5], dtype=float32)
    """
    zeros = jnp.zeros_like(rows)
    wanted = jnp.matmul(gram, jnp.where(keep, zeros, rows), precision="highest")

    def solve(kept: jax.Array, right: jax.Array) -> jax.Array:
        both = kept[:, None] & kept[None, :]
        alone = jnp.diag(jnp.where(kept, 0.0, 1.0).astype(gram.dtype))
        lower = lax.linalg.cholesky(
            jnp.where(both, gram, jnp.zeros_like(gram)) + alone, symmetrize_input=False
        )
        return jax.scipy.linalg.cho_solve((lower, True), right)

    change = by_output(solve, rows.shape[0], keep, jnp.where(keep, wanted, zeros)).T
    return jnp.where(keep, rows + change, zeros)


@jax.jit
def _reconstruct(
    weights: jax.Array, mask: jax.Array, statistics: InputStatistics, damping: ArrayLike
) -> tuple[jax.Array, Outcome]:
    exact = working_dtype(weights.dtype)
    gram = statistics.gram.astype(exact)
    rows, keep = to_rows(weights.astype(exact), gram), to_rows(mask, gram)
    share = jnp.asarray(damping, exact)

    def run(rows: jax.Array, keep: jax.Array, gram: jax.Array) -> jax.Array:
        return solve_kept(rows, keep, damped_gram(gram, share))

    solved = (jax.vmap(run) if gram.ndim == 3 else run)(rows, keep, gram)
    found = from_rows(solved, weights.shape).astype(weights.dtype)
    plain = jnp.where(mask, weights, jnp.zeros_like(weights))
    errors = [output_error(weights, each, statistics) for each in (found, plain)]
    return keep_lower(found, plain, *errors)


def reconstruct(
    weights: ArrayLike,
    mask: ArrayLike,
    statistics: InputStatistics,
    damping: ArrayLike = 0.01,
) -> tuple[jax.Array, Outcome]:
    """Choose the weights that a mask keeps so that a layer's outputs change least.

    For each output, with K its kept inputs and P the pruned ones,

        v_K = w_K + H_KK^-1 H_KP w_P,  v_P = 0,  H = gram + damping * mean(diag(gram)) * I,

    which minimises `(w - v)^T H (w - v)`. The mask may come from any criterion. One Cholesky factor
    an output, of `features^3 / 3` products: for large layers `sparse_gpt` is cheaper.

    Args:
      weights: floating-point kernel before pruning, its inputs on the leading axes.
      mask: booleans that broadcast to it, True keeps.
      statistics: of the layer's inputs; `gram` is used, with a leading axis of groups where the
        last axis of the kernel is divided into groups.
      damping: share of the mean of gram's diagonal that is added to it. Not negative.

    Returns:
      The pruned kernel of the same shape and dtype and its `Outcome`, whose baseline is the kernel
      with zeros in it. Where the output error is not lower, the baseline is returned.

    Raises:
      ValueError: the statistics do not fit the kernel, or the mask does not broadcast to it.
      TypeError: the kernel is not floating-point, or the mask not boolean.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.layers import InputStatistics
      >>> weights, mask = jnp.array([[1.0], [1.0]]), jnp.array([[False], [True]])
      >>> alike = InputStatistics(None, None, None, None, jnp.array([[2.0, 1.0], [1.0, 2.0]]))
      >>> solved, outcome = reconstruct(weights, mask, alike, damping=0.0)
      >>> solved.ravel(), outcome.error, outcome.baseline
      (Array([0. , 1.5], dtype=float32), Array(1.5, dtype=float32), Array(2., dtype=float32))

    References:
      Hassibi, Stork, Wolff, "Optimal Brain Surgeon and general network pruning", 1993, the
      generalisation of equation 5 to many weights; Kwon et al., "A Fast Post-Training Pruning
      Framework for Transformers", 2022, https://arxiv.org/abs/2204.09656, section 4.3 (of masks
      of heads and filters).
    """
    array, kept = jnp.asarray(weights), jnp.asarray(mask)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"weights must be floating-point, not {array.dtype}.")
    if kept.dtype != jnp.bool_:
        raise TypeError(f"mask must be boolean, not {kept.dtype}.")
    fits = kept.ndim in (0, array.ndim) and all(
        n in (1, size) for n, size in zip(kept.shape, array.shape, strict=False)
    )
    if not fits:
        raise ValueError(f"mask of shape {kept.shape} does not broadcast to {array.shape}.")
    return _reconstruct(array, jnp.broadcast_to(kept, array.shape), statistics, damping)
