"""Losses on relations between examples, and the contrastive loss with its banks."""

from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jopt.distill._contrastive import (
    ContrastiveState,
    contrastive_init,
    contrastive_loss,
    contrastive_negatives,
    contrastive_update,
)
from jopt.distill._relational import rkd_angle_loss, rkd_distance_loss
from jopt.distill._similarity import (
    correlation_congruence_loss,
    pkt_loss,
    similarity_preserving_loss,
)
from tests import oracles_relations as oracles


@pytest.fixture(autouse=True)
def strict_types():
    with jax.numpy_dtype_promotion("strict"):
        yield


LOSSES = {
    "rkd_distance": (rkd_distance_loss, oracles.rkd_distance, 3),
    "rkd_angle": (rkd_angle_loss, oracles.rkd_angle, 3),
    "similarity_preserving": (similarity_preserving_loss, oracles.similarity_preserving, 2),
    "correlation_congruence": (
        correlation_congruence_loss,
        partial(oracles.correlation_congruence, gamma=0.4),
        2,
    ),
    "pkt": (pkt_loss, oracles.pkt, 3),
}
every_loss = pytest.mark.parametrize(
    ("loss", "oracle", "least"), LOSSES.values(), ids=LOSSES.keys()
)
# One place far from the rest, so that errors of distances pass the bend of the Huber loss.
STUDENT: Any = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
STUDENT[4] *= 20
TEACHER: Any = np.random.default_rng(1).normal(size=(5, 2, 4)).astype(np.float32)


@every_loss
def test_each_loss_matches_its_paper(variant, loss, oracle, least):
    losses = variant(loss)(STUDENT, TEACHER)
    assert losses.shape == (5,) and losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, oracle(STUDENT, TEACHER), rtol=2e-5, atol=1e-6)


def test_both_sides_of_the_hubers_bend_are_met():
    for loss in (oracles.rkd_distance, oracles.rkd_angle):
        assert loss(STUDENT, TEACHER).max() > 0.1
    student, teacher = (oracles._relative_distances(x) for x in (STUDENT, TEACHER))
    errors = [abs(student[pair] - teacher[pair]) for pair in student]
    assert min(errors) < 1 < max(errors)


@every_loss
def test_each_gradient_matches_that_of_the_oracle(loss, oracle, least):
    weights = np.array([1.0, -2.0, 0.5, 3.0, 1.5], np.float32)
    gradient = jax.grad(lambda s: jnp.sum(weights * loss(s, TEACHER)))(jnp.asarray(STUDENT))
    expected = oracles.central_differences(lambda s: weights @ oracle(s, TEACHER), STUDENT)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-5)


@every_loss
def test_no_gradient_reaches_the_teacher(loss, oracle, least):
    gradient = jax.grad(lambda t: loss(STUDENT, t).sum())(jnp.asarray(TEACHER))
    chex.assert_trees_all_equal(gradient, jnp.zeros_like(gradient))


DEGENERATE = {
    "apart": STUDENT,
    "twins": np.array([[1.0, 2.0, 3.0]] * 2 + [[0.0, 1.0, -1.0]] * 2 + [[2.0, 0.0, 1.0]]),
    "a vector of zeros": np.array([[0.0] * 3, *np.eye(3), [1.0, 2.0, 3.0]]),
    "all zeros": np.zeros((5, 3)),
    "all the same": np.ones((5, 3)),
    "opposites": np.array([[1.0, 0, 0], [-1.0, 0, 0], [0, 1.0, 0], [0, -1.0, 0], [0, 0, 1.0]]),
}


@every_loss
def test_losses_and_gradients_vanish_where_student_and_teacher_agree(loss, oracle, least):
    step = jax.jit(jax.value_and_grad(lambda s, t: loss(s, t).sum()))
    for features in DEGENERATE.values():
        features = jnp.asarray(features, jnp.float32)
        value, gradient = step(features, features)
        np.testing.assert_allclose(value, 0.0, atol=1e-6)
        np.testing.assert_allclose(gradient, np.zeros((5, 3)), atol=1e-6)


