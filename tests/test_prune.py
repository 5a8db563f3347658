from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from hypothesis import given
from hypothesis import strategies as st

import jopt
from jopt import prune, quant
from jopt._trees import flatten_with_paths
from jopt.prune._masks import pruned_count
from tests import oracles
from tests.conftest import NnxNet

SELECTORS = {"layer": prune.topk_masks, "global": prune.global_topk_masks}
CHAINS = {
    "sgd": lambda: [optax.sgd(0.1)],
    "momentum": lambda: [optax.sgd(0.1, momentum=0.9, nesterov=True)],
    "adam": lambda: [optax.adam(0.1)],
    "adamw": lambda: [optax.adamw(0.1, weight_decay=0.1)],
    "clip": lambda: [optax.clip_by_global_norm(0.1), optax.adam(0.1)],
    "ema": lambda: [optax.sgd(0.1), optax.ema(0.9)],
    "lion": lambda: [optax.lion(0.1, weight_decay=0.1)],
}


def kernels(params):
    paths, leaves, _ = flatten_with_paths(params)
    return {path: leaf for path, leaf in zip(paths, leaves, strict=True) if leaf.ndim >= 2}


def zeros_at(params, masks):
    """Return whether every pruned weight is exactly zero."""
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(masks), strict=True)
    return all(bool(jnp.all(jnp.where(mask, 0, leaf) == 0)) for leaf, mask in pairs)


def loss_of(apply, images):
    return jax.grad(lambda params: jnp.sum(apply(params, images) ** 2))


def test_layer_masks_keep_the_largest_of_each_leaf(network, variant):
    _, params = network
    masks = variant(lambda p: prune.topk_masks(prune.magnitude_scores(p), 0.7))(params)
    found = kernels(masks)
    for path, weights in kernels(params).items():
        keep = weights.size - round(0.7 * weights.size)
        np.testing.assert_array_equal(found[path], oracles.topk_mask(np.abs(weights), keep))
    dense = [mask for mask in jax.tree.leaves(masks) if mask.ndim == 0]
    assert dense and all(bool(mask) for mask in dense)


def test_global_masks_keep_the_largest_of_all(network, variant):
    _, params = network
    masks = variant(lambda p: prune.global_topk_masks(prune.magnitude_scores(p), 0.8))(params)
    flat = np.concatenate([np.abs(w).ravel() for w in kernels(params).values()])
    got = np.concatenate([np.ravel(mask) for mask in kernels(masks).values()])
    np.testing.assert_array_equal(got, oracles.topk_mask(flat, flat.size - round(0.8 * flat.size)))


@pytest.mark.parametrize("name", SELECTORS)
@given(sparsity=st.floats(0, 1), seed=st.integers(0, 3))
def test_density_is_exact_even_with_ties(name, sparsity, seed):
    scores = {
        "a": jnp.round(2 * jax.random.normal(jax.random.key(seed), (9, 11))),
        "b": jnp.zeros((5, 3)),
    }
    try:
        masks = SELECTORS[name](scores, sparsity)
    except ValueError:  # a layer would lose every weight; traced, it keeps one
        masks = jax.jit(SELECTORS[name])(scores, jnp.float32(sparsity))
    kept = {key: int(mask.sum()) for key, mask in masks.items()}
    if name == "layer":
        expected = {"a": 99 - round(99 * sparsity), "b": 15 - round(15 * sparsity)}
        assert kept == {key: max(count, 1) for key, count in expected.items()}
    else:
        assert sum(kept.values()) == max(114 - round(114 * sparsity), 1)


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.97])
def test_the_traced_sparsity_gives_the_masks_of_the_static_one(name, sparsity, kernel):
    static = SELECTORS[name]({"kernel": kernel}, sparsity)
    traced = jax.jit(SELECTORS[name])({"kernel": kernel}, jnp.float32(sparsity))
    chex.assert_trees_all_equal(static, traced)


@given(size=st.integers(0, 2**31 - 1), numerator=st.integers(0, 2**24))
def test_the_traced_count_is_exact(size, numerator):
    sparsity = np.float32(numerator / 2**24)
    exact = size * numerator / 2**24
    got = int(pruned_count(size, jnp.asarray(sparsity), 0))
    assert abs(got - exact) <= 0.502


