"""Channels that really go: a network on Fashion-MNIST with less than a quarter of its work.

The dense network is that of `experiments.quantize_images`. The groups of coupled channels are found
in the program of its training step; a criterion scores the units of every group, each group's
scores are divided by their mean, and the lowest go until the multiply-adds fit; each group keeps a
multiple of eight, which a CPU's vectors hold. What is left is shrunk at once, so that fine-tuning
runs on small arrays. The dense networks of all seeds together are the teacher, asked once about
every image and about mirrored and shifted copies. Batch norms are re-estimated and folded, and the
folded network is timed against the dense one of its seed.

Every criterion gets a short fine-tuning; the one that loses least on validation images gets a long
one (Beyer et al., "Knowledge distillation: A good teacher is patient and consistent", 2022,
https://arxiv.org/abs/2106.05237), and after it some epochs on images that are not shifted, as the
tested ones are not: a small network does not do well on both.
"""

import dataclasses
import json
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from rich import box
from rich.console import Console
from rich.table import Table

import jopt
from experiments import (
    _checkpoint,
    _cnn,
    _compress,
    _data,
    _distill_training,
    _models,
    _parts,
    _results,
    _timing,
    _train,
    quantize_images,
)
from jopt import distill, layers, prune

Tree = Any
EXAMPLES = 1024
FEWER = 4.0  # times fewer multiply-adds
LOST = 0.005  # accuracy that this may cost
FASTER = 2.5


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides the outcome, written into the results."""

    dataset: str = "fashion_mnist"
    seeds: tuple[int, ...] = (0, 1, 2)
    batch: int = 64
    fewer: float = 4.2  # multiply-adds, times
    multiple: int = 8  # of units
    trial_epochs: int = 4  # of every criterion
    epochs: int = 30  # of the chosen one
    settling: int = 15  # further epochs of that, on images as they are and mirrored
    settling_rate: float = 1e-3
    copies: int = 8
    max_shift: int = 1
    rate: float = 3e-3
    weight_decay: float = 1e-3
    temperature: float = 4.0
    soft_weight: float = 0.9
    repeats: int = 200


def _batch_norm_scales(run: "Run", params: Tree) -> Tree:
    del run
    return prune.batch_norm_scale_scores(params)


def _taylor(run: "Run", params: Tree) -> Tree:
    images, labels = run.examples()

    def loss(params: Tree) -> Array:
        logits = _cnn.training_logits(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return prune.saliency_scores(params, jax.jit(jax.grad(loss))(params))


def _random(run: "Run", params: Tree) -> Tree:
    del run  # the same units for every seed, of networks that differ
    return prune.random_scores(jax.random.key(0), params)


SCALES = ".*_norm/scale"
# Scores of weights, and which parameters count in the score of a unit.
CRITERIA: dict[str, tuple[Callable[["Run", Tree], Tree], Any]] = {
    "random": (_random, jopt.is_kernel),
    "magnitude": (lambda run, params: prune.magnitude_scores(params), jopt.is_kernel),
    "Taylor": (_taylor, jopt.is_kernel),
    "geometric median": (
        lambda run, params: _spread(prune.fpgm_scores(params), params),
        ".*kernel",
    ),
    "batch-norm scale": (_batch_norm_scales, SCALES),
}


def _spread(scores: Tree, params: Tree) -> Tree:
    """Give every weight the score of its filter."""
    return jax.tree.map(lambda score, leaf: jnp.broadcast_to(score, leaf.shape), scores, params)


def eval_images(count: int) -> Array:
    """Return images of zeros, of which only the shape matters."""
    return jnp.zeros((count, *_cnn.SHAPE))


class Run:
    """The data, the dense networks, and the steps that train small ones."""

    def __init__(self, settings: Settings, data: _data.Dataset, work: Path, say: Any) -> None:
        """Put the data on the device."""
        self.settings, self.say = settings, say
        dense = quantize_images.Settings(dataset=settings.dataset, seeds=settings.seeds)
        if settings.epochs == 1:
            dense = quantize_images.smoke(dense)
        self.data = data
        self.dense = quantize_images.Run(dense, data, _data.CACHE / "quantize_images", say)
        self.train, self.validation, self.test = (
            self.dense.train,
            self.dense.validation,
            self.dense.test,
        )
        about = dataclasses.asdict(settings)
        for later in ("settling", "settling_rate"):  # which the names of their files say
            about.pop(later)
        about = [jopt.__version__, about, data.source]
        self.work = work / _checkpoint.digest(about)

    def examples(self) -> tuple[Array, Array]:
        """Return the images and labels that scores are taken from."""
        images, labels = self.train
        return _train.normalize(images[:EXAMPLES]), labels[:EXAMPLES]

    def masks(self, params: Tree, criterion: str) -> Tree:
        """Return the masks of the units that a criterion removes."""
        images, _ = self.examples()
        groups = prune.find_groups(_cnn.training_logits, params, images[:2])
        score, where = CRITERIA[criterion]
        scores = prune.unit_scores(groups, score(self, params), where)
        scores = {name: each / jnp.mean(each) for name, each in scores.items()}
        # Counted where every product is a convolution or a dot of the usual kind.
        counts = prune.multiply_adds(
            partial(_cnn.training_logits, network=_cnn.traced_normed), params, eval_images(1)
        )

        def masks(sparsity: float) -> Tree:
            keep = prune.global_topk_masks(scores, sparsity, ".*", min_kept=4)
            keep = prune.round_units(keep, scores, self.settings.multiple)
            return prune.unit_masks(groups, params, keep)

        budget = counts.total / self.settings.fewer
        cost = partial(prune.kept_multiply_adds, counts)
        return prune.masks_to_budget(masks, cost, budget, limits=(0.0, 0.95)).masks

    @cached_property
    def networks(self) -> dict[int, tuple[Tree, "Scored"]]:
        """Return the dense network of each seed: its parameters, and the folded network scored."""
        return {seed: dense_network(self, seed) for seed in self.settings.seeds}

    @cached_property
    def pool(self) -> _distill_training.Pool:
        """Return copies of the training images, with what all dense networks say of them."""
        return self._asked(
            _distill_training.make_pool(self.data, self.settings.copies, self.settings.max_shift)
        )

    @cached_property
    def settled_pool(self) -> _distill_training.Pool:
        """Return the training images as they are and mirrored, likewise."""
        images, labels = self.train
        both = jnp.concatenate([images, images[:, :, ::-1]])
        return self._asked(_distill_training.Pool(both, jnp.tile(labels, 2), len(images)))

    def _asked(self, pool: _distill_training.Pool) -> _distill_training.Pool:
        dense = distill.stack_params([scored.params for _, scored in self.networks.values()])
        temperature = self.settings.temperature

        @jax.jit
        def ask(dense: Tree, part: Array) -> Array:
            logits = jax.vmap(_cnn.folded_logits, (0, None))(dense, _train.normalize(part))
            return distill.ensemble_logits(logits, temperature=temperature)

        logits = _train.in_parts(partial(ask, dense), pool.images, 500)
        return dataclasses.replace(pool, teacher=logits)

    def tune(
        self, criterion: str, shrunk: prune.Shrunk, seed: int, epochs: int, settling: int
    ) -> Tree:
        """Fine-tune the small network with the dense ones as its teachers."""
        settings = self.settings

        def loss(small: Tree, state: Tree, batch: _distill_training.Batch) -> tuple[Array, Tree]:
            losses = distill.distillation_loss(
                shrunk.apply(small, batch.images),
                batch.teacher,
                batch.labels,
                settings.temperature,
                settings.soft_weight,
            )
            return losses.mean(), state

        fit = _distill_training.Fit(settings.batch, epochs, settings.rate, settings.weight_decay)
        file = self.work / f"{criterion.replace(' ', '-')}-{seed}-{epochs}.ckpt"
        tuned = fit.run(loss, shrunk.params, self.pool, seed, file, self.say)
        if not settling:
            return tuned
        rate = settings.settling_rate
        fit = dataclasses.replace(fit, epochs=settling, rate=rate)
        file = file.with_name(f"{file.stem}-settled-{settling}-{rate:g}.ckpt")
        return fit.run(loss, tuned, self.settled_pool, seed, file, self.say)

    def averages(self, params: Tree, shrunk: prune.Shrunk, small: Tree) -> Tree:
        """Take the batch norms' averages of the small network anew."""

        def update(variables: Tree, images: Array) -> Tree:
            out = _cnn.normed.apply(variables, images, True, mutable=["batch_stats"])
            return out[1]["batch_stats"]

        stats = _cnn.fresh_averages(params)
        like = {"params": params, "batch_stats": stats}
        units = {f"params/{name}": stays for name, stays in shrunk.units.items()}
        small_update = prune.shrunk_apply(update, like, units)
        images = _train.normalize(self.train[0][:4096])
        batches = [images[at : at + 512] for at in range(0, len(images), 512)]
        return layers.reestimate_batch_norm(
            lambda params, stats, x: small_update({"params": params, "batch_stats": stats}, x),
            small,
            _cnn.fresh_averages(small),
            batches,
        )


