"""The batch-norm network as the quantization experiment uses it: trained, folded, quantized.

It is trained with `BatchNormCNN`, whose batch norms take each batch's own statistics; their running
averages are estimated once, at the end. What is stored and tested is the folded network: kernels
with biases, and for each layer whose inputs are quantized three numbers, `(offset, step, top)`:
x becomes `offset + step * clip(round((x - offset) / step), 0, top)`.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from experiments import _convolution, _models, _train
from jopt import is_compressed, layers, materialize, quant

Tree = Any
LAYERS = ("conv1", "conv2", "conv3", "dense1", "dense2")
NORMS = {layer: f"{layer}_norm" for layer in LAYERS[:-1]}
INNER = "(conv2|conv3|dense1)/kernel"  # few bits
OUTER = "(conv1|dense2)/kernel"  # first and last layer: eight bits, as the papers have it
CHAIN = [(f"{one}/kernel", f"{two}/kernel") for one, two in zip(LAYERS, LAYERS[1:], strict=False)]
SHAPE = (28, 28, 1)

normed = _models.BatchNormCNN()
folded = _models.BatchNormCNN(normalize=None)
traced = _models.BatchNormCNN(normalize=None, convolve=_convolution.conv_windows_direct)
traced_normed = _models.BatchNormCNN(convolve=_convolution.conv_windows_direct)


def initial(key: Array) -> tuple[Tree, Tree]:
    """Return fresh parameters and running averages."""
    variables = jax.jit(normed.init)(key, jnp.zeros((1, *SHAPE)))
    return variables["params"], variables["batch_stats"]


def fresh_averages(params: Tree) -> Tree:
    """Return running averages as they are before any step, of the widths of these parameters."""
    return {
        norm: {"mean": jnp.zeros(size), "var": jnp.ones(size)}
        for norm, size in ((n, params[n]["scale"].shape[0]) for n in NORMS.values())
    }


def training_logits(
    params: Tree,
    images: Array,
    change_inputs: _models.ChangeInputs = _models.unchanged_inputs,
    network: _models.BatchNormCNN = normed,
) -> Array:
    """Return logits with the statistics of the batch itself."""
    variables = {"params": params, "batch_stats": fresh_averages(params)}
    return network.apply(variables, images, True, change_inputs)  # pyright: ignore[reportReturnType]


def quantize_inputs(inputs: Tree) -> _models.ChangeInputs:
    """Return the hook that rounds the inputs of the layers for which there are three numbers."""

    def change(layer: str, x: Array) -> Array:
        if layer not in inputs:
            return x
        offset, step, top = inputs[layer]
        return offset + step * jnp.clip(jnp.round((x - offset) / step), 0, top)

    return change


def run(tree: Tree, images: Array) -> Array:
    """Run a folded network `{"params", "inputs"}`, compressed or not; returns logits."""
    params = materialize(tree["params"])
    hook = quantize_inputs(tree["inputs"])
    return folded.apply({"params": params}, images, False, hook)  # pyright: ignore[reportReturnType]


def folded_logits(params: Tree, images: Array) -> Array:
    """Run the folded network on plain parameters."""
    return folded.apply({"params": params}, images)  # pyright: ignore[reportReturnType]


def traced_logits(params: Tree, images: Array) -> Array:
    """Run the folded network with XLA's own convolutions, whose kernels calibration sees."""
    return traced.apply({"params": params}, images)  # pyright: ignore[reportReturnType]


@lru_cache(8)
def _moved(change: _models.ChangeInputs) -> Callable[[Tree, Tree, Array], Tree]:
    """Return what moves the running averages; the same for the same hook, so it compiles once."""

    def update(params: Tree, averages: Tree, images: Array) -> Tree:
        variables = {"params": params, "batch_stats": averages}
        return normed.apply(variables, images, True, change, mutable=["batch_stats"])[1][
            "batch_stats"
        ]

    return update


def estimate(params: Tree, change: _models.ChangeInputs, images: Array, batch: int = 512) -> Tree:
    """Return the running averages that a network with these kernels and inputs has."""
    averages = fresh_averages(params)
    full = [images[at : at + batch] for at in range(0, len(images) - batch + 1, batch)]
    return layers.reestimate_batch_norm(_moved(change), params, averages, full or [images])


def _with_factor(leaf: Any, factor: Array) -> Any:
    """Multiply a leaf by one factor for each output."""
    factor = factor.reshape((1,) * (leaf.ndim - 1) + (-1,))
    if not is_compressed(leaf):
        return leaf * factor
    return leaf.replace(scale=factor if leaf.scale is None else leaf.scale * factor)


def fold(params: Tree, averages: Tree) -> Tree:
    """Fold the batch norms into kernels that may be quantized: only their scales change."""
    out = {"dense2": params["dense2"]}
    for layer, norm in NORMS.items():
        mean, var = averages[norm]["mean"], averages[norm]["var"]
        factor = params[norm]["scale"] * jax.lax.rsqrt(var + _models.EPSILON)
        out[layer] = {
            "kernel": _with_factor(params[layer]["kernel"], factor),
            "bias": params[norm]["bias"] - mean * factor,
        }
    return out


def error(tree: Tree, part: tuple[Array, Array]) -> float:
    """Return the error rate of a folded network."""
    return _train.error_rate(run, tree, *part)


def layer_ranges(params: Tree, images: Array) -> dict[str, Any]:
    """Return the histogram of the inputs of every layer of a folded network."""
    statistic = quant.histogram(2048)

    @jax.jit
    def update(states: Tree, batch: Array) -> Tree:
        seen: dict[str, Array] = {}

        def hook(layer: str, x: Array) -> Array:
            seen[layer] = x
            return x

        folded.apply({"params": params}, _train.normalize(batch), False, hook)
        return {
            layer: statistic.update(states[layer], seen[layer].reshape(-1, 1)) for layer in LAYERS
        }

    states = {layer: statistic.init(1) for layer in LAYERS}
    for at in range(0, len(images), 256):
        states = update(states, images[at : at + 256])
    return {layer: statistic.finalise(state) for layer, state in states.items()}


Ends = Callable[[Any, quant.QuantSpec], tuple[Array, Array]]


def input_levels(figures: dict[str, Any], bits: int, ends: Ends, layers: tuple[str, ...]) -> Tree:
    """Return the three numbers of each layer, with zero one of the levels.

    Args:
        figures: of `layer_ranges`.
        bits: of a code.
        ends: which range of the histogram the levels cover.
        layers: those whose inputs are quantized.
    """
    spec = quant.QuantSpec(bits, (), grid=quant.affine_zero)
    top = float(2**bits - 1)
    levels = {}
    for layer in layers:
        low, high = quant.histogram_range(figures[layer], ends, spec)
        low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
        step = jnp.where(high > low, (high - low) / top, 1.0)
        levels[layer] = jnp.stack([step * jnp.round(low / step), step, jnp.float32(top)])
    return levels
