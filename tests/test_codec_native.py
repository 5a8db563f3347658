"""Native coding writes and reads the very bytes that NumPy does, and touches no other memory."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jopt import codec
from jopt.codec import CodecError, _coding, _native, _sections
from jopt.codec._grids import Lags, grid_of
from jopt.codec._words import word_dtype
from tests.conftest import COMPILER, SANITIZED, needs_arm, run_check, run_check_for_arm, switched
from tests.test_codec import assert_same_bits
from tests.test_codec_corruption import golden_tree

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")


@pytest.fixture
def choose(native_codec, monkeypatch):
    """Return what makes the codec run natively or not, whatever the size."""
    return lambda native: monkeypatch.setattr(_coding, "_is_native", lambda size: native)


def draw_words(seed, shape, width):
    """Draw words as trained layers have them: blank rows and columns, repeated masks, bells."""
    draw = np.random.default_rng(seed)
    spread = (1 << min(width, 8)) / 8
    bell = np.round(draw.normal(size=shape) * spread).astype(np.int64)
    words = bell if draw.random() < 0.6 else draw.integers(0, 1 << min(width, 62), shape)
    mask = draw.random(shape) < draw.choice([0.02, 0.1, 0.5, 0.95])
    for axis in range(len(shape)):
        if draw.random() < 0.4:
            along = [-1 if at == axis else 1 for at in range(len(shape))]
            mask &= (draw.random(shape[axis]) < 0.5).reshape(along)
    if draw.random() < 0.3:  # what lags find
        period = -(-shape[0] // 8)
        mask = np.concatenate([mask[:period]] * 8)[: shape[0]]
    return ((words * mask) % (1 << min(width, 62))).astype(word_dtype(width)).ravel()


@given(
    st.integers(0, 2**32),
    st.sampled_from([1, 2, 4, 8, 16, 32]),
    st.one_of(
        st.tuples(st.integers(1, 600)),
        st.tuples(st.integers(1, 50), st.integers(1, 50)),
        st.tuples(st.integers(1, 16), st.integers(1, 16), st.integers(1, 16)),
        st.tuples(*[st.integers(1, 6)] * 4),
    ),
)
def test_the_bytes_are_those_of_numpy(native_codec, seed, width, shape):
    words = draw_words(seed, shape, width)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for native in (False, True):
            patch.setattr(_coding, "_is_native", lambda size, native=native: native)
            found.append(_sections.encode_words(words, width, shape))
        assert found[0] == found[1]
        sizes = []
        for native in (False, True):
            patch.setattr(_coding, "_is_native", lambda size, native=native: native)
            back, size = _sections.decode_words(found[0], width, shape, len(words))
            np.testing.assert_array_equal(back, words)
            sizes.append(size)
        assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("shape", "width"), [((1500, 900), 4), ((1100, 1000), 32), ((70_000,), 8)], ids=str
)
def test_large_arrays_have_the_bytes_of_numpy(choose, shape, width):
    words = draw_words(3, shape, width)  # factors of more than 2^20 elements are looked up seldom
    assert (width < 16) or np.count_nonzero(words) > 1000
    choose(False)
    expected = _sections.encode_words(words, width, shape)
    choose(True)
    assert _sections.encode_words(words, width, shape) == expected
    np.testing.assert_array_equal(
        _sections.decode_words(expected, width, shape, len(words))[0], words
    )


def test_files_are_the_same_and_mutated_ones_are_refused_alike(choose, tmp_path):
    tree, files = golden_tree(), []
    for native in (False, True):
        choose(native)
        files.append(tmp_path / f"{native}.jopt")
        codec.save(files[-1], tree)
        assert_same_bits(codec.load(files[-1]), tree)
    assert files[0].read_bytes() == files[1].read_bytes()
    words = draw_words(7, (40, 30), 4)
    good = _sections.encode_words(words, 4, (40, 30))
    draw = np.random.default_rng(0)
    for _ in range(60):
        bad = bytearray(good)
        for at in draw.integers(0, len(bad), draw.integers(1, 4)):
            bad[at] = draw.integers(256)
        bad = bytes(bad[: draw.integers(1, len(bad) + 1)])
        outcomes = []
        for native in (False, True):
            choose(native)
            try:
                outcomes.append(_sections.decode_words(bad, 4, (40, 30), 1200)[0].tolist())
            except CodecError as error:
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1]


def test_small_arrays_wait_for_a_large_one(native_codec):
    _native.load.cache_clear()
    assert isinstance(_coding.writer_for(_coding.WORTH - 1), _coding.Writer)
    assert not _native.load.cache_info().currsize
    assert isinstance(_coding.writer_for(_coding.WORTH), _coding.NativeWriter)
    assert isinstance(_coding.reader_for(1, b""), _coding.NativeReader)


def test_without_a_compiler_numpy_codes(native_codec, tmp_path):
    with switched(PATH="", CXX=None):
        assert "no C++ compiler was found" in str(_native.load())
        tree = {"kernel": jax.random.normal(jax.random.key(0), (300, 300))}
        codec.save(tmp_path / "tree.jopt", tree)
        assert_same_bits(codec.load(tmp_path / "tree.jopt"), tree)


def test_wrong_sizes_are_refused_before_a_byte_is_touched(native_codec):
    writer, grid, flags = _coding.NativeWriter(), grid_of((4, 5)), np.ones(20, bool)
    with pytest.raises(AssertionError, match="refuses the arguments of flags"):
        writer.code_flags(flags, grid, Lags((1, 300)), 0.0, 1)
    with pytest.raises(AssertionError, match="refuses the arguments of flags"):
        writer.code_flags(flags, grid, Lags(), 99.0, 1)
    with pytest.raises(AssertionError, match="refuses the arguments of values"):
        writer.code_values(flags, grid, Lags(), flags, 9)
    with pytest.raises(AssertionError, match="refuses the arguments of histogram"):
        writer.code_histogram(np.array([3]), 1, 3, 1)
    assert writer.finish() == b""


def test_no_coder_reads_or_writes_beyond_its_arrays(tmp_path):
    flags = ["-O1", *SANITIZED]
    program = tmp_path / "check"
    said = run_check("native_codec_check.cc", "jopt/codec/native", flags, program, rounds=400)
    assert said.strip() == "400 cases: 0 wrong"


@needs_arm
def test_coders_run_right_in_an_emulator_of_arm(tmp_path):
    run_check_for_arm("native_codec_check.cc", "jopt/codec/native", "armv8-a", tmp_path / "check")
