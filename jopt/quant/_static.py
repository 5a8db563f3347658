"""Fake quantization with a range that is given: for activations whose range is already known."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jopt._arrays import materialize, working_dtype
from jopt.quant._code_ranges import block_counts, check_per_block
from jopt.quant._quantize import check_values, split_blocks, split_levels, straight_through
from jopt.quant._spec import QuantSpec


@partial(jax.jit, static_argnames="spec")
def _within(values: jax.Array, low: jax.Array, high: jax.Array, spec: QuantSpec) -> jax.Array:
    exact = working_dtype(values.dtype)
    blocks = split_blocks(jax.lax.stop_gradient(values).astype(exact), spec)
    low, high = (
        jax.lax.stop_gradient(split_levels(end, values.ndim).astype(exact)) for end in (low, high)
    )
    levels = spec.grid.fit(blocks, low, high, spec.bits)
    rounded = materialize(spec.grid.encode(blocks, levels, spec.bits))
    rounded = jnp.where(jnp.isnan(blocks), blocks, rounded)
    inside = ((blocks >= low) & (blocks <= high)).reshape(values.shape)
    return straight_through(values, rounded.reshape(values.shape).astype(values.dtype), inside)


def fake_quantize_within(
    values: ArrayLike, low: ArrayLike, high: ArrayLike, spec: QuantSpec
) -> jax.Array:
    """Round an array to the levels of a given range, with a straight-through gradient.

    `fake_quantize` takes the range from the values at hand, which for activations means a pass over
    them at inference and results that depend on the batch; here it is given: from calibration, or
    a moving average kept during training. The gradient is that of the identity where
    `low <= x <= high` and zero elsewhere; the range counts as a constant. `low == high` gives
    levels of step 1.

    Args:
      values: floating-point array, not empty.
      low: floating-point, a scalar or one for each block (as many axes as `values`).
      high: as low; at least low.
      spec: bits, block and grid; its range is not used.

    Returns:
      An array of the shape and dtype of `values`. NaN stays NaN.

    Raises:
      ValueError: `spec.block` does not divide the shape, the array is empty, or `low` or `high`
        has not one entry for each block.
      TypeError: one of them is not floating-point.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jopt import quant
      >>> from jopt.quant._static import fake_quantize_within
      >>> spec = quant.QuantSpec(2, block=(), grid=quant.affine)
      >>> values = jnp.array([-1.0, 0.9, 2.2, 9.0])
      >>> fake_quantize_within(values, 0.0, 3.0, spec)
      Array([0., 1., 2., 3.], dtype=float32)
      >>> jax.grad(lambda v: fake_quantize_within(v, 0.0, 3.0, spec).sum())(values)
      Array([0., 1., 1., 0.], dtype=float32)
    """
    array = jnp.asarray(values)
    check_values(array, spec)
    counts = block_counts(array.shape, spec)
    ends = [jnp.asarray(low), jnp.asarray(high)]
    ends = [jnp.full(counts, end) if not end.ndim else end for end in ends]
    for name, end in zip(("low", "high"), ends, strict=True):
        check_per_block(name, end, array, spec)
    return _within(array, ends[0], ends[1], spec)