def test_masks_under_vmap_equal_masks_one_by_one():
    stacked = jax.random.normal(jax.random.key(0), (3, 6, 5))
    levels = jnp.array([0.1, 0.5, 0.9])
    together = jax.vmap(lambda s, p: prune.topk_masks({"k": s}, p)["k"])(stacked, levels)
    for index in range(3):
        alone = prune.topk_masks({"k": stacked[index]}, levels[index])["k"]
        chex.assert_trees_all_equal(together[index], alone)


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("sparsity", [-0.1, 1.1, float("nan")])
@pytest.mark.parametrize("kind", [float, np.asarray, jnp.asarray])
def test_sparsity_outside_its_range_is_refused(name, sparsity, kind, kernel):
    sparsity = kind(sparsity)
    with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\]"):
        SELECTORS[name]({"kernel": kernel}, sparsity)


def test_sparsity_must_be_a_scalar(kernel):
    with pytest.raises(ValueError, match=r"sparsity must be a scalar, not of shape \(2,\)"):
        prune.topk_masks({"kernel": kernel}, jnp.ones(2))


def test_random_scores_differ_by_key_and_leaf():
    params = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4))}
    one, two = (prune.random_scores(jax.random.key(seed), params) for seed in (0, 1))
    assert not jnp.allclose(one["a"], two["a"]) and not jnp.allclose(one["a"], one["b"])
    chex.assert_trees_all_equal(one, jax.jit(prune.random_scores)(jax.random.key(0), params))


def test_leaves_that_are_not_floats_never_lose():
    params = {"ids": jnp.ones((2, 2), int), "kernel": jnp.ones((2, 2))}
    masks = prune.global_topk_masks(prune.magnitude_scores(params), 0.75)
    assert bool(masks["ids"]) and masks["kernel"].sum() == 1
    with pytest.raises(TypeError, match="ids: scores must be floating-point arrays"):
        prune.topk_masks(params, 0.5, "ids")


def test_apply_masks_sets_zeros_and_leaves_the_original(network, variant):
    _, params = network
    before = jax.tree.map(jnp.copy, params)
    masks = prune.topk_masks(prune.magnitude_scores(params), 0.75)
    pruned = variant(prune.apply_masks)(params, masks)
    assert zeros_at(pruned, masks)
    assert float(prune.sparsity(pruned)) == pytest.approx(0.75, abs=0.01)
    chex.assert_trees_all_equal(params, before)


def test_apply_masks_broadcasts_one_mask_per_channel():
    params = {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}
    masks = {"kernel": jnp.array([[True, False, True, True]]), "bias": jnp.array(True)}
    pruned = prune.apply_masks(params, masks)
    np.testing.assert_array_equal(pruned["kernel"].sum(0), [3, 0, 3, 3])


def test_a_pruned_nan_becomes_zero():
    pruned = prune.apply_masks({"w": jnp.array([jnp.nan, 1.0])}, {"w": jnp.array([False, True])})
    np.testing.assert_array_equal(pruned["w"], [0, 1])


def test_masking_commutes_with_symmetric_quantization(kernel):
    masks = prune.topk_masks(prune.magnitude_scores({"k": kernel}), 0.5)
    leaf = quant.quantize(kernel, quant.QuantSpec(4))
    masked = prune.apply_masks({"k": leaf}, masks)["k"]
    expected = jnp.where(masks["k"], jopt.materialize(leaf), 0)
    chex.assert_trees_all_equal(jopt.materialize(masked), expected)
    affine = quant.quantize(kernel, quant.QuantSpec(4, range=quant.minmax, grid=quant.affine))
    with pytest.raises(TypeError, match="k: mask before quantizing"):
        prune.apply_masks({"k": affine}, masks)


def test_masks_of_another_tree_or_shape_are_refused(kernel):
    params = {"kernel": kernel}
    with pytest.raises(ValueError, match="masks and params are different trees"):
        prune.apply_masks(params, {"other": jnp.ones((8, 6), bool)})
    with pytest.raises(ValueError, match=r"kernel: mask of shape \(6,\) does not broadcast"):
        prune.apply_masks(params, {"kernel": jnp.ones(6, bool)})
    with pytest.raises(TypeError, match="kernel: a mask must be boolean, not float32"):
        prune.apply_masks(params, {"kernel": jnp.ones((8, 6))})
    with pytest.raises(ValueError, match="does not broadcast"):
        prune.keep_masked({"kernel": jnp.ones((5, 6), bool)}).init(params)


