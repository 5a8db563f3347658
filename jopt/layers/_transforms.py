"""What users reach for: `find_layers`, `layer_inputs`, `map_inputs`."""

import collections
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from jopt._arrays import is_compressed
from jopt._trees import flatten_with_paths, is_kernel
from jopt.layers._interpret import (
    PRODUCTS,
    Analysis,
    How,
    Record,
    Rules,
    analyse,
    bind,
    evaluate,
)
from jopt.layers._rows import rows_of, with_scans_in_order
from jopt.layers._uses import Layer, Use
from jopt.layers._views import View, whole

Apply = Callable[..., Any]
Change = Callable[[Layer, jax.Array, Any], jax.Array]


class LayerReport(NamedTuple):
    """Say which parameters are kernels of layers, and why others are not.

    Attributes:
      layers: by path, each way in which the parameter is used as a kernel.
      recorded: the paths that `layer_inputs` records.
      others: by path, for each other parameter of two or more axes, why it is not recorded.
    """

    layers: dict[str, tuple[Layer, ...]]
    recorded: tuple[str, ...]
    others: dict[str, str]


class LayerTrace(NamedTuple):
    """A traced function: the program, its inputs' values, and which of them are kernels."""

    closed: core.ClosedJaxpr
    values: list[Any]
    views: list[View | None]
    paths: list[str]
    leaves: list[Any]
    out_tree: Any

    def analysis(self, rules: Rules = PRODUCTS) -> Analysis:
        """Follow the parameters through the program."""
        return analyse(self.closed.jaxpr, self.views, rules)


def _leaf_views(path: str, leaf: Any) -> list[View | None]:
    if is_kernel(path, leaf) and leaf.size:
        return [whole(path, leaf.shape)]
    return [None] * len(jax.tree.leaves(leaf))


def trace_layers(apply: Apply, params: Any, args: tuple[Any, ...]) -> LayerTrace:
    """Trace a function and view its parameters as kernels; nothing is computed."""
    paths, leaves, _ = flatten_with_paths(params)
    if not leaves:
        raise ValueError(f"params must hold at least one array, not {params!r}.")
    closed, out_shapes = jax.make_jaxpr(apply, return_shape=True)(params, *args)
    values = jax.tree.leaves((params, args))
    views = [v for path, leaf in zip(paths, leaves, strict=True) for v in _leaf_views(path, leaf)]
    views += [None] * (len(values) - len(views))
    return LayerTrace(closed, values, views, paths, leaves, jax.tree.structure(out_shapes))


def check_apply(apply: Apply) -> None:
    """Refuse what cannot be called."""
    if not callable(apply):
        raise TypeError(f"apply must be a function (params, *args) -> outputs, not {apply!r}.")


def run_layers(trace: LayerTrace, how: How, extras: dict[str, Any]) -> tuple[Any, list[Record]]:
    """Run a traced function; `how.visit` runs the product of each layer."""
    outs, records = evaluate(
        trace.closed.jaxpr, trace.closed.consts, trace.values, trace.views, how, extras
    )
    return jax.tree.unflatten(trace.out_tree, outs), records


def by_path(uses: list[Use]) -> dict[str, tuple[Layer, ...]]:
    """Return by path each way in which a product uses a parameter."""
    layers: dict[str, list[Layer]] = collections.defaultdict(list)
    for use in uses:
        if use.layer not in layers[use.layer.path]:
            layers[use.layer.path].append(use.layer)
    return {path: tuple(found) for path, found in layers.items()}


def _conflict(layers: tuple[Layer, ...]) -> str | None:
    """Say why the inputs of a parameter's uses do not fit into one array, if they do not."""
    for name in ("contracted", "batch", "groups", "grouped"):
        values = list(dict.fromkeys(getattr(layer, name) for layer in layers))
        if len(values) > 1:
            listed = " and ".join(str(value) for value in values)
            return f"it is used with {name} {listed}, whose inputs do not fit together"
    return None


