"""Was there enough calibration data, and does the chosen range suit it?

`activation_adequacy` runs data (better such as the ranges were not chosen on) through a model and
says for each layer how many rows there were for how many features, how much falls outside the
range, how many features and codes were used at all, and whether the batches agree.
`format_adequacy` (in a file of its own) writes it as a table and says in words what to do.
"""

import functools
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jopt.layers._calibrate import Apply, accumulate, finalise_states, scans_only
from jopt.layers._statistics import Statistic, rows_extremes
from jopt.quant._histogram import Histogram, bin_centres, bin_width, histogram
from jopt.quant._histogram_ranges import Ends, restored_points
from jopt.quant._spec import QuantSpec


class Widths(NamedTuple):
    """Accumulate the widths of the batches' ranges, one after the other.

    Attributes:
      batches: how many.
      mean: of the widths.
      squares: sum of squared deviations from the mean.
      trend: sum of deviations from the mean times the number of the batch.
    """

    batches: jax.Array
    mean: jax.Array
    squares: jax.Array
    trend: jax.Array


class Usage(NamedTuple):
    """Say how the inputs of a layer were used by calibration data; see `usage`.

    Attributes:
      rows: how many, a float32 scalar.
      active: whether each feature was ever other than 0, bool, (features,).
      values: a `Histogram` of all values.
      widths: what the batches' ranges were.
    """

    rows: jax.Array
    active: jax.Array
    values: Histogram
    widths: Widths


class Adequacy(NamedTuple):
    """Say how well calibration data and a range suit a layer's inputs.

    Attributes:
      rows: how many rows were seen.
      features: how many numbers a row has; fewer rows than features cannot fix a full `gram`.
      saturation: the share of values outside the range, 0 to 1.
      active: the share of features that were ever other than 0.
      codes: the share of the levels within the range that were used.
      spread: the standard deviation of the widths of the batches' ranges, relative to their mean;
        NaN for fewer than two batches.
      drift: how much the widths grew (or, negative, shrank) from the first batch to the last by
        their linear trend, relative to their mean; NaN for fewer than two batches.
    """

    rows: jax.Array
    features: jax.Array
    saturation: jax.Array
    active: jax.Array
    codes: jax.Array
    spread: jax.Array
    drift: jax.Array


def _merge_widths(first: Widths, second: Widths) -> Widths:
    total = first.batches + second.batches
    weight = jnp.where(total > 0, total, 1.0)
    step = second.mean - first.mean
    mean = first.mean + step * (second.batches / weight)
    between = step * step * (first.batches * second.batches / weight)
    # The second's batches are numbered on from the first's. Deviations sum to zero in each part,
    # so that only the parts' means are left to add: their middles lie half the total apart.
    apart = step * (first.batches * second.batches / weight) * (total / 2)
    return Widths(
        total, mean, first.squares + second.squares + between, first.trend + second.trend + apart
    )


@functools.lru_cache
def usage(bins: int = 2048) -> Statistic:
    """Make the statistic that `adequacy` judges by.

    `merge` equals one pass: exactly for counts, up to rounding for the widths of the batches,
    which are numbered in the order of merging.

    Args:
      bins: of the histogram, a power of two, at least 16.

    Returns:
      A `Statistic` whose figures are a `Usage`.

    Raises:
      ValueError: bins is not such a number.

    Example:
      >>> import jax.numpy as jnp
      >>> statistic = usage()
      >>> state = statistic.update(statistic.init(2), jnp.array([[0.0, 1.0], [0.0, 3.0]]))
      >>> state.active, float(state.widths.mean)
      (Array([False,  True], dtype=bool), 3.0)
    """
    values = histogram(bins)

    def init(features: int) -> Usage:
        zero = jnp.zeros((), jnp.float32)
        none = Widths(zero, zero, zero, zero)
        return Usage(zero, jnp.zeros(features, bool), values.init(1), none)

    def update(state: Usage, rows: jax.Array) -> Usage:
        if not rows.size:
            return state
        low, high = rows_extremes(rows)
        one, zero = jnp.ones((), jnp.float32), jnp.zeros((), jnp.float32)
        width = Widths(one, high - low, zero, zero)
        return Usage(
            state.rows + rows.shape[0],
            state.active | jnp.any(rows != 0, axis=0),
            values.update(state.values, rows),
            _merge_widths(state.widths, width),
        )

    def merge(first: Usage, second: Usage) -> Usage:
        return Usage(
            first.rows + second.rows,
            first.active | second.active,
            values.merge(first.values, second.values),
            _merge_widths(first.widths, second.widths),
        )

    def finalise(state: Usage) -> Usage:
        return state._replace(values=values.finalise(state.values))

    return Statistic(init, update, merge, finalise)


def _saturation(values: Histogram, low: jax.Array, high: jax.Array) -> jax.Array:
    """Return the share of values outside a range, bins that lie there as a whole."""
    counts, centres = values.counts.astype(jnp.float32), bin_centres(values)
    zeros = values.zeros.astype(jnp.float32)
    half = bin_width(values.exponent) / 2
    outside = (centres + half <= low) | (centres - half > high)
    zero_out = (low > 0) | (high < 0)
    number = jnp.sum(jnp.where(outside, counts, 0.0)) + jnp.where(zero_out, zeros, 0.0)
    return number / jnp.maximum(jnp.sum(counts) + zeros, 1.0)


