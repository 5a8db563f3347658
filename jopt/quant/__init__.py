"""Quantization: from floating-point arrays to few-bit integer codes and back.

`QuantSpec` says how, `quantize` and `quantize_params` do it, `fake_quantize` and
`fake_quantize_params` do it inside a loss with a straight-through gradient, and
`jopt.materialize` goes back to floats.
"""

from jopt.quant._affine import fake_quantize, quantize
from jopt.quant._grids import Grid, affine, affine_zero, symmetric
from jopt.quant._params import fake_quantize_params, quantize_params
from jopt.quant._ranges import Range, absmax, minmax
from jopt.quant._spec import QuantSpec

__all__ = [
    "Grid",
    "QuantSpec",
    "Range",
    "absmax",
    "affine",
    "affine_zero",
    "fake_quantize",
    "fake_quantize_params",
    "minmax",
    "quantize",
    "quantize_params",
    "symmetric",
]
