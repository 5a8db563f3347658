"""Logarithmic grids: levels at powers of a base, and at sums of powers of two."""

import functools
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jopt._leaves import CodebookTensor
from jopt.quant._grids import Grid
from jopt.quant._tables import (
    around,
    count_reached,
    encode_sign,
    normalise,
    scale_to,
    shared_table,
    sign_neighbours,
    with_codes,
)

Bounds = Callable[[np.ndarray, float], np.ndarray]


def log_domain(magnitudes: np.ndarray, base: float) -> np.ndarray:
    """Round the exponent: take the level `base^-i` with `i = round(-log_base |x|)`.

    The bound below `base^-i` is `base^-(i + 1/2)`. The last level has the same bound, so that
    what would round to a smaller power becomes zero.

    Args:
      magnitudes: the levels above zero, falling.
      base: the ratio of one level to the next.

    Returns:
      The bound below each level: a value above it takes this level or a larger one.

    Example:
      >>> import numpy as np
      >>> log_domain(np.array([1.0, 0.5]), 2.0).round(3)
      array([0.707, 0.354])
    """
    return magnitudes / math.sqrt(base)


def arithmetic_mean(magnitudes: np.ndarray, base: float) -> np.ndarray:
    """Take the nearest level: the bound is the mean of a level and the next smaller one, or zero.

    Args:
      magnitudes: the levels above zero, falling.
      base: not used.

    Returns:
      The bound below each level: a value above it takes this level or a larger one.

    Example:
      >>> import numpy as np
      >>> arithmetic_mean(np.array([1.0, 0.5]), 2.0)
      array([0.75, 0.25])
    """
    del base
    return (magnitudes + np.append(magnitudes[1:], 0.0)) / 2


def _two_sided(
    magnitudes: Callable[[int], np.ndarray], bounds: Callable[[np.ndarray], np.ndarray]
) -> Grid:
    """Make a grid of zero and of levels on both sides of it, from their falling magnitudes."""

    def fit(values: jax.Array, low: jax.Array, high: jax.Array, bits: int) -> CodebookTensor:
        del values
        above = magnitudes(bits)
        table = np.concatenate([-above, [0.0], above[::-1]])
        return shared_table(table, scale_to(low, high, 1.0))

    def encode(values: jax.Array, levels: CodebookTensor, bits: int) -> CodebookTensor:
        if bits == 1:
            return encode_sign(values, levels)
        above = bounds(magnitudes(bits))
        both = jnp.asarray(np.concatenate([-above, above[::-1]]), values.dtype)
        both = both.reshape((1,) * values.ndim + (-1,))
        return with_codes(levels, count_reached(normalise(values, levels), both, jnp.greater))

    def neighbours(
        values: jax.Array, levels: CodebookTensor, bits: int
    ) -> tuple[CodebookTensor, CodebookTensor]:
        if bits == 1:
            return sign_neighbours(values, levels)
        return around(values, encode(values, levels, bits))

    return Grid(fit, encode, neighbours)


