from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jopt import prune
from tests import oracles_transforms

SHAPES = {
    "weight": prune.one_each,
    "layer": prune.one_per_layer,
    "output": prune.one_per_output,
}


def kernels(params):
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if leaf.ndim >= 2
    }


def assert_others_untouched(before, after):
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    for old, new in pairs:
        if old.ndim < 2:
            np.testing.assert_array_equal(old, new)


# Straight through


def test_masked_parameters_have_exact_zeros_and_dense_gradients(network, images):
    apply, params = network
    masks = prune.topk_masks(prune.magnitude_scores(params), 0.6)
    shown = jax.jit(prune.masked_params)(params, masks)
    chex.assert_trees_all_equal(shown, prune.apply_masks(params, masks))
    loss = lambda params: jnp.sum(apply(params, images) ** 2)  # noqa: E731
    through = jax.jit(jax.grad(lambda params: loss(prune.masked_params(params, masks))))(params)
    at_masked = jax.jit(jax.grad(loss))(prune.apply_masks(params, masks))
    chex.assert_trees_all_close(through, at_masked, rtol=1e-5, atol=1e-6)
    removed = jax.tree.map(lambda mask, g: jnp.where(mask, 0, g), masks, through)
    assert any(bool((leaf != 0).any()) for leaf in jax.tree.leaves(removed))


def test_a_removed_nan_shows_as_zero_and_forward_derivatives_pass():
    params = {"w": jnp.array([jnp.nan, 2.0]), "ids": jnp.array([3, 4])}
    masks = {"w": jnp.array([False, True]), "ids": jnp.array([True, False])}
    shown = prune.masked_params(params, masks)
    np.testing.assert_array_equal(shown["w"], [0, 2])
    np.testing.assert_array_equal(shown["ids"], [3, 0])
    only = partial(prune.masked_params, masks={"w": masks["w"]})
    _, tangent = jax.jvp(only, ({"w": params["w"]},), ({"w": jnp.array([5.0, 6.0])},))
    np.testing.assert_array_equal(tangent["w"], [5, 6])


def test_masks_from_the_same_parameters_get_no_gradient(kernel):
    def shown(kernel, sparsity):
        masks = prune.topk_masks(prune.magnitude_scores({"k": kernel}), sparsity)
        return prune.masked_params({"k": kernel}, masks)["k"]

    gradient = jax.jit(jax.grad(lambda k: jnp.sum(3 * shown(k, 0.5))))(kernel)
    np.testing.assert_array_equal(gradient, jnp.full_like(kernel, 3))
    together = jax.jit(jax.vmap(shown, (None, 0)))(kernel, jnp.array([0.25, 0.5]))
    np.testing.assert_array_equal((together == 0).sum((1, 2)), [12, 24])


def test_the_refined_straight_through_gradient(kernel):
    masks = {"k": jnp.abs(kernel) > 0.7}
    weights = jnp.arange(kernel.size, dtype=jnp.float32).reshape(kernel.shape)

    def loss(params):
        shown = prune.masked_params(params, masks)["k"]
        return jnp.sum(weights * shown) + 2e-4 * prune.masked_out_penalty(params, masks)

    got = jax.grad(loss)({"k": kernel})["k"]
    expected = np.asarray(weights) + 2e-4 * np.where(masks["k"], 0, kernel)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="different trees"):
        prune.masked_out_penalty({"k": kernel}, {"other": masks["k"]})


# Soft thresholds


@pytest.mark.parametrize("shape", SHAPES)
def test_learned_thresholds_shrink_as_the_oracle_does(network, shape):
    _, params = network
    thresholds = prune.str_init(params, -3.0, shape=SHAPES[shape])
    shrunk = jax.jit(prune.str_params)(params, thresholds)
    level = oracles_transforms.sigmoid(-3.0)
    for path, weights in kernels(params).items():
        expected = oracles_transforms.soft_threshold(weights, level)
        np.testing.assert_allclose(kernels(shrunk)[path], expected, rtol=1e-5, atol=1e-6)
    assert_others_untouched(params, shrunk)
    masks = prune.str_masks(params, thresholds)
    held = prune.apply_masks(shrunk, masks)
    chex.assert_trees_all_equal(held, shrunk)
    for path, mask in kernels(masks).items():
        np.testing.assert_array_equal(mask, kernels(shrunk)[path] != 0)


