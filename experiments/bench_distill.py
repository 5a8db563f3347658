"""Distillation losses against the same equations in torch: values, gradients and times.

    pip install torch==2.13.0                     # for this comparison only
    python -m experiments.bench_distill           # a minute on two cores
    python -m experiments.bench_distill --smoke

Logit distillation, its decoupled form, relational distillation (distances and angles) and attention
transfer are written in torch from the papers, averaged as jopt averages them. Both sides get the
same float32 inputs; recorded are the largest differences of the mean loss and of its gradient with
respect to the student, over the largest gradient, and the times of one value with its gradient.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments import _results, _timing
from jopt import distill

try:
    import torch  # pyright: ignore[reportMissingImports]
except ImportError:
    torch: Any = None

CLOSE = 1e-5
Loss = Callable[..., Any]


def _torch_kd(student: Any, teacher: Any, temperature: float) -> Any:
    log_student = torch.nn.functional.log_softmax(student / temperature, dim=1)
    target = torch.nn.functional.softmax(teacher / temperature, dim=1)
    return torch.nn.functional.kl_div(log_student, target, reduction="batchmean") * temperature**2


def _torch_dkd(student: Any, teacher: Any, labels: Any, temperature: float) -> Any:
    """Return equation 7 of the paper with its probabilities written out."""
    q, p = (torch.softmax(logits / temperature, 1) for logits in (student, teacher))
    chosen = torch.nn.functional.one_hot(labels, student.shape[1]).bool()
    target_q, target_p = q[chosen], p[chosen]
    pair = target_p * (target_p / target_q).log()
    pair = pair + (1 - target_p) * ((1 - target_p) / (1 - target_q)).log()
    others_q, others_p = (
        each[~chosen].view(len(each), -1) / (1 - target[:, None])
        for each, target in ((q, target_q), (p, target_p))
    )
    rest = (others_p * (others_p / others_q).log()).sum(1)
    return temperature**2 * (pair + 8.0 * rest).mean()


def _torch_rkd_distance(student: Any, teacher: Any) -> Any:
    def relative(features: Any) -> Any:
        distances = torch.pdist(features)  # each pair once
        return distances / distances.mean()

    return torch.nn.functional.smooth_l1_loss(relative(student), relative(teacher))


def _torch_rkd_angle(student: Any, teacher: Any) -> Any:
    count = len(student)

    def cosines(features: Any) -> Any:
        edges = torch.nn.functional.normalize(features[None] - features[:, None], dim=2)
        return torch.bmm(edges, edges.transpose(1, 2))

    losses = torch.nn.functional.smooth_l1_loss(
        cosines(student), cosines(teacher), reduction="none"
    )
    same = torch.eye(count, dtype=torch.bool)
    apart = ~(same[:, :, None] | same[:, None, :] | same[None])
    return losses[apart].mean()


def _torch_attention(student: Any, teacher: Any) -> Any:
    first, second = (
        torch.nn.functional.normalize(maps.pow(2).sum(-1).flatten(1)) for maps in (student, teacher)
    )
    return (first - second).pow(2).mean()


def losses(smoke: bool) -> dict[str, tuple[Loss, Loss, tuple[Any, ...]]]:
    """Return `(ours, theirs, inputs)` by name; the first input is the student's."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    batch = 8 if smoke else 128
    student, teacher = 2 * normal(batch, 100), 3 * normal(batch, 100)
    labels = rng.integers(0, 100, batch)
    features, others = normal(batch, 64), normal(batch, 256)
    maps, wide = normal(batch, 8, 8, 64), normal(batch, 8, 8, 256)

    def dkd(s: Array, t: Array, y: Array) -> Array:
        return distill.dkd_loss(s, t, y, 1.0, 8.0, 4.0)

    return {
        "KD": (distill.kd_loss, lambda s, t: _torch_kd(s, t, 4.0), (student, teacher)),
        "DKD": (dkd, lambda s, t, y: _torch_dkd(s, t, y, 4.0), (student, teacher, labels)),
        "RKD distance": (distill.rkd_distance_loss, _torch_rkd_distance, (features, others)),
        "RKD angle": (distill.rkd_angle_loss, _torch_rkd_angle, (features, others)),
        "AT": (distill.attention_transfer_loss, _torch_attention, (maps, wide)),
    }


def measure(ours: Loss, theirs: Loss, inputs: tuple[Any, ...], repeats: int) -> dict[str, Any]:
    """Compare one loss with its transcription."""
    here = tuple(jnp.asarray(each) for each in inputs)
    step = jax.jit(jax.value_and_grad(lambda student, *rest: ours(student, *rest).mean()))
    student = torch.tensor(inputs[0], requires_grad=True)
    rest = tuple(torch.tensor(each) for each in inputs[1:])

    def other() -> tuple[float, Any]:
        value = theirs(student, *rest)
        return value.item(), torch.autograd.grad(value, student)[0]

    value, gradient = (np.asarray(each) for each in step(*here))
    value_there, gradient_there = other()
    gradient_there = gradient_there.numpy()
    rows = _timing.interleaved({"jopt": lambda: step(*here), "torch": lambda: other()[0]}, repeats)
    ours_s, theirs_s = (rows[name]["median_s"] for name in ("jopt", "torch"))
    scale = float(np.abs(gradient_there).max())
    return {
        "value": float(value),
        "value_difference": abs(float(value) - value_there) / abs(value_there),
        "gradient_difference": float(np.abs(gradient - gradient_there).max()) / scale,
        "jopt_ms": round(1e3 * ours_s, 4),
        "torch_ms": round(1e3 * theirs_s, 4),
        "faster": round(theirs_s / ours_s, 2),
    }


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bench_distill")
    parser.add_argument("--smoke", action="store_true", help="small inputs, a few calls")
    parser.add_argument("--repeats", type=int, default=101, help="calls of each side")
    parser.add_argument("--out", type=Path, default=_results.RESULTS, help="where results go")
    options = parser.parse_args(arguments)
    if torch is None:
        parser.error("this comparison needs torch: pip install torch==2.13.0")
    figures, targets = {}, []
    for name, (ours, theirs, inputs) in losses(options.smoke).items():
        row = measure(ours, theirs, inputs, 2 if options.smoke else options.repeats)
        figures[name] = row
        for part in ("value", "gradient"):
            words = f"{name}: relative difference of the {part} to torch"
            targets.append(_results.target(words, row[f"{part}_difference"], CLOSE, "lower"))
        print(
            f"{name}: values differ by {row['value_difference']:.1e}, gradients by "
            f"{row['gradient_difference']:.1e}; {row['jopt_ms']:.3f} ms, torch "
            f"{row['torch_ms']:.3f} ms ({row['faster']:.2f}x)"
        )
    results = {
        "command": _results.command("experiments.bench_distill"),
        **_results.environment(("torch",)),
        "data": "random inputs: only equality and times are compared",
        "settings": {"repeats": options.repeats},
        "figures": figures,
        "targets": targets,
    }
    name = "bench_distill-smoke" if options.smoke else "bench_distill"
    print(f"Results: {_results.write_results(name, results, options.out)}")


if __name__ == "__main__":
    main()
