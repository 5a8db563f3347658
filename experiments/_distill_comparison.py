"""One small student, taught by every method; and by few labels.

The teacher is a residual network, trained with labels on images that are mirrored and shifted anew
at every step. What it says is the mean over an image and its mirror image; it is asked once about
the training images. Every student has the same architecture, start, order of images and number of
steps within a seed, and differs in its loss alone. Beside the methods on single pairs there are
chains (`jopt.distill.distill_chain`): an assistant between teacher and student, and a student that
is born again, taught by nobody but itself.

With fewer labels, the student has labels for 1 % or 10 % of the images. Alone it sees these only;
the teacher is also asked about the others. (The teacher itself knew all labels: the case of a
large network that somebody else trained.)
"""

import dataclasses
import json
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import jopt
from experiments import (
    _checkpoint,
    _compress,
    _data,
    _distill_methods,
    _distill_report,
    _distill_training,
    _models,
    _parts,
    _results,
    _rows,
    _train,
    quantize_images,
)
from experiments._distill_methods import METHODS
from experiments._residual import ESTIMATED, Network, shared_network
from jopt import distill, prune

Tree = Any
TEACHER_ACCURACY = 0.935  # that is asked for
SMALLER = 10.0  # times


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides the outcome, written into the results."""

    dataset: str = "fashion_mnist"
    seeds: tuple[int, ...] = (0, 1, 2)
    teacher: tuple[tuple[int, ...], tuple[int, ...]] = ((24, 64), (1, 2))  # widths, blocks
    assistant: tuple[tuple[int, ...], tuple[int, ...]] = ((16, 32), (0, 1))
    student: tuple[tuple[int, ...], tuple[int, ...]] = ((12, 24), (0, 1))
    batch: int = 64
    teacher_epochs: int = 12
    epochs: int = 6
    tuning_epochs: int = 2
    rate: float = 3e-3
    weight_decay: float = 1e-2
    max_shift: int = 1
    copies: int = 1  # small networks that are trained for so long gain nothing by more
    labels: tuple[float, ...] = (0.01, 0.1)
    generations: int = 1


class Run:
    """The data, the teacher, what it said, and the students."""

    def __init__(self, settings: Settings, data: _data.Dataset, work: Path, say: Any) -> None:
        """Put the data on the device."""
        self.settings, self.data, self.say = settings, data, say
        self.validation, self.test = (
            (jnp.asarray(images), jnp.asarray(labels))
            for images, labels in (data.validation, data.test)
        )
        self.shape = data.train[0].shape[1:]
        self.work = work / self.digest([])
        self.pool = _distill_training.make_pool(data, settings.copies, settings.max_shift)

    def digest(self, more: list[Any]) -> str:
        """Name what decides the trainings, and whatever else does."""
        about = dataclasses.asdict(self.settings) | {"seeds": None, "labels": None}
        data = [self.data.source, len(self.data.train[1])]
        soft = [_distill_methods.TEMPERATURE, _distill_methods.SOFT_WEIGHT]
        return _checkpoint.digest([jopt.__version__, about, *soft, *data, *more])

    def network(self, widths: Any) -> Network:
        """Return the network of some widths and blocks."""
        return shared_network(*map(tuple, widths), self.data.num_classes)

    @cached_property
    def estimation(self) -> Array:
        """Return the images that batch norms are estimated on."""
        return _train.normalize(self.pool.images[: min(ESTIMATED, self.pool.count)])

    def fit(self, epochs: int, augment: Any = _train.unchanged) -> _distill_training.Fit:
        """Return how networks are trained."""
        settings = self.settings
        return _distill_training.Fit(
            settings.batch, epochs, settings.rate, settings.weight_decay, augment, plain_last=True
        )

    @cached_property
    def teacher(self) -> Tree:
        """Train the teacher, or read it; its batch norms are folded."""
        network = self.network(self.settings.teacher)
        params = network.initial(jax.random.key(0), self.shape)
        loss = _distill_methods.make_loss(METHODS["alone"], 0.0, network.training)
        augment = quantize_images.augment(self.settings.max_shift)
        plain = dataclasses.replace(
            self.pool,
            images=self.pool.images[: self.pool.count],
            labels=self.pool.labels[: self.pool.count],
        )
        fit = self.fit(self.settings.teacher_epochs, augment)
        trained = {"student": params, "extra": ()}
        trained = fit.run(loss, trained, plain, 0, self.work / "teacher.ckpt", self.say)
        return network.fold(trained["student"], self.estimation)

    @cached_property
    def taught(self) -> _distill_training.Pool:
        """Return the pool with what the teacher says."""
        network = self.network(self.settings.teacher)

        def apply(params: Tree, images: Array) -> _models.Features:
            found = network.two_sided(params, images)
            return found._replace(maps=found.maps.astype(jnp.float16))

        return _distill_training.ask(self.pool, apply, self.teacher, self.work / "answers")

    def train(
        self,
        name: str,
        method: _distill_methods.Method,
        weight: float,
        pool: _distill_training.Pool,
        seed: int,
        *,
        widths: Any = None,
        epochs: int | None = None,
        examples: Array | None = None,
    ) -> Tree:
        """Train one network by a method; returns it folded."""
        settings = self.settings
        network = self.network(widths or settings.student)
        key = jax.random.key(100 + seed)
        params = network.initial(key, self.shape)
        teacher_width = settings.teacher[0][-1]
        about = _distill_methods.Widths(network.widths[-1], teacher_width, pool.count)
        extra, state = method.init(jax.random.fold_in(key, 1), about)
        trained = self.fit(epochs or settings.epochs).run(
            _distill_methods.make_loss(method, weight, network.training),
            {"student": params, "extra": extra},
            pool,
            seed,
            self.work / f"{name}{f'-{weight:g}' if weight else ''}-{seed}.ckpt",
            self.say,
            state=state,
            examples=examples,
        )
        return network.fold(trained["student"], self.estimation)

    def scores(self, params: Tree, widths: Any = None, two_sided: bool = False) -> dict[str, float]:
        """Return validation and test accuracy."""
        network = self.network(widths or self.settings.student)
        return {
            "validation": network.accuracy(params, self.validation, two_sided),
            "test": network.accuracy(params, self.test, two_sided),
        }

    def answers(self, params: Tree, widths: Any) -> _distill_training.Pool:
        """Return the pool with the logits of another teacher."""
        network = self.network(widths)
        forward = jax.jit(lambda params, part: network.logits(params, _train.normalize(part)))
        logits = _train.in_parts(partial(forward, params), self.pool.images)
        said = _models.Features(logits, logits[:, :0], logits[:, :0])
        return dataclasses.replace(self.pool, teacher=said)

    def weights(self) -> dict[str, Any]:
        """Choose each method's weight by a short training of the first seed."""
        file = self.work / "weights.json"
        found = json.loads(file.read_text()) if file.exists() else {}
        for name, method in METHODS.items():
            if name in found and found[name]["tried"] == list(method.weights):
                continue
            tried = {}
            for weight in method.weights if len(method.weights) > 1 else ():
                params = self.train(
                    f"tuning-{name}",
                    method,
                    weight,
                    self.taught,
                    self.settings.seeds[0],
                    epochs=self.settings.tuning_epochs,
                )  # fmt: skip
                network = self.network(self.settings.student)
                tried[f"{weight:g}"] = network.accuracy(params, self.validation)
            only = next(iter(method.weights))
            best = max(tried, key=lambda key: tried[key]) if tried else only
            found[name] = {"weight": float(best), "validation": tried}
            found[name]["tried"] = list(method.weights)
            _results.write_atomically(file, json.dumps(found).encode())
        return found


