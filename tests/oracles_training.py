"""Formulas of the papers on training through quantization, in float64 NumPy."""

import numpy as np


def lsq(v, s, low, high):
    """Return equations 1 and 2 of LSQ."""
    return np.round(np.clip(np.asarray(v, np.float64) / s, low, high)) * s


def lsq_gradients(v, s, low, high, count):
    """Return equation 5 for v and equation 3 for s, each element's, the latter times g."""
    ratio = np.asarray(v, np.float64) / s
    for_v, for_s = np.zeros_like(ratio), np.zeros_like(ratio)
    for index, r in np.ndenumerate(ratio):
        if r <= low:
            for_s[index] = low
        elif r >= high:
            for_s[index] = high
        else:
            for_v[index] = 1
            for_s[index] = -r + np.round(r)
    return for_v, for_s / np.sqrt(count * high)


def lsq_plus(x, s, beta, low, high):
    return np.round(np.clip((np.asarray(x, np.float64) - beta) / s, low, high)) * s + beta


def lsq_plus_gradients(x, s, beta, low, high):
    """Return the gradients of each element for x, s and beta, without the factor g."""
    ratio = (np.asarray(x, np.float64) - beta) / s
    inside = (ratio > low) & (ratio < high)
    for_s = np.where(inside, np.round(ratio) - ratio, np.where(ratio <= low, low, high))
    return inside.astype(float), for_s, (~inside).astype(float)


def pact(x, alpha, k):
    """Return equations 1 and 2 of PACT."""
    x = np.asarray(x, np.float64)
    y = 0.5 * (np.abs(x) - np.abs(x - alpha) + alpha)
    return np.round(y * (2**k - 1) / alpha) * alpha / (2**k - 1)


def quantize_k(r, k):
    return np.round((2**k - 1) * np.asarray(r, np.float64)) / (2**k - 1)


def dorefa_weights(w, k):
    """Return equation 9 of DoReFa-Net."""
    squashed = np.tanh(np.asarray(w, np.float64))
    return 2 * quantize_k(squashed / (2 * np.abs(squashed).max()) + 0.5, k) - 1


def dorefa_weights_smooth(w):
    """Return equation 9 with the identity for quantize_k: what its gradient is that of."""
    squashed = np.tanh(np.asarray(w, np.float64))
    return squashed / np.abs(squashed).max()


def dorefa_gradient(g, sigma, k):
    """Return equation 12 of DoReFa-Net; sigma is uniform in (-1/2, 1/2)."""
    g = np.asarray(g, np.float64)
    largest = np.abs(g).max(tuple(range(1, g.ndim)), keepdims=True)
    shifted = g / (2 * largest) + 0.5 + sigma / (2**k - 1)
    return 2 * largest * (quantize_k(np.clip(shifted, 0, 1), k) - 0.5)


def batch_norm(x, scale, offset, mean, variance, epsilon):
    x, scale, offset, mean, variance = (
        np.asarray(a, np.float64) for a in (x, scale, offset, mean, variance)
    )
    return scale * (x - mean) / np.sqrt(variance + epsilon) + offset


def finite_difference(function, x, step=1e-6):
    """Return the gradient of a function of an array to a number, by central differences."""
    x = np.asarray(x, np.float64)
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        move = np.zeros_like(x)
        move[index] = step
        gradient[index] = (function(x + move) - function(x - move)) / (2 * step)
    return gradient
