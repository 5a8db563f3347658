"""One-dimensional k-means in float64 NumPy: the exact optimum, by the recurrence alone."""

import numpy as np


def exact_error(values, count, weights=None):
    """Return the least mean squared error of any codebook of `count` entries.

    D[m][j] = min_i D[m - 1][i] + error(i, j) over sorted distinct values, each layer by divide and
    conquer: the best i does not fall as j rises. All j of one depth are treated together.
    """
    values = np.asarray(values, np.float64).ravel()
    weights = np.ones(values.size) if weights is None else np.asarray(weights, np.float64).ravel()
    total = weights.sum()
    points, inverse = np.unique(values, return_inverse=True)
    mass = np.bincount(inverse, weights)
    points, mass = points[mass > 0], mass[mass > 0]
    if points.size <= count:
        return 0.0
    points = points - points @ mass / total
    n0 = np.append(0.0, np.cumsum(mass))
    n1 = np.append(0.0, np.cumsum(mass * points))

    def gain(i, j):
        inside = n0[j] - n0[i]
        return np.where(inside > 0, (n1[j] - n1[i]) ** 2 / np.where(inside > 0, inside, 1), 0.0)

    size = points.size
    best = gain(np.zeros(size + 1, int), np.arange(size + 1))
    for _ in range(count - 1):
        best = _next_layer(best, gain, size)
    return max(mass @ points**2 - best[size], 0.0) / total


def _next_layer(best, gain, size):
    longer = np.full(size + 1, -np.inf)
    longer[0] = 0.0
    chosen = np.zeros(size + 1, int)
    step = 1 << int(size).bit_length()
    while step >= 1:
        j = np.arange(step, size + 1, 2 * step)
        if j.size:
            low = chosen[j - step]
            above = j + step
            high = np.minimum(np.where(above <= size, chosen[np.minimum(above, size)], j), j)
            length = high - low + 1
            start = np.append(0, np.cumsum(length)[:-1])
            i = np.arange(length.sum()) - np.repeat(start - low, length)
            value = best[i] + gain(i, np.repeat(j, length))
            top = np.maximum.reduceat(value, start)
            longer[j] = top
            hits = np.flatnonzero(value == np.repeat(top, length))
            rows = np.searchsorted(start, hits, side="right") - 1
            chosen[j[rows[::-1]]] = i[hits[::-1]]  # the first of equals is written last
        step //= 2
    return longer


def slow_exact_error(values, count):
    """Return the same by trying every interval: O(count n^2), no use of monotonicity."""
    x = np.sort(np.asarray(values, np.float64).ravel())
    best = np.array([0.0] + [np.inf] * x.size)
    for _ in range(count):
        best = np.array(
            [
                min(
                    best[i] + ((x[i:j] - x[i:j].mean()) ** 2).sum() if i < j else best[i]
                    for i in range(j + 1)
                )
                for j in range(x.size + 1)
            ]
        )
    return best[-1] / x.size


def error(values, codebook, weights=None):
    """Return the mean squared distance to the nearest entry."""
    values = np.asarray(values, np.float64).ravel()
    squared = (values - np.asarray(codebook, np.float64)[nearest(values, codebook)]) ** 2
    return np.average(squared, weights=None if weights is None else np.ravel(weights))


def nearest(values, codebook):
    """Return the index of the nearest entry, the lower of two, by trying all."""
    values = np.asarray(values, np.float64).ravel()
    book = np.asarray(codebook, np.float64)
    if book.size * values.size < 1 << 22:
        return np.abs(values[:, None] - book).argmin(1)
    return np.searchsorted((book[1:] + book[:-1]) / 2, values)


def lloyd_steps(values, codebook, steps):
    x, book = np.asarray(values, np.float64).ravel(), np.array(codebook, np.float64)
    for _ in range(steps):
        codes = nearest(x, book)
        for j in range(book.size):
            if (codes == j).any():
                book[j] = x[codes == j].mean()
    return book
