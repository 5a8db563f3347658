"""Sentiment, in students: three layers that learn from the fine-tuned network, and small files.

The student starts from every other layer of the teacher, learns its hidden states and attention
scores, then its answers (TinyBERT). Packed, its words become vectors of a few numbers (the best
approximation of their table by rank), it is pruned, and trained through the rounding.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

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
from experiments._sentiment_taught import Loss, Row, Taught, Tree


@dataclasses.dataclass(frozen=True)
class Packing:
    """How small a student is made: words of so many numbers, then a recipe.

    Attributes:
      factor: numbers of a word.
      recipe: of pruning and quantization.
      seen: whether words that no training sentence has become zeros.
    """

    factor: int
    recipe: _compress.Recipe
    seen: bool = False

    @property
    def words(self) -> str:
        """Say it in short."""
        recipe, seen = self.recipe, ", words seen" if self.seen else ""
        return f"{recipe.sparsity:.0%}, {recipe.bits} bits, rank {self.factor}{seen}"

    def described(self) -> dict[str, Any]:
        """Return all of it as it is written into the results; of `seen` nothing where it is not."""
        found = dataclasses.asdict(self)
        return found if self.seen else {key: each for key, each in found.items() if key != "seen"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the outcome beside the settings of the network and its lessons."""

    student: tuple[int, ...] = (1, 3, 5)  # layers that the student starts from and learns
    feature_epochs: int = 2
    epochs: int = 6


CHANNEL = (-1, 1)  # weights that share a scale
PACKINGS = {
    "medium": Packing(128, _compress.Recipe(0.5, 6, 2, 2, 3e-4)),
    "small": Packing(128, _compress.Recipe(0.5, 4, 2, 2, 3e-4)),
    "tiny": Packing(112, _compress.Recipe(0.8, 4, 4, 2, 3e-4), seen=True),
}


def packings() -> dict[str, Any]:
    """Return the packings as they are written into the results."""
    return {"packings": {name: how.described() for name, how in PACKINGS.items()}}


class Students(Taught):
    """One seed: the teacher, its student, and the files that this is packed into."""

    part = "students"

    def student(self) -> Tree:
        """Teach three layers hidden states and attention, then answers."""
        settings, run = self.settings, self.run
        module, places = self.module(len(settings.student)), settings.student

        def features(params: Tree, teacher: Tree, batch: _distill_training.Batch) -> Any:
            real = batch.images != run.padding
            own = _bert.inside(module, params, batch.images, real, batch.key)
            whole = _bert.inside(run.module, teacher, batch.images, real)
            return _sentiment_taught.inner_losses(own, whole, places, real).mean(), teacher

        start = _bert.some_layers(self.teacher, places)
        epochs = settings.feature_epochs
        start = self.fit("student-features", features, start, epochs, state=self.teacher)
        loss = self.taught(run.training_of(module))
        return self.fit("student", loss, start, settings.epochs)

    def packed(self, packing: Packing) -> Made:
        """Factorize the student's words, prune it, and quantize it by training."""
        run, params, factor = self.run, self.student(), packing.factor
        module = self.module(len(self.settings.student), factor)
        counts = np.bincount(
            np.asarray(run.pool.images).ravel(), minlength=run.module.encoder.vocabulary
        )
        params = _bert.factorized(params, factor, counts + 1.0)
        encoder = params["encoder"]
        if packing.seen:  # the others get no gradient, and stay zeros
            seen = np.bincount(np.asarray(self.pool.images).ravel(), minlength=len(counts)) > 0
            encoder = encoder | {
                "words": {"embedding": encoder["words"]["embedding"] * seen[:, None]}
            }
        places = encoder["places"]["embedding"][: run.settings.length]  # more there never are
        params = params | {"encoder": encoder | {"places": {"embedding": places}}}
        module = module.clone(encoder=module.encoder.clone(positions=len(places)))
        logits = run.training_of(module)

        def make_loss(view: Callable[[Tree], Tree]) -> Loss:
            return self.taught(lambda params, ids, key: logits(view(params), ids, key))

        recipe = packing.recipe
        name = f"rank-{factor}-{recipe.prune_epochs}-{recipe.quantize_epochs}"
        name += "-seen" if packing.seen else ""
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
            block=CHANNEL,
        )
        return tree, {}, run.predict_of(module)

    def measure(self, held: _parts.Held) -> _sentiment_network.Measured:
        """Train and score every network that is not among the finished ones."""
        run, layers = self.run, len(self.settings.student)
        scores = _sentiment_network.Scores(run, self.work.name, self.seed, held, LISTED)

        def three_layers() -> Made:
            return self.student(), {}, run.predict_of(self.module(layers))

        shapes: dict[tuple[str, str, str], Callable[[], Made]] = {
            ("student", f"{layers} layers", "TinyBERT"): three_layers
        } | {
            ("student", name, packing.words): partial(self.packed, packing)
            for name, packing in PACKINGS.items()
        }
        scores.add("float", "32 bits", "", lambda: (self.teacher, {}, None))
        for about, make in shapes.items():
            scores.add(*about, make)
        return scores.measured()


def smoke(settings: Settings) -> Settings:
    """Shorten everything to an epoch of a student of one layer."""
    return dataclasses.replace(settings, student=(1,), feature_epochs=1, epochs=1)


LISTED = ("bytes", "validation", "test")
SMALL, KEPT = 20.0, 0.97  # times fewer bytes; of the accuracy
TINY, LOST = 50.0, 0.03  # times fewer bytes; accuracy lost


def targets_of(rows: list[Row]) -> list[dict[str, Any]]:
    """Hold the bytes of the files, and what they keep, against what was asked for."""
    by_form = {row["form"]: row for row in rows}
    whole = rows[0]

    def fewer(form: str, goal: float) -> dict[str, Any]:
        pairs = zip(whole["bytes"], by_form[form]["bytes"], strict=True)
        smaller = round(min(a / b for a, b in pairs), 2)
        return _results.target(f"{form}: times fewer bytes", smaller, goal, "higher")

    kept = round(by_form["small"]["mean_test"] / whole["mean_test"], 5)
    lost = round(whole["mean_test"] - by_form["tiny"]["mean_test"], 6)
    return [
        fewer("small", SMALL),
        _results.target("small: of the test accuracy", kept, KEPT, "higher"),
        fewer("tiny", TINY),
        _results.target("tiny: test accuracy lost", lost, LOST, "lower"),
    ]
