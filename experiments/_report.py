"""What a person sees at the end of an experiment: a table and a plot."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

FORMS = {"dense": "float32", "pruned": "pruned", "packed": "packed"}
MARKERS = {"dense": "o", "pruned": "s", "packed": "*"}
# Bytes and test error that Han, Mao and Dally report: table 1 of "Deep Compression", 2016.
DEEP_COMPRESSION = {"lenet_300_100": (27_000, 0.0158), "lenet5": (44_000, 0.0074)}


def table(results: dict[str, Any], title: str, out: Path, console: Console) -> None:
    """Print every network's forms, the data they were measured on, and the targets."""
    console.print(f"Reloaded from its file and tested on {results['data']['source']}:")
    found = Table(box=box.SIMPLE_HEAD, padding=(0, 0), pad_edge=False)
    for name in ("network", "form"):
        found.add_column(name, no_wrap=True)
    for name in ("weights", "bytes", "smaller", "validation", "test error"):
        found.add_column(name, justify="right", no_wrap=True)
    for network, rows in results["figures"]["networks"].items():
        for form, row in rows.items():
            found.add_row(
                network if form == "dense" else "",
                FORMS[form],
                f"{row['nonzero']:,}",
                f"{row['bytes']:,}",
                f"{row['ratio']:.1f}x",
                f"{row['validation_error']:.2%}",
                f"{row['test_error']:.2%}",
            )
        found.add_section()
    console.print(found)
    print_targets(results["targets"], console)
    console.print(f"Results: {out / title}.json, plot {out / title}.png, networks {out / title}/")


def print_targets(targets: list[dict[str, Any]], console: Console, form: str = "") -> None:
    """Print what was asked for, and whether it was met; `form` is how values are written."""
    for each in targets:
        sign = ">=" if each["better"] == "higher" else "<="
        verdict = "[green]met[/]" if each["met"] else "[red]missed[/]"
        value = format(each["value"], form)
        console.print(f"{verdict}  {each['target']}: {value} (goal {sign} {each['goal']})")


def grouped(columns: Sequence[str], rows: Iterable[tuple[Sequence[str], Sequence[str]]]) -> Table:
    """Make a table whose first columns name a group of rows, once, with a gap between groups.

    Args:
      columns: titles; those of a group and of the name after it are to the left, numbers right.
      rows: for each the words of its group, and its other cells, of which the first is its name.
    """
    found = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    last: list[str] | None = None
    for group, cells in rows:
        if last is None:
            for number, title in enumerate(columns):
                side = "left" if number <= len(group) else "right"
                found.add_column(title, justify=side, no_wrap=True)
        elif last != list(group):
            found.add_section()
        shown = [""] * len(group) if last == list(group) else list(group)
        last = list(group)
        found.add_row(*shown, *cells)
    return found


def bytes_axis(axes: Any) -> None:
    """Make the horizontal axis one of bytes, on a log scale."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size / 1000:,g} kB"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("bytes of the one file that reloads (log scale)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def plot(networks: dict[str, Any], data: str, file: Path) -> None:
    """Draw test error against bytes, one line a network, as PNG and SVG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import PercentFormatter

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    worst = 0.0
    for network, rows in networks.items():
        sizes = [row["bytes"] for row in rows.values()]
        errors = [row["test_error"] for row in rows.values()]
        (line,) = axes.plot(sizes, errors, linewidth=1.5, alpha=0.6, label=network)
        for marker, row in zip(MARKERS.values(), rows.values(), strict=True):
            place = (row["bytes"], row["test_error"])
            size = 13 if marker == "*" else 7
            axes.plot(*place, marker, color=line.get_color(), markersize=size)
            _name(axes, f"{row['bytes'] / 1000:,.1f} kB", place)
        if data == "mnist" and network in DEEP_COMPRESSION:
            place = DEEP_COMPRESSION[network]
            axes.plot(*place, "*", color=line.get_color(), markersize=13, fillstyle="none")
            _name(axes, "Han et al. 2016", place)
            errors.append(place[1])
        worst = max(worst, *errors)
    for form, marker in MARKERS.items():
        axes.plot([], [], marker, color="gray", markersize=9, label=FORMS[form])
    bytes_axis(axes)
    axes.set_ylim(0, 1.15 * worst + 1e-4)
    axes.margins(x=0.1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=2))
    axes.set_ylabel("test error")
    axes.set_title(f"{data}: test error against file size", loc="left", fontweight="bold")
    axes.legend(frameon=False, ncols=2, loc="upper right")
    save_plot(figure, file)


def _name(axes: Any, words: str, place: tuple[float, float]) -> None:
    """Write beside a point what it is."""
    above = {"textcoords": "offset points", "xytext": (0, 9), "ha": "center", "fontsize": 8}
    axes.annotate(words, place, **above)


def save_plot(figure: Any, file: Path) -> None:
    """Write a figure as PNG and SVG, undated, so that the same figures give the same file."""
    import matplotlib.pyplot as plt

    file.parent.mkdir(parents=True, exist_ok=True)
    for ending in ("png", "svg"):
        dated = {"Date": None} if ending == "svg" else {}
        figure.savefig(file.with_suffix(f".{ending}"), dpi=150, metadata=dated)
    plt.close(figure)
