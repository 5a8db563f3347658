"""What a student may learn from a teacher: the methods of the distillation experiment.

A method is a loss for each example, added to the cross-entropy with the labels (Hinton's is mixed
with it), and what it trains beside the student: a projector, a head. Weights are chosen on
validation images, in a short training, by `experiments._distill_comparison`.
"""

import dataclasses
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from experiments import _distill_training, _models
from jopt import distill

Tree = Any
Features = _models.Features
TEMPERATURE = 2.0
SOFT_WEIGHT = 0.9
NEGATIVES = 1024  # of the contrastive loss
DIMS = 32  # of its embeddings


@dataclasses.dataclass(frozen=True)
class Widths:
    """What a method must know of the two networks and of the data."""

    student: int
    teacher: int
    examples: int


def nothing(key: Array, widths: Widths) -> tuple[Tree, Tree]:
    """Train and remember nothing beside the student."""
    return (), ()


# (student, teacher, batch, extra, state) -> losses (batch,), new state
Compare = Callable[[Features, Features, _distill_training.Batch, Tree, Tree], tuple[Array, Tree]]


@dataclasses.dataclass(frozen=True)
class Method:
    """A method of distillation.

    Attributes:
      compare: the loss of each example.
      weights: that are tried for it on validation images.
      soft: whether the cross-entropy is mixed with Hinton's loss.
      init: makes what is trained beside the student, and the state.
    """

    compare: Compare | None = None
    weights: tuple[float, ...] = (0.0,)
    soft: bool = False
    init: Callable[[Array, Widths], tuple[Tree, Tree]] = nothing


def _stateless(loss: Callable[[Features, Features, Array], Array]) -> Compare:
    def compare(
        student: Features,
        teacher: Features,
        batch: _distill_training.Batch,
        extra: Tree,
        state: Tree,
    ) -> tuple[Array, Tree]:
        return loss(student, teacher, batch.labels), state

    return compare


def _projector(key: Array, widths: Widths) -> tuple[Tree, Tree]:
    return distill.init_projector(key, widths.student, widths.teacher), ()


def _hint(
    student: Features, teacher: Features, batch: _distill_training.Batch, extra: Tree, state: Tree
) -> tuple[Array, Tree]:
    return distill.hint_loss(distill.project(extra, student.maps), teacher.maps), state


def _contrastive_init(key: Array, widths: Widths) -> tuple[Tree, Tree]:
    one, two, three = jax.random.split(key, 3)
    heads = {
        "student": distill.init_projector(one, widths.student, DIMS),
        "teacher": distill.init_projector(two, widths.teacher, DIMS),
    }
    return heads, distill.contrastive_init(three, widths.examples, DIMS)


def _contrastive(
    student: Features, teacher: Features, batch: _distill_training.Batch, extra: Tree, state: Tree
) -> tuple[Array, Tree]:
    examples = state.student_bank.shape[0]
    negatives = distill.contrastive_negatives(
        batch.key, batch.examples, examples, min(NEGATIVES, examples - 1)
    )
    places = (batch.examples, negatives)
    both = (
        distill.project(extra["student"], student.embedding),
        distill.project(extra["teacher"], teacher.embedding),
    )
    losses = distill.contrastive_loss(state, *both, *places)
    return losses, distill.contrastive_update(state, *both, *places)


def _relational(student: Features, teacher: Features, labels: Array) -> Array:
    pair = (student.embedding, teacher.embedding)
    return distill.rkd_distance_loss(*pair) + 2 * distill.rkd_angle_loss(*pair)


METHODS: dict[str, Method] = {
    "alone": Method(),
    "KD": Method(soft=True),
    "DKD": Method(
        _stateless(
            lambda s, t, labels: distill.dkd_loss(
                s.logits, t.logits, labels, temperature=TEMPERATURE
            )
        ),
        (0.06, 0.25, 1.0),
    ),
    "DIST": Method(
        _stateless(lambda s, t, labels: distill.dist_loss(s.logits, t.logits, 2.0, 2.0)),
        (0.25, 1.0, 4.0),
    ),
    "hint": Method(_hint, (0.01, 0.1, 1.0), init=_projector),
    "AT": Method(
        _stateless(lambda s, t, labels: distill.attention_transfer_loss(s.maps, t.maps)),
        (5.0, 50.0, 500.0),
    ),
    "SP": Method(
        _stateless(lambda s, t, labels: distill.similarity_preserving_loss(s.maps, t.maps)),
        (0.1, 1.0, 10.0),
    ),
    "RKD": Method(_stateless(_relational), (0.1, 1.0, 25.0)),
    "CRD": Method(_contrastive, (0.01, 0.1, 0.8), init=_contrastive_init),
}
FEATURES = ("hint", "AT", "SP", "RKD", "CRD")


def mixed_loss(
    logits: Array, said: Array, labels: Array, temperature: float, soft_weight: float
) -> Array:
    """Mix the cross-entropy with Hinton's loss, (batch,); that alone where the label is -1.

    Args:
      logits: of the student, (batch, classes).
      said: the teacher's logits, (batch, classes).
      labels: (batch,).
      temperature: of the teacher's answers.
      soft_weight: of Hinton's loss where there is a label, 0 to 1.
    """
    hard = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    soft = distill.kd_loss(logits, said, temperature)
    return jnp.where(labels >= 0, (1 - soft_weight) * hard + soft_weight * soft, soft)


@lru_cache(64)
def make_loss(
    method: Method, weight: float, student: Callable[[Tree, Array], Features]
) -> _distill_training.Loss:
    """Return the loss of a training tree `{"student", "extra"}`, for equal arguments the same.

    Images whose label is -1 are taught by the teacher alone.

    Args:
      method: what is compared.
      weight: of the comparison.
      student: `(params, images) -> features`, in training.
    """

    def loss(trained: Tree, state: Tree, batch: _distill_training.Batch) -> tuple[Array, Tree]:
        own = student(trained["student"], batch.images)
        teacher = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), batch.teacher)
        if method.soft:
            losses = mixed_loss(own.logits, teacher.logits, batch.labels, TEMPERATURE, SOFT_WEIGHT)
        else:
            known = jnp.maximum(batch.labels, 0)
            hard = optax.softmax_cross_entropy_with_integer_labels(own.logits, known)
            losses = jnp.where(batch.labels >= 0, hard, 0.0)
        if method.compare is not None:
            more, state = method.compare(own, teacher, batch, trained["extra"], state)
            losses = losses + weight * more
        return losses.mean(), state

    return loss
