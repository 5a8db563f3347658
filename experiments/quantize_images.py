"""Quantize a batch-norm network on Fashion-MNIST, by every method and at every number of bits.

    python -m experiments.quantize_images                    # three seeds
    python -m experiments.quantize_images --smoke            # a trial in a minute or two
    python -m experiments.quantize_images --seeds 1 --train-only   # one part of the work

A small convolutional network is trained in floats for each seed. Then every method after training
and every recipe of training through quantization makes a network of it, which is packed into one
`.jopt` file and tested as reloaded from that file. The inner kernels (conv2, conv3, dense1: 98 % of
the weights) get the format that the table names, the first and the last kernel eight bits, biases
stay floats; batch norms are folded. Rows with "inputs" also quantize what goes into the layers.

Choices (the number of epochs, the best method of a target) are made on a validation part of the
training images; the test images are looked at once, at the end. Finished trainings and rows are
kept: a killed run goes on where it was, and `--restart` forgets them.
"""

import argparse
import dataclasses
import shutil
import tempfile
import time
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from rich.console import Console

import jopt
from experiments import (
    _after_training,
    _checkpoint,
    _cnn,
    _data,
    _quantize_report,
    _results,
    _rows,
    _through_training,
    _train,
)
from jopt import codec, materialize, quant

Tree = Any
EXAMPLES = 1024  # training images that calibrate ranges and statistics
ESTIMATED = 4096  # training images that batch norms are estimated on


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides the outcome, written into the results."""

    dataset: str = "fashion_mnist"
    seeds: tuple[int, ...] = (0, 1, 2)
    batch: int = 128
    epochs: int = 12
    rate: float = 3e-3
    weight_decay: float = 2e-2
    max_shift: int = 1
    tuning_shift: int = 1
    trial: bool = False


def augment(max_shift: int) -> Any:
    """Return the augmentation: mirrored at random, moved by up to some pixels."""

    def change(key: Array, images: Array) -> Array:
        shift_key, flip_key = jax.random.split(key)
        flips = jax.random.bernoulli(flip_key, 0.5, (len(images), 1, 1, 1))
        images = jnp.where(flips, images[:, :, ::-1], images)
        return _train.random_shift(shift_key, images, max_shift) if max_shift else images

    return change


def _decayed(tree: Tree) -> Tree:
    """Say which leaves weight decay acts on: the kernels."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: path[-1] == jax.tree_util.DictKey("kernel"), tree
    )


