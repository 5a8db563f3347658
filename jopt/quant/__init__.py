"""Quantization: from floating-point arrays to few-bit codes and back.

`QuantSpec` says how: bits, blocks, a range and a number format (a `Grid`). `quantize` and
`quantize_params` do it, `fake_quantize` and `fake_quantize_params` do it inside a loss with a
straight-through gradient, and `jopt.materialize` goes back to floats.

- Formats: `symmetric`, `affine`, `affine_zero`; `logarithmic`, `additive_powers_of_two`; `kmeans`,
  `codebook`, `nf4`; `binary`, `ternary`; `e4m3`, `mxfp4`, `nvfp4` and the other narrow floats.
- Ranges: `absmax`, `minmax`, `percentile`, `mse`, `entropy`.
- Calibration: `jopt.layers.calibrate` gathers statistics of the inputs of every layer of any
  `apply`; `activation_ranges` and `quantize_inputs` round them, `adequacy` says whether the data
  suffice.
- After training: `gptq`, `awq`, `smooth_quant`, `hqq`, `adaround`, `hadamard_rotation`,
  `quantize_weighted`, all through `quantize_calibrated_params`; `quantize_in_order`,
  `correct_biases`, `equalize_params`.
- Through training: straight-through, `lsq`, `lsq_plus`, `pact`, `dorefa_weights`, `ttq`,
  `fake_binarize`, codebooks; `fold_batch_norms`, `jopt.layers.reestimate_batch_norm`.
"""

from jopt.quant._activations import (
    activation_ranges,
    fake_quantize_within,
    per_tensor,
    per_token,
    quantize_inputs,
    quantize_inputs_dynamically,
)
from jopt.quant._adaround import adaround
from jopt.quant._adequacy import Adequacy, Usage, activation_adequacy, adequacy, usage
from jopt.quant._adequacy_report import advice, format_adequacy
from jopt.quant._awq import awq
from jopt.quant._batch_norm import fold_batch_norm, fold_batch_norms, remove_batch_norms
from jopt.quant._bias import correct_bias, correct_biases
from jopt.quant._binary import (
    binarize,
    binarize_params,
    binary,
    clipped_slope,
    fake_binarize,
    fake_binarize_params,
    xnor_slope,
)
from jopt.quant._bits import (
    TernaryBits,
    binary_matmul,
    pack_signs,
    pack_ternary,
    ternary_matmul,
    unpack_signs,
)
from jopt.quant._calibrated import format_report, quantize_calibrated_params
from jopt.quant._centroids import codebooks, with_codebooks
from jopt.quant._code_ranges import CodeRange, balanced_codes, signed_codes, unsigned_codes
from jopt.quant._codebook import codebook, kmeans, nf4, normal_float, normal_float_values
from jopt.quant._dorefa import (
    dorefa_activations,
    dorefa_gradients,
    dorefa_params,
    dorefa_quantize,
    dorefa_quantize_params,
    dorefa_weights,
)
from jopt.quant._drift import Drift, corrected_weights, drifted_error
from jopt.quant._entropy import entropy
from jopt.quant._equalize import equalize, equalize_params
from jopt.quant._floats import (
    e4m3,
    e5m2,
    mxfp4,
    mxfp6_e2m3,
    mxfp6_e3m2,
    mxfp8_e4m3,
    mxfp8_e5m2,
    nvfp4,
)
from jopt.quant._gptq import as_stored, by_importance, gptq
from jopt.quant._grids import Grid, affine, affine_zero, symmetric
from jopt.quant._hadamard import hadamard_rotation
from jopt.quant._histogram import Histogram, histogram
from jopt.quant._histogram_ranges import (
    entropy_range,
    entropy_search_range,
    histogram_range,
    minmax_range,
    mse_range,
    mse_search_range,
    percentile_range,
)
from jopt.quant._hqq import hqq
from jopt.quant._kmeans import (
    density_codebook,
    linear_codebook,
    lloyd,
    optimal_codebook,
    optimal_codebook_with_zero,
    random_codebook,
    tied_gradient,
)
from jopt.quant._learned import init_steps, lsq_params, lsq_quantize_params
from jopt.quant._logarithmic import (
    additive_power_levels,
    additive_powers_of_two,
    arithmetic_mean,
    log_domain,
    logarithmic,
)
from jopt.quant._lsq import lsq, lsq_quantize
from jopt.quant._lsq_init import lsq_init, lsq_init_mse
from jopt.quant._lsq_plus import lsq_plus, lsq_plus_quantize
from jopt.quant._lsq_plus_init import lsq_plus_init, lsq_plus_init_weights
from jopt.quant._nearest import nearest_codes
from jopt.quant._pact import pact, pact_init
from jopt.quant._params import fake_quantize_params, quantize_params
from jopt.quant._percentile import percentile
from jopt.quant._propagate import quantize_in_order
from jopt.quant._quantize import (
    encode,
    fake_quantize,
    fit_levels,
    quantize,
    quantize_stochastically,
)
from jopt.quant._range_search import mse, mse_search
from jopt.quant._ranges import Range, absmax, minmax
from jopt.quant._row_rounding import row_rounding
from jopt.quant._smooth import smooth_quant, smoothed_inputs
from jopt.quant._spec import QuantSpec
from jopt.quant._ternary import ternarize, ternary, ternary_optimal
from jopt.quant._ttq import (
    TernaryScales,
    ttq,
    ttq_init,
    ttq_init_params,
    ttq_params,
    ttq_quantize,
    ttq_quantize_params,
)
from jopt.quant._weighted import quantize_weighted
from jopt.quant._xnor import sign_activations, xnor_conv, xnor_dense, xnor_scaling

