"""Writers and readers that run the models natively: the same bytes, many times faster."""

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from jopt._compiling import SWITCH, Unavailable, compiled, library
from jopt.codec import _models
from jopt.codec._coder import refuse_rest, stream_bytes, stream_words
from jopt.codec._grids import Grid, Lags

_MAIN = Path(__file__).parent / "native" / "codec.cc"
_FLAGS = ("-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math")
_NO_MEMORY = 2
_INTEGER, _WHOLE, _REAL, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "tables": (_INTEGER, [_POINTER, _WHOLE, _POINTER, _WHOLE]),
    "writer": (_POINTER, []),
    "writer_free": (None, [_POINTER]),
    "writer_finish": (_WHOLE, [_POINTER]),
    "writer_words": (None, [_POINTER, _POINTER]),
    "reader": (_POINTER, [_POINTER, _WHOLE]),
    "reader_free": (None, [_POINTER]),
    "reader_bits": (_WHOLE, [_POINTER]),
    "reader_empty": (_INTEGER, [_POINTER]),
} | {
    f"{verb}_{name}": (_INTEGER, [_POINTER, *arguments])
    for verb in ("write", "read")
    for name, arguments in {
        "flags": [_POINTER, _POINTER, _WHOLE, _REAL, _INTEGER],
        "values": [_POINTER, _POINTER, _POINTER, _WHOLE, _INTEGER],
        "histogram": [_POINTER, _WHOLE, _INTEGER, _WHOLE],
    }.items()
}


@cache
def load() -> ctypes.CDLL | str:
    """Return the library, or why there is none."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH} is 0"
    try:
        found = ctypes.CDLL(str(compiled(*library("codec", _MAIN, _FLAGS))))
    except (Unavailable, OSError) as error:
        return str(error)
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(found, f"jopt_{name}")
        function.restype, function.argtypes = result, arguments
    squash, logs = _models.tables()
    refused = found.jopt_tables(squash.ctypes, len(squash), logs.ctypes, len(logs))
    return "its tables have other sizes" if refused else found


class _Native:
    """A handle of the library, and the calls that writers and readers share."""

    _verb: str

    def __init__(self) -> None:
        found = load()
        assert not isinstance(found, str), found
        self._library, self._handle = found, None

    def _hold(self, handle: int | None) -> None:
        if not handle:
            raise MemoryError("no memory for the entropy coder.")
        self._handle = handle

    def _call(self, name: str, *arguments: Any) -> None:
        function = getattr(self._library, f"jopt_{self._verb}_{name}")
        outcome = function(self._handle, *arguments)
        if outcome == _NO_MEMORY:
            raise MemoryError(f"no memory to code {name}.")
        assert outcome == 0, f"the native coder refuses the arguments of {name}."

    def code_flags(
        self, truth: np.ndarray | None, grid: Grid, lags: Lags, base: float, period: int
    ) -> np.ndarray:
        """Do what `_flags.code_flags` does, for a grid with its periods."""
        flags = np.zeros(grid.size, bool) if truth is None else np.array(truth, bool)
        words = _layout(grid, lags)
        self._call("flags", flags.ctypes, words.ctypes, len(words), base, period)
        return flags

    def code_values(
        self, truth: np.ndarray | None, grid: Grid, lags: Lags, flags: np.ndarray, depth: int
    ) -> np.ndarray:
        """Do what `_values.code_values` does."""
        values = np.zeros(grid.size, np.int16) if truth is None else np.array(truth, np.int16)
        kept, words = np.ascontiguousarray(flags, bool), _layout(grid, lags)
        self._call("values", values.ctypes, kept.ctypes, words.ctypes, len(words), depth)
        return values

    def code_histogram(
        self, truth: np.ndarray | None, count: int, alphabet: int, gain: int
    ) -> np.ndarray:
        """Do what `_models.code_histogram` does."""
        symbols = np.zeros(count, np.uint8) if truth is None else np.array(truth, np.uint8)
        self._call("histogram", symbols.ctypes, count, alphabet, gain)
        return symbols


class NativeWriter(_Native):
    """Collect symbols with their models, then encode them all, as `Writer` does."""

    _verb = "write"

    def __init__(self) -> None:
        """Start empty."""
        super().__init__()
        self._hold(self._library.jopt_writer())

    def finish(self) -> bytes:
        """Encode what was collected."""
        count = self._library.jopt_writer_finish(self._handle)
        if count < 0:
            raise MemoryError("no memory for the coded stream.")
        words = np.empty(count, np.uint32)
        self._library.jopt_writer_words(self._handle, words.ctypes)
        return stream_bytes(words)

    def __del__(self) -> None:
        """Let go of the memory."""
        self._library.jopt_writer_free(self._handle)


class NativeReader(_Native):
    """Decode symbols in the order in which a writer took them, as `Reader` does."""

    _verb = "read"

    def __init__(self, data: bytes) -> None:
        """Take a whole stream."""
        super().__init__()
        words = stream_words(data)
        self._hold(self._library.jopt_reader(words.ctypes, len(words)))

    def bits_left(self) -> int:
        """Return how many bits of the stream are still to be decoded."""
        return self._library.jopt_reader_bits(self._handle)

    def finish(self) -> None:
        """Check that the stream is used up, as `Reader.finish` does."""
        refuse_rest(bool(self._library.jopt_reader_empty(self._handle)))

    def __del__(self) -> None:
        """Let go of the memory."""
        self._library.jopt_reader_free(self._handle)


def _layout(grid: Grid, lags: Lags) -> np.ndarray:
    """Write a grid and its lags as `read_grid` in codec.cc reads them."""
    axes = [number for axis in grid.axes for number in axis]
    counts = [len(grid.axes), len(lags.up), len(lags.left)]
    head = [grid.rows, grid.cols, grid.size, int(grid.is_table)]
    return np.array([*head, *counts, *axes, *lags.up, *lags.left], np.int64)
