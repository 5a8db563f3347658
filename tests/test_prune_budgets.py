import itertools
import math

import chex
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments._convolution import conv_pool_direct
from experiments._models import LeNet5
from jopt import codec, prune
from jopt._trees import flatten_with_paths
from tests import oracles_masks

BUDGETS = {
    "uniform": prune.uniform_sparsities,
    "erdos_renyi": prune.erdos_renyi_sparsities,
    "erdos_renyi_kernel": prune.erdos_renyi_kernel_sparsities,
}
DENSITIES = {
    "uniform": lambda shape: 1.0,
    "erdos_renyi": lambda shape: (shape[-2] + shape[-1]) / (shape[-2] * shape[-1]),
    "erdos_renyi_kernel": lambda shape: sum(shape) / math.prod(shape),
}
SHAPES = {"conv1": (5, 5, 1, 20), "conv2": (5, 5, 20, 50), "fc1": (800, 500), "fc2": (500, 10)}


def structs(shapes):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def by_path(tree):
    paths, leaves, _ = flatten_with_paths(tree)
    return dict(zip(paths, leaves, strict=True))


def pruned_of(sparsities, sizes):
    return {name: round(sizes[name] * value) for name, value in sparsities.items()}


# One sparsity for each leaf.


def test_every_leaf_may_have_its_own_sparsity(network):
    _, params = network
    scores = prune.magnitude_scores(params)
    levels = {"conv/kernel": 0.25, "hidden/kernel": 0.75, "head/kernel": 0.5}
    with jax.numpy_dtype_promotion("strict"):
        masks = prune.topk_masks(scores, levels)
    for path, level in levels.items():
        alone = prune.topk_masks(scores, level, where=path)
        chex.assert_trees_all_equal(by_path(masks)[path], by_path(alone)[path])
    # The same as a tree of the same structure, entries of biases ignored, and traced.
    whole = jax.tree.unflatten(
        jax.tree.structure(params), [jnp.float32(levels.get(p, 0.9)) for p in by_path(params)]
    )
    chex.assert_trees_all_equal(jax.jit(prune.topk_masks)(scores, whole), masks)


def test_sparsities_of_other_leaves_are_refused(kernel):
    scores = {"a": kernel, "b": kernel}
    with pytest.raises(ValueError, match=r"sparsity has no entry for \['b'\]"):
        prune.topk_masks(scores, {"a": 0.5})
    with pytest.raises(ValueError, match="sparsity has 'c', which is no leaf"):
        prune.topk_masks(scores, {"a": 0.5, "b": 0.5, "c": 0.5})
    with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\], not 1.5"):
        prune.topk_masks(scores, {"a": 0.5, "b": 1.5})


def test_min_kept_is_an_error_if_static_and_a_floor_if_traced(kernel):
    scores = {"kernel": kernel}
    assert not prune.topk_masks(scores, 1.0, min_kept=0)["kernel"].any()
    with pytest.raises(ValueError, match="kernel: sparsity 0.99 keeps 0 of 48, fewer than 1"):
        prune.topk_masks(scores, 0.99)
    with pytest.raises(ValueError, match="kernel: sparsity 1.0 keeps 0 of 48, fewer than 2"):
        prune.topk_masks(scores, 1.0, min_kept=2)
    traced = jax.jit(lambda level: prune.topk_masks(scores, level, min_kept=2))
    assert traced(jnp.float32(1.0))["kernel"].sum() == 2
    for bad in (-1, 1.5, True):
        with pytest.raises(ValueError, match="min_kept must be a whole number, at least 0"):
            prune.topk_masks(scores, 0.5, min_kept=bad)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("traced", [False, True])
def test_global_masks_keep_some_of_every_leaf_and_the_total(traced):
    keys = jax.random.split(jax.random.key(0), 2)
    scores = {
        "small": 0.01 * jax.random.uniform(keys[0], (4, 5)).at[0, 0].set(jnp.nan),
        "large": jax.random.uniform(keys[1], (8, 10)).at[0].set(jnp.inf),
    }
    level = jnp.float32(0.8) if traced else 0.8
    masks = prune.global_topk_masks(scores, level, min_kept=3)
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"small": 3, "large": 17}
    for name, mask in masks.items():  # what is kept beats what is not
        finite = jnp.nan_to_num(scores[name], nan=-1.0)
        assert jnp.where(mask, finite, jnp.inf).min() >= jnp.where(mask, -jnp.inf, finite).max()
    with pytest.raises(ValueError, match="5 of 100, fewer than 6, min_kept = 3 for each of 2"):
        prune.global_topk_masks(scores, 0.95, min_kept=3)
    least = jax.jit(lambda level: prune.global_topk_masks(scores, level, min_kept=3))
    kept = least(jnp.float32(1.0))
    assert {name: int(mask.sum()) for name, mask in kept.items()} == {"small": 3, "large": 3}