def test_gradients_of_the_soft_threshold():
    weights = jnp.array([[-2.0, 0.5, 1.0, 3.0, 0.0, -1.0]])
    slope = jax.grad(lambda w, t: jnp.sum(prune.soft_threshold(w, t)), (0, 1))
    by_weight, by_threshold = slope(weights, jnp.float32(1.0))
    np.testing.assert_array_equal(by_weight, [[1, 0, 0, 1, 0, 0]])
    assert float(by_threshold) == 1.0 - 1.0
    _, one = slope(weights[:, :4], jnp.float32(0.25))
    assert float(one) == 1 - 1 - 1 - 1


def test_decay_of_the_thresholds_prunes():
    target = jnp.where(jnp.arange(64).reshape(8, 8) % 4 == 0, 2.0, 0.0)
    trained: dict[str, Any] = {"params": {"w": target + 0.03}}
    trained["thresholds"] = prune.str_init(trained["params"], -6.0)
    tx = optax.sgd(0.1)

    def loss(trained):
        shown = prune.str_params(trained["params"], trained["thresholds"])["w"]
        decay = jnp.sum(trained["thresholds"]["w"] ** 2)
        return jnp.sum((shown - target) ** 2) + 0.1 * decay

    def step(carry, _):
        trained, state = carry
        updates, state = tx.update(jax.grad(loss)(trained), state)
        return (optax.apply_updates(trained, updates), state), None

    (trained, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=400))(
        (trained, tx.init(trained))
    )
    masks = prune.str_masks(trained["params"], trained["thresholds"])
    np.testing.assert_array_equal(masks["w"], target > 1)


# L0


@pytest.mark.parametrize("log_alpha", [-2.0, 0.0, 1.5])
def test_sampled_gates_have_the_hard_concrete_distribution(log_alpha):
    gates = jax.jit(prune.hard_concrete_sample)(jax.random.key(0), jnp.full((40_000,), log_alpha))
    gates = np.asarray(gates)
    closed = oracles_transforms.hard_concrete_cdf(0.0, log_alpha)
    opened = 1 - oracles_transforms.hard_concrete_cdf(1.0, log_alpha)
    assert (gates == 0).mean() == pytest.approx(closed, abs=0.01)
    assert (gates == 1).mean() == pytest.approx(opened, abs=0.01)
    for level in (0.2, 0.5, 0.8):
        expected = oracles_transforms.hard_concrete_cdf(level, log_alpha)
        assert (gates <= level).mean() == pytest.approx(expected, abs=0.01)
    penalty = prune.hard_concrete_penalty(jnp.float32(log_alpha))
    assert float(penalty) == pytest.approx(1 - closed, abs=1e-6)
    with pytest.raises(ValueError, match="temperature must be above 0, low below 0"):
        prune.hard_concrete_sample(jax.random.key(0), jnp.zeros(2), low=0.1)


@given(log_alpha=st.floats(-50, 50), temperature=st.floats(0.1, 2), stretch=st.floats(0.05, 0.5))
def test_gates_stay_within_zero_and_one(log_alpha, temperature, stretch):
    where = jnp.float32(log_alpha)
    low, high = -stretch, 1 + stretch
    gate = float(prune.hard_concrete_gates(where, low, high))
    exact = oracles_transforms.sigmoid(log_alpha) * (high - low) + low
    assert gate == pytest.approx(min(1, max(0, exact)), abs=1e-5)
    chance = float(prune.hard_concrete_penalty(where, temperature, low, high))
    expected = oracles_transforms.hard_concrete_cdf(0.0, log_alpha, temperature, low, high)
    assert chance == pytest.approx(1 - expected, abs=1e-5)


def test_gradients_of_sampled_gates_are_finite_and_those_of_the_expectation():
    # d E[z] / d log_alpha, by the reparameterized gradient and by differences of the exact mean.
    def mean(log_alpha):
        levels = (np.arange(4000) + 0.5) / 4000
        return 1 - oracles_transforms_cdf(levels, log_alpha).mean()

    def sampled(log_alpha, key):
        return prune.hard_concrete_sample(key, log_alpha)

    keys = jax.random.split(jax.random.key(1), 20_000)
    slopes = jax.jit(jax.vmap(jax.grad(sampled), (None, 0)))(jnp.float32(0.5), keys)
    assert bool(jnp.isfinite(slopes).all())
    expected = (mean(0.501) - mean(0.499)) / 0.002
    assert float(slopes.mean()) == pytest.approx(expected, rel=0.05)


