"""The teacher's outputs on disk: asked once, read in any order, in bounded memory, resumable.

A folder holds one `.npy` file for each array of the outputs, with a row for each example, and
`cache.json`: what the rows are, which teacher made them from which inputs, how many are done, and
for each array the CRC-32 of those. A chunk of rows is written and flushed before it is counted, so
a killed run loses a chunk at most.
"""

import dataclasses
import hashlib
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jopt._files import write_atomically
from jopt._trees import flatten_with_paths

_INDEX = "cache.json"
_FORMAT = 2
_CHECKED_BYTES = 1 << 24  # read at a time, to compare a checksum


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
    if old is None and any(not file.name.startswith(f".{_INDEX}.") for file in folder.iterdir()):
        raise ValueError(f"folder {folder} holds other files, and no {_INDEX}.")
    for name in index:
        if old is not None and old[name] != index[name]:
            raise ValueError(
                f"folder {folder} holds the answers of another run: its {name} differs. Take "
                "another folder, or delete this one."
            )
    like = jax.eval_shape(apply, params, _slice(inputs, slice(0, chunk), chunk))
    arrays = _describe(like, chunk, examples)
    if old is None:
        old = index | {"arrays": arrays, "done": 0, "checksums": [0] * len(arrays)}
        _write_index(folder, old)
    elif old["arrays"] != arrays:
        raise ValueError(f"folder {folder} holds outputs of other names, shapes or dtypes.")
    if not old["done"]:
        for number, array in enumerate(arrays):
            _open(folder, number, array, "w+").flush()
    files = [_open(folder, number, array, "r+") for number, array in enumerate(arrays)]
    checksums = old["checksums"]
    ask = jax.jit(apply)
    for start in range(old["done"], examples, chunk):
        stop = min(start + chunk, examples)
        outputs = ask(params, _slice(inputs, slice(start, stop), chunk))
        for number, (file, leaf) in enumerate(zip(files, jax.tree.leaves(outputs), strict=True)):
            rows = np.ascontiguousarray(np.asarray(leaf)[: stop - start])
            file[start:stop] = rows
            file.flush()
            checksums[number] = zlib.crc32(_bytes_of(rows), checksums[number])
        _write_index(folder, old | {"done": stop, "checksums": checksums})
    del files
    return open_teacher_cache(folder, like)


def open_teacher_cache(
    folder: str | os.PathLike[str], like: Any = None, verify: bool = True
) -> TeacherCache:
    """Open the answers that `cache_teacher` kept, without the teacher.

    Args:
      folder: that was written.
      like: a tree of the outputs' structure, such as `jax.eval_shape(apply, params, inputs)`; None
        gives a dictionary from paths to arrays, or the array itself if there is one without a path.
      verify: read everything once, to compare the checksums; False opens without reading.

    Returns:
      The cache.

    Raises:
      FileNotFoundError: there is no cache in the folder.
      ValueError: it is not complete, of another format, damaged, or `like` has other paths.

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
    arrays = {}
    for number, array in enumerate(index["arrays"]):
        arrays[array["path"]] = rows = _open(folder, number, array, "r")
        if verify and _checksum(rows) != index["checksums"][number]:
            raise ValueError(
                f"{_file(folder, number)} is damaged: its bytes are not those that were written."
            )
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
        if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        step = rows if rows and shape else None
        parts = [leaf] if step is None else (leaf[i : i + step] for i in range(0, shape[0], step))
        for part in parts:
            found.update(_bytes_of(np.ascontiguousarray(part)))
    return found.hexdigest()


def _bytes_of(rows: np.ndarray) -> Any:
    """Return the bytes of a contiguous array, of a dtype that buffers do not know either."""
    return rows.reshape(-1).view(np.uint8)


def _checksum(rows: np.ndarray) -> int:
    step = max(1, _CHECKED_BYTES * len(rows) // max(rows.nbytes, 1))
    found = 0
    for start in range(0, len(rows), step):
        found = zlib.crc32(_bytes_of(np.ascontiguousarray(rows[start : start + step])), found)
    return found


def _describe(like: Any, chunk: int, examples: int) -> list[dict[str, Any]]:
    arrays = []
    paths, leaves, _ = flatten_with_paths(like)
    for path, leaf in zip(paths, leaves, strict=True):
        if leaf.shape[:1] != (chunk,):
            raise ValueError(
                f"apply must return a row for each of {chunk} inputs, but output {path!r} has "
                f"shape {leaf.shape}."
            )
        shape = [examples, *leaf.shape[1:]]
        arrays.append({"path": path, "shape": shape, "dtype": str(leaf.dtype)})
    return arrays


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number}.npy"


def _open(folder: Path, number: int, array: dict[str, Any], mode: Any) -> Any:
    """Map one array; dtypes that NumPy's format does not know are kept as their bytes."""
    dtype, shape = jnp.dtype(array["dtype"]), tuple(array["shape"])
    stored = dtype if dtype.isbuiltin == 1 else np.dtype(f"u{dtype.itemsize}")
    file = _file(folder, number)
    if mode == "w+":
        return np.lib.format.open_memmap(file, mode, stored, shape)
    try:
        found = np.lib.format.open_memmap(file, mode)
    except FileNotFoundError:
        raise ValueError(f"folder {folder} is damaged: {file.name} is not there.") from None
    except (ValueError, EOFError, SyntaxError) as error:  # cut short, or no array at all
        raise ValueError(f"{file} is damaged: {error}") from None
    if found.shape != shape or found.dtype != stored:
        raise ValueError(f"{file} is damaged: it holds {found.dtype} of shape {found.shape}.")
    return found.view(dtype)


def _read_index(folder: Path) -> dict[str, Any] | None:
    file = folder / _INDEX
    if not file.exists():
        return None
    try:
        index = json.loads(file.read_bytes())
        version = index["format"]
        whole = version != _FORMAT or _is_whole(index)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged: {error!r}.") from None
    if version != _FORMAT:
        raise ValueError(
            f"{file} has format {version!r}, not {_FORMAT}: delete the folder and ask the teacher "
            "again."
        )
    if not whole:
        raise ValueError(f"{file} is damaged: its fields do not fit.")
    return index


def _is_whole(index: dict[str, Any]) -> bool:
    """Say whether the fields of an index can be what was written."""
    arrays, checksums = index["arrays"], index["checksums"]
    for array in arrays:
        jnp.dtype(array["dtype"])
        if not isinstance(array["path"], str) or array["shape"][:1] != [index["examples"]]:
            return False
        if not all(isinstance(size, int) and size >= 0 for size in array["shape"]):
            return False
    named = all(isinstance(index[name], str) for name in ("teacher", "inputs"))
    counted = all(isinstance(each, int) for each in (index["done"], *checksums))
    return (
        named
        and counted
        and len(checksums) == len(arrays)
        and 0 <= index["done"] <= index["examples"]
    )


def _write_index(folder: Path, index: dict[str, Any]) -> None:
    write_atomically(folder / _INDEX, json.dumps(index).encode())
