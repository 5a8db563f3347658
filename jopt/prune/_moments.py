"""Forget what an optimizer gathered for weights that are removed."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jopt._leaves import is_compressed
from jopt._trees import is_floating
from jopt.prune._masks import apply_masks
from jopt.prune._matching import Path, entries, map_matching


def _cleared(path: Path, leaf: Any, param: Any, mask: Any) -> Any:
    if not hasattr(leaf, "dtype") or is_compressed(leaf) or jnp.shape(leaf) != jnp.shape(param):
        return leaf
    # Booleans are masks themselves; a lone scalar may be a learning rate as well as a moment.
    if not jnp.issubdtype(leaf.dtype, jnp.number) or (not path and not jnp.ndim(leaf)):
        return leaf
    return jnp.where(mask, leaf, jnp.zeros((), leaf.dtype))


def _keeps_removed(node: Any) -> bool:
    return isinstance(node, tuple) and getattr(node, "keeps_removed_weights", False)


def clear_moments(state: Any, params: Any, masks: Any) -> Any:
    """Set to zero what an optimizer's state holds for removed weights.

    A part of the state that is a tree like `params` is masked, whatever transform it belongs to:
    moments, traces, averages, accumulated gradients; and so is a vector of all parameters, as
    `optax.flatten` keeps them. In such a part the leaves of another shape
    (Adafactor's factored moments), and booleans, stay as they are; so does everything else, such as
    counts. Zero is what nearly all transforms start from; but counts go on, so that Adam's first
    step for a weight that grows again has no bias correction of its own: it is
    `(1 - b1) / sqrt(1 - b2)`, by default 3.2, times the learning rate.

    Args:
      state: the state of any optax transform: chains, `masked`, `multi_transform`, `MultiSteps`,
        `inject_hyperparams`, the state of an `nnx.Optimizer`.
      params: the parameters that it was made for; only their structure and shapes matter.
      masks: a tree of booleans like `params`, False for what is to be forgotten; each broadcasts
        against its parameter.

    Returns:
      The state with the same structure, shapes and dtypes.

    Raises:
      ValueError: the masks do not fit the parameters.
      TypeError: a mask is not boolean.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> tx = optax.sgd(0.1, momentum=0.9)
      >>> _, state = tx.update({"w": jnp.array([3.0, 4.0])}, tx.init(params))
      >>> clear_moments(state, params, {"w": jnp.array([True, False])})[0].trace
      {'w': Array([3., 0.], dtype=float32)}
    """
    jax.eval_shape(apply_masks, params, masks)
    pairs = zip(entries(params)[0], jax.tree.leaves(masks), strict=True)
    fits = {path: (param, mask) for (path, param), mask in pairs}
    if len(fits) > 1:
        state = _cleared_vectors(state, list(fits.values()))
    return map_matching(
        lambda path, leaf: _cleared(path, leaf, *fits[path]), state, params, _keeps_removed
    )


def _cleared_vectors(state: Any, fits: list[tuple[Any, Any]]) -> Any:
    """Mask the vectors that have an element for each of all parameters, in their order."""
    total = sum(math.prod(jnp.shape(param)) for param, _ in fits)

    def cleared(leaf: Any) -> Any:
        if _keeps_removed(leaf) or jnp.shape(leaf) != (total,) or not is_floating(leaf):
            return leaf
        masks = [jnp.broadcast_to(mask, jnp.shape(param)).ravel() for param, mask in fits]
        return jnp.where(jnp.concatenate(masks), leaf, jnp.zeros((), leaf.dtype))

    def is_whole(node: Any) -> bool:
        return _keeps_removed(node) or is_compressed(node)

    return jax.tree.map(cleared, state, is_leaf=is_whole)
