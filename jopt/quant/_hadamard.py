"""Hadamard rotation: spread outliers over all inputs before rounding, and turn back after."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jopt._arrays import hadamard, materialize
from jopt._leaves import RotatedTensor
from jopt.layers._outcome import Outcome, Unsuited, output_error
from jopt.layers._statistics import InputStatistics
from jopt.quant._grids import Leaf
from jopt.quant._quantize import check_values, quantize
from jopt.quant._spec import QuantSpec

Method = Callable[[jax.Array, InputStatistics, QuantSpec], tuple[Leaf, Outcome]]


def random_signs(inputs: int, seed: int = 0) -> jax.Array:
    """Return -1 and 1 at random, int8, (inputs,), the same for the same seed.

    Example:
      >>> random_signs(4).shape
      (4,)
    """
    bits = jax.random.bernoulli(jax.random.key(seed), 0.5, (inputs,))
    return jnp.where(bits, 1, -1).astype(jnp.int8)


def _turn(values: jax.Array, signs: jax.Array, inputs: int) -> jax.Array:
    """Rotate the first axis, (positions * inputs, ...), within each position."""
    flat = values.reshape(-1, inputs, values.size // values.shape[0])
    return hadamard(signs.astype(values.dtype)[None, :, None] * flat).reshape(values.shape)


def rotate_statistics(
    statistics: InputStatistics, signs: jax.Array, inputs: int
) -> InputStatistics:
    """Return the statistics of the rotated inputs.

    Mean and second moments are exact. The mean and the largest magnitude cannot be known from
    them: they are those of a normal distribution, `sqrt(2 / pi)` and four standard deviations,
    which rotated inputs resemble.

    Args:
      statistics: of the inputs, without an axis of groups.
      signs: (inputs,).
      inputs: how many inputs one position of a convolution has; `features` for a dense layer.

    Returns:
      Statistics of the same shapes.
    """
    gram = _turn(_turn(statistics.gram, signs, inputs).T, signs, inputs)
    deviation = jnp.sqrt(jnp.maximum(jnp.diagonal(gram), 0.0))
    return InputStatistics(
        statistics.count,
        _turn(statistics.mean[:, None], signs, inputs)[:, 0],
        deviation * (2 / jnp.pi) ** 0.5,
        deviation * 4.0,
        gram,
    )


@partial(jax.jit, static_argnames=("spec", "method"))
def _rotate(
    weights: jax.Array,
    statistics: InputStatistics | None,
    spec: QuantSpec,
    method: Method | None,
    signs: jax.Array,
) -> tuple[Leaf, Outcome]:
    column = signs.reshape((1,) * (weights.ndim - 2) + (-1, 1))
    turned = hadamard(column.astype(weights.dtype) * weights)
    if method is None or statistics is None:
        tensor = quantize(turned, spec)
    else:
        tensor, _ = method(turned, rotate_statistics(statistics, signs, weights.shape[-2]), spec)
    leaf, baseline = RotatedTensor(tensor, column), quantize(weights, spec)

    def error(candidate: Any) -> jax.Array:
        if statistics is not None:
            return output_error(weights, candidate, statistics)
        difference = materialize(candidate).astype(jnp.float32) - weights.astype(jnp.float32)
        return (difference**2).sum()

    ours, theirs = error(leaf), error(baseline)
    better = ours < theirs
    fallen = _as_not_rotated(leaf, baseline, better)
    return fallen, Outcome(jnp.where(better, ours, theirs), theirs, better)


def _as_not_rotated(leaf: RotatedTensor, baseline: Leaf, better: jax.Array) -> RotatedTensor:
    """Return the leaf, or the baseline with the signs 0, which mean: not rotated."""
    if jax.tree.structure(leaf.tensor) != jax.tree.structure(baseline):
        raise ValueError(
            f"method must return a {type(baseline).__name__}, as rounding does, not a "
            f"{type(leaf.tensor).__name__}."
        )
    return jax.tree.map(
        lambda one, other: jnp.where(better, one, other),
        leaf,
        RotatedTensor(baseline, jnp.zeros_like(leaf.signs)),
    )


def hadamard_rotation(
    weights: jax.Array,
    statistics: InputStatistics | None,
    spec: QuantSpec,
    *,
    method: Method | None = None,
    seed: int = 0,
) -> tuple[RotatedTensor, Outcome]:
    """Quantize a kernel rotated by a random Hadamard matrix along its inputs.

    `W = D H (H D W)` with random signs D on the diagonal and an orthonormal H: `H D W` is
    quantized. A few large weights or inputs are spread over all of them, so that the range of a
    group is smaller and rounding costs less; `x W = (x D H)(H D W)`, so activations may be
    quantized rotated as well. An input axis whose length is odd cannot be rotated, one of `2^k m`
    inputs is rotated in blocks of 2^k (see `jopt._arrays.hadamard`). A convolution is rotated
    along its input channels.

    Args:
      weights: floating-point kernel (..., inputs, outputs).
      statistics: of the layer's inputs, or None: then the squared error of the weights decides.
      spec: bits, block, range and grid.
      method: what quantizes the rotated kernel, such as `gptq`; None rounds to nearest.
      seed: of the signs.

    Returns:
      The leaf, and how it compares with round-to-nearest without rotation. Where it does not win
      the leaf holds round-to-nearest, and its signs are 0: not rotated.

    Raises:
      ValueError: the kernel has less than two axes, or the method changes the kind of leaf.
      TypeError: the weights are not floating-point.

    Example:
      >>> import jax
      >>> from jopt import quant
      >>> weights = jax.random.normal(jax.random.key(0), (64, 8)).at[3].mul(20.0)
      >>> leaf, outcome = quant.hadamard_rotation(weights, None, quant.QuantSpec(4))
      >>> bool(outcome.improved), leaf.signs.shape
      (True, (64, 1))

    References:
      Tseng et al., "QuIP#: Even Better LLM Quantization with Hadamard Incoherence and Lattice
      Codebooks", 2024, https://arxiv.org/abs/2402.04396, section 3; Ashkboos et al., "QuaRot",
      2024, https://arxiv.org/abs/2404.00456.
    """
    weights = jnp.asarray(weights)
    check_values(weights, spec)
    if weights.ndim < 2:
        raise ValueError(f"weights must have two axes or more, not shape {weights.shape}.")
    if statistics is not None and statistics.gram.ndim > 2:
        raise Unsuited("kernels of grouped convolutions cannot be rotated across their groups")
    return _rotate(weights, statistics, spec, method, random_signs(weights.shape[-2], seed))
