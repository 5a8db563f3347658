"""Run compressed models fast, from any model's own `apply(params, *args)`.

    params = jopt.run.prepare(apply, params, x)  # once: lay kernels out as products read them
    fast = jopt.run.compressed(apply)
    y = fast(params, x)                          # apply(materialize(params), x), but fast
    print(jopt.run.explain(apply, params, x))    # what ran where, and why not

`compressed` is a transform of the program (the jaxpr) of `apply`: where a product, a convolution or
a look-up of rows meets a compressed leaf, it computes with the codes; elsewhere it restores the
leaf. See `jopt.layers` for which programs it looks into.
"""

from jopt.run._build import instructions as native_instructions
from jopt.run._compressed import Explanation, Ran, compressed, explain
from jopt.run._forms import binary_product
from jopt.run._forms import native_here as native_problem
from jopt.run._matrices import (
    Int4Matrix,
    Int8Matrix,
    SignMatrix,
    TurnedMatrix,
)
from jopt.run._prepare import prepare
from jopt.run._pruned import FloatMatrix, NarrowMatrix, SparseMatrix

__all__ = [
    "Explanation",
    "FloatMatrix",
    "Int4Matrix",
    "Int8Matrix",
    "NarrowMatrix",
    "Ran",
    "SignMatrix",
    "SparseMatrix",
    "TurnedMatrix",
    "binary_product",
    "compressed",
    "explain",
    "native_instructions",
    "native_problem",
    "prepare",
]
