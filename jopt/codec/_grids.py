"""The order in which a sparse array is coded: a matrix, anti-diagonal by anti-diagonal.

The elements of one anti-diagonal are coded together, as one NumPy batch; when its turn comes, an
element knows all of its row to the left and all of its column above. So what rows and columns have
in common is learned while coding and costs no side information, and still a matrix of R x C takes
R + C steps. The encoder adds lags: steps up the column or along the row at which elements resemble
each other. The first layer of an image network has its pixels in rows, so the weights of
neighbouring pixels lie 1 and `width` rows apart.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from jopt.codec._coder import ONE
from jopt.codec._models import log_ratio

MAX_LAGS = 8
_MAX_DISTANCE = 256
_SAMPLED = 1024  # rows and columns in which lags are looked for
_MIN_PERIOD = 8
_FEW_STEPS = 1 << 12  # beyond these, a step must be worth NumPy's overhead:
_MIN_BATCH = 256
_TELLING = 6.0  # standard deviations; hundreds of steps are tried, so 3 would prove nothing


@dataclass(frozen=True)
class Grid:
    """Lay out an array as a matrix whose last row may be short.

    Attributes:
      rows: number of rows.
      cols: number of columns.
      size: number of elements, more than `(rows - 1) * cols`.
      axes: (stride, length) of each axis of the array that is neither the rows nor the columns.
      is_table: whether rows and columns are axes, or products of axes, of the array.
    """

    rows: int
    cols: int
    size: int
    axes: tuple[tuple[int, int], ...]
    is_table: bool

    def waves(self) -> Iterator["Wave"]:
        """Yield the anti-diagonals in turn."""
        for diagonal in range(self.rows + self.cols - 1):
            first = max(0, diagonal - self.cols + 1)
            count = min(self.rows, diagonal + 1) - first
            last = (first + count - 1) * (self.cols - 1) + diagonal
            if last >= self.size:
                count -= 1
            if count:
                yield Wave(first, diagonal - first, count, self.cols)


class Wave(NamedTuple):
    """One anti-diagonal, from its upper right to its lower left element.

    Attributes:
      row: the first element's row.
      col: its column.
      count: number of elements.
      width: number of columns of the matrix.
    """

    row: int
    col: int
    count: int
    width: int

    def flat(self, shift: int = 0) -> slice:
        """Return the flat indices of the elements plus `shift`, as a slice."""
        start, step = self.row * self.width + self.col + shift, max(1, self.width - 1)
        return slice(start, start + (self.count - 1) * step + 1, step)

    def rows(self, shift: int = 0) -> slice:
        """Return the rows of the elements plus `shift`."""
        return slice(self.row + shift, self.row + shift + self.count)

    def cols(self, shift: int = 0) -> slice:
        """Return the columns of the elements plus `shift`, which descend."""
        stop = self.col + shift - self.count
        return slice(self.col + shift, stop if stop >= 0 else None, -1)

    def indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return rows, columns and flat indices as arrays."""
        row = np.arange(self.row, self.row + self.count)
        col = self.row + self.col - row
        return row, col, row * self.width + col


