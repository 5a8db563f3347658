"""Float64 NumPy transcriptions of the number formats, written from their papers."""

import itertools

import ml_dtypes
import numpy as np

# Dettmers et al., "QLoRA", 2023, appendix E.
NF4 = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]


def nearest(values, levels):
    """Return the nearest level of each value, the lower one of two that are as near."""
    values, levels = np.asarray(values, np.float64), np.sort(np.asarray(levels, np.float64))
    distance = np.abs(values[..., None] - levels)
    return levels[distance.argmin(-1)]


def log_quantized(values, bits, base):
    """LogQuant of Miyashita et al. 2016, with powers that are too small set to zero."""
    values = np.asarray(values, np.float64)
    scale = np.abs(values).max()
    count = 2 ** (bits - 1) - 1
    out = np.zeros(values.shape)
    for place in np.argwhere(values):
        place = tuple(place)
        exponent = int(np.rint(-np.log(abs(values[place]) / scale) / np.log(base)))
        if exponent < count:
            out[place] = np.sign(values[place]) * scale * base**-exponent
    return out


def additive_powers(terms):
    """Li et al. 2020, equation 4: all sums of one exponent of each term, normalised."""
    choices = [[0.0] + [2.0**-exponent for exponent in term] for term in terms]
    sums = sorted({sum(choice) for choice in itertools.product(*choices)})
    return [value / sums[-1] for value in sums]


# The exponents of each term, by the number of bits without the sign; "2^-1" first, as published.
ADDITIVE_TERMS = {
    1: [[1]],
    2: [[1, 2, 3]],
    3: [[1, 2, 4], [3]],
    4: [[1, 3, 5], [2, 4, 6]],
    5: [[1, 3, 6], [2, 4, 7], [5]],
    6: [[1, 4, 7], [2, 5, 8], [3, 6, 9]],
}

# OCP MX v1.0, section 5.3: dtype, exponent of the largest number, the largest number.
ELEMENTS = {
    "e4m3": (ml_dtypes.float8_e4m3fn, 8, 448.0),
    "e5m2": (ml_dtypes.float8_e5m2, 15, 57344.0),
    "e2m3": (ml_dtypes.float6_e2m3fn, 2, 7.5),
    "e3m2": (ml_dtypes.float6_e3m2fn, 4, 28.0),
    "e2m1": (ml_dtypes.float4_e2m1fn, 2, 6.0),
}


def element(ratios, name):
    """Round to the nearest number of a narrow float, ties to even, and clip to the largest."""
    dtype, _, largest = ELEMENTS[name]
    return np.clip(ratios, -largest, largest).astype(dtype).astype(np.float64)


def mx(values, name, block):
    """OCP MX v1.0, section 6.3: the scale and the restored values of rows cut into blocks."""
    _, top, _ = ELEMENTS[name]
    blocks = np.asarray(values, np.float64).reshape(-1, block)
    largest = np.abs(blocks).max(1, keepdims=True)
    power = np.where(largest > 0, np.floor(np.log2(np.where(largest > 0, largest, 1))) - top, 0)
    scale = 2.0**power
    return scale, (scale * element(blocks / scale, name)).reshape(np.shape(values))


def nvfp4(values, block):
    """NVFP4: the scales of the blocks, that of the tensor and the restored values."""
    blocks = np.asarray(values, np.float64).reshape(-1, block)
    whole = np.abs(blocks).max() / (6 * 448)
    scale = element(np.abs(blocks).max(1, keepdims=True) / 6 / whole, "e4m3")
    restored = whole * scale * element(blocks / (whole * scale), "e2m1")
    return scale, whole, restored.reshape(np.shape(values))


def numbers_of(dtype):
    """Return every finite number of a narrow dtype of ml_dtypes, sorted."""
    width = {"float4_e2m1fn": 4, "float6_e2m3fn": 6, "float6_e3m2fn": 6}.get(
        np.dtype(dtype).name, 8
    )
    numbers = np.arange(2**width, dtype=np.uint8).view(dtype).astype(np.float64)
    return np.unique(numbers[np.isfinite(numbers)])
