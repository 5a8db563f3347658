"""LAMP: magnitudes made comparable between layers."""

from typing import Any

import jax
import jax.numpy as jnp

from jopt.prune._scores import map_products


def lamp_scores(params: Any) -> Any:
    """Score every weight by its share of the squares of its leaf's weights that are not smaller.

    `s_u = w_u^2 / sum of w_v^2 over v from u on`, the weights of a leaf in order of rising
    magnitude. It is what `global_topk_masks` is given: the order within a leaf is that of
    magnitudes, the largest weight of each leaf has the score 1 (no layer is lost whole while
    another has a second weight), and there is nothing to choose. Of equal weights the one with the
    lower index (in C order) counts as the larger. Weights of a leaf that is all zeros score 0.

    One sort and one cumulative sum of each leaf. Weights are divided by the largest, so that
    squares stay in range down to 1e-19 of it (below, they are 0). In float32 the scores of 25
    million weights are right to about 1e-6, and never out of order.

    Args:
      params: any pytree of arrays.

    Returns:
      A tree of scores between 0 and 1 in float32 or wider; infinity for leaves that are not
      floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> lamp_scores({"kernel": jnp.array([[2.0, -4.0], [0.0, 1.0]])})["kernel"].round(3)
      Array([[0.2  , 1.   ],
             [0.   , 0.048]], dtype=float32)

    References:
      Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning", 2021,
      https://arxiv.org/abs/2010.07611, section 2.
    """
    return map_products(_lamp, params)


@jax.jit
def _lamp(weights: jax.Array) -> jax.Array:
    if not weights.size:
        return weights
    negative, order = jax.lax.sort_key_val(-jnp.abs(weights).reshape(-1), jnp.arange(weights.size))
    largest = -negative[0]
    squares = jnp.square(negative / jnp.where(largest > 0, largest, 1))
    # Rounding may let a sum fall; the running maximum keeps scores in order.
    sums = jax.lax.cummax(jnp.cumsum(squares))
    shares = squares / jnp.where(sums > 0, sums, 1)
    scores = jnp.zeros_like(shares).at[order].set(shares, unique_indices=True)
    return scores.reshape(weights.shape)
