from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from hypothesis import given, settings
from hypothesis import strategies as st

from jopt import prune
from jopt._trees import flatten_with_paths
from tests import oracles, oracles_transforms
from tests.conftest import NnxNet

EVERY = 3
END = 11


def odd_params():
    """Leaves that other libraries trip over: one axis, none, integers, unmasked ones."""
    keys = jax.random.split(jax.random.key(3), 3)
    return {
        "kernel": jax.random.normal(keys[0], (6, 5)),
        "vector": jax.random.normal(keys[1], (12,)),
        "channels": jax.random.normal(keys[2], (4, 3)),
        "scalar": jnp.float32(2.0),
        "bias": jnp.linspace(-1, 1, 5),
    }


def half(leaf):
    """Keep about half of a leaf, in no order; compiles faster than a selection."""
    if leaf.ndim < 1:
        return jnp.array(True)
    return jnp.asarray(np.arange(leaf.size).reshape(leaf.shape) * 7 % 11 < 5)


def odd_masks():
    params = odd_params()
    return {
        "kernel": half(params["kernel"]),
        "vector": half(params["vector"]),
        "channels": jnp.array([[True, False, True]]),
        "scalar": jnp.array(True),
        "bias": jnp.array(True),
    }


def added(params, updates) -> Any:
    return optax.apply_updates(params, updates)


def sparse(inner, rule) -> Any:
    return prune.sparse_training(inner, rule)


def surgery(*arguments, **named) -> Any:
    return prune.network_surgery(*arguments, **named)


def zeros_at(params, masks):
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(masks), strict=True)
    return all(bool(jnp.all(jnp.where(mask, 0, leaf) == 0)) for leaf, mask in pairs)


def gradient_at(params, count):
    """Return smooth dense gradients that change from step to step."""
    return jax.tree.map(
        lambda w: jnp.sin(3 * w + count + jnp.arange(w.size).reshape(w.shape)), params
    )


def kept_per_leaf(masks):
    return [int(mask.sum()) for mask in jax.tree.leaves(masks)]


# clear_moments


OPTIMIZERS = {
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "adam": lambda: optax.adam(0.1),
    "amsgrad": lambda: optax.amsgrad(0.1),
    "chain": lambda: optax.chain(optax.clip(1.0), optax.chain(optax.ema(0.9), optax.adamw(0.1))),
    "multi_steps": lambda: optax.MultiSteps(optax.adam(0.1), 3),
    "hyperparams": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    "lookahead_like": lambda: optax.chain(optax.trace(0.9), optax.scale_by_schedule(lambda n: 0.1)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_of_removed_weights_are_cleared_and_nothing_else(name):
    params, masks, tx = odd_params(), odd_masks(), OPTIMIZERS[name]()
    state = tx.init(params)
    for count in range(2):
        _, state = tx.update(gradient_at(params, count), state, params)
    cleared: Any = prune.clear_moments(state, params, masks)
    chex.assert_trees_all_equal_structs(cleared, state)
    before, after = (jax.tree_util.tree_leaves_with_path(each) for each in (state, cleared))
    seen = 0
    for (path, old), (_, new) in zip(before, after, strict=True):
        name = getattr(path[-1], "key", None)
        if name in masks:
            mask = np.broadcast_to(masks[name], np.shape(old))
            np.testing.assert_array_equal(new, np.where(mask, old, 0))
            seen += int(np.any(np.where(mask, 0, old)))
        else:
            np.testing.assert_array_equal(new, old)
    assert seen >= 3  # kernel, vector and channels had something to clear


def test_moments_behind_masked_nodes_are_cleared():
    params, masks = odd_params(), odd_masks()
    labels = {"kernel": "a", "vector": "b", "channels": "a", "scalar": "b", "bias": "a"}
    tx: Any = optax.chain(
        optax.partition({"a": optax.adam(0.1), "b": optax.sgd(0.1, momentum=0.9)}, labels),
        optax.masked(optax.trace(0.5), {**dict.fromkeys(params, True), "bias": False}),
    )
    _, state = tx.update(gradient_at(params, 0), tx.init(params), params)
    cleared: Any = prune.clear_moments(state, params, masks)
    inner = cleared[0].inner_states
    assert zeros_at(inner["a"].inner_state[0].mu["kernel"], masks["kernel"])
    assert zeros_at(inner["a"].inner_state[0].nu["channels"], masks["channels"])
    assert zeros_at(inner["b"].inner_state[0].trace["vector"], masks["vector"])
    assert zeros_at(cleared[1].inner_state.trace["vector"], masks["vector"])
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), state, cleared)
    assert sum(jax.tree.leaves(changed)) == 2 + 2 + 1 + 3  # of mu, nu, trace, trace


