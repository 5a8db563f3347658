"""Native code that XLA calls: compiled at first use, and made known to it.

Without a compiler everything else works; what is asked for then says why there is none.
"""

import ctypes
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import jax

from jopt._compiling import SWITCH, Unavailable, compiled

_OFF = ("0", "codec")


def load(
    file_and_command: Callable[[], tuple[Path, list[str]]], targets: Iterable[str]
) -> ctypes.CDLL | str:
    """Return a library, what XLA calls in it registered, or why there is none.

    Args:
      file_and_command: returns the library's file, and the command that makes it.
      targets: by name: XLA calls the library's `JoptName` as `jopt_name`.
    """
    if (switch := os.environ.get(SWITCH, "1")) in _OFF:
        return f"{SWITCH} is {switch}"
    try:
        found = ctypes.CDLL(str(compiled(*file_and_command())))
    except (Unavailable, OSError) as error:
        return str(error)
    for name in targets:
        function = getattr(found, f"Jopt{name.capitalize()}")
        jax.ffi.register_ffi_target(f"jopt_{name}", jax.ffi.pycapsule(function), platform="cpu")
    return found
