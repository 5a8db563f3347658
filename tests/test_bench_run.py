"""The comparison of compressed products, and what README says of it."""

import json
from pathlib import Path

from experiments import _bench_run_peers, bench_run

ROOT = Path(__file__).parent.parent


def test_every_product_is_timed_and_agrees(tmp_path, monkeypatch, capsys):
    for name in ("HAS_ORT", "HAS_TORCH", "HAS_QWIX"):
        monkeypatch.setattr(_bench_run_peers, name, False)
    bench_run.main(["--smoke", "--only", "products", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "bench_run-products-smoke.json").read_text())
    assert len(results["figures"]) == 10
    for row in results["figures"]:
        assert row["difference"] < (0.02 if "A8" in row["case"] else 1e-5)
        assert row["microseconds"]["XLA float32"] > 0
    assert "native kernels: JOPT_NATIVE is 0" in capsys.readouterr().out


def _side(seconds):
    return lambda: seconds


def test_others_run_in_a_process_of_their_own():
    other = _bench_run_peers.Other(_side, [(1,), (2,)])
    try:
        assert other.seconds() < 1
        assert other.seconds() >= 0
    finally:
        other.close()


def test_the_readme_says_what_was_measured():
    results = json.loads((ROOT / "experiments/results/bench_run.json").read_text())
    text = (ROOT / "README.md").read_text()
    assert results["command"] in text
    for row in results["figures"]:
        lines = [line for line in text.splitlines() if line.startswith(f"| {row['case']}")]
        assert any(f"{row['times_faster']['XLA float32']:.2f}x" in line for line in lines), row
        for name, times in row["times_faster"].items():
            if name in {"ONNX Runtime int8", "ONNX Runtime MatMulNBits", "PyTorch CSR", "PyTorch"}:
                assert any(f"{times:.2f}x {name}" in line for line in lines), (row, name)