@every_loss
def test_gradients_are_finite_for_twins_and_zeros(loss, oracle, least):
    step = jax.jit(jax.value_and_grad(lambda s, t: loss(s, t).sum()))
    for student in DEGENERATE.values():
        for teacher in DEGENERATE.values():
            value, gradient = step(
                jnp.asarray(student, jnp.float32), jnp.asarray(teacher, jnp.float32)
            )
            assert np.isfinite(value) and np.isfinite(gradient).all()


@every_loss
def test_a_permuted_batch_has_permuted_losses(loss, oracle, least):
    order = np.array([3, 0, 4, 1, 2])
    losses = loss(STUDENT, TEACHER)
    assert np.ptp(losses) > 1e-3
    np.testing.assert_allclose(loss(STUDENT[order], TEACHER[order]), losses[order], rtol=1e-5)


@every_loss
def test_relations_do_not_change_with_the_scale_of_the_features(loss, oracle, least):
    scaled = loss(8 * STUDENT, 0.25 * TEACHER)
    np.testing.assert_allclose(scaled, loss(STUDENT, TEACHER), rtol=1e-5)


@every_loss
def test_halves_are_computed_in_single_precision(loss, oracle, least):
    dtype = jnp.float16
    student, teacher = (jnp.asarray(each).astype(dtype) for each in (200 * STUDENT, TEACHER / 64))
    value, gradient = jax.value_and_grad(lambda s: loss(s, teacher).sum())(student)
    assert value.dtype == jnp.float32 and gradient.dtype == dtype
    assert np.isfinite(gradient.astype(jnp.float32)).all()
    np.testing.assert_allclose(
        value, oracle(np.asarray(student, np.float32), np.asarray(teacher, np.float32)).sum(), 2e-5
    )


@every_loss
def test_few_examples_are_refused_with_the_rule(loss, oracle, least):
    assert loss(STUDENT[:least], TEACHER[:least]).max() > 1e-4
    for batch in range(1, least):
        with pytest.raises(
            ValueError,
            match=f"student_features .* at least {least} examples in a batch, not {batch}",
        ):
            loss(STUDENT[:batch], TEACHER[:batch])


@every_loss
def test_features_that_do_not_fit_are_named(loss, oracle, least):
    with pytest.raises(
        ValueError, match=r"same number of examples .* not \(5, 3\) and \(4, 2, 4\)"
    ):
        loss(STUDENT, TEACHER[:4])
    with pytest.raises(ValueError, match=r"at least 2 axes, not \(5,\) and \(5, 2, 4\)"):
        loss(STUDENT[:, 0], TEACHER)


def test_distances_are_normalised_by_the_mean_over_twins_too():
    """Of six ordered pairs two are twins: the mean of 0, 1, 1 is 2/3, not 1."""
    student: Any = np.array([[0.0], [0.0], [1.0]], np.float32)
    teacher: Any = np.array([[0.0], [1.0], [2.0]], np.float32)
    errors = np.array([0 - 0.75, 1.5 - 1.5, 1.5 - 0.75])  # pairs 01, 02, 12
    huber = errors**2 / 2
    expected = [(huber[0] + huber[1]) / 2, (huber[0] + huber[2]) / 2, (huber[1] + huber[2]) / 2]
    np.testing.assert_allclose(rkd_distance_loss(student, teacher), expected, rtol=1e-5)


def test_an_angle_at_a_twin_has_the_cosine_zero_and_counts_only_distinct_places():
    student: Any = np.array([[0.0], [0.0], [1.0]], np.float32)  # cosines 0, 0, 1
    teacher: Any = np.array([[0.0], [1.0], [2.0]], np.float32)  # cosines 1, -1, 1
    np.testing.assert_allclose(rkd_angle_loss(student, teacher), [0.5, 0.5, 0.0], atol=1e-6)


