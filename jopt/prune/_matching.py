"""Find, in any optimizer's state, the parts that are trees like the parameters."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from jopt._leaves import is_compressed

Path = tuple[Any, ...]


def _is_whole(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode) or is_compressed(node)


def entries(tree: Any) -> tuple[list[tuple[Path, Any]], Any]:
    """Flatten a tree with key paths, compressed leaves and masked nodes kept whole."""
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_whole)


def _is_like(found: list[tuple[Path, Any]], paths: set[Path]) -> bool:
    """Return whether the entries lie at these paths; a `MaskedNode` may stand for a subtree."""
    seen: set[Path] = set()
    for path, leaf in found:
        if path in paths:
            seen.add(path)
        elif not isinstance(leaf, optax.MaskedNode):
            return False
        else:
            seen |= {each for each in paths if each[: len(path)] == path}
    return seen == paths


def map_matching(
    function: Callable[[Path, Any], Any],
    tree: Any,
    params: Any,
    skip: Callable[[Any], bool] = lambda node: False,
) -> Any:
    """Replace the leaves of every part of a tree that is a tree like the parameters.

    A `MaskedNode`, which stands for what a transform does not see, stays.

    Args:
      function: `(key path within the part, leaf) -> leaf`.
      tree: an optimizer's state, or anything else; what is no such part stays as it is.
      params: the parameters; only their structure matters.
      skip: says of a node that it is to be left alone with all that is in it.

    Returns:
      A tree of the same structure.

    Example:
      >>> import jax.numpy as jnp
      >>> state = (jnp.int32(3), {"w": jnp.ones(2)})
      >>> map_matching(lambda path, leaf: -leaf, state, {"w": 0})
      (Array(3, dtype=int32), {'w': Array([-1., -1.], dtype=float32)})
    """
    paths = {path for path, _ in entries(params)[0]}

    def replaced(path: Path, leaf: Any) -> Any:
        masked = path not in paths or isinstance(leaf, optax.MaskedNode)
        return leaf if masked else function(path, leaf)

    def visit(node: Any) -> Any:
        if skip(node):
            return node
        found, treedef = entries(node)
        if _is_like(found, paths):
            return jax.tree.unflatten(treedef, [replaced(path, leaf) for path, leaf in found])
        children, treedef = jax.tree.flatten(node, is_leaf=lambda each: each is not node)
        if any(child is node for child in children):  # a leaf
            return node
        return jax.tree.unflatten(treedef, [visit(child) for child in children])

    return visit(tree)
