"""The .jopt file gives back what it was given, in few bytes, and accounts for each of them."""

import math
import os
from typing import Any, NamedTuple

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jopt import codec
from jopt._leaves import QTensor
from jopt.codec import CodecError

NARROW = ["int2", "uint2", "int4", "uint4"]
INTEGERS = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
FLOATS = ["float16", "bfloat16", "float32", "float64"]
FLOAT8 = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "float8_e8m0fnu"]
COMPLEX = ["complex64", "complex128"]
DTYPES = ["bool", *NARROW, *INTEGERS, *FLOATS, *FLOAT8, *COMPLEX]


def bits_of(leaf):
    """Return dtype, shape and bytes: what must come back unchanged."""
    array = np.asarray(leaf)
    return array.dtype.name, array.shape, array.tobytes()


def assert_same_bits(tree, other):
    leaves, structure = jax.tree.flatten(tree)
    others, other_structure = jax.tree.flatten(other)
    assert structure == other_structure
    for leaf, twin in zip(leaves, others, strict=True):
        if hasattr(leaf, "dtype"):
            assert bits_of(leaf) == bits_of(twin)
        else:
            assert type(leaf) is type(twin) and repr(leaf) == repr(twin)


def array_of(dtype, shape, seed, zeros):
    """Make an array of random bit patterns, a fraction of them zero."""
    rng = np.random.default_rng(seed)
    kind = jnp.dtype(dtype)
    if dtype == "bool":
        return rng.random(shape) >= zeros
    if dtype in NARROW:
        info = jnp.iinfo(kind)
        values = rng.integers(int(info.min), int(info.max) + 1, shape)
        return np.where(rng.random(shape) < zeros, 0, values).astype(kind)
    count = math.prod(shape)
    raw = rng.integers(0, 256, count * kind.itemsize, dtype=np.uint8)
    raw[np.repeat(rng.random(count) < zeros, kind.itemsize)] = 0
    return raw.view(kind).reshape(shape)


def round_trip(path, tree, **options):
    size = codec.save(path, tree)
    assert size == os.path.getsize(path) == codec.verify(path, tree).total
    return codec.load(path, **options)


def entropy_bytes(symbols):
    counts = np.unique(symbols, return_counts=True)[1]
    return float((counts * np.log2(counts.sum() / counts)).sum()) / 8


@pytest.fixture
def file(tmp_path):
    return tmp_path / "tree.jopt"


# Exactness --------------------------------------------------------------------------------------


@pytest.mark.parametrize("zeros", [0.0, 0.9])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (37,), (20, 15), (3, 3, 4, 9)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_shape_comes_back_bit_for_bit(dtype, shape, zeros, file):
    tree = {"leaf": array_of(dtype, shape, 0, zeros)}
    assert_same_bits(round_trip(file, tree), tree)


@given(
    hnp.arrays(
        st.sampled_from(["int8", "uint8", "int16", "int32", "float32", "float16", "bool"]),
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6),
    )
)
def test_any_values_come_back_bit_for_bit(tmp_path_factory, array):
    path = tmp_path_factory.mktemp("values") / "tree.jopt"
    assert_same_bits(round_trip(path, [array]), [array])


def leaves():
    finite_and_not = st.floats(allow_nan=True, allow_infinity=True)
    integers = st.integers(-(2**63), 2**63 - 1)
    return st.one_of(st.none(), st.booleans(), integers, finite_and_not, st.text(max_size=5))


def trees():
    def containers(children):
        return st.one_of(
            st.lists(children, max_size=3),
            st.lists(children, max_size=3).map(tuple),
            st.dictionaries(st.text(max_size=4), children, max_size=3),
            st.dictionaries(st.integers(-5, 5), children, max_size=3),
        )

    arrays = st.builds(
        array_of,
        st.sampled_from(DTYPES),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
        st.integers(0, 99),
        st.sampled_from([0.0, 0.7]),
    )
    return st.recursive(leaves() | arrays, containers, max_leaves=8)