def _reason(path: str, leaf: Any, ends: list[tuple[str, str]]) -> str:
    if is_compressed(leaf):
        return "it is compressed: pass jopt.materialize(params)"
    if not leaf.size:
        return "it is empty"
    reasons = list(dict.fromkeys(reason for end, reason in ends if end == path))
    return f"used by {', '.join(reasons)}" if reasons else "never used"


def find_layers(apply: Apply, params: Any, *args: Any) -> LayerReport:
    """Find the parameters that `apply` uses as kernels of dense layers and convolutions.

    Nothing is computed. A parameter is a kernel where a dot or a convolution multiplies it, perhaps
    transposed, reshaped or converted before, by something that is not a parameter itself. Only
    floating-point parameters of two or more axes are looked at.

    Args:
      apply: `(params, *args) -> outputs`, any pure function.
      params: the tree of parameters; arrays or `jax.ShapeDtypeStruct`s.
      *args: what else `apply` takes; arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      A `LayerReport`, in which nothing is left out: a parameter of two or more axes is either
      recorded or among the others, with the reason.

    Raises:
      TypeError: `apply` is not callable.
      ValueError: `params` holds no array.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"w": jnp.ones((3, 2)), "table": jnp.ones((5, 3)), "spare": jnp.ones((2, 2))}
      >>> report = find_layers(lambda p, i: p["table"][i] @ p["w"], params, jnp.array([1]))
      >>> report.recorded, report.layers["w"][0].contracted
      (('w',), (0,))
      >>> report.others
      {'spare': 'never used', 'table': 'used by gather'}
    """
    check_apply(apply)
    trace = trace_layers(apply, params, args)
    found = trace.analysis()
    layers = by_path(found.uses)
    recorded, others = [], {}
    for path, leaf in zip(trace.paths, trace.leaves, strict=True):
        if path in layers:
            conflict = _conflict(layers[path])
            if conflict is None:
                recorded.append(path)
            else:
                others[path] = conflict
        elif is_compressed(leaf) or is_kernel(path, leaf):
            others[path] = _reason(path, leaf, found.ends)
    return LayerReport(layers, tuple(recorded), others)


def _concatenated(arrays: list[jax.Array]) -> jax.Array:
    dtypes = {array.dtype for array in arrays}
    dtype = dtypes.pop() if len(dtypes) == 1 else jnp.dtype(jnp.float32)
    return jnp.concatenate([array.astype(dtype) for array in arrays], axis=-2)


def record_input(
    use: Use, equation: core.JaxprEqn, values: list[Any], extras: dict[str, Any]
) -> tuple[list[Any], list[Record]]:
    """Run a layer and record its input."""
    del extras
    return bind(equation, values), [Record(rows_of(use, values[use.side]), use, use.scans)]


RECORD = How(record_input)


def layer_inputs(apply: Apply) -> Callable[..., dict[str, jax.Array]]:
    """Make a function that returns the inputs of the layers of a model.

    rows @ to_matrix(layer, kernel) is what the layer computes before its bias. Use it inside one
    jitted function with what consumes the rows, so that they are never held all at once:

        @jax.jit
        def calibrate(states, params, x):
            inputs = layer_inputs(apply)(params, x)
            return {path: update(states[path], rows) for path, rows in inputs.items()}

    Args:
      apply: `(params, *args) -> outputs`, any pure function; close over what is static.

    Returns:
      A jitted function `(params, *args) -> {path: rows}`; keep it, as each call of `layer_inputs`
      makes one that compiles anew. Rows are `(count, features)` in the dtype that the product sees:
      all examples, positions and uses of the parameter counted together (in float32 where uses have
      several dtypes), the features the kernel's contracted axes in its own order, so
      `(height, width, in)` for a convolution, whose rows are patches. Leading axes come before
      where parts of the kernel have inputs of their own: the layers of a scan, the copies of a
      `vmap`, the groups of a grouped or depthwise convolution (see `Layer.leading`). A parameter
      is absent if `find_layers` lists it among the others, which says why.

    Raises:
      TypeError: `apply` is not callable.
      ValueError: when called, `params` holds no array.

    Example:
      >>> import jax.numpy as jnp
      >>> inputs = layer_inputs(lambda params, x: jnp.tanh(x) @ params["w"])
      >>> inputs({"w": jnp.ones((2, 3))}, jnp.zeros((1, 4, 2)))["w"].shape
      (4, 2)
    """
    check_apply(apply)

    @jax.jit
    def inputs(params: Any, *args: Any) -> dict[str, jax.Array]:
        trace = trace_layers(apply, params, args)
        layers = by_path(trace.analysis().uses)
        _, records = run_layers(trace, RECORD, {})
        rows: dict[str, list[jax.Array]] = {
            path: [] for path, found in layers.items() if _conflict(found) is None
        }
        for record in records:
            if record.use.layer.path in rows:
                rows[record.use.layer.path].append(with_scans_in_order(record.use, record.rows))
        return {path: _concatenated(arrays) for path, arrays in rows.items()}

    return inputs


