"""Scores: how much each weight matters. A higher score keeps a weight longer."""

from typing import Any

import jax
import jax.numpy as jnp

from jopt._trees import flatten_with_paths, is_floating


def _map_floating(function: Any, params: Any) -> Any:
    """Apply `function(index, leaf)` to floating leaves; others get one score that never loses."""
    _, leaves, treedef = flatten_with_paths(params)
    scores = [
        function(index, leaf) if is_floating(leaf) else jnp.inf for index, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(treedef, scores)


def magnitude_scores(params: Any) -> Any:
    """Score every weight by its absolute value, `|w|`.

    Args:
      params: any pytree of arrays.

    Returns:
      A tree of the same structure with float scores. A leaf that is not a floating-point array
      (integers, compressed leaves) gets the scalar score infinity.

    Example:
      >>> import jax.numpy as jnp
      >>> magnitude_scores({"kernel": jnp.array([[-2.0, 1.0]])})
      {'kernel': Array([[2., 1.]], dtype=float32)}

    References:
      Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015,
      https://arxiv.org/abs/1506.02626.
    """
    return _map_floating(lambda index, leaf: jnp.abs(leaf), params)


def random_scores(key: jax.Array, params: Any) -> Any:
    """Score every weight by chance, uniformly in [0, 1): the baseline that others must beat.

    Args:
      key: a key from `jax.random.key`.
      params: any pytree of arrays; only shapes matter.

    Returns:
      A tree of the same structure with float32 scores, independent between leaves. A leaf that is
      not a floating-point array gets the scalar score infinity.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> random_scores(jax.random.key(0), {"kernel": jnp.ones((2, 3))})["kernel"].shape
      (2, 3)
    """
    return _map_floating(
        lambda index, leaf: jax.random.uniform(jax.random.fold_in(key, index), leaf.shape), params
    )
