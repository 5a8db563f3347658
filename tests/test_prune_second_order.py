"""SparseGPT, exact OBC and least squares against the papers in float64, and over whole trees."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jopt
from jopt import layers, prune, quant
from jopt.layers._outcome import output_error
from jopt.layers._statistics import InputStatistics
from jopt.quant import QuantSpec
from tests import oracles_obs as oracles
from tests import trained
from tests.oracles_gptq import output_error as error_in_float64


def correlated(seed, features, causes=None):
    """Return statistics of inputs that fewer hidden causes explain."""
    rng = np.random.default_rng(seed)
    causes = causes or max(features // 2, 1)
    rows = rng.normal(size=(6 * features, causes)) @ rng.normal(size=(causes, features))
    return of_rows(rows + 0.3 * rng.normal(size=rows.shape))


def of_rows(rows):
    gram = jnp.asarray(rows.T @ rows / len(rows), jnp.float32)
    flat = jnp.ones(len(gram))
    return InputStatistics(jnp.ones(()), flat, flat, flat, gram)


def kernel_of(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def is_pattern(mask, n, m):
    inputs = mask.shape[0]
    return bool((mask.reshape(inputs // m, m, -1).sum(1) == n).all())


# --- SparseGPT ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "sparsity", "block"),
    [(40, 0.5, 16), (40, 0.6, 16), (40, (2, 4), 128), (540, (5, 9), 128)],
)
def test_sparse_gpt_is_the_algorithm_of_the_paper(features, sparsity, block):
    weights, statistics = kernel_of(0, (features, 6)), correlated(1, features)
    with jax.numpy_dtype_promotion("strict"):
        pruned, mask, outcome = prune.sparse_gpt(weights, statistics, sparsity, 0.02, block)
    lazy = block // sparsity[1] * sparsity[1] if isinstance(sparsity, tuple) else block
    expected, kept = oracles.sparse_gpt(weights, statistics.gram, sparsity, 0.02, lazy)
    np.testing.assert_array_equal(mask, kept)
    np.testing.assert_allclose(pruned, expected, atol=1e-3)
    assert bool(outcome.improved) and outcome.error < outcome.baseline
    np.testing.assert_allclose(
        outcome.error, error_in_float64(weights, pruned, statistics.gram), rtol=1e-3
    )
    if isinstance(sparsity, tuple):
        assert is_pattern(mask, *sparsity)
    else:
        assert int((~mask).sum()) == round(weights.size * sparsity)
    by_size = jnp.where(
        prune.n_m_mask(jnp.abs(weights), *sparsity)
        if isinstance(sparsity, tuple)
        else prune.topk_masks(jnp.abs(weights), sparsity),
        weights,
        0.0,
    )
    np.testing.assert_allclose(
        outcome.baseline, error_in_float64(weights, by_size, statistics.gram), rtol=1e-3
    )


JOINT = {
    "symmetric": (QuantSpec(4), 0.5),
    "groups_affine": (QuantSpec(3, (10, 1), quant.minmax, quant.affine_zero), (2, 4)),
}


@pytest.mark.parametrize("name", JOINT)
def test_weights_are_pruned_and_quantized_in_one_pass(name):
    spec, sparsity = JOINT[name]
    weights, statistics = kernel_of(12, (40, 6)), correlated(13, 40)
    only_pruned = prune.sparse_gpt(weights, statistics, sparsity, 0.01, 16)[0]
    round_row = quant.row_rounding(only_pruned, statistics, spec)
    pruned, mask, outcome = prune.sparse_gpt(
        weights, statistics, sparsity, 0.01, 16, round_row=round_row
    )
    by_row = lambda row, values: np.asarray(  # noqa: E731
        round_row(jnp.int32(row), jnp.asarray(values, jnp.float32)), np.float64
    )
    expected, kept = oracles.sparse_gpt(weights, statistics.gram, sparsity, 0.01, 16, by_row)
    np.testing.assert_array_equal(mask, kept)
    np.testing.assert_allclose(pruned, expected, atol=1e-5)
    assert not pruned[~mask].any()
    leaf = quant.encode(pruned, quant.fit_levels(only_pruned, spec), spec)
    np.testing.assert_array_equal(jopt.materialize(leaf), pruned)
    assert bool(outcome.improved)
    afterwards = output_error(weights, quant.quantize(only_pruned, spec), statistics)
    assert outcome.error < 0.95 * afterwards


def test_quantizing_the_joint_result_again_keeps_its_codes():
    weights, statistics, spec = kernel_of(2, (40, 6)), correlated(3, 40), QuantSpec(4)
    round_row = quant.row_rounding(weights, statistics, spec)
    pruned, _, _ = prune.sparse_gpt(weights, statistics, 0.5, 0.01, 16, round_row=round_row)
    first = quant.encode(pruned, quant.fit_levels(weights, spec), spec)
    again = quant.quantize(pruned, spec)
    whole = jnp.abs(first.codes.astype(jnp.int8)).max(0) == 7  # columns that reach the last level
    assert int(whole.sum()) >= 3
    np.testing.assert_array_equal(
        again.codes.astype(jnp.int8)[:, whole], first.codes.astype(jnp.int8)[:, whole]
    )
    np.testing.assert_allclose(jopt.materialize(again)[:, whole], pruned[:, whole], rtol=1e-6)


def test_rounding_compiles_once_for_many_kernels():
    spec, statistics = QuantSpec(4), correlated(4, 12)
    traced = jax.jit(chex.assert_max_traces(1)(lambda round_row: round_row(0, jnp.ones(3))))
    for seed in range(3):
        traced(quant.row_rounding(kernel_of(seed, (12, 3)), statistics, spec))


@pytest.mark.parametrize("joint", [False, True])
def test_groups_have_inputs_of_their_own_and_share_the_count(joint):
    weights, spec = kernel_of(5, (3, 3, 2, 6)), QuantSpec(4)
    parts = [correlated(seed, 18) for seed in range(3)]
    statistics = jax.tree.map(lambda *fields: jnp.stack(fields), *parts)
    round_row = quant.row_rounding(weights, statistics, spec) if joint else None
    pruned, mask, outcome = prune.sparse_gpt(weights, statistics, 0.3, 0.01, 8, round_row)
    assert int((~mask).sum()) == round(weights.size * 0.3) and bool(outcome.improved)
    for group, part in enumerate(parts):
        columns = slice(2 * group, 2 * group + 2)
        matrix = weights.reshape(18, 6)[:, columns]
        own = jax.tree.map(lambda field, g=group: field[g], round_row)
        by_row = joint and (lambda row, values, own=own: np.asarray(own(row, jnp.array(values))))
        expected, kept = oracles.sparse_gpt(
            matrix, part.gram, 0.3, 0.01, 8, by_row or None, offset=36 * group
        )
        np.testing.assert_array_equal(mask.reshape(18, 6)[:, columns], kept)
        np.testing.assert_allclose(pruned.reshape(18, 6)[:, columns], expected, atol=1e-4)


def test_dead_inputs_go_first_and_keep_their_values_where_they_need_not():
    rows = np.random.default_rng(6).normal(size=(200, 40))
    rows[:, [3, 17]] = 0
    weights, statistics = kernel_of(7, (40, 6)), of_rows(rows)
    others = np.delete(np.arange(40), [3, 17])
    for damping in (0.0, 0.01):
        pruned, mask, _ = prune.sparse_gpt(weights, statistics, 0.15, damping, 16)
        assert not mask[jnp.array([3, 17])].any()  # 3 is in the first block of 16, 17 the second
        pruned, mask, _ = prune.sparse_gpt(weights, statistics, 1 / 60, damping, 16)
        assert int((~mask).sum()) == 4 and int((~mask[jnp.array([3, 17])]).sum()) == 3
        pruned, mask, _ = prune.sparse_gpt(weights, statistics, 1 / 120, damping, 40)
        assert int((~mask).sum()) == 2 and bool(mask[others].all())
        np.testing.assert_array_equal(pruned[mask], weights[mask])  # nothing to make up for


@pytest.mark.parametrize("method", [partial(prune.sparse_gpt, block=16), prune.obc])
def test_extremes_narrow_dtypes_and_statistics_that_say_nothing(method):
    weights, statistics = kernel_of(8, (40, 6)), correlated(9, 40)
    pruned, mask, outcome = method(weights, statistics, 0.0)
    assert bool(mask.all()) and outcome.error == 0
    np.testing.assert_array_equal(pruned, weights)
    for level in (1.0, jnp.float32(0.999)):
        with pytest.raises(ValueError, match="keeps 0 of 240, fewer than 1"):
            method(weights, statistics, level)
    _, mask, _ = jax.jit(lambda level: method(weights, statistics, level))(jnp.float32(1.0))
    assert mask.sum() == 1
    unknown = statistics._replace(gram=jnp.full((40, 40), jnp.nan))
    pruned, mask, outcome = method(weights, unknown, 0.5)
    np.testing.assert_array_equal(mask, prune.topk_masks(jnp.abs(weights), 0.5))
    assert not bool(outcome.improved)
    np.testing.assert_array_equal(pruned, jnp.where(mask, weights, 0))
    narrow, mask, outcome = method(weights.astype(jnp.bfloat16), statistics, (2, 4))
    assert narrow.dtype == jnp.bfloat16 and bool(outcome.improved) and is_pattern(mask, 2, 4)
    pruned, mask, outcome = method(weights, statistics, jnp.float32(0.5))
    assert int(mask.sum()) == 120 and bool(outcome.improved)
    dense, mask, _ = method(weights, statistics, (4, 4))
    assert bool(mask.all())
    np.testing.assert_array_equal(dense, weights)


@pytest.mark.parametrize("method", [prune.sparse_gpt, prune.obc])
def test_methods_refuse_what_does_not_fit(method):
    weights, statistics = jnp.ones((6, 2)), correlated(10, 6)
    with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\], not 1.5"):
        method(weights, statistics, 1.5)
    with pytest.raises(ValueError, match=r"m = 4 does not divide the inputs, axis 0 of .*\(6, 2\)"):
        method(weights, statistics, (2, 4))
    with pytest.raises(ValueError, match="n must lie in 0 to m = 3, not 4"):
        method(weights, statistics, (4, 3))
    with pytest.raises(ValueError, match="two numbers"):
        method(weights, statistics, (1, 2, 3))
    with pytest.raises(ValueError, match="6 features fit no leading axes"):
        method(jnp.ones((4, 6)), statistics, 0.5)
    with pytest.raises(TypeError, match="floating-point, not int32"):
        method(jnp.ones((6, 2), int), statistics, 0.5)


def test_sparse_gpt_refuses_a_block_of_no_inputs():
    with pytest.raises(ValueError, match="block must be at least 1, not 0"):
        prune.sparse_gpt(jnp.ones((6, 2)), correlated(10, 6), 0.5, block=0)


# --- exact OBC ------------------------------------------------------------------------------------


def masks_in_float64(weights, gram, sparsity):
    """Run the paper's algorithms 1 and 2."""
    features, outputs = weights.shape
    pattern = sparsity if isinstance(sparsity, tuple) else None
    steps = features if pattern is None else features - features // pattern[1] * pattern[0]
    traces = [oracles.exact_obs(weights[:, i], gram, steps, pattern) for i in range(outputs)]
    counts = [steps] * outputs
    if pattern is None:
        losses = [each for _, each in traces]
        counts = oracles.by_queue(losses, round(weights.size * sparsity))
    kept = np.ones(weights.shape, bool)
    for output, (order, _) in enumerate(traces):
        kept[order[: counts[output]], output] = False
    return kept


