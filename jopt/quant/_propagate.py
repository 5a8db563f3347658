"""Quantize layer by layer in the order of use, each making up for the layers before it.

Statistics taken from the float network describe inputs that a quantized layer never sees. Here each
layer is given the inputs x^ of the network quantized so far, and the outputs that the float network
makes of its own inputs x as the target, so that errors do not pile up from layer to layer.
"""

import functools
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jopt._arrays import materialize
from jopt._trees import Filter, flatten_with_paths, is_kernel, naming_leaf
from jopt.layers import Layer, find_layers, layer_inputs
from jopt.layers._calibrate import map_over, shared_axes, subsample
from jopt.layers._outcome import Outcome, Unsuited, keep_lower, mapped
from jopt.layers._statistics import InputStatistics, InputSums, input_statistics
from jopt.quant._by_path import refuse_non_finite, selected
from jopt.quant._calibrated import Method, Report
from jopt.quant._drift import Drift, corrected_weights, drifted_error
from jopt.quant._grids import Leaf
from jopt.quant._quantize import check_values, quantize
from jopt.quant._spec import QuantSpec

Apply = Callable[..., Any]


class _Sums(NamedTuple):
    inputs: InputSums
    cross: jax.Array
    square: jax.Array


def _start(features: int) -> _Sums:
    zeros = jnp.zeros((features, features), jnp.float32)
    return _Sums(input_statistics.init(features), zeros, zeros)


def _add(state: _Sums, seen: jax.Array, wanted: jax.Array) -> _Sums:
    seen = seen.astype(jnp.float32)
    drift = wanted.astype(jnp.float32) - seen
    return _Sums(
        input_statistics.update(state.inputs, seen),
        state.cross + jnp.matmul(seen.T, drift, precision="highest"),
        state.square + jnp.matmul(drift.T, drift, precision="highest"),
    )


def _finish(state: _Sums) -> tuple[InputStatistics, Drift]:
    count = jnp.maximum(state.inputs.count, 1.0)
    figures = input_statistics.finalise(state.inputs)
    return figures, Drift(state.cross / count, state.square / count)


def _moments(
    inputs: Callable[..., Any], path: str, max_rows: int | None, params: Any, current: Any,
    batches: list[tuple[Any, ...]],
) -> tuple[InputStatistics, Drift]:  # fmt: skip
    """Gather the moments of one layer; what comes after that layer is not computed."""

    def rows(tree: Any, args: tuple[Any, ...]) -> jax.Array:
        return subsample(inputs(tree, *args)[path], max_rows)

    shape = jax.eval_shape(rows, params, batches[0]).shape
    depth = len(shape) - 2
    one = jax.jit(lambda: _start(shape[-1]))()
    state = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, shape[:-2] + leaf.shape), one)

    @jax.jit
    def step(state: _Sums, params: Any, current: Any, args: tuple[Any, ...]) -> _Sums:
        return map_over(_add, depth)(state, rows(current, args), rows(params, args))

    for args in batches:
        state = step(state, params, current, args)
    return map_over(_finish, depth)(state)


@functools.lru_cache(maxsize=64)
def _as_one_method(method: Method, damping: float) -> Method:
    """Return a method for statistics that are pairs `(statistics, drift)`."""

    def corrected(weights: jax.Array, moments: Any, spec: QuantSpec) -> tuple[Leaf, Outcome]:
        statistics, drift = moments
        target = corrected_weights(weights, statistics, drift, damping)
        leaf, _ = method(target, statistics, spec)
        nearest = quantize(weights, spec)
        return keep_lower(
            leaf,
            nearest,
            drifted_error(weights, leaf, statistics, drift),
            drifted_error(weights, nearest, statistics, drift),
        )

    return corrected


def _order_of_use(apply: Apply, params: Any, args: tuple[Any, ...]) -> tuple[list[Layer], dict]:
    """Return the layers in the order of use, and for other parameters the reason."""
    found = find_layers(apply, params, *args)
    layers = [uses[0] for path, uses in found.layers.items() if path in found.recorded]
    reasons = dict(found.others)
    for layer in layers:
        if shared_axes(layer) != ():
            reasons[layer.path] = f"its axes {layer.contracted} are its inputs"
    return [layer for layer in layers if layer.path not in reasons], reasons


