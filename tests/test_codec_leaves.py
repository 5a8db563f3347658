"""Every class of compressed leaf, leaves within leaves included, comes back from a file."""

import base64
import zlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import jopt
from jopt import codec, prune
from jopt._leaves import (
    COMPRESSED_CLASSES,
    BitTensor,
    CodebookTensor,
    FloatTensor,
    QTensor,
    RotatedTensor,
    ScaledTensor,
)
from jopt.codec import CodecError
from tests.test_codec import array_of, assert_same_bits
from tests.test_codec_corruption import header_of, mutate, with_header

FLOAT4 = jnp.dtype("float4_e2m1fn")


def float4_of(shape, seed):
    raw = np.random.default_rng(seed).integers(0, 16, shape, dtype=np.uint8)
    return raw.view(ml_dtypes.float4_e2m1fn)


def quantized(seed=0):
    codes = array_of("int4", (8, 6), seed, 0.5)
    return QTensor(jnp.asarray(codes), jnp.linspace(0.5, 1.0, 6).reshape(1, 6))


def affine():
    zeros = jnp.asarray(array_of("uint4", (2, 6), 1, 0.0))
    return QTensor(jnp.asarray(array_of("uint4", (8, 6), 0, 0.2)), jnp.ones((2, 6)), zeros)


