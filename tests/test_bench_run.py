"""The comparison of compressed products, and what README says of it."""

import json
from pathlib import Path

from experiments import _bench_run_peers, _bench_run_products, _bench_run_report, bench_run

ROOT = Path(__file__).parent.parent


def test_every_product_is_timed_and_agrees(tmp_path, monkeypatch, capsys):
    for name in ("HAS_ORT", "HAS_TORCH", "HAS_QWIX"):
        monkeypatch.setattr(_bench_run_peers, name, False)
    bench_run.main(["--smoke", "--only", "products", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "bench_run-products-smoke.json").read_text())
    assert len(results["figures"]) == len(_bench_run_products.cases(True))
    for row in results["figures"]:
        assert row["difference"] < (0.02 if "A8" in row["case"] else 1e-5)
        assert row["microseconds"]["XLA float32"] > 0
        assert row["of_reading"] > 0 and row["of_multiplying"] > 0
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
    _, rest = text.split(f"{_bench_run_report.BEGIN}\n")
    table = rest.split(_bench_run_report.END)[0].splitlines()
    assert table == _bench_run_report.lines(results["figures"])


def test_the_table_says_how_fast_each_way_is_and_replaces_the_old_one(tmp_path):
    row = {
        "case": "a network",
        "ours": "jopt, W8A8",
        "microseconds": {"XLA float32": 4000.0, "jopt, W8A8": 2000.0, "jopt, W8": 1000.0},
        "times_faster": {"XLA float32": 2.0, "jopt, W8": 0.5, "jopt in XLA": 3.0, "Other": 1.25},
        "of_reading": 0.956,
        "of_multiplying": 1.5,
    }
    product = {
        "case": "a product",
        "ours": "jopt",
        "microseconds": {"XLA float32": 90.0, "jopt": 30.0},
        "times_faster": {"XLA float32": 3.0},
        "of_reading": 0.0,
        "of_multiplying": 0.25,
    }
    readme = tmp_path / "README.md"
    begin, end = _bench_run_report.BEGIN, _bench_run_report.END
    readme.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    _bench_run_report.write([row, product], readme)
    first, *table, last = readme.read_text().split(f"{begin}\n")[1].splitlines()[1:-1]
    assert first.startswith("|---") and last == end
    assert table == [
        "| a network (W8A8) | 2.0 ms | 2.00x; W8 4.00x | 1.25x Other | 96 %, 150 % |",
        "| a product | 30 us | 3.00x | - | 0 %, 25 % |",
    ]
    assert readme.read_text().startswith("before\n") and readme.read_text().endswith("after\n")