def _checked(params: Any, spec: QuantSpec, where: Filter) -> tuple[list[str], list[Any], Any, set]:
    """Refuse leaves that cannot be quantized before anything is computed."""
    refuse_non_finite(params, where)
    paths, leaves, treedef = flatten_with_paths(params)
    for path, leaf in zip(paths, leaves, strict=True):  # apply takes none that is compressed
        naming_leaf(lambda _: None)(path, leaf)
    chosen = selected(params, where)
    for path, leaf in chosen.items():
        naming_leaf(check_values, spec)(path, leaf)
    return paths, leaves, treedef, set(chosen)


def quantize_in_order(
    apply: Apply,
    params: Any,
    batches: Iterable[Any],
    spec: QuantSpec,
    method: Method,
    where: Filter = is_kernel,
    damping: float = 0.01,
    max_rows: int | None = None,
) -> tuple[Any, Report]:
    """Quantize the layers of a model one after the other, in the order in which they are used.

    For each layer the inputs x of the float network and x^ of the network quantized so far give a
    corrected kernel (`corrected_weights`), which `method` quantizes for the inputs x^. Each layer
    makes one pass over the data. The layers of a scan are one parameter, quantized together from
    inputs that none of them has changed yet.

    Args:
      apply: `(params, *args) -> outputs`, any pure function.
      params: its parameters, plain arrays; they are not changed.
      batches: calibration data; a tuple holds the `*args` of apply, anything else is its one
        argument. All of them are kept while this runs.
      spec: bits, block, range and grid.
      method: `(weights, statistics, spec) -> (leaf, Outcome)`, as `gptq`.
      where: which leaves; by default those that `is_kernel` takes.
      damping: how strongly a corrected kernel is held to the float one, as a share of the mean of
        gram's diagonal.
      max_rows: if given, about so many evenly spaced rows of each batch are used for each layer.

    Returns:
      The tree with compressed leaves, and a report: by path the `Outcome`, whose errors are those
      against the outputs of the float network, or the reason why a leaf was rounded to nearest.

    Raises:
      ValueError: there is no batch, the filter matches nothing, a block does not divide a leaf, or
        a leaf holds NaN or infinity.
      TypeError: a leaf is compressed already, or a chosen one is not floating-point.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jopt import quant
      >>> from jopt.quant import gptq
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> params = {name: jax.random.normal(key, (4, 4)) for name, key in zip("ab", keys)}
      >>> apply = lambda p, x: jnp.tanh(x @ p["b"]) @ p["a"]
      >>> data = jax.random.normal(keys[2], (64, 4))
      >>> small, report = quantize_in_order(apply, params, [data], quant.QuantSpec(3), gptq)
      >>> list(report)
      ['b', 'a']

    References:
      Li et al., "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration", 2025,
      https://arxiv.org/abs/2504.02692, and Zhang et al., "Qronos: Correcting the Past by Shaping
      the Future in Post-Training Quantization", 2025, https://arxiv.org/abs/2505.11695, section 3.
      Both correct within the rounding loop; here the kernel is corrected once, before it, so that
      any method can follow.
    """
    data = [batch if isinstance(batch, tuple) else (batch,) for batch in batches]
    if not data:
        raise ValueError("batches must hold at least one batch: there is nothing to calibrate on.")
    paths, leaves, treedef, chosen = _checked(params, spec, where)
    layers, reasons = _order_of_use(apply, params, data[0])
    inputs = layer_inputs(apply)
    run = _as_one_method(method, damping)
    done: dict[str, Leaf] = {}
    report: Report = {}
    tree = partial(jax.tree.unflatten, treedef)
    for layer in (layer for layer in layers if layer.path in chosen):
        current = materialize(
            tree([done.get(p, leaf) for p, leaf in zip(paths, leaves, strict=True)])
        )
        moments = _moments(inputs, layer.path, max_rows, params, current, data)
        weights = leaves[paths.index(layer.path)]
        try:
            result = mapped(run, spec, len(layer.batch))(weights, moments)
        except Unsuited as error:
            reasons[layer.path] = str(error)
            continue
        done[layer.path], report[layer.path] = result
    for path, leaf in zip(paths, leaves, strict=True):
        if path in chosen and path not in done:
            done[path] = quantize(leaf, spec)
            report[path] = f"rounded to nearest: {reasons.get(path, 'not a layer')}"
    return tree([done.get(p, leaf) for p, leaf in zip(paths, leaves, strict=True)]), report
