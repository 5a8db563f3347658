"""GPTQ against the paper's algorithm in PyTorch: the factor and the loop, side by side."""

import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _timing
from experiments._results import target
from jopt.layers._feedback import feedback_factor, round_with_feedback
from jopt.layers._statistics import InputStatistics
from jopt.quant import QuantSpec
from jopt.quant._gptq import as_stored, gptq
from jopt.quant._quantize import fit_levels

SEED = 0
BITS = 4
DAMPING = 0.01
_TORCH_BLOCK = 128  # the paper's

try:
    import torch  # pyright: ignore[reportMissingImports]
except ImportError:
    torch = None


def problem(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a kernel, (inputs, outputs), and the second moments of correlated inputs."""
    rng = np.random.default_rng(SEED)
    mixing = rng.normal(size=(size, size)).astype(np.float32) / np.sqrt(size, dtype=np.float32)
    mixing += np.eye(size, dtype=np.float32)
    inputs = rng.normal(size=(2 * size, size)).astype(np.float32) @ mixing
    kernel = rng.normal(size=(size, size)).astype(np.float32) / np.sqrt(size, dtype=np.float32)
    return kernel, inputs.T @ inputs / np.float32(len(inputs))


def torch_factor(hessian: Any) -> Any:
    """Prepare as algorithm 1 does: damp, invert, and factor the inverse."""
    assert torch is not None
    damped = hessian.clone()
    index = torch.arange(len(damped))
    damped[index, index] += DAMPING * torch.mean(torch.diag(damped))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


def torch_loop(weights: Any, factor: Any, scale: Any) -> Any:
    """Run the loop of algorithm 1 on weights (outputs, inputs) with one scale an output."""
    assert torch is not None
    left, rounded = weights.clone(), torch.zeros_like(weights)
    top = 2 ** (BITS - 1) - 1
    size = weights.shape[1]
    for start in range(0, size, _TORCH_BLOCK):
        stop = min(start + _TORCH_BLOCK, size)
        block = left[:, start:stop].clone()
        errors = torch.zeros_like(block)
        inner = factor[start:stop, start:stop]
        for column in range(stop - start):
            values = block[:, column]
            level = scale * torch.clamp(torch.round(values / scale), -top, top)
            rounded[:, start + column] = level
            error = (values - level) / inner[column, column]
            block[:, column:] -= error[:, None] * inner[column, column:][None, :]
            errors[:, column] = error
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return rounded


@jax.jit
def jopt_factor(gram: jax.Array) -> jax.Array:
    """Prepare as `gptq` does, in the order of the paper."""
    return feedback_factor(gram[::-1, ::-1], DAMPING)


@jax.jit
def jopt_loop(kernel: jax.Array, factor: jax.Array, scale: jax.Array) -> jax.Array:
    """Run the loop of `gptq` with one scale an output, in the order of the paper."""
    spec = QuantSpec(BITS)

    def round_row(index: jax.Array, values: jax.Array) -> jax.Array:
        del index
        levels = fit_levels(kernel, spec).replace(scale=scale)
        return spec.grid.encode(values[None], levels, BITS).codes[0].astype(jnp.float32) * scale[0]

    return round_with_feedback(kernel[::-1], factor, round_row)[::-1]


def _error(kernel: np.ndarray, restored: Any, gram: np.ndarray) -> float:
    delta = kernel - np.asarray(restored)
    return float(np.sum(delta * (gram @ delta), dtype=np.float64))


def compare(size: int, repeats: int) -> dict[str, Any]:
    """Time both sides on one matrix of `size` inputs and outputs, and check the errors."""
    kernel, gram = problem(size)
    spec = QuantSpec(BITS)
    weights, moments = jnp.asarray(kernel), jnp.asarray(gram)
    scale = fit_levels(weights, spec).scale
    factor = jopt_factor(moments)
    statistics = InputStatistics(moments[0, 0], moments[0], moments[0], moments[0], moments)
    whole = partial(gptq, weights, statistics, spec, DAMPING, as_stored)
    timed = {
        "jopt preparation": partial(jopt_factor, moments),
        "jopt loop": partial(jopt_loop, weights, factor, scale),
        "jopt gptq with its outcome": whole,
    }
    start = time.perf_counter()
    jopt_loop.lower(weights, factor, scale).compile()
    figures: dict[str, Any] = {"compile_loop_s": time.perf_counter() - start}
    figures["error"] = _error(kernel, jopt_loop(weights, factor, scale), gram)
    figures["error_to_nearest"] = float(whole()[1].baseline)
    if torch is not None:
        hessian, outputs = torch.tensor(gram), torch.tensor(kernel.T.copy())
        prepared, steps = torch_factor(hessian), torch.tensor(np.asarray(scale)[0])
        timed |= {
            "torch preparation": partial(torch_factor, hessian),
            "torch loop": partial(torch_loop, outputs, prepared, steps),
        }
        figures["torch_error"] = _error(
            kernel, torch_loop(outputs, prepared, steps).numpy().T, gram
        )
    figures["median_s"] = medians = {
        name: row["median_s"] for name, row in _timing.interleaved(timed, repeats).items()
    }
    if torch is not None:
        for part in ("preparation", "loop"):
            figures[f"{part}_times_faster"] = medians[f"torch {part}"] / medians[f"jopt {part}"]
    return figures


def targets_of(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Hold the figures of every kernel against what is asked for."""
    found = []
    for name, row in figures.items():
        if "torch_error" not in row:
            continue
        for part, goal in (("loop", 2.0), ("preparation", 1.5)):
            words = f"GPTQ {name}: {part}, times as fast as PyTorch"
            found.append(target(words, round(row[f"{part}_times_faster"], 2), goal, "higher"))
        excess = row["error"] / row["torch_error"] - 1
        words = f"GPTQ {name}: output error over PyTorch's, share"
        found.append(target(words, round(excess, 7), 1e-3, "lower"))
    return found


def rows(smoke: bool) -> dict[str, Any]:
    """Measure 1024 x 1024 and 4096 x 4096 kernels, a small one in a smoke run.

    Returns:
      By size: median seconds of preparation and loop on both sides, how many times faster jopt is,
      and the output errors, which must agree; and the targets. Without PyTorch its figures are
      absent, and so are the targets.
    """
    sizes = {128: 1} if smoke else {1024: 7, 4096: 3}
    figures = {f"{size}x{size}": compare(size, repeats) for size, repeats in sizes.items()}
    return figures | {"targets": targets_of(figures)}
