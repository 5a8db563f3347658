"""Recipes that train the network through quantization, each a handful of functions.

A recipe trains one tree, `{"params": ..., ...}`: the parameters and whatever is learned beside them
ride in one optimizer. What stays as it was at the start (codes, calibrated levels) is a second
tree; everything else here is a function of both together. The first and the last kernel have eight
bits everywhere.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from experiments import _cnn, _models
from jopt import CodebookTensor, materialize, quant

Tree = Any
EIGHT = quant.QuantSpec(8)
QUANTIZED_INPUTS = ("conv2", "conv3", "dense1")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Say how one format is trained.

    Attributes:
      method: its name in the table.
      format: of the inner kernels, such as "2" bits or "k-means-16".
      inputs: bits of the inputs of the inner layers, or 0 for floats.
      start: `(params, levels) -> (trained, fixed)`, of float parameters and the calibrated levels
        of inputs; `tree` below is the two in one.
      weights: `tree -> params`, the kernels as they will be restored, with gradients.
      change: `tree -> hook` that quantizes inputs, with gradients.
      export: `tree -> params` with compressed kernels.
      levels: `tree -> {layer: (offset, step, top)}`.
      penalty: `tree -> scalar` to add to the loss.
      epochs: of training, from the float network.
      rate: Adam's learning rate.
    """

    method: str
    format: str
    inputs: int
    start: Callable[[Tree, Tree], tuple[Tree, Tree]]
    weights: Callable[[Tree], Tree]
    change: Callable[[Tree], _models.ChangeInputs]
    export: Callable[[Tree], Tree]
    levels: Callable[[Tree], Tree]
    penalty: Callable[[Tree], Array] = lambda tree: jnp.zeros(())
    epochs: int = 3
    rate: float = 1e-3

    @property
    def name(self) -> str:
        """Return a name for files."""
        words = f"{self.method} {self.format} a{self.inputs}"
        return "".join(char if char.isalnum() else "-" for char in words.lower())


def outer(params: Tree) -> Tree:
    """Round the first and the last kernel to eight bits."""
    return quant.fake_quantize_params(params, EIGHT, _cnn.OUTER)


def outer_codes(params: Tree) -> Tree:
    """Quantize the first and the last kernel to eight bits."""
    return quant.quantize_params(params, EIGHT, _cnn.OUTER)


def no_change(tree: Tree) -> _models.ChangeInputs:
    """Leave the inputs as they are."""
    return _models.unchanged_inputs


def no_levels(tree: Tree) -> Tree:
    """Say that no inputs are quantized."""
    return {}


def only_params(params: Tree, levels: Tree) -> tuple[Tree, Tree]:
    """Train the parameters alone."""
    return {"params": params}, {}


def trains(
    learned: Callable[[Tree, Tree], Tree],
) -> Callable[[Tree, Tree], tuple[Tree, Tree]]:
    """Train the parameters and what `learned` makes of them and of the levels of inputs."""
    return lambda params, levels: ({"params": params, **learned(params, levels)}, {})


def straight_through(
    method: str, format: str, spec: quant.QuantSpec, epochs: int = 3, rate: float = 1e-3
) -> Recipe:
    """Train kernels through the rounding to any spec, inputs in floats."""
    return Recipe(
        method,
        format,
        0,
        only_params,
        lambda tree: outer(quant.fake_quantize_params(tree["params"], spec, _cnn.INNER)),
        no_change,
        lambda tree: outer_codes(quant.quantize_params(tree["params"], spec, _cnn.INNER)),
        no_levels,
        epochs=epochs,
        rate=rate,
    )


def _lsq_codes(bits: int) -> quant.CodeRange:
    """Return as many levels below zero as above it, but for two bits all four."""
    return quant.balanced_codes if bits > 2 else quant.signed_codes


def learned_steps(method: str, bits: int, init: Callable, epochs: int = 3) -> Recipe:
    """Train kernels and the steps of their levels (LSQ), inputs in floats."""
    spec, codes = quant.QuantSpec(bits), _lsq_codes(bits)
    start = partial(init, code_range=codes)
    quantizer, exported = (
        partial(each, code_range=codes) for each in (quant.lsq, quant.lsq_quantize)
    )
    return Recipe(
        method,
        str(bits),
        0,
        trains(lambda params, _: {"steps": quant.init_steps(params, spec, _cnn.INNER, start)}),
        lambda tree: outer(quant.lsq_params(tree["params"], tree["steps"], spec, quantizer)),
        no_change,
        lambda tree: outer_codes(
            quant.lsq_quantize_params(tree["params"], tree["steps"], spec, exported)
        ),
        no_levels,
        epochs=epochs,
    )


# --- Inputs in few bits as well -------------------------------------------------------------------


