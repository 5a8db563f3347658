"""Quantization of whole parameter trees."""

from typing import Any

import jax
import jax.numpy as jnp

from jopt._leaves import is_compressed
from jopt._trees import Filter, flatten_with_paths, is_floating, is_kernel, map_selected, select
from jopt.quant._quantize import fake_quantize, quantize
from jopt.quant._spec import QuantSpec


@jax.jit
def _all_finite(arrays: list[jax.Array]) -> list[jax.Array]:
    return [jnp.all(jnp.isfinite(array)) for array in arrays]


def refuse_non_finite(params: Any, where: Filter) -> None:
    """Raise for NaN and infinity, which would spoil a whole block."""
    paths, leaves, _ = flatten_with_paths(params)
    chosen = jax.tree.leaves(select(params, where))
    checked = [
        (path, leaf)
        for path, leaf, take in zip(paths, leaves, chosen, strict=True)
        if take and is_floating(leaf)
    ]
    finite = _all_finite([leaf for _, leaf in checked])
    for (path, _), is_finite in zip(checked, finite, strict=True):
        try:
            spoiled = not is_finite
        except jax.errors.ConcretizationTypeError:  # under jit the values are not known
            return
        if spoiled:
            raise ValueError(f"{path}: values must be finite, but there is a NaN or an infinity.")


def leaf_with_path(function: Any, spec: QuantSpec) -> Any:
    """Return `(path, leaf) -> function(leaf, spec)` whose errors name the leaf."""

    def apply(path: str, leaf: Any) -> Any:
        if is_compressed(leaf):
            raise TypeError(f"{path}: the leaf is compressed already ({type(leaf).__name__}).")
        try:
            return function(leaf, spec)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from None

    return apply


def quantize_params(params: Any, spec: QuantSpec, where: Filter = is_kernel) -> Any:
    """Replace the chosen leaves of a tree by quantized ones.

    Different leaves get different specs by composed calls: what one call has quantized, a later
    call with the default filter leaves alone.

    Args:
      params: a linen dict, an `nnx.State` or any other pytree; it is not changed.
      spec: bits, block, range and grid.
      where: a regex on the path or a predicate `(path, leaf) -> bool`; by default the
        floating-point leaves of two or more axes.

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
    return map_selected(leaf_with_path(quantize, spec), params, where)


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
    return map_selected(leaf_with_path(fake_quantize, spec), params, where)
