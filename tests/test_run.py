"""Compressed models run as their plain path: any leaf, any model, transformed in any way."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

import jopt
from jopt import codec, quant, run
from jopt._leaves import Prepared
from jopt.run import _pallas, _probe
from jopt.run._packing import pack4, pack_bits, unpack4, unpack_bits
from tests import nets

SPECS = {
    "int8": quant.QuantSpec(8),
    "affine8": quant.QuantSpec(8, (1,), quant.minmax, quant.affine),
    "one scale": quant.QuantSpec(8, ()),
    "int8 by group": quant.QuantSpec(8, (16, 1)),
    "int4": quant.QuantSpec(4),
    "int4 by 32": quant.QuantSpec(4, (32, 1)),
    "affine4 by 64": quant.QuantSpec(4, (64, 1), quant.minmax, quant.affine),
    "int4 by 16": quant.QuantSpec(4, (16, 1)),
    "int2": quant.QuantSpec(2),
    "nf4": quant.QuantSpec(4, (64, 1), quant.absmax, quant.nf4),
    "codebook": quant.QuantSpec(2, (), quant.absmax, quant.codebook((-1.0, 0.0, 0.5))),
    "int3": quant.QuantSpec(3, (64, 1)),
}


def _tree(make):
    """Compress a kernel of 64 inputs and one of 192 by one method."""
    keys = jax.random.split(jax.random.key(3), 2)
    shapes = {"first": (64, 192), "second": (192, 5)}
    return {
        name: make(jax.random.normal(key, shape))
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def _factor(kernel):
    return jnp.linspace(0.5, 2.0, kernel.shape[-2])[:, None]


def _binary(kernel):
    return quant.quantize(kernel, quant.QuantSpec(1, (1,), quant.absmax, quant.binary))


def _scaled(kernel):
    factor = _factor(kernel)
    return jopt.ScaledTensor(quant.quantize(kernel / factor, quant.QuantSpec(4, (64, 1))), factor)


def _rotated(kernel):
    signs = jnp.where(jnp.arange(len(kernel)) % 3 == 0, -1, 1).astype(jnp.int8)[:, None]
    return jopt.RotatedTensor(quant.quantize(kernel, quant.QuantSpec(8)), signs)


def _scaled_rotated(kernel):
    return jopt.ScaledTensor(_rotated(kernel), _factor(kernel))


MAKERS = {
    name: (lambda spec: lambda kernel: quant.quantize(kernel, spec))(s) for name, s in SPECS.items()
}
MAKERS |= {
    "binary": _binary,
    "bits": quant.binarize,
    "scaled": _scaled,
    "rotated": _rotated,
    "scaled and rotated": _scaled_rotated,
}


def apply(params, x):
    """Run two dense layers."""
    return jnp.tanh(x @ params["first"]) @ params["second"]


def reference(params, x):
    """Return the plain path, in float64 on the host."""
    dense = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), jopt.materialize(params))
    return np.tanh(np.asarray(x, np.float64) @ dense["first"]) @ dense["second"]


@pytest.fixture(params=[1, 5])
def x(request):
    return jax.random.normal(jax.random.key(4), (request.param, 64))


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_outputs_are_those_of_the_plain_path(name, x):
    params = _tree(MAKERS[name])
    prepared = run.prepare(apply, params, x)
    for plain, ready in zip(
        jax.tree.leaves(jopt.materialize(params)),
        jax.tree.leaves(jopt.materialize(prepared)),
        strict=True,
    ):
        chex.assert_trees_all_close(ready, plain, rtol=1e-6, atol=1e-6)
    assert all(isinstance(leaf, Prepared) for leaf in prepared.values())
    for tree in (params, prepared):
        outputs = run.compressed(apply)(tree, x)
        np.testing.assert_allclose(outputs, reference(params, x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["affine8", "affine4 by 64", "int8 by group", "int4", "scaled"])
def test_rounded_inputs_are_off_by_half_a_step_of_each_row(name, x):
    params = _tree(MAKERS[name])
    first = lambda params, x: x @ params["first"]  # noqa: E731
    prepared = run.prepare(first, params, x)
    outputs = run.compressed(first, activations="int8")(prepared, x)
    kernel = np.asarray(jopt.materialize(params["first"]), np.float64)
    leaf = params["first"]
    factor = np.asarray(leaf.factor) if isinstance(leaf, jopt.ScaledTensor) else np.ones((64, 1))
    seen, weights = np.asarray(x, np.float64) * factor.T, kernel / factor
    step = np.abs(seen).max(1, keepdims=True) / 127
    exact = step * np.round(seen / step) @ weights
    np.testing.assert_allclose(outputs, exact, rtol=1e-4, atol=1e-4)
    bound = step / 2 * np.abs(weights).sum(0) + 1e-4
    assert (np.abs(outputs - seen @ weights) <= bound).all()


def test_a_fixed_step_serves_all_rows(x):
    params = _tree(MAKERS["int8"])
    ranges = {"first": (-1.0, 2.0)}
    prepared = run.prepare(apply, params, x, ranges=ranges)
    assert prepared["second"].input_scale is None
    first = lambda params, x: x @ params["first"]  # noqa: E731
    outputs = run.compressed(first, activations="int8")(prepared, x)
    step = 2 / 127
    rounded = step * np.clip(np.round(np.asarray(x, np.float64) / step), -127, 127)
    expected = rounded @ np.asarray(jopt.materialize(params["first"]), np.float64)
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-4)
    plain = run.compressed(first)(prepared, x)  # kept as they are where nothing is rounded
    np.testing.assert_allclose(plain, x @ jopt.materialize(params["first"]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_rows_that_are_not_finite_give_nan_and_no_other_row_does(activations):
    params = _tree(MAKERS["int8"])
    x = jnp.ones((4, 64)).at[1, 3].set(jnp.nan).at[2].set(0.0)
    prepared = run.prepare(apply, params, x)
    outputs = run.compressed(apply, activations=activations)(prepared, x)
    assert np.isnan(outputs).any(1).tolist() == [False, True, False, False]
    chex.assert_trees_all_equal(outputs[2], jnp.zeros(5))


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("name", ["int8", "affine4 by 64", "nf4", "bits", "scaled"])
def test_gradients_are_those_of_the_plain_path(name, activations, x):
    params = _tree(MAKERS[name])
    prepared = run.prepare(apply, params, x)
    fast = run.compressed(apply, activations=activations)

    def loss(of):
        return lambda params, x: jnp.sum(jnp.sin(of(params, x)))

    linear = lambda params, x: x @ params["first"]  # noqa: E731
    fast_linear = run.compressed(linear, activations=activations)
    plain = lambda params, x: linear(jopt.materialize(params), x)  # noqa: E731
    ours = jax.grad(lambda x: fast_linear(prepared, x).sum())(x)
    theirs = jax.grad(lambda x: plain(params, x).sum())(x)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-4, atol=1e-4)
    tangents = jax.jvp(lambda x: fast_linear(prepared, x), (x,), (jnp.ones_like(x),))[1]
    chex.assert_trees_all_close(tangents, plain(params, jnp.ones_like(x)), rtol=1e-4, atol=1e-4)
    if activations == "float":
        own = jax.grad(loss(fast), allow_int=True)(prepared, x)
        back = jax.grad(loss(lambda params, x: apply(jopt.materialize(params), x)), allow_int=True)
        for ours, theirs in zip(_floats(own), _floats(back(prepared, x)), strict=True):
            chex.assert_trees_all_close(ours, theirs, rtol=1e-3, atol=1e-3)


def _floats(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if leaf.dtype != jax.dtypes.float0]


MODELS = sorted(nets.NETS)


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_whole_models_run(name, activations):
    model, params, x = nets.NETS[name]()
    compressed = quant.quantize_params(params, quant.QuantSpec(8))
    prepared = run.prepare(model, compressed, x)
    expected = model(jopt.materialize(compressed), x)
    outputs = run.compressed(model, activations=activations)(prepared, x)
    assert jax.tree.structure(outputs) == jax.tree.structure(expected)
    tolerance = 2e-4 if activations == "float" else 0.06
    chex.assert_trees_all_close(outputs, expected, atol=tolerance * float(jnp.abs(expected).max()))
    rows = run.explain(model, prepared, x, activations=activations).rows
    leaves = jax.tree_util.tree_leaves_with_path(compressed, is_leaf=jopt.is_compressed)
    assert len({row.path for row in rows if row.leaf != "array"}) == sum(
        jopt.is_compressed(leaf) for _, leaf in leaves
    )
    assert all(row.why for row in rows if row.leaf == "QTensor")


def test_a_scan_slices_its_prepared_layers():
    params = quant.quantize_params(
        {"layers": jax.random.normal(jax.random.key(0), (3, 8, 8))}, quant.QuantSpec(8, (8, 1))
    )

    def model(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), x.sum()), x, params["layers"])

    x = jnp.ones((2, 8))
    prepared = run.prepare(model, params, x)
    assert prepared["layers"].codes.shape == (3, 8, 8)
    row = run.explain(model, prepared, x).rows[0]
    assert (row.leaf, row.form, row.why) == ("Int8Matrix", "XLA, floats", "")
    expected = model(jopt.materialize(params), x)
    chex.assert_trees_all_close(run.compressed(model)(prepared, x), expected, rtol=1e-5, atol=1e-5)


def test_copies_of_a_model_run_under_vmap(x):
    trees = [_tree(MAKERS["int4"]), _tree(MAKERS["int4"])]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    prepared = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *(run.prepare(apply, tree, x) for tree in trees)
    )
    outputs = jax.vmap(run.compressed(apply), (0, None))(prepared, x)
    expected = jax.vmap(lambda p: apply(jopt.materialize(p), x))(stacked)
    chex.assert_trees_all_close(outputs, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_tables_are_restored_and_no_others(bits):
    table = jax.random.normal(jax.random.key(0), (11, 64))
    params = {"table": quant.quantize(table, quant.QuantSpec(bits, (1, 64)))}

    def model(params, ids):
        return params["table"][ids], jnp.take(params["table"], ids, axis=0)

    ids = jnp.array([[3, 0, 10], [11, -1, 400]])
    prepared = run.prepare(model, params, ids)
    found = run.explain(model, prepared, ids).rows
    assert [row.form for row in found] == ["rows of codes"]
    expected = model(jopt.materialize(params), ids)
    chex.assert_trees_all_equal(run.compressed(model)(prepared, ids), expected)
    program = str(jax.make_jaxpr(run.compressed(model))(prepared, ids))
    assert "gather" in program


def test_a_tied_table_serves_both_of_its_uses():
    class Tied(linen.Module):
        @linen.compact
        def __call__(self, ids):
            embed = linen.Embed(13, 64)
            return embed.attend(jnp.tanh(embed(ids)))

    ids = jnp.array([[1, 2, 12]])
    params = quant.quantize_params(Tied().init(jax.random.key(0), ids), quant.QuantSpec(4, (1, 64)))
    prepared = run.prepare(Tied().apply, params, ids)
    rows = run.explain(Tied().apply, prepared, ids).rows
    assert [(row.kind, row.why) for row in rows] == [("gather", ""), ("dot", "")]
    expected = Tied().apply(jopt.materialize(params), ids)
    outputs = run.compressed(Tied().apply)(prepared, ids)
    chex.assert_trees_all_close(outputs, expected, rtol=1e-5, atol=1e-5)


CONVOLUTIONS = {
    "depthwise": ((3, 3), {"feature_group_count": 6}, 6),
    "depthwise, strided": ((3, 2), {"feature_group_count": 6, "strides": (2, 3)}, 6),
    "depthwise, valid": ((5, 5), {"feature_group_count": 6, "padding": "VALID"}, 6),
    "pointwise": ((1, 1), {}, 4),
    "pointwise, strided": ((1, 1), {"strides": 2}, 4),
    "pointwise, padded": ((1, 1), {"padding": 1}, 4),
    "few channels": ((3, 3), {"strides": 2}, 4),
    "dilated": ((3, 3), {"kernel_dilation": 2, "feature_group_count": 6}, 6),
    "groups": ((3, 3), {"feature_group_count": 2}, 4),
    "one dimension": ((3,), {}, 4),
}


@pytest.mark.parametrize("name", sorted(CONVOLUTIONS))
def test_convolutions_of_floats_run_in_every_way(name):
    from jopt.layers._transforms import trace_layers
    from jopt.run import _convolutions

    size, options, outputs = CONVOLUTIONS[name]
    module = linen.Conv(outputs, size, use_bias=False, **options)
    x = jax.random.normal(jax.random.key(0), (2, 7, 9, 6) if len(size) == 2 else (2, 7, 6))
    params = module.init(jax.random.key(1), x)
    expected = module.apply(params, x)
    chex.assert_trees_all_close(run.compressed(module.apply)(params, x), expected, atol=1e-5)
    use = trace_layers(module.apply, params, (x,)).analysis().uses[0]
    kernel = jax.tree.leaves(params)[0]
    shapes = _convolutions.Shapes(x.shape, kernel.shape, use.layer.window)
    ways = _convolutions.ways_of(shapes)
    assert len(ways) == 1 if name in {"dilated", "groups"} else True
    for way in ways.values():
        chex.assert_trees_all_close(way(shapes, x, kernel), expected, atol=1e-5)


def test_what_is_asked_wrongly_is_named(tmp_path, x):
    params = _tree(MAKERS["int8"])
    with pytest.raises(ValueError, match="activations must be one of .*not 'int4'"):
        run.compressed(apply, activations="int4")
    with pytest.raises(TypeError, match="apply must be a function .*not 3"):
        run.prepare(3, params, x)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"ranges has \['other'\], which are no compressed"):
        run.prepare(apply, params, x, ranges={"other": (0, 1)})
    with pytest.raises(ValueError, match=r"sparse must lie in \(0, 1\], not 1.5"):
        run.prepare(apply, params, x, sparse=1.5)
    with pytest.raises(codec.CodecError, match="'first' is a Int8Matrix, made by jopt.run.prepare"):
        codec.save(tmp_path / "model.jopt", run.prepare(apply, params, x))


def test_an_explanation_names_every_leaf_and_why():
    params = {
        "used": quant.quantize(jnp.ones((4, 4)), quant.QuantSpec(8)),
        "narrow": quant.quantize(
            jnp.ones((4, 4)), quant.QuantSpec(8, (1,), quant.absmax, quant.e4m3)
        ),
        "spare": quant.quantize(jnp.ones((4, 4)), quant.QuantSpec(8)),
        "added": quant.quantize(jnp.ones((4, 4)), quant.QuantSpec(8)),
        "both": quant.quantize(jnp.ones((4, 4)), quant.QuantSpec(8)),
        "dense": jnp.ones((4, 4)),
    }

    def model(params, x):
        x = x @ params["used"] @ params["narrow"] @ params["dense"]
        x = x @ params["both"] @ params["both"].T
        return x + params["added"]

    x = jnp.ones((4, 4))
    found = run.explain(model, run.prepare(model, params, x), x)
    rows = {row.path: row for row in found.rows}
    assert set(rows) == set(params)
    assert rows["used"].why == "" and rows["used"].leaf == "Int8Matrix"
    assert rows["spare"].why == "never used"
    assert rows["added"].why == "used by add"
    assert rows["narrow"].why == "there is no product for narrow floats"
    assert rows["both"].why == "its uses sum over different axes"
    assert rows["dense"].leaf == "array"
    unprepared = run.explain(model, params, x).rows
    assert "not laid out" in next(row.why for row in unprepared if row.path == "used")
    text = str(found)
    assert "native kernels none: JOPT_NATIVE is 0" in text
    assert all(name in text for name in params)


@pytest.mark.parametrize("rows", [1, 130])
@pytest.mark.parametrize(
    "name", ["int8", "affine8", "int8 by group", "int4", "affine4 by 64", "int4 by 32"]
)
def test_pallas_kernels_give_the_product_of_floats(name, rows):
    product = _pallas.int4_product if "4" in name else _pallas.int8_product
    kernel = jax.random.normal(jax.random.key(0), (192, 133))
    x = jax.random.normal(jax.random.key(1), (rows, 192))
    linear = lambda params, x: x @ params["w"]  # noqa: E731
    matrix = run.prepare(linear, {"w": MAKERS[name](kernel)}, x)["w"]
    outputs = product(matrix, x, interpret=True)
    expected = np.asarray(x, np.float64) @ np.asarray(jopt.materialize(matrix), np.float64)
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-4)


def test_pallas_kernels_take_inputs_that_fill_no_block():
    x, kernel = jnp.ones((3, 70)), jax.random.normal(jax.random.key(0), (70, 5))
    matrix = run.prepare(
        lambda params, x: x @ params["w"], {"w": quant.quantize(kernel, quant.QuantSpec(4))}, x
    )["w"]
    outputs = _pallas.int4_product(matrix, x, interpret=True)
    chex.assert_trees_all_close(outputs, x @ jopt.materialize(matrix), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inputs", [0, 1, 31, 32, 33, 63, 64, 65, 200])
def test_packing_loses_nothing(inputs):
    codes = np.random.default_rng(inputs).integers(0, 16, (3, inputs))
    packed = pack4(jnp.asarray(codes))
    assert packed.shape == (3, 32 * -(-inputs // 64))
    np.testing.assert_array_equal(unpack4(packed, inputs), codes)
    bits = pack_bits(jnp.asarray(codes > 7))
    assert bits.shape == (3, 4 * -(-inputs // 32))
    np.testing.assert_array_equal(unpack_bits(bits, inputs), codes > 7)


def test_sparse_kernels_are_kept_in_rows(x):
    kernel = np.asarray(jax.random.normal(jax.random.key(0), (64, 192)))
    kernel = np.where(np.abs(kernel) > 1.5, kernel, 0)
    params = {"first": jnp.asarray(kernel), "second": jnp.ones((192, 5))}
    prepared = run.prepare(apply, params, x, sparse=0.8)
    assert isinstance(prepared["first"], run.SparseMatrix)
    assert prepared["first"].values.size == np.count_nonzero(kernel)
    chex.assert_trees_all_equal(jopt.materialize(prepared), params)
    chex.assert_trees_all_close(run.compressed(apply)(prepared, x), apply(params, x), rtol=1e-4)
    assert run.prepare(apply, params, x) is not None
    untouched = run.prepare(apply, params, x)["first"]
    assert isinstance(untouched, jax.Array)  # without native kernels nothing is gained


@pytest.fixture
def probing(monkeypatch, tmp_path):
    """Measure ways, and keep what is found in a folder of the test's own."""
    monkeypatch.setenv("JOPT_PROBE", "1")
    monkeypatch.setenv("JOPT_CACHE", str(tmp_path))
    _probe._known.cache_clear()
    _probe._file.cache_clear()
    yield tmp_path
    _probe._known.cache_clear()
    _probe._file.cache_clear()


