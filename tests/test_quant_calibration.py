"""Ranges of weights and of inputs, statistics gathered by batch, and their adequacy."""

import itertools

import chex
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jopt
from jopt import quant
from jopt.layers._calibrate import accumulate, calibrate, finalise_states, merge_states
from jopt.layers._statistics import (
    Extremes,
    Statistic,
    extremes,
    input_statistics,
    moving_average,
    per_feature,
    together,
)
from jopt.quant import QuantSpec
from jopt.quant._activations import (
    activation_ranges,
    fake_quantize_within,
    per_tensor,
    quantize_inputs,
    quantize_inputs_dynamically,
)
from jopt.quant._adequacy import activation_adequacy, adequacy, usage
from jopt.quant._adequacy_report import advice, format_adequacy
from jopt.quant._entropy import entropy
from jopt.quant._histogram import histogram
from jopt.quant._histogram_ranges import (
    entropy_range,
    entropy_search_range,
    histogram_range,
    minmax_range,
    mse_range,
    mse_search_range,
    percentile_range,
)
from jopt.quant._percentile import percentile
from jopt.quant._range_search import mse, mse_search
from jopt.quant._weighted import quantize_weighted
from tests import oracles_calibration as oracles

AFFINE_ZERO = QuantSpec(8, (), quant.minmax, quant.affine_zero)
GRIDS = {"symmetric": quant.symmetric, "affine": quant.affine, "affine_zero": quant.affine_zero}


def heavy_tails(seed, *shape):
    return np.random.default_rng(seed).standard_t(3, shape).astype(np.float32)


def dense(params, x):
    return x @ params["w"]


def gathered(statistic, batches):
    update = jax.jit(statistic.update)
    state = statistic.init(batches[0].shape[1])
    for rows in batches:
        state = update(state, rows)
    return state


# --- ranges of weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("percent", [0.1, 50, 99, 99.9, 100])
def test_percentile_is_the_exact_order_statistic_of_each_block(percent):
    values = heavy_tails(0, 1000, 3)
    values[:, 2] = np.abs(values[:, 2]).round(1) + 1  # ties
    low, high = jax.jit(lambda v: percentile(percent)(v, (0,), None))(values)
    for column in range(3):
        threshold = oracles.rank_magnitude(values[:, column], percent)
        assert float(high[0, column]) == min(threshold, values[:, column].max())
        assert float(low[0, column]) == max(-threshold, values[:, column].min())


def test_percentile_finds_its_place_whatever_the_distribution():
    tiny = np.float32(2.0**-100)
    rows = [[0, 0, 0, 0, 5], [tiny, 1, 1, 1, 2.0**100], [7, 7, 7, 7, 7], [0, 0, 0, 0, 0]]
    _, high = percentile(80)(jnp.array(rows, jnp.float32), (1,), None)
    # A threshold of zero cuts nothing; four of five are at or below the others'.
    np.testing.assert_array_equal(high.ravel(), [5, 1, 7, 0])


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_mse_is_the_best_of_all_its_thresholds(bits):
    values = heavy_tails(bits, 400, 2)
    spec = QuantSpec(bits, (1,), mse_search(24, 0.05))
    restored = np.asarray(quant.fake_quantize(values, spec), np.float64)
    for column in range(2):
        weights = values[:, column]
        tried = [np.abs(weights).max() * 0.05 ** (i / 24) for i in range(25)]
        best = min(oracles.squared_error(weights, threshold, bits) for threshold in tried)
        got = ((restored[:, column] - weights) ** 2).sum()
        assert got == pytest.approx(best, rel=1e-4)
        assert best < oracles.squared_error(weights, tried[0], bits)


@pytest.mark.parametrize(
    ("name", "block"),
    [("symmetric", ()), ("symmetric", (8, 1)), ("affine", (1,)), ("affine_zero", (8, 1))],
)
def test_mse_is_never_worse_than_the_whole_range(name, block):
    values = jnp.asarray(heavy_tails(7, 64, 6)) + jnp.array([0, 0, 0, 4, -4, 0.0])[None, :]
    spec = QuantSpec(4, block, mse, GRIDS[name])
    whole = QuantSpec(4, block, quant.minmax, GRIDS[name])
    costs = [
        jnp.square(quant.fake_quantize(values, s) - values).reshape(-1, 8, 6).sum(1)
        for s in (spec, whole)
    ]
    if block != (8, 1):
        costs = [cost.sum(0, keepdims=True) for cost in costs]
    if block == ():
        costs = [cost.sum(1, keepdims=True) for cost in costs]
    assert bool((costs[0] <= costs[1] * (1 + 1e-5)).all())
    assert float(costs[0].sum()) < float(costs[1].sum())


def test_the_power_of_the_error_says_how_much_outliers_count():
    values = jnp.asarray(heavy_tails(3, 2000))
    scales = [
        float(quant.quantize(values, QuantSpec(3, (), mse_search(power=power))).scale[0])
        for power in (1.0, 2.0, 4.0)
    ]
    assert scales[0] < scales[1] < scales[2]


