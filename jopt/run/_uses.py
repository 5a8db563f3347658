"""Where a model multiplies by its parameters, or looks up rows of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jopt._leaves import is_compressed
from jopt.layers import Layer
from jopt.layers._interpret import PRODUCTS, Analysis, Rules
from jopt.layers._transforms import LayerTrace, by_path, check_apply, trace_layers
from jopt.layers._uses import Use
from jopt.layers._views import View, whole

Apply = Callable[..., Any]
GATHER = "gather"


def gather_use(params: dict[str, Any], views: list[View | None]) -> Use | str:
    """Read a `gather` of whole rows of a table by one index each.

    Returns:
      The use, or the reason why there is none.
    """
    view = views[0]
    if view is None:
        return "gather has it as its indices"
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    table = whole(view.path, view.shape)
    rows = (
        len(view.shape) == 2
        and view.dims == table.dims
        and tuple(numbers.start_index_map) == (0,)
        and tuple(numbers.collapsed_slice_dims) == (0,)
        and not getattr(numbers, "operand_batching_dims", ())
        and tuple(sizes) == (1, view.shape[1])
    )
    if not rows:
        return "gather takes other parts of it than rows"
    layer = Layer(view.path, GATHER, view.shape, (1,), (), (), 1, None, (), None)
    return Use(layer, 1, (), (), (), (), view.scanned, view.scans)


RULES: Rules = {**PRODUCTS, GATHER: gather_use}


class Found(NamedTuple):
    """A traced model and what becomes of its parameters.

    Attributes:
      trace: the program.
      analysis: its layers, its gathers, and where other views end.
    """

    trace: LayerTrace
    analysis: Analysis

    def layers(self) -> dict[str, tuple[Layer, ...]]:
        """Return by path each way in which a product uses a parameter."""
        return by_path([use for use in self.analysis.uses if use.layer.kind != GATHER])

    @property
    def gathered(self) -> set[str]:
        """Return the paths of the tables of which rows are looked up."""
        return {use.layer.path for use in self.analysis.uses if use.layer.kind == GATHER}


def dense_avals(params: Any) -> Any:
    """Return the shapes and dtypes of the parameters that compressed leaves stand for."""

    def aval(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_compressed(leaf) else leaf

    return jax.tree.map(aval, params, is_leaf=is_compressed)


def trace_uses(apply: Apply, dense: Any, args: tuple[Any, ...]) -> Found:
    """Trace a model on parameters that are not compressed; nothing is computed.

    Raises:
      TypeError: `apply` is not callable.
      ValueError: `dense` holds no array.
    """
    check_apply(apply)
    trace = trace_layers(apply, dense, args)
    return Found(trace, trace.analysis(RULES))
