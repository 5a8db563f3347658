import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jopt
from jopt import quant
from jopt.quant import QuantSpec
from tests import oracles

GRIDS = {
    "symmetric": (quant.absmax, quant.symmetric),
    "affine": (quant.minmax, quant.affine),
    "affine_zero": (quant.minmax, quant.affine_zero),
}
BITS = range(1, 9)
SOME_BITS = (1, 3, 8)
floats = st.floats(-(2.0**100), 2.0**100, width=32)
# Few shapes: each one is compiled once for each grid and number of bits.
matrices = st.sampled_from([(1,), (7,), (3, 4)]).flatmap(
    lambda shape: hnp.arrays(np.float32, shape, elements=floats)
)


def spec_of(name, bits, block=()):
    value_range, grid = GRIDS[name]
    return QuantSpec(bits, block, value_range, grid)


@pytest.mark.parametrize("bits", BITS)
def test_affine_is_the_min_max_formula(bits):
    values = np.random.default_rng(bits).normal(size=(40, 5)).astype(np.float32)
    leaf = quant.quantize(values, spec_of("affine", bits))
    np.testing.assert_array_equal(leaf.codes.astype(jnp.int32), oracles.minmax_codes(values, bits))
    np.testing.assert_allclose(
        jopt.materialize(leaf), oracles.minmax_values(values, bits), atol=2e-6
    )


@pytest.mark.parametrize("bits", range(2, 9))
def test_symmetric_codes_match_the_formula(bits):
    values = np.random.default_rng(bits).normal(size=(40, 5)).astype(np.float32)
    leaf = quant.quantize(values, spec_of("symmetric", bits))
    expected = oracles.symmetric_codes(values, bits)
    np.testing.assert_array_equal(leaf.codes.astype(jnp.int32), expected)


@pytest.mark.parametrize("bits", SOME_BITS)
@pytest.mark.parametrize("name", GRIDS)
@given(values=matrices)
def test_every_element_is_within_half_a_scale(name, bits, values):
    leaf = quant.quantize(values, spec_of(name, bits))
    scale = float(leaf.scale.max())
    bound = scale * (1.0 if bits == 1 else 0.5)  # one bit, symmetric: the levels are -a and a
    slack = 1e-5 * max(float(np.abs(values).max()), scale)
    assert np.abs(np.asarray(jopt.materialize(leaf)) - values).max() <= bound + slack


@pytest.mark.parametrize("bits", SOME_BITS)
@pytest.mark.parametrize("name", ["symmetric", "affine_zero"])
@given(values=matrices)
def test_zeros_stay_exactly_zero(name, bits, values):
    values = np.where(np.arange(values.size).reshape(values.shape) % 2, values, 0)
    restored = np.asarray(quant.fake_quantize(values, spec_of(name, bits)))
    assert (restored[values == 0] == 0).all()


