"""HQQ: move the zero points and scales until few weights are far off, without any data."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jopt._arrays import materialize, working_dtype
from jopt.layers._outcome import Outcome, keep_better
from jopt.layers._statistics import InputStatistics
from jopt.quant._blocks import merge_blocks, split_blocks
from jopt.quant._grids import Leaf, affine_zero
from jopt.quant._quantize import (
    check_values,
    encode,
    fit_levels,
    narrowed,
    quantize,
)
from jopt.quant._spec import QuantSpec


def _shrink(error: jax.Array, strength: jax.Array, power: float) -> jax.Array:
    """Return the sparse part of an error: the generalised soft threshold of equation 5."""
    size = jnp.abs(error)
    # The derivative of |e|^p is infinite at 0: an exact zero stays zero whatever it is.
    slope = jnp.where(size > 0, jnp.where(size > 0, size, 1.0) ** (power - 1), 0.0)
    return jnp.sign(error) * jnp.maximum(size - slope / strength, 0.0)


def _block_mean(values: jax.Array, spec: QuantSpec) -> jax.Array:
    """Return the mean of each block, one for each, with the axes of a scale."""
    blocks, within = split_blocks(values, spec)
    return merge_blocks(blocks.mean(within, keepdims=True), values.shape, spec)


def _refit(levels: Any, weights: jax.Array, sparse: jax.Array, spec: QuantSpec) -> Any:
    """Return the levels whose errors, the sparse part left out, are smallest in the square."""
    leaf = encode(weights, levels, spec)
    restored, wanted = materialize(leaf), weights - sparse
    if getattr(levels, "zero_point", None) is not None:
        zero_point = levels.zero_point + _block_mean(restored - wanted, spec) / levels.scale
        if spec.grid is affine_zero:  # whose zero points are codes
            zero_point = jnp.clip(jnp.round(zero_point), 0, 2**spec.bits - 1)
        return levels.replace(zero_point=zero_point)
    squares = _block_mean(restored * restored, spec)
    products = _block_mean(restored * wanted, spec)
    ratio = products / jnp.where(squares > 0, squares, 1.0)
    usable = (squares > 0) & (ratio > 0)
    return levels.replace(scale=levels.scale * jnp.where(usable, ratio, 1.0))


@partial(jax.jit, static_argnames=("spec", "power", "steps"))
def _search(
    weights: jax.Array, spec: QuantSpec, power: float, steps: int, strength: float, growth: float
) -> tuple[Leaf, jax.Array, jax.Array]:
    exact = weights.astype(working_dtype(weights.dtype))

    def objective(levels: Any) -> jax.Array:
        """Return the sum of |error|^power of each block."""
        error = exact - materialize(encode(exact, levels, spec))
        return _block_mean(jnp.abs(error) ** power, spec)

    first = fit_levels(weights, spec)
    initial = objective(first)

    def step(carry: Any, beta: jax.Array) -> tuple[Any, None]:
        levels, best, least = carry
        error = exact - materialize(encode(exact, levels, spec))
        levels = _refit(levels, exact, _shrink(error, beta, power), spec)
        value = objective(levels)
        better = value < least
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), levels, best)
        return (levels, best, jnp.minimum(value, least)), None

    # Errors are measured in units of the largest scale, so that the strength has none.
    unit = jnp.maximum(first.scale.max().astype(exact.dtype), jnp.finfo(exact.dtype).tiny)
    betas = strength * growth ** jnp.arange(steps, dtype=exact.dtype) / unit ** (2 - power)
    (_, best, least), _ = jax.lax.scan(step, (first, first, initial), betas)
    # Codes are taken with the levels as they will be stored.
    stored = narrowed(best, exact.dtype, weights.dtype)
    best = jax.tree.map(lambda narrow, wide: narrow.astype(wide.dtype), stored, best)
    leaf = narrowed(encode(exact, best, spec), exact.dtype, weights.dtype)
    return leaf, least.mean(), initial.mean()


def hqq(
    weights: jax.Array,
    statistics: InputStatistics | None,
    spec: QuantSpec,
    *,
    power: float = 0.7,
    steps: int = 20,
    strength: float = 10.0,
    growth: float = 1.01,
) -> tuple[Leaf, Outcome]:
    """Quantize a kernel with the zero points, or scales, that make most of its errors smallest.

    Minimises `sum |W - V|^p`, p < 1, which lets outliers go, by half-quadratic splitting: in turns
    the sparse part of the error is split off, `E = shrink(W - V)`, and the zero point of each block
    is set to the mean that fits the rest, `z = mean(q - (W - E) / scale)`. Grids without a zero
    point get the same for their scale, by least squares, which the paper has not. Every block keeps
    the best levels seen, so the objective is never above round-to-nearest's.

    Args:
      weights: floating-point kernel, of any shape.
      statistics: of the inputs, to compare with round-to-nearest on the outputs, or None: then the
        objective decides, and stands in the outcome. The search itself uses no data.
      spec: bits, block, range and grid; the grid must have a scale by block.
      power: p, between 0 and 1.
      steps: iterations.
      strength: beta at the start, relative to the scale.
      growth: factor of beta from step to step.

    Returns:
      The leaf, and how it compares with round-to-nearest, which it is where it does not win.

    Raises:
      ValueError: `power` is not between 0 and 1, `steps` is less than 1, or the levels of the grid
        are not moved by a scale or a zero point.
      TypeError: the weights are not floating-point.

    Example:
      >>> import jax
      >>> from jopt import quant
      >>> weights = jax.random.t(jax.random.key(0), 3.0, (64, 8))
      >>> spec = quant.QuantSpec(4, (32, 1), range=quant.minmax, grid=quant.affine)
      >>> leaf, outcome = quant.hqq(weights, None, spec)
      >>> bool(outcome.improved), bool(outcome.error < outcome.baseline)
      (True, True)

    References:
      Badri, Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023,
      https://mobiusml.github.io/hqq_blog/, equations 3 to 6.
    """
    weights = jnp.asarray(weights)
    check_values(weights, spec)
    if not 0 < power < 1:
        raise ValueError(f"power must be between 0 and 1, not {power}.")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}.")
    levels = jax.eval_shape(lambda w: fit_levels(w, spec), weights)
    scale = getattr(levels, "scale", None)
    if scale is None or not jnp.issubdtype(scale.dtype, jnp.floating) or scale.dtype.itemsize < 4:
        raise ValueError(f"hqq moves a float32 scale or zero point; grid {spec.grid} has none.")
    leaf, error, baseline = _search(weights, spec, power, steps, strength, growth)
    if statistics is None:
        return leaf, Outcome(error, baseline, error < baseline)
    return keep_better(weights, leaf, quantize(weights, spec), statistics)
