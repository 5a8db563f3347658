"""What quantizers with a learned step share: which codes they use, and the step itself.

A code range is a function from bits to the lowest and the highest code: `signed_codes` (for
weights), `unsigned_codes` (for activations after a ReLU), `balanced_codes` (those of the grid
`symmetric`) or one's own.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jopt.quant._grids import code_dtype
from jopt.quant._spec import QuantSpec, block_sizes

CodeRange = Callable[[int], tuple[int, int]]


def signed_codes(bits: int) -> tuple[int, int]:
    """Return the codes of two's complement, `-2^(bits-1)` to `2^(bits-1) - 1`.

    At one bit that would leave no level above zero, so the codes are -1 and 1; an exact zero (a
    pruned weight) keeps the code 0.

    Example:
      >>> signed_codes(2), signed_codes(1)
      ((-2, 1), (-1, 1))
    """
    return -(2 ** (bits - 1)), max(2 ** (bits - 1) - 1, 1)


def balanced_codes(bits: int) -> tuple[int, int]:
    """Return as many codes above zero as below, `-n` to `n` with `n = 2^(bits-1) - 1`, at least 1.

    Example:
      >>> balanced_codes(4)
      (-7, 7)
    """
    top = max(2 ** (bits - 1) - 1, 1)
    return -top, top


def unsigned_codes(bits: int) -> tuple[int, int]:
    """Return the codes from 0 to `2^bits - 1`.

    Example:
      >>> unsigned_codes(4)
      (0, 15)
    """
    return 0, 2**bits - 1


def code_bounds(code_range: CodeRange, bits: int) -> tuple[int, int]:
    """Return the lowest and the highest code, and refuse a range without a level above zero."""
    low, high = code_range(bits)
    if not low <= 0 < high or high - low >= 2 ** max(bits, 2):
        raise ValueError(f"code_range must hold 0 and a code above it, not ({low}, {high}).")
    return low, high


def round_codes(position: jax.Array, bits: int, bounds: tuple[int, int]) -> jax.Array:
    """Return the code nearest to each position, as floats."""
    clipped = jnp.clip(position, *bounds)
    return jnp.sign(clipped) if bits == 1 and bounds[0] < 0 else jnp.round(clipped)


def as_codes(codes: jax.Array, bits: int, bounds: tuple[int, int]) -> jax.Array:
    """Store whole floats in the narrowest dtype that holds the codes of the range."""
    return codes.astype(code_dtype(2**bits, signed=bounds[0] < 0))


def block_counts(shape: tuple[int, ...], spec: QuantSpec) -> tuple[int, ...]:
    """Return the number of blocks along every axis: the shape of a step.

    Example:
      >>> block_counts((128, 32), QuantSpec(block=(64, 1)))
      (2, 32)
    """
    return tuple(n // size for n, size in zip(shape, block_sizes(shape, spec.block), strict=True))


def check_per_block(name: str, array: jax.Array, values: jax.Array, spec: QuantSpec) -> None:
    """Refuse an array that has not one floating-point number for each block."""
    expected = block_counts(values.shape, spec)
    if array.shape != expected:
        raise ValueError(
            f"{name} must have shape {expected}, one for each block, not {array.shape}."
        )
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating-point, not {array.dtype}.")


@jax.custom_jvp
def magnitude(step: jax.Array) -> jax.Array:
    """Return `|step|`, at least the smallest normal float, with a gradient that is never zero."""
    return jnp.maximum(jnp.abs(step), jnp.finfo(step.dtype).tiny)


@magnitude.defjvp
def _magnitude_jvp(primals: Any, tangents: Any) -> Any:
    (step,), (change,) = primals, tangents
    # The derivative at 0 and below the floor is 1: a step that fell to zero can grow again.
    return magnitude(step), jnp.where(step < 0, -change, change)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def scale_gradient(array: jax.Array, factor: float) -> jax.Array:
    """Return the array, and multiply its gradient by `factor`."""
    del factor
    return array


@scale_gradient.defjvp
def _scale_gradient_jvp(factor: float, primals: Any, tangents: Any) -> Any:
    return primals[0], tangents[0] * factor


def gradient_factor(values: jax.Array, blocks: int, high: int, count: int | None) -> float:
    """Return `g = 1 / sqrt(N Qp)`; N is `count`, or the elements of a block."""
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise ValueError(f"count must be a whole number of elements, at least 1, not {count!r}.")
    return 1 / math.sqrt((count or values.size // blocks) * high)


def store_step(step: jax.Array, dtype: Any) -> jax.Array:
    """Return the step that an export can hold: positive, in the dtype of the values."""
    return magnitude(step.astype(dtype))
