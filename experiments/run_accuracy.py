"""What whole networks lose when `jopt.run` computes with their codes, beside the format's own loss.

    python -m experiments.run_accuracy           # ten minutes on two cores
    python -m experiments.run_accuracy --smoke

Each network is quantized and scored four ways: as floats, with its weights restored (what the
format loses), by `jopt.run` with inputs of products as floats, and with inputs rounded to int8. A
LeNet-5 and a convolutional network are trained here for some epochs; MiniLM and EfficientNet-Lite0
are pretrained, and left out where their packages are not installed. Beside the scores stands how
far outputs of `jopt.run` are from those of the restored weights, in decibels of their power.
"""

import argparse
import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import jopt
from experiments import (
    _bert,
    _cnn,
    _data,
    _efficientnet,
    _models,
    _report,
    _results,
    _text,
    _train,
    quantize_images,
)
from jopt import quant, run
from jopt._trees import flatten_with_paths

Tree = Any
GROUP = 32  # of inputs
FORMS = {  # the second where groups of inputs do not fit a kernel
    "W8": (quant.QuantSpec(8), quant.QuantSpec(8)),
    "W4-g32": (quant.QuantSpec(4, (GROUP, 1)), quant.QuantSpec(4)),
}
TABLES = r".*(words|places)/embedding"
SAME, ROUNDED = 0.0005, 0.01  # what may be lost beside the format's own
BATCH = 500
TOKENS = 32
CROPS = 9  # of each photo, beside its middle


@dataclasses.dataclass(frozen=True)
class Network:
    """A network, what it is asked about, and how answers are scored.

    Attributes:
      name: what it is.
      apply: `(params, inputs) -> outputs`.
      params: of the float network.
      inputs: batches.
      score: from the outputs of all batches to a figure up to 1.
      asked: what the figure is.
      kernels: which leaves are quantized.
      tables: whether tables of words and places are as well, by row to 8 bits.
    """

    name: str
    apply: Callable[..., Any]
    params: Tree
    inputs: list[Any]
    score: Callable[[np.ndarray], float]
    asked: str
    kernels: str = r".*kernel"
    tables: bool = False


def _accuracy(labels: np.ndarray) -> Callable[[np.ndarray], float]:
    return lambda outputs: float(np.mean(outputs.argmax(1) == labels))


def _batches(inputs: Any, batch: int) -> list[Any]:
    return [inputs[at : at + batch] for at in range(0, len(inputs), batch)]


def lenet(smoke: bool, console: Console) -> Network:
    """LeNet-5 on handwritten digits."""
    data = _data.load_saying("mnist", console.print)
    data = _data.head(data, 256) if smoke else data
    model, epochs, batch = _models.LeNet5(), 1 if smoke else 4, 64

    def apply(params: Tree, images: jax.Array) -> Any:
        return model.apply({"params": params}, images)

    def loss(params: Tree, images: Any, labels: Any, key: Any, extras: Any) -> jax.Array:
        logits = apply(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    images, labels = (jnp.asarray(each) for each in data.train)
    steps = epochs * max(1, len(labels) // batch)
    tx = quantize_images.optimizer(2e-3, steps, 1e-2)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *images.shape[1:])))["params"]
    step, key = _train.make_step(loss, tx), jax.random.key(1)
    carry = _train.start(params, tx, key)
    carry = _train.run_epochs(step, carry, (images, labels), batch, epochs, key)
    asked = "accuracy on test images"
    inputs = _batches(np.asarray(_train.normalize(jnp.asarray(data.test[0]))), BATCH)
    score = _accuracy(np.asarray(data.test[1]))
    return Network("LeNet-5, MNIST", apply, carry.params, inputs, score, asked)


def convolutional(smoke: bool, console: Console) -> Network:
    """The convolutional network of `quantize_images` on Fashion-MNIST, batch norms folded in."""
    data = _data.load_saying("fashion_mnist", console.print)
    data = _data.head(data, 256) if smoke else data
    settings = quantize_images.Settings(seeds=(0,), epochs=1 if smoke else 4)
    work = _data.CACHE / "run_accuracy"
    of = quantize_images.Run(settings, data, work, console.print)
    params = of.float_network(0)
    params = _cnn.fold(params, of.estimated(params, _cnn.quantize_inputs({})))
    inputs = _batches(np.asarray(_train.normalize(jnp.asarray(data.test[0]))), BATCH)
    score = _accuracy(np.asarray(data.test[1]))
    asked = "accuracy on test images"
    name = "convolutional, Fashion-MNIST"
    return Network(name, _cnn.folded_logits, params, inputs, score, asked)


def minilm(smoke: bool, console: Console) -> Network:
    """MiniLM as an encoder of sentences, all of one length here."""
    bert = _bert.load(_bert.minilm_folder(), TOKENS)
    texts = _text.load_texts_or_exit("rotten_tomatoes", console.print)
    tokens = bert.tokenize(texts.test[0])
    full = tokens.real.all(1)  # those that fill all places
    ids = np.asarray(tokens.ids)[full][: 8 if smoke else 512]

    def apply(params: Tree, ids: jax.Array) -> Any:
        hidden: Any = bert.model.apply({"params": params}, ids)
        return _bert.sentence_embedding(hidden, jnp.ones(ids.shape, bool))

    plain = jax.jit(apply)
    inputs = _batches(ids, 8 if smoke else 64)
    whole = np.concatenate([np.asarray(plain(bert.params, each)) for each in inputs])

    def score(outputs: np.ndarray) -> float:
        return float(np.mean(np.sum(outputs * whole, 1)))

    asked = "mean cosine to the float network's embeddings"
    kernels = "layer.*/kernel"
    return Network("MiniLM", apply, bert.params, inputs, score, asked, kernels, True)


