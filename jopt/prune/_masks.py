"""Masks: which weights stay. True keeps; each mask broadcasts against its parameter."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jopt._arrays import known_values, materialize
from jopt._leaves import FloatTensor, QTensor, ScaledTensor, is_compressed
from jopt._trees import Filter, broadcasts_to, flatten_with_paths, is_floating, is_kernel, select
from jopt.prune._threshold import keep_largest_global, keep_largest_of_leaf

Sparsity = float | jax.Array
_ARRAYS = (np.ndarray, jax.Array)


def pruned_count(size: int, sparsity: Sparsity, min_kept: int = 1) -> Any:
    """Return `round(size * sparsity)`, exact for a traced float32 as well.

    A float32 product of 25 million and 0.9 is off by an element or two, so a traced sparsity is
    taken as a whole number of 2^-24 and multiplied in integers, in parts of 12 bits.

    Args:
      size: number of weights.
      sparsity: fraction to prune, 0 to 1.
      min_kept: how many must stay, or all where there are fewer: more pruned is an error where the
        sparsity is known, and not done where it is traced.

    Raises:
      ValueError: a known sparsity is outside [0, 1] or keeps too few, or it is no scalar.
      TypeError: it is no number.
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float, np.generic, *_ARRAYS)):
        raise TypeError(f"sparsity must be a number in [0, 1], not {sparsity!r}.")
    if jnp.shape(sparsity) != ():
        raise ValueError(f"sparsity must be a scalar, not of shape {jnp.shape(sparsity)}.")
    most = size - min(min_kept, size)
    known = known_values(sparsity)
    if known is not None:
        if not 0.0 <= known <= 1.0:
            raise ValueError(f"sparsity must lie in [0, 1], not {sparsity}.")
        count = round(size * float(known))
        if count > most:
            raise ValueError(
                f"sparsity {sparsity} keeps {size - count} of {size}, fewer than {min_kept}."
            )
        if not isinstance(sparsity, jax.Array):
            return count
    sparsity = jnp.asarray(sparsity)  # a traced one can only be clipped
    fraction = jnp.round(jnp.clip(sparsity.astype(jnp.float32), 0, 1) * 2**24).astype(jnp.uint32)
    size_high, size_low = divmod(size, 4096)
    high, low = fraction >> 12, fraction & 4095
    middle = size_high * low + size_low * high + (size_low * low >> 12)
    count = (size_high * high + ((middle + 2048) >> 12)).astype(jnp.int32)
    return jnp.minimum(count, most)


def scored(scores: Any, where: Filter) -> tuple[list[str], list[Any], list[bool], Any]:
    """Return paths and leaves of a tree of scores, which are chosen, and the tree's structure.

    Raises:
      ValueError: the filter matches nothing.
      TypeError: a chosen score is not a floating-point array.
    """
    paths, leaves, treedef = flatten_with_paths(scores)
    chosen = jax.tree.leaves(select(scores, where))
    for path, leaf, take in zip(paths, leaves, chosen, strict=True):
        if take and not is_floating(leaf):
            raise TypeError(f"{path}: scores must be floating-point arrays, not {leaf!r}.")
    return paths, leaves, chosen, treedef


def _masks_from(kept: list[jax.Array], chosen: list[bool], treedef: Any) -> Any:
    remaining = iter(kept)
    return jax.tree.unflatten(
        treedef, [next(remaining) if take else jnp.array(True) for take in chosen]
    )


def _sparsity_of_each(sparsity: Any, paths: list[str], chosen: list[bool]) -> list[Sparsity]:
    """Look up the sparsity of every chosen leaf in a tree or a dict of paths, or repeat one."""
    taken = [path for path, take in zip(paths, chosen, strict=True) if take]
    if isinstance(sparsity, str):
        raise TypeError(f"sparsity must be a number, or numbers by path, not {sparsity!r}.")
    if isinstance(sparsity, (int, float)) or hasattr(sparsity, "dtype"):
        return [sparsity] * len(taken)
    # A key "conv/kernel" of a dict and the nested keys of a tree are the same path.
    found, values, _ = flatten_with_paths(sparsity)
    for path in found:
        if path not in paths:
            raise ValueError(f"sparsity has {path!r}, which is no leaf; the paths are {paths}.")
    by_path = dict(zip(found, values, strict=True))
    missing = [path for path in taken if path not in by_path]
    if missing:
        raise ValueError(f"sparsity has no entry for {missing}; add them or choose by where.")
    return [by_path[path] for path in taken]


def check_min_kept(min_kept: int) -> None:
    if isinstance(min_kept, bool) or not isinstance(min_kept, int) or min_kept < 0:
        raise ValueError(f"min_kept must be a whole number, at least 0, not {min_kept!r}.")


def kept_count(path: str, size: int, sparsity: Sparsity, min_kept: int = 1) -> jax.Array:
    """Return how many entries of a leaf stay; errors of `pruned_count` name the leaf."""
    try:
        return jnp.asarray(size - pruned_count(size, sparsity, min_kept))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from None


