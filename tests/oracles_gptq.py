"""The paper's algorithms in float64 NumPy, for one matrix of shape (inputs, outputs)."""

import numpy as np


def gptq(weights, gram, round_row, damping, order):
    """Frantar et al. 2023, algorithm 1 with a block of one column, in the paper's layout.

    `round_row(row, values)` gives the level nearest to each value for the kernel's row `row`.
    """
    hessian = 2 * np.asarray(gram, np.float64)[order][:, order]
    remaining = np.asarray(weights, np.float64)[order].T.copy()  # outputs by inputs
    dead = np.diag(hessian) == 0
    hessian[dead, dead] = 1
    hessian += damping * np.mean(np.diag(2 * np.asarray(gram, np.float64))) * np.eye(len(hessian))
    inverse = np.linalg.cholesky(np.linalg.inv(hessian)).T
    rounded = np.zeros_like(remaining)
    for column in range(len(hessian)):
        rounded[:, column] = round_row(order[column], remaining[:, column])
        error = (remaining[:, column] - rounded[:, column]) / inverse[column, column]
        remaining[:, column:] -= np.outer(error, inverse[column, column:])
    restored = np.zeros_like(rounded)
    restored[:, order] = rounded
    return restored.T


def nearest_of(table):
    """Return a function that rounds to the nearest of `table`, (inputs, outputs, levels)."""
    table = np.asarray(table, np.float64)

    def round_row(row, values):
        at = np.abs(table[row] - values[:, None]).argmin(-1)
        return table[row][np.arange(len(values)), at]

    return round_row


def output_error(weights, restored, gram):
    """Return the sum over outputs of (w - v)^T gram (w - v)."""
    delta = np.asarray(weights, np.float64) - np.asarray(restored, np.float64)
    return float(np.einsum("io,ij,jo->", delta, np.asarray(gram, np.float64), delta))


def awq_factors(weights, mean_abs, exponent):
    """Lin et al. 2024, section 3.2: s = s_x^a, divided by sqrt(max * min)."""
    del weights
    scales = np.asarray(mean_abs, np.float64) ** exponent
    return scales / np.sqrt(scales.max() * scales.min())


def smooth_factors(weights, abs_max, exponent):
    """Xiao et al. 2023, equation 4: s_j = max|x_j|^a / max|w_j|^(1 - a)."""
    rows = np.abs(np.asarray(weights, np.float64)).max(1)
    return np.asarray(abs_max, np.float64) ** exponent / rows ** (1 - exponent)
