import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jopt
from jopt import quant
from jopt._leaves import CodebookTensor
from jopt.layers._statistics import InputStatistics, input_statistics
from jopt.quant import QuantSpec
from jopt.quant._codebook import nf4
from jopt.quant._floats import nvfp4
from jopt.quant._gptq import as_stored, by_importance, gptq
from jopt.quant._tables import encode_nearest
from tests import oracles_gptq as oracles

affine = {"range": quant.minmax, "grid": quant.affine}


def statistics_of(rows):
    rows = jnp.asarray(rows, jnp.float32)
    state = input_statistics.update(input_statistics.init(rows.shape[1]), rows)
    return input_statistics.finalise(state)


def mixed(seed, features, rows=None):
    """Draw inputs that a few hidden causes explain, so that they are correlated."""
    rng = np.random.default_rng(seed)
    causes = rng.normal(size=(rows or 4 * features, max(features // 3, 1)))
    mixing = rng.normal(size=(causes.shape[1], features))
    return causes @ mixing + 0.3 * rng.normal(size=(len(causes), features))


def kernel_of(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def levels_of(leaf, bits):
    """Return every level of each element, (inputs, outputs, levels)."""
    low, high = (-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1)
    if leaf.zero_point is not None:
        low, high = 0, 2**bits - 1
    return jnp.stack(
        [
            jopt.materialize(leaf.replace(codes=jnp.full(leaf.codes.shape, code, jnp.int32)))
            for code in range(low, high + 1)
        ],
        axis=-1,
    )


@pytest.mark.parametrize(
    ("spec", "order"),
    [
        (QuantSpec(4, (1,)), by_importance),
        (QuantSpec(3, (), **affine), as_stored),
        (QuantSpec(2, (5, 1), **affine), by_importance),
        (QuantSpec(3, (10, 4)), as_stored),
    ],
)
def test_gptq_is_the_algorithm_of_the_paper(spec, order):
    weights, statistics = kernel_of(0, (40, 12)), statistics_of(mixed(1, 40))
    leaf, outcome = gptq(weights, statistics, spec, 0.02, order)
    nearest = quant.quantize(weights, spec)
    chex.assert_trees_all_equal(leaf.replace(codes=None), nearest.replace(codes=None))
    diagonal = np.diagonal(statistics.gram)
    places = np.argsort(-diagonal, kind="stable") if order is by_importance else np.arange(40)
    expected = oracles.gptq(
        weights,
        statistics.gram,
        oracles.nearest_of(levels_of(nearest, spec.bits)),
        0.02,
        places,
    )
    np.testing.assert_allclose(jopt.materialize(leaf), expected, atol=1e-5)
    assert bool(outcome.improved)
    np.testing.assert_allclose(
        outcome.error, oracles.output_error(weights, expected, statistics.gram), rtol=1e-3
    )
    np.testing.assert_allclose(
        outcome.baseline,
        oracles.output_error(weights, jopt.materialize(nearest), statistics.gram),
        rtol=1e-3,
    )


def test_rows_of_several_panels_give_the_codes_of_the_paper():
    spec = QuantSpec(4, (67, 1))
    weights, statistics = kernel_of(2, (67 * 8, 3)), statistics_of(mixed(3, 67 * 8))
    leaf, _ = gptq(weights, statistics, spec, 0.05, as_stored)
    table = levels_of(quant.quantize(weights, spec), 4)
    expected = oracles.gptq(
        weights, statistics.gram, oracles.nearest_of(table), 0.05, np.arange(67 * 8)
    )
    assert (np.abs(jopt.materialize(leaf) - expected) > 1e-5).mean() < 0.01  # ties in float32
    mine = oracles.output_error(weights, jopt.materialize(leaf), statistics.gram)
    theirs = oracles.output_error(weights, expected, statistics.gram)
    assert mine == pytest.approx(theirs, rel=5e-3)


def squares_between(values, low, high, bits):
    shares = jnp.square(jnp.linspace(0.0, 1.0, 2**bits))
    width = (high - low)[..., None]
    return CodebookTensor(None, low[..., None] + width * shares.reshape((1,) * values.ndim + (-1,)))  # pyright: ignore[reportArgumentType]


squares = quant.Grid(
    squares_between, encode_nearest, lambda *args: (encode_nearest(*args), encode_nearest(*args))
)

FORMATS = {
    "one_bit": QuantSpec(1, (8, 1)),
    "own_table_for_each_output": QuantSpec(2, (1,), quant.minmax, squares),
    "nvfp4": QuantSpec(4, (8, 1), grid=nvfp4),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_number_format_gains_and_keeps_its_levels(name):
    spec = FORMATS[name]
    weights, statistics = kernel_of(4, (32, 6)), statistics_of(mixed(5, 32))
    with jax.numpy_dtype_promotion("strict"):
        leaf, outcome = gptq(weights, statistics, spec)
    nearest = quant.quantize(weights, spec)
    chex.assert_trees_all_equal_shapes_and_dtypes(leaf, nearest)
    chex.assert_trees_all_equal(leaf.replace(codes=None), nearest.replace(codes=None))
    assert bool(outcome.improved) and outcome.error < 0.95 * outcome.baseline
    np.testing.assert_allclose(
        outcome.error,
        oracles.output_error(weights, jopt.materialize(leaf), statistics.gram),
        rtol=1e-3,
    )


@pytest.mark.parametrize(
    ("shape", "block"),
    [((3, 3, 2, 6), (2, 1)), ((18, 2, 3), (1, 1))],
)
def test_a_kernel_of_many_axes_is_its_matrix(shape, block):
    weights, statistics = kernel_of(6, (18, 6)), statistics_of(mixed(7, 18))
    spec = QuantSpec(3, block)
    leaf, outcome = gptq(weights.reshape(shape), statistics, spec)
    nearest = quant.quantize(weights.reshape(shape), spec)
    table = levels_of(nearest, 3).reshape(18, 6, -1)
    order = np.argsort(-np.diagonal(statistics.gram), kind="stable")
    expected = oracles.gptq(weights, statistics.gram, oracles.nearest_of(table), 0.01, order)
    np.testing.assert_allclose(jopt.materialize(leaf).reshape(18, 6), expected, atol=1e-5)
    assert bool(outcome.improved)


def test_groups_have_inputs_of_their_own():
    weights = kernel_of(8, (3, 3, 2, 8))
    parts = [statistics_of(mixed(seed, 18)) for seed in (9, 10)]
    statistics = jax.tree.map(lambda *fields: jnp.stack(fields), *parts)
    spec = QuantSpec(3, (1, 2))
    leaf, outcome = gptq(weights, statistics, spec)
    assert bool(outcome.improved)
    table = levels_of(quant.quantize(weights, spec), 3).reshape(18, 8, -1)
    total = 0.0
    for group, part in enumerate(parts):
        columns = slice(4 * group, 4 * group + 4)
        matrix = weights.reshape(18, 8)[:, columns]
        order = np.argsort(-np.diagonal(part.gram), kind="stable")
        expected = oracles.gptq(
            matrix, part.gram, oracles.nearest_of(table[:, columns]), 0.01, order
        )
        found = jopt.materialize(leaf).reshape(18, 8)[:, columns]
        np.testing.assert_allclose(found, expected, atol=1e-5)
        total += oracles.output_error(matrix, found, part.gram)
    np.testing.assert_allclose(outcome.error, total, rtol=1e-3)


def test_a_depthwise_kernel_has_one_column_a_group():
    weights = kernel_of(11, (3, 3, 1, 5))
    parts = [statistics_of(mixed(seed, 9)) for seed in range(5)]
    statistics = jax.tree.map(lambda *fields: jnp.stack(fields), *parts)
    leaf, outcome = gptq(weights, statistics, QuantSpec(2, (1,)), 0.01, as_stored)
    table = levels_of(quant.quantize(weights, QuantSpec(2, (1,))), 2).reshape(9, 5, -1)
    for column, part in enumerate(parts):
        where = slice(column, column + 1)
        round_row = oracles.nearest_of(table[:, where])
        matrix = weights.reshape(9, 5)[:, where]
        expected = oracles.gptq(matrix, part.gram, round_row, 0.01, np.arange(9))
        found = jopt.materialize(leaf).reshape(9, 5)[:, where]
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert bool(outcome.improved)


def test_stacked_layers_are_mapped_over_and_jit_changes_nothing():
    kernels = kernel_of(12, (3, 20, 6))
    parts = [statistics_of(mixed(seed, 20)) for seed in range(3)]
    stacked = jax.tree.map(lambda *fields: jnp.stack(fields), *parts)
    spec = QuantSpec(3, (10, 1))
    together, outcomes = jax.vmap(lambda w, s: gptq(w, s, spec))(kernels, stacked)
    for index, part in enumerate(parts):
        leaf, outcome = jax.jit(lambda w, s: gptq(w, s, spec))(kernels[index], part)
        got = jax.tree.map(lambda field, i=index: field[i], together)
        chex.assert_trees_all_close(jopt.materialize(got), jopt.materialize(leaf), atol=1e-6)
        np.testing.assert_allclose(outcomes.error[index], outcome.error, rtol=1e-4)


def test_inputs_without_correlation_leave_nothing_to_gain():
    weights, spec = kernel_of(13, (40, 12)), QuantSpec(4)
    ones = jnp.ones(40)
    statistics = InputStatistics(jnp.ones(()), ones, ones, ones, jnp.eye(40))
    leaf, outcome = gptq(weights, statistics, spec)
    chex.assert_trees_all_equal(leaf, quant.quantize(weights, spec))
    assert not bool(outcome.improved) and outcome.error == outcome.baseline


def test_dead_inputs_are_rounded_to_nearest():
    rows = mixed(14, 40)
    rows[:, [3, 17]] = 0
    weights, statistics, spec = kernel_of(15, (40, 12)), statistics_of(rows), QuantSpec(4)
    for damping in (0.0, 0.01):
        leaf, outcome = gptq(weights, statistics, spec, damping)
        assert bool(outcome.improved)
        nearest = jopt.materialize(quant.quantize(weights, spec))
        restored = jopt.materialize(leaf)
        np.testing.assert_array_equal(restored[jnp.array([3, 17])], nearest[jnp.array([3, 17])])


@pytest.mark.parametrize("fill", [0.0, jnp.nan])
def test_statistics_that_say_nothing_give_round_to_nearest(fill):
    weights, spec = kernel_of(16, (40, 12)), QuantSpec(4)
    flat = jnp.full(40, fill)
    statistics = InputStatistics(jnp.ones(()), flat, flat, flat, jnp.full((40, 40), fill))
    leaf, outcome = gptq(weights, statistics, spec)
    chex.assert_trees_all_equal(leaf, quant.quantize(weights, spec))
    assert not bool(outcome.improved)


def test_a_singular_gram_without_damping_is_refused_by_its_outcome():
    weights, spec = kernel_of(17, (40, 12)), QuantSpec(4)
    statistics = statistics_of(np.ones((4, 40)))
    leaf, outcome = gptq(weights, statistics, spec, 0.0)
    assert bool(jnp.isfinite(jopt.materialize(leaf)).all())
    assert outcome.error <= outcome.baseline


def test_narrow_weights_keep_their_dtype():
    weights = kernel_of(18, (32, 6)).astype(jnp.bfloat16)
    spec = QuantSpec(4, (8, 1), grid=nf4)
    with jax.numpy_dtype_promotion("strict"):
        leaf, outcome = gptq(weights, statistics_of(mixed(19, 32)), spec)
    chex.assert_trees_all_equal_shapes_and_dtypes(leaf, quant.quantize(weights, spec))
    assert jopt.materialize(leaf).dtype == jnp.bfloat16
    assert bool(outcome.improved)


@pytest.mark.parametrize("shape", [(1, 5), (9, 1)])
def test_one_input_or_one_output_is_enough(shape):
    weights, statistics = kernel_of(20, shape), statistics_of(mixed(21, shape[0], 16))
    leaf, outcome = gptq(weights, statistics, QuantSpec(3, ()))
    assert leaf.shape == shape and outcome.error <= outcome.baseline


def test_errors_say_what_does_not_fit():
    statistics = statistics_of(mixed(22, 6))
    with pytest.raises(ValueError, match=r"6 features fit no leading axes of weights .*\(4, 6\)"):
        gptq(jnp.ones((4, 6)), statistics, QuantSpec())
    with pytest.raises(ValueError, match=r"block \(4, 1\) does not divide"):
        gptq(jnp.ones((6, 2)), statistics, QuantSpec(block=(4, 1)))
    with pytest.raises(TypeError, match="floating-point, not int32"):
        gptq(jnp.ones((6, 2), int), statistics, QuantSpec())
    with pytest.raises(ValueError, match="groups do not divide"):
        stacked = jax.tree.map(lambda field: jnp.stack([field] * 4), statistics)
        gptq(jnp.ones((6, 2)), stacked, QuantSpec())
