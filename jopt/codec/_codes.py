"""Code words of up to 8 bits: integer codes, masks, narrow floats.

histogram  by how often each word occurs
sparse     which are not the commonest word, then how those differ from it
"""

import numpy as np

from jopt.codec._bytes import Cursor
from jopt.codec._coding import (
    code_flags,
    code_histogram,
    code_values,
    reader_for,
    writer_for,
)
from jopt.codec._errors import CodecError
from jopt.codec._flags import flag_head, read_flag_head
from jopt.codec._grids import find_lags, grid_of
from jopt.codec._models import RATES

HISTOGRAM, SPARSE = 2, 3
"""The first byte of each way."""

_TRY_ALL = 1 << 15  # arrays up to this size are coded in every way that may win
_STRONG_VALUES = 1 << 19  # values of larger arrays are coded by histogram, which is faster
_ONE_VALUE, _BY_HISTOGRAM = 0x40, 0x80


def code_candidates(words: np.ndarray, width: int, shape: tuple[int, ...]) -> list[bytes]:
    """Code words of up to 8 bits in the ways that may win; only small arrays are tried twice."""
    counts = np.bincount(words, minlength=1 << width)
    blank = int(counts.argmax())
    small = len(words) <= _TRY_ALL
    found = []
    if small or counts[blank] >= len(words) / 4:
        found.append(_encode_sparse(words, width, shape, blank))
    if small or not found:
        found.append(_encode_histogram(words, width, counts))
    return found


def rate_for(counts: np.ndarray) -> int:
    """Choose a gain: the fewer symbols are in use, the less belief in the others."""
    used = np.count_nonzero(counts) / len(counts)
    return 0 if used > 1 / 2 else 1 if used > 1 / 8 else 2


def _encode_histogram(words: np.ndarray, width: int, counts: np.ndarray) -> bytes:
    rate = rate_for(counts)
    writer = writer_for(len(words))
    code_histogram(writer, words, len(words), 1 << width, rate)
    return bytes([HISTOGRAM, rate]) + writer.finish()


def decode_histogram(cursor: Cursor, width: int, shape: tuple[int, ...], size: int) -> tuple:
    rate = _checked_rate(cursor.byte())
    reader = reader_for(size, cursor.rest())
    words = code_histogram(reader, None, size, 1 << width, rate)
    reader.finish()
    return words, 0


def _checked_rate(rate: int) -> int:
    if rate >= len(RATES):
        raise CodecError(f"rate {rate} of a histogram is unknown.")
    return rate


def _encode_sparse(words: np.ndarray, width: int, shape: tuple[int, ...], blank: int) -> bytes:
    half = 1 << (width - 1)
    values = (words.astype(np.int16) - blank + half) % (2 * half) - half
    grid = grid_of(shape)
    lags = find_lags(values, grid)
    flags = values != 0
    kept = values[flags]
    head, base = flag_head(flags, lags)
    writer = writer_for(len(words))
    code_flags(writer, flags, grid, lags, base)
    if (kept == kept[0]).all():
        mode = bytes([_ONE_VALUE, int(kept[0]) % (2 * half)])
    elif len(words) <= _STRONG_VALUES:
        depth = int(np.abs(kept).max() - 1).bit_length()
        mode = bytes([depth])
        code_values(writer, values, grid, lags, flags, depth)
    else:
        rate = rate_for(np.bincount(kept % (2 * half), minlength=2 * half))
        mode = bytes([_BY_HISTOGRAM | rate])
        code_histogram(writer, kept % (2 * half), len(kept), 2 * half, rate)
    return bytes([SPARSE, blank]) + mode + head + writer.finish()


def decode_sparse(cursor: Cursor, width: int, shape: tuple[int, ...], size: int) -> tuple:
    blank, mode = cursor.byte(), cursor.byte()
    only = cursor.byte() if mode == _ONE_VALUE else 0
    lags, base = read_flag_head(cursor)
    reader, grid = reader_for(size, cursor.rest()), grid_of(shape)
    whole = reader.bits_left()
    flags = code_flags(reader, None, grid, lags, base)
    mask = (whole - reader.bits_left()) // 8
    values = np.zeros(size, np.int16)
    if mode == _ONE_VALUE:
        values[flags] = only
    elif mode & _BY_HISTOGRAM:
        count, rate = int(flags.sum()), _checked_rate(mode & ~_BY_HISTOGRAM)
        values[flags] = code_histogram(reader, None, count, 1 << width, rate)
    elif mode < width:
        values = code_values(reader, None, grid, lags, flags, mode)
    else:
        raise CodecError(f"mode {mode} of the values is unknown.")
    reader.finish()
    return (values + blank) & ((1 << width) - 1), mask
