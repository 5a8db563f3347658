"""Batch norm's averages taken anew, for the activations that the quantized network has."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jopt._arrays import working_dtype
from jopt._trees import flatten_with_paths, is_floating

# The averages that momentum is measured with. Large, so that what is measured is momentum and not
# the batch; a power of two, so that multiplying by it is exact.
_PROBE = 2.0**20
# A norm whose averages keep all but this share is one that does not train.
_FROZEN = 1e-6

Update = Callable[[Any, Any, Any], Any]


def population_statistics(average: Any, spread: Any) -> Any:
    """Combine batches into the statistics of all examples together.

    The mean is the average of the batches' means; the variance is the average of the batches'
    variances plus the variance of their means, which is exact for batches of equal size. A leaf
    `var` without a `mean` of its shape beside it, and any other leaf, is averaged.

    Args:
      average: a tree like the statistics: the average over batches.
      spread: a tree like the statistics: the variance over batches.

    Returns:
      A tree like the statistics.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.layers import population_statistics
      >>> average = {"mean": jnp.array(1.0), "var": jnp.array(2.0)}
      >>> spread = {"mean": jnp.array(0.5), "var": jnp.array(9.0)}
      >>> population_statistics(average, spread)
      {'mean': Array(1., dtype=float32, weak_type=True),
       'var': Array(2.5, dtype=float32, weak_type=True)}

    References:
      Wu, Johnson, "Rethinking 'Batch' in BatchNorm", 2021, https://arxiv.org/abs/2105.07576,
      section 3.
    """
    paths, leaves, treedef = flatten_with_paths(average)
    spreads = dict(zip(paths, jax.tree.leaves(spread), strict=True))

    def combine(path: str, leaf: Any) -> Any:
        root, _, name = path.rpartition("/")
        of_means = spreads.get(f"{root}/mean" if root else "mean")
        fits = name == "var" and of_means is not None and of_means.shape == leaf.shape
        return leaf + of_means if fits else leaf

    combined = [combine(path, leaf) for path, leaf in zip(paths, leaves, strict=True)]
    return jax.tree.unflatten(treedef, combined)


def average_statistics(average: Any, spread: Any) -> Any:
    """Combine batches by their average alone: what running averages tend to.

    Args:
      average: a tree like the statistics: the average over batches.
      spread: not used.

    Returns:
      `average`.

    Example:
      >>> average_statistics({"mean": 1.0}, {"mean": 0.5})
      {'mean': 1.0}
    """
    del spread
    return average


def _wide(leaf: jax.Array, value: float) -> jax.Array:
    return jnp.full(leaf.shape, value, working_dtype(leaf.dtype))


def _probe(statistics: Any, value: float) -> Any:
    return jax.tree.map(lambda a: _wide(a, value) if is_floating(a) else a, statistics)


@jax.jit
def _kept(at_zero: Any, at_probe: Any) -> Any:
    """Return which share `1 - m` of each average an update takes from the batch."""

    def share(zero: jax.Array, probe: jax.Array) -> jax.Array:
        zero, probe = (a.astype(working_dtype(a.dtype)) for a in (zero, probe))
        return 1 - (probe - zero) / _PROBE

    return jax.tree.map(
        lambda zero, probe: share(zero, probe) if is_floating(zero) else zero, at_zero, at_probe
    )


@jax.jit
def _add(count: jax.Array, moments: Any, shares: Any, at_zero: Any) -> Any:
    """Add a batch to the average and the variance over batches, by Welford's update."""

    def batch_of(share: jax.Array, update: jax.Array, mean: jax.Array) -> jax.Array:
        if not is_floating(update):
            return update
        return update.astype(mean.dtype) / jnp.where(share > _FROZEN, share, 1.0)

    def moved(mean: jax.Array, batch: jax.Array) -> jax.Array:
        if not is_floating(batch):
            return mean
        return mean + (batch - mean) / count.astype(mean.dtype)

    def grown(total: jax.Array, batch: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
        return total + (batch - old) * (batch - new) if is_floating(batch) else total

    means, totals = moments
    batches = jax.tree.map(batch_of, shares, at_zero, means)
    new = jax.tree.map(moved, means, batches)
    return new, jax.tree.map(grown, totals, batches, means, new)


def reestimate_batch_norm(
    update: Update,
    params: Any,
    statistics: Any,
    batches: Iterable[Any],
    combine: Callable[[Any, Any], Any] = population_statistics,
) -> Any:
    """Return batch norm's running averages taken anew over some batches.

    After quantizing or pruning the activations are no longer those that the averages were taken of,
    and at few bits that costs accuracy. `update` is the training forward pass, which sets each
    average to `m old + (1 - m) batch`. Calling it with averages of zero gives `(1 - m) batch`, and
    calling it once with large ones gives m, so that the statistics of each batch are known whatever
    the momentum is, and count the same: nothing is left over from before. The error is that of
    float32 over `1 - m`, about 1e-5 of a statistic at momentum 0.99.

    Args:
      update: `(params, statistics, batch) -> statistics`; it is jitted here. In linen
        `lambda p, s, x: model.apply({"params": p, "batch_stats": s}, x, train=True,
        mutable=["batch_stats"])[1]["batch_stats"]`, with `jopt.materialize(p)` for compressed
        parameters.
      params: passed to `update`.
      statistics: the averages that there are; they give the structure, and a norm that `update`
        does not change keeps them.
      batches: at least one, best of equal size; they count the same.
      combine: `(average, spread) -> statistics`: `population_statistics` or `average_statistics`.

    Returns:
      A tree of the structure, shapes and dtypes of `statistics`. Leaves that are not
      floating-point are returned as they are.

    Raises:
      ValueError: there is no batch, `update` returns another structure, or (outside jit) it changes
        no average, which means that the model ran in inference mode.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.layers import reestimate_batch_norm
      >>> def update(params, statistics, batch):
      ...     hidden = batch * params
      ...     new = {"mean": hidden.mean(0), "var": hidden.var(0)}
      ...     return {name: 0.5 * old + 0.5 * new[name] for name, old in statistics.items()}
      >>> statistics = {"mean": jnp.zeros(1), "var": jnp.ones(1)}
      >>> batches = [jnp.array([[0.0], [2.0]]), jnp.array([[4.0], [6.0]])]
      >>> new = reestimate_batch_norm(update, jnp.array(1.0), statistics, batches)
      >>> new["mean"], new["var"]  # of 0, 2, 4, 6
      (Array([3.], dtype=float32), Array([5.], dtype=float32))

    References:
      Nagel et al., "A White Paper on Neural Network Quantization", 2021,
      https://arxiv.org/abs/2106.08295, section 4.2.1 (batch norm); Wu, Johnson, 2021,
      https://arxiv.org/abs/2105.07576, section 3.
    """
    observe = jax.jit(update)
    zeros = _probe(statistics, 0.0)
    moments, shares = (zeros, zeros), None
    for number, batch in enumerate(batches, start=1):
        at_zero = observe(params, zeros, batch)
        if shares is None:
            _check_structure(at_zero, statistics)
            shares = _kept(at_zero, observe(params, _probe(statistics, _PROBE), batch))
            _check_trains(shares)
        moments = _add(jnp.array(number, jnp.float32), moments, shares, at_zero)
    if shares is None:
        raise ValueError("batches must hold at least one batch, but there is none.")
    count = number
    average, total = moments
    spread = jax.tree.map(lambda a: a / count if is_floating(a) else a, total)

    def finish(old: Any, share: Any, new: Any) -> Any:
        if not is_floating(old):
            return old
        return jnp.where(share > _FROZEN, new.astype(old.dtype), old)

    return jax.tree.map(finish, statistics, shares, combine(average, spread))


def _check_structure(new: Any, statistics: Any) -> None:
    got, expected = jax.tree.structure(new), jax.tree.structure(statistics)
    if got != expected:
        raise ValueError(f"update must return statistics of structure {expected}, not {got}.")


def _check_trains(shares: Any) -> None:
    """Raise if no average moves."""
    floating = [share for share in jax.tree.leaves(shares) if is_floating(share)]
    if not floating:
        raise ValueError("statistics hold no floating-point leaf: there are no averages to take.")
    try:
        moves = any(bool(jnp.any(share > _FROZEN)) for share in floating)
    except jax.errors.ConcretizationTypeError:  # under jit the values are not known
        return
    if not moves:
        raise ValueError("update changed no average: it must run the model in training mode.")
