"""Arrays as words: the unsigned integers that hold their elements' bits.

The codec never looks at values, only at words, so NaN payloads, infinities and -0.0 come back as
they were. A word is as wide as the dtype really is: 4 bits for `int4`, 1 for `bool`.
"""

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jopt._arrays import dtype_bits
from jopt.codec._errors import CodecError

_INTEGERS = [f"{sign}int{bits}" for sign in ("", "u") for bits in (2, 4, 8, 16, 32, 64)]
_FLOATS = ["float16", "bfloat16", "float32", "float64"]
_NARROW_FLOATS = [
    f"float8_{form}"
    for form in ("e4m3fn", "e5m2", "e4m3", "e3m4", "e4m3fnuz", "e5m2fnuz", "e4m3b11fnuz", "e8m0fnu")
]
_NARROW_FLOATS.append("float4_e2m1fn")
_COMPLEX = ["complex64", "complex128"]
_DTYPES = {
    name: jnp.dtype(name)
    for name in ["bool", *_INTEGERS, *_FLOATS, *_NARROW_FLOATS, *_COMPLEX]
    if name == "bool" or hasattr(jnp, name)
}


def dtype_named(name: Any) -> np.dtype:
    """Look up a dtype that files may hold.

    Raises:
      CodecError: there is none of that name.
    """
    if not isinstance(name, str) or name not in _DTYPES:
        raise CodecError(f"dtype {name!r} is not one that a .jopt file holds.")
    return _DTYPES[name]


def width_of(dtype: np.dtype) -> int:
    """Return the bits of a word; a complex number is two words."""
    if dtype.name == "bool":
        return 1
    return dtype_bits(dtype) // (2 if dtype.kind == "c" else 1)


def word_shape(dtype: np.dtype, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the words of an array; complex numbers add an axis of two."""
    return (*shape, 2) if dtype.kind == "c" else shape


def word_dtype(width: int) -> np.dtype:
    """Return the unsigned dtype that holds words of `width` bits."""
    return np.dtype(f"u{max(width, 8) // 8}")


def to_words(array: np.ndarray) -> np.ndarray:
    """Return the flat words of an array of one of the known dtypes."""
    flat = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False)).reshape(-1)
    if array.dtype.kind == "c":
        flat = flat.view(f"f{array.dtype.itemsize // 2}")
    width = width_of(array.dtype)
    if width < 8 and jnp.issubdtype(array.dtype, jnp.floating):
        return flat.view(np.uint8) & np.uint8((1 << width) - 1)
    if width < 8:
        return (flat.astype(np.int8).view(np.uint8) & ((1 << width) - 1)).astype(np.uint8)
    return flat.view(f"u{flat.dtype.itemsize}")


def from_words(words: np.ndarray, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Rebuild the array whose words these are."""
    width = width_of(dtype)
    if dtype.name == "bool":
        return words.astype(np.bool_).reshape(shape)
    if width < 8 and jnp.issubdtype(dtype, jnp.floating):
        return words.astype(np.uint8).view(dtype).reshape(shape)
    if width < 8:
        values = words.astype(np.int8)
        if jnp.issubdtype(dtype, jnp.signedinteger):
            values = (values ^ (1 << width - 1)) - (1 << width - 1)
        return values.astype(dtype).reshape(shape)
    return words.astype(f"u{width // 8}", copy=False).view(dtype).reshape(shape)


def on_device(array: np.ndarray) -> Any:
    """Return a jax array, or the NumPy array itself if jax would narrow its dtype."""
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        return array
    return jnp.asarray(array)


def checksum(words: np.ndarray, start: int) -> int:
    """Continue a CRC-32 over words in little-endian order."""
    return zlib.crc32(words.astype(words.dtype.newbyteorder("<"), copy=False).tobytes(), start)


def pack(words: np.ndarray, width: int) -> bytes:
    """Write words bit after bit, lowest first, or as little-endian bytes from 8 bits up."""
    if width >= 8:
        return words.astype(f"<u{width // 8}", copy=False).tobytes()
    bits = np.unpackbits(words[:, None], axis=1, count=width, bitorder="little")
    return np.packbits(bits, bitorder="little").tobytes()


def unpack(data: bytes, width: int, count: int) -> np.ndarray:
    """Read what `pack` wrote.

    Raises:
      CodecError: there are more or fewer bytes than `count` words take.
    """
    expected = math.ceil(count * width / 8)
    if len(data) != expected:
        raise CodecError(f"{len(data)} bytes where {count} words of {width} bits take {expected}.")
    if width >= 8:
        return np.frombuffer(data, f"<u{width // 8}").astype(f"u{width // 8}")
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    weights = (1 << np.arange(width)).astype(np.uint8)
    return (bits[: count * width].reshape(count, width) * weights).sum(1, dtype=np.uint8)
