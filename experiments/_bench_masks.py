"""Exact magnitude masks of whole networks against every usual way to make them."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _timing
from experiments._results import target
from jopt import prune
from jopt.prune import _natively, _threshold
from jopt.prune._threshold import keep_largest_global

try:
    import torch  # pyright: ignore[reportMissingImports]
    from torch.nn.utils import prune as torch_prune  # pyright: ignore[reportMissingImports]
except ImportError:
    torch: Any = None
    torch_prune: Any = None

SEED = 0
KEPT = 0.1
OURS = "jopt global"
BY_LAYER = "jopt by layer"
COUNTED = "jopt global, XLA alone"
GLOBAL_PEERS = {"torch prune.global_unstructured": 35.0, "torch.kthvalue": 4.0}
Side = Callable[[], Any]


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


def bert_base_shapes() -> list[tuple[int, ...]]:
    """Kernels and embedding tables of BERT-base, 109 million parameters."""
    shapes: list[tuple[int, ...]] = [(30522, 768), (512, 768), (2, 768), (768, 768)]
    for _ in range(12):
        shapes += [(768, 768)] * 4 + [(768, 3072), (3072, 768)]
    return shapes


def make_scores(shapes: list[tuple[int, ...]]) -> list[jax.Array]:
    """Draw magnitudes of He-normal weights, whose scales differ from leaf to leaf."""
    keys = jax.random.split(jax.random.key(SEED), len(shapes))
    return [
        jnp.abs(jax.random.normal(key, shape)) * (2 / np.prod(shape[:-1])) ** 0.5
        for key, shape in zip(keys, shapes, strict=True)
    ]


def flatten(leaves: list[Any]) -> np.ndarray:
    """Concatenate leaves in NumPy."""
    return np.concatenate([np.asarray(leaf).reshape(-1) for leaf in leaves])


def stable_mask(flat: np.ndarray, keep: int) -> np.ndarray:
    """Make the mask that is right by definition: of equals the first are kept."""
    cut = np.partition(flat, flat.size - keep)[flat.size - keep]
    mask = flat > cut
    ties = np.flatnonzero(flat == cut)
    mask[ties[: keep - int(mask.sum())]] = True
    return mask


def _above(leaves: list[jax.Array], threshold: jax.Array) -> list[jax.Array]:
    return [leaf >= threshold for leaf in leaves]


def _join(leaves: list[jax.Array]) -> jax.Array:
    return jnp.concatenate([leaf.reshape(-1) for leaf in leaves])


def _by_sort(leaves: list[jax.Array], keep: int) -> list[jax.Array]:
    return _above(leaves, jnp.sort(_join(leaves))[-keep])


def _by_top_k(leaves: list[jax.Array], keep: int) -> list[jax.Array]:
    return _above(leaves, jax.lax.top_k(_join(leaves), keep)[0][-1])


def _by_argsort(leaves: list[jax.Array], keep: int) -> jax.Array:
    """Rank all weights and scatter ones, as jaxpruner does; exact, also under ties."""
    flat = _join(leaves)
    order = jnp.argsort(-flat, stable=True)
    return jnp.zeros(flat.shape, bool).at[order[:keep]].set(True)


JAX_PEERS = {
    "jnp.sort": _by_sort,
    "jax.lax.top_k": _by_top_k,
    "jnp.argsort (as jaxpruner)": _by_argsort,
}


def _torch_sides(host: list[np.ndarray], keep: int, kept: list[int]) -> dict[str, Side]:
    """Return torch's ways: its own pruning, and a threshold by `kthvalue`."""
    if torch is None:
        return {}
    tensors = [torch.from_numpy(leaf.copy()) for leaf in host]

    def modules() -> list[Any]:
        layers = [torch.nn.Module() for _ in tensors]
        for layer, tensor in zip(layers, tensors, strict=True):
            layer.register_parameter("weight", torch.nn.Parameter(tensor))
        return layers

    def masks(layers: list[Any]) -> list[Any]:
        return [dict(layer.named_buffers())["weight_mask"].bool() for layer in layers]

    def by_kthvalue() -> Any:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        threshold = flat.kthvalue(flat.numel() - keep + 1).values
        return [tensor >= threshold for tensor in tensors]

    def by_global_unstructured() -> Any:
        layers = modules()
        amount = sum(tensor.numel() for tensor in tensors) - keep
        parameters = [(layer, "weight") for layer in layers]
        torch_prune.global_unstructured(parameters, torch_prune.L1Unstructured, amount=amount)
        return masks(layers)

    def by_layer() -> Any:
        layers = modules()
        for layer, tensor, count in zip(layers, tensors, kept, strict=True):
            torch_prune.l1_unstructured(layer, "weight", amount=tensor.numel() - count)
        return masks(layers)

    return {
        "torch.kthvalue": by_kthvalue,
        "torch prune.global_unstructured": by_global_unstructured,
        "torch prune.l1_unstructured by layer": by_layer,
    }


