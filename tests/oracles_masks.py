"""Structures and budgets of masks in NumPy, by sorting and by trying everything."""

import itertools

import numpy as np


def n_m_mask(scores, n, m, axis):
    """Sort every group; of equals the one with the lower index comes first."""
    last = np.moveaxis(np.asarray(scores, np.float64), axis, -1)
    groups = last.reshape(-1, m)
    order = np.argsort(-np.where(np.isnan(groups), -np.inf, groups), axis=1, kind="stable")
    mask = np.zeros(groups.shape, bool)
    np.put_along_axis(mask, order[:, :n], True, axis=1)
    return np.moveaxis(mask.reshape(last.shape), -1, axis)


def block_of(index, sizes):
    return tuple(i // size for i, size in zip(index, sizes, strict=True))


def pooled(scores, sizes, reduce):
    """Collect the elements of each block one by one."""
    scores = np.asarray(scores, np.float64)
    members = {}
    for index in np.ndindex(scores.shape):
        members.setdefault(block_of(index, sizes), []).append(scores[index])
    out = np.zeros([n // size for n, size in zip(scores.shape, sizes, strict=True)])
    for block, values in members.items():
        out[block] = reduce(values)
    return out


def expanded(mask, sizes, shape):
    return np.array([mask[block_of(index, sizes)] for index in np.ndindex(shape)]).reshape(shape)


def capped_densities(raw, sizes, density):
    """Return min(1, scale * raw) with sum(sizes * densities) = density * sum(sizes), by bisection.

    Mocanu et al., equation 1, with the cap of Evci et al.: one scale for all, nothing over 1.
    """
    raw, sizes = np.asarray(raw, np.float64), np.asarray(sizes, np.float64)
    low, high = 0.0, 1 / raw.min()
    for _ in range(200):
        middle = (low + high) / 2
        if (np.minimum(1, middle * raw) * sizes).sum() < density * sizes.sum():
            low = middle
        else:
            high = middle
    return np.minimum(1, high * raw)


def least_harm(levels, harms, sizes, pruned):
    """Return the least harm of any split over leaves, harm interpolated between levels."""
    grids = [range(int(size * levels[-1]) + 1) for size in sizes]
    best = np.inf
    for counts in itertools.product(*grids):
        if sum(counts) == pruned:
            curves = zip(counts, sizes, harms, strict=True)
            harm = sum(np.interp(c / size, [0, *levels], [0, *h]) for c, size, h in curves)
            best = min(best, harm)
    return best
