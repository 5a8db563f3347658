"""Round how many units stay to what vector units and matrix units like."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jopt._arrays import on_host


def round_units(
    keep: Mapping[str, jax.Array], scores: Mapping[str, jax.Array], multiple: int
) -> dict[str, jax.Array]:
    """Round the number of units that each group keeps to the nearest multiple.

    Widths of 7, 15 and 47 channels take longer than 8, 16 and 48 where products run in vectors of
    eight: what is pruned below a multiple is lost for nothing. A group that would be rounded to
    nothing keeps one multiple, and no group keeps more than it has. Of what was removed the highest
    scores come back first, of what stayed the lowest go first.

    Args:
      keep: by group which units stay, `(units,)` booleans, as `topk_masks` makes them of
        `unit_scores`; a scalar stays as it is.
      scores: the scores of the same groups, higher keeps; more groups are ignored.
      multiple: 8 for a CPU's vectors, 128 for the lanes of a TPU.

    Returns:
      A choice of the same shapes, for `unit_masks`. Works under `jit`.

    Raises:
      ValueError: `multiple` is not a whole number from 1 up, or a group has no scores or scores of
        another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> scores = {"w[1]": jnp.array([5.0, 1.0, 4.0, 3.0, 2.0])}
      >>> keep = {"w[1]": jnp.array([True, False, True, True, False])}
      >>> round_units(keep, scores, 4)["w[1]"]
      Array([ True, False,  True,  True,  True], dtype=bool)
    """
    if isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1:
        raise ValueError(f"multiple must be a whole number, at least 1, not {multiple!r}.")
    for name, stays in keep.items():
        if name not in scores:
            raise ValueError(f"scores has no {name!r}, which keep has; it has {list(scores)}.")
        if jnp.shape(stays) not in ((), jnp.shape(scores[name])):
            raise ValueError(
                f"scores[{name!r}] must have shape {jnp.shape(stays)}, as keep has it, not "
                f"{jnp.shape(scores[name])}."
            )
    return {
        name: _rounded(stays, scores[name], multiple) if jnp.ndim(stays) else stays
        for name, stays in keep.items()
    }


def _rounded(stays: jax.Array, scores: jax.Array, multiple: int) -> jax.Array:
    if not (on_host(stays) and on_host(scores)):
        return _chosen(jnp, stays, scores, multiple)
    return jnp.asarray(_chosen(np, np.asarray(stays), np.asarray(scores), multiple))


def _chosen(numpy: Any, stays: Any, scores: Any, multiple: int) -> Any:
    size = stays.size
    wanted = (numpy.sum(stays) + multiple // 2) // multiple * multiple
    order = numpy.lexsort((-scores, ~stays))  # what stays first, then by score
    ranks = numpy.argsort(order)
    return ranks < numpy.clip(wanted, min(multiple, size), size)