@given(trees())
def test_any_structure_comes_back(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("structures") / "tree.jopt"
    codec.save(path, tree)
    assert_same_bits(codec.load(path), tree)


def test_special_floats_keep_their_bits(file):
    patterns = np.array([0x7FC00001, 0xFFC12345, 0x7F800000, 0xFF800000, 0x80000000, 0, 1])
    array = patterns.astype(np.uint32).view(np.float32)
    tree = {"array": array, "nan": math.nan, "inf": -math.inf, "zero": -0.0}
    loaded = round_trip(file, tree)
    assert_same_bits(loaded, tree)
    assert math.copysign(1, loaded["zero"]) == -1


def test_arrays_come_back_as_jax_arrays_unless_jax_would_narrow_them(file):
    loaded = round_trip(file, {"a": np.ones(2, np.float32), "b": np.ones(2, np.float64)})
    assert isinstance(loaded["a"], jax.Array)
    assert isinstance(loaded["b"], np.ndarray)


def test_big_endian_and_strided_arrays_are_stored_by_value(file):
    array = np.arange(12, dtype=">f4").reshape(3, 4)[:, ::2]
    codec.save(file, array)
    np.testing.assert_array_equal(codec.load(file), array)


@pytest.mark.parametrize("zero_point", [None, "channel", "group", "tensor", "float"])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int4", "uint4", "int2"])
def test_compressed_leaves_come_back(dtype, zero_point, file):
    shapes = {"channel": (1, 8), "group": (4, 8), "tensor": (1, 1), "float": (1, 8)}
    kind = "float32" if zero_point == "float" else dtype
    zeros = None if zero_point is None else array_of(kind, shapes[zero_point], 1, 0.0)
    leaf = QTensor(array_of(dtype, (12, 8), 0, 0.5), jnp.ones((1, 8)), zeros)  # type: ignore
    tree = {"kernel": leaf, "bias": jnp.zeros(8)}
    loaded = round_trip(file, tree)
    assert type(loaded["kernel"]) is QTensor
    assert_same_bits(loaded, tree)


def test_zero_points_per_channel_do_not_hide_the_zeros(file):
    rng = np.random.default_rng(0)
    zero_point = rng.integers(0, 16, (1, 64))
    steps = rng.integers(-3, 4, (256, 64)) * (rng.random((256, 64)) < 0.1)
    codes = jnp.asarray((steps + zero_point) % 16, jnp.uint4)
    scale = jnp.ones((1, 64))
    with_zeros = codec.save(file, QTensor(codes, scale, jnp.asarray(zero_point, jnp.uint4)))
    assert_same_bits(codec.load(file).codes, codes)
    centred = jnp.asarray(steps, jnp.int4)
    assert with_zeros < codec.save(file, QTensor(centred, scale, None)) + 100


# Structures -------------------------------------------------------------------------------------


class Pair(NamedTuple):
    left: Any
    right: Any


def test_networks_come_back_as_dicts_and_into_their_own_structure(network, images, file):
    apply, params = network
    codec.save(file, params)
    plain = codec.load(file)
    restored = codec.load(file, like=params)
    assert isinstance(plain, dict)
    assert bits_of(plain["conv"]["kernel"]) == bits_of(jax.tree.leaves(params["conv"])[1])
    assert_same_bits(restored, params)
    np.testing.assert_array_equal(apply(restored, images), apply(params, images))


def test_compressed_leaves_go_into_an_nnx_state(file):
    state = nnx.state(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    codes = QTensor(jnp.ones((4, 3), jnp.int8), jnp.ones((1, 3)))
    compressed = jax.tree.map(lambda leaf: codes if leaf.ndim == 2 else leaf, state)
    codec.save(file, compressed)
    assert_same_bits(codec.load(file, like=state), compressed)
    assert codec.inspect(file).entries[1].path == "kernel"


def test_other_containers_come_back_as_plain_ones(file):
    frozen = linen.FrozenDict({"a": jnp.ones(2)}) if hasattr(linen, "FrozenDict") else {}
    tree = {"pair": Pair(jnp.zeros(2), None), "frozen": frozen}
    codec.save(file, tree)
    plain = codec.load(file)
    assert type(plain["pair"]) is dict and list(plain["pair"]) == ["left", "right"]
    assert type(plain["frozen"]) is dict
    assert isinstance(codec.load(file, like=tree)["pair"], Pair)


def test_like_lists_the_differences(file):
    codec.save(file, {"a": jnp.ones(2), "b": jnp.ones(2)})
    with pytest.raises(CodecError, match=r"only like has 'c'; only the file has 'b'"):
        codec.load(file, like={"a": jnp.ones(2), "c": jnp.ones(2)})
    with pytest.raises(CodecError, match=r"leaf 'b' has shape \(2,\) in the file, \(3,\) in like"):
        codec.load(file, like={"a": jnp.ones(2), "b": jnp.ones(3)})


def test_metadata_comes_back_and_must_be_plain_json(file):
    metadata = {"network": "lenet", "accuracy": 0.5, "sizes": [1, 2], "deep": {"é": None}}
    codec.save(file, {}, metadata=metadata)
    assert codec.read_metadata(file) == metadata
    codec.save(file, {})
    assert codec.read_metadata(file) == {}
    for bad in ({"a": (1, 2)}, {1: 2}, {"a": math.nan}, {"a": object()}, [1]):
        with pytest.raises(CodecError, match="metadata"):
            codec.save(file, {}, metadata=bad)  # type: ignore


# Size -------------------------------------------------------------------------------------------


def gaussian_codes(bits, shape, keep=1.0, seed=0):
    rng = np.random.default_rng(seed)
    top = 2 ** (bits - 1) - 1
    codes = np.clip(np.round(rng.normal(size=shape) * top / 2.5), -top, top)
    return (codes * (rng.random(shape) < keep)).astype(np.int8)


@pytest.mark.parametrize(
    ("bits", "keep", "shape"),
    [
        (4, 1.0, (512, 512)),
        (4, 0.1, (512, 512)),
        (8, 1.0, (512, 512)),
        (4, 0.1, (1024, 600)),
        (4, 0.1, (300_000,)),
        (2, 0.5, (70_000, 4)),
    ],
)
def test_independent_codes_take_their_entropy(bits, keep, shape, file):
    codes = gaussian_codes(bits, shape, keep)
    size = codec.save(file, codes)
    assert size < 1.01 * entropy_bytes(codes) + 120
    np.testing.assert_array_equal(codec.load(file), codes)


def test_masks_with_dead_rows_and_columns_take_much_less_than_their_entropy(file):
    rng = np.random.default_rng(0)
    chance = 0.05 * np.outer(rng.gamma(0.5, 2, 400), rng.gamma(1.0, 1, 300))
    mask = rng.random((400, 300)) < np.clip(chance, 0, 1)
    size = codec.save(file, mask)
    ideal = -np.log2(np.where(mask, chance, 1 - chance).clip(1e-9, 1)).sum() / 8
    assert size < 0.85 * entropy_bytes(mask)
    assert size < 1.12 * ideal


def test_smooth_receptive_fields_are_found_and_used(file):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(16, 16, 128))
    for axis in (0, 1):
        images = images + np.roll(images, 1, axis) + np.roll(images, -1, axis)
    weights = images.reshape(256, 128)
    cut = np.quantile(np.abs(weights), 0.9)
    codes = np.where(np.abs(weights) > cut, np.clip(np.round(weights / cut * 2), -7, 7), 0)
    for matrix in (codes, codes.T):  # pixels in rows, then in columns
        matrix = np.ascontiguousarray(matrix.astype(np.int8))
        assert codec.save(file, matrix) < 0.85 * entropy_bytes(matrix)
        np.testing.assert_array_equal(codec.load(file), matrix)


def test_masked_floats_pay_for_what_is_kept(file):
    rng = np.random.default_rng(0)
    dense = rng.normal(size=(300, 200)).astype(np.float32)
    mask = rng.random((300, 200)) < 0.1
    size = codec.save(file, np.where(mask, dense, np.float32(0)))
    kept = codec.save(file, dense[mask])
    assert size < kept + entropy_bytes(mask) * 1.02 + 30
    assert kept < 0.9 * dense[mask].nbytes


def test_incompressible_arrays_cost_a_few_bytes_more(file):
    noise = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8)
    assert codec.save(file, noise) < 5000 + 50


