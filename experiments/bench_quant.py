"""Time quantization against the libraries that people use for it.

    python -m experiments.bench_quant                 # everything, about a quarter of an hour
    python -m experiments.bench_quant --only int8     # one part: int8, kmeans or gptq
    python -m experiments.bench_quant --smoke

Three parts, each with both sides in one process, interleaved, medians compared:

- int8: one scale an output channel for the 110 million parameters of a BERT-base, against PyTorch
  eager and torchao's `quantize_`.
- kmeans: the best 16 and 256 values for 1 and 25 million weights, with the code of every weight,
  against scikit-learn's KMeans, and the error against the exact optimum.
- gptq: layers of 1024 and 4096 inputs and outputs, against a PyTorch transcription of the paper's
  algorithm at equal error.

A part whose peer is not installed is left out, with a word.
"""

import argparse
import importlib.util
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import _bench_gptq, _bench_kmeans, _timing
from experiments._results import RESULTS, command, environment, target, write_results
from jopt import quant

SEED = 0
HAS_TORCH = importlib.util.find_spec("torch") is not None
HAS_TORCHAO = HAS_TORCH and importlib.util.find_spec("torchao") is not None


def bert_base_shapes() -> list[tuple[int, int]]:
    """Kernels and embedding tables of BERT-base, 109 million parameters."""
    shapes = [(30522, 768), (512, 768), (2, 768), (768, 768)]
    for _ in range(12):
        shapes += [(768, 768)] * 4 + [(768, 3072), (3072, 768)]
    return shapes


def _torch_sides(kernels: list[np.ndarray]) -> dict[str, Callable[[], Any]]:
    """Quantize with PyTorch eager, one scale for each output (a row there)."""
    if not HAS_TORCH:
        return {}
    import torch  # pyright: ignore[reportMissingImports]

    weights = [torch.from_numpy(np.ascontiguousarray(kernel.T)) for kernel in kernels]

    def eager() -> Any:
        out = []
        with torch.no_grad():
            for weight in weights:
                scale = weight.abs().amax(1, keepdim=True) / 127
                codes = (weight / scale).round().clamp(-127, 127).to(torch.int8)
                out.append((codes, scale))
        return [len(out)]

    return {"torch eager": eager}


def _torchao_sides(kernels: list[np.ndarray]) -> dict[str, Callable[[], Any]]:
    """Quantize `torch.nn.Linear` modules in place with torchao; the modules are made anew."""
    if not HAS_TORCHAO:
        return {}
    import torch  # pyright: ignore[reportMissingImports]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.quantization import (  # pyright: ignore[reportMissingImports]
            Int8WeightOnlyConfig,
            quantize_,
        )

    weights = [torch.from_numpy(np.ascontiguousarray(kernel.T)) for kernel in kernels]

    def module() -> Any:
        layers = []
        for weight in weights:
            layer = torch.nn.Linear(1, 1, bias=False, device="meta")
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)
            layers.append(layer)
        return torch.nn.Sequential(*layers)

    def run() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantize_(module(), Int8WeightOnlyConfig())
        return [0]

    return {"torchao quantize_": run}


def int8_rows(smoke: bool) -> dict[str, Any]:
    """Quantize the kernels of a BERT-base to int8 with one scale for each output channel."""
    shapes = [(64, 32), (32, 64)] if smoke else bert_base_shapes()
    keys = jax.random.split(jax.random.key(SEED), len(shapes))
    params = {
        str(at): jax.random.normal(key, shape) * shape[0] ** -0.5
        for at, (key, shape) in enumerate(zip(keys, shapes, strict=True))
    }
    kernels = [np.asarray(leaf) for leaf in params.values()]
    spec = quant.QuantSpec(8)
    run = jax.jit(lambda tree: quant.quantize_params(tree, spec))
    copy = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 0.0, tree))
    sides: dict[str, Callable[[], Any]] = {
        "jopt": lambda: run(params),
        "XLA copy of the floats": lambda: copy(params),
    }
    sides |= _torch_sides(kernels) | _torchao_sides(kernels)
    rows = _timing.interleaved(sides, 3 if smoke else 9)
    ours = rows["jopt"]["median_s"]
    return {
        "parameters": sum(kernel.size for kernel in kernels),
        "rows": rows,
        "times_faster": {n: row["median_s"] / ours for n, row in rows.items() if n != "jopt"},
    }


PARTS: dict[str, Callable[[bool], dict[str, Any]]] = {
    "int8": int8_rows,
    "kmeans": _bench_kmeans.rows,
    "gptq": _bench_gptq.rows,
}


def targets_of(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Hold the ratios against what is asked for, where a peer was there."""
    found = []
    faster = figures.get("int8", {}).get("times_faster", {})
    for peer, goal in (("torch eager", 2.0), ("torchao quantize_", 4.0)):
        if peer in faster:
            words = f"int8 of 110 million parameters: times faster than {peer}"
            found.append(target(words, round(faster[peer], 2), goal, "higher"))
    found += figures.get("kmeans", {}).get("targets", [])
    found += figures.get("gptq", {}).get("targets", [])
    return found


def main() -> None:
    """Run the parts and write experiments/results/bench_quant.json."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bench_quant")
    parser.add_argument("--only", choices=PARTS, help="run one part, keep the others' figures")
    parser.add_argument("--smoke", action="store_true", help="small, into a temporary folder")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp()) if options.smoke else RESULTS
    file, figures = folder / "bench_quant.json", {}
    if options.only and file.exists():
        figures = json.loads(file.read_text())["figures"]
    for part in [options.only] if options.only else PARTS:
        figures[part] = PARTS[part](options.smoke)
        print(json.dumps({part: figures[part]}, indent=2))
    results = {
        "command": command("experiments.bench_quant"),
        **environment(("torch", "torchao", "scikit-learn")),
        "data": "weights drawn from the seed",
        "settings": {"seed": SEED, "smoke": options.smoke},
        "figures": figures,
        "targets": [] if options.smoke else targets_of(figures),
    }
    for each in results["targets"]:
        print("met   " if each["met"] else "MISSED", each["target"], each["value"], each["goal"])
    print(write_results("bench_quant", results, folder))


if __name__ == "__main__":
    main()
