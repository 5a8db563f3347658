"""Rows of the quantization experiment that need no training: round, search, calibrate."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import Array

from experiments import _cnn
from jopt import layers, quant

Tree = Any
EIGHT = quant.QuantSpec(8)
ALL_INPUTS = _cnn.LAYERS


@dataclasses.dataclass(frozen=True)
class Network:
    """A folded float network and what calibration images say of it.

    Attributes:
      params: kernels and biases.
      statistics: of the inputs of each kernel, by its path.
      ranges: histogram of the inputs of each layer.
    """

    params: Tree
    statistics: dict[str, layers.InputStatistics]
    ranges: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Row:
    """Say how one format is made of a trained network.

    Attributes:
      method: its name in the table.
      format: of the inner kernels.
      inputs: bits of the inputs of all layers, or 0 for floats.
      make: `network -> {"params", "inputs"}`, compressed.
    """

    method: str
    format: str
    inputs: int
    make: Callable[[Network], Tree]

    @property
    def name(self) -> str:
        """Return a name for files."""
        words = f"{self.method} {self.format} a{self.inputs}"
        return "".join(char if char.isalnum() else "-" for char in words.lower())


def calibrated(params: Tree, images: Array) -> Network:
    """Gather the statistics of a folded network's inputs over uint8 images."""
    batches = [images[at : at + 128].astype("float32") / 255 for at in range(0, len(images), 128)]
    statistics = layers.calibrate(_cnn.traced_logits, params, batches)
    return Network(params, statistics, _cnn.layer_ranges(params, images))


def _outer(params: Tree) -> Tree:
    return quant.quantize_params(params, EIGHT, _cnn.OUTER)


def rounded(network: Network, spec: quant.QuantSpec) -> Tree:
    """Round the inner kernels to nearest."""
    return {"params": _outer(quant.quantize_params(network.params, spec, _cnn.INNER)), "inputs": {}}


def by_method(network: Network, spec: quant.QuantSpec, method: Callable) -> Tree:
    """Quantize the inner kernels by a method that knows the inputs of each."""
    params, _ = quant.quantize_calibrated_params(
        network.params, network.statistics, spec, method, _cnn.INNER
    )
    return {"params": _outer(params), "inputs": {}}


def with_biases(network: Network, make: Callable[[Network], Tree]) -> Tree:
    """Correct the biases of what another row makes."""
    tree = make(network)
    params, _ = quant.correct_biases(network.params, tree["params"], network.statistics)
    return tree | {"params": params}


def equalized(network: Network, spec: quant.QuantSpec) -> Tree:
    """Even out the channels of neighbouring layers, then round with one scale a tensor."""
    even = quant.equalize_params(network.params, _cnn.CHAIN)
    return {"params": _outer(quant.quantize_params(even, spec, _cnn.INNER)), "inputs": {}}


def with_inputs(
    network: Network, make: Callable[[Network], Tree], bits: int, ends: _cnn.Ends
) -> Tree:
    """Round the inputs of all layers as well, to levels of a calibrated range."""
    levels = _cnn.input_levels(network.ranges, bits, ends, ALL_INPUTS)
    return make(network) | {"inputs": levels}


def _uniform(bits: int) -> list[Row]:
    words = str(bits)
    plain, tensor = quant.QuantSpec(bits), quant.QuantSpec(bits, ())
    mse = quant.QuantSpec(bits, range=quant.mse)
    minmax = quant.QuantSpec(bits, range=quant.minmax, grid=quant.affine)
    methods: dict[str, Callable[[Network], Tree]] = {
        "round-to-nearest, tensor": partial(rounded, spec=tensor),
        "equalized, tensor": partial(equalized, spec=tensor),
        "round-to-nearest": partial(rounded, spec=plain),
        "min-max": partial(rounded, spec=minmax),
    }
    if bits < 8:
        methods |= {
            "MSE range": partial(rounded, spec=mse),
            "MSE range, biases": partial(with_biases, make=partial(rounded, spec=mse)),
        }
    if bits < 6:
        gptq = partial(by_method, spec=mse, method=quant.gptq)
        methods |= {
            "weighted MSE": partial(by_method, spec=plain, method=quant.quantize_weighted),
            "HQQ": partial(by_method, spec=minmax, method=quant.hqq),
            "AWQ": partial(by_method, spec=mse, method=quant.awq),
            "Hadamard": partial(by_method, spec=mse, method=quant.hadamard_rotation),
            "AdaRound": partial(by_method, spec=mse, method=quant.adaround),
            "GPTQ": gptq,
            "GPTQ, biases": partial(with_biases, make=gptq),
        }
    return [Row(method, words, 0, make) for method, make in methods.items()]