def grid_of(shape: tuple[int, ...]) -> Grid:
    """Choose the matrix for an array of `shape`, the same on both sides.

    The axes are split where the matrix is most nearly square. An array that would still be
    so narrow that it takes many short steps is laid out as a square instead.
    """
    size = math.prod(shape)
    splits = [(math.prod(shape[:at]), math.prod(shape[at:])) for at in range(1, len(shape))]
    rows, cols = max(splits, key=min, default=(1, size))
    strides = [math.prod(shape[at + 1 :]) for at in range(len(shape))]
    axes = [(stride, length) for stride, length in zip(strides, shape, strict=True) if length > 1]
    is_table = min(rows, cols) > 1 and (
        rows + cols <= _FEW_STEPS or size >= _MIN_BATCH * (rows + cols)
    )
    if is_table:
        taken = {(cols, rows), (1, cols)}
        return Grid(rows, cols, size, tuple(axis for axis in axes if axis not in taken), True)
    cols = math.isqrt(max(size - 1, 0)) + 1
    if len(shape) > 1 and shape[-1] <= cols:
        cols += -cols % shape[-1]
    return Grid(-(-size // cols), cols, size, tuple(axes if len(axes) > 1 else ()), False)


class Factor:
    """Estimate how much more often than expected an index shows ones, on a log scale.

    The estimate is `ln((seen + 1) / (expected + 1))`, where `expected` sums what the rest of the
    model gave: the mean of a Gamma prior on a Poisson rate. Together the factors of rows and
    columns make the product-of-odds model of a table.
    """

    def __init__(self, count: int, period: int = 1) -> None:
        self._seen = np.full(count, float(ONE))
        self._expected = np.full(count, float(ONE))
        self._period, self._turn, self._known = period, 0, np.zeros(count)

    def feature(self, index: slice | np.ndarray) -> np.ndarray:
        """Return the estimate of each index, in units of 1/UNIT, as of the last full period."""
        if self._period > 1:
            return self._known[index]
        return log_ratio(self._seen[index], self._expected[index])

    def pooled(self, indices: list[slice]) -> np.ndarray:
        """Return one estimate from several indices taken together."""
        seen = sum(self._seen[index] for index in indices)
        return log_ratio(np.asarray(seen), np.asarray(sum(self._expected[i] for i in indices)))

    def learn(self, index: slice | np.ndarray, seen: np.ndarray, expected: np.ndarray) -> None:
        """Add what was seen and expected, in units of 1/ONE."""
        if isinstance(index, slice):
            self._seen[index] += seen
            self._expected[index] += expected
        else:  # an index may come twice
            np.add.at(self._seen, index, seen)
            np.add.at(self._expected, index, expected)
        self._turn += 1
        if self._period > 1 and self._turn % self._period == 0:
            self._known = log_ratio(self._seen, self._expected)


@dataclass(frozen=True)
class Lags:
    """Steps back from an element to others that resemble it, all coded before it.

    Attributes:
      up: numbers of rows.
      left: numbers of columns.
    """

    up: tuple[int, ...] = ()
    left: tuple[int, ...] = ()

    def offsets(self, grid: Grid) -> np.ndarray:
        """Return the steps as differences of flat indices."""
        return np.array([step * grid.cols for step in self.up] + list(self.left), np.int64)


def with_periods(grid: Grid, lags: Lags) -> Grid:
    """Add the axes that were flattened into the rows or the columns and that the lags betray.

    The most telling long step that divides the number of rows is taken for the length of an axis:
    28 for the 784 pixels of an image, the number of channels for a flattened feature map.
    """
    axes = list(grid.axes)
    for steps, count, stride in ((lags.up, grid.rows, grid.cols), (lags.left, grid.cols, 1)):
        period = next((step for step in steps if step >= _MIN_PERIOD and count % step == 0), 0)
        if period and grid.is_table:
            axes += [(stride, period), (stride * period, count // period)]
    return replace(grid, axes=tuple(dict.fromkeys(axes)))


def find_lags(values: np.ndarray, grid: Grid) -> Lags:
    """Find the steps at which zeros, or signs, agree far more often than by chance.

    Args:
      values: flat integers, 0 where blank.
      grid: their layout.

    Returns:
      At most `MAX_LAGS` steps, most telling first.
    """
    whole = grid.rows if grid.rows * grid.cols == grid.size else grid.rows - 1
    matrix = np.sign(values[: whole * grid.cols]).reshape(whole, grid.cols)
    scored = [(score, 0, step) for step, score in _scores(matrix)]
    scored += [(score, 1, step) for step, score in _scores(matrix.T)]
    best = sorted(scored, reverse=True)[:MAX_LAGS]
    return Lags(
        tuple(step for _, axis, step in best if axis == 0),
        tuple(step for _, axis, step in best if axis == 1),
    )


def _scores(signs: np.ndarray) -> list[tuple[int, float]]:
    """Score steps along the first axis in standard deviations, keeping the telling ones."""
    width = max(16, (1 << 18) // min(_SAMPLED, max(1, len(signs))))
    signs = signs[:_SAMPLED, :width].astype(np.float32)
    flags = np.abs(signs)
    total = float(flags.sum())
    if len(signs) < 3 or not total:
        return []
    by_row, by_col = flags.sum(1), flags.sum(0)
    chance = np.outer(by_row, by_row) * float((by_col**2).sum()) / total**2
    balanced = signs - flags * (float(signs.sum()) / total)
    both, same = flags @ flags.T, balanced @ balanced.T
    found = []
    for step in range(1, min(len(signs) - 1, _MAX_DISTANCE)):
        pairs, expected = np.trace(both, step), np.trace(chance, step)
        excess = max(0.0, (pairs - expected) / math.sqrt(expected + 1))
        score = math.hypot(excess, np.trace(same, step) / math.sqrt(pairs + 1))
        if score > _TELLING:
            found.append((step, score))
    return found
