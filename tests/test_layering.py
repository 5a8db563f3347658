"""Imports point one way, and `import jopt` stays light."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parent.parent
BASE = {"_leaves", "_arrays", "_trees", "layers"}
ALLOWED = {
    "_leaves": set(),
    "_files": set(),
    "_compiling": set(),
    "_ffi": {"_compiling"},
    "_arrays": {"_leaves"},
    "_trees": BASE - {"_trees", "layers"},
    "layers": BASE - {"layers"},
    "quant": BASE,
    "prune": BASE | {"_compiling", "_ffi"},
    "distill": BASE | {"_files"},
    "codec": BASE | {"_files", "_compiling"},
    "run": BASE | {"_files", "_compiling", "_ffi"},
    "cli": BASE | {"quant", "prune", "distill", "codec", "run", "__init__"},
    "__init__": BASE | {"quant", "prune", "distill", "codec", "run"},
}
MODULES = sorted((ROOT / "jopt").rglob("*.py"))


def imports_of(file):
    """List the modules that a file imports, in full."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_module_imports_only_what_lies_below_it(file):
    package = file.relative_to(ROOT / "jopt").parts[0].removesuffix(".py")
    for name in imports_of(file):
        parts = name.split(".")
        if parts[0] == "jopt":
            target = parts[1] if len(parts) > 1 and parts[1] in ALLOWED else "__init__"
            assert target in ALLOWED[package] | {package}, name
        assert parts[0] not in {"tensorflow_datasets", "matplotlib", "torch", "experiments"}, name
        assert not name.startswith(("jax._src", "jax.core", "flax.core", "flax.linen")), name
        assert parts[0] != "flax" or name.startswith("flax.struct"), name


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_stay_short(file):
    assert len(file.read_text().splitlines()) <= 400


def taken_from_jax(file):
    """List the names of JAX that a file reads, such as `jax.ffi.ffi_call`."""
    short = {"jax": "jax", "lax": "jax.lax", "jnp": "jax.numpy"}
    yield from (name for name in imports_of(file) if name.startswith("jax."))
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute):
            root, *parts = ast.unparse(node).split(".")
            if root in short and all(map(str.isidentifier, parts)):
                yield ".".join([short[root], *parts])


def test_jax_is_as_new_as_is_asked_and_has_every_name_that_is_taken():
    """Say at once which public name a version of JAX has lost, or is about to lose."""
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (least,) = (each.partition(">=")[2] for each in asked if re.match(r"jax\b", each))
    assert jax.__version_info__ >= tuple(map(int, least.split(".")))
    names = {name for file in MODULES for name in taken_from_jax(file)}
    assert {"jax.extend.core", "jax.ffi.include_dir", "jax.lax.optimization_barrier"} <= names
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        for name in names:
            module, *parts = name.split(".")
            found = importlib.import_module(module)
            for part in parts:
                module = f"{module}.{part}"
                if not hasattr(found, part):
                    importlib.import_module(module)
                found = getattr(found, part)
                if not inspect.ismodule(found):
                    break  # what an object has is its own


def test_import_jopt_stays_light():
    heavy = ["tensorflow", "tensorflow_datasets", "matplotlib", "mlxtend", "torch"]
    code = f"import jopt, sys; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert out.stdout.strip() == "[]", out.stdout + out.stderr


def test_every_public_name_is_exported_once_and_documented():
    import jopt

    for module in (jopt, jopt.layers, jopt.quant, jopt.prune, jopt.distill, jopt.codec, jopt.run):
        assert sorted(module.__all__) == sorted(set(module.__all__))
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isfunction(value) or inspect.isclass(value):
                assert inspect.getdoc(value), name