class Scored(NamedTuple):
    """A folded network and what it is worth.

    Attributes:
      applies: `(params, images) -> logits`, by how convolutions are computed.
      params: kernels and biases.
      multiply_adds: for one image.
      validation: accuracy.
      test: accuracy.
    """

    applies: dict[str, Callable[[Tree, Array], Array]]
    params: Tree
    multiply_adds: int
    validation: float
    test: float


# As matrix products over the whole batch, and by XLA, whose products `multiply_adds` understands.
CONVOLUTIONS = {"matrix products": _cnn.folded_logits, "XLA's": _cnn.traced_logits}


def scored(run: Run, applies: dict[str, Any], params: Tree) -> Scored:
    """Count and score a folded network."""
    apply = applies["matrix products"]
    validation, test = (
        round(1 - _train.error_rate(apply, params, *part), 6) for part in (run.validation, run.test)
    )
    count = prune.multiply_adds(applies["XLA's"], params, eval_images(1)).total
    return Scored(applies, params, count, validation, test)


def dense_network(run: Run, seed: int) -> tuple[Tree, Scored]:
    """Return the parameters of a dense network, and the folded network scored."""
    params = run.dense.float_network(seed)
    folded = _cnn.fold(params, run.dense.estimated(params, _models.unchanged_inputs))
    return params, scored(run, CONVOLUTIONS, folded)