def topk_masks(
    scores: Any,
    sparsity: Sparsity | Mapping[str, Any] | Any,
    where: Filter = is_kernel,
    min_kept: int = 1,
) -> Any:
    """Keep the highest scores of every chosen leaf: the same sparsity in each layer, or its own.

    Exactly `round(size * sparsity)` elements of a leaf are pruned. Of equal scores the one with
    the lower index (in C order) is kept.

    Args:
      scores: a tree of scores, higher keeps.
      sparsity: fraction to prune, 0 to 1; a number, or a traced scalar (then clipped). Or one
        for each leaf: a dict from paths, as the budgets make it, or a tree; entries of leaves that
        are not chosen are ignored.
      where: which leaves to prune, a regex on the path or a predicate; by default
        those that `is_kernel` takes.
      min_kept: how many elements every leaf must keep: fewer are an error, or, where the sparsity
        is traced, not pruned. With 0 a layer may be lost.

    Returns:
      A tree of booleans: full-shape masks for the chosen leaves, a scalar True for the others.

    Raises:
      ValueError: `sparsity` is outside [0, 1], has no entry for a chosen leaf or one that is no
        leaf, or leaves fewer than `min_kept`; or the filter matches nothing.
      TypeError: a chosen score is not a floating-point array.

    Example:
      >>> import jax.numpy as jnp
      >>> scores = {"kernel": jnp.array([[3.0, 1.0], [2.0, 2.0]]), "bias": jnp.ones(2)}
      >>> topk_masks(scores, 0.5)["kernel"]
      Array([[ True, False],
             [ True, False]], dtype=bool)
      >>> topk_masks(scores, {"kernel": 0.75})["kernel"].sum()
      Array(1, dtype=int32)
    """
    check_min_kept(min_kept)
    paths, leaves, chosen, treedef = scored(scores, where)
    each = iter(_sparsity_of_each(sparsity, paths, chosen))
    kept = [
        keep_largest_of_leaf(leaf, kept_count(path, leaf.size, next(each), min_kept))
        for path, leaf, take in zip(paths, leaves, chosen, strict=True)
        if take
    ]
    return _masks_from(kept, chosen, treedef)


def global_topk_masks(
    scores: Any, sparsity: Sparsity, where: Filter = is_kernel, min_kept: int = 0
) -> Any:
    """Keep the highest scores over all chosen leaves together: layers compete.

    Exactly `round(total * sparsity)` elements are pruned. Of equal scores the one in the earlier
    leaf, then with the lower index, is kept. A layer may lose more than others, even everything
    unless `min_kept` forbids it; all layers together keep one element at least.

    Args:
      scores: a tree of scores, higher keeps, comparable between leaves.
      sparsity: fraction to prune, 0 to 1; a number, or a traced scalar (then clipped).
      where: which leaves to prune, a regex on the path or a predicate; by default
        those that `is_kernel` takes.
      min_kept: how many elements every leaf keeps, its highest, before leaves compete for the
        rest. 1 makes sure that no layer is lost.

    Returns:
      A tree of booleans: full-shape masks for the chosen leaves, a scalar True for the others.

    Raises:
      ValueError: `sparsity` is outside [0, 1], leaves nothing, or fewer elements than `min_kept`
        for each leaf; or the filter matches nothing. With a traced sparsity those are kept all the
        same.
      TypeError: a chosen score is not a floating-point array.

    Example:
      >>> import jax.numpy as jnp
      >>> scores = {"a": jnp.array([[4.0, 3.0]]), "b": jnp.array([[1.0, 2.0]])}
      >>> global_topk_masks(scores, 0.5)
      {'a': Array([[ True,  True]], dtype=bool), 'b': Array([[False, False]], dtype=bool)}
      >>> global_topk_masks(scores, 0.5, min_kept=1)
      {'a': Array([[ True, False]], dtype=bool), 'b': Array([[False,  True]], dtype=bool)}
    """
    check_min_kept(min_kept)
    _, leaves, chosen, treedef = scored(scores, where)
    taken = [leaf for leaf, take in zip(leaves, chosen, strict=True) if take]
    total = sum(leaf.size for leaf in taken)
    sure = sum(min(min_kept, leaf.size) for leaf in taken)
    try:
        keep = jnp.asarray(total - pruned_count(total, sparsity, max(sure, 1)))
    except ValueError as error:
        each = f", min_kept = {min_kept} for each of {len(taken)} leaves" if min_kept else ""
        raise ValueError(f"{str(error)[:-1]}{each}.") from None
    if not min_kept:
        return _masks_from(keep_largest_global(taken, keep), chosen, treedef)
    safe = [keep_largest_of_leaf(leaf, min_kept) for leaf in taken]
    # NaN comes last, so that what is safe does not compete again.
    rest = [jnp.where(mask, jnp.nan, leaf) for mask, leaf in zip(safe, taken, strict=True)]
    won = keep_largest_global(rest, keep - sure)
    return _masks_from(
        [jnp.logical_or(*pair) for pair in zip(safe, won, strict=True)], chosen, treedef
    )


