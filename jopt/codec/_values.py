"""Code the signs and the magnitudes of the elements that are not blank.

As for the flags, logistic regressions learn while coding. A sign is predicted by the signs at its
lags: the receptive fields of a first layer are smooth, and half of the cost of the signs goes. A
magnitude is predicted by the magnitudes at its lags and in its row and column.
"""

import numpy as np

from jopt.codec._coder import ONE, Coder
from jopt.codec._grids import Factor, Grid, Lags
from jopt.codec._models import UNIT, Logistic, log_ratio


def code_values(
    coder: Coder, truth: np.ndarray | None, grid: Grid, lags: Lags, flags: np.ndarray, depth: int
) -> np.ndarray:
    """Code the values of the elements that are not blank.

    Args:
      coder: writes or reads.
      truth: flat integers, zero where blank, when writing; None when reading.
      grid: the layout.
      lags: which neighbours to look at.
      flags: which elements are not blank.
      depth: magnitudes less one have so many bits.

    Returns:
      Flat integers, zero where blank.
    """
    offsets = lags.offsets(grid)[:, None]
    margin = int(offsets.max(initial=0))
    known = np.zeros(margin + grid.size)
    signs, magnitudes = _Signs(grid, len(offsets)), _Magnitudes(grid, len(offsets), depth)
    for wave in grid.waves():
        row, col, flat = wave.indices()
        kept = flags[flat]
        row, col, flat = row[kept], col[kept], flat[kept]
        if not len(flat):
            continue
        near = known[flat + margin - offsets]
        known_here = None if truth is None else truth[flat]
        sign = signs.code(coder, known_here, row, col, np.sign(near))
        size = magnitudes.code(coder, known_here, row, col, np.abs(near))
        known[flat + margin] = sign * size
    return known[margin:].astype(np.int64)


class _Signs:
    """Signs, by those of the lags and by the balance of the row and the column."""

    def __init__(self, grid: Grid, lags: int) -> None:
        self._model = Logistic([0.0, 0.5, 0.5] + [1.0] * lags, firmness=10)
        self._balances = [np.full((2, count), 2.0) for count in (grid.rows, grid.cols)]

    def code(
        self,
        coder: Coder,
        truth: np.ndarray | None,
        row: np.ndarray,
        col: np.ndarray,
        near: np.ndarray,
    ) -> np.ndarray:
        tilts = [
            log_ratio(balance[1, index], balance[0, index])
            for balance, index in zip(self._balances, (row, col), strict=True)
        ]
        features = np.concatenate([np.full((1, len(row)), float(UNIT)), tilts, near * UNIT])
        positive, _ = self._model.code(coder, None if truth is None else truth > 0, features)
        for balance, index in zip(self._balances, (row, col), strict=True):
            np.add.at(balance, (positive.astype(np.intp), index), 1.0)
        return np.where(positive, 1, -1)


class _Magnitudes:
    """Magnitudes less one, bit by bit from the top, each node of the tree with its own density.

    What moves the chance of a bit: the magnitudes of the lags, how many of them are not blank, and
    the mean magnitude of the row and of the column.
    """

    def __init__(self, grid: Grid, lags: int, depth: int) -> None:
        self._depth = depth
        self._models = [Logistic([0.0, 1.0, 0.2, 0.2, 0.0] + [0.1] * lags) for _ in range(depth)]
        self._nodes = np.full((2, 1 << depth), 0.5)
        self._means = [Factor(count) for count in (grid.rows, grid.cols)]
        self._total, self._count = 1.0, 1.0

    def code(
        self,
        coder: Coder,
        truth: np.ndarray | None,
        row: np.ndarray,
        col: np.ndarray,
        near: np.ndarray,
    ) -> np.ndarray:
        shared = self._features(row, col, near)
        node = np.ones(len(row), np.intp)
        for level, model in enumerate(self._models):
            shift = self._depth - 1 - level
            bit = None if truth is None else (np.abs(truth) - 1) >> shift & 1
            shared[1] = log_ratio(self._nodes[1, node], self._nodes[0, node])
            bits, _ = model.code(coder, bit, shared)
            bits = bits.astype(np.intp)
            np.add.at(self._nodes, (bits, node), 1.0)
            node = 2 * node + bits
        size = node - (1 << self._depth) + 1
        self._learn(row, col, size)
        return size

    def _features(self, row: np.ndarray, col: np.ndarray, near: np.ndarray) -> np.ndarray:
        means = [
            factor.feature(index) for factor, index in zip(self._means, (row, col), strict=True)
        ]
        scale = 2 * UNIT / (1 << self._depth)
        heads = [
            np.full(len(row), float(UNIT)),
            np.zeros(len(row)),
            *means,
            np.sign(near).sum(0) * UNIT / 4,
        ]
        return np.floor(np.concatenate([heads, near * scale]))

    def _learn(self, row: np.ndarray, col: np.ndarray, size: np.ndarray) -> None:
        self._total, self._count = self._total + float(size.sum()), self._count + len(size)
        mean = np.full(len(size), np.floor(self._total * ONE / self._count))
        for factor, index in zip(self._means, (row, col), strict=True):
            factor.learn(index, size * float(ONE), mean)
