"""Table, targets and plot of the criteria part of the pruning experiment."""

from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from experiments import _report, _results

Row = dict[str, Any]
WAYS = {
    "once": "at once, then fine-tuned",
    "gradual": "gradually",
    "scratch": "sparse from the start",
}
TITLES = {"lenet5": "LeNet-5, MNIST", "cnn": "batch-norm CNN, Fashion-MNIST"}


def _by_level(rows: list[Row], how: str, criterion: str) -> dict[float, float]:
    return {
        row["level"]: row["mean_test"]
        for row in rows
        if (row["how"], row["criterion"]) == (how, criterion)
    }


# What the literature says: the first is at least as good as the second.
ORDERS = (
    ("gradual magnitude above magnitude at once", ("gradual", "magnitude"), ("once", "magnitude")),
    ("magnitude at once above random at once", ("once", "magnitude"), ("once", "random")),
    ("gradual magnitude above gradual random", ("gradual", "magnitude"), ("gradual", "random")),
    ("RigL above static random", ("scratch", "RigL"), ("scratch", "random")),
)
SECOND_ORDER = (("gradual", "Fisher"), ("gradual", "movement"))


def targets(rows: dict[str, list[Row]]) -> list[dict[str, Any]]:
    """Hold the order of the criteria against the literature's: points of mean test accuracy."""
    found = []
    for network, own in rows.items():
        for words, better, worse in ORDERS:
            first, second = _by_level(own, *better), _by_level(own, *worse)
            for level in first:
                gain = round(first[level] - second[level], 6)
                found.append(
                    _results.target(f"{network}, {level:.0%}: {words}", gain, 0.0, "higher")
                )
        magnitude = _by_level(own, "gradual", "magnitude")
        for level in [level for level in magnitude if level >= 0.95]:
            best = max(_by_level(own, *each)[level] for each in SECOND_ORDER)
            words = f"{network}, {level:.0%}: Fisher or movement no worse than magnitude, gradual"
            found.append(_results.target(words, round(best - magnitude[level], 6), 0.0, "higher"))
    return found


def table(rows: dict[str, list[Row]], targets: list[dict[str, Any]], console: Console) -> None:
    """Print the mean test accuracy of every row, a column for each sparsity."""
    for network, own in rows.items():
        dense = own[0]
        levels = sorted({row["level"] for row in own[1:]})
        seeds = len(dense["test"])
        console.print(
            f"{TITLES[network]}: test accuracy, %; dense {100 * dense['mean_test']:.2f}"
            + (f"; mean of {seeds} seeds" if seeds > 1 else "; one seed")
        )
        found = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
        found.add_column("criterion", no_wrap=True)
        for level in levels:
            found.add_column(f"{level:.0%}", justify="right", no_wrap=True)
        kinds = dict.fromkeys((row["how"], row["criterion"]) for row in own[1:])
        last = None
        for how, criterion in kinds:
            if how != last:
                found.add_row(f"[bold]{WAYS[how]}[/]")
            last = how
            cells = [
                f"{100 * row['mean_test']:.2f}"
                for row in own
                if (row["how"], row["criterion"]) == (how, criterion)
            ]
            found.add_row(f" {criterion}", *cells)
        if seeds > 1:
            halves = [
                np.median([50 * row["spread_test"] for row in own[1:] if row["level"] == level])
                for level in levels
            ]
            found.add_section()
            found.add_row("half the seeds' spread,", *[""] * len(levels))
            found.add_row("median of the rows", *[f"±{half:.2f}" for half in halves])
        console.print(found)
    missed = [each for each in targets if not each["met"]]
    if targets:
        console.print(f"{len(targets) - len(missed)} of {len(targets)} orders hold.")
    for each in missed:
        console.print(f"  not: {each['target']} ({100 * each['value']:+.2f} points)")


def plot(rows: dict[str, list[Row]], file: Path) -> None:
    """Draw the error against sparsity, a panel for each network and way of training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(rows), len(WAYS), figsize=(12, 3.6 * len(rows) + 0.6), squeeze=False, sharey="row"
    )
    criteria = dict.fromkeys(row["criterion"] for own in rows.values() for row in own[1:])
    looks = _looks([name for name in criteria if name != "random"])
    for line, (network, own) in zip(axes, rows.items(), strict=True):
        for axis, how in zip(line, WAYS, strict=True):
            dense = 100 * (1 - own[0]["mean_test"])
            axis.axhline(dense, color="0.6", linewidth=1, linestyle=":")
            kinds = dict.fromkeys(row["criterion"] for row in own[1:] if row["how"] == how)
            for criterion in kinds:
                picked = [r for r in own if (r["how"], r["criterion"]) == (how, criterion)]
                left = [100 * (1 - row["level"]) for row in picked]
                errors = np.array([[100 * (1 - test) for test in row["test"]] for row in picked])
                color, marker = looks[criterion]
                about = {"color": color, "marker": marker, "markersize": 4, "linewidth": 1.3}
                axis.plot(left, errors.mean(1), label=criterion, **about)
                axis.fill_between(left, errors.min(1), errors.max(1), color=color, alpha=0.15)
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.invert_xaxis()
            ticks = sorted({round(100 * (1 - row["level"]), 6) for row in own[1:]})
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.minorticks_off()
            axis.set_title(f"{TITLES[network]}\n{WAYS[how]}", fontsize=9)
            axis.set_xlabel("weights left in kernels, %")
        _plain_ticks(line[0])
        line[0].set_ylabel("test error, %")
    found = [axis.get_legend_handles_labels() for axis in axes.ravel()]
    lines = {
        name: line for handles, names in found for line, name in zip(handles, names, strict=True)
    }
    if lines:
        figure.legend(lines.values(), lines, fontsize=8, frameon=False, ncols=7, loc="lower center")
    figure.tight_layout(rect=(0, 0.6 / figure.get_size_inches()[1], 1, 1))
    _report.save_plot(figure, file)


def _looks(criteria: list[str]) -> dict[str, tuple[str, str]]:
    """Give every criterion one colour and marker, the same in all panels."""
    found = {name: (f"C{n % 10}", "os"[n // 10 % 2]) for n, name in enumerate(criteria)}
    return found | {"random": ("0.35", "o")}


def _plain_ticks(axis: Any) -> None:
    """Write errors as plain numbers, at steps of the usual kind within the range drawn."""
    low, high = axis.get_ylim()
    steps = [base * 10.0**power for power in range(-2, 3) for base in (1, 2, 3, 5, 7)]
    ticks = [step for step in steps if low <= step <= high]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
