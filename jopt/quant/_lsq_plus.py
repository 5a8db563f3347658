"""LSQ+: a learned step and a learned offset, for activations that reach below zero.

Swish, GELU and leaky ReLU give a few small negative values: unsigned codes would lose them and
signed codes would waste half their levels on them. An offset lets the levels start where the values
do. As with LSQ, `spec` gives the bits and the blocks; its range and grid are not used.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jopt._arrays import expand_blocks, materialize, working_dtype
from jopt._leaves import QTensor
from jopt.quant._code_ranges import (
    CodeRange,
    as_codes,
    check_per_block,
    code_bounds,
    gradient_factor,
    round_codes,
    scale_gradient,
    store_step,
    unsigned_codes,
)
from jopt.quant._quantize import check_values
from jopt.quant._spec import QuantSpec

Bounds = tuple[int, int]


@partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _shift_gradients(
    values: jax.Array, step: jax.Array, offset: jax.Array, bits: int, bounds: Bounds
) -> jax.Array:
    """Return zeros that have the gradient of LSQ+; NaN stays NaN, which codes cannot hold."""
    del step, offset, bits, bounds
    return jnp.where(jnp.isnan(values), values, jnp.zeros_like(values))


@_shift_gradients.defjvp
def _shift_gradients_jvp(bits: int, bounds: Bounds, primals: Any, tangents: Any) -> Any:
    values, step, offset = primals
    change, step_change, offset_change = tangents
    position = (values - offset) / step
    codes = round_codes(position, bits, bounds)
    inside = (position > bounds[0]) & (position < bounds[1])
    slope = jnp.where(inside, codes - position, codes)
    moved = jnp.where(inside, change, jnp.broadcast_to(offset_change, change.shape))
    return _shift_gradients(values, step, offset, bits, bounds), moved + slope * step_change


def _encoded(
    values: jax.Array, step: jax.Array, offset: jax.Array, spec: QuantSpec, bounds: Bounds
) -> QTensor:
    """Return the leaf; step is the stored one, offset in the wider dtype."""
    exact = offset.dtype
    wide = step.astype(exact)
    shift, each = (expand_blocks(a, values.shape) for a in (offset, wide))
    codes = round_codes((values.astype(exact) - shift) / each, spec.bits, bounds)
    return QTensor(as_codes(codes, spec.bits, bounds), step, -offset / wide)


@partial(jax.jit, static_argnames=("spec", "bounds"))
def _lsq_plus_quantize(
    values: jax.Array, step: jax.Array, offset: jax.Array, spec: QuantSpec, bounds: Bounds
) -> QTensor:
    exact = working_dtype(values.dtype)
    return _encoded(values, store_step(step, values.dtype), offset.astype(exact), spec, bounds)


@partial(jax.jit, static_argnames=("spec", "bounds", "factor"))
def _lsq_plus(
    values: jax.Array,
    step: jax.Array,
    offset: jax.Array,
    spec: QuantSpec,
    bounds: Bounds,
    factor: float,
) -> jax.Array:
    exact = working_dtype(values.dtype)
    stored = store_step(scale_gradient(step, factor), values.dtype)
    offset = scale_gradient(offset, factor).astype(exact)
    fixed = jax.lax.stop_gradient((values, stored, offset))
    leaf = _encoded(fixed[0], fixed[1], fixed[2], spec, bounds)
    gradients = _shift_gradients(
        values.astype(exact),
        expand_blocks(stored.astype(exact), values.shape),
        expand_blocks(offset, values.shape),
        spec.bits,
        bounds,
    )
    # A sum with zeros, so that the value is what the leaf restores, to the last bit.
    return materialize(leaf) + gradients.astype(values.dtype)


def _checked(
    values: ArrayLike,
    step: ArrayLike,
    offset: ArrayLike,
    spec: QuantSpec,
    code_range: CodeRange,
) -> tuple[jax.Array, jax.Array, jax.Array, Bounds]:
    array, learned, shift = jnp.asarray(values), jnp.asarray(step), jnp.asarray(offset)
    check_values(array, spec)
    check_per_block("step", learned, array, spec)
    check_per_block("offset", shift, array, spec)
    return array, learned, shift, code_bounds(code_range, spec.bits)


def lsq_plus(
    values: ArrayLike,
    step: ArrayLike,
    offset: ArrayLike,
    spec: QuantSpec,
    code_range: CodeRange = unsigned_codes,
    count: int | None = None,
) -> jax.Array:
    """Round an array to levels with a learned step and a learned offset.

    `x^ = s round(clip((x - beta) / s, n, p)) + beta`. Where `n < (x - beta)/s < p` the gradient is
    1 for x, 0 for beta and `round((x - beta)/s) - (x - beta)/s` for s; elsewhere it is 0 for x, 1
    for beta and n or p for s. Both sums over a block are multiplied by `1 / sqrt(N p)`, as in LSQ.
    The step is kept positive as in `lsq`. Zero is in general not a level, so pruned weights do not
    stay zero: use `lsq` for them.

    Args:
      values: floating-point array, not empty.
      step: floating-point, one for each block: as many axes as `values`; see `lsq_plus_init`.
      offset: beta, of step's shape, in the unit of the values.
      spec: bits and block.
      code_range: bits to the lowest and the highest code, `(n, p)`.
      count: N; by default the elements of a block. For a batch of activations, give the elements of
        one example.

    Returns:
      An array of the shape and dtype of `values`, exactly
      `materialize(lsq_plus_quantize(values, step, offset, spec))`; under jit, dtypes narrower than
      float32 may differ from it in the last bit.

    Raises:
      ValueError: `spec.block` does not divide the shape, the array is empty, or `step` or `offset`
        has not one entry for each block.
      TypeError: one of them is not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.quant import QuantSpec
      >>> from jopt.quant import lsq_plus
      >>> values = jnp.array([-0.7, 0.1, 9.0])
      >>> lsq_plus(values, jnp.array([0.5]), jnp.array([-0.5]), QuantSpec(2, block=()))
      Array([-0.5, 0. , 1. ], dtype=float32)

    References:
      Bhalgat et al., "LSQ+: Improving low-bit quantization through learnable offsets and better
      initialization", 2020, https://arxiv.org/abs/2004.09576, section 3.1.
    """
    array, learned, shift, bounds = _checked(values, step, offset, spec, code_range)
    factor = gradient_factor(array, learned.size, bounds[1], count)
    return _lsq_plus(array, learned, shift, spec, bounds, factor)


def lsq_plus_quantize(
    values: ArrayLike,
    step: ArrayLike,
    offset: ArrayLike,
    spec: QuantSpec,
    code_range: CodeRange = unsigned_codes,
) -> QTensor:
    """Quantize an array with the step and the offset that were learned for it.

    Args:
      values: floating-point array, not empty.
      step: one for each block, as for `lsq_plus`.
      offset: of step's shape.
      spec: bits and block.
      code_range: as for `lsq_plus`.

    Returns:
      A `QTensor` with the real zero point `-offset / step`.

    Raises:
      ValueError: as for `lsq_plus`.
      TypeError: as for `lsq_plus`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.quant import QuantSpec
      >>> from jopt.quant import lsq_plus_quantize
      >>> values = jnp.array([-0.7, 0.1, 9.0])
      >>> leaf = lsq_plus_quantize(
      ...     values, jnp.array([0.5]), jnp.array([-0.5]), QuantSpec(2, block=())
      ... )
      >>> leaf.codes, leaf.zero_point
      (Array([0, 1, 3], dtype=uint2), Array([1.], dtype=float32))
    """
    array, learned, shift, bounds = _checked(values, step, offset, spec, code_range)
    return _lsq_plus_quantize(array, learned, shift, spec, bounds)