def _changed(change: Change, use: Use, values: jax.Array, extras: Mapping[str, Any]) -> jax.Array:
    new = change(use.layer, values, extras.get(use.layer.path))
    if jnp.shape(new) != values.shape or jnp.result_type(new) != values.dtype:
        raise ValueError(
            f"change must keep the input of layer {use.layer.path!r} {values.dtype}"
            f"{list(values.shape)}; it made {jnp.result_type(new)}{list(jnp.shape(new))}."
        )
    return new


def map_inputs(apply: Apply, change: Change) -> Callable[..., Any]:
    """Make a function that runs a model with the input of each of its layers replaced.

    y = kernel * change(layer, x, extra) wherever the model computes y = kernel * x.
    Differentiable in the parameters, the extras and the arguments as far as `change` is.

    Args:
      apply: `(params, *args) -> outputs`, any pure function; close over what is static.
      change: `(layer, x, extra) -> x`, which keeps shape and dtype. `x` is the input as the product
        has it, of any rank; `layer.input_axes` are the axes summed over. Called while tracing,
        once for each use, and once for all steps of a scan.

    Returns:
      A jitted function `(params, extras, *args) -> outputs`; keep it, as each call of `map_inputs`
      makes one that compiles anew. `extras` is a dict `{path: any pytree}`; a layer whose path is
      absent gets None. In a scan that slices the parameter over its layers, the extra of that path
      is sliced with it along its leading axis.

    Raises:
      TypeError: `apply` or `change` is not callable.
      ValueError: when called, `params` holds no array, `extras` has a path that is no layer, or
        `change` changes a shape or dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> rounded = map_inputs(
      ...     lambda params, x: x @ params["w"],
      ...     lambda layer, x, step: x if step is None else step * jnp.round(x / step),
      ... )
      >>> params, x = {"w": jnp.ones((2, 1))}, jnp.array([0.6, 1.9])
      >>> rounded(params, {}, x), rounded(params, {"w": 1.0}, x)
      (Array([2.5], dtype=float32), Array([3.], dtype=float32))
    """
    check_apply(apply)
    if not callable(change):
        raise TypeError(f"change must be a function (layer, x, extra) -> x, not {change!r}.")

    def visit(
        use: Use, equation: core.JaxprEqn, values: list[Any], extras: dict[str, Any]
    ) -> tuple[list[Any], list[Record]]:
        values[use.side] = _changed(change, use, values[use.side], extras)
        return bind(equation, values), []

    @jax.jit
    def mapped(params: Any, extras: Mapping[str, Any], *args: Any) -> Any:
        trace = trace_layers(apply, params, args)
        layers = by_path(trace.analysis().uses)
        unknown = [path for path in extras if path not in layers]
        if unknown:
            raise ValueError(f"extras has {unknown}, not layers; the layers are {list(layers)}.")
        return run_layers(trace, How(visit), dict(extras))[0]

    return mapped
