"""Sentiment, with more training: the fine-tuned network teaches what is made of it.

- *pruned*: weights of all layers go step by step, by magnitude or by movement, while the teacher
  teaches; then the rest recovers.
- *shrunk*: half of the attention heads and of the hidden units of every layer are removed, those
  that the loss needs least to first order, or two whole layers.
- *student*: three layers, copies of every other one of the teacher's, that learn its hidden states
  and attention scores, then its answers (TinyBERT).
- *tiny*: that student with words as vectors of a few numbers (the best approximation of their table
  by rank), pruned, and trained through the rounding to 4 bits.

Students also learn what the teacher says of sentences with words blanked out, and of those that are
spliced from the halves of two, which have no label (`experiments.distill_text`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import jopt
from experiments import (
    _bert,
    _checkpoint,
    _compress,
    _distill_methods,
    _distill_training,
    _results,
    _sentences,
    _sentiment_network,
    distill_text,
)
from experiments._sentiment_network import KERNELS, Made
from jopt import distill, prune

Tree = Any
Row = dict[str, Any]
Loss = _distill_training.Loss
UNITS = r"encoder/layer\d+/(query/kernel\[1\]:0|up/kernel\[1\])"  # heads, hidden units
SELECT = partial(prune.global_topk_masks, where=KERNELS)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the outcome beside the settings of the network."""

    temperature: float = 2.0
    soft_weight: float = 0.7
    sparsities: tuple[float, ...] = (0.8, 0.9)
    prune_epochs: int = 6
    score_rate: float = 1e-2  # Adam's, of the scores of movement, as in the paper
    units: float = 0.5  # of heads and of hidden units that are removed
    layers: tuple[int, ...] = (0, 1, 3, 5)  # that stay where whole layers are removed
    shrunk_epochs: int = 2
    student: tuple[int, ...] = (1, 3, 5)  # layers that the student starts from and learns
    feature_epochs: int = 2
    epochs: int = 6
    blanked: float = 0.15  # of the words
    copies: int = 4  # of the sentences, the first as they are, the others with words blanked out
    spliced: int = 4  # further copies, of spliced sentences
    factor: int = 48
    recipe: _compress.Recipe = dataclasses.field(
        default_factory=lambda: _compress.Recipe(0.9, 4, 6, 3, 3e-4)
    )


def make_pool(run: _sentiment_network.Run, settings: Settings) -> _distill_training.Pool:
    """Copy the training sentences with words blanked out, then spliced, without labels."""
    rows, labels, padding = run.pool.images, run.pool.labels, run.padding
    unknown = run.unknown

    def blanked(key: Array, rows: Array) -> Array:
        places = jnp.arange(rows.shape[1])[None]
        ends = jnp.sum(rows != padding, 1, keepdims=True) - 1
        inner = (places > 0) & (places < ends)  # the marks of beginning and end stay
        blank = jax.random.bernoulli(key, settings.blanked, rows.shape)
        return jnp.where(blank & inner, unknown, rows)

    def spliced(key: Array) -> Array:
        other, blank = jax.random.split(key)
        shuffled = jax.random.permutation(other, rows)
        return blanked(blank, distill_text.splice(rows, shuffled, padding))

    own = [blanked(jax.random.key(2000 + copy), rows) for copy in range(1, settings.copies)]
    new = [spliced(jax.random.key(3000 + copy)) for copy in range(settings.spliced)]
    nobody = jnp.full_like(labels, -1)
    return _distill_training.Pool(
        jnp.concatenate([rows, *own, *new]),
        jnp.concatenate([labels] * settings.copies + [nobody] * settings.spliced),
        len(labels),
    )


