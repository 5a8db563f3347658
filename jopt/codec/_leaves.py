"""Leaves as rows of the header and bytes of the body.

An array is a row `[dtype, shape, bytes]`. A compressed leaf is `[class, [field, ...]]`, each field
such a row or null; a third entry, 1, says that its codes are stored less its zero points, so that
what stands for 0.0 is one symbol in every block. The field `tensor` of a leaf that wraps another
(`ScaledTensor`, `RotatedTensor`) is the row of that other leaf, whose bytes stand in its place. A
class is stored once `COMPRESSED_CLASSES` of `jopt._leaves` lists it: its row here is its name and
the fields of the dataclass.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jopt._leaves import COMPRESSED_CLASSES, Prepared, is_compressed
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

_WRAPPED = "tensor"  # the field that may hold another compressed leaf
_MAX_NESTING = 8
_MAX_AXES = 32
_MAX_LENGTH = 1 << 40


@dataclass(frozen=True)
class Field:
    """Say what a row of the header promises of one array.

    Attributes:
      dtype: its dtype.
      shape: its shape.
      nbytes: the bytes that it takes in the file.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """Say what a row of the header promises of one leaf.

    Attributes:
      kind: the class of a compressed leaf, or None for an array.
      names: the fields, `("",)` for an array.
      fields: what each field is, None for an absent one and a plan for a leaf within the leaf.
      is_centred: whether the codes are stored less the zero points.
    """

    kind: type | None
    names: tuple[str, ...]
    fields: "tuple[Field | Plan | None, ...]"
    is_centred: bool = False

    @property
    def nbytes(self) -> int:
        """Return the bytes of the leaf, checksum not included."""
        return sum(field.nbytes for field in self.fields if field)

    def elements(self) -> int:
        """Return the number of array elements in all fields, and those that bits stand for."""
        pairs = zip(self.names, self.fields, strict=True)
        return sum(_elements(name, field) for name, field in pairs if field)


def _elements(name: str, field: Field | Plan) -> int:
    if isinstance(field, Plan):
        return field.elements()
    # An extent is empty, but its shape is that of the kernel which will be restored.
    return math.prod(field.shape[:-1] if name == "extent" else field.shape)


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
    if isinstance(leaf, Prepared):
        raise CodecError(
            f"leaf {path!r} is a {name}, made by jopt.run.prepare for running; store the "
            f"parameters that were prepared instead."
        )
    fields = {key: getattr(leaf, key) for key in _CLASSES[name][1]}
    codes, zero_point = (
        None if fields.get(key) is None else _host_array(fields[key], f"{path}.{key}")
        for key in ("codes", "zero_point")
    )
    zeros = _zero_points(codes, zero_point)
    rows, parts = [], []
    for key, value in fields.items():
        row, data, content = _encode_field(
            value, f"{path}.{key}", content, key == _WRAPPED, zeros if key == "codes" else None
        )
        rows.append(row)
        parts.append(data)
    return [name, rows] + [1] * (zeros is not None), b"".join(parts), content


def _encode_field(
    value: Any, path: str, content: int, may_wrap: bool, zeros: np.ndarray | None
) -> tuple[list | None, bytes, int]:
    if value is None:
        return None, b"", content
    if may_wrap and is_compressed(value):
        return encode_leaf(value, path, content)
    array = _host_array(value, path)
    return _encode_array(array, to_words(array), content, zeros)


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


def plan_of(row: Any, nesting: int = 0) -> Plan:
    """Read a row of the header.

    Args:
      row: the row.
      nesting: how many leaves it lies within.

    Raises:
      CodecError: the row is malformed, or of a class that this version of jopt does not know.
    """
    if not isinstance(row, list) or len(row) < 2 or not isinstance(row[0], str):
        raise CodecError("a row of the header is malformed.")
    if _is_class_row(row):
        return _class_plan(row, nesting)
    return Plan(None, ("",), (_field_of(row),))


def _is_class_row(row: Any) -> bool:
    return (
        isinstance(row, list)
        and len(row) > 1
        and isinstance(row[1], list)
        and any(not isinstance(entry, int) for entry in row[1])
    )


