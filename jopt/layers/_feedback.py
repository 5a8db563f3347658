"""Round or prune the inputs of a layer one by one, feeding each error back into the others.

With `gram = C^T C`, C upper triangular, the output error of changing W to Q is the sum of squares
of `C (W - Q)`. Row k of that product is `C_kk (target_k - Q_k)` with

    target_k = W_k + sum over j > k of (C_kj / C_kk) (W_j - Q_j),

so rounding the last row first, and each row to the level nearest to its target, is GPTQ: the errors
already made are fed back into the rows to come. This form needs one Cholesky factor where the
paper's needs an inverse as well, and gives the same codes (Chen et al., "The Geometry of LLM
Quantization: GPTQ as Babai's Nearest Plane Algorithm", 2025, https://arxiv.org/abs/2507.18553).

Setting row k of an output to zero adds `C_kk^2 target_k^2` to its error when all later rows are
settled and the rows before it make up for it. That is the score of optimal brain surgeon,
`w_k^2 / [H^-1]_kk`, with H the gram of the rows not yet settled, 0 to k: its factor is the leading
block of C, and the last diagonal entry of its inverse is `1 / C_kk^2`. SparseGPT chooses the
weights of a whole block of rows by that score before it settles the first of them, so each row
needs the value it has if no other row of its block is changed: `current = W + U^-1 f`, where U is
the block of `C / diag(C)` and f the feedback of the rows settled before.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

RoundRow = Callable[[jax.Array, jax.Array], jax.Array]
Choose = Callable[[jax.Array, jax.Array], jax.Array]
# (rows, targets, factor, first row) -> results and errors, all of the shape of rows.
Settle = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[tuple[jax.Array, ...], jax.Array]]

# Rows are rounded one by one within a tile, tiles are joined by a product within a panel, and
# panels, unrolled, by the large products that are most of the work. More panels compile longer:
# XLA runs a product within a loop more slowly than one outside.
_TILE = 32
_PANEL = 256
_PANELS = 16
_CHOOSING_PANEL = 512  # choosing takes long to compile
_CHOOSING_PANELS = 4
_SHORT = 8  # rows whose triangular system is solved by plain sums


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
    return factor_and_diagonal(gram, damping)[0]


def damped_gram(gram: jax.Array, damping: jax.Array | float) -> jax.Array:
    """Add a share of the mean of its diagonal to the diagonal, and 1 where that leaves it zero.

    Example:
      >>> import jax.numpy as jnp
      >>> damped_gram(jnp.diag(jnp.array([4.0, 2.0])), 0.5)
      Array([[5.5, 0. ],
             [0. , 3.5]], dtype=float32)
    """
    diagonal = jnp.diagonal(gram)
    raised = diagonal + damping * jnp.mean(diagonal)
    where = jnp.arange(len(diagonal))
    return gram.at[where, where].set(jnp.where(raised > 0, raised, 1.0))


def factor_and_diagonal(gram: jax.Array, damping: jax.Array | float) -> tuple[jax.Array, jax.Array]:
    """Return `feedback_factor`, and the diagonal of C by which its rows were divided.

    Example:
      >>> import jax.numpy as jnp
      >>> factor_and_diagonal(jnp.array([[4.0, 2.0], [2.0, 2.0]]), 0.0)[1]
      Array([2., 1.], dtype=float32)
    """
    lower = lax.linalg.cholesky(damped_gram(gram, damping), symmetrize_input=False)
    diagonal = jnp.diagonal(lower)
    return lower.T / diagonal[:, None], diagonal


def _settle_rows(
    rows: jax.Array,
    targets: jax.Array,
    factor: jax.Array,
    first: Any,
    round_row: RoundRow,
) -> tuple[tuple[jax.Array], jax.Array]:
    """Round rows one by one, the last one first, and return them and their errors."""
    count = rows.shape[0]

    def step(index: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rounded, errors = state
        row = count - 1 - index
        target = targets[row] + jnp.matmul(factor[row], errors, precision="highest")
        level = round_row(first + row, target)
        return rounded.at[row].set(level), errors.at[row].set(rows[row] - level)

    rounded, errors = lax.fori_loop(0, count, step, (jnp.zeros_like(rows), jnp.zeros_like(rows)))
    return (rounded,), errors


def _settle_parts(
    rows: jax.Array,
    targets: jax.Array,
    factor: jax.Array,
    first: Any,
    size: int,
    settle: Settle,
    kinds: tuple[Any, ...],
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Settle `size` rows at a time, the last ones first; `kinds` are the dtypes of the results."""
    parts = rows.shape[0] // size
    if parts == 1:
        return settle(rows, targets, factor, first)

    def step(index: jax.Array, state: Any) -> Any:
        results, errors = state
        start = (parts - 1 - index) * size

        def cut(array: jax.Array) -> jax.Array:
            return lax.dynamic_slice_in_dim(array, start, size)

        def put(array: jax.Array, new: jax.Array) -> jax.Array:
            return lax.dynamic_update_slice_in_dim(array, new, start, axis=0)

        ahead = cut(factor)  # rows not yet settled have no error, so they do not count
        reached = cut(targets) + jnp.matmul(ahead, errors, precision="highest")
        inner = lax.dynamic_slice_in_dim(ahead, start, size, axis=1)
        new, new_errors = settle(cut(rows), reached, inner, first + start)
        return jax.tree.map(put, results, new), put(errors, new_errors)

    empty = tuple(jnp.zeros(rows.shape, kind) for kind in kinds)
    return lax.fori_loop(0, parts, step, (empty, jnp.zeros_like(rows)))


