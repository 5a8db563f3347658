import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jopt import distill
from tests import oracles

STUDENT = jax.random.normal(jax.random.key(0), (5, 4))
TEACHER = 3 * jax.random.normal(jax.random.key(1), (5, 4))
LABELS = jnp.array([0, 3, 1, 1, 2])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_soft_cross_entropy_matches_the_paper(variant, temperature):
    loss = variant(lambda s, t: distill.soft_cross_entropy(s, t, temperature))(STUDENT, TEACHER)
    expected = oracles.soft_cross_entropy(STUDENT, TEACHER, temperature)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_the_gradient_is_temperature_times_the_difference_of_softmaxes(variant):
    temperature = 3.0
    gradient = variant(
        jax.grad(lambda s: distill.soft_cross_entropy(s, TEACHER, temperature).sum())
    )(STUDENT)
    soft = jax.nn.softmax(STUDENT / temperature) - jax.nn.softmax(TEACHER / temperature)
    np.testing.assert_allclose(gradient, temperature * soft, rtol=1e-4, atol=1e-6)


def test_nothing_is_learned_from_a_teacher_that_agrees():
    gradient = jax.grad(lambda s: distill.soft_cross_entropy(s, TEACHER, 2.0).sum())(TEACHER)
    np.testing.assert_allclose(gradient, jnp.zeros_like(TEACHER), atol=1e-6)


def test_no_gradient_reaches_the_teacher():
    def loss(teacher):
        return distill.distillation_loss(STUDENT, teacher, LABELS).sum()

    chex.assert_trees_all_equal(jax.grad(loss)(TEACHER), jnp.zeros_like(TEACHER))


@pytest.mark.parametrize("soft_weight", [0.0, 0.3, 1.0])
def test_the_mix_is_linear_in_its_two_parts(variant, soft_weight):
    loss = variant(lambda s: distill.distillation_loss(s, TEACHER, LABELS, 2.0, soft_weight))(
        STUDENT
    )
    soft = oracles.soft_cross_entropy(STUDENT, TEACHER, 2.0)
    hard = -oracles.log_softmax(STUDENT)[np.arange(5), np.asarray(LABELS)]
    np.testing.assert_allclose(loss, soft_weight * soft + (1 - soft_weight) * hard, rtol=1e-5)


def test_losses_under_vmap_equal_losses_of_the_batch():
    def one(s, t, y):
        return distill.distillation_loss(s, t, y)

    together = distill.distillation_loss(STUDENT, TEACHER, LABELS)
    chex.assert_trees_all_close(jax.vmap(one)(STUDENT, TEACHER, LABELS), together, rtol=1e-6)


def test_a_traced_temperature_works():
    traced = jax.jit(distill.soft_cross_entropy)(STUDENT, TEACHER, jnp.float32(2.0))
    chex.assert_trees_all_close(
        traced, distill.soft_cross_entropy(STUDENT, TEACHER, 2.0), rtol=1e-6
    )


def test_bad_arguments_are_named():
    with pytest.raises(
        ValueError, match=r"same shape, of 1 axes or more, not \(5, 4\) and \(5, 3\)"
    ):
        distill.soft_cross_entropy(STUDENT, TEACHER[:, :3])
    with pytest.raises(ValueError, match="temperature must be positive, not 0"):
        distill.soft_cross_entropy(STUDENT, TEACHER, 0)
    with pytest.raises(ValueError, match=r"soft_weight must lie in \[0, 1\], not 1.5"):
        distill.distillation_loss(STUDENT, TEACHER, LABELS, soft_weight=1.5)
    with pytest.raises(ValueError, match=r"labels must have shape \(5,\), one per example"):
        distill.distillation_loss(STUDENT, TEACHER, LABELS[:2])
    with pytest.raises(TypeError, match="labels must be whole numbers, not float32"):
        distill.distillation_loss(STUDENT, TEACHER, LABELS.astype(jnp.float32))
