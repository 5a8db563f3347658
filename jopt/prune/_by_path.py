"""What is learned beside the parameters: one entry a pruned leaf, in a dict by path."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jopt._trees import Filter, broadcasts_to, flatten_with_paths, is_floating, select

Entries = Mapping[str, jax.Array]
Shape = Callable[[Any], tuple[int, ...]]


def one_each(leaf: Any) -> tuple[int, ...]:
    """Return the shape of one value a weight.

    Example:
      >>> import jax.numpy as jnp
      >>> one_each(jnp.ones((3, 4)))
      (3, 4)
    """
    return leaf.shape


def one_per_layer(leaf: Any) -> tuple[int, ...]:
    """Return the shape of a single value for a whole leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> one_per_layer(jnp.ones((3, 4)))
      ()
    """
    del leaf
    return ()


def one_per_output(leaf: Any) -> tuple[int, ...]:
    """Return the shape of one value an output channel, the last axis of a kernel.

    Example:
      >>> import jax.numpy as jnp
      >>> one_per_output(jnp.ones((3, 4)))
      (1, 4)
    """
    return (1,) * (leaf.ndim - 1) + leaf.shape[-1:]


def one_per_input(leaf: Any) -> tuple[int, ...]:
    """Return the shape of one value an input channel, the last axis but one of a kernel.

    Example:
      >>> import jax.numpy as jnp
      >>> one_per_input(jnp.ones((3, 4)))
      (3, 1)
    """
    return (1,) * (leaf.ndim - 2) + leaf.shape[-2:-1] + (1,)


def init_entries(
    params: Any, where: Filter, shape: Shape, make: Callable[[int, tuple[int, ...], Any], jax.Array]
) -> dict[str, jax.Array]:
    """Make an entry `make(index, shape, dtype)` for each chosen leaf.

    Raises:
      ValueError: nothing was chosen, or a shape does not broadcast to its leaf.
      TypeError: a chosen leaf is not a floating-point array.

    Example:
      >>> import jax.numpy as jnp
      >>> init_entries({"a": jnp.ones((2, 3))}, ".*", one_per_output, lambda i, *of: jnp.zeros(*of))
      {'a': Array([[0., 0., 0.]], dtype=float32)}
    """
    paths, leaves, _ = flatten_with_paths(params)
    chosen = jax.tree.leaves(select(params, where))
    entries = {}
    for index, (path, leaf, take) in enumerate(zip(paths, leaves, chosen, strict=True)):
        if take:
            if not is_floating(leaf):
                raise TypeError(f"{path}: must be a floating-point array, not {leaf!r}.")
            made = make(index, tuple(shape(leaf)), leaf.dtype)
            _check_fits(path, leaf, made)
            entries[path] = made
    return entries


def _check_fits(path: str, leaf: Any, entry: Any) -> None:
    shape = jnp.shape(entry)
    if not broadcasts_to(shape, leaf.shape):
        raise ValueError(f"{path}: {shape} does not broadcast to a leaf of shape {leaf.shape}.")


def map_entries(
    function: Callable[[int, Any, jax.Array], Any],
    params: Any,
    entries: Entries,
    others: Callable[[Any], Any] = lambda leaf: leaf,
) -> Any:
    """Replace the leaves that have an entry by `function(index, leaf, entry)`.

    Args:
      function: what to apply.
      params: any pytree.
      entries: by path.
      others: what becomes of leaves without an entry.

    Raises:
      ValueError: an entry has no leaf, or does not broadcast to it.

    Example:
      >>> import jax.numpy as jnp
      >>> map_entries(
      ...     lambda i, leaf, entry: leaf * entry, {"a": jnp.ones(2)}, {"a": jnp.array(3.0)}
      ... )
      {'a': Array([3., 3.], dtype=float32)}
    """
    paths, leaves, treedef = flatten_with_paths(params)
    missing = sorted(set(entries) - set(paths))
    if missing:
        raise ValueError(f"{missing[0]!r} is no path of params; the paths are {paths[:20]}.")
    made = []
    for index, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
        if path in entries:
            _check_fits(path, leaf, entries[path])
            made.append(function(index, leaf, entries[path]))
        else:
            made.append(others(leaf))
    return jax.tree.unflatten(treedef, made)


def masks_of(keep: Callable[[Any, jax.Array], jax.Array], params: Any, entries: Entries) -> Any:
    """Return masks: `keep(leaf, entry)` where there is an entry, a scalar True elsewhere.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"a": jnp.ones(2), "b": jnp.ones(2)}
      >>> masks_of(lambda leaf, entry: leaf > entry, params, {"a": jnp.array([0.0, 2.0])})
      {'a': Array([ True, False], dtype=bool), 'b': Array(True, dtype=bool)}
    """
    return map_entries(
        lambda index, leaf, entry: keep(leaf, entry), params, entries, lambda leaf: jnp.array(True)
    )


def weights_per_entry(leaf: Any, entry: jax.Array) -> int:
    """Count the weights that share one value of an entry.

    Example:
      >>> import jax.numpy as jnp
      >>> weights_per_entry(jnp.ones((3, 4)), jnp.ones((1, 4)))
      3
    """
    return math.prod(leaf.shape) // max(1, math.prod(jnp.shape(entry)))
