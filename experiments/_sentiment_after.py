"""Sentiment, after training: quantized and pruned in one go, with nothing trained again.

Kernels of all layers are quantized in groups of 64 inputs, the tables of words and places in 8 bits
a row; the last layer, biases and layer norms stay floats. With W8A8 the kernels have one scale for
each output, and inputs of layers are rounded, too: in the range of each token, or in one range
fixed beforehand, with outliers moved into the kernels (SmoothQuant) or not. `jopt.run` rounds them
in the range of each token as it computes with the codes, at W8A8 and at W4A8: these two are scored
as they run, and timed, as is the network with 80 % of its weights gone.
"""

from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jopt
from experiments import _parts, _post_training, _results, _sentiment_network
from experiments._sentiment_network import KERNELS, TABLES, Made
from jopt import layers, quant

Tree = Any
Row = dict[str, Any]
BITS = (8, 4)
PATTERNS: dict[str, _post_training.Pattern] = {
    "50 %": 0.5,
    "2:4": (2, 4),
    "80 %": 0.8,
    "90 %": 0.9,
}
EIGHT = quant.QuantSpec(8, (1,))
INPUTS = quant.QuantSpec(8, ())
RUNNING = "in jopt.run"
NONE = {"not_improved": 0}  # kernels that a method left rounded to nearest


def static_inputs(apply: Any) -> Callable[..., Array]:
    """Make `(params, {path: (factor, top)}, *args) -> logits`, whose layers see rounded inputs.

    Inputs are multiplied by the factors of their layer, rounded to 8 bits within (-top, top), and
    divided by the factors again: a kernel that holds their reciprocals would not need that.
    """

    def change(layer: Any, values: Array, extra: Any) -> Array:
        if extra is None:
            return values
        factor, top = extra
        shape = [1] * values.ndim
        shape[layer.input_axes[-1]] = factor.size
        factor = factor.reshape(shape).astype(values.dtype)
        return quant.fake_quantize_within(values * factor, -top, top, INPUTS) / factor

    return layers.map_inputs(apply, change)


def smoothed(
    params: Tree, statistics: _post_training.Statistics
) -> tuple[Tree, dict[str, tuple[Array, Array]]]:
    """Quantize kernels to 8 bits by SmoothQuant; also returns factors and ranges of the inputs."""
    tree, _ = quant.quantize_calibrated_params(
        params, statistics, EIGHT, quant.smooth_quant, KERNELS
    )
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=jopt.is_compressed)
    leaves = {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in pairs}
    extras = {}
    for path, known in statistics.items():
        factor = getattr(leaves.get(path), "factor", None)
        if factor is not None:
            factor = factor.reshape(-1)
            extras[path] = factor, jnp.max(known.abs_max * factor)
    return tree, extras


@lru_cache(1)
def _programs(run: _sentiment_network.Run) -> tuple[Any, Any]:
    """Return the network with inputs rounded in given ranges, and in the range of each token."""
    return static_inputs(run.logits), quant.quantize_inputs_dynamically(run.logits, INPUTS)


def measure(
    run: _sentiment_network.Run, seed: int, held: _parts.Held
) -> _sentiment_network.Measured:
    """Make and score the networks of one seed that are not among the finished ones."""
    scores = _sentiment_network.Scores(run, "after", seed, held, LISTED)
    teacher = cache(lambda: run.teacher(seed))
    known: dict[str, Any] = {}
    static, dynamic = _programs(run)
    programs = {"a range for each token": dynamic, RUNNING: run.rounding}

    def statistics() -> _post_training.Statistics:
        if not known:
            found = layers.calibrate(run.plain, teacher(), run.full_rows(seed))
            known.update({path: each for path, each in found.items() if "layer" in path})
        return known

    def by_method(bits: int, method: Any) -> Made:
        needed = {} if method is None else statistics()
        how = _post_training.spec(bits, run.group)
        tree, lost = _post_training.quantized(teacher(), needed, how, method, KERNELS, TABLES)
        return tree, {"not_improved": len(lost)}, None

    def in_order(bits: int) -> Made:
        how, batches = _post_training.spec(bits, run.group), run.full_rows(seed, 2)
        tree, lost = _post_training.in_order(run.plain, teacher(), batches, how, KERNELS, TABLES)
        return tree, {"not_improved": len(lost)}, None

    def eight(inputs: str) -> Made:
        tree = quant.quantize_params(teacher(), quant.QuantSpec(8, (1, -1)), TABLES)
        if inputs == "SmoothQuant":
            tree, extras = smoothed(tree, statistics())
            return tree, NONE, partial(_with, static, extras)
        tree = quant.quantize_params(tree, EIGHT, KERNELS)
        if inputs in programs:
            return tree, NONE, programs[inputs]
        ones = {
            path: (jnp.ones_like(each.abs_max), jnp.max(each.abs_max))
            for path, each in statistics().items()
        }
        return tree, NONE, partial(_with, static, ones)

    def four() -> Made:
        tree, more, _ = by_method(4, quant.awq)
        return tree, more, run.rounding

    def less(pattern: _post_training.Pattern, criterion: str) -> Made:
        needed = {} if criterion == "magnitude" else statistics()
        return _post_training.pruned(teacher(), needed, pattern, criterion, KERNELS), NONE, None

    scores.add("float", "32 bits", "", lambda: (teacher(), NONE, None))
    for bits in BITS:
        for name, method in _post_training.METHODS.items():
            scores.add("quantized", f"W{bits}", name, partial(by_method, bits, method))
        if bits in _post_training.ORDERED:
            scores.add("quantized", f"W{bits}", _post_training.IN_ORDER, partial(in_order, bits))
    for inputs in ("a range for each token", "one range", "SmoothQuant"):
        scores.add("quantized", "W8A8", inputs, partial(eight, inputs))
    scores.add("quantized", "W8A8", RUNNING, partial(eight, RUNNING), coded=True)
    scores.add("quantized", "W4A8", f"AWQ, {RUNNING}", four, coded=True)
    for form, pattern in PATTERNS.items():
        for criterion in _post_training.CRITERIA:
            scores.add("pruned", form, criterion, partial(less, pattern, criterion))
    return scores.measured()


def _with(static: Any, extras: Any, params: Tree, ids: np.ndarray, real: np.ndarray) -> Array:
    return static(params, extras, ids, real)


LISTED = ("bytes", "not_improved", "validation", "test")
LOST = 0.005  # accuracy that 4 bits may cost


def targets_of(rows: list[Row]) -> list[dict[str, Any]]:
    """Hold the best method at 4 bits, chosen by validation sentences, against the float network."""
    whole = rows[0]["mean_test"]
    four = [row for row in rows if row["form"] == "W4"]
    best = max(four, key=lambda row: row["mean_validation"])
    lost = round(whole - best["mean_test"], 6)
    return [
        _results.target("fine-tuned MiniLM: test accuracy", whole, 0.82, "higher"),
        _results.target(f"W4, {best['method']}: test accuracy lost", lost, LOST, "lower"),
    ]
