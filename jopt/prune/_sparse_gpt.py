"""SparseGPT: prune a layer's inputs one after the other, each making up for those before it."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jax.typing import ArrayLike

from jopt._arrays import working_dtype
from jopt.layers._feedback import Choose, RoundRow, factor_and_diagonal, prune_with_feedback
from jopt.layers._outcome import Outcome, to_rows
from jopt.layers._statistics import InputStatistics
from jopt.prune._masks import Sparsity
from jopt.prune._n_m import n_m_mask
from jopt.prune._one_shot import (
    Pattern,
    better_than_magnitude,
    check_kernel,
    magnitude_mask,
    pruned_count,
    split_pattern,
)
from jopt.prune._threshold import keep_largest


def _as_they_are(index: jax.Array, values: jax.Array) -> jax.Array:
    """Round nothing."""
    del index
    return values


def _pruned_before(shape: tuple[int, ...], block: int, sparsity: Any) -> jax.Array:
    """Return how many weights are pruned before each block, `(groups, blocks + 1)`.

    Counts are rounded where they add up, so that the whole kernel has exactly its sparsity.
    """
    groups, features, outputs = shape
    settled = [min(block * index, features) for index in range(-(-features // block) + 1)]
    sizes = [(features * group + rows) * outputs for group in range(groups) for rows in settled]
    counts = [pruned_count(size, sparsity, 0) for size in sizes]
    if all(isinstance(count, int) for count in counts):
        counts = np.array(counts, np.int32)
    most = math.prod(shape) - min(1, math.prod(shape))  # one weight stays
    return jnp.minimum(jnp.asarray(counts), most).reshape(groups, len(settled))


def _choosing(
    importance: jax.Array, block: int, pattern: Pattern | None, pruned_before: Any
) -> Choose:
    """Return what keeps the weights of a block that cost most to remove.

    Rows come in reverse order, so that the core, which begins with the last, begins with the first.
    """
    features = len(importance)

    def choose(first: jax.Array, current: jax.Array) -> jax.Array:
        numbers = first + jnp.arange(block)
        scores = jnp.abs(current) * importance.at[numbers].get(mode="clip")[:, None]
        scores = jnp.where(numbers[:, None] < 0, jnp.inf, scores)[::-1]  # padding costs nothing
        if pattern is not None:
            return n_m_mask(scores, *pattern, axis=0)[::-1]
        place = (features - first) // block
        pruned = pruned_before[place] - pruned_before[place - 1]
        return keep_largest(scores, scores.size - pruned)[::-1]

    return choose


def _prune_rows(
    rows: jax.Array,
    gram: jax.Array,
    pruned_before: Any,
    round_row: RoundRow | None,
    damping: jax.Array,
    block: int,
    pattern: Pattern | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Prune a matrix; return it, its mask, and the rows plainly rounded."""
    rounding = round_row or _as_they_are
    factor, diagonal = factor_and_diagonal(gram[::-1, ::-1], damping)
    importance = jnp.where(jnp.diagonal(gram)[::-1] > 0, diagonal, jnp.zeros_like(diagonal))
    last = rows.shape[0] - 1
    pruned, keep = prune_with_feedback(
        rows[::-1],
        factor,
        block,
        _choosing(importance, block, pattern, pruned_before),
        lambda index, values: rounding(last - index, values),
    )
    nearest = jax.vmap(rounding)(jnp.arange(last + 1), rows) if round_row else rows
    return pruned[::-1], keep[::-1], nearest


@partial(jax.jit, static_argnames=("pattern", "block"))
def _sparse_gpt(
    weights: jax.Array,
    statistics: InputStatistics,
    large: jax.Array,
    pruned_before: jax.Array | None,
    pattern: Pattern | None,
    damping: ArrayLike,
    block: int,
    round_row: RoundRow | None,
) -> tuple[jax.Array, jax.Array, Outcome]:
    exact = working_dtype(weights.dtype)
    gram = statistics.gram.astype(exact)
    rows = to_rows(weights.astype(exact), gram)

    def run(rows: jax.Array, gram: jax.Array, before: Any, round_row: Any) -> Any:
        share = jnp.asarray(damping, exact)
        return _prune_rows(rows, gram, before, round_row, share, block, pattern)

    if gram.ndim == 3:
        pruned, keep, nearest = jax.vmap(run)(rows, gram, pruned_before, round_row)
    else:
        before = None if pruned_before is None else pruned_before[0]
        pruned, keep, nearest = run(rows, gram, before, round_row)
    plain = jnp.where(large, nearest, jnp.zeros_like(nearest))
    return better_than_magnitude(weights, statistics, (pruned, keep), (plain, large))


