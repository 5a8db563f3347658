"""Every criterion at every sparsity: LeNet-5 on MNIST, the batch-norm network on Fashion-MNIST.

Three ways to a sparse network, each with the same number of steps within itself:

- *once*: train dense, remove everything at once, fine-tune with the masks held;
- *gradual*: train dense, remove along Zhu and Gupta's cubic schedule while training on, fine-tune
  (movement's scores are trained along, and what was removed may come back);
- *scratch*: sparse from the first step, as many steps as dense training and pruning together.

Trainings are short, a passage or less through the images, since there are 570 of them: what is
compared is what each criterion makes of the same few steps, not how good a network can get.

All kernels are pruned, biases and batch norms are not. The test images are looked at once for every
row, and nothing is chosen by them. Every finished row is kept, so that a killed run goes on.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from rich.console import Console

import jopt
from experiments import (
    _checkpoint,
    _cnn,
    _convolution,
    _data,
    _models,
    _prune_criteria_report,
    _results,
    _train,
)
from jopt import layers, prune

Tree = Any
LEVELS = (0.8, 0.9, 0.95, 0.98, 0.99)
CHUNK = 60  # steps in a compiled call
EXAMPLES = 1024  # training images that scores and statistics are taken from
SCORE_RATE = 1e-2  # Adam's, of the scores of movement pruning, as in the paper


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides the outcome, written into the results."""

    seeds: tuple[int, ...] = (0, 1, 2)
    levels: tuple[float, ...] = LEVELS
    batch: int = 32
    dense_steps: int = 1200
    after_steps: int = 600  # of pruning and fine-tuning
    rate: float = 2e-3
    tuning_rate: float = 2e-3
    prune_every: int = 10
    rewire_every: int = 50


@dataclasses.dataclass(frozen=True)
class Network:
    """A network as this part needs it.

    Attributes:
      name: of its rows.
      dataset: that it is trained on.
      initial: key to fresh parameters.
      logits: `(params, images) -> logits` in training.
      visible: the same function with XLA's convolutions, whose kernels `calibrate` sees.
      steady: `(params, images or None) -> apply` with each example for itself: batch norms use the
        averages of these images, or do nothing.
      errors: `(params, estimation images, parts) -> error rates` of parts (images, labels).
    """

    name: str
    dataset: str
    initial: Callable[[Array], Tree]
    logits: Callable[[Tree, Array], Array]
    visible: Callable[[Tree, Array], Array]
    steady: Callable[[Tree, Array | None], Callable[[Tree, Array], Array]]
    errors: Callable[[Tree, Array, Sequence[Any]], list[float]]


_lenet = _models.LeNet5()
_direct = _models.LeNet5(conv_pool=_convolution.conv_pool_direct)


def _lenet_logits(params: Tree, images: Array) -> Array:
    return _lenet.apply({"params": params}, images)  # pyright: ignore[reportReturnType]


def _lenet_visible(params: Tree, images: Array) -> Array:
    return _direct.apply({"params": params}, images)  # pyright: ignore[reportReturnType]


def _cnn_visible(params: Tree, images: Array) -> Array:
    return _cnn.training_logits(params, images, network=_cnn.traced_normed)


def _cnn_steady(params: Tree, images: Array | None) -> Callable[[Tree, Array], Array]:
    averages = _cnn.fresh_averages(params)
    if images is not None:
        averages = _cnn.estimate(params, _models.unchanged_inputs, images)

    def apply(params: Tree, images: Array) -> Array:
        variables = {"params": params, "batch_stats": averages}
        return _cnn.traced_normed.apply(variables, images, False)  # pyright: ignore[reportReturnType]

    return apply


def _lenet_errors(params: Tree, images: Array, parts: Sequence[Any]) -> list[float]:
    return [_train.error_rate(_lenet_logits, params, *part) for part in parts]


def _cnn_errors(params: Tree, images: Array, parts: Sequence[Any]) -> list[float]:
    averages = _cnn.estimate(params, _models.unchanged_inputs, _train.normalize(images))
    folded = {"params": _cnn.fold(params, averages), "inputs": {}}
    return [_cnn.error(folded, part) for part in parts]


