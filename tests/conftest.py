"""What holds for every test: no silent rank promotion, quick compilation, the same models."""

import atexit
import gc
import os
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # One folder for this run and its workers: what one file or worker compiled serves the others.
    _CACHE = tempfile.mkdtemp(prefix="jopt-tests-")
    atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE
    os.environ["JOPT_CACHE"] = str(Path(_CACHE) / "jopt")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# What runs how is a fixed preference here, no matter of time; kernels have tests of their own.
os.environ["JOPT_PROBE"] = os.environ["JOPT_NATIVE"] = "0"

# Thousands of small programs are compiled in half of the time by XLA's older emitters, each as one
# module.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)

import flax.linen as linen
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import settings

from jopt import run
from jopt.codec import _native
from jopt.prune import _natively
from jopt.run import _build

ROOT = Path(__file__).parent.parent
COMPILER = next(
    (found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None
)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")

gc.freeze()
gc.set_threshold(50_000, 20, 100)  # traces make many objects and few cycles
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)  # tests compile far more than they run
settings.register_profile("jopt", deadline=None, max_examples=25, derandomize=True, database=None)
settings.load_profile("jopt")


class LinenNet(linen.Module):
    """A convolution, an embedding-free dense stack, normalisation: the usual leaves."""

    @linen.compact
    def __call__(self, images):
        hidden = linen.relu(linen.Conv(4, (3, 3), name="conv")(images))
        hidden = linen.LayerNorm(name="norm")(hidden.reshape(hidden.shape[0], -1))
        hidden = linen.relu(linen.Dense(8, name="hidden")(hidden))
        return linen.Dense(3, name="head")(hidden)


class NnxNet(nnx.Module):
    """The same network in nnx."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = nnx.LayerNorm(64, rngs=rngs)
        self.hidden = nnx.Linear(64, 8, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, images):
        hidden = nnx.relu(self.conv(images))
        hidden = self.norm(hidden.reshape(hidden.shape[0], -1))
        return self.head(nnx.relu(self.hidden(hidden)))


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_are_forgotten():
    """Let go of what a file's tests compiled: thousands of programs exhaust a process's maps."""
    yield
    jax.clear_caches()


def run_check(source, folder, flags, program, rounds=80, compiler=COMPILER, runner=()):
    """Build a check of native code in tests/, run it, and require that nothing was wrong."""
    flags = ["-std=c++17", "-w", f"-I{ROOT / folder}", *flags]
    files = [str(ROOT / "tests" / source), "-o", str(program), "-lpthread"]
    built = subprocess.run([str(compiler), *flags, *files], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    command = [*runner, str(program), str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and ": 0 wrong" in done.stdout, done.stdout + done.stderr
    return done.stdout


ARM_COMPILER = shutil.which("aarch64-linux-gnu-g++")
ARM_EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
needs_arm = pytest.mark.skipif(
    not (ARM_COMPILER and ARM_EMULATOR), reason="no compiler for ARM, or no emulator of it"
)


def run_check_for_arm(source, folder, machine, program):
    """Do the same for an ARM processor, in an emulator."""
    flags = ["-O1", "-static", f"-march={machine}"]
    arm = {"compiler": ARM_COMPILER, "runner": (ARM_EMULATOR, "-cpu", "max")}
    return run_check(source, folder, flags, program, **arm)


SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory):
    """Return the flags that build with sanitizers, where the compiler has them."""
    folder = tmp_path_factory.mktemp("sanitized")
    (folder / "empty.cc").write_text("int main() {}")
    command = [str(COMPILER), *SANITIZED, "empty.cc", "-o", "empty"]
    if subprocess.run(command, cwd=folder, capture_output=True).returncode:
        pytest.skip("the compiler has no sanitizers")
    return SANITIZED


LOADS = (_native.load, _natively._loaded, _build._loaded)


@contextmanager
def switched(**environment):
    """Set variables of the environment, or take away those that are None; all loads anew in it.

    And all loads anew after it: one file's answers are no other file's.
    """
    before = {name: os.environ.get(name) for name in environment}

    def put(values):
        for name, value in values.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        for load in LOADS:
            load.cache_clear()

    put(environment)
    try:
        yield
    finally:
        put(before)


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """Run native kernels, compiled into a folder of the tests' own; by default XLA does all."""
    folder = str(tmp_path_factory.getbasetemp() / "native")
    with switched(JOPT_NATIVE=None, JOPT_CACHE=folder):
        assert run.native_problem() is None
        yield


@pytest.fixture(scope="module")
def native_codec():
    """Code files natively where there is a compiler, which is faster; by default NumPy does."""
    with switched(JOPT_NATIVE="codec"):
        yield


@pytest.fixture(
    scope="module", params=["by counting", pytest.param("by kernel", marks=needs_compiler)]
)
def selection(request, tmp_path_factory):
    """Mark the largest scores by counting in XLA, then by the native kernel."""
    jax.clear_caches()
    folder = str(tmp_path_factory.getbasetemp() / "native")
    switch = None if request.param == "by kernel" else "0"
    with switched(JOPT_NATIVE=switch, JOPT_CACHE=folder):
        assert (_natively.problem() is None) == (request.param == "by kernel")
        yield request.param


@pytest.fixture
def images():
    return jax.random.normal(jax.random.key(7), (2, 4, 4, 1))


@pytest.fixture(params=["linen", "nnx"])
def network(request, images):
    """Return `(apply, params)`; apply takes parameters and images."""
    if request.param == "linen":
        model = LinenNet()
        params = model.init(jax.random.key(0), images)["params"]
        return (lambda params, x: model.apply({"params": params}, x)), params
    graph, params = nnx.split(NnxNet(nnx.Rngs(0)))
    return (lambda params, x: nnx.merge(graph, params)(x)), params


@pytest.fixture(params=["eager", "jit"])
def variant(request):
    """Return `jax.jit` or the identity, to run a function both ways."""
    return jax.jit if request.param == "jit" else (lambda function: function)


@pytest.fixture
def kernel():
    return jax.random.normal(jax.random.key(1), (8, 6), jnp.float32)
