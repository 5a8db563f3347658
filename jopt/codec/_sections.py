"""The bytes of one array: the ways to code its words, and the choice between them.

    0  constant   every word is the same one
    1  raw        the words, packed
    2  histogram  3  sparse         words of up to 8 bits: see `_codes`
    4  planes     5  masked planes  wider words: see `_planes`

The first byte says which. The choice goes by counts, and tries two ways only on small arrays.
"""

from dataclasses import dataclass

import numpy as np

from jopt.codec._bytes import Cursor
from jopt.codec._codes import HISTOGRAM, SPARSE, code_candidates, decode_histogram, decode_sparse
from jopt.codec._errors import CodecError
from jopt.codec._planes import MASKED_PLANES, PLANES, decode_planes, plane_candidates
from jopt.codec._words import pack, unpack, word_dtype

_CONSTANT, _RAW = 0, 1


@dataclass(frozen=True)
class Sizes:
    """Count the bytes of one coded array: where its zeros are, and everything else."""

    mask: int
    values: int


def encode_words(words: np.ndarray, width: int, shape: tuple[int, ...]) -> bytes:
    """Code the words of an array of `shape` in few bytes."""
    if not len(words):
        return b""
    if (words == words[0]).all():
        return bytes([_CONSTANT]) + pack(words[:1], width)
    candidates = code_candidates if width <= 8 else plane_candidates
    raw = bytes([_RAW]) + pack(words, width)
    return min([*candidates(words, width, shape), raw], key=len)


def decode_words(
    data: bytes, width: int, shape: tuple[int, ...], size: int
) -> tuple[np.ndarray, Sizes]:
    """Rebuild the words of an array, and count the bytes that each part took.

    Raises:
      CodecError: the bytes are not a coded array of that width and shape.
    """
    if not size:
        if data:
            raise CodecError("bytes for an array without elements.")
        return np.zeros(0, word_dtype(width)), Sizes(0, 0)
    cursor = Cursor(data)
    method = cursor.byte()
    decoders = {HISTOGRAM: decode_histogram, SPARSE: decode_sparse}
    if method == _CONSTANT:
        words, mask = np.broadcast_to(unpack(cursor.rest(), width, 1), size), 0
    elif method == _RAW:
        words, mask = unpack(cursor.rest(), width, size), 0
    elif method in decoders and width <= 8:
        words, mask = decoders[method](cursor, width, shape, size)
    elif method in (PLANES, MASKED_PLANES) and width > 8:
        words, mask = decode_planes(cursor, width, shape, size, method == MASKED_PLANES)
    else:
        raise CodecError(f"method {method} is unknown for words of {width} bits.")
    if int(words.max()) >> width:
        raise CodecError(f"a word has more than {width} bits.")
    return words.astype(word_dtype(width)), Sizes(mask, len(data) - mask)
