"""The largest scores marked natively, on CPU where there is a compiler.

In two passes at the speed of memory the kernel does what XLA needs several slower ones for; and it
is compiled once, where XLA compiles for every shape.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path

import jax
from jax import Array

from jopt._compiling import library
from jopt._ffi import load

_MAIN = Path(__file__).parent / "native" / "select.cc"


def _file_and_command() -> tuple[Path, list[str]]:
    return library("select", _MAIN, ("-O3",), jax.ffi.include_dir(), version("jaxlib"))


@cache
def _loaded() -> ctypes.CDLL | str:
    return load(_file_and_command, ("select",))


def problem() -> str | None:
    """Say why no kernel runs here, or None where one does."""
    if (backend := jax.default_backend()) != "cpu":
        return f"the backend is {backend}, not cpu"
    found = _loaded()
    return found if isinstance(found, str) else None


def keep_largest(flats: Sequence[Array], keep: Array) -> list[Array]:
    """Mark the `keep` largest of the scores of several arrays together; of equals, the first.

    Args:
      flats: float32, with one axis each.
      keep: int32; clipped to the number of scores.
    """
    shapes = [jax.ShapeDtypeStruct(flat.shape, bool) for flat in flats]
    return list(jax.ffi.ffi_call("jopt_select", shapes, vmap_method="expand_dims")(keep, *flats))
