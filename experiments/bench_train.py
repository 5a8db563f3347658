"""Training steps per second: our formulations, plain JAX and torch, on one machine at once.

    python -m experiments.bench_train [--smoke] [--rounds N]

LeNet-5 and LeNet-300-100, Adam, batches of 128. Every side keeps the images as bytes in memory and
gathers its own batches. The sides take turns, a few steps each, for many rounds, so that whatever
else the machine does falls on all of them; a ratio is the median over rounds of the two times of
one round. Torch may use as many threads as there are cores, or one: the ratio that counts is to
the better of the two. About 3 minutes on 2 cores; without torch its rows are left out.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments._convolution import conv_pool_direct
from experiments._models import LeNet5, LeNet300100
from experiments._results import RESULTS, command, cores, environment, target, write_results
from experiments._train import (
    dispatch_steps,
    epoch_order,
    make_step,
    random_shift,
    run_epoch,
    scan_steps,
    start,
    unchanged,
)
from jopt import prune

try:
    import torch  # pyright: ignore[reportMissingImports]
except ImportError:
    torch: Any = None

BATCH = 128
LEARNING_RATE = 1e-3
SPARSITY = 0.9
PEERS_IN_TORCH = ("torch_eager_1_thread", "torch_eager_prune_1_thread")
Side = Callable[[], Any]


def jax_side(
    model: nn.Module,
    params: Any,
    images: np.ndarray,
    labels: np.ndarray,
    loop: Callable = scan_steps,
    augment: Callable = unchanged,
    masked: bool = False,
) -> Side:
    """Return a function that trains for one pass over the examples and waits for the end."""
    examples, targets = jnp.asarray(images), jnp.asarray(labels)

    def loss(params, images, labels, key, extras):
        logits: Any = model.apply({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    tx = optax.adam(LEARNING_RATE)
    if masked:
        masks = prune.topk_masks(prune.magnitude_scores(params), SPARSITY)
        params = prune.apply_masks(params, masks)
        tx = optax.chain(tx, prune.keep_masked(masks))
    step = make_step(loss, tx, augment=augment)
    carry = start(params, tx, jax.random.key(1))
    order = epoch_order(jax.random.key(2), len(labels), BATCH)

    def side() -> None:
        nonlocal carry
        carry, losses = run_epoch(step, carry, examples, targets, order, loop=loop)
        losses.block_until_ready()

    return side


def _torch_lenet5() -> Any:
    layers = torch.nn
    return layers.Sequential(
        *(layers.Conv2d(1, 20, 5), layers.ReLU(), layers.MaxPool2d(2)),
        *(layers.Conv2d(20, 50, 5), layers.ReLU(), layers.MaxPool2d(2), layers.Flatten()),
        *(layers.Linear(800, 500), layers.ReLU(), layers.Linear(500, 10)),
    )


def _torch_lenet300100() -> Any:
    layers = torch.nn
    return layers.Sequential(
        *(layers.Flatten(), layers.Linear(784, 300), layers.ReLU()),
        *(layers.Linear(300, 100), layers.ReLU(), layers.Linear(100, 10)),
    )


def torch_side(
    network: Any, images: np.ndarray, labels: np.ndarray, threads: int, masked: bool = False
) -> Side:
    """Return the same for a torch network in eager mode, pruned with torch's own hooks or not."""
    from torch.nn.utils import prune as torch_prune  # pyright: ignore[reportMissingImports]

    if masked:
        for layer in network:
            if hasattr(layer, "weight"):
                torch_prune.l1_unstructured(layer, "weight", amount=SPARSITY)
    optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE)
    examples = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    targets = torch.from_numpy(labels.astype(np.int64))
    steps = len(labels) // BATCH
    order = torch.from_numpy(np.random.default_rng(2).permutation(len(labels)))

    def side() -> None:
        torch.set_num_threads(threads)
        for index in order[: steps * BATCH].reshape(steps, BATCH):
            optimizer.zero_grad()
            logits = network(examples[index].float() / 255)
            torch.nn.functional.cross_entropy(logits, targets[index]).backward()
            optimizer.step()

    return side


def our_sides(name: str, images: np.ndarray, labels: np.ndarray) -> dict[str, Side]:
    """Return all the sides of one network that run in JAX, by name."""
    model = LeNet5() if name == "lenet5" else LeNet300100()
    plain = LeNet5(conv_pool=conv_pool_direct) if name == "lenet5" else model
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *images.shape[1:])))["params"]
    ours = partial(jax_side, model, params, images, labels)
    return {
        "jopt_scan": ours(),
        "jopt_masks_held": ours(masked=True),
        "jax_plain_dispatch": jax_side(plain, params, images, labels, loop=dispatch_steps),
        "jopt_dispatch": ours(loop=dispatch_steps),
        "jopt_random_shift": ours(augment=partial(random_shift, max_shift=2)),
    }


def torch_sides(name: str, images: np.ndarray, labels: np.ndarray) -> dict[str, Side]:
    """Return all the sides of one network that run in torch, by name."""
    build = _torch_lenet5 if name == "lenet5" else _torch_lenet300100
    result = {}
    for threads, suffix in ((cores(), ""), (1, "_1_thread")):
        result[f"torch_eager{suffix}"] = torch_side(build(), images, labels, threads)
        result[f"torch_eager_prune{suffix}"] = torch_side(build(), images, labels, threads, True)
    return result