@pytest.mark.parametrize(("features", "sparsity"), [(40, 0.5), (40, 0.9), (40, (2, 4))])
def test_obc_is_the_algorithm_of_the_paper_and_beats_sparse_gpt(features, sparsity):
    weights, statistics = kernel_of(11, (features, 6)), correlated(12, features)
    with jax.numpy_dtype_promotion("strict"):
        pruned, mask, outcome = prune.obc(weights, statistics, sparsity)
    gram = oracles.damped(statistics.gram, 0.01)
    kept = masks_in_float64(weights, gram, sparsity)
    np.testing.assert_array_equal(mask, kept)
    for output in range(6):
        expected = oracles.least_squares(weights[:, output], kept[:, output], gram)
        np.testing.assert_allclose(pruned[:, output], expected, atol=1e-4)
    one_pass = prune.sparse_gpt(weights, statistics, sparsity)[2]
    assert outcome.error < 0.9 * one_pass.error and outcome.baseline == one_pass.baseline


def test_every_single_removal_is_the_best_of_all():
    weights, statistics = kernel_of(13, (8, 3)), correlated(14, 8)
    left = np.ones(8, bool), np.ones(8, bool), np.ones(8, bool)
    for step in range(1, 8):
        pruned, mask, _ = prune.obc(weights, statistics, step / 8, 0.0, prune.removed_evenly)
        for output in range(3):
            column = weights[:, output]
            error, at = oracles.best_single_removal(column, statistics.gram, left[output])
            left[output][at] = False
            np.testing.assert_array_equal(mask[:, output], left[output])
            mine = oracles.error_of(column, np.asarray(pruned[:, output], float), statistics.gram)
            assert mine == pytest.approx(error, rel=1e-3, abs=1e-6)