def oracles_transforms_cdf(levels, log_alpha):
    return np.array([oracles_transforms.hard_concrete_cdf(z, log_alpha) for z in levels])


def test_the_functions_agree_when_run_eagerly(kernel):
    params, key = {"k": kernel, "b": jnp.ones(3)}, jax.random.key(0)
    gates = prune.l0_init(key, params, shape=prune.one_per_input)
    logs = prune.variational_init(params, -3.0)
    cases: Any = (
        (prune.l0_params, (key, params, gates)),
        (prune.l0_gated_params, (params, gates)),
        (prune.l0_penalty, (params, gates)),
        (prune.str_params, (params, gates)),
        (prune.variational_params, (key, params, logs)),
        (prune.variational_penalty, (params, logs)),
    )
    for function, arguments in cases:
        eager, jitted = function(*arguments), jax.jit(function)(*arguments)
        chex.assert_trees_all_close(eager, jitted, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_gated_parameters_masks_and_penalty_agree(network, shape):
    _, params = network
    log_alphas = prune.l0_init(jax.random.key(0), params, shape=SHAPES[shape], closed=0.7)
    for entry in log_alphas.values():
        np.testing.assert_allclose(entry, np.log(0.3 / 0.7), atol=0.06)
    spread = {
        path: entry + jnp.linspace(-6, 6, entry.size).reshape(entry.shape)
        for path, entry in log_alphas.items()
    }
    gated = jax.jit(prune.l0_gated_params)(params, spread)
    masks = prune.l0_masks(params, spread)
    chex.assert_trees_all_equal(prune.apply_masks(gated, masks), gated)
    nonzero = sum(int((leaf != 0).sum()) for leaf in kernels(gated).values())
    kept = jax.tree.map(lambda leaf, mask: jnp.broadcast_to(mask, leaf.shape), params, masks)
    assert nonzero == sum(int(mask.sum()) for mask in kernels(kept).values())
    expected = sum(
        float(np.sum(1 - oracles_transforms.hard_concrete_cdf(0.0, np.float64(entry))))
        * (kernel.size // entry.size)
        for entry, kernel in zip(spread.values(), kernels(params).values(), strict=True)
    )
    assert float(jax.jit(prune.l0_penalty)(params, spread)) == pytest.approx(expected, rel=1e-5)
    assert_others_untouched(params, gated)
    drawn = jax.jit(prune.l0_params)(jax.random.key(1), params, spread)
    assert_others_untouched(params, drawn)
    other = jax.jit(prune.l0_params)(jax.random.key(2), params, spread)
    assert any(
        bool((a != b).any())
        for a, b in zip(kernels(drawn).values(), kernels(other).values(), strict=True)
    )


def test_l0_training_closes_the_gates_of_weights_that_do_not_matter():
    target = jnp.where(jnp.arange(24).reshape(6, 4) % 2 == 0, 1.0, 0.0)
    params = {"w": target + 0.05}
    trained: Any = {"params": params, "gates": prune.l0_init(jax.random.key(0), params)}
    tx = optax.adam(0.05)

    def loss(trained, key):
        shown = prune.l0_params(key, trained["params"], trained["gates"])["w"]
        fit = jnp.sum((shown - target) ** 2)
        return fit + 0.05 * prune.l0_penalty(trained["params"], trained["gates"])

    def step(carry, key):
        trained, state = carry
        updates, state = tx.update(jax.grad(loss)(trained, key), state)
        return (optax.apply_updates(trained, updates), state), None

    keys = jax.random.split(jax.random.key(1), 600)
    (trained, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, keys))((trained, tx.init(trained)))
    masks = prune.l0_masks(trained["params"], trained["gates"])
    np.testing.assert_array_equal(masks["w"], target > 0)


# Variational dropout


def test_the_divergence_is_that_of_the_integral():
    levels = np.array([-8.0, -4.0, -1.0, 0.0, 1.0, 3.0, 8.0])
    got = prune.dropout_divergence(jnp.asarray(levels, jnp.float32))
    exact = [oracles_transforms.divergence(level) for level in levels]
    np.testing.assert_allclose(got, exact, atol=0.01)  # how good the approximation is
    assert bool((jnp.diff(got) < 0).all())


def test_log_alpha_is_clipped_and_its_gradient_finite():
    weights = jnp.array([0.0, 1e-20, 0.1, -0.1, 30.0])
    got = prune.dropout_log_alpha(weights, jnp.full(5, -2.0))
    small = -2 - np.log(0.01 + 1e-8)
    np.testing.assert_allclose(got, [8, 8, small, small, -8], rtol=1e-5)
    slope = jax.grad(lambda w: jnp.sum(prune.dropout_log_alpha(w, jnp.full(5, -2.0))))(weights)
    np.testing.assert_allclose(slope, [0, 0, -20, 20, 0], rtol=1e-4)


def test_noisy_weights_have_their_mean_and_variance():
    params = {"w": jnp.array([[1.0, -2.0]]), "b": jnp.ones(2)}
    logs = {"w": jnp.log(jnp.array([[0.25, 4.0]]))}
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = jax.jit(jax.vmap(prune.variational_params, (0, None, None)))(keys, params, logs)
    np.testing.assert_allclose(drawn["w"].mean(0), params["w"], atol=0.05)
    np.testing.assert_allclose(drawn["w"].var(0), [[0.25, 4.0]], rtol=0.05)
    np.testing.assert_array_equal(drawn["b"], jnp.ones((20_000, 2)))


def test_local_noise_matches_that_of_the_weights():
    def product(inputs, weights):
        dimensions = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            inputs, weights, (1, 1), "VALID", dimension_numbers=dimensions
        )

    inputs = jax.random.normal(jax.random.key(0), (2, 3, 3, 2))
    weights = jax.random.normal(jax.random.key(1), (3, 3, 2, 2))
    logs = jax.random.normal(jax.random.key(2), (3, 3, 2, 2)) - 2
    keys = jax.random.split(jax.random.key(3), 2000)

    def shared(key):
        return product(inputs, prune.variational_params(key, {"w": weights}, {"w": logs})["w"])

    local = partial(
        prune.local_reparameterization,
        product=product,
        inputs=inputs,
        weights=weights,
        log_sigma2=logs,
    )
    many, own = jax.jit(jax.vmap(shared))(keys), jax.jit(jax.vmap(lambda key: local(key)))(keys)
    exact = jnp.einsum("nhwi,hwio->no", inputs**2, jnp.exp(logs))
    np.testing.assert_allclose(own.mean(0), product(inputs, weights), atol=0.3)
    np.testing.assert_allclose(own.var(0)[:, 0, 0], exact, rtol=0.15)
    np.testing.assert_allclose(many.var(0)[:, 0, 0], exact, rtol=0.15)
    one, two = own[:, 0, 0, 0, 0], own[:, 1, 0, 0, 0]
    assert abs(float(jnp.corrcoef(one, two)[0, 1])) < 0.05  # examples have noise of their own
    slope = jax.grad(
        lambda x: jnp.sum(prune.local_reparameterization(keys[0], product, x, weights, logs))
    )(jnp.zeros_like(inputs))
    assert bool(jnp.isfinite(slope).all())