def bits(shape=(3, 3, 2, 6), scale=(1, 1, 1, 6)):
    rows = int(np.prod(shape[:-1]))
    packed = array_of("uint8", (-(-rows // 8), shape[-1]), 2, 0.0)
    packed[-1] &= (1 << (rows % 8 or 8)) - 1
    return BitTensor(jnp.asarray(packed), jnp.full(scale, 0.5), jnp.zeros((*shape, 0), bool))


def factor(shape=(8, 1)):
    return jnp.linspace(0.5, 2.0, shape[0]).reshape(shape)


def signs():
    return jnp.where(jnp.arange(8).reshape(8, 1) % 3 == 0, -1, 1).astype(jnp.int8)


def table(entries, blocks=(1, 1)):
    return jnp.linspace(-1.0, 2.0, entries * blocks[0] * blocks[1]).reshape(*blocks, entries)


def float_codes(dtype):
    return jnp.linspace(-3.0, 3.0, 48).reshape(8, 6).astype(dtype)


LEAVES = {
    "symmetric": quantized,
    "affine": affine,
    "codebook": lambda: CodebookTensor(jnp.asarray(array_of("uint4", (8, 6), 3, 0.3)), table(16)),
    "codebook_of_groups": lambda: CodebookTensor(
        jnp.asarray(array_of("uint2", (8, 6), 3, 0.3)), table(3, (2, 6)), jnp.ones((4, 1))
    ),
    "float8": lambda: FloatTensor(float_codes(jnp.float8_e4m3fn), jnp.ones((1, 6))),
    "float8_e5m2": lambda: FloatTensor(float_codes(jnp.float8_e5m2), jnp.ones((1, 6))),
    "mxfp4": lambda: FloatTensor(
        jnp.asarray(float4_of((8, 6), 0)),
        jnp.exp2(jnp.arange(12.0).reshape(2, 6)).astype(jnp.float8_e8m0fnu),
        jnp.ones((1, 1)),
    ),
    "nvfp4": lambda: FloatTensor(
        jnp.asarray(float4_of((8, 6), 1)),
        jnp.linspace(0.1, 9.0, 12).reshape(2, 6).astype(jnp.float8_e4m3fn),
        jnp.full((1, 1), 0.01),
    ),
    "bits": bits,
    "bits_of_a_dense_kernel": lambda: bits((9, 5), (1, 1)),
    "stacked_bits": lambda: jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), bits()),
    "scaled": lambda: ScaledTensor(quantized(), factor()),
    "scaled_affine": lambda: ScaledTensor(affine(), factor()),
    "scaled_bits": lambda: ScaledTensor(bits((8, 6), (1, 6)), factor()),
    "scaled_array": lambda: ScaledTensor(jnp.ones((8, 6)), factor()),
    "rotated": lambda: RotatedTensor(quantized(), signs()),
    "rotated_floats": lambda: RotatedTensor(LEAVES["nvfp4"](), signs()),
    "scaled_and_rotated": lambda: ScaledTensor(RotatedTensor(quantized(), signs()), factor()),
    "without_codes": lambda: QTensor(None, jnp.ones((1, 6))),  # type: ignore
}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "tree.jopt"


def test_every_class_has_an_example():
    assert {type(make()) for make in LEAVES.values()} == set(COMPRESSED_CLASSES)


@pytest.mark.parametrize("name", LEAVES)
def test_leaves_come_back_bit_for_bit_and_are_accounted_for(name, file):
    tree = {"kernel": LEAVES[name](), "bias": jnp.zeros(6)}
    size = codec.save(file, tree)
    loaded = codec.load(file, like=tree)
    assert_same_bits(loaded, tree)
    assert_same_bits(codec.load(file), tree)
    ledger = codec.verify(file, tree)
    assert ledger.total == size
    if name != "without_codes":
        restored = np.asarray(jopt.materialize(loaded["kernel"]))
        np.testing.assert_array_equal(restored, jopt.materialize(tree["kernel"]))
        assert ledger.entries[1].shape == restored.shape
        zeros = np.count_nonzero(restored == 0) / restored.size
        assert ledger.entries[1].zeros == pytest.approx(zeros)


@pytest.mark.parametrize("shape", [(), (0,), (5,), (64, 50)])
def test_float4_comes_back_whatever_its_bits(shape, file):
    tree = [float4_of(shape, 0), float4_of(shape, 1).reshape(shape[::-1]).T]
    codec.save(file, tree)
    codec.verify(file, tree)
    loaded = codec.load(file)
    for array, twin in zip(loaded, tree, strict=True):
        assert array.dtype == FLOAT4
        np.testing.assert_array_equal(np.asarray(array).view(np.uint8), twin.view(np.uint8))


def test_float4_takes_half_a_byte_at_most(file):
    assert codec.save(file, float4_of((100, 100), 0)) < 5000 + 50


def test_signs_take_one_bit_each_and_their_shape_nothing(file):
    leaf = bits((100, 80), (1, 1))
    assert codec.save(file, leaf) < 100 * 80 / 8 + 150
    entry = codec.inspect(file).entries[0]
    assert (entry.kind, entry.dtype, entry.shape) == ("BitTensor", "uint8", (100, 80))
    assert entry.float32_bytes == 4 * 100 * 80


def test_the_ledger_of_a_wrapped_leaf_is_that_of_the_codes_within(file):
    wrapped = LEAVES["scaled_and_rotated"]()
    codec.save(file, {"wrapped": wrapped, "bare": quantized()})
    bare, entry = codec.inspect(file).entries
    assert (entry.kind, entry.dtype, entry.shape) == ("ScaledTensor", "int4", (8, 6))
    assert (entry.values, entry.mask) == (bare.values, bare.mask)
    assert entry.scales > bare.scales
    assert entry.float32_bytes == bare.float32_bytes


def test_wrapped_affine_codes_are_stored_as_compactly_as_bare_ones(file):
    codec.save(file, [affine(), ScaledTensor(affine(), factor())])
    bare, wrapped = codec.inspect(file).entries
    assert wrapped.values + wrapped.mask == bare.values + bare.mask


def test_leaves_go_into_an_nnx_state(file):
    state = nnx.state(nnx.Linear(8, 6, rngs=nnx.Rngs(0)))
    wrapped = LEAVES["scaled_and_rotated"]()
    compressed = jax.tree.map(lambda leaf: wrapped if leaf.ndim == 2 else leaf, state)
    codec.save(file, compressed)
    assert_same_bits(codec.load(file, like=state), compressed)
    with pytest.raises(CodecError, match=r"has shape \(8, 6\) in the file, \(7, 6\) in like"):
        codec.load(file, like=nnx.state(nnx.Linear(7, 6, rngs=nnx.Rngs(0))))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda leaf: leaf.replace(factor=2 * leaf.factor), "'w.factor' differs .* in 8 of 8"),
        (lambda leaf: leaf.replace(tensor=quantized()), "'w.tensor' is a RotatedTensor in the f"),
        (
            lambda leaf: leaf.replace(tensor=leaf.tensor.replace(signs=-leaf.tensor.signs)),
            "'w.tensor.signs' differs",
        ),
        (
            lambda leaf: leaf.replace(tensor=leaf.tensor.replace(tensor=quantized(1))),
            "'w.tensor.tensor.codes' differs",
        ),
        (lambda leaf: leaf.tensor, "'w' is a ScaledTensor in the file, a RotatedTensor in the"),
    ],
)
def test_verify_names_the_field_within(change, words, file):
    leaf = LEAVES["scaled_and_rotated"]()
    codec.save(file, {"w": leaf})
    with pytest.raises(CodecError, match=words):
        codec.verify(file, {"w": change(leaf)})


@pytest.mark.parametrize(
    ("leaf", "words"),
    [
        (lambda: QTensor(quantized(), jnp.ones((1, 6))), "'w.codes' is a QTensor, not an array"),  # type: ignore
        (lambda: ScaledTensor(quantized(), quantized()), "'w.factor' is a QTensor"),  # type: ignore
        (lambda: ScaledTensor(object(), factor()), "'w.tensor' is a object"),
        (
            lambda: ScaledTensor(quantized().replace(scale=jax.random.key(0)), factor()),  # type: ignore
            "'w.tensor.scale' holds PRNG keys",
        ),
    ],
)
def test_what_no_field_may_hold_is_refused_and_the_field_named(leaf, words, file):
    with pytest.raises(CodecError, match=words):
        codec.save(file, {"w": leaf()})