def _sides(scores: list[jax.Array], keep: int, sparsity: float) -> dict[str, Side]:
    """Return jopt's two ways as a user calls them, and the other ways in JAX and NumPy."""
    tree = dict(enumerate(scores))
    host = [np.asarray(leaf) for leaf in scores]
    threshold = jnp.asarray(np.partition(flatten(host), -keep)[-keep])
    write = jax.jit(_above)
    whole = jax.jit(lambda tree: prune.global_topk_masks(tree, sparsity))
    each = jax.jit(lambda tree: prune.topk_masks(tree, sparsity))

    counted = jax.jit(lambda leaves: _threshold._by_counting(jnp.int32(keep), *leaves))
    flats = [leaf.reshape(-1) for leaf in scores]

    def by_partition() -> Any:
        flat = flatten(host)
        cut = np.partition(flat, flat.size - keep)[flat.size - keep]
        return [leaf >= cut for leaf in host]

    return {
        OURS: lambda: list(whole(tree).values()),
        BY_LAYER: lambda: list(each(tree).values()),
        **({} if _natively.problem() else {COUNTED: lambda: counted(flats)}),
        "mask only, threshold given": lambda: write(scores, threshold),
        "numpy.partition": by_partition,
        **{
            name: partial(jax.jit(function, static_argnums=1), scores, keep)
            for name, function in JAX_PEERS.items()
        },
    }


def _repeats(name: str, rounds: int) -> int:
    """Return how often a side has its turn: those that take seconds less often."""
    if name in JAX_PEERS:
        return 1
    return min(rounds, 3) if name.startswith("torch prune") else rounds


