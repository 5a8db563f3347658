"""Grids: which levels a block of values may take, and the codes that name them.

A `Grid` is three functions over one idea, *levels*: a compressed leaf without codes (`codes` is
None), whose scale, zero point or codebook say what its codes will mean. `fit` chooses levels for a
range, `encode` finds the code of each value, `neighbours` the two levels around each value. All
three work on values of any shape against which the levels broadcast axis by axis, so they serve
whole blocks at once and single rows alike. A grid of one's own is such a triple.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jopt._leaves import QTensor

Levels = Any  # a compressed leaf whose codes are None
Leaf = Any  # a compressed leaf


@dataclasses.dataclass(frozen=True)
class Grid:
    """Name the three functions that make a number format.

    Attributes:
      fit: `(values, low, high, bits) -> levels`: `low` and `high` are the ends of the range of
        each block and broadcast against `values`; the fields of the levels have their shape (a
        codebook has one more axis). Formats that need no values, or no range, ignore them.
      encode: `(values, levels, bits) -> leaf`: the levels with the code of each value, nearest
        first unless the format says otherwise; values beyond the last level take it.
      neighbours: `(values, levels, bits) -> (leaf, leaf)`: the largest level at or below each
        value and the smallest at or above it, both the same level at and beyond the ends.

    Raises:
      TypeError: one of them is not a function.
    """

    fit: Callable[[jax.Array, jax.Array, jax.Array, int], Levels]
    encode: Callable[[jax.Array, Levels, int], Leaf]
    neighbours: Callable[[jax.Array, Levels, int], tuple[Leaf, Leaf]]

    def __post_init__(self) -> None:
        """Refuse what cannot be called."""
        for field in dataclasses.fields(self):
            if not callable(getattr(self, field.name)):
                raise TypeError(
                    f"{field.name} must be a function, not {getattr(self, field.name)!r}."
                )


def code_dtype(count: int, *, signed: bool = False) -> Any:
    """Return the narrowest dtype for `count` codes, or for codes from -count/2 to count/2 - 1.

    Example:
      >>> code_dtype(16), code_dtype(8, signed=True)
      (dtype(uint4), dtype(int4))
    """
    width = 2 if count <= 4 else 4 if count <= 16 else 8
    return jnp.dtype(f"{'' if signed else 'u'}int{width}")


def _step(width: jax.Array, levels: int) -> jax.Array:
    """Return `width / levels`; 1 where a block has no width."""
    step = width / levels
    return jnp.where(step >= jnp.finfo(width.dtype).tiny, step, 1.0)


def _with_codes(levels: QTensor, codes: jax.Array, bits: int) -> QTensor:
    signed = levels.zero_point is None
    return QTensor(
        codes.astype(code_dtype(2**bits, signed=signed)), levels.scale, levels.zero_point
    )


# --- symmetric ------------------------------------------------------------------------------------


def _symmetric_fit(values: jax.Array, low: jax.Array, high: jax.Array, bits: int) -> QTensor:
    del values
    top = max(2 ** (bits - 1) - 1, 1)
    return QTensor(None, _step(jnp.maximum(jnp.abs(low), jnp.abs(high)), top))


def _symmetric_encode(values: jax.Array, levels: QTensor, bits: int) -> QTensor:
    if bits == 1:
        return _with_codes(levels, jnp.sign(values), bits)
    top = 2 ** (bits - 1) - 1
    codes = jnp.clip(jnp.round(values / levels.scale), -top, top)
    return _with_codes(levels, codes, bits)


def _symmetric_neighbours(values: jax.Array, levels: QTensor, bits: int) -> tuple[QTensor, QTensor]:
    if bits == 1:
        below = jnp.where(values == 0, 0.0, jnp.where(values >= levels.scale, 1.0, -1.0))
        above = jnp.where(values == 0, 0.0, jnp.where(values > -levels.scale, 1.0, -1.0))
        return _with_codes(levels, below, bits), _with_codes(levels, above, bits)
    top = 2 ** (bits - 1) - 1
    position = jnp.clip(values / levels.scale, -top, top)
    below, above = jnp.floor(position), jnp.ceil(position)
    return _with_codes(levels, below, bits), _with_codes(levels, above, bits)


symmetric = Grid(_symmetric_fit, _symmetric_encode, _symmetric_neighbours)
"""Put the levels at whole multiples of one step, the same number on each side of zero.