def test_means_of_the_relational_losses_stand_to_the_authors_as_documented():
    """The authors average over all batch^2 pairs and batch^3 triplets, with zeros among them."""
    batch = 5

    def huber(errors):
        return np.where(np.abs(errors) <= 1, errors**2 / 2, np.abs(errors) - 0.5)

    def distances(features):
        features = features.reshape(batch, -1).astype(np.float64)
        distances = np.linalg.norm(features[:, None] - features[None], axis=-1)
        return distances / distances[distances > 0].mean()

    def cosines(features):
        features = features.reshape(batch, -1).astype(np.float64)
        units = features[:, None] - features[None]
        units = units / np.maximum(np.linalg.norm(units, axis=-1, keepdims=True), 1e-12)
        return np.einsum("ijd,kjd->jik", units, units)

    theirs = huber(distances(STUDENT) - distances(TEACHER)).mean()
    ours = rkd_distance_loss(STUDENT, TEACHER).mean()
    np.testing.assert_allclose(ours * (batch - 1) / batch, theirs, rtol=1e-5)
    theirs = huber(cosines(STUDENT) - cosines(TEACHER)).mean()
    ours = rkd_angle_loss(STUDENT, TEACHER).mean()
    np.testing.assert_allclose(ours * (batch - 1) * (batch - 2) / batch**2, theirs, rtol=1e-5)


@pytest.mark.parametrize("gamma", [0.1, 2.0])
def test_gamma_is_that_of_the_kernel(gamma):
    traced = jax.jit(correlation_congruence_loss)(STUDENT, TEACHER, jnp.float32(gamma))
    expected = oracles.correlation_congruence(STUDENT, TEACHER, gamma)
    np.testing.assert_allclose(traced, expected, rtol=1e-4)
    np.testing.assert_allclose(
        correlation_congruence_loss(STUDENT, TEACHER, gamma), expected, rtol=1e-4
    )


def test_the_papers_series_tends_to_the_exact_kernel():
    exact = oracles.gaussian(STUDENT, 0.4)
    second = np.abs(oracles.gaussian_by_taylor(STUDENT, 0.4, 2) - exact).max()
    assert 1e-3 < second < 0.1
    np.testing.assert_allclose(oracles.gaussian_by_taylor(STUDENT, 0.4, 12), exact, rtol=1e-9)


def test_a_gamma_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="gamma must be positive, not 0"):
        correlation_congruence_loss(STUDENT, TEACHER, gamma=0)


# Contrastive distillation.

EXAMPLES, DIMS, COUNT = 20, 4, 3


class Batch(NamedTuple):
    """The arguments of a loss after its state."""

    student: jax.Array
    teacher: jax.Array
    indices: jax.Array
    negatives: jax.Array


STATE = contrastive_init(jax.random.key(2), EXAMPLES, DIMS)
SET = STATE._replace(
    student_log_normalizer=jnp.float32(3.0), teacher_log_normalizer=jnp.float32(4.5)
)
INDICES = jnp.array([7, 0, 19])
BATCH = Batch(
    3 * jax.random.normal(jax.random.key(3), (3, DIMS)),
    jax.random.normal(jax.random.key(4), (3, DIMS)) / 2,
    INDICES,
    contrastive_negatives(jax.random.key(5), INDICES, EXAMPLES, COUNT),
)


def expected_losses(state, batch, temperature):
    losses = 0.0
    for embeddings, bank, log_normalizer in (
        (batch.student, state.teacher_bank, state.student_log_normalizer),
        (batch.teacher, state.student_bank, state.teacher_log_normalizer),
    ):
        if np.isneginf(log_normalizer):
            normalizer = oracles.contrastive_normalizer(
                embeddings, bank, batch.indices, batch.negatives, temperature
            )
        else:
            normalizer = np.exp(np.float64(log_normalizer))
        losses += oracles.contrastive_direction(
            embeddings, bank, normalizer, batch.indices, batch.negatives, temperature
        )
    return losses


