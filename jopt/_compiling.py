"""Compile C++ at first use, into a cache: installing needs no compiler.

A library is compiled for the machine that runs it, and is named by what made it: the sources, the
compiler, and the instruction set that the compiler sees. So a cache that several machines share
never hands one a library of another, and nothing stale is loaded.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SWITCH = "JOPT_NATIVE"
"""0: nothing native; codec: files alone; portable: for any machine."""

CACHE = "JOPT_CACHE"
_SHARED = Path(__file__).parent / "native"
_FLAGS = ("-std=c++17", "-fPIC", "-shared", "-w")
_SECONDS = 600


class Unavailable(Exception):
    """There is no native code here; the message says why."""


def cache_folder() -> Path:
    """Return where libraries and choices are kept: `JOPT_CACHE`, or the user's cache folder."""
    if own := os.environ.get(CACHE):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jopt"


def library(
    name: str, main: Path, flags: tuple[str, ...], headers: str = "", version: str = ""
) -> tuple[Path, list[str]]:
    """Return the file that a library has or will have, and the command that makes it.

    Args:
      name: what the file's name begins with.
      main: the C++ file to compile; all files beside it, and those in `jopt/native`, count as its
        sources.
      flags: of the compiler, beyond those for a library of this machine.
      headers: a folder of further headers.
      version: of these.

    Raises:
      Unavailable: there is no compiler.
    """
    compiler = _compiler()
    aimed, machine = _for_this_machine(compiler)
    found = hashlib.sha256()
    words = _output([compiler, "--version"])
    options = " ".join((*_FLAGS, *flags))
    for part in (words, machine, version.encode(), options.encode()):
        found.update(part + b"\0")
    for file in (*sorted(main.parent.iterdir()), *sorted(_SHARED.iterdir())):
        if file.is_file():
            found.update(file.name.encode() + b"\0" + file.read_bytes())
    include = [f"-I{headers}"] if headers else []
    command = [compiler, *_FLAGS, *flags, *aimed, *include, str(main)]
    return cache_folder() / f"{name}-{found.hexdigest()[:16]}.so", command


def compiled(made: Path, command: list[str]) -> Path:
    """Return a library's file, compiled if it is not there yet.

    Raises:
      Unavailable: the compiler refused or took too long.
      OSError: the folder cannot be written.
    """
    if made.exists():
        return made
    made.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=made.parent) as folder:
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
        os.replace(new, made)
    return made


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
