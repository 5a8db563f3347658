import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jopt
from jopt import layers, quant
from jopt.layers._statistics import input_statistics
from jopt.quant import QuantSpec
from jopt.quant._awq import awq
from jopt.quant._codebook import nf4
from jopt.quant._smooth import smooth_quant, smoothed_inputs
from tests import oracles_gptq as oracles

SPEC = QuantSpec(3, (8, 1), quant.minmax, quant.affine)


def statistics_of(rows):
    rows = jnp.asarray(rows, jnp.float32)
    state = input_statistics.update(input_statistics.init(rows.shape[1]), rows)
    return input_statistics.finalise(state)


def outlying(seed, features, rows=256):
    """Draw inputs of which a few are far larger than the others."""
    rng = np.random.default_rng(seed)
    sizes = np.where(np.arange(features) % 7 == 3, 20.0, 1.0) * rng.uniform(0.5, 2, features)
    return rng.normal(size=(rows, features)) * sizes


def kernel_of(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def stacked(parts):
    return jax.tree.map(lambda *fields: jnp.stack(fields), *parts)


def test_awq_finds_the_best_factors_of_the_paper():
    weights, statistics = kernel_of(0, (32, 8)), statistics_of(outlying(1, 32))
    with jax.numpy_dtype_promotion("strict"):
        leaf, outcome = awq(weights, statistics, SPEC, 11)
    errors = []
    for exponent in np.linspace(0, 1, 11):
        scales = oracles.awq_factors(weights, statistics.mean_abs, exponent)[:, None]
        restored = quant.fake_quantize(jnp.asarray(scales, jnp.float32) * weights, SPEC) / scales
        errors.append(oracles.output_error(weights, restored, statistics.gram))
    np.testing.assert_allclose(outcome.error, min(errors), rtol=1e-3)
    np.testing.assert_allclose(outcome.baseline, errors[0], rtol=1e-3)
    best = np.linspace(0, 1, 11)[np.argmin(errors)]
    expected = 1 / oracles.awq_factors(weights, statistics.mean_abs, best)
    np.testing.assert_allclose(leaf.factor[:, 0], expected, rtol=1e-4)
    assert 0 < best and bool(outcome.improved)


def test_smooth_factors_are_the_formula_and_restore_the_layer():
    weights, rows = kernel_of(2, (32, 8)), outlying(3, 32)
    statistics = statistics_of(rows)
    with jax.numpy_dtype_promotion("strict"):
        leaf, outcome = smooth_quant(weights, statistics, QuantSpec(8))
    expected = 1 / oracles.smooth_factors(weights, statistics.abs_max, 0.5)
    np.testing.assert_allclose(leaf.factor[:, 0], expected, rtol=1e-4)
    assert bool(outcome.improved) and outcome.error < 0.2 * outcome.baseline
    x = jnp.asarray(rows, jnp.float32)
    np.testing.assert_allclose(
        smoothed_inputs(x, leaf) @ jopt.materialize(leaf.tensor),
        x @ jopt.materialize(leaf),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("alpha", [0.5, (0.3, 0.5, 0.7)])
def test_smoothing_lowers_the_error_that_rounded_inputs_really_make(alpha):
    weights, rows = kernel_of(4, (32, 8)), jnp.asarray(outlying(5, 32), jnp.float32)
    leaf, outcome = smooth_quant(
        weights, statistics_of(rows), QuantSpec(8), QuantSpec(8, ()), jnp.array(alpha)
    )
    target = rows @ weights
    plain = quant.fake_quantize(rows, QuantSpec(8, ())) @ quant.fake_quantize(weights, QuantSpec(8))
    smooth = quant.fake_quantize(smoothed_inputs(rows, leaf), QuantSpec(8, ()))
    smooth = smooth @ jopt.materialize(leaf.tensor)
    found = [float(jnp.square(y - target).sum(-1).mean()) for y in (smooth, plain)]
    np.testing.assert_allclose(found, [outcome.error, outcome.baseline], rtol=0.25)  # a model
    assert found[0] < 0.3 * found[1]


def test_more_strengths_are_no_worse_than_one():
    weights, statistics = kernel_of(6, (24, 8)), statistics_of(outlying(7, 24))
    one, several = (
        smooth_quant(weights, statistics, QuantSpec(4), alpha=jnp.array(alpha))[1]
        for alpha in ((0.5,), (0.2, 0.5, 0.8))
    )
    assert several.error <= one.error * (1 + 1e-6) and several.baseline == one.baseline


METHODS = {"awq": awq, "smooth_quant": smooth_quant}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_positions_of_a_convolution_share_the_factor_of_their_channel(method):
    weights, statistics = kernel_of(8, (3, 3, 4, 6)), statistics_of(outlying(9, 36))
    leaf, outcome = method(weights, statistics, QuantSpec(4, (4, 1)))
    assert leaf.factor.shape == (1, 1, 4, 1) and jopt.materialize(leaf).shape == (3, 3, 4, 6)
    assert outcome.error <= outcome.baseline
    images = kernel_of(10, (2, 5, 5, 4))
    assert smoothed_inputs(images, leaf).shape == images.shape


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_stacked_layers_and_groups(method):
    parts = [statistics_of(outlying(seed, 18)) for seed in range(3)]
    kernels, spec = kernel_of(11, (3, 18, 6)), QuantSpec(4)
    together, outcomes = jax.vmap(lambda w, s: method(w, s, spec))(kernels, stacked(parts))
    for index, part in enumerate(parts):
        leaf, outcome = jax.jit(lambda w, s: method(w, s, spec))(kernels[index], part)
        got = jax.tree.map(lambda field, i=index: field[i], together)
        chex.assert_trees_all_close(jopt.materialize(got), jopt.materialize(leaf), atol=1e-5)
        np.testing.assert_allclose(outcomes.error[index], outcome.error, rtol=1e-3)
    grouped, outcome = method(kernel_of(12, (3, 3, 2, 6)), stacked(parts), spec)
    assert grouped.factor.shape == (1, 1, 2, 1) and outcome.error <= outcome.baseline


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_narrow_weights_keep_their_dtype_and_codebooks_work(method):
    weights = kernel_of(13, (32, 8)).astype(jnp.bfloat16)
    statistics = statistics_of(outlying(14, 32))
    with jax.numpy_dtype_promotion("strict"):
        leaf, outcome = method(weights, statistics, QuantSpec(4, (8, 1), grid=nf4))
    assert leaf.factor.dtype == jopt.materialize(leaf).dtype == jnp.bfloat16
    assert bool(outcome.improved)
    np.testing.assert_allclose(
        layers.output_error(weights, leaf, statistics),
        oracles.output_error(weights, jopt.materialize(leaf), statistics.gram),
        rtol=1e-3,
    )


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_inputs_that_are_always_zero_change_nothing(method):
    rows = outlying(15, 16)
    rows[:, [2, 9]] = 0
    weights = kernel_of(16, (16, 4)).at[5].set(0.0)
    leaf, outcome = method(weights, statistics_of(rows), QuantSpec(4))
    assert bool(jnp.isfinite(jopt.materialize(leaf)).all())
    assert outcome.error <= outcome.baseline
    for value in (0.0, jnp.nan):  # no data at all, and data that were spoiled
        nothing = jax.tree.map(lambda f, v=value: jnp.full_like(f, v), statistics_of(rows))
        leaf, outcome = method(weights, nothing, QuantSpec(4))
        nearest = quant.fake_quantize(weights, QuantSpec(4))
        chex.assert_trees_all_equal(jopt.materialize(leaf), nearest)
        assert not bool(outcome.improved)


def test_errors_say_what_does_not_fit():
    weights, statistics = kernel_of(17, (4, 6)), statistics_of(outlying(18, 6))
    for method in METHODS.values():
        with pytest.raises(ValueError, match="6 features fit no leading axes"):
            method(weights, statistics, QuantSpec())
    with pytest.raises(ValueError, match="candidates must be 2 or more, not 1"):
        awq(weights.T, statistics, QuantSpec(), 1)
    with pytest.raises(ValueError, match=r"activation_spec.block must be \(\), .* not \(1,\)"):
        smooth_quant(weights.T, statistics, QuantSpec(), QuantSpec(8, (1,)))
    leaf, _ = awq(weights.T, statistics, QuantSpec())
    with pytest.raises(ValueError, match="have not the 6 channels"):
        smoothed_inputs(jnp.ones((2, 4)), leaf)
