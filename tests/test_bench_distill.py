"""The comparison of distillation losses with torch."""

import json

import pytest

from experiments import bench_distill


def test_every_loss_agrees_with_torch(tmp_path):
    pytest.importorskip("torch")
    bench_distill.main(["--smoke", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "bench_distill-smoke.json").read_text())
    assert set(results["figures"]) == {"KD", "DKD", "RKD distance", "RKD angle", "AT"}
    assert len(results["targets"]) == 10 and all(each["met"] for each in results["targets"])


def test_without_torch_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(bench_distill, "torch", None)
    with pytest.raises(SystemExit):
        bench_distill.main([])
    assert "pip install torch==2.13.0" in capsys.readouterr().err