def test_gradients_of_a_searched_range_are_those_of_what_it_keeps():
    values = jnp.array([0.9, -0.8, 1.0, 30.0] + [1.0] * 60)
    spec = QuantSpec(4, (), mse_search(48, 0.01))
    scale = float(quant.quantize(values, spec).scale[0])
    gradient = jax.grad(lambda v: quant.fake_quantize(v, spec).sum())(values)
    np.testing.assert_array_equal(gradient, np.abs(values) <= 7 * scale * (1 + 1e-6))


RANGES = {
    "percentile": percentile(99),
    "mse": mse_search(6),
    "power": mse_search(6, power=2.4),
    "entropy": entropy(4, 256, 12),
}


@pytest.mark.parametrize("name", RANGES)
def test_ranges_are_the_same_jitted_mapped_and_in_strict_dtypes(name):
    spec = QuantSpec(4, (1,), RANGES[name])
    values = jnp.asarray(heavy_tails(1, 3, 50, 4))
    with jax.numpy_dtype_promotion("strict"):
        mapped = jax.vmap(lambda v: jopt.materialize(quant.quantize(v, spec)))(values)
        alone = jopt.materialize(quant.quantize(values[1], spec))
        narrow = jax.eval_shape(lambda v: quant.quantize(v, spec), values[0].astype(jnp.bfloat16))
    chex.assert_trees_all_close(mapped[1], alone, rtol=1e-6)
    assert narrow.scale.dtype == jnp.bfloat16


@pytest.mark.parametrize("name", RANGES)
def test_constant_blocks_keep_their_value(name):
    values = jnp.tile(jnp.array([[0.0, 2.5, -3e-30, 1e30]]), (6, 1))
    restored = quant.fake_quantize(values, QuantSpec(4, (1,), RANGES[name]))
    np.testing.assert_allclose(restored, values, rtol=1e-6)


def test_equal_arguments_give_the_identical_range():
    for factory, arguments in [(percentile, (99.0,)), (mse_search, (9,)), (entropy, (4,))]:
        assert factory(*arguments) is factory(*arguments)
    assert moving_average(0.5) is moving_average(0.5) and histogram(64) is histogram(64)


def test_entropy_ignores_a_lone_outlier_that_widens_minmax():
    values = jnp.asarray(np.append(np.random.default_rng(0).normal(size=3000), 40.0), jnp.float32)
    _, high = entropy(8)(values, (0,), None)
    assert 2 < float(high[0]) < 10


# --- the method weighted by the inputs ------------------------------------------------------------


def correlated(seed, count, features):
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(features, features)) * np.geomspace(3, 0.03, features)
    return (rng.normal(size=(count, features)) @ mixing.T).astype(np.float32)


def statistics_of(rows):
    return input_statistics.finalise(gathered(input_statistics, [jnp.asarray(rows)]))


def test_weighted_ranges_lower_the_output_error():
    rows = np.random.default_rng(0).normal(size=(400, 24)) * np.geomspace(0.01, 3, 24)
    weights = heavy_tails(4, 24, 8)
    weights[:3] *= 6  # large weights where inputs are small
    spec = QuantSpec(3)
    leaf, outcome = quantize_weighted(weights, statistics_of(rows), spec)
    errors = [
        (((rows @ (np.asarray(jopt.materialize(each), np.float64) - weights)) ** 2).sum(1)).mean()
        for each in (leaf, quant.quantize(weights, spec))
    ]
    assert bool(outcome.improved) and errors[0] < 0.5 * errors[1]
    assert float(outcome.error) == pytest.approx(errors[0], rel=1e-3)
    assert float(outcome.baseline) == pytest.approx(errors[1], rel=1e-3)


def test_weighted_ranges_are_the_best_of_their_weighted_error():
    rows = np.random.default_rng(1).normal(size=(300, 16)) * np.geomspace(0.1, 2, 16)
    weights = heavy_tails(5, 16, 1)
    statistics = statistics_of(rows)._replace(gram=jnp.diag(jnp.asarray((rows**2).mean(0), "f4")))
    leaf, _ = quantize_weighted(weights, statistics, QuantSpec(3), 20, 0.2)
    largest, importance = np.abs(weights).max(), (rows**2).mean(0)[:, None]
    best = min(
        oracles.squared_error(weights, largest * 0.2 ** (i / 20), 3, importance) for i in range(21)
    )
    got = (importance * (np.asarray(jopt.materialize(leaf), np.float64) - weights) ** 2).sum()
    assert got == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("shape", [(3, 3, 4, 6), (36, 6)])
