"""Steps and offsets to start LSQ+ from."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jopt._arrays import working_dtype
from jopt.quant._blocks import split_blocks
from jopt.quant._code_ranges import (
    CodeRange,
    block_counts,
    code_bounds,
    round_codes,
    signed_codes,
    unsigned_codes,
)
from jopt.quant._lsq_init import finished_step
from jopt.quant._quantize import check_values
from jopt.quant._spec import QuantSpec


@partial(jax.jit, static_argnames=("spec", "high"))
def _init_weights(values: jax.Array, spec: QuantSpec, high: int) -> jax.Array:
    exact = working_dtype(values.dtype)
    blocks, axes = split_blocks(values.astype(exact), spec)
    mean = jnp.mean(blocks, axes, keepdims=True)
    spread = 3 * jnp.std(blocks, axes, keepdims=True)
    reach = jnp.maximum(jnp.abs(mean - spread), jnp.abs(mean + spread))
    return finished_step(reach / high, values, spec)


def lsq_plus_init_weights(
    values: ArrayLike, spec: QuantSpec, code_range: CodeRange = signed_codes
) -> jax.Array:
    """Return the step from which LSQ+ starts weights, which are quantized without an offset.

    `s = max(|mean - 3 std|, |mean + 3 std|) / Qn`, Qn the codes below zero, `2^(bits-1)`; a block
    of zeros gets step 1.

    Args:
      values: floating-point array, not empty.
      spec: bits and block.
      code_range: bits to the lowest and the highest code; for a range that starts at 0 the highest
        code takes the place of Qn.

    Returns:
      One step for each block, as many axes and the dtype of `values`.

    Raises:
      ValueError: `spec.block` does not divide the shape, or the array is empty.
      TypeError: the array is not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.quant import QuantSpec
      >>> from jopt.quant import lsq_plus_init_weights
      >>> lsq_plus_init_weights(jnp.array([3.0, 1.0]), QuantSpec(2, block=()))  # (2 + 3) / 2
      Array([2.5], dtype=float32)

    References:
      Bhalgat et al., 2020, https://arxiv.org/abs/2004.09576, section 3.2.
    """
    array = jnp.asarray(values)
    check_values(array, spec)
    low, high = code_bounds(code_range, spec.bits)
    return _init_weights(array, spec, -low or high)


# The search starts from these shares of the range below and of that above the mean. Many, because
# what it settles on depends on the start: with these it ends within some 2 % of the least error.
_STARTS = [
    (below, above)
    for below in (1.0, 0.75, 0.5, 0.3)
    for above in (1.0, 0.85, 0.7, 0.55, 0.4, 0.25, 0.15)
]
_ROUNDS = 6


@partial(jax.jit, static_argnames=("spec", "bounds"))
def _init(
    values: jax.Array, spec: QuantSpec, bounds: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    exact = working_dtype(values.dtype)
    blocks, axes = split_blocks(values.astype(exact), spec)
    low, high = bounds
    average = partial(jnp.mean, axis=axes, keepdims=True)
    tiny = jnp.finfo(exact).tiny

    def codes_of(step: jax.Array, offset: jax.Array) -> jax.Array:
        return round_codes((blocks - offset) / step, spec.bits, bounds)

    def refit(_: Any, fit: Any) -> Any:
        """Take the best step and offset for the codes that the present ones give."""
        codes = codes_of(*fit)
        mean_code, mean_value = average(codes), average(blocks)
        spread = average((codes - mean_code) ** 2)
        shared = average((codes - mean_code) * (blocks - mean_value))
        step = shared / jnp.where(spread > 0, spread, 1.0)
        step = jnp.where(step >= tiny, step, fit[0])
        return step, mean_value - step * mean_code

    bottom, top = jnp.min(blocks, axes, keepdims=True), jnp.max(blocks, axes, keepdims=True)
    mean = average(blocks)

    def better(best: Any, shares: jax.Array) -> Any:
        start, end = mean + shares[0] * (bottom - mean), mean + shares[1] * (top - mean)
        step = (end - start) / (high - low)
        step = jnp.where(step >= tiny, step, 1.0)
        fit = jax.lax.fori_loop(0, _ROUNDS, refit, (step, start - low * step))
        error = blocks - (fit[0] * codes_of(*fit) + fit[1])
        loss = average(error * error)
        return jax.tree.map(partial(jnp.where, loss < best[0]), (loss, *fit), best), None

    nothing = jnp.full_like(mean, jnp.inf)
    first = (nothing, jnp.ones_like(mean), mean)
    _, step, offset = jax.lax.scan(better, first, jnp.array(_STARTS, exact))[0]
    counts = block_counts(values.shape, spec)
    step, offset = (a.reshape(counts).astype(values.dtype) for a in (step, offset))
    return jnp.maximum(step, jnp.finfo(values.dtype).tiny), offset


def lsq_plus_init(
    values: ArrayLike, spec: QuantSpec, code_range: CodeRange = unsigned_codes
) -> tuple[jax.Array, jax.Array]:
    """Return the step and the offset from which LSQ+ starts activations.

    They minimise `sum((x^ - x)^2)`: from the whole range and from shrunk ones, the codes and the
    step and offset that fit them best by least squares are found in turn, which never raises the
    error; the best end is returned. So the error is never above that of the whole range. (The paper
    leaves open how its minimum is found.) A block of equal values is restored exactly.

    Args:
      values: floating-point array, a batch of activations, not empty.
      spec: bits and block.
      code_range: bits to the lowest and the highest code.

    Returns:
      `(step, offset)`, each with one entry for each block, as many axes and the dtype of `values`.

    Raises:
      ValueError: `spec.block` does not divide the shape, or the array is empty.
      TypeError: the array is not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.quant import QuantSpec
      >>> from jopt.quant import lsq_plus_init
      >>> step, offset = lsq_plus_init(jnp.array([-1.0, 1.0, 3.0, 5.0]), QuantSpec(2, block=()))
      >>> step, offset
      (Array([2.], dtype=float32), Array([-1.], dtype=float32))

    References:
      Bhalgat et al., 2020, https://arxiv.org/abs/2004.09576, section 3.2.
    """
    array = jnp.asarray(values)
    check_values(array, spec)
    return _init(array, spec, code_bounds(code_range, spec.bits))
