"""Read the tensors of a PyTorch file without PyTorch and without executing anything in it.

A `.pth` file is a pickle, and a pickle is a program: unpickled plainly it may call any function.
Here it may name only what tensors need, and each of these names stands for a value that does
nothing but note its arguments; everything else is refused. Both layouts are read: the zip archive
that `torch.save` writes since 1.6, and the pickles in a row with the numbers behind them of before.
"""

import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # how the older layout begins
_DTYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype[Any]
    count: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Named(NamedTuple):
    """What a name in the pickle stands for. A tuple, so that the pickle cannot alter it."""

    name: str
    call: Callable[..., Any] | None = None
    dtype: np.dtype[Any] | None = None

    def __call__(self, *arguments: Any) -> Any:
        if self.call is None:
            raise pickle.UnpicklingError(f"{self.name} is called, which no tensor needs")
        return self.call(*arguments)


class _Mapping(dict[Any, Any]):
    """An ordered dict of the pickle; the attributes that it would set are left out."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Leave the versions of modules out, which `torch.save` adds."""


def _mapping(*arguments: Any) -> _Mapping:
    if arguments:
        raise pickle.UnpicklingError("collections.OrderedDict is called with arguments")
    return _Mapping()


def _is_sizes(value: Any) -> bool:
    return isinstance(value, tuple) and all(type(each) is int and each >= 0 for each in value)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> _Tensor:
    """Note a tensor, checked to lie within its storage and to be no larger than it."""
    del rest  # whether it has a gradient, and hooks
    sizes = _is_sizes(shape) and _is_sizes(strides) and _is_sizes((offset,))
    if not isinstance(storage, _Storage) or not sizes or len(shape) != len(strides):
        raise pickle.UnpicklingError(
            f"a tensor of storage {storage!r}, offset {offset!r}, shape {shape!r} and strides "
            f"{strides!r} cannot be"
        )
    count = math.prod(shape)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if count and (last >= storage.count or count > storage.count):
        raise pickle.UnpicklingError(
            f"a tensor of shape {shape}, strides {strides} and offset {offset} does not fit its "
            f"storage of {storage.count} numbers"
        )
    return _Tensor(storage, offset, shape, strides)


def _parameter(tensor: Any, *rest: Any) -> _Tensor:
    del rest
    if not isinstance(tensor, _Tensor):
        raise pickle.UnpicklingError(f"a parameter of {tensor!r} cannot be")
    return tensor