def test_greedy_removals_come_close_to_the_best_subset():
    weights, statistics = kernel_of(15, (8, 3)), correlated(16, 8)
    pruned, _, _ = prune.obc(weights, statistics, 3 / 8, 0.0, prune.removed_evenly)
    for output in range(3):
        column = weights[:, output]
        best = oracles.best_subset(column, statistics.gram, 5)
        mine = oracles.error_of(column, np.asarray(pruned[:, output], float), statistics.gram)
        assert best * 0.999 <= mine <= 2 * best


def test_many_features_and_no_damping_stay_close_to_float64():
    weights, statistics = kernel_of(17, (500, 2)), correlated(18, 500)
    for damping in (0.0, 0.01):
        pruned, mask, _ = prune.obc(weights, statistics, 0.7, damping)
        gram = oracles.damped(statistics.gram, damping)
        kept = masks_in_float64(weights, gram, 0.7)
        exact = np.stack(
            [oracles.least_squares(weights[:, i], kept[:, i], gram) for i in range(2)], axis=1
        )
        mine, best = (error_in_float64(weights, each, gram) for each in (pruned, exact))
        assert mine < 1.02 * best
        if damping:
            assert (np.asarray(mask) != kept).mean() < 0.01


def test_removals_are_shared_as_asked():
    losses = np.abs(np.random.default_rng(19).normal(size=(5, 12)))
    for count in (0, 7, 33, 60):
        shared = prune.removed_by_loss(jnp.asarray(losses, jnp.float32), jnp.int32(count))
        np.testing.assert_array_equal(shared, oracles.by_queue(list(losses), count))
        even = prune.removed_evenly(jnp.asarray(losses), count)
        assert int(even.sum()) == count and int(even.max() - even.min()) <= 1