def _turns(sides: dict[str, Side], rounds: int) -> dict[str, list[float]]:
    """Time the sides in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name, side in sides.items():
            if turn < _repeats(name, rounds):
                seconds[name].append(_timing.timed(side))
    return seconds


def _checked(sides: dict[str, Side], whole: np.ndarray, each: np.ndarray) -> dict[str, bool]:
    """Say of each side whether its mask is that of a stable sort; this warms it up, too."""
    exact = {}
    for name, side in sides.items():
        masks = side()
        found = flatten(masks if isinstance(masks, list) else [masks])
        exact[name] = bool(np.array_equal(found, each if "by layer" in name else whole))
    for name in (OURS, BY_LAYER, COUNTED):
        if not exact.get(name, True):
            raise SystemExit(f"the masks of {name} differ from those of a stable sort.")
    return exact


def _other_data(scores: list[jax.Array], rounds: int) -> dict[str, float]:
    """Say how much our time depends on the data, in seconds."""
    size = sum(leaf.size for leaf in scores)
    drawn = [jax.random.uniform(jax.random.key(1), leaf.shape) for leaf in scores]
    zeroed = [jnp.where(u < 0.9, 0, leaf) for u, leaf in zip(drawn, scores, strict=True)]
    cases = {
        "dense, half kept": (scores, 0.5),
        "90 % zeros, 5 % kept": (zeroed, 0.05),
        "90 % zeros, half kept": (zeroed, 0.5),
        "constant, half kept": ([jnp.ones_like(leaf) for leaf in scores], 0.5),
    }
    sides: dict[str, Side] = {
        name: partial(keep_largest_global, leaves, jnp.int32(fraction * size))
        for name, (leaves, fraction) in cases.items()
    }
    for side in sides.values():
        jax.block_until_ready(side())
    return {name: float(np.median(t)) for name, t in _turns(sides, rounds).items()}


def _compile_seconds(leaves: list[jax.Array]) -> float:
    jax.clear_caches()
    start = time.perf_counter()
    keep_largest_global.lower(leaves, 1).compile()
    return time.perf_counter() - start


def _measured(shapes: list[tuple[int, ...]], rounds: int, sorts: bool) -> dict[str, Any]:
    scores = make_scores(shapes)
    sizes = [leaf.size for leaf in scores]
    size = sum(sizes)
    sparsity = 1 - KEPT
    keep = size - round(size * sparsity)
    kept = [n - round(n * sparsity) for n in sizes]
    compiled = _compile_seconds(scores)
    host = [np.asarray(leaf) for leaf in scores]
    sides = _sides(scores, keep, sparsity) | _torch_sides(host, keep, kept)
    if not sorts:  # minutes each
        sides = {name: side for name, side in sides.items() if name not in JAX_PEERS}
    pairs = zip(host, kept, strict=True)
    by_layer = flatten([stable_mask(leaf.reshape(-1), count) for leaf, count in pairs])
    exact = _checked(sides, stable_mask(flatten(host), keep), by_layer)
    seconds = _turns(sides, rounds)
    rows = {
        name: {
            "median_s": float(np.median(times)),
            "min_s": min(times),
            "repeats": len(times),
            "exact": exact[name],
        }
        for name, times in seconds.items()
    }
    return {
        "weights": size,
        "kept": keep,
        "leaves": len(scores),
        "compile_s": compiled,
        "rows": rows,
        "times_faster": {
            name: row["median_s"] / rows[BY_LAYER if "by layer" in name else OURS]["median_s"]
            for name, row in rows.items()
            if name not in (OURS, BY_LAYER)
        },
    }


def _targets(words: str, figures: dict[str, Any]) -> list[dict[str, Any]]:
    rows, faster = figures["rows"], figures["times_faster"]
    found = [
        target(f"{words}, {name}: as a stable sort", float(rows[name]["exact"]), 1, "higher")
        for name in (OURS, BY_LAYER)
    ]
    for peer, goal in GLOBAL_PEERS.items():
        if peer in faster:
            found.append(target(f"{words}: times faster than {peer}", faster[peer], goal, "higher"))
    return found


def rows(smoke: bool, rounds: int) -> dict[str, Any]:
    """Make masks of 25 and 110 million weights; the sorts run once, and on the first only."""
    nets = {
        "25 million weights": resnet50_shapes(),
        "110 million weights": bert_base_shapes(),
    }
    if smoke:
        nets = {"smoke": [(3, 3, 16, 16), (64, 100), (7, 1)]}
    # The kernel is compiled here, if it is not there: no network's time has that in it.
    figures: dict[str, Any] = {"kernel": _natively.problem() or "native"}
    targets = []
    for words, shapes in nets.items():
        print(f"masks of {words} ...", flush=True)
        figures[words] = _measured(shapes, rounds, sorts=words != "110 million weights")
        targets += _targets(f"mask of {words}", figures[words])
    first = next(iter(nets.values()))
    figures["other_data_s"] = _other_data(make_scores(first), rounds)
    return figures | {"targets": targets}
