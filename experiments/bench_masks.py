"""Time an exact global magnitude mask of 25.5 million weights against every usual way to make it.

    python -m experiments.bench_masks [--smoke]

The leaves have the shapes of a ResNet-50's kernels; 10 % of the weights are kept. All rows run in
one process, interleaved, so that load on the machine falls on all alike, and medians are compared.
Each row's mask is held against that of a stable sort in NumPy; the run fails if jopt's differs.
"""

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments._results import RESULTS, command, environment, target, write_results
from jopt.prune._threshold import keep_largest_global

HAS_TORCH = importlib.util.find_spec("torch") is not None

GOAL_SECONDS = 0.15
SEED = 0
Row = tuple[Callable[[], Any], int]  # what to time, how many repeats


def resnet50_shapes() -> list[tuple[int, ...]]:
    """Kernels of ResNet-50: 53 convolutions and the dense layer, 25,502,912 weights."""
    shapes: list[tuple[int, ...]] = [(7, 7, 3, 64)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(1, 1, channels, width), (3, 3, width, width), (1, 1, width, 4 * width)]
            if block == 0:
                shapes.append((1, 1, channels, 4 * width))
            channels = 4 * width
    return [*shapes, (2048, 1000)]


def make_weights(shapes: list[tuple[int, ...]]) -> list[jax.Array]:
    """Draw He-normal weights, so that scales differ from leaf to leaf as in a network."""
    keys = jax.random.split(jax.random.key(SEED), len(shapes))
    return [
        jax.random.normal(key, shape) * (2 / np.prod(shape[:-1])) ** 0.5
        for key, shape in zip(keys, shapes, strict=True)
    ]


def flatten(leaves: list[Any]) -> np.ndarray:
    """Concatenate leaves in NumPy."""
    return np.concatenate([np.asarray(leaf).reshape(-1) for leaf in leaves])


def stable_mask(leaves: list[jax.Array], keep: int) -> np.ndarray:
    """Make the mask that is right by definition."""
    order = np.argsort(-flatten(leaves), kind="stable")
    mask = np.zeros(order.size, bool)
    mask[order[:keep]] = True
    return mask


def above(leaves: list[jax.Array], threshold: jax.Array) -> list[jax.Array]:
    """Write masks for a known threshold: the least that any method has to do."""
    return [leaf >= threshold for leaf in leaves]


def join(leaves: list[jax.Array]) -> jax.Array:
    """Concatenate leaves in JAX."""
    return jnp.concatenate([leaf.reshape(-1) for leaf in leaves])


def by_sort(leaves: list[jax.Array], keep: int) -> list[jax.Array]:
    """Take the threshold from a full sort."""
    return above(leaves, jnp.sort(join(leaves))[-keep])


def by_top_k(leaves: list[jax.Array], keep: int) -> list[jax.Array]:
    """Take the threshold from `jax.lax.top_k`."""
    return above(leaves, jax.lax.top_k(join(leaves), keep)[0][-1])


def by_argsort(leaves: list[jax.Array], keep: int) -> jax.Array:
    """Rank all weights and scatter ones, as jaxpruner does; exact, also under ties."""
    flat = join(leaves)
    order = jnp.argsort(-flat, stable=True)
    return jnp.zeros(flat.shape, bool).at[order[:keep]].set(True)


def by_partition(leaves: list[np.ndarray], keep: int) -> list[np.ndarray]:
    """Take the threshold from `numpy.partition`."""
    flat = flatten(leaves)
    threshold = np.partition(flat, flat.size - keep)[flat.size - keep]
    return [leaf >= threshold for leaf in leaves]


def torch_rows(leaves: list[np.ndarray], keep: int, repeats: int) -> dict[str, Row]:
    """Rows of PyTorch, if it is installed."""
    if not HAS_TORCH:
        return {}
    import torch  # pyright: ignore[reportMissingImports]
    from torch.nn.utils import prune  # pyright: ignore[reportMissingImports]

    tensors = [torch.from_numpy(leaf.copy()) for leaf in leaves]

    def by_kthvalue() -> Any:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        threshold = flat.kthvalue(flat.numel() - keep + 1).values
        return [tensor >= threshold for tensor in tensors]

    def by_global_unstructured() -> Any:
        layers = [torch.nn.Module() for _ in tensors]
        for layer, tensor in zip(layers, tensors, strict=True):
            layer.register_parameter("weight", torch.nn.Parameter(tensor))
        amount = sum(tensor.numel() for tensor in tensors) - keep
        prune.global_unstructured(
            [(layer, "weight") for layer in layers], prune.L1Unstructured, amount=amount
        )
        return [dict(layer.named_buffers())["weight_mask"].bool() for layer in layers]

    return {
        "torch.kthvalue": (by_kthvalue, repeats),
        "torch prune.global_unstructured": (by_global_unstructured, min(repeats, 3)),
    }


def case_rows(
    scores: list[jax.Array], fractions: dict[str, float], mask: Callable
) -> dict[str, Row]:
    """Rows of ours with other data: how much the time depends on it."""
    size = sum(leaf.size for leaf in scores)
    zeroed = [
        jnp.where(jax.random.uniform(jax.random.key(1), leaf.shape) < 0.9, 0, leaf)
        for leaf in scores
    ]
    constant = [jnp.ones_like(leaf) for leaf in scores]
    data = {"dense": scores, "90 % zeros": zeroed, "constant": constant}
    rows: dict[str, Row] = {}
    for name, fraction in fractions.items():
        leaves = data[name.split(",")[0]]
        rows[f"jopt ({name})"] = (partial(mask, leaves, jnp.int32(fraction * size)), 7)
    return rows


