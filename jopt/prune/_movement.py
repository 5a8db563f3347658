"""Movement pruning with scores that are trained along with the weights."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jopt._arrays import working_dtype
from jopt._trees import Filter, flatten_with_paths, is_kernel
from jopt.prune._masks import scored, topk_masks


def movement_params(
    params: Any,
    scores: Any,
    level: float | jax.Array,
    select: Callable[[Any, Any], Any] = topk_masks,
) -> Any:
    """Mask parameters by scores that are trained along with them.

    `w' = w m(S)`, with gradients `dL/dw = m dL/dw'` and, as if m were S itself, `dL/dS = w dL/dw'`.
    Scores of pruned weights go on moving, so that these may come back. Start scores at zero and let
    the optimizer train `(params, scores)`; a descent on S adds up `-w dL/dw'`, which is movement.

    Args:
      params: any pytree of arrays.
      scores: a tree of the same structure, floating-point, of the leaves' shapes.
      level: what `select` takes: the sparsity for `topk_masks` (hard movement) and
        `global_topk_masks`, the threshold for `soft_movement_masks`. It may follow a schedule.
      select: `(scores, level) -> masks`. A leaf whose mask is a scalar is left alone.

    Returns:
      The tree with zeros where masks are False.

    Raises:
      ValueError: the trees differ, or as `select` raises.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params, scores = {"k": jnp.array([[5.0, 3.0]])}, {"k": jnp.array([[0.1, 0.2]])}
      >>> movement_params(params, scores, 0.5)
      {'k': Array([[0., 3.]], dtype=float32)}
      >>> loss = lambda params, scores: movement_params(params, scores, 0.5)["k"].sum()
      >>> jax.grad(loss, argnums=(0, 1))(params, scores)
      ({'k': Array([[0., 1.]], dtype=float32)}, {'k': Array([[5., 3.]], dtype=float32)})

    References:
      Sanh, Wolf, Rush, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", 2020,
      https://arxiv.org/abs/2005.07683, section 4.
    """
    masks = select(scores, level)

    def masked(leaf: jax.Array, mask: jax.Array, score: jax.Array) -> jax.Array:
        if jnp.ndim(mask) == 0:
            return leaf
        # The difference is exactly 0, but its derivative is 1: straight through the mask.
        gate = mask.astype(leaf.dtype) + (score - jax.lax.stop_gradient(score)).astype(leaf.dtype)
        return leaf * gate

    paths, leaves, treedef = flatten_with_paths(params)
    columns = []
    for name, tree in (("masks", masks), ("scores", scores)):
        others, values, _ = flatten_with_paths(tree)
        if others != paths:
            only = sorted(set(paths) ^ set(others)) or [f"{paths} and {others}"]
            raise ValueError(f"{name} and params are different trees; they differ at {only[:5]}.")
        columns.append(values)
    return jax.tree.unflatten(treedef, map(masked, leaves, *columns))


def soft_movement_masks(
    scores: Any, threshold: float | jax.Array, where: Filter = is_kernel
) -> Any:
    """Keep what scores above one threshold for all leaves: `sigmoid(S) > threshold`.

    How much is pruned is up to the scores, pushed down by `movement_penalty`, and differs between
    leaves. The paper compares S itself; the sigmoid gives the threshold the range of the penalty.

    Args:
      scores: a tree of scores, higher keeps.
      threshold: between 0 and 1, a Python number or a traced scalar.
      where: which leaves to prune, a regex on the path or a predicate; by default
        those that `is_kernel` takes.

    Returns:
      A tree of booleans: full-shape masks for the chosen leaves, a scalar True for the others.

    Raises:
      ValueError: `threshold` is outside [0, 1], or the filter matches nothing.
      TypeError: a chosen score is not a floating-point array.

    Example:
      >>> import jax.numpy as jnp
      >>> soft_movement_masks({"k": jnp.array([[0.1, 0.0, -0.1]])}, 0.5)
      {'k': Array([[ True, False, False]], dtype=bool)}

    References:
      Sanh, Wolf, Rush, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", 2020,
      https://arxiv.org/abs/2005.07683, section 4.
    """
    if isinstance(threshold, (int, float)) and not 0 <= threshold <= 1:
        raise ValueError(f"threshold must lie in [0, 1], not {threshold!r}.")
    _, leaves, chosen, treedef = scored(scores, where)
    masks = [
        _sigmoid(leaf) > jnp.asarray(threshold, working_dtype(leaf.dtype))
        if take
        else jnp.array(True)
        for leaf, take in zip(leaves, chosen, strict=True)
    ]
    return jax.tree.unflatten(treedef, masks)


def _sigmoid(scores: jax.Array) -> jax.Array:
    return jax.nn.sigmoid(scores.astype(working_dtype(scores.dtype)))


def movement_penalty(scores: Any, where: Filter = is_kernel) -> jax.Array:
    """Return the mean of `sigmoid(S)` over all chosen scores: what soft movement adds to the loss.

    The paper takes the sum times a factor; the mean keeps the factor's size whatever the network's.

    Args:
      scores: a tree of scores.
      where: which leaves count; by default those that `is_kernel` takes.

    Returns:
      A float32 scalar between 0 and 1, with gradients.

    Raises:
      ValueError: the filter matches nothing.
      TypeError: a chosen score is not a floating-point array.

    Example:
      >>> import jax.numpy as jnp
      >>> float(movement_penalty({"k": jnp.zeros((2, 2)), "bias": jnp.ones(2)}))
      0.5

    References:
      Sanh, Wolf, Rush, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", 2020,
      https://arxiv.org/abs/2005.07683, section 4.
    """
    _, leaves, chosen, _ = scored(scores, where)
    taken = [leaf for leaf, take in zip(leaves, chosen, strict=True) if take]
    sums = [jnp.sum(_sigmoid(leaf)).astype(jnp.float32) for leaf in taken]
    return jnp.stack(sums).sum() / sum(leaf.size for leaf in taken)
