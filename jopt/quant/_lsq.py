"""Learned step size quantization (LSQ): the step of the levels is trained with the weights.

`spec` gives the bits and the blocks that share a step; its range and grid are not used, because the
step is learned and the levels are its whole multiples. A code range says which multiples.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jopt._arrays import expand_blocks, working_dtype
from jopt._leaves import QTensor
from jopt.quant._code_ranges import (
    CodeRange,
    as_codes,
    check_per_block,
    code_bounds,
    gradient_factor,
    round_codes,
    scale_gradient,
    signed_codes,
    store_step,
)
from jopt.quant._quantize import check_values
from jopt.quant._spec import QuantSpec


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _round_to_steps(
    values: jax.Array, step: jax.Array, bits: int, bounds: tuple[int, int]
) -> jax.Array:
    return step * round_codes(values / step, bits, bounds)


@_round_to_steps.defjvp
def _round_to_steps_jvp(bits: int, bounds: tuple[int, int], primals: Any, tangents: Any) -> Any:
    values, step = primals
    position = values / step
    codes = round_codes(position, bits, bounds)
    inside = (position > bounds[0]) & (position < bounds[1])
    slope = jnp.where(inside, codes - position, codes)
    passed = jnp.where(inside, tangents[0], jnp.zeros_like(tangents[0]))
    return step * codes, passed + slope * tangents[1]


@partial(jax.jit, static_argnames=("spec", "bounds", "factor"))
def _lsq(
    values: jax.Array, step: jax.Array, spec: QuantSpec, bounds: tuple[int, int], factor: float
) -> jax.Array:
    exact = working_dtype(values.dtype)
    stored = store_step(scale_gradient(step, factor), values.dtype).astype(exact)
    each = expand_blocks(stored, values.shape)
    rounded = _round_to_steps(values.astype(exact), each, spec.bits, bounds)
    return rounded.astype(values.dtype)


def lsq(
    values: ArrayLike,
    step: ArrayLike,
    spec: QuantSpec,
    code_range: CodeRange = signed_codes,
    count: int | None = None,
) -> jax.Array:
    """Round an array to whole multiples of a learned step.

    `v^ = s round(clip(v / s, -Qn, Qp))`. The gradient for v is that of the identity where
    `-Qn < v/s < Qp` and zero elsewhere; that for s is `round(v/s) - v/s` there, -Qn below and Qp
    above, summed over the block and multiplied by `g = 1 / sqrt(N Qp)`. Zeros stay zero. The step
    that is used is `|step|`, at least the smallest normal float, so that an optimizer cannot turn
    the signs of a kernel around, and rounded to the dtype of the values, so that the value is
    exactly `materialize(lsq_quantize(values, step, spec))`. Train it without weight decay.

    Args:
      values: floating-point array, weights or activations, not empty.
      step: floating-point, one for each block: as many axes as `values`; see `lsq_init`.
      spec: bits and block.
      code_range: bits to the lowest and the highest code, `(-Qn, Qp)`.
      count: N, how many elements share a step for the factor g; by default those of a block. For
        activations that are a batch, give the elements of one example, as the paper does.

    Returns:
      An array of the shape and dtype of `values`.

    Raises:
      ValueError: `spec.block` does not divide the shape, the array is empty, or `step` has not one
        entry for each block.
      TypeError: `values` or `step` is not floating-point.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jopt.quant import QuantSpec
      >>> from jopt.quant import lsq
      >>> spec, step = QuantSpec(2, block=()), jnp.array([0.5])
      >>> values = jnp.array([-2.0, -0.375, 0.125, 9.0])
      >>> lsq(values, step, spec)
      Array([-1. , -0.5,  0. ,  0.5], dtype=float32)
      >>> jax.grad(lambda s: lsq(values, s, spec).sum())(step)  # (-2 - 1/4 - 1/4 + 1) / sqrt(4)
      Array([-0.75], dtype=float32)

    References:
      Esser et al., "Learned Step Size Quantization", 2020, https://arxiv.org/abs/1902.08153,
      equations 1 to 3 and 5, section 2.2. That the step is kept positive, and one bit (see
      `signed_codes`), are not in the paper.
    """
    array, learned, bounds = _checked(values, step, spec, code_range)
    factor = gradient_factor(array, learned.size, bounds[1], count)
    return _lsq(array, learned, spec, bounds, factor)


def _checked(
    values: ArrayLike, step: ArrayLike, spec: QuantSpec, code_range: CodeRange
) -> tuple[jax.Array, jax.Array, tuple[int, int]]:
    array, learned = jnp.asarray(values), jnp.asarray(step)
    check_values(array, spec)
    check_per_block("step", learned, array, spec)
    return array, learned, code_bounds(code_range, spec.bits)


@partial(jax.jit, static_argnames=("spec", "bounds"))
def _lsq_quantize(
    values: jax.Array, step: jax.Array, spec: QuantSpec, bounds: tuple[int, int]
) -> QTensor:
    exact = working_dtype(values.dtype)
    stored = store_step(step, values.dtype)
    position = values.astype(exact) / expand_blocks(stored.astype(exact), values.shape)
    codes = round_codes(position, spec.bits, bounds)
    return QTensor(as_codes(codes, spec.bits, bounds), stored)


def lsq_quantize(
    values: ArrayLike, step: ArrayLike, spec: QuantSpec, code_range: CodeRange = signed_codes
) -> QTensor:
    """Quantize an array with the step that was learned for it.

    What is restored is exactly `lsq(values, step, spec, code_range)`.

    Args:
      values: floating-point array, not empty.
      step: one for each block, as for `lsq`.
      spec: bits and block.
      code_range: as for `lsq`.

    Returns:
      A `QTensor` without zero point; its scale is `|step|` in the dtype of `values`.

    Raises:
      ValueError: as for `lsq`.
      TypeError: as for `lsq`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.quant import QuantSpec
      >>> from jopt.quant import lsq_quantize
      >>> leaf = lsq_quantize(
      ...     jnp.array([-2.0, -0.4, 9.0]), jnp.array([0.5]), QuantSpec(2, block=())
      ... )
      >>> leaf.codes
      Array([-2, -1, 1], dtype=int2)
    """
    array, learned, bounds = _checked(values, step, spec, code_range)
    return _lsq_quantize(array, learned, spec, bounds)
