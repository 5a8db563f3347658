"""Time functions side by side: in turns within one process, medians compared."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def timed(function: Callable[[], Any]) -> float:
    """Return the seconds of one call, waiting for its results."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def interleaved(sides: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, float]]:
    """Time the sides in turns, after one call each to warm up; returns medians and minima."""
    for side in sides.values():
        jax.block_until_ready(side())
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            seconds[name].append(timed(side))
    return {
        name: {"median_s": float(np.median(times)), "min_s": min(times), "repeats": len(times)}
        for name, times in seconds.items()
    }