@pytest.mark.parametrize("count", [3, 8], ids=["few negatives", "many negatives"])
@pytest.mark.parametrize("state", [STATE, SET], ids=["first batch", "later batch"])
def test_the_contrastive_loss_matches_the_paper(variant, state, count):
    # 3 and 8 lie on both sides of the choice between copying rows and multiplying all.
    assert (3 + 1) * DIMS < EXAMPLES < (8 + 1) * DIMS
    batch = BATCH._replace(
        negatives=contrastive_negatives(jax.random.key(6), INDICES, EXAMPLES, count)
    )
    losses = variant(contrastive_loss)(state, *batch)
    assert losses.shape == (3,) and losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, expected_losses(state, batch, 0.07), rtol=1e-5)


def test_a_contrastive_temperature_may_be_traced_and_small():
    traced = jax.jit(contrastive_loss)(SET, *BATCH, jnp.float32(0.5))
    np.testing.assert_allclose(traced, expected_losses(SET, BATCH, 0.5), rtol=1e-5)
    assert np.isfinite(contrastive_loss(STATE, *BATCH, temperature=0.001)).all()  # exp overflows


def test_contrastive_gradients_match_those_of_the_oracle():
    gradients = jax.grad(
        lambda s, t: contrastive_loss(SET, s, t, INDICES, BATCH.negatives, 0.5).sum(),
        argnums=(0, 1),
    )(BATCH.student, BATCH.teacher)
    for name, gradient in zip(("student", "teacher"), gradients, strict=True):
        expected = oracles.central_differences(
            lambda x, name=name: expected_losses(SET, BATCH._replace(**{name: x}), 0.5).sum(),
            getattr(BATCH, name),
        )
        assert np.abs(expected).max() > 1e-2
        np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-5)


def test_the_first_normalizer_is_a_constant_for_the_gradient():
    measured = contrastive_update(STATE, *BATCH)
    fixed = STATE._replace(
        student_log_normalizer=measured.student_log_normalizer,
        teacher_log_normalizer=measured.teacher_log_normalizer,
    )
    gradient = jax.grad(lambda s, state: contrastive_loss(state, s, *BATCH[1:]).sum())
    np.testing.assert_allclose(
        gradient(BATCH.student, STATE), gradient(BATCH.student, fixed), rtol=1e-5
    )


def test_no_gradient_reaches_the_state():
    for state in (STATE, SET):
        gradient = jax.grad(lambda state: contrastive_loss(state, *BATCH).sum())(state)
        chex.assert_trees_all_equal(gradient, jax.tree.map(jnp.zeros_like, state))

    def through_update(embeddings):
        state = contrastive_update(STATE, embeddings, *BATCH[1:])
        return sum(jnp.sum(leaf) for leaf in state)

    chex.assert_trees_all_equal(
        jax.grad(through_update)(BATCH.student), jnp.zeros_like(BATCH.student)
    )


def test_contrastive_gradients_are_finite_for_zeros():
    batch = BATCH._replace(student=BATCH.student.at[0].set(0.0), teacher=jnp.zeros((3, DIMS)))
    gradients = jax.grad(
        lambda s, t: contrastive_loss(STATE, s, t, INDICES, BATCH.negatives).sum(), argnums=(0, 1)
    )(batch.student, batch.teacher)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    state = contrastive_update(STATE, *batch, momentum=0.0)
    np.testing.assert_array_equal(state.student_bank[7], np.zeros(DIMS))


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_an_update_moves_the_entries_of_its_batch_alone(variant, momentum):
    state = variant(partial(contrastive_update, momentum=momentum))(STATE, *BATCH)
    for bank, before, embeddings in (
        (state.student_bank, STATE.student_bank, BATCH.student),
        (state.teacher_bank, STATE.teacher_bank, BATCH.teacher),
    ):
        expected = oracles.contrastive_bank(before, embeddings, INDICES, momentum)
        np.testing.assert_allclose(bank, expected, rtol=1e-5, atol=1e-6)
        others = np.setdiff1d(np.arange(EXAMPLES), INDICES)
        np.testing.assert_array_equal(bank[others], before[others])
        assert (np.abs(bank[INDICES] - before[INDICES]).max(axis=1) > 1e-3).all()