@pytest.mark.parametrize("bits", SOME_BITS)
@pytest.mark.parametrize("name", ["symmetric", "affine"])  # a moved zero point moves the ends
@given(values=matrices)
def test_quantizing_twice_changes_nothing(name, bits, values):
    spec = spec_of(name, bits)
    once = quant.quantize(values, spec)
    twice = quant.quantize(jopt.materialize(once), spec)
    np.testing.assert_allclose(
        jopt.materialize(twice), jopt.materialize(once), rtol=1e-5, atol=1e-5 * np.abs(values).max()
    )


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("block", [(), (1,), (2, 1), (-1, 3), (1, 1, 1), (-1, -1, -1)])
def test_each_block_is_quantized_as_if_alone(name, block):
    values = jax.random.normal(jax.random.key(3), (2, 4, 6))
    restored = quant.fake_quantize(values, spec_of(name, 4, block))
    sizes = [
        n if b == -1 else b
        for n, b in zip((2, 4, 6), (-1,) * (3 - len(block)) + block, strict=True)
    ]
    for corner in np.ndindex(*(n // size for n, size in zip((2, 4, 6), sizes, strict=True))):
        where = tuple(
            slice(i * size, (i + 1) * size) for i, size in zip(corner, sizes, strict=True)
        )
        alone = quant.fake_quantize(values[where], spec_of(name, 4))
        np.testing.assert_allclose(restored[where], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("value", [0.0, 3.5, -2.0, 1e-42])
def test_a_constant_block_is_restored(name, value):
    values = jnp.full((3, 4), value)
    restored = quant.fake_quantize(values, spec_of(name, 4))
    np.testing.assert_allclose(restored, values, rtol=1e-6, atol=1e-37)
    assert jnp.isfinite(quant.quantize(values, spec_of(name, 4)).scale).all()


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_floats_keep_their_dtype_and_the_bound(name, dtype):
    values = jax.random.normal(jax.random.key(0), (16, 8)).astype(dtype)
    leaf = quant.quantize(values, spec_of(name, 8))
    restored = jopt.materialize(leaf)
    assert restored.dtype == dtype == leaf.scale.dtype
    error = jnp.abs(restored.astype(jnp.float32) - values.astype(jnp.float32)).max()
    rounding = float(jnp.finfo(dtype).eps) * float(jnp.abs(values).max())
    assert error <= 0.5 * float(leaf.scale[0, 0]) * 1.01 + rounding


@pytest.mark.parametrize(
    ("bits", "signed", "unsigned"),
    [
        (1, "int2", "uint2"),
        (2, "int2", "uint2"),
        (3, "int4", "uint4"),
        (4, "int4", "uint4"),
        (5, "int8", "uint8"),
        (8, "int8", "uint8"),
    ],
)
def test_codes_take_the_narrowest_dtype(bits, signed, unsigned):
    values = jnp.linspace(-1, 1, 9)
    assert quant.quantize(values, spec_of("symmetric", bits)).codes.dtype == jnp.dtype(signed)
    assert quant.quantize(values, spec_of("affine", bits)).codes.dtype == jnp.dtype(unsigned)


def test_one_bit_symmetric_keeps_pruned_weights_pruned():
    leaf = quant.quantize(jnp.array([-2.0, 0.0, 0.5]), spec_of("symmetric", 1))
    np.testing.assert_array_equal(jopt.materialize(leaf), [-2.0, 0.0, 2.0])


@pytest.mark.parametrize("name", GRIDS)
def test_fake_quantize_is_exactly_quantize_then_materialize(name, variant, kernel):
    spec = spec_of(name, 3, (1,))
    fake = variant(lambda values: quant.fake_quantize(values, spec))(kernel)
    real = jopt.materialize(quant.quantize(kernel, spec))
    chex.assert_trees_all_close(fake, real, rtol=1e-6)


@pytest.mark.parametrize("name", GRIDS)
def test_the_gradient_passes_straight_through(name, variant, kernel):
    weights = jnp.arange(kernel.size, dtype=jnp.float32).reshape(kernel.shape)
    loss = variant(jax.grad(lambda v: (weights * quant.fake_quantize(v, spec_of(name, 4))).sum()))
    chex.assert_trees_all_close(loss(kernel), weights)


def test_the_gradient_is_zero_outside_the_range():
    def half(values, axes, restore):
        low, high = quant.absmax(values, axes)
        return 0.5 * low, 0.5 * high

    spec = QuantSpec(4, (), half)
    gradient = jax.grad(lambda v: quant.fake_quantize(v, spec).sum())(
        jnp.array([-2.0, 0.5, 2.0, 0.9])
    )
    chex.assert_trees_all_equal(gradient, jnp.array([0.0, 1.0, 0.0, 1.0]))
    restored = quant.fake_quantize(jnp.array([-2.0, 0.5, 2.0, 0.9]), spec)
    assert float(jnp.abs(restored).max()) == pytest.approx(1.0)


def test_fake_quantize_params_trains_what_quantize_params_gives(network, images, variant):
    apply, params = network
    spec = QuantSpec(4)
    fake = variant(lambda p: apply(quant.fake_quantize_params(p, spec), images))(params)
    real = apply(jopt.materialize(quant.quantize_params(params, spec)), images)
    chex.assert_trees_all_close(fake, real, rtol=1e-4, atol=1e-5)


def test_quantize_params_under_jit_equals_eager(network):
    _, params = network
    spec = QuantSpec(4)
    jitted = jax.jit(lambda p: quant.quantize_params(p, spec))(params)
    chex.assert_trees_all_close(
        jopt.materialize(jitted), jopt.materialize(quant.quantize_params(params, spec)), rtol=1e-6
    )


@pytest.mark.parametrize("bits", [0, 9, 2.5, True, "4"])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits must be a whole number from 1 to 8, not {bits!r}"):
        QuantSpec(bits=bits)


@pytest.mark.parametrize("block", [(0,), (-2,), [1], (1.5,), 1])
def test_blocks_that_make_no_sense_are_refused(block):
    with pytest.raises(ValueError, match="block must be a tuple"):
        QuantSpec(block=block)


@pytest.mark.parametrize("field", ["range", "grid"])
def test_a_range_must_be_a_function_and_a_grid_a_grid(field):
    with pytest.raises(TypeError, match=f"{field} must be a "):
        QuantSpec(**{field: "absmax"})  # pyright: ignore[reportArgumentType]


def test_errors_name_the_leaf_the_rule_and_the_value():
    params = {"dense": {"kernel": jnp.ones((128, 64))}, "ids": jnp.ones((2, 2), int)}
    with pytest.raises(
        ValueError, match=r"dense/kernel: block \(48, 1\) does not divide shape \(128, 64\)"
    ):
        quant.quantize_params(params, QuantSpec(block=(48, 1)))
    with pytest.raises(ValueError, match=r"block \(1, 1, 1\) has more axes"):
        quant.quantize_params(params, QuantSpec(block=(1, 1, 1)))
    with pytest.raises(TypeError, match="ids: values must be floating-point, not int32"):
        quant.quantize_params(params, QuantSpec(), "ids")
    small = quant.quantize_params(params, QuantSpec())
    with pytest.raises(TypeError, match="dense/kernel: the leaf is compressed already"):
        quant.quantize_params(small, QuantSpec(), "dense/kernel")
    with pytest.raises(ValueError, match="matches no leaf"):
        quant.quantize_params(small, QuantSpec())
    with pytest.raises(TypeError, match="spec must be a QuantSpec"):
        quant.quantize(jnp.ones(2), 4)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="no element"):
        quant.quantize(jnp.ones((0, 3)), QuantSpec())


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_values_that_are_not_finite_are_refused(bad):
    params = {"kernel": jnp.ones((2, 2)).at[0, 0].set(bad)}
    with pytest.raises(ValueError, match="kernel: values must be finite"):
        quant.quantize_params(params, QuantSpec())


def test_the_input_is_not_changed(network):
    _, params = network
    before = jax.tree.map(jnp.copy, params)
    quant.quantize_params(params, QuantSpec(4))
    chex.assert_trees_all_equal(params, before)