@functools.lru_cache
def logarithmic(base: float = 2.0, rounding: Bounds = log_domain) -> Grid:
    """Make a grid of zero and of powers of a base on both sides of it.

    The levels are 0 and `+-scale * base^-i` for `i = 0, ..., n - 1`, with `n = 2^(bits-1) - 1` and
    `scale = max(|low|, |high|)` (1 for a block of zeros): fine near zero and coarse at the ends.
    Values exactly on a bound take the lower level. At one bit the levels are -scale and scale, and
    only an exact zero keeps a code of its own. Powers that would fall out of the normal numbers of
    float32 (n over `126 / log2(base)`) are left out.

    Args:
      base: above 1, at most 2^32.
      rounding: `log_domain` (round the exponent, as LogNet does) or `arithmetic_mean` (the nearest
        level, with the smaller squared error), or another function from the magnitudes of the
        levels to the bounds below them.

    Returns:
      A grid that makes `CodebookTensor` leaves of `2n + 1` entries. Equal arguments give the
      identical grid.

    Raises:
      ValueError: base is out of range.
      TypeError: rounding is not a function.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import quant
      >>> values = jnp.array([-8.0, 5.7, 2.9, 1.0, 0.0])
      >>> quant.fake_quantize(values, quant.QuantSpec(3, (), grid=quant.logarithmic()))
      Array([-8.,  8.,  4.,  0.,  0.], dtype=float32)
      >>> nearest = quant.logarithmic(2.0, quant.arithmetic_mean)
      >>> quant.fake_quantize(values, quant.QuantSpec(3, (), grid=nearest))
      Array([-8.,  4.,  2.,  0.,  0.], dtype=float32)

    References:
      Miyashita, Lee, Murmann, "Convolutional Neural Networks using Logarithmic Data
      Representation", 2016, https://arxiv.org/abs/1603.01025, the function LogQuant. There small
      values take the last power; here they become zero when they would round to a smaller one.
    """
    if isinstance(base, bool) or not isinstance(base, int | float) or not 1 < base <= 2**32:
        raise ValueError(f"base must be above 1 and at most 2^32, not {base!r}.")
    if not callable(rounding):
        raise TypeError(f"rounding must be a function, not {rounding!r}.")

    def magnitudes(bits: int) -> np.ndarray:
        count = min(max(2 ** (bits - 1) - 1, 1), int(126 / math.log2(base)))
        return np.float64(base) ** -np.arange(count)

    return _two_sided(magnitudes, lambda above: rounding(above, base))


def additive_power_levels(bits: int) -> tuple[float, ...]:
    """Return zero and the levels above it of additive powers of two, from 0 to 1.

    With `b = bits - 1` bits beside the sign, `n = b // 2` terms are added: term i is 0, `2^-i`,
    `2^-(i+n)` or `2^-(i+2n)`, for `i = 0, ..., n - 1`. For odd b one term more is 0 or `2^-2n`, and
    the last power of the others is halved to make room. All are divided by the largest sum.

    Args:
      bits: 1 to 8, the sign included.

    Returns:
      `2^(bits-1)` rising floats (two for one bit).

    Example:
      >>> [round(15 * level, 3) for level in additive_power_levels(4)]
      [0.0, 1.5, 3.0, 4.5, 6.0, 9.0, 12.0, 15.0]

    References:
      Li, Dong, Wang, "Additive Powers-of-Two Quantization: An Efficient Non-uniform Discretization
      for Neural Networks", 2020, https://arxiv.org/abs/1909.13144, equation 4 with k = 2 and
      equation 5. Bits beyond those of the paper follow the same rule.
    """
    count, odd = divmod(max(bits - 1, 1), 2)
    terms: list[tuple[float, ...]] = [
        (0.0, 2.0**-i, 2.0 ** -(i + count), 2.0 ** -(i + 2 * count + odd)) for i in range(count)
    ]
    if odd:
        terms.append((0.0, 2.0 ** -(2 * count)))
    sums = sorted({sum(choice) for choice in itertools.product(*terms)})
    return tuple(level / sums[-1] for level in sums)


def _additive_magnitudes(bits: int) -> np.ndarray:
    return np.asarray(additive_power_levels(bits)[:0:-1])


additive_powers_of_two = _two_sided(
    _additive_magnitudes, functools.partial(arithmetic_mean, base=2.0)
)
"""Put the levels at sums of a few powers of two, so that a product is a few shifts.

The levels are `+-scale * level` for the levels of `additive_power_levels`, `2^bits - 1` with zero;
`scale = max(|low|, |high|)`, 1 for a block of zeros. A value takes the nearest level, the lower
one if it lies exactly between two. At one bit the levels are -scale and scale, and only an exact
zero keeps a code of its own. The clipping threshold that the paper trains is the range here. Li,
Dong, Wang, "Additive Powers-of-Two Quantization", 2020, https://arxiv.org/abs/1909.13144.
"""
