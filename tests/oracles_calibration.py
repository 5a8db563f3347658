"""Calibration in float64 NumPy, written from the definitions without looking at the library."""

import math

import numpy as np


def rank_magnitude(x, percent):
    """Return the smallest magnitude that at least `percent` of all magnitudes do not exceed."""
    ordered = np.sort(np.abs(np.asarray(x, np.float64)).ravel())
    held = np.array([np.count_nonzero(ordered <= value) for value in ordered])
    return ordered[1000 * held >= round(10 * percent) * ordered.size].min()


def symmetric(x, threshold, bits):
    """Round to whole multiples of threshold / (2^(b-1) - 1), saturating; one bit: -T or T."""
    x = np.asarray(x, np.float64)
    if bits == 1:
        return np.sign(x) * threshold
    top = 2 ** (bits - 1) - 1
    step = threshold / top
    return np.clip(np.round(x / step), -top, top) * step


def affine_zero(x, low, high, bits):
    """Round to a whole number of steps from a zero point that is itself a code."""
    x, top = np.asarray(x, np.float64), 2**bits - 1
    low, high = min(low, 0.0), max(high, 0.0)
    step = (high - low) / top if high > low else 1.0
    zero = np.round(-low / step)
    return (np.clip(np.round(x / step) + zero, 0, top) - zero) * step


def squared_error(x, threshold, bits, importance=1.0):
    return (importance * (symmetric(x, threshold, bits) - np.asarray(x, np.float64)) ** 2).sum()


def histogram(x, bins):
    """Return `(counts, zeros, exponent)`: bins 2^e wide around zero, e as small as holds all."""
    x = np.asarray(x, np.float64).ravel()
    half, exponent = bins // 2, -126
    while True:
        places = np.floor(x / 2.0**exponent)
        if places.min() >= -half and places.max() < half:
            break
        exponent += 1
    places = (places[x != 0] + half).astype(int)
    return np.bincount(places, minlength=bins), np.count_nonzero(x == 0), exponent


def divergence(counts, cut, bits):
    """Return KL(P, Q) of a histogram around zero cut at `cut` bins on each side.

    Levels are the multiples of T / (2^(b-1) - 1), each bin rounded to the nearest.
    """
    half = len(counts) // 2
    inside = np.array(counts[half - cut : half + cut], np.float64)
    p = inside.copy()
    p[0] += np.sum(counts[: half - cut])
    p[-1] += np.sum(counts[half + cut :])
    middles = np.arange(-cut, cut) + 0.5
    codes = np.round(middles / (cut / (2 ** (bits - 1) - 1)))
    q = np.zeros_like(p)
    for code in np.unique(codes):
        full = (codes == code) & (inside > 0)
        if full.any():
            q[full] = inside[full].sum() / full.sum()
    total = p.sum()
    p, q = p / total, np.maximum(q / max(q.sum(), 1), 1 / total)
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def moving_average(ends, momentum):
    """Return the average with weights (1 - m) m^(n - i), normalised."""
    weights = np.array([momentum ** (len(ends) - 1 - i) for i in range(len(ends))])
    return (weights * np.asarray(ends, np.float64)).sum() / weights.sum()


def spread_and_drift(widths):
    """Return std / mean, and the slope of the line of least squares times (n - 1) / mean."""
    widths = np.asarray(widths, np.float64)
    slope = np.polyfit(np.arange(widths.size), widths, 1)[0]
    return widths.std() / widths.mean(), slope * (widths.size - 1) / widths.mean()