`q = clip(round(x / scale), -n, n)`, `scale = max(|low|, |high|) / n`, `n = 2^(bits-1) - 1`. Zero
has the code 0, so pruned weights stay zero. At one bit there is no level beside zero, so the levels
are `-scale` and `scale` and only an exact zero (a pruned weight) keeps the code 0. A block of zeros
gets scale 1. Values outside the range take the nearest end. Ties are rounded to even, as everywhere
in XLA. Nagel et al., "A White Paper on Neural Network Quantization", 2021,
https://arxiv.org/abs/2106.08295, equations 7 and 8.
"""

# --- affine ---------------------------------------------------------------------------------------


def _affine_fit(values: jax.Array, low: jax.Array, high: jax.Array, bits: int) -> QTensor:
    del values
    scale = _step(high - low, 2**bits - 1)
    return QTensor(None, scale, -low / scale)


def _affine_position(values: jax.Array, levels: QTensor, bits: int) -> jax.Array:
    """Return where the values lie among the codes, a real number from 0 to 2^bits - 1."""
    assert levels.zero_point is not None
    low = -levels.zero_point * levels.scale
    return jnp.clip((values - low) / levels.scale, 0, 2**bits - 1)


def _affine_encode(values: jax.Array, levels: QTensor, bits: int) -> QTensor:
    return _with_codes(levels, jnp.round(_affine_position(values, levels, bits)), bits)


def _affine_neighbours(values: jax.Array, levels: QTensor, bits: int) -> tuple[QTensor, QTensor]:
    position = _affine_position(values, levels, bits)
    below, above = jnp.floor(position), jnp.ceil(position)
    return _with_codes(levels, below, bits), _with_codes(levels, above, bits)


affine = Grid(_affine_fit, _affine_encode, _affine_neighbours)
"""Spread the `2^bits` levels evenly from `low` to `high`, both ends included.

`q = round((x - low) / (high - low) * (2^bits - 1))`, restored as `low + scale * q` with
`scale = (high - low) / (2^bits - 1)`; the zero point `-low / scale` is a real number. Both ends are
met, zero in general is not: for pruned weights use `symmetric` or `affine_zero`. A block whose
values are all equal gets scale 1 and is restored exactly. Jacob et al., "Quantization and Training
of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018,
https://arxiv.org/abs/1712.05877, equation 12 (without its rounding of the zero point, which is
`affine_zero`).
"""


def _affine_zero_fit(values: jax.Array, low: jax.Array, high: jax.Array, bits: int) -> QTensor:
    del values
    levels = 2**bits - 1
    low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    scale = _step(high - low, levels)
    return QTensor(None, scale, jnp.clip(jnp.round(-low / scale), 0, levels))


def _affine_zero_encode(values: jax.Array, levels: QTensor, bits: int) -> QTensor:
    assert levels.zero_point is not None
    codes = jnp.round(values / levels.scale) + levels.zero_point
    return _with_codes(levels, jnp.clip(codes, 0, 2**bits - 1), bits)


affine_zero = Grid(_affine_zero_fit, _affine_zero_encode, _affine_neighbours)
"""Spread the levels evenly and move them so that zero is exactly one of them.

The range is first widened to hold zero, then `q = clip(round(x / scale) + z, 0, 2^bits - 1)` with
the whole zero point `z = round(-low / scale)`. Pruned weights stay zero. Jacob et al.,
"Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
2018, https://arxiv.org/abs/1712.05877, section 3.
"""
