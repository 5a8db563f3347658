"""The best 16 and 256 values for many weights: time and error against scikit-learn and the optimum.

Both sides end with a codebook and the code of every weight. scikit-learn's KMeans runs with its
defaults: k-means++ seeding, one start (`n_init="auto"` is one start as well), until it converges;
only where that takes many minutes is it stopped after one iteration, and its time is then a lower
bound. The optimum is that of an exact dynamic program in float64 over runs of neighbouring weights.
"""

import importlib.util
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments._results import target
from jopt.quant._kmeans import nearest_codes, optimal_codebook
from tests.oracles_kmeans import exact_error

SEED = 0
GOAL_RATIO, GOAL_GAP = 30.0, 1e-4
HAS_SKLEARN = importlib.util.find_spec("sklearn") is not None
_REACH = 8
_LONG = 10**10  # weights times entries beyond which scikit-learn is stopped early

Fit = Callable[[], tuple[Any, Any]]


def optimum(values: np.ndarray, codebook: np.ndarray, runs: int) -> tuple[float, float]:
    """Return the least mean squared error, and how far above the true one it may lie, relatively.

    The boundaries of the optimum are sought among the ends of `runs` runs of sorted values. To move
    a boundary within a run of n values and width w costs at most 2 (n - 1) w times the distance of
    the two entries beside it; the distances are taken from `codebook`.
    """
    count = codebook.size
    ordered = np.sort(values.astype(np.float64))
    # Runs are short where values are rare, as the cells of an optimal codebook are.
    near = np.pad(ordered, _REACH, "edge")
    share = np.cumsum((near[2 * _REACH :] - near[: -2 * _REACH]) ** (2 / 3))
    start = np.searchsorted(share, np.linspace(0, share[-1], runs, endpoint=False), side="right")
    start = np.unique(np.append(0, start))
    size = np.diff(np.append(start, ordered.size))
    mean = np.add.reduceat(ordered, start) / size
    inside = np.sum((ordered - np.repeat(mean, size)) ** 2) / ordered.size
    error = exact_error(mean, count, size) + inside
    book = codebook.astype(np.float64)
    run = np.searchsorted(ordered[start], (book[1:] + book[:-1]) / 2, side="right") - 1
    run = np.maximum(run, 0)
    width = ordered[start + size - 1][run] - ordered[start][run]
    cost = 2 * (size[run] - 1) * width * np.diff(book)
    return error, float(np.sum(cost) / ordered.size / error)


def squared_error(values: np.ndarray, codebook: np.ndarray, codes: np.ndarray) -> float:
    """Return the mean squared error in float64."""
    return float(np.mean((values - codebook.astype(np.float64)[codes]) ** 2))


def sklearn_fit(values: np.ndarray, count: int, iterations: int) -> Fit:
    """Return a call of KMeans; neither its copy of the data nor its import is timed."""
    from sklearn.cluster import KMeans  # pyright: ignore[reportMissingImports]

    one: Any = 1  # scikit-learn's own annotation says that n_init is a string

    column = values.reshape(-1, 1)

    def fit() -> tuple[Any, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it did not converge, where it is stopped early
            model = KMeans(count, n_init=one, max_iter=iterations, random_state=SEED).fit(column)
        return model.cluster_centers_.reshape(-1), model.labels_

    return fit


def timed(fit: Fit) -> tuple[float, Any]:
    """Return seconds and what came out."""
    start = time.perf_counter()
    found = jax.block_until_ready(fit())
    return time.perf_counter() - start, found


def case(size: int, count: int, runs: int) -> dict[str, Any]:
    """Measure one number of weights with one number of entries."""
    values = jax.block_until_ready(jax.random.normal(jax.random.key(SEED), (size,)) * 0.05)
    host = np.asarray(values)

    def ours() -> tuple[Any, Any]:
        codebook = optimal_codebook(values, count)
        return codebook, nearest_codes(values, codebook)

    stopped = size * count >= _LONG // 2
    repeats = 1 if size * count >= 10**8 else 3
    theirs = sklearn_fit(host, count, 1 if stopped else 300) if HAS_SKLEARN else None
    compile_s = timed(ours)[0]
    seconds: dict[str, list[float]] = {"jopt": [], "scikit-learn": []}
    reference = None
    for _ in range(repeats):
        if theirs is not None:
            spent, reference = timed(theirs)
            seconds["scikit-learn"].append(spent)
        seconds["jopt"] += [timed(ours)[0] for _ in range(5)]
    codebook, codes = (np.asarray(part) for part in ours())
    error = squared_error(host, codebook, codes)
    best, slack = optimum(host, codebook, runs)
    figures: dict[str, Any] = {
        "weights": size,
        "entries": count,
        "jopt": {"median_s": float(np.median(seconds["jopt"])), "min_s": min(seconds["jopt"])},
        "first_call_s": compile_s,
        "optimum": best,
        "optimum_may_be_lower_by": slack,
        "error": error,
        "error_over_optimum": error / best - 1,
    }
    figures["jopt"]["repeats"] = len(seconds["jopt"])
    if reference is not None:
        median = float(np.median(seconds["scikit-learn"]))
        centres, labels = reference
        figures["scikit-learn"] = {
            "median_s": median,
            "repeats": repeats,
            "stopped_after_one_iteration": stopped,
            "error_over_optimum": squared_error(host, centres, labels) / best - 1,
        }
        figures["times_faster"] = median / figures["jopt"]["median_s"]
    return figures


def targets_of(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Hold one case against what is asked for."""
    words = f"k-means of {figures['weights']:,} weights with {figures['entries']} entries"
    gap = figures["error_over_optimum"]
    found = [target(f"{words}: error over the optimum", gap, GOAL_GAP, "lower")]
    if "times_faster" in figures:
        faster = round(figures["times_faster"], 1)
        words = f"{words}: times faster than scikit-learn"
        found.append(target(words, faster, GOAL_RATIO, "higher"))
    return found


def rows(smoke: bool) -> dict[str, Any]:
    """Return the figures of all cases and the targets; without scikit-learn its rows are absent."""
    sizes, counts = ((20_000, 50_000), (4, 16)) if smoke else ((1_000_000, 25_000_000), (16, 256))
    cases = {}
    for size in sizes:
        for count in counts:
            # Many runs for few entries, so that the exact program takes a minute or less.
            runs = 1 << 13 if smoke else (1 << 20 if count <= 16 else 1 << 18)
            cases[f"{size} weights, {count} entries"] = case(size, count, runs)
    if not HAS_SKLEARN:
        print("scikit-learn is not installed: its rows are absent.")
    return {"rows": cases, "targets": [each for row in cases.values() for each in targets_of(row)]}