NETWORKS = {
    "lenet5": Network(
        "lenet5",
        "mnist",
        lambda key: jax.jit(_lenet.init)(key, jnp.zeros((1, *_cnn.SHAPE)))["params"],
        _lenet_logits,
        _lenet_visible,
        lambda params, images: _lenet_visible,
        _lenet_errors,
    ),
    "cnn": Network(
        "cnn",
        "fashion_mnist",
        lambda key: _cnn.initial(key)[0],
        _cnn.training_logits,
        _cnn_visible,
        _cnn_steady,
        _cnn_errors,
    ),
}


class Run:
    """One network: its data, its compiled steps, its finished rows."""

    def __init__(
        self, network: Network, data: _data.Dataset, settings: Settings, work: Path, say: Any
    ) -> None:
        """Put the data on the device."""
        self.network, self.settings, self.say = network, settings, say
        self.train, self.validation, self.test = (
            (jnp.asarray(images), jnp.asarray(labels))
            for images, labels in (data.train, data.validation, data.test)
        )
        about = dataclasses.asdict(settings) | {"seeds": None, "levels": None}
        about = [jopt.__version__, about, data.source, len(data.train[1])]
        self.work = work / f"{network.name}-{_checkpoint.digest(about)}"
        self.steps: dict[Any, _train.Step] = {}

    def loss(self, params: Tree, images: Array, labels: Array, *unused: Any) -> Array:
        """Return the mean cross-entropy."""
        logits = self.network.logits(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def visible_loss(
        self, params: Tree, images: Array, labels: Array, temperature: float = 1.0
    ) -> Array:
        """Return the same with convolutions that scores may differentiate twice."""
        logits = self.network.visible(params, images) / temperature
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def adam(self, rate: float, steps: int) -> optax.GradientTransformation:
        """Return Adam with a short warm-up and a cosine to a hundredth of the rate."""
        warm = min(200, max(1, steps // 10))
        return optax.adam(
            optax.warmup_cosine_decay_schedule(rate / 20, rate, warm, steps, rate / 100)
        )

    def fit(
        self, name: str, tx: Any, params: Tree, steps: int, seed: int, at: int, level: Any = None
    ) -> Tree:
        """Train for some steps; a step of one name is compiled once, for all levels."""
        step = self.steps.setdefault(name, _train.make_step(self.loss, tx))
        key = jax.random.fold_in(jax.random.key(seed), at)
        carry = _train.start(params, tx(level) if callable(tx) else tx, key)
        for some in self.batches(key, steps, CHUNK):
            carry, _ = _train.run_epoch(step, carry, *self.train, some, level)
        return carry.params

    def batches(self, key: Array, steps: int, each: int) -> list[Array]:
        """Return the indices of some steps, cut into pieces of a few."""
        order = _train.long_order(key, len(self.train[1]), self.settings.batch, steps)
        return [order[at : at + each] for at in range(0, steps, each)]

    def dense(self, seed: int) -> Tree:
        """Train the dense network of a seed, or read it."""
        params = self.network.initial(jax.random.key(seed))
        file = self.work / f"dense-{seed}.ckpt"
        restored = _checkpoint.restore(file, params)
        if restored is not None:
            return restored
        steps = self.settings.dense_steps
        params = self.fit("dense", self.adam(self.settings.rate, steps), params, steps, seed, 1)
        _checkpoint.save(file, params)
        return params

    def held(self, masks: Tree, params: Tree, seed: int) -> Tree:
        """Fine-tune with the masks held."""
        steps = self.settings.after_steps
        tx = optax.chain(self.adam(self.settings.tuning_rate, steps), prune.keep_masked(masks))
        return self.fit("held", tx, prune.apply_masks(params, masks), steps, seed, 2)

    def gradually(self, name: str, criterion: Any, level: float, params: Tree, seed: int) -> Tree:
        """Remove weights over half of the steps after the dense training."""
        steps = self.settings.after_steps
        rising = prune.cubic_schedule(1.0, 0, steps // 2)

        def tx(level: Array) -> optax.GradientTransformation:
            rule = prune.gradual(
                lambda count: level * rising(count), self.settings.prune_every, criterion
            )
            return prune.sparse_training(self.adam(self.settings.tuning_rate, steps), rule)

        return self.fit(name, tx, params, steps, seed, 2, jnp.float32(level))

    def moved(self, level: float, params: Tree, seed: int) -> Tree:
        """Remove as `gradually` does, by scores that are trained along: weights may come back."""
        steps, every = self.settings.after_steps, self.settings.prune_every
        schedule = prune.cubic_schedule(level, 0, steps // 2)

        def loss(both: Tree, images: Array, labels: Array, key: Array, level: Array) -> Array:
            params, scores = both
            return self.loss(
                prune.movement_params(params, scores, level, prune.global_topk_masks),
                images,
                labels,
            )

        rates: dict[Any, optax.GradientTransformation] = {
            "params": self.adam(self.settings.tuning_rate, steps),
            "scores": optax.adam(SCORE_RATE),
        }
        tx = optax.multi_transform(rates, ("params", "scores"))
        step = self.steps.setdefault("moved", _train.make_step(loss, tx))
        key = jax.random.fold_in(jax.random.key(seed), 2)
        carry = _train.start((params, jax.tree.map(jnp.zeros_like, params)), tx, key)
        for n, some in enumerate(self.batches(key, steps, every)):
            now = jnp.float32(schedule(n * every))
            carry, _ = _train.run_epoch(step, carry, *self.train, some, now)
        params, scores = carry.params
        return prune.apply_masks(params, prune.global_topk_masks(scores, level))

    @property
    def all_steps(self) -> int:
        """Return the steps of a network that is sparse from the start."""
        return self.settings.dense_steps + self.settings.after_steps

    def from_scratch(self, name: str, tx: Any, params: Tree, seed: int) -> Tree:
        """Train a network that is sparse from the start."""
        return self.fit(name, tx, params, self.all_steps, seed, 1)

    def examples(self) -> tuple[Array, Array]:
        """Return the images, normalized, and labels that scores are taken from."""
        images, labels = self.train
        return _train.normalize(images[:EXAMPLES]), labels[:EXAMPLES]


Make = Callable[[Run, Tree, float, int], Tree]


def _once(score: Callable[[Run, Tree, int], Tree], select: Any = prune.global_topk_masks) -> Make:
    def make(run: Run, dense: Tree, level: float, seed: int) -> Tree:
        return run.held(select(score(run, dense, seed), level), dense, seed)

    return make


def _gradients(run: Run, params: Tree) -> Tree:
    return jax.jit(jax.grad(run.loss))(params, *run.examples())


def _fisher(run: Run, params: Tree, seed: int) -> Tree:
    images, labels = run.examples()
    apply = run.network.steady(params, images)

    def loss(params: Tree, image: Array, label: Array) -> Array:
        logits = apply(params, image[None])[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, label)

    return prune.fisher_scores(params, prune.squared_gradients(loss, params, images, labels))


def _statistics(run: Run, params: Tree) -> Any:
    images, _ = run.examples()
    batches = [images[at : at + 128] for at in range(0, len(images), 128)]
    return layers.calibrate(run.network.visible, params, batches, max_rows=4096)


def _each_output(scores: Tree, level: float) -> Tree:
    """Prune every output alike, but leave each its best weight: one of nine inputs has few."""

    def best(score: Array, mask: Array) -> Array:
        inputs = tuple(range(score.ndim - 1))
        return mask | (score == jnp.max(score, axis=inputs, keepdims=True))

    return jax.tree.map(best, scores, prune.output_topk_masks(scores, level))


def _sparse_gpt(run: Run, dense: Tree, level: float, seed: int) -> Tree:
    pruned, masks, _ = prune.prune_calibrated_params(dense, _statistics(run, dense), level)
    return run.held(masks, pruned, seed)


def _gradual(name: str, criterion: Any) -> Make:
    def make(run: Run, dense: Tree, level: float, seed: int) -> Tree:
        return run.gradually(name, criterion, level, dense, seed)

    return make


def _fresh(run: Run, seed: int) -> Tree:
    return run.network.initial(jax.random.key(seed))


def _at_start(masks_of: Callable[[Run, Tree, float, int], Tree]) -> Make:
    def make(run: Run, dense: Tree, level: float, seed: int) -> Tree:
        params = _fresh(run, seed)
        masks = masks_of(run, params, level, seed)
        tx = optax.chain(run.adam(run.settings.rate, run.all_steps), prune.keep_masked(masks))
        return run.from_scratch("fixed", tx, prune.apply_masks(params, masks), seed)

    return make


def _random_masks(run: Run, params: Tree, level: float, seed: int) -> Tree:
    scores = prune.random_scores(jax.random.fold_in(jax.random.key(seed), 3), params)
    return prune.topk_masks(scores, prune.erdos_renyi_kernel_sparsities(params, level))


def _rewired(name: str, rule: Callable[[Run, Tree, int, int], Any]) -> Make:
    def make(run: Run, dense: Tree, level: float, seed: int) -> Tree:
        params = _fresh(run, seed)
        masks = _random_masks(run, params, level, seed)
        adam = run.adam(run.settings.rate, run.all_steps)
        tx = prune.sparse_training(adam, rule(run, masks, run.all_steps * 3 // 4, seed))
        return run.from_scratch(name, tx, prune.apply_masks(params, masks), seed)

    return make


def _set(run: Run, masks: Tree, end: int, seed: int) -> Any:
    start = jax.nn.initializers.he_normal()  # as the networks' own kernels
    key, every = jax.random.key(seed), run.settings.rewire_every
    return prune.set_rule(key, masks, every, initializer=start, end=end)


def _rigl(run: Run, masks: Tree, end: int, seed: int) -> Any:
    del seed
    return prune.rigl(masks, end, run.settings.rewire_every)


def _grasp(run: Run, params: Tree, level: float, seed: int) -> Tree:
    loss = partial(run.visible_loss, temperature=200.0)  # the paper's
    scores = jax.jit(partial(prune.grasp_scores, loss))(params, *run.examples())
    return prune.global_topk_masks(scores, level)


def _snip(run: Run, params: Tree, level: float, seed: int) -> Tree:
    scores = prune.snip_scores(run.visible_loss, params, *run.examples())
    return prune.global_topk_masks(scores, level)


def _synflow(run: Run, params: Tree, level: float, seed: int) -> Tree:
    apply = run.network.steady(params, None)
    return prune.synflow_masks(apply, params, level, run.examples()[0][:2])


# (how, criterion): how a row is made.
ROWS: dict[tuple[str, str], Make] = {
    ("once", "random"): _once(
        lambda run, params, seed: prune.random_scores(jax.random.key(seed), params),
        prune.topk_masks,
    ),
    ("once", "magnitude, by layer"): _once(
        lambda run, params, seed: prune.magnitude_scores(params), prune.topk_masks
    ),
    ("once", "magnitude"): _once(lambda run, params, seed: prune.magnitude_scores(params)),
    ("once", "LAMP"): _once(lambda run, params, seed: prune.lamp_scores(params)),
    ("once", "saliency"): _once(
        lambda run, params, seed: prune.saliency_scores(params, _gradients(run, params))
    ),
    ("once", "Fisher"): _once(_fisher),
    ("once", "Wanda"): _once(
        lambda run, params, seed: prune.wanda_scores(params, _statistics(run, params))[0],
        _each_output,
    ),
    ("once", "SparseGPT"): _sparse_gpt,
    ("gradual", "random"): _gradual(
        "random", lambda params: prune.random_scores(jax.random.key(0), params)
    ),
    ("gradual", "magnitude"): _gradual("magnitude", prune.magnitude_scores),
    ("gradual", "LAMP"): _gradual("LAMP", prune.lamp_scores),
    ("gradual", "movement"): lambda run, dense, level, seed: run.moved(level, dense, seed),
    ("gradual", "Fisher"): _gradual("Fisher", prune.fisher()),
    ("scratch", "random"): _at_start(_random_masks),
    ("scratch", "SNIP"): _at_start(_snip),
    ("scratch", "GraSP"): _at_start(_grasp),
    ("scratch", "SynFlow"): _at_start(_synflow),
    ("scratch", "SET"): _rewired("SET", _set),
    ("scratch", "RigL"): _rewired("RigL", _rigl),
}


def start_scales(run: Run, seed: int, level: float = 0.9) -> dict[str, float]:
    """Return how many times larger logits are once masks are put on fresh parameters."""
    params, (images, _) = _fresh(run, seed), run.examples()
    before = jnp.std(run.network.visible(params, images))
    makers = {"random": _random_masks, "SNIP": _snip, "GraSP": _grasp, "SynFlow": _synflow}
    found = {}
    for name, masks_of in makers.items():
        masked = prune.apply_masks(params, masks_of(run, params, level, seed))
        found[name] = round(float(jnp.std(run.network.visible(masked, images)) / before), 4)
    return found


TRIED = (("once", "SparseGPT"), ("gradual", "movement"), ("scratch", "RigL"))  # in a trial


def measure(run: Run, seed: int) -> list[dict[str, Any]]:
    """Make and score every row of one seed that is not among the finished ones."""
    file = run.work / f"rows-{seed}.json"
    done = json.loads(file.read_text()) if file.exists() else {}
    dense = run.dense(seed)
    wanted = [("dense", "", 0.0)]
    rows = TRIED if len(run.settings.levels) == 1 else tuple(ROWS)
    wanted += [(*row, level) for level in run.settings.levels for row in rows]
    for how, criterion, level in wanted:
        name = f"{how} {criterion} {level}"
        if name in done:
            continue
        params = dense if how == "dense" else ROWS[how, criterion](run, dense, level, seed)
        errors = run.network.errors(params, run.train[0][:4096], (run.validation, run.test))
        validation, test = (round(1 - error, 6) for error in errors)
        done[name] = {
            "how": how,
            "criterion": criterion,
            "level": level,
            "sparsity": round(float(prune.sparsity(params)), 6),
            "validation": validation,
            "test": test,
        }
        run.work.mkdir(parents=True, exist_ok=True)
        _results.write_atomically(file, json.dumps(done).encode())
        row = done[name]
        run.say(
            f"{run.network.name}, seed {seed}: {name}: {row['sparsity']:.2%} zeros, "
            f"validation {row['validation']:.2%}"
        )
    return [done[f"{how} {criterion} {level}"] for how, criterion, level in wanted]


def smoke(settings: Settings) -> Settings:
    """Shorten everything to an epoch of what little data there then is."""
    return dataclasses.replace(settings, dense_steps=60, after_steps=60, levels=(0.9,), batch=8)


def run(
    dataset: str | None,
    head: int | None,
    seeds: tuple[int, ...],
    work: Path,
    plot: Callable[[str], Path],
    console: Console,
) -> dict[str, Any]:
    """Run or resume the part; returns its tag, data, settings, figures and targets."""
    settings = Settings(seeds=seeds)
    settings = settings if head is None else smoke(settings)
    about, rows, scales, tags = {}, {}, {}, set()
    for network in NETWORKS.values():
        data = _data.load_or_exit(dataset or network.dataset, console.print)
        data = data if head is None else _data.head(data, head)
        each = Run(network, data, settings, work, console.print)
        rows[network.name] = _prune_criteria_report.joined([measure(each, seed) for seed in seeds])
        scales[network.name] = start_scales(each, seeds[0])
        about[network.name] = _data.about(data)
        tags.add("" if data.tag == network.dataset else data.tag)
    tag = "-".join(sorted(tags - {""}))
    targets = _prune_criteria_report.targets(rows) if head is None and not tag else []
    _prune_criteria_report.plot(rows, plot(tag))
    _prune_criteria_report.table(rows, targets, console)
    return {
        "tag": tag,
        "data": about,
        "settings": dataclasses.asdict(settings) | {"examples": EXAMPLES, "score_rate": SCORE_RATE},
        "figures": {"networks": rows, "logits_with_masks_at_90_over_without": scales},
        "targets": targets,
    }
