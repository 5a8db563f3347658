"""Batch norm folded into the kernel before it, so that what is quantized is what runs."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jopt._arrays import working_dtype
from jopt._leaves import is_compressed
from jopt._trees import flatten_with_paths

_PATHS_SHOWN = 20


@jax.jit
def fold_batch_norm(
    kernel: jax.Array,
    bias: jax.Array | None,
    scale: jax.Array | None,
    offset: jax.Array | None,
    mean: jax.Array,
    variance: jax.Array,
    epsilon: float | jax.Array = 1e-5,
) -> tuple[jax.Array, jax.Array]:
    """Return the kernel and the bias that do what a layer and the batch norm after it do.

    `f = scale / sqrt(variance + epsilon)`, `kernel' = kernel f`,
    `bias' = (bias - mean) f + offset`. A missing scale is 1, a missing bias or offset 0. It is
    computed in float32, or wider.

    Args:
      kernel: dense or convolution kernel, its last axis the outputs.
      bias: (outputs,), or None.
      scale: gamma, (outputs,), or None.
      offset: beta, (outputs,), or None.
      mean: running mean, (outputs,).
      variance: running variance, (outputs,).
      epsilon: what the norm adds to the variance; 1e-5 in Flax.

    Returns:
      `(kernel, bias)`: the kernel in its dtype, the bias, (outputs,), in the dtype of the given
      bias or else of the kernel.

    Raises:
      ValueError: one of them has not one entry for each output.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.quant import fold_batch_norm
      >>> one = jnp.ones(1)
      >>> fold_batch_norm(jnp.array([[3.0]]), None, 2 * one, one, 5 * one, 16 * one, 0.0)
      (Array([[1.5]], dtype=float32), Array([-1.5], dtype=float32))

    References:
      Jacob et al., "Quantization and Training of Neural Networks for Efficient
      Integer-Arithmetic-Only Inference", 2018, https://arxiv.org/abs/1712.05877, equation 14.
    """
    named = {"bias": bias, "scale": scale, "offset": offset, "mean": mean, "variance": variance}
    for name, array in named.items():
        if array is not None and array.shape != kernel.shape[-1:]:
            raise ValueError(
                f"{name} must have shape {kernel.shape[-1:]}, one for each output of the kernel, "
                f"not {array.shape}."
            )
    exact = working_dtype(kernel.dtype)
    nothing = jnp.zeros(kernel.shape[-1:], exact)
    wide = {name: nothing if a is None else a.astype(exact) for name, a in named.items()}
    factor = jax.lax.rsqrt(wide["variance"] + jnp.asarray(epsilon, exact))
    factor = factor if scale is None else wide["scale"] * factor
    shift = (wide["bias"] - wide["mean"]) * factor + wide["offset"]
    spread = factor.reshape((1,) * (kernel.ndim - 1) + (-1,))
    return (
        (kernel.astype(exact) * spread).astype(kernel.dtype),
        shift.astype(kernel.dtype if bias is None else bias.dtype),
    )


def _leaves_by_path(tree: Any) -> dict[str, Any]:
    paths, leaves, _ = flatten_with_paths(tree)
    return dict(zip(paths, leaves, strict=True))


def _need(leaves: dict[str, Any], path: str, tree: str) -> Any:
    if path not in leaves:
        shown = ", ".join(map(repr, list(leaves)[:_PATHS_SHOWN])) or "none: the tree is empty"
        raise ValueError(f"pairs: {path!r} is not in {tree}; the paths are {shown}.")
    return leaves[path]


def _folded(
    params: Any, statistics: Any, pairs: Mapping[str, str], epsilon: float
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Return the new kernel and bias of each layer."""
    if len(set(pairs.values())) != len(pairs):
        raise ValueError(f"pairs: a norm follows more than one layer: {dict(pairs)}.")
    weights, running = _leaves_by_path(params), _leaves_by_path(statistics)
    folded = {}
    for layer, norm in pairs.items():
        kernel = _need(weights, f"{layer}/kernel", "params")
        if is_compressed(kernel):
            raise TypeError(f"{layer}/kernel is compressed: fold batch norm before quantizing.")
        mean = _need(running, f"{norm}/mean", "statistics")
        variance = _need(running, f"{norm}/var", "statistics")
        rest = (weights.get(f"{layer}/bias"), weights.get(f"{norm}/scale"))
        offset = weights.get(f"{norm}/bias")
        try:
            folded[layer] = fold_batch_norm(kernel, *rest, offset, mean, variance, epsilon)
        except ValueError as error:
            raise ValueError(f"{layer} and {norm}: {error}") from None
    return folded