def test_normalizers_are_set_once(variant):
    update = variant(contrastive_update)
    first = update(STATE, *BATCH)
    for log_normalizer, embeddings, bank in (
        (first.student_log_normalizer, BATCH.student, STATE.teacher_bank),
        (first.teacher_log_normalizer, BATCH.teacher, STATE.student_bank),
    ):
        expected = oracles.contrastive_normalizer(embeddings, bank, INDICES, BATCH.negatives, 0.07)
        np.testing.assert_allclose(log_normalizer, np.log(expected), rtol=1e-5)
    second = update(first, *BATCH)
    assert second.student_log_normalizer == first.student_log_normalizer
    assert second.teacher_log_normalizer == first.teacher_log_normalizer
    assert not np.allclose(second.student_bank, first.student_bank)


def test_the_random_banks_have_rows_of_length_about_one():
    state = contrastive_init(jax.random.key(0), 400, 8)
    for bank in (state.student_bank, state.teacher_bank):
        assert bank.shape == (400, 8) and bank.dtype == jnp.float32
        np.testing.assert_allclose(np.mean(np.sum(np.square(bank), axis=1)), 1.0, atol=0.05)
        assert np.abs(bank).max() <= np.sqrt(3 / 8)
    assert not np.allclose(state.student_bank, state.teacher_bank)


def test_negatives_are_uniform_over_the_others():
    indices = jnp.array([0, 2, 4])
    negatives = contrastive_negatives(jax.random.key(0), indices, examples=5, count=4000)
    assert negatives.shape == (3, 4000) and negatives.dtype == jnp.int32
    for own, row in zip((0, 2, 4), np.asarray(negatives), strict=True):
        counts = np.bincount(row, minlength=5)
        assert len(counts) == 5 and counts[own] == 0
        # Five standard deviations of a count with mean 1000.
        assert np.abs(np.delete(counts, own) - 1000).max() < 5 * np.sqrt(4000 * 3 / 16)


def test_the_loss_is_lower_for_aligned_embeddings():
    """Banks that know the examples: the right embedding scores better than another's."""
    embeddings = jax.random.normal(jax.random.key(0), (EXAMPLES, 8))
    indices = jnp.arange(EXAMPLES)
    negatives = contrastive_negatives(jax.random.key(1), indices, EXAMPLES, 5)
    state = contrastive_update(
        contrastive_init(jax.random.key(2), EXAMPLES, 8),
        *(embeddings, embeddings, indices, negatives),
        momentum=0.0,
    )
    aligned = contrastive_loss(state, embeddings, embeddings, indices, negatives)
    shuffled = jnp.roll(embeddings, 1, axis=0)
    others = contrastive_loss(state, shuffled, shuffled, indices, negatives)
    assert aligned.mean() + 1 < others.mean()
    assert (aligned > 0).all()  # agreement alone does not make it zero


