"""Table of the sentiment experiment."""

from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from experiments import _report

Row = dict[str, Any]


def table(rows: list[Row], targets: list[dict[str, Any]], console: Console) -> None:
    """Print the accuracy and the bytes of every network."""
    seeds = len(rows[0]["test"])
    console.print(
        f"Test accuracy of what the file gives back, mean of {seeds} seeds ± half their spread."
    )
    titles = ("form", "method", "bytes", "accuracy", "lost")
    cells = [
        (
            [row["form"]],
            [
                row["method"],
                f"{np.mean(row['bytes']):,.0f}",
                f"{row['mean_test']:.2%} ±{50 * row['spread_test']:.2f}",
                f"{100 * (rows[0]['mean_test'] - row['mean_test']):.2f}",
            ],
        )
        for row in rows
    ]
    console.print(_report.grouped(titles, cells))
    _report.print_targets(targets, console)


def latencies(found: dict[str, dict[str, float]], console: Console) -> None:
    """Print how long networks take for one sentence and for 64, and how much faster that is."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("32 tokens a sentence, one seed")
    whole = next(iter(found.values()))
    for count in whole:
        table.add_column(f"{count} at once", justify="right", no_wrap=True)
        table.add_column("faster", justify="right", no_wrap=True)
    for name, each in found.items():
        cells = [
            cell
            for count, value in each.items()
            for cell in (f"{value:.2f} ms", f"{whole[count] / value:.2f}x")
        ]
        table.add_row(name, *cells)
    console.print(table)
