"""Trees as JSON: the containers and the small leaves of a pytree, in a few characters.

    null, true, 1, 0.5, "relu"     themselves: None and Python scalars
    {"kernel": ..., "bias": ...}   a dict with text keys
    []                             an array or compressed leaf: the next one of the file
    [0, ...]  [1, ...]             a list, a tuple
    [2, [keys], ...]               a dict with integer keys
    [3, "hex"]                     a float that JSON has no form for: NaN and the infinities

A container that is none of these is stored by its keys: an `nnx.State`, a `FrozenDict`, a
NamedTuple or a dataclass becomes a dict, an nnx variable what it holds, a node whose children have
only positions a tuple.
"""

import math
import struct
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax import tree_util

from jopt._leaves import is_compressed
from jopt.codec._errors import CodecError

_LIST, _TUPLE, _INT_DICT, _FLOAT = range(4)

_MAX_INT = 1 << 63


def to_json(tree: Any) -> tuple[Any, list[tuple[str, Any]]]:
    """Take a tree apart.

    Args:
      tree: any pytree whose leaves are arrays, compressed leaves and Python scalars.

    Returns:
      The structure, and the array and compressed leaves with their paths, in order.

    Raises:
      CodecError: a leaf or a key is of a kind that is not stored.
    """
    leaves: list[tuple[str, Any]] = []
    return _node_to_json(tree, "", leaves), leaves


def _node_to_json(node: Any, path: str, leaves: list[tuple[str, Any]]) -> Any:
    if _is_scalar(node):
        return _scalar_to_json(node, path)
    if _is_array(node):
        leaves.append((path, node))
        return []
    children = _children(node, path)
    if len(children) == 1 and children[0][0] == tree_util.GetAttrKey("value"):
        (_, child) = children[0]
        if _is_scalar(child) or _is_array(child):  # an nnx variable
            return _node_to_json(child, path, leaves)
    keys = [_plain_key(key) for key, _ in children]
    parts = [
        _node_to_json(child, f"{path}/{key}" if path else str(key), leaves)
        for key, (_, child) in zip(keys, children, strict=True)
    ]
    return _container_to_json(node, children, keys, parts, path)


def _is_scalar(node: Any) -> bool:
    plain = node is None or isinstance(node, (bool, int, float, str))
    return plain and not isinstance(node, np.generic)


def _is_array(node: Any) -> bool:
    return is_compressed(node) or isinstance(node, (np.ndarray, np.generic, jax.Array))


def _scalar_to_json(value: Any, path: str) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return [_FLOAT, struct.pack("<d", value).hex()]
    if isinstance(value, int) and not -_MAX_INT <= value < _MAX_INT:
        raise CodecError(f"leaf {path!r}: the int {value:#x} does not fit in 64 bits.")
    return value


def _children(node: Any, path: str) -> list[tuple[Any, Any]]:
    """Flatten one level."""
    try:
        pairs, _ = tree_util.tree_flatten_with_path(
            node, is_leaf=lambda other: other is not node or other is None
        )
    except ValueError as error:  # keys that cannot be sorted
        raise CodecError(f"{path!r} cannot be flattened: {error}") from error
    if len(pairs) == 1 and not pairs[0][0]:
        raise CodecError(
            f"leaf {path!r} is a {type(node).__name__}; a .jopt file holds arrays, compressed "
            "leaves, bool, int, float, str and None."
        )
    return [(keys[0], child) for keys, child in pairs]


def _plain_key(key: Any) -> Any:
    for name in ("key", "name", "idx"):
        if hasattr(key, name):
            return getattr(key, name)
    return str(key)


def _container_to_json(node: Any, children: list, keys: list, parts: list, path: str) -> Any:
    if type(node) in (list, tuple):
        return [_LIST if type(node) is list else _TUPLE, *parts]
    positions = (tree_util.SequenceKey, tree_util.FlattenedIndexKey)
    if children and all(isinstance(key, positions) for key, _ in children):
        return [_TUPLE, *parts]
    if keys and all(type(key) is int for key in keys):
        return [_INT_DICT, keys, *parts]
    if isinstance(node, dict) and not all(type(key) is str for key in keys):
        raise CodecError(f"{path!r}: keys of a dict must be all str or all int, not {keys}.")
    names = [str(key) for key in keys]
    if len(set(names)) < len(names):
        raise CodecError(f"{path!r}: two keys have the same text: {names}.")
    return dict(zip(names, parts, strict=True))


def leaf_paths(structure: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path and the value of every leaf of a structure, `[]` for those of the body.

    Raises:
      CodecError: the structure is not one that `to_json` makes.
    """
    if not _is_container(structure):
        yield path, structure if structure == [] else _scalar_from_json(structure)
        return
    for key, child in _parts(structure):
        yield from leaf_paths(child, f"{path}/{key}" if path else str(key))


def _is_container(structure: Any) -> bool:
    return isinstance(structure, dict) or (
        isinstance(structure, list) and bool(structure) and structure[0] != _FLOAT
    )


def _parts(structure: Any) -> list[tuple[Any, Any]]:
    if isinstance(structure, dict):
        return list(structure.items())
    tag, *parts = structure
    if type(tag) is int and tag in (_LIST, _TUPLE):
        return list(enumerate(parts))
    if type(tag) is int and tag == _INT_DICT and parts and isinstance(parts[0], list):
        keys, *parts = parts
        plain = all(type(key) is int for key in keys)
        if plain and len(keys) == len(parts) and len(set(keys)) == len(keys):
            return list(zip(keys, parts, strict=True))
    raise CodecError("the structure of the tree is malformed.")


def from_json(structure: Any, leaves: Iterator[Any]) -> Any:
    """Put a tree together again.

    Args:
      structure: what `to_json` returned.
      leaves: the array and compressed leaves, in order.

    Returns:
      The tree, of dicts, lists and tuples.

    Raises:
      CodecError: the structure is not one that `to_json` makes.
    """
    if not _is_container(structure):
        return next(leaves) if structure == [] else _scalar_from_json(structure)
    pairs = [(key, from_json(child, leaves)) for key, child in _parts(structure)]
    if isinstance(structure, dict) or structure[0] == _INT_DICT:
        return dict(pairs)
    values = [value for _, value in pairs]
    return values if structure[0] == _LIST else tuple(values)


def _scalar_from_json(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    try:
        _, text = value
        return struct.unpack("<d", bytes.fromhex(text))[0]
    except (ValueError, TypeError, struct.error) as error:
        raise CodecError("a float of the structure is malformed.") from error
