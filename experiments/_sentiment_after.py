"""Sentiment, after training: quantized and pruned in one go, with nothing trained again.

Kernels of all layers are quantized in groups of 64 inputs, the tables of words and places in 8 bits
a row; the last layer, biases and layer norms stay floats. With W8A8 the kernels have one scale for
each output, and inputs of layers are rounded, too: in the range of each token, or in one range
fixed beforehand, with outliers moved into the kernels (SmoothQuant) or not.
"""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jopt
from experiments import _compress, _post_training, _results, _sentiment_network
from experiments._sentiment_network import KERNELS, TABLES
from jopt import layers, quant

Tree = Any
Row = dict[str, Any]
BITS = (8, 4)
PATTERNS: dict[str, _post_training.Pattern] = {"50 %": 0.5, "2:4": (2, 4), "80 %": 0.8}
EIGHT = quant.QuantSpec(8, (1,))
INPUTS = quant.QuantSpec(8, ())


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


def measure(run: _sentiment_network.Run, seed: int, repeats: int) -> list[Row]:
    """Make and score every network of one seed that is not among the finished ones."""
    file = run.work / f"after-{seed}.json"
    done = json.loads(file.read_text()) if file.exists() else {}
    params = run.teacher(seed)
    known: dict[str, Any] = {}
    wanted = []
    static = static_inputs(run.logits)
    dynamic = quant.quantize_inputs_dynamically(run.logits, INPUTS)

    def statistics() -> _post_training.Statistics:
        if not known:
            found = layers.calibrate(run.plain, params, run.full_rows(seed))
            known.update({path: each for path, each in found.items() if "layer" in path})
        return known

    def row(kind: str, form: str, method: str, make: Callable[[], tuple[Tree, int, Any]]) -> None:
        key = f"{kind} {form} {method}"
        wanted.append(key)
        if key in done:
            return
        tree, lost, predict = make()
        written, back = _compress.written(tree, run.work / f"packed-{seed}.jopt")
        found = {"kind": kind, "form": form, "method": method, "bytes": written}
        found |= {"not_improved": lost} | run.accuracies(back, predict)
        done[key] = found
        _results.write_atomically(file, json.dumps(done).encode())
        run.say(f"seed {seed}: {key}: {written:,} bytes, validation {found['validation']:.2%}")

    def by_method(bits: int, method: Any) -> tuple[Tree, int, Any]:
        needed = {} if method is None else statistics()
        how = _post_training.spec(bits, run.group)
        tree, lost = _post_training.quantized(params, needed, how, method, KERNELS, TABLES)
        return tree, len(lost), None

    def eight(inputs: str) -> tuple[Tree, int, Any]:
        tree = quant.quantize_params(params, quant.QuantSpec(8, (1, -1)), TABLES)
        if inputs == "SmoothQuant":
            tree, extras = smoothed(tree, statistics())
            return tree, 0, partial(_with, static, extras)
        tree = quant.quantize_params(tree, EIGHT, KERNELS)
        if inputs == "a range for each token":
            return tree, 0, dynamic
        ones = {
            path: (jnp.ones_like(each.abs_max), jnp.max(each.abs_max))
            for path, each in statistics().items()
        }
        return tree, 0, partial(_with, static, ones)

    def less(pattern: _post_training.Pattern, criterion: str) -> tuple[Tree, int, Any]:
        needed = {} if criterion == "magnitude" else statistics()
        tree = _post_training.pruned(params, needed, pattern, criterion, KERNELS)
        return tree, 0, None

    row("float", "32 bits", "", lambda: (params, 0, None))
    for bits in BITS:
        for name, method in _post_training.METHODS.items():
            row("quantized", f"W{bits}", name, partial(by_method, bits, method))
    for inputs in ("a range for each token", "one range", "SmoothQuant"):
        row("quantized", "W8A8", inputs, partial(eight, inputs))
    for form, pattern in PATTERNS.items():
        for criterion in _post_training.CRITERIA:
            row("pruned", form, criterion, partial(less, pattern, criterion))
    key = "latency_ms"
    if key not in done:
        done[key] = run.latencies(params, repeats=repeats)
        _results.write_atomically(file, json.dumps(done).encode())
    return [done[name] | ({key: done[key]} if name.startswith("float") else {}) for name in wanted]


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
