"""Tables and plots of the distillation experiments."""

from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from experiments import _report

SHOWN = 20.0  # points below the best that the plot of bytes shows


def gains(rows: list[dict[str, Any]]) -> np.ndarray:
    """Return each row's gain over the student alone, seed by seed: (rows, seeds)."""
    alone = {row["labels"]: np.array(row["test"]) for row in rows if row["method"] == "alone"}
    return np.stack([np.array(row["test"]) - alone[row["labels"]] for row in rows])


def table(figures: dict[str, Any], targets: list[dict[str, Any]], console: Console) -> None:
    """Print the networks, and the accuracy of every student."""
    for name, row in figures["networks"].items():
        score = f", test accuracy {row['test']:.2%}" if "test" in row else ""
        console.print(
            f"{name}: {row['parameters']:,} parameters, {row['multiply_adds']:,} multiply-adds"
            f"{score}"
        )
    titles = ("labels", "method", "test accuracy", "lowest to highest", "gain")
    cells = [
        (
            [f"{row['labels']:.0%}"],
            [
                row["method"],
                f"{row['mean_test']:.2%}",
                f"{min(row['test']):.2%} to {max(row['test']):.2%}",
                "" if row["method"] == "alone" else f"{100 * gain.mean():+.2f}",
            ],
        )
        for row, gain in zip(figures["students"], gains(figures["students"]), strict=True)
    ]
    console.print(_report.grouped(titles, cells))
    _report.print_targets(targets, console)


def plot(figures: dict[str, Any], file: Path) -> None:
    """Draw every student's test accuracy, a panel for each fraction of labels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = figures["students"]
    fractions = sorted({row["labels"] for row in rows}, reverse=True)
    counts = [sum(row["labels"] == labels for row in rows) for labels in fractions]
    figure, axes = pyplot.subplots(
        len(fractions),
        1,
        figsize=(8, 0.34 * sum(counts) + 1.0 * len(fractions)),
        height_ratios=[count + 0.5 for count in counts],
        squeeze=False,
        layout="constrained",
    )
    for axis, labels in zip(axes[:, 0], fractions, strict=True):
        own = [row for row in rows if row["labels"] == labels][::-1]
        for place, row in enumerate(own):
            color = {"alone": "0.35", "KD": "C3"}.get(row["method"], "C0")
            tests = 100 * np.array(row["test"])
            axis.plot(tests, [place] * len(tests), "o", color=color, markersize=4, alpha=0.5)
            axis.plot(tests.mean(), place, "|", color=color, markersize=14, markeredgewidth=2)
            if row["method"] == "alone":
                axis.axvline(tests.mean(), color="0.35", linewidth=1, linestyle=":")
        axis.set_yticks(range(len(own)), [row["method"] for row in own], fontsize=9)
        axis.set_ylim(-0.6, len(own) - 0.4)
        axis.grid(axis="x", alpha=0.25)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.set_title(f"{labels:.0%} of the labels", loc="left", fontsize=10, fontweight="bold")
    axes[-1, 0].set_xlabel("test accuracy, %; each seed a dot, their mean a bar")
    _report.save_plot(figure, file)


def classic_table(figures: dict[str, Any], targets: list[dict[str, Any]], console: Console) -> None:
    """Print the pair of convolutional networks."""
    for name, row in figures["networks"].items():
        console.print(
            f"{name}: {row['parameters']:,} parameters, {row['multiply_adds']:,} multiply-adds"
        )
    found = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    found.add_column("network", no_wrap=True)
    for name in ("test accuracy", "lowest to highest"):
        found.add_column(name, justify="right", no_wrap=True)
    for row in figures["rows"]:
        tests = row["test"]
        found.add_row(
            row["network"], f"{row['mean_test']:.2%}", f"{min(tests):.2%} to {max(tests):.2%}"
        )
    console.print(found)
    _report.print_targets(targets, console)


def text_table(rows: list[dict[str, Any]], targets: list[dict[str, Any]], console: Console) -> None:
    """Print the networks that read sentences: bytes and accuracy, against the teacher's."""
    console.print("Test accuracy, %: mean of the seeds ± half their spread.")
    teacher = rows[0]
    found = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    found.add_column("network", no_wrap=True)
    for name in ("kB", "smaller", "test", "kept"):
        found.add_column(name, justify="right", no_wrap=True)
    last = None
    for row in rows:
        if row["network"] != last:
            found.add_row(f"[bold]{row['network']}[/]")
        last = row["network"]
        tests, size = row["test"], np.mean(row["bytes"])
        found.add_row(
            f" {row['how']}",
            f"{size / 1000:,.1f}",
            f"{np.mean(teacher['bytes']) / size:.1f}x",
            f"{100 * row['mean_test']:.2f} ±{50 * (max(tests) - min(tests)):.2f}",
            f"{row['mean_test'] / teacher['mean_test']:.1%}",
        )
    console.print(found)
    _report.print_targets(targets, console)