# Budgets over layers.


@pytest.mark.parametrize("name", BUDGETS)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9, 0.95, 0.98])
def test_budgets_meet_the_total_exactly_and_follow_the_paper(name, sparsity):
    sizes = {path: math.prod(shape) for path, shape in SHAPES.items()}
    found = BUDGETS[name](structs(SHAPES), sparsity)
    pruned = pruned_of(found, sizes)
    assert sum(pruned.values()) == round(sparsity * sum(sizes.values()))
    raw = [DENSITIES[name](shape) for shape in SHAPES.values()]
    expected = oracles_masks.capped_densities(raw, list(sizes.values()), 1 - sparsity)
    for (path, size), density in zip(sizes.items(), expected, strict=True):
        assert abs(size - pruned[path] - density * size) <= 1.5
        assert 0 <= found[path] < 1


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 30), st.integers(1, 30)), min_size=1),
    st.floats(0, 0.95),
)
def test_budgets_never_exceed_a_leaf(shapes, sparsity):
    named = {str(index): shape for index, shape in enumerate(shapes)}
    sizes = {path: math.prod(shape) for path, shape in named.items()}
    for budget in BUDGETS.values():
        try:
            found = budget(structs(named), sparsity)
        except ValueError as error:
            assert "takes every weight" in str(error)
            continue
        pruned = pruned_of(found, sizes)
        assert sum(pruned.values()) == round(sparsity * sum(sizes.values()))
        assert all(0 <= pruned[path] < size for path, size in sizes.items())


def test_masks_of_a_budget_have_its_total(network):
    _, params = network
    sparsities = prune.erdos_renyi_kernel_sparsities(params, 0.5)
    masks = prune.topk_masks(prune.magnitude_scores(params), sparsities)
    kernels = [leaf for leaf in jax.tree.leaves(masks) if leaf.ndim >= 2]
    total = sum(leaf.size for leaf in kernels)
    assert sum(int(leaf.sum()) for leaf in kernels) == total - round(0.5 * total)


@pytest.mark.parametrize("name", BUDGETS)
def test_budgets_that_cannot_be_are_refused(name):
    for bad in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\)"):
            BUDGETS[name](structs(SHAPES), bad)
    with pytest.raises(ValueError, match=r"takes every weight of \['(conv1|fc1)"):
        BUDGETS[name](structs({"conv1": (1, 2), "fc1": (100, 100)}), 0.9999)
    with pytest.raises(ValueError, match="matches no leaf"):
        BUDGETS[name](structs(SHAPES), 0.5, "nothing")


# Sensitivity.


def test_sensitivity_prunes_one_leaf_at_a_time_and_compiles_once(network, images):
    chex.clear_trace_counter()
    apply, params = network
    scores = prune.magnitude_scores(params)
    target = apply(params, images)

    @jax.jit
    @chex.assert_max_traces(1)
    def evaluate(params):
        return jnp.mean((apply(params, images) - target) ** 2)

    table = prune.sensitivity(evaluate, params, scores, (0.3, 0.9))
    assert table.levels == (0.3, 0.9) and table.whole == pytest.approx(0.0, abs=1e-9)
    sizes = {path: leaf.size for path, leaf in by_path(params).items() if leaf.ndim >= 2}
    assert table.sizes == sizes and list(table.figures) == list(sizes)
    for path in sizes:
        for level, figure in zip(table.levels, table.figures[path], strict=True):
            pruned = prune.apply_masks(params, prune.topk_masks(scores, level, path))
            expected = float(jnp.mean((apply(pruned, images) - target) ** 2))
            assert figure == pytest.approx(expected, rel=1e-4)
    for bad in ((), (0.5, 0.5), (0.0, 0.5), (0.5, 1.1), (0.9, 0.3)):
        with pytest.raises(ValueError, match=r"levels must ascend within \(0, 1\]"):
            prune.sensitivity(evaluate, params, scores, bad)


@given(st.lists(st.floats(0, 5), min_size=9, max_size=9), st.integers(0, 24))
def test_no_split_harms_less_than_that_by_sensitivity(steps, pruned):
    """With convex harms interpolation is exact, so that trying everything must agree."""
    levels, sizes = (0.25, 0.5, 0.75), (8, 12, 12)
    harms = [np.cumsum(np.sort(steps[3 * i : 3 * i + 3])) for i in range(3)]
    names = "abc"
    table = prune.Sensitivity(
        levels,
        1.0,
        {name: 1.0 + harm for name, harm in zip(names, harms, strict=True)},
        dict(zip(names, sizes, strict=True)),
    )
    found = prune.sensitivity_sparsities(table, pruned / 32)
    counts = pruned_of(found, table.sizes)
    assert sum(counts.values()) == pruned
    harm = sum(
        np.interp(counts[name] / size, [0, *levels], [0, *h])
        for name, size, h in zip(names, sizes, harms, strict=True)
    )
    assert harm == pytest.approx(oracles_masks.least_harm(levels, harms, sizes, pruned), abs=1e-9)


