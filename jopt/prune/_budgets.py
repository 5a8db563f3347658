"""Budgets over layers: how much each gives, so that all together meet a target."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jopt._trees import Filter, flatten_with_paths, is_kernel, select

Shape = tuple[int, ...]


def chosen_shapes(tree: Any, where: Filter) -> dict[str, Shape]:
    """Return the shapes of the chosen leaves by path.

    Example:
      >>> import jax.numpy as jnp
      >>> chosen_shapes({"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, ".*kernel")
      {'kernel': (2, 3)}
    """
    paths, leaves, _ = flatten_with_paths(tree)
    chosen = jax.tree.leaves(select(tree, where))
    return {
        path: tuple(leaf.shape)
        for path, leaf, take in zip(paths, leaves, chosen, strict=True)
        if take
    }


def pruned_total(sizes: Mapping[str, int], sparsity: float) -> int:
    """Return how many weights a sparsity takes from all leaves together.

    Raises:
      ValueError: `sparsity` is outside [0, 1).

    Example:
      >>> pruned_total({"a": 6, "b": 4}, 0.9)
      9
    """
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity must lie in [0, 1), not {sparsity!r}.")
    return round(sum(sizes.values()) * sparsity)


def as_sparsities(
    sizes: Mapping[str, int], kept: Mapping[str, float], total: int
) -> dict[str, float]:
    """Round the weights that leaves keep to whole numbers of a given sum, and make sparsities.

    By largest remainders: each is rounded down, then the largest fractions get one more.

    Args:
      sizes: how many weights a leaf has.
      kept: how many it should keep, not yet whole, at most its size.
      total: how many all keep together; the sum of `kept` up to rounding.

    Returns:
      A sparsity for each leaf, of which `round(size * sparsity)` is exact.

    Raises:
      ValueError: a leaf would lose every weight.

    Example:
      >>> as_sparsities({"a": 4, "b": 4}, {"a": 1.4, "b": 2.6}, 4)
      {'a': 0.75, 'b': 0.25}
    """
    whole = {path: min(math.floor(kept[path] + 1e-9), size) for path, size in sizes.items()}
    by_fraction = sorted(sizes, key=lambda path: whole[path] - kept[path])
    missing = total - sum(whole.values())
    for path in by_fraction * 2:
        if missing > 0 and whole[path] < sizes[path]:
            whole[path] += 1
            missing -= 1
    lost = [path for path, count in whole.items() if count == 0 and sizes[path]]
    if lost:
        raise ValueError(f"the budget takes every weight of {lost}; leave them out by where.")
    return {path: 1 - whole[path] / size if size else 0.0 for path, size in sizes.items()}


def uniform_sparsities(params: Any, sparsity: float, where: Filter = is_kernel) -> dict[str, float]:
    """Take the same fraction of every layer, and the total exactly.

    Args:
      params: any pytree of arrays; only shapes matter.
      sparsity: fraction of all chosen weights to prune, 0 to below 1.
      where: which leaves share the budget; leave a first or last layer out to keep it dense.

    Returns:
      A dict from path to sparsity, for `topk_masks`.

    Raises:
      ValueError: `sparsity` is out of range, a leaf would lose every weight, or the filter matches
        nothing.

    Example:
      >>> import jax.numpy as jnp
      >>> uniform_sparsities({"a": jnp.ones((2, 2)), "b": jnp.ones((4, 2))}, 0.5)
      {'a': 0.5, 'b': 0.5}
    """
    sizes = {path: math.prod(shape) for path, shape in chosen_shapes(params, where).items()}
    total = sum(sizes.values()) - pruned_total(sizes, sparsity)
    kept = {path: size * total / max(sum(sizes.values()), 1) for path, size in sizes.items()}
    return as_sparsities(sizes, kept, total)


def _proportional(
    shapes: dict[str, Shape], sparsity: float, density: Callable[[Shape], float]
) -> dict[str, float]:
    """Keep `scale * density` of each leaf, at most all of it, with the scale that meets the total.

    As the scale grows, leaves become dense in the order of falling density; so the scale of what
    is left is tried with ever more of them dense, until none of the others passes 1.
    """
    sizes = {path: math.prod(shape) for path, shape in shapes.items()}
    total = sum(sizes.values()) - pruned_total(sizes, sparsity)
    raw = {path: density(shape) if sizes[path] else 0.0 for path, shape in shapes.items()}
    free = sorted(shapes, key=lambda path: raw[path])  # the last becomes dense first
    left, scale = total, 0.0
    while free:
        scale = left / max(sum(raw[path] * sizes[path] for path in free), 1e-30)
        if scale * raw[free[-1]] <= 1:
            break
        left -= sizes[free.pop()]
    kept = {path: float(size) for path, size in sizes.items()}
    kept |= {path: scale * raw[path] * sizes[path] for path in free}
    return as_sparsities(sizes, kept, total)


def erdos_renyi_sparsities(
    params: Any, sparsity: float, where: Filter = is_kernel
) -> dict[str, float]:
    """Keep more of small layers: density in proportion to (in + out) / (in * out).

    Such a random graph has links in proportion to its neurons. A layer that would keep more than
    all of it is dense, and the others share the rest, so that the total is met exactly.

    Args:
      params: any pytree of arrays; only shapes matter: `(..., in, out)`, the axes before, as a
        convolution's window, left out of account.
      sparsity: fraction of all chosen weights to prune, 0 to below 1.
      where: which leaves share the budget.

    Returns:
      A dict from path to sparsity, for `topk_masks`.

    Raises:
      ValueError: `sparsity` is out of range, a leaf would lose every weight, or the filter matches
        nothing.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"large": jnp.ones((8, 8)), "small": jnp.ones((2, 8))}
      >>> erdos_renyi_sparsities(params, 0.675)  # 26 kept, in proportion to 8 + 8 and 2 + 8
      {'large': 0.75, 'small': 0.375}

    References:
      Mocanu et al., "Scalable Training of Artificial Neural Networks with Adaptive Sparse
      Connectivity Inspired by Network Science", 2018, https://arxiv.org/abs/1707.04780, equation 1.
      Evci et al., "Rigging the Lottery: Making All Tickets Winners", 2020,
      https://arxiv.org/abs/1911.11134, section 3 (1) (the capping).
    """
    return _proportional(
        chosen_shapes(params, where),
        sparsity,
        lambda shape: sum(shape[-2:]) / math.prod(shape[-2:]),
    )


def erdos_renyi_kernel_sparsities(
    params: Any, sparsity: float, where: Filter = is_kernel
) -> dict[str, float]:
    """Keep more of small layers: density by (in + out + h + w) / (in * out * h * w).

    As `erdos_renyi_sparsities`, with all axes of a kernel: the sum of a shape over its product.

    Args:
      params: any pytree of arrays; only shapes matter. Of layers stacked by a scan the axis of the
        stack counts like a window's.
      sparsity: fraction of all chosen weights to prune, 0 to below 1.
      where: which leaves share the budget.

    Returns:
      A dict from path to sparsity, for `topk_masks`.

    Raises:
      ValueError: `sparsity` is out of range, a leaf would lose every weight, or the filter matches
        nothing.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"conv": jnp.ones((2, 2, 2, 4)), "dense": jnp.ones((5, 10))}
      >>> erdos_renyi_kernel_sparsities(params, 1 - 25 / 82)  # in proportion to 10 and 15
      {'conv': 0.6875, 'dense': 0.7}

    References:
      Evci et al., "Rigging the Lottery: Making All Tickets Winners", 2020,
      https://arxiv.org/abs/1911.11134, section 3 (1).
    """
    return _proportional(
        chosen_shapes(params, where), sparsity, lambda shape: sum(shape) / math.prod(shape)
    )