def _formats() -> list[Row]:
    spec = quant.QuantSpec
    formats = {
        ("log-4", "base 2"): spec(4, grid=quant.logarithmic(2.0)),
        ("log-4", "base 2, mean"): spec(4, grid=quant.logarithmic(2.0, quant.arithmetic_mean)),
        ("log-4", "base sqrt 2"): spec(4, grid=quant.logarithmic(2**0.5)),
        ("log-4", "additive powers"): spec(4, grid=quant.additive_powers_of_two),
        ("k-means-16", "one codebook a layer"): spec(4, (), grid=quant.kmeans),
        ("k-means-16", "a codebook a channel"): spec(4, (1,), grid=quant.kmeans),
        ("k-means-8", "one codebook a layer"): spec(3, (), grid=quant.kmeans),
        ("k-means-4", "one codebook a layer"): spec(2, (), grid=quant.kmeans),
        ("NF4", "round-to-nearest"): spec(4, grid=quant.nf4),
        ("FP8 e4m3", "round-to-nearest"): spec(8, grid=quant.e4m3),
        ("FP8 e5m2", "round-to-nearest"): spec(8, grid=quant.e5m2),
        ("MXFP8", "round-to-nearest"): spec(8, (32, 1), grid=quant.mxfp8_e4m3),
        ("MXFP6", "round-to-nearest"): spec(6, (32, 1), grid=quant.mxfp6_e2m3),
        ("MXFP4", "round-to-nearest"): spec(4, (32, 1), grid=quant.mxfp4),
        ("NVFP4", "round-to-nearest"): spec(4, (16, 1), grid=quant.nvfp4),
        ("ternary", "TWN"): spec(2, grid=quant.ternary),
        ("ternary", "best threshold"): spec(2, grid=quant.ternary_optimal),
        ("binary", "XNOR-Net weights"): spec(1, grid=quant.binary),
    }
    # conv2 has 16 input channels: formats of 32-blocks take 16 there, as they must divide it.
    return [
        Row(method, words, 0, partial(_fitting, spec=each))
        for (words, method), each in formats.items()
    ]


def _fitting(network: Network, spec: quant.QuantSpec) -> Tree:
    """Round to nearest, with blocks of inputs no longer than a layer's inputs."""
    if len(spec.block) < 2:
        return rounded(network, spec)
    params = network.params
    for layer in ("conv2", "conv3", "dense1"):
        inputs = params[layer]["kernel"].shape[-2]
        size = min(spec.block[0], inputs)
        each = dataclasses.replace(spec, block=(size, 1))
        params = quant.quantize_params(params, each, f"{layer}/kernel")
    return {"params": _outer(params), "inputs": {}}


def _with_inputs() -> list[Row]:
    eight, four = quant.QuantSpec(8), quant.QuantSpec(4, range=quant.mse)
    eights = partial(rounded, spec=eight)
    best_four = partial(by_method, spec=four, method=quant.gptq)
    ends = {
        "min-max": quant.minmax_range,
        "99.9th percentile": quant.percentile_range(99.9),
        "MSE": quant.mse_search_range(),
        "entropy": quant.entropy_search_range(),
    }
    rows = [
        Row(f"inputs: {name}", "8", 8, partial(with_inputs, make=eights, bits=8, ends=each))
        for name, each in ends.items()
    ]
    return rows + [
        Row(
            f"GPTQ, inputs: {name}",
            "4",
            bits,
            partial(with_inputs, make=best_four, bits=bits, ends=ends[name]),
        )
        for bits, name in ((8, "MSE"), (4, "MSE"))
    ]


def rows() -> list[Row]:
    """Return every row of the table."""
    found = [row for bits in (8, 6, 4, 3, 2) for row in _uniform(bits)]
    return found + _formats() + _with_inputs()


def make(row: Row, network: Network) -> Tree:
    """Make a row's network, and wait for it."""
    return jax.block_until_ready(row.make(network))
