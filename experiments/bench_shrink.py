"""Shrink networks that people use, prove that nothing else changed, and time what is left.

    python -m experiments.bench_shrink            # a few minutes on two cores
    python -m experiments.bench_shrink --smoke

LeNet-5, a ResNet-20, EfficientNet-Lite0 and a BERT encoder of MiniLM's size, with random weights:
the question here is structure and speed, not accuracy. The groups of coupled axes are found in the
program of the forward pass, the half of every group with the smallest magnitudes is masked, and the
masks are shrunk away. Recorded are the parameters and multiply-adds before and after, the largest
difference between the outputs of the masked and of the shrunk network, and both times, in turns.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import _bert, _convolution, _models, _networks, _results, _timing
from jopt import prune

Tree = Any


def _images(batch: int, size: int, channels: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (batch, size, size, channels))


def _linen(model: Any, x: jax.Array) -> tuple[Callable[..., Any], Tree, jax.Array]:
    variables = jax.jit(model.init)(jax.random.key(0), x)

    @jax.jit
    def scattered(variables: Tree) -> Tree:
        """Give norms scales and averages of their own, so that their units differ."""
        leaves, treedef = jax.tree.flatten(variables)
        keys = jax.random.split(jax.random.key(2), len(leaves))
        moved = [
            leaf + 0.1 * jax.random.uniform(key, leaf.shape) if leaf.ndim == 1 else leaf
            for leaf, key in zip(leaves, keys, strict=True)
        ]
        return jax.tree.unflatten(treedef, moved)

    return (lambda variables, x: model.apply(variables, x)), scattered(variables), x


def networks(smoke: bool) -> dict[str, Callable[[], Any]]:
    """Return what makes each network: `(apply, variables, batch)`."""
    lenet = _models.LeNet5(conv_pool=_convolution.conv_pool_direct)
    small: dict[str, Callable[[], Any]] = {
        "LeNet-5, batch 64": lambda: _linen(lenet, _images(64, 28, 1)),
    }
    if smoke:
        return small
    bert = jax.random.randint(jax.random.key(1), (4, 64), 0, 30522)
    return small | {
        "ResNet-20, batch 16": lambda: _linen(_networks.ResNet(), _images(16, 32, 3)),
        "EfficientNet-Lite0, one image": lambda: _linen(
            _networks.EfficientNetLite0(), _images(1, 224, 3)
        ),
        "BERT encoder, 4 x 64 tokens": lambda: _linen(_bert.BertEncoder(), bert),
    }


def _size(tree: Tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def measure(apply: Callable[..., Any], variables: Tree, x: jax.Array, repeats: int) -> Any:
    """Shrink one network to half of the units of every group."""
    groups = prune.find_groups(apply, variables, x)
    scores = prune.unit_scores(groups, prune.magnitude_scores(variables))
    keep = prune.topk_masks(scores, 0.5, ".*")
    masks = prune.unit_masks(groups, variables, keep)
    shrunk = prune.shrink(apply, variables, masks, x)
    masked = prune.apply_masks(variables, masks)
    dense = jax.jit(apply)
    one, other = np.asarray(dense(masked, x)), np.asarray(shrunk.apply(shrunk.params, x))
    rows = _timing.interleaved(
        {
            "dense": lambda: dense(variables, x),
            "shrunk": lambda: shrunk.apply(shrunk.params, x),
        },
        repeats,
    )
    counts = [
        prune.multiply_adds(function, tree, x).total
        for function, tree in ((apply, variables), (shrunk.apply, shrunk.params))
    ]
    return {
        "groups": len(groups.groups),
        "parameters": [_size(variables), _size(shrunk.params)],
        "multiply_adds": counts,
        "largest_output": float(np.abs(one).max()),
        "largest_difference": float(np.abs(one - other).max()),
        "dense_ms": round(1e3 * rows["dense"]["median_s"], 3),
        "shrunk_ms": round(1e3 * rows["shrunk"]["median_s"], 3),
        "fewer_multiply_adds": round(counts[0] / counts[1], 3),
        "faster": round(rows["dense"]["median_s"] / rows["shrunk"]["median_s"], 3),
    }


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bench_shrink")
    parser.add_argument("--smoke", action="store_true", help="LeNet-5 alone, a few calls")
    parser.add_argument("--repeats", type=int, default=21, help="calls of each side")
    parser.add_argument("--out", type=Path, default=_results.RESULTS, help="where results go")
    options = parser.parse_args(arguments)
    figures = {}
    for name, make in networks(options.smoke).items():
        apply, variables, x = make()
        repeats = 2 if options.smoke else options.repeats
        row = figures[name] = measure(apply, variables, x, repeats)
        print(
            f"{name}: {row['groups']} groups, parameters {row['parameters'][0]:,} -> "
            f"{row['parameters'][1]:,}, {row['fewer_multiply_adds']:.2f}x fewer multiply-adds, "
            f"{row['dense_ms']:.2f} -> {row['shrunk_ms']:.2f} ms ({row['faster']:.2f}x), "
            f"outputs differ by {row['largest_difference']:.1e} of {row['largest_output']:.1f}"
        )
    results = {
        "command": _results.command("experiments.bench_shrink"),
        **_results.environment(),
        "data": "random weights and inputs: only structure and times are compared",
        "settings": {"repeats": options.repeats, "units_removed": 0.5},
        "figures": figures,
        "targets": [],
    }
    name = "bench_shrink-smoke" if options.smoke else "bench_shrink"
    print(f"Results: {_results.write_results(name, results, options.out)}")


if __name__ == "__main__":
    main()
