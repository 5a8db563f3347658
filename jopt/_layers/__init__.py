"""See and change the inputs of the layers of any model.

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
"""

from jopt._layers._rows import from_matrix, to_matrix
from jopt._layers._transforms import (
    LayerReport,
    find_layers,
    layer_inputs,
    map_inputs,
)
from jopt._layers._uses import Layer, Window

__all__ = [
    "Layer",
    "LayerReport",
    "Window",
    "find_layers",
    "from_matrix",
    "layer_inputs",
    "map_inputs",
    "to_matrix",
]
