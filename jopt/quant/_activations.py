"""Quantized inputs of layers at inference: ranges fixed beforehand, or taken from each input.

The input of a layer is rounded to what its codes would restore, in place, whatever library the
model is written in (see `map_inputs`); it is how accurate the integer network will be.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jopt._arrays import materialize, working_dtype
from jopt.layers import Layer, map_inputs
from jopt.layers._calibrate import Apply, accumulate, finalise_states, scans_only
from jopt.layers._statistics import Statistic
from jopt.quant._histogram import histogram
from jopt.quant._histogram_ranges import Ends, Method, histogram_range, mse_range
from jopt.quant._quantize import straight_through
from jopt.quant._spec import QuantSpec

Axes = Callable[[Layer, int], tuple[int, ...]]


def _check_spec(spec: QuantSpec) -> None:
    if not isinstance(spec, QuantSpec):
        raise TypeError(f"spec must be a QuantSpec, not {spec!r}.")
    if spec.block != ():
        raise ValueError(
            f"block must be () for the inputs of layers, whose ranges are not by block, not "
            f"{spec.block}."
        )


@partial(jax.jit, static_argnames="spec")
def _within(values: jax.Array, low: jax.Array, high: jax.Array, spec: QuantSpec) -> jax.Array:
    exact = working_dtype(values.dtype)
    wide = jax.lax.stop_gradient(values).astype(exact)
    low, high = (jax.lax.stop_gradient(end).astype(exact) for end in (low, high))
    levels = spec.grid.fit(wide, low, high, spec.bits)
    rounded = materialize(spec.grid.encode(wide, levels, spec.bits))
    rounded = jnp.where(jnp.isnan(wide), wide, rounded).astype(values.dtype)
    return straight_through(values, rounded, (wide >= low) & (wide <= high))


def fake_quantize_within(
    values: ArrayLike, low: ArrayLike, high: ArrayLike, spec: QuantSpec
) -> jax.Array:
    """Round an array to what its codes in a given range restore, with a straight-through gradient.

    As `fake_quantize`, but the range is an argument and not taken from the values, which for
    activations would mean a pass over them at inference and results that depend on the batch.
    Values outside take its nearest end, and their gradient is zero. The range has no gradient.

    Args:
      values: floating-point array.
      low: lower ends, broadcasting against `values` axis by axis; a scalar is one for all.
      high: upper ends, of the same shape.
      spec: bits and grid; its range and block are not used.

    Returns:
      An array of the shape and dtype of `values`. NaN stays NaN.

    Raises:
      ValueError: low or high does not have the rank of `values`.
      TypeError: the values are not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import quant
      >>> spec = quant.QuantSpec(2, (), quant.minmax, quant.affine_zero)
      >>> fake_quantize_within(jnp.array([0.2, 1.2, 9.0]), 0.0, 3.0, spec)
      Array([0., 1., 3.], dtype=float32)
    """
    array, *ends = (jnp.asarray(each) for each in (values, low, high))
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"values must be floating-point, not {array.dtype}.")
    ends = [end.reshape((1,) * array.ndim) if end.size == 1 else end for end in ends]
    for name, end in zip(("low", "high"), ends, strict=True):
        if end.ndim != array.ndim:
            raise ValueError(
                f"{name} of shape {end.shape} must be a scalar or have the rank of the values, of "
                f"shape {array.shape}."
            )
    return _within(array, *ends, spec)


def activation_ranges(
    apply: Apply,
    params: Any,
    batches: Iterable[Any],
    spec: QuantSpec,
    statistic: Statistic | None = None,
    method: Method = mse_range,
    max_rows: int | None = None,
) -> dict[str, Ends]:
    """Choose a range for the inputs of each layer from calibration data.

    Each layer has one range, each layer of a scan its own; copies made by `vmap` and groups of a
    convolution share one.

    Args:
      apply: `(params, *args) -> outputs`, any pure function.
      params: its parameters, plain arrays.
      batches: as for `calibrate`.
      spec: bits and grid of the inputs; `block` must be `()`. Inputs after a ReLU are best served
        by `affine_zero`.
      statistic: `histogram()` by default; `extremes` or `moving_average(m)` with `minmax_range`.
      method: `(figures, spec) -> (low, high)`: `mse_range`, `minmax_range`, `percentile_range(p)`,
        `entropy_range`.
      max_rows: as for `calibrate`.

    Returns:
      `{path: (low, high)}`, float32, for `quantize_inputs`.

    Raises:
      ValueError: as `calibrate`, or the block is not `()`.
      TypeError: the figures of `statistic` are not what `method` needs.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import quant
      >>> from jopt.quant import minmax_range
      >>> apply, params = lambda params, x: x @ params["w"], {"w": jnp.ones((1, 2))}
      >>> spec = quant.QuantSpec(8, (), grid=quant.affine_zero)
      >>> batches = [jnp.array([[0.0], [1.0]]), jnp.array([[5.0]])]
      >>> activation_ranges(apply, params, batches, spec, method=minmax_range)
      {'w': (Array(0., dtype=float32), Array(5., dtype=float32))}
    """
    _check_spec(spec)
    statistic = histogram() if statistic is None else statistic
    states = accumulate(apply, params, batches, statistic, max_rows, scans_only)
    figures = finalise_states(statistic, states)
    return {path: histogram_range(each, method, spec) for path, each in figures.items()}


def quantize_inputs(apply: Apply, spec: QuantSpec) -> Callable[..., Any]:
    """Make a function that runs a model with the inputs of its layers quantized in fixed ranges.

    Differentiable, straight-through inside the ranges and zero outside, so it also serves to train.

    Args:
      apply: `(params, *args) -> outputs`, any pure function.
      spec: bits and grid of the inputs; `block` must be `()`.

    Returns:
      A jitted function `(params, ranges, *args) -> outputs`; keep it, as each call of
      `quantize_inputs` makes one that compiles anew. `ranges` is `{path: (low, high)}`, as from
      `activation_ranges`; the input of a layer whose path is left out of it is not quantized.

    Raises:
      ValueError: the block is not `()`; when called, `ranges` has a path that is no layer.
      TypeError: `apply` is not callable or `spec` not a `QuantSpec`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import quant
      >>> spec = quant.QuantSpec(2, (), grid=quant.affine_zero)
      >>> quantized = quantize_inputs(lambda params, x: x @ params["w"], spec)
      >>> ranges = {"w": (jnp.array(0.0), jnp.array(3.0))}
      >>> quantized({"w": jnp.ones((1, 1))}, ranges, jnp.array([[1.2], [9.0]])).ravel()
      Array([1., 3.], dtype=float32)
    """
    _check_spec(spec)

    def change(layer: Layer, values: jax.Array, ends: Ends | None) -> jax.Array:
        del layer
        return values if ends is None else fake_quantize_within(values, *ends, spec)

    return map_inputs(apply, change)


def per_token(layer: Layer, ndim: int) -> tuple[int, ...]:
    """Return the axes that share a range so that each output has inputs of one scale.

    The axes summed over, for a dense layer: each token has its own range. For a convolution, whose
    outputs overlap in their inputs, all axes of an example.

    Example:
      >>> per_token(Layer("w", "dot", (8, 4), (0,), (), (), 1, None, (2,), None), 3)
      (2,)
    """
    if layer.window is None:
        return layer.input_axes
    example = layer.window.dimension_numbers.lhs_spec[0]
    return tuple(axis for axis in range(ndim) if axis != example)


def per_tensor(layer: Layer, ndim: int) -> tuple[int, ...]:
    """Return all axes: one range for the whole input, which then depends on the whole batch."""
    del layer
    return tuple(range(ndim))


def quantize_inputs_dynamically(
    apply: Apply, spec: QuantSpec, axes: Axes = per_token
) -> Callable[..., Any]:
    """Make a function that runs a model with each layer's input quantized in a range of its own.

    The range is taken by `spec.range` when the model runs, so no calibration is needed.

    Args:
      apply: `(params, *args) -> outputs`, any pure function.
      spec: bits, range (`absmax` or `minmax`, as it costs time at each run) and grid; `block` must
        be `()`.
      axes: `(layer, ndim) -> axes` that share a range: `per_token` or `per_tensor`.

    Returns:
      A jitted function `(params, *args) -> outputs`; keep it, as each call of this one makes one
      that compiles anew. All layers are quantized that `find_layers` lists as layers.

    Raises:
      ValueError: the block is not `()`.
      TypeError: `apply` is not callable or `spec` not a `QuantSpec`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import quant
      >>> run = quantize_inputs_dynamically(
      ...     lambda params, x: x @ params["w"], quant.QuantSpec(2, ())
      ... )
      >>> run({"w": jnp.eye(2)}, jnp.array([[1.0, 0.4], [10.0, 6.0]]))  # levels -a, 0, a of a row
      Array([[ 1.,  0.],
             [10., 10.]], dtype=float32)
    """
    _check_spec(spec)

    def change(layer: Layer, values: jax.Array, extra: Any) -> jax.Array:
        del extra
        exact = working_dtype(values.dtype)
        wide = jax.lax.stop_gradient(values).astype(exact)

        def restore(low: jax.Array, high: jax.Array) -> jax.Array:
            levels = spec.grid.fit(wide, low, high, spec.bits)
            return materialize(spec.grid.encode(wide, levels, spec.bits))

        ends = spec.range(wide, axes(layer, values.ndim), restore)
        return fake_quantize_within(values, *ends, spec)

    mapped = map_inputs(apply, change)
    no_extras: Mapping[str, Any] = {}
    return lambda params, *args: mapped(params, no_extras, *args)