def _per_tensor(x: Array, value: Array) -> Array:
    return value.reshape((1,) * x.ndim)


def _fixed(tree: Tree) -> _models.ChangeInputs:
    """Round inputs to calibrated levels that are not trained, straight through inside them."""
    levels = tree["levels"]

    def change(layer: str, x: Array) -> Array:
        if layer not in levels:
            return x
        offset, step, top = levels[layer]
        clipped = jnp.clip(x, offset, offset + step * top)
        rounded = _cnn.quantize_inputs(levels)(layer, x)
        return clipped + jax.lax.stop_gradient(rounded - clipped)

    return change


def _lsq_inputs(bits: int, tree: Tree) -> _models.ChangeInputs:
    spec = quant.QuantSpec(bits, ())

    def change(layer: str, x: Array) -> Array:
        if layer not in tree["input_steps"]:
            return x
        step = _per_tensor(x, tree["input_steps"][layer])
        count = x.size // _batch(layer, x)
        return quant.lsq(x, step, spec, code_range=quant.unsigned_codes, count=count)

    return change


def _lsq_plus_inputs(bits: int, tree: Tree) -> _models.ChangeInputs:
    spec = quant.QuantSpec(bits, ())

    def change(layer: str, x: Array) -> Array:
        if layer not in tree["input_steps"]:
            return x
        step = _per_tensor(x, tree["input_steps"][layer])
        offset = _per_tensor(x, tree["offsets"][layer])
        return quant.lsq_plus(x, step, offset, spec, count=x.size // _batch(layer, x))

    return change


def _batch(layer: str, x: Array) -> int:
    """Return the number of examples: convolutions have them last."""
    return x.shape[-1] if layer.startswith("conv") else x.shape[0]


def _pact_inputs(bits: int, tree: Tree) -> _models.ChangeInputs:
    def change(layer: str, x: Array) -> Array:
        if layer not in tree["clips"]:
            return x
        return quant.pact(x, tree["clips"][layer], bits)

    return change


def _dorefa_inputs(bits: int, tree: Tree) -> _models.ChangeInputs:
    def change(layer: str, x: Array) -> Array:
        return quant.dorefa_activations(x, bits) if layer in QUANTIZED_INPUTS else x

    return change


def _top(bits: int) -> float:
    return float(2**bits - 1)


def _levels_of(tree: Tree, bits: int) -> Tree:
    """Return the levels of learned steps, and of learned offsets if there are any."""
    steps = tree["input_steps"]
    offsets = tree.get("offsets", {layer: jnp.zeros(()) for layer in steps})
    return {
        layer: jnp.stack([offsets[layer], jnp.abs(steps[layer]), jnp.float32(_top(bits))])
        for layer in steps
    }


def everything(bits: int, epochs: int = 3) -> list[Recipe]:
    """Return the methods that quantize kernels and inputs of the inner layers to `bits`."""
    spec = quant.QuantSpec(bits)
    whole = quant.QuantSpec(bits, ())
    words = str(bits)
    codes = _lsq_codes(bits)
    start = partial(quant.lsq_init_mse, code_range=codes)

    def steps_of(levels: Tree) -> Tree:
        return {layer: three[1] for layer, three in levels.items()}

    def lsq_weights(tree: Tree, codes: quant.CodeRange = quant.signed_codes) -> Tree:
        quantizer = partial(quant.lsq, code_range=codes)
        return outer(quant.lsq_params(tree["params"], tree["steps"], spec, quantizer))

    def lsq_codes(tree: Tree, codes: quant.CodeRange = quant.signed_codes) -> Tree:
        quantizer = partial(quant.lsq_quantize, code_range=codes)
        small = quant.lsq_quantize_params(tree["params"], tree["steps"], spec, quantizer)
        return outer_codes(small)

    def dorefa(tree: Tree) -> Tree:
        return outer(quant.dorefa_params(tree["params"], whole, _cnn.INNER))

    def dorefa_codes(tree: Tree) -> Tree:
        return outer_codes(quant.dorefa_quantize_params(tree["params"], whole, _cnn.INNER))

    plain = straight_through("straight-through", words, spec)
    return [
        dataclasses.replace(
            plain,
            inputs=bits,
            epochs=epochs,
            start=lambda params, levels: ({"params": params}, {"levels": levels}),
            change=_fixed,
            levels=lambda tree: tree["levels"],
        ),
        Recipe(
            "LSQ",
            words,
            bits,
            trains(
                lambda params, levels: {
                    "steps": quant.init_steps(params, spec, _cnn.INNER, start),
                    "input_steps": steps_of(levels),
                }
            ),
            partial(lsq_weights, codes=codes),
            partial(_lsq_inputs, bits),
            partial(lsq_codes, codes=codes),
            partial(_levels_of, bits=bits),
            epochs=epochs,
        ),
        Recipe(
            "LSQ+",
            words,
            bits,
            trains(
                lambda params, levels: {
                    "steps": quant.init_steps(
                        params, spec, _cnn.INNER, quant.lsq_plus_init_weights
                    ),
                    "input_steps": steps_of(levels),
                    "offsets": {layer: jnp.zeros(()) for layer in levels},
                }
            ),
            lsq_weights,
            partial(_lsq_plus_inputs, bits),
            lsq_codes,
            partial(_levels_of, bits=bits),
            epochs=epochs,
        ),
        Recipe(
            "PACT",
            words,
            bits,
            trains(
                lambda params, levels: {
                    "clips": {layer: three[1] * three[2] for layer, three in levels.items()}
                }
            ),
            dorefa,
            partial(_pact_inputs, bits),
            dorefa_codes,
            lambda tree: {
                layer: jnp.stack([0.0, jnp.abs(clip) / _top(bits), jnp.float32(_top(bits))])
                for layer, clip in tree["clips"].items()
            },
            penalty=lambda tree: 1e-4 * jnp.square(jnp.stack(list(tree["clips"].values()))).sum(),
            epochs=epochs,
        ),
        Recipe(
            "DoReFa",
            words,
            bits,
            only_params,
            dorefa,
            partial(_dorefa_inputs, bits),
            dorefa_codes,
            lambda tree: {
                layer: jnp.array([0.0, 1 / _top(bits), _top(bits)]) for layer in QUANTIZED_INPUTS
            },
            epochs=epochs,
        ),
    ]


# --- Codebooks, ternary, binary -------------------------------------------------------------------


def shared_weights(bits: int, epochs: int = 2) -> Recipe:
    """Fine-tune the centroids of k-means, whose codes stay (Deep Compression)."""
    spec = quant.QuantSpec(bits, (), grid=quant.kmeans)

    def start(params: Tree, levels: Tree) -> tuple[Tree, Tree]:
        leaves = _inner(quant.quantize_params(params, spec, _cnn.INNER))
        centroids = {layer: leaf.codebook for layer, leaf in leaves.items()}
        codes = {layer: leaf.codes for layer, leaf in leaves.items()}
        return {"params": params, "centroids": centroids}, {"codes": codes}

    def compressed(tree: Tree) -> Tree:
        leaves = {
            layer: {"kernel": CodebookTensor(tree["codes"][layer], table)}
            for layer, table in tree["centroids"].items()
        }
        return tree["params"] | leaves

    return Recipe(
        "k-means, centroids trained",
        f"k-means-{2**bits}",
        0,
        start,
        lambda tree: outer(materialize(compressed(tree))),
        no_change,
        lambda tree: outer_codes(compressed(tree)),
        no_levels,
        epochs=epochs,
    )


def _inner(params: Tree) -> Tree:
    return {layer: params[layer]["kernel"] for layer in ("conv2", "conv3", "dense1")}


def trained_ternary(epochs: int = 4) -> Recipe:
    """Train kernels with two learned levels beside zero (TTQ)."""
    return Recipe(
        "TTQ",
        "ternary",
        0,
        trains(lambda params, _: {"scales": quant.ttq_init_params(params, where=_cnn.INNER)}),
        lambda tree: outer(quant.ttq_params(tree["params"], tree["scales"])),
        no_change,
        lambda tree: outer_codes(quant.ttq_quantize_params(tree["params"], tree["scales"])),
        no_levels,
        epochs=epochs,
    )


def binary_weights(epochs: int = 5) -> Recipe:
    """Train kernels of one bit, the weights of XNOR-Net."""
    return Recipe(
        "XNOR-Net weights",
        "binary",
        0,
        only_params,
        lambda tree: outer(quant.fake_binarize_params(tree["params"], where=_cnn.INNER)),
        no_change,
        lambda tree: outer_codes(quant.binarize_params(tree["params"], where=_cnn.INNER)),
        no_levels,
        epochs=epochs,
    )


def recipes() -> list[Recipe]:
    """Return every recipe of the table."""
    found = []
    for bits in (8, 6, 4, 3, 2):
        epochs = 1 if bits > 4 else 3
        spec = quant.QuantSpec(bits)
        found.append(straight_through("straight-through", str(bits), spec, epochs))
        found.append(learned_steps("LSQ", bits, quant.lsq_init_mse, epochs))
    log = quant.QuantSpec(4, grid=quant.logarithmic(2.0))
    ternary = quant.QuantSpec(2, grid=quant.ternary)
    found += [
        straight_through("straight-through", "log-4", log, 2),
        shared_weights(4),
        straight_through("TWN", "ternary", ternary, 4),
        trained_ternary(),
        binary_weights(),
    ]
    return found + everything(3) + everything(2)
