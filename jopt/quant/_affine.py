"""Uniform quantization of one array: to codes and back, exactly and with a gradient."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jopt._arrays import QTensor, materialize
from jopt.quant._spec import QuantSpec, block_sizes


def _code_dtype(bits: int, signed: bool) -> Any:
    width = 2 if bits <= 2 else 4 if bits <= 4 else 8
    return jnp.dtype(f"{'' if signed else 'u'}int{width}")


def _check(values: jax.Array, spec: QuantSpec) -> None:
    if not isinstance(spec, QuantSpec):
        raise TypeError(f"spec must be a QuantSpec, not {spec!r}.")
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise TypeError(f"values must be floating-point, not {values.dtype}.")
    if values.size == 0:
        raise ValueError(f"values of shape {values.shape} have no element to take a range from.")
    block_sizes(values.shape, spec.block)


def _to_blocks(values: jax.Array, spec: QuantSpec) -> tuple[jax.Array, tuple[int, ...]]:
    """Split each axis in two, (number of blocks, size of a block); return the second ones too."""
    sizes = block_sizes(values.shape, spec.block)
    pairs = [(n // size, size) for n, size in zip(values.shape, sizes, strict=True)]
    within = tuple(range(1, 2 * len(pairs), 2))
    return values.reshape([n for pair in pairs for n in pair]), within


@partial(jax.jit, static_argnames="spec")
def _quantize(values: jax.Array, spec: QuantSpec) -> tuple[QTensor, jax.Array]:
    """Return the leaf, and where the values lay inside the range."""
    exact = jnp.promote_types(values.dtype, jnp.float32)
    blocks, within = _to_blocks(values.astype(exact), spec)
    low, high = spec.range(blocks, within)
    codes, scale, zero_point = spec.grid(blocks, low, high, spec.bits)
    if values.dtype != exact:
        # The scale is stored in the narrow dtype of the values: stretch the range so that the
        # codes are taken with the scale that they will be restored with.
        tiny = jnp.finfo(values.dtype).tiny
        stored = jnp.maximum(scale.astype(values.dtype), tiny).astype(exact)
        low, high, scale = low * (stored / scale), high * (stored / scale), stored
        codes, _, zero_point = spec.grid(blocks, low, high, spec.bits)
    counts = tuple(n for axis, n in enumerate(blocks.shape) if axis % 2 == 0)
    leaf = QTensor(
        codes.reshape(values.shape).astype(_code_dtype(spec.bits, signed=zero_point is None)),
        scale.reshape(counts).astype(values.dtype),
        None if zero_point is None else zero_point.reshape(counts),
    )
    inside = (blocks >= low) & (blocks <= high)
    return leaf, inside.reshape(values.shape)


def quantize(values: ArrayLike, spec: QuantSpec) -> QTensor:
    """Quantize one array.

    The range of each block is taken from the values themselves by `spec.range` and divided into
    levels by `spec.grid`. With `absmax` or `minmax` every element is restored to within half a
    scale.

    Args:
      values: floating-point array of any shape, not empty.
      spec: bits, block, range and grid.

    Returns:
      A `QTensor` whose codes have the narrowest native dtype that holds them and whose scale has
      the dtype of `values`.

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
    _check(array, spec)
    return _quantize(array, spec)[0]


@jax.custom_jvp
def _straight_through(values: jax.Array, rounded: jax.Array, inside: jax.Array) -> jax.Array:
    del values, inside
    return rounded


@_straight_through.defjvp
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
    _check(array, spec)
    leaf, inside = _quantize(jax.lax.stop_gradient(array), spec)
    return _straight_through(array, materialize(leaf), inside)
