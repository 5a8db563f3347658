"""The layers of any model: find them, see and change their inputs, gather what they see.

A pure transform of the program (the jaxpr) of the user's own `apply(params, *args)`; no module is
patched, and it makes no difference which library wrote the model. For linen:

    apply = lambda params, x: model.apply({"params": params}, x)

with batch statistics `{"params": params, "batch_stats": stats}`, where `stats` is closed over or
an argument. For nnx:

    graph, params = nnx.split(model)
    apply = lambda params, x: nnx.merge(graph, params)(x)

and where a model holds more than parameters (batch statistics, random streams):

    graph, params, rest = nnx.split(model, nnx.Param, ...)
    apply = lambda params, x: nnx.merge(graph, params, rest)(x)

`find_layers` says which parameters are kernels of layers and why others are not; `layer_inputs`
records inputs, for calibration; `map_inputs` replaces them, for quantized activations. They look
into jit, remat, scan, vmap and functions with derivatives of their own, which lose their own
derivative only if there is a layer inside them. They do not look into `cond`, `while` and
`shard_map`: a parameter that goes in there is reported and left as it is.

`calibrate` runs data through a model and describes the inputs of every layer, with
`input_statistics` for the methods after training or with any other `Statistic`; `output_error` says
what replacing a kernel costs on those data. `reestimate_batch_norm` takes the averages of batch
norms anew after quantizing or pruning.
"""

from jopt.layers._calibrate import accumulate, calibrate, finalise_states, merge_states
from jopt.layers._outcome import Outcome, output_error
from jopt.layers._reestimate import (
    average_statistics,
    population_statistics,
    reestimate_batch_norm,
)
from jopt.layers._rows import from_matrix, to_matrix
from jopt.layers._statistics import (
    Extremes,
    InputStatistics,
    Statistic,
    extremes,
    input_statistics,
    moving_average,
    per_feature,
    together,
)
from jopt.layers._transforms import (
    LayerReport,
    find_layers,
    layer_inputs,
    map_inputs,
)
from jopt.layers._uses import Layer, Window

__all__ = [
    "Extremes",
    "InputStatistics",
    "Layer",
    "LayerReport",
    "Outcome",
    "Statistic",
    "Window",
    "accumulate",
    "average_statistics",
    "calibrate",
    "extremes",
    "finalise_states",
    "find_layers",
    "from_matrix",
    "input_statistics",
    "layer_inputs",
    "map_inputs",
    "merge_states",
    "moving_average",
    "output_error",
    "per_feature",
    "population_statistics",
    "reestimate_batch_norm",
    "to_matrix",
    "together",
]
