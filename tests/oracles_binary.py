"""Binary and ternary networks in float64 NumPy, written from the papers."""

import numpy as np


def _blocks(weights, block):
    """Yield the slices of each block; `block` counts from the last axis, missing ones are whole."""
    sizes = [*weights.shape[: weights.ndim - len(block)], *block]
    counts = [n // size for n, size in zip(weights.shape, sizes, strict=True)]
    for corner in np.ndindex(*counts):
        yield (
            corner,
            tuple(slice(i * size, (i + 1) * size) for i, size in zip(corner, sizes, strict=True)),
        )


def _map_blocks(function, weights, block):
    weights = np.asarray(weights, np.float64)
    out = np.zeros_like(weights)
    for _, where in _blocks(weights, block):
        out[where] = function(weights[where])
    return out


def binary_weights(weights, block):
    """Return alpha sign(W), alpha = ||W||_1 / n, sign(0) = 1."""
    return _map_blocks(lambda w: np.where(w >= 0, 1, -1) * np.abs(w).mean(), weights, block)


def xnor_gradient(weights, upstream, block):
    """Return dC/dW = dC/dW~ (1/n + [|W| <= 1] alpha)."""
    slope = _map_blocks(lambda w: 1 / w.size + (np.abs(w) <= 1) * np.abs(w).mean(), weights, block)
    return upstream * slope


def ternary_weights(weights, block):
    """Return TWN's weights: threshold 0.7 E|W|, scale E(|W| over the threshold)."""

    def one(w):
        kept = np.abs(w) > 0.7 * np.abs(w).mean()
        return np.sign(w) * kept * (np.abs(w[kept]).mean() if kept.any() else 1.0)

    return _map_blocks(one, weights, block)


def best_ternary_error(weights):
    """Return the least squared error of any -a, 0, a, by trying every number of kept weights."""
    descending = np.sort(np.abs(np.asarray(weights, np.float64).ravel()))[::-1]
    gains = np.cumsum(descending) ** 2 / np.arange(1, descending.size + 1)
    return (descending**2).sum() - gains.max()


def ttq(weights, positive, negative, threshold):
    """Return the ternary weights of a layer and the regions above and below its threshold."""
    weights = np.asarray(weights, np.float64)
    limit = threshold * np.abs(weights).max()
    above, below = weights > limit, weights < -limit
    return positive * above - negative * below, above, below


def ttq_gradients(weights, positive, negative, threshold, upstream):
    """Return equations 7 and 8, the gradient of the lower level with its sign."""
    _, above, below = ttq(weights, positive, negative, threshold)
    latent = upstream * np.where(above, positive, np.where(below, negative, 1.0))
    return latent, (upstream * above).sum(), -(upstream * below).sum()


def convolve(inputs, kernel, stride, pad):
    """Cross-correlate (batch, h, w, in) with (h, w, in, out), zeros around."""
    inputs = np.pad(np.asarray(inputs, np.float64), ((0, 0), pad, pad, (0, 0)))
    height, width, _, outputs = kernel.shape
    rows = (inputs.shape[1] - height) // stride + 1
    cols = (inputs.shape[2] - width) // stride + 1
    out = np.zeros((inputs.shape[0], rows, cols, outputs))
    for i in range(rows):
        for j in range(cols):
            window = inputs[:, i * stride : i * stride + height, j * stride : j * stride + width]
            out[:, i, j] = np.einsum("nhwc,hwco->no", window, kernel)
    return out


def xnor_convolution(inputs, kernel, stride, pad):
    """Return equation 11: (sign(I) * sign(W)) K alpha, K = (mean over channels of |I|) * k."""
    signs = np.where(np.asarray(inputs) >= 0, 1.0, -1.0)
    product = convolve(signs, np.where(np.asarray(kernel) >= 0, 1.0, -1.0), stride, pad)
    height, width = kernel.shape[:2]
    means = np.abs(np.asarray(inputs, np.float64)).mean(-1, keepdims=True)
    scaling = convolve(means, np.full((height, width, 1, 1), 1 / (height * width)), stride, pad)
    return product * scaling * np.abs(np.asarray(kernel, np.float64)).mean((0, 1, 2))
