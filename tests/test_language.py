"""The language model, its text, and the experiment that compresses it."""

import json
import math
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import _data, _decoder, _language, _language_network, language_model
from jopt import distill, layers, prune, quant
from tests import tiny_tfds

pytestmark = [
    pytest.mark.filterwarnings("default"),  # those of TFDS and matplotlib are not ours
    pytest.mark.usefixtures("native_codec"),
]
pytest.importorskip("tokenizers")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Keep data and checkpoints away from those of people."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setattr(_data, "CACHE", tmp_path / "cache")
    return tmp_path


def _network():
    sizes = {"positions": 12, "width": 8, "layers": 2, "heads": 2, "hidden": 12}
    module = _decoder.Decoder(11, **sizes)  # pyright: ignore[reportArgumentType]
    ids = jax.random.randint(jax.random.key(1), (3, 7), 0, 11)
    params = module.init(jax.random.key(0), ids)["params"]
    return module, jax.tree.map(lambda leaf: leaf + 0.3 * jnp.sin(jnp.arange(leaf.size)).reshape(
        leaf.shape
    ), params), ids  # fmt: skip


def _oracle(params, ids, heads):
    """Return the logits of one sentence, in float64 NumPy, token after token."""
    weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        x = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        return x * weights[name]["scale"] + weights[name]["bias"]

    def dense(x, name):
        return x @ weights[name]["kernel"] + weights[name]["bias"]

    def gelu(x):
        return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    table = weights["tokens"]["embedding"]
    x = table[ids] + weights["places"][: len(ids)]
    for number in range(2):
        name = f"layer{number}"
        y = norm(x, f"{name}_attention_norm")
        query, key, value = (
            dense(y, f"{name}_{part}").reshape(len(ids), heads, -1)
            for part in ("query", "key", "value")
        )
        mixed = np.zeros_like(query)
        for place in range(len(ids)):
            for head in range(heads):
                seen = key[: place + 1, head] @ query[place, head] / np.sqrt(query.shape[-1])
                share = np.exp(seen - seen.max())
                mixed[place, head] = share / share.sum() @ value[: place + 1, head]
        x = x + dense(mixed.reshape(len(ids), -1), f"{name}_out")
        x = x + dense(gelu(dense(norm(x, f"{name}_norm"), f"{name}_up")), f"{name}_down")
    return norm(x, "norm") @ table.T


def test_the_decoder_is_the_transformer_of_the_papers():
    module, params, ids = _network()
    logits, cache = module.apply({"params": params}, ids)
    assert cache is None
    for row, found in zip(ids, logits, strict=True):
        np.testing.assert_allclose(found, _oracle(params, np.asarray(row), 2), rtol=2e-4, atol=2e-4)


def test_a_token_sees_none_that_comes_later():
    module, params, ids = _network()
    logits, _ = module.apply({"params": params}, ids)
    other, _ = module.apply({"params": params}, ids.at[:, 4].set(0).at[:, 5].set(1))
    np.testing.assert_array_equal(logits[:, :4], other[:, :4])
    assert float(jnp.abs(logits[:, 4:] - other[:, 4:]).max()) > 0.01


@pytest.mark.parametrize("cuts", [(3,), (1, 2, 6), tuple(range(1, 7))])
def test_reading_piece_by_piece_is_reading_at_once(cuts):
    module, params, ids = _network()
    cache: Any = module.empty(3)
    found = []
    for piece in jnp.split(ids, cuts, axis=1):
        logits, cache = module.apply({"params": params}, piece, cache)
        found.append(logits)
    whole, _ = module.apply({"params": params}, ids)
    np.testing.assert_allclose(jnp.concatenate(found, 1), whole, rtol=1e-4, atol=1e-4)
    assert int(cache.length) == 7


def test_generation_takes_the_likeliest_token_each_time():
    module, params, ids = _network()
    found = _decoder.generate(module, params, ids[:, :2], 6)
    read = ids[:, :2]
    for _ in range(6):
        logits, _ = module.apply({"params": params}, read)
        read = jnp.concatenate([read, jnp.argmax(logits[:, -1:], -1)], 1)
    np.testing.assert_array_equal(found, read[:, 2:])
    with pytest.raises(ValueError, match="must fit 12 places together, not 13"):
        _decoder.generate(module, params, ids, 6)


def test_draws_are_as_frequent_as_the_network_says():
    module, params, ids = _network()
    prompt = jnp.broadcast_to(ids[:1, :3], (4000, 3))
    drawn = _decoder.generate(module, params, prompt, 1, jax.random.key(4), _decoder.drawn)
    share = np.bincount(np.asarray(drawn[:, 0]), minlength=11) / 4000
    logits, _ = module.apply({"params": params}, ids[:1, :3])
    np.testing.assert_allclose(share, jax.nn.softmax(logits[0, -1]), atol=0.03)