def test_training_in_a_scan_falls_and_traces_once():
    """Learn one projection of random features onto the teacher's, all in one program."""
    features = jax.random.normal(jax.random.key(0), (EXAMPLES, 6))
    targets = features @ jax.random.normal(jax.random.key(1), (6, DIMS))
    # Two batches of an epoch after the other, again and again.
    batches = jnp.tile(jnp.arange(EXAMPLES).reshape(2, -1), (60, 1))
    keys = jax.random.split(jax.random.key(2), len(batches))

    @jax.jit
    @chex.assert_max_traces(1)
    def train(weights, state):
        def step(carry, inputs):
            weights, state = carry
            key, indices = inputs
            negatives = contrastive_negatives(key, indices, EXAMPLES, COUNT)
            teacher = targets[indices]

            def mean_loss(weights):
                student = features[indices] @ weights
                losses = contrastive_loss(state, student, teacher, indices, negatives, 0.2)
                return losses.mean(), student

            (loss, student), gradient = jax.value_and_grad(mean_loss, has_aux=True)(weights)
            state = contrastive_update(state, student, teacher, indices, negatives, 0.2)
            return (weights - 0.1 * gradient, state), loss

        return jax.lax.scan(step, (weights, state), (keys, batches))

    weights = jax.random.normal(jax.random.key(3), (6, DIMS))
    (_, state), losses = train(weights, STATE)
    assert isinstance(state, ContrastiveState)
    assert np.isfinite(state.student_log_normalizer)
    lengths = np.linalg.norm(state.student_bank, axis=1)
    np.testing.assert_allclose(lengths, np.ones(EXAMPLES), rtol=1e-5)
    assert losses[-10:].mean() < losses[:10].mean() - 0.5


def test_contrastive_losses_of_a_permuted_batch_are_permuted():
    order = np.array([2, 0, 1])
    losses = contrastive_loss(SET, *BATCH)
    assert np.ptp(losses) > 1e-2
    permuted = contrastive_loss(SET, *(part[order] for part in BATCH))
    np.testing.assert_allclose(permuted, losses[order], rtol=1e-6)


@pytest.mark.parametrize("function", [contrastive_loss, contrastive_update])
def test_bad_contrastive_arguments_are_named(function):
    def call(**changes):
        return function(STATE, *BATCH._replace(**changes))

    with pytest.raises(ValueError, match=r"student_embeddings must have shape \(3, 4\)"):
        call(student=BATCH.student[:, :2])
    with pytest.raises(ValueError, match=r"teacher_embeddings must have shape \(3, 4\)"):
        call(teacher=BATCH.teacher[:2])
    with pytest.raises(ValueError, match=r"indices must have shape \(3,\), not \(3, 1\)"):
        call(indices=INDICES[:, None])
    with pytest.raises(TypeError, match="indices must be whole numbers, not float32"):
        call(indices=INDICES.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"negatives must have shape \(batch, count\)"):
        call(negatives=BATCH.negatives[:, :0])
    with pytest.raises(ValueError, match=r"negatives must have shape \(3, 3\), not \(2, 3\)"):
        call(negatives=BATCH.negatives[:2])
    with pytest.raises(TypeError, match="negatives must be whole numbers, not float32"):
        call(negatives=BATCH.negatives.astype(jnp.float32))
    with pytest.raises(ValueError, match="temperature must be positive, not 0"):
        function(STATE, *BATCH, temperature=0)


def test_bad_numbers_are_named():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\], not 1.5"):
        contrastive_update(STATE, *BATCH, momentum=1.5)
    with pytest.raises(ValueError, match="examples must be at least 2, .* not 1"):
        contrastive_init(key, 1, 4)
    with pytest.raises(ValueError, match="dims must be at least 1, not 0"):
        contrastive_init(key, 4, 0)
    with pytest.raises(ValueError, match="examples must be at least 2, .* not 1"):
        contrastive_negatives(key, INDICES, 1, 3)
    with pytest.raises(ValueError, match="count must be at least 1, not 0"):
        contrastive_negatives(key, INDICES, EXAMPLES, 0)
    with pytest.raises(ValueError, match=r"indices must have shape \(3,\), not \(3, 1\)"):
        contrastive_negatives(key, INDICES[:, None], EXAMPLES, 3)
    with pytest.raises(TypeError, match="indices must be whole numbers, not float32"):
        contrastive_negatives(key, INDICES.astype(jnp.float32), EXAMPLES, 3)
