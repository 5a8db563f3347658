"""What a person sees at the end of an experiment: a table and a plot."""

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

FORMS = {"dense": "float32", "pruned": "pruned", "packed": "packed"}
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
    for each in results["targets"]:
        sign = ">=" if each["better"] == "higher" else "<="
        verdict = "[green]met[/]" if each["met"] else "[red]missed[/]"
        console.print(f"{verdict}  {each['target']}: {each['value']} (goal {sign} {each['goal']})")
    console.print(f"Results: {out / title}.json, plot {out / title}.png, networks {out / title}/")


def plot(networks: dict[str, Any], data: str, file: Path) -> None:
    """Draw test error against bytes, one line a network, as PNG and SVG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for network, rows in networks.items():
        sizes = [row["bytes"] for row in rows.values()]
        errors = [row["test_error"] for row in rows.values()]
        (line,) = axes.plot(sizes, errors, linewidth=1.5, alpha=0.6)
        for marker, (form, row) in zip("os*", rows.items(), strict=True):
            axes.plot(
                row["bytes"],
                row["test_error"],
                marker,
                color=line.get_color(),
                markersize=13 if form == "packed" else 7,
                label=network if form == "packed" else None,
            )
            axes.annotate(
                f"{row['bytes'] / 1000:,.1f} kB",
                (row["bytes"], row["test_error"]),
                textcoords="offset points",
                xytext=(0, 9),
                ha="center",
                fontsize=8,
            )
        if data == "mnist" and network in DEEP_COMPRESSION:
            size, error = DEEP_COMPRESSION[network]
            axes.plot(size, error, "*", color=line.get_color(), markersize=13, fillstyle="none")
    axes.set_xscale("log")
    worst = max(row["test_error"] for rows in networks.values() for row in rows.values())
    axes.set_ylim(0, 1.2 * worst + 1e-4)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size / 1000:,g} kB"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    axes.set_xlabel("bytes of the one file that reloads (log scale)")
    axes.set_ylabel("test error")
    hollow = ", hollow: Han et al. 2016" if data == "mnist" else ""
    axes.set_title(f"{data}: test error against file size", loc="left", fontweight="bold")
    axes.set_title(f"circle float32, square pruned, star packed{hollow}", loc="right", fontsize=9)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    for ending in ("png", "svg"):
        figure.savefig(file.with_suffix(f".{ending}"), dpi=150, metadata=_no_date(ending))
    plt.close(figure)


def _no_date(ending: str) -> dict[str, Any]:
    """Leave the date out, so that the same figures give the same file."""
    return {"Date": None} if ending == "svg" else {}
