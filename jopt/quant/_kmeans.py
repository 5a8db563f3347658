"""One-dimensional k-means: the codebook of the least squared error, and what goes with it.

`optimal_codebook` is as good as exact, and reads the values twice however many entries there are:
see `_kmeans_bins` and `_kmeans_program`. `lloyd` is Lloyd's iteration, from any of the three
starts of Deep Compression.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from jopt.quant._kmeans_bins import Bins, is_short, is_sound, summarize
from jopt.quant._kmeans_program import optimal_means
from jopt.quant._kmeans_starts import (
    check_values,
    density_codebook,
    linear_codebook,
    random_codebook,
)
from jopt.quant._nearest import nearest_codes

__all__ = [
    "density_codebook",
    "linear_codebook",
    "lloyd",
    "nearest_codes",
    "optimal_codebook",
    "optimal_codebook_with_zero",
    "random_codebook",
    "tied_gradient",
]


def optimal_codebook(values: Array, count: int, weights: Array | None = None) -> Array:
    """Find the `count` numbers that represent all elements with the least squared error.

    Minimizes `sum_i w_i min_j (x_i - c_j)^2`, to 0.01 % of the least possible sum (measured, not
    proven). If there are no more different values than `count`, each gets an entry that equals it
    exactly, and the last entries are repetitions.

    Args:
      values: floating-point, any shape, 1 to 2^31 - 1 elements; they are taken as float32.
      count: the number of entries, 1 or more; static.
      weights: how much each element counts, at least 0, of the shape of `values`; added up in
        float32. Elements of weight 0 are left out. None is one for each.

    Returns:
      (count,) float32 in rising order; all NaN if an element or a weight is not finite, or no
      weight is above zero. No gradient flows: for training see `tied_gradient`.

    Raises:
      TypeError: `values` or `weights` is not floating-point.
      ValueError: `count` is below 1, `values` is empty or too long, or the shapes differ.

    Example:
      >>> optimal_codebook(jnp.array([1.0, 2.0, 9.0, 11.0]), 2)
      Array([ 1.5, 10. ], dtype=float32)

    References:
      Han, Mao, and Dally, "Deep Compression", 2016, https://arxiv.org/abs/1510.00149, equation 2,
      which Lloyd's iteration solves there. Wang and Song, "Ckmeans.1d.dp", 2011,
      https://doi.org/10.32614/RJ-2011-015, for the dynamic program.
    """
    check_values(values, count)
    if weights is not None:
        _check_weights(values, weights)
    values, weights = lax.stop_gradient((values, weights))
    return _fit(values, weights, count, jnp.array(False))


def optimal_codebook_with_zero(values: Array, count: int) -> Array:
    """Find an optimal codebook that keeps exact zeros, if there are any.

    If an element is exactly zero (a pruned weight), one entry is 0.0 and the other `count - 1` are
    those of `optimal_codebook` for the elements that are not zero; if not, all `count` are. The
    choice is made by the data, also under `jit`. A small element may be nearer to 0.0 than to its
    centroid, and `nearest_codes` then gives it 0.0.

    Args:
      values: as for `optimal_codebook`.
      count: the number of entries, 2 or more; static.

    Returns:
      (count,) float32 in rising order, without -0.0; zeros only if all elements are zero, and NaN
      if one is not finite.

    Raises:
      TypeError: `values` is not floating-point.
      ValueError: `count` is below 2, or `values` is empty or too long.

    Example:
      >>> optimal_codebook_with_zero(jnp.array([0.0, 4.0, 0.0, 5.0, 9.0]), 2)
      Array([0., 6.], dtype=float32)

    References:
      Han, Mao, and Dally, "Deep Compression", 2016, https://arxiv.org/abs/1510.00149, section 3:
      there, too, pruned weights take no part in the clustering.
    """
    if count < 2:
        raise ValueError(f"count must be at least 2, one of them for zero, got {count}.")
    check_values(values, count)
    values = lax.stop_gradient(values)
    nonzero, zero = _zeros(values)
    return _fit(values, nonzero, count, zero)


@partial(jax.jit, static_argnums=2)
def lloyd(values: Array, codebook: Array, steps: int) -> Array:
    """Improve a codebook by `steps` of Lloyd's iteration.

    `c_j = mean of the x_i that are nearest to c_j`; an entry that is nearest to none stays. Each
    step lowers the squared error or leaves it. It ends in a local minimum: after twenty steps from
    `linear_codebook` the error of normal weights is half as much again as that of
    `optimal_codebook` with 16 entries.

    Args:
      values: floating-point, any shape, 1 to 2^31 - 1 elements; they are taken as float32.
      codebook: (count,), rising: where to start.
      steps: how many steps, 0 or more; static.

    Returns:
      (count,) float32 in rising order.

    Raises:
      TypeError: `values` or `codebook` is not floating-point.
      ValueError: `values` is empty or too long, `codebook` not a vector, or `steps` is negative.

    Example:
      >>> lloyd(jnp.array([1.0, 2.0, 9.0, 11.0]), jnp.array([0.0, 4.0]), 1)
      Array([ 1.5, 10. ], dtype=float32)

    References:
      Lloyd, "Least squares quantization in PCM", 1982, https://doi.org/10.1109/TIT.1982.1056489.
    """
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}.")
    check_values(values, 1)
    flat = lax.stop_gradient(values).astype(jnp.float32).reshape(-1)

    def step(_: Array, codebook: Array) -> Array:
        codes = nearest_codes(flat, codebook)
        number = jnp.zeros(codebook.size, jnp.int32).at[codes].add(1)
        # The mean of the differences: sums of the values themselves would be rounded more.
        shift = jnp.zeros(codebook.size, jnp.float32).at[codes].add(flat - codebook[codes])
        return jnp.sort(codebook + shift / jnp.maximum(number, 1).astype(jnp.float32))

    return lax.fori_loop(0, steps, step, lax.stop_gradient(codebook.astype(jnp.float32)))


@partial(jax.jit, static_argnums=2)
def tied_gradient(gradient: Array, codes: Array, count: int) -> Array:
    """Add up the gradients of all weights that share an entry.

    `dL/dc_j = sum_i dL/dw_i [code_i = j]`, zero for an entry that no weight has: the gradient of a
    loss with respect to a codebook whose codes stay.

    Args:
      gradient: of the loss with respect to the weights, floating-point.
      codes: integers in 0 .. count - 1, of the shape of `gradient`.
      count: the number of entries; static.

    Returns:
      (count,) float32.

    Raises:
      TypeError: `gradient` is not floating-point, or `codes` are not integers.
      ValueError: the shapes differ, or `count` is below 1.

    Example:
      >>> tied_gradient(jnp.array([1.0, 2.0, 4.0]), jnp.array([0, 1, 0], jnp.uint8), 2)
      Array([5., 2.], dtype=float32)

    References:
      Han, Mao, and Dally, "Deep Compression", 2016, https://arxiv.org/abs/1510.00149, equation 3.
    """
    if not jnp.issubdtype(jnp.result_type(gradient), jnp.floating):
        raise TypeError(f"gradient must be floating-point, got {jnp.result_type(gradient)}.")
    if not jnp.issubdtype(jnp.result_type(codes), jnp.integer):
        raise TypeError(f"codes must be integers, got {jnp.result_type(codes)}.")
    if jnp.shape(gradient) != jnp.shape(codes):
        raise ValueError(f"codes of shape {codes.shape} do not match gradient {gradient.shape}.")
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}.")
    flat = gradient.reshape(-1).astype(jnp.float32)
    return jnp.zeros(count, jnp.float32).at[codes.reshape(-1).astype(jnp.int32)].add(flat)


def _check_weights(values: Array, weights: Array) -> None:
    if not jnp.issubdtype(jnp.result_type(weights), jnp.floating):
        raise TypeError(f"weights must be floating-point, got {jnp.result_type(weights)}.")
    if jnp.shape(weights) != jnp.shape(values):
        raise ValueError(
            f"weights of shape {jnp.shape(weights)} do not match values {jnp.shape(values)}."
        )


def _fit(values: Array, weights: Array | None, count: int, zero: Array) -> Array:
    """Fit `count` entries, one of them 0.0 if `zero`.

    The steps are compiled one by one: the longest depends on `count` alone, and not on the shape.
    """
    bins = summarize(values, weights, count)
    codebook = optimal_means(bins, count, zero)
    if not is_short(values):
        codebook = _separate(values, weights, bins, codebook, zero)
    return _finish(bins, codebook, zero)


@jax.jit
def _zeros(values: Array) -> tuple[Array, Array]:
    """Return a weight of zero for each zero, else one, and whether there is a zero."""
    return (values != 0).astype(jnp.float32), jnp.any(values == 0)


@jax.jit
def _finish(bins: Bins, codebook: Array, zero: Array) -> Array:
    """Put a zero in the place of the last entry, a repetition, if asked to; answer for bad data."""
    with_zero = codebook.at[-1].set(0.0)
    # If no bin is used, there is nothing but zeros, or nothing at all.
    with_zero = jnp.sort(jnp.where((with_zero == 0) | (bins.used == 0), 0.0, with_zero))
    sound = is_sound(bins) & (zero | (bins.used > 0))
    return jnp.where(sound, jnp.where(zero, with_zero, codebook), jnp.nan)


@jax.jit
def _separate(
    values: Array, weights: Array | None, bins: Bins, codebook: Array, zero: Array
) -> Array:
    """Give entries that are left over to different values that share a bin.

    There are such entries only if there are no more bins than entries, hence few different values;
    the loop does nothing otherwise. Each pass splits the widest clusters in two. If `zero`, the
    last entry is to be left a repetition.
    """
    size = codebook.size
    count = size - zero.astype(jnp.int32)
    values = jnp.asarray(values, jnp.float32).reshape(-1)
    used = jnp.ones(values.shape, bool) if weights is None else weights.reshape(-1) > 0

    def split(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        codebook, _, tries = state
        codes = nearest_codes(values, codebook)
        none = jnp.full(size, jnp.inf, jnp.float32)
        low = none.at[codes].min(jnp.where(used, values, jnp.inf))
        high = (-none).at[codes].max(jnp.where(used, values, -jnp.inf))
        width = jnp.where(low < high, high - low, 0.0)
        rank = jnp.argsort(jnp.argsort(-width)).astype(jnp.int32)
        parted = (width > 0) & (rank < count - jnp.sum(low <= high, dtype=jnp.int32))
        # An entry with one value becomes that value; the widest become their two ends.
        entries = jnp.where((width > 0) & ~parted, codebook, low)
        entries = jnp.sort(jnp.append(entries, jnp.where(parted, high, jnp.inf)))[:size]
        largest = jnp.max(jnp.where(entries < jnp.inf, entries, -jnp.inf))
        return jnp.minimum(entries, largest), jnp.any(parted), tries + 1

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        return state[1] & (state[2] <= size)

    few = (bins.used > 0) & (bins.used <= count) & is_sound(bins)
    return lax.while_loop(unfinished, split, (codebook, few, jnp.int32(0)))[0]
