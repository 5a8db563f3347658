"""Steps to start learned step size quantization (LSQ) from."""

import math
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
)
from jopt.quant._quantize import check_values
from jopt.quant._spec import QuantSpec


@partial(jax.jit, static_argnames=("spec", "high"))
def _lsq_init(values: jax.Array, spec: QuantSpec, high: int) -> jax.Array:
    exact = working_dtype(values.dtype)
    blocks, axes = split_blocks(values.astype(exact), spec)
    step = 2 / math.sqrt(high) * jnp.mean(jnp.abs(blocks), axes)
    return finished_step(step, values, spec)


def finished_step(step: jax.Array, values: jax.Array, spec: QuantSpec) -> jax.Array:
    """Give the steps of blocks the axes and dtype of the values, and zero blocks the step 1."""
    step = step.reshape(block_counts(values.shape, spec)).astype(values.dtype)
    return jnp.where(step >= jnp.finfo(values.dtype).tiny, step, jnp.ones_like(step))


def lsq_init(values: ArrayLike, spec: QuantSpec, code_range: CodeRange = signed_codes) -> jax.Array:
    """Return the step to start LSQ from.

    `s = 2 mean(|v|) / sqrt(Qp)`; a block of zeros gets step 1. For a kernel that is pruned most
    values of the mean are zeros and the step comes out too small: use `lsq_init_mse`.

    Args:
      values: floating-point array, the weights or a first batch of activations, not empty.
      spec: bits and block.
      code_range: bits to the lowest and the highest code.

    Returns:
      One step for each block, as many axes and the dtype of `values`.

    Raises:
      ValueError: `spec.block` does not divide the shape, or the array is empty.
      TypeError: the array is not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.quant import QuantSpec
      >>> from jopt.quant import lsq_init
      >>> lsq_init(jnp.array([[-3.0, 0.0], [1.0, 0.0]]), QuantSpec(2))
      Array([[4., 1.]], dtype=float32)

    References:
      Esser et al., "Learned Step Size Quantization", 2020, https://arxiv.org/abs/1902.08153,
      section 2.1.
    """
    array = jnp.asarray(values)
    check_values(array, spec)
    return _lsq_init(array, spec, code_bounds(code_range, spec.bits)[1])


@partial(jax.jit, static_argnames=("spec", "bounds", "candidates"))
def _lsq_init_mse(
    values: jax.Array, spec: QuantSpec, bounds: tuple[int, int], candidates: int
) -> jax.Array:
    exact = working_dtype(values.dtype)
    blocks, axes = split_blocks(values.astype(exact), spec)
    low, high = bounds
    widest = jnp.max(blocks, axes, keepdims=True) / high
    if low < 0:
        widest = jnp.maximum(widest, jnp.min(blocks, axes, keepdims=True) / low)
    widest = jnp.maximum(widest, jnp.finfo(exact).tiny)

    def better(best: Any, share: jax.Array) -> Any:
        step = widest * share
        error = blocks - step * round_codes(blocks / step, spec.bits, bounds)
        loss = jnp.mean(error * error, axes, keepdims=True)
        return jax.tree.map(partial(jnp.where, loss < best[0]), (loss, step), best), None

    # The widest step first and strict comparison: of equals the widest is kept.
    shares = jnp.arange(candidates, 0, -1, dtype=exact) / candidates
    start = (jnp.full_like(widest, jnp.inf), widest)
    step = jax.lax.scan(better, start, shares)[0][1]
    empty = jnp.max(jnp.abs(blocks), axes, keepdims=True) == 0
    return finished_step(jnp.where(empty, 0.0, step), values, spec)


def lsq_init_mse(
    values: ArrayLike,
    spec: QuantSpec,
    code_range: CodeRange = signed_codes,
    candidates: int = 64,
) -> jax.Array:
    """Return the step with the smallest squared error among those that reach part of the range.

    The candidates are `i/candidates` of the step at which nothing is clipped, `i = 1 ..
    candidates`; a block of zeros gets step 1. Zeros are restored by every step and so do not count,
    which makes this the start for pruned kernels.

    Args:
      values: floating-point array, not empty.
      spec: bits and block.
      code_range: bits to the lowest and the highest code.
      candidates: how many steps are tried, at least 1.

    Returns:
      One step for each block, as many axes and the dtype of `values`.

    Raises:
      ValueError: `spec.block` does not divide the shape, the array is empty, or `candidates` is
        below 1.
      TypeError: the array is not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.quant import QuantSpec
      >>> from jopt.quant import lsq_init_mse
      >>> spec = QuantSpec(2, block=())  # the codes -2, -1, 0, 1 and the steps 0.5, 1, 1.5, 2
      >>> lsq_init_mse(jnp.array([1.0, -1.0, 2.0, 0.0]), spec, candidates=4)
      Array([1.5], dtype=float32)
    """
    if candidates < 1:
        raise ValueError(f"candidates must be at least 1, not {candidates}.")
    array = jnp.asarray(values)
    check_values(array, spec)
    return _lsq_init_mse(array, spec, code_bounds(code_range, spec.bits), candidates)
