"""Compare trees bit for bit, and put the leaves of one into the structure of another."""

import struct
from typing import Any

import jax
import numpy as np

from jopt._leaves import is_compressed
from jopt._trees import flatten_with_paths
from jopt.codec._errors import CodecError
from jopt.codec._words import to_words

_SHOWN = 8


def rebuild_like(tree: Any, like: Any) -> Any:
    """Put the leaves of `tree` where `like` has its own, matched by path.

    Raises:
      CodecError: paths or shapes differ; the message lists which.
    """
    paths, leaves, _ = flatten_with_paths(tree)
    wanted, others, treedef = flatten_with_paths(like)
    chosen = [leaves[at] for at in _match(paths, wanted, "like")]
    for path, leaf, other in zip(wanted, chosen, others, strict=True):
        here, there = getattr(leaf, "shape", None), getattr(other, "shape", None)
        if here is not None and there is not None and tuple(here) != tuple(there):
            raise CodecError(f"leaf {path!r} has shape {here} in the file, {there} in like.")
    return jax.tree.unflatten(treedef, chosen)


def _match(paths: list[str], wanted: list[str], name: str) -> list[int]:
    """Return for each wanted path where it is among `paths`."""
    if paths == wanted:
        return list(range(len(paths)))
    missing, extra = _less(wanted, paths), _less(paths, wanted)
    if missing or extra or len(paths) != len(wanted):
        raise CodecError(
            f"the paths differ: only {name} has {_listed(missing)}; only the file has "
            f"{_listed(extra)}."
        )
    where = {path: at for at, path in enumerate(paths)}
    if len(where) < len(paths):
        raise CodecError("several leaves have the same path, in another order.")
    return [where[path] for path in wanted]


def _less(paths: list[str], others: list[str]) -> list[str]:
    known = set(others)
    return [path for path in paths if path not in known]


def _listed(paths: list[str]) -> str:
    shown = ", ".join(map(repr, paths[:_SHOWN])) or "none"
    return shown + (f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else "")


def check_equal(loaded: Any, tree: Any) -> None:
    """Compare two trees by paths and by the bits of their leaves.

    Raises:
      CodecError: they differ; the message names the first leaf that does.
    """
    paths, leaves, _ = flatten_with_paths(loaded)
    wanted, others, _ = flatten_with_paths(tree)
    order = _match(paths, wanted, "the tree")
    for path, at, other in zip(wanted, order, others, strict=True):
        _check_leaf(path, leaves[at], other)


def _check_leaf(path: str, leaf: Any, other: Any) -> None:
    if is_compressed(leaf) and type(leaf) is type(other):
        for name in leaf.__dataclass_fields__:
            _check_leaf(f"{path}.{name}", getattr(leaf, name), getattr(other, name))
    else:
        _check_field(path, leaf, other)


def _check_field(path: str, value: Any, other: Any) -> None:
    if _described(value) != _described(other):
        raise CodecError(
            f"leaf {path!r} is {_described(value)} in the file, {_described(other)} in the tree."
        )
    if not hasattr(value, "dtype"):
        return
    here, there = to_words(np.asarray(value)), to_words(np.asarray(other))
    different = np.count_nonzero(here != there)
    if different:
        raise CodecError(
            f"leaf {path!r} differs from the tree in {different} of {here.size} elements."
        )


def _described(value: Any) -> str:
    """Say what a leaf is; arrays by dtype and shape, scalars by their bits."""
    if is_compressed(value):
        return f"a {type(value).__name__}"
    if hasattr(value, "dtype"):
        return f"{np.dtype(value.dtype).name}{list(value.shape)}"
    if isinstance(value, float):
        return f"float {value} ({struct.pack('>d', value).hex()})"
    return f"{type(value).__name__} {value!r}"