def lenet_like(seed=0):
    """Return the codes of a pruned LeNet-300-100 with uneven rows and columns, and its biases."""
    rng = np.random.default_rng(seed)
    tree = {}
    shapes = [(784, 300, 0.04), (300, 100, 0.06), (100, 10, 0.3)]
    for at, (rows, cols, density) in enumerate(shapes):
        chance = density * np.outer(rng.gamma(1, 1, rows), rng.gamma(4, 0.25, cols))
        codes = gaussian_codes(4, (rows, cols), 1.0, seed + at)
        codes[rng.random((rows, cols)) >= chance] = 0
        kernel = QTensor(jnp.asarray(codes, jnp.int4), jnp.full((1, 1), 0.1), None)
        bias = QTensor(jnp.asarray(gaussian_codes(8, (cols,))), jnp.full((1,), 0.1), None)
        tree[f"Dense_{at}"] = {"kernel": kernel, "bias": bias}
    return {"params": tree}


def test_the_file_of_a_small_network_wastes_little(file):
    tree = lenet_like()
    size = codec.save(file, tree, metadata={"network": "lenet_300_100"})
    ledger = codec.inspect(file)
    ideal = sum(entropy_bytes(np.asarray(leaf)) for leaf in jax.tree.leaves(tree) if leaf.size > 1)
    coded = sum(entry.values + entry.mask for entry in ledger.entries)
    assert size - coded < 250
    assert coded < 0.97 * ideal


