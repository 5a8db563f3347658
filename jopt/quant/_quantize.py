"""Quantization of one array: to codes and back, exactly, at random and with a gradient."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jopt._arrays import materialize, working_dtype
from jopt.quant._blocks import merge_blocks, split_blocks, split_levels
from jopt.quant._grids import Leaf, Levels
from jopt.quant._spec import QuantSpec, block_sizes


def check_values(values: jax.Array, spec: QuantSpec) -> None:
    """Refuse what cannot be quantized.

    Raises:
      ValueError: `spec.block` does not divide the shape, or the array is empty.
      TypeError: the array is not floating-point, or spec is not a QuantSpec.
    """
    if not isinstance(spec, QuantSpec):
        raise TypeError(f"spec must be a QuantSpec, not {spec!r}.")
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise TypeError(f"values must be floating-point, not {values.dtype}.")
    if values.size == 0:
        raise ValueError(f"values of shape {values.shape} have no element to take a range from.")
    block_sizes(values.shape, spec.block)


def _fit(
    blocks: jax.Array, within: tuple[int, ...], spec: QuantSpec, dtype: Any
) -> tuple[Levels, jax.Array, jax.Array]:
    """Return levels whose scale is one of `dtype`, and the ends of the range."""

    def restore(low: jax.Array, high: jax.Array) -> jax.Array:
        levels = spec.grid.fit(blocks, low, high, spec.bits)
        return materialize(spec.grid.encode(blocks, levels, spec.bits))

    low, high = spec.range(blocks, within, restore)
    levels = spec.grid.fit(blocks, low, high, spec.bits)
    if dtype == blocks.dtype:
        return levels, low, high
    if getattr(levels, "global_scale", None) is not None:
        return _with_global_scale(levels, dtype), low, high
    scale = getattr(levels, "scale", None)
    if scale is not None and scale.dtype == blocks.dtype:
        # The scale is stored in the narrow dtype of the values: stretch the range so that the
        # codes are taken with the scale that they will be restored with.
        stored = jnp.maximum(scale.astype(dtype), jnp.finfo(dtype).tiny).astype(blocks.dtype)
        low, high = low * (stored / scale), high * (stored / scale)
        levels = spec.grid.fit(blocks, low, high, spec.bits).replace(scale=stored)
    return levels, low, high


def _with_global_scale(levels: Levels, dtype: Any) -> Levels:
    """Round the scale of all blocks to a narrow dtype; those of single blocks make up for it."""
    wide = levels.global_scale.dtype
    stored = jnp.maximum(levels.global_scale.astype(dtype), jnp.finfo(dtype).tiny).astype(wide)
    smallest = jnp.finfo(levels.scale.dtype).smallest_subnormal.astype(wide)
    scale = levels.scale.astype(wide) * (levels.global_scale / stored)
    scale = jnp.maximum(scale, smallest).astype(levels.scale.dtype)
    return levels.replace(global_scale=stored, scale=scale)


def narrowed(leaf: Leaf, wide: Any, narrow: Any) -> Leaf:
    """Store scales and codebooks in the dtype of the values; a zero point stays as it is."""

    def store(path: Any, field: jax.Array) -> jax.Array:
        kept = path[-1] == jax.tree_util.GetAttrKey("zero_point") or field.dtype != wide
        return field if kept else field.astype(narrow)

    return jax.tree_util.tree_map_with_path(store, leaf)


def fit_levels(values: jax.Array, spec: QuantSpec) -> Levels:
    """Choose the levels of each block of an array, without codes.

    Args:
      values: floating-point array, not empty.
      spec: bits, block, range and grid.

    Returns:
      A compressed leaf whose codes are None and whose other fields are those of `quantize`, in
      float32 for narrower values.
    """
    exact = working_dtype(values.dtype)
    levels, _, _ = _fit(*split_blocks(values.astype(exact), spec), spec, values.dtype)
    return merge_blocks(levels, values.shape, spec)


def encode(values: jax.Array, levels: Levels, spec: QuantSpec) -> Leaf:
    """Find the code of every element among given levels.

    Args:
      values: floating-point array.
      levels: from `fit_levels` of an array of this shape, or a leaf without its codes.
      spec: the same spec; its range is not used.

    Returns:
      The levels with codes.
    """
    exact = working_dtype(values.dtype)
    blocks, _ = split_blocks(values.astype(exact), spec)
    leaf = spec.grid.encode(blocks, split_levels(levels, values.shape, spec), spec.bits)
    return merge_blocks(leaf, values.shape, spec)


@partial(jax.jit, static_argnames="spec")
def _quantize(values: jax.Array, spec: QuantSpec) -> Leaf:
    return _quantize_inside(values, spec)[0]


@partial(jax.jit, static_argnames="spec")
def _quantize_inside(values: jax.Array, spec: QuantSpec) -> tuple[Leaf, jax.Array]:
    """Return the leaf, and where the values lay inside the range."""
    exact = working_dtype(values.dtype)
    blocks, within = split_blocks(values.astype(exact), spec)
    levels, low, high = _fit(blocks, within, spec, values.dtype)
    leaf = merge_blocks(spec.grid.encode(blocks, levels, spec.bits), values.shape, spec)
    inside = (blocks >= low) & (blocks <= high)
    return narrowed(leaf, exact, values.dtype), inside.reshape(values.shape)


def quantize(values: ArrayLike, spec: QuantSpec) -> Leaf:
    """Quantize one array.

    The range of each block is taken from the values themselves by `spec.range`, and `spec.grid`
    says which levels lie in it. With `absmax` or `minmax` and an even grid every element is
    restored to within half a scale.

    Args:
      values: floating-point array of any shape, not empty.
      spec: bits, block, range and grid.

    Returns:
      A compressed leaf, a `QTensor` for even grids, whose codes have the narrowest native dtype
      that holds them and whose scale has the dtype of `values`.

    Raises:
      ValueError: `spec.block` does not divide the shape, or the array is empty.
      TypeError: the array is not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import quant
      >>> leaf = quant.quantize(jnp.array([-0.9, 0.2, 2.0]), quant.QuantSpec(4, block=()))
      >>> leaf.codes, leaf.scale
      (Array([-3, 1, 7], dtype=int4), Array([0.2857143], dtype=float32))
    """
    array = jnp.asarray(values)
    check_values(array, spec)
    return _quantize(array, spec)


@partial(jax.jit, static_argnames="spec")
def _quantize_stochastically(key: jax.Array, values: jax.Array, spec: QuantSpec) -> Leaf:
    exact = working_dtype(values.dtype)
    blocks, within = split_blocks(values.astype(exact), spec)
    levels, _, _ = _fit(blocks, within, spec, values.dtype)
    below, above = spec.grid.neighbours(blocks, levels, spec.bits)
    low, high = materialize(below), materialize(above)
    width = high - low
    share = (jnp.clip(blocks, low, high) - low) / jnp.where(width > 0, width, 1.0)
    up = jax.random.uniform(key, blocks.shape, exact) < share
    leaf = below.replace(codes=jnp.where(up, above.codes, below.codes))
    return narrowed(merge_blocks(leaf, values.shape, spec), exact, values.dtype)


def quantize_stochastically(key: jax.Array, values: ArrayLike, spec: QuantSpec) -> Leaf:
    """Quantize one array, rounding up or down at random so that the mean is right.

    A value x between the levels l and h becomes h with probability `(x - l) / (h - l)`, so the
    expectation of what is restored is x itself inside the range. Levels keep their value.

    Args:
      key: a random key.
      values: floating-point array of any shape, not empty.
      spec: bits, block, range and grid.

    Returns:
      A compressed leaf, as from `quantize`.

    Raises:
      ValueError: `spec.block` does not divide the shape, or the array is empty.
      TypeError: the array is not floating-point.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jopt import materialize, quant
      >>> values = jnp.concatenate([jnp.ones(1), jnp.full(9999, 0.25)])
      >>> leaf = quant.quantize_stochastically(
      ...     jax.random.key(0), values, quant.QuantSpec(2, block=())
      ... )
      >>> abs(float(materialize(leaf)[1:].mean()) - 0.25) < 0.02
      True

    References:
      Gupta et al., "Deep Learning with Limited Numerical Precision", 2015,
      https://arxiv.org/abs/1502.02551, section 3.
    """
    array = jnp.asarray(values)
    check_values(array, spec)
    return _quantize_stochastically(key, array, spec)


@jax.custom_jvp
def straight_through(values: jax.Array, rounded: jax.Array, inside: jax.Array) -> jax.Array:
    """Return `rounded`, with the gradient of `values` where `inside`, and none elsewhere."""
    del values, inside
    return rounded


@straight_through.defjvp
def _straight_through_jvp(primals: Any, tangents: Any) -> Any:
    _, rounded, inside = primals
    return rounded, jnp.where(inside, tangents[0], jnp.zeros_like(tangents[0]))


def fake_quantize(values: ArrayLike, spec: QuantSpec) -> jax.Array:
    """Round an array to what quantizing and restoring it gives, with a straight-through gradient.

    The value is exactly `materialize(quantize(values, spec))`. The gradient is that of the
    identity inside the range and zero outside it; the range counts as a constant.

    Args:
      values: floating-point array of any shape, not empty.
      spec: bits, block, range and grid.

    Returns:
      An array of the shape and dtype of `values`.

    Raises:
      ValueError: `spec.block` does not divide the shape, or the array is empty.
      TypeError: the array is not floating-point.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jopt import quant
      >>> spec = quant.QuantSpec(2, block=())
      >>> values = jnp.array([-1.0, 0.4, 0.6])
      >>> quant.fake_quantize(values, spec)
      Array([-1.,  0.,  1.], dtype=float32)
      >>> jax.grad(lambda v: quant.fake_quantize(v, spec).sum())(values)
      Array([1., 1., 1.], dtype=float32)

    References:
      Bengio, Leonard, Courville, "Estimating or Propagating Gradients Through Stochastic
      Neurons", 2013, https://arxiv.org/abs/1308.3432.
    """
    array = jnp.asarray(values)
    check_values(array, spec)
    leaf, inside = _quantize_inside(jax.lax.stop_gradient(array), spec)
    return straight_through(array, materialize(leaf), inside)
