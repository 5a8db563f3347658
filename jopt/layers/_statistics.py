"""What calibration data say of the inputs of a layer, gathered batch by batch.

A `Statistic` is a monoid, four functions: `init` gives the state of no data, `update` adds a batch,
`merge` joins the states of two shards of the data (and equals one pass over both), `finalise` turns
a state into figures. All are pure and work under `jit` and `vmap`. `input_statistics` is what the
methods after training need; `extremes`, `moving_average` and `histogram` give ranges for quantized
inputs, one for the whole tensor, or with `per_feature` one for each feature; `together` gathers
several in one pass.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Statistic(NamedTuple):
    """Name the four functions of a statistic of rows, as optax names the two of a transformation.

    Attributes:
      init: `(features) -> state` of no rows; `features` is a whole number.
      update: `(state, rows) -> state`, with rows of shape `(count, features)`.
      merge: `(state, state) -> state`.
      finalise: `state -> figures`.
    """

    init: Callable[[int], Any]
    update: Callable[[Any, jax.Array], Any]
    merge: Callable[[Any, Any], Any]
    finalise: Callable[[Any], Any]


class InputSums(NamedTuple):
    """Accumulate sums over rows; see `InputStatistics`."""

    count: jax.Array
    total: jax.Array
    absolute: jax.Array
    largest: jax.Array
    gram: jax.Array


class InputStatistics(NamedTuple):
    """Describe the inputs x of one layer, one row a position, `features` numbers a row.

    Attributes:
      count: number of rows, a float32 scalar (exact up to 2^24, then to one part in 10^7).
      mean: `E[x]`, (features,).
      mean_abs: `E[|x|]`, (features,).
      abs_max: `max |x|`, (features,).
      gram: `E[x x^T]`, (features, features). The mean squared error that replacing the kernel W by
        V makes in one output is `(W - V)^T gram (W - V)`; its diagonal is `E[x^2]`.
    """

    count: jax.Array
    mean: jax.Array
    mean_abs: jax.Array
    abs_max: jax.Array
    gram: jax.Array


def _init(features: int) -> InputSums:
    zeros = jnp.zeros(features, jnp.float32)
    return InputSums(
        jnp.zeros((), jnp.float32), zeros, zeros, zeros, jnp.zeros((features, features))
    )


def _update(state: InputSums, rows: jax.Array) -> InputSums:
    rows = rows.astype(jnp.float32)
    return InputSums(
        state.count + rows.shape[0],
        state.total + rows.sum(0),
        state.absolute + jnp.abs(rows).sum(0),
        jnp.maximum(state.largest, jnp.abs(rows).max(0, initial=0.0)),
        state.gram + jnp.matmul(rows.T, rows, precision="highest"),  # no TF32 on a GPU
    )


def _merge(first: InputSums, second: InputSums) -> InputSums:
    summed = jax.tree.map(jnp.add, first, second)
    return summed._replace(largest=jnp.maximum(first.largest, second.largest))


def _finalise(state: InputSums) -> InputStatistics:
    count = jnp.maximum(state.count, 1.0)
    return InputStatistics(
        state.count,
        state.total / count,
        state.absolute / count,
        state.largest,
        state.gram / count,
    )


input_statistics = Statistic(_init, _update, _merge, _finalise)
"""Mean, mean magnitude, largest magnitude and second moments: what methods after training need.

`merge` equals one pass over both shards up to the rounding of float32 sums.
"""

# --- the ends of the range ------------------------------------------------------------------------


class Extremes(NamedTuple):
    """Give the ends of a range.

    Attributes:
      low: the smallest value, a float32 scalar.
      high: the largest.
    """

    low: jax.Array
    high: jax.Array


def rows_extremes(rows: jax.Array) -> Extremes:
    """Return the smallest and the largest value of a batch: inf and -inf where there is none."""
    rows = rows.astype(jnp.float32)
    return Extremes(jnp.min(rows, initial=jnp.inf), jnp.max(rows, initial=-jnp.inf))


def joined_extremes(first: Extremes, second: Extremes) -> Extremes:
    """Return the ends of what two ranges cover together."""
    return Extremes(jnp.minimum(first.low, second.low), jnp.maximum(first.high, second.high))


def known_extremes(state: Extremes) -> Extremes:
    """Return the ends, 0 and 0 where no value was seen."""
    empty = state.low > state.high
    return Extremes(jnp.where(empty, 0.0, state.low), jnp.where(empty, 0.0, state.high))


def no_extremes(features: int = 0) -> Extremes:
    """Return the ends of the range of no values."""
    del features
    return Extremes(jnp.full((), jnp.inf, jnp.float32), jnp.full((), -jnp.inf, jnp.float32))


extremes = Statistic(
    no_extremes,
    lambda state, rows: joined_extremes(state, rows_extremes(rows)),
    joined_extremes,
    known_extremes,
)
"""Smallest and largest value: figures are `Extremes(low, high)`, both 0 where no value was seen.

