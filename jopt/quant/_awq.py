"""AWQ: enlarge the weights of the inputs that matter before rounding, as far as it helps."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jopt._arrays import working_dtype
from jopt._leaves import ScaledTensor
from jopt.layers._outcome import Outcome, keep_better, output_error, row_axes, to_rows
from jopt.layers._statistics import InputStatistics
from jopt.quant._quantize import check_values, quantize
from jopt.quant._scaling import as_factor, by_channel, quantize_scaled
from jopt.quant._spec import QuantSpec

_FLOOR = 1e-4  # of the largest mean magnitude: an input that is always zero has no scale of its own


def _scales(importance: jax.Array, exponent: jax.Array) -> jax.Array:
    """Return `importance^exponent` divided by `sqrt(max * min)`, all ones at exponent 0."""
    largest = jnp.max(importance)
    relative = jnp.maximum(importance / jnp.where(largest > 0, largest, 1.0), _FLOOR)
    powers = relative**exponent
    return powers / jnp.sqrt(jnp.max(powers) * jnp.min(powers))


@partial(jax.jit, static_argnames=("spec", "candidates"))
def _awq(
    weights: jax.Array, statistics: InputStatistics, spec: QuantSpec, candidates: int
) -> tuple[ScaledTensor, Outcome]:
    exact = working_dtype(weights.dtype)
    to_rows(weights, statistics.gram)  # refuses statistics of another layer
    features = statistics.gram.shape[-1]
    inputs = row_axes(weights.shape, features)
    importance = by_channel(statistics.mean_abs.astype(exact), weights.shape, inputs).mean(0)

    def factor(exponent: jax.Array) -> jax.Array:
        scales = _scales(importance, exponent)
        return as_factor(scales, weights.shape, features, weights.dtype)

    def error(exponent: jax.Array) -> jax.Array:
        leaf = quantize_scaled(weights, factor(exponent), spec)
        return output_error(weights, leaf, statistics)

    exponents = jnp.linspace(0.0, 1.0, candidates, dtype=exact)
    errors = jax.lax.map(error, exponents)
    best = exponents[jnp.argmin(jnp.where(jnp.isnan(errors), jnp.inf, errors))]
    leaf = quantize_scaled(weights, factor(best), spec)
    return keep_better(weights, leaf, quantize(weights, spec), statistics)


def awq(
    weights: ArrayLike, statistics: InputStatistics, spec: QuantSpec, candidates: int = 20
) -> tuple[ScaledTensor, Outcome]:
    """Quantize a kernel with a factor for each input, so that large inputs are rounded finer.

    `W ~ Q(s W) / s` with `s = mean_abs^a`, divided by `sqrt(max(s) min(s))`; a is the one of
    `candidates` numbers from 0 to 1 whose output error on the calibration data is the lowest. At
    a = 0 it is round-to-nearest, so it is never worse. Positions of a convolution share the factor
    of their channel. The paper clips as well: here that is the range, `spec.range`. (The paper's
    grid leaves out a = 1.)

    Args:
      weights: floating-point kernel, its inputs on the leading axes and its outputs on the others.
      statistics: of the layer's inputs; `gram` and `mean_abs` are used.
      spec: bits, block, range and grid.
      candidates: how many exponents are tried, 2 or more.

    Returns:
      A `ScaledTensor` of a compressed leaf and the factors `1 / s`, one for each index of the last
      input axis, and its `Outcome`. Where nothing is gained the factors are 1.

    Raises:
      ValueError: the statistics do not fit the kernel, `spec.block` does not divide it, or there
        are too few candidates.
      TypeError: the kernel is not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import quant
      >>> from jopt.quant import awq
      >>> rows = jnp.array([[9.0, 0.1], [-9.0, 0.1]])
      >>> from jopt import layers
      >>> statistics = layers.input_statistics.finalise(
      ...     layers.input_statistics.update(layers.input_statistics.init(2), rows)
      ... )
      >>> leaf, outcome = awq(jnp.array([[0.3], [1.0]]), statistics, quant.QuantSpec(2, ()))
      >>> float(outcome.baseline), float(outcome.error) < 0.1
      (7.29..., True)

    References:
      Lin et al., "AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and
      Acceleration", 2024, https://arxiv.org/abs/2306.00978, equations 4 and 5.
    """
    array = jnp.asarray(weights)
    check_values(array, spec)
    if candidates < 2:
        raise ValueError(f"candidates must be 2 or more, not {candidates}.")
    return _awq(array, statistics, spec, candidates)
