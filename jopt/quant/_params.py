"""Quantization of whole parameter trees."""

from typing import Any

from jopt._trees import Filter, is_kernel, map_selected, naming_leaf
from jopt.quant._by_path import refuse_non_finite
from jopt.quant._quantize import fake_quantize, quantize
from jopt.quant._spec import QuantSpec


def quantize_params(params: Any, spec: QuantSpec, where: Filter = is_kernel) -> Any:
    """Replace the chosen leaves of a tree by quantized ones.

    Different leaves get different specs by composed calls: what one call has quantized, a later
    call with the default filter leaves alone.

    Args:
      params: a linen dict, an `nnx.State` or any other pytree; it is not changed.
      spec: bits, block, range and grid.
      where: a regex on the path or a predicate `(path, leaf) -> bool`; by default
        those that `is_kernel` takes.

    Returns:
      The tree with a `QTensor` at each chosen leaf.

    Raises:
      ValueError: the filter matches nothing, a block does not divide a leaf, or a leaf holds NaN
        or infinity (outside jit, where values can be looked at). The message names the leaf.
      TypeError: a chosen leaf is compressed already or is not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import quant
      >>> params = {"dense": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}}
      >>> small = quant.quantize_params(params, quant.QuantSpec(bits=4))
      >>> small["dense"]["kernel"].codes.dtype, small["dense"]["bias"].dtype
      (dtype(int4), dtype('float32'))
    """
    refuse_non_finite(params, where)
    return map_selected(naming_leaf(quantize, spec), params, where)


def fake_quantize_params(params: Any, spec: QuantSpec, where: Filter = is_kernel) -> Any:
    """Round the chosen leaves to their quantized values, with straight-through gradients.

    Put it between the parameters and `apply` in the loss to train through quantization; afterwards
    `quantize_params` with the same arguments gives leaves with exactly the values trained with.

    Args:
      params: a linen dict, an `nnx.State` or any other pytree; it is not changed.
      spec: bits, block, range and grid.
      where: as for `quantize_params`.

    Returns:
      A tree of the same structure, shapes and dtypes.

    Raises:
      ValueError: the filter matches nothing, or a block does not divide a leaf.
      TypeError: a chosen leaf is compressed already or is not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import quant
      >>> params = {"kernel": jnp.array([[1.0, 0.4]])}
      >>> quant.fake_quantize_params(params, quant.QuantSpec(bits=2, block=()))
      {'kernel': Array([[1., 0.]], dtype=float32)}
    """
    return map_selected(naming_leaf(fake_quantize, spec), params, where)
