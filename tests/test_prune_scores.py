"""Every score against its paper in float64, on linen and nnx, and every score with every mask."""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jopt import layers, prune, quant
from jopt._trees import flatten_with_paths
from tests import oracles_scores as oracles

KEYS = jax.random.split(jax.random.key(3), 8)
INPUTS = jax.random.normal(KEYS[0], (7, 5))
LABELS = jnp.arange(7) % 3
LINEAR = {"kernel": jax.random.normal(KEYS[1], (5, 3))}


def logistic(params, inputs, labels):
    logits = inputs @ params["kernel"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def logistic_one(params, x, label):
    return logistic(params, x[None], label[None])


def by_path(tree):
    paths, leaves, _ = flatten_with_paths(tree)
    return dict(zip(paths, leaves, strict=True))


def like(params, seed=0):
    """Return a tree of the same shapes with values of its own: it stands for gradients."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), params)


# --- first gradients ------------------------------------------------------------------------------


def test_saliency_is_the_product_of_weight_and_gradient(network, variant):
    params, gradients = network[1], like(network[1])
    with jax.numpy_dtype_promotion("strict"):
        scores = variant(prune.saliency_scores)(params, gradients)
    chex.assert_trees_all_equal_structs(scores, params)
    for path, score in by_path(scores).items():
        w, g = (np.asarray(by_path(tree)[path], np.float64) for tree in (params, gradients))
        np.testing.assert_allclose(score, np.abs(w * g), rtol=1e-6)


def test_snip_is_normalised_saliency(variant):
    per_example = oracles.logistic_example_gradients(LINEAR["kernel"], INPUTS, LABELS)
    expected = np.abs(np.asarray(LINEAR["kernel"], np.float64) * per_example.mean(0))
    with jax.numpy_dtype_promotion("strict"):
        scores = variant(partial(prune.snip_scores, logistic))(LINEAR, INPUTS, LABELS)
    np.testing.assert_allclose(scores["kernel"], expected / expected.sum(), rtol=1e-4)


def test_snip_of_a_loss_without_gradients_is_zero_and_not_nan():
    scores = prune.snip_scores(lambda p: jnp.sum(0 * p["w"]), {"w": jnp.ones(3)})
    np.testing.assert_array_equal(scores["w"], 0)


def test_grasp_is_the_weight_times_the_hessian_gradient_product(variant):
    kernel = np.asarray(LINEAR["kernel"], np.float64)
    gradient = oracles.logistic_example_gradients(kernel, INPUTS, LABELS).mean(0)
    expected = kernel * oracles.logistic_hessian_product(kernel, INPUTS, gradient)
    with jax.numpy_dtype_promotion("strict"):
        scores = variant(partial(prune.grasp_scores, logistic))(LINEAR, INPUTS, LABELS)
    np.testing.assert_allclose(scores["kernel"], expected, rtol=1e-3, atol=1e-7)


def test_grasp_keeps_what_gradient_flow_needs():
    # Without weight j the squared norm of the gradient changes by -2 s_j, for small weights.
    small = 1e-3 * np.asarray(LINEAR["kernel"], np.float64)
    found = prune.grasp_scores(logistic, {"kernel": jnp.float32(small)}, INPUTS, LABELS)
    scores = np.asarray(found["kernel"])

    def flow(kernel):
        return (oracles.logistic_example_gradients(kernel, INPUTS, LABELS).mean(0) ** 2).sum()

    for place in np.ndindex(small.shape):
        without = small.copy()
        without[place] = 0
        change = flow(without) - flow(small)
        np.testing.assert_allclose(change, -2 * scores[place], rtol=0.02, atol=1e-8)
    assert (scores > 0).any() and (scores < 0).any()


def test_taylor_squares_the_sum_over_a_filter(network, variant):
    params, gradients = network[1], like(network[1])
    for axis, measure in ((-1, jnp.square), (0, jnp.abs)):
        with jax.numpy_dtype_promotion("strict"):
            scores = variant(partial(prune.taylor_scores, axis=axis, measure=measure))(
                params, gradients
            )
        for path, score in by_path(scores).items():
            w, g = (np.asarray(by_path(tree)[path], np.float64) for tree in (params, gradients))
            sums = w * g
            if w.ndim > 1:
                sums = oracles.filters(sums, axis).sum(1)
                shape = [1] * w.ndim
                shape[axis] = -1
                sums = sums.reshape(shape)
            assert score.shape == sums.shape
            expected = sums**2 if measure is jnp.square else np.abs(sums)
            np.testing.assert_allclose(score, expected, rtol=1e-3, atol=1e-6)


# --- Fisher ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_squared_gradients_are_of_single_examples_whatever_the_chunk(chunk):
    per_example = oracles.logistic_example_gradients(LINEAR["kernel"], INPUTS, LABELS)
    with jax.numpy_dtype_promotion("strict"):
        means = prune.squared_gradients(logistic_one, LINEAR, INPUTS, LABELS, chunk=chunk)
    np.testing.assert_allclose(means["kernel"], (per_example**2).mean(0), rtol=1e-4)
    kernel = np.asarray(LINEAR["kernel"], np.float64)
    scores = prune.fisher_scores(LINEAR, means)["kernel"]
    np.testing.assert_allclose(scores, kernel**2 * (per_example**2).mean(0) / 2, rtol=1e-4)


def test_squared_gradients_compile_once_and_hold_one_chunk():
    text = prune.squared_gradients.lower(
        logistic_one, LINEAR, jnp.ones((1000, 5)), jnp.zeros(1000, int), chunk=4
    ).as_text()
    assert "tensor<4x5x3xf32>" in text and "tensor<1000x5x3xf32>" not in text


def test_squared_gradients_of_a_network(network, images):
    apply, params = network
    loss = lambda p, x: jnp.sum(jnp.square(apply(p, x[None])))  # noqa: E731
    means = prune.squared_gradients(loss, params, images)
    chex.assert_trees_all_equal_shapes_and_dtypes(means, params)
    each = [jax.jit(jax.grad(loss))(params, image) for image in images]
    expected = jax.tree.map(lambda *g: jnp.stack([jnp.square(x) for x in g]).mean(0), *each)
    chex.assert_trees_all_close(means, expected, rtol=1e-4, atol=1e-6)


def test_squared_gradients_refuse_wrong_examples():
    with pytest.raises(ValueError, match=r"axis of examples in common, not of \[6, 7\]"):
        prune.squared_gradients(logistic_one, LINEAR, INPUTS, LABELS[:6])
    with pytest.raises(ValueError, match="chunk must be at least 1, not 0"):
        prune.squared_gradients(logistic_one, LINEAR, INPUTS, LABELS, chunk=0)
    with pytest.raises(ValueError, match=r"not of \[\]"):
        prune.squared_gradients(lambda p: p["kernel"].sum(), LINEAR)


# --- synaptic flow --------------------------------------------------------------------------------

SIZES = [(6, 9), (9, 7), (7, 4)]
CHAIN = {f"k{i}": jax.random.normal(KEYS[2 + i], size) for i, size in enumerate(SIZES)}


def chain(params, x):
    x = jax.nn.relu(x @ params["k0"])
    return jax.nn.relu(x @ params["k1"]) @ params["k2"]


def test_synflow_counts_all_paths_through_a_weight(variant):
    shape = jax.ShapeDtypeStruct((1, 6), jnp.float32)
    with jax.numpy_dtype_promotion("strict"):
        scores = variant(lambda params: prune.synflow_scores(chain, params, shape))(CHAIN)
    expected = oracles.synflow(list(CHAIN.values()))
    for score, wanted in zip(scores.values(), expected, strict=True):
        np.testing.assert_allclose(score, wanted, rtol=1e-4)
    # What goes into the hidden units is what comes out of them: every layer carries the same.
    totals = [float(score.sum()) for score in scores.values()]
    np.testing.assert_allclose(totals, totals[0], rtol=1e-5)


def test_synflow_of_a_network_ignores_the_values_of_inputs(network, images):
    apply, params = network
    scores = prune.synflow_scores(apply, params, images)
    chex.assert_trees_all_equal_structs(scores, params)
    chex.assert_trees_all_equal(scores, prune.synflow_scores(apply, params, images * jnp.nan))


@pytest.mark.parametrize("rounds", [1, 100])
def test_synflow_masks_follow_the_algorithm(rounds):
    shape = jax.ShapeDtypeStruct((1, 6), jnp.float32)
    with jax.numpy_dtype_promotion("strict"):
        masks = prune.synflow_masks(chain, CHAIN, 0.8, shape, rounds=rounds)
    expected = oracles.synflow_kept(list(CHAIN.values()), 0.8, rounds)
    for mask, wanted in zip(masks.values(), expected, strict=True):
        np.testing.assert_array_equal(mask, wanted)


def test_many_rounds_of_synflow_keep_a_path_where_one_round_cuts_all():
    shape, level = jax.ShapeDtypeStruct((1, 6), jnp.float32), 0.95
    masks = [prune.synflow_masks(chain, CHAIN, level, shape, rounds=n) for n in (1, 100)]
    kept = [[int(mask.sum()) for mask in each.values()] for each in masks]
    assert sum(kept[0]) == sum(kept[1]) == 145 - round(145 * level)
    assert min(kept[0]) == 0 < min(kept[1])


def test_synflow_masks_of_chosen_leaves_jitted_with_a_traced_sparsity(network, images):
    apply, params = network
    select = partial(prune.global_topk_masks, where="h.*/kernel")
    run = lambda s: prune.synflow_masks(apply, params, s, images, rounds=3, select=select)  # noqa: E731
    traced = jax.jit(run)(jnp.float32(0.75))
    found = by_path(traced)
    assert found["conv/kernel"].ndim == 0 and found["norm/scale"].ndim == 0
    kept = [int(found[f"{name}/kernel"].sum()) for name in ("hidden", "head")]
    assert sum(kept) == 536 - 402


def deep(params, x):
    return jax.lax.scan(lambda x, kernel: (jax.nn.relu(x @ kernel), None), x, params["kernels"])[0]


def test_synflow_says_when_a_deep_network_leaves_float32_and_float64_holds_it():
    kernels = np.random.default_rng(0).normal(size=(80, 8, 8))
    row = np.zeros((1, 8))
    single = {"kernels": jnp.asarray(kernels, jnp.float32)}
    with pytest.raises(ValueError, match="apply must give finite synaptic flow"):
        prune.synflow_scores(deep, single, jnp.asarray(row, jnp.float32))
    with pytest.raises(ValueError, match="apply must give finite synaptic flow"):
        prune.synflow_masks(deep, single, 0.5, jnp.asarray(row, jnp.float32), rounds=2)
    with jax.enable_x64(True):
        scores = prune.synflow_scores(deep, {"kernels": jnp.asarray(kernels)}, jnp.asarray(row))
    expected = np.array(oracles.synflow(list(kernels)))
    np.testing.assert_allclose(scores["kernels"], expected, rtol=1e-9)


def test_synflow_masks_refuse_what_makes_no_sense():
    shape = jax.ShapeDtypeStruct((1, 6), jnp.float32)
    bad: Any
    for bad in (0, 1.5, True):
        with pytest.raises(ValueError, match="rounds must be a whole number, at least 1"):
            prune.synflow_masks(chain, CHAIN, 0.5, shape, rounds=bad)
    with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\], not 1.2"):
        prune.synflow_masks(chain, CHAIN, 1.2, shape)


# --- criteria and trained scores ------------------------------------------------------------------


def run_criterion(criterion, steps):
    def step(state, each):
        return criterion.update(state, *each), None

    state, _ = jax.lax.scan(step, criterion.init(LINEAR), steps)
    return criterion.score(state, LINEAR)["kernel"]


@pytest.mark.parametrize("name", ["movement", "saliency", "fisher"])
def test_criteria_gather_over_steps(name, variant):
    weights, gradients = jax.random.normal(KEYS[6], (2, 4, 5, 3))
    w, g = np.asarray(weights, np.float64), np.asarray(gradients, np.float64)
    last = np.asarray(LINEAR["kernel"], np.float64)
    shares = 0.3 * 0.7 ** np.arange(3, -1, -1).reshape(-1, 1, 1)
    made, expected = {
        "movement": (prune.movement(), -(w * g).sum(0)),
        "saliency": (prune.saliency(0.7), np.abs(last * (shares * g).sum(0))),
        "fisher": (prune.fisher(0.7), last**2 * (shares * g**2).sum(0) / 2),
    }[name]
    with jax.numpy_dtype_promotion("strict"):
        got = variant(partial(run_criterion, made))(({"kernel": weights}, {"kernel": gradients}))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_movement_is_gathered_in_float32_for_narrow_weights():
    params = {"w": jnp.ones(1, jnp.bfloat16), "ids": jnp.ones(2, int)}
    criterion = prune.movement()
    state = criterion.init(params)
    for _ in range(300):  # bfloat16 stops counting at 256
        state = criterion.update(state, params, {"w": -jnp.ones(1, jnp.bfloat16), "ids": 0})
    assert state["w"].dtype == jnp.float32 and float(state["w"][0]) == 300
    assert state["ids"] == jnp.inf


@pytest.mark.parametrize("bad", [-0.1, 1.0])
@pytest.mark.parametrize("make", [prune.saliency, prune.fisher])
def test_decay_outside_its_range_is_refused(make, bad):
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\)"):
        make(bad)


def test_movement_params_go_straight_through_the_mask(network, images):
    (apply, params), select = network, prune.soft_movement_masks
    scores = prune.random_scores(jax.random.key(0), params)

    def loss(params, scores):
        with jax.numpy_dtype_promotion("strict"):
            masked = prune.movement_params(params, scores, 0.6, select)
        return jnp.sum(jnp.square(apply(masked, images)))

    masks = select(scores, 0.6)
    pruned = prune.apply_masks(params, masks)
    chex.assert_trees_all_equal(prune.movement_params(params, scores, 0.6, select), pruned)
    for_params, for_scores = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, scores)
    plain = jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(apply(p, images)))))(pruned)
    masked = jax.tree.map(lambda g, m: jnp.where(m, g, 0), plain, masks)
    through = jax.tree.map(lambda g, w, m: g * w if m.ndim else 0 * g, plain, params, masks)
    chex.assert_trees_all_close(for_params, masked, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(for_scores, through, rtol=1e-4, atol=1e-5)


def test_scores_learn_which_input_matters_and_pruned_weights_come_back():
    # Only the second input bears on the target; its weight starts out pruned.
    inputs = jax.random.normal(jax.random.key(0), (64, 2))
    params, scores = {"k": jnp.array([[1.0], [0.5]])}, {"k": jnp.array([[0.1], [0.0]])}

    def loss(both):
        masked = prune.movement_params(both[0], both[1], 0.5)
        return jnp.mean(jnp.square(inputs @ masked["k"] - 2 * inputs[:, 1:]))

    both = (params, scores)
    for _ in range(20):
        both = jax.tree.map(lambda x, g: x - 0.1 * g, both, jax.grad(loss)(both))
    masks = prune.topk_masks(both[1], 0.5)
    np.testing.assert_array_equal(masks["k"], [[False], [True]])


def test_movement_params_refuse_another_tree():
    with pytest.raises(ValueError, match="masks and params are different trees"):
        prune.movement_params(LINEAR, {"other": LINEAR["kernel"]}, 0.5)


def test_soft_masks_and_their_penalty(network, variant):
    _, params = network
    scores = jax.tree.map(lambda leaf: 3 * leaf, params)
    with jax.numpy_dtype_promotion("strict"):
        masks = variant(prune.soft_movement_masks)(scores, jnp.float32(0.6))
        penalty, gradient = variant(jax.value_and_grad(prune.movement_penalty))(scores)
    kernels = {path: leaf for path, leaf in by_path(scores).items() if leaf.ndim > 1}
    soft = {path: 1 / (1 + np.exp(-np.asarray(s, np.float64))) for path, s in kernels.items()}
    flat = np.concatenate([each.ravel() for each in soft.values()])
    for path, mask in by_path(masks).items():
        np.testing.assert_array_equal(mask, soft[path] > 0.6 if path in soft else True)
    np.testing.assert_allclose(penalty, flat.mean(), rtol=1e-5)
    slopes = np.concatenate([by_path(gradient)[path].ravel() for path in soft])
    np.testing.assert_allclose(slopes, flat * (1 - flat) / flat.size, rtol=1e-4)
    with pytest.raises(ValueError, match=r"threshold must lie in \[0, 1\], not 2"):
        prune.soft_movement_masks(scores, 2)


# --- Wanda, outputs, activity ---------------------------------------------------------------------


def test_wanda_weighs_by_the_norms_of_inputs(network, images):
    apply, params = network
    batches = [images, 2 * images + 1]
    statistics = layers.calibrate(apply, params, batches)
    with jax.numpy_dtype_promotion("strict"):
        scores, report = prune.wanda_scores(params, statistics)
    assert report == {}
    chex.assert_trees_all_equal_shapes_and_dtypes(scores, params)
    recorded = [layers.layer_inputs(apply)(params, batch) for batch in batches]
    for path in ("conv/kernel", "hidden/kernel", "head/kernel"):
        rows = np.concatenate([each[path] for each in recorded])
        expected = oracles.wanda(by_path(params)[path], rows)
        np.testing.assert_allclose(by_path(scores)[path], expected, rtol=1e-4)
    jitted = jax.jit(lambda p, s: prune.wanda_scores(p, s)[0])(params, statistics)
    chex.assert_trees_all_close(jitted, scores, rtol=1e-5)


def test_wanda_of_grouped_convolutions():
    x = jax.random.normal(KEYS[7], (3, 4, 4, 4)) * jnp.arange(1.0, 5).reshape(1, 1, 1, 4)
    params = {"kernel": jax.random.normal(KEYS[6], (3, 3, 2, 6))}

    def apply(params, x):
        return jax.lax.conv_general_dilated(
            x,
            params["kernel"],
            (1, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=2,
        )

    scores, report = prune.wanda_scores(params, layers.calibrate(apply, params, [x]))
    assert report == {}
    for group in range(2):  # outputs 0-2 see channels 0-1, outputs 3-5 channels 2-3
        seen = np.asarray(x)[..., 2 * group : 2 * group + 2]
        patches = [
            image[i : i + 3, j : j + 3].reshape(-1)
            for image in seen
            for i in (0, 1)
            for j in (0, 1)
        ]
        columns = slice(3 * group, 3 * group + 3)
        expected = oracles.wanda(params["kernel"][..., columns], np.array(patches))
        np.testing.assert_allclose(scores["kernel"][..., columns], expected, rtol=1e-4)


def test_wanda_of_stacked_layers_uses_the_inputs_of_each():
    params = {"kernels": jax.random.normal(KEYS[5], (3, 5, 5))}

    def apply(params, x):
        return jax.lax.scan(lambda x, k: (jnp.tanh(x @ k), None), x, params["kernels"])[0]

    scores, report = prune.wanda_scores(params, layers.calibrate(apply, params, [INPUTS]))
    assert report == {}
    x = np.asarray(INPUTS, np.float64)
    for layer in range(3):
        kernel = np.asarray(params["kernels"][layer], np.float64)
        np.testing.assert_allclose(scores["kernels"][layer], oracles.wanda(kernel, x), rtol=1e-4)
        x = np.tanh(x @ kernel)
    masks = prune.output_topk_masks(scores, 0.4, axis=(0, -1))
    np.testing.assert_array_equal(masks["kernels"].sum(1), 3)


def test_wanda_reports_what_it_scores_by_magnitude():
    params = {
        "table": jnp.array([[-2.0, 1.0]]),
        "k": jnp.ones((5, 2)),
        "small": quant.quantize(jnp.ones((2, 2)), quant.QuantSpec(4)),
        "bias": jnp.array([-3.0]),
    }
    flat = jnp.ones(4)
    stats = {"k": layers.InputStatistics(flat[0], flat, flat, flat, jnp.ones((4, 4)))}
    scores, report = prune.wanda_scores(params, stats, "table|k|small")
    assert sorted(report) == ["k", "small", "table"]
    assert report["table"] == "scored by magnitude: no statistics"
    assert "4 features fit no leading axes" in report["k"]
    assert "not a floating-point array" in report["small"] and scores["small"] == jnp.inf
    np.testing.assert_array_equal(scores["table"], [[2, 1]])
    np.testing.assert_array_equal(scores["bias"], [3])


def test_output_masks_have_the_same_sparsity_in_each_column(network):
    _, params = network
    scores = prune.magnitude_scores(params)
    with jax.numpy_dtype_promotion("strict"):
        masks = prune.output_topk_masks(scores, 0.55)
    for path, mask in by_path(masks).items():
        score = by_path(scores)[path]
        if score.ndim < 2:
            assert mask.shape == () and bool(mask)
        else:
            np.testing.assert_array_equal(mask, oracles.keep_by_output(score, 0.55))


@settings(max_examples=15)
@given(sparsity=st.floats(0, 1), seed=st.integers(0, 2))
def test_output_masks_are_exact_with_ties(sparsity, seed):
    scores = jnp.round(jax.random.normal(jax.random.key(seed), (2, 5, 4)))
    mask = prune.output_topk_masks({"k": scores}, sparsity, min_kept=0)["k"]
    np.testing.assert_array_equal(mask, oracles.keep_by_output(scores, sparsity))
    moved = {"k": jnp.moveaxis(scores, -1, 0)}
    first = prune.output_topk_masks(moved, sparsity, axis=0, min_kept=0)["k"]
    np.testing.assert_array_equal(jnp.moveaxis(first, 0, -1), mask)


def test_output_masks_refuse_a_missing_axis_and_other_errors():
    with pytest.raises(ValueError, match=r"k: axis 2 does not fit scores of shape \(2, 2\)"):
        prune.output_topk_masks({"k": jnp.ones((2, 2))}, 0.5, axis=2)
    with pytest.raises(ValueError, match="sparsity must lie in"):
        prune.output_topk_masks({"k": jnp.ones((2, 2))}, 1.5)
    with pytest.raises(TypeError, match="k: scores must be floating-point arrays"):
        prune.output_topk_masks({"k": jnp.ones((2, 2), int)}, 0.5, "k")


def test_activity_counts_zeros_of_the_layer_before(network, images):
    apply, params = network
    batches = [images, images - 0.5]
    figures = layers.calibrate(apply, params, batches, statistic=prune.activity)
    recorded = [layers.layer_inputs(apply)(params, batch) for batch in batches]
    for path, each in figures.items():
        rows = np.concatenate([inputs[path] for inputs in recorded])
        np.testing.assert_allclose(each.nonzero, 1 - oracles.inactive(rows), rtol=1e-6)
        np.testing.assert_allclose(each.mean_abs, np.abs(rows).mean(0), rtol=1e-5)
    assert 0 < float(figures["head/kernel"].nonzero.mean()) < 1


def test_activity_of_shards_merges_to_that_of_all():
    rows = jax.nn.relu(jax.random.normal(jax.random.key(0), (9, 4)))
    statistic = prune.activity
    whole = statistic.update(statistic.init(4), rows)
    parts = [statistic.update(statistic.init(4), part) for part in (rows[:2], rows[2:])]
    chex.assert_trees_all_close(statistic.merge(*parts), whole, rtol=1e-6)
    assert not statistic.finalise(statistic.init(4)).nonzero.any()


def test_channel_scores_average_over_positions():
    values = jnp.arange(12.0).reshape(3, 4)  # position by channel
    got = prune.channel_scores(values.reshape(-1), 4)
    np.testing.assert_array_equal(got, values.mean(0))
    stacked = prune.channel_scores(jnp.stack([values.reshape(-1)] * 2), 4)
    np.testing.assert_array_equal(stacked, [got, got])
    with pytest.raises(ValueError, match="channels 5 do not divide 12 features"):
        prune.channel_scores(values.reshape(-1), 5)


# --- filters and LAMP -----------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("axis", [-1, 0])
def test_filter_norms(network, order, axis):
    _, params = network
    with jax.numpy_dtype_promotion("strict"):
        scores = prune.filter_norm_scores(params, axis, order)
    for path, leaf in by_path(params).items():
        score, size = by_path(scores)[path], np.abs(np.asarray(leaf, np.float64))
        if leaf.ndim > 1:
            rows = oracles.filters(size, axis)
            size = rows.sum(1) if order == 1 else np.sqrt((rows**2).sum(1))
            assert score.ndim == leaf.ndim and score.shape[axis] == score.size == size.size
        np.testing.assert_allclose(score.ravel(), size, rtol=1e-5)
    with pytest.raises(ValueError, match="order must be 1 or 2, not 3"):
        prune.filter_norm_scores(params, order=3)
    with pytest.raises(ValueError, match=r"axis must lie in \[-2, 2\) for a leaf of 2 axes, not 2"):
        prune.filter_norm_scores({"k": jnp.ones((2, 2))}, axis=2)


@pytest.mark.parametrize("axis", [-1, 0])
def test_fpgm_sums_distances_to_all_other_filters(network, variant, axis):
    _, params = network
    with jax.numpy_dtype_promotion("strict"):
        scores = variant(partial(prune.fpgm_scores, axis=axis))(params)
    for path, leaf in by_path(params).items():
        score = by_path(scores)[path]
        expected = oracles.distance_sums(leaf, axis) if leaf.ndim > 1 else np.abs(leaf)
        np.testing.assert_allclose(score.ravel(), expected, rtol=1e-4, atol=1e-5)


def test_fpgm_of_more_filters_than_a_block_far_from_the_origin():
    kernel = np.random.default_rng(0).normal(size=(3, 300)) + 100
    got = prune.fpgm_scores({"k": jnp.asarray(kernel, jnp.float32)})["k"]
    # The mean is taken off first: at the origin's distance float32 would keep two digits.
    expected = oracles.distance_sums(np.asarray(jnp.float32(kernel)), -1)
    np.testing.assert_allclose(got[0], expected, rtol=1e-4)
    text = jax.jit(prune.fpgm_scores).lower({"k": jnp.ones((3, 3000))}).as_text()
    assert "3000x3000" not in text


def test_equal_filters_have_no_distance():
    got = prune.fpgm_scores({"k": jnp.ones((4, 3)) / 3})["k"]
    np.testing.assert_array_equal(got, 0)


def test_scales_score_channels_and_their_penalty_has_a_gradient(network):
    _, params = network
    params = jax.tree.map(lambda leaf: leaf - 2.0, params)
    scores = by_path(prune.batch_norm_scale_scores(params))
    np.testing.assert_array_equal(scores["norm/scale"], 1)
    assert all(score == jnp.inf for path, score in scores.items() if path != "norm/scale")
    masks = prune.topk_masks(prune.batch_norm_scale_scores(params), 0.25, ".*/scale")
    assert by_path(masks)["norm/scale"].sum() == 48
    with jax.numpy_dtype_promotion("strict"):
        penalty, gradient = jax.value_and_grad(prune.scale_penalty)(params)
    assert penalty == 64
    for path, leaf in by_path(gradient).items():
        np.testing.assert_array_equal(leaf, -1 if path == "norm/scale" else 0)
    with pytest.raises(ValueError, match="matches no leaf"):
        prune.scale_penalty({"kernel": jnp.ones((2, 2))})
    with pytest.raises(TypeError, match="scale: a scale must be a floating-point array"):
        prune.batch_norm_scale_scores({"scale": jnp.ones(2, int)})


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_lamp_equals_its_definition(dtype, variant):
    weights = jax.random.normal(jax.random.key(0), (13, 7)).astype(dtype)
    weights = weights.at[0].set(weights[5]).at[1, :3].set(0)  # ties, zeros
    with jax.numpy_dtype_promotion("strict"):
        score = variant(prune.lamp_scores)({"k": weights})["k"]
    assert score.dtype == jnp.float32
    np.testing.assert_allclose(score, oracles.lamp(np.asarray(weights, np.float64)), rtol=1e-5)


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e25])
def test_lamp_does_not_depend_on_the_size_of_weights(size):
    weights = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    got = prune.lamp_scores({"k": jnp.asarray(weights) * size})["k"]
    np.testing.assert_allclose(got, oracles.lamp(weights), rtol=1e-4)


def test_lamp_of_zeros_of_nothing_and_of_float64():
    scores = prune.lamp_scores({"zeros": jnp.zeros((2, 2)), "none": jnp.zeros((0, 2)), "n": 3})
    assert not scores["zeros"].any() and scores["none"].shape == (0, 2) and scores["n"] == jnp.inf
    with jax.enable_x64(True):
        weights = np.random.default_rng(1).normal(size=(9, 9))
        score = prune.lamp_scores({"k": jnp.asarray(weights)})["k"]
    assert score.dtype == np.float64
    np.testing.assert_allclose(score, oracles.lamp(weights), rtol=1e-12)


def test_lamp_masks_are_magnitude_masks_within_a_layer_and_never_lose_one(network):
    _, params = network
    params = jax.tree.map(lambda leaf: leaf, params)
    masks = prune.global_topk_masks(prune.lamp_scores(params), 0.99)
    for path, mask in by_path(masks).items():
        if mask.ndim:
            size = np.abs(by_path(params)[path])
            assert mask.any() and size[np.asarray(mask)].min() >= size[~np.asarray(mask)].max()


# --- all together ---------------------------------------------------------------------------------


def all_scores(apply, params, statistics, images):
    """Return every score that has the shape of its weights, of one network."""
    gradients, criterion = like(params), prune.movement()

    def loss(params, x):
        return jnp.sum(jnp.square(apply(params, x)))

    return {
        "lamp": prune.lamp_scores(params),
        "saliency": prune.saliency_scores(params, gradients),
        "snip": prune.snip_scores(loss, params, images),
        "grasp": prune.grasp_scores(loss, params, images),
        "synflow": prune.synflow_scores(apply, params, images),
        "fisher": prune.fisher_scores(params, jax.tree.map(jnp.square, gradients)),
        "movement": criterion.update(criterion.init(params), params, gradients),
        "wanda": prune.wanda_scores(params, statistics)[0],
    }


def test_every_score_makes_masks_of_the_sparsity_asked_for(network, images):
    apply, params = network
    statistics = layers.calibrate(apply, params, [images])
    found = jax.jit(partial(all_scores, apply))(params, statistics, images)
    selects = (prune.topk_masks, prune.global_topk_masks, prune.output_topk_masks)
    for index, (name, scores) in enumerate(found.items()):
        chex.assert_trees_all_equal_structs(scores, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(scores, params)
        masks = selects[index % 3](scores, 0.5)
        found_masks = [mask for mask in jax.tree.leaves(masks) if mask.ndim]
        kept = sum(int(mask.sum()) for mask in found_masks)
        assert kept == pytest.approx(sum(mask.size for mask in found_masks) / 2, abs=10), name


def test_scores_of_filters_take_whole_filters(network):
    _, params = network
    select = partial(prune.topk_masks, sparsity=0.5, where="hidden/kernel")
    for scores in (
        prune.filter_norm_scores(params),
        prune.fpgm_scores(params),
        prune.taylor_scores(params, like(params)),
    ):
        kernel = by_path(prune.apply_masks(params, select(scores)))["hidden/kernel"]
        assert int((kernel == 0).all(0).sum()) == 4 and int((kernel != 0).all(0).sum()) == 4


def test_narrow_weights_get_float32_scores_and_other_leaves_never_lose():
    params: Any = {
        "k": jnp.full((2, 2), 1e-4, jnp.float16),
        "ids": jnp.arange(3),
        "small": quant.quantize(jnp.ones((2, 2)), quant.QuantSpec(4)),
    }

    def loss(params):
        return jnp.sum(params["k"].astype(jnp.float32) * 1e-4) + params["ids"].sum()

    snip = prune.snip_scores(loss, params)
    np.testing.assert_allclose(snip["k"], 0.25, rtol=1e-3)
    gradients = {**params, "k": jnp.full((2, 2), 1e-4, jnp.float16)}
    each = prune.saliency_scores(params, gradients)["k"]
    assert each.dtype == jnp.float32  # 1e-8 is 0 in float16
    np.testing.assert_allclose(each, 1e-8, rtol=1e-2)
    for scores in (snip, prune.grasp_scores(loss, params), prune.lamp_scores(params)):
        assert scores["ids"] == jnp.inf and scores["small"] == jnp.inf
        masks = prune.global_topk_masks(scores, 0.75)
        assert bool(masks["ids"]) and bool(masks["small"]) and masks["k"].sum() == 1


def test_trees_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="are different trees; they differ at \\['b', 'kernel'\\]"):
        prune.saliency_scores(LINEAR, {"b": LINEAR["kernel"]})
    with pytest.raises(ValueError, match=r"must have its shape, not \(3,\)"):
        prune.fisher_scores(LINEAR, {"kernel": jnp.ones(3)})


def test_scores_under_vmap_equal_scores_one_by_one():
    stacked = {"k": jax.random.normal(jax.random.key(0), (3, 6, 5))}
    other = {"k": jax.random.normal(jax.random.key(1), (3, 6, 5))}
    functions: list[tuple[Any, Any]] = [  # others are in the battery
        (prune.taylor_scores, (stacked, other)),
        (prune.fisher_scores, (stacked, other)),
    ]
    for function, args in functions:
        together = jax.vmap(function)(*args)["k"]
        for index in range(3):
            alone = function(*({"k": tree["k"][index]} for tree in args))["k"]
            np.testing.assert_allclose(together[index], alone, rtol=1e-5, atol=1e-6)
