"""Ranges for quantized inputs, from statistics gathered batch by batch.

A method is a function `(figures, spec) -> (low, high)`. `minmax_range` takes the ends of any
figures that have them (`extremes`, `moving_average`, `histogram`); `percentile_range`, `mse_range`
and `entropy_range` need the `Histogram` of a `histogram`. As in the ranges of weights, they choose
a threshold T and cut the ends at -T and T.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jopt._arrays import materialize
from jopt.quant._entropy import entropy_threshold
from jopt.quant._histogram import Histogram, bin_centres, bin_width, folded_counts
from jopt.quant._percentile import check_percent
from jopt.quant._range_search import search_range, shrink_factors
from jopt.quant._ranges import clip_range
from jopt.quant._spec import QuantSpec

Ends = tuple[jax.Array, jax.Array]
Method = Callable[[Any, QuantSpec], Ends]

_POINTS_A_BIN = 4


def _need_histogram(figures: Any) -> None:
    if not isinstance(figures, Histogram):
        raise TypeError(
            f"figures must be a Histogram, gathered with statistic=histogram(), not {figures!r}."
        )


def minmax_range(figures: Any, spec: QuantSpec) -> Ends:
    """Return the smallest and the largest value seen.

    Args:
      figures: `Extremes`, a `Histogram`, or whatever has `low` and `high`.
      spec: not used.

    Returns:
      `(low, high)`, float32 scalars.

    Raises:
      TypeError: the figures have no ends.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import quant
      >>> from jopt.layers import Extremes
      >>> ends = minmax_range(Extremes(jnp.array([0.0]), jnp.array([2.0])), quant.QuantSpec())
      >>> ends[1]
      Array([2.], dtype=float32)
    """
    del spec
    if not hasattr(figures, "low") or not hasattr(figures, "high"):
        raise TypeError(f"figures must have low and high, not be a {type(figures).__name__}.")
    return figures.low, figures.high


@functools.lru_cache
def percentile_range(percent: float) -> Method:
    """Make the method that holds at least `percent` of the values, to within a bin.

    T is the upper end of the first bin of magnitudes at which `percent` of all values, zeros among
    them, have been counted; where zeros alone are enough nothing is cut.

    Args:
      percent: above 0, at most 100.

    Returns:
      A method `(figures, spec) -> (low, high)`.

    Raises:
      ValueError: percent is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import quant
      >>> from jopt.quant import histogram
      >>> state = histogram(16).update(histogram(16).init(1), jnp.arange(1.0, 8.0)[:, None])
      >>> low, high = histogram_range(state, percentile_range(50), quant.QuantSpec())
      >>> float(high)  # half of 7 lies below 5
      5.0
    """
    check_percent(percent)

    def method(figures: Histogram, spec: QuantSpec) -> Ends:
        """Cut a histogram at a percentile: see `percentile_range`."""
        del spec
        _need_histogram(figures)
        counts = folded_counts(figures).astype(jnp.float32)
        zeros = figures.zeros.astype(jnp.float32)
        need = (jnp.sum(counts) + zeros) * (percent / 100)
        # A part in 10^6 forgives the rounding of the sums.
        reached = zeros + jnp.cumsum(counts) >= need * (1 - 1e-6)
        first = jnp.argmax(reached).astype(jnp.float32)
        threshold = (first + 1) * bin_width(figures.exponent)
        cut = reached[-1] & (zeros < need)
        return clip_range(figures.low, figures.high, jnp.where(cut, threshold, jnp.inf))

    return method


def _points(figures: Histogram) -> tuple[jax.Array, jax.Array]:
    """Return points that stand for the values of a histogram, and their shares; zero is one."""
    steps = (jnp.arange(_POINTS_A_BIN, dtype=jnp.float32) + 0.5) / _POINTS_A_BIN - 0.5
    width = bin_width(figures.exponent)
    points = bin_centres(figures)[:, None] + width * steps[None, :]
    counts = figures.counts.astype(jnp.float32)[:, None] / _POINTS_A_BIN
    shares = jnp.broadcast_to(counts, points.shape).reshape(-1)
    zero, zeros = jnp.zeros(1, jnp.float32), figures.zeros.astype(jnp.float32)[None]
    shares = jnp.concatenate([shares, zeros])
    points = jnp.clip(jnp.concatenate([points.reshape(-1), zero]), figures.low, figures.high)
    return points, shares / jnp.maximum(jnp.sum(shares), 1.0)


def restored_points(points: jax.Array, low: jax.Array, high: jax.Array, spec: QuantSpec) -> Any:
    """Round points to the levels of one range, given by its two ends as scalars."""
    levels = spec.grid.fit(points, low[None], high[None], spec.bits)
    return materialize(spec.grid.encode(points, levels, spec.bits))


@functools.lru_cache
def mse_search_range(candidates: int = 48, smallest: float = 0.1) -> Method:
    """Make the method of least squared error over a histogram, for the bits and grid of the spec.

    The values of a bin are taken as spread evenly over it; zeros are exact. Thresholds are in
    geometric progression, as in `mse_search`.

    Args:
      candidates: how many thresholds are tried, beside the uncut range.
      smallest: the smallest, relative to the largest magnitude.

    Returns:
      A method `(figures, spec) -> (low, high)`.

    Raises:
      ValueError: an argument is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import quant
      >>> from jopt.quant import histogram
      >>> rows = jnp.concatenate([jnp.ones(400), jnp.full(1, 1.8)])[:, None]
      >>> state = histogram().update(histogram().init(1), rows)
      >>> low, high = histogram_range(state, mse_search_range(), quant.QuantSpec(2))
      >>> round(float(high), 1)  # levels -T, 0, T
      1.0

    References:
      Nagel et al., "A White Paper on Neural Network Quantization", 2021,
      https://arxiv.org/abs/2106.08295, equation 11.
    """
    factors = shrink_factors(candidates, smallest)

    def method(figures: Histogram, spec: QuantSpec) -> Ends:
        """Cut a histogram where the squared error is least: see `mse_search_range`."""
        _need_histogram(figures)
        points, shares = _points(figures)
        unit = jnp.maximum(jnp.abs(figures.low), jnp.abs(figures.high))
        unit = jnp.where(unit > 0, unit, 1.0)

        def loss(low: jax.Array, high: jax.Array) -> jax.Array:
            error = (restored_points(points, low, high, spec) - points) / unit
            return jnp.sum(shares * error * error)

        return search_range(figures.low, figures.high, factors, loss)

    return method


mse_range = mse_search_range()
"""Cut a histogram where the squared error of what is restored is least: see `mse_search_range`."""


@functools.lru_cache
def entropy_search_range(candidates: int = 128) -> Method:
    """Make the method of least divergence between the values before and after quantization.

    See `entropy_threshold` for the equation. The levels are those of the spec's grid and bits.

    Args:
      candidates: how many thresholds are tried, evenly spaced.

    Returns:
      A method `(figures, spec) -> (low, high)`.

    Raises:
      ValueError: candidates is not a positive whole number.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import quant
      >>> from jopt.quant import histogram
      >>> rows = jnp.concatenate([jnp.linspace(0.0, 1.0, 5000), jnp.full(1, 6.0)])[:, None]
      >>> state = histogram().update(histogram().init(1), rows)
      >>> low, high = histogram_range(state, entropy_search_range(), quant.QuantSpec(8))
      >>> float(high) < 1.5
      True
    """
    if isinstance(candidates, bool) or not isinstance(candidates, int) or candidates < 1:
        raise ValueError(f"candidates must be a whole number of at least 1, not {candidates!r}.")

    def method(figures: Histogram, spec: QuantSpec) -> Ends:
        """Cut a histogram where the divergence is least: see `entropy_search_range`."""
        _need_histogram(figures)
        threshold = entropy_threshold(figures, spec.grid, spec.bits, candidates)
        return clip_range(figures.low, figures.high, threshold)

    return method


entropy_range = entropy_search_range()
"""Cut a histogram where the divergence is least: see `entropy_search_range`."""


@partial(jax.jit, static_argnames=("method", "spec", "leading"))
def _mapped(figures: Any, method: Method, spec: QuantSpec, leading: int) -> Ends:
    def function(figures: Any) -> Ends:
        return method(figures, spec)

    for _ in range(leading):
        function = jax.vmap(function)
    return function(figures)


def histogram_range(figures: Any, method: Method, spec: QuantSpec) -> Ends:
    """Choose the range of quantized inputs from what was gathered of them.

    Args:
      figures: a `Histogram`, or for `minmax_range` any figures with `low` and `high`; leading axes
        (stacked layers, features) are mapped over.
      method: `minmax_range`, `percentile_range(p)`, `mse_range`, `entropy_range` or a function of
        that form.
      spec: bits and grid of the quantized inputs.

    Returns:
      `(low, high)`, float32, of the leading axes' shape.

    Raises:
      TypeError: the figures are not what the method needs.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import quant
      >>> from jopt.quant import histogram
      >>> state = histogram().update(histogram().init(1), jnp.array([[-1.0], [3.0]]))
      >>> histogram_range(state, minmax_range, quant.QuantSpec())
      (Array(-1., dtype=float32), Array(3., dtype=float32))
    """
    if not isinstance(spec, QuantSpec):
        raise TypeError(f"spec must be a QuantSpec, not {spec!r}.")
    if not callable(method):
        raise TypeError(f"method must be a function (figures, spec), not {method!r}.")
    return _mapped(figures, method, spec, jnp.ndim(getattr(figures, "low", 0)))
