"""The native kernels, compiled at first use and made known to XLA.

Without a compiler everything else works; `problem` says what is missing.
"""

import ctypes
from functools import cache
from importlib.metadata import version
from pathlib import Path

import jax

from jopt._compiling import library
from jopt._ffi import load

TARGETS = (
    "int8",
    "int4",
    "codebook",
    "signs",
    "binary",
    "sparse",
    "floats",
    "convolution",
    "int8convolution",
    "depthwise",
)
_MAIN = Path(__file__).parent / "native" / "bindings.cc"
_FLAGS = ("-O2", "-fno-schedule-insns")  # which GCC has on x86: elsewhere sums leave registers


def file_and_command() -> tuple[Path, list[str]]:
    """Return the file that the library has or will have, and the command that makes it."""
    return library("run", _MAIN, _FLAGS, jax.ffi.include_dir(), version("jaxlib"))


@cache
def _loaded() -> ctypes.CDLL | str:
    """Return the library, its products registered with XLA, or why there is none."""
    found = load(file_and_command, TARGETS)
    if not isinstance(found, str):
        found.jopt_instructions.restype = ctypes.c_char_p
    return found


def problem() -> str | None:
    """Say why there are no native kernels, or None where there are."""
    found = _loaded()
    return found if isinstance(found, str) else None


def instructions() -> str:
    """Return the instruction set of the native kernels, or an empty text where there are none."""
    found = _loaded()
    return "" if isinstance(found, str) else found.jopt_instructions().decode()