class Trained:
    """One seed: the teacher, what it says, and what is trained with it."""

    def __init__(
        self, run: _sentiment_network.Run, settings: Settings, seed: int, repeats: int
    ) -> None:
        """Fine-tune the teacher, or read it."""
        self.run, self.settings, self.seed, self.repeats = run, settings, seed, repeats
        self.teacher = run.teacher(seed)
        self.work = (
            run.work / f"trained-{seed}-{_checkpoint.digest([dataclasses.asdict(settings)])}"
        )
        pool = make_pool(run, settings)
        self.pool = dataclasses.replace(pool, teacher=self._answers(pool))
        longest = np.asarray(jnp.sum(pool.images != run.padding, 1))
        self.loop = _sentences.cut_steps(longest)

    def _answers(self, pool: _distill_training.Pool) -> Array:
        """Ask the teacher about every sentence of the pool, or read what it said."""
        file = self.work / "answers.ckpt"
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
        settings = self.settings
        return _distill_methods.mixed_loss(
            logits, batch.teacher, batch.labels, settings.temperature, settings.soft_weight
        )

    @property
    def steps(self) -> int:
        """Return how many steps an epoch has."""
        return max(1, self.pool.count // self.run.settings.batch)

    # --- Pruned -----------------------------------------------------------------------------------

    def by_magnitude(self, sparsity: float) -> Made:
        """Remove the smallest weights step by step; what is gone stays gone."""
        steps = self.steps * self.settings.prune_epochs
        schedule = prune.cubic_schedule(sparsity, 0, steps // 2)
        rule = prune.gradual(schedule, max(1, min(10, steps // 8)), select=SELECT)
        tx = prune.sparse_training(
            optax.adam(_compress.rate_while_pruning(self.run.settings.rate, steps)), rule
        )
        loss = self.taught(self.run.training_logits)
        name = f"magnitude-{sparsity:g}"
        return self.fit(name, loss, self.teacher, self.settings.prune_epochs, tx), {}, None

    def by_movement(self, sparsity: float) -> Made:
        """Remove the weights whose scores, which are trained along, are lowest; some come back."""
        steps = self.steps * self.settings.prune_epochs
        schedule = prune.cubic_schedule(sparsity, 0, steps // 2)

        def loss(both: Tree, count: Tree, batch: _distill_training.Batch) -> tuple[Array, Tree]:
            params, scores = both["params"], both["scores"]
            masked = prune.movement_params(params, scores, jnp.asarray(schedule(count)), SELECT)
            logits = self.run.training_logits(masked, batch.images, batch.key)
            return self.mixed(logits, batch).mean(), count + 1

        rates: dict[Any, optax.GradientTransformation] = {
            "params": optax.adam(_compress.rate_while_pruning(self.run.settings.rate, steps)),
            "scores": optax.adam(self.settings.score_rate),
        }
        tx = optax.multi_transform(rates, {"params": "params", "scores": "scores"})
        both = {"params": self.teacher, "scores": jax.tree.map(jnp.zeros_like, self.teacher)}
        name, epochs = f"movement-{sparsity:g}", self.settings.prune_epochs
        found = self.fit(name, loss, both, epochs, tx, jnp.zeros((), jnp.int32))
        masks = SELECT(found["scores"], sparsity)
        return prune.apply_masks(found["params"], masks), {}, None

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

    # --- Students ---------------------------------------------------------------------------------

    def student(self) -> Tree:
        """Teach three layers hidden states and attention, then answers."""
        settings, run = self.settings, self.run
        module, places = self.module(len(settings.student)), settings.student

        def features(params: Tree, teacher: Tree, batch: _distill_training.Batch) -> Any:
            real = batch.images != run.padding
            own = _bert.inside(module, params, batch.images, real, batch.key)
            whole = _bert.inside(run.module, teacher, batch.images, real)
            return inner_losses(own, whole, places, real).mean(), teacher

        start = _bert.some_layers(self.teacher, places)
        epochs = settings.feature_epochs
        start = self.fit("student-features", features, start, epochs, state=self.teacher)
        loss = self.taught(run.training_of(module))
        return self.fit("student", loss, start, settings.epochs)

    def packed(self, factor: int | None, recipe: _compress.Recipe) -> Made:
        """Prune and quantize the student, whose words may be factorized first."""
        run, params = self.run, self.student()
        module = self.module(len(self.settings.student), factor)
        name = "packed"
        if factor is not None:
            counts = np.bincount(
                np.asarray(run.pool.images).ravel(), minlength=run.module.encoder.vocabulary
            )
            params = _bert.factorized(params, factor, counts + 1.0)
            name = f"tiny-{factor}"
        encoder = params["encoder"]
        places = encoder["places"]["embedding"][: run.settings.length]  # more there never are
        params = params | {"encoder": encoder | {"places": {"embedding": places}}}
        module = module.clone(encoder=module.encoder.clone(positions=len(places)))
        logits = run.training_of(module)

        def make_loss(view: Callable[[Tree], Tree]) -> Loss:
            return self.taught(lambda params, ids, key: logits(view(params), ids, key))

        tree = _compress.compress(
            recipe,
            params,
            make_loss,
            self.pool,
            run.settings.batch,
            self.seed,
            self.work / name,
            run.say,
            where=KERNELS,
            loop=self.loop,
        )
        return tree, {}, run.predict_of(module)

    def measure(self) -> tuple[list[Row], _sentiment_network.Latencies]:
        """Train, score and time every network that is not among the finished ones."""
        run, settings = self.run, self.settings
        rows = _sentiment_network.Rows(run, self.work.name, self.seed)

        def row(kind: str, form: str, method: str, make: Callable[[], Made]) -> None:
            rows.add({"kind": kind, "form": form, "method": method}, make)

        def three_layers() -> Made:
            return self.student(), {}, run.predict_of(self.module(len(settings.student)))

        row("float", "32 bits", "", lambda: (self.teacher, {}, None))
        ways = {"magnitude": self.by_magnitude, "movement": self.by_movement}
        for sparsity in settings.sparsities:
            for name, way in ways.items():
                row("pruned", f"{sparsity:.0%}", f"{name}, taught", partial(way, sparsity))
        recipe = settings.recipe
        packed = f"{recipe.sparsity:.0%}, {recipe.bits} bits"
        shapes: dict[tuple[str, str, str], Callable[[], Made]] = {
            ("shrunk", f"{settings.units:.0%} of units", "saliency, taught"): self.fewer_units,
            ("shrunk", f"{len(settings.layers)} layers", "taught"): self.fewer_layers,
            ("student", f"{len(settings.student)} layers", "TinyBERT"): three_layers,
            ("student", f"{len(settings.student)} layers", packed): partial(
                self.packed, None, recipe
            ),
            ("student", "tiny", f"{packed}, rank {settings.factor}"): partial(
                self.packed, settings.factor, recipe
            ),
        }
        for about, make in shapes.items():
            row(*about, make)
        if "latency_ms" not in rows.done:
            sides: dict[str, Any] = {"float": (run.predict, self.teacher)}
            for (_, form, method), make in shapes.items():
                tree, _, predict = make()
                sides[f"{form}, {method}"] = predict, jopt.materialize(tree)
            rows.keep("latency_ms", run.latencies(sides, self.repeats))
        return rows.list(), rows.done["latency_ms"]


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


def smoke(settings: Settings) -> Settings:
    """Shorten everything to an epoch of one network of each kind, of two layers."""
    recipe = dataclasses.replace(settings.recipe, sparsity=0.5, prune_epochs=1, quantize_epochs=1)
    return dataclasses.replace(
        settings,
        sparsities=settings.sparsities[-1:],
        prune_epochs=1,
        layers=(0,),
        shrunk_epochs=1,
        student=(1,),
        feature_epochs=1,
        epochs=1,
        copies=2,
        spliced=1,
        factor=4,
        recipe=recipe,
    )


LISTED = ("bytes", "validation", "test")
MOVED, LOST, SMALLER = 0.015, 0.03, 50.0


def targets_of(rows: list[Row]) -> list[dict[str, Any]]:
    """Hold what movement and the tiny student lose against what they may."""
    whole = rows[0]
    by_name = {(row["form"], row["method"]): row for row in rows}
    moved, tiny = by_name["90%", "movement, taught"], rows[-1]
    smaller = min(a / b for a, b in zip(whole["bytes"], tiny["bytes"], strict=True))

    def lost(row: Row) -> float:
        return round(whole["mean_test"] - row["mean_test"], 6)

    words = "test accuracy lost"
    return [
        _results.target(f"90 % by movement, taught: {words}", lost(moved), MOVED, "lower"),
        _results.target("tiny: times smaller file", round(smaller, 2), SMALLER, "higher"),
        _results.target(f"tiny: {words}", lost(tiny), LOST, "lower"),
    ]
