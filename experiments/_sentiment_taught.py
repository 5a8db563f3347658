"""What networks learn from the fine-tuned one: its answers about sentences, some made for that.

Beside the sentences as they are, the pool has copies with words blanked out and copies spliced from
the halves of two, which have no label (`experiments.distill_text`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from experiments import (
    _bert,
    _checkpoint,
    _distill_methods,
    _distill_training,
    _parts,
    _sentences,
    _sentiment_network,
    distill_text,
)
from jopt import distill

Tree = Any
Row = dict[str, Any]
Loss = _distill_training.Loss


@dataclasses.dataclass(frozen=True)
class Lessons:
    """What the teacher says, and how much of it counts."""

    temperature: float = 2.0
    soft_weight: float = 0.7
    blanked: float = 0.15  # of the words
    copies: int = 4  # of the sentences, the first as they are, the others with words blanked out
    spliced: int = 4  # further copies, of spliced sentences


def make_pool(run: _sentiment_network.Run, lessons: Lessons) -> _distill_training.Pool:
    """Copy the training sentences with words blanked out, then spliced, without labels."""
    rows, labels, padding = run.pool.images, run.pool.labels, run.padding
    unknown = run.unknown

    def blanked(key: Array, rows: Array) -> Array:
        places = jnp.arange(rows.shape[1])[None]
        ends = jnp.sum(rows != padding, 1, keepdims=True) - 1
        inner = (places > 0) & (places < ends)  # the marks of beginning and end stay
        blank = jax.random.bernoulli(key, lessons.blanked, rows.shape)
        return jnp.where(blank & inner, unknown, rows)

    def spliced(key: Array) -> Array:
        other, blank = jax.random.split(key)
        shuffled = jax.random.permutation(other, rows)
        return blanked(blank, distill_text.splice(rows, shuffled, padding))

    own = [blanked(jax.random.key(2000 + copy), rows) for copy in range(1, lessons.copies)]
    new = [spliced(jax.random.key(3000 + copy)) for copy in range(lessons.spliced)]
    nobody = jnp.full_like(labels, -1)
    return _distill_training.Pool(
        jnp.concatenate([rows, *own, *new]),
        jnp.concatenate([labels] * lessons.copies + [nobody] * lessons.spliced),
        len(labels),
    )


class Taught:
    """One seed: the teacher, what it says, and how others are trained with that."""

    part: str  # of the experiment, in names of files

    def __init__(
        self, run: _sentiment_network.Run, lessons: Lessons, settings: Any, seed: int
    ) -> None:
        """Say what is taught; the teacher is fine-tuned or read when it is needed.

        Args:
          run: the checkpoint and the sentences.
          lessons: what the teacher says.
          settings: of the part, which its checkpoints belong to.
          seed: of everything drawn.
        """
        self.run, self.lessons, self.settings, self.seed = run, lessons, settings, seed
        about = _checkpoint.digest([dataclasses.asdict(lessons), dataclasses.asdict(settings)])
        self.work = run.work / f"{self.part}-{seed}-{about}"

    @cached_property
    def teacher(self) -> Tree:
        """Fine-tune the teacher, or read it."""
        return self.run.teacher(self.seed)

    @cached_property
    def pool(self) -> _distill_training.Pool:
        """Make the sentences with what the teacher says about them."""
        pool = make_pool(self.run, self.lessons)
        return dataclasses.replace(pool, teacher=self._answers(pool))

    @cached_property
    def loop(self) -> Any:
        """Cut the steps of training to a few lengths."""
        longest = np.asarray(jnp.sum(self.pool.images != self.run.padding, 1))
        return _sentences.cut_steps(longest)

    def _answers(self, pool: _distill_training.Pool) -> Array:
        """Ask the teacher about every sentence of the pool, or read what it said."""
        about = _checkpoint.digest([dataclasses.asdict(self.lessons)])
        file = self.run.work / f"answers-{self.seed}-{about}.ckpt"
        shape = (len(pool.labels), self.run.texts.num_classes)
        found = _checkpoint.restore(file, np.zeros(shape, np.float32))
        if found is None:
            ids = np.asarray(pool.images)
            tokens = _bert.Tokens(ids, ids != self.run.padding, np.zeros_like(ids))
            found = _sentences.through(partial(self.run.predict, self.teacher), tokens)
            _checkpoint.save(file, found)
        return jnp.asarray(found)

    def module(self, layers: int, factor: int | None = None) -> _bert.BertClassifier:
        """Return the classifier with another number of layers, and factorized words."""
        whole = self.run.module
        return whole.clone(encoder=whole.encoder.clone(layers=layers, factor=factor))

    def fit(
        self,
        name: str,
        loss: Loss,
        params: Tree,
        epochs: int,
        tx: optax.GradientTransformation | None = None,
        state: Tree = (),
    ) -> Tree:
        """Train something, or go on, or read it."""
        of = self.run.settings
        how = _distill_training.Fit(
            of.batch, epochs, of.rate, of.weight_decay, loop=self.loop, plain_last=True
        )
        file, say = self.work / f"{name}.ckpt", self.run.say
        return how.run(loss, params, self.pool, self.seed, file, say, tx=tx, state=state)

    def taught(self, logits: Callable[[Tree, Array, Array], Array]) -> Loss:
        """Return the loss of `(params, ids, key) -> logits` that the teacher's answers make."""

        def loss(params: Tree, state: Tree, batch: _distill_training.Batch) -> tuple[Array, Tree]:
            own = logits(params, batch.images, batch.key)
            return self.mixed(own, batch).mean(), state

        return loss

    def mixed(self, logits: Array, batch: _distill_training.Batch) -> Array:
        """Return the loss of each sentence by its label and the teacher's answer."""
        lessons = self.lessons
        return _distill_methods.mixed_loss(
            logits, batch.teacher, batch.labels, lessons.temperature, lessons.soft_weight
        )

    @property
    def steps(self) -> int:
        """Return how many steps an epoch has."""
        return max(1, self.pool.count // self.run.settings.batch)

    def measure(self, held: _parts.Held) -> _sentiment_network.Measured:
        """Train and score the networks of the seed that results do not hold."""
        raise NotImplementedError


def inner_losses(
    student: _bert.Inside, teacher: _bert.Inside, places: Sequence[int], real: Array
) -> Array:
    """Return the loss of each sentence by hidden states and attention scores, (batch,).

    Args:
      student: what is inside it.
      teacher: what is inside it, as wide.
      places: the teacher's layer for each of the student's.
      real: booleans, (batch, length).
    """
    losses = [distill.hidden_state_loss(student.hidden[0], teacher.hidden[0], real)]
    for number, place in enumerate(places):
        pair = student.hidden[number + 1], teacher.hidden[place + 1]
        losses.append(distill.hidden_state_loss(*pair, real))
        scores = student.scores[number], teacher.scores[place]
        losses.append(distill.attention_score_loss(*scores, real))
    return jnp.sum(jnp.stack(losses), 0)
