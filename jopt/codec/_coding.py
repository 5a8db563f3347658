"""Streams of flags, values and symbols, coded natively where that is worth it, else by NumPy.

The library is looked for, and compiled if need be, when the first array comes that is large enough
to be worth it; from then on it codes small ones too. Either side writes and reads the same bytes.
"""

import numpy as np

from jopt.codec import _flags, _models, _native, _values
from jopt.codec._coder import Reader, Writer
from jopt.codec._grids import Grid, Lags
from jopt.codec._native import NativeReader, NativeWriter

WORTH = 1 << 16
"""Arrays of so many elements are worth a compilation of seconds."""

Coder = Writer | Reader | NativeWriter | NativeReader


def _is_native(size: int) -> bool:
    if size < WORTH and not _native.load.cache_info().currsize:
        return False
    return not isinstance(_native.load(), str)


def writer_for(size: int) -> Writer | NativeWriter:
    """Return what codes an array of so many elements."""
    return NativeWriter() if _is_native(size) else Writer()


def reader_for(size: int, data: bytes) -> Reader | NativeReader:
    """Return what decodes an array of so many elements.

    Raises:
      CodecError: the data are no stream.
    """
    return NativeReader(data) if _is_native(size) else Reader(data)


def code_flags(
    coder: Coder, truth: np.ndarray | None, grid: Grid, lags: Lags, base: int
) -> np.ndarray:
    """Code which elements are not blank: see `_flags.code_flags`."""
    if isinstance(coder, Writer | Reader):
        return _flags.code_flags(coder, truth, grid, lags, base)
    layout, period = _flags.density_layout(grid, lags)
    return coder.code_flags(truth, layout, lags, base / _flags.BASE_UNITS, period)


def code_values(
    coder: Coder, truth: np.ndarray | None, grid: Grid, lags: Lags, flags: np.ndarray, depth: int
) -> np.ndarray:
    """Code the values of the elements that are not blank: see `_values.code_values`."""
    if isinstance(coder, Writer | Reader):
        return _values.code_values(coder, truth, grid, lags, flags, depth)
    return coder.code_values(truth, grid, lags, flags, depth)


def code_histogram(
    coder: Coder, truth: np.ndarray | None, count: int, alphabet: int, rate: int
) -> np.ndarray:
    """Code symbols by how often each was seen so far: see `_models.code_histogram`."""
    if isinstance(coder, Writer | Reader):
        return _models.code_histogram(coder, truth, count, alphabet, rate)
    if alphabet < 2:
        return np.zeros(count, np.int64)
    return coder.code_histogram(truth, count, alphabet, _models.RATES[rate])
