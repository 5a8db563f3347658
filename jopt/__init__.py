"""Make trained JAX models smaller and faster while they keep their accuracy.

Everything is a function from a pytree of parameters to a pytree of parameters:

- `jopt.layers`: what the layers of any model are, and what their inputs are like.
- `jopt.quant`: few-bit codes instead of floats.
- `jopt.prune`: zeros instead of weights that do not matter, held there by optax transforms.
- `jopt.distill`: losses with which a small network learns from a large one.
- `jopt.codec`: one small file for all of it.
- `jopt.run`: compressed models that run fast, from their own `apply`.
- `jopt.materialize`: back to plain arrays, inside the jitted function.
"""

from jopt import codec, distill, layers, prune, quant, run
from jopt._arrays import materialize, nbytes
from jopt._leaves import (
    BitTensor,
    CodebookTensor,
    FloatTensor,
    QTensor,
    RotatedTensor,
    ScaledTensor,
    is_compressed,
)
from jopt._trees import Filter, is_kernel, select

__all__ = [
    "BitTensor",
    "CodebookTensor",
    "Filter",
    "FloatTensor",
    "QTensor",
    "RotatedTensor",
    "ScaledTensor",
    "codec",
    "distill",
    "is_compressed",
    "is_kernel",
    "layers",
    "materialize",
    "nbytes",
    "prune",
    "quant",
    "run",
    "select",
]

__version__ = "0.1.0"