def test_outputs_in_several_rounds_are_the_same(monkeypatch):
    monkeypatch.setattr("jopt.prune._reconstruct._ELEMENTS", 3 * 12 * 12)  # three at a time
    weights, statistics = kernel_of(20, (12, 7)), correlated(21, 12)
    pruned, mask, _ = prune.obc(weights, statistics, 0.5)
    gram = oracles.damped(statistics.gram, 0.01)
    np.testing.assert_array_equal(mask, masks_in_float64(weights, gram, 0.5))
    for output in range(7):
        expected = oracles.least_squares(weights[:, output], np.asarray(mask)[:, output], gram)
        np.testing.assert_allclose(pruned[:, output], expected, atol=1e-4)


# --- least squares --------------------------------------------------------------------------------


def test_reconstruct_solves_the_weights_of_any_mask(variant):
    weights, statistics = kernel_of(22, (3, 2, 5, 4)), correlated(23, 30)
    mask = jnp.asarray(np.random.default_rng(24).random((3, 2, 5, 4)) < 0.5)
    with jax.numpy_dtype_promotion("strict"):
        solved, outcome = variant(prune.reconstruct)(weights, mask, statistics)
    gram = oracles.damped(statistics.gram, 0.01)
    for output in range(4):
        column, kept = (np.asarray(a).reshape(30, 4)[:, output] for a in (weights, mask))
        expected = oracles.least_squares(column, kept, gram)
        np.testing.assert_allclose(solved.reshape(30, 4)[:, output], expected, atol=1e-4)
    masked = jnp.where(mask, weights, 0)
    np.testing.assert_allclose(outcome.baseline, output_error(weights, masked, statistics))
    assert bool(outcome.improved)
    channels = mask[:, :, :1, :1]
    by_channel, _ = prune.reconstruct(weights, channels, statistics)
    assert not by_channel[~jnp.broadcast_to(channels, weights.shape)].any()


def test_reconstruct_is_least_squares_on_the_rows_themselves():
    rows = np.random.default_rng(25).normal(size=(50, 10))
    weights, mask = kernel_of(26, (10, 1)), jnp.arange(10)[:, None] % 3 > 0
    solved, _ = prune.reconstruct(weights, mask, of_rows(rows), 0.0)
    kept = np.asarray(mask)[:, 0]
    expected = np.linalg.lstsq(rows[:, kept], rows @ np.asarray(weights, float))[0]
    np.testing.assert_allclose(solved[kept], expected, rtol=1e-3)


