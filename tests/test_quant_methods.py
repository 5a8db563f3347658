"""HQQ, AdaRound, rotation, bias correction and equalization, on layers that were trained."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jopt
from jopt import layers, quant
from jopt.layers._outcome import output_error
from jopt.quant import QuantSpec
from jopt.quant._adaround import adaround
from jopt.quant._bias import correct_bias, correct_biases
from jopt.quant._equalize import equalize, equalize_params
from jopt.quant._hadamard import hadamard_rotation
from jopt.quant._hqq import hqq
from tests import trained

AFFINE = QuantSpec(3, (16, 1), quant.minmax, quant.affine)
SPECS = {
    "affine": AFFINE,
    "affine_zero": QuantSpec(3, (1,), quant.minmax, quant.affine_zero),
    "symmetric": QuantSpec(3, (1,)),
}


def without_data(weights, statistics, spec):
    del statistics
    return hqq(weights, None, spec)


def quickly(weights, statistics, spec):
    return adaround(weights, statistics, spec, steps=300)


METHODS = {
    "hqq": hqq,
    "hqq_without_data": without_data,
    "adaround": quickly,
    "hadamard": hadamard_rotation,
}


def lp_error(weights, leaf, power=0.7):
    """Return the mean of |w - v|^p in float64."""
    difference = np.asarray(weights, np.float64) - np.asarray(jopt.materialize(leaf), np.float64)
    return (np.abs(difference) ** power).mean()


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_hqq_is_nearer_to_the_weights_in_its_norm(spec):
    wins = 0
    for weights, _ in trained.layers():
        leaf, outcome = hqq(weights, None, spec)
        ours, theirs = lp_error(weights, leaf), lp_error(weights, quant.quantize(weights, spec))
        assert ours <= theirs * (1 + 1e-6)
        np.testing.assert_allclose(outcome.error, ours, rtol=1e-3)
        np.testing.assert_allclose(outcome.baseline, theirs, rtol=1e-3)
        wins += ours < 0.995 * theirs
    assert wins >= (0 if spec.grid is quant.affine_zero else 2)  # whole zero points hardly move


def test_adaround_makes_the_outputs_better_and_the_weights_worse():
    for weights, statistics in trained.layers():
        leaf, outcome = quickly(weights, statistics, QuantSpec(3))
        nearest = quant.quantize(weights, QuantSpec(3))
        assert outcome.improved and float(outcome.error) < 0.8 * float(outcome.baseline)
        np.testing.assert_allclose(
            outcome.error, output_error(weights, leaf, statistics), rtol=1e-4
        )
        squares = [((jopt.materialize(x) - weights) ** 2).sum() for x in (leaf, nearest)]
        assert squares[0] > squares[1]


def test_adaround_only_rounds_up_or_down():
    weights, statistics = trained.layers()[0]
    leaf, _ = quickly(weights, statistics, QuantSpec(3))
    assert float((jnp.abs(jopt.materialize(leaf) - weights) / leaf.scale).max()) <= 1 + 1e-5


def test_rotation_spreads_outliers():
    for weights, statistics in trained.layers():
        spiked = weights.at[::9].multiply(8.0)
        _, outcome = hadamard_rotation(spiked, statistics, QuantSpec(4))
        assert outcome.improved and float(outcome.error) < 0.8 * float(outcome.baseline)


def test_rotation_takes_another_method():
    weights, statistics = trained.layers()[0]
    spiked = weights.at[::9].multiply(8.0)
    _, alone = hadamard_rotation(spiked, statistics, QuantSpec(3))
    leaf, both = hadamard_rotation(spiked, statistics, QuantSpec(3), method=quickly)
    assert float(both.error) < float(alone.error)
    np.testing.assert_allclose(both.error, output_error(spiked, leaf, statistics), rtol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_where_it_does_not_win_round_to_nearest_comes_back(name):
    """A kernel on the grid already has no error to take away."""
    _, statistics = trained.layers()[2]
    codes = jax.random.randint(jax.random.key(0), (32, 8), -3, 4).at[:2].set(3)
    weights = 0.5 * codes.astype(jnp.float32)
    leaf, outcome = METHODS[name](weights, statistics, QuantSpec(3))
    assert not outcome.improved
    np.testing.assert_allclose(outcome.error, outcome.baseline)
    np.testing.assert_array_equal(jopt.materialize(leaf), weights)


@pytest.mark.parametrize("name", METHODS)
def test_methods_map_over_stacked_layers(name):
    weights, statistics = trained.layers()[1]
    stacked = jnp.stack([weights, 2 * weights[::-1]])
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), statistics)
    together, outcomes = jax.vmap(METHODS[name], (0, 0, None))(stacked, both, AFFINE)
    for at in range(2):
        alone, outcome = METHODS[name](stacked[at], statistics, AFFINE)
        one = jax.tree.map(lambda leaf, at=at: leaf[at], together)
        same = jnp.isclose(jopt.materialize(one), jopt.materialize(alone), rtol=1e-4, atol=1e-5)
        assert float(same.mean()) > 0.99  # a tie may fall to the other side
        np.testing.assert_allclose(outcomes.error[at], outcome.error, rtol=0.02)


@pytest.mark.parametrize("name", METHODS)
def test_methods_keep_narrow_floats_and_shapes(name):
    weights, statistics = trained.layers()[0]
    weights = weights.astype(jnp.bfloat16).reshape(4, 16, 48)
    with jax.numpy_dtype_promotion("strict"):
        leaf, outcome = METHODS[name](weights, statistics, AFFINE)
    restored = jopt.materialize(leaf)
    assert restored.shape == weights.shape and restored.dtype == jnp.bfloat16
    assert jnp.isfinite(outcome.error)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("value", [0.0, 2.0])
def test_constant_kernels_stay_as_they_are(name, value):
    weights = jnp.full((64, 3), value)
    leaf, outcome = METHODS[name](weights, trained.layers()[0][1], SPECS["affine"])
    np.testing.assert_allclose(jopt.materialize(leaf), weights, atol=1e-6)
    assert not bool(jnp.isnan(outcome.error))


def test_options_out_of_range_are_refused():
    weights, statistics = trained.layers()[0]
    with pytest.raises(ValueError, match="power must be between 0 and 1, not 2"):
        hqq(weights, None, AFFINE, power=2.0)
    with pytest.raises(ValueError, match="steps must be at least 1, not 0"):
        hqq(weights, None, AFFINE, steps=0)
    with pytest.raises(ValueError, match="steps must be at least 1, not 0"):
        adaround(weights, statistics, AFFINE, steps=0)
    with pytest.raises(ValueError, match="two axes or more"):
        hadamard_rotation(weights[0], None, QuantSpec(4))
    with pytest.raises(ValueError, match="64 features fit no leading axes"):
        adaround(weights[:32], statistics, QuantSpec(4))


def test_a_corrected_bias_gives_back_the_mean_outputs():
    params, statistics = trained.network()
    spec = QuantSpec(2, ())
    small = quant.quantize_params(params, spec)
    corrected, report = correct_biases(params, small, statistics)
    assert report == {f"dense{n}/kernel": f"dense{n}/bias" for n in range(3)}
    inputs = trained.forward(params, trained.images(jax.random.key(9), 4096))[0][1]

    def outputs(tree):
        return inputs @ jopt.materialize(tree["dense1"]["kernel"]) + tree["dense1"]["bias"][None, :]

    gap = [
        jnp.abs(outputs(tree).mean(0) - outputs(params).mean(0)).mean()
        for tree in (small, corrected)
    ]
    assert gap[1] < 0.3 * gap[0]


def test_biases_that_cannot_be_corrected_are_reported():
    params, statistics = trained.network()
    params = {"a": {"kernel": params["dense0"]["kernel"]}, "dense1": params["dense1"]}
    small = quant.quantize_params(params, QuantSpec(4))
    statistics = {"a/kernel": statistics["dense0/kernel"]}
    corrected, report = correct_biases(params, small, statistics)
    assert report["a/kernel"] == "there is no bias at a/bias"
    assert report["dense1/kernel"] == "no statistics of its inputs"
    chex.assert_trees_all_equal(corrected, small)
    with pytest.raises(ValueError, match="not the same paths"):
        correct_biases({"b": params}, small, statistics)


def test_a_depthwise_bias_is_corrected_by_group():
    key = jax.random.key(0)
    weights = jax.random.normal(key, (3, 3, 1, 5))
    mean = jax.random.normal(jax.random.key(1), (5, 9))
    gram = jnp.tile(jnp.eye(9)[None], (5, 1, 1))
    statistics = layers.input_statistics.finalise(layers.input_statistics.init(9))
    statistics = statistics._replace(mean=mean, gram=gram)
    leaf = quant.quantize(weights, QuantSpec(2))
    got = correct_bias(jnp.zeros(5), weights, leaf, statistics)
    lost = np.asarray(weights - jopt.materialize(leaf)).reshape(9, 5)
    np.testing.assert_allclose(got, (np.asarray(mean).T * lost).sum(0), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="do not fit"):
        correct_bias(jnp.zeros(4), weights, leaf, statistics)


def test_equalized_networks_compute_the_same_and_lose_less_in_one_scale():
    params, _ = trained.network()
    stretch = 2.0 ** jnp.linspace(-4, 4, 48)
    params = jax.tree.map(lambda leaf: leaf, params)
    params["dense0"] = {
        "kernel": params["dense0"]["kernel"] * stretch[None, :],
        "bias": params["dense0"]["bias"] * stretch,
    }
    params["dense1"] = params["dense1"] | {"kernel": params["dense1"]["kernel"] / stretch[:, None]}
    inputs = trained.images(jax.random.key(5), 256)
    wanted = trained.forward(params, inputs)[1]
    pairs = [("dense0/kernel", "dense1/kernel"), ("dense1/kernel", "dense2/kernel")]
    even = equalize_params(params, pairs)
    np.testing.assert_allclose(trained.forward(even, inputs)[1], wanted, rtol=2e-3, atol=2e-3)
    errors = []
    for tree in (params, even):
        small = jopt.materialize(quant.quantize_params(tree, QuantSpec(5, ())))
        errors.append(float(((trained.forward(small, inputs)[1] - wanted) ** 2).mean()))
    assert errors[1] < 0.1 * errors[0]


def test_equalization_goes_through_depthwise_and_flattened_layers():
    keys = jax.random.split(jax.random.key(0), 3)
    first = jax.random.normal(keys[0], (3, 4)) * jnp.array([8.0, 1.0, 0.0, 0.1])[None, :]
    for second in (
        jax.random.normal(keys[1], (3, 3, 1, 4)),
        jax.random.normal(keys[1], (3, 3, 4, 6)),
        jax.random.normal(keys[2], (5 * 4, 6)),
    ):
        new, bias, after = equalize(first, jnp.ones(4), second)
        scale = np.asarray(bias)
        assert scale[2] == 1  # never made: left alone
        channel_axis = -1 if second.shape[-2] == 1 else -2
        spread = second.shape[channel_axis] // 4
        factor = np.tile(1 / scale, spread)
        shape = [1] * second.ndim
        shape[channel_axis] = 4 * spread
        np.testing.assert_allclose(after, np.asarray(second) * factor.reshape(shape), rtol=1e-5)
        made = np.abs(new).max(0)
        read = np.abs(np.moveaxis(np.asarray(after), channel_axis, -1)).reshape(-1, spread, 4)
        read = read.max((0, 1))
        np.testing.assert_allclose(made[[0, 1, 3]], read[[0, 1, 3]], rtol=1e-4)


def test_equalization_names_what_does_not_fit():
    params = {"a": {"kernel": jnp.ones((2, 3))}, "b": {"kernel": jnp.ones((4, 2))}}
    with pytest.raises(ValueError, match="a/kernel and b/kernel: .* 4 inputs, no multiple of"):
        equalize_params(params, [("a/kernel", "b/kernel")])
    with pytest.raises(ValueError, match="pairs name 'c'"):
        equalize_params(params, [("a/kernel", "c")])
    with pytest.raises(ValueError, match="steps must be at least 1"):
        equalize_params(params, [], steps=0)
