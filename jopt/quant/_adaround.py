"""AdaRound: learn for each weight whether to round it up or down."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jopt._arrays import materialize, working_dtype
from jopt.layers._outcome import Outcome, keep_better, to_rows
from jopt.layers._statistics import InputStatistics
from jopt.quant._blocks import merge_blocks, split_blocks, split_levels
from jopt.quant._grids import Leaf
from jopt.quant._quantize import (
    check_values,
    fit_levels,
    narrowed,
    quantize,
)
from jopt.quant._spec import QuantSpec

_STRETCH_LOW, _STRETCH_HIGH = -0.1, 1.1  # gamma and zeta of equation 23


def _up(logits: jax.Array) -> jax.Array:
    """Return h(V), from 0 for down to 1 for up, both reached: equation 23."""
    span = _STRETCH_HIGH - _STRETCH_LOW
    return jnp.clip(jax.nn.sigmoid(logits) * span + _STRETCH_LOW, 0.0, 1.0)


@partial(jax.jit, static_argnames=("spec", "steps"))
def _learn(
    weights: jax.Array,
    statistics: InputStatistics,
    spec: QuantSpec,
    steps: int,
    rate: float,
    regularization: float,
) -> Leaf:
    exact = weights.astype(working_dtype(weights.dtype))
    levels = split_levels(fit_levels(weights, spec), weights.shape, spec)
    pair = spec.grid.neighbours(split_blocks(exact, spec)[0], levels, spec.bits)
    below, above = merge_blocks(pair, weights.shape, spec)
    low, high = materialize(below), materialize(above)
    width = high - low
    share = (jnp.clip(exact, low, high) - low) / jnp.where(width > 0, width, 1.0)
    gram = statistics.gram.astype(exact.dtype)

    def squared_outputs(kernel: jax.Array) -> jax.Array:
        rows = to_rows(kernel, gram)
        return (rows * (gram @ rows)).sum()

    # The error is measured in units of round-to-nearest's, so that the weight of the regularizer
    # means the same in every layer.
    nearest = jnp.where(share >= 0.5, high, low) - exact
    unit = jnp.maximum(squared_outputs(nearest), jnp.finfo(exact.dtype).tiny)
    start = (share - _STRETCH_LOW) / (_STRETCH_HIGH - _STRETCH_LOW)
    logits = jnp.log(start / (1 - start))

    def loss(logits: jax.Array, beta: jax.Array, weight: jax.Array) -> jax.Array:
        up = _up(logits)
        error = squared_outputs(low + up * width - exact) / unit
        undecided = jnp.where(width > 0, 1 - jnp.abs(2 * up - 1) ** beta, 0.0)
        return error + weight * undecided.mean()

    tx = optax.adam(rate)
    progress = jnp.linspace(0.0, 1.0, steps, dtype=exact.dtype)
    # A first fifth without the regularizer, then an ever sharper one: beta falls from 20 to 2.
    annealed = jnp.clip((progress - 0.2) / 0.8, 0.0, 1.0)
    schedule = (20.0 - 18.0 * annealed, jnp.where(progress < 0.2, 0.0, regularization))

    def step(carry: Any, now: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        logits, state = carry
        gradient = jax.grad(loss)(logits, *now)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to whole powers
            updates, state = tx.update(gradient, state)
        return (optax.apply_updates(logits, updates), state), None

    (logits, _), _ = jax.lax.scan(step, (logits, tx.init(logits)), schedule)
    codes = jnp.where(_up(logits) >= 0.5, above.codes, below.codes)
    return narrowed(below.replace(codes=codes), exact.dtype, weights.dtype)


def adaround(
    weights: jax.Array,
    statistics: InputStatistics,
    spec: QuantSpec,
    *,
    steps: int = 1000,
    rate: float = 0.03,
    regularization: float = 30.0,
) -> tuple[Leaf, Outcome]:
    """Quantize a kernel with each weight rounded up or down as is best for the layer's outputs.

    Minimises `tr((W - V)^T G (W - V)) + lambda sum(1 - |2 h - 1|^beta)` over `V = l + h (u - l)`,
    with l and u the levels on either side of each weight, `h = clip(1.2 sigmoid(v) - 0.1, 0, 1)`,
    G the second moments of the inputs, and beta falling from 20 to 2, by Adam. The paper minimises
    the error behind the activation function on samples; this minimises it before, on all of them
    at once. It works for every grid.

    Args:
      weights: floating-point kernel (..., outputs).
      statistics: of the layer's inputs; a leading axis of groups for grouped convolutions.
      spec: bits, block, range and grid.
      steps: of Adam.
      rate: its learning rate.
      regularization: weight of the term that makes the choices definite.

    Returns:
      The leaf, and how it compares with round-to-nearest, which it is where it does not win.

    Raises:
      ValueError: `steps` is less than 1, or the statistics are not of this kernel's inputs.
      TypeError: the weights are not floating-point.

    Example:
      >>> import jax
      >>> from jopt import quant
      >>> rows = jax.random.normal(jax.random.key(0), (200, 4)) @ jax.numpy.ones((4, 16))
      >>> from jopt import layers
      >>> statistics = layers.input_statistics.finalise(
      ...     layers.input_statistics.update(layers.input_statistics.init(16), rows)
      ... )
      >>> weights = jax.random.normal(jax.random.key(1), (16, 8))
      >>> _, outcome = quant.adaround(weights, statistics, quant.QuantSpec(3), steps=200)
      >>> bool(outcome.improved)
      True

    References:
      Nagel, Amjad, van Baalen, Louizos, Blankevoort, "Up or Down? Adaptive Rounding for
      Post-Training Quantization", 2020, https://arxiv.org/abs/2004.10568, equations 21 to 24.
    """
    weights = jnp.asarray(weights)
    check_values(weights, spec)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}.")
    baseline = quantize(weights, spec)
    # Raises where the statistics do not fit, before the search is compiled.
    jax.eval_shape(keep_better, weights, baseline, baseline, statistics)
    leaf = _learn(weights, statistics, spec, steps, rate, regularization)
    return keep_better(weights, leaf, baseline, statistics)
