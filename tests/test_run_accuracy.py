"""What whole networks lose when `jopt.run` computes with their codes."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from experiments import _data, _results, run_accuracy
from tests import tiny_tfds

pytestmark = pytest.mark.filterwarnings("default")  # those of TFDS are not ours


def test_a_trained_network_is_scored_by_all_ways(tmp_path, monkeypatch, capsys):
    tiny_tfds.write(tmp_path / "tfds", "mnist")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setattr(_data, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(run_accuracy, "NETWORKS", {"lenet": run_accuracy.lenet})
    monkeypatch.setattr(run_accuracy, "FORMS", {"W4-g32": run_accuracy.FORMS["W4-g32"]})
    run_accuracy.main(["--smoke", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "run_accuracy-smoke.json").read_text())
    (row,) = results["figures"]
    assert row["decibels_float"] > 100 and 30 < row["decibels_int8"] < 100
    assert row["run_float"] == row["restored"]
    assert row["products"] == 4 and row["restored_products"] < 4
    assert len(results["targets"]) == 2 and results["targets"][0]["met"]
    assert "LeNet-5, MNIST, W4-g32: accuracy on test images" in capsys.readouterr().out


def test_a_network_that_cannot_be_had_is_left_out_and_named(monkeypatch):
    def missing(smoke, console):
        raise _data.DataUnavailable("the photos are not there.")

    monkeypatch.setattr(run_accuracy, "NETWORKS", {"one": missing})
    console = Console(record=True, file=io.StringIO())
    assert list(run_accuracy.rows_of(True, console)) == []
    assert "Left out: the photos are not there." in console.export_text()


def test_a_data_set_that_is_nowhere_leaves_its_network_out(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(run_accuracy, "NETWORKS", {"one": run_accuracy.convolutional})
    console = Console(record=True, file=io.StringIO(), width=200)
    assert list(run_accuracy.rows_of(True, console)) == []
    assert "Left out: TFDS's fashion_mnist is not prepared in" in console.export_text()


def test_decibels_are_of_power():
    expected = np.array([3.0, 4.0])
    assert run_accuracy.decibels(expected, expected) == 200
    assert run_accuracy.decibels(expected + [0.3, 0.4], expected) == 20


def test_the_readme_says_what_was_measured():
    figures = json.loads((_results.RESULTS / "run_accuracy.json").read_text())["figures"]
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    for row in figures:
        scores = [row[name] for name in ("float", "restored", "run_float", "run_int8")]
        cells = " | ".join(f"{score:.4f}" for score in scores)
        assert f"| {row['network']} | {row['form']} | {cells} |" in readme