def measure(contest: dict[str, Side], rounds: int) -> dict[str, list[float]]:
    """Return the seconds that each side took in each round, all warm."""
    for side in contest.values():
        side()
    times: dict[str, list[float]] = {name: [] for name in contest}
    for _ in range(rounds):
        for name, side in contest.items():
            begin = time.perf_counter()
            side()
            times[name].append(time.perf_counter() - begin)
    return times


def ratio(times: dict[str, list[float]], side: str, peers: list[str]) -> float:
    """Return how many times faster a side is than the best of its peers, median over rounds."""
    best = min(peers, key=lambda peer: statistics.median(times[peer]))
    return statistics.median(
        other / own for other, own in zip(times[best], times[side], strict=True)
    )


def figures_of(name: str, times: dict[str, list[float]], steps: int) -> dict[str, float]:
    """Return steps per second of each side and its ratios, named `<network>/<side>/<what>`."""
    figures = {}
    for side, seconds in times.items():
        row = f"{name}/{side}/"
        figures[row + "steps_per_second"] = steps / statistics.median(seconds)
        figures[row + "best_steps_per_second"] = steps / min(seconds)
        for peer in ("jax_plain_dispatch", "torch_eager", "torch_eager_prune"):
            peers = [other for other in times if other in (peer, f"{peer}_1_thread")]
            if peers:
                figures[f"{row}over_{peer}"] = ratio(times, side, peers)
    held_over_free = 1 / ratio(times, "jopt_masks_held", ["jopt_scan"])
    return figures | {f"{name}/time_with_masks_held_over_without": held_over_free}


def targets_of(name: str, figures: dict[str, float]) -> list[dict[str, Any]]:
    """Return the targets of one network, as far as this machine has the peers."""
    if torch is None:
        return []
    return [
        target(
            f"{name}: training steps per second over torch eager",
            *(figures[f"{name}/jopt_scan/over_torch_eager"], 1.0, "higher"),
        ),
        target(
            f"{name}: with masks held, over torch eager with torch.nn.utils.prune",
            *(figures[f"{name}/jopt_masks_held/over_torch_eager_prune"], 1.0, "higher"),
        ),
    ]


def print_table(name: str, times: dict[str, list[float]], figures: dict[str, float]) -> None:
    """Print one network's sides, fastest first."""
    print(f"\n{name:32}{'steps/s':>10}{'best':>10}{'x torch':>10}{'x plain jax':>13}")
    for side in sorted(times, key=lambda side: statistics.median(times[side])):
        row = f"{name}/{side}/"
        over_torch = figures.get(row + "over_torch_eager")
        print(
            f"  {side:30}{figures[row + 'steps_per_second']:10.1f}"
            f"{figures[row + 'best_steps_per_second']:10.1f}"
            f"{'-' if over_torch is None else format(over_torch, '.2f'):>10}"
            f"{figures[row + 'over_jax_plain_dispatch']:13.2f}"
        )


def run(name: str, steps: int, rounds: int, smoke: bool) -> dict[str, float]:
    """Measure one network, print its table and return its figures."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (steps * BATCH, 28, 28, 1), dtype=np.uint8)
    labels = rng.integers(0, 10, steps * BATCH, dtype=np.int32)
    contest = our_sides(name, images, labels)
    if torch is not None:
        contest |= torch_sides(name, images, labels)
    if smoke:
        kept = ("jopt_scan", "jopt_masks_held", "jax_plain_dispatch", *PEERS_IN_TORCH)
        contest = {side: contest[side] for side in kept if side in contest}
    times = measure(contest, rounds)
    figures = figures_of(name, times, steps)
    print_table(name, times, figures)
    return figures


def main() -> None:
    """Run both networks and write the results."""
    parser = argparse.ArgumentParser(description="Compare training steps per second.")
    parser.add_argument("--smoke", action="store_true", help="a step each, to a temporary folder")
    parser.add_argument("--rounds", type=int, default=15, help="how often each side has its turn")
    parser.add_argument("--results", type=Path, help="folder to write to")
    arguments = parser.parse_args()
    smoke = arguments.smoke
    folder = arguments.results or (Path(tempfile.mkdtemp()) if smoke else RESULTS)
    rounds = 1 if smoke else arguments.rounds
    steps = {"lenet5": 1, "lenet_300_100": 1} if smoke else {"lenet5": 10, "lenet_300_100": 40}
    if torch is None:
        print("torch is not installed: its rows are absent.")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    figures = {}
    for name in steps:
        figures |= run(name, steps[name], rounds, smoke)
    targets = [entry for name in steps for entry in targets_of(name, figures)]
    results = {
        "command": command("experiments.bench_train"),
        **environment(("torch",)),
        "data": "random bytes in MNIST's shape, random labels: only times are measured",
        "settings": {
            "batch": BATCH,
            "steps_a_turn": steps,
            "rounds": rounds,
            "seeds": {"data": 0, "params": 0, "steps": 1, "order": 2},
            "optimizer": f"adam({LEARNING_RATE})",
            "sparsity_of_masked_sides": SPARSITY,
            "load_average_at_start": load,
            "torch": "absent" if torch is None else "eager, float32",
        },
        "figures": figures,
        "targets": targets,
    }
    path = write_results("bench_train", results, folder)
    for entry in targets:
        print(f"{'met   ' if entry['met'] else 'MISSED'} {entry['target']}: {entry['value']:.2f}")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
