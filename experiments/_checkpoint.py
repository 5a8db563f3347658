"""Checkpoints: what lets an experiment go on where it was killed.

A checkpoint is one file of plain arrays, written whole or not at all. It is read back into a
template of the same structure, so nothing in it is executed.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization

from experiments._results import write_atomically


def digest(about: Any) -> str:
    """Return a name of what decides a training; other settings never take its checkpoints over."""
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.asarray(leaf).dtype, jax.dtypes.prng_key)


def save(file: Path, tree: Any) -> None:
    """Save the leaves of a tree; random keys are saved as their data."""
    leaves = [
        np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
        for leaf in jax.tree.leaves(tree)
    ]
    write_atomically(file, serialization.msgpack_serialize(leaves))


def restore(file: Path, like: Any) -> Any | None:
    """Read a checkpoint back into the structure of `like`, or return None if there is none.

    A file that does not fit `like` (it was left by other settings or code) counts as none.
    """
    if not file.exists():
        return None
    try:
        arrays = serialization.msgpack_restore(file.read_bytes())
    except Exception:  # msgpack raises many kinds; a spoilt checkpoint means starting anew
        return None
    leaves, treedef = jax.tree.flatten(like)
    if not isinstance(arrays, list) or len(arrays) != len(leaves):
        return None
    restored = []
    for leaf, array in zip(leaves, arrays, strict=True):
        value = jnp.asarray(array)
        value = jax.random.wrap_key_data(value) if _is_key(leaf) else value
        if value.shape != jnp.shape(leaf) or value.dtype != jnp.asarray(leaf).dtype:
            return None
        restored.append(value)
    return jax.tree.unflatten(treedef, restored)