def test_a_masked_node_may_stand_for_a_whole_layer():
    params = {"a": {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}, "c": {"w": jnp.ones(3)}}
    tx: Any = optax.masked(optax.trace(0.5), {"a": False, "c": True})
    _, state = tx.update(params, tx.init(params), params)
    masks: Any = jax.tree.map(lambda leaf: jnp.array(False), params)
    cleared: Any = prune.clear_moments(state, params, masks)
    np.testing.assert_array_equal(cleared.inner_state.trace["c"]["w"], 0)


def test_factored_moments_stay_and_full_ones_are_cleared():
    params = {"w": jnp.ones((4, 6)), "v": jnp.ones(5)}
    masks = {"w": jnp.eye(4, 6, dtype=bool), "v": jnp.arange(5) > 1}
    tx: Any = optax.adafactor(0.1, min_dim_size_to_factor=2, momentum=0.9)
    _, state = tx.update(params, tx.init(params), params)
    cleared: Any = prune.clear_moments(state, params, masks)
    before, after = (
        {
            jax.tree_util.keystr(path): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(each)
        }
        for each in (state, cleared)
    )
    changed = {path for path in before if bool((before[path] != after[path]).any())}
    assert len(changed) == 3, changed  # v's full second moment, and both momenta
    assert all("v_row" not in path and "v_col" not in path for path in changed)


def test_moments_of_integers_and_of_a_lone_array():
    params = {"ids": jnp.arange(4), "w": jnp.ones(2)}
    masks = {"ids": jnp.array(True), "w": jnp.array([False, True])}
    state = optax.TraceState({"ids": jnp.arange(4), "w": jnp.ones(2)})
    cleared: Any = prune.clear_moments(state, params, masks)
    assert cleared.trace["ids"].dtype == params["ids"].dtype
    np.testing.assert_array_equal(cleared.trace["ids"], [0, 1, 2, 3])
    np.testing.assert_array_equal(cleared.trace["w"], [0, 1])
    tx: Any = optax.inject_hyperparams(optax.adam)(learning_rate=0.1)
    lone = jnp.ones(3)
    _, state = tx.update(lone, tx.init(lone), lone)
    done: Any = prune.clear_moments(state, lone, jnp.array([True, False, True]))
    np.testing.assert_array_equal(done.inner_state[0].mu != 0, [True, False, True])
    assert float(done.hyperparams["learning_rate"]) == pytest.approx(0.1)


def test_moments_in_an_nnx_optimizer_are_cleared(images):
    model = NnxNet(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        gradients = nnx.grad(lambda model: jnp.sum(model(images) ** 2))(model)
        optimizer.update(model, gradients)

    step(model, optimizer)
    params = nnx.state(model, nnx.Param)
    masks = jax.tree.map(half, params)
    states: Any = jax.jit(prune.clear_moments)(optimizer.opt_state, params, masks)
    assert zeros_at(states[0].mu, masks) and zeros_at(states[0].nu, masks)
    assert any(bool((leaf != 0).any()) for leaf in jax.tree.leaves(states[0].mu))


def test_masks_that_do_not_fit_are_refused_by_clear_moments():
    with pytest.raises(ValueError, match="masks and params are different trees"):
        prune.clear_moments((), {"a": jnp.ones(2)}, {"b": jnp.array(True)})
    with pytest.raises(TypeError, match="a mask must be boolean"):
        prune.clear_moments((), {"a": jnp.ones(2)}, {"a": jnp.ones(2)})


# sparse_training


def rules():
    fisher_like = prune.Criterion(
        init=lambda params: jax.tree.map(jnp.zeros_like, params),
        update=lambda state, params, gradients: jax.tree.map(
            lambda s, g: s + jnp.square(g), state, gradients
        ),
        score=lambda state, params: jax.tree.map(lambda s, w: s * jnp.square(w), state, params),
    )
    select = partial(prune.topk_masks, where="kernel|vector|channels")
    return {
        "gradual": prune.gradual(prune.cubic_schedule(0.7, 1, 9), EVERY, select=select),
        "criterion": prune.gradual(prune.cubic_schedule(0.7, 1, 9), 1, fisher_like, select),
        "set": prune.set_rule(jax.random.key(5), odd_masks(), EVERY, 0.4),
        "rigl": prune.rigl(odd_masks(), END, EVERY, 0.5),
    }


INNERS = {
    "adamw": optax.adamw(0.05, weight_decay=0.1),
    "clipped": optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1, momentum=0.9)),
}