def _settle_panels(
    rows: jax.Array, factor: jax.Array, panel: int, settle: Settle
) -> tuple[jax.Array, ...]:
    """Settle a panel of rows at a time, the last one first, with no loop around the products."""
    known: list[jax.Array] = []
    settled: list[tuple[jax.Array, ...]] = []
    stop = rows.shape[0]
    while stop > 0:
        start = max(stop - panel, 0)
        targets = rows[start:stop]
        if known:
            later = jnp.concatenate(known[::-1])
            targets += jnp.matmul(factor[start:stop, stop:], later, precision="highest")
        inner = factor[start:stop, start:stop]
        new, errors = settle(rows[start:stop], targets, inner, start)
        known.append(errors)
        settled.append(new)
        stop = start
    return tuple(jnp.concatenate(each[::-1]) for each in zip(*settled, strict=True))


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
    in_tile = partial(_settle_rows, round_row=round_row)
    in_panel = partial(_settle_parts, size=tile, settle=in_tile, kinds=(rows.dtype,))
    return _settle_panels(rows, factor, panel, in_panel)[0][:count]


def _unchanged(rows: jax.Array, targets: jax.Array, factor: jax.Array) -> jax.Array:
    """Return the values of a block's rows if none of them is changed: rows + U^-1 f."""
    feedback = targets - rows
    count = rows.shape[0]
    if count > _SHORT:
        return rows + lax.linalg.triangular_solve(
            factor, feedback, left_side=True, lower=False, unit_diagonal=True
        )
    moved = [feedback[count - 1]]
    for row in range(count - 2, -1, -1):
        later = (factor[row, row + 1 + i] * each for i, each in enumerate(moved))
        moved.insert(0, feedback[row] - sum(later))
    return rows + jnp.stack(moved)


def _settle_block(
    rows: jax.Array,
    targets: jax.Array,
    factor: jax.Array,
    first: Any,
    tile: int,
    choose: Choose,
    round_row: RoundRow,
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Choose the weights of a block that are kept, then settle its rows."""
    keep = choose(first, _unchanged(rows, targets, factor))

    def keep_or_prune(index: jax.Array, values: jax.Array) -> jax.Array:
        return jnp.where(keep[index - first], round_row(index, values), jnp.zeros_like(values))

    in_tile = partial(_settle_rows, round_row=keep_or_prune)
    (pruned,), errors = _settle_parts(
        rows, targets, factor, first, tile, in_tile, kinds=(rows.dtype,)
    )
    return (pruned, keep), errors


def _block_sizes(count: int, block: int) -> tuple[int, int, int]:
    """Return the rows of a tile within a block, of a run of short blocks, and of a panel."""
    divisor = max(size for size in range(1, _TILE + 1) if block % size == 0)
    tile = divisor if divisor >= _SHORT else block
    run = block * max(1, _TILE // block)
    runs = -(-count // (run * _CHOOSING_PANELS))
    return tile, run, run * max(runs, _CHOOSING_PANEL // run, 1)


def prune_with_feedback(
    rows: jax.Array, factor: jax.Array, block: int, choose: Choose, round_row: RoundRow
) -> tuple[jax.Array, jax.Array]:
    """Prune the rows of a matrix block by block, the last one first, feeding errors back.

    Args:
      rows: `(features, outputs)`.
      factor: from `feedback_factor`, of the features in the same order.
      block: how many rows are chosen from together, counted from the last row.
      choose: `(first, current) -> keep`, from the number of a block's first row and the values
        that its rows have before any of them is changed, `(block, outputs)`, to booleans. Where
        block does not divide the features rows of zeros come first, with numbers below 0.
      round_row: as for `round_with_feedback`; what is made of the weights that are kept.

    Returns:
      The rows with zeros, and where weights were kept.

    Example:
      >>> import jax.numpy as jnp
      >>> rows, factor = jnp.array([[2.0], [1.0]]), jnp.array([[1.0, 0.5], [0.0, 1.0]])
      >>> larger = lambda first, current: jnp.abs(current) > 1.5
      >>> pruned, keep = prune_with_feedback(rows, factor, 2, larger, lambda index, row: row)
      >>> pruned.ravel(), keep.ravel()
      (Array([2.5, 0. ], dtype=float32), Array([ True, False], dtype=bool))
    """
    tile, run, panel = _block_sizes(rows.shape[0], block)
    padding = -rows.shape[0] % run
    rows = jnp.pad(rows, ((padding, 0), (0, 0)))
    factor = jnp.pad(factor, ((padding, 0), (padding, 0)))
    in_block = partial(
        _settle_block,
        tile=tile,
        choose=lambda first, current: choose(first - padding, current),
        round_row=lambda index, values: round_row(jnp.maximum(index - padding, 0), values),
    )
    kinds = (rows.dtype, jnp.bool_)
    in_run = partial(_settle_parts, size=block, settle=in_block, kinds=kinds)
    in_panel = partial(_settle_parts, size=run, settle=in_run, kinds=kinds)
    pruned, keep = _settle_panels(rows, factor, panel, in_panel)
    return pruned[padding:], keep[padding:]