def measure(run: Run, seed: int, weights: dict[str, Any]) -> list[dict[str, Any]]:
    """Train and score every student of one seed that is not among the finished ones."""
    settings = run.settings
    rows = _rows.Rows(run.work / f"rows-{seed}.json", ("method", "labels", "weight"))

    def row(name: str, labels: float, make: Callable[[], Tree], weight: float = 0.0) -> None:
        def measured() -> dict[str, Any]:
            scores = run.scores(make())
            words = f"{name} {labels:g} {weight:g}"
            run.say(f"seed {seed}: {words}: validation {scores['validation']:.2%}")
            return scores

        rows.add({"method": name, "labels": labels, "weight": weight}, measured)

    train = partial(run.train, seed=seed)
    for name, method in METHODS.items():
        weight = weights[name]["weight"]
        row(name, 1.0, partial(train, name, method, weight, run.taught), weight)
    scores = {row["method"]: row["validation"] for row in rows.list()}
    best = max(_distill_methods.FEATURES, key=lambda name: scores[name])
    both = dataclasses.replace(METHODS[best], soft=True)
    weight = weights[best]["weight"]
    make = partial(train, f"KD-{best}", both, weight, run.taught)
    row("KD + best feature", 1.0, make, weight)

    def taught_by(name: str, teacher: tuple[Tree, Any]) -> tuple[Tree, Any]:
        return train(name, METHODS["KD"], 0.0, run.answers(*teacher)), settings.student

    def assisted() -> Tree:
        def assistant(teacher: tuple[Tree, Any]) -> tuple[Tree, Any]:
            assistant = run.train(
                "assistant",
                METHODS["KD"],
                0.0,
                run.taught,
                settings.seeds[0],
                widths=settings.assistant,
            )
            return assistant, settings.assistant

        chain = [assistant, partial(taught_by, "assisted")]
        return distill.distill_chain((run.teacher, settings.teacher), chain)[-1][0]

    row("teacher assistant", 1.0, assisted)

    def born_again() -> Tree:
        first = train("alone", METHODS["alone"], 0.0, run.taught), settings.student
        chain = [
            partial(taught_by, f"generation{number}") for number in range(settings.generations)
        ]
        return distill.distill_chain(first, chain)[-1][0]

    row("born again", 1.0, born_again)

    for fraction in settings.labels:
        known = _distill_training.labelled(run.pool, fraction, settings.batch, seed)
        partly = _distill_training.without_labels(run.taught, known)
        stem = f"{fraction:g}"
        row(
            "alone",
            fraction,
            partial(train, f"alone-{stem}", METHODS["alone"], 0.0, run.taught, examples=known),
        )
        row(
            "KD",
            fraction,
            partial(train, f"KD-all-{stem}", METHODS["KD"], 0.0, partly),
        )
    return rows.list()


