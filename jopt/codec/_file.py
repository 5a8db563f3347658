"""The `.jopt` file: save and load a tree, inspect and verify a file.

    5 bytes   signature, 0x89 "JOPT"
    1         version of the format
    1 to 4    length of the header, base 128
    4         CRC-32 of all bytes so far and of the header
    ...       header: deflated JSON [structure, rows of the leaves, metadata]
    ...       for each leaf its bytes (`_leaves`, `_sections`), then their CRC-32
    4         CRC-32 of the words of all decoded arrays

All numbers are little-endian. The checksum of a leaf is compared before any of its bytes is
decoded; the last one catches a decoder that disagrees with the encoder.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jopt._files import write_atomically
from jopt.codec._compare import check_equal, rebuild_like
from jopt.codec._errors import CodecError
from jopt.codec._header import crc, parse_header, part, read_header, write_header
from jopt.codec._leaves import Plan, decode_leaf, encode_leaf
from jopt.codec._ledger import Ledger, leaf_entry, scalar_entry
from jopt.codec._sections import Sizes
from jopt.codec._structure import from_json, leaf_paths, to_json

_FREE_ELEMENTS = 1 << 26
_ELEMENTS_PER_BYTE = 64


def save(path: str | os.PathLike, tree: Any, *, metadata: dict | None = None) -> int:
    """Write a tree to one file, coded in about as few bytes as its elements' entropy.

    What comes back from `load` is what was saved, bit for bit, NaN payloads, infinities and -0.0
    included. Codes and masks are entropy-coded with models that learn from rows, columns and
    neighbours; floating-point arrays lose their zeros and what is regular in their exponents. The
    file is written beside `path` and moved over it when complete, so a failed save leaves an old
    file as it was.

    Args:
      path: where to write.
      tree: any pytree of jax and NumPy arrays (bool, integers, floating-point and complex),
        compressed leaves, bool, int, float, str and None. Dicts with text or with integer keys,
        lists and tuples are restored as such; other containers are stored by their keys and come
        back as dicts, or tuples, unless `load` is given a tree like them.
      metadata: what else the file shall hold, a dict of plain JSON; `read_metadata` returns it.

    Returns:
      The size of the file in bytes.

    Raises:
      CodecError: a leaf is of another kind (PRNG keys, objects, traced arrays), a key is, or the
        metadata is not plain JSON.

    Example:
      >>> import tempfile, os, jax.numpy as jnp
      >>> path = os.path.join(tempfile.mkdtemp(), "zeros.jopt")
      >>> save(path, {"kernel": jnp.zeros((1000, 1000))}) < 60
      True
      >>> load(path)["kernel"].shape
      (1000, 1000)

    References:
      Duda, "Asymmetric numeral systems", 2013, https://arxiv.org/abs/1311.2540.
    """
    data = _encode(tree, metadata)
    write_atomically(Path(path), data)
    return len(data)


def _encode(tree: Any, metadata: dict | None) -> bytes:
    structure, leaves = to_json(tree)
    rows, parts, content = [], [], 0
    for leaf_path, leaf in leaves:
        row, data, content = encode_leaf(leaf, leaf_path, content)
        rows.append(row)
        parts += [data, crc(data)]
    header = write_header(structure, rows, metadata)
    return b"".join([header, *parts, content.to_bytes(4, "little")])


def load(path: str | os.PathLike, like: Any = None, *, max_elements: int | None = None) -> Any:
    """Read a tree from a file; nothing but the file is needed.

    Args:
      path: what `save` wrote.
      like: a tree, say an `nnx.State`, into whose structure the leaves are put, matched by path.
      max_elements: refuse files that declare more array elements in all, before memory is taken
        for them. By default 64 for each byte of the file, and 2^26 in any case.

    Returns:
      The tree. Arrays are jax arrays, except that 64-bit ones come back as NumPy arrays while jax
      has its 64-bit types disabled.

    Raises:
      CodecError: the file is truncated, altered, foreign, or of a newer version, and the message
        says which part is at fault; or `like` has other paths or shapes.
      OSError: the file cannot be read.

    Example:
      >>> import tempfile, os, jax.numpy as jnp
      >>> path = os.path.join(tempfile.mkdtemp(), "layer.jopt")
      >>> _ = save(path, {"kernel": jnp.array([[1, 7]], jnp.int4), "rate": 0.5})
      >>> load(path)
      {'kernel': Array([[1, 7]], dtype=int4), 'rate': 0.5}
    """
    with _naming(path):
        contents = _open(path, max_elements)
        tree = from_json(contents.structure, iter([leaf for leaf, *_ in contents.decode()]))
        return tree if like is None else rebuild_like(tree, like)


def read_metadata(path: str | os.PathLike) -> dict:
    """Return the metadata of a file, without decoding its arrays.

    Args:
      path: what `save` wrote.

    Returns:
      The dict given to `save`, or an empty one.

    Raises:
      CodecError: the header is damaged, or the file is not a .jopt file.

    Example:
      >>> import tempfile, os
      >>> path = os.path.join(tempfile.mkdtemp(), "empty.jopt")
      >>> _ = save(path, {}, metadata={"network": "lenet5"})
      >>> read_metadata(path)
      {'network': 'lenet5'}
    """
    with _naming(path):
        return _open(path, None).metadata


def inspect(path: str | os.PathLike, *, max_elements: int | None = None) -> Ledger:
    """Account for every byte of a file; this decodes it, since zeros are counted too.

    Args:
      path: what `save` wrote.
      max_elements: as for `load`.

    Returns:
      A ledger whose total is the size of the file; `print` shows it as a table.

    Raises:
      CodecError: the file is damaged.

    Example:
      >>> import tempfile, os, jax.numpy as jnp
      >>> path = os.path.join(tempfile.mkdtemp(), "layer.jopt")
      >>> size = save(path, {"kernel": jnp.eye(64)})
      >>> inspect(path).total == size
      True
    """
    with _naming(path):
        return _account(_open(path, max_elements))[1]


def verify(path: str | os.PathLike, tree: Any = None, *, max_elements: int | None = None) -> Ledger:
    """Decode everything in a file and compare it with its checksums, and with a tree if given.

    Args:
      path: what `save` wrote.
      tree: what the file shall hold, bit for bit; structures are compared by their paths.
      max_elements: as for `load`.

    Returns:
      The ledger, as `inspect` does.

    Raises:
      CodecError: the file is damaged, or differs from `tree`; the first differing leaf is named.

    Example:
      >>> import tempfile, os, jax.numpy as jnp
      >>> path = os.path.join(tempfile.mkdtemp(), "layer.jopt")
      >>> _ = save(path, {"bias": jnp.ones(3)})
      >>> verify(path, {"bias": jnp.zeros(3)})
      Traceback (most recent call last):
      ...
      jopt.codec._errors.CodecError: ...leaf 'bias' differs from the tree in 3 of 3 elements.
    """
    with _naming(path):
        contents = _open(path, max_elements)
        leaves, ledger = _account(contents)
        if tree is not None:
            check_equal(from_json(contents.structure, iter(leaves)), tree)
        return ledger


def _account(contents: "_Contents") -> tuple[list[Any], Ledger]:
    """Decode every array; return them, and where their bytes are."""
    leaves, entries = [], []
    for leaf_path, decoded in zip(contents.paths, contents.decode(), strict=True):
        leaves.append(decoded[0])
        entries.append(leaf_entry(leaf_path, *decoded))
    remaining = iter(entries)
    listed = [
        next(remaining) if value == [] else scalar_entry(leaf_path, value)
        for leaf_path, value in leaf_paths(contents.structure)
    ]
    sizes = sum(entry.total for entry in listed)
    return leaves, Ledger(tuple(listed), len(contents.data) - sizes)


@dataclass(frozen=True)
class _Contents:
    """An opened file: its header is checked, its leaves are not yet."""

    data: bytes
    structure: Any
    paths: list[str]
    plans: list[Plan]
    metadata: dict
    body: int

    def decode(self) -> Iterator[tuple[Any, dict[str, Sizes]]]:
        """Yield each array and compressed leaf, and the bytes of its fields."""
        at, content = self.body, 0
        for path, plan in zip(self.paths, self.plans, strict=True):
            stop = at + plan.nbytes
            data, check = self.data[at:stop], self.data[stop : stop + 4]
            with part(f"leaf {path!r}"):
                if crc(data) != check:
                    raise CodecError("checksum mismatch; its bytes were altered.")
                leaf, sizes, content = decode_leaf(plan, data, content)
            yield leaf, sizes
            at = stop + 4
        if content.to_bytes(4, "little") != self.data[at:]:
            raise CodecError("checksum of the contents: what was decoded is not what was saved.")


def _open(path: str | os.PathLike, max_elements: int | None) -> _Contents:
    data = Path(path).read_bytes()
    text, body = read_header(data)
    with part("header"):
        structure, plans, metadata = parse_header(text)
        paths = [leaf_path for leaf_path, value in leaf_paths(structure) if value == []]
        if len(paths) != len(plans):
            raise CodecError(f"{len(plans)} rows for {len(paths)} leaves.")
    expected = body + sum(plan.nbytes + 4 for plan in plans) + 4
    if len(data) < expected:
        where = _leaf_at(paths, plans, len(data) - body)
        raise CodecError(
            f"{where}: truncated; {expected - len(data)} bytes are missing at the end."
        )
    if len(data) > expected:
        raise CodecError(f"{len(data) - expected} trailing bytes after the end.")
    limit = max_elements
    if limit is None:
        limit = max(_FREE_ELEMENTS, _ELEMENTS_PER_BYTE * len(data))
    elements = sum(plan.elements() for plan in plans)
    if elements > limit:
        raise CodecError(
            f"header: declares {elements} array elements, over {limit}; if that is meant, "
            f"pass max_elements={elements}."
        )
    return _Contents(data, structure, paths, plans, metadata, body)


def _leaf_at(paths: list[str], plans: list[Plan], length: int) -> str:
    """Name the leaf in which a body cut to `length` bytes ends."""
    for path, plan in zip(paths, plans, strict=True):
        length -= plan.nbytes + 4
        if length < 0:
            return f"leaf {path!r}"
    return "checksum of the contents"


@contextmanager
def _naming(path: str | os.PathLike) -> Iterator[None]:
    """Put the name of the file before the errors of a block, and let no other kind escape it."""
    try:
        with part(os.fspath(path)):
            yield
    except RecursionError as error:
        raise CodecError(f"{os.fspath(path)}: header: nested too deeply.") from error
