"""Tables, targets and the plot of the quantization experiment."""

from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from experiments import _report, _results

Row = dict[str, Any]
LEARNED = ("LSQ", "LSQ+", "PACT")


def joined(by_seed: list[list[Row]]) -> list[Row]:
    """Join the rows of all seeds."""
    same, listed = ("when", "method", "format", "inputs"), ("bytes", "validation", "test")
    return [
        row | {"mean_bytes": round(float(np.mean(row["bytes"])))}
        for row in _results.join_seeds(by_seed, same, listed)
    ]


def _best(rows: list[Row], when: str, format: str, inputs: int) -> Row:
    """Return the row of a kind that is best on the validation images."""
    kind = [r for r in rows if (r["when"], r["format"], r["inputs"]) == (when, format, inputs)]
    return max(kind, key=lambda row: row["mean_validation"])


def targets(rows: list[Row]) -> list[dict[str, Any]]:
    """Hold the means over seeds against what is asked for; points are hundredths."""
    found: list[dict[str, Any]] = []
    base = rows[0]["mean_test"]

    def add(words: str, value: float, goal: float, better: str) -> None:
        found.append(_results.target(words, round(value, 6), goal, better))

    def lost(words: str, row: Row, goal: float) -> None:
        add(f"{words}: accuracy lost ({row['method']})", base - row["mean_test"], goal, "lower")

    add("float32: test accuracy", base, 0.925, "higher")
    lost("W8A8 after training", _best(rows, "after", "8", 8), 0.001)
    lost("W4 after training", _best(rows, "after", "4", 0), 0.003)
    lost("W2 through training", _best(rows, "through", "2", 0), 0.010)
    lost("binary weights through training", _best(rows, "through", "binary", 0), 0.015)
    for bits in (3, 2):
        plain = [
            _named(rows, "straight-through", str(bits), inputs)["mean_test"] for inputs in (0, bits)
        ]
        add(
            f"LSQ, W{bits}: accuracy above straight-through",
            _named(rows, "LSQ", str(bits), 0)["mean_test"] - plain[0],
            0.0,
            "higher",
        )
        for method in LEARNED:
            add(
                f"{method}, W{bits}A{bits}: accuracy above straight-through",
                _named(rows, method, str(bits), bits)["mean_test"] - plain[1],
                0.0,
                "higher",
            )
    return found


def _named(rows: list[Row], method: str, format: str, inputs: int) -> Row:
    key = ("through", method, format, inputs)
    return next(r for r in rows if (r["when"], r["method"], r["format"], r["inputs"]) == key)


def table(results: dict[str, Any], console: Console) -> None:
    """Print every row, and the targets."""
    rows = results["figures"]["rows"]
    base = rows[0]
    seeds = len(base["test"])
    console.print(
        f"Reloaded from its file and tested on {results['data']['source']}; "
        f"means of {seeds} seed{'s' if seeds > 1 else ''}, spread from lowest to highest:"
    )
    found = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for name in ("training", "weights", "inputs", "method"):
        found.add_column(name, no_wrap=True)
    for name in ("bytes", "smaller", "validation", "test", "spread", "lost"):
        found.add_column(name, justify="right", no_wrap=True)
    kind = None
    for row in rows:
        if kind not in (None, (row["when"], row["format"], row["inputs"])):
            found.add_section()
        kind = (row["when"], row["format"], row["inputs"])
        found.add_row(
            row["when"] if row is not base else "",
            row["format"],
            str(row["inputs"] or "float"),
            row["method"],
            f"{row['mean_bytes']:,}",
            f"{base['mean_bytes'] / row['mean_bytes']:.1f}x",
            f"{row['mean_validation']:.2%}",
            f"{row['mean_test']:.2%}",
            f"{100 * row['spread_test']:.2f}",
            f"{100 * (base['mean_test'] - row['mean_test']):.2f}",
        )
    console.print(found)
    _report.print_targets(results["targets"], console, ".4f")


def frontier(rows: list[Row], near: float = 0.05) -> list[Row]:
    """Return the rows than which no smaller one does better on validation images, smallest first.

    Of rows whose bytes differ by less than the share `near` only the best is kept.
    """
    found: list[Row] = []
    for row in sorted(rows, key=lambda row: (row["mean_bytes"], -row["mean_validation"])):
        if not found or row["mean_validation"] > found[-1]["mean_validation"]:
            if found and row["mean_bytes"] < (1 + near) * found[-1]["mean_bytes"]:
                found.pop()
            found.append(row)
    return found


def plot(rows: list[Row], file: Path) -> None:
    """Draw test accuracy against bytes, with the frontier that validation images choose."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MultipleLocator, PercentFormatter

    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    base = rows[0]["mean_test"]
    axes.axhline(base, color="gray", linewidth=1, linestyle="--", label="float32")
    lowest = base - 0.018
    for when, marker, color in (("after", "o", "tab:orange"), ("through", "s", "tab:blue")):
        shown = [
            row
            for row in rows
            if row["when"] == when and not row["inputs"] and row["mean_test"] > lowest
        ]
        sizes, scores = ([row[key] for row in shown] for key in ("mean_bytes", "mean_test"))
        axes.plot(sizes, scores, marker, color=color, alpha=0.25, markersize=4)
        best = frontier(shown)
        sizes, scores = ([row[key] for row in best] for key in ("mean_bytes", "mean_test"))
        axes.plot(sizes, scores, f"{marker}:", color=color, label=f"{when} training", linewidth=1)
        lift, last = 0, 0.0
        for row in best:
            lift = 12 - lift if row["mean_bytes"] < 1.3 * last else 0  # labels that would meet
            last = row["mean_bytes"]
            ends = [min(row["test"]), max(row["test"])]
            axes.plot([row["mean_bytes"]] * 2, ends, color=color, alpha=0.4)
            bits = f"{row['format']} bits" if row["format"].isdigit() else row["format"]
            above = when == "through"
            axes.annotate(
                f"{row['method']}, {bits}",
                (row["mean_bytes"], row["mean_test"]),
                textcoords="offset points",
                xytext=(-5, 3 + lift) if above else (6, -2 - lift),
                ha="right" if above else "left",
                va="bottom" if above else "top",
                fontsize=8,
                color=color,
            )
    _report.bytes_axis(axes)
    axes.set_ylim(lowest, base + 0.003)
    axes.set_xlim(11e3, 420e3)
    axes.set_xticks([15e3, 20e3, 30e3, 40e3, 60e3, 80e3, 120e3, 160e3, 240e3, 320e3])
    axes.yaxis.set_major_locator(MultipleLocator(0.005))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    axes.set_ylabel("test accuracy, mean and range of seeds")
    axes.set_title(
        "every row without quantized inputs; lines: best on validation images for its size",
        loc="left",
        fontsize=10,
    )
    axes.legend(frameon=False, loc="lower right")
    _report.save_plot(figure, file)
