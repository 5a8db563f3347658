"""The front of a file: signature, version, and a header of JSON in as few bytes as can be.

The header is deflated with a preset dictionary of what headers are likely to say, which takes a
third off that of a small network.
"""

import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jopt.codec._bytes import Cursor, varint
from jopt.codec._errors import CodecError
from jopt.codec._leaves import Plan, plan_of

_SIGNATURE = b"\x89JOPT"
_VERSION = 1
_START = len(_SIGNATURE) + 1

_MAX_HEADER = 1 << 26
# What headers are likely to say, commonest last; deflate refers back to it. Part of version 1.
_PHRASES = (
    b'"uint32""int64""uint16""float64""float16""uint2""int2""bool""int32""uint8""bfloat16""int16"'
    b'"params""batch_stats""mean""var""embedding""LayerNorm_0""BatchNorm_0""norm""attention"'
    b'"query""key""value""out""mlp""up""down""head""block_0""layers""encoder""decoder""name"'
    b'"student""teacher""lenet5""lenet_300_100""model""conv1":"conv2":"fc1":"fc2":"fc3":"linear1":'
    b'"CodebookTensor",[["uint4",["uint8",[{"Conv_0":{"Conv_1":{"Dense_0":{"Dense_1":{"Dense_2":'
    b'"w":[],"b":[],"scale":[]},"bias":[],"kernel":[]}},["bfloat16",[["float32",[["float32",[10],'
    b'["float16",[1]],["QTensor",[["int8",["QTensor",[["int4",[1,1],["float32",[1,1],5],null]],'
)


def write_header(structure: Any, rows: list, metadata: dict | None) -> bytes:
    """Return everything that comes before the first leaf."""
    fields = [structure, rows] if metadata is None else [structure, rows, _plain(metadata)]
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    if len(text) > _MAX_HEADER:
        raise CodecError(f"structure and metadata take {len(text)} bytes, over {_MAX_HEADER}.")
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zdict=_PHRASES)
    header = deflate.compress(text) + deflate.flush()
    start = _SIGNATURE + bytes([_VERSION]) + varint(len(header))
    return start + crc(start + header) + header


def _plain(metadata: dict) -> dict:
    try:
        copy = json.loads(json.dumps(metadata, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise CodecError(f"metadata is not plain JSON: {error}") from error
    if not isinstance(metadata, dict) or copy != metadata:
        raise CodecError("metadata must be a dict of lists, dicts with str keys and plain values.")
    return copy


def crc(data: bytes) -> bytes:
    """Return the CRC-32 of some bytes, as it stands in the file."""
    return zlib.crc32(data).to_bytes(4, "little")


def read_header(data: bytes) -> tuple[bytes, int]:
    """Check everything up to the first leaf and return the inflated header and where it ends."""
    start = data[: len(_SIGNATURE)]
    if start != _SIGNATURE:
        if _SIGNATURE.startswith(start) and start:
            raise CodecError(f"signature: truncated after {len(data)} bytes.")
        raise CodecError(f"signature: not a .jopt file; it starts with {start!r}.")
    cursor = Cursor(data[len(_SIGNATURE) :])
    with part("header"):
        version = cursor.byte()
        if version != _VERSION:
            age = "newer" if version > _VERSION else "unknown"
            raise CodecError(f"version {version} is {age}; this jopt reads version {_VERSION}.")
        length = cursor.varint()
        prefix = data[: _START + len(varint(length))]
        check, header = cursor.take(4), cursor.take(length)
        if crc(prefix + header) != check:
            raise CodecError("checksum mismatch; the header was altered.")
        inflate = zlib.decompressobj(-15, zdict=_PHRASES)
        try:
            text = inflate.decompress(header, _MAX_HEADER + 1)
        except zlib.error as error:
            raise CodecError(f"cannot be inflated: {error}") from error
        if len(text) > _MAX_HEADER or not inflate.eof or inflate.unused_data:
            raise CodecError("is too long or incomplete.")
    return text, len(prefix) + 4 + length


def parse_header(text: bytes) -> tuple[Any, list[Plan], dict]:
    """Read an inflated header: the structure, the plans of the leaves, the metadata."""
    try:
        fields = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise CodecError(f"is not JSON: {error}") from error
    if not isinstance(fields, list) or len(fields) not in (2, 3) or type(fields[1]) is not list:
        raise CodecError("has not the form [structure, rows, metadata].")
    structure, rows, *rest = fields
    metadata = rest[0] if rest else {}
    if not isinstance(metadata, dict):
        raise CodecError("metadata is not a dict.")
    return structure, [plan_of(row) for row in rows], metadata


@contextmanager
def part(name: str) -> Iterator[None]:
    """Put the name of a part before the errors of a block."""
    try:
        yield
    except CodecError as error:
        raise CodecError(f"{name}: {error}") from None
