"""MiniLM, fine-tuned to tell good sentences from bad ones, made smaller.

    python -m experiments.sentiment                          # three seeds: most of a day
    python -m experiments.sentiment --seeds 0
    python -m experiments.sentiment --checkpoint DIR         # another BERT, as Hugging Face has it
    python -m experiments.sentiment --smoke                  # a trial in a minute

Part `after` quantizes and prunes it after training: `experiments._sentiment_after`. Part `trained`
trains on while weights go, and removes heads and layers: `experiments._sentiment_trained`. Part
`students` teaches three layers, and packs them: `experiments._sentiment_students`. All networks are
scored as their files give them back. Choices are made on validation sentences; the test sentences,
of other films, are looked at once. Finished trainings and rows are kept: a killed run goes on where
it was.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import (
    _data,
    _parts,
    _results,
    _sentences,
    _sentiment_after,
    _sentiment_network,
    _sentiment_report,
    _sentiment_students,
    _sentiment_taught,
    _sentiment_trained,
)


def start(
    dataset: str | None,
    head: int | None,
    seeds: tuple[int, ...],
    work: Path,
    console: Console,
    checkpoint: Path | None,
) -> tuple[_sentiment_network.Run, str]:
    """Load what all parts share, whose networks lie in one folder; also return the results' tag."""
    texts, folder, tag = _sentences.start(dataset, head, checkpoint, console.print)
    settings = _sentiment_network.Settings(dataset=texts.name, seeds=seeds)
    if head is not None:
        settings = dataclasses.replace(
            settings, length=12, batch=16, epochs=1, calibration=16, calibration_length=7
        )
    shared = work.with_name("networks" + ("-smoke" if head is not None else ""))
    try:
        return _sentiment_network.Run(settings, texts, folder, shared, console.print), tag
    except (_data.DataUnavailable, ValueError) as problem:
        raise SystemExit(str(problem)) from None


def after(
    dataset: str | None,
    head: int | None,
    seeds: tuple[int, ...],
    work: Path,
    plot: Callable[[str], Path],
    console: Console,
    checkpoint: Path | None = None,
) -> dict[str, Any]:
    """Run or resume the part; returns its tag, data, settings, figures and targets."""
    del plot
    run, tag = start(dataset, head, seeds, work, console, checkpoint)
    measured = [_sentiment_after.measure(run, seed, 3 if head else 20) for seed in seeds]
    targets = _sentiment_after.targets_of
    return results(run, tag, measured, _sentiment_after.LISTED, targets, {}, console)


def taught(
    name: str,
    how: Any,
    kind: type[_sentiment_taught.Taught],
    more: Callable[[], dict[str, Any]] = dict,
) -> _parts.Part:
    """Make the part of the experiment whose networks learn from the fine-tuned one.

    Args:
      name: of the part.
      how: the module that has its `Settings`, `smoke`, `LISTED` and `targets_of`.
      kind: what trains and measures the networks of a seed.
      more: returns further settings that are written down.
    """

    def part(
        dataset: str | None,
        head: int | None,
        seeds: tuple[int, ...],
        work: Path,
        plot: Callable[[str], Path],
        console: Console,
        checkpoint: Path | None = None,
    ) -> dict[str, Any]:
        del plot
        run, tag = start(dataset, head, seeds, work, console, checkpoint)
        settings, lessons = how.Settings(), lessons_of(head)
        settings = settings if head is None else how.smoke(settings)
        repeats = 3 if head else 20
        measured = [kind(run, lessons, settings, seed).measure(repeats) for seed in seeds]
        written = {"lessons": dataclasses.asdict(lessons), name: dataclasses.asdict(settings)}
        return results(run, tag, measured, how.LISTED, how.targets_of, written | more(), console)

    return part


def lessons_of(head: int | None) -> _sentiment_taught.Lessons:
    """Return what the teacher says, less of it in a trial."""
    whole = _sentiment_taught.Lessons()
    return whole if head is None else dataclasses.replace(whole, copies=2, spliced=1)


def results(
    run: _sentiment_network.Run,
    tag: str,
    measured: list[tuple[list[dict[str, Any]], _sentiment_network.Latencies]],
    listed: tuple[str, ...],
    targets_of: Callable[[list[dict[str, Any]]], list[dict[str, Any]]],
    settings: dict[str, Any],
    console: Console,
) -> dict[str, Any]:
    """Join what the seeds measured, print it, and return what is written down."""
    rows = _results.join_seeds([each[0] for each in measured], ("kind", "form", "method"), listed)
    targets = [] if tag else targets_of(rows)
    latencies = measured[0][1]
    _sentiment_report.table(rows, targets, console)
    _sentiment_report.latencies(latencies, console)
    return {
        "tag": tag,
        "data": _data.about(run.texts),
        "settings": dataclasses.asdict(run.settings) | settings,
        "figures": {"rows": rows, "latency_ms": latencies},
        "targets": targets,
    }


PARTS: dict[str, _parts.Part] = {
    "after": after,
    "trained": taught("trained", _sentiment_trained, _sentiment_trained.Trained),
    "students": taught(
        "students", _sentiment_students, _sentiment_students.Students, _sentiment_students.packings
    ),
}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    words = "another TFDS set of sentences than rotten_tomatoes, such as imdb_reviews"
    checkpoint = "folder of a BERT in Hugging Face's layout, instead of MiniLM"
    _parts.main("sentiment", PARTS, words, arguments, {"checkpoint": checkpoint})


if __name__ == "__main__":
    main()
