"""Ranges chosen by what an error costs: inputs that are large make their weights' errors large."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jopt._arrays import working_dtype
from jopt.layers._outcome import Outcome, from_rows, keep_better, to_rows
from jopt.layers._statistics import InputStatistics
from jopt.quant._quantize import check_values, encode, fit_levels, narrowed, quantize
from jopt.quant._range_search import block_loss, search_range, shrink_factors
from jopt.quant._ranges import Restore, minmax
from jopt.quant._spec import QuantSpec


def row_importance(weights: jax.Array, statistics: InputStatistics) -> jax.Array:
    """Return `E[x_i^2]` of the input of each weight, in the shape of the weights, with mean one.

    All ones where every input is zero.
    """
    gram = statistics.gram.astype(jnp.float32)
    rows = to_rows(weights.astype(jnp.float32), gram)
    squares = jnp.diagonal(gram, axis1=-2, axis2=-1)[..., None]
    mean = jnp.mean(squares)
    squares = jnp.where(mean > 0, squares / jnp.where(mean > 0, mean, 1.0), 1.0)
    return from_rows(jnp.broadcast_to(squares, rows.shape), weights.shape)


@partial(jax.jit, static_argnames=("spec", "candidates", "smallest"))
def _quantize_weighted(
    weights: jax.Array,
    statistics: InputStatistics,
    spec: QuantSpec,
    candidates: int,
    smallest: float,
) -> tuple[Any, Outcome]:
    exact = working_dtype(weights.dtype)
    importance = row_importance(weights, statistics).astype(exact)
    factors = shrink_factors(candidates, smallest)

    def weighted(
        values: jax.Array, axes: tuple[int, ...], restore: Restore
    ) -> tuple[jax.Array, jax.Array]:
        # Blocks are the weights in another shape.
        loss = block_loss(values, axes, restore, importance=importance.reshape(values.shape))
        return search_range(*minmax(values, axes), factors, loss)

    levels = fit_levels(weights, dataclasses.replace(spec, range=weighted))
    leaf = narrowed(encode(weights, levels, spec), exact, weights.dtype)
    return keep_better(weights, leaf, quantize(weights, spec), statistics)


def quantize_weighted(
    weights: ArrayLike,
    statistics: InputStatistics,
    spec: QuantSpec,
    candidates: int = 48,
    smallest: float = 0.1,
) -> tuple[Any, Outcome]:
    """Quantize a kernel with the range of each block chosen for the layer's outputs.

    `T = argmin_T sum_i E[x_i^2] (w_i - v_i(T))^2` over the weights of a block, x_i the input that
    w_i multiplies and v(T) what is restored from `(min, max)` cut at -T and T. This is the output
    error as far as inputs are uncorrelated; where the whole of it, with their correlations, is not
    lower than that of round-to-nearest with the spec's own range, that is returned.

    Args:
      weights: the kernel, its inputs on the leading axes, its outputs on the others.
      statistics: of the layer's inputs; only `gram` is used.
      spec: bits, block, grid; its range is that of the baseline.
      candidates: how many thresholds are tried.
      smallest: the smallest of them, relative to the largest magnitude of the block.

    Returns:
      The compressed leaf and its `Outcome`.

    Raises:
      ValueError: `spec.block` does not divide the shape, the statistics do not fit it, or an
        argument is out of range.
      TypeError: the weights are not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import materialize, quant
      >>> from jopt.layers import _statistics
      >>> weights = jnp.array([[1.0], [0.55], [0.55]])  # 2 bits: levels -T, 0, T
      >>> gram = jnp.diag(jnp.array([0.01, 1.0, 1.0]))  # the first input is nearly zero
      >>> statistics = _statistics.InputStatistics(None, None, None, None, gram)
      >>> leaf, outcome = quantize_weighted(weights, statistics, quant.QuantSpec(2))
      >>> materialize(leaf).ravel().round(2), outcome.improved
      (Array([0.56, 0.56, 0.56], dtype=float32), Array(True, dtype=bool))
    """
    array = jnp.asarray(weights)
    check_values(array, spec)
    return _quantize_weighted(array, statistics, spec, candidates, smallest)
