from functools import cache
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen

from jopt import prune
from jopt._trees import flatten_with_paths
from jopt.prune._shrink._axes import Axis, kept, leaves, product, regroup, total, unify, units
from tests.nets import NETS, Encoder

LOCKED = {
    "residual": "conv_general_dilated groups axes that were concatenated",
    "encoder": "gather picks places of it",
    "scanned": "scan runs along it",
}


@cache
def network(name):
    """Return a network, its groups, masks of about half of its units, and the shrunk one."""
    apply, params, batch = NETS[name]()
    groups = prune.find_groups(apply, params, batch)
    keys = jax.random.split(jax.random.key(9), len(groups.groups))
    keep = {
        group: jax.random.permutation(key, jnp.arange(each.size) < (each.size + 1) // 2)
        for key, (group, each) in zip(keys, groups.groups.items(), strict=True)
    }
    masks = prune.unit_masks(groups, params, keep)
    return apply, params, batch, groups, keep, masks, prune.shrink(apply, params, masks, batch)


def members(groups, name):
    return {(member.path, member.axis) for member in groups.groups[name].members}


def close(one, other):
    chex.assert_trees_all_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETS)
def test_the_shrunk_network_computes_what_the_masked_one_does(name):
    apply, params, batch, groups, keep, masks, shrunk = network(name)
    masked = prune.apply_masks(params, masks)
    more = jnp.concatenate([batch, batch[::-1], batch])  # `shrink` has compared them on `batch`
    close(shrunk.apply(shrunk.params, more), jax.jit(apply)(masked, more))
    before = sum(leaf.size for leaf in jax.tree.leaves(params))
    after = sum(leaf.size for leaf in jax.tree.leaves(shrunk.params))
    assert after < 0.7 * before
    paths, leaves_, _ = flatten_with_paths(params)
    small = dict(zip(paths, jax.tree.leaves(shrunk.params), strict=True))
    for path, leaf in zip(paths, leaves_, strict=True):
        for axis in range(leaf.ndim):
            gone = len(shrunk.removed.get(path, {}).get(axis, ()))
            assert small[path].shape[axis] == leaf.shape[axis] - gone
    chex.assert_trees_all_equal(shrunk.widen(shrunk.params), masked)


@pytest.mark.parametrize("name", NETS)
def test_every_axis_is_in_a_group_or_locked_for_a_reason(name):
    _, params, _, groups, *_ = network(name)
    paths, found, _ = flatten_with_paths(params)
    grouped = {at for group in groups.groups for at in members(groups, group)}
    for path, leaf in zip(paths, found, strict=True):
        for axis, size in enumerate(leaf.shape):
            assert size == 1 or (path, axis) in grouped or f"{path}[{axis}]" in groups.locked
    if name in LOCKED:
        assert LOCKED[name] in " ".join(groups.locked.values())


@pytest.mark.parametrize("name", ["residual", "encoder", "scanned"])
def test_gradients_of_the_shrunk_network_are_those_of_the_masked_one(name):
    apply, params, batch, *_, masks, shrunk = network(name)
    masked = prune.apply_masks(params, masks)
    full = jax.jit(jax.grad(lambda p: jnp.sum(apply(p, batch) ** 2)))(masked)
    small = jax.jit(jax.grad(lambda p: jnp.sum(shrunk.apply(p, batch) ** 2)))(shrunk.params)
    chex.assert_trees_all_close(small, shrunk.narrow(full), rtol=2e-3, atol=2e-3)


def test_training_goes_on_with_the_smaller_optimizer_state():
    apply, params, batch, *_, masks, shrunk = network("nnx")

    def steps(tx, apply, params, state):
        def step(carry, _):
            params, state = carry
            gradients = jax.grad(lambda p: jnp.sum(apply(p, batch) ** 2))(params)
            updates, state = tx.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), length=2)[0]

    tx = optax.chain(optax.adam(1e-2), prune.keep_masked(masks))
    masked = prune.apply_masks(params, masks)
    masked, state = jax.jit(lambda p: steps(tx, apply, p, tx.init(p)))(masked)
    small, narrow = shrunk.narrow(masked), shrunk.narrow(state)
    chex.assert_trees_all_equal_shapes(small, shrunk.params)
    chex.assert_trees_all_equal_shapes(narrow[0][0].mu, shrunk.params)
    assert all(bool(mask.all()) for mask in jax.tree.leaves(prune.current_masks(narrow)))
    after, _ = jax.jit(lambda p, s: steps(tx, apply, p, s))(masked, state)
    small, _ = jax.jit(lambda p, s: steps(tx, shrunk.apply, p, s))(small, narrow)
    chex.assert_trees_all_close(small, shrunk.narrow(after), rtol=1e-3, atol=1e-4)
    wide = shrunk.widen(narrow)
    chex.assert_trees_all_equal_shapes(wide, state)
    chex.assert_trees_all_equal(shrunk.narrow(wide), narrow)


