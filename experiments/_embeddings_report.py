"""Table and plot of the embeddings experiment."""

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from experiments import _report

Row = dict[str, Any]


def table(rows: list[Row], targets: list[dict[str, Any]], console: Console) -> None:
    """Print how near every network is to the float one."""
    console.print(
        "Embeddings of test sentences against the float network's: mean cosine, that of the worst "
        "hundredth, and nearest neighbours that stay."
    )
    titles = ("form", "method", "bytes", "cosine", "worst", "neighbours")
    cells = [
        (
            [row["form"]],
            [
                row["method"],
                f"{np.mean(row['bytes']):,.0f}",
                f"{row['mean_test']:.4f}",
                f"{np.mean(row['worst_hundredth']):.4f}",
                f"{row['mean_overlap']:.1%}",
            ],
        )
        for row in rows
    ]
    console.print(_report.grouped(titles, cells))
    _report.print_targets(targets, console)


def plot(rows: list[Row], file: Path) -> None:
    """Draw neighbours kept against bits, a line for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter

    figure, axes = pyplot.subplots(figsize=(6.5, 4.5), layout="constrained")
    quantized = [row for row in rows if row["method"]]
    for method, marker in zip(
        dict.fromkeys(r["method"] for r in quantized), "oDs^vP", strict=False
    ):
        own = [row for row in quantized if row["method"] == method]
        bits = [int(row["form"].split()[0]) for row in own]
        axes.plot(
            bits, [row["mean_overlap"] for row in own], marker=marker, markersize=5, label=method
        )
    axes.invert_xaxis()
    axes.set_xticks(sorted({int(row["form"].split()[0]) for row in quantized}))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("bits of a kernel's weight, groups of 64")
    axes.set_ylabel("ten nearest sentences that stay nearest")
    axes.set_title("Sentence embeddings after quantization", loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    _report.save_plot(figure, file)
