"""What every experiment writes down: where it ran, what it measured, what was asked for."""

import json
import os
import platform
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jopt", "jax", "jaxlib", "flax", "optax", "numpy")


def environment(packages: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the schema's `versions`, with those of further packages too, and `hardware`."""
    versions = {"python": platform.python_version()}
    for package in (*PACKAGES, *packages):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0]
    hardware = {
        "processor": _processor(),
        "cores": cores(),
        "machine": platform.machine(),
        "backend": jax.default_backend(),
        "device": device.device_kind,
        "devices": jax.device_count(),
    }
    return {"versions": versions, "hardware": hardware}


def command(module: str) -> str:
    """Return the command that is running, as one would type it."""
    return " ".join(["python", "-m", module, *sys.argv[1:]])


def target(words: str, value: float, goal: float, better: str) -> dict[str, Any]:
    """Return one entry of `targets`; whether it is met follows from the numbers.

    Args:
        words: what is asked for.
        value: what was measured.
        goal: what it is held against; reaching it exactly is enough.
        better: "lower" or "higher".
    """
    if better not in ("lower", "higher"):
        raise ValueError(f'better is "lower" or "higher", not {better!r}.')
    met = value <= goal if better == "lower" else value >= goal
    return {"target": words, "value": value, "goal": goal, "better": better, "met": bool(met)}


def join_seeds(
    by_seed: list[list[dict[str, Any]]], same: tuple[str, ...], listed: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Join the rows of all seeds: lists, means, and the spread of the test from lowest to highest.

    Args:
        by_seed: for each seed its rows, in the same order.
        same: entries that are the same for all seeds.
        listed: entries that become lists; `validation` and `test` are among them.
    """
    found = []
    for rows in zip(*by_seed, strict=True):
        lists = {key: [row[key] for row in rows] for key in listed}
        means = {
            f"mean_{key}": round(float(np.mean(lists[key])), 6) for key in ("validation", "test")
        }
        spread = {"spread_test": round(max(lists["test"]) - min(lists["test"]), 6)}
        found.append({key: rows[0][key] for key in same} | lists | means | spread)
    return found


def rows_of_seed(
    rows: list[dict[str, Any]], listed: tuple[str, ...], place: int
) -> list[dict[str, Any]]:
    """Return the rows of one seed from joined ones.

    Args:
        rows: as `join_seeds` returns them.
        listed: entries that are lists.
        place: of the seed in them.
    """
    return [
        {
            key: each[place] if key in listed else each
            for key, each in row.items()
            if not key.startswith(("mean_", "spread_"))
        }
        for row in rows
    ]


def write_results(name: str, results: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write `<folder>/<name>.json` in one stroke, so that a killed run leaves no half a file."""
    path = folder / f"{name}.json"
    write_atomically(path, (json.dumps(results, indent=2, allow_nan=False) + "\n").encode())
    return path


def write_atomically(file: Path, content: bytes) -> None:
    """Write a file so that it is there either whole or as it was."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as out:
        try:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        except BaseException:
            os.unlink(out.name)
            raise
    os.chmod(out.name, 0o644)
    os.replace(out.name, file)


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    """Return the processor's name, which Linux keeps in /proc only."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
