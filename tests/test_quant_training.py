"""Training through quantization: values, gradients, exports, and that it learns."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jopt
from jopt import prune, quant
from jopt.quant import QuantSpec, fake_quantize_within
from jopt.quant._code_ranges import balanced_codes, signed_codes, unsigned_codes
from jopt.quant._dorefa import (
    dorefa_activations,
    dorefa_gradients,
    dorefa_params,
    dorefa_quantize,
    dorefa_quantize_params,
    dorefa_weights,
)
from jopt.quant._learned import init_steps, lsq_params, lsq_quantize_params
from jopt.quant._lsq import lsq, lsq_quantize
from jopt.quant._lsq_init import lsq_init, lsq_init_mse
from jopt.quant._lsq_plus import lsq_plus, lsq_plus_quantize
from jopt.quant._lsq_plus_init import lsq_plus_init, lsq_plus_init_weights
from jopt.quant._pact import pact, pact_init
from tests import oracles_training as oracles

BITS = (1, 2, 4, 8)
RANGES = [signed_codes, unsigned_codes, balanced_codes]
WHOLE = QuantSpec(2, ())
NARROW = [jnp.bfloat16, jnp.float16]


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def full(value, ndim):
    return jnp.full((1,) * ndim, value, jnp.float32)


# --- LSQ ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code_range", RANGES)
@pytest.mark.parametrize("bits", [2, 8])
def test_lsq_and_its_gradients_are_the_papers_equations(bits, code_range):
    values, weights = normal(bits, 40, 3), normal(9, 40, 3)
    low, high = code_range(bits)
    spec, step = QuantSpec(bits, ()), 1.3 / high + 0.1

    def loss(v, s):
        return (weights * lsq(v, s, spec, code_range)).sum()

    with jax.numpy_dtype_promotion("strict"):
        got = lsq(values, full(step, 2), spec, code_range)
        for_v, for_s = jax.grad(loss, (0, 1))(jnp.asarray(values), full(step, 2))
    np.testing.assert_allclose(got, oracles.lsq(values, step, low, high), atol=1e-6)
    each_v, each_s = oracles.lsq_gradients(values, step, low, high, values.size)
    np.testing.assert_allclose(for_v, weights * each_v, rtol=1e-6)
    np.testing.assert_allclose(for_s, (weights * each_s).sum().reshape(1, 1), rtol=1e-4, atol=1e-6)


def test_each_step_gets_the_gradient_of_its_own_block():
    values, spec = normal(0, 4, 6), QuantSpec(3, (2, 1))
    step = np.abs(normal(1, 2, 6)) + 0.2
    got = jax.grad(lambda s: lsq(values, s, spec).sum())(jnp.asarray(step))
    for block, column in np.ndindex(2, 6):
        part = values[2 * block : 2 * block + 2, column]
        each = oracles.lsq_gradients(part, step[block, column], -4, 3, 2)[1]
        assert got[block, column] == pytest.approx(each.sum(), rel=1e-4, abs=1e-6)


def test_the_gradient_factor_counts_the_elements_that_are_said_to_share_a_step():
    values, step = normal(0, 8, 5), full(0.4, 2)
    of = partial(jax.grad(lambda s, n: lsq(values, s, WHOLE, count=n).sum()), step)
    np.testing.assert_allclose(of(5), of(None) * np.sqrt(8), rtol=1e-5)
    with pytest.raises(ValueError, match="count must be a whole number of elements, .* not 0"):
        lsq(values, step, WHOLE, count=0)


@pytest.mark.parametrize("code_range", RANGES)
@pytest.mark.parametrize("bits", [1, 2, 8])
def test_what_lsq_exports_is_what_it_trained(bits, code_range):
    values, spec = jnp.asarray(normal(bits, 16, 6)), QuantSpec(bits, (8, 1))
    step = jnp.asarray(np.abs(normal(7, 2, 6)) + 0.1) / code_range(bits)[1]
    trained = lsq(values, step, spec, code_range)
    leaf = lsq_quantize(values, step, spec, code_range)
    np.testing.assert_array_equal(trained, jopt.materialize(leaf))
    low, high = code_range(bits)
    codes = np.asarray(leaf.codes.astype(jnp.int32))
    assert set(np.unique(codes)) <= set(range(low, high + 1))
    assert jopt.nbytes(leaf.codes) <= 16 * 6 * max(bits, 2) // 8


@pytest.mark.parametrize("dtype", NARROW)
def test_lsq_keeps_narrow_dtypes_and_still_exports_exactly(dtype):
    values, spec = jnp.asarray(normal(3, 16, 6)).astype(dtype), QuantSpec(4)
    step = jnp.full((1, 6), 0.123, jnp.float32)  # a step that the dtype cannot hold
    trained = jax.jit(lambda v: lsq(v, step, spec))(values)
    leaf = lsq_quantize(values, step, spec)
    assert trained.dtype == leaf.dtype == dtype
    np.testing.assert_array_equal(trained, jopt.materialize(leaf))
    gradient = jax.grad(lambda s: lsq(values, s, spec).astype(jnp.float32).sum())(step)
    assert gradient.dtype == jnp.float32 and bool(jnp.isfinite(gradient).all())


def test_two_bits_have_four_levels_and_the_lowest_is_representable():
    leaf = lsq_quantize(jnp.array([-9.0, -0.5, 0.1, 9.0]), jnp.array([0.5]), WHOLE)
    np.testing.assert_array_equal(leaf.codes.astype(jnp.int32), [-2, -1, 0, 1])
    assert leaf.codes.dtype == jnp.int2


def test_one_bit_signed_has_the_levels_minus_step_and_step():
    values = jnp.array([-3.0, -0.1, 0.0, 0.2])
    rounded = lsq(values, jnp.array([0.5]), QuantSpec(1, ()))
    np.testing.assert_array_equal(rounded, [-0.5, -0.5, 0.0, 0.5])


def test_a_step_that_crosses_zero_keeps_the_signs_and_can_grow_again():
    values = jnp.array([-1.0, 2.0, 4.0])
    negative = lsq(values, jnp.array([-0.5]), WHOLE)
    np.testing.assert_array_equal(negative, lsq(values, jnp.array([0.5]), WHOLE))
    assert (lsq_quantize(values, jnp.array([-0.5]), WHOLE).scale > 0).all()
    gradient = jax.grad(lambda s: jnp.square(lsq(values, s, WHOLE) - values).sum())
    for step in (0.0, 1e-42):
        at_zero = gradient(jnp.array([step]))
        assert bool(jnp.isfinite(at_zero).all()) and at_zero[0] < 0  # descent makes it larger
    assert gradient(jnp.array([-1e-3]))[0] > 0  # and there, larger in magnitude


def test_zeros_stay_zero_and_nan_stays_nan_under_lsq():
    values = jnp.array([0.0, jnp.nan, -jnp.inf, 1.0])
    for spec in (QuantSpec(1, ()), WHOLE):
        rounded = lsq(values, jnp.array([0.5]), spec)
        assert rounded[0] == 0 and jnp.isnan(rounded[1]) and jnp.isfinite(rounded[2])


def test_lsq_refuses_what_does_not_fit():
    values = jnp.ones((4, 2))
    with pytest.raises(ValueError, match=r"step must have shape \(1, 2\), .* not \(2,\)"):
        lsq(values, jnp.ones(2), QuantSpec(2))
    with pytest.raises(TypeError, match="step must be floating-point, not int32"):
        lsq(values, jnp.ones((1, 2), jnp.int32), QuantSpec(2))
    with pytest.raises(TypeError, match="values must be floating-point"):
        lsq(values.astype(jnp.int32), jnp.ones((1, 2)), QuantSpec(2))
    with pytest.raises(ValueError, match="no element"):
        lsq(jnp.ones((0, 2)), jnp.ones((1, 2)), QuantSpec(2))
    with pytest.raises(ValueError, match=r"code_range must hold 0 .* not \(1, 2\)"):
        lsq(values, jnp.ones((1, 2)), QuantSpec(2), lambda bits: (1, 2))
    with pytest.raises(ValueError, match="candidates must be at least 1"):
        lsq_init_mse(values, QuantSpec(2), candidates=0)


@pytest.mark.parametrize("code_range", RANGES)
def test_the_first_step_is_twice_the_mean_magnitude_over_the_root_of_the_top_code(code_range):
    values = normal(0, 12, 3)
    expected = 2 * np.abs(values).mean(0, keepdims=True) / np.sqrt(code_range(4)[1])
    got = lsq_init(values, QuantSpec(4), code_range)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("init", [lsq_init, lsq_init_mse, lsq_plus_init_weights])
@pytest.mark.parametrize("dtype", [jnp.float32, *NARROW])
def test_first_steps_are_positive_even_for_zeros_and_keep_the_dtype(init, dtype):
    values = jnp.zeros((4, 3), dtype).at[:, 1].set(2.0)
    step = init(values, QuantSpec(3))
    assert step.shape == (1, 3) and step.dtype == dtype
    assert bool((step > 0).all()) and step[0, 0] == 1


def test_the_mse_step_is_the_best_of_its_candidates_and_ignores_pruned_weights():
    values, spec = normal(2, 200), QuantSpec(2, ())
    got = float(lsq_init_mse(values, spec, candidates=20)[0])
    widest = max(values.max(), -values.min() / 2)
    errors = [
        ((oracles.lsq(values, widest * i / 20, -2, 1) - values) ** 2).sum() for i in range(1, 21)
    ]
    assert got == pytest.approx(widest * (np.argmin(errors) + 1) / 20, rel=1e-5)
    sparse = np.concatenate([values, np.zeros(1800, np.float32)])
    assert float(lsq_init_mse(sparse, spec, candidates=20)[0]) == pytest.approx(got, rel=1e-5)


# --- LSQ+ -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("code_range", RANGES)
def test_lsq_plus_and_its_gradients_are_the_papers_equations(code_range):
    values, weights = normal(1, 50) - 0.3, normal(2, 50)
    low, high = code_range(3)
    spec, step, offset = QuantSpec(3, ()), 0.31, -0.42
    learned = (full(step, 1), full(offset, 1))

    def loss(v, s, b):
        return (weights * lsq_plus(v, s, b, spec, code_range)).sum()

    with jax.numpy_dtype_promotion("strict"):
        got = lsq_plus(values, learned[0], learned[1], spec, code_range)
        gradients = jax.grad(loss, (0, 1, 2))(jnp.asarray(values), *learned)
    np.testing.assert_allclose(
        got, oracles.lsq_plus(values, step, offset, low, high), rtol=1e-5, atol=1e-6
    )
    each = oracles.lsq_plus_gradients(values, step, offset, low, high)
    g = 1 / np.sqrt(50 * high)
    np.testing.assert_allclose(gradients[0], weights * each[0], rtol=1e-6)
    np.testing.assert_allclose(gradients[1], [(weights * each[1]).sum() * g], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(gradients[2], [(weights * each[2]).sum() * g], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_what_lsq_plus_exports_is_what_it_trained(bits):
    values, spec = jnp.asarray(normal(bits, 8, 6)), QuantSpec(bits)
    step, offset = jnp.full((1, 6), 2.9 / 2**bits), jnp.asarray(normal(3, 1, 6))
    trained = jax.jit(lambda v, s, b: lsq_plus(v, s, b, spec))(values, step, offset)
    leaf = lsq_plus_quantize(values, step, offset, spec)
    np.testing.assert_array_equal(trained, jopt.materialize(leaf))


def test_lsq_plus_keeps_bfloat16_and_nan():
    values = jnp.array([jnp.nan, 1.0, 3.0], jnp.bfloat16)
    one = jnp.array([1.0])
    rounded = lsq_plus(values, one, one, WHOLE)
    assert rounded.dtype == jnp.bfloat16 and jnp.isnan(rounded[0])
    np.testing.assert_array_equal(rounded[1:].astype(jnp.float32), [1.0, 3.0])
    restored = jopt.materialize(lsq_plus_quantize(values, one, one, WHOLE))
    np.testing.assert_array_equal(restored[1:], rounded[1:])


@pytest.mark.parametrize("bits", [2, 4])
def test_lsq_plus_starts_no_worse_than_the_whole_range(bits):
    values = normal(4, 500)
    values = values / (1 + np.exp(-3 * values))  # swish: a long tail above, a short one below
    step, offset = (float(a[0]) for a in lsq_plus_init(values, QuantSpec(bits, ())))
    top = 2**bits - 1

    def error(s, b):
        return ((oracles.lsq_plus(values, s, b, 0, top) - values) ** 2).sum()

    whole = error((values.max() - values.min()) / top, values.min())
    assert error(step, offset) < 0.8 * whole
    # No step and offset of a fine grid is much better: it is a minimum.
    steps = np.linspace(0.1, 1.2, 60) * (values.max() - values.min()) / top
    offsets = np.linspace(values.min() - 0.2, values.min() + 0.5, 30)
    assert error(step, offset) <= 1.03 * min(error(s, b) for s in steps for b in offsets)


@pytest.mark.parametrize("value", [0.0, 2.5, -1.0])
def test_lsq_plus_restores_a_constant(value):
    values = jnp.full((3, 2), value)
    step, offset = lsq_plus_init(values, WHOLE)
    assert bool((step > 0).all())
    np.testing.assert_allclose(lsq_plus(values, step, offset, WHOLE), values, rtol=1e-6)


def test_lsq_plus_starts_weights_from_three_standard_deviations():
    values = normal(5, 300) + 1.0
    mean, spread = values.mean(), values.std()
    expected = max(abs(mean - 3 * spread), abs(mean + 3 * spread)) / 2**3
    got = lsq_plus_init_weights(values, QuantSpec(4, ()))
    np.testing.assert_allclose(got, [expected], rtol=1e-5)


# --- PACT -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_pact_is_the_papers_equations(bits):
    values = 3 * normal(bits, 60)
    with jax.numpy_dtype_promotion("strict"):
        got = pact(values, jnp.float32(1.7), bits)
    np.testing.assert_allclose(got, oracles.pact(values, 1.7, bits), rtol=1e-6, atol=1e-6)


def test_pacts_gradients_are_those_of_clipping_even_at_the_level_itself():
    values, weights = jnp.array([-1.0, 0.0, 0.4, 3.0, 5.0]), jnp.array([1.0, 2.0, 4.0, 8.0, 16.0])
    gradient = jax.jit(jax.grad(lambda v, c: (weights * pact(v, c, 4)).sum(), (0, 1)))
    for_values, for_clip = gradient(values, jnp.float32(3.0))
    np.testing.assert_array_equal(for_values, [0.0, 2.0, 4.0, 0.0, 0.0])
    assert for_clip == 24.0
    channels = jax.grad(lambda c: pact(jnp.ones((4, 2)), c, 4).sum())(jnp.array([[0.5, 2.0]]))
    np.testing.assert_array_equal(channels, [[4.0, 0.0]])


def test_a_clipping_level_that_fell_to_zero_grows_again():
    gradient = jax.grad(lambda c: -pact(jnp.array([1.0, 2.0]), c, 4).sum())(jnp.float32(0.0))
    assert gradient == -2.0


def test_pact_starts_where_nothing_is_clipped():
    assert pact_init(jnp.array([-2.0, 1.5])) == 1.5
    assert pact_init(jnp.zeros(3)) == 1 and pact_init(jnp.zeros(0)) == 1


def test_pact_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="bits must be a whole number from 1 to 8, not 0"):
        pact(jnp.ones(3), 1.0, 0)
    with pytest.raises(ValueError, match=r"clip of shape \(2,\) does not broadcast to \(3,\)"):
        pact(jnp.ones(3), jnp.ones(2), 4)
    with pytest.raises(TypeError, match="clip must be floating-point, not int32"):
        pact(jnp.ones(3), jnp.ones((), jnp.int32), 4)


# --- DoReFa-Net -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_dorefa_weights_are_equation_9(bits):
    values, spec = normal(bits, 30, 4), QuantSpec(bits, ())
    with jax.numpy_dtype_promotion("strict"):
        got = dorefa_weights(values, spec)
    np.testing.assert_allclose(got, oracles.dorefa_weights(values, bits), atol=1e-6)
    leaf = dorefa_quantize(values, spec)
    np.testing.assert_array_equal(got, jopt.materialize(leaf))
    assert jopt.nbytes(leaf.codes) == 120 * bits // 8


def test_dorefa_weights_have_the_gradient_of_the_squashing():
    values, weights = normal(0, 12), normal(1, 12)
    got = jax.grad(lambda v: (weights * dorefa_weights(v, WHOLE)).sum())(jnp.asarray(values))
    expected = oracles.finite_difference(
        lambda v: (weights * oracles.dorefa_weights_smooth(v)).sum(), values
    )
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5)


def test_one_bit_dorefa_is_the_sign_times_the_mean_magnitude():
    values, spec = jnp.array([[-3.0, 0.5], [1.0, 0.0]]), QuantSpec(1)
    rounded, back = jax.vjp(lambda v: dorefa_weights(v, spec), values)
    np.testing.assert_array_equal(rounded, [[-2.0, 0.25], [2.0, 0.0]])
    np.testing.assert_array_equal(back(values)[0], values)
    np.testing.assert_array_equal(jopt.materialize(dorefa_quantize(values, spec)), rounded)


@pytest.mark.parametrize("bits", [1, 3])
def test_dorefa_takes_zeros_and_narrow_floats(bits):
    zeros = dorefa_weights(jnp.zeros((3, 2)), QuantSpec(bits))
    assert bool(jnp.isfinite(zeros).all())
    values = jnp.asarray(normal(1, 5, 2)).astype(jnp.bfloat16)
    rounded = dorefa_weights(values, QuantSpec(bits))
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        rounded, jopt.materialize(dorefa_quantize(values, QuantSpec(bits)))
    )


@pytest.mark.parametrize("bits", [1, 3])
def test_dorefa_activations_are_equation_11(bits):
    values = np.concatenate([normal(bits, 40), [0.0, 1.0]]).astype(np.float32)
    function = jax.jit(jax.value_and_grad(lambda v: (v * dorefa_activations(v, bits)).sum()))
    expected = oracles.quantize_k(np.clip(values, 0, 1), bits)
    inside = (values >= 0) & (values <= 1)
    value, gradient = function(jnp.asarray(values))
    assert value == pytest.approx((values * expected).sum(), rel=1e-5)
    np.testing.assert_allclose(gradient, expected + values * inside, rtol=1e-5, atol=1e-6)


def test_dorefa_gradients_are_equation_12_and_right_on_average():
    gradient = normal(0, 3, 4) * np.array([[1.0], [10.0], [0.0]], np.float32)
    values = jnp.ones((3, 4))

    def pull(key):
        out, back = jax.vjp(lambda v: dorefa_gradients(key, v, 2), values)
        return out, back(jnp.asarray(gradient))[0]

    keys = jax.random.split(jax.random.key(0), 4000)
    outs, pulled = jax.jit(jax.vmap(pull))(keys)
    np.testing.assert_array_equal(outs[0], values)
    sigma = np.asarray(jax.random.uniform(keys[0], (3, 4), jnp.float32, -0.5, 0.5))
    got = pulled[0]
    expected = oracles.dorefa_gradient(gradient[:2], sigma[:2], 2)
    np.testing.assert_allclose(got[:2], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(got[2], np.zeros(4))
    np.testing.assert_allclose(pulled.mean(0), gradient, atol=0.02 * np.abs(gradient).max())


def test_dorefa_gradients_refuse_a_scalar_and_integers():
    with pytest.raises(ValueError, match="values must have an axis of examples"):
        dorefa_gradients(jax.random.key(0), 1.0, 2)
    with pytest.raises(TypeError, match="values must be floating-point, not int32"):
        dorefa_gradients(jax.random.key(0), jnp.ones(2, jnp.int32), 2)


# --- activations with a given range ---------------------------------------------------------------


def test_a_given_range_does_what_the_same_range_taken_from_the_values_does():
    values = jnp.asarray(normal(0, 8, 3))
    spec = QuantSpec(3, (1,), quant.minmax, quant.affine)
    low, high = values.min(0, keepdims=True), values.max(0, keepdims=True)
    with jax.numpy_dtype_promotion("strict"):
        got = fake_quantize_within(values, low, high, spec)
    np.testing.assert_allclose(got, quant.fake_quantize(values, spec), rtol=1e-6, atol=1e-6)


def test_values_outside_a_given_range_are_clipped_and_pass_no_gradient():
    values = jnp.array([-9.0, 0.6, 9.0], jnp.bfloat16)
    spec = QuantSpec(8, (), grid=quant.affine)
    rounded, back = jax.vjp(lambda v: fake_quantize_within(v, -1.0, 1.0, spec), values)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_allclose(rounded.astype(jnp.float32), [-1.0, 0.6, 1.0], atol=5e-3)
    np.testing.assert_array_equal(back(jnp.ones_like(values))[0].astype(jnp.float32), [0, 1, 0])
    assert jnp.isnan(fake_quantize_within(jnp.array([jnp.nan]), -1.0, 1.0, spec)).all()


# --- trees ----------------------------------------------------------------------------------------


def test_steps_are_found_and_exported_by_path_in_any_tree(network):
    _, params = network
    spec = QuantSpec(2)
    steps = init_steps(params, spec)
    assert sorted(steps) == ["conv/kernel", "head/kernel", "hidden/kernel"]
    trained = lsq_params(params, steps, spec)
    chex.assert_trees_all_equal_shapes_and_dtypes(trained, params)
    small = lsq_quantize_params(params, steps, spec)
    assert sum(map(jopt.is_compressed, jax.tree.leaves(small, is_leaf=jopt.is_compressed))) == 3
    chex.assert_trees_all_equal(jopt.materialize(small), trained)


def test_steps_train_in_the_optimizer_of_the_parameters_and_pruned_weights_stay_zero():
    spec, inputs = QuantSpec(2), jnp.asarray(normal(1, 20, 8))
    params = {"kernel": jnp.asarray(normal(0, 8, 3)), "bias": jnp.zeros(3)}
    masks = prune.topk_masks(prune.magnitude_scores(params), 0.5)
    steps = init_steps(prune.apply_masks(params, masks), spec, init=lsq_init_mse)
    tree = {"params": prune.apply_masks(params, masks), "steps": steps}
    tx = optax.chain(
        optax.adam(1e-2),
        optax.add_decayed_weights(-1e-4, mask={"params": True, "steps": False}),
        prune.keep_masked({"params": masks, "steps": {"kernel": True}}),
    )

    def loss(tree):
        rounded = lsq_params(tree["params"], tree["steps"], spec)
        return jnp.square(inputs @ rounded["kernel"] + rounded["bias"][None, :] - 1).mean()

    @jax.jit
    def train(tree, state):
        value, gradient = jax.value_and_grad(loss)(tree)
        updates, state = tx.update(gradient, state, tree)
        return optax.apply_updates(tree, updates), state, value

    state, losses = tx.init(tree), []
    for _ in range(60):
        tree, state, value = train(tree, state)
        losses.append(value)
    assert losses[-1] < 0.5 * losses[0]
    assert bool((tree["steps"]["kernel"] != steps["kernel"]).all())
    small = lsq_quantize_params(tree["params"], tree["steps"], spec)
    restored = jopt.materialize(small)
    chex.assert_trees_all_equal(restored, lsq_params(tree["params"], tree["steps"], spec))
    chex.assert_trees_all_equal(prune.apply_masks(restored, masks), restored)


def test_networks_stacked_by_vmap_train_as_one_by_one():
    spec, inputs = QuantSpec(2), jnp.asarray(normal(1, 5, 4))
    params = {"dense": {"kernel": jnp.asarray(normal(0, 4, 3))}}
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, -0.5 * leaf]), params)

    def loss(tree):
        kernel = lsq_params(tree["params"], tree["steps"], spec)["dense"]["kernel"]
        return jnp.square(inputs @ kernel - 1).sum()

    def gradient(params):
        return jax.grad(loss)({"params": params, "steps": init_steps(params, spec)})

    together = jax.jit(jax.vmap(gradient))(stacked)
    alone = gradient(jax.tree.map(lambda leaf: leaf[1], stacked))
    got = jax.tree.map(lambda leaf: leaf[1], together)
    chex.assert_trees_all_close(got, alone, rtol=1e-4, atol=1e-5)


def test_different_leaves_take_different_specs_and_quantizers():
    params = {"a": jnp.asarray(normal(0, 4, 2)), "b": jnp.asarray(normal(1, 4, 2))}
    steps = init_steps(params, QuantSpec(2), "a")
    pairs = init_steps(params, QuantSpec(4), "b", lsq_plus_init)

    def with_offset(values, pair, spec):
        return lsq_plus(values, pair[0], pair[1], spec)

    got = lsq_params(params, steps, QuantSpec(2), partial(lsq, code_range=balanced_codes))
    got = lsq_params(got, pairs, QuantSpec(4), with_offset)
    expected = lsq(params["a"], steps["a"], QuantSpec(2), balanced_codes)
    np.testing.assert_array_equal(got["a"], expected)
    step, offset = pairs["b"]
    np.testing.assert_array_equal(got["b"], lsq_plus(params["b"], step, offset, QuantSpec(4)))


def test_tree_errors_name_the_leaf():
    params = {"dense": {"kernel": jnp.ones((4, 2))}}
    with pytest.raises(ValueError, match="steps: 'kernel' is no path of params; .*dense/kernel"):
        lsq_params(params, {"kernel": jnp.ones((1, 2))}, QuantSpec(2))
    with pytest.raises(ValueError, match="steps: empty"):
        lsq_params(params, {}, QuantSpec(2))
    with pytest.raises(ValueError, match=r"dense/kernel: step must have shape \(1, 2\)"):
        lsq_params(params, {"dense/kernel": jnp.ones((1, 1))}, QuantSpec(2))
    with pytest.raises(ValueError, match="matches no leaf"):
        init_steps(params, QuantSpec(2), "nothing")
    small = quant.quantize_params(params, QuantSpec(2))
    with pytest.raises(TypeError, match="dense/kernel: the leaf is compressed already"):
        init_steps(small, QuantSpec(2), "dense/kernel")
    spoiled = {"dense": {"kernel": jnp.full((4, 2), jnp.nan)}}
    steps = {"dense/kernel": jnp.ones((1, 2))}
    with pytest.raises(ValueError, match="dense/kernel: values must be finite"):
        lsq_quantize_params(spoiled, steps, QuantSpec(2))
    with pytest.raises(ValueError, match="steps/dense/kernel: values must be finite"):
        lsq_quantize_params(params, {"dense/kernel": jnp.full((1, 2), jnp.nan)}, QuantSpec(2))


def test_dorefa_on_trees_trains_what_it_exports():
    params = {"kernel": jnp.asarray(normal(0, 4, 3)), "bias": jnp.ones(3)}
    spec = QuantSpec(3, ())
    small = dorefa_quantize_params(params, spec)
    chex.assert_trees_all_equal(jopt.materialize(small), dorefa_params(params, spec))


def test_at_two_bits_a_learned_step_ends_below_the_straight_through_estimator():
    """The problem is a linear map; the floor of both is the error of two-bit kernels."""
    inputs, truth = jnp.asarray(normal(0, 256, 16)), jnp.asarray(normal(1, 16, 8))
    target, spec = inputs @ truth, QuantSpec(2)
    tx = optax.adam(2e-3)

    def train(loss, tree):
        def step(carry, _):
            tree, state = carry
            value, gradient = jax.value_and_grad(loss)(tree)
            updates, state = tx.update(gradient, state, tree)
            return (optax.apply_updates(tree, updates), state), value

        return jax.jit(lambda tree: jax.lax.scan(step, (tree, tx.init(tree)), None, 400)[1])(tree)

    straight = train(
        lambda tree: jnp.square(inputs @ quant.fake_quantize(tree["kernel"], spec) - target).mean(),
        {"kernel": truth},
    )
    learned = train(
        lambda tree: jnp.square(inputs @ lsq(tree["kernel"], tree["step"], spec) - target).mean(),
        {"kernel": truth, "step": lsq_init(truth, spec)},
    )
    fixed = train(
        lambda tree: jnp.square(
            inputs @ lsq(tree["kernel"], lsq_init(truth, spec), spec) - target
        ).mean(),
        {"kernel": truth},
    )
    assert learned[-20:].mean() < 0.7 * straight[-20:].mean()
    assert learned[-20:].mean() < 0.9 * fixed[-20:].mean()  # it is the step that learned
