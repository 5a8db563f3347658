"""Native kernels: figures of float64, under jit and vmap, and no byte read that is not theirs."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

import jopt
from jopt import quant, run
from jopt.run import _build, _forms, _native
from jopt.run._packing import into_panels, out_of_panels, rows_at
from tests.conftest import (
    COMPILER,
    needs_arm,
    needs_compiler,
    run_check,
    run_check_for_arm,
    switched,
)
from tests.test_run import MAKERS, _tree, apply, reference

EDGES = ((0, 0), (0, 0))


def panels(codes):
    """Lay int8 codes, (..., outputs, inputs), out as kernels read them."""
    fill = [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % 32)]
    return into_panels(jnp.pad(codes, fill), 4)


@needs_compiler
def test_kernels_are_compiled_once_and_say_for_what(native):
    assert run.native_problem() is None
    assert run.native_instructions() in {
        "AVX2",
        "AVX-512 VNNI",
        "AVX-512 VNNI and VBMI",
        "NEON with dot products",
        "NEON",
        "portable",
    }
    library, _ = _build.file_and_command()
    assert library.exists()
    changed = library.stat().st_mtime_ns
    _build._loaded.cache_clear()
    assert run.native_problem() is None
    assert library.stat().st_mtime_ns == changed


@needs_compiler
@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("name", sorted(MAKERS))
def test_models_run_by_kernels_as_by_xla(native, name, activations):
    x = jax.random.normal(jax.random.key(5), (3, 64))
    params = _tree(MAKERS[name])
    prepared = run.prepare(apply, params, x)
    forms = {row.form for row in run.explain(apply, prepared, x, activations=activations).rows}
    by_kernel = {form for form in forms if form.startswith("native")}
    assert by_kernel or name in {"int8 by group", "int4 by 16"}
    outputs = run.compressed(apply, activations=activations)(prepared, x)
    expected = reference(params, x)
    if activations == "float":
        np.testing.assert_allclose(outputs, expected, rtol=2e-5, atol=2e-5)
    else:
        assert np.abs(outputs - expected).max() < 0.03 * np.abs(expected).max()


@needs_compiler
@pytest.mark.parametrize("rows", [4, 40])  # by outputs, and by panels
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("name", ["affine8", "affine4 by 64", "nf4", "int2"])
def test_kernels_sum_the_same_integers_as_xla(native, name, rounded, rows):
    kernel = jax.random.normal(jax.random.key(0), (192, 37))
    x = jax.random.normal(jax.random.key(1), (rows, 192)).at[2].set(0.0)
    linear = lambda params, x: x @ params["first"]  # noqa: E731
    matrix = run.prepare(linear, {"first": MAKERS[name](kernel)}, x)["first"]
    forms = _forms.forms_of(matrix, rounded)
    kept = [form for form in forms if form.name.endswith("float") or form.name == _forms.FLOATS]
    taken = [form for form in forms if form not in kept] if rounded else kept[:-1]
    outputs = [jax.jit(form.product)(matrix, x) for form in taken]
    if not rounded:
        outputs.append(_forms.floats(matrix, x))
    for other in outputs[1:]:
        chex.assert_trees_all_close(outputs[0], other, rtol=1e-5, atol=1e-4)
    chex.assert_trees_all_equal(outputs[0][2], jnp.zeros(37))


@needs_compiler
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("fixed", [None, 1e30, 1e-30])
def test_steps_and_scales_of_any_size_do_not_overflow_on_the_way(native, fixed, rows):
    codes = jnp.full((3, 64), 100, jnp.int8)
    scale = jnp.array([1e30, 1.0, 1e-30])
    steps = jnp.array([1e30, 1.0, 1e-30]) if fixed is None else jnp.full(3, fixed)
    x = jnp.resize(steps, rows)[:, None] * jnp.full((rows, 64), 127.0)
    given = None if fixed is None else jnp.full(1, fixed)
    outputs = _native.int8_product(x, panels(codes), scale, None, given, rounded=True)
    exact = np.asarray(x, np.float64) @ np.asarray(codes, np.float64).T * np.asarray(scale)
    with np.errstate(over="ignore"):
        expected = exact.astype(np.float32)
    expected[np.abs(expected) < np.finfo(np.float32).tiny] = 0
    kept = np.where(np.abs(outputs) < np.finfo(np.float32).tiny, 0, outputs)
    np.testing.assert_allclose(kept, expected, rtol=1e-6)


@needs_compiler
def test_a_row_that_is_not_finite_has_no_finite_output(native):
    x = jnp.ones((20, 70)).at[3, 5].set(jnp.nan).at[7, 0].set(jnp.inf)
    codes, scale = panels(jnp.ones((17, 70), jnp.int8)), jnp.ones(17)
    rounded = _native.int8_product(x, codes, scale, rounded=True)
    assert np.isnan(rounded[jnp.array([3, 7])]).all()
    kept = _native.int8_product(x, codes, scale, rounded=False)
    assert not np.isfinite(kept[jnp.array([3, 7])]).any()
    for outputs in (rounded, kept):
        np.testing.assert_allclose(np.delete(np.asarray(outputs), [3, 7], 0), 70.0, rtol=1e-6)


@needs_compiler
def test_as_many_inputs_as_fit_are_summed_exactly_and_more_are_refused(native):
    longest = _forms.LONGEST
    x, codes = jnp.full((9, longest), 127.0), jnp.full((1, longest), -128, jnp.int8)
    for rows in (1, 9):
        outputs = _native.int8_product(x[:rows], panels(codes), jnp.ones(1), rounded=True)
        np.testing.assert_array_equal(outputs, np.float32(-127 * 128 * longest))
    with pytest.raises(Exception, match=r"jopt: weights must have at most 2\^16 inputs"):
        more = panels(jnp.ones((1, longest + 1), jnp.int8))
        jax.block_until_ready(
            _native.int8_product(jnp.ones((1, longest + 1)), more, jnp.ones(1), rounded=True)
        )


@pytest.mark.parametrize(("rows", "count", "item"), [(1, 3, 1), (16, 2, 4), (37, 5, 4), (0, 2, 1)])
def test_panels_hold_the_rows_that_went_in(rows, count, item):
    draw = np.random.default_rng(0)
    given = jnp.asarray(draw.integers(0, 256, (2, rows, count * item)), jnp.uint8)
    laid = into_panels(given, item)
    assert laid.shape == (2, -(-rows // 16), count, 16, item)
    np.testing.assert_array_equal(out_of_panels(laid, rows), given)
    some = jnp.asarray([rows - 1, 0][: 2 * bool(rows)], jnp.int32)
    np.testing.assert_array_equal(rows_at(laid[0], some), given[0, some])


@needs_compiler
def test_kernels_run_over_copies_nested_and_shared(native):
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.normal(size=(2, 3, 70)), jnp.float32)
    codes = jnp.asarray(draw.integers(-127, 128, (4, 5, 70)), jnp.int8)
    scale = jnp.asarray(draw.random(5), jnp.float32)

    def product(x, codes):
        return _native.int8_product(x, panels(codes), scale, rounded=False)

    both = jax.jit(jax.vmap(jax.vmap(product, (0, None)), (None, 0)))(x, codes)
    expected = np.einsum(
        "bmk,cnk->cbmn", np.asarray(x, np.float64), np.asarray(codes) * np.asarray(scale)[:, None]
    )
    np.testing.assert_allclose(both, expected, rtol=1e-4, atol=1e-3)
    shared = jax.vmap(product, (0, None))(x, codes[0])
    np.testing.assert_allclose(shared, expected[0], rtol=1e-4, atol=1e-3)
    paired = jax.vmap(product)(x, codes[:2])
    np.testing.assert_allclose(paired[1], expected[1, 1], rtol=1e-4, atol=1e-3)


SPARSE_WRONG = {
    "starts": {"starts": np.array([0, 9, 2], np.int32)},
    "starts of codes": {"starts": np.array([0, 9, 2], np.int32), "rounded": True},
    "negative start": {"starts": np.array([-1, 1, 2], np.int32)},
    "starts beyond": {"starts": np.array([0, 1, 3], np.int32)},
    "number of starts": {"starts": np.array([0, 1], np.int32)},
    "blocks": {"starts": np.array([0, 1, 1, 2, 2], np.int32)},
    "number of columns": {"columns": np.array([0], np.uint8)},
    "type of values": {"values": np.array([1, 2], np.uint8)},
    "scale": {"scale": np.array([1], np.float32)},
    "rounded floats": {"rounded": True, "values": np.ones(2, np.float32)},
}


@needs_compiler
def test_shapes_that_do_not_fit_are_refused_before_anything_is_read(native):
    x, codes, scale = jnp.ones((2, 70)), panels(jnp.ones((5, 70), jnp.int8)), jnp.ones(5)
    packed, group = jnp.ones((5, 64), jnp.uint8), {"group": 64, "rounded": True}
    four, scales = into_panels(packed, 4), jnp.ones((1, 2, 16, 1))
    about: dict[str, Any] = {"outputs": 5} | group
    odd: dict[str, Any] = about | {"group": 48}
    more: dict[str, Any] = about | {"outputs": 17}
    table = jnp.ones((5, 16))
    four_numbers = jnp.ones(4)
    ends = [
        _native.After(less=four_numbers),
        _native.After(times=four_numbers),
        _native.After(plus=four_numbers),
    ]

    def sparse(**changed):
        named: Any = {
            "values": np.array([1, 2], np.int8),
            "columns": np.array([0, 69], np.uint8),
            "starts": np.array([0, 1, 2], np.int32),
        }
        return _native.sparse_product(x, outputs=2, **(named | changed))

    jax.block_until_ready([sparse(), sparse(rounded=True), sparse(values=jnp.ones(2))])
    image, windows = x.reshape(1, 2, 7, 10), {"size": (1, 7), "strides": (1, 1), "padding": EDGES}
    ended = [
        partial(_native.int8_product, x, codes, scale, rounded=True),
        partial(_native.int4_product, x, four, scales, **about),
        partial(_native.floats_product, x, jnp.ones((70, 5))),
        partial(_native.int8_convolution, image, codes, scale, **windows),
        partial(_native.convolution, image, jnp.ones((2, 2, 10, 5)), (1, 1), EDGES),
        partial(_native.depthwise, image, jnp.ones((2, 2, 10)), (1, 1), EDGES),
    ]
    for call in ended:
        jax.block_until_ready(call())
    calls = [
        *(partial(call, after=end) for call in ended for end in ends),
        lambda: _native.int8_product(x, codes[:, :-1], scale, rounded=True),
        lambda: _native.int8_product(x, codes[..., :8, :], scale, rounded=True),
        lambda: _native.int8_product(x, codes, jnp.ones(17), rounded=True),
        lambda: _native.int8_product(x, codes, scale, scale[:2], rounded=True),
        lambda: _native.int4_product(x, four[:, :8], scales, **about),
        lambda: _native.int4_product(x, four, scales[:, :1], **about),
        lambda: _native.int4_product(x, four, scales, scales[:, :, :8], **about),
        lambda: _native.int4_product(x, four, scales, **odd),
        lambda: _native.int4_product(x, four, scales, **more),
        lambda: _native.codebook_product(x, packed[:, :32], jnp.ones((5, 2)), table, **group),
        lambda: _native.codebook_product(x, packed, jnp.ones((5, 1)), table, **group),
        lambda: _native.codebook_product(x, packed, jnp.ones((5, 2)), table[:3], **group),
        lambda: _native.codebook_product(
            x, packed, jnp.ones((5, 2)), table, group=48, rounded=True
        ),
        lambda: _native.signs_product(x, packed[:, :8], scale),
        lambda: _native.floats_product(x, jnp.ones((60, 5))),
        lambda: _native.convolution(x.reshape(1, 2, 7, 10), jnp.ones((2, 2, 9, 4)), (1, 1), EDGES),
        lambda: _native.int8_convolution(
            x.reshape(1, 2, 7, 10), codes, scale, size=(2, 2), strides=(1, 1), padding=EDGES
        ),
        lambda: _native.depthwise(x.reshape(1, 2, 7, 10), jnp.ones((2, 2, 9)), (1, 1), EDGES),
        *(partial(sparse, **each) for each in SPARSE_WRONG.values()),
    ]
    for call in calls:
        with pytest.raises(Exception, match="jopt: .* must "):
            jax.block_until_ready(call())


@needs_compiler
def test_pruned_kernels_run_by_kernels(native):
    draw = np.random.default_rng(0)
    kernel = np.where(draw.random((1300, 41)) < 0.1, draw.normal(size=(1300, 41)), 0)
    kernel[:, 7] = kernel[500:1100, 9] = 0
    params = {"first": jnp.asarray(kernel, jnp.float32)}
    linear = lambda params, x: x @ params["first"]  # noqa: E731
    for rows in (1, 3, 12, 17, 40):
        x = jnp.asarray(draw.normal(size=(rows, 1300)), jnp.float32)
        prepared = run.prepare(linear, params, x)
        assert isinstance(prepared["first"], run.SparseMatrix)
        assert len(prepared["first"].starts) == 41 * 6 + 1
        np.testing.assert_array_equal(prepared["first"].restore(), params["first"])
        outputs = run.compressed(linear)(prepared, x)
        np.testing.assert_allclose(outputs, np.asarray(x, np.float64) @ kernel, atol=1e-4)


CODES = {
    "int8": quant.QuantSpec(8, (-1, 1)),
    "int4": quant.QuantSpec(4, (-1, 1)),
    "affine4": quant.QuantSpec(4, (-1, 1), quant.minmax, quant.affine_zero),
}


@needs_compiler
@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("name", sorted(CODES))
def test_pruned_codes_run_by_kernels(native, name, activations):
    draw = np.random.default_rng(0)
    kernel = np.where(draw.random((1300, 41)) < 0.1, draw.normal(size=(1300, 41)), 0)
    kernel[:, 7] = kernel[500:1100, 9] = 0
    params = quant.quantize_params({"w": jnp.asarray(kernel, jnp.float32)}, CODES[name], "w")
    linear = lambda params, x: x @ params["w"]  # noqa: E731
    kernel = np.asarray(jopt.materialize(params["w"]), np.float64)
    fast = run.compressed(linear, activations=activations)
    picks = activations == "int8" and "VBMI" in run.native_instructions()
    for rows in (1, 2, 3, 17, 40):
        x = jnp.asarray(draw.normal(size=(rows, 1300)), jnp.float32)
        prepared = run.prepare(linear, params, x, sparse=0.88)
        assert isinstance(prepared["w"], run.SparseMatrix)
        assert prepared["w"].values.dtype == jnp.int8
        assert len(prepared["w"].starts) == 41 * 6 + 1
        chex.assert_trees_all_close(jopt.materialize(prepared), jopt.materialize(params), rtol=1e-6)
        row = run.explain(linear, prepared, x, activations=activations).rows[0]
        rounded = picks and rows <= 2
        assert row.form == f"native sparse x {'int8' if rounded else 'float'}"
        seen = np.asarray(x, np.float64)
        if rounded:
            codes, step = _forms.round_rows(x)
            seen = np.asarray(codes, np.float64) * np.asarray(step, np.float64)
        np.testing.assert_allclose(fast(prepared, x), seen @ kernel, rtol=1e-5, atol=1e-4)
    slope = jax.grad(lambda x: (fast(prepared, x) ** 2).sum() / 2)(x)
    outputs = np.asarray(fast(prepared, x), np.float64)
    np.testing.assert_allclose(slope, outputs @ kernel.T, rtol=1e-4, atol=1e-3)
    copies = jnp.stack([x, 2 * x])
    twice = jax.vmap(fast, (None, 0))(prepared, copies)
    np.testing.assert_allclose(twice, [outputs, 2 * outputs], rtol=1e-5, atol=1e-4)


@needs_compiler
def test_codes_of_large_networks_alone_lie_in_compressed_rows(native):
    """Fewer stay in a cache, where all of them are multiplied faster by rounded inputs."""
    linear = lambda params, x: x @ params["w"] @ params["v"]  # noqa: E731
    for size, kind in ((64, run.Int8Matrix), (2050, run.SparseMatrix)):
        params, x = {name: jnp.eye(size) for name in "wv"}, jnp.ones((1, size))
        ready = run.prepare(linear, quant.quantize_params(params, quant.QuantSpec(8), "."), x)
        assert isinstance(ready["w"], kind)
        np.testing.assert_allclose(run.compressed(linear)(ready, x), x, rtol=1e-6)


@needs_compiler
def test_codes_are_summed_exactly_by_whatever_picks_them(native):
    draw = np.random.default_rng(1)
    codes = np.where(draw.random((9, 700)) < 0.3, draw.integers(-128, 128, (9, 700)), 0)
    codes[3] = np.where(draw.random(700) < 0.9, -128, 127)
    outputs, columns = np.nonzero(codes)
    counts = np.bincount(outputs * 3 + columns // 256, minlength=27)
    starts = np.append(0, np.cumsum(counts)).astype(np.int32)
    x = np.clip(draw.integers(-200, 200, (3, 700)), -127, 127).astype(np.float32)
    x[:, 0] = 127  # the step is 1
    values = codes[outputs, columns].astype(np.int8)
    places = (columns % 256).astype(np.uint8)
    arrays: Any = x, values, places, starts
    found = _native.sparse_product(*arrays, outputs=9, rounded=True)
    np.testing.assert_array_equal(found, (x.astype(np.int64) @ codes.T).astype(np.float32))


@needs_compiler
def test_what_has_no_product_of_codes_runs_by_what_is_left_of_it(native):
    draw = np.random.default_rng(0)
    kernel = np.where(draw.random((512, 64)) < 0.1, draw.normal(size=(512, 64)), 0)
    levels = tuple(np.sort(np.append(0, draw.normal(size=39))))
    table = quant.QuantSpec(6, (), quant.absmax, quant.codebook(levels))
    linear = lambda params, x: x @ params["w"]  # noqa: E731
    x = jnp.asarray(draw.normal(size=(3, 512)), jnp.float32)
    for spec in (table, quant.QuantSpec(8, (), quant.absmax, quant.e4m3)):
        params = quant.quantize_params({"w": jnp.asarray(kernel, jnp.float32)}, spec, "w")
        prepared = run.prepare(linear, params, x)
        assert isinstance(prepared["w"], run.SparseMatrix)
        chex.assert_trees_all_close(jopt.materialize(prepared), jopt.materialize(params), rtol=1e-6)
        assert run.explain(linear, prepared, x).rows[0].form == "native sparse x float"
        expected = np.asarray(x, np.float64) @ np.asarray(jopt.materialize(params["w"]), np.float64)
        np.testing.assert_allclose(run.compressed(linear)(prepared, x), expected, atol=1e-4)
    assert not isinstance(run.prepare(linear, params, x, sparse=0.95)["w"], run.SparseMatrix)


@pytest.mark.parametrize("kind", ["native", "xla"])
def test_signs_by_signs_are_counted(kind, request):
    if kind == "native":
        if COMPILER is None:
            pytest.skip("there is no C++ compiler")
        request.getfixturevalue("native")
    draw = np.random.default_rng(0)
    kernel, x = draw.normal(size=(301, 41)), draw.normal(size=(2, 3, 301))
    x[0, 0, :2] = 0.0, -0.0
    leaf = quant.binarize(jnp.asarray(kernel, jnp.float32))
    matrix = run.prepare(lambda params, x: x @ params["w"], {"w": leaf}, x)["w"]
    outputs = jax.jit(run.binary_product)(jnp.asarray(x, jnp.float32), matrix)
    counts = np.where(x >= 0, 1, -1) @ np.where(kernel >= 0, 1, -1)
    np.testing.assert_allclose(outputs, counts * np.asarray(leaf.scale)[0], rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="do not multiply"):
        run.binary_product(jnp.ones((2, 300)), matrix)
    with pytest.raises(TypeError, match="kernel must be a SignMatrix"):
        run.binary_product(jnp.ones((2, 300)), leaf)  # pyright: ignore[reportArgumentType]


WINDOWS = {
    "native depthwise": {"kernel_size": (3, 2), "strides": (2, 1), "feature_group_count": 6},
    "native convolution": {"kernel_size": (3, 2), "strides": (2, 1)},
    "native product of matrices": {"kernel_size": (1, 1), "strides": (2, 1)},
}


@needs_compiler
@pytest.mark.parametrize("form", sorted(WINDOWS))
def test_convolutions_run_by_kernels_and_have_derivatives(native, form):
    module = linen.Conv(6, **WINDOWS[form], use_bias=False)
    x = jax.random.normal(jax.random.key(0), (2, 7, 9, 6))
    params = module.init(jax.random.key(1), x)
    fast = run.compressed(module.apply)
    assert run.explain(module.apply, params, x).rows[0].form == form
    chex.assert_trees_all_close(fast(params, x), module.apply(params, x), atol=1e-5)

    def slope(of):
        return jax.grad(lambda params, x: jnp.sin(of(params, x)).sum(), (0, 1))(params, x)

    chex.assert_trees_all_close(slope(fast), slope(module.apply), rtol=1e-4, atol=1e-4)
    copies = jnp.stack([x, 2 * x])
    expected = jax.vmap(module.apply, (None, 0))(params, copies)
    chex.assert_trees_all_close(jax.vmap(fast, (None, 0))(params, copies), expected, atol=1e-5)
    per_copy = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf]), params)
    expected = jax.vmap(module.apply)(per_copy, copies)
    chex.assert_trees_all_close(jax.vmap(fast)(per_copy, copies), expected, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("spec", [quant.QuantSpec(8), quant.QuantSpec(8, grid=quant.affine)])
def test_convolutions_with_windows_run_by_codes(native, spec):
    module = linen.Conv(21, (3, 2), (2, 1), padding=((1, 0), (2, 1)))
    x = jax.random.normal(jax.random.key(0), (2, 7, 9, 5))
    params = module.init(jax.random.key(1), x)
    codes = quant.quantize_params(params, spec, ".*kernel")
    ready = run.prepare(module.apply, codes, x)
    assert isinstance(ready["params"]["kernel"], run.Int8Matrix)
    chex.assert_trees_all_equal(jopt.materialize(ready), jopt.materialize(codes))
    for activations in ("float", "int8"):
        row = run.explain(module.apply, ready, x, activations=activations).rows[0]
        assert (row.form, row.why) == ("native int8 convolution", "")
    fast, floats = run.compressed(module.apply), jopt.materialize(codes)
    chex.assert_trees_all_close(fast(ready, x), module.apply(floats, x), atol=1e-5)

    def slope(of, params):
        return jax.grad(lambda x: jnp.sin(of(params, x)).sum())(x)

    chex.assert_trees_all_close(slope(fast, ready), slope(module.apply, floats), atol=1e-4)
    copies = jnp.stack([x, 2 * x])
    expected = jax.vmap(module.apply, (None, 0))(floats, copies)
    chex.assert_trees_all_close(jax.vmap(fast, (None, 0))(ready, copies), expected, atol=1e-5)
    with switched(JOPT_NATIVE="0"):  # a tree that was prepared where there was a compiler
        chex.assert_trees_all_close(
            run.compressed(module.apply)(ready, x), module.apply(floats, x), atol=1e-5
        )
        assert run.explain(module.apply, ready, x).rows[0].form == "XLA, convolution"


@needs_compiler
@pytest.mark.parametrize("bits", [2, 4])
def test_kernels_with_windows_of_fewer_bits_stay_as_they_are(native, bits):
    module = linen.Conv(6, (3, 2))
    x = jnp.ones((1, 7, 9, 5))
    params = quant.quantize_params(module.init(jax.random.key(1), x), quant.QuantSpec(bits))
    ready = run.prepare(module.apply, params, x)
    row = run.explain(module.apply, ready, x).rows[0]
    assert row.leaf == "QTensor" and "int8 codes alone" in row.why


@needs_compiler
@pytest.mark.parametrize(
    "more", [{"kernel_dilation": 2}, {"padding": ((-1, 0), (0, -1))}, {"feature_group_count": 2}]
)
def test_convolutions_that_no_kernel_computes_are_left_to_xla(native, more):
    module = linen.Conv(6, (3, 2), **more)
    x = jax.random.normal(jax.random.key(0), (2, 7, 9, 6))
    params = module.init(jax.random.key(1), x)
    assert not run.explain(module.apply, params, x).rows[0].form.startswith("native")
    outputs = run.compressed(module.apply)(params, x)
    chex.assert_trees_all_close(outputs, module.apply(params, x), atol=1e-5)


def test_without_a_compiler_everything_runs_and_says_so():
    with switched(JOPT_NATIVE=None, PATH="", CXX=None):
        x = jnp.ones((1, 64))
        params = _tree(MAKERS["int8"])
        assert "no C++ compiler was found" in str(run.native_problem())
        found = run.explain(apply, run.prepare(apply, params, x), x)
        assert "no C++ compiler was found" in str(found)
        outputs = run.compressed(apply)(run.prepare(apply, params, x), x)
        np.testing.assert_allclose(outputs, reference(params, x), rtol=2e-5, atol=2e-5)


def test_a_compiler_that_fails_is_quoted(tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'what is this' >&2\nexit 1\n")
    broken.chmod(0o755)
    cache = str(tmp_path / "cache")
    with switched(JOPT_NATIVE=None, CXX=str(broken), JOPT_CACHE=cache):
        assert run.native_problem() == f"{broken} failed: what is this"
        assert list((tmp_path / "cache").iterdir()) == []


@needs_compiler
def test_many_callers_at_once_all_come_back(native):
    """XLA runs products side by side on the pool whose threads each product asks for, too."""

    def many(params, x):
        return [jnp.tanh(x + place) @ params["w"] for place in range(12)]

    params = {"w": jax.random.normal(jax.random.key(0), (512, 2048))}
    tree = quant.quantize_params(params, quant.QuantSpec(8), ".*")
    x = jax.random.normal(jax.random.key(1), (40, 512))
    ready = run.prepare(many, tree, x)
    found = run.explain(many, ready, x, activations="int8").rows[0]
    assert found.form.startswith("native")
    fast = run.compressed(many, activations="int8")
    alone = fast(ready, x)
    chex.assert_trees_all_close(alone, many(jopt.materialize(tree), x), atol=1.5)
    with ThreadPoolExecutor(8) as threads:
        for each in threads.map(lambda _: fast(ready, x), range(24)):
            chex.assert_trees_all_equal(each, alone)


@needs_compiler
@pytest.mark.parametrize("kind", ["for this machine, sanitized", "portable"])
def test_no_kernel_reads_or_writes_beyond_its_arrays(kind, request, tmp_path):
    flags = ["-O0", "-DJOPT_PORTABLE"]
    if kind != "portable":
        flags = ["-O0", "-march=native", *request.getfixturevalue("sanitized")]
    run_check("native_check.cc", "jopt/run/native", flags, tmp_path / "check")


@needs_arm
@pytest.mark.parametrize(
    ("machine", "instructions"),
    [("armv8-a", "NEON"), ("armv8.2-a+dotprod", "NEON with dot products")],
)
def test_kernels_for_arm_run_right_in_an_emulator(machine, instructions, tmp_path):
    program = tmp_path / "check"
    said = run_check_for_arm("native_check.cc", "jopt/run/native", machine, program)
    assert said.startswith(f"{instructions}: ")