def test_masked_optimizer_state_is_narrowed_and_other_axes_are_refused():
    _, params, *_, shrunk = network("nnx")
    kernels = jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    small = jax.tree.map(lambda leaf: leaf.ndim > 1, shrunk.params)
    state = optax.masked(optax.adam(1e-2), kernels).init(params)
    expected = optax.masked(optax.adam(1e-2), small).init(shrunk.params)
    chex.assert_trees_all_equal_shapes(shrunk.narrow(state), expected)
    chex.assert_trees_all_equal_shapes(shrunk.widen(expected), state)
    factored = optax.scale_by_factored_rms(min_dim_size_to_factor=2).init(params)
    with pytest.raises(
        ValueError, match=r"an entry of shape \(.*\) for .* start the optimizer anew"
    ):
        shrunk.narrow(factored)


def test_attention_heads_are_units():
    _, _, _, groups, *_ = network("encoder")
    heads = members(groups, "params/attention_0/query/kernel[1]")
    assert heads == {
        *((f"params/attention_0/{name}/kernel", 1) for name in ("query", "key", "value")),
        *((f"params/attention_0/{name}/bias", 0) for name in ("query", "key", "value")),
        ("params/attention_0/out/kernel", 0),
    }


def test_a_tied_embedding_and_the_residual_stream_are_one_group():
    _, _, _, groups, *_ = network("encoder")
    stream = members(groups, "params/embed/embedding[1]")
    assert ("params/norm_1_1/scale", 0) in stream and ("params/position", 2) in stream


def test_depthwise_kernels_go_with_their_channels():
    _, _, _, groups, *_ = network("inverted")
    group = members(groups, "params/Conv_1/kernel[3]")
    # Expansion, depthwise and projection; the gate that reads and scales the channels.
    assert {("params/Conv_2/kernel", 3), ("params/Conv_3/kernel", 2)} < group
    assert {("params/Dense_0/kernel", 0), ("params/Dense_1/kernel", 1)} < group


def test_whole_layers_go_when_that_is_asked_for():
    apply, params, batch, groups, *_ = network("encoder")
    none = {
        name: jnp.zeros(group.size, bool)
        for name, group in groups.groups.items()
        if "_1/" in name and "embed" not in name
    }
    with pytest.raises(ValueError, match=r"leaves 0 of 3 units; at_least=1 must stay"):
        prune.unit_masks(groups, params, none)
    masks = prune.unit_masks(groups, params, none, at_least=0)
    shrunk = prune.shrink(apply, params, masks, batch)
    assert shrunk.params["params"]["up_1"]["kernel"].shape == (12, 0)
    assert shrunk.params["params"]["attention_1"]["out"]["kernel"].shape == (0, 0, 12)


def test_units_are_kept_as_long_as_any_weight_of_them_is():
    apply, params, batch = NETS["scanned"]()
    masks = prune.topk_masks(prune.magnitude_scores(params), 0.9)
    shrunk = prune.shrink(apply, params, masks, batch)
    assert not shrunk.removed and not shrunk.units
    chex.assert_trees_all_equal(shrunk.params, prune.apply_masks(params, masks))


def test_a_shrunk_network_is_made_again_from_its_units_alone():
    apply, params, batch, *_, shrunk = network("residual")
    units_ = {name: stays.tolist() for name, stays in shrunk.units.items()}  # as JSON holds them
    again = prune.shrunk_apply(apply, jax.eval_shape(lambda: params), units_)
    close(again(shrunk.params, batch), shrunk.apply(shrunk.params, batch))
    with pytest.raises(ValueError, match=r"BatchNorm_0/mean: the shrunk network needs shape"):
        again(params, batch)
    with pytest.raises(ValueError, match="units has .'nothing'.; the groups of this program are"):
        prune.shrunk_apply(apply, params, {"nothing": [True]})(shrunk.params, batch)


