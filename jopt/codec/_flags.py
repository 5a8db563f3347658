"""Code which elements of an array are blank.

The chance of each comes from a logistic regression that learns while coding (`_models.Logistic`),
in the order of `_grids`: from the density of its row, its column and each other axis, and from
whether the elements at its lags are blank. This codes the zeros of a pruned layer in fewer bits
than their density alone would allow, because pruning leaves dead inputs, dead units and receptive
fields.
"""

import numpy as np

from jopt.codec._bytes import Cursor
from jopt.codec._coder import ONE, Coder
from jopt.codec._errors import CodecError
from jopt.codec._grids import MAX_LAGS, Factor, Grid, Lags, Wave, with_periods
from jopt.codec._models import UNIT, Logistic, squash

BASE_UNITS = 12
"""Log-odds of the density are stored in twelfths of a nat."""

_LARGE = 1 << 20  # from here on factors are looked up afresh every `_PERIOD` waves, to save time
_PERIOD = 8


def code_flags(
    coder: Coder, truth: np.ndarray | None, grid: Grid, lags: Lags, base: int
) -> np.ndarray:
    """Code which elements are not blank.

    Args:
      coder: writes or reads.
      truth: flat flags when writing, None when reading.
      grid: the layout.
      lags: which neighbours to look at.
      base: log-odds of the density to start from, in `1 / BASE_UNITS` nats.

    Returns:
      Flat flags, bool.
    """
    offsets = lags.offsets(grid)
    margin = int(offsets.max(initial=0))
    known = np.zeros(margin + grid.size, np.int16)  # UNIT where not blank
    layout, period = density_layout(grid, lags)
    density = _Density(layout, lags, period)
    count, fixed = density.count, 1 + density.count + density.pools
    model = Logistic(
        [base / BASE_UNITS] + [0.8] * count + [0.3] * density.pools + [0.4] * len(offsets)
    )
    buffer = np.full((fixed + len(offsets), min(grid.rows, grid.cols)), float(UNIT))
    for wave in grid.waves():
        features = buffer[:, : wave.count]
        indices = density.fill(features[1:fixed], wave)
        for at, offset in enumerate(offsets, fixed):
            features[at] = known[wave.flat(margin - offset)]
        weights = [model.weight(1 + at) for at in range(count)]
        bits, odds = model.code(coder, None if truth is None else truth[wave.flat()], features)
        known[wave.flat(margin)] = bits * np.int16(UNIT)
        density.learn(indices, bits, odds, features[1 : 1 + count], weights)
    return known[margin:] > 0


def density_layout(grid: Grid, lags: Lags) -> tuple[Grid, int]:
    """Return the grid with all axes that have factors, and how many waves these stay the same."""
    return with_periods(grid, lags), 1 if grid.size < _LARGE else _PERIOD


class _Density:
    """The factors of rows, columns and further axes, and the pooled factors of lagged rows."""

    def __init__(self, grid: Grid, lags: Lags, period: int) -> None:
        self._axes, self._lags, self._is_table = grid.axes, lags, grid.is_table
        self._factors = [Factor(length, period) for _, length in grid.axes]
        self._up, self._left = max(lags.up, default=0), max(lags.left, default=0)
        if grid.is_table:  # in front of either, zeros for the lags that reach out
            self._rows = Factor(grid.rows + self._up, period)
            self._cols = Factor(grid.cols + self._left, period)
            self._factors = [self._rows, self._cols, *self._factors]
        self.count = len(self._factors)
        self.pools = (bool(lags.up) + bool(lags.left)) if grid.is_table else 0

    def fill(self, features: np.ndarray, wave: Wave) -> list[slice | np.ndarray]:
        """Write the features of a wave, and return the index of each of its factors."""
        indices: list[slice | np.ndarray] = []
        if self._is_table:
            indices = [wave.rows(self._up), wave.cols(self._left)]
        if self._axes:
            flat = wave.indices()[2]
            indices += [flat // stride % length for stride, length in self._axes]
        for at, (factor, index) in enumerate(zip(self._factors, indices, strict=True)):
            features[at] = factor.feature(index)
        if self.pools and self._lags.up:
            lagged = [wave.rows(self._up - step) for step in self._lags.up]
            features[self.count] = self._rows.pooled(lagged)
        if self.pools and self._lags.left:
            lagged = [wave.cols(self._left - step) for step in self._lags.left]
            features[-1] = self._cols.pooled(lagged)
        return indices

    def learn(
        self, indices: list, bits: np.ndarray, odds: np.ndarray, own: np.ndarray, weights: list
    ) -> None:
        """Tell each factor what was seen, and what was expected of the others alone."""
        seen = bits * float(ONE)
        pairs = zip(self._factors, indices, own, weights, strict=True)
        for factor, index, feature, weight in pairs:
            factor.learn(index, seen, squash(odds - np.floor(weight * feature)))


def flag_head(flags: np.ndarray, lags: Lags) -> tuple[bytes, int]:
    """Write what `code_flags` needs to be told: the density to start from, and the lags."""
    ones = np.count_nonzero(flags)
    base = round(float(np.log(ones / (len(flags) - ones))) * BASE_UNITS)
    base = max(-128, min(127, base))
    counts = len(lags.up) << 4 | len(lags.left)
    return bytes([base & 255, counts, *lags.up, *lags.left]), base


def read_flag_head(cursor: Cursor) -> tuple[Lags, int]:
    """Read what `flag_head` wrote."""
    base, counts = (cursor.byte() ^ 128) - 128, cursor.byte()
    up, left = tuple(cursor.take(counts >> 4)), tuple(cursor.take(counts & 15))
    if len(up) + len(left) > MAX_LAGS or 0 in up or 0 in left:
        raise CodecError("the lags are too many or zero.")
    return Lags(up, left), base
