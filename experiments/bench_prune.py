"""Time pruning against the libraries that people use for it.

    python -m experiments.bench_prune                  # everything, about ten minutes on two cores
    python -m experiments.bench_prune --only masks     # one part: masks, n_m or training
    python -m experiments.bench_prune --smoke

Three parts, all sides of each in one process, in turns, medians compared:

- masks: exactly 10 % of the weights of a ResNet-50 (25 million) and of a BERT-base (110 million)
  kept, over all layers and in each, against torch.nn.utils.prune, torch.kthvalue and sorts. Every
  mask is compared with that of a stable sort; the run fails if one of jopt's differs.
- n_m: 2:4 and 4:8 masks of a kernel of 1024 x 1024 along either axis, against a sort and `top_k` of
  every group.
- training: steps of LeNet-5 with masks held against steps without, and against torch in eager mode
  with torch.nn.utils.prune.

Without torch its rows are left out, with a word.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments import _bench_masks, _bench_n_m, _bench_pruned_training
from experiments._results import RESULTS, command, environment, write_results

PARTS: dict[str, Callable[[bool, int], dict[str, Any]]] = {
    "masks": _bench_masks.rows,
    "n_m": _bench_n_m.rows,
    "training": _bench_pruned_training.rows,
}


def main() -> None:
    """Run the parts and write experiments/results/bench_prune.json."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bench_prune")
    parser.add_argument("--only", choices=PARTS, help="run one part, keep the others' figures")
    parser.add_argument("--rounds", type=int, default=11, help="how often each side has its turn")
    parser.add_argument("--smoke", action="store_true", help="small, into a temporary folder")
    parser.add_argument("--results", type=Path, help="folder to write to")
    options = parser.parse_args()
    folder = options.results or (Path(tempfile.mkdtemp()) if options.smoke else RESULTS)
    file, figures = folder / "bench_prune.json", {}
    if options.only and file.exists():
        figures = json.loads(file.read_text())["figures"]
    if _bench_masks.torch is None:
        print("torch is not installed: its rows are absent.")
    for part in [options.only] if options.only else PARTS:
        figures[part] = PARTS[part](options.smoke, 1 if options.smoke else options.rounds)
        print(json.dumps({part: figures[part]}, indent=2))
    results = {
        "command": command("experiments.bench_prune"),
        **environment(("torch",)),
        "data": "weights and images drawn from the seed: only times and masks are compared",
        "settings": {
            "seed": _bench_masks.SEED,
            "kept": _bench_masks.KEPT,
            "rounds": options.rounds,
            "smoke": options.smoke,
            "torch": "absent" if _bench_masks.torch is None else "eager, float32",
        },
        "figures": figures,
        "targets": []
        if options.smoke
        else [each for part in figures.values() for each in part["targets"]],
    }
    for each in results["targets"]:
        print("met   " if each["met"] else "MISSED", each["target"], each["value"], each["goal"])
    print(write_results("bench_prune", results, folder))


if __name__ == "__main__":
    main()