def test_reconstruct_never_loses_and_refuses_what_does_not_fit():
    weights, statistics = kernel_of(27, (6, 2)), correlated(28, 6)
    same, outcome = prune.reconstruct(weights, True, statistics)
    np.testing.assert_array_equal(same, weights)
    assert outcome.error == 0
    unknown = statistics._replace(gram=jnp.full((6, 6), jnp.nan))
    mask = jnp.arange(12).reshape(6, 2) > 4
    kept, outcome = prune.reconstruct(weights, mask, unknown)
    np.testing.assert_array_equal(kept, jnp.where(mask, weights, 0))
    assert not bool(outcome.improved)
    with pytest.raises(TypeError, match="mask must be boolean, not float32"):
        prune.reconstruct(weights, weights, statistics)
    with pytest.raises(ValueError, match=r"mask of shape \(5, 2\) does not broadcast to \(6, 2\)"):
        prune.reconstruct(weights, jnp.ones((5, 2), bool), statistics)
    with pytest.raises(TypeError, match="floating-point, not int32"):
        prune.reconstruct(jnp.ones((6, 2), int), True, statistics)


# --- trees ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [prune.sparse_gpt, prune.obc])
def test_trees_of_any_kind_are_pruned_and_solved(method, network, images):
    apply, params = network
    data = jnp.concatenate([images + 0.1 * shift for shift in range(16)])
    statistics = layers.calibrate(apply, params, [data])
    before = jax.tree.map(jnp.copy, params)
    where = ".*/kernel" if method is prune.sparse_gpt else "head/kernel"
    pruned, masks, report = prune.prune_calibrated_params(params, statistics, 0.5, method, where)
    chex.assert_trees_all_equal(params, before)
    chex.assert_trees_all_equal_structs(pruned, params, masks)
    wanted = {"conv/kernel", "hidden/kernel", "head/kernel"}
    assert set(report) == (wanted if method is prune.sparse_gpt else {"head/kernel"})
    chex.assert_trees_all_equal(prune.apply_masks(pruned, masks), pruned)
    outcomes = [entry for entry in report.values() if not isinstance(entry, str)]
    assert len(outcomes) == len(report)
    assert all(outcome.error <= outcome.baseline for outcome in outcomes)
    assert any(bool(outcome.improved) for outcome in outcomes)
    solved, solved_report = prune.reconstruct_params(params, masks, statistics)
    chex.assert_trees_all_equal_structs(solved, params)
    assert set(solved_report) == set(report)
    for (path, outcome), entry in zip(solved_report.items(), outcomes, strict=True):
        assert path in report and not isinstance(outcome, str)
        assert outcome.error <= entry.error * 1.01 + 1e-6


def test_a_trained_network_changes_its_outputs_less():
    params, statistics = trained.network()
    pruned, _, report = prune.prune_calibrated_params(params, statistics, (2, 4))
    outcomes = [entry for entry in report.values() if not isinstance(entry, str)]
    assert len(outcomes) == 3 and all(bool(outcome.improved) for outcome in outcomes)
    plain = prune.apply_masks(
        params, prune.n_m_masks(prune.magnitude_scores(params), 2, 4, where=".*/kernel")[0]
    )
    held_out = trained.images(jax.random.key(9), 512)
    target = trained.forward(params, held_out)[1]
    errors = [
        float(jnp.square(trained.forward(tree, held_out)[1] - target).mean())
        for tree in (pruned, plain)
    ]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("method", [prune.sparse_gpt, prune.obc])
