"""A language model taught by one four times its size: word by word, and on what it says itself.

The student is trained on the text alone, or with the teacher's distribution of every next word. The
second is then trained on: on the text as before, or on continuations that it draws itself and the
teacher judges (GKD), with the same number of steps. Beside the perplexity of the test text stands
what the teacher thinks of the student's own continuations of test prompts: the mean surprise of the
teacher at their tokens.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from experiments import (
    _compress,
    _decoder,
    _language_network,
    _language_report,
    _parts,
    _results,
    _rows,
)
from jopt import distill

Tree = Any
SMALLER = 4.0  # times fewer parameters


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the outcome beside the settings of the networks."""

    weight: float = 0.7  # of the teacher, against the text
    further_epochs: int = 1
    further_rate: float = 3e-4
    prompt: int = 32
    continuation: int = 64
    fraction: float = 0.5  # of sequences that are the student's own
    judged: int = 256  # test prompts


SAME, LISTED = ("how", "parameters"), ("surprise", "validation", "test")


def measure(
    run: _language_network.Run, settings: Settings, seed: int, held: _parts.Held
) -> _rows.Rows:
    """Train and score every student of one seed that is not among the finished ones."""
    file = run.work / f"students-{seed}.json"
    rows = _rows.Rows(file, ("how",), held.rows(seed, LISTED), held.facts(seed))
    shape = run.settings.student
    module, teaching = run.module(shape), run.module(run.settings.teacher)

    def row(how: str, make: Callable[[], Tree]) -> None:
        def measured() -> dict[str, Any]:
            params = make()
            found = run.perplexities(shape, params)
            own = judged(run, settings, params, run.teacher(seed), seed)
            run.say(f"seed {seed}: {how}: validation {found['validation']:.3f}, judged {own:.3f}")
            return {"parameters": _compress.size(params), "surprise": own} | found

        rows.add({"how": how}, measured)

    def taught() -> Tree:
        loss = _language_network.taught_loss(module, teaching, settings.weight)
        start = run.initial(shape, seed)
        stem = run.work / f"taught-{seed}.ckpt"
        return run.fit().run(loss, start, run.pool, seed, stem, run.say, state=run.teacher(seed))

    def further(name: str, loss: Any) -> Tree:
        steps = settings.further_epochs * (run.pool.count // run.settings.batch)
        rate = optax.cosine_decay_schedule(settings.further_rate, steps, 0.01)
        return run.fit(settings.further_epochs).run(
            loss,
            taught(),
            run.pool,
            seed,
            run.work / f"{name}-{seed}.ckpt",
            run.say,
            state=run.teacher(seed),
            tx=optax.adamw(rate, weight_decay=run.settings.weight_decay),
        )

    row("alone", lambda: run.trained(shape, seed, "alone"))
    row("word by word", taught)
    on_text = _language_network.taught_loss(module, teaching, settings.weight)
    row("word by word, then more of it", lambda: further("more", on_text))
    on_policy = _language_network.on_policy_loss(
        module,
        teaching,
        settings.prompt,
        settings.continuation,
        settings.fraction,
        distill.reverse_kd_loss,
    )
    row("word by word, then on-policy", lambda: further("policy", on_policy))
    return rows


def judged(
    run: _language_network.Run, settings: Settings, params: Tree, teacher: Tree, seed: int
) -> float:
    """Return the teacher's mean surprise at what a student says after prompts of the test text."""
    module, teaching = run.module(run.settings.student), run.module(run.settings.teacher)
    prompts = run.test[: settings.judged, : settings.prompt]
    key = jax.random.fold_in(jax.random.key(seed), 5)
    said = _decoder.generate(module, params, prompts, settings.continuation, key, _decoder.drawn)
    ids = jnp.concatenate([prompts, said], 1)

    @jax.jit
    def surprises(teacher: Tree, ids: Array) -> Array:
        logits = _language_network.logits_of(teaching)(teacher, ids[:, :-1])
        found = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
        return found[:, settings.prompt - 1 :].mean()

    parts = [surprises(teacher, ids[at : at + 32]) for at in range(0, len(ids), 32)]
    return round(float(np.mean([float(part) for part in parts])), 5)


def targets_of(rows: list[dict[str, Any]], teacher_parameters: int) -> list[dict[str, Any]]:
    """Hold the students against what is asked for."""
    by_name = {row["how"]: row for row in rows}
    alone, taught = by_name["alone"], by_name["word by word"]
    more = by_name["word by word, then more of it"]
    own = by_name["word by word, then on-policy"]
    ratio = teacher_parameters / alone["parameters"]
    return [
        _results.target("times fewer parameters", round(ratio, 3), SMALLER, "higher"),
        _results.target(
            "perplexity alone / taught word by word",
            round(alone["mean_test"] / taught["mean_test"], 5),
            1.0,
            "higher",
        ),
        _results.target(
            "teacher's surprise at the student's own words: more of the same less on-policy",
            round(float(np.mean(more["surprise"]) - np.mean(own["surprise"])), 5),
            0.0,
            "higher",
        ),
    ]


def run(call: _parts.Call) -> dict[str, Any]:
    """Run or resume the part; returns its tag, data, settings, figures and targets."""
    each, tag = _language_network.start(call)
    settings = Settings()
    if call.head is not None:
        settings = dataclasses.replace(settings, prompt=4, continuation=4, judged=32)
    written = dataclasses.asdict(settings) | {"network": dataclasses.asdict(each.settings)}
    held = call.held(tag, written)
    by_seed = [measure(each, settings, seed, held) for seed in call.seeds]
    rows = _results.join_seeds([found.list() for found in by_seed], SAME, LISTED)
    size = by_seed[0].once(
        "teacher_parameters", lambda: _compress.size(each.teacher(call.seeds[0]))
    )
    targets = targets_of(rows, size)
    _language_report.students_table(rows, targets, call.console)
    return {
        "tag": tag,
        "data": _language_network.about(each.data),
        "settings": written,
        "figures": {"rows": rows, "teacher_parameters": size},
        "targets": targets if tag == "" else [],
    }
