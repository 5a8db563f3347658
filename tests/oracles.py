"""The papers' formulas in float64 NumPy, written without looking at the library."""

import numpy as np


def minmax_codes(x, bits):
    """Return q = round((x - min) / (max - min) * (2^b - 1)) for one block."""
    x = np.asarray(x, np.float64)
    return np.round((x - x.min()) / (x.max() - x.min()) * (2**bits - 1))


def minmax_values(x, bits):
    x = np.asarray(x, np.float64)
    return x.min() + minmax_codes(x, bits) * (x.max() - x.min()) / (2**bits - 1)


def symmetric_codes(x, bits):
    x = np.asarray(x, np.float64)
    top = 2 ** (bits - 1) - 1
    return np.clip(np.round(x / (np.abs(x).max() / top)), -top, top)


def topk_mask(scores, keep):
    """Keep the largest; of equals the one with the lower index."""
    flat = np.asarray(scores, np.float64).ravel()
    mask = np.zeros(flat.size, bool)
    mask[np.argsort(-flat, kind="stable")[:keep]] = True
    return mask.reshape(np.shape(scores))


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def soft_cross_entropy(student, teacher, temperature):
    targets = np.exp(log_softmax(np.asarray(teacher, np.float64) / temperature))
    return -(temperature**2) * (targets * log_softmax(np.asarray(student) / temperature)).sum(-1)


def cubic_sparsity(step, final, begin, length):
    """Return equation 1 of Zhu and Gupta, starting from zero."""
    progress = np.clip((step - begin) / length, 0, 1)
    return final + (0.0 - final) * (1 - progress) ** 3
