"""Time functions side by side: in turns within one process, medians compared."""

import time
from typing import Any

import jax
import numpy as np


def timed(function: Any) -> float:
    """Return the seconds of one call, waiting for its results, or what it says itself of them."""
    if hasattr(function, "seconds"):
        return function.seconds()
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def interleaved(
    sides: dict[str, Any], repeats: int, settle: bool = False
) -> dict[str, dict[str, float]]:
    """Time the sides in turns, after one call each to warm up; returns medians and minima.

    Args:
        sides: by name what is timed: functions, or what has a method `seconds`.
        repeats: calls of each.
        settle: whether each turn begins with a call that does not count: a process that waited for
            others' turns, even for milliseconds, is slower at first.
    """
    for side in sides.values():
        timed(side)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            if settle:
                timed(side)
            seconds[name].append(timed(side))
    return {
        name: {"median_s": float(np.median(times)), "min_s": min(times), "repeats": len(times)}
        for name, times in seconds.items()
    }