# Damage -----------------------------------------------------------------------------------------


def nested_tree():
    return {name: LEAVES[name]() for name in ("scaled_affine", "rotated_floats", "bits")}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "good.jopt"
    codec.save(path, nested_tree())
    return path.read_bytes()


@pytest.fixture
def load(tmp_path):
    def load_bytes(data, read=codec.load):
        path = tmp_path / "file.jopt"
        path.write_bytes(data)
        return read(path, max_elements=20_000)

    return load_bytes


def bytes_of(row):
    """Return the bytes of a row, leaves within included."""
    if row is None:
        return 0
    if isinstance(row[1], list) and any(not isinstance(entry, int) for entry in row[1]):
        return sum(map(bytes_of, row[1]))
    return row[2]


def test_rows_of_leaves_within_are_rows(good):
    (_, rows), _ = header_of(good)
    assert [row[0] for row in rows] == ["BitTensor", "RotatedTensor", "ScaledTensor"]
    assert rows[1][1][0][0] == "FloatTensor"
    assert rows[2][1][0] == ["QTensor", rows[2][1][0][1], 1]


def test_any_flipped_bit_of_a_nested_leaf_is_refused(good, load):
    rng = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(good)
        damaged[rng.integers(len(good))] ^= 1 << int(rng.integers(8))
        with pytest.raises(CodecError):
            load(bytes(damaged))
    for length in range(0, len(good), 11):
        with pytest.raises(CodecError):
            load(good[:length])


def test_mutated_headers_of_nested_leaves_are_refused_or_read(good, load):
    rng = np.random.default_rng(1)
    fields, body = header_of(good)
    read = 0
    for _ in range(250):
        data = with_header(mutate(rng, fields), body)
        try:
            load(data)
            read += 1
        except CodecError:
            continue
    assert 0 < read < 125


def test_mutated_bytes_of_nested_leaves_are_refused_or_harmless(good, load):
    rng = np.random.default_rng(2)
    fields, body = header_of(good)
    tree, starts, at = nested_tree(), [], 0
    for row in fields[1]:
        starts.append((at, at + bytes_of(row)))
        at += bytes_of(row) + 4
    for _ in range(150):
        start, stop = starts[rng.integers(len(starts))]
        changed = bytearray(body)
        changed[start + int(rng.integers(stop - start))] = int(rng.integers(256))
        changed[stop : stop + 4] = zlib.crc32(changed[start:stop]).to_bytes(4, "little")
        try:
            loaded = load(with_header(fields, bytes(changed)))
        except CodecError:
            continue
        assert_same_bits(loaded, tree)


def deep(levels):
    row = ["QTensor", [["int8", [1, 1], 2], ["float32", [1, 1], 2], None]]
    for _ in range(levels):
        row = ["ScaledTensor", [row, ["float32", [1, 1], 2]]]
    return row


SCALE = ["float32", [1], 2]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (["QTensor", [deep(0), SCALE, None]], "malformed"),
        (["ScaledTensor", [SCALE, deep(0)]], "malformed"),
        (["ScaledTensor", [["NewTensor", [SCALE]], SCALE]], "no compressed leaf 'NewTensor'"),
        (["ScaledTensor", [[["x"], [SCALE]], SCALE]], "no compressed leaf"),
        (["ScaledTensor", [["QTensor", [SCALE] * 4], SCALE]], "fields of QTensor"),
        (["ScaledTensor", [["QTensor", [SCALE, SCALE], 2], SCALE]], "fields of QTensor"),
        (["ScaledTensor", [deep(0), SCALE, SCALE]], "fields of ScaledTensor"),
        (["ScaledTensor", ["QTensor", SCALE]], "malformed"),
        (deep(9), "8 deep"),
        (deep(200), "8 deep"),
        (["BitTensor", [["uint8", [1, 1], 2], SCALE, ["bool", [2**30, 2**30, 0], 0]]], "imposs"),
        (["BitTensor", [["uint8", [1], 1], SCALE[:2] + [1], ["bool", [2**39, 0], 0]]], "array el"),
    ],
)
def test_impossible_rows_are_refused_at_once(row, words, load):
    with pytest.raises(CodecError, match=words):
        load(with_header([[], [row]], bytes(10)))