def start(tx, params):
    state = tx.init(params)
    return prune.apply_masks(params, prune.current_masks(state)), state


@pytest.mark.parametrize(
    ("name", "inner"),
    [
        ("gradual", "adamw"),
        ("criterion", "adamw"),
        ("set", "adamw"),
        ("rigl", "adamw"),
        ("rigl", "clipped"),
    ],
)
def test_zeros_and_density_are_exact_at_every_step(name, inner):
    chex.clear_trace_counter()
    tx = sparse(INNERS[inner], rules()[name])

    @jax.jit
    @chex.assert_max_traces(1)
    def step(params, state):
        updates, state = tx.update(gradient_at(params, state.count), state, params)
        return added(params, updates), state

    params, state = start(tx, odd_params())
    first = kept_per_leaf(state.masks)
    for count in range(14):
        before = state.masks
        params, state = step(params, state)
        masks = prune.current_masks(state)
        assert zeros_at(params, masks)
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(params))
        moments = [
            node
            for node in jax.tree.leaves(state.inner, is_leaf=lambda n: isinstance(n, dict))
            if isinstance(node, dict)
        ]
        assert moments and all(zeros_at(moment, masks) for moment in moments)
        if name in ("set", "rigl"):
            assert kept_per_leaf(masks) == first
        else:
            every = EVERY if name == "gradual" else 1
            level = oracles.cubic_sparsity(count - count % every, 0.7, 1, 9)
            for leaf in ("kernel", "vector", "channels"):
                size = params[leaf].size
                assert abs(int((~masks[leaf]).sum()) - size * level) < 0.51
            lost = jax.tree.map(lambda new, old: bool((new & ~old).any()), masks, before)
            assert not any(jax.tree.leaves(lost))
        assert bool(masks["bias"]) and bool(masks["scalar"])