def _codes_used(values: Histogram, low: jax.Array, high: jax.Array, spec: QuantSpec) -> jax.Array:
    """Return the share of the levels within a range that some value takes."""
    bins = values.counts.shape[0]
    share = jnp.linspace(0.0, 1.0, 4 * bins, dtype=jnp.float32)
    sweep = restored_points(low + (high - low) * share, low, high, spec)
    there = 1 + jnp.sum(sweep[1:] != sweep[:-1])
    half = values.counts.shape[0] // 2
    centres = jnp.clip(bin_centres(values), values.low, values.high)
    points = jnp.insert(centres, half, 0.0)  # zeros are counted apart
    seen = jnp.insert(values.counts > 0, half, values.zeros > 0)
    restored = jnp.where(seen, restored_points(points, low, high, spec), -jnp.inf)
    # Points ascend, and so do their levels: one above all before it is new.
    highest = jax.lax.cummax(restored)
    before = jnp.concatenate([jnp.full(1, -jnp.inf), highest[:-1]])
    taken = jnp.sum(seen & (restored > before))
    return taken.astype(jnp.float32) / there.astype(jnp.float32)


def _stability(widths: Widths) -> tuple[jax.Array, jax.Array]:
    number = widths.batches
    mean = jnp.where(widths.mean > 0, widths.mean, 1.0)
    spread = jnp.sqrt(widths.squares / jnp.maximum(number, 1.0)) / mean
    # Batches are numbered evenly, so the sum of their squared deviations is n (n^2 - 1) / 12.
    slope = widths.trend * 12 / jnp.maximum(number * (number * number - 1), 1.0)
    drift = slope * (number - 1) / mean
    known = number >= 2
    return jnp.where(known, spread, jnp.nan), jnp.where(known, drift, jnp.nan)


@partial(jax.jit, static_argnames=("spec", "axes"))
def _judge(
    values: Histogram,
    widths: Widths,
    low: jax.Array,
    high: jax.Array,
    spec: QuantSpec,
    axes: int,
) -> tuple[jax.Array, ...]:
    """Return saturation, codes, spread and drift; one compilation serves any number of features."""

    def one(values: Histogram, widths: Widths, low: jax.Array, high: jax.Array) -> Any:
        outside = _saturation(values, low, high)
        return outside, _codes_used(values, low, high, spec), *_stability(widths)

    function = one
    for _ in range(axes):
        function = jax.vmap(function)
    return function(values, widths, low, high)


def adequacy(figures: Usage, low: ArrayLike, high: ArrayLike, spec: QuantSpec) -> Adequacy:
    """Judge a range by what calibration data show of a layer's inputs.

    `saturation = #{x < low or x > high} / #x`, from below: a bin of the histogram that an end of
    the range divides counts as inside. With n batches whose ranges are w_i wide,
    `spread = std(w) / mean(w)`, and `drift = slope * (n - 1) / mean(w)`, slope the one of the line
    of least squares through `(i, w_i)`.

    Args:
      figures: from `usage`; leading axes (stacked layers) are mapped over.
      low: lower end of the range, a scalar or of the leading axes' shape.
      high: upper end.
      spec: bits and grid of the inputs.

    Returns:
      An `Adequacy` of float32 scalars, or of arrays of the leading axes' shape.

    Raises:
      TypeError: figures is not a `Usage`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import quant
      >>> statistic = usage()
      >>> state = statistic.update(statistic.init(2), jnp.array([[0.0, 1.0], [0.0, 3.0]]))
      >>> spec = quant.QuantSpec(2, (), grid=quant.affine_zero)  # four levels: 0, 1, 2, 3
      >>> judged = adequacy(statistic.finalise(state), jnp.array(0.0), jnp.array(3.0), spec)
      >>> float(judged.saturation), float(judged.active), float(judged.codes)
      (0.0, 0.5, 0.75)
    """
    if not isinstance(figures, Usage):
        raise TypeError(
            f"figures must be a Usage, gathered with statistic=usage(), not {figures!r}."
        )
    shape = figures.rows.shape
    low, high = (jnp.broadcast_to(jnp.asarray(end, jnp.float32), shape) for end in (low, high))
    outside, codes, spread, drift = _judge(
        figures.values, figures.widths, low, high, spec, len(shape)
    )
    active = jnp.mean(figures.active, axis=-1, dtype=jnp.float32)
    features = jnp.full(shape, figures.active.shape[-1], jnp.float32)
    return Adequacy(figures.rows, features, outside, active, codes, spread, drift)


def activation_adequacy(
    apply: Apply,
    params: Any,
    batches: Iterable[Any],
    ranges: Mapping[str, Ends],
    spec: QuantSpec,
    max_rows: int | None = None,
) -> dict[str, Adequacy]:
    """Judge the ranges of all layers' inputs on data, better held out from those they come from.

    Args:
      apply: `(params, *args) -> outputs`, any pure function.
      params: its parameters, plain arrays.
      batches: as for `calibrate`.
      ranges: `{path: (low, high)}`, from `activation_ranges`.
      spec: bits and grid of the inputs, as given there.
      max_rows: as for `calibrate`.

    Returns:
      `{path: Adequacy}` for the paths of `ranges`; give it to `format_adequacy`.

    Raises:
      ValueError: as `calibrate`, or `ranges` has a path that is no layer.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import quant
      >>> apply, params = lambda params, x: x @ params["w"], {"w": jnp.ones((1, 2))}
      >>> ranges = {"w": (jnp.array(-1.0), jnp.array(1.0))}
      >>> batches = [jnp.array([[0.5], [3.0], [1.0], [-0.5]])]
      >>> judged = activation_adequacy(apply, params, batches, ranges, quant.QuantSpec(8, ()))
      >>> float(judged["w"].saturation)
      0.25
    """
    states = accumulate(apply, params, batches, usage(), max_rows, scans_only)
    unknown = [path for path in ranges if path not in states]
    if unknown:
        raise ValueError(f"ranges has {unknown}, not layers; the layers are {list(states)}.")
    figures = finalise_states(usage(), {path: states[path] for path in ranges})
    return {path: adequacy(figures[path], *ranges[path], spec) for path in ranges}
