"""Where the bytes of a file are: one line a leaf, and totals that are the size of the file."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jopt._arrays import dtype_bits, materialize
from jopt._leaves import is_compressed
from jopt.codec._sections import Sizes


@dataclass(frozen=True)
class Entry:
    """Account for one leaf of a file.

    Attributes:
      path: the path of the leaf.
      kind: `"array"`, the name of a compressed class, or `"scalar"` for what lies in the header.
      shape: of the array that the leaf stands for.
      dtype: of the array, or of the codes (or bits) of a compressed leaf, those of the leaf within
        for one that wraps another.
      zeros: fraction of elements that stand for 0, from 0 to 1.
      values: bytes of the elements that are not blank, or of all where no mask is coded.
      mask: bytes that say which elements are blank.
      scales: bytes of every other field of a compressed leaf: scales, zero points, codebooks,
        factors, signs.
      header: bytes of the checksum.
      float32_bytes: what the leaf takes uncompressed: 4 bytes an element for floating-point and
        compressed leaves, its size in memory for other arrays, 0 for scalars.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    zeros: float
    values: int
    mask: int
    scales: int
    header: int
    float32_bytes: int

    @property
    def total(self) -> int:
        """Return the bytes of the leaf in the file."""
        return self.values + self.mask + self.scales + self.header

    @property
    def bits(self) -> float:
        """Return the bits of values and mask per element, 0 for an empty array."""
        return 8 * (self.values + self.mask) / max(1, math.prod(self.shape))

    @property
    def ratio(self) -> float:
        """Return how many times smaller than `float32_bytes` the leaf is in the file."""
        return self.float32_bytes / max(1, self.total)


@dataclass(frozen=True)
class Ledger:
    """Account for every byte of a file.

    Attributes:
      entries: one per leaf, in the order of the tree.
      header: bytes that belong to no leaf: signature, structure, shapes, metadata, checksums.

    Example:
      >>> entry = Entry("w", "array", (8, 4), "float32", 0.5, 60, 8, 0, 4, 128)
      >>> print(Ledger((entry,), 28))
      path    kind   shape  dtype    zeros   bits  values  mask  scales  header  bytes  ratio
      ------  -----  -----  -------  -----  -----  ------  ----  ------  ------  -----  -----
      w       array  8x4    float32  50.0%  17.00      60     8       0       4     72   1.8x
      header                                                                 28     28
      total                          50.0%             60     8       0      32    100   1.3x
    """

    entries: tuple[Entry, ...]
    header: int

    @property
    def total(self) -> int:
        """Return the size of the file in bytes."""
        return self.header + sum(entry.total for entry in self.entries)

    @property
    def float32_bytes(self) -> int:
        """Return the bytes of all leaves uncompressed; see `Entry.float32_bytes`."""
        return sum(entry.float32_bytes for entry in self.entries)

    @property
    def ratio(self) -> float:
        """Return `float32_bytes` over the bytes of the file."""
        return self.float32_bytes / self.total

    @property
    def zeros(self) -> float:
        """Return the fraction of zeros among all elements of all arrays."""
        sizes = [math.prod(entry.shape) if entry.kind != "scalar" else 0 for entry in self.entries]
        pairs = zip(self.entries, sizes, strict=True)
        return sum(entry.zeros * size for entry, size in pairs) / max(1, sum(sizes))

    def __str__(self) -> str:
        """Return an aligned table with a row of totals."""
        rows = [_HEADINGS, *(_row(entry) for entry in self.entries), self._rest(), self._totals()]
        widths = [max(len(row[at]) for row in rows) for at in range(len(_HEADINGS))]
        rows.insert(1, ["-" * width for width in widths])
        return "\n".join(_align(row, widths) for row in rows)

    def _rest(self) -> list[str]:
        return ["header", *[""] * 8, str(self.header), str(self.header), ""]

    def _totals(self) -> list[str]:
        values, mask, scales, header = (
            str(sum(getattr(entry, part) for entry in self.entries) + extra)
            for part, extra in (("values", 0), ("mask", 0), ("scales", 0), ("header", self.header))
        )
        zeros, ratio = f"{self.zeros:.1%}", f"{self.ratio:.1f}x"
        return [
            "total",
            "",
            "",
            "",
            zeros,
            "",
            values,
            mask,
            scales,
            header,
            str(self.total),
            ratio,
        ]


