"""What cannot be stored, and damaged, foreign or hostile files, are refused with a clear error."""

import base64
import io
import json
import os
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jopt import codec
from jopt._leaves import QTensor
from jopt.codec import CodecError, _header
from tests.test_codec import assert_same_bits

SIGNATURE = b"\x89JOPT"


@pytest.fixture(scope="module")
def tree():
    return golden_tree()


@pytest.fixture(scope="module")
def good(tree, tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "good.jopt"
    codec.save(path, tree, metadata={"network": "golden"})
    return path.read_bytes()


@pytest.fixture
def file(tmp_path):
    return tmp_path / "tree.jopt"


@pytest.fixture
def load(tmp_path):
    def load_bytes(data, **options):
        path = tmp_path / "file.jopt"
        path.write_bytes(data)
        return codec.load(path, **options)

    return load_bytes


def header_of(data):
    """Return the JSON of a header and the leaves after it."""
    text, body = _header.read_header(data)
    return json.loads(text), data[body:]


def with_header(fields, body):
    """Write a file whose header passes its checksum, whatever it says."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zdict=_header._PHRASES)
    text = json.dumps(fields).encode()
    return framed(deflate.compress(text) + deflate.flush()) + body


def framed(header):
    start = SIGNATURE + b"\1" + _header.varint(len(header))
    return start + zlib.crc32(start + header).to_bytes(4, "little") + header


def spans(rows, body):
    """Yield where each leaf of a body starts and ends, checksum excluded."""
    at = 0
    for row in rows:
        fields = row[1] if isinstance(row[1], list) and row[0] == "QTensor" else [row]
        stop = at + sum(field[2] for field in fields if field)
        yield at, stop
        at = stop + 4


# Damage -----------------------------------------------------------------------------------------


def flip(rng, data):
    data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))


def swap(rng, data):
    first, second = rng.integers(len(data), size=2)
    data[first], data[second] = data[second], data[first]


def truncate(rng, data):
    del data[rng.integers(len(data)) :]


def extend(rng, data):
    data += rng.bytes(int(rng.integers(1, 40)))


def blank(rng, data):
    start, length = int(rng.integers(len(data))), int(rng.integers(1, 60))
    data[start : start + length] = bytes(len(data[start : start + length]))


def duplicate(rng, data):
    start, length = int(rng.integers(len(data))), int(rng.integers(1, 60))
    data[start:start] = data[start : start + length]


def drop(rng, data):
    start, length = int(rng.integers(len(data))), int(rng.integers(1, 60))
    del data[start : start + length]


@pytest.mark.parametrize("damage", [flip, swap, truncate, extend, blank, duplicate, drop])
def test_random_damage_is_refused_or_harmless(damage, good, tree, load):
    rng = np.random.default_rng(0)
    for _ in range(150):
        data = bytearray(good)
        damage(rng, data)
        if bytes(data) == good:
            continue
        with pytest.raises(CodecError):
            load(bytes(data))
    assert_same_bits(load(good), tree)


def test_every_truncation_is_refused(good, load):
    for length in range(0, len(good), 7):
        with pytest.raises(CodecError, match="signature|truncated|header"):
            load(good[:length])


def test_errors_name_the_file_the_part_and_the_fault(good, load):
    fields, body = header_of(good)
    start = len(good) - len(body)
    first_path = "constant"
    cases = [
        (good[:-1], "checksum of the contents: truncated; 1 bytes are missing"),
        (good[: start + 2], f"leaf '{first_path}': truncated"),
        (good + b"ab", "2 trailing bytes"),
        (good[:start] + b"\xff" + good[start + 1 :], f"leaf '{first_path}': checksum mismatch"),
        (good[:20] + b"\xff\xff" + good[22:], "header: checksum mismatch"),
        (good[:-1] + bytes([good[-1] ^ 1]), "checksum of the contents"),
        (SIGNATURE + b"\2" + good[6:], "version 2 is newer"),
        (SIGNATURE + b"\0" + good[6:], "version 0 is unknown"),
        (good[:3], "signature: truncated"),
    ]
    for data, words in cases:
        with pytest.raises(CodecError, match=words) as caught:
            load(data)
        assert "file.jopt: " in str(caught.value)


def npz():
    buffer = io.BytesIO()
    np.savez(buffer, a=np.ones(3))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data", [b"", b"text\n" * 50, npz(), b"\x89PNG\r\n\x1a\n" + bytes(50), b"\x80\x04N.", bytes(99)]
)
def test_foreign_files_are_refused(data, load):
    with pytest.raises(CodecError, match="not a .jopt file"):
        load(data)


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        codec.load(tmp_path / "none.jopt")


# Attacks: checksums are right, contents are not --------------------------------------------------


def mutate(rng, value):
    """Change one thing somewhere in JSON."""
    strange = [None, True, -1, 0, 1, 7, 255, 2**31, 2**70, 0.5, "int4", "QTensor", "", [], {}, [[]]]
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = list(value)[rng.integers(len(value))]
        return {**value, key: mutate(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = int(rng.integers(len(value)))
        if rng.random() < 0.2:
            return value[:at] + value[at + 1 :]
        return [*value[:at], mutate(rng, value[at]), *value[at + 1 :]]
    if type(value) is int and rng.random() < 0.6:
        return int(value + rng.integers(-3, 4))
    return strange[rng.integers(len(strange))]


def loads_or_refuses(load, data):
    try:
        load(data, max_elements=20_000)
    except CodecError:
        return False
    return True


def test_mutated_headers_are_refused_or_read(good, load):
    rng = np.random.default_rng(1)
    fields, body = header_of(good)
    read = sum(loads_or_refuses(load, with_header(mutate(rng, fields), body)) for _ in range(200))
    assert 0 < read < 100


def test_mutated_leaves_are_refused_or_harmless(good, tree, load):
    rng = np.random.default_rng(2)
    fields, body = header_of(good)
    leaves = list(spans(fields[1], body))
    for _ in range(200):
        start, stop = leaves[rng.integers(len(leaves))]
        changed = bytearray(body)
        near = min(stop - start, 10) if rng.random() < 0.5 else stop - start
        changed[start + int(rng.integers(near))] = int(rng.integers(256))
        changed[stop : stop + 4] = zlib.crc32(changed[start:stop]).to_bytes(4, "little")
        try:
            loaded = load(with_header(fields, bytes(changed)), max_elements=20_000)
        except CodecError:
            continue
        assert_same_bits(loaded, tree)  # a byte that says nothing, such as the padding of raw bits


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ([[], [["float32", [2**39, 2**39], 2]]], "array elements"),
        ([[], [["float32", [2**27], 2]]], "max_elements"),
        ([[], [["float32", [-1], 2]]], "impossible"),
        ([[], [["float32", [True], 2]]], "impossible"),
        ([[], [["float32", [1] * 40, 2]]], "impossible"),
        ([[], [["float32", [1], 10**9]]], "truncated"),
        ([[], [["object", [1], 2]]], "'object'"),
        ([[], [["NewTensor", [["int8", [1], 2]]]]], "knows no compressed leaf 'NewTensor'"),
        ([[], [["QTensor", [None, None, None, None]]]], "fields of QTensor"),
        ([[], []], "0 rows for 1 leaves"),
        ([{}, [["int8", [1], 2]]], "1 rows for 0 leaves"),
        ([[9], []], "malformed"),
        ([[2, ["a"], 1], []], "malformed"),
        ([[3, "zz"], []], "malformed"),
        ({}, "form"),
        ([[], [], []], "metadata is not a dict"),
    ],
)
def test_impossible_headers_are_refused_at_once(fields, words, load):
    with pytest.raises(CodecError, match=words):
        load(with_header(fields, bytes(10)))


def test_deep_nesting_and_inflated_headers_are_refused(load):
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zdict=_header._PHRASES)
    deep = deflate.compress(b"[" * 100_000) + deflate.flush()
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zdict=_header._PHRASES)
    bomb = deflate.compress(bytes(70 << 20)) + deflate.flush()
    for header, words in ((deep, "nested|JSON"), (bomb, "too long"), (b"\xff", "inflated")):
        with pytest.raises(CodecError, match=words):
            load(framed(header))


def test_compressed_fields_that_do_not_fit_load_but_do_not_crash_inspect(tmp_path):
    path = tmp_path / "odd.jopt"
    codec.save(path, QTensor(jnp.ones((4, 3), jnp.int8), jnp.ones((1, 2)), None))
    assert codec.inspect(path).total == path.stat().st_size


# Refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("leaf", "words"),
    [
        (lambda: jax.random.key(0), "PRNG keys"),
        (lambda: np.array([object()]), "object"),
        (lambda: np.array(["text"]), "dtype"),
        (lambda: object(), "is a object"),
        (lambda: b"bytes", "is a bytes"),
        (lambda: 1j, "is a complex"),
        (lambda: jax.ShapeDtypeStruct((2,), jnp.float32), "ShapeDtypeStruct"),
        (lambda: 2**63, "64 bits"),
        (lambda: {(1, 2): 1.0}, "keys of a dict"),
        (lambda: {True: 1.0}, "keys of a dict"),
        (lambda: {1: 1.0, "a": 2.0}, "cannot be flattened"),
    ],
)
def test_what_cannot_be_stored_is_refused_and_the_leaf_named(leaf, words, file):
    with pytest.raises(CodecError, match=words) as caught:
        codec.save(file, {"good": 1, "bad": leaf()})
    assert "bad" in str(caught.value)
    assert not os.listdir(file.parent)


def test_traced_arrays_are_refused(file):
    with pytest.raises(CodecError, match="outside of jit"):
        jax.jit(lambda x: codec.save(file, {"x": x}))(jnp.ones(2))


def test_a_failed_save_leaves_the_old_file_and_nothing_else(file, monkeypatch):
    codec.save(file, {"a": jnp.ones(3)})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        codec.save(file, {"a": jnp.zeros(5)})
    assert os.listdir(file.parent) == [file.name]
    codec.verify(file, {"a": jnp.ones(3)})


def test_many_elements_are_refused_unless_meant(file):
    codec.save(file, {"a": np.zeros(1000, np.int8)})
    with pytest.raises(CodecError, match=r"declares 1000 array elements.*max_elements=1000"):
        codec.load(file, max_elements=999)
    assert codec.load(file, max_elements=1000)["a"].size == 1000


# The format -------------------------------------------------------------------------------------


def golden_tree():
    """Return a tree that takes every way of coding, without any random generator."""
    grid = np.arange(24 * 20).reshape(24, 20)
    mixed = (grid * 2654435761 >> 7) % 97
    codes = np.where(mixed < 80, 0, mixed % 7 - 3).astype(np.int8)
    return {
        "sparse": codes,
        "mask": mixed < 30,
        "dense": ((mixed * 31) % 11).astype(np.uint8),
        "floats": np.where(mixed < 80, 0, mixed / 64).astype(np.float32),
        "whole": (mixed[0] / 8).astype(np.float32),
        "noise": (np.arange(50) * 40503 >> 3).astype(np.uint16),
        "q": QTensor(jnp.asarray(codes[:4, :4], jnp.int4), jnp.ones((1, 4)), None),
        "constant": np.full((1000,), 2.5, np.float16),
        "plain": [1, (None, True), "text", 0.1],
    }


GOLDEN = (
    "iAqmUQ~{O&<m_{{ZBxq*!Y~Z`m!2b(mK4Odpd2PKi3!+v6v5}?bS<J2x5!Og+fCsVnPC|acGh<=H*=YXitJ1GIL*~K"
    "4YlEV?uHR1lQ&|cq;!AwI7<CHIpP&AbGMQQ7O+mfj#JHM-*{t&+qM2YMGy+WLfE!O3hp@?o`1j>luc#GtTFd_{U4E#"
    "DD9RhNt2Rm#l*PKVt2BtegFUfK@_N({sID~vCE$@J2M$D%iqvRQB8qNBkWGrd}m_!|8(53)8%H;3yFAO<rTa0&_!>Q"
    "Maa&{!ZS{NJg?^<mgyd9Ct(V+Y6*EK-++`B(Jb$z`i5LN@2;a7M<(3^_`MkU2tf!K1mDjX$m~znu3&zHJPjH58+S(_"
    "DJC^9+=<{HdZ3L(g;za78o7)SM`l%$<=O|*g?Q5+KHzf8$c20ef|gFgUz_(~I8X&LP`2`iuLTf8vK2l6^nB9&d$#8S"
    "`KQ_|U|UzSECl}LlmKRbIU##Y&Jb7O`w0mIGX@9&0|1OEQp(N<1^)r<Lj?*C6b%9kT#XkBsN=oxz7elNdazUxwT<CL"
    "rC<sX9^t+#gXpA5@)8>m*$X&S=tMhIMH(`EL}WH>R33?M#C+?2e}Aigf8)rp3=5zj&VT-VE*n~2GonZu+sh##MTQ8z"
    "jbNvdEdu~R0rxcp3J(Ge3j_(Eb(7a*|CS7d@eRzF%otVr{Ww<bzuprg3AfvX!2trDPW$Bn0071ljVDw)8&Be5sdjLR"
    "H=g~m#Knu*QtcT5;1s7QZag$l`(wg)iHlI57qi~RrP^!mG6MM(z$u44PEi$Q+<2mlX`nE)_s725h3`xQ6BpSkpgw0("
    "E@t(4yp4mQO0^KlTH9D60RR914gdhq00000fIl%FTXX{e0_rgZ3J(IWJ{iJw20O}c67?9R2tg~wJhR>?I|iH!w@T$w"
    "d<5d%O1QC|M-7x1VjsXTI?A|%B?SKgBxZjw?1Mo_%(hu@EcmRz;1%YA9};PDlN^12f`EbmfqsFI0c(18x;782%m"
)


def test_files_of_version_1_stay_readable(file):
    file.write_bytes(base64.b85decode(GOLDEN))
    codec.verify(file, golden_tree())