def test_stacked_layers_are_mapped_over(method):
    kernels = kernel_of(29, (3, 40, 6))
    parts = [correlated(seed, 40) for seed in range(3)]
    stacked = jax.tree.map(lambda *fields: jnp.stack(fields), *parts)
    pruned, masks, report = prune.prune_calibrated_params(
        {"scan": {"kernel": kernels}}, {"scan/kernel": stacked}, (2, 4), method
    )
    outcome = report["scan/kernel"]
    assert not isinstance(outcome, str)
    for index, part in enumerate(parts):
        alone = method(kernels[index], part, (2, 4))
        got = pruned["scan"]["kernel"][index], masks["scan"]["kernel"][index]
        chex.assert_trees_all_close(got, alone[:2], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(outcome.error[index], alone[2].error, rtol=1e-3)


def test_depthwise_kernels_have_one_column_a_group():
    weights = kernel_of(30, (3, 3, 1, 5))
    parts = [correlated(seed, 9) for seed in range(5)]
    statistics = jax.tree.map(lambda *fields: jnp.stack(fields), *parts)
    pruned, mask, outcome = prune.obc(weights, statistics, 0.5)
    assert int((~mask).sum()) == round(45 * 0.5) and bool(outcome.improved)
    traces = [
        oracles.exact_obs(weights.reshape(9, 5)[:, i], oracles.damped(part.gram, 0.01), 9)
        for i, part in enumerate(parts)
    ]
    counts = oracles.by_queue([losses for _, losses in traces], round(45 * 0.5))
    np.testing.assert_array_equal((~mask).reshape(9, 5).sum(0), counts)
    columns = np.asarray(weights).reshape(9, 5).T, np.asarray(pruned).reshape(9, 5).T
    error = sum(map(oracles.error_of, *columns, [part.gram for part in parts]))
    np.testing.assert_allclose(outcome.error, error, rtol=1e-3)


def test_leaves_without_statistics_are_named_in_the_report():
    params = {"a": kernel_of(31, (8, 4)), "b": kernel_of(32, (8, 4)), "c": kernel_of(33, (6, 4))}
    params |= {"bias": jnp.ones(4), "step": jnp.int32(3)}
    statistics = {"a": correlated(34, 8), "b": correlated(35, 5), "c": correlated(36, 6)}
    pruned, masks, report = prune.prune_calibrated_params(params, statistics, (2, 4))
    assert not isinstance(report["a"], str)
    assert "by magnitude: " in report["b"] and "5 features fit no leading axes" in report["b"]
    assert str(report["c"]).startswith("left dense: m = 4 does not divide")
    np.testing.assert_array_equal(masks["b"], prune.n_m_mask(jnp.abs(params["b"]), 2, 4))
    np.testing.assert_array_equal(pruned["b"], jnp.where(masks["b"], params["b"], 0))
    chex.assert_trees_all_equal(
        {k: pruned[k] for k in ("c", "bias", "step")}, {k: params[k] for k in ("c", "bias", "step")}
    )
    assert masks["c"].shape == () and bool(masks["bias"])
    solved, told = prune.reconstruct_params(params, masks, statistics)
    assert sorted(told) == ["a", "b"] and str(told["b"]).startswith("only masked: ")
    np.testing.assert_array_equal(solved["b"], pruned["b"])
    del statistics["b"]
    report = prune.prune_calibrated_params(
        params, statistics, {"a": (2, 4), "b": 0.25}, where="a|b"
    )[2]
    assert report["b"] == "pruned by magnitude: no statistics"
    assert (
        prune.reconstruct_params(params, masks, statistics)[1]["b"] == "only masked: no statistics"
    )


def test_trees_refuse_what_they_cannot_prune():
    params = {"a": kernel_of(37, (8, 4)), "step": jnp.ones((2, 2), int)}
    with pytest.raises(ValueError, match="matches no leaf"):
        prune.prune_calibrated_params(params, {}, 0.5, where="nothing")
    with pytest.raises(ValueError, match="a: sparsity must lie in"):
        prune.prune_calibrated_params(params, {}, -0.1)
    with pytest.raises(ValueError, match="a: sparsity has no entry"):
        prune.prune_calibrated_params(params, {}, {"b": 0.5})
    with pytest.raises(TypeError, match="step: weights must be a floating-point array"):
        prune.prune_calibrated_params(params, {}, 0.5, where="step")
    with pytest.raises(TypeError, match="a: weights must be a floating-point array"):
        small = quant.quantize_params(params, QuantSpec(4), where="a")
        prune.prune_calibrated_params(small, {}, 0.5, where="a")
    with pytest.raises(ValueError, match="different trees"):
        prune.reconstruct_params(params, {"a": True}, {})


def test_jitted_over_a_tree_equals_eager():
    params = {"a": kernel_of(38, (8, 4))}
    statistics = {"a": correlated(39, 8)}
    run = partial(prune.prune_calibrated_params, sparsity=(2, 4))
    eager, jitted = run(params, statistics), jax.jit(run)(params, statistics)
    chex.assert_trees_all_close(jitted, eager, rtol=1e-4, atol=1e-6)