@pytest.mark.parametrize(
    "leaf",
    [
        # Broadcasting these would take terabytes.
        ScaledTensor(
            QTensor(jnp.ones((1, 1 << 20), jnp.int8), jnp.ones((1, 1))), jnp.ones((1 << 20, 1))
        ),
        RotatedTensor(
            QTensor(jnp.ones((1, 1 << 20), jnp.int8), jnp.ones((1, 1))),
            jnp.ones((1 << 20, 1), jnp.int8),
        ),
        FloatTensor(
            jnp.ones((2, 2), jnp.float8_e5m2), jnp.ones((1, 1 << 20)), jnp.ones((1 << 20, 1))
        ),
        BitTensor(jnp.ones((1, 4), jnp.uint8), jnp.ones((1, 1)), jnp.zeros((1 << 20, 4, 0), bool)),
        CodebookTensor(jnp.ones((4, 4), jnp.uint4), jnp.ones((3, 1, 16))),
        CodebookTensor(jnp.ones((4, 4), jnp.uint4), jnp.ones((0, 1, 16))),
        ScaledTensor(None, jnp.ones((2, 2))),
    ],
    ids=lambda leaf: type(leaf).__name__,
)
def test_fields_that_do_not_fit_load_and_inspect_says_so(leaf, file):
    size = codec.save(file, leaf)
    assert_same_bits(codec.load(file), leaf)
    ledger = codec.inspect(file)
    assert ledger.total == size and ledger.entries[0].shape == ()


# The format -------------------------------------------------------------------------------------


def golden_leaves():
    """Return one leaf of each class, without any random generator."""
    grid = np.arange(48).reshape(8, 6)
    mixed = (grid * 2654435761 >> 7) % 16
    q = QTensor(jnp.asarray(mixed // 2 - 4, jnp.int4), jnp.ones((1, 6)))
    fp4 = jnp.asarray(mixed.astype(np.uint8).view(ml_dtypes.float4_e2m1fn))
    scale = jnp.full((2, 6), 0.5, jnp.float8_e8m0fnu)
    packed = jnp.asarray(mixed[:1] * 16 + mixed[1:2], jnp.uint8)
    return {
        "bits": BitTensor(packed, jnp.ones((1, 6)), jnp.zeros((8, 6, 0), bool)),
        "codebook": CodebookTensor(jnp.asarray(mixed % 4, jnp.uint2), jnp.ones((1, 1, 4))),
        "floats": FloatTensor(fp4, scale, jnp.ones((1, 1))),
        "rotated": RotatedTensor(q, jnp.ones((8, 1), jnp.int8)),
        "scaled": ScaledTensor(RotatedTensor(q, jnp.ones((8, 1), jnp.int8)), jnp.ones((8, 1))),
    }


GOLDEN = (
    "iAqmUQ~{#_FXAde1Nt;6vjpn4WN64hcwjwHnWB7Pa!E}=@>mMQXF!{rGE2~c(gJLcS*(sZy4_}AyQ3iqRwvp*$4m$4JA+u"
    "TmvBUk5kz6Ej-fGzS9DBJJfq|Wl0?!ER%{ZVYLsi3mIpJ($P{jlMSQA7u0dK}DNxP`EQd9;z-9+Q!T`y1Ea8oA0gAuj&V+"
    "`M1;}(Gi0Q%LKt(c;w$>q3Tfn>+8w&sd1UGB0(FFhi0DwO*rt50~tifBn25<2iyv1v<0001hKPX$m2LUjq4Rq^KxG$CrbJ"
    "{_-E`|JK*)XRbgzEr)0001hKV1ZEpaI+;!u~Pr5YrFB{UPih(+)EIAlx6r4lw`#0DwOL0o#t)2Laq4!u~Pr5YrFB{UPih("
    "+)EIAlx6r4lw`#0DwOL0RR91fInnEzjS1YX_E"
)


def test_files_with_every_class_stay_readable(file):
    file.write_bytes(base64.b85decode(GOLDEN))
    codec.verify(file, golden_leaves())


# Masks ------------------------------------------------------------------------------------------


MASK = jnp.arange(48).reshape(8, 6) % 3 > 0


@pytest.mark.parametrize("name", ["symmetric", "float8", "mxfp4", "nvfp4", "scaled"])
def test_masks_zero_the_codes_that_have_a_zero(name):
    leaf = LEAVES[name]()
    masked = prune.apply_masks({"w": leaf}, {"w": MASK})["w"]
    assert type(masked) is type(leaf)
    restored = np.asarray(jopt.materialize(leaf)).astype(np.float32)
    np.testing.assert_array_equal(
        np.asarray(jopt.materialize(masked)).astype(np.float32), np.where(MASK, restored, 0)
    )
    assert prune.sparsity({"w": masked}) >= 1 / 3


@pytest.mark.parametrize(
    "name", ["affine", "codebook", "scaled_affine", "scaled_bits", "rotated", "scaled_and_rotated"]
)
def test_masks_refuse_codes_that_may_have_no_zero(name):
    with pytest.raises(TypeError, match="w: mask before"):
        prune.apply_masks({"w": LEAVES[name]()}, {"w": MASK})
