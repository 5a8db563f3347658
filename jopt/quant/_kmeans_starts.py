"""Where Lloyd's iteration can start: the three codebooks of Deep Compression."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from jopt.quant._kmeans_bins import is_sound, summarize


def check_values(values: Array, count: int) -> None:
    """Raise unless `count` entries can be fitted to `values`."""
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}.")
    if not jnp.issubdtype(jnp.result_type(values), jnp.floating):
        raise TypeError(f"values must be floating-point, got {jnp.result_type(values)}.")
    if not 1 <= jnp.size(values) < 2**31:
        raise ValueError(f"values must number 1 to 2**31 - 1, got {jnp.size(values)}.")


@partial(jax.jit, static_argnums=1)
def linear_codebook(values: Array, count: int) -> Array:
    """Spread `count` entries evenly from the smallest to the largest value.

    `c_j = min + (max - min) j / (count - 1)`; a single entry is the middle. Deep Compression found
    this start the best of its three, because it gives the few large weights entries of their own.

    Args:
      values: as for `optimal_codebook`.
      count: the number of entries, 1 or more; static.

    Returns:
      (count,) float32 in rising order.

    Raises:
      TypeError: `values` is not floating-point.
      ValueError: `count` is below 1, or `values` is empty or too long.

    Example:
      >>> linear_codebook(jnp.array([-1.0, 0.0, 3.0]), 3)
      Array([-1.,  1.,  3.], dtype=float32)

    References:
      Han, Mao, and Dally, "Deep Compression", 2016, https://arxiv.org/abs/1510.00149, section 3.2.
    """
    check_values(values, count)
    flat = lax.stop_gradient(values).astype(jnp.float32).reshape(-1)
    low, high = jnp.min(flat), jnp.max(flat)
    if count == 1:
        return (low / 2 + high / 2)[None]
    part = jnp.arange(count, dtype=jnp.float32) / (count - 1)
    return low * (1 - part) + high * part


@partial(jax.jit, static_argnums=1)
def density_codebook(values: Array, count: int) -> Array:
    """Place `count` entries at equal steps of the distribution of the values.

    `F(c_j) = (j + 1/2) / count` with the distribution function F. Each entry is the mean of the bin
    in which that point lies: for up to 4096 elements it is an element; for more, it is within one
    part in some hundred of the width of an optimal cell.

    Args:
      values: as for `optimal_codebook`.
      count: the number of entries, 1 or more; static.

    Returns:
      (count,) float32 in rising order; all NaN if an element is not finite.

    Raises:
      TypeError: `values` is not floating-point.
      ValueError: `count` is below 1, or `values` is empty or too long.

    Example:
      >>> density_codebook(jnp.array([5.0, 1.0, 2.0, 100.0]), 2)
      Array([1., 5.], dtype=float32)

    References:
      Han, Mao, and Dally, "Deep Compression", 2016, https://arxiv.org/abs/1510.00149, section 3.2.
      The halves are jopt's: the ends of F are no useful entries.
    """
    check_values(values, count)
    flat = lax.stop_gradient(values).astype(jnp.float32).reshape(-1)
    bins = summarize(flat, None, count)
    below = jnp.cumsum(bins.mass)
    wanted = (jnp.arange(count, dtype=jnp.float32) + 0.5) / count * below[-1]
    place = jnp.minimum(jnp.searchsorted(below, wanted), bins.used - 1)
    return jnp.where(is_sound(bins), bins.mean[place], jnp.nan)


@partial(jax.jit, static_argnums=2)
def random_codebook(key: Array, values: Array, count: int) -> Array:
    """Take `count` elements at random (the Forgy start).

    The array, read in flat order, is cut into `count` equal runs and one element is drawn from
    each, so that no element is taken twice unless there are fewer than `count`.

    Args:
      key: a random key.
      values: as for `optimal_codebook`.
      count: the number of entries, 1 or more; static.

    Returns:
      (count,) float32 in rising order.

    Raises:
      TypeError: `values` is not floating-point.
      ValueError: `count` is below 1, or `values` is empty or too long.

    Example:
      >>> random_codebook(jax.random.key(0), jnp.array([3.0, 1.0]), 2)
      Array([1., 3.], dtype=float32)

    References:
      Han, Mao, and Dally, "Deep Compression", 2016, https://arxiv.org/abs/1510.00149, section 3.2.
      The runs are jopt's: drawing without them needs a permutation of all elements.
    """
    check_values(values, count)
    flat = lax.stop_gradient(values).astype(jnp.float32).reshape(-1)
    ends = jnp.asarray([flat.size * run // count for run in range(count + 1)], jnp.int32)
    last = jnp.minimum(ends[:-1], flat.size - 1)
    place = jax.random.randint(key, (count,), last, jnp.maximum(ends[1:], last + 1))
    return jnp.sort(flat[place])
