"""Count the multiply-adds of a network, all of them or those that masks leave."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend import core

from jopt.layers._interpret import Record, inner_jaxprs
from jopt.layers._transforms import RECORD, run_layers, trace_layers
from jopt.prune._budgets import Shape
from jopt.prune._to_budget import kept_counts


class MultiplyAdds(NamedTuple):
    """How often a network multiplies, for the arguments that it was traced with.

    Attributes:
      uses: by path of a kernel, how many times each of its weights is multiplied.
      shapes: by path the shape of the kernel.
      other: multiply-adds of products without a kernel, as attention has them.
    """

    uses: dict[str, int]
    shapes: dict[str, Shape]
    other: int

    @property
    def layers(self) -> dict[str, int]:
        """Return the multiply-adds of each kernel, by path."""
        return {path: uses * math.prod(self.shapes[path]) for path, uses in self.uses.items()}

    @property
    def total(self) -> int:
        """Return all multiply-adds."""
        return sum(self.layers.values()) + self.other


def _product(equation: core.JaxprEqn) -> int:
    """Count the multiply-adds of a dot or a convolution."""
    avals: list[Any] = [variable.aval for variable in (*equation.invars[:2], equation.outvars[0])]
    left, right, result = (aval.shape for aval in avals)
    out = math.prod(result)
    if equation.primitive.name == "dot_general":
        (summed, _), _ = equation.params["dimension_numbers"]
        return out * math.prod(left[axis] for axis in summed)
    outputs = right[equation.params["dimension_numbers"].rhs_spec[0]]
    return out * math.prod(right) // max(outputs, 1)


def _all_products(jaxpr: core.Jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            total += _product(equation)
            continue
        inner = [
            _all_products(each) for v in equation.params.values() for each, _ in inner_jaxprs(v)
        ]
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += times * (
            max(inner, default=0) if equation.primitive.name == "cond" else sum(inner)
        )
    return total


def multiply_adds(apply: Callable[..., Any], params: Any, *args: Any) -> MultiplyAdds:
    """Count the multiply-adds of dots and convolutions; nothing is computed.

    Of a kernel with h x w x in x out weights: h * w * in * out * output positions. Every use of a
    shared kernel counts, and every step of a scan. Positions of a window outside of the image
    count as well, as usual, and so do the zeros between inputs of a transposed convolution. Of a
    `cond` the dearest branch counts, of a `while` one step; kernels within these, or that
    are no kernels for other reasons (see `jopt.layers.find_layers`), count among the others.

    Args:
      apply: `(params, *args) -> outputs`, any pure function.
      params: the tree of parameters; arrays or `jax.ShapeDtypeStruct`s.
      *args: what else `apply` takes: one example, for counts by example.

    Returns:
      The counts, exact.

    Raises:
      ValueError: `params` holds no array.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"conv": jnp.ones((3, 3, 1, 4)), "dense": jnp.ones((16, 10))}
      >>> def apply(params, x):
      ...     x = jax.lax.conv_general_dilated(
      ...         x, params["conv"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
      ...     )
      ...     return x.reshape(-1, 16) @ params["dense"]
      >>> counts = multiply_adds(apply, params, jnp.ones((1, 4, 4, 1)))
      >>> counts.layers, counts.total
      ({'conv': 144, 'dense': 160}, 304)
    """
    found = trace_layers(apply, params, args)

    def inputs_of_layers(*values: Any) -> list[Record]:
        return run_layers(found._replace(values=list(values)), RECORD, {})[1]

    uses: dict[str, int] = {}
    for record in jax.eval_shape(inputs_of_layers, *found.values):
        path = record.use.layer.path
        uses[path] = uses.get(path, 0) + record.rows.shape[-2]
    shapes = {
        path: tuple(leaf.shape)
        for path, leaf in zip(found.paths, found.leaves, strict=True)
        if path in uses
    }
    counts = MultiplyAdds(uses, shapes, 0)
    return counts._replace(other=_all_products(found.closed.jaxpr) - counts.total)


def kept_multiply_adds(counts: MultiplyAdds, masks: Any) -> int:
    """Count the multiply-adds with weights that masks keep.

    A weight that is masked is never multiplied, whatever its input. What a machine saves of that
    depends on it: without sparse kernels only what is shrunk away.

    Args:
      counts: what `multiply_adds` counted.
      masks: a tree of booleans like the parameters.

    Returns:
      A whole number; products without a kernel stay in it.

    Raises:
      ValueError: there is no mask for a kernel.

    Example:
      >>> import jax.numpy as jnp
      >>> counts = multiply_adds(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 2))}, jnp.ones((5, 3)))
      >>> kept_multiply_adds(counts, {"w": jnp.array([[True, False]])})
      15
    """
    kept = kept_counts(masks, counts.shapes)
    return counts.other + sum(uses * kept[path] for path, uses in counts.uses.items())
