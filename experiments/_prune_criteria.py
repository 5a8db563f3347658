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
import re
from collections.abc import Callable, Sequence
from functools import cache, partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from experiments import _data, _parts, _prune_criteria_report, _results, _rows
from experiments._prune_criteria_training import EXAMPLES, NETWORKS, SCORE_RATE, Run, Settings
from jopt import layers, prune

Tree = Any
SAME = ("how", "criterion", "level")  # what names a row
LISTED = ("sparsity", "validation", "test")  # what a row has for each seed
SYNFLOW_ROUNDS = 100  # as the paper takes

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


def _budgets(params: Tree, level: float) -> dict[str, float]:
    """Return what global magnitude takes from each kernel: the layers' shares for local methods.

    The same share of every layer would leave a convolution of nine inputs next to nothing.
    """
    masks = prune.global_topk_masks(prune.magnitude_scores(params), level)
    kernels = {name: layer["kernel"] for name, layer in masks.items() if "kernel" in layer}
    return {f"{name}/kernel": 1 - float(mask.mean()) for name, mask in kernels.items()}


def _each_output(scores: Tree, budgets: dict[str, float]) -> Tree:
    """Prune the outputs of a layer alike, but leave each its best weight."""

    def best(score: Array, mask: Array) -> Array:
        inputs = tuple(range(score.ndim - 1))
        return mask | (score == jnp.max(score, axis=inputs, keepdims=True))

    masks = [
        prune.output_topk_masks(scores, share, re.escape(path), min_kept=0)
        for path, share in budgets.items()
    ]
    return jax.tree.map(best, scores, reduce(partial(jax.tree.map, jnp.logical_and), masks))


def _wanda(run: Run, dense: Tree, level: float, seed: int) -> Tree:
    scores, _ = prune.wanda_scores(dense, _statistics(run, dense))
    return run.held(_each_output(scores, _budgets(dense, level)), dense, seed)


def _sparse_gpt(run: Run, dense: Tree, level: float, seed: int) -> Tree:
    budgets = _budgets(dense, level)
    pruned, masks, _ = prune.prune_calibrated_params(dense, _statistics(run, dense), budgets)
    return run.held(masks, pruned, seed)


def _gradual(name: str, criterion: Any) -> Make:
    def make(run: Run, dense: Tree, level: float, seed: int) -> Tree:
        return run.gradually(name, criterion, level, dense, seed)

    return make


def _gradually_random(run: Run, dense: Tree, level: float, seed: int) -> Tree:
    def criterion(params: Tree) -> Tree:
        return prune.random_scores(jax.random.key(seed), params)

    return run.gradually(f"random {seed}", criterion, level, dense, seed)


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
    images = run.examples()[0][:2]
    return prune.synflow_masks(apply, params, level, images, rounds=SYNFLOW_ROUNDS)


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
    ("once", "Wanda"): _wanda,
    ("once", "SparseGPT"): _sparse_gpt,
    ("gradual", "random"): _gradually_random,
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


def measure(run: Run, seed: int, held: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """Make and score every row of one seed that is not among the finished or the held ones."""
    rows = _rows.Rows(run.work / f"rows-{seed}.json", SAME, held)
    dense = cache(lambda: run.dense(seed))

    def make(how: str, criterion: str, level: float) -> dict[str, Any]:
        way = ROWS.get((how, criterion))
        params = dense() if way is None else way(run, dense(), level, seed)
        errors = run.network.errors(params, run.train[0][:4096], (run.validation, run.test))
        validation, test = (round(1 - error, 6) for error in errors)
        sparsity = round(float(prune.sparsity(params)), 6)
        run.say(
            f"{run.network.name}, seed {seed}: {how} {criterion} {level}: {sparsity:.2%} zeros, "
            f"validation {validation:.2%}"
        )
        return {"sparsity": sparsity, "validation": validation, "test": test}

    ways = TRIED if len(run.settings.levels) == 1 else tuple(ROWS)
    wanted = [("dense", "", 0.0)]
    wanted += [(*way, level) for level in run.settings.levels for way in ways]
    for each in wanted:
        rows.add(dict(zip(SAME, each, strict=True)), partial(make, *each))
    return rows.list()


def smoke(settings: Settings) -> Settings:
    """Shorten everything to an epoch of what little data there then is."""
    return dataclasses.replace(settings, dense_steps=30, after_steps=30, levels=(0.9,), batch=8)


def run(call: _parts.Call) -> dict[str, Any]:
    """Run or resume the part; returns its tag, data, settings, figures and targets."""
    settings = Settings(seeds=call.seeds)
    settings = settings if call.head is None else smoke(settings)
    written = dataclasses.asdict(settings) | {"examples": EXAMPLES, "score_rate": SCORE_RATE}
    about, rows, scales, tags = {}, {}, {}, set()
    for network in NETWORKS.values():
        data = call.cut(_data.load_or_exit(call.dataset or network.dataset, call.console.print))
        tags.add("" if data.tag == network.dataset else data.tag)
        each = Run(network, data, settings, call.work, call.console.print)
        held = call.held("-".join(sorted(tags - {""})), written)
        known = held.figures["networks"].get(network.name, []) if held.seeds else []
        by_seed = [measure(each, seed, held.rows(seed, LISTED, known)) for seed in call.seeds]
        rows[network.name] = _results.join_seeds(by_seed, SAME, LISTED)
        scales[network.name] = start_scales(each, call.seeds[0])
        about[network.name] = _data.about(data)
    tag = "-".join(sorted(tags - {""}))
    targets = _prune_criteria_report.targets(rows) if call.head is None and not tag else []
    _prune_criteria_report.plot(rows, call.plot(tag))
    _prune_criteria_report.table(rows, targets, call.console)
    return {
        "tag": tag,
        "data": about,
        "settings": written,
        "figures": {"networks": rows, "logits_with_masks_at_90_over_without": scales},
        "targets": targets,
    }
