"""Sentiment, with more training: weights, units and layers go while the whole network teaches.

- *pruned*: weights of all layers go step by step, by magnitude or by movement, while the teacher
  teaches its answers, hidden states and attention scores; then the rest recovers.
- *shrunk*: half of the attention heads and of the hidden units of every layer are removed, those
  that the loss needs least to first order, or two whole layers.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from experiments import (
    _bert,
    _compress,
    _distill_training,
    _parts,
    _results,
    _sentiment_network,
    _sentiment_taught,
)
from experiments._sentiment_network import KERNELS, Made
from experiments._sentiment_taught import Row, Taught, Tree
from jopt import prune

UNITS = r"encoder/layer\d+/(query/kernel\[1\]:0|up/kernel\[1\])"  # heads, hidden units
SELECT = partial(prune.global_topk_masks, where=KERNELS)


class Pruning(NamedTuple):
    """How many weights of all layers go, and which."""

    sparsity: float
    by: str  # "movement" or "magnitude"
    share: float = 1.0  # of the epochs: the fewer weights go, the fewer are needed

    @property
    def row(self) -> tuple[str, str]:
        """Return what tells its row from others: form and method."""
        return f"{self.sparsity:.0%}", f"{self.by}, taught"

    @property
    def file(self) -> str:
        """Return what its checkpoint is called."""
        return f"{self.by}-{self.sparsity:g}" + (f"-{self.share:g}" if self.share != 1 else "")


PRUNINGS = (Pruning(0.5, "movement", 0.5), Pruning(0.8, "movement", 0.5), Pruning(0.9, "movement"))


def prunings() -> dict[str, Any]:
    """Return the prunings as they are written into the results."""
    return {"prunings": {", ".join(how.row): how._asdict() for how in PRUNINGS}}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the outcome beside the settings of the network and its lessons."""

    prune_epochs: int = 8
    prune_rate: float = 3e-4  # Adam's
    score_rate: float = 3e-4  # Adam's, of the scores of movement; at the paper's 1e-2 they drift
    select_every: int = 10  # steps between choices of masks
    inner_weight: float = 1.0  # of hidden states and attention scores beside the answers
    units: float = 0.5  # of heads and of hidden units that are removed
    layers: tuple[int, ...] = (0, 1, 3, 5)  # that stay where whole layers are removed
    shrunk_epochs: int = 2