def test_the_library_takes_the_decoder_whole():
    module, params, ids = _network()
    apply = _language_network.logits_of(module)
    report = layers.find_layers(apply, params, ids)
    kernels = {f"layer{n}_{part}/kernel" for n in (0, 1) for part in (
        "query", "key", "value", "out", "up", "down"
    )}  # fmt: skip
    assert kernels | {"tokens/embedding"} == set(report.layers)
    statistics = layers.calibrate(apply, params, [ids])
    spec = quant.QuantSpec(4, (4, 1), range=quant.minmax, grid=quant.affine)
    for method in (quant.gptq, quant.awq, quant.hqq, quant.hadamard_rotation):
        _, found = quant.quantize_calibrated_params(
            params, statistics, spec, method, "layer.*/kernel"
        )
        assert set(found) == kernels and not [
            each for each in found.values() if isinstance(each, str)
        ]
    groups = prune.find_groups(apply, params, ids)
    heads = [group for group in groups.groups.values() if any(
        "layer0_query" in member.path for member in group.members
    )]  # fmt: skip
    assert heads


# --- Text -----------------------------------------------------------------------------------------


def test_tokens_give_back_any_text():
    tokenizer = _language.learn_tokens(["one two two three", "two two"], 300)
    text = "two Ünïcode\n  three ✓"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    found = _language.encode(tokenizer, ["two", "one"])
    ends = np.flatnonzero(found == tokenizer.token_to_id(_language.END))
    assert len(ends) == 2 and ends[-1] == len(found) - 1


def test_windows_predict_every_token_once():
    rows = _language.windows(np.arange(23), 5, 2)
    assert rows.tolist() == [list(range(start, start + 6)) for start in (2, 7, 12, 17)]
    with pytest.raises(ValueError, match="at least length .* = 9, not 8"):
        _language.windows(np.arange(8), 5, 3)


def test_without_prepared_text_the_help_topics_are_taken_and_it_is_said(folder):
    said = []
    text = _language.load_or_exit("brown", 300, said.append)
    assert text.tag == "pydoc" and "brown" in said[0] and "help topics" in said[1]
    assert text.vocabulary == 300 and len(text.train) > 5 * len(text.test) > 0
    with pytest.raises(SystemExit, match="tiny"):
        _language.load_or_exit("tiny", 300, said.append)


def test_without_tokenizers_it_is_said_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(SystemExit, match=r"pip install 'jopt\[experiments\]'"):
        _language.load_or_exit("brown", 300, print)
    with pytest.raises(ValueError, match="tokens must be at least 257, not 256"):
        _language.load("brown", 256)


# --- The experiment -------------------------------------------------------------------------------


def test_perplexity_is_that_of_each_token():
    module, params, ids = _network()
    logits = np.stack([_oracle(params, np.asarray(row[:-1]), 2) for row in ids])
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    said = np.take_along_axis(chances, np.asarray(ids)[:, 1:, None], -1)
    expected = math.exp(-np.log(said).mean())
    assert _language_network.perplexity(module, params, ids) == pytest.approx(expected, rel=1e-3)


def test_on_policy_judges_the_students_words_alone():
    module, params, ids = _network()
    loss = _language_network.on_policy_loss(module, module, 3, 3, 1.0, distill.reverse_kd_loss)
    batch = _language_network._distill_training.Batch(ids, ids, None, ids, jax.random.key(2))
    same, _ = loss(params, params, batch)
    assert float(same) == pytest.approx(0.0, abs=1e-6)
    other = jax.tree.map(lambda leaf: leaf * 1.1, params)
    assert float(loss(params, other, batch)[0]) > 1e-4
    gradient = jax.grad(lambda params: loss(params, other, batch)[0])(params)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))


def test_the_language_model_experiment_runs_and_resumes(folder):
    tiny_tfds.write_documents(folder / "tfds", "tiny_documents")
    arguments = ["--smoke", "--dataset", "tiny_documents", "--out", str(folder / "out")]
    language_model.main(arguments)
    (file,) = (folder / "out").glob("*.json")
    figures = json.loads(file.read_text())["figures"]
    rows = figures["compress"]["rows"]
    assert {row["kind"] for row in rows} == {"float", "quantized", "pruned"}
    by_method = {row["method"]: row for row in rows if row["kind"] == "quantized"}
    assert set(by_method) == {"RTN", "HQQ", "AWQ", "GPTQ", "rotation + RTN"}
    assert max(by_method["RTN"]["bytes"]) < min(rows[0]["bytes"])
    assert figures["compress"]["generated"]["same_as_before_packing"]
    assert len(figures["distill"]["rows"]) == 4
    assert len(list((folder / "out").glob("*-compress.png"))) == 1
