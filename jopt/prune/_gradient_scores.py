"""Scores from first gradients: what the loss would lose, to first order, without a weight."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jopt.prune._scores import map_products, split_floating

Loss = Callable[..., jax.Array]


def saliency_scores(params: Any, gradients: Any) -> Any:
    """Score every weight by how much the loss changes without it, to first order: `|w g|`.

    Args:
      params: any pytree of arrays.
      gradients: a tree of the same structure, of the loss at these parameters.

    Returns:
      A tree of scores in float32 or wider; infinity for leaves that are not floating-point.

    Raises:
      ValueError: the trees differ in paths or shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> saliency_scores({"w": jnp.array([2.0, -1.0])}, {"w": jnp.array([0.5, 3.0])})
      {'w': Array([1., 3.], dtype=float32)}

    References:
      Mozer, Smolensky, "Skeletonization", 1988,
      https://papers.nips.cc/paper/1988/hash/07e1cd7dca89a1678042477183b7ac3f-Abstract.html.
    """
    return map_products(lambda w, g: jnp.abs(w * g), params, gradients)


@partial(jax.jit, static_argnames="loss")
def snip_scores(loss: Loss, params: Any, *args: Any) -> Any:
    """Score every connection by its share of all connections' sensitivity, at initialisation.

    `s_j = |w_j dL/dw_j| / sum over all leaves of |w dL/dw|`; all 0 where the sum is 0. The
    derivative for a gate c_j on weight j, at c = 1, is `w_j dL/dw_j`. Dividing by the sum does not
    change the order; it makes scores of several batches of equal weight, if they are added.

    Args:
      loss: `(params, *args) -> scalar`. Compiled once for each such function: define it once.
      params: any pytree of arrays.
      *args: the rest of loss's arguments, such as a batch of inputs and labels.

    Returns:
      A tree of scores in float32 or wider, which sum to 1; infinity for leaves that are not
      floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> def loss(params, x):
      ...     return jnp.sum(params["w"] * x)
      >>> snip_scores(loss, {"w": jnp.array([1.0, -2.0])}, jnp.array([2.0, 3.0]))
      {'w': Array([0.25, 0.75], dtype=float32)}

    References:
      Lee, Ajanthan, Torr, "SNIP: Single-shot Network Pruning based on Connection Sensitivity",
      2019, https://arxiv.org/abs/1810.02340, section 4.
    """
    leaves, rebuild = split_floating(params)
    gradients = jax.grad(lambda leaves: loss(rebuild(leaves), *args))(leaves)
    scores = saliency_scores(params, rebuild(gradients))
    sums = [jnp.sum(score).astype(jnp.float32) for score in split_floating(scores)[0]]
    total = jnp.sum(jnp.stack(sums)) if sums else jnp.ones(())
    safe = jnp.where(total > 0, total, 1)
    return map_products(lambda score: score / safe.astype(score.dtype), scores)


@partial(jax.jit, static_argnames="loss")
def grasp_scores(loss: Loss, params: Any, *args: Any) -> Any:
    """Score every weight by how much gradient flow is lost without it, at initialisation.

    Taking weight j away changes the squared norm of the gradient by `-2 w_j (H g)_j`, to first
    order, with g the gradient and H the Hessian of the loss. The paper's `S = -w (H g)` is high
    where removal makes the gradient larger, and it removes the highest; the score here is its
    negative, `w (H g)`, so that the higher is kept. Scores may have either sign.

    The paper divides the logits by a temperature of 200 before the loss and uses ten examples of
    each class: both are matters of `loss` and its arguments. The product with the Hessian is the
    derivative of the gradient along itself: memory and time of a few gradients.

    Args:
      loss: `(params, *args) -> scalar`. Compiled once for each such function: define it once.
      params: any pytree of arrays.
      *args: the rest of loss's arguments, such as a batch of inputs and labels.

    Returns:
      A tree of scores in float32 or wider; infinity for leaves that are not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> def loss(params):  # g = (2 w0, -w1), H = diag(2, -1)
      ...     return params["w"][0] ** 2 - params["w"][1] ** 2 / 2
      >>> grasp_scores(loss, {"w": jnp.array([1.0, 3.0])})
      {'w': Array([4., 9.], dtype=float32)}

    References:
      Wang, Zhang, Grosse, "Picking Winning Tickets Before Training by Preserving Gradient Flow",
      2020, https://arxiv.org/abs/2002.07376, algorithm 1.
    """
    leaves, rebuild = split_floating(params)
    gradient = jax.grad(lambda leaves: loss(rebuild(leaves), *args))
    gradients, along = jax.linearize(gradient, leaves)
    return map_products(lambda w, hg: w * hg, params, rebuild(along(gradients)))


def taylor_scores(
    params: Any,
    gradients: Any,
    axis: int = -1,
    measure: Callable[[jax.Array], jax.Array] = jnp.square,
) -> Any:
    """Score every filter by how much the loss changes without the whole of it, to first order.

    `(sum over the filter of g w)^2`, a filter being all weights of one index along `axis`. The
    products are summed before they are squared: those of one filter may cancel. The paper takes the
    mean of this score over batches; the mean of scores of several gradients does the same.

    Args:
      params: any pytree of arrays.
      gradients: a tree of the same structure, of the loss at these parameters.
      axis: the axis of filters; -1, the outputs, for kernels of dense layers and convolutions.
      measure: what is made of the sum: `jnp.square`, or `jnp.abs` as in the paper of 2017 (which
        sums over activations instead of weights).

    Returns:
      A tree of scores in float32 or wider. Those of a leaf of two or more axes have length 1 along
      all axes but `axis`, so that masks made of them broadcast; those of other leaves have the
      leaf's shape. Infinity for leaves that are not floating-point.

    Raises:
      ValueError: the trees differ in paths or shapes, or a leaf of two or more axes has no such
        axis.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.array([[1.0, 1.0], [2.0, 2.0]])}
      >>> taylor_scores(params, {"kernel": jnp.array([[1.0, 2.0], [1.0, -1.0]])})
      {'kernel': Array([[9., 0.]], dtype=float32)}

    References:
      Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019,
      https://arxiv.org/abs/1906.10771, section 3.1.
      Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference",
      2017, https://arxiv.org/abs/1611.06440, section 2.2.
    """
    return map_products(lambda w, g: measure(sum_filters(w * g, axis)), params, gradients)


def sum_filters(values: jax.Array, axis: int) -> jax.Array:
    """Sum over all axes but one, kept with length 1; arrays of fewer than two axes stay.

    Raises:
      ValueError: there is no such axis.

    Example:
      >>> import jax.numpy as jnp
      >>> sum_filters(jnp.ones((3, 2)), -1)
      Array([[3., 3.]], dtype=float32)
    """
    if values.ndim < 2:
        return values
    return jnp.sum(values, other_axes(values.ndim, axis), keepdims=True)


def other_axes(ndim: int, axis: int) -> tuple[int, ...]:
    """Return all axes but one.

    Raises:
      ValueError: there is no such axis.

    Example:
      >>> other_axes(4, -1), other_axes(3, 0)
      ((0, 1, 2), (1, 2))
    """
    if not -ndim <= axis < ndim:
        raise ValueError(
            f"axis must lie in [{-ndim}, {ndim}) for a leaf of {ndim} axes, not {axis}."
        )
    return tuple(each for each in range(ndim) if each != axis % ndim)
