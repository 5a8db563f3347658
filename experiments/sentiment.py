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
it was, and seeds that the results hold are not measured again.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

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


def start(call: _parts.Call) -> tuple[_sentiment_network.Run, str]:
    """Load what all parts share, whose networks lie in one folder; also return the results' tag."""
    texts, folder, tag = _sentences.start(call)
    settings = _sentiment_network.Settings(dataset=texts.name, seeds=call.seeds)
    if call.head is not None:
        settings = dataclasses.replace(
            settings, length=12, batch=16, epochs=1, calibration=16, calibration_length=7
        )
    shared, say = call.shared("networks"), call.console.print
    try:
        return _sentiment_network.Run(settings, texts, folder, shared, say), tag
    except (_data.DataUnavailable, ValueError) as problem:
        raise SystemExit(str(problem)) from None


def after(call: _parts.Call) -> dict[str, Any]:
    """Run or resume the part; returns its tag, data, settings, figures and targets."""
    run, tag = start(call)
    return results(call, run, tag, partial(_sentiment_after.measure, run), _sentiment_after, {})


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

    def part(call: _parts.Call) -> dict[str, Any]:
        run, tag = start(call)
        settings, lessons = how.Settings(), _sentiment_taught.Lessons()
        if call.head is not None:
            settings = how.smoke(settings)
            lessons = dataclasses.replace(lessons, copies=2, spliced=1)

        def measure(seed: int, held: _parts.Held) -> _sentiment_network.Measured:
            return kind(run, lessons, settings, seed).measure(held)

        written = {"lessons": dataclasses.asdict(lessons), name: dataclasses.asdict(settings)}
        return results(call, run, tag, measure, how, written | more())

    return part


def results(
    call: _parts.Call,
    run: _sentiment_network.Run,
    tag: str,
    measure: Callable[[int, _parts.Held], _sentiment_network.Measured],
    how: Any,
    more: dict[str, Any],
) -> dict[str, Any]:
    """Measure all seeds, join and print what they say, and return what is written down.

    Args:
      call: of the part.
      run: what all parts share.
      tag: of the results.
      measure: makes the networks of a seed that results do not hold.
      how: the module that has the part's `LISTED` and `targets_of`.
      more: settings beside those of the network.
    """
    settings = dataclasses.asdict(run.settings) | more
    held = call.held(tag, settings, ("packings", "prunings"))
    by_seed = [measure(seed, held) for seed in call.seeds]
    rows = _results.join_seeds([each.rows for each in by_seed], _sentiment_network.SAME, how.LISTED)
    latencies = by_seed[0].latencies(20 if call.head is None else 3)
    targets = [] if tag else how.targets_of(rows)
    _sentiment_report.table(rows, targets, call.console)
    _sentiment_report.latencies(latencies, call.console)
    return {
        "tag": tag,
        "data": _data.about(run.texts),
        "settings": settings,
        "figures": {"rows": rows, "latency_ms": latencies},
        "targets": targets,
    }


PARTS: dict[str, _parts.Part] = {
    "after": after,
    "trained": taught(
        "trained", _sentiment_trained, _sentiment_trained.Trained, _sentiment_trained.prunings
    ),
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