def test_scores_of_units_are_means_over_weights_then_over_members():
    _, params, _, groups, *_ = network("residual")
    scores = prune.magnitude_scores(params)
    got = prune.unit_scores(groups, scores)
    paths, found, _ = flatten_with_paths(scores)
    by_path = {path: np.asarray(leaf) for path, leaf in zip(paths, found, strict=True)}
    for name, group in groups.groups.items():
        means = []
        for path, axis, owners in group.members:
            if by_path[path].ndim >= 2:
                rows = np.moveaxis(by_path[path], axis, 0)
                means.append([rows[owners == unit].mean() for unit in range(group.size)])
        np.testing.assert_allclose(got[name], np.mean(means, 0), rtol=1e-5)
    largest = prune.unit_scores(groups, scores, "params/.*", lambda each: each.max(0))
    assert all((largest[name] >= got[name] - 1e-6).all() for name in got)
    masks = prune.global_topk_masks(got, 0.3, ".*")
    assert set(masks) == set(groups.groups)


def test_layer_norms_that_subtract_the_mean_first_keep_their_width():
    def apply(params, x):
        x = x @ params["w"]
        x = x - x.mean(-1, keepdims=True)
        return (x / jnp.sqrt((x * x).mean(-1, keepdims=True))) @ params["v"]

    params = {"w": jnp.ones((3, 4)), "v": jnp.ones((4, 2))}
    groups = prune.find_groups(apply, params, jnp.ones((2, 3)))
    assert not groups.groups
    assert groups.locked["w[1]"].startswith("reduce_sum adds up values that are not zero")


def test_an_operation_without_a_rule_is_named():
    def apply(params, x):
        return jnp.real(jnp.fft.fft(x @ params["w"])) @ params["v"]

    params = {"w": jnp.ones((3, 4)), "v": jnp.ones((4, 2))}
    masks = {"w": jnp.array([[True, True, False, True]]), "v": jnp.array(True)}
    assert prune.find_groups(apply, params, jnp.ones((2, 3))).locked["w[1]"] == "fft is not known"
    with pytest.raises(ValueError, match="w: whole indices of axis 1 are masked.*fft is not known"):
        prune.shrink(apply, params, masks, jnp.ones((2, 3)))


def test_networks_that_differ_are_refused():
    def apply(params, x):  # dividing by what was masked makes NaN of it
        return (x @ params["w"] / params["scale"]) @ params["v"]

    params = {"w": jnp.ones((3, 4)), "scale": jnp.ones((1, 4)), "v": jnp.ones((4, 2))}
    groups = prune.find_groups(apply, params, jnp.ones((2, 3)))
    masks = prune.unit_masks(groups, params, {"w[1]": jnp.arange(4) > 0})
    with pytest.raises(ValueError, match="output 0 of the shrunk network differs"):
        prune.shrink(apply, params, masks, jnp.ones((2, 3)))


def test_groups_that_a_filter_does_not_match_stay_whole():
    params = {"w": jnp.array([[1.0, 3.0]]), "v": jnp.array([[2.0], [4.0]])}
    groups = prune.find_groups(lambda p, x: x @ p["w"] @ p["v"], params, jnp.ones((1, 1)))
    scores = prune.unit_scores(groups, params) | {"other[1]": jnp.array([1.0, 2.0, 3.0])}
    keep = prune.topk_masks(scores, 0.5, r"other.*")
    keep = prune.round_units({"w[1]": keep["w[1]"]}, scores, 4)
    masks = prune.unit_masks(groups, params, keep)
    assert all(bool(mask.all()) for mask in masks.values())
    with pytest.raises(ValueError, match="leaves 0 of 2 units"):
        prune.unit_masks(groups, params, {"w[1]": jnp.array(False)})


def test_choices_that_do_not_fit_are_refused():
    _, params, _, groups, *_ = network("nnx")
    with pytest.raises(ValueError, match="keep has 'head'; the groups are"):
        prune.unit_masks(groups, params, {"head": jnp.ones(3, bool)})
    with pytest.raises(ValueError, match=r"keep\['first/kernel\[3\]'\] must be 8 booleans"):
        prune.unit_masks(groups, params, {"first/kernel[3]": jnp.ones(3, bool)})
    with pytest.raises(ValueError, match="masks and params are different trees"):
        prune.shrink(lambda p, x: x, {"w": jnp.ones(2)}, {"v": jnp.array(True)}, jnp.ones(1))
    with pytest.raises(TypeError, match="apply must be a function"):
        prune.find_groups(params, params)  # pyright: ignore[reportArgumentType]