def sparse_gpt(
    weights: ArrayLike,
    statistics: InputStatistics,
    sparsity: Sparsity | Pattern,
    damping: ArrayLike = 0.01,
    block: int = 128,
    round_row: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array, Outcome]:
    """Prune a kernel so that its layer's outputs change least on calibration data, in one pass.

    Input by input, the first one first: weights are set to zero, and the error is made up for by
    the inputs that come after, in the way that is best if these stay. Which weights go is decided a
    block of inputs at a time, over all outputs together, when the block is reached: those of lowest

        w^2 / [H^-1]_jj,  H = gram of the inputs from j on, w as it has become by then.

    The whole kernel loses exactly `round(size * sparsity)` weights, and each block its share to
    within one. With a pattern (n, m), n of every m consecutive inputs of each output are kept,
    chosen when the m inputs are reached. Weights of an input that was always zero go first.

    The factor of gram is taken in the reverse order of inputs, which gives what the paper's factor
    of the inverse gives (`jopt/layers/_feedback.py` derives it). Unlike the paper, counts are exact
    whatever the ties, and weights of dead inputs that need not go keep their values.

    Args:
      weights: floating-point kernel, its inputs on the leading axes and its outputs on the others:
        `(inputs, outputs)`, `(height, width, inputs, outputs)`.
      statistics: of the layer's inputs; `gram` is used, `(features, features)`, or with a leading
        axis of groups where the last axis of the kernel is divided into groups.
      sparsity: fraction to prune, 0 to 1, a Python number or a traced scalar; or a pattern (n, m)
        that keeps n of every m inputs, m dividing the last axis of inputs.
      damping: share of the mean of gram's diagonal that is added to it. Not negative.
      block: how many inputs are chosen from together; with a pattern it is m.
      round_row: `(index, values) -> values`, which rounds what is kept of an input in the same
        pass, as `jopt.quant.row_rounding` makes it; its error is made up for as well. A
        `jax.tree_util.Partial` can hold arrays that change without compiling anew; with groups
        they have a leading axis of groups.

    Returns:
      The pruned kernel of the same shape and dtype, its mask (True keeps), and its `Outcome`, whose
      baseline is magnitude pruning of the kernel with the same sparsity or pattern (and the same
      rounding). Where the output error is not lower, the baseline is returned.

    Raises:
      ValueError: the statistics do not fit the kernel, `sparsity` is outside [0, 1], the pattern
        does not fit, or `block` is below 1.
      TypeError: the kernel is not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.layers import InputStatistics
      >>> weights = jnp.array([[1.0], [1.1]])  # twins: one can do the work of both
      >>> twins = InputStatistics(None, None, None, None, jnp.array([[1.0, 0.9], [0.9, 1.0]]))
      >>> pruned, mask, outcome = sparse_gpt(weights, twins, 0.5, damping=0.0)
      >>> pruned.ravel(), mask.ravel()  # 1.1 + 0.9 * 1.0
      (Array([0., 2.], dtype=float32), Array([False,  True], dtype=bool))
      >>> outcome.error.round(4), outcome.baseline  # 1 - 0.9^2 and 1
      (Array(0.19, dtype=float32), Array(1., dtype=float32))

    References:
      Frantar, Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
      2023, https://arxiv.org/abs/2301.00774, algorithm 1 and section 3.
    """
    array = jnp.asarray(weights)
    fraction, pattern = split_pattern(sparsity)
    check_kernel(array, statistics, pattern)
    if block < 1:
        raise ValueError(f"block must be at least 1, not {block!r}.")
    if round_row is not None and not isinstance(round_row, Partial):
        round_row = Partial(round_row)
    rows = to_rows(array, statistics.gram)
    shape = rows.shape if rows.ndim == 3 else (1, *rows.shape)
    before, count = None, None
    if pattern is None:
        block = min(block, shape[1])
        before, count = _pruned_before(shape, block, fraction), pruned_count(rows.size, fraction)
    else:
        block = pattern[1]
    large = magnitude_mask(rows, count, pattern)
    return _sparse_gpt(array, statistics, large, before, pattern, damping, block, round_row)
