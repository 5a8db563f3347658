"""Exact optimal brain surgeon for layers: remove weights one by one, the cheapest first."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jopt._arrays import working_dtype
from jopt.layers._feedback import damped_gram
from jopt.layers._outcome import Outcome, to_rows
from jopt.layers._statistics import InputStatistics
from jopt.prune._masks import Sparsity
from jopt.prune._one_shot import (
    Pattern,
    better_than_magnitude,
    check_kernel,
    magnitude_mask,
    pruned_count,
    split_pattern,
)
from jopt.prune._reconstruct import by_output, solve_kept
from jopt.prune._threshold import keep_largest

Share = Callable[[jax.Array, Any], jax.Array]

_LAZY = 32  # removals after which the inverse is brought up to date by one product


def removed_by_loss(losses: jax.Array, count: jax.Array | int) -> jax.Array:
    """Share removals among outputs so that each next one is the cheapest there is.

    As if the cheapest next weight of all outputs were taken `count` times (algorithm 2). Losses of
    an output need not rise; taking the cheapest next is taking the smallest running maxima.

    Args:
      losses: `(outputs, steps)`, of each output's removals in order.
      count: of removals over all outputs.

    Returns:
      int32, `(outputs,)`, how many each output loses.

    Example:
      >>> removed_by_loss(jnp.array([[1.0, 4.0], [2.0, 3.0]]), 3)
      Array([1, 2], dtype=int32)
    """
    highest = lax.cummax(jnp.nan_to_num(losses, nan=jnp.inf), axis=1)
    return keep_largest(-highest, count).sum(1, dtype=jnp.int32)


def removed_evenly(losses: jax.Array, count: jax.Array | int) -> jax.Array:
    """Share removals among outputs evenly, the remainder to the first ones.

    Args:
      losses: `(outputs, steps)`.
      count: of removals over all outputs.

    Returns:
      int32, `(outputs,)`.

    Example:
      >>> removed_evenly(jnp.ones((2, 4)), 5)
      Array([3, 2], dtype=int32)
    """
    outputs = losses.shape[0]
    total = jnp.asarray(count, jnp.int32)
    return total // outputs + (jnp.arange(outputs) < total % outputs).astype(jnp.int32)


def _removable(left: jax.Array, pattern: Pattern | None) -> jax.Array:
    """Return which weights may go: those left, in groups that have more than n."""
    if pattern is None:
        return left
    n, m = pattern
    remaining = left.reshape(-1, m).sum(1, keepdims=True, dtype=jnp.int32)
    return left & jnp.broadcast_to(remaining > n, (len(left) // m, m)).reshape(-1)


def _remove_some(
    carry: tuple[jax.Array, ...], numbers: jax.Array, floor: jax.Array, pattern: Pattern | None
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Remove a few weights of one output; the inverse is brought up to date at the end.

    The inverse of the gram of what is left is `inverse - updates^T updates`: each removal adds a
    row to updates, as a step of a Cholesky factorisation with pivots adds a column.
    """
    inverse, weights, variances, removed_at, last = carry

    def remove(state: tuple[jax.Array, ...], step: jax.Array) -> tuple[Any, jax.Array]:
        updates, weights, variances, removed_at = state
        allowed = _removable(removed_at == last, pattern)
        losses = jnp.where(allowed, jnp.square(weights) / variances, jnp.inf)
        at = jnp.argmin(losses)
        possible = allowed[at]
        column = inverse[:, at] - jnp.matmul(updates[:, at], updates, precision="highest")
        pivot = jnp.maximum(column[at], floor[at])
        column = jnp.where(possible & (removed_at == last), column, jnp.zeros_like(column))
        update = column / jnp.sqrt(pivot)
        weights = weights - column * (weights[at] / pivot)
        weights = weights.at[at].multiply(jnp.where(possible, 0.0, 1.0).astype(weights.dtype))
        variances = jnp.maximum(variances - jnp.square(update), floor)
        updates = updates.at[step - numbers[0]].set(update)
        removed_at = removed_at.at[at].set(jnp.where(possible, step, removed_at[at]))
        return (updates, weights, variances, removed_at), losses[at]

    none = jnp.zeros((len(numbers), len(weights)), weights.dtype)
    state, losses = lax.scan(remove, (none, weights, variances, removed_at), numbers)
    updates, weights, variances, removed_at = state
    inverse = inverse - jnp.matmul(updates.T, updates, precision="highest")
    return (inverse, weights, variances, removed_at, last), losses


