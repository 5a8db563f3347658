"""A language model after training: every method of quantization and pruning, by perplexity.

Kernels of all layers are quantized in groups of 64 inputs, with a zero point for each group; the
table of tokens has 8 bits in every row, and all else stays in floats. Pruned kernels stay floats:
what is compared is which weights go and what the others become. Inputs of layers are taken from
windows of the training text.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

import jopt
from experiments import (
    _compress,
    _decoder,
    _language_network,
    _language_report,
    _parts,
    _post_training,
    _results,
    _rows,
)
from jopt import layers

Tree = Any
KERNELS = "layer.*/kernel"
TABLE = "tokens/embedding"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the outcome beside the settings of the networks."""

    bits: tuple[int, ...] = (8, 4, 3, 2)
    group: int = 64
    windows: int = 128  # of the training text, for calibration
    prompt: int = 32
    continuation: int = 48


PATTERNS: dict[str, _post_training.Pattern] = {"50 %": 0.5, "2:4": (2, 4)}


def _quantized(
    params: Tree, statistics: _post_training.Statistics, bits: int, settings: Settings, method: Any
) -> tuple[Tree, list[str]]:
    how = _post_training.spec(bits, settings.group)
    return _post_training.quantized(params, statistics, how, method, KERNELS, TABLE)


SAME, LISTED = ("kind", "form", "method"), ("bytes", "not_improved", "validation", "test")


def measure(
    run: _language_network.Run, settings: Settings, seed: int, held: _parts.Held
) -> _rows.Rows:
    """Make and score every network of one seed that is not among the finished ones."""
    file = run.work / f"compressed-{seed}.json"
    rows = _rows.Rows(file, SAME, held.rows(seed, LISTED), held.facts(seed))
    shape = run.settings.teacher
    module = run.module(shape)
    statistics: _post_training.Statistics = {}

    def known() -> _post_training.Statistics:
        if not statistics:
            windows = run.pool.images[: settings.windows, :-1]
            batches = [windows[at : at + 16] for at in range(0, len(windows), 16)]
            apply = _language_network.logits_of(module)
            statistics.update(layers.calibrate(apply, run.teacher(seed), batches))
        return statistics

    def row(kind: str, form: str, method: str, make: Callable[[], tuple[Tree, Any]]) -> None:
        about = {"kind": kind, "form": form, "method": method}

        def measured() -> dict[str, Any]:
            tree, more = make()
            size, back = _compress.written(tree, run.work / f"packed-{seed}.jopt")
            found = run.perplexities(shape, back)
            words = " ".join(about.values())
            run.say(f"seed {seed}: {words}: {size:,} bytes, validation {found['validation']:.3f}")
            return {"bytes": size} | more | found

        rows.add(about, measured)

    def by_method(bits: int, method: Any) -> tuple[Tree, Any]:
        needed = {} if method is None else known()
        tree, lost = _quantized(run.teacher(seed), needed, bits, settings, method)
        return tree, {"not_improved": len(lost)}

    row("float", "32 bits", "", lambda: (run.teacher(seed), {"not_improved": 0}))
    for bits in settings.bits:
        for name, method in _post_training.METHODS.items():
            row("quantized", f"{bits} bits", name, partial(by_method, bits, method))
    for form, pattern in PATTERNS.items():
        for criterion in _post_training.CRITERIA:
            row(
                "pruned",
                form,
                criterion,
                lambda pattern=pattern, criterion=criterion: (
                    _post_training.pruned(run.teacher(seed), known(), pattern, criterion, KERNELS),
                    {"not_improved": 0},
                ),
            )
    return rows


def sample(run: _language_network.Run, settings: Settings, seed: int) -> dict[str, Any]:
    """Continue a prompt of the test text by a network that a file of 4 bits gives back."""
    params = run.teacher(seed)
    module = run.module(run.settings.teacher)
    tree, _ = _quantized(params, {}, 4, settings, None)
    size, back = _compress.written(tree, run.work / f"packed-{seed}.jopt")
    prompt = run.test[:1, : settings.prompt]
    say = partial(_decoder.generate, module, prompt=prompt, count=settings.continuation)
    decode = run.data.tokenizer.decode
    packed, here = say(back), say(jopt.materialize(tree))
    return {
        "prompt": decode(np.asarray(prompt[0]).tolist()),
        "float": decode(np.asarray(say(params)[0]).tolist()),
        "4 bits, from the file": decode(np.asarray(packed[0]).tolist()),
        "bytes": size,
        "same_as_before_packing": bool(jnp.array_equal(packed, here)),
    }


# The first is at least as good as the second, say the papers.
ORDERS = {
    "quantized": (("GPTQ", "RTN"), ("AWQ", "RTN")),
    "pruned": (("Wanda", "magnitude"), ("SparseGPT", "magnitude")),
}


def targets_of(rows: list[dict[str, Any]], generated: dict[str, Any]) -> list[dict[str, Any]]:
    """Hold the order of the methods against the papers': ratios of mean test perplexities."""
    means = {(row["kind"], row["form"], row["method"]): row["mean_test"] for row in rows}
    found = []
    for kind, form in dict.fromkeys((row["kind"], row["form"]) for row in rows):
        for better, worse in ORDERS.get(kind, ()):
            ratio = means[kind, form, worse] / means[kind, form, better]
            words = f"{form}: perplexity of {worse} / {better}"
            found.append(_results.target(words, round(ratio, 5), 1.0, "higher"))
    same = float(generated["same_as_before_packing"])
    return [
        *found,
        _results.target("generation from the packed file as before", same, 1.0, "higher"),
    ]


def smoke(settings: Settings) -> Settings:
    """Leave one width, few windows."""
    return dataclasses.replace(settings, bits=(4,), group=8, windows=16, prompt=4, continuation=4)


def run(call: _parts.Call) -> dict[str, Any]:
    """Run or resume the part; returns its tag, data, settings, figures and targets."""
    each, tag = _language_network.start(call)
    settings = Settings() if call.head is None else smoke(Settings())
    written = dataclasses.asdict(settings) | {"network": dataclasses.asdict(each.settings)}
    held = call.held(tag, written)
    by_seed = [measure(each, settings, seed, held) for seed in call.seeds]
    rows = _results.join_seeds([found.list() for found in by_seed], SAME, LISTED)
    first, once = call.seeds[0], by_seed[0].once
    generated = once("generated", lambda: sample(each, settings, first))
    size = once("parameters", lambda: _compress.size(each.teacher(first)))
    targets = [] if call.head else targets_of(rows, generated)
    _language_report.compressed_table(rows, targets, call.console)
    _language_report.compressed_plot(rows, call.plot(tag))
    call.console.print(f"[dim]{generated['prompt']}[/]{generated['4 bits, from the file']}")
    bits = each.bits_per_byte(rows[0]["mean_test"])
    return {
        "tag": tag,
        "data": _language_network.about(each.data),
        "settings": written,
        "figures": {
            "rows": rows,
            "parameters": size,
            "float_bits_per_byte": bits,
            "generated": generated,
        },
        "targets": targets if tag == "" else [],
    }
