"""Parameter trees with learned steps.

The steps are a dictionary from path to step, `{"dense/kernel": ...}`: a pytree like any other, that
rides beside the parameters through `jax.grad`, optax, `vmap` and checkpoints. Which leaves are
quantized is written down once, in its keys.
"""

from collections.abc import Callable
from typing import Any

from jopt._trees import Filter, is_kernel, naming_leaf
from jopt.quant._by_path import in_both, map_with, refuse_non_finite, selected
from jopt.quant._lsq import lsq, lsq_quantize
from jopt.quant._lsq_init import lsq_init
from jopt.quant._spec import QuantSpec

Steps = dict[str, Any]


def init_steps(
    params: Any,
    spec: QuantSpec,
    where: Filter = is_kernel,
    init: Callable[[Any, QuantSpec], Any] = lsq_init,
) -> Steps:
    """Choose the leaves to quantize and return the steps to start from.

    Leaves with different specs: one call for each, the dictionaries joined by `|` or kept apart.

    Args:
      params: a linen dict, an `nnx.State` or any other pytree.
      spec: bits and block.
      where: a regex on the path or a predicate `(path, leaf) -> bool`; by default
        those that `is_kernel` takes.
      init: `(values, spec) -> step`: `lsq_init`, `lsq_init_mse` (for pruned kernels),
        `lsq_plus_init_weights`, or anything that the quantizer takes as its step.

    Returns:
      A dictionary from path to step, in the order of the tree.

    Raises:
      ValueError: the filter matches nothing, or a block does not divide a leaf.
      TypeError: a chosen leaf is compressed already or is not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.quant import QuantSpec
      >>> from jopt.quant import init_steps
      >>> params = {"dense": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}}
      >>> init_steps(params, QuantSpec(2))
      {'dense/kernel': Array([[2., 2.]], dtype=float32)}
    """
    start = naming_leaf(init, spec)
    return {path: start(path, leaf) for path, leaf in selected(params, where).items()}


def lsq_params(
    params: Any,
    steps: Steps,
    spec: QuantSpec,
    quantizer: Callable[[Any, Any, QuantSpec], Any] = lsq,
) -> Any:
    """Round the leaves that have a step, with gradients for both.

    Put it between the parameters and `apply` in the loss, and train one tree that holds both.
    Weight decay would shrink the steps: mask it. Pruned weights stay zero.

    Args:
      params: a linen dict, an `nnx.State` or any other pytree; it is not changed.
      steps: path to step, from `init_steps`.
      spec: bits and block, as for `init_steps`.
      quantizer: `(values, step, spec) -> values`: `lsq`, one with another code range
        (`functools.partial(lsq, code_range=balanced_codes)`), or one of your own.

    Returns:
      A tree of the structure, shapes and dtypes of `params`.

    Raises:
      ValueError: a key of `steps` is no path of `params` (the message lists those), `steps` is
        empty, or a step does not fit its leaf.
      TypeError: a leaf is compressed already or is not floating-point.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jopt.quant import QuantSpec
      >>> from jopt.quant import init_steps, lsq_params, lsq_quantize_params
      >>> spec, params = QuantSpec(2), {"kernel": jnp.array([[0.3, -0.8], [0.9, 0.2]])}
      >>> tree = {"params": params, "steps": init_steps(params, spec)}
      >>> def loss(tree):
      ...     kernel = lsq_params(tree["params"], tree["steps"], spec)["kernel"]
      ...     return jnp.square(jnp.array([1.0, 2.0]) @ kernel - 1.0).sum()
      >>> tx = optax.chain(
      ...     optax.add_decayed_weights(1e-4, mask={"params": True, "steps": False}),
      ...     optax.sgd(0.01),
      ... )
      >>> state, before = tx.init(tree), loss(tree)
      >>> for _ in range(20):
      ...     updates, state = tx.update(jax.grad(loss)(tree), state, tree)
      ...     tree = optax.apply_updates(tree, updates)
      >>> bool(loss(tree) < before)
      True
      >>> small = lsq_quantize_params(tree["params"], tree["steps"], spec)
      >>> small["kernel"].codes.dtype
      dtype(int2)
    """
    return map_with(naming_leaf(quantizer, spec), params, steps, "steps")


def lsq_quantize_params(
    params: Any,
    steps: Steps,
    spec: QuantSpec,
    quantizer: Callable[[Any, Any, QuantSpec], Any] = lsq_quantize,
) -> Any:
    """Replace the leaves that have a step by quantized ones: what was trained, to the last bit.

    Args:
      params: a linen dict, an `nnx.State` or any other pytree; it is not changed.
      steps: path to step.
      spec: bits and block, as in training.
      quantizer: `(values, step, spec) -> leaf`: `lsq_quantize`, with the code range of training.

    Returns:
      The tree with a `QTensor` at each leaf that has a step.

    Raises:
      ValueError: as for `lsq_params`, or a leaf holds NaN or infinity (outside jit).
      TypeError: a leaf is compressed already or is not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.quant import QuantSpec
      >>> from jopt.quant import lsq_quantize_params
      >>> params = {"kernel": jnp.array([[0.3, -0.8]])}
      >>> steps = {"kernel": jnp.array([[0.5, 0.5]])}
      >>> lsq_quantize_params(params, steps, QuantSpec(2))["kernel"].codes
      Array([[1, -2]], dtype=int2)
    """
    small = map_with(naming_leaf(quantizer, spec), params, steps, "steps")
    refuse_non_finite({"params": params, "steps": steps}, in_both("steps", steps))
    return small
