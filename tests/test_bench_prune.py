"""The benchmark of pruning runs, and what it holds jopt against makes the same masks."""

import json
import sys

import jax
import numpy as np
import pytest

from experiments import _bench_masks, _bench_n_m, bench_prune
from tests import oracles, oracles_masks

pytestmark = pytest.mark.filterwarnings("default")  # those of torch are not ours


def test_the_benchmark_runs_and_writes_what_it_measured(tmp_path, monkeypatch):
    arguments = ["bench_prune", "--smoke", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    bench_prune.main()
    results = json.loads((tmp_path / "bench_prune.json").read_text())
    assert set(results["figures"]) == set(bench_prune.PARTS) and results["targets"] == []
    masks = results["figures"]["masks"]["smoke"]
    assert masks["weights"] == 8711 and masks["kept"] == 871
    assert all(row["exact"] for row in masks["rows"].values())
    absent = _bench_masks.torch is None
    assert ("torch.kthvalue" in masks["rows"]) != absent
    for part in results["figures"].values():
        assert all(np.isfinite(each["value"]) for each in part["targets"])
    monkeypatch.setattr(sys, "argv", [*arguments, "--only", "n_m"])  # the other parts stay
    bench_prune.main()
    again = json.loads((tmp_path / "bench_prune.json").read_text())
    assert again["figures"]["masks"] == results["figures"]["masks"]


def test_peers_are_what_they_claim_to_be():
    scores = jax.random.normal(jax.random.key(0), (8, 16))
    for axis in (0, 1):
        expected = oracles_masks.n_m_mask(scores, 2, 4, axis)
        for way in (_bench_n_m.by_argsort, _bench_n_m.by_top_k):
            np.testing.assert_array_equal(way(scores, 2, 4, axis), expected)
    flat = np.round(4 * np.asarray(scores)).ravel()
    for keep in (1, 13, 128):
        expected = oracles.topk_mask(flat, keep)
        np.testing.assert_array_equal(_bench_masks.stable_mask(flat, keep), expected)


def test_networks_have_the_sizes_they_are_named_for():
    count = lambda shapes: sum(int(np.prod(shape)) for shape in shapes)  # noqa: E731
    assert count(_bench_masks.resnet50_shapes()) == 25_502_912
    assert 109_000_000 < count(_bench_masks.bert_base_shapes()) < 111_000_000