__all__ = [
    "Adequacy",
    "CodeRange",
    "Drift",
    "Grid",
    "Histogram",
    "QuantSpec",
    "Range",
    "TernaryBits",
    "TernaryScales",
    "Usage",
    "absmax",
    "activation_adequacy",
    "activation_ranges",
    "adaround",
    "additive_power_levels",
    "additive_powers_of_two",
    "adequacy",
    "advice",
    "affine",
    "affine_zero",
    "arithmetic_mean",
    "as_stored",
    "awq",
    "balanced_codes",
    "binarize",
    "binarize_params",
    "binary",
    "binary_matmul",
    "by_importance",
    "clipped_slope",
    "codebook",
    "codebooks",
    "correct_bias",
    "correct_biases",
    "corrected_weights",
    "density_codebook",
    "dorefa_activations",
    "dorefa_gradients",
    "dorefa_params",
    "dorefa_quantize",
    "dorefa_quantize_params",
    "dorefa_weights",
    "drifted_error",
    "e4m3",
    "e5m2",
    "encode",
    "entropy",
    "entropy_range",
    "entropy_search_range",
    "equalize",
    "equalize_params",
    "fake_binarize",
    "fake_binarize_params",
    "fake_quantize",
    "fake_quantize_params",
    "fake_quantize_within",
    "fit_levels",
    "fold_batch_norm",
    "fold_batch_norms",
    "format_adequacy",
    "format_report",
    "gptq",
    "hadamard_rotation",
    "histogram",
    "histogram_range",
    "hqq",
    "init_steps",
    "kmeans",
    "linear_codebook",
    "lloyd",
    "log_domain",
    "logarithmic",
    "lsq",
    "lsq_init",
    "lsq_init_mse",
    "lsq_params",
    "lsq_plus",
    "lsq_plus_init",
    "lsq_plus_init_weights",
    "lsq_plus_quantize",
    "lsq_quantize",
    "lsq_quantize_params",
    "minmax",
    "minmax_range",
    "mse",
    "mse_range",
    "mse_search",
    "mse_search_range",
    "mxfp4",
    "mxfp6_e2m3",
    "mxfp6_e3m2",
    "mxfp8_e4m3",
    "mxfp8_e5m2",
    "nearest_codes",
    "nf4",
    "normal_float",
    "normal_float_values",
    "nvfp4",
    "optimal_codebook",
    "optimal_codebook_with_zero",
    "pack_signs",
    "pack_ternary",
    "pact",
    "pact_init",
    "per_tensor",
    "per_token",
    "percentile",
    "percentile_range",
    "quantize",
    "quantize_calibrated_params",
    "quantize_in_order",
    "quantize_inputs",
    "quantize_inputs_dynamically",
    "quantize_params",
    "quantize_stochastically",
    "quantize_weighted",
    "random_codebook",
    "remove_batch_norms",
    "row_rounding",
    "sign_activations",
    "signed_codes",
    "smooth_quant",
    "smoothed_inputs",
    "symmetric",
    "ternarize",
    "ternary",
    "ternary_matmul",
    "ternary_optimal",
    "tied_gradient",
    "ttq",
    "ttq_init",
    "ttq_init_params",
    "ttq_params",
    "ttq_quantize",
    "ttq_quantize_params",
    "unpack_signs",
    "unsigned_codes",
    "usage",
    "with_codebooks",
    "xnor_conv",
    "xnor_dense",
    "xnor_scaling",
    "xnor_slope",
]
