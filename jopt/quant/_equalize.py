"""Cross-layer equalization: even out the channels between two layers without changing the net."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jopt._trees import flatten_with_paths
from jopt.quant._bias import sibling_bias


def _inputs_last(second: jax.Array, channels: int) -> jax.Array:
    """Return the second kernel as (other, channels): what reads each channel."""
    inputs, outputs = second.shape[-2:]
    if inputs == 1 and outputs == channels and second.ndim > 2:  # depthwise
        return second.reshape(-1, channels)
    if inputs % channels:
        raise ValueError(
            f"the second kernel {second.shape} has {inputs} inputs, no multiple of the first one's "
            f"{channels} outputs."
        )
    # Flattened feature maps have the channel last: inputs = positions * channels.
    return jnp.moveaxis(second.reshape(-1, channels, outputs), 1, -1).reshape(-1, channels)


def _scale_inputs(second: jax.Array, factor: jax.Array) -> jax.Array:
    channels = factor.shape[0]
    if second.shape[-2] == 1 and second.shape[-1] == channels and second.ndim > 2:
        return second * factor.reshape((1,) * (second.ndim - 1) + (channels,))
    split = second.reshape(-1, channels, second.shape[-1])
    return (split * factor[None, :, None]).reshape(second.shape)


@jax.jit
def equalize(
    first: jax.Array, bias: jax.Array, second: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scale the channels between two layers so that both kernels have equal ranges for each.

    `s_i = sqrt(r1_i / r2_i)` with the largest magnitudes r of what makes and of what reads channel
    i; the first layer's channel is divided by s_i, the second one's input is multiplied by it. The
    network is the same if what lies between is positively homogeneous (ReLU, leaky ReLU, max or
    mean pooling, flattening). One scale per tensor then serves all channels. A channel that is
    never made or never read is left alone.

    Args:
      first: kernel (..., channels) of a dense, convolution or depthwise layer.
      bias: (channels,).
      second: kernel (..., channels, outputs) of the next layer, a depthwise kernel
        (height, width, 1, channels), or a dense kernel behind a flattened map whose channels are
        last: (positions * channels, outputs).

    Returns:
      The first kernel, the bias and the second kernel.

    Raises:
      ValueError: the second kernel does not read the first one's channels.

    Example:
      >>> import jax.numpy as jnp
      >>> first, _, second = equalize(
      ...     jnp.array([[8.0, 1.0]]), jnp.zeros(2), jnp.array([[0.5], [1.0]])
      ... )
      >>> first, second.ravel()
      (Array([[2., 1.]], dtype=float32), Array([2., 1.], dtype=float32))

    References:
      Nagel, van Baalen, Blankevoort, Welling, "Data-Free Quantization Through Weight Equalization
      and Bias Correction", 2019, https://arxiv.org/abs/1906.04721, equation 11.
    """
    channels = first.shape[-1]
    if bias.shape != (channels,):
        raise ValueError(f"bias {bias.shape} does not fit the {channels} outputs of the kernel.")
    made = jnp.abs(first).reshape(-1, channels).max(0)
    read = jnp.abs(_inputs_last(second, channels)).max(0)
    usable = (made > 0) & (read > 0)
    scale = jnp.sqrt(jnp.where(usable, made, 1.0) / jnp.where(usable, read, 1.0))
    scale = scale.astype(first.dtype)
    return (
        first / scale.reshape((1,) * (first.ndim - 1) + (-1,)),
        bias / scale,
        _scale_inputs(second, scale),
    )


def equalize_params(params: Any, pairs: Sequence[tuple[str, str]], steps: int = 20) -> Any:
    """Equalize the layers of a tree along a chain, again and again until it settles.

    Args:
      params: a linen dict, an `nnx.State` or any other pytree, batch norms folded already.
      pairs: paths of kernels, each with the path of the one that reads its outputs, for example
        `[("conv1/kernel", "conv2/kernel")]`; biases lie beside the first ones, or there are none.
      steps: how often the whole list is gone through: with a chain of pairs each step moves ranges
        by one layer.

    Returns:
      A tree of the same structure that computes the same function.

    Raises:
      ValueError: a path is not in the tree, or two kernels do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"a": {"kernel": jnp.array([[9.0]])}, "b": {"kernel": jnp.array([[1.0]])}}
      >>> equalize_params(params, [("a/kernel", "b/kernel")])
      {'a': {'kernel': Array([[3.]], dtype=float32)}, 'b': {'kernel': Array([[3.]], dtype=float32)}}
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}.")
    paths, leaves, treedef = flatten_with_paths(params)
    where = {path: at for at, path in enumerate(paths)}
    for path in (path for pair in pairs for path in pair):
        if path not in where:
            raise ValueError(f"pairs name {path!r}, but the paths are {paths}.")
    for _ in range(steps):
        for one, two in pairs:
            first, second, at = where[one], where[two], where.get(sibling_bias(one))
            bias = jnp.zeros(leaves[first].shape[-1]) if at is None else leaves[at]
            try:
                leaves[first], bias, leaves[second] = equalize(leaves[first], bias, leaves[second])
            except ValueError as error:
                raise ValueError(f"{one} and {two}: {error}") from None
            if at is not None:
                leaves[at] = bias
    return jax.tree.unflatten(treedef, leaves)
