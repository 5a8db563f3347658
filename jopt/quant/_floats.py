"""Narrow floats: FP8 with a scale for each block, the MX formats and NVFP4.

All of them are one idea: a value is divided by the scale of its block and rounded to a float of a
few bits, which is described by four numbers (`_Format`). They differ in how the scale is chosen.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jopt._leaves import FloatTensor
from jopt.quant._grids import Grid
from jopt.quant._tables import scale_to

Round = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class _Format:
    """Describe a narrow float: its bits, how its codes are held, and which numbers it has."""

    bits: int
    dtype: Any
    mantissa: int  # explicit bits of the mantissa
    lowest: int  # exponent of the smallest normal number; subnormal ones have its step
    largest: float  # the largest finite number

    @property
    def top(self) -> int:
        """Return the exponent of the largest number."""
        return math.frexp(self.largest)[1] - 1


_E4M3 = _Format(8, jnp.float8_e4m3fn, 3, -6, 448.0)
_E5M2 = _Format(8, jnp.float8_e5m2, 2, -14, 57344.0)
_E2M3 = _Format(6, jnp.float8_e4m3fn, 3, 0, 7.5)
_E3M2 = _Format(6, jnp.float8_e4m3fn, 2, -2, 28.0)
_E2M1 = _Format(4, jnp.float4_e2m1fn, 1, 0, 6.0)


def _binade(values: jax.Array) -> jax.Array:
    """Return the largest power of two at or below |x|: its bits without sign and mantissa."""
    info = jnp.finfo(values.dtype)
    word = jnp.dtype(f"uint{info.bits}")
    exponent_bits = word.type(2 ** (info.bits - 1) - 2**info.nmant)
    return jax.lax.bitcast_convert_type(
        jax.lax.bitcast_convert_type(values, word) & exponent_bits, values.dtype
    )


def _rounded(values: jax.Array, form: _Format, rounding: Round) -> jax.Array:
    """Round to the numbers of a format, which lie a power of two apart around each value."""
    values = jnp.clip(values, -form.largest, form.largest)
    step = jnp.maximum(_binade(values), 2.0**form.lowest) * 2.0**-form.mantissa
    return rounding(values / step) * step


def _whole_scale(levels: FloatTensor, dtype: Any) -> jax.Array:
    """Return what one unit of a code is worth, never zero."""
    scale = levels.scale.astype(dtype)
    if levels.global_scale is not None:
        scale = levels.global_scale.astype(dtype) * scale
    return jnp.maximum(scale, jnp.finfo(dtype).tiny)


def _float_grid(
    name: str, form: _Format, fit_scale: Callable[[jax.Array, jax.Array], FloatTensor]
) -> Grid:
    """Make the grid of a format, given `(low, high) -> levels`."""

    def fit(values: jax.Array, low: jax.Array, high: jax.Array, bits: int) -> FloatTensor:
        del values
        if bits != form.bits:
            raise ValueError(
                f"grid {name} has codes of {form.bits} bits; bits must be {form.bits}, not {bits}."
            )
        return fit_scale(low, high)

    def with_codes(levels: FloatTensor, numbers: jax.Array) -> FloatTensor:
        return FloatTensor(numbers.astype(form.dtype), levels.scale, levels.global_scale)

    def encode(values: jax.Array, levels: FloatTensor, bits: int) -> FloatTensor:
        del bits
        ratio = values / _whole_scale(levels, values.dtype)
        return with_codes(levels, _rounded(ratio, form, jnp.round))

    def neighbours(
        values: jax.Array, levels: FloatTensor, bits: int
    ) -> tuple[FloatTensor, FloatTensor]:
        del bits
        scale = _whole_scale(levels, values.dtype)
        ratio = values / scale
        # The quotient of a level and its scale may lie a rounding error beside the number.
        number = _rounded(ratio, form, jnp.round)
        ratio = jnp.where(number * scale == values, number, ratio)
        below, above = _rounded(ratio, form, jnp.floor), _rounded(ratio, form, jnp.ceil)
        return with_codes(levels, below), with_codes(levels, above)

    return Grid(fit, encode, neighbours)


# --- a scale of the values' own dtype -------------------------------------------------------------


def _plain(name: str, form: _Format) -> Grid:
    return _float_grid(
        name,
        form,
        lambda low, high: FloatTensor(None, scale_to(low, high, form.largest)),  # pyright: ignore[reportArgumentType]
    )


e4m3 = _plain("e4m3", _E4M3)
"""Round to 8-bit floats with four bits of exponent and three of mantissa, up to 448.

`x ~ scale * code`, `scale = max(|low|, |high|) / 448`, so that the end of the range is the largest
finite number; 1 for a block of zeros. Values beyond the range take its end: there is no NaN and no
infinity among the codes. Ties go to the even mantissa. Between 2^-6 and 448 scales the error is at
most 1/16 of a value. Micikevicius et al., "FP8 Formats for Deep Learning", 2022,
https://arxiv.org/abs/2209.05433, table 1.
"""

e5m2 = _plain("e5m2", _E5M2)
"""Round to 8-bit floats with five bits of exponent and two of mantissa, up to 57344.