def test_noise_that_lowers_a_figure_is_no_gain():
    figures = {"a": np.array([-1.0, 0.5]), "b": np.array([0.1, 0.2])}
    table = prune.Sensitivity((0.5, 0.9), 0.0, figures, {"a": 10, "b": 10})
    assert prune.sensitivity_sparsities(table, 0.25) == {"a": 0.5, "b": 0.0}
    assert prune.sensitivity_sparsities(table, 0.7) == {"a": 0.5, "b": 0.9}
    with pytest.raises(ValueError, match=r"beyond the table, whose last level is 0.9"):
        prune.sensitivity_sparsities(table, 0.95)
    broken = table._replace(figures=figures | {"b": np.array([np.nan, 1.0])})
    with pytest.raises(ValueError, match=r"must be finite; those of \['b'\] are not"):
        prune.sensitivity_sparsities(broken, 0.5)
    full = prune.Sensitivity(
        (1.0,), 0.0, {"a": np.array([0.0]), "b": np.array([9.0])}, {"a": 4, "b": 4}
    )
    with pytest.raises(ValueError, match=r"takes every weight of \['a'\]"):
        prune.sensitivity_sparsities(full, 0.5)


# To a target.


def test_masks_hit_a_number_of_parameters(network):
    _, params = network
    scores = prune.magnitude_scores(params)
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert prune.kept_parameters(params, jax.tree.map(lambda _: jnp.array(True), params)) == total
    found = prune.masks_to_budget(
        lambda level: prune.global_topk_masks(scores, level),
        lambda masks: prune.kept_parameters(params, masks),
        budget=300,
        tolerance=0,
    )
    assert found.cost == 300 == prune.kept_parameters(params, found.masks)
    leaves = zip(jax.tree.leaves(params), jax.tree.leaves(found.masks), strict=True)
    assert sum(int(jnp.broadcast_to(mask, leaf.shape).sum()) for leaf, mask in leaves) == 300


