"""Bias correction: give back the mean that quantization took from each output."""

from typing import Any

import jax
import jax.numpy as jnp

from jopt._arrays import materialize
from jopt._leaves import is_compressed
from jopt._trees import flatten_with_paths
from jopt.layers._outcome import to_rows
from jopt.layers._statistics import InputStatistics


def correct_bias(
    bias: jax.Array, weights: jax.Array, leaf: Any, statistics: InputStatistics
) -> jax.Array:
    """Return the bias with which the quantized layer has the mean outputs of the original.

    `b' = b + E[x]^T (W - V)`.

    Args:
      bias: (outputs,).
      weights: the kernel before, (..., outputs).
      leaf: the kernel after, compressed or restored.
      statistics: of the layer's inputs; a leading axis of groups for grouped convolutions.

    Returns:
      An array of the shape and dtype of `bias`.

    Raises:
      ValueError: the shapes do not fit each other.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import quant
      >>> from jopt import layers
      >>> statistics = layers.InputStatistics(
      ...     jnp.ones(()), jnp.array([2.0, 0.0]), jnp.ones(2), jnp.ones(2), jnp.eye(2)
      ... )
      >>> weights = jnp.array([[0.3], [5.0]])
      >>> correct_bias(jnp.zeros(1), weights, jnp.array([[0.25], [9.0]]), statistics).round(3)
      Array([0.1], dtype=float32)

    References:
      Nagel, van Baalen, Blankevoort, Welling, "Data-Free Quantization Through Weight Equalization
      and Bias Correction", 2019, https://arxiv.org/abs/1906.04721, section 4.2.
    """
    restored = materialize(leaf)
    if bias.shape != weights.shape[-1:] or restored.shape != weights.shape:
        raise ValueError(
            f"bias {bias.shape}, weights {weights.shape} and leaf {restored.shape} do not fit."
        )
    difference = weights.astype(jnp.float32) - restored.astype(jnp.float32)
    rows = to_rows(difference, statistics.gram)
    shift = (statistics.mean[..., None, :] @ rows).reshape(-1)
    return (bias.astype(jnp.float32) + shift).astype(bias.dtype)


def sibling_bias(path: str) -> str:
    """Return the path of the bias that lies beside a kernel in linen and nnx.

    Example:
      >>> sibling_bias("block/dense/kernel")
      'block/dense/bias'
    """
    return "/".join([*path.split("/")[:-1], "bias"])


def correct_biases(
    params: Any, quantized: Any, statistics: dict[str, InputStatistics]
) -> tuple[Any, dict[str, str]]:
    """Correct the bias beside every quantized kernel of a tree; see `correct_bias`.

    Args:
      params: the tree before quantization.
      quantized: the tree after.
      statistics: of the inputs of its layers by path of the kernel, as `calibrate` gives them.

    Returns:
      `quantized` with the biases corrected, and for each compressed leaf the path of the bias that
      was corrected, or why none was.

    Raises:
      ValueError: the trees have not the same paths.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import quant
      >>> params = {"dense": {"kernel": jnp.array([[0.3, 1.0]]), "bias": jnp.zeros(2)}}
      >>> small = quant.quantize_params(params, quant.QuantSpec(2, block=()))
      >>> one = jnp.ones(1)
      >>> from jopt import layers
      >>> statistics = {"dense/kernel": layers.InputStatistics(one[0], one, one, one, jnp.eye(1))}
      >>> corrected, report = quant.correct_biases(params, small, statistics)
      >>> corrected["dense"]["bias"].round(3), report
      (Array([0.3, 0. ], dtype=float32), {'dense/kernel': 'dense/bias'})
    """
    paths, before, _ = flatten_with_paths(params)
    others, leaves, treedef = flatten_with_paths(quantized)
    if paths != others:
        raise ValueError(f"params and quantized have not the same paths: {paths} and {others}.")
    where = {path: at for at, path in enumerate(paths)}
    report: dict[str, str] = {}
    for at, path in enumerate(paths):
        if not is_compressed(leaves[at]):
            continue
        target = where.get(sibling_bias(path))
        if path not in statistics:
            report[path] = "no statistics of its inputs"
        elif target is None or leaves[target].ndim > statistics[path].mean.ndim:
            report[path] = f"there is no bias at {sibling_bias(path)}"
        else:
            leaves[target] = correct_bias(leaves[target], before[at], leaves[at], statistics[path])
            report[path] = sibling_bias(path)
    return jax.tree.unflatten(treedef, leaves), report
