"""Ternary weights: -a, 0 and a."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jopt._arrays import working_dtype
from jopt._leaves import QTensor
from jopt.quant._binary import block_axes, positive_scale
from jopt.quant._blocks import merge_blocks, split_blocks
from jopt.quant._grids import Grid, symmetric
from jopt.quant._quantize import check_values
from jopt.quant._spec import QuantSpec

_FACTOR = 0.7
_RATIO, _CANDIDATES, _REFINEMENTS = 0.8, 24, 8


def _sums(
    magnitudes: jax.Array, threshold: jax.Array, axes: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """Return the sum of the magnitudes above a threshold, and how many there are."""
    kept = magnitudes > threshold
    total = jnp.sum(jnp.where(kept, magnitudes, jnp.zeros_like(magnitudes)), axes, keepdims=True)
    return total, jnp.sum(kept.astype(magnitudes.dtype), axes, keepdims=True)


def _rule(magnitudes: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Return the threshold `0.7 mean |x|` and the mean of the magnitudes above it."""
    threshold = _FACTOR * jnp.mean(magnitudes, axes, keepdims=True)
    total, count = _sums(magnitudes, threshold, axes)
    return threshold, total / jnp.maximum(count, 1.0)


def _check_bits(bits: int) -> None:
    if bits != 2:
        raise ValueError(f"bits must be 2 for a ternary grid, not {bits}.")


def _ternary_fit(values: jax.Array, low: jax.Array, high: jax.Array, bits: int) -> QTensor:
    del high
    _check_bits(bits)
    _, scale = _rule(jnp.abs(values), block_axes(values, low))
    return QTensor(None, positive_scale(scale))  # type: ignore


ternary = Grid(_ternary_fit, symmetric.encode, symmetric.neighbours)
"""Put the levels at `-a`, 0 and `a`, with `a` by the rule of ternary weight networks.

`a = mean of |x| over |x| > d`, `d = 0.7 mean |x|`, and each value takes the level nearest to it:
the threshold is `a / 2`. That is not the paper's, which is `d` itself, since levels hold no
threshold, and for a given `a` the nearest level is never worse in squared error; `ternarize` is the
paper to the letter. The range is not used, and the bits of the spec must be 2. A block of zeros
gets scale 1. Li et al., "Ternary Weight Networks", 2016, https://arxiv.org/abs/1605.04711,
section 2.2.
"""


def _optimal_fit(values: jax.Array, low: jax.Array, high: jax.Array, bits: int) -> QTensor:
    del high
    _check_bits(bits)
    axes = block_axes(values, low)
    largest = jnp.max(jnp.abs(values), axes, keepdims=True)
    magnitudes = jnp.abs(values) / positive_scale(largest)  # squares must not overflow
    start = _rule(magnitudes, axes)[1] / 2

    def compare(best: tuple, threshold: jax.Array) -> tuple:
        gain = _gain(magnitudes, threshold, axes)
        better = gain > best[0]
        return (jnp.where(better, gain, best[0]), jnp.where(better, threshold, best[1])), None

    def refine(threshold: jax.Array, _: None) -> tuple:
        total, count = _sums(magnitudes, threshold, axes)
        return total / jnp.maximum(count, 1.0) / 2, None

    candidates = jnp.array([_RATIO ** (1 + at) for at in range(_CANDIDATES)], values.dtype)
    best = (_gain(magnitudes, start, axes), start)
    (_, threshold), _ = jax.lax.scan(compare, best, candidates)
    threshold, _ = jax.lax.scan(refine, threshold, None, _REFINEMENTS)
    return QTensor(None, positive_scale(2 * threshold * positive_scale(largest)))  # type: ignore


def _gain(magnitudes: jax.Array, threshold: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Return by how much the squared error falls below that of all zeros."""
    total, count = _sums(magnitudes, threshold, axes)
    return total * (total / jnp.maximum(count, 1.0))


ternary_optimal = Grid(_optimal_fit, symmetric.encode, symmetric.neighbours)
"""Put the levels at `-a`, 0 and `a`, with `a` searched for the least squared error.

The best `a` for a threshold t is the mean of `|x|` over `|x| > t`, and the error then falls by
`(sum of |x|)^2 / count`; the best threshold for `a` is `a / 2`. The search compares 24 thresholds
between the largest magnitude and a 200th of it, and that of `ternary`, and then repeats the two
rules 8 times, which never raises the error. So it is never worse than `ternary`; of exotic blocks
it may miss the optimum by a little, since it does not sort. It takes some 30 passes over the values
where `ternary` takes two. The range is not used, and the bits of the spec must be 2. A block of
zeros gets scale 1. Li et al., "Ternary Weight Networks", 2016, https://arxiv.org/abs/1605.04711,
section 2.2, of which 0.7 is the approximation for weights that are spread like a bell or evenly.
"""


@partial(jax.jit, static_argnames="block")
def _ternarize(weights: jax.Array, block: tuple[int, ...]) -> QTensor:
    spec = QuantSpec(2, block)
    blocks, within = split_blocks(weights.astype(working_dtype(weights.dtype)), spec)
    threshold, scale = _rule(jnp.abs(blocks), within)
    codes = jnp.where(jnp.abs(blocks) > threshold, jnp.sign(blocks), jnp.zeros_like(blocks))
    scale = positive_scale(scale).astype(weights.dtype)
    return merge_blocks(QTensor(codes.astype(jnp.int2), scale), weights.shape, spec)


def ternarize(weights: ArrayLike, block: tuple[int, ...] = (1,)) -> QTensor:
    """Round weights to -a, 0 and a by the rule of ternary weight networks.

    `d = 0.7 mean |w|`; `q = sign(w) where |w| > d`, else 0; `a = mean of |w| over |w| > d`. A
    block of zeros gets codes 0 and scale 1. `QuantSpec(2, block, grid=ternary)` has the same `a`
    but takes the nearest level, which has the lower squared error.

    Args:
      weights: floating-point array, not empty.
      block: which weights share a scale, as in `QuantSpec`; the paper has `()`, one for a layer.

    Returns:
      A QTensor with `int2` codes, whose scale has the dtype of `weights`.

    Raises:
      ValueError: `block` does not divide the shape, or the array is empty.
      TypeError: the array is not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> leaf = ternarize(jnp.array([3.0, -1.0, 0.5, -1.5]), block=())
      >>> leaf.codes, leaf.scale
      (Array([1, 0, 0, -1], dtype=int2), Array([2.25], dtype=float32))

    References:
      Li et al., "Ternary Weight Networks", 2016, https://arxiv.org/abs/1605.04711, section 2.2.
    """
    array = jnp.asarray(weights)
    check_values(array, QuantSpec(2, block))
    return _ternarize(array, block)
