"""The nearest entry of a sorted codebook for each of many values, exactly and without a search."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from jopt.quant._kmeans_bins import cumulate, order_key

_COMPARED = 32  # up to as many entries, comparing with every boundary is quickest
_CELLS = 1 << 16


@jax.jit
def nearest_codes(values: Array, codebook: Array) -> Array:
    """Return for each value the index of the nearest entry of a sorted codebook.

    `code = the number of midpoints (c_i + c_(i+1)) / 2 that lie below x`, as if the midpoints were
    exact: a value halfway between two entries gets the lower one, and so does a value that meets an
    entry which is there twice. NaN gets the code 0; so does everything where the codebook is NaN.

    Args:
      values: floating-point array of any shape, compared as float32.
      codebook: (count,), rising, 1 or more entries, used as float32.

    Returns:
      Codes of the shape of `values`: uint8 for up to 256 entries, uint16 for up to 65536, else
      int32. No gradient flows.

    Raises:
      TypeError: `values` or `codebook` is not floating-point.
      ValueError: `codebook` is not a vector of at least one entry.

    Example:
      >>> nearest_codes(jnp.array([-3.0, 0.5, 0.6, 9.0]), jnp.array([-1.0, 0.0, 1.0]))
      Array([0, 1, 2, 2], dtype=uint8)
    """
    for name, array in (("values", values), ("codebook", codebook)):
        if not jnp.issubdtype(jnp.result_type(array), jnp.floating):
            raise TypeError(f"{name} must be floating-point, got {jnp.result_type(array)}.")
    if jnp.ndim(codebook) != 1 or jnp.size(codebook) == 0:
        raise ValueError(f"codebook must be a vector of entries, got shape {jnp.shape(codebook)}.")
    count = jnp.size(codebook)
    dtype = jnp.uint8 if count <= 256 else jnp.uint16 if count <= 65536 else jnp.int32
    values = lax.stop_gradient(jnp.asarray(values, jnp.float32))
    bounds = _midpoints(lax.stop_gradient(jnp.asarray(codebook, jnp.float32)))
    find = _compare_all if count <= _COMPARED else _look_up
    return find(values, bounds, dtype)


def _midpoints(codebook: Array) -> Array:
    """Return the largest floats that are not above the midpoints of neighbours."""
    lower, upper = codebook[:-1] / 2, codebook[1:] / 2
    middle = lower + upper
    back = middle - lower
    error = (lower - (middle - back)) + (upper - back)
    return jnp.where(error < 0, jnp.nextafter(middle, jnp.float32(-jnp.inf)), middle)


def _compare_all(values: Array, bounds: Array, dtype: jnp.dtype) -> Array:
    codes = jnp.zeros(values.shape, dtype)
    for index in range(bounds.size):
        codes = codes + (values > bounds[index]).astype(dtype)
    return codes


def _look_up(values: Array, bounds: Array, dtype: jnp.dtype) -> Array:
    """Start at the number of bounds below the cell of a value, then search within the cell.

    A cell is half of a float's bits (128 cells a power of two), and mostly holds one bound or none.
    """
    keys = order_key(jnp.where(jnp.isnan(values), -jnp.inf, values))
    cell_of_bounds = (order_key(bounds) >> 16) + _CELLS // 2
    inside = jnp.zeros(_CELLS, jnp.int32).at[cell_of_bounds].add(1)
    below = cumulate(inside) - inside
    steps = 32 - lax.clz(jnp.max(inside))
    # Beyond the last bound there is none that a value could exceed.
    padded = jnp.pad(bounds, (0, 2 * bounds.size + 1), constant_values=jnp.nan)

    def search(step: Array, codes: Array) -> Array:
        stride = jnp.int32(1) << (steps - 1 - step)
        bound = padded.at[codes + (stride - 1)].get(mode="promise_in_bounds")
        return jnp.where(values > bound, codes + stride, codes)

    start = below.at[(keys >> 16) + _CELLS // 2].get(mode="promise_in_bounds")
    return lax.fori_loop(0, steps, search, start).astype(dtype)
