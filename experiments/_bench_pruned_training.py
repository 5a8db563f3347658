"""Training with masks held against training without, and against torch with its own pruning."""

from typing import Any

import numpy as np

from experiments import bench_train
from experiments._results import target

SLOWER = 1.05


def rows(smoke: bool, rounds: int) -> dict[str, Any]:
    """Train LeNet-5 in batches of 128: steps a second of each side, and their ratios."""
    steps = 1 if smoke else 10
    count = steps * bench_train.BATCH
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 28, 28, 1), dtype=np.uint8)
    labels = rng.integers(0, 10, count, dtype=np.int32)
    names = ("jopt_scan", "jopt_masks_held", "jax_plain_dispatch")
    contest = bench_train.our_sides("lenet5", images, labels)
    if bench_train.torch is not None:
        contest |= bench_train.torch_sides("lenet5", images, labels)
        names += (*bench_train.PEERS_IN_TORCH, "torch_eager", "torch_eager_prune")
    if smoke:
        names = ("jopt_scan", "jopt_masks_held", *bench_train.PEERS_IN_TORCH)
    contest = {name: side for name, side in contest.items() if name in names}
    times = bench_train.measure(contest, rounds)
    figures: dict[str, Any] = bench_train.figures_of("lenet5", times, steps)
    held = figures["lenet5/time_with_masks_held_over_without"]
    targets = [
        target("LeNet-5: time of a step with masks held over one without", held, SLOWER, "lower")
    ]
    over = figures.get("lenet5/jopt_masks_held/over_torch_eager_prune")
    if over is not None:
        words = "LeNet-5 with masks held: steps a second over torch eager with torch.nn.utils.prune"
        targets.append(target(words, over, 1.0, "higher"))
    return figures | {"targets": targets}
