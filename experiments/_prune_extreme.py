"""Extreme sparsity: LeNet-5 with one weight in 280 left, LeNet-300-100 with one in 68, on MNIST.

A LeNet-5 is trained with labels and becomes the teacher (as in `experiments.mnist_lenet`). Both
networks then learn from it, on images shifted by up to a pixel, while the weights that matter least
are removed over all layers together along a polynomial schedule (Zhu and Gupta's), and are
fine-tuned with the masks held as the learning rate falls. What matters is `w^2` times the running
mean of squared gradients (`prune.fisher`): magnitudes alone leave too few weights in the
convolutions, whose every weight serves many pixels, no biases, and weights that lead nowhere.

Long before the end most units of LeNet-5 have no weight left. Between two stages they are taken out
(`prune.shrink`), so that an epoch of the later stages, which matter most, takes a quarter of the
time; at the end zeros are put back.

What is counted: everything. Biases are pruned in the same ranking as kernels, and the ratio is all
parameters, kernels and biases, over those that are not zero in the file that reloads.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import jopt
from experiments import (
    _checkpoint,
    _compress,
    _data,
    _prune_extreme_report,
    _results,
    _stages,
    _train,
    mnist_lenet,
)
from jopt import codec, prune

Tree = Any
ALL = ".*"  # biases are pruned too


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a recipe; empty units are gone before it.

    Attributes:
      ratio: all parameters over those left at its end.
      prune: epochs over which sparsity rises.
      tune: epochs with the masks held, as the learning rate falls to a hundredth.
      dense: epochs before pruning begins.
      shifted: whether images are shifted. A network of so few weights does not learn images by
        heart; what it spends on images that are shifted it lacks for those that are not.
    """

    ratio: float
    prune: int
    tune: int = 0
    dense: int = 0
    shifted: bool = True

    @property
    def epochs(self) -> int:
        """Return how many epochs it takes."""
        return self.dense + self.prune + self.tune


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one network is pruned.

    Attributes:
      error: test error that is asked for.
      stages: one after the other; LeNet-5 starts from the teacher, and is dense at once.
      rate: Adam's learning rate.
      decay: weight decay of kernels, times the learning rate.
      power: of the schedule; 3 is Zhu and Gupta's, a higher one leaves more time for the end.
      temperature: of the teacher's answers.
    """

    error: float
    stages: tuple[Stage, ...]
    rate: float
    decay: float
    power: float
    temperature: float

    @property
    def ratio(self) -> float:
        """Return all parameters over those left at the end."""
        return self.stages[-1].ratio


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides the outcome, written into the results."""

    dataset: str = "mnist"
    seeds: tuple[int, ...] = (0, 1, 2)
    batch: int = 128
    soft_weight: float = 0.9
    prune_every: int = 50
    teacher: mnist_lenet.Settings = dataclasses.field(default_factory=mnist_lenet.Settings)
    recipes: dict[str, Recipe] = dataclasses.field(
        default_factory=lambda: {
            "lenet_300_100": Recipe(
                0.0190, (Stage(68, 40, 20, 10),), 2e-3, decay=0.1, power=3, temperature=4
            ),
            "lenet5": Recipe(
                0.0080,
                (Stage(100, 16), Stage(200, 24), Stage(280, 24), Stage(280, 0, 60, shifted=False)),
                1e-2,
                decay=1e-2,
                power=4,
                temperature=2,
            ),
        }
    )


