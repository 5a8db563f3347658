"""Tables, targets and the plot of the quantization experiment."""

from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from experiments import _results

Row = dict[str, Any]
LEARNED = ("LSQ", "LSQ+", "PACT")


def joined(by_seed: list[list[Row]]) -> list[Row]:
    """Join the rows of all seeds: lists, means, and the spread from lowest to highest."""
    found = []
    for rows in zip(*by_seed, strict=True):
        tests = [row["test"] for row in rows]
        found.append(
            {key: rows[0][key] for key in ("when", "method", "format", "inputs")}
            | {key: [row[key] for row in rows] for key in ("bytes", "validation", "test")}
            | {
                "mean_bytes": round(float(np.mean([row["bytes"] for row in rows]))),
                "mean_validation": round(float(np.mean([row["validation"] for row in rows])), 6),
                "mean_test": round(float(np.mean(tests)), 6),
                "spread_test": round(max(tests) - min(tests), 6),
            }
        )
    return found


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
    for each in results["targets"]:
        sign = ">=" if each["better"] == "higher" else "<="
        verdict = "[green]met[/]" if each["met"] else "[red]missed[/]"
        console.print(
            f"{verdict}  {each['target']}: {each['value']:.4f} (goal {sign} {each['goal']})"
        )


def plot(rows: list[Row], file: Path) -> None:
    """Draw test accuracy against bytes: the best method of each format."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    base = rows[0]["mean_test"]
    axes.axhline(base, color="gray", linewidth=1, linestyle="--")
    lowest = base
    for when, marker, color in (("after", "o", "tab:orange"), ("through", "s", "tab:blue")):
        formats = dict.fromkeys(r["format"] for r in rows if r["when"] == when and not r["inputs"])
        for number, format in enumerate(formats):
            row = _best(rows, when, format, 0)
            if row["mean_test"] < base - 0.06:
                continue  # far below the rest
            label = f"{when} training" if not number else None
            spread = row["test"]
            axes.plot([row["mean_bytes"]] * 2, [min(spread), max(spread)], color=color, alpha=0.5)
            axes.plot(
                row["mean_bytes"], row["mean_test"], marker, color=color, label=label, alpha=0.8
            )
            words = f"{format} bit" if format.isdigit() else format
            axes.annotate(
                words,
                (row["mean_bytes"], row["mean_test"]),
                textcoords="offset points",
                xytext=(5, 5 if when == "through" else -10),
                fontsize=7,
                color=color,
            )
            lowest = min(lowest, *spread)
    axes.plot([], [], "--", color="gray", label="float32")
    axes.set_xscale("log")
    axes.set_ylim(lowest - 0.002, base + 0.004)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size / 1000:,g} kB"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks([15e3, 20e3, 30e3, 40e3, 60e3, 80e3])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    axes.set_xlabel("bytes of the one file that reloads (log scale)")
    axes.set_ylabel("test accuracy, mean of seeds")
    axes.set_title(
        "best method of each format, by validation images", loc="left", fontweight="bold"
    )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    for ending in ("png", "svg"):
        dated = {"Date": None} if ending == "svg" else {}
        figure.savefig(file.with_suffix(f".{ending}"), dpi=150, metadata=dated)
    plt.close(figure)
