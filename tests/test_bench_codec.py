"""The benchmark of the file coders."""

import json
from pathlib import Path

import pytest

from experiments import _results, bench_codec
from tests.conftest import COMPILER


@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
def test_both_coders_are_timed_and_write_the_same_file(native_codec, tmp_path, capsys):
    bench_codec.main(["--smoke", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "bench_codec-smoke.json").read_text())
    (row,) = results["figures"].values()
    assert row["same_bytes"] and all(each["met"] for each in results["targets"])
    assert "60x40, 90 % zeros, 4 bits: " in capsys.readouterr().out


def test_without_a_native_coder_the_command_says_why(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_codec._native, "load", lambda: "JOPT_NATIVE is 0")
    with pytest.raises(SystemExit):
        bench_codec.main(["--out", str(tmp_path)])
    assert "JOPT_NATIVE is 0" in capsys.readouterr().err


def test_the_readme_says_what_was_measured():
    readme = (Path(__file__).parent.parent / "README.md").read_text().replace("\n", " ")
    figures = json.loads((_results.RESULTS / "bench_codec.json").read_text())["figures"]
    for name in ("write", "read"):
        faster = [row[name]["faster"] for row in figures.values()]
        assert f"{min(faster):.1f} to {max(faster):.0f} times as fast to {name}" in readme
