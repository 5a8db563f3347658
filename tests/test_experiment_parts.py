"""Parts of experiments: what is finished is not measured again, and nothing of the rest is lost."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from experiments import _data, _parts, _results, _rows

SAME, LISTED = ("how",), ("validation", "test")


def test_a_part_is_replaced_without_losing_the_others():
    def made(value: float) -> dict:
        target = _results.target("error", value, 1.0, "lower")
        return {"data": value, "settings": {}, "figures": {"error": value}, "targets": [target]}

    results = _parts.joined({}, "prune_images", "first", made(2.0))
    results = _parts.joined(results, "prune_images", "second", made(0.5))
    results = _parts.joined(results, "prune_images", "first", made(0.25))
    assert results["data"] == {"first": 0.25, "second": 0.5}
    assert results["figures"]["second"] == {"error": 0.5} and set(results["runs"]) == set(
        results["settings"]
    )
    named = {each["target"]: (each["value"], each["met"]) for each in results["targets"]}
    assert named == {"first: error": (0.25, True), "second: error": (0.5, True)}


def _part(made: list[int], skill: float = 0.5) -> _parts.Part:
    """Make a part that says for which seeds it made something."""

    def part(call: _parts.Call) -> dict[str, Any]:
        settings = {"network": {"seeds": call.seeds, "widths": (1, 2), "skill": skill}}
        held = call.held("", settings)
        by_seed = []
        for seed in call.seeds:
            file = call.work / f"rows-{seed}.json"
            rows = _rows.Rows(file, SAME, held.rows(seed, LISTED), held.facts(seed))

            def make(seed: int = seed) -> dict[str, Any]:
                made.append(seed)
                return {"validation": seed / 4, "test": seed / 8}

            rows.add({"how": "taught"}, make)
            by_seed.append(rows)
        size = by_seed[0].once("size", lambda: 10 * call.seeds[0])
        rows = _results.join_seeds([each.list() for each in by_seed], SAME, LISTED)
        return {
            "tag": "",
            "data": {},
            "settings": settings,
            "figures": {"rows": rows, "size": size},
            "targets": [],
        }

    return part


@pytest.fixture
def trial(tmp_path, monkeypatch):
    """Return what runs the command line of an experiment of one part, on an empty disk."""
    monkeypatch.setattr(_data, "CACHE", tmp_path / "cache")

    def run(part: _parts.Part, *arguments: str) -> dict[str, Any]:
        _parts.main("trial", {"one": part}, "", ["--out", str(tmp_path), *arguments])
        return json.loads((tmp_path / "trial.json").read_text())["figures"]["one"]

    return run


def _forget(tmp_path: Path) -> None:
    for file in (tmp_path / "cache").rglob("rows-*.json"):
        file.unlink()


def test_seeds_that_results_hold_are_not_measured_again(trial, tmp_path):
    made: list[int] = []
    first = trial(_part(made), "--seeds", "3")
    assert made == [3] and first["size"] == 30
    assert first["rows"][0]["test"] == [0.375] and first["rows"][0]["spread_test"] == 0.0
    _forget(tmp_path)  # as on another machine
    second = trial(_part(made), "--seeds", "3", "1", "2")
    assert made == [3, 1, 2]
    (row,) = second["rows"]
    assert row["test"] == [0.375, 0.125, 0.25] and row["validation"] == [0.75, 0.25, 0.5]
    assert row["mean_test"] == 0.25 and row["spread_test"] == 0.25
    _forget(tmp_path)
    third = trial(_part(made), "--seeds", "2", "3")
    assert made == [3, 1, 2] and third["rows"][0]["test"] == [0.25, 0.375]
    assert third["size"] == 20  # was measured of the first seed alone, and is of this one now


@pytest.mark.parametrize("why", ["other settings", "--restart"])
def test_seeds_are_measured_again(trial, tmp_path, why):
    made: list[int] = []
    trial(_part(made), "--seeds", "3")
    _forget(tmp_path)
    if why == "--restart":
        trial(_part(made), "--seeds", "3", why)
    else:
        trial(_part(made, skill=0.75), "--seeds", "3")
    assert made == [3, 3]


def test_rows_may_be_added_to_results_but_not_described_otherwise(tmp_path):
    def settings(**recipes: int) -> dict[str, Any]:
        return {
            "seeds": [1],
            "skill": 0.5,
            "recipes": {n: {"epochs": e} for n, e in recipes.items()},
        }

    old = {"settings": {"one": settings(small=2)}, "figures": {"one": {"rows": []}}}
    (tmp_path / "trial.json").write_text(json.dumps(old))
    call = _parts.Call("trial", "one", None, None, (1,), tmp_path, tmp_path, Console())

    def seeds(new: dict[str, Any]) -> tuple[int, ...]:
        return call.held("", new, ("recipes",)).seeds

    assert seeds(settings(small=2)) == seeds(settings(small=2, tiny=4)) == (1,)
    assert seeds(settings(small=3)) == () and seeds(settings(small=2) | {"skill": 0.75}) == ()
    assert call.held("", settings(small=2, tiny=4)).seeds == ()  # nothing may grow


def test_a_killed_run_makes_the_rows_that_are_missing(tmp_path):
    made: list[str] = []

    def make(name: str) -> dict[str, float]:
        if name == "killed":
            raise KeyboardInterrupt
        made.append(name)
        return {"test": 0.5}

    for names in (["first", "killed"], ["first", "second"]):
        rows = _rows.Rows(tmp_path / "new" / "rows.json", SAME)
        try:
            for name in names:
                rows.add({"how": name}, lambda name=name: make(name))
        except KeyboardInterrupt:
            continue
        assert rows.list() == [{"how": name, "test": 0.5} for name in names]
    assert made == ["first", "second"]


def test_what_was_measured_here_goes_before_what_results_hold(tmp_path):
    file = tmp_path / "rows.json"
    _rows.Rows(file, SAME).add({"how": "here"}, lambda: {"test": 1})
    held = [{"how": "here", "test": 2}, {"how": "there", "test": 3}]
    rows = _rows.Rows(file, SAME, held, {"size": 4})
    for name in ("there", "here"):
        rows.add({"how": name}, lambda: pytest.fail("was made again"))
    assert rows.list() == [{"how": "there", "test": 3}, {"how": "here", "test": 1}]
    assert rows.once("size", lambda: 5) == 4
