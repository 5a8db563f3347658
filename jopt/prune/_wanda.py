"""Wanda: magnitudes times the norms of inputs, compared within each output."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jopt._arrays import working_dtype
from jopt._trees import Filter, flatten_with_paths, is_floating, is_kernel, select
from jopt.layers import InputStatistics
from jopt.layers._calibrate import map_over
from jopt.layers._outcome import from_rows, stacked_axes, to_rows


@functools.partial(jax.jit, static_argnames="depth")
def _products(weights: jax.Array, statistics: InputStatistics, depth: int) -> jax.Array:
    """Multiply each weight's size by the norm of its input, mapped over stacked layers."""

    def scored(weights: jax.Array, gram: jax.Array, count: jax.Array) -> jax.Array:
        squares = jnp.diagonal(gram, axis1=-2, axis2=-1) * count[..., None]
        norms = jnp.sqrt(jnp.maximum(squares, 0)).astype(exact)[..., None]
        return from_rows(to_rows(jnp.abs(weights), gram) * norms, weights.shape)

    exact = working_dtype(weights.dtype)
    each = map_over(scored, depth)
    return each(weights.astype(exact), statistics.gram, statistics.count)


def wanda_scores(
    params: Any, statistics: Mapping[str, InputStatistics], where: Filter = is_kernel
) -> tuple[Any, dict[str, str]]:
    """Score every weight by its size times the norm of the inputs that it meets.

    `s_ij = |w_ij| ||x_j||_2`, the norm over all rows of the calibration data:
    `sqrt(count diag(E[x x^T]))`. The paper compares the weights of one output with each other only,
    as `output_topk_masks` does. Scores of leaves without statistics are magnitudes; they compare
    with nothing else, so do not use such a tree with `global_topk_masks`.

    Args:
      params: a linen dict, an `nnx.State` or any other pytree.
      statistics: by path, from `jopt.layers.calibrate(apply, params, batches)`; with an axis in
        front for stacked layers, and for the groups of a grouped convolution.
      where: which leaves to score so; by default
        those that `is_kernel` takes. Others get magnitudes.

    Returns:
      A tree of scores in float32 or wider, infinity for leaves that are not floating-point; and a
      report: of the chosen leaves those scored by magnitude, each with the reason in words.

    Raises:
      ValueError: the filter matches nothing.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import layers
      >>> apply, params = lambda p, x: x @ p["w"], {"w": jnp.array([[1.0], [-2.0]])}
      >>> statistics = layers.calibrate(apply, params, [jnp.array([[3.0, 1.0], [4.0, 0.0]])])
      >>> scores, report = wanda_scores(params, statistics)  # norms 5 and 1
      >>> scores["w"].ravel(), report
      (Array([5., 2.], dtype=float32), {})

    References:
      Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2024,
      https://arxiv.org/abs/2306.11695, equation 1.
    """
    paths, leaves, treedef = flatten_with_paths(params)
    chosen = jax.tree.leaves(select(params, where))
    report: dict[str, str] = {}
    scores = []
    for path, leaf, take in zip(paths, leaves, chosen, strict=True):
        depth = _depth(path, leaf, statistics) if take else None
        if isinstance(depth, str):
            report[path] = f"scored by magnitude: {depth}"
        if not is_floating(leaf):
            scores.append(jnp.inf)
        elif isinstance(depth, int):
            scores.append(_products(leaf, statistics[path], depth))
        else:
            scores.append(jnp.abs(leaf).astype(working_dtype(leaf.dtype)))
    return jax.tree.unflatten(treedef, scores), report


def _depth(path: str, leaf: Any, statistics: Mapping[str, InputStatistics]) -> int | str:
    """Return how many axes of a leaf are stacked layers, or why its inputs cannot score it."""
    if not is_floating(leaf):
        return "not a floating-point array; it keeps all its weights"
    if path not in statistics:
        return "no statistics"
    try:
        return stacked_axes(leaf.shape, statistics[path].gram.shape)
    except ValueError as error:
        return str(error)
