"""The teacher's outputs on disk: asked once, read in any order, in bounded memory, resumable.

A folder holds one `.npy` file for each array of the outputs, with a row for each example, and
`cache.json`: what the rows are, which teacher made them from which inputs, and how many are done.
A chunk of rows is written and flushed before it is counted, so a killed run loses a chunk at most.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jopt._trees import flatten_with_paths

_INDEX = "cache.json"
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class TeacherCache:
    """Outputs of a teacher, on disk.

    Attributes:
      outputs: a tree of read-only memory-mapped arrays, the first axis that of examples.
      examples: number of rows.
    """

    outputs: Any
    examples: int

    def rows(self, indices: Any) -> Any:
        """Read the outputs of some examples into memory.

        Args:
          indices: whole numbers or booleans as NumPy indexes with, or a slice.

        Returns:
          A tree of NumPy arrays.
        """
        indices = indices if isinstance(indices, slice) else np.asarray(indices)
        return jax.tree.map(lambda leaf: np.array(leaf[indices]), self.outputs)


def cache_teacher(
    folder: str | os.PathLike[str],
    apply: Callable[[Any, Any], Any],
    params: Any,
    inputs: Any,
    chunk: int = 512,
) -> TeacherCache:
    """Ask a teacher about all inputs, and keep its answers on disk; go on where a run was killed.

    If the folder holds the answers of the same parameters to the same inputs, they are not asked
    again. Otherwise it must be empty or absent: another teacher's answers are never mixed in. What
    `apply` does is not part of that check: after changing it, take another folder. One process
    writes at a time.

    Args:
      folder: where to; it is made.
      apply: `(params, inputs) -> outputs`, a tree of arrays with a row for each input, such as
        logits, a dictionary of features, or `top_k_logits` of them. It is jitted here, for one
        shape: the last chunk is filled up with its last example.
      params: of the teacher, any pytree of arrays.
      inputs: a tree of arrays (NumPy's memory-mapped ones too) with one row for each example.
      chunk: examples asked at a time, which bounds memory.

    Returns:
      The cache, complete.

    Raises:
      ValueError: `chunk` is below 1, there is no example, the inputs differ in length, an output
        has no row for each input, or the folder holds something else.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     cache = cache_teacher(folder, lambda w, x: x * w, jnp.float32(2), jnp.arange(5.0))
      ...     print(cache.rows([4, 0]))
      [8. 0.]
    """
    folder = Path(folder)
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, not {chunk}.")
    examples = _rows_of(inputs)
    index = {
        "format": _FORMAT,
        "teacher": _digest(params),
        "inputs": _digest(inputs, chunk),
        "examples": examples,
    }
    folder.mkdir(parents=True, exist_ok=True)
    old = _read_index(folder)
    if old is None and any(folder.iterdir()):
        raise ValueError(f"folder {folder} holds other files, and no {_INDEX}.")
    for name in index:
        if old is not None and old.get(name) != index[name]:
            raise ValueError(
                f"folder {folder} holds the answers of another run: its {name} differs. Take "
                "another folder, or delete this one."
            )
    like = jax.eval_shape(apply, params, _slice(inputs, slice(0, chunk), chunk))
    arrays = _describe(like, chunk, examples)
    if old is None:
        old = index | {"arrays": arrays, "done": 0}
        _write_index(folder, old)
    elif old["arrays"] != arrays:
        raise ValueError(f"folder {folder} holds outputs of other names, shapes or dtypes.")
    if not old["done"]:
        for array in arrays:
            _open(folder, array, "w+").flush()
    files = [_open(folder, array, "r+") for array in arrays]
    ask = jax.jit(apply)
    for start in range(old["done"], examples, chunk):
        stop = min(start + chunk, examples)
        outputs = ask(params, _slice(inputs, slice(start, stop), chunk))
        for file, leaf in zip(files, jax.tree.leaves(outputs), strict=True):
            file[start:stop] = np.asarray(leaf)[: stop - start]
            file.flush()
        _write_index(folder, old | {"done": stop})
    del files
    return open_teacher_cache(folder, like)


def open_teacher_cache(folder: str | os.PathLike[str], like: Any = None) -> TeacherCache:
    """Open the answers that `cache_teacher` kept, without the teacher.

    Args:
      folder: that was written.
      like: a tree of the outputs' structure, such as `jax.eval_shape(apply, params, inputs)`; None
        gives a dictionary from paths to arrays, or the array itself if there is one without a path.

    Returns:
      The cache.

    Raises:
      FileNotFoundError: there is no cache in the folder.
      ValueError: it is not complete, of a later format, damaged, or `like` has other paths.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> def apply(weight, x):
      ...     return {"logits": x * weight}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = cache_teacher(folder, apply, jnp.float32(2), jnp.arange(3.0))
      ...     print(open_teacher_cache(folder).rows(slice(1, 3)))
      {'logits': array([2., 4.], dtype=float32)}
    """
    folder = Path(folder)
    index = _read_index(folder)
    if index is None:
        raise FileNotFoundError(f"folder {folder} holds no {_INDEX}.")
    if index["done"] != index["examples"]:
        raise ValueError(
            f"folder {folder} holds {index['done']} of {index['examples']} examples: run "
            "cache_teacher again to finish it."
        )
    arrays = {array["path"]: _open(folder, array, "r") for array in index["arrays"]}
    if like is None:
        outputs = arrays[""] if list(arrays) == [""] else arrays
    else:
        paths, _, treedef = flatten_with_paths(like)
        if paths != list(arrays):
            raise ValueError(f"like must have the paths {list(arrays)}, not {paths}.")
        outputs = jax.tree.unflatten(treedef, list(arrays.values()))
    return TeacherCache(outputs, index["examples"])


def _rows_of(inputs: Any) -> int:
    counts = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(inputs)}
    if len(counts) != 1 or counts == {()} or counts == {(0,)}:
        raise ValueError(
            "inputs must be arrays with one row for each example, at least one, and as many in "
            f"each, not of first axes {sorted(counts)}."
        )
    return counts.pop()[0]


def _slice(inputs: Any, rows: slice, chunk: int) -> Any:
    """Return `chunk` rows: those of a shorter slice, and its last one as often as needed."""

    def take(leaf: Any) -> np.ndarray:
        found = np.asarray(leaf[rows])
        fill = np.broadcast_to(found[-1:], (chunk - len(found), *found.shape[1:]))
        return np.concatenate([found, fill]) if len(fill) else found

    return jax.tree.map(take, inputs)


def _digest(tree: Any, rows: int | None = None) -> str:
    """Name the content of a tree: paths, shapes, dtypes and bytes, read some rows at a time."""
    found = hashlib.sha256()
    paths, leaves, _ = flatten_with_paths(tree)
    for path, leaf in zip(paths, leaves, strict=True):
        shape = np.shape(leaf)
        found.update(f"{path} {shape} {jnp.result_type(leaf)}\n".encode())
        step = rows if rows and shape else None
        parts = [leaf] if step is None else (leaf[i : i + step] for i in range(0, shape[0], step))
        for part in parts:
            found.update(np.ascontiguousarray(np.asarray(part)).tobytes())
    return found.hexdigest()


def _describe(like: Any, chunk: int, examples: int) -> list[dict[str, Any]]:
    arrays = []
    paths, leaves, _ = flatten_with_paths(like)
    for number, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
        if leaf.shape[:1] != (chunk,):
            raise ValueError(
                f"apply must return a row for each of {chunk} inputs, but output {path!r} has "
                f"shape {leaf.shape}."
            )
        shape = [examples, *leaf.shape[1:]]
        name = f"{number}.npy"
        arrays.append({"path": path, "file": name, "shape": shape, "dtype": str(leaf.dtype)})
    return arrays


def _open(folder: Path, array: dict[str, Any], mode: Any) -> Any:
    """Map one array; dtypes that NumPy's format does not know are kept as their bytes."""
    dtype, shape = jnp.dtype(array["dtype"]), tuple(array["shape"])
    stored = dtype if dtype.isbuiltin == 1 else np.dtype(f"u{dtype.itemsize}")
    file = folder / array["file"]
    if mode == "w+":
        return np.lib.format.open_memmap(file, mode, stored, shape)
    found = np.lib.format.open_memmap(file, mode)
    if found.shape != shape or found.dtype != stored:
        raise ValueError(f"{file} is damaged: it holds {found.dtype} of shape {found.shape}.")
    return found.view(dtype)


def _read_index(folder: Path) -> dict[str, Any] | None:
    file = folder / _INDEX
    if not file.exists():
        return None
    index = json.loads(file.read_text())
    if index.get("format") != _FORMAT:
        raise ValueError(f"{file} has format {index.get('format')}, not {_FORMAT}.")
    return index


def _write_index(folder: Path, index: dict[str, Any]) -> None:
    new = folder / f"{_INDEX}.new"
    new.write_text(json.dumps(index))
    new.replace(folder / _INDEX)
