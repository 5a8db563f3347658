"""Code words of 16, 32 or 64 bits: which are not zero, then their bytes, plane by plane.

A plane goes by its histogram if that pays and as it is otherwise. In trained weights the exponents
pay and the mantissas do not.
"""

import numpy as np

from jopt.codec._bytes import Cursor, varint
from jopt.codec._codes import rate_for
from jopt.codec._coding import code_flags, code_histogram, reader_for, writer_for
from jopt.codec._errors import CodecError
from jopt.codec._flags import flag_head, read_flag_head
from jopt.codec._grids import Lags, find_lags, grid_of
from jopt.codec._words import word_dtype

PLANES, MASKED_PLANES = 4, 5
"""The first byte, by whether zeros are coded apart."""


def plane_candidates(words: np.ndarray, width: int, shape: tuple[int, ...]) -> list[bytes]:
    flags = words != 0
    writer, head = writer_for(len(words)), b""
    masked = np.count_nonzero(flags) < len(words) * 15 / 16
    if masked:
        grid = grid_of(shape)
        lags = find_lags(flags.astype(np.int8), grid)
        head, base = flag_head(flags, lags)
        code_flags(writer, flags, grid, lags, base)
        words = words[flags]
    modes, raw = 0, b""
    for at, plane in enumerate(_to_planes(words, width)):
        counts = np.bincount(plane, minlength=256)
        mode = _plane_mode(counts)
        modes |= mode << 2 * at
        if mode:
            code_histogram(writer, plane, len(plane), 256, mode - 1)
        else:
            raw += plane.tobytes()
    coded = writer.finish()
    method = bytes([MASKED_PLANES if masked else PLANES])
    return [method + varint(modes) + head + varint(len(coded)) + coded + raw]


def _plane_mode(counts: np.ndarray) -> int:
    """Return 0 for a plane to store as it is, or one more than the rate of its histogram."""
    total, seen = counts.sum(), counts[counts > 0]
    entropy = float((seen * np.log2(total / seen)).sum())
    learning = len(seen) * (1 + np.log2(total) / 2)
    return 0 if entropy + learning > 7.99 * total else 1 + rate_for(counts)


def _to_planes(words: np.ndarray, width: int) -> list[np.ndarray]:
    """Split words into bytes, highest first, the sign moved to the bottom.

    The top bit moves down so that the highest byte of a float32 is its exponent.
    """
    rolled = words << words.dtype.type(1) | words >> words.dtype.type(width - 1)
    return list(
        rolled.astype(rolled.dtype.newbyteorder(">")).view(np.uint8).reshape(-1, width // 8).T
    )


def _from_planes(planes: list[np.ndarray], width: int) -> np.ndarray:
    big = np.ascontiguousarray(np.stack(planes, axis=1), np.uint8).reshape(-1)
    rolled = big.view(f">u{width // 8}").astype(word_dtype(width))
    return rolled >> rolled.dtype.type(1) | rolled << rolled.dtype.type(width - 1)


def decode_planes(
    cursor: Cursor, width: int, shape: tuple[int, ...], size: int, masked: bool
) -> tuple:
    modes = cursor.varint()
    if modes >> 2 * (width // 8):
        raise CodecError("there are more planes than bytes in a word.")
    lags, base = read_flag_head(cursor) if masked else (Lags(), 0)
    reader = reader_for(size, cursor.take(cursor.varint()))
    whole = reader.bits_left()
    flags = code_flags(reader, None, grid_of(shape), lags, base) if masked else np.True_
    mask = (whole - reader.bits_left()) // 8
    count = int(flags.sum()) if masked else size
    planes = []
    for at in range(width // 8):
        mode = modes >> 2 * at & 3
        if mode:
            planes.append(code_histogram(reader, None, count, 256, mode - 1))
        else:
            planes.append(np.frombuffer(cursor.take(count), np.uint8))
    reader.finish()
    if cursor.rest():
        raise CodecError("bytes are left over.")
    kept = _from_planes(planes, width)
    if not masked:
        return kept, mask
    words = np.zeros(size, word_dtype(width))
    words[flags] = kept
    return words, mask
