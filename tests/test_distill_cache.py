"""The teacher's outputs on disk."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jopt import distill

PARAMS = {"kernel": jnp.arange(12.0).reshape(3, 4)}
INPUTS = np.random.default_rng(0).normal(size=(11, 3)).astype(np.float32)


def apply(params, inputs):
    logits = inputs @ params["kernel"]
    return {
        "half": logits.astype(jnp.bfloat16),
        "logits": logits,
        "top": distill.top_k_logits(logits, 2),
    }


class Killed(Exception):
    """Stands for the end of the process."""


class Counted:
    """Inputs that count how often rows are read for the teacher, and may end the run."""

    def __init__(self, allowed):
        self.allowed, self.asked = allowed, 0

    def __call__(self, params, inputs):
        def ask(inputs):
            if self.asked == self.allowed:
                raise Killed
            self.asked += 1
            return np.asarray(inputs)

        same = jax.ShapeDtypeStruct(inputs.shape, inputs.dtype)
        return apply(params, jax.pure_callback(ask, same, inputs))


def test_all_rows_come_back_in_any_order(tmp_path):
    cache = distill.cache_teacher(tmp_path / "new" / "cache", apply, PARAMS, INPUTS, chunk=4)
    assert cache.examples == 11
    expected = jax.tree.map(np.asarray, apply(PARAMS, INPUTS))
    rows = np.array([10, 0, 3, 3])
    found = cache.rows(rows)
    assert isinstance(found["top"], distill.TopKLogits) and found["half"].dtype == jnp.bfloat16
    chex.assert_trees_all_equal_shapes_and_dtypes(found, jax.tree.map(lambda a: a[rows], expected))
    chex.assert_trees_all_close(
        jax.tree.map(np.float32, found), jax.tree.map(lambda a: np.float32(a[rows]), expected),
        rtol=1e-5,
    )  # fmt: skip
    chex.assert_trees_all_equal(cache.rows(slice(2, 4)), cache.rows([2, 3]))
    chex.assert_trees_all_equal(cache.rows(np.arange(11) < 2), cache.rows([0, 1]))
    assert not cache.outputs["logits"].flags.writeable


def test_it_opens_without_the_teacher(tmp_path):
    cache = distill.cache_teacher(tmp_path, apply, PARAMS, INPUTS, chunk=4)
    alone = distill.open_teacher_cache(tmp_path)
    paths = ["half", "logits", *(f"top/{n}" for n in ("indices", "codes", "step", "rest"))]
    assert list(alone.outputs) == paths
    np.testing.assert_array_equal(alone.rows([1])["top/codes"], cache.rows([1])["top"].codes)
    like = jax.eval_shape(apply, PARAMS, INPUTS)
    chex.assert_trees_all_equal(
        distill.open_teacher_cache(tmp_path, like).rows([7]), cache.rows([7])
    )
    with pytest.raises(ValueError, match=r"like must have the paths \['half', 'logits'"):
        distill.open_teacher_cache(tmp_path, {"logits": 0})


def test_keys_among_parameters_are_told_apart(tmp_path):
    params = {"dropout": jax.random.key(0), **PARAMS}
    distill.cache_teacher(tmp_path, apply, params, INPUTS)
    with pytest.raises(ValueError, match="its teacher differs"):
        distill.cache_teacher(tmp_path, apply, params | {"dropout": jax.random.key(1)}, INPUTS)


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_a_killed_run_goes_on_where_it_was(tmp_path, allowed):
    killed = Counted(allowed)
    with pytest.raises(Exception, match="Killed"):
        distill.cache_teacher(tmp_path, killed, PARAMS, INPUTS, chunk=4)
    with pytest.raises(ValueError, match=rf"holds {4 * allowed} of 11 examples: run cache_teacher"):
        distill.open_teacher_cache(tmp_path)
    rest = Counted(99)
    cache = distill.cache_teacher(tmp_path, rest, PARAMS, INPUTS, chunk=4)
    assert rest.asked == 3 - allowed
    np.testing.assert_allclose(
        cache.rows(slice(None))["logits"], INPUTS @ np.asarray(PARAMS["kernel"]), rtol=1e-5
    )
    again = Counted(0)
    chex.assert_trees_all_equal(
        distill.cache_teacher(tmp_path, again, PARAMS, INPUTS, chunk=4).rows([5]), cache.rows([5])
    )


@pytest.mark.parametrize("index_is_there", [True, False])
def test_a_run_killed_before_its_first_array_goes_on(tmp_path, index_is_there):
    distill.cache_teacher(tmp_path, apply, PARAMS, INPUTS)
    index = json.loads((tmp_path / "cache.json").read_text())
    for file in tmp_path.iterdir():
        file.unlink()
    (tmp_path / ".cache.json.0123.tmp").write_text('{"for')
    if index_is_there:
        begun = index | {"done": 0, "checksums": [0] * len(index["arrays"])}
        (tmp_path / "cache.json").write_text(json.dumps(begun))
    cache = distill.cache_teacher(tmp_path, apply, PARAMS, INPUTS)
    np.testing.assert_allclose(
        cache.rows([8])["logits"], INPUTS[[8]] @ np.asarray(PARAMS["kernel"]), rtol=1e-5
    )


def test_trees_of_inputs_and_bare_outputs(tmp_path):
    inputs = {"a": np.arange(5.0, dtype=np.float32), "b": np.ones((5, 2), np.float32)}
    cache = distill.cache_teacher(
        tmp_path, lambda w, x: w * x["a"] + x["b"].sum(-1), jnp.float32(2), inputs, chunk=2
    )
    np.testing.assert_array_equal(cache.rows(slice(None)), [2, 4, 6, 8, 10])
    np.testing.assert_array_equal(distill.open_teacher_cache(tmp_path).rows([4]), [10])


def test_another_teacher_or_other_inputs_are_refused(tmp_path):
    distill.cache_teacher(tmp_path / "cache", apply, PARAMS, INPUTS)
    before = (tmp_path / "cache" / "cache.json").read_text()
    with pytest.raises(ValueError, match="its teacher differs"):
        distill.cache_teacher(tmp_path / "cache", apply, {"kernel": PARAMS["kernel"] + 1}, INPUTS)
    with pytest.raises(ValueError, match="its inputs differs"):
        distill.cache_teacher(tmp_path / "cache", apply, PARAMS, INPUTS + 1)
    with pytest.raises(ValueError, match="outputs of other names, shapes or dtypes"):
        distill.cache_teacher(tmp_path / "cache", lambda p, x: x @ p["kernel"], PARAMS, INPUTS)
    assert (tmp_path / "cache" / "cache.json").read_text() == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files, and no cache\.json"):
        distill.cache_teacher(other, apply, PARAMS, INPUTS)
    with pytest.raises(FileNotFoundError, match=r"holds no cache\.json"):
        distill.open_teacher_cache(other)


def test_damage_is_seen(tmp_path):
    distill.cache_teacher(tmp_path, apply, PARAMS, INPUTS)
    np.save(tmp_path / "1.npy", np.zeros((3, 4), np.float32))
    with pytest.raises(ValueError, match=r"1\.npy is damaged: it holds float32 of shape \(3, 4\)"):
        distill.open_teacher_cache(tmp_path)
    index = json.loads((tmp_path / "cache.json").read_text())
    (tmp_path / "cache.json").write_text(json.dumps(index | {"format": 1}))
    with pytest.raises(ValueError, match="has format 1, not 2: delete the folder"):
        distill.open_teacher_cache(tmp_path)


def test_every_flipped_byte_and_cut_is_seen(tmp_path):
    distill.cache_teacher(tmp_path, apply, PARAMS, INPUTS, chunk=4)
    rng = np.random.default_rng(0)
    for file in sorted(tmp_path.iterdir()):
        whole = file.read_bytes()
        damaged = [whole[:0], whole[:9], whole[: len(whole) // 2], whole[:-1]]
        for place in (*rng.integers(0, len(whole), 30), len(whole) - 1):
            damaged.append(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        for data in damaged:
            file.write_bytes(data)
            if file.suffix == ".npy" and data[128:] == whole[128:]:  # some bytes only fill up
                continue
            try:
                distill.open_teacher_cache(tmp_path)
            except ValueError as error:
                assert str(tmp_path) in str(error)
            else:
                assert file.name == "cache.json"  # digests of inputs are not compared here
        file.write_bytes(whole)
    (tmp_path / "1.npy").unlink()
    with pytest.raises(ValueError, match=r"is damaged: 1\.npy is not there"):
        distill.open_teacher_cache(tmp_path)


def test_a_checksum_may_be_left_alone(tmp_path):
    distill.cache_teacher(tmp_path, apply, PARAMS, INPUTS)
    data = bytearray((tmp_path / "1.npy").read_bytes())
    data[-1] ^= 1
    (tmp_path / "1.npy").write_bytes(data)
    with pytest.raises(ValueError, match=r"1\.npy is damaged: its bytes are not those"):
        distill.open_teacher_cache(tmp_path)
    assert distill.open_teacher_cache(tmp_path, verify=False).examples == 11


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match="chunk must be at least 1, not 0"):
        distill.cache_teacher(tmp_path, apply, PARAMS, INPUTS, chunk=0)
    with pytest.raises(ValueError, match="as many in each"):
        distill.cache_teacher(tmp_path, apply, PARAMS, {"a": INPUTS, "b": INPUTS[:3]})
    with pytest.raises(ValueError, match="at least one"):
        distill.cache_teacher(tmp_path, apply, PARAMS, INPUTS[:0])
    with pytest.raises(
        ValueError, match=r"a row for each of 512 inputs, but output '' has shape \(4,\)"
    ):
        distill.cache_teacher(tmp_path, lambda p, x: x.sum() * p["kernel"][0], PARAMS, INPUTS)
    assert not any(tmp_path.iterdir())