def about_networks(run: Run) -> dict[str, Any]:
    """Count parameters and multiply-adds, and score the teacher and the assistant."""
    settings, found = run.settings, {}
    trees = {"teacher": (run.teacher, settings.teacher)}
    for name in ("assistant", "student"):
        widths = getattr(settings, name)
        network = run.network(widths)
        params = network.fold(network.initial(jax.random.key(0), run.shape), run.estimation[:64])
        trees[name] = params, widths
    for name, (params, widths) in trees.items():
        network = run.network(widths)
        images = jnp.zeros((1, *run.shape))
        found[name] = {
            "parameters": _compress.size(params),
            "multiply_adds": prune.multiply_adds(network.visible_logits, params, images).total,
        }
    found["teacher"]["multiply_adds"] *= 2  # an image and its mirror image
    found["teacher"] |= run.scores(run.teacher, settings.teacher, two_sided=True)
    return found


def smoke(settings: Settings) -> Settings:
    """Shorten everything to an epoch of small networks."""
    return dataclasses.replace(
        settings,
        teacher=((8, 16), (0, 1)),
        assistant=((4, 8), (0, 0)),
        student=((2, 4), (0, 0)),
        batch=32,
        teacher_epochs=1,
        epochs=1,
        tuning_epochs=1,
        copies=2,
        labels=(0.1,),
        generations=1,
    )


def run(call: _parts.Call) -> dict[str, Any]:
    """Run or resume the part; returns its tag, data, settings, figures and targets."""
    settings = Settings(dataset=call.dataset or "fashion_mnist", seeds=call.seeds)
    settings = settings if call.head is None else smoke(settings)
    data = _data.load_or_exit(settings.dataset, call.console.print)
    data = call.cut(data)
    each = Run(settings, data, call.work, call.console.print)
    networks = about_networks(each)
    weights = each.weights()
    by_seed = [measure(each, seed, weights) for seed in call.seeds]
    rows = _results.join_seeds(by_seed, ("method", "labels"), ("validation", "test"))
    figures = {"networks": networks, "weights": weights, "students": rows}
    tag = "" if data.tag == "fashion_mnist" else data.tag
    targets = [] if tag else targets_of(figures)
    _distill_report.table(figures, targets, call.console)
    _distill_report.plot(figures, call.plot(tag))
    return {
        "tag": tag,
        "data": _data.about(data),
        "settings": dataclasses.asdict(settings)
        | {
            "temperature": _distill_methods.TEMPERATURE,
            "soft_weight": _distill_methods.SOFT_WEIGHT,
            "negatives": _distill_methods.NEGATIVES,
        },
        "figures": figures,
        "targets": targets,
    }


def targets_of(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Hold the figures against what is asked for."""
    networks = figures["networks"]
    rows = {(row["method"], row["labels"]): row for row in figures["students"]}
    teacher, student = networks["teacher"], networks["student"]
    found = [
        _results.target("teacher's test accuracy", teacher["test"], TEACHER_ACCURACY, "higher"),
        _results.target(
            "parameters of the teacher over the student's",
            round(teacher["parameters"] / student["parameters"], 2),
            SMALLER,
            "higher",
        ),
    ]
    for labels in sorted({row["labels"] for row in figures["students"]}):
        alone, taught = rows["alone", labels], rows["KD", labels]
        gain = round(taught["mean_test"] - alone["mean_test"], 6)
        spread = max(alone["spread_test"], taught["spread_test"])
        words = f"KD above alone with {labels:.0%} of the labels, beyond the spread"
        found.append(_results.target(words, gain, spread, "higher"))
    return found