def measure(
    run: Run, criterion: str, seed: int, epochs: int, settling: int = 0
) -> tuple[dict[str, Any], Scored]:
    """Prune, tune, fold and score one network; returns its row, and the network."""
    params, dense = run.networks[seed]
    masks = run.masks(params, criterion)
    images, _ = run.examples()
    shrunk = prune.shrink(_cnn.training_logits, params, masks, images[:64], tolerance=1e-3)
    small = run.tune(criterion, shrunk, seed, epochs, settling)
    small = _cnn.fold(small, run.averages(params, shrunk, small))
    applies = {
        name: prune.shrunk_apply(apply, dense.params, shrunk.units)
        for name, apply in CONVOLUTIONS.items()
    }
    found = scored(run, applies, small)
    both = (dense, found)
    row = {
        "criterion": criterion,
        "epochs": epochs + settling,
        "seed": seed,
        "units": {name: f"{stays.sum()} of {len(stays)}" for name, stays in shrunk.units.items()},
        "parameters": [_compress.size(each.params) for each in both],
        "multiply_adds": [each.multiply_adds for each in both],
        "validation": [each.validation for each in both],
        "test": [each.test for each in both],
    }
    return row, found


def trial(run: Run, criterion: str, seed: int) -> dict[str, Any]:
    """Return the row of a short fine-tuning, which is read if it was made before."""
    epochs = run.settings.trial_epochs
    file = run.work / f"{criterion.replace(' ', '-')}-{seed}-{epochs}.json"
    if not file.exists():
        row, _ = measure(run, criterion, seed, epochs)
        _results.write_atomically(file, json.dumps(row).encode())
    return json.loads(file.read_text())


def latencies(run: Run, dense: Scored, small: Scored) -> dict[str, dict[str, Any]]:
    """Time the dense and the shrunk network, in turns, at batch 1 and 64.

    Both ways of computing convolutions are timed, and the fastest of each network compared.
    """
    found: dict[str, dict[str, Any]] = {}
    for batch in (1, 64):
        images = _train.normalize(run.test[0][:batch])
        calls = {
            (name, which): partial(jax.jit(apply), network.params, images)
            for which, network in (("dense", dense), ("shrunk", small))
            for name, apply in network.applies.items()
        }
        named = {f"{name}, {which}": call for (name, which), call in calls.items()}
        rows = _timing.interleaved(named, run.settings.repeats)
        ways = {
            name: [1e3 * rows[f"{name}, {which}"]["median_s"] for which in ("dense", "shrunk")]
            for name in CONVOLUTIONS
        }
        ways["fastest"] = [min(column) for column in zip(*ways.values(), strict=True)]
        found[str(batch)] = {
            name: {
                "dense_ms": round(whole, 4),
                "shrunk_ms": round(less, 4),
                "faster": round(whole / less, 3),
            }
            for name, (whole, less) in ways.items()
        }
    return found


