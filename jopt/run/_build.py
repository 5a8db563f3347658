"""Compile the native kernels at first use, into a cache: installing needs no compiler.

They are compiled for the machine that runs them, and the library is named by what made it: the
sources, jaxlib and its headers, the compiler, and the instruction set that the compiler sees. So a
cache that several machines share never hands one a library of another, and nothing stale is loaded.
Without a compiler everything else works; `problem` says what is missing.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from importlib.metadata import version
from pathlib import Path

import jax

SWITCH = "JOPT_NATIVE"  # 0: no native kernels; portable: those for any machine
CACHE = "JOPT_CACHE"
TARGETS = ("int8", "int4", "signs", "binary", "sparse", "depthwise")
_SOURCES = Path(__file__).parent / "native"
_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-w")
_SECONDS = 600


class Unavailable(Exception):
    """There are no native kernels here; the message says why."""


def cache_folder() -> Path:
    """Return where libraries and choices are kept: `JOPT_CACHE`, or the user's cache folder."""
    if own := os.environ.get(CACHE):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jopt"


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    raise Unavailable("no C++ compiler was found (c++, g++, clang++ or what CXX names)")


def _output(command: list[str]) -> bytes:
    done = subprocess.run(command, capture_output=True, check=False, stdin=subprocess.DEVNULL)
    return done.stdout if done.returncode == 0 else b""


def _for_this_machine(compiler: str) -> tuple[list[str], bytes]:
    """Return the flags that aim at this machine, and what the compiler then says of it."""
    if os.environ.get(SWITCH) == "portable":
        return ["-DJOPT_PORTABLE"], b"portable"
    for flag in ("-march=native", "-mcpu=native"):
        if macros := _output([compiler, flag, "-dM", "-E", "-x", "c++", "/dev/null"]):
            return [flag], macros
    return [], b""


def _library() -> tuple[Path, list[str]]:
    """Return the file that the library has or will have, and the command that makes it."""
    compiler = _compiler()
    flags, machine = _for_this_machine(compiler)
    include = Path(jax.ffi.include_dir())
    found = hashlib.sha256()
    words = _output([compiler, "--version"])
    for part in (words, machine, version("jaxlib").encode(), " ".join(_FLAGS).encode()):
        found.update(part + b"\0")
    for file in sorted(_SOURCES.iterdir()):
        if file.is_file():
            found.update(file.name.encode() + b"\0" + file.read_bytes())
    command = [compiler, *_FLAGS, *flags, f"-I{include}", str(_SOURCES / "bindings.cc")]
    return cache_folder() / f"native-{found.hexdigest()[:16]}.so", command


def _compiled() -> Path:
    library, command = _library()
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        new = Path(folder) / "native.so"
        try:
            done = subprocess.run(
                [*command, "-o", str(new)],
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise Unavailable(f"{command[0]} took longer than {_SECONDS} s") from None
        if done.returncode:
            first = next(iter(done.stderr.strip().splitlines()), "without a word")
            raise Unavailable(f"{command[0]} failed: {first}")
        os.replace(new, library)
    return library


@cache
def _loaded() -> ctypes.CDLL | str:
    """Return the library, its products registered with XLA, or why there is none."""
    if os.environ.get(SWITCH, "1") == "0":
        return f"{SWITCH} is 0"
    try:
        library = ctypes.CDLL(str(_compiled()))
    except (Unavailable, OSError) as error:
        return str(error)
    for name in TARGETS:
        function = getattr(library, f"Jopt{name.capitalize()}")
        jax.ffi.register_ffi_target(f"jopt_{name}", jax.ffi.pycapsule(function), platform="cpu")
    library.jopt_instructions.restype = ctypes.c_char_p
    return library


def problem() -> str | None:
    """Say why there are no native kernels, or None where there are."""
    found = _loaded()
    return found if isinstance(found, str) else None


def instructions() -> str:
    """Return the instruction set of the native kernels, or an empty text where there are none."""
    library = _loaded()
    return "" if isinstance(library, str) else library.jopt_instructions().decode()
