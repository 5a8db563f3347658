"""The largest masks that fit a budget of any kind: parameters, multiply-adds, bytes, seconds."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jopt._trees import flatten_with_paths
from jopt.prune._budgets import Shape


class Budgeted(NamedTuple):
    """Masks that fit a budget.

    Attributes:
      masks: the tree of masks.
      sparsity: the sparsity they were made with.
      cost: what they cost.
    """

    masks: Any
    sparsity: float
    cost: float


def masks_to_budget(
    make_masks: Callable[[float], Any],
    cost: Callable[[Any], float],
    budget: float,
    tolerance: float = 1e-3,
    limits: tuple[float, float] = (0.0, 1.0),
    halvings: int = 20,
) -> Budgeted:
    """Find the least sparsity whose masks cost at most a budget.

    Bisection: the cost must fall as sparsity rises. (Where it wiggles, as a file's bytes may, the
    masks fit all the same, but others may that keep a little more.)

    Args:
      make_masks: sparsity to masks, such as `lambda s: topk_masks(scores, s)`. A Python float each
        time: do not trace it to something that compiles anew.
      cost: masks to a number: `kept_parameters(params, masks)`, `kept_multiply_adds(...)`, the
        bytes of the file that stores the pruned network, a measured time.
      budget: what the masks may cost.
      tolerance: stop when the cost is within this fraction of the budget below it.
      limits: the least and the greatest sparsity to try.
      halvings: stop after so many steps.

    Returns:
      The masks, their sparsity and their cost: the dearest seen that fit.

    Raises:
      ValueError: even the greatest sparsity that has masks costs more than the budget, or `limits`,
        `tolerance` or `halvings` is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.prune import kept_parameters, topk_masks
      >>> params = {"kernel": jnp.arange(1.0, 11.0).reshape(2, 5), "bias": jnp.ones(2)}
      >>> found = masks_to_budget(
      ...     lambda sparsity: topk_masks(params, sparsity),
      ...     lambda masks: kept_parameters(params, masks),
      ...     budget=5,
      ... )
      >>> found.masks["kernel"].sum(), found.cost
      (Array(3, dtype=int32), 5.0)
    """
    low, high = limits
    if not 0 <= low <= high <= 1:
        raise ValueError(f"limits must be two sparsities in order in [0, 1], not {limits!r}.")
    if tolerance < 0 or halvings < 0:
        raise ValueError(
            f"tolerance and halvings must be at least 0, not {tolerance!r} and {halvings!r}."
        )

    def measured(masks: Any, sparsity: float) -> Budgeted:
        return Budgeted(masks, sparsity, float(np.asarray(cost(masks))))

    found = measured(make_masks(low), low)
    if found.cost <= budget:
        return found
    best, reason = None, f"at sparsity {low} the cost is {found.cost}"
    middle = high
    for _ in range(halvings + 1):
        try:
            masks = make_masks(middle)
        except ValueError as error:  # a layer would lose every weight
            high, reason = middle, str(error).rstrip(".")
            middle = (low + high) / 2
            continue
        found = measured(masks, middle)
        if found.cost <= budget:
            best, high = found, middle
        elif middle == limits[1]:
            reason = f"at sparsity {middle} the cost is {found.cost}"
            break
        else:
            low = middle
        if best is not None and best.cost >= budget * (1 - tolerance):
            break
        middle = (low + high) / 2
    if best is None:
        raise ValueError(f"budget {budget} is out of reach: {reason}.")
    return best


def kept_parameters(params: Any, masks: Any) -> int:
    """Count the weights that masks keep, leaves without a mask of their own included.

    Args:
      params: any pytree of arrays; only shapes matter.
      masks: a tree of booleans of the same structure, each broadcasting against its leaf.

    Returns:
      A whole number.

    Raises:
      ValueError: the trees differ.

    Example:
      >>> import jax.numpy as jnp
      >>> masks = {"kernel": jnp.array([[True, False, True]]), "bias": jnp.array(True)}
      >>> kept_parameters({"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, masks)
      7
    """
    paths, leaves, _ = flatten_with_paths(params)
    counts = kept_counts(
        masks, {p: tuple(leaf.shape) for p, leaf in zip(paths, leaves, strict=True)}
    )
    return sum(counts.values())


def kept_counts(masks: Any, shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Count what each mask keeps of an array of a given shape.

    Raises:
      ValueError: there is no mask for a shape.

    Example:
      >>> import jax.numpy as jnp
      >>> kept_counts({"w": jnp.array([[True, False]])}, {"w": (3, 2)})
      {'w': 3}
    """
    paths, leaves, _ = flatten_with_paths(masks)
    found = dict(zip(paths, leaves, strict=True))
    missing = [path for path in shapes if path not in found]
    if missing:
        raise ValueError(f"masks has no entry for {missing}; it has {paths}.")
    counts = {}
    for path, shape in shapes.items():
        mask = np.asarray(found[path])
        counts[path] = int(np.count_nonzero(mask)) * (math.prod(shape) // max(mask.size, 1))
    return counts
