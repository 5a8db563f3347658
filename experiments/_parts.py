"""Experiments of several parts: one command line, one results file, each part measured by itself.

Every part has its own entry in `data`, `settings`, `figures` and `runs` (the command, versions and
hardware that made it) of the results, so that a part is measured again without losing the others,
and with more seeds without measuring those again that there are.
"""

import argparse
import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console

from experiments import _data, _results, _train

TRIAL = 512  # examples of each part of a data set, in a trial


@dataclasses.dataclass(frozen=True)
class Held:
    """What results hold of a part that was measured with the same settings.

    Attributes:
      seeds: over which they hold; empty if there are none.
      figures: of the part.
    """

    seeds: tuple[int, ...] = ()
    figures: Any = None

    def rows(self, seed: int, listed: tuple[str, ...], rows: Any = None) -> list[dict[str, Any]]:
        """Return the rows of a seed, or none.

        Args:
          seed: any.
          listed: entries of rows that are lists over the seeds.
          rows: of the figures, as joined; those named rows if not given.
        """
        if seed not in self.seeds:
            return []
        rows = self.figures["rows"] if rows is None else rows
        return _results.rows_of_seed(rows, listed, self.seeds.index(seed))

    def facts(self, seed: int) -> dict[str, Any]:
        """Return the figures beside the rows, if they are of this seed: of the first only."""
        if self.seeds[:1] != (seed,):
            return {}
        return {name: each for name, each in self.figures.items() if name != "rows"}


@dataclasses.dataclass(frozen=True)
class Call:
    """What a part is called with.

    Attributes:
      experiment: that it belongs to.
      name: of the part.
      dataset: None for its own.
      head: the length that its data sets are cut to in a trial, else None.
      seeds: to measure.
      work: folder of checkpoints.
      out: folder of results.
      console: to print to.
      restart: whether what is finished is forgotten.
      paths: further options of the command line, or None for each.
    """

    experiment: str
    name: str
    dataset: str | None
    head: int | None
    seeds: tuple[int, ...]
    work: Path
    out: Path
    console: Console
    restart: bool = False
    paths: Mapping[str, Path | None] = dataclasses.field(default_factory=dict)

    def plot(self, tag: str) -> Path:
        """Return the file of the part's plot, without what it ends in."""
        return self.out / f"{title(self.experiment, tag)}-{self.name}"

    def cut(self, data: Any) -> Any:
        """Return a data set, of a trial only its first examples."""
        return data if self.head is None else _data.head(data, self.head)

    def shared(self, name: str) -> Path:
        """Return a folder of checkpoints that several parts share."""
        return self.work.with_name(self.work.name.replace(self.name, name))

    def held(self, tag: str, settings: dict[str, Any], growing: Sequence[str] = ()) -> Held:
        """Return what results hold, so that a seed is not measured twice.

        Args:
          tag: of the results.
          settings: as they are written; those of results must be the same but for the seeds.
          growing: entries of the settings that describe rows by name, and may have more or fewer
            of them; those in both must be the same.
        """
        if self.restart or self.head is not None:
            return Held()
        old = read(self.out, title(self.experiment, tag))
        was = old.get("settings", {}).get(self.name)
        if was is None:
            return Held()
        old_settings, new_settings = map(_without_seeds, (was, settings))
        pairs = [(old_settings.pop(name, {}), new_settings.pop(name, {})) for name in growing]
        agree = all(one[row] == two[row] for one, two in pairs for row in one if row in two)
        if old_settings != new_settings or not agree:
            return Held()
        return Held(tuple(_seeds(was)), old["figures"][self.name])


# A part returns its tag, data, settings, figures and targets.
Part = Callable[[Call], dict[str, Any]]


def _without_seeds(settings: Any) -> Any:
    """Leave the seeds out, and make settings what they are when they are read back."""
    return json.loads(json.dumps(settings), object_hook=lambda each: each | {"seeds": None})


def _seeds(settings: dict[str, Any]) -> list[int]:
    """Return the seeds in settings, or in those of what they contain."""
    if "seeds" in settings:
        return settings["seeds"]
    found = [_seeds(each) for each in settings.values() if isinstance(each, dict)]
    return next(filter(None, found), [])


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
      paths: further options that take a path, by name, with their help.
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

        call = Call(
            experiment=experiment,
            name=name,
            dataset=options.dataset,
            head=TRIAL if options.smoke else None,
            seeds=seeds,
            work=work,
            out=out,
            console=console,
            restart=options.restart,
            paths={path: getattr(options, path) for path in paths},
        )
        with _train.quick_compilation() if options.smoke else nullcontext():
            made = parts[name](call)
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
