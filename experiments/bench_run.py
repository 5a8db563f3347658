"""Time compressed products and networks against XLA's floats, and against other runtimes.

    python -m experiments.bench_run                    # everything, about ten minutes on two cores
    python -m experiments.bench_run --only products    # one part: products or networks
    python -m experiments.bench_run --readme           # the committed results, into README.md
    python -m experiments.bench_run --smoke

All sides of a case run in turns, each called twice, of which the second counts; medians are
compared. Cold cases rotate over more matrices than the caches hold, so that weights stream from
memory as they do in a network; warm ones repeat one matrix. ONNX Runtime, PyTorch, qwix and AQT are
timed where they are installed.

Beside each case stand what fraction of this machine's measured limits it reaches: of the speed at
which one core's sum over floats reads memory, and of the multiply-adds of a large product of
floats; and how far its outputs are from the plain path's, by the largest output.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments import (
    _bench_run_networks,
    _bench_run_peers,
    _bench_run_products,
    _bench_run_report,
    _results,
    _timing,
)
from experiments._bench_run_products import FLOAT, Case
from jopt import run

PARTS = {"products": _bench_run_products.cases, "networks": _bench_run_networks.cases}
PACKAGES = ("onnxruntime", "torch", "qwix", "aqtp")


def limits(smoke: bool) -> dict[str, float]:
    """Measure what the machine can do at best: bytes read and operations done in a second."""
    size = 1 << (16 if smoke else 25)
    values, side = jnp.ones(size), 64 if smoke else 2048
    matrix = jnp.ones((side, side))
    total, product = jax.jit(jnp.sum), jax.jit(jnp.matmul)
    found = _timing.interleaved(
        {"read": lambda: total(values), "multiply": lambda: product(matrix, matrix)}, 7
    )
    return {
        "bytes_per_second": round(4 * size / found["read"]["min_s"]),
        "operations_per_second": round(2 * side**3 / found["multiply"]["min_s"]),
    }


def measure(case: Case, repeats: int, best: dict[str, float]) -> dict[str, Any]:
    """Time one case."""
    try:
        rows = _timing.interleaved(case.sides, repeats, settle=True)
    finally:
        for side in case.sides.values():
            if isinstance(side, _bench_run_peers.Other):
                side.close()
    seconds = {name: row["median_s"] / case.copies for name, row in rows.items()}
    own = seconds[case.ours]
    found = {
        "case": case.name,
        "copies": case.copies,
        "ours": case.ours,
        "goal": case.goal,
        "microseconds": {name: round(1e6 * each, 2) for name, each in seconds.items()},
        "times_faster": {
            name: round(each / own, 3) for name, each in seconds.items() if name != case.ours
        },
        "difference": case.difference,
    }
    found["of_reading"] = round(case.bytes / own / best["bytes_per_second"], 3)
    found["of_multiplying"] = round(case.operations / own / best["operations_per_second"], 3)
    found["goals_of_others"] = dict(case.others)
    return found


def targets_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Hold each case against what is asked for."""
    found = []
    for row in rows:
        pairs = [(FLOAT, row["goal"])] if row["goal"] is not None else []
        for name, goal in pairs + list(row["goals_of_others"].items()):
            if name in row["times_faster"]:
                words = f"{row['case']}: times faster than {name}"
                found.append(_results.target(words, row["times_faster"][name], goal, "higher"))
    return found


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.bench_run")
    parser.add_argument("--only", choices=sorted(PARTS), help="one part, results written apart")
    parser.add_argument("--smoke", action="store_true", help="small sizes, a few calls")
    parser.add_argument("--readme", action="store_true", help="write README's table, time nothing")
    parser.add_argument("--repeats", type=int, default=21, help="calls of each side")
    parser.add_argument("--out", type=Path, default=_results.RESULTS, help="where results go")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    options = _parse(arguments)
    if options.readme:
        results = json.loads((options.out / "bench_run.json").read_text())
        return _bench_run_report.write(results["figures"])
    repeats = 2 if options.smoke else options.repeats
    best = limits(options.smoke)
    print(
        f"Reading {best['bytes_per_second'] / 1e9:.1f} GB/s, multiplying "
        f"{best['operations_per_second'] / 1e9:.0f} GFLOP/s; native kernels: "
        f"{run.native_problem() or run.native_instructions()}"
    )
    rows: list[dict[str, Any]] = []
    parts = [options.only] if options.only else list(PARTS)
    makers: list[Callable[[], Case]] = [
        make for part in parts for make in PARTS[part](options.smoke)
    ]
    for make in makers:
        row = measure(make(), repeats, best)
        rows.append(row)
        faster = ", ".join(f"{each:.2f}x {name}" for name, each in row["times_faster"].items())
        print(f"{row['case']}: {faster}; apart by {row['difference']:.1e}", flush=True)
        jax.clear_caches()
    results = {
        "command": _results.command("experiments.bench_run"),
        **_results.environment(PACKAGES),
        "data": "random weights and inputs: only time and agreement are compared",
        "settings": {"repeats": repeats, "native": run.native_instructions()},
        "limits": best,
        "figures": rows,
        "targets": targets_of(rows),
    }
    name = "bench_run" + (f"-{options.only}" if options.only else "")
    name += "-smoke" if options.smoke else ""
    print(f"Results: {_results.write_results(name, results, options.out)}")


if __name__ == "__main__":
    main()
