"""Scores: how much each weight matters. A higher score keeps a weight longer.

Every function of scores returns a tree like the parameters. A leaf that is not a floating-point
array (integers, compressed leaves) gets the scalar score infinity and never loses. Products and
squares of weights leave the range of float16 and become ties in bfloat16, so that scores made of
them are computed and returned in float32, or in the leaf's dtype where that is wider.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jopt._arrays import working_dtype
from jopt._trees import flatten_with_paths, is_floating


def map_floating(function: Callable[..., Any], params: Any, *trees: Any) -> Any:
    """Apply `function(leaf, *others)` to floating leaves; the rest get a score that never loses.

    Args:
      function: what to apply to a leaf and to what lies at its place in the other trees.
      params: any pytree; compressed leaves count as leaves.
      *trees: trees of the same paths.

    Returns:
      A tree like params.

    Raises:
      ValueError: the trees have different paths.

    Example:
      >>> import jax.numpy as jnp
      >>> map_floating(lambda leaf: leaf.size, {"ids": jnp.ones(3, int), "w": jnp.ones(2)})
      {'ids': inf, 'w': 2}
    """
    paths, leaves, treedef = flatten_with_paths(params)
    columns = []
    for tree in trees:
        others, values, _ = flatten_with_paths(tree)
        if others != paths:
            only = sorted(set(paths) ^ set(others)) or [f"{paths} and {others}"]
            raise ValueError(
                f"params and what was gathered for them are different trees; they differ at "
                f"{only[:5]}."
            )
        columns.append(values)
    rows = zip(leaves, *columns, strict=True)
    return jax.tree.unflatten(
        treedef, [function(*row) if is_floating(row[0]) else jnp.inf for row in rows]
    )


def map_products(function: Callable[..., Any], params: Any, *trees: Any) -> Any:
    """Apply `map_floating` in the working dtype: float32, or the leaf's where that is wider.

    Args:
      function: as for `map_floating`.
      params: as for `map_floating`.
      *trees: as for `map_floating`; their leaves have the shapes of the parameters.

    Returns:
      A tree like params.

    Raises:
      ValueError: the trees have different paths, or leaves of other shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> weights = {"w": jnp.array([2.0], jnp.float16)}
      >>> map_products(lambda w, g: w * g, weights, {"w": jnp.array([3.0], jnp.float16)})
      {'w': Array([6.], dtype=float32)}
    """

    def wide(leaf: jax.Array, *others: jax.Array) -> Any:
        for other in others:
            if jnp.shape(other) != leaf.shape:
                raise ValueError(
                    f"what was gathered for a leaf of shape {leaf.shape} must have its shape, not "
                    f"{jnp.shape(other)}."
                )
        exact = working_dtype(leaf.dtype)
        return function(*(jnp.asarray(each).astype(exact) for each in (leaf, *others)))

    return map_floating(wide, params, *trees)


def split_floating(params: Any) -> tuple[list[jax.Array], Callable[[list[jax.Array]], Any]]:
    """Take the floating leaves out of a tree, to differentiate by them alone.

    Returns:
      The leaves, and the function that puts others in their place.

    Example:
      >>> import jax.numpy as jnp
      >>> leaves, rebuild = split_floating({"ids": 7, "w": jnp.ones(2)})
      >>> len(leaves), rebuild([5.0])
      (1, {'ids': 7, 'w': 5.0})
    """
    _, leaves, treedef = flatten_with_paths(params)
    taken = [is_floating(leaf) for leaf in leaves]

    def rebuild(replaced: list[jax.Array]) -> Any:
        remaining = iter(replaced)
        each = zip(leaves, taken, strict=True)
        return jax.tree.unflatten(
            treedef, [next(remaining) if take else leaf for leaf, take in each]
        )

    return [leaf for leaf, take in zip(leaves, taken, strict=True) if take], rebuild


def magnitude_scores(params: Any) -> Any:
    """Score every weight by its absolute value, `|w|`.

    Args:
      params: any pytree of arrays.

    Returns:
      A tree of the same structure with scores of the leaf's own dtype. A leaf that is not a
      floating-point array (integers, compressed leaves) gets the scalar score infinity.

    Example:
      >>> import jax.numpy as jnp
      >>> magnitude_scores({"kernel": jnp.array([[-2.0, 1.0]])})
      {'kernel': Array([[2., 1.]], dtype=float32)}

    References:
      Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015,
      https://arxiv.org/abs/1506.02626.
    """
    return map_floating(jnp.abs, params)


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
    _, leaves, treedef = flatten_with_paths(params)
    indices = jax.tree.unflatten(treedef, range(len(leaves)))
    return map_floating(
        lambda leaf, index: jax.random.uniform(jax.random.fold_in(key, index), leaf.shape),
        params,
        indices,
    )