def test_sparsity_counts_kernels_and_compressed_leaves():
    params = {"kernel": jnp.array([[0.0, 1.0], [0.0, 0.0]]), "bias": jnp.zeros(4)}
    assert float(prune.sparsity(params)) == 0.75
    small = quant.quantize_params(params, quant.QuantSpec(4))
    assert float(prune.sparsity(small)) == 0.75
    assert float(prune.sparsity(params, ".*")) == pytest.approx(7 / 8)


@pytest.mark.parametrize("chain", CHAINS)
def test_keep_masked_holds_exact_zeros_under_any_chain(network, images, variant, chain):
    apply, params = network
    masks = prune.topk_masks(prune.magnitude_scores(params), 0.6)
    tx = optax.chain(*CHAINS[chain](), prune.keep_masked(masks))
    start = prune.apply_masks(params, masks)
    gradient = loss_of(apply, images)

    @variant
    def step(params, state):
        updates, state = tx.update(gradient(params), state, params)
        return optax.apply_updates(params, updates), state

    # Moments from dense training, so that pruned weights have something to drift with.
    params, state = params, tx.init(params)
    for _ in range(3):
        params, state = step(params, state)
        assert zeros_at(params, masks)
    moved = [
        bool((a != b).any()) for a, b in zip(*map(jax.tree.leaves, (start, params)), strict=True)
    ]
    assert any(moved)


def test_keep_masked_is_exact_when_updates_are_narrower_than_parameters():
    masks = {"w": jnp.array([False, True])}
    params = {"w": jnp.array([0.1234567, 1.0])}
    tx = prune.keep_masked(masks)
    updates, _ = tx.update({"w": jnp.ones(2, jnp.bfloat16)}, tx.init(params), params)
    new: Any = optax.apply_updates(params, updates)
    assert float(new["w"][0]) == 0.0


def test_masks_are_arguments_of_the_compiled_step_not_constants():
    masks = {"w": jax.random.bernoulli(jax.random.key(0), 0.5, (512, 512))}
    params = {"w": jnp.ones((512, 512))}
    tx = optax.chain(optax.sgd(0.1), prune.keep_masked(masks))
    text = jax.jit(tx.update).lower(params, tx.init(params), params).as_text()
    assert len(text) < 5000