def pruning(
    recipe: Recipe, stage: Stage, total: int, masks: Tree, epoch: int, every: int
) -> optax.GradientTransformation:
    """Return the optimizer that trains, prunes to exactly `total // ratio` weights, and tunes.

    Args:
      recipe: what to do.
      stage: which part of it.
      total: parameters of the network that it began with.
      masks: what is left of it now.
      epoch: updates in an epoch.
      every: updates between two prunings.
    """
    begin, rising, tuning = (n * epoch for n in (stage.dense, stage.prune, stage.tune))
    size, left = _compress.size(masks), _compress.nonzero(masks)
    now, end = 1 - left / size, 1 - (total // stage.ratio) / size
    level = optax.constant_schedule(end)
    if rising:
        level = optax.polynomial_schedule(now, end, recipe.power, rising, begin)
    warm = max(1, min(200, epoch // 2))
    rate = optax.join_schedules(
        [
            optax.linear_schedule(0.1 * recipe.rate, recipe.rate, warm),
            optax.constant_schedule(recipe.rate),
            optax.cosine_decay_schedule(recipe.rate, max(tuning, 1), alpha=0.01),
        ],
        [warm, max(begin + rising, warm)],
    )
    rule = prune.gradual(
        level,
        max(1, min(every, rising // 4)) if rising else every,
        prune.fisher(),
        partial(_best_of, masks),
    )
    adam = optax.adamw(rate, weight_decay=recipe.decay, mask=_kernels)
    return prune.sparse_training(optax.chain(adam, prune.keep_masked(masks)), rule)


def _best_of(masks: Tree, scores: Tree, sparsity: Any) -> Tree:
    """Keep the highest scores of all; what was gone before comes last."""
    scores = jax.tree.map(lambda mask, score: jnp.where(mask, score, -jnp.inf), masks, scores)
    return prune.global_topk_masks(scores, sparsity, ALL)


def _kernels(params: Tree) -> Tree:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


class Run:
    """One seed: the teacher, and the networks that are pruned under it."""

    def __init__(
        self, settings: Settings, data: _data.Dataset, seed: int, work: Path, progress: Progress
    ) -> None:
        """Put what every network needs in place."""
        self.settings, self.data, self.seed = settings, data, seed
        validation = jnp.asarray(data.validation[0]), jnp.asarray(data.validation[1])
        key = jax.random.key(seed)
        self.trainer = _stages.Trainer(
            work / f"seed-{seed}", key, validation, progress, settings.batch
        )
        teaching = dataclasses.replace(settings.teacher, seed=seed)
        self.compression = mnist_lenet.Compression(teaching, data, self.trainer)

    def teach(self) -> tuple[Tree, _stages.Pool]:
        """Train the teacher and ask it about shifted copies of the training images."""
        teacher = self.compression.teacher()
        return teacher, self.compression.pool(teacher)

    def pruned(self, name: str, teacher: Tree, pool: _stages.Pool) -> Tree:
        """Take one network through its recipe."""
        recipe, settings = self.settings.recipes[name], self.settings
        _, apply = mnist_lenet.network(name, self.data.num_classes)
        params = teacher if name == "lenet5" else self.compression.initial(name)
        total, batch = _compress.size(params), min(settings.batch, pool.count)
        folder = self.trainer.folder / _checkpoint.digest(
            [jopt.__version__, dataclasses.asdict(recipe)]
        )
        trainer = dataclasses.replace(self.trainer, folder=folder)  # one history for both
        images = _train.normalize(pool.images[:64])
        masks = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), params)
        widen: list[Any] = []
        for number, stage in enumerate(recipe.stages):
            if number:
                masks = jax.tree.map(lambda leaf: leaf != 0, params)
                shrunk = prune.shrink(apply, params, masks, images)
                params, apply, masks = shrunk.params, shrunk.apply, shrunk.narrow(masks)
                widen.append(shrunk.widen)
            tx = pruning(recipe, stage, total, masks, pool.count // batch, settings.prune_every)
            loss = _stages.distilled_loss(
                apply, _compress.unchanged, recipe.temperature, settings.soft_weight
            )
            title = name if len(recipe.stages) == 1 else f"{name} {number + 1}"
            check = partial(_train.error_rate, apply)
            seen = pool if stage.shifted else _stages.plain(pool)
            params = trainer.train(title, params, tx, loss, seen, stage.epochs, check).params
        for back in reversed(widen):
            params = back(params)
        return params

    def networks(self) -> dict[str, Tree]:
        """Return the teacher and the pruned networks."""
        teacher, pool = self.teach()
        trees = {name: self.pruned(name, teacher, pool) for name in self.settings.recipes}
        return {"teacher": teacher} | trees


def measure(name: str, tree: Tree, data: _data.Dataset, file: Path) -> dict[str, Any]:
    """Write a network to a file, reload it, count what is left, and test it."""
    _, apply = mnist_lenet.network("lenet5" if name == "teacher" else name, data.num_classes)
    file.parent.mkdir(parents=True, exist_ok=True)
    written = codec.save(file, tree)
    codec.verify(file, tree)
    params = jopt.materialize(codec.load(file))
    kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
    return {
        "parameters": _compress.size(params),
        "left": _compress.nonzero(params),
        "ratio": round(_compress.size(params) / max(_compress.nonzero(params), 1), 2),
        "kernels_ratio": round(_compress.size(kernels) / max(_compress.nonzero(kernels), 1), 2),
        "left_by_layer": {
            layer: {kind: int((leaf != 0).sum()) for kind, leaf in leaves.items()}
            for layer, leaves in params.items()
        },
        "bytes": written,
        "validation_error": round(mnist_lenet.error_on(apply, params, data.validation), 6),
        "test_error": round(mnist_lenet.error_on(apply, params, data.test), 6),
    }


def summary(rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Join the rows of the seeds, with their means."""
    keys = ("validation_error", "test_error", "ratio", "bytes")
    return {
        name: {"seeds": found}
        | {f"mean_{key}": round(float(np.mean([row[key] for row in found])), 6) for key in keys}
        for name, found in rows.items()
    }


def targets_of(rows: dict[str, Any], settings: Settings) -> list[dict[str, Any]]:
    """Hold the figures against what is asked for: the smallest ratio, the mean and worst error."""
    found = []
    for name, recipe in settings.recipes.items():
        seeds = rows[name]["seeds"]
        ratio = min(row["ratio"] for row in seeds)
        worst = max(row["test_error"] for row in seeds)
        mean = rows[name]["mean_test_error"]
        found += [
            _results.target(f"{name}: weights / weights left", ratio, recipe.ratio, "higher"),
            _results.target(f"{name}: mean test error", mean, recipe.error, "lower"),
            _results.target(f"{name}: worst seed's test error", worst, recipe.error, "lower"),
        ]
    return found


def smoke(settings: Settings) -> Settings:
    """Shorten every stage to an epoch or two."""
    recipes = {
        name: dataclasses.replace(
            recipe,
            stages=tuple(
                dataclasses.replace(
                    each,
                    prune=min(each.prune, 2),
                    tune=min(each.tune, 1),
                    dense=min(each.dense, 1),
                )
                for each in recipe.stages
            ),
        )
        for name, recipe in settings.recipes.items()
    }
    return dataclasses.replace(
        settings, teacher=mnist_lenet.smoke(settings.teacher), recipes=recipes
    )


def run(
    dataset: str | None,
    head: int | None,
    seeds: tuple[int, ...],
    work: Path,
    plot: Callable[[str], Path],
    console: Console,
) -> dict[str, Any]:
    """Run or resume the part; returns its tag, data, settings, figures and targets."""
    settings = Settings(dataset=dataset or "mnist", seeds=seeds)
    data = _data.load_or_exit(settings.dataset, console.print)
    if head is not None:
        settings, data = smoke(settings), _data.head(data, head)
    common = dataclasses.asdict(settings) | {"seeds": None, "recipes": None}
    folder = work / _checkpoint.digest(
        [jopt.__version__, [common, data.source, len(data.train[1])]]
    )
    columns = [
        TextColumn("{task.description:>14}"),
        BarColumn(24),
        TextColumn("{task.completed:>3.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    ]
    trees, seconds, history = {}, {}, {}
    for seed in seeds:
        with Progress(*columns, console=console) as progress:
            each = Run(settings, data, seed, folder, progress)
            trees[seed] = each.networks()
            seconds[seed], history[seed] = each.trainer.seconds, each.trainer.history
    rows = summary(
        {
            name: [
                {"seed": seed} | measure(name, trees[seed][name], data, folder / "packed.jopt")
                for seed in seeds
            ]
            for name in ("teacher", *settings.recipes)
        }
    )
    tag = "" if data.tag == "mnist" else data.tag
    targets = targets_of(rows, settings) if data.tag == "mnist" else []
    goals = {name: (recipe.ratio, recipe.error) for name, recipe in settings.recipes.items()}
    _prune_extreme_report.plot(rows, goals, data.tag, plot(tag))
    _prune_extreme_report.table(rows, targets, console)
    return {
        "tag": tag,
        "data": _data.about(data),
        "settings": dataclasses.asdict(settings),
        "figures": {
            "networks": rows,
            "seconds": seconds,
            "validation_error_by_epoch": history,
        },
        "targets": targets,
    }
