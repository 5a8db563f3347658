"""Leaves as rows of the header and bytes of the body.

An array is a row `[dtype, shape, bytes]`. A compressed leaf is `[class, [field, ...]]`, each field
such a row or null; a third entry, 1, says that its codes are stored less its zero points, so that
what stands for 0.0 is one symbol in every block. A class is stored once `COMPRESSED_CLASSES` of
`jopt._arrays` lists it: its row here is its name and the fields of the dataclass.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jopt._arrays import COMPRESSED_CLASSES, is_compressed
from jopt.codec._errors import CodecError
from jopt.codec._sections import Sizes, decode_words, encode_words
from jopt.codec._words import (
    checksum,
    dtype_named,
    from_words,
    on_device,
    to_words,
    width_of,
    word_shape,
)

_CLASSES: dict[str, tuple[type, tuple[str, ...]]] = {
    kind.__name__: (kind, tuple(field.name for field in dataclasses.fields(kind)))
    for kind in COMPRESSED_CLASSES
}

_MAX_AXES = 32
_MAX_LENGTH = 1 << 40


@dataclass(frozen=True)
class Plan:
    """Say what a row of the header promises.

    Attributes:
      kind: the class of a compressed leaf, or None for an array.
      names: the fields.
      fields: a dtype, a shape and a number of bytes for each field, or None for an absent one.
      is_centred: whether the codes are stored less the zero points.
    """

    kind: type | None
    names: tuple[str, ...]
    fields: tuple[tuple[np.dtype, tuple[int, ...], int] | None, ...]
    is_centred: bool = False

    def nbytes(self) -> int:
        """Return the bytes of the leaf, checksum not included."""
        return sum(field[2] for field in self.fields if field)

    def elements(self) -> int:
        """Return the number of array elements in all fields."""
        return sum(math.prod(field[1]) for field in self.fields if field)


def encode_leaf(leaf: Any, path: str, content: int) -> tuple[list, bytes, int]:
    """Code an array or a compressed leaf.

    Args:
      leaf: what to code.
      path: its path, for errors.
      content: the checksum of all that came before.

    Returns:
      The row of the header, the bytes, and the checksum continued.
    """
    if not is_compressed(leaf):
        array = _host_array(leaf, path)
        return _encode_array(array, to_words(array), content)
    name = type(leaf).__name__
    fields = {key: getattr(leaf, key) for key in _CLASSES[name][1]}
    arrays = {
        key: None if value is None else _host_array(value, f"{path}.{key}")
        for key, value in fields.items()
    }
    words = {key: None if array is None else to_words(array) for key, array in arrays.items()}
    zeros = _zero_points(arrays.get("codes"), arrays.get("zero_point"))
    rows, parts = [], []
    for key, array in arrays.items():
        if array is None:
            rows.append(None)
            continue
        shift = zeros if key == "codes" else None
        row, data, content = _encode_array(array, words[key], content, shift)
        rows.append(row)
        parts.append(data)
    return [name, rows] + [1] * (zeros is not None), b"".join(parts), content


def _host_array(leaf: Any, path: str) -> np.ndarray:
    if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise CodecError(f"leaf {path!r} holds PRNG keys; store jax.random.key_data(keys) instead.")
    if not isinstance(leaf, (np.ndarray, np.generic, jax.Array)):
        raise CodecError(f"leaf {path!r} is a {type(leaf).__name__}, not an array.")
    try:
        array = np.asarray(leaf)
    except TypeError as error:
        raise CodecError(f"leaf {path!r} is traced; save outside of jit.") from error
    try:
        dtype_named(array.dtype.name)
    except CodecError as error:
        raise CodecError(f"leaf {path!r}: {error}") from None
    return array


def _encode_array(
    array: np.ndarray, words: Any, content: int, zeros: np.ndarray | None = None
) -> tuple[list, bytes, int]:
    content = checksum(words, content)
    width, shape = width_of(array.dtype), word_shape(array.dtype, array.shape)
    if zeros is not None:
        words = _shifted(words, -zeros, width)
    data = encode_words(words, width, shape)
    return [array.dtype.name, list(array.shape), len(data)], data, content


def _zero_points(codes: np.ndarray | None, zero_point: np.ndarray | None) -> np.ndarray | None:
    """Return the zero point of each code, flat, or None where there are none to use."""
    if codes is None or zero_point is None or codes.ndim != zero_point.ndim or not codes.size:
        return None
    if not all(jnp.issubdtype(array.dtype, jnp.integer) for array in (codes, zero_point)):
        return None
    if width_of(codes.dtype) > 8 or not zero_point.size:
        return None
    pairs = list(zip(codes.shape, zero_point.shape, strict=True))
    if any(length % count for length, count in pairs):
        return None
    values = zero_point.astype(np.int64)
    for axis, (length, count) in enumerate(pairs):
        values = np.repeat(values, length // count, axis)
    return values.reshape(-1)


def _shifted(words: np.ndarray, by: np.ndarray, width: int) -> np.ndarray:
    return ((words.astype(np.int64) + by) & ((1 << width) - 1)).astype(words.dtype)


def plan_of(row: Any) -> Plan:
    """Read a row of the header.

    Raises:
      CodecError: the row is malformed, or of a class that this version of jopt does not know.
    """
    if not isinstance(row, list) or len(row) < 2 or not isinstance(row[0], str):
        raise CodecError("a row of the header is malformed.")
    if isinstance(row[1], list) and any(not isinstance(entry, int) for entry in row[1]):
        return _class_plan(row)
    return Plan(None, ("",), (_field_of(row),))


def _class_plan(row: list) -> Plan:
    if row[0] not in _CLASSES:
        raise CodecError(f"this version of jopt knows no compressed leaf {row[0]!r}.")
    kind, names = _CLASSES[row[0]]
    if len(row[1]) > len(names) or row[2:] not in ([], [1]):
        raise CodecError(f"a row of the header has not the fields of {row[0]}.")
    absent = [None] * (len(names) - len(row[1]))  # fields younger than the file
    fields = tuple(None if field is None else _field_of(field) for field in row[1] + absent)
    return Plan(kind, names, fields, len(row) == 3)


def _field_of(row: Any) -> tuple[np.dtype, tuple[int, ...], int]:
    if not isinstance(row, list) or len(row) != 3 or not isinstance(row[1], list):
        raise CodecError("a row of the header is malformed.")
    name, shape, nbytes = row
    numbers = [*shape, nbytes]
    if not all(type(n) is int and 0 <= n < _MAX_LENGTH for n in numbers) or len(shape) > _MAX_AXES:
        raise CodecError(f"shape {shape} or length {nbytes} is impossible.")
    return dtype_named(name), tuple(shape), nbytes


def decode_leaf(plan: Plan, data: bytes, content: int) -> tuple[Any, list[Sizes | None], int]:
    """Rebuild a leaf.

    Args:
      plan: what the header says of it.
      data: its `plan.nbytes()` bytes.
      content: the checksum of all that came before.

    Returns:
      The leaf, the bytes of each field by part, and the checksum continued.

    Raises:
      CodecError: the bytes do not make what the plan says; the message names the field.
    """
    decoded: dict[str, Any] = {}
    sizes: list[Sizes | None] = []
    at = 0
    for name, field in zip(plan.names, plan.fields, strict=True):
        if field is None:
            sizes.append(None)
            continue
        dtype, shape, nbytes = field
        words, parts = _decode_field(name, dtype, shape, data[at : at + nbytes])
        decoded[name] = words
        sizes.append(parts)
        at += nbytes
    arrays = _assemble(plan, decoded)
    for name in decoded:
        content = checksum(to_words(arrays[name]), content)
    values = {name: on_device(array) for name, array in arrays.items()}
    if plan.kind is None:
        return values[""], sizes, content
    return plan.kind(**{name: values.get(name) for name in plan.names}), sizes, content


def _decode_field(name: str, dtype: np.dtype, shape: tuple[int, ...], data: bytes) -> tuple:
    full = word_shape(dtype, shape)
    try:
        return decode_words(data, width_of(dtype), full, math.prod(full))
    except CodecError as error:
        raise CodecError(f"{name or 'values'}: {error}") from None


def _assemble(plan: Plan, decoded: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    specs = {n: f for n, f in zip(plan.names, plan.fields, strict=True) if f is not None}
    arrays = {
        name: from_words(decoded[name], dtype, shape) for name, (dtype, shape, _) in specs.items()
    }
    if plan.is_centred:
        zeros = _zero_points(arrays.get("codes"), arrays.get("zero_point"))
        if zeros is None:
            raise CodecError("codes: the zero points do not fit the codes.")
        dtype, shape, _ = specs["codes"]
        arrays["codes"] = from_words(
            _shifted(decoded["codes"], zeros, width_of(dtype)), dtype, shape
        )
    return arrays
