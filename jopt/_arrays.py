"""What is done with compressed leaves whatever made them: restore the arrays, count the bytes."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jopt._leaves import (
    BitTensor,
    CodebookTensor,
    FloatTensor,
    Prepared,
    QTensor,
    RotatedTensor,
    ScaledTensor,
    is_compressed,
)


def expand_blocks(values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Repeat one value per block until every element of `shape` has its own.

    Args:
      values: one value per block; `values.shape[i]` divides `shape[i]`.
      shape: the shape to reach, with as many axes as `values`.

    Returns:
      An array of `shape` and of the dtype of `values`.

    Raises:
      ValueError: the ranks differ, or a number of blocks does not divide its axis.

    Example:
      >>> import jax.numpy as jnp
      >>> expand_blocks(jnp.array([[1], [2]]), (4, 2))
      Array([[1, 1],
             [1, 1],
             [2, 2],
             [2, 2]], dtype=int32)
    """
    counts = values.shape
    if len(counts) != len(shape) or any(
        size % count if count else size for count, size in zip(counts, shape, strict=True)
    ):
        raise ValueError(f"blocks {counts} do not divide shape {shape} axis by axis.")
    if all(count in (1, size) for count, size in zip(counts, shape, strict=True)):
        return jnp.broadcast_to(values, shape)
    split = tuple(
        n for count, size in zip(counts, shape, strict=True) for n in (count, size // max(count, 1))
    )
    spread = values.reshape(tuple(n for count in counts for n in (count, 1)))
    return jnp.broadcast_to(spread, split).reshape(shape)


def _tensor(leaf: QTensor) -> jax.Array:
    centred = leaf.codes.astype(leaf.scale.dtype)
    if leaf.zero_point is not None:
        zero_point = leaf.zero_point.astype(leaf.scale.dtype)
        centred = centred - expand_blocks(zero_point, leaf.codes.shape)
    return expand_blocks(leaf.scale, leaf.codes.shape) * centred


def _looked_up(leaf: CodebookTensor) -> jax.Array:
    *counts, entries = leaf.codebook.shape
    sizes = [size // count for size, count in zip(leaf.codes.shape, counts, strict=True)]
    axes = range(len(counts))
    split = leaf.codes.reshape([n for pair in zip(counts, sizes, strict=True) for n in pair])
    order = [2 * axis for axis in axes] + [2 * axis + 1 for axis in axes]
    rows = split.transpose(order).reshape(math.prod(counts), -1).astype(jnp.int32)
    table = leaf.codebook.reshape(-1, entries)
    values = jax.vmap(lambda line, at: line.at[at].get(mode="clip"))(table, rows)
    back = [n for axis in axes for n in (axis, axis + len(counts))]
    values = values.reshape(*counts, *sizes).transpose(back).reshape(leaf.codes.shape)
    return values if leaf.scale is None else values * expand_blocks(leaf.scale, values.shape)


def _narrow_floats(leaf: FloatTensor) -> jax.Array:
    # In float32: a product of two scales may be too small for a narrow dtype where neither is.
    exact = working_dtype(leaf.dtype)
    scale = leaf.scale.astype(exact)
    if leaf.global_scale is not None:
        scale = leaf.global_scale.astype(exact) * scale
    values = expand_blocks(scale, leaf.codes.shape) * leaf.codes.astype(exact)
    return values.astype(leaf.dtype)


def _signs(leaf: BitTensor) -> jax.Array:
    *stacked, length, columns = leaf.bits.shape
    rows = math.prod(leaf.shape[len(stacked) : -1])
    places = jnp.arange(8, dtype=jnp.uint8).reshape((1,) * len(stacked) + (1, 8, 1))
    bits = (leaf.bits[..., None, :] >> places) & jnp.uint8(1)
    bits = bits.reshape(*stacked, 8 * length, columns)[..., :rows, :].reshape(leaf.shape)
    return expand_blocks(leaf.scale, leaf.shape) * (2 * bits.astype(leaf.dtype) - 1)


def _scaled(leaf: ScaledTensor) -> jax.Array:
    return leaf.factor.astype(leaf.dtype) * materialize(leaf.tensor)


def _rotated(leaf: RotatedTensor) -> jax.Array:
    inner, signs = materialize(leaf.tensor), leaf.signs.astype(leaf.dtype)
    return jnp.where(signs == 0, inner, signs * hadamard(inner))


def hadamard(values: jax.Array) -> jax.Array:
    """Multiply the last axis but one by an orthonormal Hadamard matrix.

    `H_1 = (1)`, `H_2m = ((H_m, H_m), (H_m, -H_m)) / sqrt(2)`. A length that is no power of two is
    cut into blocks of the largest power of two that divides it. The matrix is symmetric, so that
    a second call undoes the first.

    Args:
      values: floating-point array of two or more axes.

    Returns:
      An array of the same shape and dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> hadamard(jnp.array([[1.0], [1.0], [3.0], [-1.0]])).ravel()
      Array([ 2.,  2.,  0., -2.], dtype=float32)
    """
    *before, length, columns = values.shape
    block = length & -length
    out = values.reshape(*before, length // block, block, columns) if length else values
    half = 1
    while half < block:
        parts = out.reshape(*before, length // (2 * half), 2, half, columns)
        even, odd = parts[..., 0, :, :], parts[..., 1, :, :]
        out = jnp.stack([even + odd, even - odd], axis=-3)
        half *= 2
    return (out * (1 / math.sqrt(block) if block > 1 else 1.0)).reshape(values.shape)


_RESTORE = {
    QTensor: _tensor,
    CodebookTensor: _looked_up,
    FloatTensor: _narrow_floats,
    BitTensor: _signs,
    ScaledTensor: _scaled,
    RotatedTensor: _rotated,
}


def materialize(tree: Any) -> Any:
    """Replace every compressed leaf by the array that it stands for.

    Call it inside the jitted function and pass the compressed tree as an argument, so that the
    program holds the codes and not the floats. Leaves that are not compressed pass through.

    Args:
      tree: any pytree: a linen dict, an `nnx.State`, a single leaf.

    Returns:
      The same tree with plain arrays only.

    Example:
      >>> import jax.numpy as jnp
      >>> tree = {
      ...     "w": QTensor(jnp.array([1, 2], jnp.int8), jnp.array([2.0])),
      ...     "b": jnp.ones(1),
      ... }
      >>> materialize(tree)
      {'b': Array([1.], dtype=float32), 'w': Array([2., 4.], dtype=float32)}
    """
    return jax.tree.map(_restored, tree, is_leaf=is_compressed)


def _restored(leaf: Any) -> Any:
    if isinstance(leaf, Prepared):
        return leaf.restore()
    return _RESTORE[type(leaf)](leaf) if is_compressed(leaf) else leaf


def working_dtype(dtype: Any) -> Any:
    """Return the dtype to compute in: float32, or `dtype` itself where that is wider.

    Example:
      >>> import jax.numpy as jnp
      >>> working_dtype(jnp.bfloat16)
      dtype('float32')
    """
    return jnp.dtype(dtype if jnp.dtype(dtype).itemsize > 4 else jnp.float32)


def on_host(array: Any) -> bool:
    """Say whether an array's values are known here: neither traced nor on another process's device.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> print(on_host(jnp.ones(2)), jax.jit(lambda x: x + on_host(x))(1))
      True 1
    """
    try:
        return bool(getattr(array, "is_fully_addressable", True))
    except jax.errors.ConcretizationTypeError:
        return False


def known_values(array: Any) -> np.ndarray | None:
    """Return an array's values where they are known, so that they can be checked; else None.

    Example:
      >>> import jax.numpy as jnp
      >>> known_values(jnp.array([1, 2])).tolist()
      [1, 2]
    """
    return np.asarray(array) if on_host(array) else None


def dtype_bits(dtype: Any) -> int:
    """Return how many bits one element of `dtype` takes in a device's memory.

    Example:
      >>> import jax.numpy as jnp
      >>> dtype_bits(jnp.int4), dtype_bits(jnp.bfloat16), dtype_bits(jnp.bool_)
      (4, 16, 8)
    """
    if jnp.issubdtype(dtype, jnp.integer):
        return int(jnp.iinfo(dtype).bits)
    if jnp.dtype(dtype) == jnp.float4_e2m1fn:
        return 4
    return 8 * jnp.dtype(dtype).itemsize


def nbytes(tree: Any) -> int:
    """Count the bytes that the arrays of `tree` take in memory, sub-byte codes packed.

    `Array.nbytes` counts an `int4` as a whole byte; this does not. Masks that multiply dense
    weights save nothing here, and neither does sparsity: for the size of a file see
    `jopt.codec.inspect`.

    Args:
      tree: any pytree of arrays and compressed leaves.

    Returns:
      Bytes; each array is rounded up to a whole byte.

    Example:
      >>> import jax.numpy as jnp
      >>> nbytes({"codes": jnp.zeros((3, 3), jnp.int4), "bias": jnp.zeros(2)})
      13
    """
    return sum(
        -(-jnp.size(leaf) * dtype_bits(jnp.result_type(leaf)) // 8)
        for leaf in jax.tree.leaves(tree)
    )
