"""The native kernel that marks the largest scores: what it refuses, where it runs, its bounds.

That it marks the right ones is in test_prune_threshold.py, which runs it and XLA.
"""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jopt import prune
from jopt.prune import _natively
from tests.conftest import (
    needs_arm,
    needs_compiler,
    run_check,
    run_check_for_arm,
    switched,
)


@needs_compiler
def test_the_kernel_reads_and_writes_its_arrays_alone(sanitized, tmp_path):
    flags = ["-O1", *sanitized]
    run_check("select_check.cc", "jopt/prune/native", flags, tmp_path / "check")


@needs_arm
def test_the_kernel_runs_right_in_an_emulator_of_arm(tmp_path):
    run_check_for_arm("select_check.cc", "jopt/prune/native", "armv8-a", tmp_path / "check")


@pytest.fixture
def kernel(tmp_path_factory):
    jax.clear_caches()
    folder = str(tmp_path_factory.getbasetemp() / "native")
    with switched(JOPT_NATIVE=None, JOPT_CACHE=folder):
        assert _natively.problem() is None
        yield
    jax.clear_caches()


@needs_compiler
def test_masks_of_a_tree_run_by_the_kernel_and_equal_those_of_xla(kernel, monkeypatch):
    sizes = {"conv": (3, 3, 8, 16), "dense": (130, 70), "head": (70, 10)}
    keys = jax.random.split(jax.random.key(0), len(sizes))
    scores = {
        name: {"kernel": jnp.abs(jax.random.normal(key, shape, dtype))}
        for key, (name, shape), dtype in zip(
            keys, sizes.items(), (jnp.float32, jnp.bfloat16, jnp.float16), strict=True
        )
    }
    ways = [
        lambda tree: prune.global_topk_masks(tree, 0.9),
        lambda tree: prune.topk_masks(tree, 0.9),
        lambda tree: prune.output_topk_masks(tree, 0.5),
    ]
    native = [way(scores) for way in ways]
    program = str(jax.jit(ways[0]).lower(scores).as_text())
    assert "jopt_select" in program and "while" not in program
    jax.clear_caches()
    monkeypatch.setattr(_natively, "problem", lambda: "for comparison")
    assert "jopt_select" not in str(jax.jit(ways[0]).lower(scores).as_text())
    for made, way in zip(native, ways, strict=True):
        for one, other in zip(jax.tree.leaves(made), jax.tree.leaves(way(scores)), strict=True):
            np.testing.assert_array_equal(one, other)


@needs_compiler
def test_a_program_for_other_backends_counts(kernel):
    masks = jax.jit(lambda scores: prune.global_topk_masks(scores, 0.5))
    scores = {"kernel": jnp.ones((40, 3))}
    for platform, native in {"cpu": True, "tpu": False, "cuda": False}.items():
        text = masks.trace(scores).lower(lowering_platforms=(platform,)).as_text()
        assert ("jopt_select" in text) == native


@needs_compiler
def test_many_callers_at_once_all_come_back(kernel):
    """Each call takes threads of the pool that XLA runs the other calls on."""
    scores = jax.random.normal(jax.random.key(1), (8, 40_000))
    keep = jnp.arange(1, 9) * 4000
    one = jax.jit(lambda scores, keep: prune.topk_masks({"kernel": scores}, 0.75)["kernel"])
    together = jax.jit(jax.vmap(lambda row, keep: _natively.keep_largest([row], keep)[0]))
    with ThreadPoolExecutor(8) as threads:
        counts = list(threads.map(lambda _: one(scores, keep).sum(), range(40)))
        rows = list(threads.map(lambda _: together(scores, keep).sum(1), range(40)))
    assert {int(count) for count in counts} == {80_000}
    assert all((np.asarray(row) == keep).all() for row in rows)


@needs_compiler
def test_wrong_operands_are_refused_before_they_are_read(kernel):
    def call(*operands, made):
        shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in made]
        return jax.ffi.ffi_call("jopt_select", shapes)(*operands)

    keep, scores = jnp.int32(2), jnp.ones(5)
    marks = ((5,), jnp.bool_)
    for operands, made, words in (
        ((keep,), [marks], "as many scores as marks"),
        ((jnp.float32(2), scores), [marks], "keep must be int32"),
        ((keep, jnp.ones(5, jnp.int32)), [marks], "scores must be float32"),
        ((keep, scores), [((5,), jnp.int8)], "marks boolean"),
        ((keep, scores), [((4,), jnp.bool_)], "of one length"),
        ((keep, scores[None]), [((1, 5), jnp.bool_)], "one axis more than keep"),
        ((keep[None], jnp.ones((2, 5))), [((3, 5), jnp.bool_)], "leading axes must be equal"),
        ((jnp.ones(2, jnp.int32), jnp.ones((1, 5))), [((3, 5), jnp.bool_)], "leading axes"),
    ):
        with pytest.raises(Exception, match=words):
            jax.block_until_ready(call(*operands, made=made))


def test_without_a_compiler_xla_counts():
    with switched(JOPT_NATIVE=None, PATH="", CXX=None):
        assert "no C++ compiler was found" in str(_natively.problem())
        masks = prune.topk_masks({"kernel": jnp.arange(12.0).reshape(4, 3)}, 0.75)
        assert int(masks["kernel"].sum()) == 3
    with switched(JOPT_NATIVE="0"):
        assert _natively.problem() == "JOPT_NATIVE is 0"
