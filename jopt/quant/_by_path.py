"""Leaves of a tree by their paths: errors name them, and what is learned lies beside them."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jopt._trees import Filter, flatten_with_paths, is_floating, select

_PATHS_SHOWN = 20


@jax.jit
def _all_finite(arrays: list[jax.Array]) -> list[jax.Array]:
    return [jnp.all(jnp.isfinite(array)) for array in arrays]


def refuse_non_finite(params: Any, where: Filter) -> None:
    """Raise for NaN and infinity, which would spoil a whole block."""
    checked = {path: leaf for path, leaf in selected(params, where).items() if is_floating(leaf)}
    for path, is_finite in zip(checked, _all_finite(list(checked.values())), strict=True):
        try:
            spoiled = not is_finite
        except jax.errors.ConcretizationTypeError:  # under jit the values are not known
            return
        if spoiled:
            raise ValueError(f"{path}: values must be finite, but there is a NaN or an infinity.")


def selected(params: Any, where: Filter) -> dict[str, Any]:
    """Return the chosen leaves by path, in the order of the tree.

    Raises:
      ValueError: nothing was chosen.

    Example:
      >>> selected({"a": 1.0, "b": 2.0}, "b")
      {'b': 2.0}
    """
    paths, leaves, _ = flatten_with_paths(params)
    chosen = jax.tree.leaves(select(params, where))
    return {path: leaf for path, leaf, take in zip(paths, leaves, chosen, strict=True) if take}


def map_with(
    function: Callable[[str, Any, Any], Any], params: Any, entries: Mapping[str, Any], name: str
) -> Any:
    """Replace the leaves that have an entry by `function(path, leaf, entry)`.

    Args:
      function: what to apply.
      params: any pytree.
      entries: by path; `name` is what errors call them.
      name: of the argument that the entries came in.

    Raises:
      ValueError: there are no entries, or one has a path that is not in the tree.

    Example:
      >>> map_with(lambda path, leaf, entry: leaf * entry, {"a": 2, "b": 3}, {"b": 5}, "factors")
      {'a': 2, 'b': 15}
    """
    paths, leaves, treedef = flatten_with_paths(params)
    missing = [path for path in entries if path not in paths]
    if missing or not entries:
        shown = ", ".join(map(repr, paths[:_PATHS_SHOWN])) or "none: the tree is empty"
        wrong = repr(missing[0]) if missing else "empty: nothing"
        raise ValueError(f"{name}: {wrong} is no path of params; the paths are {shown}.")
    replaced = [
        function(path, leaf, entries[path]) if path in entries else leaf
        for path, leaf in zip(paths, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, replaced)


def in_both(name: str, entries: Mapping[str, Any]) -> Callable[[str, Any], bool]:
    """Return the filter of all entries and their leaves in `{"params": params, name: entries}`.

    Example:
      >>> chosen = in_both("steps", {"a": 1.0})
      >>> chosen("steps/a", 1.0), chosen("params/a", 1.0), chosen("params/b", 1.0)
      (True, True, False)
    """

    def chosen(path: str, leaf: Any) -> bool:
        del leaf
        root, _, rest = path.partition("/")
        return root == name or rest in entries

    return chosen
