from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jopt import prune, quant
from jopt._trees import flatten_with_paths
from tests import oracles, oracles_masks


def by_path(tree):
    paths, leaves, _ = flatten_with_paths(tree)
    return dict(zip(paths, leaves, strict=True))


# Ties, zeros of both signs, infinities and NaN among the scores.
SCORES = st.sampled_from(
    [0.0, -0.0, 1.0, 2.0, 3.0, -1.5, float("inf"), float("-inf"), float("nan")]
)


@pytest.mark.parametrize("axis", [0, 1, -1, -2])
@pytest.mark.parametrize("m", [1, 4, 8, 12])
def test_n_of_every_m_are_kept_as_a_sort_would(m, axis):
    scores = jnp.round(4 * jax.random.normal(jax.random.key(m), (24, 24, 3))).swapaxes(0, 2)
    scores = scores if axis in (1, -1, -2) else scores.swapaxes(0, 1)
    for n in {0, 1, m // 2, m}:
        with jax.numpy_dtype_promotion("strict"):
            mask = prune.n_m_mask(scores, n, m, axis)
        np.testing.assert_array_equal(mask, oracles_masks.n_m_mask(scores, n, m, axis))


@given(st.lists(SCORES, min_size=24, max_size=24), st.integers(0, 4))
def test_groups_keep_exactly_n_whatever_the_scores(values, n):
    for m in (4, 12):  # by pairs and by entries
        scores = np.array(values, np.float32)
        mask = np.asarray(prune.n_m_mask(jnp.asarray(scores), n, m, 0))
        assert (mask.reshape(-1, m).sum(1) == n).all()
        np.testing.assert_array_equal(mask, oracles_masks.n_m_mask(scores, n, m, 0))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_scores_make_the_masks_of_wide_ones(dtype):
    scores = jax.random.normal(jax.random.key(0), (8, 4), dtype)
    wide = scores.astype(jnp.float32)
    for m in (2, 8):
        chex.assert_trees_all_equal(prune.n_m_mask(scores, 1, m, 0), prune.n_m_mask(wide, 1, m, 0))


def test_trees_keep_n_of_m_and_record_what_they_skip(network, variant):
    _, params = network
    scores = prune.magnitude_scores(params)
    with jax.numpy_dtype_promotion("strict"):
        masks, skipped = variant(lambda s: prune.n_m_masks(s, 2, 4))(scores)
    found = by_path(masks)
    # The convolution has one input channel.
    reason = "m = 4 does not divide axis 2 of shape (3, 3, 1, 4)"
    assert skipped.reasons == (("conv/kernel", reason),)
    assert found["conv/kernel"].shape == () and bool(found["conv/kernel"])
    kept = by_path(scores)["hidden/kernel"]
    np.testing.assert_array_equal(found["hidden/kernel"], oracles_masks.n_m_mask(kept, 2, 4, 0))
    assert all(bool(m) and m.ndim == 0 for path, m in found.items() if not path.endswith("kernel"))
    pruned = prune.apply_masks(params, masks)
    assert float(prune.sparsity(pruned, "hidden/kernel")) == 0.5


def test_the_axis_may_depend_on_the_leaf():
    scores = {"table": jax.random.normal(jax.random.key(0), (3, 8)), "w": jnp.ones((4, 3))}
    axis = lambda path, leaf: -1 if path == "table" else -2  # noqa: E731
    masks, skipped = prune.n_m_masks(scores, 1, 4, axis)
    assert skipped == prune.Skipped()
    np.testing.assert_array_equal(masks["table"], oracles_masks.n_m_mask(scores["table"], 1, 4, 1))
    np.testing.assert_array_equal(masks["w"].sum(0), [1, 1, 1])


def test_n_m_masks_under_vmap_equal_one_by_one():
    stacked = jax.random.normal(jax.random.key(0), (3, 8, 2))
    together = jax.vmap(lambda s: prune.n_m_masks({"w": s}, 2, 4)[0]["w"])(stacked)
    alone = [prune.n_m_mask(each, 2, 4) for each in stacked]
    chex.assert_trees_all_equal(together, jnp.stack(alone))


@pytest.mark.parametrize(
    ("n", "m", "axis", "error", "words"),
    [
        (2, 4, 1, ValueError, r"m = 4 does not divide axis 1 of shape \(8, 6\)"),
        (5, 4, 0, ValueError, "n must lie in 0 to m = 4, not 5"),
        (-1, 4, 0, ValueError, "n must lie in 0 to m = 4, not -1"),
        (0, 0, 0, ValueError, "m must be at least 1, not 0"),
        (1, 2.0, 0, TypeError, "m must be a whole number, not 2.0"),
        (True, 2, 0, TypeError, "n must be a whole number, not True"),
        (1, 2, 2, ValueError, "axis 2 is out of range for scores of 2 axes"),
    ],
)
def test_patterns_that_cannot_be_are_refused(n, m, axis, error, words, kernel):
    with pytest.raises(error, match=words):
        prune.n_m_mask(kernel, n, m, axis)
    if "divide" not in words:
        with pytest.raises(error, match=words):
            prune.n_m_masks({"kernel": kernel}, n, m, axis)


def test_n_m_needs_scores_that_are_floats():
    with pytest.raises(TypeError, match="scores must be floating-point, got int32"):
        prune.n_m_mask(jnp.ones((4, 4), jnp.int32), 2, 4)
    with pytest.raises(TypeError, match="ids: scores must be floating-point arrays"):
        prune.n_m_masks({"ids": jnp.ones((4, 4), jnp.int32)}, 2, 4, where="ids")


BLOCKS = {
    "output_channels": ((1,), (3, 3, 4, 1), (1, 1, 1, 6)),
    "input_channels": ((1, -1), (3, 3, 1, 6), (1, 1, 4, 1)),
    "window_positions": ((1, 1, -1, -1), (1, 1, 4, 6), (3, 3, 1, 1)),
    "groups": ((2, 1), (3, 3, 2, 1), None),
    "tiles": ((2, 3), (3, 3, 2, 3), None),
    "elements": ((1, 1, 1, 1), (1, 1, 1, 1), (3, 3, 4, 6)),
    "whole": ((), (3, 3, 4, 6), (1, 1, 1, 1)),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_pooled_and_the_highest_kept(name):
    reduce = jnp.max if name in ("tiles", "input_channels") else jnp.mean
    block, sizes, shape = BLOCKS[name]
    scores = {"conv": jax.random.normal(jax.random.key(0), (3, 3, 4, 6)), "bias": jnp.ones(6)}
    with jax.numpy_dtype_promotion("strict"):
        pooled = prune.pool_scores(scores, block, reduce=reduce)
    numpy_reduce = {jnp.mean: np.mean, jnp.max: np.max}[reduce]
    expected = oracles_masks.pooled(scores["conv"], sizes, numpy_reduce)
    np.testing.assert_allclose(pooled["conv"], expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(pooled["bias"], scores["bias"])
    masks = prune.block_topk_masks(scores, 0.5, block, reduce=reduce, select=prune.topk_masks)
    kept = oracles.topk_mask(expected, expected.size - round(0.5 * expected.size))
    full = oracles_masks.expanded(kept, sizes, (3, 3, 4, 6))
    np.testing.assert_array_equal(np.broadcast_to(masks["conv"], full.shape), full)
    assert masks["conv"].shape == (shape or (3, 3, 4, 6)) and masks["bias"].shape == ()


def test_channels_of_all_layers_compete(network):
    _, params = network
    scores = prune.magnitude_scores(params)
    masks = prune.block_topk_masks(scores, 0.6, (1,), select=prune.global_topk_masks)
    kernels = {path: leaf for path, leaf in by_path(scores).items() if leaf.ndim >= 2}
    means = {}
    for path, leaf in kernels.items():
        means[path] = np.asarray(leaf, np.float64).reshape(-1, leaf.shape[-1]).mean(0)
    flat = np.concatenate(list(means.values()))
    kept = oracles.topk_mask(flat, flat.size - round(0.6 * flat.size))
    found = by_path(masks)
    np.testing.assert_array_equal(np.concatenate([found[path].ravel() for path in means]), kept)
    pruned = prune.apply_masks(params, masks)
    assert 0 < float(prune.sparsity(pruned)) < 1


def test_global_selection_of_blocks_spares_the_last_of_a_leaf_if_asked():
    scores = {"low": jnp.full((2, 3), 0.1), "high": jnp.ones((2, 5))}
    lose = prune.block_topk_masks(scores, 0.5, (1,), select=prune.global_topk_masks)
    assert not lose["low"].any()
    spare = partial(prune.global_topk_masks, min_kept=1)
    masks = prune.block_topk_masks(scores, 0.5, (1,), select=spare)
    assert masks["low"].sum() == 1 and masks["high"].sum() == 3


def test_a_leaf_that_would_lose_every_block_is_an_error(kernel):
    with pytest.raises(ValueError, match=r"kernel: sparsity 0.95 keeps 0 of 6, fewer than 1"):
        prune.block_topk_masks({"kernel": kernel}, 0.95, (1,))
    traced = jax.jit(lambda level: prune.block_topk_masks({"kernel": kernel}, level, (1,)))
    assert traced(jnp.float32(0.95))["kernel"].sum() == 1


def test_the_filter_is_asked_about_leaves_and_not_about_blocks():
    scores = {"a": jnp.ones((4, 4)), "b": jnp.ones((2, 4))}
    large = lambda path, leaf: leaf.size > 8  # noqa: E731
    masks = prune.block_topk_masks(scores, 0.5, (1,), where=large)
    assert masks["a"].shape == (1, 4) and masks["b"].shape == ()


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ((3, 1), r"kernel: block \(3, 1\) does not divide shape \(8, 6\)"),
        ((1, 1, 1), r"kernel: block \(1, 1, 1\) has more axes than shape \(8, 6\)"),
        ((0,), "block must be a tuple of positive whole numbers or -1"),
        ([1], "block must be a tuple of positive whole numbers or -1"),
        ((True,), "block must be a tuple of positive whole numbers or -1"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(block, words, kernel):
    with pytest.raises(ValueError, match=words):
        prune.pool_scores({"kernel": kernel}, block)


def test_blocks_follow_the_convention_of_quantization():
    """A group that is pruned is a group with a scale of its own."""
    weights = jax.random.normal(jax.random.key(0), (8, 6))
    leaf = quant.quantize(weights, quant.QuantSpec(8, (4, 1)))
    assert prune.pool_scores({"w": weights}, (4, 1))["w"].shape == leaf.scale.shape


def test_block_masks_under_vmap_equal_one_by_one():
    stacked = jax.random.normal(jax.random.key(0), (3, 8, 6))
    masks = lambda s: prune.block_topk_masks({"w": s}, 0.5, (2, 1))["w"]  # noqa: E731
    chex.assert_trees_all_equal(
        jax.vmap(masks)(stacked), jnp.stack([masks(each) for each in stacked])
    )