def _class_plan(row: list, nesting: int) -> Plan:
    if not isinstance(row[0], str) or row[0] not in _CLASSES:
        raise CodecError(f"this version of jopt knows no compressed leaf {row[0]!r}.")
    kind, names = _CLASSES[row[0]]
    if len(row[1]) > len(names) or row[2:] not in ([], [1]):
        raise CodecError(f"a row of the header has not the fields of {row[0]}.")
    if nesting == _MAX_NESTING:
        raise CodecError(f"leaves lie more than {_MAX_NESTING} deep in each other.")
    absent = [None] * (len(names) - len(row[1]))  # fields younger than the file
    fields = []
    for name, field in zip(names, row[1] + absent, strict=True):
        if name == _WRAPPED and _is_class_row(field):
            fields.append(_class_plan(field, nesting + 1))
        else:
            fields.append(None if field is None else _field_of(field))
    return Plan(kind, names, tuple(fields), len(row) == 3)


def _field_of(row: Any) -> Field:
    if not isinstance(row, list) or len(row) != 3 or not isinstance(row[1], list):
        raise CodecError("a row of the header is malformed.")
    name, shape, nbytes = row
    numbers = [*shape, nbytes]
    if not all(type(n) is int and 0 <= n < _MAX_LENGTH for n in numbers) or len(shape) > _MAX_AXES:
        raise CodecError(f"shape {shape} or length {nbytes} is impossible.")
    if 0 in shape and math.prod(n for n in shape if n) >= _MAX_LENGTH:
        raise CodecError(f"shape {shape} or length {nbytes} is impossible.")
    return Field(dtype_named(name), tuple(shape), nbytes)


def decode_leaf(plan: Plan, data: bytes, content: int) -> tuple[Any, dict[str, Sizes], int]:
    """Rebuild a leaf.

    Args:
      plan: what the header says of it.
      data: its `plan.nbytes` bytes.
      content: the checksum of all that came before.

    Returns:
      The leaf, the bytes of each field by part, and the checksum continued. Absent fields have no
      entry, those of a leaf within are named `"tensor.codes"`, and an array is the field `""`.

    Raises:
      CodecError: the bytes do not make what the plan says; the message names the field.
    """
    slices = _slices(plan, data)
    flat = {n: f for n, f in zip(plan.names, plan.fields, strict=True) if isinstance(f, Field)}
    decoded = {name: _decode_field(name, field, slices[name]) for name, field in flat.items()}
    arrays = _assemble(plan, flat, {name: words for name, (words, _) in decoded.items()})
    values: dict[str, Any] = {}
    sizes: dict[str, Sizes] = {}
    for name, field in zip(plan.names, plan.fields, strict=True):
        if isinstance(field, Plan):
            try:
                values[name], within, content = decode_leaf(field, slices[name], content)
            except CodecError as error:
                raise CodecError(f"{name}.{error}") from None
            sizes |= {f"{name}.{inner}" if inner else name: size for inner, size in within.items()}
        elif field is not None:
            content = checksum(to_words(arrays[name]), content)
            values[name] = on_device(arrays[name])
            sizes[name] = decoded[name][1]
    if plan.kind is None:
        return values[""], sizes, content
    return plan.kind(**{name: values.get(name) for name in plan.names}), sizes, content


def _slices(plan: Plan, data: bytes) -> dict[str, bytes]:
    """Cut the bytes of a leaf into those of its fields."""
    cut, at = {}, 0
    for name, field in zip(plan.names, plan.fields, strict=True):
        if field is not None:
            cut[name] = data[at : at + field.nbytes]
            at += field.nbytes
    return cut


def _decode_field(name: str, field: Field, data: bytes) -> tuple[np.ndarray, Sizes]:
    full = word_shape(field.dtype, field.shape)
    try:
        return decode_words(data, width_of(field.dtype), full, math.prod(full))
    except CodecError as error:
        raise CodecError(f"{name or 'values'}: {error}") from None


def _assemble(
    plan: Plan, fields: dict[str, Field], decoded: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    arrays = {
        name: from_words(decoded[name], field.dtype, field.shape) for name, field in fields.items()
    }
    if plan.is_centred:
        zeros = _zero_points(arrays.get("codes"), arrays.get("zero_point"))
        if zeros is None:
            raise CodecError("codes: the zero points do not fit the codes.")
        codes = fields["codes"]
        shifted = _shifted(decoded["codes"], zeros, width_of(codes.dtype))
        arrays["codes"] = from_words(shifted, codes.dtype, codes.shape)
    return arrays