_ALLOWED = {
    "collections.OrderedDict": _Named("collections.OrderedDict", _mapping),
    "torch._utils._rebuild_tensor_v2": _Named("torch._utils._rebuild_tensor_v2", _tensor),
    "torch._utils._rebuild_parameter": _Named("torch._utils._rebuild_parameter", _parameter),
    **{f"torch.{name}": _Named(f"torch.{name}", None, np.dtype(_DTYPES[name])) for name in _DTYPES},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        """Return the stand-in of a name, or refuse it."""
        name = f"{module_name}.{global_name}"
        if name not in _ALLOWED:
            raise pickle.UnpicklingError(
                f"its pickle asks for {name}, which no tensor needs; it is not executed"
            )
        return _ALLOWED[name]

    def persistent_load(self, pid: Any) -> _Storage:
        """Note a storage: ("storage", type, key, device, count), and in the older layout a view."""
        known = isinstance(pid, tuple) and len(pid) in (5, 6) and pid[0] == "storage"
        if not known or (len(pid) == 6 and pid[5] is not None):
            raise pickle.UnpicklingError(f"its pickle refers to {pid!r}, which is no storage")
        _, kind, key, _, count = pid[:5]
        dtype = kind.dtype if isinstance(kind, _Named) else None
        if dtype is None or not isinstance(key, str) or not _is_sizes((count,)):
            raise pickle.UnpicklingError(f"its pickle refers to {pid!r}, which is no storage")
        return _Storage(key, dtype, count)


def read(file: Path) -> dict[str, np.ndarray]:
    """Read a file that `torch.save` wrote of a state dict: names and tensors.

    Returns:
      The tensors by name, in the order of the file, as arrays of their own.

    Raises:
      ValueError: the file is no such file, is damaged, holds something else than a state dict, or
        its pickle names a class or function that tensors do not need, which the message names.
    """
    try:
        with file.open("rb") as stream:
            zipped = stream.read(2) == b"PK"
            stream.seek(0)
            return _read_zip(stream) if zipped else _read_row(stream)
    except (
        pickle.UnpicklingError,  # and whatever else a malformed pickle makes the unpickler raise
        zipfile.BadZipFile,
        ArithmeticError,
        AttributeError,
        EOFError,
        IndexError,
        KeyError,
        MemoryError,
        RuntimeError,
        TypeError,
        ValueError,
        struct.error,
    ) as error:
        raise ValueError(f"{file}: {str(error) or type(error).__name__}.") from None


def _read_zip(stream: BinaryIO) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(stream) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise pickle.UnpicklingError(
                f"the archive has {len(pickles)} entries */data.pkl, not 1"
            )
        folder = pickles[0].removesuffix("data.pkl")

        def stored(name: str) -> bytes:
            info = entries.get(folder + name)
            if info is None or info.compress_type != zipfile.ZIP_STORED:
                raise pickle.UnpicklingError(f"the archive has no plainly stored {folder}{name}")
            return archive.read(info)

        if folder + "byteorder" in entries and stored("byteorder") != b"little":
            raise pickle.UnpicklingError(f"its byte order is {stored('byteorder')!r}, not little")
        found = _checked(_Unpickler(io.BytesIO(stored("data.pkl"))).load())
        storages: dict[_Storage, np.ndarray] = {}
        for tensor in found.values():
            if tensor.storage not in storages:
                data = stored(f"data/{tensor.storage.key}")
                storages[tensor.storage] = _numbers(tensor.storage, data)
        return {name: _array(tensor, storages) for name, tensor in found.items()}


def _read_row(stream: BinaryIO) -> dict[str, np.ndarray]:
    magic, protocol, system = (_Unpickler(stream).load() for _ in range(3))
    if magic != _MAGIC or protocol != _PROTOCOL:
        raise pickle.UnpicklingError("it is no file of torch.save")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise pickle.UnpicklingError(f"its numbers are not little-endian: {system!r}")
    found = _checked(_Unpickler(stream).load())
    keys = _Unpickler(stream).load()
    needed = {tensor.storage.key: tensor.storage for tensor in found.values()}
    if not isinstance(keys, list) or not set(needed) <= {key for key in keys if type(key) is str}:
        raise pickle.UnpicklingError(
            f"it lists the storages {keys!r:.80}, not those of its tensors"
        )
    storages = {}
    for key in keys:
        (count,) = struct.unpack("<q", stream.read(8))
        if key not in needed or needed[key].count != count:
            raise pickle.UnpicklingError(f"storage {key!r} has {count} numbers and no such tensor")
        storage = needed[key]
        storages[storage] = _numbers(storage, stream.read(count * storage.dtype.itemsize))
    return {name: _array(tensor, storages) for name, tensor in found.items()}


def _checked(found: Any) -> dict[str, _Tensor]:
    """Check that what was unpickled is a state dict."""
    if not isinstance(found, dict):
        raise pickle.UnpicklingError(f"it holds a {type(found).__name__}, not names and tensors")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, _Tensor):
            raise pickle.UnpicklingError(
                f"under {name!r} it holds a {type(value).__name__}, not a tensor"
            )
    return dict(found)


def _numbers(storage: _Storage, data: bytes) -> np.ndarray:
    needed = storage.count * storage.dtype.itemsize
    if len(data) != needed:
        raise pickle.UnpicklingError(
            f"storage {storage.key!r} has {len(data)} bytes, not {needed} for {storage.count} "
            f"numbers of {storage.dtype}"
        )
    return np.frombuffer(data, storage.dtype)


def _array(tensor: _Tensor, storages: dict[_Storage, np.ndarray]) -> np.ndarray:
    numbers = storages[tensor.storage]
    strides = tuple(stride * numbers.itemsize for stride in tensor.strides)
    view = np.lib.stride_tricks.as_strided(numbers[tensor.offset :], tensor.shape, strides)
    return view.copy()