def test_weighted_ranges_take_convolutions_stacks_and_dead_inputs(shape):
    kernels = jnp.asarray(heavy_tails(6, 2, *shape))
    stacked = jax.vmap(lambda rows: input_statistics.update(input_statistics.init(36), rows))(
        jnp.stack([jnp.asarray(correlated(0, 50, 36)), jnp.zeros((50, 36))])
    )
    statistics = jax.vmap(input_statistics.finalise)(stacked)
    spec = QuantSpec(4)
    leaves, outcomes = jax.vmap(lambda w, s: quantize_weighted(w, s, spec))(kernels, statistics)
    assert jopt.materialize(leaves).shape == (2, *shape)
    assert bool(jnp.isfinite(outcomes.error).all())
    assert not bool(outcomes.improved[1])  # inputs of zero: nothing to gain
    nearest = quant.fake_quantize(kernels[1], spec)
    np.testing.assert_allclose(jopt.materialize(leaves)[1], nearest, rtol=1e-6)


def test_weighted_ranges_take_groups_each_with_its_own_inputs():
    rows = np.stack([correlated(g, 80, 9) for g in range(4)])
    statistics = jax.vmap(statistics_of)(jnp.asarray(rows))
    kernel = jnp.asarray(heavy_tails(8, 3, 3, 1, 4), jnp.bfloat16)
    leaf, outcome = quantize_weighted(kernel, statistics, QuantSpec(3))
    flat = np.asarray(kernel, np.float64).reshape(9, 4)
    delta = np.asarray(jopt.materialize(leaf), np.float64).reshape(9, 4) - flat
    error = sum(((rows[g].astype(np.float64) @ delta[:, g]) ** 2).mean() for g in range(4))
    assert float(outcome.error) == pytest.approx(error, rel=1e-2)
    assert leaf.scale.dtype == jnp.bfloat16


# --- statistics -----------------------------------------------------------------------------------

STATISTICS = {
    "input_statistics": input_statistics,
    "extremes": extremes,
    "moving_average": moving_average(0.9),
    "histogram": histogram(64),
    "usage": usage(64),
    "per_feature": per_feature(histogram(16)),
    "together": together(extremes, input_statistics),
}
EXACT = ["extremes", "histogram", "per_feature"]


@pytest.mark.parametrize("name", STATISTICS)
def test_merging_shards_equals_one_pass(name):
    statistic = STATISTICS[name]
    batches = [jnp.asarray(heavy_tails(i, 5, 3) * 10.0**i) for i in range(4)]
    with jax.numpy_dtype_promotion("strict"):
        one = gathered(statistic, batches)
        shards = gathered(statistic, batches[:1]), gathered(statistic, batches[1:])
        merge = jax.jit(statistic.merge)
        merged = merge(*shards)
        nothing = statistic.init(3)
        same = merge(nothing, merge(merged, nothing))
    compare = chex.assert_trees_all_equal if name in EXACT else chex.assert_trees_all_close
    kwargs = {} if name in EXACT else {"rtol": 1e-4, "atol": 1e-5}
    compare(merged, one, **kwargs)
    compare(same, merged, **kwargs)
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, nothing)
    finite = jax.tree.map(lambda x: np.isfinite(x).all(), jax.jit(statistic.finalise)(one))
    assert all(jax.tree.leaves(finite))


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_are_mapped_over_stacked_layers(name):
    statistic = STATISTICS[name]
    rows = jnp.asarray(heavy_tails(3, 2, 6, 3))

    @jax.jit
    def figures(each):
        return statistic.finalise(statistic.update(statistic.init(3), each))

    together_ = jax.vmap(figures)(rows)
    alone = jax.tree.map(lambda *each: jnp.stack(each), *[figures(each) for each in rows])
    chex.assert_trees_all_close(together_, alone, rtol=1e-5)


@pytest.mark.parametrize("name", STATISTICS)
def test_a_layer_that_no_row_reached_has_finite_figures(name):
    statistic = STATISTICS[name]
    state = gathered(statistic, [jnp.zeros((0, 3))])
    chex.assert_trees_all_equal(state, statistic.init(3))
    leaves = jax.tree.leaves(jax.jit(statistic.finalise)(state))
    assert all(np.isfinite(leaf).all() for leaf in leaves)


