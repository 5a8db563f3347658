"""The two halves of GPTQ: the factor of the second moments, and rounding with feedback.

With `gram = C^T C`, C upper triangular, the output error of rounding W to Q is the sum of squares
of `C (W - Q)`. Row k of that product is `C_kk (target_k - Q_k)` with

    target_k = W_k + sum over j > k of (C_kj / C_kk) (W_j - Q_j),

so rounding the last row first, and each row to the level nearest to its target, is GPTQ: the errors
already made are fed back into the rows to come. This form needs one Cholesky factor where the
paper's needs an inverse as well, and gives the same codes (Chen et al., "The Geometry of LLM
Quantization: GPTQ as Babai's Nearest Plane Algorithm", 2025, https://arxiv.org/abs/2507.18553).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

RoundRow = Callable[[jax.Array, jax.Array], jax.Array]

# Rows are rounded one by one within a tile, tiles are joined by a product within a panel, and
# panels, unrolled, by the large products that are most of the work. More panels compile longer:
# XLA runs a product within a loop more slowly than one outside.
_TILE = 32
_PANEL = 256
_PANELS = 16


def feedback_factor(gram: jax.Array, damping: jax.Array | float) -> jax.Array:
    """Factor the damped second moments, each row divided by its diagonal.

    `gram + damping * mean(diag(gram)) * I = C^T C`; an input that is always zero gets the diagonal
    1 where damping leaves it zero.

    Args:
      gram: `(features, features)`, symmetric.
      damping: share of the mean of its diagonal that is added to the diagonal.

    Returns:
      `C / diag(C)`, upper triangular with a diagonal of ones; NaN where gram is not positive
      definite.

    Example:
      >>> import jax.numpy as jnp
      >>> feedback_factor(jnp.array([[4.0, 2.0], [2.0, 2.0]]), 0.0)
      Array([[1. , 0.5],
             [0. , 1. ]], dtype=float32)
    """
    diagonal = jnp.diagonal(gram)
    raised = diagonal + damping * jnp.mean(diagonal)
    where = jnp.arange(len(diagonal))
    damped = gram.at[where, where].set(jnp.where(raised > 0, raised, 1.0))
    lower = lax.linalg.cholesky(damped, symmetrize_input=False)
    return lower.T / jnp.diagonal(lower)[:, None]


def _round_tile(
    rows: jax.Array, targets: jax.Array, factor: jax.Array, first: jax.Array, round_row: RoundRow
) -> tuple[jax.Array, jax.Array]:
    """Round the rows of a tile, the last one first, and return them and their errors."""
    count = rows.shape[0]

    def step(index: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rounded, errors = state
        row = count - 1 - index
        target = targets[row] + jnp.matmul(factor[row], errors, precision="highest")
        level = round_row(first + row, target)
        return rounded.at[row].set(level), errors.at[row].set(rows[row] - level)

    return lax.fori_loop(0, count, step, (jnp.zeros_like(rows), jnp.zeros_like(rows)))


def _round_panel(
    rows: jax.Array,
    feedback: jax.Array,
    factor: jax.Array,
    first: int,
    tile: int,
    round_row: RoundRow,
) -> tuple[jax.Array, jax.Array]:
    """Round the rows of a panel tile by tile, the last one first."""
    tiles = rows.shape[0] // tile

    def step(index: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rounded, errors = state
        start = (tiles - 1 - index) * tile

        def cut(array: jax.Array) -> jax.Array:
            return lax.dynamic_slice_in_dim(array, start, tile)

        ahead = cut(factor)  # rows not yet rounded have no error, so they do not count
        targets = cut(rows) + cut(feedback) + jnp.matmul(ahead, errors, precision="highest")
        inner = lax.dynamic_slice_in_dim(ahead, start, tile, axis=1)
        new, new_errors = _round_tile(cut(rows), targets, inner, first + start, round_row)
        return (
            lax.dynamic_update_slice_in_dim(rounded, new, start, axis=0),
            lax.dynamic_update_slice_in_dim(errors, new_errors, start, axis=0),
        )

    return lax.fori_loop(0, tiles, step, (jnp.zeros_like(rows), jnp.zeros_like(rows)))


def _sizes(count: int) -> tuple[int, int]:
    """Return the rows of a tile and of a panel."""
    if count <= _TILE:
        return -(-count // 8) * 8, _TILE
    tiles = -(-count // (_TILE * _PANELS))
    return _TILE, max(_PANEL, tiles * _TILE)


def round_with_feedback(rows: jax.Array, factor: jax.Array, round_row: RoundRow) -> jax.Array:
    """Round the rows of a matrix, the last one first, feeding errors back into the others.

    Args:
      rows: `(features, outputs)`.
      factor: from `feedback_factor`, of the features in the same order.
      round_row: `(index, values) -> values`, from a row's number, from 0 to features - 1, and its
        target to the levels chosen, `(outputs,)`.

    Returns:
      The rounded rows, of the same shape and dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> rows, factor = jnp.array([[0.4], [0.4]]), jnp.array([[1.0, 0.5], [0.0, 1.0]])
      >>> round_with_feedback(rows, factor, lambda index, row: jnp.round(row)).ravel()
      Array([1., 0.], dtype=float32)
    """
    count = rows.shape[0]
    tile, panel = _sizes(count)
    padding = -count % tile  # rows without neighbours, which change nothing
    rows = jnp.pad(rows, ((0, padding), (0, 0)))
    factor = jnp.pad(factor, ((0, padding), (0, padding)))
    known: list[jax.Array] = []
    rounded: list[jax.Array] = []
    stop = count + padding
    while stop > 0:
        start = max(stop - panel, 0)
        feedback = jnp.zeros_like(rows[start:stop])
        if known:
            later = jnp.concatenate(known[::-1])
            feedback = jnp.matmul(factor[start:stop, stop:], later, precision="highest")
        inner = factor[start:stop, start:stop]
        new, errors = _round_panel(rows[start:stop], feedback, inner, start, tile, round_row)
        known.append(errors)
        rounded.append(new)
        stop = start
    return jnp.concatenate(rounded[::-1])[:count]
