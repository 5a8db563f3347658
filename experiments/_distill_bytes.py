"""Distillation, pruning and quantization: each alone, and all together, at equal bytes.

- *distilled*: narrower and narrower networks, taught by the teacher, in floats;
- *pruned*: one network trained with labels, pruned step by step with labels, by LAMP: once batch
  norms are folded into them, kernels are of so different sizes that magnitudes over all of them
  empty whole layers;
- *quantized*: the same network, trained through the rounding with labels;
- *all three*: the same architecture taught by the teacher, pruned under the teacher, quantized
  under the teacher.

The teacher, its answers and the training are those of `experiments._distill_comparison`. Every
network is measured as the file that it is written to, and by what that file alone gives back.
"""

import dataclasses
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from jax import Array

from experiments import (
    _compress,
    _data,
    _distill_comparison,
    _distill_methods,
    _distill_report,
    _distill_training,
    _models,
    _parts,
    _results,
    _rows,
)
from experiments._distill_methods import METHODS
from experiments._residual import Network
from jopt import prune

Tree = Any
SINGLE = ("distilled", "pruned", "quantized")
ALL = "all three"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the outcome beside the settings of the comparison."""

    widths: tuple[tuple[int, int], ...] = ((4, 8), (6, 12), (8, 16), (12, 24))
    sparsities: tuple[float, ...] = (0.8, 0.9, 0.95, 0.98)
    bits: tuple[int, ...] = (8, 4, 3, 2)
    together: tuple[tuple[float, int], ...] = ((0.5, 8), (0.5, 4), (0.8, 4), (0.9, 4))
    prune_epochs: int = 2
    quantize_epochs: int = 1
    rate: float = 1e-3
    criterion: str = "LAMP"


def measure(
    run: _distill_comparison.Run, settings: Settings, seed: int, work: Path
) -> list[dict[str, Any]]:
    """Make and score every network of one seed that is not among the finished ones."""
    rows = _rows.Rows(work / f"rows-{seed}.json", ("how", "form"))
    widths, taught = run.settings.assistant, run.taught

    def row(how: str, form: str, make: Callable[[], tuple[Tree, Any]]) -> None:
        def measured() -> dict[str, Any]:
            tree, shape = make()
            size, params = _compress.written(tree, work / "packed.jopt")
            scores = run.scores(params, shape)
            validation = f"validation {scores['validation']:.2%}"
            run.say(f"seed {seed}: {how} {form}: {size:,} bytes, {validation}")
            return {"bytes": size, "left": _compress.nonzero(params)} | scores

        rows.add({"how": how, "form": form}, measured)

    def base(method: str) -> Tree:
        return run.train(f"base-{method}", METHODS[method], 0.0, taught, seed, widths=widths)

    def packed(method: str, sparsity: float, bits: int) -> tuple[Tree, Any]:
        recipe = _compress.Recipe(
            sparsity, bits, settings.prune_epochs, settings.quantize_epochs, settings.rate
        )
        tree = _compress.compress(
            recipe,
            base(method),
            partial(_make_loss, run.network(widths), method),
            taught,
            run.settings.batch,
            seed,
            work / f"{method}-{seed}",
            run.say,
            scores=prune.lamp_scores,
        )
        return tree, widths

    def narrow(width: tuple[int, int]) -> tuple[Tree, Any]:
        shape = (width, widths[1])
        name = "narrow-" + "-".join(map(str, width))
        return run.train(name, METHODS["KD"], 0.0, taught, seed, widths=shape), shape

    for width in settings.widths:
        row("distilled", f"widths {width[0]} and {width[1]}", partial(narrow, width))
    row("distilled", "full width", lambda: (base("KD"), widths))
    row("pruned", "dense", lambda: (base("alone"), widths))
    for sparsity in settings.sparsities:
        row("pruned", f"{sparsity:.0%}", partial(packed, "alone", sparsity, 0))
    for bits in settings.bits:
        row("quantized", f"{bits} bits", partial(packed, "alone", 0.0, bits))
    for sparsity, bits in settings.together:
        row(ALL, f"{sparsity:.0%}, {bits} bits", partial(packed, "KD", sparsity, bits))
    return rows.list()


@lru_cache(64)
def _make_loss(network: Network, method: str, view: Callable[[Tree], Tree]) -> Any:
    """Return the loss of folded parameters that are seen through `view`."""

    def features(params: Tree, images: Array) -> _models.Features:
        return network.features(view(params), images)

    inner = _distill_methods.make_loss(METHODS[method], 0.0, features)

    def loss(params: Tree, state: Tree, batch: _distill_training.Batch) -> tuple[Array, Tree]:
        return inner({"student": params, "extra": ()}, state, batch)

    return loss


def targets_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Hold the best of the combination at most as large against every network made one way."""
    together = [row for row in rows if row["how"] == ALL]
    found = []
    for row in rows:
        rivals = [
            each for each in together if max(each["bytes"]) <= max(row["bytes"])
        ]  # of any seed
        if row["how"] not in SINGLE or not rivals:
            continue
        best = max(rivals, key=lambda each: each["mean_validation"])
        gain = round(best["mean_test"] - row["mean_test"], 6)
        words = f"all three, no more bytes, above {row['how']} ({row['form']})"
        found.append(_results.target(words, gain, 0.0, "higher"))
    return found


def smoke(settings: Settings) -> Settings:
    """Leave one network of each kind."""
    return dataclasses.replace(
        settings,
        widths=settings.widths[:1],
        sparsities=settings.sparsities[:1],
        bits=settings.bits[:1],
        together=settings.together[-1:],
        prune_epochs=1,
        quantize_epochs=1,
    )


def run(call: _parts.Call) -> dict[str, Any]:
    """Run or resume the part; returns its tag, data, settings, figures and targets."""
    common = _distill_comparison.Settings(dataset=call.dataset or "fashion_mnist", seeds=call.seeds)
    settings = Settings()
    if call.head is not None:
        common, settings = _distill_comparison.smoke(common), smoke(settings)
    data = _data.load_or_exit(common.dataset, call.console.print)
    data = call.cut(data)
    # The teacher and its answers serve both parts.
    each = _distill_comparison.Run(common, data, call.shared("methods"), call.console.print)
    folder = call.work / each.digest([dataclasses.asdict(settings)])
    by_seed = [measure(each, settings, seed, folder) for seed in call.seeds]
    rows = _results.join_seeds(by_seed, ("how", "form"), ("bytes", "left", "validation", "test"))
    tag = "" if data.tag == "fashion_mnist" else data.tag
    targets = [] if tag else targets_of(rows)
    _distill_report.bytes_table(rows, targets, call.console)
    _distill_report.bytes_plot(rows, data.name, call.plot(tag))
    return {
        "tag": tag,
        "data": _data.about(data),
        "settings": dataclasses.asdict(settings) | {"common": dataclasses.asdict(common)},
        "figures": rows,
        "targets": targets,
    }
