"""The `mse` range: cut each block where the error of what is restored is smallest.

A narrower range rounds the many small values better and the few large ones worse. The best cut is
searched for among thresholds in geometric progression from the largest magnitude downwards, one
after the other, so that memory does not grow with their number.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jopt.quant._ranges import Range, Restore, clip_range, minmax

Loss = Callable[[jax.Array, jax.Array], jax.Array]


def shrink_factors(candidates: int, smallest: float) -> tuple[float, ...]:
    """Return `candidates` factors in geometric progression from below 1 down to `smallest`.

    Raises:
      ValueError: there is no candidate, or smallest is not between 0 and 1.

    Example:
      >>> shrink_factors(2, 0.25)
      (0.5, 0.25)
    """
    if isinstance(candidates, bool) or not isinstance(candidates, int) or candidates < 1:
        raise ValueError(f"candidates must be a whole number of at least 1, not {candidates!r}.")
    if not 0 < smallest < 1:
        raise ValueError(f"smallest must lie between 0 and 1, not {smallest!r}.")
    return tuple(smallest ** (i / candidates) for i in range(1, candidates + 1))


def search_range(
    low: jax.Array, high: jax.Array, factors: tuple[float, ...], loss: Loss
) -> tuple[jax.Array, jax.Array]:
    """Return the range of least loss among `(low, high)` and its cuts.

    The range is cut at `-T` and `T`, T = factor * max(|low|, |high|). Of equal losses the widest
    range wins, and a loss that is not a number never does, so that the result is no worse than
    `(low, high)`.

    Args:
      low: lower ends.
      high: upper ends, of the same shape.
      factors: below 1.
      loss: `(low, high) -> loss` of the same shape, one for each block.

    Returns:
      `(low, high)` of each block.
    """
    largest = jnp.maximum(jnp.abs(low), jnp.abs(high))

    def step(
        best: tuple[jax.Array, jax.Array], factor: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        threshold = factor * largest
        cost = loss(*clip_range(low, high, threshold))
        better = cost < best[0]
        return (jnp.where(better, cost, best[0]), jnp.where(better, threshold, best[1])), None

    start = (loss(low, high), largest)
    (_, threshold), _ = jax.lax.scan(step, start, jnp.array(factors, low.dtype))
    return clip_range(low, high, threshold)


def block_sums(values: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Sum over `axes`, kept with size one, as products with ones.

    On a CPU XLA runs a reduction that is fused with costly elementwise work element by element,
    strided and on one thread; as a product it takes an eighth of the time.
    """
    for axis in axes:
        if values.shape[axis] > 1:
            ones = jnp.ones(values.shape[axis], values.dtype)
            sums = jnp.tensordot(ones, values, (0, axis), precision="highest")
            values = jnp.expand_dims(sums, axis)
    return values


def block_loss(
    values: jax.Array,
    axes: tuple[int, ...],
    restore: Restore,
    power: float = 2.0,
    importance: jax.Array | None = None,
) -> Loss:
    """Return the function that sums `importance * |restored - x|^power` over each block.

    Errors are taken relative to the largest magnitude of the block, so that their powers neither
    overflow nor vanish.
    """
    largest = jnp.max(jnp.abs(values), axes, keepdims=True)
    unit = jnp.where(largest > 0, largest, 1.0)

    def loss(low: jax.Array, high: jax.Array) -> jax.Array:
        error = (restore(low, high) - values) / unit
        cost = error * error if power == 2 else jnp.abs(error) ** power
        cost = cost if importance is None else importance * cost
        return block_sums(cost, axes)

    return loss


@functools.lru_cache
def mse_search(candidates: int = 48, smallest: float = 0.1, power: float = 2.0) -> Range:
    """Make the range whose cut gives the least error of the restored values in each block.

    `T = argmin_T sum |restored_T(x) - x|^power` over `max |x|` and `candidates` thresholds from it
    down to `smallest * max |x|`, in geometric progression; the range is `(min, max)` cut at -T and
    T. Never worse than `minmax`, and with a symmetric grid never worse than `absmax`, in that sum.
    Works with every grid. The array is quantized `candidates + 1` times.

    Args:
      candidates: how many thresholds are tried, beside the uncut range.
      smallest: the smallest of them, relative to `max |x|`.
      power: of the error, positive; 2 is the squared error, GPTQ's published code takes 2.4.

    Returns:
      A range for `QuantSpec`; equal arguments give the same function.

    Raises:
      ValueError: an argument is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import materialize, quant
      >>> values = jnp.concatenate([jnp.ones(40), jnp.full(1, 1.8)])
      >>> spec = quant.QuantSpec(2, (), mse_search())
      >>> round(float(quant.quantize(values, spec).scale[0]), 1)  # levels -T, 0, T
      1.0

    References:
      Choukroun et al., "Low-bit Quantization of Neural Networks for Efficient Inference", 2019,
      https://arxiv.org/abs/1902.06822, section 3; Nagel et al., "A White Paper on Neural Network
      Quantization", 2021, https://arxiv.org/abs/2106.08295, equation 11.
    """
    factors = shrink_factors(candidates, smallest)
    if not (power > 0 and math.isfinite(power)):
        raise ValueError(f"power must be positive, not {power!r}.")

    def search(
        values: jax.Array, axes: tuple[int, ...], restore: Restore
    ) -> tuple[jax.Array, jax.Array]:
        """Cut each block where the error of the restored values is least: see `mse_search`."""
        return search_range(
            *minmax(values, axes), factors, block_loss(values, axes, restore, power)
        )

    return search


mse = mse_search()
"""Cut each block where the squared error of the restored values is least: see `mse_search`."""