def test_the_penalty_and_the_masks_follow_log_alpha(network, variant):
    _, params = network
    logs = prune.variational_init(params, -3.0)
    penalty = variant(prune.variational_penalty)(params, logs)
    masks = variant(prune.variational_masks)(params, logs)
    expected = 0.0
    for path, weights in kernels(params).items():
        ratio = np.clip(-3 - np.log(np.float64(weights) ** 2 + 1e-8), -8, 8)
        likely = oracles_transforms.sigmoid(1.87320 + 1.48695 * ratio)
        expected += np.sum(0.63576 + 0.5 * np.log1p(np.exp(-ratio)) - 0.63576 * likely)
        clear = np.abs(ratio - 3) > 1e-4
        np.testing.assert_array_equal(kernels(masks)[path][clear], (ratio < 3)[clear])
    assert float(penalty) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="threshold must lie between -8 and 8, not 9"):
        prune.variational_masks(params, logs, 9.0)


def test_variational_training_drowns_weights_that_do_not_matter():
    key = jax.random.key(0)
    inputs = jax.random.normal(key, (128, 6))
    truth = jnp.array([[2.0], [0.0], [-1.0], [0.0], [0.0], [1.5]])
    params = {"w": truth + 0.1}
    trained: Any = {"params": params, "logs": prune.variational_init(params)}
    warm_up, tx = optax.linear_schedule(0.0, 1.0, 300), optax.adam(0.02)

    def loss(trained, key, count):
        weights, logs = trained["params"]["w"], trained["logs"]["w"]
        out = prune.local_reparameterization(key, jnp.matmul, inputs, weights, logs)
        penalty = prune.variational_penalty(trained["params"], trained["logs"])
        return 50 * jnp.mean((out - inputs @ truth) ** 2) + warm_up(count) * penalty

    def step(carry, key):
        trained, state, count = carry
        updates, state = tx.update(jax.grad(loss)(trained, key, count), state)
        return (optax.apply_updates(trained, updates), state, count + 1), None

    begin = (trained, tx.init(trained), jnp.int32(0))
    keys = jax.random.split(key, 1500)
    (trained, _, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, keys))(begin)
    masks = prune.variational_masks(trained["params"], trained["logs"])
    np.testing.assert_array_equal(masks["w"], truth != 0)