def _removals(
    weights: jax.Array, gram: jax.Array, inverse: jax.Array, steps: int, pattern: Pattern | None
) -> tuple[jax.Array, jax.Array]:
    """Remove the weights of one output one by one; return the steps at which each went, and losses.

    `[H^-1]_pp` is never below `1 / H_pp`, in whatever set p is left: rounding is kept from it.
    """
    lazy = min(_LAZY, steps)
    floor = 1 / jnp.diagonal(gram)
    numbers = jnp.arange(-(-steps // lazy) * lazy, dtype=jnp.int32).reshape(-1, lazy)
    never = jnp.full(len(weights), numbers.size, jnp.int32)
    start = (inverse, weights, jnp.maximum(jnp.diagonal(inverse), floor), never, never)
    body = partial(_remove_some, floor=floor, pattern=pattern)
    (_, _, _, removed_at, _), losses = lax.scan(body, start, numbers)
    return removed_at, losses.reshape(-1)[:steps]


def _remove_rows(
    rows: jax.Array, gram: jax.Array, steps: int, pattern: Pattern | None
) -> tuple[jax.Array, jax.Array]:
    """Return for each output the steps at which its weights went, and what each removal cost."""
    features = rows.shape[0]
    if steps == 0:
        return jnp.zeros((rows.shape[1], features), jnp.int32), jnp.zeros((rows.shape[1], 0))
    lower = lax.linalg.cholesky(gram, symmetrize_input=False)
    inverse = jax.scipy.linalg.cho_solve((lower, True), jnp.eye(features, dtype=gram.dtype))
    inverse = (inverse + inverse.T) / 2
    return by_output(lambda one: _removals(one, gram, inverse, steps, pattern), features, rows)


@partial(jax.jit, static_argnames=("pattern", "share"))
def _obc(
    weights: jax.Array,
    statistics: InputStatistics,
    large: jax.Array,
    count: ArrayLike | None,
    pattern: Pattern | None,
    damping: ArrayLike,
    share: Share,
) -> tuple[jax.Array, jax.Array, Outcome]:
    exact = working_dtype(weights.dtype)
    gram = statistics.gram.astype(exact)
    rows = to_rows(weights.astype(exact), gram)
    stacked, by_group = (rows, gram) if gram.ndim == 3 else (rows[None], gram[None])
    by_group = jax.vmap(lambda each: damped_gram(each, jnp.asarray(damping, exact)))(by_group)
    groups, features, outputs = stacked.shape
    steps = features if pattern is None else features // pattern[1] * (pattern[1] - pattern[0])
    removals = jax.vmap(lambda rows, gram: _remove_rows(rows, gram, steps, pattern))
    removed_at, losses = removals(stacked, by_group)
    counts = jnp.full(groups * outputs, steps, jnp.int32)
    if count is not None:
        counts = share(losses.reshape(-1, steps), jnp.asarray(count, jnp.int32))
    keep = (removed_at >= counts.reshape(groups, outputs, 1)).swapaxes(1, 2)
    solved = jax.vmap(solve_kept)(stacked, keep, by_group)
    if gram.ndim == 2:
        solved, keep = solved[0], keep[0]
    plain = jnp.where(large, rows, jnp.zeros_like(rows))
    return better_than_magnitude(weights, statistics, (solved, keep), (plain, large))


def obc(
    weights: ArrayLike,
    statistics: InputStatistics,
    sparsity: Sparsity | Pattern,
    damping: ArrayLike = 0.01,
    share: Share = removed_by_loss,
) -> tuple[jax.Array, jax.Array, Outcome]:
    """Prune a small layer by removing weights one at a time, each time the cheapest of its output.

    Removing weight p of an output, the others making up for it in the best way, costs

        w_p^2 / [H^-1]_pp  and changes them by  -w_p [H^-1]_:p / [H^-1]_pp,

    H the gram of the inputs that are left; then p leaves H, by a rank-one update of its inverse.
    Each output is taken apart to the last weight, and how many it really loses is decided from
    the costs of all outputs together. With a pattern (n, m) a group of m inputs that has only n
    left loses none. The time is `features^3` for each output: for hundreds of features, not
    thousands; there is `sparse_gpt` for these.

    Unlike the paper, updates of the inverse are gathered and made by a product of matrices, and
    the weights kept are in the end solved from gram itself (`reconstruct`), which rounding errors
    of many updates do not reach; in exact arithmetic both are the same.

    Args:
      weights: floating-point kernel, its inputs on the leading axes and its outputs on the others.
      statistics: of the layer's inputs; `gram` is used, `(features, features)`, or with a leading
        axis of groups where the last axis of the kernel is divided into groups.
      sparsity: fraction to prune, 0 to 1, a Python number or a traced scalar, met exactly; or a
        pattern (n, m) that keeps n of every m inputs, m dividing the last axis of inputs.
      damping: share of the mean of gram's diagonal that is added to it. Not negative.
      share: `(losses, count) -> counts`, how many weights each output loses: `removed_by_loss`
        (algorithm 2) or `removed_evenly`. Not used with a pattern.

    Returns:
      The pruned kernel of the same shape and dtype, its mask (True keeps), and its `Outcome`, whose
      baseline is magnitude pruning with the same sparsity or pattern. Where the output error is not
      lower, the baseline is returned.

    Raises:
      ValueError: the statistics do not fit the kernel, `sparsity` is outside [0, 1], or the
        pattern does not fit.
      TypeError: the kernel is not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.layers import InputStatistics
      >>> weights = jnp.array([[2.0], [2.5], [1.5]])  # the first two inputs are nearly the same
      >>> gram = jnp.array([[1.0, 0.75, 0.0], [0.75, 1.0, 0.0], [0.0, 0.0, 1.0]])
      >>> alike = InputStatistics(None, None, None, None, gram)
      >>> pruned, mask, outcome = obc(weights, alike, 1 / 3, damping=0.0)
      >>> pruned.ravel()  # 2.5 + 0.75 * 2; it costs 4 (1 - 0.75^2), the third 1.5^2
      Array([0. , 4. , 1.5], dtype=float32)

    References:
      Frantar, Singh, Alistarh, "Optimal Brain Compression: A Framework for Accurate Post-Training
      Quantization and Pruning", 2022, https://arxiv.org/abs/2208.11580, algorithms 1 and 2.
    """
    array = jnp.asarray(weights)
    fraction, pattern = split_pattern(sparsity)
    check_kernel(array, statistics, pattern)
    rows = to_rows(array, statistics.gram)
    count = None if pattern is not None else pruned_count(rows.size, fraction)
    large = magnitude_mask(rows, count, pattern)
    return _obc(array, statistics, large, count, pattern, damping, share)
