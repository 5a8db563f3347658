"""GPTQ: round the inputs of a layer one after the other, each making up for those before it."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jopt._arrays import working_dtype
from jopt.layers._feedback import feedback_factor, round_with_feedback
from jopt.layers._outcome import Outcome, from_rows, keep_better, row_axes, to_rows
from jopt.layers._statistics import InputStatistics
from jopt.quant._grids import Leaf, Levels
from jopt.quant._quantize import check_values, encode, quantize
from jopt.quant._row_rounding import levels_by_row, rounding, widened_levels
from jopt.quant._spec import QuantSpec

Order = Callable[[jax.Array], jax.Array]


def by_importance(gram: jax.Array) -> jax.Array:
    """Order the inputs by their mean square, the largest first, so that it is rounded best.

    Args:
      gram: `E[x x^T]`, `(features, features)`.

    Returns:
      The features' numbers in the order in which they are rounded.

    Example:
      >>> import jax.numpy as jnp
      >>> by_importance(jnp.diag(jnp.array([1.0, 3.0, 2.0])))
      Array([1, 2, 0], dtype=int32)
    """
    return jnp.argsort(-jnp.diagonal(gram))


def as_stored(gram: jax.Array) -> jax.Array:
    """Keep the order of the kernel's rows, as the paper does.

    Args:
      gram: `(features, features)`.

    Returns:
      0, 1, ..., features - 1.

    Example:
      >>> import jax.numpy as jnp
      >>> as_stored(jnp.eye(3))
      Array([0, 1, 2], dtype=int32)
    """
    return jnp.arange(gram.shape[0])


def _round_rows(
    rows: jax.Array,
    gram: jax.Array,
    levels: Levels,
    blocks: list[np.ndarray],
    damping: jax.Array,
    spec: QuantSpec,
    order: Order,
) -> jax.Array:
    """Round a matrix; the core takes the last row first, so the order is turned round."""
    places = order(gram)[::-1]
    factor = feedback_factor(gram[places][:, places], damping)
    blocks_in_order = [jnp.asarray(block)[places] for block in blocks]
    rounded = round_with_feedback(rows[places], factor, rounding(levels, blocks_in_order, spec))
    return jnp.zeros_like(rounded).at[places].set(rounded)


@partial(jax.jit, static_argnames=("spec", "order"))
def _gptq(
    weights: jax.Array,
    statistics: InputStatistics,
    spec: QuantSpec,
    damping: ArrayLike,
    order: Order,
) -> tuple[Leaf, Outcome]:
    exact = working_dtype(weights.dtype)
    gram = statistics.gram.astype(exact)
    rows = to_rows(weights.astype(exact), gram)
    nearest = quantize(weights, spec)
    levels = widened_levels(nearest, weights.dtype, exact)
    inputs = row_axes(weights.shape, gram.shape[-1])
    groups = gram.shape[0] if gram.ndim == 3 else 1
    by_row, blocks = levels_by_row(levels, weights.shape, inputs, groups)
    share = jnp.asarray(damping, exact)

    def run(rows: jax.Array, gram: jax.Array, levels: Levels) -> jax.Array:
        return _round_rows(rows, gram, levels, blocks, share, spec, order)

    if gram.ndim == 3:
        rounded = jax.vmap(run)(rows, gram, by_row)
    else:
        rounded = run(rows, gram, jax.tree.map(lambda field: field[0], by_row))
    leaf = encode(from_rows(rounded, weights.shape), levels, spec)
    leaf = jax.tree.map(lambda new, old: new.astype(old.dtype), leaf, nearest)
    return keep_better(weights, leaf, nearest, statistics)


def gptq(
    weights: ArrayLike,
    statistics: InputStatistics,
    spec: QuantSpec,
    damping: ArrayLike = 0.01,
    order: Order = by_importance,
) -> tuple[Leaf, Outcome]:
    """Quantize a kernel so that its layer's outputs change least on calibration data.

    Minimise `sum over outputs of (w - q)^T gram (w - q)`, input by input: each is rounded to its
    nearest level, and the error is made up for by the inputs not yet rounded, in the way that is
    best if they were not rounded at all. The levels are those of `quantize`, chosen beforehand from
    the weights, so any grid, range and block will do. The weights themselves end further from their
    values than by rounding to nearest; the outputs end nearer. An input that was always zero is
    rounded to nearest (the paper sets its weights to zero).

    Args:
      weights: floating-point kernel, its inputs on the leading axes and its outputs on the others:
        `(inputs, outputs)`, `(height, width, inputs, outputs)`.
      statistics: of the layer's inputs; `gram` is used, `(features, features)`, or with a leading
        axis of groups where the last axis of the kernel is divided into groups.
      spec: bits, block, range and grid.
      damping: share of the mean of gram's diagonal that is added to it; more of it trusts the
        calibration data less. Not negative.
      order: function from gram to the order in which inputs are rounded: `by_importance` or
        `as_stored`.

    Returns:
      The compressed leaf, of the class and dtypes of `quantize`'s, and its `Outcome`. Where the
      output error is not lower than round-to-nearest's, round-to-nearest is returned.

    Raises:
      ValueError: the statistics do not fit the kernel, or `spec.block` does not divide it.
      TypeError: the kernel is not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import quant
      >>> from jopt.quant import gptq
      >>> from jopt.layers import InputStatistics
      >>> weights = jnp.array([[0.4, 1.0], [0.4, 0.0]])  # twins: their sum is what counts
      >>> twins = InputStatistics(None, None, None, None, jnp.array([[1.0, 0.9], [0.9, 1.0]]))
      >>> leaf, outcome = gptq(weights, twins, quant.QuantSpec(2, ()))
      >>> leaf.codes, outcome.improved
      (Array([[0, 1],
             [1, 0]], dtype=int2), Array(True, dtype=bool))

    References:
      Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for
      Generative Pre-trained Transformers", 2023, https://arxiv.org/abs/2210.17323, equations 2
      and 3 and algorithm 1. Chen et al., "The Geometry of LLM Quantization", 2025,
      https://arxiv.org/abs/2507.18553.
    """
    array = jnp.asarray(weights)
    check_values(array, spec)
    return _gptq(array, statistics, spec, damping, order)
