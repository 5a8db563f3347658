"""The compressed leaves: data only, so that every other module can know them without their methods.

A compressed model is the user's own pytree with some arrays replaced by the classes of this file.
They are pytrees themselves and carry no static shape, axis or bit-width: what a leaf needs to know
is read from the shapes and dtypes of its arrays, which is why `vmap`, `scan`, `grad`, sharding and
checkpointing work on compressed models unchanged.
"""

from typing import Any

import flax.struct as struct
import jax
import jax.numpy as jnp


@struct.dataclass
class QTensor:
    """Hold an array as integer codes and the scale that gives them meaning.

    `x ~ scale * (codes - zero_point)`. `scale` and `zero_point` have as many axes as `codes`, and
    `scale.shape[i]` divides `codes.shape[i]`: each entry covers one block of
    `codes.shape[i] // scale.shape[i]` codes along axis `i`. One scale for everything has shape
    `(1, ..., 1)`, one per output channel of a kernel `(1, ..., channels)`.

    Attributes:
      codes: integers of a native dtype, `int2`, `int4`, `int8` or their unsigned forms. The two
        narrow ones are really packed in memory (see `nbytes`).
      scale: floating-point; its dtype is the dtype of the restored array.
      zero_point: the code that stands for 0.0, of scale's shape, or None for 0.

    Example:
      >>> import jax.numpy as jnp
      >>> leaf = QTensor(jnp.array([[-3, 0, 2]], jnp.int4), jnp.array([[0.5]]), None)
      >>> materialize(leaf)
      Array([[-1.5,  0. ,  1. ]], dtype=float32)
    """

    codes: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the array that this leaf stands for."""
        return self.codes.shape

    @property
    def dtype(self) -> Any:
        """Return the dtype of the array that this leaf stands for."""
        return self.scale.dtype

    @property
    def ndim(self) -> int:
        """Return the number of axes of the array that this leaf stands for."""
        return self.codes.ndim

    @property
    def size(self) -> int:
        """Return the number of elements of the array that this leaf stands for."""
        return self.codes.size


COMPRESSED_CLASSES: tuple[type, ...] = (QTensor,)


def is_compressed(leaf: Any) -> bool:
    """Return whether `leaf` is a compressed leaf; made to be passed as `is_leaf`.

    Example:
      >>> is_compressed(3.0)
      False
    """
    return isinstance(leaf, COMPRESSED_CLASSES)


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


def _dequantize(leaf: QTensor) -> jax.Array:
    centred = leaf.codes.astype(leaf.scale.dtype)
    if leaf.zero_point is not None:
        zero_point = leaf.zero_point.astype(leaf.scale.dtype)
        centred = centred - expand_blocks(zero_point, leaf.codes.shape)
    return expand_blocks(leaf.scale, leaf.codes.shape) * centred


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
    return jax.tree.map(
        lambda leaf: _dequantize(leaf) if is_compressed(leaf) else leaf, tree, is_leaf=is_compressed
    )


def dtype_bits(dtype: Any) -> int:
    """Return how many bits one element of `dtype` takes in a device's memory.

    Example:
      >>> import jax.numpy as jnp
      >>> dtype_bits(jnp.int4), dtype_bits(jnp.bfloat16), dtype_bits(jnp.bool_)
      (4, 16, 8)
    """
    if jnp.issubdtype(dtype, jnp.integer):
        return int(jnp.iinfo(dtype).bits)
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
