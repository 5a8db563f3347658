"""Criteria that gather what they need while a network trains."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Criterion(NamedTuple):
    """Score weights by what was seen of their gradients: three pure functions.

    Attributes:
      init: `params -> state`.
      update: `(state, params, gradients) -> state`, called with every step's raw gradients and with
        the parameters that they were taken at.
      score: `(state, params) -> scores`, a tree like params, higher keeps.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> saliency = Criterion(
      ...     init=lambda params: jax.tree.map(jnp.zeros_like, params),
      ...     update=lambda state, params, gradients: gradients,
      ...     score=lambda state, params: jax.tree.map(lambda w, g: jnp.abs(w * g), params, state),
      ... )
      >>> params = {"w": jnp.array([2.0, 1.0])}
      >>> state = saliency.update(saliency.init(params), params, {"w": jnp.array([-1.0, 3.0])})
      >>> saliency.score(state, params)["w"]
      Array([2., 3.], dtype=float32)
    """

    init: Callable[[Any], Any]
    update: Callable[[Any, Any, Any], Any]
    score: Callable[[Any, Any], Any]