def test_masks_of_traced_choices_and_shrunk_networks_under_vmap():
    apply, params, batch, groups, keep, masks, shrunk = network("scanned")
    traced = jax.jit(lambda keep: prune.unit_masks(groups, params, keep))(keep)
    chex.assert_trees_all_equal(traced, masks)
    one_by_one = jnp.stack([shrunk.apply(shrunk.params, x[None])[0] for x in batch])
    close(jax.vmap(lambda x: shrunk.apply(shrunk.params, x[None])[0])(batch), one_by_one)


def test_what_a_function_closes_over_is_cut_as_well():
    table = jnp.arange(4.0)[None]
    apply = lambda params, x: jnp.cos(table) * (x @ params["w"]) @ params["v"]  # noqa: E731
    params = {"w": jnp.arange(12.0).reshape(3, 4), "v": jnp.ones((4, 2))}
    groups = prune.find_groups(apply, params, jnp.ones((2, 3)))
    masks = prune.unit_masks(groups, params, {"w[1]": jnp.arange(4) != 1})
    shrunk = prune.shrink(apply, params, masks, jnp.ones((2, 3)))
    assert shrunk.params["w"].shape == (3, 3)


def test_loops_and_branches_are_followed():
    def apply(params, x):
        x = x @ params["w"]
        x = jax.lax.cond(x.sum() > 0, lambda x: jax.nn.relu(x), lambda x: -x, x)
        x = jax.lax.fori_loop(0, 3, lambda _, x: x + params["b"], x)
        x = jax.lax.while_loop(lambda x: jnp.max(x) < 9, lambda x: 2 * x, x)
        first, second = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([first * second, second], -1) @ params["v"]

    params = {
        "w": jnp.arange(12.0).reshape(3, 4) + 1,
        "b": jnp.ones((1, 4)),
        "v": jnp.arange(8.0).reshape(4, 2),
    }
    groups = prune.find_groups(apply, params, jnp.ones((2, 3)))
    # max reduces over the units, so that they stay.
    assert groups.locked["w[1]"] == "reduce_max reduces it"
    plain = lambda params, x: apply(params | {"w": params["w"] * 10}, x)  # noqa: E731
    assert prune.find_groups(plain, params, jnp.ones((2, 3))).locked == groups.locked


def test_a_gated_unit_splits_in_two_halves():
    def apply(params, x):
        gate, value = jnp.split(x @ params["w"], 2, axis=-1)
        return (jax.nn.silu(gate) * value) @ params["v"]

    params = {"w": jnp.arange(24.0).reshape(3, 8) / 9, "v": jnp.ones((4, 2))}
    groups = prune.find_groups(apply, params, jnp.ones((2, 3)))
    (group,) = groups.groups.values()
    owners = {member.path: member.units.tolist() for member in group.members}
    assert owners == {"v": [0, 1, 2, 3], "w": [0, 1, 2, 3, 0, 1, 2, 3]}
    masks = prune.unit_masks(groups, params, {"v[0]": jnp.arange(4) < 3})
    assert prune.shrink(apply, params, masks, jnp.ones((2, 3))).params["w"].shape == (3, 6)


def test_modules_of_flax_are_run_without_being_built_again():
    model = Encoder()
    batch = jnp.arange(5)[None]
    params = model.init(jax.random.key(0), batch)
    *_, shrunk = network("encoder")
    with pytest.raises(Exception, match="shape"):  # Flax knows the width of its modules
        model.apply(shrunk.params, batch)
    outputs: Any = model.apply(params, batch)
    assert shrunk.apply(shrunk.params, batch).shape == outputs.shape


def test_axes_are_divided_where_they_must_be():
    flat, heads = Axis(12), product([Axis(3), Axis(4)])
    unify(flat, heads, "add")
    assert [leaf.size for leaf in leaves(flat)] == [3, 4]
    joined = total([Axis(2), flat])
    assert units(joined, leaves(flat)[1]).tolist() == [-1, -1, *[0, 1, 2, 3] * 3]
    stays = kept(joined, {leaves(flat)[0]: np.array([True, False, True])})
    assert stays.tolist() == [True] * 6 + [False] * 4 + [True] * 4
    uneven = regroup([Axis(5), Axis(4), Axis(6)], (5, 3, 8))
    assert [axis.size for axis in uneven] == [5, 3, 8]
    assert [leaf.reason for axis in uneven for leaf in leaves(axis)] == [None] + [
        "reshape made it"
    ] * 2