def timed(function: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def interleave(rows: dict[str, Row]) -> dict[str, list[float]]:
    """Time rows, already warm, in turns until each has its repeats."""
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for turn in range(max(repeats for _, repeats in rows.values())):
        for name, (function, repeats) in rows.items():
            if turn < repeats:
                seconds[name].append(timed(function))
    return seconds


def compile_seconds(leaves: list[jax.Array]) -> float:
    """Seconds to trace and compile for these leaves."""
    jax.clear_caches()
    start = time.perf_counter()
    keep_largest_global.lower(leaves, 1).compile()
    return time.perf_counter() - start


def check(rows: dict[str, Row], expected: np.ndarray) -> dict[str, bool]:
    """Say of each row whether its mask is the one of a stable sort; this warms it up, too."""
    exact = {}
    for name, (function, _) in rows.items():
        masks = function()
        found = flatten(masks if isinstance(masks, list) else [masks])
        exact[name] = bool(np.array_equal(found, expected))
    return exact


def show(figures: dict[str, Any], ours: str) -> None:
    """Print the table."""
    print(f"\n{'':34}{'median':>10}{'fastest':>10}{'over ours':>11}  exact")
    for name, row in figures["rows"].items():
        exact = {True: "yes", False: "no", None: ""}[row["exact"]]
        ratio = row["median_s"] / figures["rows"][ours]["median_s"]
        times = f"{1e3 * row['median_s']:8.1f}ms{1e3 * row['min_s']:8.1f}ms"
        print(f"{name:34}{times}{ratio:10.2f}x  {exact}")
    print("compile:", {name: round(value, 2) for name, value in figures["compile_s"].items()})


def main() -> None:
    """Run the comparison and write experiments/results/bench_masks.json."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--smoke", action="store_true", help="small leaves, a few repeats, into a temporary folder"
    )
    smoke = parser.parse_args().smoke
    shapes = [(3, 3, 16, 16), (64, 100), (7,)] if smoke else resnet50_shapes()
    repeats, slow = (3, 1) if smoke else (11, 1)
    scores = [jnp.abs(leaf) for leaf in make_weights(shapes)]
    size = sum(leaf.size for leaf in scores)
    keep = size // 10
    host = [np.asarray(leaf) for leaf in scores]
    many = [jnp.ones((64 * (i % 7 + 1), 128)) for i in range(20 if smoke else 200)]
    compiles = {f"{len(scores)} leaves": compile_seconds(scores)}
    compiles |= {"1 leaf": compile_seconds([join(scores)])}
    compiles |= {f"{len(many)} leaves": compile_seconds(many)}

    threshold = jnp.asarray(np.partition(flatten(host), size - keep)[size - keep])
    ours = "jopt keep_largest_global"
    static = {name: jax.jit(f, static_argnums=1) for name, f in JAX_PEERS.items()}
    write = jax.jit(above)
    rows: dict[str, Row] = {
        "mask only, threshold given": (lambda: write(scores, threshold), repeats),
        ours: (lambda: keep_largest_global(scores, jnp.int32(keep)), repeats),
        "numpy.partition": (lambda: by_partition(host, keep), min(repeats, 7)),
        **torch_rows(host, keep, min(repeats, 5)),
        **{name: (partial(f, scores, keep), slow) for name, f in static.items()},
    }
    exact = check(rows, stable_mask(scores, keep))
    if not exact[ours]:
        raise SystemExit("jopt's mask differs from NumPy's stable sort.")
    fractions = {"dense, half kept": 0.5, "90 % zeros, 5 % kept": 0.05}
    fractions |= {"90 % zeros, half kept": 0.5, "constant, half kept": 0.5}
    cases = case_rows(scores, fractions, keep_largest_global)
    for function, _ in cases.values():
        jax.block_until_ready(function())
    seconds = interleave(rows | cases)
    figures: dict[str, Any] = {
        "weights": size,
        "kept": keep,
        "leaves": len(scores),
        "compile_s": compiles,
    }
    figures["rows"] = {
        name: {
            "median_s": float(np.median(values)),
            "min_s": min(values),
            "repeats": len(values),
            "exact": exact.get(name),
        }
        for name, values in seconds.items()
    }
    show(figures, ours)
    if not HAS_TORCH:
        print("PyTorch is not installed: its rows are absent.")
    record(figures, ours, smoke)


JAX_PEERS = {
    "jnp.sort": by_sort,
    "jax.lax.top_k": by_top_k,
    "jnp.argsort (as jaxpruner)": by_argsort,
}


def record(figures: dict[str, Any], ours: str, smoke: bool) -> None:
    """Write bench_masks.json; figures of a smoke run go to a temporary folder."""
    words = "exact global mask of 25 million weights, seconds"
    median = figures["rows"][ours]["median_s"]
    results = {
        "command": command("experiments.bench_masks"),
        **environment(("torch",)),
        "data": "He-normal weights drawn from the seed, in the shapes of a ResNet-50's kernels",
        "settings": {"seed": SEED, "smoke": smoke, "kept": 0.1, "torch": HAS_TORCH},
        "figures": figures,
        "targets": [] if smoke else [target(words, median, GOAL_SECONDS, "lower")],
    }
    print(write_results("bench_masks", results, Path(tempfile.mkdtemp()) if smoke else RESULTS))


if __name__ == "__main__":
    main()
