"""Sensitivity: what pruning each layer alone costs, and the budget that costs least."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jopt._trees import Filter, is_kernel
from jopt.prune._budgets import as_sparsities, pruned_total
from jopt.prune._masks import apply_masks, scored, topk_masks


class Sensitivity(NamedTuple):
    """What was measured with one leaf pruned and all others whole.

    Attributes:
      levels: the sparsities, ascending.
      whole: the figure of the unpruned parameters.
      figures: by path one figure for each level, float64.
      sizes: by path how many weights the leaf has.
    """

    levels: tuple[float, ...]
    whole: float
    figures: dict[str, np.ndarray]
    sizes: dict[str, int]


def sensitivity(
    evaluate: Callable[[Any], Any],
    params: Any,
    scores: Any,
    levels: Sequence[float],
    where: Filter = is_kernel,
) -> Sensitivity:
    """Measure what pruning each chosen leaf alone does, at each of a few sparsities.

    `evaluate` is called `1 + leaves * levels` times, always with arrays of the same shapes: a
    jitted one is compiled once.

    Args:
      evaluate: parameters to one number, lower is better: a loss or an error on validation data.
      params: any pytree of arrays.
      scores: a tree of scores like params, higher keeps.
      levels: sparsities to try, in (0, 1], ascending.
      where: which leaves to try, a regex on the path or a predicate.

    Returns:
      The table, on the host.

    Raises:
      ValueError: `levels` is empty, not ascending or outside (0, 1]; or the filter matches nothing.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[3.0, 5.0]])}
      >>> lost = lambda pruned: 11 - sum(leaf.sum() for leaf in pruned.values())
      >>> table = sensitivity(lost, params, params, [0.5, 1.0])
      >>> table.whole, table.figures["a"].tolist(), table.figures["b"].tolist()
      (0.0, [1.0, 3.0], [3.0, 8.0])

    References:
      Li et al., "Pruning Filters for Efficient ConvNets", 2017, https://arxiv.org/abs/1608.08710,
      section 3.2.
    """
    levels = tuple(float(level) for level in levels)
    rises = all(low < high for low, high in zip(levels, levels[1:], strict=False))
    if not levels or not rises or not 0 < levels[0] <= levels[-1] <= 1:
        raise ValueError(f"levels must ascend within (0, 1], not {levels!r}.")
    paths, leaves, chosen, treedef = scored(scores, where)
    shapes = [leaf.shape if take else () for leaf, take in zip(leaves, chosen, strict=True)]
    dense = [jnp.ones(shape, bool) for shape in shapes]
    masked = jax.jit(apply_masks)

    def figure(index: int, mask: jax.Array) -> float:
        masks = jax.tree.unflatten(treedef, [*dense[:index], mask, *dense[index + 1 :]])
        return float(np.asarray(evaluate(masked(params, masks))))

    figures, sizes = {}, {}
    for index, (path, leaf, take) in enumerate(zip(paths, leaves, chosen, strict=True)):
        if take:
            masks = [topk_masks({"leaf": leaf}, level, ".*", 0)["leaf"] for level in levels]
            figures[path] = np.array([figure(index, mask) for mask in masks])
            sizes[path] = leaf.size
    return Sensitivity(levels, figure(0, dense[0]), figures, sizes)


class _Step(NamedTuple):
    slope: float  # harm for each weight
    path: str
    weights: int


def _hull_steps(path: str, counts: list[int], harms: list[float]) -> list[_Step]:
    """Walk along the lower convex hull of harm over pruned weights, from nothing pruned on."""
    corners: list[tuple[int, float]] = []
    for point in zip(counts, harms, strict=True):
        while len(corners) > 1:
            (x0, y0), (x1, y1) = corners[-2:]
            if (y1 - y0) * (point[0] - x1) < (point[1] - y1) * (x1 - x0):
                break
            corners.pop()
        if corners and corners[-1][0] == point[0]:
            continue
        corners.append(point)
    return [
        _Step((y1 - y0) / (x1 - x0), path, x1 - x0)
        for (x0, y0), (x1, y1) in zip(corners, corners[1:], strict=False)
    ]


def sensitivity_sparsities(table: Sensitivity, sparsity: float) -> dict[str, float]:
    """Share out a sparsity over the leaves so that the harm predicted from a table is least.

    Harm is the rise of a leaf's figure over the whole network's, at least that of lower levels;
    that of several leaves is taken to add up. Between levels it runs along the lower convex hull
    of what was measured, on which the steps of least harm for each weight, taken in turn over all
    leaves, are the best there is: no other split of the total harms less.

    Args:
      table: what `sensitivity` measured.
      sparsity: fraction of all weights of the table's leaves to prune, 0 to below 1.

    Returns:
      A dict from path to sparsity, for `topk_masks`; no leaf goes beyond the last level.

    Raises:
      ValueError: `sparsity` is out of range, is beyond what the last level allows, a leaf would
        lose every weight, or a figure is not finite.

    Example:
      >>> import numpy as np
      >>> figures = {"a": np.array([0.1, 0.9]), "b": np.array([0.2, 0.4])}
      >>> table = Sensitivity((0.5, 0.9), 0.0, figures, {"a": 10, "b": 10})
      >>> sensitivity_sparsities(table, 0.7)
      {'a': 0.5, 'b': 0.9}

    References:
      Shoham, Gersho, "Efficient Bit Allocation for an Arbitrary Set of Quantizers", 1988,
      https://doi.org/10.1109/29.90373 (the Lagrangian on the convex hull).
    """
    left = pruned_total(table.sizes, sparsity)
    odd = [path for path, harms in table.figures.items() if not np.isfinite(harms).all()]
    if odd or not np.isfinite(table.whole):
        raise ValueError(f"the table's figures must be finite; those of {odd or 'whole'} are not.")
    steps = []
    for path, size in table.sizes.items():
        counts = [0, *(round(size * level) for level in table.levels)]
        harms = np.maximum.accumulate([0.0, *(table.figures[path] - table.whole)])
        steps += _hull_steps(path, counts, harms.tolist())
    if left > sum(step.weights for step in steps):
        raise ValueError(
            f"sparsity {sparsity} is beyond the table, whose last level is {table.levels[-1]}."
        )
    pruned = dict.fromkeys(table.sizes, 0)
    # Stable, and slopes of a leaf rise: its steps stay in order.
    for step in sorted(steps, key=lambda step: step.slope):
        taken = min(step.weights, left)
        pruned[step.path] += taken
        left -= taken
    kept: Mapping[str, float] = {p: size - pruned[p] for p, size in table.sizes.items()}
    return as_sparsities(table.sizes, kept, sum(table.sizes.values()) - sum(pruned.values()))