def joined(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join the rows of the seeds by criterion."""
    found = []
    for criterion in dict.fromkeys(row["criterion"] for row in rows):
        own = [row for row in rows if row["criterion"] == criterion]
        lost = {
            part: [round(row[part][0] - row[part][1], 6) for row in own]
            for part in ("validation", "test")
        }
        found.append(
            {
                "criterion": criterion,
                "epochs": own[0]["epochs"],
                "seeds": own,
                "mean_validation_lost": round(float(np.mean(lost["validation"])), 6),
                "mean_test_lost": round(float(np.mean(lost["test"])), 6),
                "spread_test_lost": round(max(lost["test"]) - min(lost["test"]), 6),
                "fewer_multiply_adds": round(
                    min(row["multiply_adds"][0] / row["multiply_adds"][1] for row in own), 3
                ),
            }
        )
    return found


def table(figures: dict[str, Any], console: Console) -> None:
    """Print every criterion, and the latencies of the chosen one."""
    console.print("Test accuracy, mean of the seeds; the last row was chosen by validation images.")
    found = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    found.add_column("criterion", no_wrap=True)
    for name in ("epochs", "multiply-adds", "dense", "shrunk", "lost", "spread"):
        found.add_column(name, justify="right", no_wrap=True)
    for row in (*figures["criteria"], figures["chosen"]):
        means = np.mean([each["test"] for each in row["seeds"]], 0)
        found.add_row(
            row["criterion"],
            str(row["epochs"]),
            f"{row['fewer_multiply_adds']:.2f}x fewer",
            f"{means[0]:.2%}",
            f"{means[1]:.2%}",
            f"{100 * row['mean_test_lost']:.2f}",
            f"{100 * row['spread_test_lost']:.2f}",
        )
    console.print(found)
    for batch, ways in figures["latency"].items():
        for name, row in ways.items():
            console.print(
                f"batch {batch}, {name}: {row['dense_ms']:.3f} ms dense, "
                f"{row['shrunk_ms']:.3f} ms shrunk, {row['faster']:.2f}x faster"
            )


def run(call: _parts.Call) -> dict[str, Any]:
    """Run or resume the part; returns its tag, data, settings, figures and targets."""
    settings = Settings(dataset=call.dataset or "fashion_mnist", seeds=call.seeds)
    data = _data.load_or_exit(settings.dataset, call.console.print)
    criteria = list(CRITERIA)
    if call.head is not None:
        settings = dataclasses.replace(
            settings, trial_epochs=1, epochs=1, settling=1, repeats=3, batch=8, copies=2
        )
        data, criteria = call.cut(data), criteria[1:2]
    each = Run(settings, data, call.work, call.console.print)
    trials = [trial(each, criterion, seed) for criterion in criteria for seed in call.seeds]
    found = joined(trials)
    name = min(found, key=lambda row: row["mean_validation_lost"])["criterion"]
    rows, networks = zip(
        *(measure(each, name, seed, settings.epochs, settings.settling) for seed in call.seeds),
        strict=True,
    )
    (best,) = joined(list(rows))
    latency = latencies(each, each.networks[call.seeds[0]][1], networks[0])
    figures = {"criteria": found, "chosen": best, "latency": latency}
    tag = "" if data.tag == "fashion_mnist" else data.tag
    targets = [
        _results.target("fewer multiply-adds, times", best["fewer_multiply_adds"], FEWER, "higher"),
        _results.target("test accuracy lost", best["mean_test_lost"], LOST, "lower"),
        *(
            _results.target(
                f"faster at batch {batch}, times", ways["fastest"]["faster"], FASTER, "higher"
            )
            for batch, ways in latency.items()
        ),
    ]
    table(figures, call.console)
    return {
        "tag": tag,
        "data": _data.about(data),
        "settings": dataclasses.asdict(settings) | {"examples": EXAMPLES},
        "figures": figures,
        "targets": [] if tag else targets,
    }