@pytest.mark.parametrize("name", ["criterion", "set"])
def test_a_scan_equals_the_loop_and_a_checkpoint_goes_on(name):
    tx = sparse(optax.adam(0.05), rules()[name])

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(gradient_at(params, state.count), state, params)
        return (added(params, updates), state), None

    one, begin = jax.jit(step), start(tx, odd_params())
    looped = begin
    for _ in range(5):
        looped, _ = one(looped, None)
    leaves, treedef = jax.tree.flatten(looped)
    saved = serialization.msgpack_serialize([np.asarray(leaf) for leaf in leaves])
    restored = [jnp.asarray(leaf) for leaf in serialization.msgpack_restore(saved)]
    resumed = jax.tree.unflatten(treedef, restored)
    for _ in range(4):
        resumed, _ = one(resumed, None)
        looped, _ = one(looped, None)
    chex.assert_trees_all_equal(resumed, looped)
    scanned, _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=9))(begin)
    chex.assert_trees_all_close(scanned, looped, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(scanned[1].masks, looped[1].masks)


def test_the_inner_transform_sees_gradients_of_kept_weights_and_the_rule_all():
    masks = {"w": jnp.array([True, False])}
    rule = prune.SparseRule(
        init=lambda params: (masks, jax.tree.map(jnp.zeros_like, params)),
        observe=lambda state, params, gradients: gradients,
        due=lambda count: count < 0,
        change=lambda state, step: (
            prune.SparseChange(step.masks, masks, step.updates, step.inner),
            state,
        ),
    )
    tx = sparse(optax.trace(0.5), rule)
    params = {"w": jnp.array([1.0, 0.0])}
    updates, state = tx.update({"w": jnp.array([3.0, 4.0])}, tx.init(params), params)
    np.testing.assert_array_equal(state.inner.trace["w"], [3, 0])
    np.testing.assert_array_equal(state.rule["w"], [3, 4])
    np.testing.assert_array_equal(updates["w"], [3, 0])


def test_rigl_moves_connections_as_the_paper_says():
    params, masks = odd_params(), odd_masks()
    tx = sparse(optax.sgd(0.1, momentum=0.9), prune.rigl(masks, END, EVERY, 0.5))
    update = jax.jit(tx.update)
    params, state = start(tx, params)
    moved = 0
    for count in range(13):
        gradients = gradient_at(params, count)
        updates, new = update(gradients, state, params)
        due = count in (3, 6, 9)
        for leaf in params:
            before, after = np.asarray(state.masks[leaf]), np.asarray(new.masks[leaf])
            if due and leaf in ("kernel", "vector"):
                expected = oracles_transforms.rigl_mask(
                    params[leaf], before, gradients[leaf], count, END, 0.5
                ).reshape(before.shape)
                np.testing.assert_array_equal(after, expected)
                grown = after & ~before
                moved += grown.sum()
                value = np.asarray(params[leaf] + updates[leaf])
                np.testing.assert_array_equal(value, np.where(after & before, params[leaf], 0))
                trace = np.asarray(state.inner[0].trace[leaf])
                expected = np.where(after & before, trace, 0)
                np.testing.assert_array_equal(new.inner[0].trace[leaf], expected)
            else:
                np.testing.assert_array_equal(after, before)
                assert due == (not np.any(updates[leaf]))
        params, state = added(params, updates), new
    assert moved > 5


def test_set_keeps_the_outermost_weights_and_grows_new_ones():
    fraction = 0.4
    params, masks = odd_params(), odd_masks()
    rule = prune.set_rule(
        jax.random.key(6), masks, 2, fraction, lambda key, shape, dtype: jnp.full(shape, 7.0, dtype)
    )
    tx = sparse(optax.sgd(0.1, momentum=0.9), rule)
    update = jax.jit(tx.update)
    params, state = start(tx, params)
    for count in range(3):
        before, old_masks = state, state.masks
        gradients = gradient_at(params, count)
        updates, state = update(gradients, state, params)
        old, params = params, added(params, updates)
    inner: Any = optax.sgd(0.1, momentum=0.9)
    kept = jax.tree.map(lambda g, m: jnp.where(m, g, 0), gradients, old_masks)
    after: Any = added(old, inner.update(kept, before.inner, old)[0])
    for leaf in ("kernel", "vector"):
        outermost = oracles_transforms.set_kept(after[leaf], np.asarray(old_masks[leaf]), fraction)
        new = np.asarray(state.masks[leaf])
        assert new.sum() == old_masks[leaf].sum() and not (outermost & ~new).any()
        np.testing.assert_allclose(params[leaf][outermost], after[leaf][outermost], rtol=1e-6)
        grown = new & ~outermost
        np.testing.assert_allclose(params[leaf][grown], 7.0, rtol=1e-6)
        assert not np.any(state.inner[0].trace[leaf][grown])
        assert grown.any()
    np.testing.assert_array_equal(state.masks["channels"], masks["channels"])


def test_set_grows_everywhere_alike():
    masks = {"w": jnp.arange(12) < 4}

    def grown(key):
        tx = sparse(optax.sgd(0.0), prune.set_rule(key, masks, 1, 1.0))
        params = {"w": jnp.where(masks["w"], 1.0, 0.0)}
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update({"w": jnp.zeros(12)}, state, params)
            params = added(params, updates)
        return state.masks["w"], params["w"]

    found, values = jax.jit(jax.vmap(grown))(jax.random.split(jax.random.key(0), 900))
    assert bool((found.sum(1) == 4).all())
    np.testing.assert_allclose(found.mean(0), 1 / 3, atol=0.07)
    drawn = values[found]
    assert abs(float(drawn.mean())) < 0.01 and float(drawn.std()) == pytest.approx(0.1, abs=0.01)


@settings(max_examples=15)
@given(seed=st.integers(0, 99), extremes=st.sampled_from([jnp.nan, jnp.inf, 0.0]))
def test_density_survives_nan_infinity_and_ties(seed, extremes):
    update, tx = _hostile()
    keys = jax.random.split(jax.random.key(seed), 2)
    params = {"w": jnp.round(jax.random.normal(keys[0], (4, 5)))}
    params, state = start(tx, params)
    for _ in range(3):
        hit = jax.random.bernoulli(keys[1], 0.7, (4, 5))
        gradients = {"w": jnp.where(hit, extremes, params["w"])}
        updates, state = update(gradients, state, params)
        assert int(state.masks["w"].sum()) == 9
        held: Any = added(params, updates)
        params = jax.tree.map(jnp.nan_to_num, held)


def _hostile(made=[]):  # noqa: B006  (one compilation for all examples)
    if not made:
        tx = sparse(optax.sgd(0.1), prune.rigl({"w": jnp.arange(20).reshape(4, 5) < 9}, 99, 1, 0.6))
        made.append((jax.jit(tx.update), tx))
    return made[0]


def test_gradual_counts_are_exact_for_scores_that_rank_removed_weights_first():
    # What lost first would win later; NaN and -infinity must still beat what is removed.
    scores = jnp.array([[5.0, jnp.nan, -jnp.inf, 1.0]])
    turned = prune.Criterion(
        init=lambda params: 0,
        update=lambda state, params, gradients: state + 1,
        score=lambda state, params: {"w": jnp.where(state == 1, scores, -scores)},
    )
    schedule = prune.one_shot_schedule(0.5, 0)
    tx = sparse(optax.sgd(0.0), prune.gradual(schedule, 1, turned))
    params = {"w": jnp.ones((1, 4))}
    state = tx.init(params)
    for _ in range(3):
        _, state = tx.update({"w": jnp.ones((1, 4))}, state, params)
        np.testing.assert_array_equal(state.masks["w"], [[True, False, False, True]])


def test_gradual_equals_prune_gradually(network, images):
    apply, params = network
    gradient = jax.grad(lambda params: jnp.sum(apply(params, images) ** 2))
    schedule = prune.cubic_schedule(0.8, 1, 4)
    both = (
        optax.chain(optax.sgd(0.01), prune.prune_gradually(schedule, 2)),
        sparse(optax.sgd(0.01), prune.gradual(schedule, 2)),
    )
    ends = []
    for tx in both:

        @jax.jit
        def step(params, state, tx=tx):
            updates, state = tx.update(gradient(params), state, params)
            return added(params, updates), state

        now, state = params, tx.init(params)
        for _ in range(6):
            now, state = step(now, state)
        ends.append((now, prune.current_masks(state)))
    chex.assert_trees_all_close(*ends, rtol=1e-5, atol=1e-7)


def test_sparse_training_works_in_an_nnx_optimizer(images):
    model = NnxNet(nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    masks = jax.tree.map(lambda leaf: half(leaf) if leaf.ndim > 1 else jnp.array(True), params)
    nnx.update(model, prune.apply_masks(params, masks))
    tx = sparse(optax.adamw(0.05), prune.rigl(masks, 10, 1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        gradients = nnx.grad(lambda model: jnp.sum(model(images) ** 2))(model)
        optimizer.update(model, gradients)

    for _ in range(3):
        step(model, optimizer)
    now = prune.current_masks(optimizer.opt_state)
    assert zeros_at(nnx.state(model, nnx.Param), now)
    assert kept_per_leaf(now) == kept_per_leaf(masks)
    moved = [bool((a != b).any()) for a, b in zip(*map(jax.tree.leaves, (now, masks)), strict=True)]
    assert any(moved)


def test_nothing_of_a_rule_runs_between_changes():
    tx = sparse(optax.sgd(0.1), prune.rigl({"w": jnp.ones((8, 8), bool)}, 100, 10))
    params = {"w": jnp.ones((8, 8))}
    jaxpr: Any = jax.make_jaxpr(tx.update)(params, tx.init(params), params)
    (inner,) = jaxpr.jaxpr.eqns
    inside = inner.params["jaxpr"].jaxpr.eqns
    (choice,) = [equation for equation in inside if equation.primitive.name == "cond"]
    assert not {"while", "cumsum", "reduce_sum"} & {each.primitive.name for each in inside}
    assert sorted(len(branch.jaxpr.eqns) for branch in choice.params["branches"])[0] == 0


def test_masks_are_arguments_of_the_compiled_step():
    masks = {"w": jax.random.bernoulli(jax.random.key(0), 0.5, (256, 256))}
    params = {"w": jnp.ones((256, 256))}
    tx = sparse(optax.sgd(0.1), prune.set_rule(jax.random.key(0), masks, 10))
    text = jax.jit(tx.update).lower(params, tx.init(params), params).as_text()
    assert len(text) < 150_000 and 'dense<"0x' not in text


def test_set_leaves_the_masks_alone_after_its_end():
    masks = {"w": jnp.arange(12) < 4}
    tx = sparse(optax.sgd(0.0), prune.set_rule(jax.random.key(0), masks, 1, 0.5, end=3))
    params = {"w": jnp.where(masks["w"], 1.0, 0.0)}
    state, found = tx.init(params), []
    for _ in range(6):
        updates, state = tx.update({"w": jnp.zeros(12)}, state, params)
        params = added(params, updates)
        found.append(state.masks["w"].tolist())
    assert found[0] != found[1] != found[2] == found[3] == found[5]


def test_strict_dtypes_and_narrow_leaves():
    params = {"w": jax.random.normal(jax.random.key(0), (6, 4), jnp.bfloat16)}
    masks = prune.topk_masks(prune.magnitude_scores(params), 0.5)
    for rule in (
        prune.rigl(masks, 10, 1),
        prune.set_rule(jax.random.key(0), masks, 1),
        prune.gradual(prune.cubic_schedule(0.5, 0, 4)),
    ):
        tx = sparse(optax.trace(0.9), rule)
        with jax.numpy_dtype_promotion("strict"):
            state = tx.init(params)
            updates, after = jax.eval_shape(tx.update, params, state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
        assert updates["w"].dtype == jnp.bfloat16


def test_rules_say_what_they_need():
    key, masks = jax.random.key(0), {"w": jnp.array(True)}
    bad: Any
    for bad in (0, 1.5, True):
        for make in (
            lambda every: prune.gradual(lambda n: 0.5, every),
            lambda every: prune.set_rule(key, masks, every),
            lambda every: prune.rigl(masks, 10, every),
        ):
            with pytest.raises(ValueError, match="every must be a whole number"):
                make(bad)
    with pytest.raises(ValueError, match=r"fraction must lie in \[0, 1\], not 1.5"):
        prune.set_rule(key, masks, 1, 1.5)
    with pytest.raises(ValueError, match=r"fraction must lie in \[0, 1\], not -0.1"):
        prune.rigl(masks, 10, 1, -0.1)
    with pytest.raises(ValueError, match="end must be a number of updates"):
        prune.rigl(masks, 0)
    with pytest.raises(ValueError, match="end must be None or a number of updates.* not 0"):
        prune.set_rule(key, masks, 1, end=0)
    tx = sparse(optax.sgd(0.1), prune.rigl(masks, 10))
    with pytest.raises(ValueError, match="sparse_training needs the parameters"):
        tx.update({"w": jnp.ones(2)}, tx.init({"w": jnp.ones(2)}))
    with pytest.raises(ValueError, match="different trees"):
        tx.init({"v": jnp.ones(2)})


@pytest.mark.parametrize("initial", [0.0, 0.3])
def test_schedules_follow_their_formulas(initial):
    cubic: Any = prune.cubic_schedule(0.9, 3, 7, initial)
    jump: Any = prune.one_shot_schedule(0.9, 4)
    for count in range(15):
        part = min(max(count - 3, 0) / 7, 1)
        expected = 0.9 + (initial - 0.9) * (1 - part) ** 3
        assert float(cubic(count)) == pytest.approx(expected, abs=1e-6)
        assert float(jump(jnp.int32(count))) == pytest.approx(0.9 if count >= 4 else 0.0)
    with pytest.raises(ValueError, match=r"final must lie in \[0, 1\], not 1.2"):
        prune.cubic_schedule(1.2, 0, 5)
    with pytest.raises(ValueError, match="steps 1, not 0 and 0"):
        prune.cubic_schedule(0.5, 0, 0)
    with pytest.raises(ValueError, match="step be 0 or more"):
        prune.one_shot_schedule(0.5, -1)


# Dynamic network surgery


def test_surgery_masks_follow_the_oracle(variant):
    weights = jax.random.normal(jax.random.key(0), (20, 30))
    mask = jax.random.bernoulli(jax.random.key(1), 0.5, (20, 30))
    for multiplier in (-3.0, 0.0, 0.7):
        level = variant(prune.surgery_threshold)(weights, multiplier)
        got = variant(prune.surgery_mask)(weights, mask, level)
        expected = oracles_transforms.surgery_mask(weights, mask, multiplier)
        np.testing.assert_array_equal(got, expected)
        assert (multiplier == -3.0) == bool(got.all())


def test_surgery_trains_all_weights_and_splices_some_in_again(network, images):
    chex.clear_trace_counter()
    apply, params = network
    targets = jax.random.normal(jax.random.key(1), (2, 3))
    multiplier = lambda path, leaf: 0.3 if path.startswith("hidden") else 0.1  # noqa: E731
    tx: Any = optax.chain(surgery(jax.random.key(0), multiplier), optax.adam(0.02))

    def loss(params, masks):
        return jnp.mean((apply(prune.masked_params(params, masks), images) - targets) ** 2)

    @jax.jit
    @chex.assert_max_traces(1)
    def step(params, state):
        value, gradients = jax.value_and_grad(loss)(params, prune.current_masks(state))
        updates, state = tx.update(gradients, state, params)
        return added(params, updates), state, value

    state, values, spliced = tx.init(params), [], 0
    for _ in range(40):
        before = prune.current_masks(state)
        params, state, value = step(params, state)
        values.append(float(value))
        pairs = zip(*map(jax.tree.leaves, (prune.current_masks(state), before)), strict=True)
        spliced += sum(int((new & ~old).sum()) for new, old in pairs)
    masks = prune.current_masks(state)
    paths, leaves, _ = flatten_with_paths(masks)
    shapes = {path: leaf.shape for path, leaf in zip(paths, leaves, strict=True)}
    assert shapes["head/bias"] == () and shapes["head/kernel"] == (8, 3)
    assert 0.3 < float(prune.sparsity(prune.apply_masks(params, masks))) < 0.9
    assert float(prune.sparsity(params)) < 0.01 and spliced > 0
    assert values[-1] < 0.5 * max(values)


def test_surgery_happens_with_its_probability_and_per_leaf():
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    tx = surgery(jax.random.key(2), 0.0, lambda count: 0.25)
    state = tx.init(params)

    def step(state, index):
        small = jax.tree.map(lambda leaf: 0.0 * leaf, params)
        _, new = tx.update(params, state, small)
        cut = jnp.stack([~new.masks[name].any() for name in ("a", "b")])
        return state._replace(count=new.count), cut

    _, cut = jax.jit(lambda state: jax.lax.scan(step, state, jnp.arange(2000)))(state)
    np.testing.assert_allclose(cut.mean(0), 0.25, atol=0.04)
    assert float((cut[:, 0] & cut[:, 1]).mean()) == pytest.approx(0.0625, abs=0.02)
    never = surgery(jax.random.key(2), 0.0, optax.constant_schedule(0.0))
    state = never.update(params, never.init(params), jax.tree.map(jnp.zeros_like, params))[1]
    assert all(bool(mask.all()) for mask in jax.tree.leaves(prune.current_masks(state)))
    assert prune.inverse_decay(0.1, 2.0)(10) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="rate and power must be 0 or more"):
        prune.inverse_decay(-1.0)
    with pytest.raises(ValueError, match="network_surgery needs the parameters"):
        tx.update(params, state)
    with pytest.raises(ValueError, match="matches no leaf"):
        surgery(jax.random.key(0), 0.0, where="none").init(params)


# Rewinding


@pytest.mark.parametrize("step", [0, 2, 9])
def test_remember_keeps_the_parameters_of_its_step(step):
    tx: Any = optax.chain(optax.sgd(0.1), prune.remember(step))
    params = {"w": jnp.array([1.0, 2.0])}

    def advance(carry, _):
        params, state = carry
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        new: Any = added(params, updates)
        return (new, state), new["w"]

    (_, state), history = jax.lax.scan(advance, (params, tx.init(params)), length=5)
    seen = jnp.concatenate([params["w"][None], history])
    if step >= 5:
        with pytest.raises(ValueError, match=r"remember\(9\) takes it .* there were 5"):
            prune.rewound(state)
        return
    expected = seen[step]
    np.testing.assert_array_equal(prune.rewound(state)["w"], expected)
    cleared: Any = prune.clear_moments(state, params, {"w": jnp.array([True, False])})
    np.testing.assert_array_equal(prune.rewound(cleared)["w"], expected)


def test_remember_says_what_it_needs():
    bad: Any
    for bad in (-1, 0.5, True):
        with pytest.raises(ValueError, match="step must be a whole number of updates"):
            prune.remember(bad)
    with pytest.raises(ValueError, match="the copy of one `remember`, not of 0"):
        prune.rewound(optax.sgd(0.1).init({"w": jnp.ones(1)}))
    with pytest.raises(ValueError, match="remember needs the parameters"):
        prune.remember(1).update({}, prune.remember(1).init({}))


@given(final=st.floats(0, 0.99), rounds=st.integers(1, 12))
def test_each_round_removes_the_same_part_of_what_is_left(final, rounds):
    levels = prune.iterative_sparsities(final, rounds)
    left = 1 - np.array([0.0, *levels])
    np.testing.assert_allclose(left[1:] / left[:-1], (1 - final) ** (1 / rounds), rtol=1e-9)
    assert len(levels) == rounds and levels[-1] == final


def test_iterative_pruning_says_what_it_needs():
    with pytest.raises(ValueError, match=r"final must lie in \[0, 1\), not 1.0"):
        prune.iterative_sparsities(1.0, 2)
    with pytest.raises(ValueError, match="rounds must be at least 1, not 0"):
        prune.iterative_sparsities(0.5, 0)
    with pytest.raises(ValueError, match="sparsities must not fall"):
        prune.iterative_pruning(lambda p, m, s: p, {"w": jnp.ones((2, 2))}, 0, [0.5, 0.2])
    with pytest.raises(ValueError, match="start_step must be 0 or more, not -1"):
        prune.iterative_pruning(lambda p, m, s: p, {"w": jnp.ones((2, 2))}, -1, [0.5])


@pytest.mark.parametrize("rewind", [prune.rewind_weights, prune.keep_weights])
def test_tickets_start_from_rewound_weights_and_lose_the_smallest(network, images, rewind):
    apply, params = network
    gradient = jax.grad(lambda params: jnp.mean(apply(params, images) ** 2))
    starts = []

    @jax.jit
    def run(params, masks, start_step):
        tx: Any = optax.chain(
            optax.sgd(optax.linear_schedule(0.5, 0.0, 6)), prune.keep_masked(masks)
        )
        state = tx.init(params)
        state = jax.tree.map(  # the schedule starts at start_step
            lambda leaf: start_step if leaf.dtype == jnp.int32 else leaf, state
        )

        def step(_, carry):
            params, state = carry
            updates, state = tx.update(gradient(params), state, params)
            return added(params, updates), state

        return jax.lax.fori_loop(0, 6 - start_step, step, (params, state))[0]

    def train(params, masks, start_step):
        starts.append(params)
        return run(params, masks, jnp.int32(start_step))

    levels = prune.iterative_sparsities(0.8, 3)
    rounds = list(prune.iterative_pruning(train, params, 2, levels, rewind))
    assert [each.sparsity for each in rounds] == [0.0, *levels]
    trained = params
    for index, each in enumerate(rounds):
        assert zeros_at(each.params, each.masks)
        assert float(prune.sparsity(each.params)) == pytest.approx(each.sparsity, abs=1e-3)
        if index:
            source = params if rewind is prune.rewind_weights else trained
            chex.assert_trees_all_equal(starts[index], prune.apply_masks(source, each.masks))
            expected = prune.global_topk_masks(prune.magnitude_scores(trained), each.sparsity)
            chex.assert_trees_all_equal(each.masks, expected)
        trained = each.params


@pytest.mark.parametrize("make", [prune.gradual, prune.prune_gradually])
def test_schedules_that_ask_for_what_there_is_not_are_refused(make):
    with pytest.raises(ValueError, match=r"in \[0, 1\), not 1\.0 at update 0"):
        make(optax.constant_schedule(1.0))
    with pytest.raises(ValueError, match=r"in \[0, 1\), not 1\.5 at update 100000000"):
        make(optax.linear_schedule(0.0, 1.5, 50))
    make(lambda count: count / 10)  # unbounded, but so is no training
    with pytest.raises(TypeError, match=r"schedule must be a function .*, not 0\.5"):
        make(0.5)


def test_masks_of_other_containers_serve():
    """Plain dicts, as a file or a search by path gives them, for an nnx State."""
    params = nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    kernel = jnp.array([[True, False], [False, True], [True, True]])
    masks = {"bias": True, "kernel": kernel}
    growing = sparse(optax.sgd(1.0), prune.rigl(masks, 9, 1))
    for tx in (prune.keep_masked(masks), growing):
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(params, state, params)
            params = optax.apply_updates(params, updates)
        assert jax.tree.structure(prune.current_masks(state)) == jax.tree.structure(params)
        zeros = [int((leaf == 0).sum()) for leaf in jax.tree.leaves(params)]
        assert max(zeros) >= 2  # of the kernel


def test_moments_in_one_vector_are_cleared():
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(4)}
    masks = {"a": jnp.array([[True, False, True]]), "b": jnp.array(True)}
    tx = optax.flatten(optax.adam(0.1))
    _, state = tx.update(params, tx.init(params), params)
    cleared = prune.clear_moments(state, params, masks)
    zeros = np.array([0, 1, 0, 0, 1, 0] + [0] * 4, bool)
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(cleared), strict=True):
        expected = np.where(zeros, 0, before) if np.shape(before) == (10,) else before
        np.testing.assert_array_equal(after, expected)
    assert any(np.shape(leaf) == (10,) for leaf in jax.tree.leaves(state))


def test_a_copy_that_was_not_taken_is_an_error():
    tx, params = prune.remember(2), {"w": jnp.ones(3)}
    state = tx.init(params)
    for count in range(3):
        with pytest.raises(ValueError, match=rf"remember\(2\) takes it .* there were {count}"):
            prune.rewound(state)
        _, state = tx.update(params, state, {"w": jnp.full(3, float(count))})
    np.testing.assert_array_equal(prune.rewound(state)["w"], np.full(3, 2))


def test_sparsities_out_of_range_stop_before_the_first_training():
    def train(params, masks, start_step):
        raise AssertionError("nothing must be trained")

    with pytest.raises(
        ValueError, match=r"sparsities must lie in \[0, 1\), but they are \[0\.5, 1"
    ):
        prune.iterative_pruning(train, {"w": jnp.ones((2, 2))}, 0, [0.5, 1.5])