@pytest.mark.parametrize("selector", SELECTORS)
def test_gradual_pruning_follows_the_schedule(network, images, selector):
    chex.clear_trace_counter()
    apply, params = network
    schedule = optax.polynomial_schedule(0.0, 0.9, power=3, transition_steps=8, transition_begin=2)
    tx = optax.chain(
        optax.adam(0.01), prune.prune_gradually(schedule, every=2, select=SELECTORS[selector])
    )
    gradient = loss_of(apply, images)

    @jax.jit
    @chex.assert_max_traces(1)
    def step(params, state):
        updates, state = tx.update(gradient(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    last = jax.tree.map(lambda leaf: jnp.array(True), params)
    for count in range(14):
        params, state = step(params, state)
        masks = prune.current_masks(state)
        assert zeros_at(params, masks)
        expected = oracles.cubic_sparsity(count - count % 2, 0.9, 2, 8)
        assert float(prune.sparsity(params)) == pytest.approx(expected, abs=0.02)
        revived = jax.tree.map(lambda now, before: bool((now & ~before).any()), masks, last)
        assert not any(jax.tree.leaves(revived))
        last = masks


def test_gradual_pruning_in_a_scan_equals_the_loop(network, images):
    apply, params = network
    tx = optax.chain(optax.sgd(0.01), prune.prune_gradually(lambda count: count / 10.0))
    gradient = loss_of(apply, images)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(gradient(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    looped = (params, tx.init(params))
    for _ in range(5):
        looped, _ = jax.jit(step)(looped, None)
    scanned, _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=5))(
        (params, tx.init(params))
    )
    chex.assert_trees_all_close(scanned[0], looped[0], rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(prune.current_masks(scanned[1]), prune.current_masks(looped[1]))


def test_training_resumes_from_a_checkpoint_with_its_masks(network, images):
    apply, params = network
    tx = optax.chain(optax.adam(0.01), prune.prune_gradually(lambda count: 0.1 * count))
    gradient = jax.jit(loss_of(apply, images))

    def run(params, state, steps):
        for _ in range(steps):
            updates, state = tx.update(gradient(params), state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    straight, _ = run(params, tx.init(params), 4)
    half, state = run(params, tx.init(params), 2)
    leaves, treedef = jax.tree.flatten((half, state))
    saved = serialization.msgpack_serialize([np.asarray(leaf) for leaf in leaves])
    restored = [jnp.asarray(leaf) for leaf in serialization.msgpack_restore(saved)]
    half, state = jax.tree.unflatten(treedef, restored)
    resumed, _ = run(half, state, 2)
    chex.assert_trees_all_equal(resumed, straight)


def test_keep_masked_works_in_an_nnx_optimizer(images):
    model = NnxNet(nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    masks = prune.topk_masks(prune.magnitude_scores(params), 0.5)
    tx = optax.chain(optax.adamw(0.05), prune.keep_masked(masks))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        gradients = nnx.grad(lambda model: jnp.sum(model(images) ** 2))(model)
        optimizer.update(model, gradients)

    for _ in range(3):
        step(model, optimizer)
    assert zeros_at(nnx.state(model, nnx.Param), masks)


def test_gradual_pruning_of_chosen_leaves_only(network):
    _, params = network
    select = partial(prune.topk_masks, where="head/kernel")
    tx = prune.prune_gradually(optax.constant_schedule(0.5), select=select)
    state = tx.init(params)
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    pruned = kernels(optax.apply_updates(params, updates))
    assert (pruned["head/kernel"] == 0).mean() == 0.5
    assert (pruned["conv/kernel"] != 0).all()


def test_transforms_say_what_they_need(kernel):
    params = {"kernel": kernel}
    for tx in (
        prune.keep_masked({"kernel": jnp.array(True)}),
        prune.prune_gradually(lambda n: 0.5),
    ):
        with pytest.raises(ValueError, match="needs the parameters"):
            tx.update(params, tx.init(params))
    bad: Any
    for bad in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="every must be a whole number"):
            prune.prune_gradually(lambda n: 0.5, every=bad)
    with pytest.raises(ValueError, match="the masks of one transform, not of 0"):
        prune.current_masks(optax.adam(0.1).init(params))


def test_a_layer_that_would_lose_every_weight_is_an_error():
    scores = {"kernel": jnp.ones((4, 3)), "small": jnp.ones((1, 3))}
    for masks in (prune.topk_masks, prune.output_topk_masks):
        with pytest.raises(ValueError, match=r"kernel: sparsity 1\.0 keeps 0 of \d+, fewer"):
            masks(scores, 1.0)
        with pytest.raises(ValueError, match=r"small: sparsity 0\.875 keeps 0 of \d, "):
            masks(scores, jnp.float32(0.875), where="small")
        least = jax.jit(lambda level, masks=masks: masks(scores, level))(jnp.float32(1.0))
        assert least["kernel"].any() and least["small"].any()
    with pytest.raises(ValueError, match=r"sparsity 1\.0 keeps 0 of 15, fewer than 1\."):
        prune.global_topk_masks(scores, 1.0)
    least = jax.jit(lambda level: prune.global_topk_masks(scores, level))(jnp.float32(1.0))
    assert sum(int(mask.sum()) for mask in least.values()) == 1


@pytest.mark.parametrize("wrong", [True, "0.5", None])
def test_a_sparsity_that_is_no_number_is_named(wrong):
    scores = {"kernel": jnp.ones((4, 3))}
    for masks in (prune.output_topk_masks, prune.global_topk_masks):
        with pytest.raises(TypeError, match=f"sparsity must be a number in .*, not {wrong!r}"):
            masks(scores, wrong)
    if wrong is not None:
        with pytest.raises(TypeError, match=f"sparsity must be a number.*, not {wrong!r}"):
            prune.topk_masks(scores, wrong)


def test_a_budget_is_found_where_the_greatest_sparsity_has_no_masks():
    params = {"a": jnp.arange(1.0, 41.0).reshape(4, 10)}

    def found(budget):
        return prune.masks_to_budget(
            lambda sparsity: prune.topk_masks(params, sparsity, min_kept=3),
            lambda masks: prune.kept_parameters(params, masks),
            budget,
        )

    assert found(7).cost == 7 and found(3).cost == 3
    with pytest.raises(ValueError, match=r"budget 2 is out of reach: a: sparsity .* keeps 2 of 40"):
        found(2)
