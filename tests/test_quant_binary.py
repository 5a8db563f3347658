"""Binary and ternary networks: the papers' formulas, their gradients, and products by counting."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jopt
from jopt import quant
from jopt._leaves import BitTensor, CodebookTensor
from jopt.quant import QuantSpec
from jopt.quant._binary import (
    binarize,
    binarize_params,
    binary,
    clipped_slope,
    fake_binarize,
    fake_binarize_params,
)
from jopt.quant._bits import (
    TernaryBits,
    binary_matmul,
    pack_signs,
    pack_ternary,
    ternary_matmul,
    unpack_signs,
)
from jopt.quant._ternary import ternarize, ternary, ternary_optimal
from jopt.quant._ttq import (
    TernaryScales,
    ttq,
    ttq_init,
    ttq_init_params,
    ttq_params,
    ttq_quantize,
    ttq_quantize_params,
)
from jopt.quant._xnor import sign_activations, xnor_conv, xnor_dense, xnor_scaling
from tests import oracles_binary as oracles

BLOCKS = {(): (8, 6), (1,): (8, 1), (4, 1): (4, 1)}  # as in QuantSpec: as whole sizes


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def signs_of(values):
    return np.where(np.asarray(values) >= 0, 1, -1)


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


# Bits -------------------------------------------------------------------------------------------

# Rows around whole bytes and words, inputs around the 64 that are multiplied at a time.
SHAPES = [(1, 1, 1), (3, 7, 2), (2, 8, 5), (64, 9, 3), (65, 31, 4), (130, 32, 1), (2, 33, 65)]
SHAPES += [(5, 257, 11), (0, 9, 2), (2, 9, 0), (2, 0, 3)]


@pytest.mark.parametrize(("count", "rows", "columns"), SHAPES)
def test_products_of_bits_are_those_of_integers(count, rows, columns):
    x, w = normal((count, rows)), normal((rows, columns), 1)
    got = binary_matmul(pack_signs(x, axis=-1), pack_signs(w), rows)
    np.testing.assert_array_equal(got, signs_of(x) @ signs_of(w))
    assert got.dtype == jnp.int32
    x, w = x * (np.abs(x) > 0.7), w * (np.abs(w) > 0.7)
    got = ternary_matmul(pack_ternary(x, axis=-1), pack_ternary(w))
    np.testing.assert_array_equal(got, np.sign(x) @ np.sign(w))


def test_products_work_under_jit_and_vmap_and_with_more_axes():
    x, w = normal((3, 4, 5, 20)), normal((3, 20, 6), 1)
    expected = np.einsum("bnmk,bko->bnmo", signs_of(x), signs_of(w))
    bits, kernels = pack_signs(x, axis=-1), pack_signs(w)
    product = jax.jit(jax.vmap(lambda a, b: binary_matmul(a, b, 20)))
    np.testing.assert_array_equal(product(bits, kernels), expected)
    planes = [pack_ternary(x, axis=-1), pack_ternary(w)]
    np.testing.assert_array_equal(jax.vmap(ternary_matmul)(*planes), expected)
    np.testing.assert_array_equal(binary_matmul(bits[0, 0, 0], kernels[0], 20), expected[0, 0, 0])


def test_a_product_never_holds_all_differences():
    x, w = jnp.zeros((2048, 128), jnp.uint8), jnp.zeros((128, 1024), jnp.uint8)
    program = jax.jit(lambda a, b: binary_matmul(a, b, 1024)).lower(x, w).compile()
    memory = program.memory_analysis()
    assert (
        memory is not None and memory.temp_size_in_bytes < 2 * 4 * 2048 * 1024
    )  # twice the result; the differences would take 256 MB


@pytest.mark.parametrize("axis", [-2, -1, 0])
@pytest.mark.parametrize("rows", [1, 8, 13])
def test_unpacking_undoes_packing_and_padding_is_zero(rows, axis):
    shape = [3, 3]
    shape[axis] = rows
    values = normal(shape)
    bits = pack_signs(values, axis=axis)
    assert bits.dtype == jnp.uint8 and bits.shape[axis] == -(-rows // 8)
    np.testing.assert_array_equal(unpack_signs(bits, rows, axis), signs_of(values))
    beyond = unpack_signs(bits, 8 * bits.shape[axis], axis)
    assert (np.take(beyond, range(rows, 8 * bits.shape[axis]), axis) == -1).all()


def test_the_sign_of_zero_is_plus_and_that_of_nan_minus():
    values = jnp.array([0.0, -0.0, jnp.nan, jnp.inf, -jnp.inf])
    np.testing.assert_array_equal(unpack_signs(pack_signs(values, -1), 5, -1), [1, 1, -1, 1, -1])


BYTES = jnp.zeros((2, 3), jnp.uint8)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: pack_signs(jnp.ones(3)), ValueError, r"values of shape \(3,\) have no axis -2"),
        (lambda: unpack_signs(BYTES, 17), ValueError, "rows=17 take 3 bytes, but axis -2"),
        (lambda: unpack_signs(jnp.ones((1, 1)), 1), TypeError, "bits must be uint8, not float32"),
        (lambda: binary_matmul(BYTES, BYTES, 9), ValueError, "do not multiply"),
        (lambda: binary_matmul(BYTES, BYTES.T, 9), ValueError, "rows=9 take 2 bytes"),
        (lambda: binary_matmul(BYTES, jnp.ones((3, 1)), 24), TypeError, "must be uint8"),
        (
            lambda: ternary_matmul(TernaryBits(BYTES, BYTES), TernaryBits(BYTES, BYTES)),
            ValueError,
            "do not multiply",
        ),
        (
            lambda: ternary_matmul(TernaryBits(BYTES, BYTES[:1]), TernaryBits(BYTES.T, BYTES.T)),
            ValueError,
            "one shape",
        ),
    ],
)
def test_operands_that_do_not_fit_are_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


# Binary weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS)
def test_binarize_is_the_formula_and_fake_binarize_its_value(block):
    values = normal((8, 6))
    leaf = binarize(values, block)
    assert isinstance(leaf, BitTensor) and leaf.shape == (8, 6)
    np.testing.assert_allclose(
        jopt.materialize(leaf), oracles.binary_weights(values, BLOCKS[block]), rtol=1e-6
    )
    np.testing.assert_array_equal(fake_binarize(values, block), jopt.materialize(leaf))


def test_filters_of_convolutions_and_stacks_are_binarized():
    values = normal((2, 3, 3, 5, 4))
    leaf = jax.vmap(binarize)(values)
    assert leaf.bits.shape == (2, 6, 4) and leaf.shape == values.shape
    expected = [oracles.binary_weights(each, (3, 3, 5, 1)) for each in values]
    np.testing.assert_allclose(jopt.materialize(leaf), expected, rtol=1e-6)
    one = jax.tree.map(lambda field: field[1], leaf)
    chex.assert_trees_all_equal(one, jax.jit(binarize)(values[1]))


@pytest.mark.parametrize("block", BLOCKS)
def test_the_gradients_are_those_of_the_papers(block):
    values, upstream = 1.5 * normal((8, 6)), normal((8, 6), 1)

    def cost(weights):
        return jnp.sum(upstream * fake_binarize(weights, block))

    expected = oracles.xnor_gradient(values, upstream, BLOCKS[block])
    np.testing.assert_allclose(jax.grad(cost)(jnp.asarray(values)), expected, rtol=1e-5)
    clipped = jax.grad(lambda w: jnp.sum(upstream * fake_binarize(w, block, clipped_slope)))
    np.testing.assert_array_equal(
        clipped(jnp.asarray(values)), np.where(np.abs(values) <= 1, upstream, 0)
    )


def test_any_slope_is_taken():
    slope = jax.jacfwd(lambda w: fake_binarize(w, (), lambda w, scale, count: w * count * scale))
    np.testing.assert_allclose(slope(jnp.array([[3.0], [-1.0]]))[:, 0, :, 0], [[12, 0], [0, -4]])


@pytest.mark.parametrize("dtype", [jnp.bfloat16])
def test_narrow_floats_stay_narrow(dtype):
    values = jnp.asarray(normal((20, 6))).astype(dtype)
    for leaf in (binarize(values), ternarize(values)):
        assert leaf.scale.dtype == dtype == jopt.materialize(leaf).dtype
    assert fake_binarize(values).dtype == dtype
    np.testing.assert_array_equal(fake_binarize(values), jopt.materialize(binarize(values)))
    assert jax.grad(lambda w: fake_binarize(w).sum())(values).dtype == dtype
    layers = xnor_dense(values.T, binarize(values)), sign_activations(values)
    assert all(layer.dtype == dtype for layer in layers)
    scales = ttq_init(values)
    assert ttq(values, *scales).dtype == scales.positive.dtype == dtype


def test_the_scale_has_the_least_squared_error_and_the_signs_too():
    values = normal((6, 1))
    for restored in (
        jopt.materialize(binarize(values)),
        quant.fake_quantize(values, QuantSpec(1, (), grid=binary)),
    ):
        error = float(((values - np.asarray(restored)) ** 2).sum())
        patterns = np.array(np.meshgrid(*[[-1, 1]] * 6)).reshape(6, -1)
        scales = patterns.T @ values[:, 0] / 6  # the best for each pattern
        least = ((values - scales * patterns) ** 2).sum(0).min()
        assert error == pytest.approx(least, rel=1e-5)


def test_zeros_are_kept_by_the_grid_and_become_plus_in_bits():
    values = jnp.array([[2.0, 0.0], [0.0, 0.0], [-4.0, 0.0]])
    spec = QuantSpec(1, grid=binary)
    restored = quant.fake_quantize(values, spec)
    np.testing.assert_array_equal(restored, [[3, 0], [0, 0], [-3, 0]])
    np.testing.assert_array_equal(jopt.materialize(binarize(values)), [[2, 0], [2, 0], [-2, 0]])
    with pytest.raises(ValueError, match="bits must be 1 for the grid binary, not 8"):
        quant.quantize(values, QuantSpec(grid=binary))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: binarize(jnp.ones(3)), ValueError, r"weights of shape \(3,\) are no kernel"),
        (lambda: binarize(jnp.ones((0, 3))), ValueError, "no element"),
        (lambda: binarize(jnp.ones((5, 3)), (2, 1)), ValueError, "does not divide"),
        (lambda: fake_binarize(jnp.ones((5, 3), int)), TypeError, "floating-point"),
        (lambda: sign_activations(jnp.ones(3, int)), TypeError, "inputs must be a floating"),
        (lambda: xnor_scaling(jnp.ones((2, 3)), (3,)), ValueError, r"not \(batch, 1 spatial"),
        (lambda: xnor_dense(jnp.ones((2, 3)), binarize(jnp.ones((4, 2)))), ValueError, "multiply"),
        (
            lambda: xnor_dense(jnp.ones((2, 4)), binarize(jnp.ones((4, 2)), (2, 1))),
            ValueError,
            r"kernel has scales of shape \(2, 2\)",
        ),
        (
            lambda: xnor_conv(jnp.ones((2, 4, 1)), binarize(jnp.ones((2, 2, 1, 3)))),
            ValueError,
            "does not convolve",
        ),
    ],
)
def test_what_is_not_binary_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.fixture(params=["dict", "nnx"])
def params(request):
    shapes = {"conv": (3, 3, 2, 4), "hidden": (5, 4), "head": (4, 3)}
    tree = {
        name: {"kernel": jnp.asarray(normal(shape)), "bias": jnp.zeros(shape[-1])}
        for name, shape in shapes.items()
    }
    return tree if request.param == "dict" else nnx.State(jax.tree.map(nnx.Param, tree))


def test_trees_are_binarized_by_path(params):
    small = binarize_params(params, where=".*(conv|hidden)/kernel")
    rounded = fake_binarize_params(params, where=".*(conv|hidden)/kernel")
    chex.assert_trees_all_equal(jopt.materialize(small), rounded)
    leaves = jax.tree.leaves(small, is_leaf=jopt.is_compressed)
    assert sum(isinstance(leaf, BitTensor) for leaf in leaves) == 2
    with pytest.raises(TypeError, match="conv/kernel: the leaf is compressed already"):
        binarize_params(small, where="conv/kernel")
    with pytest.raises(ValueError, match="bias: weights of shape .* are no kernel"):
        fake_binarize_params(params, where=".*/bias")


# Binary activations -----------------------------------------------------------------------------


def test_activations_are_signs_with_a_clipped_gradient(variant):
    values = jnp.array([-2.0, -1.0, -0.1, 0.0, -0.0, 1.0, 1.5])
    got, pull = jax.vjp(variant(sign_activations), values)
    np.testing.assert_array_equal(got, [-1, -1, -1, 1, 1, 1, 1])
    np.testing.assert_array_equal(pull(jnp.full(7, 3.0))[0], [0, 3, 3, 3, 3, 3, 0])


@pytest.mark.parametrize("block", [(), (1,)])
def test_a_dense_layer_of_bits_is_the_formula(block):
    x, w = normal((4, 37)), normal((37, 5), 1)
    expected = oracles.xnor_convolution(
        x.reshape(4, 1, 1, 37), w.reshape(1, 1, 37, 5), 1, (0, 0)
    ).reshape(4, 5)
    if block == ():
        expected *= np.abs(w).mean() / np.abs(w).mean(0)
    np.testing.assert_allclose(xnor_dense(x, binarize(w, block)), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("stride", "padding", "pad"),
    [(1, "SAME", (1, 1)), (2, "VALID", (0, 0)), (2, ((2, 0), (2, 0)), (2, 0))],
)
def test_a_convolution_of_bits_is_the_formula(stride, padding, pad):
    x, w = normal((2, 7, 7, 5)), normal((3, 3, 5, 4), 1)
    got = xnor_conv(x, binarize(w), (stride, stride), padding)
    np.testing.assert_allclose(got, oracles.xnor_convolution(x, w, stride, pad), atol=1e-4)
    if padding == "SAME":  # what is trained in floats is what runs in bits
        signs, kernel = sign_activations(x), fake_binarize(w)
        product = jax.lax.conv_general_dilated(
            signs, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        np.testing.assert_allclose(product * xnor_scaling(x, (3, 3)), got, atol=1e-4)


def test_convolutions_of_one_axis_and_stacks_work():
    x, w = normal((2, 6, 3)), normal((2, 3, 4), 1)
    flat = xnor_conv(x, binarize(w), padding="VALID")
    square = xnor_conv(x[:, :, None], binarize(w[:, None]), padding="VALID")
    np.testing.assert_allclose(flat, square[:, :, 0], rtol=1e-6)
    stacked = jax.vmap(lambda a: xnor_conv(a, binarize(w), padding="VALID"))(x[:, None])
    np.testing.assert_allclose(stacked[:, 0], flat, rtol=1e-6)


def fit(loss, trained: Any, steps, rate) -> tuple[Any, np.ndarray]:
    optimizer = optax.adam(rate)

    def step(carry, _):
        trained, state = carry
        value, gradient = jax.value_and_grad(loss)(trained)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(trained, updates), state), value

    with jax.numpy_dtype_promotion("standard"):  # optax mixes
        (trained, _), losses = jax.lax.scan(
            step, (trained, optimizer.init(trained)), None, length=steps
        )
    return trained, np.asarray(losses)


def test_a_binary_layer_learns_what_only_the_signs_can_tell():
    keys = jax.random.split(jax.random.key(0), 3)
    inputs = jax.random.normal(keys[0], (256, 12))
    target = 0.3 * jnp.sign(jax.random.normal(keys[1], (12, 4)))
    start = {"kernel": 0.3 * jax.random.normal(keys[2], (12, 4))}

    def loss(params):
        return jnp.mean((inputs @ (fake_binarize(params["kernel"]) - target)) ** 2)

    trained, losses = fit(loss, start, 150, 0.02)
    assert losses[-1] < 0.02 * losses[0]
    np.testing.assert_array_equal(signs_of(trained["kernel"]), signs_of(target))


def test_signs_of_activations_learn_what_leads_to_them():
    keys = jax.random.split(jax.random.key(1), 3)
    inputs = jax.random.normal(keys[0], (512, 3))
    teacher = jax.random.normal(keys[1], (3, 8)) / 2
    target = jnp.sign(inputs @ teacher)
    start = jax.random.normal(keys[2], (3, 8)) / 2

    def loss(weights):
        return jnp.mean((sign_activations(inputs @ weights) - target) ** 2)

    _, losses = fit(loss, start, 150, 0.05)
    assert losses[0] > 1 and losses[-1] < 0.1  # 4 times the share of wrong signs


# Ternary weights --------------------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS)
def test_ternarize_is_the_formula(block):
    values = normal((8, 6), 2)
    leaf = ternarize(values, block)
    assert leaf.codes.dtype == jnp.int2
    np.testing.assert_allclose(
        jopt.materialize(leaf), oracles.ternary_weights(values, BLOCKS[block]), rtol=1e-6
    )
    grid = quant.quantize(values, QuantSpec(2, block, grid=ternary))
    np.testing.assert_allclose(grid.scale, leaf.scale, rtol=1e-6)
    scale = np.abs(jopt.materialize(grid)).max()  # nearest level, not nearest threshold
    errors = [float(np.sum((values - jopt.materialize(each)) ** 2)) for each in (grid, leaf)]
    assert errors[0] <= errors[1] and scale > 0


def draws(name, shape):
    rng = np.random.default_rng(5)
    return {
        "normal": rng.normal(size=shape),
        "laplace": rng.laplace(size=shape),
        "uniform": rng.uniform(-1, 1, shape),
        "heavy": rng.standard_t(2, shape),
        "sparse": rng.normal(size=shape) * (rng.random(shape) < 0.1),
        "outlier": np.where(np.arange(shape[0])[:, None] == 3, 300.0, rng.normal(size=shape)),
        "large": 1e30 * rng.normal(size=shape),
        "small": 1e-30 * rng.normal(size=shape),
    }[name].astype(np.float32)


@pytest.mark.parametrize(
    "name", ["normal", "laplace", "uniform", "heavy", "sparse", "outlier", "large", "small"]
)
def test_the_search_comes_within_a_thousandth_of_the_best(name):
    values = draws(name, (256, 8))
    found = quant.fake_quantize(values, QuantSpec(2, grid=ternary_optimal))
    ruled = quant.fake_quantize(values, QuantSpec(2, grid=ternary))
    for column in range(8):
        exact = values[:, column].astype(np.float64)
        errors = [((exact - np.asarray(each)[:, column]) ** 2).sum() for each in (found, ruled)]
        least = oracles.best_ternary_error(exact)
        assert least * (1 - 1e-5) <= errors[0] <= min(least * 1.001, errors[1] * (1 + 1e-5))


@pytest.mark.parametrize("grid", [ternary, ternary_optimal], ids=["rule", "search"])
def test_ternary_grids_keep_zeros_and_constants_and_their_own_levels(grid):
    values = jnp.array([[0.0, 3.0, -2.0], [0.0, 3.0, 0.0], [0.0, -3.0, 0.0]])
    np.testing.assert_array_equal(quant.fake_quantize(values, QuantSpec(2, grid=grid)), values)
    assert bool(jnp.isfinite(quant.quantize(values, QuantSpec(2, grid=grid)).scale).all())
    random = jnp.asarray(normal((64, 3)))
    spec = QuantSpec(2, (16, 1), grid=grid)
    once = quant.fake_quantize(random, spec)
    np.testing.assert_allclose(quant.fake_quantize(once, spec), once, rtol=1e-6)
    with pytest.raises(ValueError, match="bits must be 2 for a ternary grid, not 3"):
        quant.quantize(values, QuantSpec(3, grid=grid))


# Trained ternary quantization -------------------------------------------------------------------


def test_learned_levels_and_their_gradients_are_the_papers(variant):
    values, upstream = normal((8, 6), 3), normal((8, 6), 4)
    levels = jnp.full((1, 1), 0.8), jnp.full((1, 1), 1.3)

    def cost(weights, positive, negative):
        return jnp.sum(upstream * ttq(weights, positive, negative, 0.3))

    expected, *_ = oracles.ttq(values, 0.8, 1.3, 0.3)
    np.testing.assert_allclose(variant(ttq)(values, *levels, 0.3), expected, rtol=1e-6)
    got = variant(jax.grad(cost, (0, 1, 2)))(jnp.asarray(values), *levels)
    for each, formula in zip(
        got, oracles.ttq_gradients(values, 0.8, 1.3, 0.3, upstream), strict=True
    ):
        np.testing.assert_allclose(each.reshape(np.shape(formula)), formula, rtol=1e-5)
    step = 1e-2  # the value is linear in the levels, so differences are exact
    for at in (1, 2):
        moved = [list(levels), list(levels)]
        moved[0][at - 1], moved[1][at - 1] = levels[at - 1] + step, levels[at - 1] - step
        slope = (cost(values, *moved[0]) - cost(values, *moved[1])) / (2 * step)
        np.testing.assert_allclose(got[at].sum(), slope, rtol=1e-3)


@pytest.mark.parametrize("block", BLOCKS)
def test_exported_levels_are_exactly_those_trained_with(block):
    values = jnp.asarray(normal((8, 6), 6))
    scales = ttq_init(values, block, 0.2)
    leaf = ttq_quantize(values, *scales, 0.2)
    assert isinstance(leaf, CodebookTensor) and leaf.codes.dtype == jnp.uint2
    np.testing.assert_array_equal(jopt.materialize(leaf), ttq(values, *scales, 0.2))
    for corner, where in oracles._blocks(np.asarray(values), BLOCKS[block]):
        part = np.asarray(values[where], np.float64)
        limit = 0.2 * np.abs(part).max()
        for side, level in ((part, scales.positive), (-part, scales.negative)):
            kept = side[side > limit]
            mean = kept.mean() if kept.size else np.abs(part).max()
            np.testing.assert_allclose(level[corner], mean, rtol=1e-6)


def test_blocks_of_zeros_stay_zeros():
    zeros = jnp.zeros((3, 2))
    scales = ttq_init(zeros)
    np.testing.assert_array_equal(ttq(zeros, *scales), zeros)
    np.testing.assert_array_equal(jopt.materialize(ternarize(zeros)), zeros)
    for leaf in (binarize(zeros), ternarize(zeros)):
        assert bool(jnp.isfinite(leaf.scale).all())


def test_levels_that_do_not_fit_are_refused():
    one = jnp.ones((1, 1))
    for levels, words in (
        ((jnp.ones(2), jnp.ones(2)), r"scales of shape \(2,\) do not divide"),
        ((jnp.ones((3, 1)), jnp.ones((3, 1))), r"scales of shape \(3, 1\) do not divide"),
        ((one, jnp.ones((1, 2))), "must have one shape"),
        ((one.astype(jnp.bfloat16), one.astype(jnp.bfloat16)), "the dtype float32 of the weights"),
    ):
        for function in (ttq, ttq_quantize):
            with pytest.raises(ValueError, match=words):
                function(jnp.ones((4, 2)), *levels)


def test_weights_and_levels_train_in_the_same_optimizer():
    inputs, target = jnp.asarray(normal((64, 6))), jnp.sign(normal((6, 2), 1)) * 0.5 + 0.1
    params = {"kernel": jnp.asarray(normal((6, 2), 2))}
    scales = ttq_init_params(params, (1,))

    def loss(trained):
        kernel = ttq_params(trained["params"], trained["scales"])["kernel"]
        return jnp.mean((inputs @ (kernel - target)) ** 2)

    trained, losses = fit(loss, {"params": params, "scales": scales}, 300, 0.02)
    assert losses[-1] < 0.01 * losses[0]
    small = ttq_quantize_params(trained["params"], trained["scales"])
    np.testing.assert_allclose(jopt.materialize(small)["kernel"], target, atol=0.1)


def test_trees_take_levels_by_path(params):
    scales = ttq_init_params(params, where=".*(conv|hidden)/kernel")
    assert sorted(scales) == ["conv/kernel", "hidden/kernel"]
    assert scales["conv/kernel"].positive.shape == (1, 1, 1, 1)
    small, rounded = ttq_quantize_params(params, scales), ttq_params(params, scales)
    chex.assert_trees_all_equal(jopt.materialize(small), rounded)
    leaves = jax.tree.leaves(small, is_leaf=jopt.is_compressed)
    assert sum(isinstance(leaf, CodebookTensor) for leaf in leaves) == 2
    with pytest.raises(
        ValueError, match="scales: 'none' is no path of params; the paths are 'conv"
    ):
        ttq_params(params, {"none": TernaryScales(jnp.ones(1), jnp.ones(1))})
    with pytest.raises(ValueError, match="conv/bias: scales of shape"):
        ttq_params(params, {"conv/bias": scales["conv/kernel"]})
    with pytest.raises(ValueError, match="conv/kernel: block .* has more axes"):
        ttq_init_params(params, (1,) * 5, where="conv/kernel")
