"""Losses on logits and features against transcriptions of the papers, and what all promise."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jopt import distill
from tests import oracles_distill as oracles

RNG = np.random.default_rng(0)
LOGITS = 2 * RNG.normal(size=(6, 5)).astype(np.float32)
TEACHER = 3 * RNG.normal(size=(6, 5)).astype(np.float32)
LABELS = jnp.array([0, 4, 2, 2, 1, 3])
MAPS = RNG.normal(size=(4, 3, 2, 5)).astype(np.float32)
TEACHER_MAPS = RNG.normal(size=(4, 3, 2, 5)).astype(np.float32)
WIDE_MAPS = RNG.normal(size=(4, 3, 2, 7)).astype(np.float32)
RAW = RNG.normal(size=5).astype(np.float32)


def dkd(s, t):
    return distill.dkd_loss(s, t, LABELS, alpha=0.7, beta=3.0, temperature=2.0)


def flow(s, t):
    return distill.flow_loss((s, s**2), (t, t**2))


LOSSES = {
    "kd": (lambda s, t: distill.kd_loss(s, t, 3.0), lambda s, t: oracles.kd(s, t, 3.0), LOGITS),
    "reverse": (
        lambda s, t: distill.reverse_kd_loss(s, t, 2.0),
        lambda s, t: oracles.reverse_kd(s, t, 2.0),
        LOGITS,
    ),
    "jensen-shannon": (
        lambda s, t: distill.jensen_shannon_loss(s, t, 0.3, 2.0),
        lambda s, t: oracles.jensen_shannon(s, t, 0.3, 2.0),
        LOGITS,
    ),
    "dkd": (dkd, lambda s, t: oracles.dkd(s, t, LABELS, 0.7, 3.0, 2.0), LOGITS),
    "dist": (
        lambda s, t: distill.dist_loss(s, t, 2.0, 0.5, 3.0),
        lambda s, t: oracles.dist(s, t, 2.0, 0.5, 3.0),
        LOGITS,
    ),
    "hint": (
        distill.hint_loss,
        lambda s, t: ((np.float64(s) - np.float64(t)) ** 2).mean((1, 2, 3)),
        MAPS,
    ),
    "attention": (
        distill.attention_transfer_loss,
        lambda s, t: oracles.attention_transfer(s, t, 2),
        MAPS,
    ),
    "attention, cubed": (
        lambda s, t: distill.attention_transfer_loss(s, t, 3),
        lambda s, t: oracles.attention_transfer(s, t, 3),
        MAPS,
    ),
    "flow": (
        flow,
        lambda s, t: ((oracles.flow(s, s**2) - oracles.flow(t, t**2)) ** 2).mean((1, 2)),
        MAPS,
    ),
    "selectivity": (distill.neuron_selectivity_loss, oracles.neuron_selectivity, MAPS),
    "vid": (
        lambda s, t: distill.vid_loss(s, t, jnp.asarray(RAW)),
        lambda s, t: oracles.vid(s, t, RAW),
        MAPS,
    ),
}
every_loss = pytest.mark.parametrize(
    ("loss", "oracle", "student"), LOSSES.values(), ids=LOSSES.keys()
)


def teacher_of(student):
    return TEACHER if student.ndim == 2 else TEACHER_MAPS


@every_loss
def test_each_loss_matches_its_paper(variant, loss, oracle, student):
    with jax.numpy_dtype_promotion("strict"):
        losses = variant(loss)(jnp.asarray(student), jnp.asarray(teacher_of(student)))
    assert losses.shape == student.shape[:1] and losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, oracle(student, teacher_of(student)), rtol=2e-5, atol=2e-6)


@every_loss
def test_each_gradient_is_the_slope_of_the_paper(loss, oracle, student):
    teacher = teacher_of(student)
    gradient = jax.grad(lambda s: loss(s, jnp.asarray(teacher)).sum())(jnp.asarray(student))
    step = 1e-6
    for place in [(0,) * student.ndim, tuple(n - 1 for n in student.shape)]:
        high, low = (np.array(student, np.float64) for _ in range(2))
        high[place] += step
        low[place] -= step
        slope = (oracle(high, teacher).sum() - oracle(low, teacher).sum()) / (2 * step)
        np.testing.assert_allclose(gradient[place], slope, rtol=2e-3, atol=2e-5)


@every_loss
def test_a_student_that_agrees_has_nothing_to_learn(loss, oracle, student):
    del oracle
    same = jnp.asarray(student)
    losses, gradient = jax.value_and_grad(lambda s: loss(s, same).sum())(same)
    if loss is not LOSSES["vid"][0]:
        np.testing.assert_allclose(losses, 0, atol=2e-5)
    np.testing.assert_allclose(gradient, np.zeros_like(student), atol=1e-5)


@every_loss
def test_no_gradient_reaches_the_teacher(loss, oracle, student):
    del oracle
    teacher = jnp.asarray(teacher_of(student))
    gradient = jax.grad(lambda t: loss(jnp.asarray(student), t).sum())(teacher)
    chex.assert_trees_all_equal(gradient, jnp.zeros_like(teacher))


@every_loss
def test_gradients_are_finite_where_everything_is_zero(loss, oracle, student):
    del oracle
    gradient = jax.grad(lambda s: loss(s, jnp.asarray(teacher_of(student))).sum())(
        jnp.zeros_like(student)
    )
    chex.assert_tree_all_finite(gradient)


@pytest.mark.parametrize("name", ["kd", "reverse", "jensen-shannon", "dkd"])
def test_sure_networks_give_finite_losses_and_gradients(name):
    sure = jnp.where(jnp.arange(5)[None, :] == LABELS[:, None], 200.0, -200.0)
    loss = LOSSES[name][0]
    for student in (sure, jnp.roll(sure, 1, axis=0)):
        value, gradient = jax.value_and_grad(lambda s: loss(s, sure).sum())(student)
        chex.assert_tree_all_finite((value, gradient))


def test_soft_cross_entropy_is_kd_and_the_entropy_of_the_teacher():
    entropy = -np.sum(oracles.softmax(TEACHER, 2.0) * np.log(oracles.softmax(TEACHER, 2.0)), -1)
    difference = distill.soft_cross_entropy(
        jnp.asarray(LOGITS), jnp.asarray(TEACHER), 2.0
    ) - distill.kd_loss(jnp.asarray(LOGITS), jnp.asarray(TEACHER), 2.0)
    np.testing.assert_allclose(difference, 4 * entropy, rtol=1e-4)


def test_dkd_with_the_teachers_doubt_as_weight_is_kd():
    doubt = 1 - oracles.softmax(TEACHER, 4.0)[np.arange(6), np.asarray(LABELS)]
    both = distill.dkd_loss(
        jnp.asarray(LOGITS), jnp.asarray(TEACHER), LABELS, 1.0, jnp.float32(doubt), 4.0
    )
    np.testing.assert_allclose(both, oracles.kd(LOGITS, TEACHER, 4.0), rtol=2e-5)


def test_jensen_shannon_over_its_weight_tends_to_both_divergences():
    s, t = jnp.asarray(LOGITS), jnp.asarray(TEACHER)
    np.testing.assert_allclose(
        distill.jensen_shannon_loss(s, t, 1e-3) / 1e-3, oracles.kd(s, t, 1.0), rtol=0.05
    )
    np.testing.assert_allclose(
        distill.jensen_shannon_loss(s, t, 0.999) / 1e-3, oracles.reverse_kd(s, t, 1.0), rtol=0.05
    )


def test_standardized_logits_do_not_see_shift_or_scale(variant):
    standard = variant(distill.standardize_logits)(jnp.asarray(LOGITS))
    np.testing.assert_allclose(standard.mean(-1), 0, atol=1e-6)
    np.testing.assert_allclose(standard.std(-1), 1, rtol=1e-5)
    moved = distill.standardize_logits(3 * jnp.asarray(LOGITS) - 7)
    np.testing.assert_allclose(moved, standard, rtol=1e-4, atol=1e-5)
    equal = jnp.ones((2, 3))
    chex.assert_trees_all_equal(distill.standardize_logits(equal), jnp.zeros((2, 3)))
    chex.assert_tree_all_finite(jax.grad(lambda z: distill.standardize_logits(z)[0, 0])(equal))


def test_the_ensemble_is_the_mean_of_the_softened_teachers(variant):
    teachers = jnp.stack([jnp.asarray(LOGITS), jnp.asarray(TEACHER), jnp.asarray(TEACHER[::-1])])
    weights = jnp.array([1.0, 2.0, 1.0])
    joint = variant(lambda t: distill.ensemble_logits(t, weights, 3.0))(teachers)
    expected = np.tensordot([0.25, 0.5, 0.25], oracles.softmax(teachers, 3.0), 1)
    np.testing.assert_allclose(oracles.softmax(joint, 3.0), expected, rtol=1e-5)
    one = distill.ensemble_logits(teachers[:1], temperature=3.0)
    np.testing.assert_allclose(oracles.softmax(one, 3.0), oracles.softmax(LOGITS, 3.0), rtol=1e-5)


def test_teachers_of_one_shape_answer_in_one_program():
    trees = [{"w": jnp.full((5, 2), value)} for value in (1.0, -2.0)]
    inputs = jnp.asarray(LOGITS)
    logits = jax.vmap(lambda p, x: x @ p["w"], (0, None))(distill.stack_params(trees), inputs)
    for one, tree in zip(logits, trees, strict=True):
        np.testing.assert_allclose(one, inputs @ tree["w"], rtol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_a_teacher_made_of_labels_is_label_smoothing(temperature):
    logits = distill.smoothed_label_logits(LABELS, 5, 0.8)
    np.testing.assert_allclose(
        oracles.softmax(logits), np.where(np.eye(5)[np.asarray(LABELS)], 0.8, 0.05), rtol=1e-5
    )
    smooth = optax.smooth_labels(jax.nn.one_hot(LABELS, 5), 0.25)
    if temperature == 1:
        expected = optax.softmax_cross_entropy(jnp.asarray(LOGITS), smooth)
        loss = distill.soft_cross_entropy(jnp.asarray(LOGITS), logits)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert np.all(np.argmax(logits, -1) == np.asarray(LABELS))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_logits_keep_the_best_classes_and_the_rest(variant, k):
    top = variant(lambda t: distill.top_k_logits(t, k, 2.0))(jnp.asarray(TEACHER))
    full = variant(lambda top: distill.expand_top_k(top, 5))(top)
    exact = np.log(oracles.softmax(TEACHER, 2.0))
    order = np.argsort(-exact, -1)[:, :k]
    np.testing.assert_array_equal(top.indices, order)
    kept = np.take_along_axis(exact, order, -1)
    found = np.take_along_axis(np.asarray(full), order, -1)
    assert np.all(np.abs(found - kept) <= np.asarray(top.step)[:, None] * 0.501)
    rest = 1 - np.exp(kept).sum(-1)
    np.testing.assert_allclose(np.exp(top.rest), rest, atol=1e-6)
    if k < 5:
        others = np.array([np.delete(row, o) for row, o in zip(full, order, strict=True)])
        np.testing.assert_allclose(np.exp(others), np.tile(rest[:, None] / (5 - k), 5 - k), 1e-4)


def test_top_k_of_a_large_vocabulary_is_small_and_close():
    logits = jnp.asarray(4 * RNG.normal(size=(3, 70_000)).astype(np.float32))
    top = distill.top_k_logits(logits, 50)
    assert top.indices.dtype == jnp.uint32
    assert distill.top_k_logits(logits[:, :1000], 50).indices.dtype == jnp.uint16
    kept = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(top.indices), -1)
    assert np.abs(-top.step[:, None] * top.codes - kept).max() < 0.05


def test_students_that_teach_each_other(variant):
    logits = jnp.stack([jnp.asarray(LOGITS), jnp.asarray(TEACHER), jnp.asarray(LOGITS[::-1])])
    losses = variant(lambda z: distill.mutual_loss(z, LABELS, 2.0))(logits)
    np.testing.assert_allclose(losses, oracles.mutual(logits, LABELS, 2.0), rtol=2e-5)


def test_a_student_moves_towards_the_others_and_they_do_not_move_towards_it():
    logits = jnp.stack([jnp.asarray(LOGITS), jnp.asarray(TEACHER)])
    first = jax.grad(lambda z: distill.mutual_loss(z, LABELS)[0].sum())(logits)
    chex.assert_trees_all_equal(first[1], jnp.zeros_like(first[1]))
    ce = jax.grad(lambda z: optax.softmax_cross_entropy_with_integer_labels(z, LABELS).sum())(
        logits[0]
    )
    kd = jax.grad(lambda z: distill.kd_loss(z, logits[1], 1.0).sum())(logits[0])
    np.testing.assert_allclose(first[0], ce + kd, rtol=1e-4, atol=1e-6)


def test_projectors_are_dense_layers_of_the_last_axis():
    projector = distill.init_projector(jax.random.key(0), 400, 300)
    np.testing.assert_allclose(projector["kernel"].std(), 0.05, rtol=0.02)
    maps = jnp.ones((2, 3, 3, 400))
    out = distill.project(projector, maps)
    assert out.shape == (2, 3, 3, 300)
    np.testing.assert_allclose(out[1, 2, 0], projector["kernel"].sum(0), rtol=1e-3, atol=1e-4)


def test_maps_are_averaged_down_and_interpolated_otherwise():
    maps = jnp.asarray(RNG.normal(size=(2, 4, 6, 3)).astype(np.float32))
    halved = distill.resize_maps(maps, (2, 3))
    np.testing.assert_allclose(halved[0, 1, 2], maps[0, 2:, 4:].mean((0, 1)), rtol=1e-5, atol=1e-6)
    assert distill.resize_maps(maps, (3, 5)).shape == (2, 3, 5, 3)
    np.testing.assert_allclose(distill.resize_maps(jnp.ones_like(maps), (3, 7)), 1, rtol=1e-5)


def test_student_and_projector_learn_in_one_chain():
    teacher = jnp.asarray(RNG.normal(size=(8, 6)).astype(np.float32))
    inputs = jnp.asarray(RNG.normal(size=(8, 8)).astype(np.float32))
    params: dict[str, Any] = {
        "student": {"kernel": jnp.asarray(RNG.normal(size=(8, 4)).astype(np.float32))},
        "projector": distill.init_projector(jax.random.key(1), 4, 6),
    }
    tx = optax.adam(3e-2)

    def loss(params):
        features = inputs @ params["student"]["kernel"]
        return distill.hint_loss(distill.project(params["projector"], features), teacher).mean()

    def step(carry: Any, _: Any) -> Any:
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradient, state)
        return (optax.apply_updates(params, updates), state), value

    trained: Any
    (trained, _), values = jax.lax.scan(step, (params, tx.init(params)), length=300)
    assert values[-1] < 0.3 * values[0]
    for name in params:
        assert not np.allclose(trained[name]["kernel"], params[name]["kernel"])


def test_each_student_of_a_chain_learns_from_the_one_before():
    """Born-again students of a linear teacher, each trained on the answers of the last."""
    inputs = jnp.asarray(RNG.normal(size=(32, 4)).astype(np.float32))
    teacher = jnp.asarray(RNG.normal(size=(4, 3)).astype(np.float32))
    asked = []

    def train(teacher):
        asked.append(teacher)
        tx = optax.adam(0.1)

        def step(carry, _):
            params, state = carry
            gradient = jax.grad(
                lambda p: distill.kd_loss(inputs @ p, inputs @ teacher, 1.0).mean()
            )(params)
            updates, state = tx.update(gradient, state)
            return (optax.apply_updates(params, updates), state), None

        start = jnp.zeros((4, 3))
        return jax.lax.scan(step, (start, tx.init(start)), length=200)[0][0]

    students: Any = distill.distill_chain(teacher, [train, train])
    assert asked[0] is teacher and asked[1] is students[0] and len(students) == 2
    joint = distill.ensemble_logits(inputs @ jnp.stack(students))
    assert distill.kd_loss(joint, inputs @ teacher, 1.0).mean() < 1e-2
    with pytest.raises(ValueError, match="students must hold at least one function"):
        distill.distill_chain(teacher, [])


def test_weights_may_be_schedules(variant):
    losses = {"hint": jnp.array([1.0, 2.0]), "kd": jnp.array([10.0, 20.0])}
    schedule = optax.linear_schedule(1.0, 0.0, 10)
    total = variant(lambda step: distill.weighted_sum(losses, {"hint": schedule, "kd": 2.0}, step))
    np.testing.assert_allclose(total(jnp.int32(5)), [20.5, 41.0])
    np.testing.assert_allclose(total(jnp.int32(50)), [20.0, 40.0])


def test_bad_arguments_are_named():
    s, t = jnp.asarray(LOGITS), jnp.asarray(TEACHER)
    maps = jnp.asarray(MAPS)
    for loss in (distill.kd_loss, distill.reverse_kd_loss, distill.jensen_shannon_loss):
        with pytest.raises(ValueError, match=r"same shape, .* not \(6, 5\) and \(6, 4\)"):
            loss(s, t[:, :4])
        with pytest.raises(ValueError, match=r"temperature must be positive, not -1\.0"):
            loss(s, t, temperature=-1.0)
    with pytest.raises(
        ValueError, match=r"beta must lie between 0 and 1, with kd_loss .* not 1\.0"
    ):
        distill.jensen_shannon_loss(s, t, 1.0)
    with pytest.raises(ValueError, match="at least 2 classes, not 1"):
        distill.dkd_loss(s[:, :1], t[:, :1], LABELS)
    with pytest.raises(ValueError, match=r"labels must have shape \(6,\)"):
        distill.dkd_loss(s, t, LABELS[:3])
    with pytest.raises(ValueError, match=r"\(examples, classes\), not \(6, 5, 1\)"):
        distill.dist_loss(s[..., None], t[..., None])
    with pytest.raises(ValueError, match="k must lie between 1 and the 5 classes, not 6"):
        distill.top_k_logits(t, 6)
    with pytest.raises(ValueError, match="at least the 3 that were kept, not 2"):
        distill.expand_top_k(distill.top_k_logits(t, 3), 2)
    with pytest.raises(ValueError, match=r"\(teachers, ..., classes\), not \(5,\)"):
        distill.ensemble_logits(t[0])
    with pytest.raises(ValueError, match=r"weights must have shape \(6,\), .* not \(2,\)"):
        distill.ensemble_logits(t, jnp.ones(2))
    with pytest.raises(ValueError, match="at least one tree"):
        distill.stack_params([])
    with pytest.raises(ValueError, match=r"params\[1\] differs from params\[0\]"):
        distill.stack_params([{"w": s}, {"w": s[:2]}])
    with pytest.raises(ValueError, match="correct must lie between 1/5 and 1, not 0.1"):
        distill.smoothed_label_logits(LABELS, 5, 0.1)
    with pytest.raises(ValueError, match="classes must be at least 2, not 1"):
        distill.smoothed_label_logits(LABELS, 1)
    with pytest.raises(TypeError, match="labels must be whole numbers, not float32"):
        distill.smoothed_label_logits(s[:, 0], 5)
    with pytest.raises(ValueError, match=r"logits must have shape \(2 or more students"):
        distill.mutual_loss(s[None], LABELS)
    with pytest.raises(ValueError, match=r"student_features and teacher_features .* same shape"):
        distill.hint_loss(maps, jnp.asarray(WIDE_MAPS))
    for loss in (distill.attention_transfer_loss, distill.neuron_selectivity_loss):
        with pytest.raises(ValueError, match="differ in channels only"):
            loss(maps, maps[:, :2])
        assert loss(maps, jnp.asarray(WIDE_MAPS)).shape == (4,)
    with pytest.raises(ValueError, match="power must be at least 1, not 0"):
        distill.attention_map(maps, 0)
    with pytest.raises(ValueError, match="differ in channels only"):
        distill.flow_matrix(maps, maps[:2])
    with pytest.raises(ValueError, match=r"raw_variance must have shape \(5,\)"):
        distill.vid_loss(maps, maps, jnp.ones(3))
    with pytest.raises(ValueError, match="width and out must be at least 1, not 0 and 3"):
        distill.init_projector(jax.random.key(0), 0, 3)
    with pytest.raises(ValueError, match=r"features must have shape \(..., 4\)"):
        distill.project(distill.init_projector(jax.random.key(0), 4, 3), maps)
    with pytest.raises(ValueError, match=r"\(examples, height, width, channels\), not \(6, 5\)"):
        distill.resize_maps(s, (2, 2))
    with pytest.raises(ValueError, match="size must be at least 1 by 1"):
        distill.resize_maps(maps, (0, 2))
    with pytest.raises(ValueError, match=r"same names, .* \['a'\] and \['b'\]"):
        distill.weighted_sum({"a": s}, {"b": 1.0})
    with pytest.raises(ValueError, match="one shape, one loss for each example"):
        distill.weighted_sum({"a": s[:, 0], "b": s}, {"a": 1.0, "b": 1.0})
    with pytest.raises(ValueError, match="step must be given: the weight of 'a' is a schedule"):
        distill.weighted_sum({"a": s}, {"a": optax.constant_schedule(1.0)})


@every_loss
def test_halves_are_computed_in_single_precision(loss, oracle, student):
    del oracle
    dtype = jnp.bfloat16 if student.ndim == 2 else jnp.float16
    halves = [jnp.asarray(each).astype(dtype) for each in (student, teacher_of(student))]
    with jax.numpy_dtype_promotion("strict"):
        value, gradient = jax.value_and_grad(lambda s: loss(s, halves[1]).sum())(halves[0])
        expected, slope = jax.value_and_grad(
            lambda s: loss(s, halves[1].astype(jnp.float32)).sum()
        )(halves[0].astype(jnp.float32))
    assert value.dtype == jnp.float32 and gradient.dtype == dtype
    np.testing.assert_allclose(value, expected, rtol=2e-6 if loss is not flow else 0.02)
    scale = float(jnp.abs(slope).max())
    bound = float(jnp.finfo(dtype).eps) * (1 if loss is not flow else 20)
    np.testing.assert_allclose(
        gradient.astype(jnp.float32), slope, rtol=bound, atol=bound * scale + 6e-8
    )


@every_loss
def test_features_out_of_the_range_of_half_precision_squared_are_finite(loss, oracle, student):
    del oracle
    if student.ndim == 2 or loss is flow:  # logits, or features squared by the test itself
        return
    for scale in (1e-3, 3e3):
        student_maps, teacher_maps = (
            jnp.asarray(scale * maps, jnp.float16) for maps in (MAPS, TEACHER_MAPS)
        )
        chex.assert_tree_all_finite(
            jax.value_and_grad(lambda s, t=teacher_maps: loss(s, t).sum())(student_maps)
        )


ON_LOGITS = {name: loss for name, (loss, _, student) in LOSSES.items() if student.ndim == 2}
ON_LOGITS["soft cross-entropy"] = lambda s, t: distill.soft_cross_entropy(s, t, 2.0)


@pytest.mark.parametrize("name", [name for name in ON_LOGITS if name != "dist"])
def test_forbidden_classes_do_not_count(name):
    """A logit of -inf, for student and teacher: the loss of all the other classes.

    Not of DIST, whose correlations see the number of classes.
    """
    loss = ON_LOGITS[name]
    student, teacher = (
        jnp.insert(jnp.asarray(each), jnp.array([5]), -jnp.inf, axis=1)
        for each in (LOGITS, TEACHER)
    )
    value, gradient = jax.value_and_grad(lambda s: loss(s, teacher).sum())(student)
    expected, slope = jax.value_and_grad(lambda s: loss(s, jnp.asarray(TEACHER)).sum())(
        jnp.asarray(LOGITS)
    )
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient[:, :5], slope, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(gradient[:, 5], 0.0)
    for one, other in ((student, teacher.at[:, 5].set(0)), (student.at[:, 5].set(0), teacher)):
        gradient = jax.grad(lambda s, t=other: loss(s, t).sum())(one)
        chex.assert_tree_all_finite(gradient)


@pytest.mark.parametrize("name", sorted(ON_LOGITS.keys() - {"soft cross-entropy"}))
@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e4])
def test_agreement_costs_nothing_however_sure(name, scale):
    logits = scale * jax.random.normal(jax.random.key(3), (6, 100))
    value, gradient = jax.value_and_grad(lambda s: ON_LOGITS[name](s, logits).sum())(logits)
    np.testing.assert_allclose(value, 0, atol=1e-5)
    np.testing.assert_allclose(gradient, np.zeros(logits.shape), atol=1e-5)


def test_dist_where_a_teacher_relates_nothing():
    student, teacher = jnp.asarray(LOGITS), jnp.asarray(TEACHER)
    one = distill.dist_loss(student[:1], teacher[:1], gamma=7.0)
    np.testing.assert_allclose(one, distill.dist_loss(student[:1], teacher[:1], gamma=0.0))
    flat = jnp.zeros_like(student)
    np.testing.assert_array_equal(distill.dist_loss(student, flat), np.zeros(6))
    np.testing.assert_allclose(distill.dist_loss(flat, teacher), np.full(6, 2.0), rtol=1e-6)


def test_top_k_of_forbidden_classes_is_as_fine_as_of_the_others():
    logits = jnp.asarray(TEACHER).at[:, 3:].set(-jnp.inf)
    top = distill.top_k_logits(logits, 4)
    found = jax.nn.softmax(distill.expand_top_k(top, 5))
    np.testing.assert_allclose(found, jax.nn.softmax(logits), atol=0.25)
    assert float(top.step.max()) <= 100 / 255 * 1.001
    np.testing.assert_array_equal(found[:, 3:], 0.0)


def test_labels_that_are_no_class_are_refused_or_nan():
    s, t, teachers = jnp.asarray(LOGITS), jnp.asarray(TEACHER), jnp.stack([LOGITS, TEACHER])
    uses = [
        lambda labels: distill.dkd_loss(s, t, labels),
        lambda labels: distill.distillation_loss(s, t, labels),
        lambda labels: distill.mutual_loss(teachers, labels)[0],
        lambda labels: distill.smoothed_label_logits(labels, 5)[:, 0],
    ]
    for use in uses:
        for wrong in (5, -1):
            labels = LABELS.at[2].set(wrong)
            with pytest.raises(
                ValueError, match=rf"labels must lie in \[0, 5\).* there is {wrong}"
            ):
                use(labels)
        losses = jax.jit(use)(LABELS.at[2].set(5))
        assert np.isnan(losses[2]) and np.isfinite(losses[3:]).all()


@pytest.mark.parametrize("kind", [float, np.float64, np.float32, jnp.float32])
def test_numbers_of_every_kind_are_checked(kind):
    s, t = jnp.asarray(LOGITS), jnp.asarray(TEACHER)
    with pytest.raises(ValueError, match=r"temperature must be positive, not -2\.0"):
        distill.kd_loss(s, t, kind(-2.0))
    with pytest.raises(ValueError, match=r"soft_weight must lie in \[0, 1\], not 1\.5"):
        distill.distillation_loss(s, t, LABELS, soft_weight=kind(1.5))
    with pytest.raises(ValueError, match=r"beta must lie between 0 and 1, .* not 1\.0"):
        distill.jensen_shannon_loss(s, t, kind(1.0))
    assert distill.kd_loss(s, t, kind(2.0)).shape == (6,)


def test_what_is_no_number_is_named():
    s, t = jnp.asarray(LOGITS), jnp.asarray(TEACHER)
    with pytest.raises(TypeError, match=r"temperature must be a number .* call the schedule with"):
        distill.kd_loss(s, t, optax.constant_schedule(1.0))  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"soft_weight must be a number or an array, not \[0\.5\]"):
        distill.distillation_loss(s, t, LABELS, 1.0, [0.5])  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"k must be a whole number, not 2\.0"):
        distill.top_k_logits(t, 2.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"size must be \(height, width\), not 2"):
        distill.resize_maps(jnp.asarray(MAPS), 2)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"top.indices must lie in \[0, 4\), but there is 4"):
        distill.expand_top_k(distill.top_k_logits(t, 3), 4)
    for weights in (jnp.array([-1.0, 2.0]), jnp.zeros(2)):
        with pytest.raises(ValueError, match="weights must not be negative, nor all zero"):
            distill.ensemble_logits(jnp.stack([s, t]), weights)
