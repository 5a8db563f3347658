"""Table and plot of EfficientNet-Lite0 after quantization."""

from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from experiments import _report

Row = dict[str, Any]


def table(rows: list[Row], targets: list[dict[str, Any]], console: Console) -> None:
    """Print how near every network is to the float one."""
    console.print("Against the float network, on views that nothing was set by; mean of the seeds.")
    found = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    found.add_column("form and method", no_wrap=True)
    for name in ("bytes", "agreement", "SQNR, dB"):
        found.add_column(name, justify="right", no_wrap=True)
    last = None
    for row in rows:
        if row["form"] != last:
            found.add_row(f"[bold]{row['form']}[/]")
        last = row["form"]
        found.add_row(
            f" {row['how']}",
            f"{np.mean(row['bytes']):,.0f}",
            f"{row['mean_agreement']:.1%}",
            f"{row['mean_sqnr_db']:.1f}",
        )
    console.print(found)
    _report.print_targets(targets, console)


def plot(rows: list[Row], file: Path) -> None:
    """Draw the ratio of signal to noise of every network, as bars by form."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.32 * len(rows) + 1.6), layout="constrained")
    forms = list(dict.fromkeys(row["form"] for row in rows))
    places = np.arange(len(rows))[::-1]
    for number, form in enumerate(forms):
        own = [(place, row) for place, row in zip(places, rows, strict=True) if row["form"] == form]
        axes.barh(
            [place for place, _ in own],
            [row["mean_sqnr_db"] for _, row in own],
            color=f"C{number}",
            label=form,
        )
        for place, row in own:
            axes.plot(row["sqnr_db"], [place] * len(row["sqnr_db"]), ".", color="0.2", markersize=3)
    axes.set_yticks(places, [row["how"] for row in rows], fontsize=8)
    axes.set_xlabel("signal to noise of the logits, dB; a dot for each seed")
    axes.set_title("EfficientNet-Lite0 after quantization", loc="left", fontweight="bold")
    axes.axvline(0, color="0.5", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    _report.save_plot(figure, file)