def _masked(path: str, leaf: Any, mask: Any) -> Any:
    if jnp.result_type(mask) != jnp.bool_:
        raise TypeError(f"{path}: a mask must be boolean, not {jnp.result_type(mask)}.")
    shape = jnp.shape(mask)
    if not broadcasts_to(shape, leaf.shape):
        raise ValueError(f"{path}: mask of shape {shape} does not broadcast to {leaf.shape}.")
    return _masked_leaf(path, leaf, mask)


def _masked_leaf(path: str, leaf: Any, mask: jax.Array) -> Any:
    if isinstance(leaf, ScaledTensor):  # a factor leaves zeros where they are
        return ScaledTensor(_masked_leaf(path, leaf.tensor, mask), leaf.factor)
    if isinstance(leaf, QTensor) and leaf.zero_point is not None:
        raise TypeError(f"{path}: mask before quantizing; affine codes may not hold zero.")
    if isinstance(leaf, (QTensor, FloatTensor)):
        zero = jnp.zeros((), leaf.codes.dtype)
        return dataclasses.replace(leaf, codes=jnp.where(mask, leaf.codes, zero))
    if is_compressed(leaf):
        raise TypeError(
            f"{path}: mask before compressing; the codes of a {type(leaf).__name__} may not hold "
            "zero."
        )
    return jnp.where(mask, leaf, jnp.zeros((), leaf.dtype))


def apply_masks(params: Any, masks: Any) -> Any:
    """Set pruned weights to zero, `W * M`; a pruned NaN or infinity becomes zero too.

    The original `params` stay as they are: to un-prune is to use them again.

    Args:
      params: any pytree of arrays. Quantized leaves whose codes have a zero, symmetric ones and
        narrow floats, with or without factors, are masked in their codes.
      masks: a tree of booleans of the same structure; each broadcasts against its parameter.

    Returns:
      The pruned parameters.

    Raises:
      ValueError: the trees differ, or a mask does not broadcast to its parameter.
      TypeError: a mask is not boolean, or its leaf is compressed to codes that may have no zero:
        affine ones, indices into a codebook, single bits, and those of a rotated kernel.

    Example:
      >>> import jax.numpy as jnp
      >>> apply_masks({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([True, False])})
      {'w': Array([1., 0.], dtype=float32)}
    """
    paths, leaves, treedef = flatten_with_paths(params)
    mask_paths, mask_leaves, _ = flatten_with_paths(masks)
    if paths != mask_paths:
        only = sorted(set(paths) ^ set(mask_paths)) or [f"{paths} and {mask_paths}"]
        raise ValueError(f"masks and params are different trees; they differ at {only[:5]}.")
    return jax.tree.unflatten(
        treedef,
        [_masked(*each) for each in zip(paths, leaves, mask_leaves, strict=True)],
    )


def masks_like(params: Any, masks: Any) -> Any:
    """Return masks that fit the parameters as arrays in the parameters' own containers.

    Masks that were saved, or made by path, may be plain dicts where the parameters are a State.

    Raises:
      ValueError: the trees differ, or a mask does not broadcast to its parameter.
      TypeError: a mask is not boolean.

    Example:
      >>> import jax.numpy as jnp
      >>> masks_like({"w": jnp.ones(2)}, {"w": True})
      {'w': Array(True, dtype=bool)}
    """
    jax.eval_shape(apply_masks, params, masks)
    treedef = flatten_with_paths(params)[2]
    return jax.tree.unflatten(treedef, [jnp.asarray(each) for each in jax.tree.leaves(masks)])


def _is_weight(path: str, leaf: Any) -> bool:
    return is_compressed(leaf) or is_kernel(path, leaf)


def sparsity(params: Any, where: Filter = _is_weight) -> jax.Array:
    """Measure the fraction of weights that are exactly zero.

    Args:
      params: any pytree of arrays and compressed leaves.
      where: which leaves count; by default compressed ones and those that `is_kernel` takes.

    Returns:
      A float32 scalar in [0, 1].

    Raises:
      ValueError: the filter matches nothing.

    Example:
      >>> import jax.numpy as jnp
      >>> float(sparsity({"kernel": jnp.array([[0.0, 1.0], [0.0, 0.0]]), "bias": jnp.zeros(2)}))
      0.75
    """
    chosen = jax.tree.leaves(select(params, where))
    leaves = flatten_with_paths(params)[1]
    weights = [materialize(leaf) for leaf, take in zip(leaves, chosen, strict=True) if take]
    zeros = jnp.stack([jnp.sum(weight == 0) for weight in weights]).sum()
    return zeros / sum(weight.size for weight in weights)
