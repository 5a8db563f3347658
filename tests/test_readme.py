"""The README's example runs, and its commands are the ones that CI runs."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def python_blocks():
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = python_blocks()
    assert len([line for line in block.splitlines() if line.strip()]) <= 20
    exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "small.jopt").exists()
    assert "total" in capsys.readouterr().out


def test_ci_runs_the_tests_as_the_readme_says():
    (test_command,) = re.findall(r"python (-m pytest.*)", (ROOT / "README.md").read_text())
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in lines if line.startswith(f'"$venv/bin/python" {test_command}')]
