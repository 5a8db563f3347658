"""Pretrained networks through the experiments that quantize them, on checkpoints written here."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jopt

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")

from experiments import (
    _bert,
    _compress,
    _data,
    _efficientnet,
    _post_training,
    _results,
    _sentences,
    _sentiment_after,
    _sentiment_students,
    _sentiment_taught,
    embeddings,
    imagenet_net,
    sentiment,
)
from experiments._networks import EfficientNetLite0
from experiments._text_models import SentenceFeatures
from jopt import layers, quant
from tests import tiny_bert, tiny_tfds

pytestmark = [
    pytest.mark.filterwarnings("default"),  # those of TFDS and matplotlib are not ours
    pytest.mark.usefixtures("native_codec"),
]
WORDS = "[PAD] [UNK] [CLS] [SEP] a film of the year bad good ? ##s".split()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Keep data and checkpoints away from those of people."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setattr(_data, "CACHE", tmp_path / "cache")
    return tmp_path


def _tokens(lengths, longest):
    real = np.arange(longest) < np.array(lengths)[:, None]
    ids = np.where(real, np.arange(len(lengths))[:, None] + 1, 0).astype(np.int32)
    return _bert.Tokens(ids, real, np.zeros_like(ids))


def test_sentences_come_back_in_their_order_from_batches_of_few_lengths():
    lengths = [3, 9, 1, 4, 12, 9, 5, 2, 11]
    tokens, shapes = _tokens(lengths, 12), set()

    def run(ids, real):
        shapes.add(ids.shape)
        assert real.any(1).all()
        return np.stack([ids.max(1), real.sum(1)], 1)

    rows = _sentences.through(run, tokens, batch=2)
    np.testing.assert_array_equal(rows[:, 0], np.arange(9) + 1)
    np.testing.assert_array_equal(rows[:, 1], lengths)
    assert shapes == {(2, 12)}  # none of the usual lengths is shorter
    places = [
        (list(where), each.ids.shape)
        for where, each in _sentences.batches(tokens, 4, lengths=(4, 10, 64))
    ]
    assert places == [([0, 2, 3, 7], (4, 4)), ([1, 5, 6], (4, 10)), ([4, 8], (4, 12))]
    with pytest.raises(ValueError, match="no sentence with a token"):
        _sentences.through(run, _tokens([0, 0], 4))


def test_sentences_of_calibration_are_full(folder):
    tokenizer = tiny_bert.write(folder / "bert", tiny_bert.tensors(), WORDS) / "tokenizer.json"
    sentences = ["a film of the year"] * 20 + ["bad"] * 20
    rows = _sentences.full_rows(tokenizer, sentences, 5, 32)
    assert [each.shape for each in rows] == [(16, 5)]
    np.testing.assert_array_equal(rows[0], np.tile([2, 4, 5, 6, 3], (16, 1)))


def test_neighbours_that_stay_are_counted():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(9, 4))
    vectors = jnp.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    assert float(embeddings.overlap(vectors, vectors, 3)) == 1
    other = vectors[::-1]

    def nearest(rows):
        similar = np.array(rows @ rows.T)
        np.fill_diagonal(similar, -9)
        return [set(np.argsort(-row)[:3]) for row in similar]

    expected = np.mean([len(a & b) / 3 for a, b in zip(nearest(vectors), nearest(other))])  # noqa: B905
    np.testing.assert_allclose(embeddings.overlap(vectors, other, 3), expected, rtol=1e-6)


def test_embeddings_of_a_checkpoint_on_disk_are_compared(folder, capsys, monkeypatch):
    tiny_tfds.write_text(folder / "tfds", "tiny_text")
    checkpoint = tiny_bert.write(folder / "bert", tiny_bert.tensors(), WORDS)
    methods = {name: _post_training.METHODS[name] for name in ("RTN", "GPTQ")}  # the quick ones
    monkeypatch.setattr(_post_training, "METHODS", methods)
    arguments = ["--smoke", "--dataset", "tiny_text", "--out", str(folder / "out")]
    embeddings.main([*arguments, "--checkpoint", str(checkpoint)])
    (file,) = (folder / "out").glob("*.json")
    assert file.stem == "embeddings-tiny_text-head-bert"
    figures = json.loads(file.read_text())["figures"]["sentences"]
    whole, *rows = figures["rows"]
    assert whole["overlap"] == [1.0] and whole["mean_test"] > 0.99999
    assert [row["method"] for row in rows] == [*methods, _post_training.IN_ORDER]
    for row in rows:
        assert row["mean_test"] > 0.9 and row["bytes"][0] < whole["bytes"][0]
    assert min(row["mean_test"] for row in rows) < 0.9999
    left = figures["left_in_floats"]
    assert left["segments/embedding"] == 16 and set(left) == {"segments/embedding", "bias", "scale"}
    with pytest.raises(SystemExit, match="model.safetensors is not there"):
        embeddings.main([*arguments, "--checkpoint", str(folder / "out")])
    assert "nearest neighbours that stay" in " ".join(capsys.readouterr().out.split())


def test_sentiment_is_fine_tuned_and_compressed_after_training(folder, monkeypatch):
    tiny_tfds.write_text(folder / "tfds", "tiny_text", train=400)
    checkpoint = tiny_bert.write(folder / "bert", tiny_bert.tensors(), WORDS)
    monkeypatch.setattr(_post_training, "METHODS", {"RTN": None})  # the others are tested
    monkeypatch.setattr(_post_training, "CRITERIA", ("Wanda",))  # with the language model
    monkeypatch.setattr(_post_training, "ORDERED", ())
    monkeypatch.setattr(_sentiment_after, "BITS", (4,))
    monkeypatch.setattr(_sentiment_after, "PATTERNS", {"2:4": (2, 4)})
    packing = _sentiment_students.Packing(4, _compress.Recipe(0.5, 4, 1, 1, 3e-4), seen=True)
    monkeypatch.setattr(_sentiment_students, "PACKINGS", {"small": packing})
    arguments = ["--smoke", "--dataset", "tiny_text", "--checkpoint", str(checkpoint)]
    sentiment.main([*arguments, "--out", str(folder / "out")])
    (file,) = (folder / "out").glob("*.json")
    made = json.loads(file.read_text())["figures"]
    figures = made["after"]
    rows = {(row["form"], row["method"]): row for row in figures["rows"]}
    assert list(rows) == [
        ("32 bits", ""),
        ("W4", "RTN"),
        ("W8A8", "a range for each token"),
        ("W8A8", "one range"),
        ("W8A8", "SmoothQuant"),
        ("W8A8", "in jopt.run"),
        ("W4A8", "AWQ, in jopt.run"),
        ("2:4", "Wanda"),
    ]
    whole = rows["32 bits", ""]
    for name in ("a range for each token", "one range", "SmoothQuant", "in jopt.run"):
        row = rows["W8A8", name]
        assert abs(row["mean_test"] - whole["mean_test"]) <= 0.1
        assert row["bytes"][0] < whole["bytes"][0]
    four = [rows[name]["mean_test"] for name in (("W4", "RTN"), ("W4A8", "AWQ, in jopt.run"))]
    assert abs(four[0] - four[1]) <= 0.1
    timed = figures["latency_ms"]
    assert list(timed) == ["float"] + [", ".join(row) for row in list(rows)[1:]]
    assert all(set(each) == {"1", "64"} for each in timed.values())
    figures = made["trained"]
    rows = {(row["form"], row["method"]): row for row in figures["rows"]}
    assert list(rows) == [
        ("32 bits", ""),
        ("50%", "movement, taught"),
        ("80%", "movement, taught"),
        ("90%", "movement, taught"),
        ("50% of units", "saliency, taught"),
        ("1 layers", "taught"),
    ]
    whole = rows["32 bits", ""]["bytes"][0]
    assert all(row["bytes"][0] < whole for row in list(rows.values())[1:])
    assert list(figures["latency_ms"]) == ["float"] + [", ".join(row) for row in list(rows)[1:]]
    figures = made["students"]
    sizes = [row["bytes"][0] for row in figures["rows"]]
    assert [row["form"] for row in figures["rows"]] == ["32 bits", "1 layers", "small"]
    assert figures["rows"][-1]["method"] == "50%, 4 bits, rank 4, words seen"
    assert sizes == sorted(sizes, reverse=True)
    assert len(figures["latency_ms"]) == 3


def test_what_names_a_training_is_the_same_in_every_process():
    """The address of a function in it would forget every checkpoint of a killed run."""
    one, other = (
        _bert.BertEncoder(layers=2, activation=lambda x, scale=scale: scale * x)
        for scale in (1.0, 2.0)
    )
    assert _bert.sizes(one) == _bert.sizes(other)
    assert _bert.sizes(one)["layers"] == 2 and _bert.sizes(one)["width"] == 384
    assert json.loads(json.dumps(_bert.sizes(one))) == _bert.sizes(one)


def test_layers_are_taken_and_words_factorized():
    encoder = _bert.BertEncoder(9, 5, 2, 3, 8, 2, 12)
    module = _bert.BertClassifier(encoder, 2)
    ids, real = jnp.array([[1, 2, 3, 0]]), jnp.array([[True, True, True, False]])
    params = module.init(jax.random.key(0), ids)["params"]
    few = _bert.some_layers(params, (2, 0))
    one, two = (params["encoder"][name] for name in ("layer2", "layer0"))
    assert few["encoder"]["layer0"] is one and few["encoder"]["layer1"] is two
    assert "layer2" not in few["encoder"] and few["classifier"] is params["classifier"]
    found = _bert.inside(module, params, ids, real)
    assert [len(each) for each in found[1:]] == [4, 3]
    mean = _bert.mean_of_tokens(found.hidden[-1], real)
    np.testing.assert_allclose(found.features.embedding, mean, rtol=1e-5, atol=1e-6)
    factored = module.clone(encoder=encoder.clone(factor=8))
    tree = _bert.factorized(params, 8, np.ones(9))  # of full rank: nothing is lost
    logits = _bert.inside(factored, tree, ids, real).features.logits
    np.testing.assert_allclose(logits, found.features.logits, rtol=1e-4, atol=1e-5)
    often = np.where(np.arange(9) == 4, 1e6, 1.0)
    table = params["encoder"]["words"]["embedding"]
    tree = _bert.factorized(params, 1, often)["encoder"]
    back = jnp.asarray(tree["words"]["embedding"][4] @ tree["widen"]["kernel"])
    np.testing.assert_allclose(back, jnp.asarray(table[4]), rtol=1e-2, atol=1e-2)


def test_what_happens_inside_a_student_is_what_its_own_layers_do_in_the_teacher():
    rng = np.random.default_rng(0)
    hidden = [jnp.asarray(rng.normal(size=(2, 4, 6)), jnp.float32) for _ in range(4)]
    scores = [jnp.asarray(rng.normal(size=(2, 2, 4, 4)), jnp.float32) for _ in range(3)]
    real = jnp.arange(4)[None] < jnp.array([[3], [4]])
    said = SentenceFeatures(jnp.zeros((2, 2)), jnp.zeros((2, 6)))
    teacher = _bert.Inside(said, tuple(hidden), tuple(scores))
    student = _bert.Inside(said, (hidden[0], hidden[3]), (scores[2],))
    loss = _sentiment_taught.inner_losses(student, teacher, (2,), real)
    np.testing.assert_allclose(loss, np.zeros(2), atol=1e-7)
    assert (_sentiment_taught.inner_losses(student, teacher, (1,), real) > 0.1).all()


def test_steps_see_every_sentence_once_and_no_more_words_than_they_have():
    longest = np.array([3, 17, 5, 20, 2, 18, 4, 19])
    ids = jnp.where(np.arange(20) < longest[:, None], 1, 0)
    seen = []

    def step(carry, ids, labels, rows, extras):
        assert int(ids.shape[1]) >= longest[np.asarray(rows)].max()
        seen.append((ids.shape[1], sorted(np.asarray(rows).tolist())))
        return carry + 1, jnp.float32(len(seen))

    order = np.random.default_rng(0).permutation(8).reshape(4, 2)
    carry, losses = _sentences.cut_steps(longest)(step, 0, ids, None, order, None)
    assert carry == 4 and losses.shape == (4,)
    assert sorted(row for _, rows in seen for row in rows) == list(range(8))
    assert sorted(length for length, _ in seen) == [16, 16, 20, 20]


def test_rounded_inputs_are_those_of_smoothed_kernels():
    rng = np.random.default_rng(0)
    params = {"encoder": {"layer0": {"kernel": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)}}}
    x = jnp.asarray(rng.normal(size=(32, 6)) * [1, 1, 1, 40, 1, 1], jnp.float32)

    def apply(params, x):
        return x @ params["encoder"]["layer0"]["kernel"]

    statistics = layers.calibrate(apply, params, [x])
    tree, extras = _sentiment_after.smoothed(params, statistics)
    (path,) = extras
    factor, top = extras[path]
    static, restored = _sentiment_after.static_inputs(apply), jopt.materialize(tree)
    leaf = tree["encoder"]["layer0"]["kernel"]
    smooth = quant.smoothed_inputs(x, leaf)
    np.testing.assert_allclose(top, jnp.abs(smooth).max(), rtol=1e-6)
    rounded = quant.fake_quantize_within(smooth, -top, top, _sentiment_after.INPUTS)
    expected = rounded @ jopt.materialize(leaf.tensor)
    np.testing.assert_allclose(static(restored, extras, x), expected, rtol=1e-4, atol=1e-4)
    plain = {path: (jnp.ones_like(factor), jnp.abs(x).max())}
    exact = apply(params, x)
    errors = [jnp.abs(static(restored, each, x) - exact).max() for each in (extras, plain)]
    assert errors[0] < errors[1]
    np.testing.assert_allclose(static(restored, {}, x), apply(restored, x), rtol=1e-6)


def _disturbed(shapes):
    rng = np.random.default_rng(0)

    def draw(leaf):
        fan = max(1, int(np.prod(leaf.shape[:-1])))
        values = rng.normal(size=leaf.shape) / np.sqrt(fan)
        return jnp.asarray(values if leaf.ndim > 1 else 1 + 0.3 * values, jnp.float32)

    return jax.tree.map(draw, shapes)


def test_efficientnet_folded_and_equalized_is_the_same_function():
    model = EfficientNetLite0(num_classes=7)
    images = jnp.asarray(np.random.default_rng(1).normal(size=(2, 32, 32, 3)), jnp.float32)
    variables = _disturbed(jax.eval_shape(model.init, jax.random.key(0), images))
    statistics = jax.tree.map(jnp.abs, variables["batch_stats"])
    variables = {**variables, "batch_stats": statistics}
    expected = jax.jit(model.apply)(variables, images)
    folded, tree = _efficientnet.fold(model, variables)
    apply = jax.jit(folded.apply)
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(apply(tree, images), expected, rtol=0, atol=1e-4 * scale)
    kernel = tree["params"]["block1_depthwise"]["kernel"]
    uneven = (
        30.0 ** jnp.linspace(-1, 1, kernel.shape[-1])[None, None, None]
    )  # what folding leaves in real networks
    tree["params"]["block1_depthwise"]["kernel"] = kernel * uneven
    expected = apply(tree, images)
    even = _efficientnet.equalize(tree, steps=4)
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(apply(even, images), expected, rtol=0, atol=1e-4 * scale)

    def unevenness(tree):
        largest = jnp.abs(tree["params"]["block1_depthwise"]["kernel"]).max((0, 1, 2))
        return float(largest.max() / largest.min())

    assert unevenness(even) < unevenness(tree) / 4
    for one, two in _efficientnet.readers(tree["params"]):
        assert two in even["params"]
        ratio = even["limits"][f"{one}_limit"] / 6  # a channel and where it is cut off go together
        whole, scaled = (each["params"][one]["bias"] for each in (tree, even))
        np.testing.assert_allclose(scaled, whole * ratio, rtol=1e-4, atol=1e-6)
    found = layers.find_layers(folded.apply, tree, images)
    assert set(found.layers) >= {f"params/{name}/kernel" for name in tree["params"]}


def test_logits_are_compared_by_agreement_and_noise():
    whole = np.array([[1.0, 0.0], [0.0, 2.0]], np.float32)
    assert imagenet_net.compared(whole, whole)["agreement"] == 1
    found = imagenet_net.compared(whole, whole + np.array([[0, 0], [2.5, 0]], np.float32))
    np.testing.assert_allclose(found["sqnr_db"], 10 * np.log10(5 / 6.25), atol=1e-4)
    assert found["agreement"] == 0.5


def test_rows_of_the_imagenet_experiment_are_named_apart():
    names = [(row.form, row.how) for row in imagenet_net.ROWS]
    assert len(set(names)) == len(names)
    assert names[0] == ("W8A8, one scale", "rounded")
    assert names[-1] == ("W4A8, a scale for each output", "GPTQ, biases corrected")
    assert imagenet_net.Row(4, (1,), False, method=quant.hqq).how == "HQQ"


def test_experiments_without_their_packages_say_what_to_install(monkeypatch, folder):
    tiny_tfds.write_text(folder / "tfds", "tiny_text")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for module, arguments in (
        (embeddings, ["--dataset", "tiny_text"]),
        (sentiment, ["--dataset", "tiny_text"]),
        (imagenet_net, []),
    ):
        with pytest.raises(SystemExit, match="pip install --no-deps"):
            module.main(["--smoke", "--out", str(folder / "out"), *arguments])


SAID = {
    ("50%", "movement, taught"): ("50 % of all weights", "movement, taught"),
    ("80%", "movement, taught"): ("80 % of all weights", "movement, taught"),
    ("90%", "movement, taught"): ("90 % of all weights", "movement, taught"),
    ("50% of units", "saliency, taught"): ("half of the units", "saliency, taught"),
    ("4 layers", "taught"): ("4 layers of 6", "taught"),
}


def test_every_pretrained_network_of_the_readme_is_in_the_results():
    readme = (Path(__file__).parent.parent / "README.md").read_text()

    def figures(name):
        return json.loads((_results.RESULTS / f"{name}.json").read_text())["figures"]

    for row in figures("embeddings")["sentences"]["rows"]:
        line = f"| {row['form']} | {row['method'] or '-'} | {np.mean(row['bytes']):,.0f} | "
        assert f"{line}{row['mean_test']:.4f} | {row['mean_overlap']:.1%} |" in readme
    photos = figures("imagenet_net")["photos"]
    assert f"it names {photos['photos_right_of_20']} of 20 labelled photos" in readme
    for row in photos["rows"]:
        line = f"| {row['form']} | {row['how']} | {np.mean(row['bytes']):,.0f} | "
        assert f"{line}{row['mean_agreement']:.1%} | {row['mean_sqnr_db']:.1f} dB |" in readme
    dense, *rows = figures("language_model")["compress"]["rows"]
    for row in (dense, *rows):
        line = f"| {row['form']} | {row['method'] or '-'} | {np.mean(row['bytes']):,.0f} | "
        line += f"{row['mean_test']:.2f} | {row['mean_test'] / dense['mean_test'] - 1:+.1%} |"
        assert line in readme
    for row in figures("language_model")["distill"]["rows"]:
        line = f"| {row['how']} | {row['parameters']:,} | {row['mean_test']:.2f} | "
        assert f"{line}{np.mean(row['surprise']):.3f} |" in readme
    for part, made in figures("sentiment").items():
        timed = made["latency_ms"]
        for row in made["rows"]:
            form, method = row["form"], row["method"]
            name = SAID.get((form, method), (form, method or "-"))
            line = f"| {' | '.join(name)} | {np.mean(row['bytes']):,.0f} | "
            line += f"{100 * row['mean_test']:.2f} % "
            line += f"({100 * min(row['test']):.2f} to {100 * max(row['test']):.2f}) | "
            side = timed[f"{form}, {method}" if method else "float"]
            faster = [f"{timed['float'][key] / side[key]:.2f}x" for key in ("1", "64")]
            assert f"{line}{' | '.join(faster)} |" in readme, part
