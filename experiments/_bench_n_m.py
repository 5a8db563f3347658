"""2:4 masks of one kernel, by ranks against the ways of other libraries."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _timing
from jopt import prune

SEED = 0


def _groups(scores: jax.Array, m: int, axis: int) -> jax.Array:
    moved = jnp.moveaxis(scores, axis, -1)
    return moved.reshape(-1, m)


def _back(mask: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    last = (*shape[:axis], *shape[axis + 1 :], shape[axis])
    return jnp.moveaxis(mask.reshape(last), -1, axis)


@partial(jax.jit, static_argnums=(1, 2, 3))
def by_argsort(scores: jax.Array, n: int, m: int, axis: int) -> jax.Array:
    """Sort the indices of every group and scatter ones, as jaxpruner's n:m sparsity does."""
    groups = _groups(scores, m, axis)
    order = jnp.argsort(-groups, axis=1, stable=True)[:, :n]
    at = jnp.arange(groups.shape[0])[:, None]
    return _back(jnp.zeros(groups.shape, bool).at[at, order].set(True), scores.shape, axis)


@partial(jax.jit, static_argnums=(1, 2, 3))
def by_top_k(scores: jax.Array, n: int, m: int, axis: int) -> jax.Array:
    """Take the indices of the highest by `top_k` and sum their one-hot rows, as qwix does."""
    groups = _groups(scores, m, axis)
    _, order = jax.lax.top_k(groups, n)
    return _back(jax.nn.one_hot(order, m, dtype=jnp.int8).sum(1) > 0, scores.shape, axis)


@jax.jit
def _positive(scores: jax.Array) -> jax.Array:
    return scores > 0


def rows(smoke: bool, rounds: int) -> dict[str, Any]:
    """Make 2:4 and 4:8 masks along both axes of a 1024 x 1024 kernel."""
    size = 64 if smoke else 1024
    scores = jnp.abs(jax.random.normal(jax.random.key(SEED), (size, size)))
    ways = {"jopt": prune.n_m_mask, "argsort (as jaxpruner)": by_argsort, "top_k": by_top_k}
    figures: dict[str, Any] = {}
    for n, m in ((2, 4), (4, 8)):
        for axis in (0, 1):
            sides = {name: partial(way, scores, n, m, axis) for name, way in ways.items()}
            made = {name: np.asarray(side()) for name, side in sides.items()}
            exact = all(np.array_equal(mask, made["jopt"]) for mask in made.values())
            if not exact:
                raise SystemExit(f"{n}:{m} along axis {axis}: the masks differ.")
            sides["one comparison, the least work"] = partial(_positive, scores)
            timed = _timing.interleaved(sides, 3 * rounds)
            medians = {name: row["median_s"] for name, row in timed.items()}
            figures[f"{n}:{m} along axis {axis}"] = {
                "median_s": medians,
                "min_s": {name: row["min_s"] for name, row in timed.items()},
                "times_faster": {name: t / medians["jopt"] for name, t in medians.items()},
            }
    return figures | {"targets": []}