def test_input_statistics_are_the_means_of_the_rows():
    rows = heavy_tails(0, 40, 5)
    figures = statistics_of(rows)
    exact = rows.astype(np.float64)
    assert float(figures.count) == 40
    np.testing.assert_allclose(figures.mean, exact.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(figures.mean_abs, np.abs(exact).mean(0), rtol=1e-5)
    np.testing.assert_allclose(figures.abs_max, np.abs(exact).max(0), rtol=1e-6)
    np.testing.assert_allclose(figures.gram, exact.T @ exact / 40, rtol=1e-4, atol=1e-5)


def test_the_moving_average_is_the_weighted_mean_of_batch_ends():
    batches = [jnp.asarray(heavy_tails(i, 7, 2)) for i in range(5)]
    figures = moving_average(0.7).finalise(gathered(moving_average(0.7), batches))
    lows, highs = ([float(end(b)) for b in batches] for end in (jnp.min, jnp.max))
    assert float(figures.low) == pytest.approx(oracles.moving_average(lows, 0.7), rel=1e-5)
    assert float(figures.high) == pytest.approx(oracles.moving_average(highs, 0.7), rel=1e-5)
    backwards = moving_average(0.7).finalise(gathered(moving_average(0.7), batches[::-1]))
    assert float(backwards.high) != pytest.approx(float(figures.high), rel=1e-3)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_histogram_counts_what_numpy_counts(scale):
    values = heavy_tails(1, 500, 4) * np.float32(scale)
    values[:30] = 0
    state = gathered(histogram(64), [jnp.asarray(values)])
    counts, zeros, exponent = oracles.histogram(values, 64)
    np.testing.assert_array_equal(state.counts, counts)
    assert int(state.zeros) == zeros and int(state.exponent) == exponent
    assert float(state.low) == values.min() and float(state.high) == values.max()


def test_histograms_of_shards_in_any_order_are_bit_for_bit_one_pass():
    edges = [1.0, -1.0, 32.0, -32.0, 31.999998, -32.000004, 2.0**-140, -(2.0**-126), 0.0, -0.0]
    shards = [
        jnp.array(edges[:5])[:, None],
        jnp.array(edges[5:])[:, None],
        jnp.asarray(heavy_tails(0, 20, 1) * 1e-20),
        jnp.asarray(heavy_tails(1, 20, 1) * 1e20),
    ]
    statistic, merge = histogram(64), jax.jit(histogram(64).merge)
    one = gathered(statistic, [jnp.concatenate(shards)])
    singles = [gathered(statistic, [shard]) for shard in shards]
    assert int(one.counts.sum() + one.zeros) == 50
    for order in itertools.permutations(range(4)):
        a, b, c, d = (singles[i] for i in order)
        chex.assert_trees_all_equal(merge(merge(merge(a, b), c), d), one)
        chex.assert_trees_all_equal(merge(merge(a, b), merge(c, d)), one)


def test_powers_of_two_stay_in_the_bins_they_belong_to():
    for power in (-100, -1, 0, 5, 126):
        values = np.array([[2.0**power], [-(2.0**power)]], np.float32)
        state = gathered(histogram(16), [jnp.asarray(values)])
        counts, _, exponent = oracles.histogram(values, 16)
        np.testing.assert_array_equal(state.counts, counts)
        assert int(state.exponent) == exponent


def test_values_that_are_not_finite_show_in_the_ends_and_are_not_counted():
    state = gathered(histogram(16), [jnp.array([[1.0], [jnp.inf], [-2.0]])])
    assert int(state.counts.sum()) == 2 and float(state.high) == np.inf
    state = gathered(histogram(16), [jnp.array([[1.0], [jnp.nan]])])
    assert int(state.counts.sum()) == 1 and bool(jnp.isnan(state.low))


# --- ranges of inputs -----------------------------------------------------------------------------


def figures_of(values):
    # Padded with zeros that are then taken off, so that all sizes share one compiled function.
    values = np.asarray(values).ravel()
    spare = 20001 - values.size
    rows = jnp.asarray(np.append(values, np.zeros(spare, np.float32)))[:, None]
    state = gathered(histogram(), [rows])
    ends = extremes.finalise(extremes.update(extremes.init(1), jnp.asarray(values)[:, None]))
    return state._replace(zeros=state.zeros - spare, low=ends.low, high=ends.high)


@pytest.mark.parametrize("percent", [50, 99, 99.9])
def test_the_percentile_of_a_histogram_holds_the_share_to_within_a_bin(percent):
    values = heavy_tails(0, 20000)
    figures = figures_of(values)
    high = float(histogram_range(figures, percentile_range(percent), QuantSpec())[1])
    width = 2.0 ** int(figures.exponent)
    exact = np.sort(np.abs(values))[int(np.ceil(values.size * percent / 100)) - 1]
    assert exact <= high <= exact + width


def test_a_histogram_of_mostly_zeros_is_not_cut_at_zero():
    figures = figures_of(np.append(np.zeros(999), 3.0).astype(np.float32))
    low, high = histogram_range(figures, percentile_range(99), QuantSpec())
    assert (float(low), float(high)) == (0.0, 3.0)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_mse_of_a_histogram_is_nearly_the_best_on_the_values(bits):
    values = np.maximum(heavy_tails(bits, 4000), 0)
    spec = QuantSpec(bits, (), grid=quant.affine_zero)
    low, high = histogram_range(figures_of(values), mse_range, spec)
    tried = values.max() * 0.1 ** (np.arange(49) / 48)

    def cost(threshold):
        return ((oracles.affine_zero(values, 0.0, threshold, bits) - values) ** 2).mean()

    assert float(low) == 0.0
    assert cost(float(high)) <= 1.05 * min(cost(threshold) for threshold in tried)
    assert cost(float(high)) < cost(values.max())


def test_entropy_is_the_least_divergence_of_its_thresholds():
    values = np.append(np.random.default_rng(0).normal(size=4000), [30.0, -25.0])
    figures = figures_of(values.astype(np.float32))
    counts, _, exponent = oracles.histogram(values.astype(np.float32), 2048)
    places = np.unique(np.linspace(8, 1024, 12).round().astype(int))
    best = min(places, key=lambda place: oracles.divergence(counts, place, 4))
    high = float(histogram_range(figures, entropy_search_range(12), QuantSpec(4))[1])
    assert high == pytest.approx(min(best * 2.0**exponent, 30.0))
    assert high < 30


METHODS = {
    "minmax": minmax_range,
    "percentile": percentile_range(99.9),
    "mse": mse_search_range(8),
    "entropy": entropy_search_range(8),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_histograms_without_a_spread_give_the_value_itself(method):
    for values, ends in [
        (np.zeros((0,)), (0, 0)),
        (np.zeros(9), (0, 0)),
        (np.full(9, -3.5), (-3.5, -3.5)),
        (np.full(1, 2.0), (2, 2)),
    ]:
        low, high = histogram_range(figures_of(values.astype(np.float32)), method, AFFINE_ZERO)
        assert (float(low), float(high)) == ends


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_ranges_of_stacked_histograms_are_those_of_each(method):
    each = [figures_of(heavy_tails(seed, 300)) for seed in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    with jax.numpy_dtype_promotion("strict"):
        lows, _ = histogram_range(stacked, method, AFFINE_ZERO)
        alone = jnp.stack([histogram_range(figures, method, AFFINE_ZERO)[0] for figures in each])
    chex.assert_trees_all_close(lows, alone, rtol=1e-6)


def test_methods_say_what_figures_they_need():
    ends = Extremes(jnp.zeros(()), jnp.ones(()))
    assert float(histogram_range(ends, minmax_range, AFFINE_ZERO)[1]) == 1
    for method in (percentile_range(99), mse_range, entropy_range):
        with pytest.raises(TypeError, match="figures must be a Histogram"):
            histogram_range(ends, method, AFFINE_ZERO)
    with pytest.raises(TypeError, match="must have low and high"):
        histogram_range(statistics_of(np.ones((1, 1))), minmax_range, AFFINE_ZERO)
    with pytest.raises(TypeError, match="method must be a function"):
        histogram_range(ends, "mse", AFFINE_ZERO)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="spec must be a QuantSpec"):
        histogram_range(ends, minmax_range, 8)  # pyright: ignore[reportArgumentType]


# --- calibration ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stacked():
    keys = jax.random.split(jax.random.key(0), 2)
    layers = {"kernel": jax.random.normal(keys[0], (3, 4, 4)), "bias": jnp.ones((3, 4))}
    params = {"layers": layers, "head": {"kernel": jax.random.normal(keys[1], (4, 2))}}

    def layer(x, own):
        return jnp.tanh(x @ own["kernel"] + own["bias"][None, :]), None

    def apply(params, x):
        return jax.lax.scan(layer, x, params["layers"])[0] @ params["head"]["kernel"]

    return apply, params


def test_calibration_sees_the_inputs_of_every_layer(network, images):
    apply, params = network
    batches = [images, 2 * images]
    figures = calibrate(apply, params, batches)
    assert sorted(figures) == ["conv/kernel", "head/kernel", "hidden/kernel"]
    assert {path: int(each.count) for path, each in figures.items()} == {
        "conv/kernel": 64,
        "hidden/kernel": 4,
        "head/kernel": 4,
    }
    centre = np.concatenate([np.asarray(batch, np.float64).ravel() for batch in batches])
    assert float(figures["conv/kernel"].mean[4]) == pytest.approx(centre.mean(), abs=1e-6)
    assert float(figures["conv/kernel"].gram[4, 4]) == pytest.approx((centre**2).mean(), rel=1e-4)


@pytest.mark.parametrize("name", ["input_statistics", "histogram"])
def test_shards_of_calibration_merge(name, stacked):
    apply, params = stacked
    statistic = STATISTICS[name]
    batches = [jnp.asarray(heavy_tails(i, 5, 4)) for i in range(3)]
    shards = [accumulate(apply, params, part, statistic) for part in (batches[:1], batches[1:])]
    merged = finalise_states(statistic, merge_states(statistic, *shards))
    whole = calibrate(apply, params, batches, statistic)
    assert sorted(merged) == ["head/kernel", "layers/kernel"]
    chex.assert_trees_all_close(merged, whole, rtol=1e-4, atol=1e-6)


def test_batches_are_arguments_tuples_or_a_generator_of_any_sizes():
    def apply(params, x, factor):
        return (factor * x) @ params["w"]

    params = {"w": jnp.ones((2, 3))}
    rows = jnp.array([[1.0, 2.0]])
    figures = calibrate(apply, params, ((rows, factor) for factor in (1.0, 3.0)), extremes)
    assert float(figures["w"].high) == 6
    single = calibrate(dense, params, iter([rows, jnp.ones((3, 2))]), usage(16))
    assert float(single["w"].values.high) == 2 and float(single["w"].rows) == 4


def test_one_compilation_serves_all_batches_of_a_shape():
    apply = chex.assert_max_traces(dense, n=2)  # one trace for the shapes, one for the step
    figures = calibrate(apply, {"w": jnp.ones((2, 3))}, [jnp.ones((4, 2))] * 5)
    assert float(figures["w"].count) == 20


def test_a_second_look_at_a_model_compiles_nothing():
    apply = chex.assert_max_traces(dense, n=3)  # the shapes are traced again, the step is not
    first = calibrate(apply, {"w": jnp.ones((2, 3))}, [jnp.ones((4, 2))])
    second = calibrate(apply, {"w": jnp.zeros((2, 3))}, [3 * jnp.ones((4, 2))])
    np.testing.assert_allclose(second["w"].mean, 3 * first["w"].mean)


def test_a_model_need_not_be_hashable():
    class Dense:
        __hash__ = None  # pyright: ignore[reportAssignmentType]

        def __call__(self, params, x):
            return dense(params, x)

    figures = calibrate(Dense(), {"w": jnp.ones((2, 3))}, [jnp.ones((4, 2))])
    assert float(figures["w"].count) == 4


def test_fewer_rows_are_evenly_spaced_ones():
    rows = jnp.arange(10.0)[:, None]
    figures = calibrate(dense, {"w": jnp.ones((1, 1))}, [rows], together(extremes, usage()), 4)
    assert float(figures["w"][1].rows) == 4 and float(figures["w"][0].high) == 9  # 0, 3, 6, 9


def test_each_layer_of_a_scan_has_figures_and_a_range_of_its_own(stacked):
    apply, params = stacked
    x = jax.random.normal(jax.random.key(1), (6, 4))
    figures = calibrate(apply, params, [x, x])
    assert figures["layers/kernel"].gram.shape == (3, 4, 4)
    ranges = activation_ranges(apply, params, [x], AFFINE_ZERO, extremes, minmax_range)
    hidden, expected = x, []
    kernels, biases = params["layers"]["kernel"], params["layers"]["bias"]
    for kernel, bias in zip(kernels, biases, strict=True):
        expected.append(float(hidden.max()))
        hidden = jnp.tanh(hidden @ kernel + bias[None, :])
    np.testing.assert_allclose(ranges["layers/kernel"][1], expected, rtol=1e-5)
    whole = quantize_inputs(apply, AFFINE_ZERO)(params, ranges, x)
    np.testing.assert_allclose(whole, apply(params, x), atol=0.05)
    judged = activation_adequacy(apply, params, [x], ranges, AFFINE_ZERO)
    assert judged["layers/kernel"].saturation.shape == (3,)
    assert "layers/kernel" in format_adequacy(judged)


def test_groups_of_a_convolution_share_a_range_and_have_statistics_of_their_own():
    model = linen.Conv(4, (1, 1), feature_group_count=2, use_bias=False)
    x = jnp.concatenate([jnp.ones((2, 3, 3, 2)), 5 * jnp.ones((2, 3, 3, 2))], -1)
    params = model.init(jax.random.key(0), x)["params"]

    def apply(params, x):
        return jnp.asarray(model.apply({"params": params}, x))

    assert calibrate(apply, params, [x], extremes)["kernel"].high.tolist() == [1, 5]
    ranges = activation_ranges(apply, params, [x], AFFINE_ZERO, method=minmax_range)
    assert ranges["kernel"][1].shape == () and float(ranges["kernel"][1]) == 5
    quantized = quantize_inputs(apply, AFFINE_ZERO)(params, ranges, x)
    np.testing.assert_allclose(quantized, apply(params, x), rtol=1e-5)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_values_that_are_not_finite_are_refused_by_layer_and_batch(bad):
    batches = [jnp.ones((2, 1)), jnp.array([[1.0], [bad]])]
    with pytest.raises(ValueError, match="w: the inputs of this layer must be finite.*in batch 1"):
        calibrate(dense, {"w": jnp.ones((1, 1))}, batches, extremes)


def test_calibration_says_what_is_missing():
    params = {"w": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate(dense, params, [])
    with pytest.raises(ValueError, match=r"no parameter as the kernel of a layer \(w: used by mul"):
        calibrate(lambda p, x: p["w"] * x, params, [jnp.ones((2, 2))])
    with pytest.raises(TypeError, match="statistic must be a Statistic"):
        calibrate(dense, params, [jnp.ones((1, 2))], minmax_range)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="max_rows must be at least 1"):
        calibrate(dense, params, [jnp.ones((1, 2))], max_rows=0)
    with pytest.raises(ValueError, match="same layers"):
        merge_states(extremes, {"a": extremes.init(1)}, {"b": extremes.init(1)})


@pytest.mark.parametrize(
    ("shape", "value", "dtype"),
    [((3, 2), 0, "float32"), ((3, 2), 7, "bfloat16"), ((1, 2), 1, "float32")],
)
def test_constant_and_single_rows_are_calibrated_and_restored(shape, value, dtype):
    params, batch = {"w": jnp.eye(2, dtype=dtype)}, jnp.full(shape, value, dtype)
    ranges = activation_ranges(dense, params, [batch], AFFINE_ZERO)
    restored = quantize_inputs(dense, AFFINE_ZERO)(params, ranges, batch)
    assert restored.dtype == dtype
    np.testing.assert_allclose(restored.astype(jnp.float32), batch.astype(jnp.float32), rtol=0.01)


# --- quantized inputs -----------------------------------------------------------------------------


def test_inputs_are_rounded_to_the_formula(variant):
    x = jnp.asarray(heavy_tails(0, 6, 5))
    params = {"w": jax.random.normal(jax.random.key(0), (5, 3))}
    ranges = {"w": (jnp.array(-1.0), jnp.array(2.0))}
    quantized = variant(quantize_inputs(dense, AFFINE_ZERO))(params, ranges, x)
    rounded = oracles.affine_zero(x, -1.0, 2.0, 8)
    np.testing.assert_allclose(quantized, rounded @ np.asarray(params["w"], np.float64), rtol=1e-4)


def test_layers_without_a_range_are_left_alone():
    params, x = {"w": jnp.ones((2, 2))}, jnp.array([[0.123, 4.5]])
    chex.assert_trees_all_close(
        quantize_inputs(dense, AFFINE_ZERO)(params, {}, x), dense(params, x)
    )
    with pytest.raises(ValueError, match="not layers"):
        quantize_inputs(dense, AFFINE_ZERO)(params, {"v": (jnp.zeros(()), jnp.ones(()))}, x)


def test_gradients_pass_inside_the_range_only():
    params, x = {"w": jnp.ones((3, 1))}, jnp.array([[0.5, -2.0, 9.0]])
    ranges = {"w": (jnp.array(-1.0), jnp.array(2.0))}
    run = quantize_inputs(dense, AFFINE_ZERO)
    gradient = jax.grad(lambda x: run(params, ranges, x).sum())(x)
    np.testing.assert_array_equal(gradient, [[1, 0, 0]])
    by_range = jax.grad(lambda r: run(params, r, x).sum())(ranges)
    assert all(float(each) == 0 for each in by_range["w"])


def test_each_token_has_a_range_of_its_own():
    x = jnp.stack([jnp.linspace(-1, 1, 8), 100 * jnp.linspace(-1, 1, 8)])[None]
    params, spec = {"w": jnp.eye(8)}, QuantSpec(4, ())
    by_token = quantize_inputs_dynamically(dense, spec)(params, x)
    expected = [oracles.symmetric(row, np.abs(row).max(), 4) for row in np.asarray(x[0])]
    np.testing.assert_allclose(by_token[0], expected, rtol=1e-5, atol=1e-6)
    by_tensor = quantize_inputs_dynamically(dense, spec, per_tensor)(params, x)
    np.testing.assert_allclose(by_tensor[0, 0], np.zeros(8), atol=1e-6)  # lost beside the other


def test_each_image_has_a_range_of_its_own_in_a_convolution(network, images):
    apply, params = network
    run = quantize_inputs_dynamically(apply, QuantSpec(8, ()))
    together_ = run(params, images)
    alone = jnp.concatenate([run(params, image[None]) for image in images])
    np.testing.assert_allclose(together_, alone, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(together_, apply(params, images), atol=0.05)


def test_a_range_given_by_feature_is_used_by_feature():
    values = jnp.array([[0.3, 30.0], [9.0, 90.0]])
    ends = jnp.zeros((1, 2)), jnp.array([[1.0, 100.0]])
    with jax.numpy_dtype_promotion("strict"):
        got = fake_quantize_within(values, *ends, QuantSpec(2, (), grid=quant.affine_zero))
    np.testing.assert_allclose(got, [[1 / 3, 100 / 3], [1.0, 100.0]], rtol=1e-6)
    with pytest.raises(ValueError, match=r"low of shape \(2,\) must be a scalar"):
        fake_quantize_within(values, jnp.zeros(2), jnp.ones(2), AFFINE_ZERO)
    with pytest.raises(TypeError, match="floating-point, not int32"):
        fake_quantize_within(jnp.ones(2, int), 0.0, 1.0, AFFINE_ZERO)  # pyright: ignore


def test_inputs_have_no_blocks():
    for function in (quantize_inputs, quantize_inputs_dynamically):
        with pytest.raises(ValueError, match=r"block must be \(\) for the inputs"):
            function(dense, QuantSpec(8))
        with pytest.raises(TypeError, match="spec must be a QuantSpec"):
            function(dense, 8)  # pyright: ignore[reportArgumentType]


# --- adequacy -------------------------------------------------------------------------------------


def judged_of(batches, low, high, spec=AFFINE_ZERO):
    figures = usage().finalise(gathered(usage(), [jnp.asarray(b, jnp.float32) for b in batches]))
    return adequacy(figures, jnp.asarray(low), jnp.asarray(high), spec)


def test_adequacy_counts_what_the_data_show():
    batches = [heavy_tails(i, 50, 4) * np.array([1, 1, 0, 1]) for i in range(6)]
    every = np.concatenate(batches).astype(np.float32)
    judged = judged_of(batches, -2.0, 2.0)
    assert (float(judged.rows), float(judged.features), float(judged.active)) == (300, 4, 0.75)
    assert float(judged.saturation) == pytest.approx((np.abs(every) > 2).mean(), abs=0.002)
    used = np.unique(oracles.affine_zero(every, -2.0, 2.0, 8)).size / 256
    assert float(judged.codes) == pytest.approx(used, abs=0.05)
    spread, drift = oracles.spread_and_drift([b.max() - b.min() for b in batches])
    assert float(judged.spread) == pytest.approx(spread, rel=1e-4)
    assert float(judged.drift) == pytest.approx(drift, rel=1e-4)


@pytest.mark.parametrize("low", [-0.25, 1.0])
def test_a_range_that_holds_all_values_is_not_saturated(low):
    values = np.linspace(max(low, 0.0) if low > 0 else low, 3.0, 1000)[:, None]
    assert float(judged_of([values], low, 3.0).saturation) == 0


def test_advice_names_the_numbers_and_the_remedy():
    rng = np.random.default_rng(0)
    few = judged_of([rng.normal(size=(6, 512)), rng.normal(size=(6, 512))], -5.0, 5.0)
    assert "12 rows for 512 features: use more batches." in advice(few)
    good = [rng.uniform(-1, 1, size=(400, 4)) for _ in range(4)]
    assert advice(judged_of(good, -1.0, 1.0)) == []
    assert any("outside the range" in line for line in advice(judged_of(good, -0.5, 0.5)))
    assert any("of the codes are used" in line for line in advice(judged_of(good, -90.0, 90.0)))
    assert any("one batch" in line for line in advice(judged_of(good[:1], -1.0, 1.0)))
    growing = [batch * 2**i for i, batch in enumerate(good)]
    said = advice(judged_of(growing, -8.0, 8.0))
    assert any("shuffle" in line for line in said) and any("differ by" in line for line in said)
    dead = [np.concatenate([batch, 0 * batch], 1) for batch in good]
    assert "4 of 8 features are always 0" in " ".join(advice(judged_of(dead, -1.0, 1.0)))


def test_adequacy_of_held_out_data_shows_what_calibration_missed():
    params, rows = {"w": jnp.ones((2, 2)), "v": jnp.ones((2, 2))}, jnp.asarray(heavy_tails(0, 9, 2))

    def apply(params, x):
        return dense(params, x) @ params["v"]

    ranges = activation_ranges(apply, params, [rows], AFFINE_ZERO, method=minmax_range)
    seen = activation_adequacy(apply, params, [rows], ranges, AFFINE_ZERO)
    held_out = activation_adequacy(apply, params, [3 * rows, rows], ranges, AFFINE_ZERO)
    assert float(seen["w"].saturation) == 0 < float(held_out["w"].saturation)
    report = format_adequacy(held_out)
    assert "v: " in report and "w: " in report and "layer" in report.splitlines()[0]
    with pytest.raises(ValueError, match="not layers"):
        activation_adequacy(apply, params, [rows], {"nothing": ranges["w"]}, AFFINE_ZERO)
    with pytest.raises(TypeError, match="must be a Usage"):
        adequacy(1, jnp.zeros(()), jnp.ones(()), AFFINE_ZERO)  # pyright: ignore[reportArgumentType]


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: percentile(0), "percent must be above 0"),
        (lambda: percentile_range(101), "percent must be above 0"),
        (lambda: mse_search(0), "candidates must be a whole number"),
        (lambda: mse_search(4, 1.5), "smallest must lie between 0 and 1"),
        (lambda: mse_search(power=-1.0), "power must be positive"),
        (lambda: entropy(9), "bits must be a whole number"),
        (lambda: entropy(8, 100), "bins must be a power of two"),
        (lambda: entropy(8, candidates=0), "candidates must be a whole number"),
        (lambda: entropy_search_range(0), "candidates must be a whole number"),
        (lambda: histogram(8), "bins must be a power of two of at least 16, not 8"),
        (lambda: moving_average(1.0), "momentum must lie between 0 and 1, not 1.0"),
    ],
)
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_statistic_of_ones_own_is_gathered():
    count = Statistic(
        lambda features: jnp.zeros((), jnp.int32),
        lambda state, rows: state + rows.shape[0],
        lambda first, second: first + second,
        lambda state: state,
    )
    assert int(calibrate(dense, {"w": jnp.ones((1, 1))}, [jnp.ones((3, 1))] * 2, count)["w"]) == 6
