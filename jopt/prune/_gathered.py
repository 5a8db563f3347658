"""Criteria that gather gradients while a network trains: movement, saliency, Fisher."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jopt._arrays import working_dtype
from jopt.prune._criterion import Criterion
from jopt.prune._fisher import fisher_scores
from jopt.prune._gradient_scores import saliency_scores
from jopt.prune._scores import map_floating, map_products


def _zeros(params: Any) -> Any:
    return map_floating(lambda leaf: jnp.zeros(leaf.shape, working_dtype(leaf.dtype)), params)


def movement() -> Criterion:
    """Make the criterion that follows whether weights move away from zero or towards it.

    `S = - sum over steps of w g`: a step of descent moves a weight by a multiple of -g, so that S
    rises while |w| grows. The paper's learning rate of scores is left out: a common factor does not
    change the order.

    A weight held at zero keeps its score, so with `gradual` it never comes back. In the paper it
    may: when a large weight that matters is removed by the noise of a few steps, the loss asks for
    it at once. Without that, this criterion removes just such weights, and a network that has
    converged can lose more than by random pruning. For the paper's method use `movement_params`;
    use this one where the scores of many steps are known before anything is removed.

    Returns:
      A `Criterion` whose state and scores are trees like the parameters, in float32 or wider;
      infinity for leaves that are not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> criterion, params = movement(), {"w": jnp.array([2.0, -1.0])}
      >>> state = criterion.init(params)
      >>> state = criterion.update(state, params, {"w": jnp.array([1.0, 3.0])})
      >>> criterion.score(state, params)
      {'w': Array([-2.,  3.], dtype=float32)}

    References:
      Sanh, Wolf, Rush, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", 2020,
      https://arxiv.org/abs/2005.07683, section 4.
    """

    def update(state: Any, params: Any, gradients: Any) -> Any:
        return map_products(lambda w, g, total: total - w * g, params, gradients, state)

    return Criterion(_zeros, update, lambda state, params: state)


def _running_mean(
    decay: float, of: Callable[[jax.Array], jax.Array], score: Callable[[Any, Any], Any]
) -> Criterion:
    if not 0 <= decay < 1:
        raise ValueError(f"decay must lie in [0, 1), not {decay!r}.")

    def update(state: Any, params: Any, gradients: Any) -> Any:
        def mean(w: jax.Array, g: jax.Array, old: jax.Array) -> jax.Array:
            del w
            return decay * old + (1 - decay) * of(g)

        return map_products(mean, params, gradients, state)

    return Criterion(_zeros, update, lambda state, params: score(params, state))


def saliency(decay: float = 0.99) -> Criterion:
    """Make the criterion `|w m|`, m the running mean of gradients: see `saliency_scores`.

    `m' = decay m + (1 - decay) g`, from 0. It is not divided by `1 - decay^t`, a factor that all
    scores have in common.

    Args:
      decay: the share of the old mean that is kept, in [0, 1); 0 takes the last gradient.

    Returns:
      A `Criterion`; its state is m.

    Raises:
      ValueError: decay is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> criterion, params = saliency(0.5), {"w": jnp.array([2.0])}
      >>> state = criterion.init(params)
      >>> for g in (4.0, -6.0):  # m = 2, then 1 - 3
      ...     state = criterion.update(state, params, {"w": jnp.array([g])})
      >>> criterion.score(state, params)
      {'w': Array([4.], dtype=float32)}
    """
    return _running_mean(decay, lambda g: g, saliency_scores)


def fisher(decay: float = 0.99) -> Criterion:
    """Make the criterion `w^2 v / 2`, v the running mean of squared gradients: see `fisher_scores`.

    `v' = decay v + (1 - decay) g^2`, from 0, g the gradient of a batch. It is not divided by
    `1 - decay^t`, a factor that all scores have in common. Near a minimum the square of a batch's
    mean gradient is about the mean square of single examples divided by the size of the batch;
    elsewhere the mean gradient counts too. `squared_gradients` takes single examples.

    Args:
      decay: the share of the old mean that is kept, in [0, 1); 0 takes the last gradient.

    Returns:
      A `Criterion`; its state is v.

    Raises:
      ValueError: decay is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> criterion, params = fisher(0.5), {"w": jnp.array([2.0])}
      >>> state = criterion.update(criterion.init(params), params, {"w": jnp.array([4.0])})
      >>> criterion.score(state, params)  # 2^2 * 8 / 2
      {'w': Array([16.], dtype=float32)}
    """
    return _running_mean(decay, jnp.square, fisher_scores)
