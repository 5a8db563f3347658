"""Rank weights among candidates only, so that counts come out exact whatever the scores."""

from typing import Any

import jax
import jax.numpy as jnp

from jopt._trees import is_floating
from jopt.prune._threshold import keep_largest


def among(candidates: jax.Array, scores: jax.Array) -> jax.Array:
    """Put the scores of all others below those of the candidates.

    Others get -infinity; a candidate's score is at least the lowest finite number, NaN too.

    Args:
      candidates: boolean, broadcasts against `scores`.
      scores: floating-point.

    Returns:
      Scores of the same shape and dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> among(jnp.array([True, False]), jnp.array([1.0, 5.0]))
      Array([  1., -inf], dtype=float32)
    """
    lowest = jnp.asarray(jnp.finfo(scores.dtype).min, scores.dtype)
    return jnp.where(candidates, jnp.where(scores >= lowest, scores, lowest), -jnp.inf)


def among_kept(masks: Any, scores: Any) -> Any:
    """Put the scores of removed weights below those of all kept ones, over a tree.

    Example:
      >>> import jax.numpy as jnp
      >>> among_kept({"w": jnp.array([True, False])}, {"w": jnp.array([1.0, 5.0])})
      {'w': Array([  1., -inf], dtype=float32)}
    """
    return jax.tree.map(
        lambda mask, score: among(mask, score) if is_floating(score) else score, masks, scores
    )


def part_of(number: jax.Array, fraction: jax.Array | float) -> jax.Array:
    """Return the whole part of `number * fraction`, clipped to 0 .. number.

    Example:
      >>> import jax.numpy as jnp
      >>> int(part_of(jnp.array(7), 0.5))
      3
    """
    product = number.astype(jnp.float32) * jnp.asarray(fraction, jnp.float32)
    return jnp.clip(product.astype(number.dtype), 0, number)


def is_trainable_mask(leaf: Any, mask: Any) -> bool:
    """Return whether a mask tells the single weights of its leaf apart.

    Example:
      >>> import jax.numpy as jnp
      >>> is_trainable_mask(jnp.ones(2), jnp.ones(2, bool)), is_trainable_mask(1.0, True)
      (True, False)
    """
    return is_floating(leaf) and jnp.ndim(mask) > 0 and jnp.shape(mask) == jnp.shape(leaf)


def exchange(kept: jax.Array, scores: jax.Array, number: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Add the `number` weights of the highest scores among those that are not kept.

    Returns:
      The new mask, and what was added.

    Example:
      >>> import jax.numpy as jnp
      >>> exchange(jnp.array([True, False, False]), jnp.array([9.0, 1.0, 2.0]), jnp.array(1))
      (Array([ True, False,  True], dtype=bool), Array([False, False,  True], dtype=bool))
    """
    added = keep_largest(among(~kept, scores), number) & ~kept
    return kept | added, added
