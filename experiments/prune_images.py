"""Prune image classifiers as far as they go: every part of the pruning experiment.

    python -m experiments.prune_images                       # all parts, three seeds
    python -m experiments.prune_images --only extreme        # one part; the others are left alone
    python -m experiments.prune_images --smoke               # a trial in a minute or two

Part `criteria` prunes LeNet-5 and a network with batch norms on Fashion-MNIST by every criterion,
to 80, 90, 95, 98 and 99 %: `experiments._prune_criteria`. Part `extreme` takes LeNet-5 to one of
280 weights and LeNet-300-100 to one of 68 on MNIST: `experiments._prune_extreme`. Part `channels`
removes channels until a fifth of the multiply-adds is left: `experiments._prune_channels`.

Choices are made on a validation part of the training images; the test images are looked at once, at
the end. Finished epochs are kept: a killed run goes on where it was, and `--restart` forgets them.
Each part has its own entry in `data`, `settings`, `figures` and `runs` (the command, versions and
hardware that made it) of the results, so that a part is measured again without losing the others.
"""

import argparse
import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import _data, _prune_channels, _prune_criteria, _prune_extreme, _results, _train

Part = Callable[..., dict[str, Any]]
# A part is called with its data sets' length in a trial (else None), seeds, folder of checkpoints,
# file stem of its plot and console; it returns tag, data, settings, figures and targets.
PARTS: dict[str, Part] = {
    "channels": _prune_channels.run,
    "criteria": _prune_criteria.run,
    "extreme": _prune_extreme.run,
}
TRIAL = 512  # images of each part of a data set, in a trial


def joined(old: dict[str, Any], name: str, made: dict[str, Any]) -> dict[str, Any]:
    """Put the results of one part in the place of what was there of it."""
    about = {"command": _results.command("experiments.prune_images")}
    about |= _results.environment(("constriction", "tensorflow-datasets"))
    words = f"{name}: "
    targets = [each for each in old.get("targets", []) if not each["target"].startswith(words)]
    targets += [each | {"target": words + each["target"]} for each in made["targets"]]
    results = about | {"runs": old.get("runs", {}) | {name: about}}
    for entry in ("data", "settings", "figures"):
        results[entry] = old.get(entry, {}) | {name: made[entry]}
    return results | {"targets": targets}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.prune_images")
    parser.add_argument("--only", choices=sorted(PARTS), nargs="+", help="some of the parts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--dataset", help="another 28 by 28 TFDS image set than the part's own")
    parser.add_argument("--smoke", action="store_true", help="an epoch of a few images")
    parser.add_argument("--restart", action="store_true", help="forget finished epochs")
    parser.add_argument("--out", type=Path, default=_results.RESULTS, help="where results go")
    options = parser.parse_args(arguments)
    console = Console(highlight=False)
    out, seeds = options.out, tuple(options.seeds)
    if options.smoke:
        out = _data.CACHE / "smoke" if out == _results.RESULTS else out
        seeds = seeds[:1]
    for name in options.only or PARTS:
        work = _data.CACHE / "prune_images" / f"{name}{'-smoke' if options.smoke else ''}"
        if options.restart:
            shutil.rmtree(work, ignore_errors=True)
        with _train.quick_compilation() if options.smoke else nullcontext():
            made = PARTS[name](
                dataset=options.dataset,
                head=TRIAL if options.smoke else None,
                seeds=seeds,
                work=work,
                plot=lambda tag, name=name: out / f"{title(tag)}-{name}",
                console=console,
            )
        file = out / f"{title(made['tag'])}.json"
        old = json.loads(file.read_text()) if file.exists() else {}
        _results.write_results(file.stem, joined(old, name, made), out)
        console.print(f"Results: {file}")
        if options.smoke:
            shutil.rmtree(work, ignore_errors=True)


def title(tag: str) -> str:
    """Name the results so that trials and other data never overwrite those of the full sets."""
    return f"prune_images-{tag}" if tag else "prune_images"


if __name__ == "__main__":
    main()
