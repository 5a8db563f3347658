"""What a person sees of extreme sparsity: a table, and a plot beside what others reported."""

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from experiments import _report

# Weights over weights left, and test error: table 1 of Molchanov, Ashukha, Vetrov, "Variational
# Dropout Sparsifies Deep Neural Networks", 2017, https://arxiv.org/abs/1701.05369.
PUBLISHED = {
    "lenet5": {
        "Han et al. 2015": (12, 0.0077),
        "dynamic surgery": (111, 0.0091),
        "soft weight-sharing": (200, 0.0097),
        "variational dropout": (280, 0.0075),
    },
    "lenet_300_100": {
        "Han et al. 2015": (12, 0.0159),
        "dynamic surgery": (56, 0.0199),
        "soft weight-sharing": (23, 0.0194),
        "variational dropout": (68, 0.0192),
    },
}


def table(rows: dict[str, Any], targets: list[dict[str, Any]], console: Console) -> None:
    """Print every network and seed, and the targets."""
    found = Table(box=box.SIMPLE_HEAD, padding=(0, 0), pad_edge=False)
    found.add_column("network", no_wrap=True)
    for name in ("seed", "left", "ratio", "bytes", "validation", "test"):
        found.add_column(name, justify="right", no_wrap=True)
    for name, row in rows.items():
        for number, each in enumerate(row["seeds"]):
            found.add_row(
                "" if number else name,
                f"{each['seed']}",
                f"{each['left']:,}",
                f"{each['ratio']:.1f}x",
                f"{each['bytes']:,}",
                f"{each['validation_error']:.2%}",
                f"{each['test_error']:.2%}",
            )
        found.add_section()
    console.print(found)
    _report.print_targets(targets, console)


def plot(
    rows: dict[str, Any], goals: dict[str, tuple[float, float]], data: str, file: Path
) -> None:
    """Draw test error against the ratio beside goals and what others reported, as PNG and SVG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, MultipleLocator, NullFormatter, PercentFormatter

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, goal in goals.items():
        row = rows[name]
        ratios, errors = ([each[key] for each in row["seeds"]] for key in ("ratio", "test_error"))
        (points,) = axes.plot(ratios, errors, "*", markersize=9, alpha=0.6, label=f"{name}, jopt")
        about = {"color": points.get_color(), "fontsize": 8, "textcoords": "offset points"}
        axes.annotate(
            f"mean {row['mean_test_error']:.2%}",
            (row["mean_ratio"], row["mean_test_error"]),
            xytext=(9, 0),
            va="center",
            **about,
        )
        if data != "mnist":
            continue
        for author, place in PUBLISHED[name].items():
            axes.plot(*place, "o", color=points.get_color(), fillstyle="none")
            below = place[0] >= goal[0]  # above are the goal and jopt's own
            offset = (0, -15) if below else (0, 7)
            axes.annotate(author, place, xytext=offset, ha="center", **about)
        axes.plot(*goal, "_", color="gray", markersize=16, zorder=0)
    if data == "mnist":
        axes.plot([], [], "o", color="gray", fillstyle="none", label="reported by others")
        axes.plot([], [], "_", color="gray", markersize=16, label="goal")
    axes.set_xscale("log")
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    axes.yaxis.set_major_locator(MultipleLocator(0.005))
    axes.margins(x=0.12, y=0.12)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}x"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    axes.set_xlabel("parameters / parameters left, biases included for jopt (log scale)")
    axes.set_ylabel("test error")
    axes.set_title(f"{data}: test error against sparsity", loc="left", fontweight="bold")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=2, loc="lower left")
    _report.save_plot(figure, file)
