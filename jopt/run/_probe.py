"""Choose among ways to compute the same thing by timing them here, once, and remember.

What is fast differs from one version of XLA and one machine to the next, so nothing is decided by a
version number. Choices are kept in a file, by device and by what was asked.
"""

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jopt._compiling import SWITCH, cache_folder
from jopt._files import write_atomically
from jopt.run._build import file_and_command, problem

PROBE = "JOPT_PROBE"  # 0: nothing is timed, what is preferred unmeasured is taken
_ROUNDS, _CALLS = 5, 3
_SECONDS = 0.2  # for all rounds of one way, compiling not counted
_HOPELESS = 3.0  # times the best: no further rounds
_LOCK = threading.Lock()


@cache
def _file() -> Path:
    device = jax.devices()[0]
    kernels = file_and_command()[0].name if problem() is None else ""  # another for other kernels
    about = (version("jaxlib"), device.platform, device.device_kind, kernels)
    where = (os.environ.get(SWITCH, ""), os.cpu_count(), os.environ.get("XLA_FLAGS", ""))
    name = hashlib.sha256(repr((about, where, sorted(_cores()))).encode()).hexdigest()[:16]
    return cache_folder() / f"choices-{name}.json"


def _cores() -> set[int]:
    found = getattr(os, "sched_getaffinity", None)
    return {len(found(0))} if found else set()


def _read(file: Path) -> dict[str, dict[str, float]]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _fits(found: Any, ways: Mapping[str, Any]) -> bool:
    """Return whether a file's entry says how long each way takes."""
    whole = isinstance(found, dict) and set(found) == set(ways)
    return whole and all(isinstance(each, (int, float)) for each in found.values())


def _write(file: Path, choices: dict[str, dict[str, float]]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(choices).encode())
    except OSError:  # a cache that cannot be written is no cache
        pass


@cache
def _known() -> dict[str, dict[str, float]]:
    return _read(_file())


def is_on() -> bool:
    """Return whether ways are timed."""
    return os.environ.get(PROBE, "1") != "0"


def seconds_of(
    name: str, ways: Mapping[str, Callable[..., Any]], shapes: Sequence[Any]
) -> dict[str, float]:
    """Return how long each way takes here, from the file where it was asked before.

    Args:
      name: what is asked: all that decides the outcome and is the same on every machine.
      ways: by name the functions, all of the same arguments.
      shapes: trees of `jax.ShapeDtypeStruct`, one for each argument.

    Returns:
      Seconds by name. A way that fails has infinitely many.
    """
    key = f"{name}: {', '.join(ways)}"
    with _LOCK:
        known = _known()
        if not _fits(known.get(key), ways):
            found: dict[str, float] = {}
            # A thread of its own: nothing of a trace that is under way here is seen there.
            worker = threading.Thread(target=lambda: found.update(_measured(ways, shapes)))
            worker.start()
            worker.join()
            known[key] = found
            _write(_file(), _read(_file()) | known)
        return known[key]


def _filled(shape: Any) -> Any:
    draw = np.random.default_rng(0)
    dtype = np.dtype(shape.dtype)
    if np.issubdtype(dtype, np.unsignedinteger):
        return jax.device_put(draw.integers(0, 2, shape.shape).astype(dtype))
    if np.issubdtype(dtype, np.integer):
        return jax.device_put(draw.integers(-7, 8, shape.shape).astype(dtype))
    return jax.device_put(draw.uniform(0.5, 1.0, shape.shape).astype(dtype))


def _measured(ways: Mapping[str, Callable[..., Any]], shapes: Sequence[Any]) -> dict[str, float]:
    arguments = jax.tree.map(_filled, tuple(shapes))
    compiled: dict[str, Callable[[], Any]] = {}
    found = {name: float("inf") for name in ways}
    for name, way in ways.items():
        try:
            program = jax.jit(way).lower(*arguments).compile()
            jax.block_until_ready(program(*arguments))
            compiled[name] = lambda program=program: program(*arguments)
        except Exception:  # noqa: BLE001  what does not compile or run here is not taken
            continue
    end = time.perf_counter() + _SECONDS * max(len(compiled), 1)
    for count in range(_ROUNDS):
        for name, run in compiled.items():
            found[name] = min(found[name], _turn(run))
        if not count:
            continue  # one turn may have been disturbed
        best = min(found.values())
        compiled = {name: run for name, run in compiled.items() if found[name] < _HOPELESS * best}
        if len(compiled) < 2 or time.perf_counter() > end:
            break
    return found


def _turn(run: Callable[[], Any]) -> float:
    """Return the shortest of a few calls, after one that does not count.

    Within a network inputs lie in the cache and the threads of the pool are awake; after another
    way's turn they are not.
    """
    jax.block_until_ready(run())
    seconds = []
    for _ in range(_CALLS):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return min(seconds)
