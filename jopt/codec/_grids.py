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
from dataclasses import dataclass

import numpy as np

from jopt.codec._coder import ONE
from jopt.codec._models import log_ratio

MAX_LAGS = 8
_MAX_DISTANCE = 256
_MIN_BATCH = 256  # elements a step that keep NumPy's overhead small on large arrays
_LARGE = 1 << 19
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

    def waves(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield rows, columns and flat indices of each anti-diagonal in turn."""
        for diagonal in range(self.rows + self.cols - 1):
            first = max(0, diagonal - self.cols + 1)
            row = np.arange(first, min(self.rows, diagonal + 1))
            flat = row * (self.cols - 1) + diagonal
            if len(flat) and flat[-1] >= self.size:
                row, flat = row[:-1], flat[:-1]
            if len(flat):
                yield row, diagonal - row, flat


def grid_of(shape: tuple[int, ...]) -> Grid:
    """Choose the matrix for an array of `shape`, the same on both sides.

    The axes are split where the matrix is most nearly square. A large array that would still be
    so narrow as to make the batches short is laid out as a square instead.
    """
    size = math.prod(shape)
    splits = [(math.prod(shape[:at]), math.prod(shape[at:])) for at in range(1, len(shape))]
    rows, cols = max(splits, key=min, default=(1, size))
    strides = [math.prod(shape[at + 1 :]) for at in range(len(shape))]
    axes = [(stride, length) for stride, length in zip(strides, shape, strict=True) if length > 1]
    is_table = min(rows, cols) > 1 and (size < _LARGE or size >= _MIN_BATCH * (rows + cols))
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

    def __init__(self, count: int, margin: int = 0, distinct: bool = False) -> None:
        self._distinct = distinct  # no index comes twice in one batch
        self._margin = margin  # zeros in front, for lags that reach out of the matrix
        self._seen = np.full(margin + count, float(ONE))
        self._expected = np.full(margin + count, float(ONE))

    def feature(self, index: np.ndarray) -> np.ndarray:
        """Return the estimate of each index, in units of 1/UNIT."""
        index = index + self._margin
        return log_ratio(self._seen[index], self._expected[index])

    def pooled(self, indices: list[np.ndarray]) -> np.ndarray:
        """Return one estimate from several indices taken together."""
        stacked = np.stack(indices) + self._margin
        return log_ratio(self._seen[stacked].sum(0), self._expected[stacked].sum(0))

    def learn(self, index: np.ndarray, seen: np.ndarray, expected: np.ndarray) -> None:
        """Add what was seen and expected, in units of 1/ONE."""
        index = index + self._margin
        if self._distinct:
            self._seen[index] += seen
            self._expected[index] += expected
        else:
            np.add.at(self._seen, index, seen)
            np.add.at(self._expected, index, expected)


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
        """Return the steps as differences of flat indices, one a row, to broadcast."""
        steps = [step * grid.cols for step in self.up] + list(self.left)
        return np.array(steps, np.int64)[:, None]


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
    signs = signs[:2048, : max(16, (1 << 18) // max(1, min(2048, len(signs))))].astype(np.float32)
    flags = np.abs(signs)
    total = float(flags.sum())
    if len(signs) < 3 or not total:
        return []
    by_row, by_col = flags.sum(1), flags.sum(0)
    chance = np.outer(by_row, by_row) * float((by_col**2).sum()) / total**2
    both, same = flags @ flags.T, signs @ signs.T
    found = []
    for step in range(1, min(len(signs) - 1, _MAX_DISTANCE)):
        pairs, expected = np.trace(both, step), np.trace(chance, step)
        excess = max(0.0, (pairs - expected) / math.sqrt(expected + 1))
        score = math.hypot(excess, np.trace(same, step) / math.sqrt(pairs + 1))
        if score > _TELLING:
            found.append((step, score))
    return found