def text_plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw accuracy against bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    colors = {"teacher": "0.35", "transformer": "C0", "cnn": "C1"}
    markers = dict(zip(dict.fromkeys(row["how"] for row in rows), "osD^*", strict=False))
    for row in rows:
        look: dict[str, Any] = {"color": colors[row["network"]], "marker": markers[row["how"]]}
        place = np.mean(row["bytes"])
        tests = 100 * np.array(row["test"])
        axis.plot([place] * 2, [tests.min(), tests.max()], color=look["color"], linewidth=1)
        axis.plot(place, tests.mean(), markersize=8, **look)
    for network, color in colors.items():
        axis.plot([], [], color=color, linewidth=4, label=network)
    for how, marker in markers.items():
        axis.plot([], [], marker, color="gray", label=how)
    axis.axhline(97 * rows[0]["mean_test"], color="0.6", linewidth=1, linestyle=":")
    axis.annotate(
        "97 % of the teacher's accuracy",
        (1, 97 * rows[0]["mean_test"]),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8,
    )
    _report.bytes_axis(axis)
    axis.set_ylabel("test accuracy, %")
    axis.legend(frameon=False, fontsize=8, ncols=2)
    _report.save_plot(figure, file)


def bytes_table(
    rows: list[dict[str, Any]], targets: list[dict[str, Any]], console: Console
) -> None:
    """Print every network with its bytes."""
    console.print("Mean of the seeds; after the sign half the spread over them.")
    titles = ("made by", "form", "weights left", "bytes", "test accuracy")
    cells = [
        (
            [row["how"]],
            [
                row["form"],
                f"{np.mean(row['left']):,.0f}",
                f"{np.mean(row['bytes']):,.0f}",
                f"{row['mean_test']:.2%} ±{50 * row['spread_test']:.2f}",
            ],
        )
        for row in rows
    ]
    console.print(_report.grouped(titles, cells))
    _report.print_targets(targets, console)


def bytes_plot(rows: list[dict[str, Any]], data: str, file: Path) -> None:
    """Draw accuracy against bytes, one line for each way; what is far below the best is cut off."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 5), layout="constrained")
    ways = list(dict.fromkeys(row["how"] for row in rows))
    for way, marker in zip(ways, "os^*", strict=True):
        own = sorted((row for row in rows if row["how"] == way), key=lambda r: np.mean(r["bytes"]))
        sizes = [np.mean(row["bytes"]) for row in own]
        tests = 100 * np.array([row["test"] for row in own])
        big = 12 if marker == "*" else 6
        (line,) = axis.plot(sizes, tests.mean(1), marker=marker, markersize=big, label=way)
        axis.fill_between(sizes, tests.min(1), tests.max(1), color=line.get_color(), alpha=0.15)
    best, worst = (100 * pick(row["mean_test"] for row in rows) for pick in (max, min))
    axis.set_ylim(max(worst - 1, best - SHOWN), best + 1)
    _report.bytes_axis(axis)
    axis.set_ylabel("test accuracy, %")
    axis.set_title(f"{data}: test accuracy against file size", loc="left", fontweight="bold")
    axis.legend(frameon=False, loc="lower right")
    _report.save_plot(figure, file)