def test_ways_are_measured_once_within_a_trace_too_and_remembered(probing):
    calls = []

    def slow(x):
        calls.append("slow")
        return jax.lax.fori_loop(0, 2000, lambda i, y: jnp.sin(y), x)

    def quick(x):
        calls.append("quick")
        return x

    def broken(x):
        raise ValueError("not here")

    ways = {"slow": slow, "quick": quick, "broken": broken}

    @jax.jit
    def choose(x):
        found = _probe.seconds_of("test", ways, (jax.ShapeDtypeStruct((64,), jnp.float32),))
        assert min(found, key=found.__getitem__) == "quick"
        assert found["broken"] == float("inf")
        return x

    choose(jnp.ones(1))
    measured = len(calls)
    choose(jnp.ones(2))
    _probe._known.cache_clear()  # as in another process
    choose(jnp.ones(3))
    assert len(calls) == measured


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"test: a, b": 3}', '{"test: a, b": {"a": 1}}']
)
def test_a_damaged_file_of_choices_is_measured_anew(probing, content):
    _probe._file().write_text(content)
    shape = jax.ShapeDtypeStruct((4,), jnp.float32)
    found = _probe.seconds_of("test", {"a": jnp.sin, "b": jnp.cos}, (shape,))
    assert set(found) == {"a", "b"} and all(0 < each < 10 for each in found.values())


def test_models_run_right_whatever_was_measured(probing, x):
    params = _tree(MAKERS["int8"])
    outputs = run.compressed(apply)(run.prepare(apply, params, x), x)
    np.testing.assert_allclose(outputs, reference(params, x), rtol=2e-5, atol=2e-5)