class Trained(Taught):
    """One seed: the teacher, and what is pruned and shrunk while it teaches."""

    part = "trained"

    # --- Pruned -----------------------------------------------------------------------------------

    def lesson(self, params: Tree, teacher: Tree, batch: _distill_training.Batch) -> Array:
        """Return the loss by answers and by all layers' states and scores, without dropout."""
        module, real = self.run.module, batch.images != self.run.padding
        own, whole = (_bert.inside(module, each, batch.images, real) for each in (params, teacher))
        places = range(module.encoder.layers)
        inner = _sentiment_taught.inner_losses(own, whole, places, real)
        answers = self.mixed(own.features.logits, batch)
        return answers.mean() + self.settings.inner_weight * inner.mean()

    def epochs(self, how: Pruning) -> int:
        """Return how many epochs a pruning takes."""
        return max(1, round(self.settings.prune_epochs * how.share))

    def by_magnitude(self, how: Pruning) -> Made:
        """Remove the smallest weights step by step; what is gone stays gone."""
        settings, epochs = self.settings, self.epochs(how)
        steps = self.steps * epochs
        schedule = prune.cubic_schedule(how.sparsity, 0, steps // 2)
        every = max(1, min(settings.select_every, steps // 8))
        rule = prune.gradual(schedule, every, select=SELECT)
        rate = _compress.rate_while_pruning(settings.prune_rate, steps)
        tx = prune.sparse_training(optax.adam(rate), rule)

        def loss(params: Tree, teacher: Tree, batch: _distill_training.Batch) -> tuple[Array, Tree]:
            return self.lesson(params, teacher, batch), teacher

        return self.fit(how.file, loss, self.teacher, epochs, tx, self.teacher), {}, None

    def by_movement(self, how: Pruning) -> Made:
        """Remove the weights whose scores, which are trained along, are lowest; some come back.

        Scores start at the magnitudes, by the mean of all: a fine-tuned network's first gradients
        are noise, and scores that start at zero would remove weights at random.
        """
        settings, epochs = self.settings, self.epochs(how)
        steps = self.steps * epochs
        schedule = prune.cubic_schedule(how.sparsity, 0, steps // 2)

        def loss(both: Tree, state: Tree, batch: _distill_training.Batch) -> tuple[Array, Tree]:
            count, masks = state["count"], state["masks"]

            def choose() -> Tree:
                return SELECT(both["scores"], jnp.asarray(schedule(count)))

            masks = jax.lax.cond(count % settings.select_every == 0, choose, lambda: masks)
            masked = prune.movement_params(both["params"], both["scores"], 0, lambda *_: masks)
            value = self.lesson(masked, state["teacher"], batch)
            return value, state | {"count": count + 1, "masks": masks}

        masks = SELECT(self.teacher, 0.0)
        scored = jax.tree.map(lambda mask: "scores" if mask.ndim else "none", masks)
        rate = _compress.rate_while_pruning(settings.prune_rate, steps)
        rates: dict[Any, optax.GradientTransformation] = {
            "params": optax.adam(rate),
            "scores": optax.adam(settings.score_rate),
            "none": optax.set_to_zero(),
        }
        tx = optax.multi_transform(rates, {"params": "params", "scores": scored})
        sizes = jax.tree.map(jnp.abs, self.teacher)
        pairs = zip(jax.tree.leaves(sizes), jax.tree.leaves(masks), strict=True)
        unit = jnp.mean(jnp.concatenate([size.ravel() for size, mask in pairs if mask.ndim]))
        both = {"params": self.teacher, "scores": jax.tree.map(lambda size: size / unit, sizes)}
        state = {"count": jnp.zeros((), jnp.int32), "masks": masks, "teacher": self.teacher}
        found = self.fit(how.file, loss, both, epochs, tx, state)
        return prune.apply_masks(found["params"], SELECT(found["scores"], how.sparsity)), {}, None

    # --- Shrunk -----------------------------------------------------------------------------------

    def fewer_units(self) -> Made:
        """Remove heads and hidden units, and fine-tune what is left."""
        run, settings = self.run, self.settings
        ids = self.pool.images[: 2 * run.settings.batch]
        real, labels = ids != run.padding, self.pool.labels[: len(ids)]

        def error(params: Tree) -> Array:
            logits = run.logits(params, ids, real)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        scores = prune.saliency_scores(self.teacher, jax.jit(jax.grad(error))(self.teacher))
        groups = prune.find_groups(run.logits, self.teacher, ids, real)
        keep = prune.topk_masks(prune.unit_scores(groups, scores), settings.units, UNITS)
        masks = prune.unit_masks(groups, self.teacher, keep)
        shrunk = prune.shrink(run.logits, self.teacher, masks, ids, real)
        training = prune.shrunk_apply(run.training_logits, self.teacher, shrunk.units)
        epochs = settings.shrunk_epochs
        params = self.fit("units", self.taught(training), shrunk.params, epochs)
        return params, {}, shrunk.apply

    def fewer_layers(self) -> Made:
        """Remove whole layers, and fine-tune what is left."""
        places, epochs = self.settings.layers, self.settings.shrunk_epochs
        module = self.module(len(places))
        start = _bert.some_layers(self.teacher, places)
        params = self.fit("layers", self.taught(self.run.training_of(module)), start, epochs)
        return params, {}, self.run.predict_of(module)

    def measure(self, held: _parts.Held) -> _sentiment_network.Measured:
        """Train and score every network that is not among the finished ones."""
        run, settings = self.run, self.settings
        scores = _sentiment_network.Scores(run, self.work.name, self.seed, held, LISTED)
        scores.add("float", "32 bits", "", lambda: (self.teacher, {}, None))
        ways = {"magnitude": self.by_magnitude, "movement": self.by_movement}
        made: dict[tuple[str, str, str], Callable[[], Made]] = {
            ("pruned", *how.row): partial(ways[how.by], how) for how in PRUNINGS
        } | {
            ("shrunk", f"{settings.units:.0%} of units", "saliency, taught"): self.fewer_units,
            ("shrunk", f"{len(settings.layers)} layers", "taught"): self.fewer_layers,
        }
        for about, make in made.items():
            scores.add(*about, make)
        return scores.measured()


def smoke(settings: Settings) -> Settings:
    """Shorten everything to an epoch of one network of each kind, of two layers."""
    return dataclasses.replace(
        settings,
        prune_epochs=1,
        layers=(0,),
        shrunk_epochs=1,
    )


LISTED = ("bytes", "validation", "test")
MOVED = 0.015


def targets_of(rows: list[Row]) -> list[dict[str, Any]]:
    """Hold what movement loses against what it may."""
    by_name = {(row["form"], row["method"]): row for row in rows}
    lost = round(rows[0]["mean_test"] - by_name[PRUNINGS[-1].row]["mean_test"], 6)
    words = "90 % by movement, taught: test accuracy lost"
    return [_results.target(words, lost, MOVED, "lower")]