_HEADINGS = "path kind shape dtype zeros bits values mask scales header bytes ratio".split()
_TEXT_COLUMNS = 4


def _row(entry: Entry) -> list[str]:
    shape = "x".join(map(str, entry.shape)) or "()"
    if entry.kind == "scalar":
        return [entry.path or "(root)", entry.kind, "", entry.dtype, *[""] * 8]
    parts = (entry.values, entry.mask, entry.scales, entry.header, entry.total)
    numbers = [f"{entry.zeros:.1%}", f"{entry.bits:.2f}", *map(str, parts), f"{entry.ratio:.1f}x"]
    return [entry.path or "(root)", entry.kind, shape, entry.dtype, *numbers]


def _align(row: list[str], widths: list[int]) -> str:
    pairs = enumerate(zip(row, widths, strict=True))
    cells = [
        text.ljust(width) if at < _TEXT_COLUMNS else text.rjust(width)
        for at, (text, width) in pairs
    ]
    return "  ".join(cells).rstrip()


def scalar_entry(path: str, value: Any) -> Entry:
    """Account for a leaf that lies in the header."""
    return Entry(path, "scalar", (), type(value).__name__, 0.0, 0, 0, 0, 0, 0)


def leaf_entry(path: str, leaf: Any, sizes: dict[str, Sizes]) -> Entry:
    """Account for an array or a compressed leaf.

    Args:
      path: its path.
      leaf: what was decoded.
      sizes: the bytes of each field, as `decode_leaf` returns them.
    """
    main, elements = _main_field(leaf)
    coded = sizes.get(main, Sizes(0, 0))
    scales = sum(part.mask + part.values for part in sizes.values()) - coded.mask - coded.values
    kind = type(leaf).__name__ if is_compressed(leaf) else "array"
    dtype = "none" if elements is None else elements.dtype.name
    shape, zeros, floats = _represented(leaf)
    return Entry(path, kind, shape, dtype, zeros, coded.values, coded.mask, scales, 4, floats)


def _main_field(leaf: Any) -> tuple[str, Any]:
    """Return the name and the array of the codes: the first field, or that of the leaf within."""
    if not is_compressed(leaf):
        return "", leaf
    name = dataclasses.fields(leaf)[0].name
    inner, elements = _main_field(getattr(leaf, name))
    return f"{name}.{inner}" if inner else name, elements


def _represented(leaf: Any) -> tuple[tuple[int, ...], float, int]:
    """Return shape, fraction of zeros and float32 bytes of what a leaf stands for."""
    if not is_compressed(leaf):
        return tuple(leaf.shape), _zeros(leaf), _float32_bytes(leaf)
    try:
        # Shapes first: fields that do not fit together may broadcast to more than memory holds.
        if jax.eval_shape(materialize, leaf).shape != tuple(leaf.shape):
            return (), 0.0, 0
        array = materialize(leaf)
    except (TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError):
        return (), 0.0, 0
    return tuple(array.shape), _zeros(array), 4 * int(array.size)


def _zeros(array: Any) -> float:
    with np.errstate(invalid="ignore"):  # ml_dtypes warns of NaN
        return float(np.count_nonzero(np.asarray(array) == 0) / max(1, array.size))


def _float32_bytes(leaf: Any) -> int:
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
        return (8 if jnp.issubdtype(leaf.dtype, jnp.complexfloating) else 4) * int(leaf.size)
    return -(-int(leaf.size) * dtype_bits(leaf.dtype) // 8)
