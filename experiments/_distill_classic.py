"""The pair of many tutorials: a deep and a shallow convolutional network on 32 by 32 RGB images.

Teacher: conv 6@5x5, pool, conv 16@5x5, pool, dense 120, 84 and 10. Student: conv 6@5x5, pool, dense
84 and 10. (The student is shallower and needs a third fewer multiply-adds, yet it has more
parameters: its first dense layer sees maps that were pooled once only.) Each seed has its own
teacher, which is trained for longer. The student learns alone; from the teacher; and from the
teacher, then with labels only, at a tenth of the rate. Where labels are few, it learns from those
alone, or from the teacher on all images. Images of another size or of one channel are resized and
repeated.
"""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jopt
from experiments import (
    _checkpoint,
    _compress,
    _convolution,
    _data,
    _distill_methods,
    _distill_report,
    _distill_training,
    _models,
    _parts,
    _results,
    _train,
)
from jopt import prune

Tree = Any
SIDE = 32


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides the outcome, written into the results."""

    dataset: str = "fashion_mnist"
    seeds: tuple[int, ...] = (0, 1, 2)
    batch: int = 64
    teacher_epochs: int = 12
    epochs: int = 6
    tuning_epochs: int = 1
    labels: float = 0.1  # the part of the images that has labels, where they are few
    rate: float = 2e-3
    weight_decay: float = 1e-2
    max_shift: int = 1
    copies: int = 3


def resized(data: _data.Dataset) -> _data.Dataset:
    """Return the data as 32 by 32 RGB images."""

    @jax.jit
    def change(images: Array) -> Array:
        shape = (len(images), SIDE, SIDE, images.shape[-1])
        images = jax.image.resize(images.astype(jnp.float32), shape, "bilinear")
        return jnp.round(jnp.clip(images, 0, 255)).astype(jnp.uint8)

    def part(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if images.shape[1:3] != (SIDE, SIDE):
            images = np.asarray(_train.in_parts(change, images))
        return np.broadcast_to(images, (*images.shape[:3], 3)), labels

    return dataclasses.replace(
        data, train=part(*data.train), validation=part(*data.validation), test=part(*data.test)
    )


class Pair:
    """The two networks, and how each is run."""

    def __init__(self, classes: int) -> None:
        """Make the modules."""
        deep = partial(_models.LeNet5, classes, filters=(6, 16), hidden=(120, 84))
        shallow = partial(_models.LeNet5, classes, filters=(6,), hidden=(84,))
        self.made = {"teacher": deep, "student": shallow}
        self.modules = {name: make() for name, make in self.made.items()}
        # One function for each network, so that each is compiled once.
        self.logits = {name: partial(_logits, module) for name, module in self.modules.items()}
        self.features = {name: partial(_features, each) for name, each in self.logits.items()}

    def initial(self, name: str, seed: int) -> Tree:
        """Return fresh parameters."""
        images = jnp.zeros((1, SIDE, SIDE, 3))
        return jax.jit(self.modules[name].init)(jax.random.key(seed), images)["params"]

    def about(self, name: str) -> dict[str, int]:
        """Count parameters and multiply-adds."""
        params = self.initial(name, 0)
        visible = self.made[name](conv_pool=_convolution.conv_pool_direct)
        count = prune.multiply_adds(
            partial(_logits, visible), params, jnp.zeros((1, SIDE, SIDE, 3))
        )
        return {
            "parameters": _compress.size(params),
            "multiply_adds": count.total,
        }


def _logits(module: _models.LeNet5, params: Tree, images: Array) -> Array:
    return module.apply({"params": params}, images)  # pyright: ignore[reportReturnType]


def _features(logits: Callable[[Tree, Array], Array], params: Tree, images: Array) -> Any:
    """Return logits where features are expected; there are no others to compare."""
    found = logits(params, images)
    return _models.Features(found, found[:, :0], found[:, :0])


def measure(
    settings: Settings,
    pair: Pair,
    pool: _distill_training.Pool,
    data: _data.Dataset,
    seed: int,
    work: Path,
    say: Any,
) -> list[dict[str, Any]]:
    """Train and score the networks of one seed, or read what is finished."""
    file = work / f"rows-{seed}.json"
    if file.exists():
        return json.loads(file.read_text())

    def train(
        name: str,
        network: str,
        method: str,
        params: Tree,
        pool: Any,
        epochs: int = settings.epochs,
        rate: float = settings.rate,
        examples: Array | None = None,
    ) -> Tree:
        loss = _distill_methods.make_loss(
            _distill_methods.METHODS[method], 0.0, pair.features[network]
        )
        fit = _distill_training.Fit(
            settings.batch, epochs, rate, settings.weight_decay, plain_last=True
        )
        trained = {"student": params, "extra": ()}
        stem = work / f"{name.replace(' ', '-')}-{seed}.ckpt"
        return fit.run(loss, trained, pool, seed, stem, say, examples=examples)["student"]

    trees = {}
    fresh = pair.initial("teacher", seed)
    trees["teacher"] = train("teacher", "teacher", "alone", fresh, pool, settings.teacher_epochs)

    said = pair.features["teacher"]
    taught = _distill_training.ask(pool, said, trees["teacher"], work / f"answers-{seed}")
    fresh = pair.initial("student", seed)
    trees["student alone"] = train("alone", "student", "alone", fresh, pool)
    trees["student, KD"] = train("KD", "student", "KD", fresh, taught)
    trees["student, KD then labels"] = train(
        "tuned",
        "student",
        "alone",
        trees["student, KD"],
        pool,
        settings.tuning_epochs,
        settings.rate / 10,
    )
    few = f"{settings.labels:.0%} of the labels"
    known = _distill_training.labelled(pool, settings.labels, settings.batch, seed)
    trees[f"student alone, {few}"] = train(
        "alone-few", "student", "alone", fresh, pool, examples=known
    )
    partly = _distill_training.without_labels(taught, known)
    trees[f"student, KD, {few}"] = train("KD-few", "student", "KD", fresh, partly)
    rows = []
    for name, params in trees.items():
        apply = pair.logits[name.split()[0].rstrip(",")]
        scores = {
            part: round(
                1 - _train.error_rate(apply, params, jnp.asarray(images), jnp.asarray(labels)), 6
            )
            for part, (images, labels) in (("validation", data.validation), ("test", data.test))
        }
        rows.append({"network": name} | scores)
        say(f"seed {seed}: {name}: validation {scores['validation']:.2%}")
    _results.write_atomically(file, json.dumps(rows).encode())
    return rows


def run(call: _parts.Call) -> dict[str, Any]:
    """Run or resume the part; returns its tag, data, settings, figures and targets."""
    settings = Settings(dataset=call.dataset or "fashion_mnist", seeds=call.seeds)
    data = _data.load_or_exit(settings.dataset, call.console.print)
    if call.head is not None:
        settings = dataclasses.replace(settings, batch=32, teacher_epochs=1, epochs=1, copies=2)
        data = call.cut(data)
    data = resized(data)
    about = dataclasses.asdict(settings) | {"seeds": None}
    soft = [_distill_methods.TEMPERATURE, _distill_methods.SOFT_WEIGHT]
    work = call.work / _checkpoint.digest(
        [jopt.__version__, about, *soft, data.source, len(data.train[1])]
    )
    pair = Pair(data.num_classes)
    pool = _distill_training.make_pool(data, settings.copies, settings.max_shift)
    by_seed = [
        measure(settings, pair, pool, data, seed, work, call.console.print) for seed in call.seeds
    ]
    figures = {
        "networks": {name: pair.about(name) for name in pair.modules},
        "rows": _results.join_seeds(by_seed, ("network",), ("validation", "test")),
    }
    tag = "" if data.tag == "fashion_mnist" else data.tag
    targets = [] if tag else targets_of(figures["rows"], settings.labels)
    _distill_report.classic_table(figures, targets, call.console)
    return {
        "tag": tag,
        "data": _data.about(data),
        "settings": dataclasses.asdict(settings)
        | {
            "temperature": _distill_methods.TEMPERATURE,
            "soft_weight": _distill_methods.SOFT_WEIGHT,
        },
        "figures": figures,
        "targets": targets,
    }


def targets_of(rows: list[dict[str, Any]], labels: float) -> list[dict[str, Any]]:
    """Ask that the taught student is better than the same student alone, beyond the spread.

    Asked where labels are few: with all of them this teacher has little to add.
    """
    by_name = {row["network"]: row for row in rows}
    few = f"{labels:.0%} of the labels"
    alone, taught = by_name[f"student alone, {few}"], by_name[f"student, KD, {few}"]
    gain = round(taught["mean_test"] - alone["mean_test"], 6)
    spread = max(alone["spread_test"], taught["spread_test"])
    words = f"KD above alone with {few}, beyond the spread"
    return [_results.target(words, gain, spread, "higher")]
