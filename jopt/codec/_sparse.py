"""Code which elements of an array are blank, and the signs and magnitudes of the others.

The models are logistic regressions that learn while coding (`_models.Logistic`), in the order of
`_grids`. An element is blank or not by the density of its row, its column and each other axis, and
by whether its lags are; a sign by the signs of its lags, a magnitude by their magnitudes. This
codes pruned weights below the entropy of their own histogram, because pruning leaves dead inputs,
dead units and receptive fields.
"""

import numpy as np

from jopt.codec._coder import ONE, Coder
from jopt.codec._grids import Factor, Grid, Lags
from jopt.codec._models import UNIT, Logistic, log_ratio, squash

BASE_UNITS = 12
"""Log-odds of the density are stored in twelfths of a nat."""


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
    known = np.zeros(margin + grid.size)
    density = _Density(grid, lags)
    count = density.count
    model = Logistic([base / BASE_UNITS] + [0.8] * count + [0.3] * density.pools + [0.4] * len(offsets))
    for row, col, flat in grid.waves():
        indices = density.indices(row, col, flat)
        own = density.features(indices)
        features = np.concatenate(
            [
                np.full((1, len(flat)), float(UNIT)),
                own,
                density.pooled(row, col),
                known[flat + margin - offsets] * UNIT,
            ]
        )
        weights = [model.weight(1 + at) for at in range(count)]
        bits, odds = model.code(coder, None if truth is None else truth[flat], features)
        known[flat + margin] = bits
        density.learn(indices, bits, odds, own, weights)
    return known[margin:] > 0


class _Density:
    """The factors of rows, columns and further axes, and the pooled factors of lagged rows."""

    def __init__(self, grid: Grid, lags: Lags) -> None:
        self._axes, self._lags, self._is_table = grid.axes, lags, grid.is_table
        self._factors = [Factor(length) for _, length in grid.axes]
        if grid.is_table:
            self._rows = Factor(grid.rows, max(lags.up, default=0), distinct=True)
            self._cols = Factor(grid.cols, max(lags.left, default=0), distinct=True)
            self._factors = [self._rows, self._cols, *self._factors]
        self.count = len(self._factors)
        self.pools = (bool(lags.up) + bool(lags.left)) if grid.is_table else 0

    def indices(self, row: np.ndarray, col: np.ndarray, flat: np.ndarray) -> list[np.ndarray]:
        others = [flat // stride % length for stride, length in self._axes]
        return [row, col, *others] if self._is_table else others

    def features(self, indices: list[np.ndarray]) -> np.ndarray:
        pairs = zip(self._factors, indices, strict=True)
        features = [factor.feature(index) for factor, index in pairs]
        return np.array(features).reshape(len(features), -1) if features else np.empty((0, 0))

    def pooled(self, row: np.ndarray, col: np.ndarray) -> np.ndarray:
        pools = []
        if self.pools and self._lags.up:
            pools.append(self._rows.pooled([row - step for step in self._lags.up]))
        if self.pools and self._lags.left:
            pools.append(self._cols.pooled([col - step for step in self._lags.left]))
        return np.array(pools).reshape(len(pools), len(row))

    def learn(self, indices: list, bits: np.ndarray, odds: np.ndarray, own: np.ndarray, weights: list) -> None:
        seen = bits * float(ONE)
        for factor, index, feature, weight in zip(self._factors, indices, own, weights, strict=True):
            factor.learn(index, seen, squash(odds - np.floor(weight * feature)))


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
    offsets = lags.offsets(grid)
    margin = int(offsets.max(initial=0))
    known = np.zeros(margin + grid.size)
    signs, magnitudes = _Signs(grid, len(offsets)), _Magnitudes(grid, len(offsets), depth)
    for row, col, flat in grid.waves():
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

    def code(self, coder: Coder, truth: np.ndarray | None, row: np.ndarray, col: np.ndarray, near: np.ndarray) -> np.ndarray:
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
        self._means = [Factor(count, distinct=True) for count in (grid.rows, grid.cols)]
        self._total, self._count = 1.0, 1.0

    def code(self, coder: Coder, truth: np.ndarray | None, row: np.ndarray, col: np.ndarray, near: np.ndarray) -> np.ndarray:
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
        means = [factor.feature(index) for factor, index in zip(self._means, (row, col), strict=True)]
        scale = 2 * UNIT / (1 << self._depth)
        heads = [np.full(len(row), float(UNIT)), np.zeros(len(row)), *means, np.sign(near).sum(0) * UNIT / 4]
        return np.floor(np.concatenate([heads, near * scale]))

    def _learn(self, row: np.ndarray, col: np.ndarray, size: np.ndarray) -> None:
        self._total, self._count = self._total + float(size.sum()), self._count + len(size)
        mean = np.full(len(size), np.floor(self._total * ONE / self._count))
        for factor, index in zip(self._means, (row, col), strict=True):
            factor.learn(index, size * float(ONE), mean)