def test_relu_keeps_its_own_derivative_at_zero():
    apply = lambda params, x: jax.nn.relu(x * params["w"]) @ params["v"]  # noqa: E731
    params = {"w": jnp.zeros((1, 3)), "v": jnp.ones((3, 1))}
    masks = {"w": jnp.array([[True, False, True]]), "v": jnp.array([[True], [False], [True]])}
    shrunk = prune.shrink(apply, params, masks, jnp.ones((1, 1)))
    gradient = jax.grad(lambda p: shrunk.apply(p, jnp.ones((1, 1))).sum())(shrunk.params)
    np.testing.assert_array_equal(gradient["w"], jnp.zeros((1, 2)))


def test_linen_batch_statistics_may_be_closed_over():
    model = linen.BatchNorm(use_running_average=True)
    params = {
        "w": jnp.ones((3, 4)),
        "norm": {"scale": jnp.arange(4.0), "bias": jnp.ones(4)},
        "v": jnp.ones((4, 2)),
    }
    statistics = {"mean": jnp.arange(4.0), "var": jnp.ones(4)}

    def apply(params, x):
        x = model.apply({"params": params["norm"], "batch_stats": statistics}, x @ params["w"])
        return x @ params["v"]

    groups = prune.find_groups(apply, params, jnp.ones((2, 3)))
    masks = prune.unit_masks(groups, params, {"w[1]": jnp.arange(4) > 1})
    assert prune.shrink(apply, params, masks, jnp.ones((2, 3))).params["norm"]["scale"].shape == (
        2,
    )


def test_training_functions_shrink_with_their_statistics_and_dropout():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            x = linen.BatchNorm(use_running_average=not train)(linen.Dense(4)(x))
            return linen.Dense(2)(linen.Dropout(0.5, deterministic=not train)(x))

    model, x = Net(), jax.random.normal(jax.random.key(0), (6, 3))
    variables = model.init(jax.random.key(1), x, False)
    apply = lambda variables, x: model.apply(variables, x, False)  # noqa: E731

    def train(variables, x, key):
        return model.apply(variables, x, True, rngs={"dropout": key}, mutable=["batch_stats"])

    groups = prune.find_groups(apply, variables, x)
    keep = {"params/Dense_0/kernel[1]": jnp.arange(4) > 0}
    shrunk = prune.shrink(apply, variables, prune.unit_masks(groups, variables, keep), x)
    small_train = prune.shrunk_apply(train, variables, shrunk.units)
    logits, state = small_train(shrunk.params, x, jax.random.key(2))
    assert logits.shape == (6, 2)
    averages = state["batch_stats"]["BatchNorm_0"]["mean"]
    _, full = train(variables, x, jax.random.key(2))
    close(averages, full["batch_stats"]["BatchNorm_0"]["mean"][1:])


@pytest.mark.parametrize(
    ("kept", "multiple", "stay"),
    [(3, 4, 4), (5, 4, 4), (6, 4, 8), (1, 4, 4), (0, 4, 4), (11, 4, 11), (11, 8, 8), (5, 1, 5),
     (2, 64, 11)],
)  # fmt: skip
def test_units_are_rounded_to_multiples(kept, multiple, stay):
    rng = np.random.default_rng(kept)
    scores = {"a": jnp.asarray(rng.normal(size=11), jnp.float32), "unused": jnp.ones(2)}
    keep = {"a": jnp.asarray(rng.permutation(11) < kept)}
    found = prune.round_units(keep, scores, multiple)
    assert set(found) == {"a"} and int(found["a"].sum()) == stay
    before, after = np.asarray(keep["a"]), np.asarray(found["a"])
    assert (before & after).sum() == min(kept, stay)  # nothing goes while something comes
    score, own = np.asarray(scores["a"]), before if stay < kept else ~before
    changed, left = score[before != after], score[own & (before == after)]
    if stay > kept:
        assert min(changed, default=9) >= max(left, default=-9)
    else:
        assert max(changed, default=-9) <= min(left, default=9)
    chex.assert_trees_all_equal(
        found, jax.jit(prune.round_units, static_argnums=2)(keep, scores, multiple)
    )


@pytest.mark.parametrize(
    ("scores", "multiple", "words"),
    [
        ({"a": jnp.ones(3)}, 0, "multiple must be a whole number, at least 1, not 0"),
        ({"a": jnp.ones(3)}, 2.0, "not 2.0"),
        ({"b": jnp.ones(3)}, 2, "scores has no 'a'"),
        ({"a": jnp.ones(4)}, 2, r"must have shape \(3,\), as keep has it, not \(4,\)"),
    ],
)
def test_rounding_that_does_not_fit_is_refused(scores, multiple, words):
    with pytest.raises(ValueError, match=words):
        prune.round_units({"a": jnp.ones(3, bool)}, scores, multiple)