`merge` equals one pass exactly, in any order. NaN shows in both ends.
"""


class MovingExtremes(NamedTuple):
    """Accumulate decayed sums of the ends of each batch; see `moving_average`."""

    batches: jax.Array
    low: jax.Array
    high: jax.Array


@functools.lru_cache
def moving_average(momentum: float = 0.99) -> Statistic:
    """Make the statistic that averages the ends of the batches, later batches counting more.

    `low = sum_i (1 - m) m^(n - i) low_i / (1 - m^n)` over the batches i = 1..n, and so `high`. It
    forgets outliers of early batches and depends on their order: `merge(first, second)` equals one
    pass over the batches of `first` and then those of `second`, and is associative, up to rounding.
    A batch without rows does not count.

    The paper starts from the first batch's ends; dividing by `1 - m^n` (as Adam does) gives the
    same limit without that batch's large share.

    Args:
      momentum: the share of the old average kept at each batch, between 0 and 1.

    Returns:
      A `Statistic` whose figures are `Extremes(low, high)`, both 0 where no value was seen.

    Raises:
      ValueError: momentum is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> statistic = moving_average(0.5)
      >>> state = statistic.update(statistic.init(1), jnp.array([[3.0], [0.0]]))
      >>> state = statistic.update(state, jnp.array([[6.0], [-3.0]]))
      >>> statistic.finalise(state)  # (3 / 4 + 6 / 2) / (3 / 4)
      Extremes(low=Array(-2., dtype=float32), high=Array(5., dtype=float32))

    References:
      Jacob et al., "Quantization and Training of Neural Networks for Efficient
      Integer-Arithmetic-Only Inference", 2018, https://arxiv.org/abs/1712.05877, section 3.1.
    """
    if not 0 < momentum < 1:
        raise ValueError(f"momentum must lie between 0 and 1, not {momentum!r}.")

    def init(features: int) -> MovingExtremes:
        del features
        zero = jnp.zeros((), jnp.float32)
        return MovingExtremes(zero, zero, zero)

    def merge(first: MovingExtremes, second: MovingExtremes) -> MovingExtremes:
        decay = jnp.exp(second.batches * math.log(momentum))
        return MovingExtremes(
            first.batches + second.batches,
            decay * first.low + second.low,
            decay * first.high + second.high,
        )

    def update(state: MovingExtremes, rows: jax.Array) -> MovingExtremes:
        if not rows.size:
            return state
        low, high = rows_extremes(rows)
        one = MovingExtremes(jnp.ones_like(low), (1 - momentum) * low, (1 - momentum) * high)
        return merge(state, one)

    def finalise(state: MovingExtremes) -> Extremes:
        weight = -jnp.expm1(state.batches * math.log(momentum))
        weight = jnp.where(state.batches > 0, weight, 1.0)
        return Extremes(state.low / weight, state.high / weight)

    return Statistic(init, update, merge, finalise)


# --- combining ------------------------------------------------------------------------------------


@functools.lru_cache
def per_feature(statistic: Statistic) -> Statistic:
    """Make a statistic of each feature by itself out of one of the whole tensor.

    Args:
      statistic: any `Statistic`; it sees each feature as rows of one feature.

    Returns:
      A `Statistic` whose states and figures have a leading axis of features.

    Example:
      >>> import jax.numpy as jnp
      >>> each = per_feature(extremes)
      >>> state = each.update(each.init(2), jnp.array([[1.0, 5.0], [3.0, -5.0]]))
      >>> each.finalise(state).high
      Array([3., 5.], dtype=float32)
    """

    def init(features: int) -> Any:
        return jax.tree.map(lambda leaf: jnp.stack([leaf] * features), statistic.init(1))

    def update(state: Any, rows: jax.Array) -> Any:
        return jax.vmap(statistic.update)(state, rows.T[..., None])

    return Statistic(init, update, jax.vmap(statistic.merge), jax.vmap(statistic.finalise))


@functools.lru_cache
def together(*statistics: Statistic) -> Statistic:
    """Make the statistic that gathers several in one pass.

    Args:
      *statistics: any number of them.

    Returns:
      A `Statistic` whose states and figures are tuples, in the same order.

    Example:
      >>> import jax.numpy as jnp
      >>> both = together(extremes, input_statistics)
      >>> figures = both.finalise(both.update(both.init(1), jnp.array([[1.0], [3.0]])))
      >>> float(figures[0].high), float(figures[1].mean[0])
      (3.0, 2.0)
    """

    def init(features: int) -> tuple[Any, ...]:
        return tuple(statistic.init(features) for statistic in statistics)

    def update(state: tuple[Any, ...], rows: jax.Array) -> tuple[Any, ...]:
        pairs = zip(statistics, state, strict=True)
        return tuple(statistic.update(own, rows) for statistic, own in pairs)

    def merge(first: tuple[Any, ...], second: tuple[Any, ...]) -> tuple[Any, ...]:
        triples = zip(statistics, first, second, strict=True)
        return tuple(statistic.merge(one, other) for statistic, one, other in triples)

    def finalise(state: tuple[Any, ...]) -> tuple[Any, ...]:
        pairs = zip(statistics, state, strict=True)
        return tuple(statistic.finalise(own) for statistic, own in pairs)

    return Statistic(init, update, merge, finalise)