def optimizer(rate: float, steps: int, decay: float) -> optax.GradientTransformation:
    """Return AdamW with a warm-up and a cosine to a hundredth of the rate."""
    warm = min(300, steps // 4)
    schedule = optax.warmup_cosine_decay_schedule(rate / 20, rate, warm, steps, rate / 100)
    return optax.adamw(schedule, weight_decay=decay, mask=_decayed)


def _cross_entropy(logits: Array, labels: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class Run:
    """The data, the settings and where finished trainings and rows are kept."""

    def __init__(self, settings: Settings, data: _data.Dataset, work: Path, say: Any) -> None:
        """Put the data on the device."""
        self.settings, self.data, self.say = settings, data, say
        self.train, self.validation, self.test = (
            (jnp.asarray(images), jnp.asarray(labels))
            for images, labels in (data.train, data.validation, data.test)
        )
        self.steps = max(1, len(data.train[1]) // settings.batch)
        # Made once, so that what is compiled for one seed serves the others.
        self.rows, self.recipes = _after_training.rows(), _through_training.recipes()
        if settings.trial:
            self.rows = self.rows[:: len(self.rows) // 3]
            shortened = [dataclasses.replace(each, epochs=1) for each in self.recipes]
            self.recipes = shortened[:: len(shortened) - 1]
        self.work = work / self._digest()
        self.float_step = self._float_step()
        self.recipe_steps = {each.name: self._recipe_step(each) for each in self.recipes}

    def _digest(self) -> str:
        """Return a name of what decides the trainings; other settings never take them over."""
        settings = dataclasses.asdict(self.settings) | {"seeds": None}
        recipes = [(each.name, each.epochs, each.rate) for each in self.recipes]
        about = [jopt.__version__, settings, recipes, self.data.source, len(self.data.train[1])]
        return _checkpoint.digest(about)

    def fit(
        self,
        step: _train.Step,
        tx: Any,
        tree: Tree,
        fixed: Tree,
        epochs: int,
        key: Array,
        file: str,
    ) -> tuple[Tree, float]:
        """Train for some epochs, or read what was trained before; returns tree and seconds."""
        path = self.work / f"{file}.ckpt"
        restored = _checkpoint.restore(path, (tree, np.zeros((), np.float32)))
        if restored is not None:
            return restored[0], float(restored[1])
        began = time.monotonic()
        carry = _train.start(tree, tx, key)

        def say(epoch: int, losses: Array) -> None:
            self.say(f"{file}: epoch {epoch}/{epochs}, loss {float(losses.mean()):.4f}")

        batch = self.settings.batch
        carry = _train.run_epochs(step, carry, self.train, batch, epochs, key, fixed, say)
        seconds = time.monotonic() - began
        _checkpoint.save(path, (carry.params, np.float32(seconds)))
        return carry.params, seconds

    def _float_step(self) -> tuple[_train.Step, Any]:
        """Return the step that trains the float network, and its optimizer."""
        settings = self.settings
        tx = optimizer(settings.rate, self.steps * settings.epochs, settings.weight_decay)

        def loss(params: Tree, images: Array, labels: Array, key: Array, fixed: Tree) -> Array:
            return _cross_entropy(_cnn.training_logits(params, images), labels)

        return _train.make_step(loss, tx, augment=augment(settings.max_shift)), tx

    def _recipe_step(self, recipe: _through_training.Recipe) -> tuple[_train.Step, Any]:
        """Return the step of a recipe, and its optimizer."""
        settings = self.settings
        tx = optimizer(recipe.rate, self.steps * recipe.epochs, settings.weight_decay)

        def loss(tree: Tree, images: Array, labels: Array, key: Array, fixed: Tree) -> Array:
            whole = tree | fixed
            logits = _cnn.training_logits(recipe.weights(whole), images, recipe.change(whole))
            return _cross_entropy(logits, labels) + recipe.penalty(whole)

        return _train.make_step(loss, tx, augment=augment(settings.tuning_shift)), tx

    def float_network(self, seed: int) -> Tree:
        """Train the float network of a seed; returns its parameters, batch norms not folded."""
        params, _ = _cnn.initial(jax.random.key(seed))
        step, tx = self.float_step
        key = jax.random.fold_in(jax.random.key(seed), 1)
        epochs = self.settings.epochs
        return self.fit(step, tx, params, {}, epochs, key, f"float-{seed}")[0]

    def estimated(self, params: Tree, change: Any) -> Tree:
        """Return running averages for these kernels and inputs."""
        images = _train.normalize(self.train[0][:ESTIMATED])
        return _cnn.estimate(params, change, images)

    def calibrated(self, params: Tree) -> _after_training.Network:
        """Fold the float network and gather statistics of its inputs."""
        averages = self.estimated(params, _cnn.quantize_inputs({}))
        return _after_training.calibrated(_cnn.fold(params, averages), self.train[0][:EXAMPLES])

    def trained(
        self, recipe: _through_training.Recipe, seed: int, params: Tree, ranges: Tree
    ) -> Tree:
        """Train a recipe from the float network; returns the folded, compressed network."""
        levels = {}
        if recipe.inputs:
            search, layers = quant.mse_search_range(), _through_training.QUANTIZED_INPUTS
            levels = _cnn.input_levels(ranges, recipe.inputs, search, layers)
        tree, fixed = recipe.start(params, levels)
        step, tx = self.recipe_steps[recipe.name]
        key = jax.random.fold_in(jax.random.key(seed), 2)
        file = f"{recipe.name}-{seed}"
        tree, _ = self.fit(step, tx, tree, fixed, recipe.epochs, key, file)
        whole = tree | fixed
        inputs = recipe.levels(whole)
        averages = self.estimated(recipe.weights(whole), _cnn.quantize_inputs(inputs))
        return {"params": _cnn.fold(recipe.export(whole), averages), "inputs": inputs}


def packed(tree: Tree, file: Path) -> tuple[int, Tree]:
    """Write a network to a file; returns its size and what is reloaded from it."""
    size = codec.save(file, tree)
    codec.verify(file, tree)
    return size, codec.load(file)


def score(run: Run, when: str, row: Any, tree: Tree, folder: Path) -> dict[str, Any]:
    """Pack and reload a network and test it; returns its row of the results."""
    size, tree = packed(tree, folder / "network.jopt")
    tree = tree | {"params": materialize(tree["params"])}  # one compiled program for all rows
    return {
        "when": when,
        "method": "float32" if row is None else row.method,
        "format": "float32" if row is None else row.format,
        "inputs": 0 if row is None else row.inputs,
        "bytes": size,
        "validation": round(1 - _cnn.error(tree, run.validation), 6),
        "test": round(1 - _cnn.error(tree, run.test), 6),
    }


def measure(run: Run, seed: int, folder: Path) -> list[dict[str, Any]]:
    """Make and score every row for one seed that is not among the finished ones."""
    rows = _rows.Rows(run.work / f"rows-{seed}.json", ("name",))
    params = cache(lambda: run.float_network(seed))
    network = cache(lambda: run.calibrated(params()))

    def made(when: str, row: Any) -> Tree:
        if when == "float":
            return {"params": network().params, "inputs": {}}
        if when == "after":
            return _after_training.make(row, network())
        return run.trained(row, seed, params(), network().ranges)

    def measured(name: str, when: str, row: Any) -> dict[str, Any]:
        found = score(run, when, row, made(when, row), folder)
        validation = f"validation {found['validation']:.2%}"
        run.say(f"seed {seed}, {name}: {found['bytes']:,} bytes, {validation}")
        return found

    wanted: dict[str, tuple[str, Any]] = {"float": ("float", None)}
    wanted |= {f"after {row.name}": ("after", row) for row in run.rows}
    wanted |= {f"through {recipe.name}": ("through", recipe) for recipe in run.recipes}
    for name, each in wanted.items():
        rows.add({"name": name}, partial(measured, name, *each))
    return rows.list()


def train_all(run: Run, seed: int) -> None:
    """Train the float network and every recipe of one seed."""
    params = run.float_network(seed)
    network = run.calibrated(params)
    for recipe in run.recipes:
        run.trained(recipe, seed, params, network.ranges)


def smoke(settings: Settings) -> Settings:
    """Shorten everything to an epoch of what little data there then is, and to a few rows."""
    return dataclasses.replace(settings, seeds=settings.seeds[:1], epochs=1, trial=True)


def experiment_name(data: _data.Dataset) -> str:
    """Name the results so that other data never overwrite those of full Fashion-MNIST."""
    return "quantize_images" if data.tag == "fashion_mnist" else f"quantize_images-{data.tag}"


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.quantize_images")
    parser.add_argument("--dataset", default="fashion_mnist", help="28 by 28 TFDS image set")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--train-only", action="store_true", help="train, measure nothing")
    parser.add_argument("--smoke", action="store_true", help="an epoch of a few images")
    parser.add_argument("--restart", action="store_true", help="forget finished trainings")
    parser.add_argument("--out", type=Path, default=_results.RESULTS, help="where results go")
    options = parser.parse_args(arguments)
    console = Console(highlight=False)
    console.width = max(console.width, 120)  # the table has ten columns
    settings = Settings(dataset=options.dataset, seeds=tuple(options.seeds))
    try:
        data = _data.load(settings.dataset)
    except _data.DataUnavailable as problem:
        raise SystemExit(str(problem)) from None
    if data.train[0].shape[1:] != _cnn.SHAPE or data.num_classes != 10:
        raise SystemExit(
            f"dataset must have 10 classes of images of shape {_cnn.SHAPE}, but {data.name} has "
            f"{data.num_classes} of shape {data.train[0].shape[1:]}."
        )
    if data.note:
        console.print(data.note)
    out = options.out
    if options.smoke:
        settings, data = smoke(settings), _data.head(data, 512)
        out = _data.CACHE / "smoke" if out == _results.RESULTS else out
    run = Run(settings, data, _data.CACHE / "quantize_images", lambda words: console.print(words))
    if options.restart:
        shutil.rmtree(run.work, ignore_errors=True)
    run.work.mkdir(parents=True, exist_ok=True)
    with _train.quick_compilation() if options.smoke else nullcontext():
        if options.train_only:
            for seed in settings.seeds:
                train_all(run, seed)
            return
        with tempfile.TemporaryDirectory() as folder:
            by_seed = [measure(run, seed, Path(folder)) for seed in settings.seeds]
    if options.smoke:
        shutil.rmtree(run.work, ignore_errors=True)
    results = {
        "command": _results.command("experiments.quantize_images"),
        **_results.environment(("constriction", "tensorflow-datasets")),
        "data": _data.about(data),
        "settings": {**dataclasses.asdict(settings), "examples": EXAMPLES, "estimated": ESTIMATED},
        "figures": {"rows": _quantize_report.joined(by_seed)},
        "targets": [],
    }
    if data.tag == "fashion_mnist":
        results["targets"] = _quantize_report.targets(results["figures"]["rows"])
    file = _results.write_results(experiment_name(data), results, out)
    _quantize_report.plot(results["figures"]["rows"], file.with_suffix(""))
    _quantize_report.table(results, console)
    console.print(f"Results: {file}, plot {file.with_suffix('.png')}")


if __name__ == "__main__":
    main()
