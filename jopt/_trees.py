"""Paths into a pytree, and the filters that choose leaves by them.

A path is the keys from the root joined by slashes, `"block_0/mlp/kernel"`, the same for a linen
dict, an `nnx.State` and any other pytree (the trailing `value` of an nnx variable is left out).
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jopt._leaves import is_compressed

Filter = str | Callable[[str, Any], bool]

_PATHS_SHOWN = 20


def path_string(path: tuple[Any, ...]) -> str:
    """Write a key path as text, slashes between the keys.

    Example:
      >>> import jax
      >>> path_string((jax.tree_util.DictKey("dense"), jax.tree_util.DictKey("kernel")))
      'dense/kernel'
    """
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten_with_paths(tree: Any) -> tuple[list[str], list[Any], Any]:
    """Flatten a tree, compressed leaves kept whole.

    Returns:
      The paths, the leaves in the same order, and the tree structure that
      `jax.tree.unflatten` takes.

    Example:
      >>> flatten_with_paths({"a": 1, "b": [2]})[:2]
      (['a', 'b/0'], [1, 2])
    """
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_compressed)
    return [path_string(path) for path, _ in pairs], [leaf for _, leaf in pairs], treedef


def is_floating(leaf: Any) -> bool:
    """Return whether `leaf` is an uncompressed floating-point array.

    Example:
      >>> import jax.numpy as jnp
      >>> is_floating(jnp.ones(3)), is_floating(jnp.ones(3, int))
      (True, False)
    """
    return (
        not is_compressed(leaf)
        and hasattr(leaf, "dtype")
        and jnp.issubdtype(leaf.dtype, jnp.floating)
    )


def broadcasts_to(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Return whether a scalar, or one value for each index or for whole axes, fits an array.

    Example:
      >>> broadcasts_to((1, 4), (3, 4)), broadcasts_to((4,), (3, 4)), broadcasts_to((), (3, 4))
      (True, False, True)
    """
    if len(shape) != len(target):
        return shape == ()
    return all(n in (1, size) for n, size in zip(shape, target, strict=True))


def is_kernel(path: str, leaf: Any) -> bool:
    """Return whether a leaf is a floating-point array of two or more axes: the default filter.

    These are the kernels of dense and convolution layers and the tables of embeddings. Parameters
    of normalisation have one axis, and so have biases; those of attention have one for the heads as
    well, so that what is called `bias` is none, whatever its axes.

    Example:
      >>> import jax.numpy as jnp
      >>> is_kernel("dense/kernel", jnp.ones((2, 2))), is_kernel("dense/bias", jnp.ones(2))
      (True, False)
      >>> is_kernel("attention/query/bias", jnp.ones((12, 64)))
      False
    """
    return is_floating(leaf) and leaf.ndim >= 2 and path.rpartition("/")[2] != "bias"


def _matches(where: Filter) -> Callable[[str, Any], bool]:
    if isinstance(where, str):
        try:
            pattern = re.compile(where)
        except re.error as error:
            raise ValueError(f"where={where!r} is not a regular expression: {error}.") from None
        return lambda path, leaf: pattern.fullmatch(path) is not None
    if callable(where):
        return where
    raise TypeError(f"where must be a regex or a predicate (path, leaf) -> bool, not {where!r}.")


def select(tree: Any, where: Filter = is_kernel) -> Any:
    """Choose leaves of a tree by path or by predicate.

    Args:
      tree: any pytree; compressed leaves count as leaves.
      where: a regular expression that must match the whole path, or a predicate
        `(path, leaf) -> bool`.

    Returns:
      The tree with a Python bool at every leaf.

    Raises:
      ValueError: nothing was chosen, and the message lists the paths that there are; or the text
        is not a regular expression.
      TypeError: `where` is neither text nor callable.

    Example:
      >>> select({"dense": {"kernel": 1.0, "bias": 2.0}}, ".*/kernel")
      {'dense': {'bias': False, 'kernel': True}}
    """
    paths, leaves, treedef = flatten_with_paths(tree)
    matches = _matches(where)
    chosen = [bool(matches(path, leaf)) for path, leaf in zip(paths, leaves, strict=True)]
    if not any(chosen):
        shown = ", ".join(repr(path) for path in paths[:_PATHS_SHOWN]) or "none: the tree is empty"
        more = f" and {len(paths) - _PATHS_SHOWN} more" if len(paths) > _PATHS_SHOWN else ""
        name = repr(where) if isinstance(where, str) else getattr(where, "__name__", repr(where))
        raise ValueError(f"where={name} matches no leaf; the paths are {shown}{more}.")
    return jax.tree.unflatten(treedef, chosen)


def map_selected(function: Callable[[str, Any], Any], tree: Any, where: Filter = is_kernel) -> Any:
    """Replace the chosen leaves by `function(path, leaf)` and keep the others.

    Args:
      function: what to apply; it gets the path and the leaf.
      tree: any pytree.
      where: as for `select`.

    Returns:
      A tree of the same structure, in which a chosen leaf may have become a compressed leaf.

    Raises:
      ValueError: nothing was chosen.

    Example:
      >>> map_selected(lambda path, leaf: -leaf, {"a": 1.0, "b": 2.0}, "a")
      {'a': -1.0, 'b': 2.0}
    """
    paths, leaves, treedef = flatten_with_paths(tree)
    chosen = jax.tree.leaves(select(tree, where))
    replaced = [
        function(path, leaf) if take else leaf
        for path, leaf, take in zip(paths, leaves, chosen, strict=True)
    ]
    return jax.tree.unflatten(treedef, replaced)


def naming_leaf(function: Callable[..., Any], *rest: Any) -> Callable[..., Any]:
    """Return `(path, leaf, *more) -> function(leaf, *more, *rest)` whose errors name the leaf.

    Raises:
      TypeError: when called, for a leaf that is compressed already.

    Example:
      >>> naming_leaf(round, 1)("dense/kernel", 0.25)
      0.2
    """

    def apply(path: str, leaf: Any, *more: Any) -> Any:
        if is_compressed(leaf):
            raise TypeError(f"{path}: the leaf is compressed already ({type(leaf).__name__}).")
        try:
            return function(leaf, *more, *rest)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from None

    return apply
