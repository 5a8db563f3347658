"""Experiments of several parts: one command line, one results file, each part measured by itself.

Every part has its own entry in `data`, `settings`, `figures` and `runs` (the command, versions and
hardware that made it) of the results, so that a part is measured again without losing the others.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console

from experiments import _data, _results, _train

Part = Callable[..., dict[str, Any]]
# A part is called with `dataset` (or None for its own), `head` (its data sets' length in a trial,
# else None), `seeds`, `work` (folder of checkpoints), `plot` (tag to file stem) and `console`; it
# returns tag, data, settings, figures and targets. One that `goes_on` is also called with `found`:
# from a tag to the part's settings and figures in the results that there are, for the seeds that
# need not be measured again.
TRIAL = 512  # examples of each part of a data set, in a trial


def goes_on(part: Part) -> Part:
    """Mark a part that takes the seeds over which its results hold already."""
    part.goes_on = True  # pyright: ignore[reportFunctionMemberAccess]
    return part


def joined(old: dict[str, Any], experiment: str, name: str, made: dict[str, Any]) -> dict[str, Any]:
    """Put the results of one part in the place of what was there of it."""
    about = {"command": _results.command(f"experiments.{experiment}")}
    about |= _results.environment(("constriction", "tensorflow-datasets"))
    words = f"{name}: "
    targets = [each for each in old.get("targets", []) if not each["target"].startswith(words)]
    targets += [each | {"target": words + each["target"]} for each in made["targets"]]
    results = about | {"runs": old.get("runs", {}) | {name: about}}
    for entry in ("data", "settings", "figures"):
        results[entry] = old.get(entry, {}) | {name: made[entry]}
    return results | {"targets": targets}


def main(
    experiment: str,
    parts: dict[str, Part],
    dataset_help: str,
    arguments: list[str] | None = None,
    paths: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Run the command line of an experiment.

    Args:
      experiment: name of its module and of its results.
      parts: its parts by name, in the order in which they run.
      dataset_help: what `--dataset` takes.
      arguments: of the command line; None for the program's own.
      paths: further options that take a path, by name, with their help; the parts are called with
        them, or with None.
    """
    parser = argparse.ArgumentParser(prog=f"python -m experiments.{experiment}")
    parser.add_argument("--only", choices=sorted(parts), nargs="+", help="some of the parts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--dataset", help=dataset_help)
    parser.add_argument("--smoke", action="store_true", help="an epoch of a few images")
    parser.add_argument("--restart", action="store_true", help="forget finished epochs")
    parser.add_argument("--out", type=Path, default=_results.RESULTS, help="where results go")
    for name, words in paths.items():
        parser.add_argument(f"--{name}", type=Path, metavar="PATH", help=words)
    options = parser.parse_args(arguments)
    console = Console(highlight=False)
    out, seeds = options.out, tuple(options.seeds)
    if options.smoke:
        out = _data.CACHE / "smoke" if out == _results.RESULTS else out
        seeds = seeds[:1]
    for name in options.only or parts:
        work = _data.CACHE / experiment / f"{name}{'-smoke' if options.smoke else ''}"
        if options.restart:
            shutil.rmtree(work, ignore_errors=True)

        def found(tag: str, name: str = name) -> dict[str, Any]:
            if options.restart or options.smoke:
                return {}
            old = read(out, title(experiment, tag))
            return {entry: old.get(entry, {}).get(name) for entry in ("settings", "figures")}

        more: dict[str, Any] = {path: getattr(options, path) for path in paths}
        more |= {"found": found} if hasattr(parts[name], "goes_on") else {}
        with _train.quick_compilation() if options.smoke else nullcontext():
            made = parts[name](
                dataset=options.dataset,
                head=TRIAL if options.smoke else None,
                seeds=seeds,
                work=work,
                plot=lambda tag, name=name: out / f"{title(experiment, tag)}-{name}",
                console=console,
                **more,
            )
        stem = title(experiment, made["tag"])
        file = _results.write_results(stem, joined(read(out, stem), experiment, name, made), out)
        console.print(f"Results: {file}")
        if options.smoke:
            shutil.rmtree(work, ignore_errors=True)


def read(out: Path, stem: str) -> dict[str, Any]:
    """Return the results that there are, or nothing."""
    file = out / f"{stem}.json"
    return json.loads(file.read_text()) if file.exists() else {}


def title(experiment: str, tag: str) -> str:
    """Name the results so that trials and other data never overwrite those of the full sets."""
    return f"{experiment}-{tag}" if tag else experiment