def test_masks_hit_the_bytes_of_a_file(network, tmp_path):
    _, params = network
    scores = prune.magnitude_scores(params)
    names = itertools.count()

    def size(masks):
        file = tmp_path / f"{next(names)}.jopt"
        codec.save(file, prune.apply_masks(params, masks))
        return file.stat().st_size

    dense = size(prune.global_topk_masks(scores, 0.0))
    found = prune.masks_to_budget(
        lambda level: prune.global_topk_masks(scores, level), size, dense // 2, tolerance=0.02
    )
    assert 0.98 * (dense // 2) <= found.cost <= dense // 2
    assert size(found.masks) == found.cost


def test_masks_hit_multiply_adds_with_channels_as_with_weights():
    x = jnp.ones((1, 6, 6, 2))
    params = {
        "conv": jax.random.normal(jax.random.key(0), (3, 3, 2, 16)),
        "dense": jnp.ones((256, 5)),
    }

    def apply(params, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            x, params["conv"], (1, 1), "VALID", dimension_numbers=numbers
        )
        return y.reshape(1, -1) @ params["dense"]

    counts = prune.multiply_adds(apply, params, x)
    assert counts.layers == {"conv": 16 * 288, "dense": 1280} and counts.other == 0
    scores = prune.magnitude_scores(params)
    makers = {
        "weights": lambda level: prune.topk_masks(scores, level, "conv"),
        "channels": lambda level: prune.block_topk_masks(scores, level, (1,), "conv"),
    }
    for name, make in makers.items():
        found = prune.masks_to_budget(
            make,
            lambda masks: prune.kept_multiply_adds(counts, masks),
            budget=4000,
            limits=(0.0, 0.9),
        )
        # A weight of the convolution is used at 16 positions, a channel has 18 of them.
        unit = 16 if name == "weights" else 16 * 18
        kept = (4000 - 1280) // unit
        assert found.cost == 1280 + kept * unit


def test_a_budget_is_met_without_pruning_or_is_out_of_reach(kernel):
    scores = {"kernel": kernel}
    make = lambda level: prune.topk_masks(scores, level)  # noqa: E731
    cost = lambda masks: prune.kept_parameters(scores, masks)  # noqa: E731
    found = prune.masks_to_budget(make, cost, 1000)
    assert found.sparsity == 0.0 and found.cost == 48
    with pytest.raises(ValueError, match="budget 10 is out of reach: at sparsity 0.5 .* is 24"):
        prune.masks_to_budget(make, cost, 10, limits=(0.0, 0.5))
    with pytest.raises(ValueError, match="limits must be two sparsities in order"):
        prune.masks_to_budget(make, cost, 10, limits=(0.5, 0.1))
    with pytest.raises(ValueError, match="tolerance and halvings must be at least 0"):
        prune.masks_to_budget(make, cost, 10, tolerance=-1)
    coarse = prune.masks_to_budget(make, cost, 47, tolerance=0, halvings=2)
    assert coarse.sparsity == 0.25 and coarse.cost == 36
    with pytest.raises(ValueError, match=r"masks has no entry for \['kernel'\]"):
        prune.kept_parameters(scores, {"other": jnp.array(True)})


# Multiply-adds, against counts by hand.


def test_multiply_adds_of_lenet5():
    model = LeNet5(conv_pool=conv_pool_direct)
    x = jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    counts = prune.multiply_adds(lambda p, x: model.apply({"params": p}, x), params, x)
    expected = [24 * 24 * 25 * 20, 8 * 8 * 25 * 20 * 50, 800 * 500, 500 * 10]
    assert sorted(counts.layers.values()) == sorted(expected)
    assert counts.total == 2_293_000 and counts.other == 0


class Mixed(linen.Module):
    """A strided and a depthwise convolution, attention, a layer used twice."""

    @linen.compact
    def __call__(self, x):
        x = linen.Conv(6, (3, 3), strides=2, name="conv")(x)  # 8 x 8 x 3 to 4 x 4 x 6
        x = linen.Conv(6, (3, 3), feature_group_count=6, name="depthwise")(x)
        x = x.reshape(x.shape[0], 16, 6)
        x = linen.MultiHeadDotProductAttention(2, name="attention")(x, x)
        dense = linen.Dense(6, name="twice")
        return dense(dense(x))


def test_multiply_adds_of_convolutions_attention_and_shared_layers():
    model = Mixed()
    x = jnp.ones((1, 8, 8, 3))
    params = model.init(jax.random.key(0), x)["params"]
    counts = prune.multiply_adds(lambda p, x: model.apply({"params": p}, x), params, x)
    projection = 16 * 6 * 6
    assert counts.layers == {
        "conv/kernel": 16 * 9 * 3 * 6,
        "depthwise/kernel": 16 * 9 * 6,
        **{f"attention/{name}/kernel": projection for name in ("query", "key", "value", "out")},
        "twice/kernel": 2 * projection,
    }
    assert counts.other == 2 * 16 * 16 * 6  # queries by keys, then weights by values
    batch = prune.multiply_adds(
        lambda p, x: model.apply({"params": p}, x), params, jnp.ones((5, 8, 8, 3))
    )
    assert batch.total == 5 * counts.total


def test_multiply_adds_of_loops_branches_and_tied_weights():
    params = {"stack": jnp.ones((4, 3, 3)), "shared": jnp.ones((3, 3)), "tied": jnp.ones((7, 3))}

    def apply(params, x):
        def step(x, kernel):
            return jnp.tanh(x @ kernel) @ params["shared"], None

        x, _ = jax.lax.scan(step, x, params["stack"])
        x = x @ params["tied"].T  # and back: used both ways
        x = x @ params["tied"]
        return jax.lax.cond(x.sum() > 0, lambda x: x @ x.T, lambda x: x[:, :1] @ x[:, :1].T, x)

    counts = prune.multiply_adds(apply, params, jnp.ones((2, 3)))
    assert counts.layers == {"stack": 4 * 2 * 9, "shared": 4 * 2 * 9, "tied": 2 * 2 * 21}
    assert counts.uses == {"stack": 2, "shared": 8, "tied": 4}
    assert counts.other == 2 * 2 * 3  # the dearer branch
    masks = {
        "stack": jnp.ones((4, 1, 1), bool).at[1].set(False),
        "shared": jnp.array(True),
        "tied": jnp.ones((7, 3), bool).at[0, 0].set(False),
    }
    assert prune.kept_multiply_adds(counts, masks) == 54 + 72 + 80 + 12


def test_multiply_adds_of_both_libraries(network, images):
    apply, params = network
    counts = prune.multiply_adds(apply, params, images[:1])
    assert counts.layers == {"conv/kernel": 16 * 9 * 4, "hidden/kernel": 512, "head/kernel": 24}
    masks = prune.topk_masks(prune.magnitude_scores(params), 0.5)
    assert prune.kept_multiply_adds(counts, masks) == 16 * 18 + 256 + 12
