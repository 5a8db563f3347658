"""The README's table of `bench_run`."""

from pathlib import Path
from typing import Any

from experiments import _results
from experiments._bench_run_products import FLOAT

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- bench_run -->", "<!-- end -->"
OURS = "jopt, "


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """Return the table as Markdown: a line for each case."""
    found = [
        "| what | time | faster than XLA in float32 | than others | of reading, multiplying |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        name, own = row["case"], row["ours"].removeprefix(OURS)
        name += f" ({own})" if own != row["ours"] else ""
        faster = row["times_faster"]
        spent = row["microseconds"]
        ways = [
            f"{each.removeprefix(OURS)} {spent[FLOAT] / spent[each]:.2f}x"
            for each in faster
            if each.startswith(OURS)
        ]
        cell = "; ".join([f"{faster[FLOAT]:.2f}x", *filter(None, [", ".join(ways)])])
        others = [
            f"{times:.2f}x {each}"
            for each, times in faster.items()
            if each != FLOAT and not each.startswith("jopt")
        ]
        most = spent[row["ours"]]
        time = f"{most:.0f} us" if most < 1000 else f"{most / 1000:.1f} ms"
        limits = f"{100 * row['of_reading']:.0f} %, {100 * row['of_multiplying']:.0f} %"
        found.append(f"| {name} | {time} | {cell} | {', '.join(others) or '-'} | {limits} |")
    return found


def write(rows: list[dict[str, Any]], readme: Path = README) -> None:
    """Put the table in the place of the one that is there."""
    text = readme.read_text(encoding="utf-8")
    head, rest = text.split(f"{BEGIN}\n")
    _, tail = rest.split(END, 1)
    body = "\n".join(lines(rows))
    _results.write_atomically(readme, f"{head}{BEGIN}\n{body}\n{END}{tail}".encode())
