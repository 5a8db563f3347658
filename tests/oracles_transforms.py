"""Masks that change or are learned in training, in float64 NumPy, as the papers have them."""

import math

import numpy as np
from scipy import integrate, stats


def order(scores):
    """Return indices from the highest score to the lowest; of equal ones the first comes first."""
    return np.argsort(-np.asarray(scores, np.float64), kind="stable")


def rigl_mask(weights, mask, gradients, count, end, fraction):
    """Evci et al. 2020, algorithm 1, for one layer."""
    weights, mask, gradients = (np.ravel(each) for each in (weights, mask, gradients))
    active = int(mask.sum())
    number = int(active * fraction / 2 * (1 + math.cos(count * math.pi / end)) + 1e-6)
    kept = [i for i in order(np.abs(weights)) if mask[i]][: active - number]
    grown = [i for i in order(np.abs(gradients)) if i not in set(kept)][:number]
    new = np.zeros(mask.shape, bool)
    new[kept + grown] = True
    return new


def set_kept(weights, mask, fraction):
    """Mocanu et al. 2018, algorithm 1: what is left before growing, for one layer."""
    weights = np.asarray(weights, np.float64)
    kept = np.zeros(mask.shape, bool).ravel()
    for sign in (weights >= 0, weights < 0):
        places = np.flatnonzero(mask & sign)
        number = len(places) - int(len(places) * fraction + 1e-6)
        largest = places[np.argsort(-np.abs(weights.ravel()[places]), kind="stable")]
        kept[largest[:number]] = True
    return kept.reshape(mask.shape)


def surgery_mask(weights, mask, multiplier):
    """Guo et al. 2016, equation 4, with a and b of the authors' code."""
    size = np.abs(np.asarray(weights, np.float64))
    level = max(size.mean() + multiplier * math.sqrt(((size - size.mean()) ** 2).mean()), 0)
    low, high = 0.9 * level, 1.1 * level
    new = np.array(mask)
    for at, value in np.ndenumerate(size):
        if value < low:
            new[at] = False
        elif value >= high:
            new[at] = True
    return new


def sigmoid(x):
    """Return 1 / (1 + exp(-x))."""
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def hard_concrete_cdf(z, log_alpha, beta=2 / 3, gamma=-0.1, zeta=1.1):
    """P(gate <= z) for 0 <= z < 1: Louizos et al. 2018, equation 24 of a stretched variable."""
    s = (z - gamma) / (zeta - gamma)
    return sigmoid(beta * (math.log(s) - math.log(1 - s)) - log_alpha)


def soft_threshold(weights, threshold):
    """Kusupati et al. 2020, equation 2."""
    weights = np.asarray(weights, np.float64)
    return np.sign(weights) * np.maximum(np.abs(weights) - threshold, 0)


def divergence(log_alpha):
    """Molchanov et al. 2017, the integral that equation 14 approximates, up to its constant.

    KL = -log(alpha)/2 + E log|e| with e normal around 1 with variance alpha, and made to vanish for
    large alpha, where E log|e| - log(alpha)/2 tends to E log|n|, n standard normal.
    """
    root = math.exp(log_alpha / 2)

    def density(x):  # of e / sqrt(alpha)
        return stats.norm.pdf(x, 1 / root)

    def integrand(x):
        return math.log(x) * (density(x) + density(-x))

    top = 1 / root + 12
    value = sum(
        integrate.quad(integrand, a, b, limit=200)[0]
        for a, b in ((0, 1), (1, max(1 / root, 2)), (max(1 / root, 2), top))
    )
    return value - (-np.euler_gamma - math.log(2)) / 2
