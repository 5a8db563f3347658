"""One-dimensional k-means: the codebook of the least squared error, and what goes with it.

`optimal_codebook` is as good as exact, and reads the values twice however many entries there are:
see `_kmeans_bins` and `_kmeans_program`. `kmeans` is Lloyd's iteration, from any of the three
starts of Deep Compression.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from jopt.quant._kmeans_bins import Bins, is_short, summarize
from jopt.quant._kmeans_program import optimal_means
from jopt.quant._nearest import nearest_codes


@partial(jax.jit, static_argnums=1)
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
    flat, weights = _prepare(values, count, weights)
    bins = summarize(flat, weights, count)
    codebook = _separate(flat, weights, bins, optimal_means(bins, count), jnp.int32(count))
    return jnp.where(_is_sound(bins) & (bins.used > 0), codebook, jnp.nan)


@partial(jax.jit, static_argnums=1)
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
      >>> optimal_codebook_with_zero(jnp.array([0.0, -3.0, 0.0, 5.0, 7.0]), 3)
      Array([-3.,  0.,  6.], dtype=float32)

    References:
      Han, Mao, and Dally, "Deep Compression", 2016, https://arxiv.org/abs/1510.00149, section 3:
      there, too, pruned weights take no part in the clustering.
    """
    if count < 2:
        raise ValueError(f"count must be at least 2, one of them for zero, got {count}.")
    flat, _ = _prepare(values, count, None)
    nonzero = (flat != 0).astype(jnp.float32)
    bins = summarize(flat, nonzero, count)

    zero = jnp.any(flat == 0)
    codebook = optimal_means(bins, count, zero)
    codebook = _separate(flat, nonzero, bins, codebook, count - zero.astype(jnp.int32))
    # With one entry less the last is a repetition. If all elements are zero, there is none.
    codebook = codebook.at[-1].set(jnp.where(zero, 0.0, codebook[-1]))
    codebook = jnp.sort(jnp.where((codebook == 0) | (bins.used == 0), 0.0, codebook))
    return jnp.where(_is_sound(bins), codebook, jnp.nan)


@partial(jax.jit, static_argnums=2)
def kmeans(values: Array, codebook: Array, steps: int) -> Array:
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
      >>> kmeans(jnp.array([1.0, 2.0, 9.0, 11.0]), jnp.array([0.0, 4.0]), 1)
      Array([ 1.5, 10. ], dtype=float32)

    References:
      Lloyd, "Least squares quantization in PCM", 1982, https://doi.org/10.1109/TIT.1982.1056489.
    """
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}.")
    flat, _ = _prepare(values, 1, None)

    def step(_: Array, codebook: Array) -> Array:
        codes = nearest_codes(flat, codebook)
        number = jnp.zeros(codebook.size, jnp.int32).at[codes].add(1)
        # The mean of the differences: sums of the values themselves would be rounded more.
        shift = jnp.zeros(codebook.size, jnp.float32).at[codes].add(flat - codebook[codes])
        return jnp.sort(codebook + shift / jnp.maximum(number, 1).astype(jnp.float32))

    return lax.fori_loop(0, steps, step, lax.stop_gradient(codebook.astype(jnp.float32)))


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
    flat, _ = _prepare(values, count, None)
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
    flat, _ = _prepare(values, count, None)
    bins = summarize(flat, None, count)
    below = jnp.cumsum(bins.mass)
    wanted = (jnp.arange(count, dtype=jnp.float32) + 0.5) / count * below[-1]
    place = jnp.minimum(jnp.searchsorted(below, wanted), bins.used - 1)
    return jnp.where(_is_sound(bins), bins.mean[place], jnp.nan)


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
    flat, _ = _prepare(values, count, None)
    ends = jnp.asarray([flat.size * run // count for run in range(count + 1)], jnp.int32)
    last = jnp.minimum(ends[:-1], flat.size - 1)
    place = jax.random.randint(key, (count,), last, jnp.maximum(ends[1:], last + 1))
    return jnp.sort(flat[place])


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


def _prepare(values: Array, count: int, weights: Array | None) -> tuple[Array, Array | None]:
    """Check the arguments; return flat float32 values and weights."""
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}.")
    for name, array in (("values", values), ("weights", weights)):
        if array is not None and not jnp.issubdtype(jnp.result_type(array), jnp.floating):
            raise TypeError(f"{name} must be floating-point, got {jnp.result_type(array)}.")
    if not 1 <= jnp.size(values) < 2**31:
        raise ValueError(f"values must number 1 to 2**31 - 1, got {jnp.size(values)}.")
    if weights is not None and jnp.shape(weights) != jnp.shape(values):
        raise ValueError(
            f"weights of shape {jnp.shape(weights)} do not match values {jnp.shape(values)}."
        )
    flat = lax.stop_gradient(jnp.asarray(values, jnp.float32).reshape(-1))
    if weights is None:
        return flat, None
    return flat, lax.stop_gradient(jnp.asarray(weights, jnp.float32).reshape(-1))


def _is_sound(bins: Bins) -> Array:
    filled = jnp.arange(bins.mass.size) < bins.used
    return jnp.all(~filled | (jnp.isfinite(bins.mean) & jnp.isfinite(bins.mass)))


def _separate(
    values: Array, weights: Array | None, bins: Bins, codebook: Array, count: Array
) -> Array:
    """Give entries that are left over to different values that share a bin.

    There are such entries only if there are no more bins than entries, hence few different values;
    the loop does nothing otherwise. Each pass splits the widest clusters in two. Of the entries,
    `count` are to be different, the last is repeated.
    """
    if is_short(values):
        return codebook
    size = codebook.size
    used = jnp.ones(values.shape, bool) if weights is None else weights > 0

    def split(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        codebook, _, tries = state
        codes = nearest_codes(values, codebook)
        none = jnp.full(size, jnp.inf, jnp.float32)
        low = none.at[codes].min(jnp.where(used, values, jnp.inf))
        high = (-none).at[codes].max(jnp.where(used, values, -jnp.inf))
        width = jnp.where(low < high, high - low, 0.0)
        rank = jnp.argsort(jnp.argsort(-width)).astype(jnp.int32)
        parted = (width > 0) & (rank < count - jnp.sum(low <= high))
        # An entry with one value becomes that value; the widest become their two ends.
        entries = jnp.where((width > 0) & ~parted, codebook, low)
        entries = jnp.sort(jnp.append(entries, jnp.where(parted, high, jnp.inf)))[:size]
        largest = jnp.max(jnp.where(entries < jnp.inf, entries, -jnp.inf))
        return jnp.minimum(entries, largest), jnp.any(parted), tries + 1

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        return state[1] & (state[2] <= size)

    few = (bins.used > 0) & (bins.used <= count) & _is_sound(bins)
    return lax.while_loop(unfinished, split, (codebook, few, jnp.int32(0)))[0]
