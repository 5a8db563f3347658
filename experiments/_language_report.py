"""Tables and plot of the language model experiment."""

from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from experiments import _report

Row = dict[str, Any]


def compressed_table(rows: list[Row], targets: list[dict[str, Any]], console: Console) -> None:
    """Print the perplexity of every network."""
    console.print(
        "Perplexity of a token of the test text, mean of the seeds; after the sign half the spread."
    )
    titles = ("", "form", "method", "bytes", "perplexity", "against float")
    cells = [
        (
            [row["kind"], row["form"]],
            [
                row["method"],
                f"{np.mean(row['bytes']):,.0f}",
                f"{row['mean_test']:,.2f} ±{row['spread_test'] / 2:,.2f}",
                f"{row['mean_test'] / rows[0]['mean_test'] - 1:+.1%}",
            ],
        )
        for row in rows
    ]
    console.print(_report.grouped(titles, cells))
    _report.print_targets(targets, console)


def compressed_plot(rows: list[Row], file: Path) -> None:
    """Draw how much perplexity grows by bits and method, and a panel of pruned networks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
    dense = rows[0]["mean_test"]
    quantized = [row for row in rows if row["kind"] == "quantized"]
    for method, marker in zip(dict.fromkeys(r["method"] for r in quantized), "oDs^v", strict=False):
        own = [row for row in quantized if row["method"] == method]
        bits = [int(row["form"].split()[0]) for row in own]
        above = [100 * (np.array(row["test"]) / rows[0]["test"] - 1) for row in own]
        lost = np.array(above)  # by every seed against its own dense network
        (line,) = left.plot(bits, lost.mean(1), marker=marker, markersize=5, label=method)
        left.fill_between(bits, lost.min(1), lost.max(1), color=line.get_color(), alpha=0.15)
    left.set_yscale("symlog", linthresh=0.1)
    left.yaxis.set_major_formatter("{x:g}")
    left.invert_xaxis()
    left.set_xticks(sorted({int(row["form"].split()[0]) for row in quantized}))
    left.set_xlabel("bits of a kernel's weight, groups of 64")
    left.set_ylabel("perplexity above that of the float network, %")
    left.set_title("quantized", loc="left", fontsize=10)
    pruned = [row for row in rows if row["kind"] == "pruned"]
    forms = list(dict.fromkeys(row["form"] for row in pruned))
    methods = list(dict.fromkeys(row["method"] for row in pruned))
    width = 0.8 / max(len(methods), 1)
    for number, method in enumerate(methods):
        own = [row for row in pruned if row["method"] == method]
        places = np.arange(len(forms)) + (number - (len(methods) - 1) / 2) * width
        above = [100 * (row["mean_test"] / dense - 1) for row in own]
        right.bar(places, above, 0.9 * width, label=method)
    right.set_xticks(range(len(forms)), forms)
    right.set_ylabel("perplexity above that of the dense network, %")
    right.set_title("pruned", loc="left", fontsize=10)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    _report.save_plot(figure, file)


def students_table(rows: list[Row], targets: list[dict[str, Any]], console: Console) -> None:
    """Print the perplexity of every student, and what its teacher thinks of its own words."""
    console.print(
        "Mean of the seeds; after the sign half the spread. Surprise: of the teacher at a token "
        "that the student draws."
    )
    found = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    found.add_column("student", no_wrap=True)
    for name in ("parameters", "perplexity", "surprise"):
        found.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        found.add_row(
            row["how"],
            f"{row['parameters']:,}",
            f"{row['mean_test']:.2f} ±{row['spread_test'] / 2:.2f}",
            f"{np.mean(row['surprise']):.3f}",
        )
    console.print(found)
    _report.print_targets(targets, console)
