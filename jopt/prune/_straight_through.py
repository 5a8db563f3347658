"""Train the dense weights behind a mask: zeros forward, gradients straight through."""

from typing import Any

import jax
import jax.numpy as jnp

from jopt._trees import is_floating
from jopt.prune._masks import apply_masks


@jax.custom_jvp
def _behind(weights: jax.Array, shown: jax.Array) -> jax.Array:
    """Show one array forward; a derivative sees the other one, unchanged."""
    del weights
    return shown


@_behind.defjvp
def _behind_jvp(primals: Any, tangents: Any) -> Any:
    return primals[1], tangents[0]


def masked_params(params: Any, masks: Any) -> Any:
    """Mask parameters forward and let gradients pass to all of them.

    Forward `W * M`, with exact zeros as from `apply_masks`; backward `dL/dW = dL/d(W * M)` for
    removed weights too, which so go on learning and may come back. The masks may be computed from
    the parameters in the same program, and get no gradient:
    `masked_params(params, topk_masks(magnitude_scores(params), 0.9))` is straight-through magnitude
    pruning.

    Args:
      params: any pytree of arrays, dense.
      masks: a tree of booleans like `params`; each broadcasts against its parameter.

    Returns:
      Parameters to run the model with.

    Raises:
      ValueError: the trees differ, or a mask does not broadcast to its parameter.
      TypeError: a mask is not boolean.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params, masks = {"w": jnp.array([2.0, 1.0])}, {"w": jnp.array([True, False])}
      >>> masked_params(params, masks)
      {'w': Array([2., 0.], dtype=float32)}
      >>> jax.grad(lambda p: jnp.sum(3 * masked_params(p, masks)["w"]))(params)
      {'w': Array([3., 3.], dtype=float32)}

    References:
      Guo et al., "Dynamic Network Surgery for Efficient DNNs", 2016,
      https://arxiv.org/abs/1608.04493, equation 3. Bengio et al., "Estimating or Propagating
      Gradients Through Stochastic Neurons", 2013, https://arxiv.org/abs/1308.3432.
    """
    masked = apply_masks(jax.lax.stop_gradient(params), jax.lax.stop_gradient(masks))
    return jax.tree.map(
        lambda weights, shown: _behind(weights, shown) if is_floating(weights) else shown,
        params,
        masked,
    )


def masked_out_penalty(params: Any, masks: Any) -> jax.Array:
    """Penalise removed weights, `1/2 sum ((1 - M) W)^2`, so that masks settle.

    Added to a loss at `masked_params`, `decay` times this gives the gradient
    `dL/d(W * M) + decay (1 - M) W`, the sparse-refined straight-through estimator (SR-STE); the
    paper's decay is 2e-4.

    Args:
      params: any pytree of arrays, dense.
      masks: a tree of booleans like `params`; each broadcasts against its parameter.

    Returns:
      A float32 scalar. Leaves that are not floating-point arrays do not count.

    Raises:
      ValueError: the trees differ, or a mask does not broadcast to its parameter.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params, masks = {"w": jnp.array([2.0, 4.0])}, {"w": jnp.array([True, False])}
      >>> float(masked_out_penalty(params, masks))
      8.0
      >>> jax.grad(masked_out_penalty)(params, masks)
      {'w': Array([0., 4.], dtype=float32)}

    References:
      Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", 2021,
      https://arxiv.org/abs/2102.04010, equation 9.
    """
    masks = jax.lax.stop_gradient(masks)
    jax.eval_shape(apply_masks, params, masks)
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(masks), strict=True)
    squares = [
        jnp.sum(jnp.square(jnp.where(mask, jnp.zeros((), leaf.dtype), leaf).astype(jnp.float32)))
        for leaf, mask in pairs
        if is_floating(leaf)
    ]
    return 0.5 * sum(squares, jnp.zeros(()))
