"""Arrays split in the blocks that share levels, and put together again.

Each axis that a block divides becomes two, the number of blocks and the size of a block; an axis
that is one block, or whose blocks have one element, stays as it is. So there are no axes of size
one, which innermost, as blocks of an output channel would have them, make XLA's loops on a CPU many
times slower.
"""

import math
from typing import Any

import jax

from jopt.quant._spec import QuantSpec, block_sizes


def split_blocks(values: jax.Array, spec: QuantSpec) -> tuple[jax.Array, tuple[int, ...]]:
    """Split the axes that blocks divide in two, and return the axes within a block.

    Example:
      >>> import jax.numpy as jnp
      >>> blocks, within = split_blocks(jnp.ones((128, 32)), QuantSpec(block=(64, 1)))
      >>> blocks.shape, within
      ((2, 64, 32), (1,))
    """
    dims: list[int] = []
    within: list[int] = []
    for n, size in zip(values.shape, block_sizes(values.shape, spec.block), strict=True):
        if n > size or size == 1:
            dims.append(n // size)
        if size > 1:
            within.append(len(dims))
            dims.append(size)
    return values.reshape(dims), tuple(within)


def _parts(shape: tuple[int, ...], spec: QuantSpec) -> list[int]:
    """Return how many axes `split_blocks` makes of each axis: one or two."""
    sizes = block_sizes(shape, spec.block)
    return [2 if n > size > 1 else 1 for n, size in zip(shape, sizes, strict=True)]


def merge_blocks(leaf: Any, shape: tuple[int, ...], spec: QuantSpec) -> Any:
    """Give an array of blocks, or every field of a leaf of them, the axes of values of `shape`.

    What has one entry a block, the axes within it kept with size one, gets the axes of a scale.

    Example:
      >>> import jax.numpy as jnp
      >>> merge_blocks(jnp.ones((2, 1, 32)), (128, 32), QuantSpec(block=(64, 1))).shape
      (2, 32)
    """
    parts = _parts(shape, spec)

    def merge(field: jax.Array) -> jax.Array:
        dims, at = [], 0
        for count in parts:
            dims.append(math.prod(field.shape[at : at + count]))
            at += count
        return field.reshape(*dims, *field.shape[at:])

    return jax.tree.map(merge, leaf)


def split_levels(levels: Any, shape: tuple[int, ...], spec: QuantSpec) -> Any:
    """Undo `merge_blocks` for levels, whose fields have one entry a block.

    Example:
      >>> import jax.numpy as jnp
      >>> split_levels(jnp.ones((2, 32)), (128, 32), QuantSpec(block=(64, 1))).shape
      (2, 1, 32)
    """
    parts = _parts(shape, spec)

    def split(field: jax.Array) -> jax.Array:
        dims = [n for count, n in zip(parts, field.shape, strict=False) for n in (n, 1)[:count]]
        return field.reshape(*dims, *field.shape[len(parts) :])

    return jax.tree.map(split, levels)
