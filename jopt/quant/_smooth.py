"""SmoothQuant: move outliers from the activations to the weights, so that both can be rounded."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jopt._arrays import materialize, working_dtype
from jopt._leaves import ScaledTensor
from jopt.layers._outcome import Outcome, keep_lower, output_error, row_axes, to_rows
from jopt.layers._statistics import InputStatistics
from jopt.quant._quantize import check_values, quantize
from jopt.quant._scaling import as_factor, by_channel, quantize_scaled
from jopt.quant._spec import QuantSpec

_PER_TENSOR = QuantSpec(8, ())
_POINTS = 4096  # enough to see each of 256 levels sixteen times


def _rounding_noise(largest: jax.Array, spec: QuantSpec) -> jax.Array:
    """Return the mean squared error of rounding numbers spread evenly over the range.

    `step^2 / 12` for evenly spaced levels.
    """
    points = jnp.linspace(-1.0, 1.0, _POINTS, dtype=largest.dtype)
    levels = spec.grid.fit(
        points, jnp.full(1, -1.0, largest.dtype), jnp.ones(1, largest.dtype), spec.bits
    )
    restored = materialize(spec.grid.encode(points, levels, spec.bits))
    return jnp.square(largest) * jnp.mean(jnp.square(restored.astype(largest.dtype) - points))


def _error(
    weights: jax.Array, leaf: ScaledTensor, statistics: InputStatistics, activation_spec: QuantSpec
) -> jax.Array:
    """Model the output error when the inputs, times the factor, are rounded as well."""
    exact = working_dtype(weights.dtype)
    gram = statistics.gram.astype(exact)
    full = (*weights.shape[: row_axes(weights.shape, gram.shape[-1])],)
    spread = leaf.factor.astype(exact).reshape(leaf.factor.shape[: len(full)])
    factor = jnp.broadcast_to(spread, full).reshape(-1)  # one for each feature
    factor = factor if gram.ndim == 2 else factor[None, :]
    largest = jnp.max(statistics.abs_max.astype(exact) * factor)
    squares = jnp.diagonal(gram, axis1=-2, axis2=-1) * jnp.square(factor)
    # An input below half a step becomes zero, and loses no more than itself.
    noise = jnp.minimum(_rounding_noise(largest, activation_spec), squares)
    kernel = to_rows(materialize(leaf.tensor).astype(exact), gram)
    passed_on = jnp.sum(noise * jnp.sum(jnp.square(kernel), -1))
    return output_error(weights, leaf, statistics) + passed_on


@partial(jax.jit, static_argnames=("spec", "activation_spec"))
def _smooth_quant(
    weights: jax.Array,
    statistics: InputStatistics,
    spec: QuantSpec,
    activation_spec: QuantSpec,
    alphas: jax.Array,
) -> tuple[ScaledTensor, Outcome]:
    exact = working_dtype(weights.dtype)
    to_rows(weights, statistics.gram)  # refuses statistics of another layer
    features = statistics.gram.shape[-1]
    inputs = row_axes(weights.shape, features)
    by_feature = jnp.abs(weights.astype(exact)).reshape(features, -1).max(1)
    kernel_max = by_channel(by_feature, weights.shape, inputs).max(0)
    input_max = by_channel(statistics.abs_max.astype(exact), weights.shape, inputs).max(0)

    def smoothed(alpha: jax.Array) -> ScaledTensor:
        alive = (input_max > 0) & (kernel_max > 0)
        ones = jnp.ones_like(input_max)
        scales = jnp.where(alive, input_max, ones) ** alpha
        scales = scales / jnp.where(alive, kernel_max, ones) ** (1 - alpha)
        factor = as_factor(scales, weights.shape, features, weights.dtype)
        return quantize_scaled(weights, factor, spec)

    def error(leaf: ScaledTensor) -> jax.Array:
        return _error(weights, leaf, statistics, activation_spec)

    errors = jax.lax.map(lambda alpha: error(smoothed(alpha)), alphas)
    leaf = smoothed(alphas[jnp.argmin(jnp.where(jnp.isnan(errors), jnp.inf, errors))])
    nearest = ScaledTensor(quantize(weights, spec), jnp.ones_like(leaf.factor))
    return keep_lower(leaf, nearest, error(leaf), error(nearest))


def smooth_quant(
    weights: ArrayLike,
    statistics: InputStatistics,
    spec: QuantSpec,
    activation_spec: QuantSpec = _PER_TENSOR,
    alpha: ArrayLike = 0.5,
) -> tuple[ScaledTensor, Outcome]:
    """Quantize a kernel for a layer whose inputs are rounded, too, to one static range.

    `x W = (x / s) (s W)` with `s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)`: the inputs lose their
    outliers, and the kernel takes them over. An input that is always zero, or whose weights all
    are, keeps s = 1. What is compared is the output error with rounded inputs, modelled from the
    statistics: the error of the kernel, plus the noise of rounding `x / s` (for even levels
    `step^2 / 12` in each input, or that input's mean square if it is less) times the squares of the
    rounded kernel.

    Args:
      weights: floating-point kernel, its inputs on the leading axes and its outputs on the others.
      statistics: of the layer's inputs; `gram` and `abs_max` are used.
      spec: of the kernel.
      activation_spec: of the inputs: its bits and its grid, over `(-a, a)` with a the largest
        magnitude of all scaled inputs. Its block is `()`.
      alpha: how much is moved, from 0 to 1, or several such numbers, `(candidates,)`, of which the
        best is taken.

    Returns:
      A `ScaledTensor` of a compressed leaf and the factors `1 / s`, one for each index of the last
      input axis, and its `Outcome`, whose errors are those with rounded inputs. Where nothing is
      gained the factors are 1. The layer is `smoothed_inputs(x, leaf)`, rounded, times
      `jopt.materialize(leaf.tensor)`.

    Raises:
      ValueError: the statistics do not fit the kernel, a block does not divide it, or
        `activation_spec` has blocks.
      TypeError: the kernel is not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import quant
      >>> from jopt.quant import smooth_quant, smoothed_inputs
      >>> rows = jnp.array([[100.0, 1.0], [-100.0, -1.0]])
      >>> from jopt import layers
      >>> statistics = layers.input_statistics.finalise(
      ...     layers.input_statistics.update(layers.input_statistics.init(2), rows)
      ... )
      >>> weights = jnp.array([[0.01], [1.0]])
      >>> leaf, outcome = smooth_quant(weights, statistics, quant.QuantSpec(8))
      >>> leaf.factor.ravel(), smoothed_inputs(rows[:1], leaf)
      (Array([0.01, 1.  ], dtype=float32), Array([[1., 1.]], dtype=float32))

    References:
      Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
      Language Models", 2023, https://arxiv.org/abs/2211.10438, equations 3 and 4.
    """
    array = jnp.asarray(weights)
    check_values(array, spec)
    if activation_spec.block != ():
        raise ValueError(
            "activation_spec.block must be (), one range for all inputs, not "
            f"{activation_spec.block}."
        )
    exact = working_dtype(array.dtype)
    alphas = jnp.atleast_1d(jnp.asarray(alpha, exact))
    return _smooth_quant(array, statistics, spec, activation_spec, alphas)


def smoothed_inputs(inputs: jax.Array, leaf: ScaledTensor) -> jax.Array:
    """Multiply the inputs of a layer by the factors of its kernel.

    `smoothed_inputs(x, leaf) @ materialize(leaf.tensor) = x @ materialize(leaf)`; between the two
    factors the inputs can be rounded.

    Args:
      inputs: floating-point, the input channels on the last axis.
      leaf: from `smooth_quant` or `awq`.

    Returns:
      An array of the shape and dtype of `inputs`.

    Raises:
      ValueError: the last axis has not as many channels as the leaf has factors.

    Example:
      >>> import jax.numpy as jnp
      >>> leaf = ScaledTensor(None, jnp.array([[0.5], [2.0]]))
      >>> smoothed_inputs(jnp.array([[4.0, 4.0]]), leaf)
      Array([[2., 8.]], dtype=float32)
    """
    factor = leaf.factor.reshape(-1).astype(inputs.dtype)
    if inputs.ndim == 0 or inputs.shape[-1] != factor.size:
        raise ValueError(
            f"inputs of shape {inputs.shape} have not the {factor.size} channels of the factors."
        )
    return inputs * factor.reshape((1,) * (inputs.ndim - 1) + (-1,))
