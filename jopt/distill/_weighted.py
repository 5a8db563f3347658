"""Several losses as one, with weights that may change as training goes on."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from jopt.distill._checks import Scalar

Weight = Scalar | optax.Schedule


def weighted_sum(
    losses: Mapping[str, jax.Array],
    weights: Mapping[str, Weight],
    step: int | jax.Array | None = None,
) -> jax.Array:
    """Add losses by their weights, each a number or an `optax.Schedule` of the step.

    Stages are schedules that are zero for a while: features first, then logits. A temperature is
    scheduled by giving the loss `schedule(step)`.

    Args:
      losses: floats of one shape by name, one for each example.
      weights: by the same names; a schedule is called with `step`.
      step: updates so far, needed where a weight is a schedule.

    Returns:
      Floats of the losses' shape.

    Raises:
      ValueError: the names differ, there is none, the shapes differ, or a schedule has no step.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> losses = {"hint": jnp.array([1.0]), "kd": jnp.array([10.0])}
      >>> first_hints = optax.piecewise_constant_schedule(1.0, {100: 0.0})
      >>> weights = {"hint": first_hints, "kd": lambda step: 1 - first_hints(step)}
      >>> [float(weighted_sum(losses, weights, step)[0]) for step in (0, 200)]
      [1.0, 10.0]
    """
    if not losses or set(losses) != set(weights):
        raise ValueError(
            f"losses and weights must have the same names, at least one, not {sorted(losses)} and "
            f"{sorted(weights)}."
        )
    shapes = {name: jnp.shape(loss) for name, loss in losses.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"losses must have one shape, one loss for each example, not {shapes}.")
    parts = []
    for name, loss in losses.items():
        weight = weights[name]
        if callable(weight):
            if step is None:
                raise ValueError(f"step must be given: the weight of {name!r} is a schedule.")
            weight = weight(jnp.asarray(step))
        parts.append(loss * weight)
    return sum(parts[1:], parts[0])
