"""The pruning experiment runs, resumes, counts what is left, and keeps its parts apart."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import (
    _compress,
    _data,
    _prune_criteria,
    _prune_extreme,
    _results,
    _stages,
    _train,
    bench_shrink,
    prune_images,
)
from jopt import prune
from tests import tiny_tfds

pytestmark = [
    pytest.mark.filterwarnings("default"),  # those of TFDS and matplotlib are not ours
    pytest.mark.usefixtures("native_codec"),
]


def test_extreme_runs_resumes_and_keeps_what_it_promises(tmp_path, monkeypatch):
    tiny_tfds.write(tmp_path / "tfds", "tiny_digits")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setattr(_data, "CACHE", tmp_path / "cache")
    train, begun = _stages.Trainer.train, []

    def killed_once(self, stage, *args, **kwargs):
        begun.append(stage)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return train(self, stage, *args, **kwargs)

    monkeypatch.setattr(_stages.Trainer, "train", killed_once)
    out = tmp_path / "out"
    arguments = ["--only", "extreme", "--dataset", "tiny_digits", "--smoke", "--out", str(out)]
    with pytest.raises(KeyboardInterrupt):
        prune_images.main(arguments)
    prune_images.main(arguments)
    file = out / "prune_images-tiny_digits-head.json"
    results = json.loads(file.read_text())
    needed = {"command", "versions", "hardware", "data", "settings", "figures", "targets", "runs"}
    assert needed <= set(results) and results["targets"] == []  # asked for on full MNIST only
    networks = results["figures"]["extreme"]["networks"]
    for name, (total, ratio) in {"lenet5": (431_080, 280), "lenet_300_100": (266_610, 68)}.items():
        (row,) = networks[name]["seeds"]
        kinds = [count for layer in row["left_by_layer"].values() for count in layer.values()]
        assert row["parameters"] == total and row["left"] == sum(kinds)
        assert row["left"] == total // ratio and row["ratio"] >= ratio
        assert row["bytes"] < networks["teacher"]["seeds"][0]["bytes"] / 40
    assert (out / "prune_images-tiny_digits-head-extreme.png").stat().st_size > 1000


def test_a_recipe_ends_with_exactly_the_weights_that_it_names():
    recipe = _prune_extreme.Recipe(7, 0.0, 1, 3, 1, rate=1e-2, decay=0.1, power=4, temperature=1)
    rng = np.random.default_rng(0)
    params: Any = {
        "kernel": jnp.asarray(rng.normal(size=(9, 11)), jnp.float32),
        "bias": jnp.ones(5),
    }
    tx = _prune_extreme.pruning(recipe, 104, epoch=8, every=3)
    state, levels = tx.init(params), []
    for _ in range(5 * 8):
        updates, state = tx.update(
            {"kernel": jnp.sign(params["kernel"]), "bias": params["bias"]}, state, params
        )
        params = optax.apply_updates(params, updates)
        levels.append(_compress.nonzero(params))
    masks = prune.current_masks(state)
    assert levels[7] == 104 and levels[-1] == 104 // 7
    assert levels == sorted(levels, reverse=True)
    assert sum(int(mask.sum()) for mask in masks.values()) == 104 // 7


def test_every_way_of_pruning_and_channels_run_on_little_data(tmp_path, monkeypatch):
    tiny_tfds.write(tmp_path / "tfds", "tiny_digits")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setattr(_data, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(
        _prune_criteria, "NETWORKS", {"cnn": _prune_criteria.NETWORKS["cnn"]}
    )  # LeNet-5 takes the same ways
    monkeypatch.setattr(_prune_criteria, "TRIED", _prune_criteria.TRIED[1:])
    monkeypatch.setattr(_prune_criteria, "SYNFLOW_ROUNDS", 3)
    out = tmp_path / "out"
    arguments = ["--only", "criteria", "channels", "--dataset", "tiny_digits", "--smoke"]
    prune_images.main([*arguments, "--out", str(out)])
    (file,) = out.glob("*.json")
    figures = json.loads(file.read_text())["figures"]
    for rows in figures["criteria"]["networks"].values():
        dense, *pruned = rows
        assert dense["sparsity"] == [0.0] and len(pruned) == len(_prune_criteria.TRIED)
        for row in pruned:
            np.testing.assert_allclose(row["sparsity"], 0.9, atol=2e-3)
    (channels,) = figures["channels"]["criteria"]
    (row,) = channels["seeds"]
    assert row["multiply_adds"][1] <= row["multiply_adds"][0] / 4
    assert row["parameters"][1] < row["parameters"][0] / 2
    latency = figures["channels"]["latency"]
    assert set(latency) == {"1", "64"}
    for ways in latency.values():
        *each, best = ways.values()
        assert best["dense_ms"] == min(way["dense_ms"] for way in each)
        assert best["shrunk_ms"] == min(way["shrunk_ms"] for way in each)
    (row,) = figures["channels"]["chosen"]["seeds"]
    assert {int(stays.split()[0]) % 8 for stays in row["units"].values()} == {0}
    assert len(list(out.glob("*-criteria.png"))) == 1


def test_networks_are_shrunk_and_timed(tmp_path):
    with _train.quick_compilation():
        bench_shrink.main(["--smoke", "--out", str(tmp_path)])
    (row,) = json.loads((tmp_path / "bench_shrink-smoke.json").read_text())["figures"].values()
    assert row["parameters"][1] < row["parameters"][0] / 3
    assert row["largest_difference"] < 1e-4 * row["largest_output"]


def test_every_pruned_network_of_the_readme_is_in_the_results():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    figures = json.loads((_results.RESULTS / "prune_images.json").read_text())["figures"]
    for name, row in figures["extreme"]["networks"].items():
        if name == "teacher":
            continue
        (line,) = [each for each in readme.splitlines() if each.startswith(f"| `{name}`, ")]
        tests = [100 * each["test_error"] for each in row["seeds"]]
        wanted = f"| {row['mean_ratio']:.0f}x | {100 * row['mean_test_error']:.2f} % "
        wanted += f"({min(tests):.2f} to {max(tests):.2f}) | {row['mean_bytes']:,.0f} |"
        assert wanted in line
    criteria = figures["criteria"]["networks"]
    ways = {"once": "at once", "gradual": "gradually", "scratch": "from the start"}
    for how, criterion in {(row["how"], row["criterion"]) for row in criteria["cnn"][1:]}:
        cells = [
            f"{100 * row['mean_test']:.2f}"
            for network in ("lenet5", "cnn")
            for row in criteria[network]
            if (row["how"], row["criterion"]) == (how, criterion)
        ]
        assert f"| {ways[how]} | {criterion} | {' | '.join(cells)} |" in readme
    channels = figures["channels"]
    for row in (*channels["criteria"], channels["chosen"]):
        name = f"| {row['criterion']}, {row['epochs']} epochs |"
        (line,) = [each for each in readme.splitlines() if each.startswith(name)]
        means = [100 * sum(column) / len(column) for column in zip(
            *(each["test"] for each in row["seeds"]), strict=True
        )]  # fmt: skip
        assert (
            f"| {row['fewer_multiply_adds']:.2f}x | {means[0]:.2f} % | {means[1]:.2f} % |" in line
        )
    for batch, ways in channels["latency"].items():
        row = ways["fastest"]
        words = f"{row['dense_ms']:.2f} ms to {row['shrunk_ms']:.2f} ms, {row['faster']:.1f} times"
        assert f"batch {batch} from {words}" in " ".join(readme.split())