# Ledger -----------------------------------------------------------------------------------------


def test_the_ledger_adds_up_to_the_file(network, file):
    _, params = network
    tree = {"net": params, "q": lenet_like()["params"]["Dense_2"], "rate": 0.5, "none": None}
    size = codec.save(file, tree, metadata={"a": 1})
    ledger = codec.inspect(file)
    assert ledger.total == size == ledger.header + sum(entry.total for entry in ledger.entries)
    assert ledger.float32_bytes == sum(entry.float32_bytes for entry in ledger.entries)
    paths = [entry.path for entry in ledger.entries]
    assert "q/kernel" in paths and "net/conv/kernel" in paths and "rate" in paths
    lines = str(ledger).splitlines()
    assert len(lines) == len(ledger.entries) + 4
    assert lines[-1].startswith("total") and str(size) in lines[-1]


def test_the_ledger_says_what_leaves_are(file):
    tree = {
        "codes": QTensor(jnp.array([[0, 1, 0, 2]], jnp.int4), jnp.ones((1, 1)), None),
        "mask": np.array([True, False, False]),
        "step": 3,
    }
    codec.save(file, tree)
    codes, mask, step = codec.inspect(file).entries
    assert (codes.kind, codes.shape, codes.dtype) == ("QTensor", (1, 4), "int4")
    assert (codes.zeros, codes.float32_bytes) == (0.5, 16)
    assert codes.scales > 0 and codes.header == 4
    assert mask.zeros == pytest.approx(2 / 3) and mask.float32_bytes == 3
    assert (step.kind, step.dtype, step.total) == ("scalar", "int", 0)


def test_verify_names_the_first_leaf_that_differs(file):
    tree = {"a": jnp.ones(3), "b": jnp.zeros(2), "c": 1.0, "d": "text"}
    codec.save(file, tree)
    codec.verify(file, tree)
    for path, value in (
        ("b", -jnp.zeros(2)),
        ("a", jnp.ones(2)),
        ("c", 1),
        ("d", ""),
    ):
        with pytest.raises(CodecError, match=f"leaf '{path}'"):
            codec.verify(file, {**tree, path: value})
    with pytest.raises(CodecError, match="only the tree has 'e'"):
        codec.verify(file, {**tree, "e": 1})