# All of them


def test_strict_dtypes_are_kept(kernel):
    params = {"k": kernel.astype(jnp.bfloat16), "ids": jnp.arange(3)}
    key = jax.random.key(0)
    with jax.numpy_dtype_promotion("strict"):
        made = [
            prune.str_params(params, prune.str_init(params, -3.0)),
            prune.l0_params(key, params, prune.l0_init(key, params, shape=prune.one_per_output)),
            prune.l0_gated_params(params, prune.l0_init(key, params)),
            prune.variational_params(key, params, prune.variational_init(params)),
            prune.masked_params(params, {"k": kernel > 0, "ids": jnp.array(True)}),
        ]
        sums = [
            prune.l0_penalty(params, prune.l0_init(key, params)),
            prune.variational_penalty(params, prune.variational_init(params)),
            prune.masked_out_penalty(params, {"k": kernel > 0, "ids": jnp.array(True)}),
        ]
        inputs = jnp.ones((2, 8), jnp.bfloat16)
        logs = jnp.zeros((8, 6), jnp.bfloat16)
        out = prune.local_reparameterization(key, jnp.matmul, inputs, params["k"], logs)
        assert prune.cubic_schedule(0.5, 0, 4)(jnp.int32(4)) == 0.5
    for tree in made:
        chex.assert_trees_all_equal_shapes_and_dtypes(tree, params)
    assert all(each.dtype == jnp.float32 and each.shape == () for each in sums)
    assert out.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "make",
    [
        partial(prune.str_init, initial=-3.0),
        partial(prune.l0_init, jax.random.key(0)),
        prune.variational_init,
    ],
)
def test_entries_that_do_not_fit_are_refused(make, kernel):
    params = {"kernel": kernel, "bias": jnp.ones(6), "ids": jnp.ones((2, 2), int)}
    assert list(make(params)) == ["kernel"]
    assert sorted(make(params, where="kernel|bias")) == ["bias", "kernel"]
    with pytest.raises(ValueError, match="matches no leaf"):
        make(params, where="nothing")
    with pytest.raises(TypeError, match="ids: must be a floating-point array"):
        make(params, where="ids")
    with pytest.raises(ValueError, match=r"kernel: \(6,\) does not broadcast"):
        make(params, shape=lambda leaf: (6,))
    for function in (prune.str_params, prune.str_masks, prune.l0_penalty, prune.variational_masks):
        with pytest.raises(ValueError, match="'other' is no path of params"):
            function(params, {"other": jnp.zeros(())})
        with pytest.raises(ValueError, match=r"kernel: \(5, 6\) does not broadcast"):
            function(params, {"kernel": jnp.zeros((5, 6))})
    with pytest.raises(ValueError, match=r"closed must lie in \(0, 1\), not 1.0"):
        prune.l0_init(jax.random.key(0), params, closed=1.0)
