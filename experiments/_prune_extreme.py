"""Extreme sparsity: LeNet-5 with one weight in 280 left, LeNet-300-100 with one in 68, on MNIST.

A LeNet-5 is trained with labels and becomes the teacher (as in `experiments.mnist_lenet`). Both
networks then learn from it, on images shifted by up to a pixel, while the weights that matter least
are removed over all layers together along a polynomial schedule (Zhu and Gupta's), and are
fine-tuned with the masks held as the learning rate falls. What matters is `w^2` times the running
mean of squared gradients (`prune.fisher`): magnitudes alone leave too few weights in the
convolutions, whose every weight serves many pixels, no biases, and weights that lead nowhere.

What is counted: everything. Biases are pruned in the same ranking as kernels, and the ratio is all
parameters, kernels and biases, over those that are not zero in the file that reloads.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import jopt
from experiments import (
    _checkpoint,
    _compress,
    _data,
    _parts,
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
class Recipe:
    """How one network is pruned.

    Attributes:
      ratio: all parameters over those left.
      error: test error that is asked for.
      dense: epochs before pruning begins; LeNet-5 starts from the teacher and needs none.
      prune: epochs over which sparsity rises.
      tune: epochs with the masks held.
      rate: Adam's learning rate until then; it falls to a hundredth in fine-tuning.
      decay: weight decay of kernels, times the learning rate.
      power: of the schedule; 3 is Zhu and Gupta's, a higher one leaves more time for the end.
      temperature: of the teacher's answers.
    """

    ratio: float
    error: float
    dense: int
    prune: int
    tune: int
    rate: float
    decay: float
    power: float
    temperature: float


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
                68, 0.0190, 10, 40, 20, 2e-3, decay=0.1, power=3, temperature=4
            ),
            "lenet5": Recipe(280, 0.0080, 0, 40, 40, 1e-2, decay=1e-2, power=4, temperature=2),
        }
    )


def pruning(recipe: Recipe, total: int, epoch: int, every: int) -> optax.GradientTransformation:
    """Return the optimizer that trains, prunes to exactly `total // ratio` weights, and tunes.

    Args:
      recipe: what to do.
      total: parameters of the network.
      epoch: updates in an epoch.
      every: updates between two prunings.
    """
    begin, rising, tuning = (n * epoch for n in (recipe.dense, recipe.prune, recipe.tune))
    level = optax.polynomial_schedule(
        0.0, 1 - (total // recipe.ratio) / total, recipe.power, rising, begin
    )
    warm = max(1, min(200, epoch // 2))
    rate = optax.join_schedules(
        [
            optax.linear_schedule(0.1 * recipe.rate, recipe.rate, warm),
            optax.constant_schedule(recipe.rate),
            optax.cosine_decay_schedule(recipe.rate, tuning, alpha=0.01),
        ],
        [warm, begin + rising],
    )
    rule = prune.gradual(
        level,
        max(1, min(every, rising // 4)),
        prune.fisher(),
        partial(prune.global_topk_masks, where=ALL),
    )
    return prune.sparse_training(optax.adamw(rate, weight_decay=recipe.decay, mask=_kernels), rule)


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
        start = teacher if name == "lenet5" else self.compression.initial(name)
        epoch = pool.count // min(settings.batch, pool.count)
        tx = pruning(recipe, _compress.size(start), epoch, settings.prune_every)
        loss = _stages.distilled_loss(
            apply, lambda params: params, recipe.temperature, settings.soft_weight
        )
        epochs = recipe.dense + recipe.prune + recipe.tune
        folder = self.trainer.folder / _checkpoint.digest(
            [jopt.__version__, dataclasses.asdict(recipe)]
        )
        trainer = dataclasses.replace(self.trainer, folder=folder)  # one history for both
        check = partial(_train.error_rate, apply)
        return trainer.train(name, start, tx, loss, pool, epochs, check).params

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
        name: dataclasses.replace(recipe, dense=1, prune=2, tune=1)
        for name, recipe in settings.recipes.items()
    }
    return dataclasses.replace(
        settings, teacher=mnist_lenet.smoke(settings.teacher), recipes=recipes
    )


def run(call: _parts.Call) -> dict[str, Any]:
    """Run or resume the part; returns its tag, data, settings, figures and targets."""
    settings = Settings(dataset=call.dataset or "mnist", seeds=call.seeds)
    data = _data.load_or_exit(settings.dataset, call.console.print)
    if call.head is not None:
        settings, data = smoke(settings), call.cut(data)
    common = dataclasses.asdict(settings) | {"seeds": None, "recipes": None}
    folder = call.work / _checkpoint.digest(
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
    for seed in call.seeds:
        with Progress(*columns, console=call.console) as progress:
            each = Run(settings, data, seed, folder, progress)
            trees[seed] = each.networks()
            seconds[seed], history[seed] = each.trainer.seconds, each.trainer.history
    rows = summary(
        {
            name: [
                {"seed": seed} | measure(name, trees[seed][name], data, folder / "packed.jopt")
                for seed in call.seeds
            ]
            for name in ("teacher", *settings.recipes)
        }
    )
    tag = "" if data.tag == "mnist" else data.tag
    targets = targets_of(rows, settings) if data.tag == "mnist" else []
    goals = {name: (recipe.ratio, recipe.error) for name, recipe in settings.recipes.items()}
    _prune_extreme_report.plot(rows, goals, data.tag, call.plot(tag))
    _prune_extreme_report.table(rows, targets, call.console)
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
