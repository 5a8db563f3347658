"""Dynamic network surgery: weights are cut off, and spliced in again if they grow back."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jopt._arrays import working_dtype
from jopt._trees import Filter, flatten_with_paths, is_kernel, map_selected, select
from jopt.prune._transforms import need_params


class SurgeryState(NamedTuple):
    """State of `network_surgery`.

    Attributes:
      count: updates so far.
      masks: True keeps; full-shape for the chosen leaves, a scalar True for the others.
      thresholds: by leaf, `max(mean + c deviation, 0)` as it was at `init`; 0 for the others.
    """

    count: jax.Array
    masks: Any
    thresholds: Any


def surgery_threshold(weights: jax.Array, multiplier: ArrayLike) -> jax.Array:
    """Return the magnitude around which surgery cuts, `max(mean|W| + c std|W|, 0)`.

    Args:
      weights: a floating-point array.
      multiplier: c, any real number; more cuts more.

    Returns:
      A scalar of the dtype of the weights.

    Example:
      >>> import jax.numpy as jnp
      >>> surgery_threshold(jnp.array([1.0, -3.0]), 0.5)
      Array(2.5, dtype=float32)

    References:
      Guo et al., "Dynamic Network Surgery for Efficient DNNs", 2016,
      https://arxiv.org/abs/1608.04493.
    """
    size = jnp.abs(weights.astype(working_dtype(weights.dtype)))
    level = size.mean() + jnp.asarray(multiplier, size.dtype) * size.std()
    return jnp.maximum(level, 0).astype(weights.dtype)


def surgery_mask(weights: jax.Array, mask: jax.Array, threshold: jax.Array) -> jax.Array:
    """Cut small weights off, splice large ones in, and leave those between as they are.

    `M' = 0 if |W| < a, 1 if |W| >= b, else M`, with `a = 0.9 threshold` and `b = 1.1 threshold`.

    Args:
      weights: the dense weights, removed ones too.
      mask: boolean, of the same shape, True keeps.
      threshold: a scalar, at least 0; if it is 0, nothing is cut.

    Returns:
      The new mask.

    Example:
      >>> import jax.numpy as jnp
      >>> weights = jnp.array([0.5, 1.0, -1.0, 2.0])
      >>> surgery_mask(weights, jnp.array([True, True, False, False]), jnp.array(1.0)).tolist()
      [False, True, False, True]

    References:
      Guo et al., "Dynamic Network Surgery for Efficient DNNs", 2016,
      https://arxiv.org/abs/1608.04493, equation 4; the factors are those of the authors' code.
    """
    size = jnp.abs(weights)
    return (size >= 1.1 * threshold) | (mask & (size >= 0.9 * threshold))


def inverse_decay(rate: float = 1e-4, power: float = 1.0) -> optax.Schedule:
    """Return the probability `(1 + rate t)^-power` of surgery at update t.

    Args:
      rate: gamma, 0 or more.
      power: 0 or more.

    Returns:
      A schedule, from updates to probability.

    Raises:
      ValueError: `rate` or `power` is negative.

    Example:
      >>> float(inverse_decay(0.5)(2))
      0.5
    """
    if rate < 0 or power < 0:
        raise ValueError(f"rate and power must be 0 or more, not {rate!r} and {power!r}.")
    return lambda count: (1 + rate * jnp.asarray(count, jnp.float32)) ** -power


def network_surgery(
    key: jax.Array,
    multiplier: float | Callable[[str, Any], float],
    probability: optax.Schedule = inverse_decay(),  # noqa: B008
    where: Filter = is_kernel,
) -> optax.GradientTransformation:
    """Update masks beside dense weights, which all go on learning.

    With probability `probability(t)`, drawn for each leaf, update t takes the mask of the leaf anew
    by `surgery_mask` from the weights before the update. The updates pass through unchanged: train
    with gradients at `masked_params(params, current_masks(state))`, and in the end prune with
    `apply_masks(params, current_masks(state))`. The threshold is taken from the weights at `init`,
    which are best trained ones; the paper says only that it comes from their mean and variance.

    Args:
      key: a key from `jax.random.key`; update t uses `fold_in(key, t)`.
      multiplier: c of `surgery_threshold`, or a function of path and leaf that gives it.
      probability: from updates to probability, falling; 0 ends the surgery.
      where: which leaves, a regex on the path or a predicate; by default
        those that `is_kernel` takes.

    Returns:
      An optax transform, at any place of a chain; its state is a `SurgeryState`.

    Raises:
      ValueError: the filter matches nothing, or `update` is called without parameters.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jopt.prune import current_masks, masked_params
      >>> tx = optax.chain(network_surgery(jax.random.key(0), 0.0), optax.sgd(1.0))
      >>> params = {"w": jnp.array([[1.0, -3.0]])}
      >>> state = tx.init(params)
      >>> loss = lambda params, masks: jnp.sum(masked_params(params, masks)["w"])
      >>> for _ in range(2):
      ...     gradients = jax.grad(loss)(params, current_masks(state))
      ...     updates, state = tx.update(gradients, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> params["w"].tolist(), current_masks(state)["w"].tolist()
      ([[-1.0, -5.0]], [[False, True]])

    References:
      Guo et al., "Dynamic Network Surgery for Efficient DNNs", 2016,
      https://arxiv.org/abs/1608.04493, algorithm 1.
    """

    def threshold(path: str, leaf: Any) -> jax.Array:
        return surgery_threshold(
            leaf, multiplier(path, leaf) if callable(multiplier) else multiplier
        )

    def init(params: Any) -> SurgeryState:
        chosen = select(params, where)
        masks = jax.tree.map(
            lambda take, leaf: jnp.ones(leaf.shape if take else (), jnp.bool_), chosen, params
        )
        levels = map_selected(threshold, params, where)
        levels = jax.tree.map(lambda take, level: level if take else jnp.zeros(()), chosen, levels)
        return SurgeryState(jnp.zeros((), jnp.int32), masks, levels)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        need_params(params, "network_surgery")
        chance = jnp.asarray(probability(state.count), jnp.float32)
        _, weights, treedef = flatten_with_paths(params)
        draws = jax.random.uniform(jax.random.fold_in(key, state.count), (len(weights),))
        masks = [
            jnp.where(draw < chance, surgery_mask(leaf, mask, level), mask) if mask.ndim else mask
            for leaf, mask, level, draw in zip(
                weights,
                treedef.flatten_up_to(state.masks),
                treedef.flatten_up_to(state.thresholds),
                draws,
                strict=True,
            )
        ]
        count = jnp.asarray(optax.safe_increment(state.count))
        masks = jax.tree.unflatten(treedef, masks)
        return updates, SurgeryState(count, masks, state.thresholds)

    return optax.GradientTransformation(init, update)