def fold_batch_norms(
    params: Any, statistics: Any, pairs: Mapping[str, str], epsilon: float = 1e-5
) -> tuple[Any, Any]:
    """Fold batch norms into the layers before them, for the same model code.

    Both trees keep their structure: each norm gets the scale 1, the mean 0 and the variance
    `1 - epsilon`, so that running it with its running averages changes nothing. Where a layer has
    no bias the norm's own bias holds the shift, or, where that is missing as well, its mean. The
    kernels are then what reaches the multiplications, and can be quantized. Not for training on:
    batch statistics would undo it.

    Args:
      params: the parameters of a linen dict (`variables["params"]`), or the `nnx.Param` state.
      statistics: `variables["batch_stats"]`, or the `nnx.BatchStat` state.
      pairs: path of a layer to the path of the norm after it, `{"block_0/conv": "block_0/norm"}`.
        The layer has `kernel` and perhaps `bias`, the norm perhaps `scale` and `bias`, `mean` and
        `var`. Nothing, no activation either, may lie between the two.
      epsilon: as in the model's norms; 1e-5 in Flax.

    Returns:
      `(params, statistics)`, new trees of the same structures, shapes and dtypes.

    Raises:
      ValueError: a path is missing (the message lists those that there are), shapes do not fit, or
        a norm follows two layers.
      TypeError: a kernel is compressed already.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.quant import fold_batch_norms
      >>> one = jnp.ones(1)
      >>> params = {"conv": {"kernel": jnp.array([[3.0]])}, "norm": {"scale": 2 * one, "bias": one}}
      >>> statistics = {"norm": {"mean": 5 * one, "var": 15.99999 * one}}
      >>> params, statistics = fold_batch_norms(params, statistics, {"conv": "norm"})
      >>> params["conv"]["kernel"], params["norm"]["bias"]
      (Array([[1.5]], dtype=float32), Array([-1.5], dtype=float32))
    """
    folded = _folded(params, statistics, pairs, epsilon)
    weights, running = _leaves_by_path(params), _leaves_by_path(statistics)
    new: dict[str, jax.Array] = {}
    neutral: dict[str, jax.Array] = {}
    for layer, (kernel, shift) in folded.items():
        norm = pairs[layer]
        nothing = jnp.zeros_like(shift)
        homes = [path for path in (f"{layer}/bias", f"{norm}/bias") if path in weights]
        new |= {path: nothing for path in homes} | {f"{norm}/scale": jnp.ones_like(shift)}
        new |= {f"{layer}/kernel": kernel} | {path: shift for path in homes[:1]}
        neutral[f"{norm}/mean"] = nothing if homes else -shift
        neutral[f"{norm}/var"] = jnp.full_like(running[f"{norm}/var"], 1 - epsilon)
    return _replaced(params, new), _replaced(statistics, neutral)


def _replaced(tree: Any, new: dict[str, jax.Array]) -> Any:
    paths, leaves, treedef = flatten_with_paths(tree)
    return jax.tree.unflatten(
        treedef,
        [
            new[path].astype(leaf.dtype) if path in new else leaf
            for path, leaf in zip(paths, leaves, strict=True)
        ],
    )


def remove_batch_norms(
    params: Any, statistics: Any, pairs: Mapping[str, str], epsilon: float = 1e-5
) -> tuple[Any, Any]:
    """Fold batch norms into the layers before them and take the norms out of the trees.

    For a model written without the norms, whose layers have a bias: one is put there where it was
    missing. `fold_batch_norms` does the same for the model as it is.

    Args:
      params: as for `fold_batch_norms`; nested mappings.
      statistics: as for `fold_batch_norms`.
      pairs: as for `fold_batch_norms`.
      epsilon: as in the model's norms; 1e-5 in Flax.

    Returns:
      `(params, statistics)`, new trees of the same types without the norms; `statistics` is empty
      where all are folded.

    Raises:
      ValueError: as for `fold_batch_norms`.
      TypeError: as for `fold_batch_norms`, or a tree is not made of mappings.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.quant import remove_batch_norms
      >>> one = jnp.ones(1)
      >>> params = {"conv": {"kernel": jnp.array([[3.0]])}, "norm": {"scale": 2 * one, "bias": one}}
      >>> statistics = {"norm": {"mean": 5 * one, "var": 16 * one}}
      >>> remove_batch_norms(params, statistics, {"conv": "norm"}, epsilon=0.0)
      ({'conv': {'kernel': Array([[1.5]], dtype=float32),
                 'bias': Array([-1.5], dtype=float32)}}, {})
    """
    for name, tree in (("params", params), ("statistics", statistics)):
        if not isinstance(tree, Mapping):
            raise TypeError(f"{name} must be a mapping of mappings, not {type(tree).__name__}.")
    folded = _folded(params, statistics, pairs, epsilon)
    weights, running = _nested(params), _nested(statistics)
    for layer, (kernel, bias) in folded.items():
        node = _node(weights, layer)
        # The kernel's own wrapper, an `nnx.Param` say, is that of the bias as well.
        node["bias"] = jax.tree.map(lambda _, new=bias: new, node.get("bias", node["kernel"]))
        node["kernel"] = jax.tree.map(lambda _, new=kernel: new, node["kernel"])
        _remove(weights, pairs[layer])
        _remove(running, pairs[layer])
    return _like(weights, params), _like(running, statistics)


def _nested(tree: Any) -> Any:
    """Copy a tree of mappings to plain dictionaries."""
    return {
        key: _nested(child) if isinstance(child, Mapping) else child for key, child in tree.items()
    }


def _like(tree: dict[Any, Any], original: Any) -> Any:
    return tree if type(original) is dict else type(original)(tree)


def _key(node: Any, name: str) -> Any:
    """Return the key that is written `name`: the keys of lists of layers are whole numbers."""
    return next((key for key in node if str(key) == name), None)


def _node(tree: Any, path: str) -> Any:
    for name in path.split("/"):
        tree = tree[_key(tree, name)]
    return tree


def _remove(tree: Any, path: str) -> None:
    """Remove a node, and those above it that are left empty."""
    name, _, rest = path.partition("/")
    key = _key(tree, name)
    if key is None:
        return
    if rest:
        _remove(tree[key], rest)
    if not rest or not tree[key]:
        del tree[key]