def efficientnet(smoke: bool, console: Console) -> Network:
    """EfficientNet-Lite0 on photos, batch norms folded in.

    Its layers are not equalized: kernels with a scale for each output gain nothing by that, and
    inputs, whose channels it sets apart, lose 20 dB when they are rounded.
    """
    del console
    model, variables = _efficientnet.load()
    photos, labels = _efficientnet.photos()
    model, folded = _efficientnet.fold(model, variables)
    count = 2 if smoke else len(photos)
    views, labels = photos[:count], labels[:count]
    if not smoke:
        draw = np.random.default_rng(0)
        views = np.concatenate([views, _efficientnet.crops(draw, np.arange(count), CROPS)])
        labels = np.concatenate([labels, np.repeat(labels, CROPS)])
    inputs = _batches(np.asarray(_efficientnet.normalize(views)), 4)
    score = _accuracy(labels)
    asked = f"accuracy on 20 photos of ImageNet and {CROPS} crops of each"
    return Network("EfficientNet-Lite0", model.apply, folded, inputs, score, asked)


NETWORKS = {
    "lenet": lenet,
    "convolutional": convolutional,
    "minilm": minilm,
    "efficientnet": efficientnet,
}


def decibels(outputs: np.ndarray, expected: np.ndarray) -> float:
    """Return how much stronger what is expected is than the difference, at most 200."""
    power, noise = float(np.sum(expected**2)), float(np.sum((outputs - expected) ** 2))
    return round(min(200.0, 10 * np.log10(power / max(noise, 1e-20 * power))), 2)


def measure(network: Network, form: str) -> dict[str, Any]:
    """Score a network in a form, by all ways."""

    def outputs(apply: Callable[..., Any], params: Tree) -> np.ndarray:
        return np.concatenate([np.asarray(apply(params, each)) for each in network.inputs])

    tree = network.params
    if network.tables:
        tree = quant.quantize_params(tree, quant.QuantSpec(8, (1, -1)), TABLES)
    grouped, other = FORMS[form]

    def kernel(path: str, leaf: Any) -> bool:
        return bool(re.fullmatch(network.kernels, path)) and not jopt.is_compressed(leaf)

    def fits(path: str, leaf: Any) -> bool:
        return kernel(path, leaf) and leaf.shape[-2] % GROUP == 0

    for spec, take in ((grouped, fits), (other, kernel)):
        paths, leaves, _ = flatten_with_paths(tree)
        if any(map(take, paths, leaves)):
            tree = quant.quantize_params(tree, spec, take)
    restored = outputs(jax.jit(network.apply), jopt.materialize(tree))
    prepared = run.prepare(network.apply, tree, network.inputs[0])
    found: dict[str, Any] = {"network": network.name, "asked": network.asked, "form": form}
    found["float"] = network.score(outputs(jax.jit(network.apply), network.params))
    found["restored"] = network.score(restored)
    for activations in ("float", "int8"):
        own = outputs(run.compressed(network.apply, activations=activations), prepared)
        found[f"run_{activations}"] = network.score(own)
        found[f"decibels_{activations}"] = decibels(own, restored)
    explained = run.explain(network.apply, prepared, network.inputs[0], activations="int8")
    found["products"] = len(explained.rows)
    found["restored_products"] = sum(row.form == "restored" for row in explained.rows)
    return {key: round(value, 6) if type(value) is float else value for key, value in found.items()}


def rows_of(smoke: bool, console: Console) -> Iterator[dict[str, Any]]:
    """Measure every network that can be had."""
    for make in NETWORKS.values():
        try:
            network = make(smoke, console)
        except _data.DataUnavailable as problem:
            console.print(f"Left out: {problem}")
            continue
        for form in FORMS:
            row = measure(network, form)
            console.print(
                f"{row['network']}, {form}: {row['asked']} {row['float']:.4f} as floats, "
                f"{row['restored']:.4f} restored, {row['run_float']:.4f} by jopt.run, "
                f"{row['run_int8']:.4f} with int8 inputs "
                f"({row['decibels_float']} and {row['decibels_int8']} dB)"
            )
            yield row
        jax.clear_caches()


def targets_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Hold what is lost beside the format's own loss against what may be."""
    goals = {"float": SAME, "int8": ROUNDED}
    return [
        _results.target(
            f"{row['network']}, {row['form']}, {name} inputs: lost beside the format's own",
            round(row["restored"] - row[f"run_{name}"], 6),
            goal,
            "lower",
        )
        for row in rows
        for name, goal in goals.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.run_accuracy")
    parser.add_argument("--smoke", action="store_true", help="an epoch of few images")
    parser.add_argument("--out", type=Path, default=_results.RESULTS, help="where results go")
    options = parser.parse_args(arguments)
    console = Console(highlight=False)
    rows = list(rows_of(options.smoke, console))
    targets = targets_of(rows)
    _report.print_targets(targets, console)
    results = {
        "command": _results.command("experiments.run_accuracy"),
        **_results.environment(),
        "data": "mnist, fashion_mnist, rotten_tomatoes, photos of foolbox",
        "settings": {"native": run.native_instructions()},
        "figures": rows,
        "targets": targets,
    }
    name = "run_accuracy" + ("-smoke" if options.smoke else "")
    console.print(f"Results: {_results.write_results(name, results, options.out)}")


if __name__ == "__main__":
    main()