Like `e4m3` with half the precision and a wider range: the form for gradients. Micikevicius et al.,
"FP8 Formats for Deep Learning", 2022, https://arxiv.org/abs/2209.05433, table 1.
"""


# --- MX: a power of two for each block ------------------------------------------------------------


def _e8m0(exponent: jax.Array) -> jax.Array:
    """Return `2^exponent` as float8_e8m0fnu, whose bits are the exponent plus 127."""
    return jax.lax.bitcast_convert_type((exponent + 127).astype(jnp.uint8), jnp.float8_e8m0fnu)


def _mx(name: str, form: _Format) -> Grid:
    def fit_scale(low: jax.Array, high: jax.Array) -> FloatTensor:
        end = jnp.maximum(jnp.abs(low), jnp.abs(high))
        # 2^-127 is a scale of the format, but no normal float32: XLA would read it as zero.
        exponent = jnp.where(end > 0, jnp.maximum(jnp.frexp(end)[1] - 1 - form.top, -126), 0)
        ones = jnp.ones((1,) * end.ndim, end.dtype)
        return FloatTensor(None, _e8m0(exponent), ones)  # pyright: ignore[reportArgumentType]

    return _float_grid(name, form, fit_scale)


mxfp4 = _mx("mxfp4", _E2M1)
"""Round to the 4-bit floats 0, 0.5, 1, 1.5, 2, 3, 4 and 6 and their negatives, scaled by 2^k.

Every MX format is `x ~ 2^k * code` with `k = floor(log2(max |x|)) - emax`, emax the exponent of the
largest code (2 here), one k for each block; the standard's block is 32 values along the inputs:
`QuantSpec(4, (32, 1), grid=mxfp4)`. The scale is stored in eight bits as `float8_e8m0fnu`, and
`global_scale` is 1: it only carries the dtype. Values whose ratio exceeds the largest code take it
(7.9 becomes 6), ties go to the even mantissa, a block of zeros gets scale 1. k is at least -126,
one more than in the standard. The range is read as `max(|low|, |high|)`.
Open Compute Project, "OCP Microscaling Formats (MX) Specification v1.0", 2023, section 6.3,
https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf.
"""

mxfp6_e2m3 = _mx("mxfp6_e2m3", _E2M3)
"""Round to 6-bit floats with two bits of exponent and three of mantissa, up to 7.5; see `mxfp4`.

The codes are held in `float8_e4m3fn`, which has all their values.
"""

mxfp6_e3m2 = _mx("mxfp6_e3m2", _E3M2)
"""Round to 6-bit floats with three bits of exponent and two of mantissa, up to 28; see `mxfp4`.

The codes are held in `float8_e4m3fn`, which has all their values.
"""

mxfp8_e4m3 = _mx("mxfp8_e4m3", _E4M3)
"""Round to 8-bit floats e4m3 with a power of two for each block; see `mxfp4` and `e4m3`."""

mxfp8_e5m2 = _mx("mxfp8_e5m2", _E5M2)
"""Round to 8-bit floats e5m2 with a power of two for each block; see `mxfp4` and `e5m2`."""


# --- NVFP4: a narrow float for each block, a wide one for the tensor ------------------------------


def _nvfp4_scale(low: jax.Array, high: jax.Array) -> FloatTensor:
    end = jnp.maximum(jnp.abs(low), jnp.abs(high))
    most = jnp.max(end)
    whole = scale_to(-most, most, _E2M1.largest * _E4M3.largest)
    whole = whole.reshape((1,) * end.ndim)
    # A scale of zero would lose the block; the smallest one keeps what it can.
    smallest = 2.0 ** (_E4M3.lowest - _E4M3.mantissa)
    scale = jnp.maximum(end / (whole * _E2M1.largest), smallest)
    scale = jnp.where(end > 0, scale, 1.0)
    return FloatTensor(None, _rounded(scale, _E4M3, jnp.round).astype(_E4M3.dtype), whole)  # pyright: ignore[reportArgumentType]


nvfp4 = _float_grid("nvfp4", _E2M1, _nvfp4_scale)
"""Round to the 4-bit floats of `mxfp4` with an e4m3 scale for each block and one for the tensor.

`x ~ global_scale * scale * code`, `global_scale = max |tensor| / (6 * 448)` and `scale` the e4m3
number nearest to `max |block| / (6 * global_scale)`, at least 2^-9; the format's block is 16 values
along the inputs: `QuantSpec(4, (16, 1), grid=nvfp4)`. Where rounding made the scale smaller, the
largest value of the block is clipped, by less than 1/16. Blocks whose largest value is below
1/28672 of the tensor's have a scale without full precision, so that quantizing them again may
change them. A block of zeros gets scale 1. The range is read as `max(|low|, |high|)`. NVIDIA,
"Pretraining Large Language Models with NVFP4", 2025, https://arxiv.org/abs/2509.25149.
"""
