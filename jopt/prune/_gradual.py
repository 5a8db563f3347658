"""Prune gradually inside `sparse_training`, by scores that may be gathered from gradients."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jopt.prune._criterion import Criterion
from jopt.prune._masks import apply_masks, global_topk_masks
from jopt.prune._ranking import among_kept
from jopt.prune._scores import magnitude_scores
from jopt.prune._sparse_training import SparseChange, SparseRule, SparseStep
from jopt.prune._transforms import check_every, check_schedule


def cubic_schedule(final: float, begin: int, steps: int, initial: float = 0.0) -> optax.Schedule:
    """Return a sparsity that rises fast at first and slowly at the end.

    `s_t = final + (initial - final) (1 - (t - begin) / steps)^3`, `initial` before `begin` and
    `final` after `begin + steps`.

    Args:
      final: sparsity at the end, 0 to 1.
      begin: updates before the rise.
      steps: updates that the rise takes, at least 1.
      initial: sparsity at the start, 0 to 1.

    Returns:
      A schedule, from updates to sparsity.

    Raises:
      ValueError: a sparsity is outside [0, 1], `begin` is below 0, or `steps` below 1.

    Example:
      >>> [round(float(cubic_schedule(0.8, 2, 4)(count)), 4) for count in (0, 2, 4, 6, 9)]
      [0.0, 0.0, 0.7, 0.8, 0.8]

    References:
      Zhu, Gupta, "To Prune, or Not to Prune: Exploring the Efficacy of Pruning for Model
      Compression", 2017, https://arxiv.org/abs/1710.01878, equation 1.
    """
    for name, value in {"final": final, "initial": initial}.items():
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must lie in [0, 1], not {value!r}.")
    if begin < 0 or steps < 1:
        raise ValueError(f"begin must be at least 0 and steps 1, not {begin!r} and {steps!r}.")

    def schedule(count: ArrayLike) -> jax.Array:
        part = jnp.clip((jnp.asarray(count, jnp.float32) - begin) / steps, 0, 1)
        return final + (initial - final) * (1 - part) ** 3

    return schedule


def one_shot_schedule(final: float, step: int) -> optax.Schedule:
    """Return a sparsity that jumps from 0 to `final` at update `step`.

    Args:
      final: sparsity from `step` on, 0 to 1.
      step: updates before the jump, at least 0.

    Returns:
      A schedule, from updates to sparsity.

    Raises:
      ValueError: `final` is outside [0, 1], or `step` is below 0.

    Example:
      >>> [float(one_shot_schedule(0.5, 2)(count)) for count in (0, 1, 2, 3)]
      [0.0, 0.0, 0.5, 0.5]
    """
    if not 0.0 <= final <= 1.0 or step < 0:
        raise ValueError(f"final must lie in [0, 1] and step be 0 or more, not {final}, {step}.")
    return lambda count: jnp.where(jnp.asarray(count) >= step, jnp.float32(final), jnp.float32(0))


def _as_criterion(scores: Criterion | Callable[[Any], Any]) -> Criterion:
    if isinstance(scores, Criterion):
        return scores
    return Criterion(
        init=lambda params: (),
        update=lambda state, params, gradients: state,
        score=lambda state, params: scores(params),
    )


def gradual(
    schedule: optax.Schedule,
    every: int = 1,
    criterion: Criterion | Callable[[Any], Any] = magnitude_scores,
    select: Callable[[Any, Any], Any] = global_topk_masks,
) -> SparseRule:
    """Prune to a sparsity that follows a schedule; what is removed stays removed.

    At updates 0, `every`, 2 `every`, ... the step is taken, then the weights are scored as they
    are after it, and the masks taken anew at sparsity `schedule(count)`. A removed weight gets the
    score -infinity and a kept one at least the lowest finite number, so that the number of zeros
    is the one that `select` promises for any scores. A `select` that takes squares of scores must
    come with a plain function of the parameters.

    Args:
      schedule: sparsity after `count` updates, 0 to 1: `cubic_schedule`, `one_shot_schedule`,
        `optax.constant_schedule` or any other.
      every: updates between two prunings, at least 1.
      criterion: a `Criterion`, which is updated with the raw gradients of every step, or a
        function from parameters to scores; higher keeps.
      select: `(scores, sparsity)` to masks. To prune some leaves only:
        `functools.partial(jopt.prune.topk_masks, where="conv.*kernel")`.

    Returns:
      A rule for `sparse_training`.

    Raises:
      ValueError: `every` is below 1, or the schedule starts or settles outside [0, 1).

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jopt.prune import sparse_training
      >>> rule = gradual(one_shot_schedule(0.5, 0), criterion=lambda params: params)
      >>> tx = sparse_training(optax.sgd(1.0), rule)
      >>> params = {"w": jnp.array([[-5.0, 2.0]])}
      >>> updates, state = tx.update({"w": jnp.array([[1.0, 1.0]])}, tx.init(params), params)
      >>> optax.apply_updates(params, updates)
      {'w': Array([[0., 1.]], dtype=float32)}

    References:
      Zhu, Gupta, "To Prune, or Not to Prune: Exploring the Efficacy of Pruning for Model
      Compression", 2017, https://arxiv.org/abs/1710.01878.
    """
    check_every(every)
    check_schedule(schedule)
    gathered = _as_criterion(criterion)

    def init(params: Any) -> tuple[Any, Any]:
        state = gathered.init(params)
        # Masks of the final shapes from the start, so that the state keeps one structure.
        shapes = jax.eval_shape(lambda s, p: select(gathered.score(s, p), 0.0), state, params)
        return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, jnp.bool_), shapes), state

    def change(state: Any, step: SparseStep) -> tuple[SparseChange, Any]:
        candidate = apply_masks(optax.apply_updates(step.params, step.updates), step.masks)
        level = jnp.asarray(schedule(step.count), jnp.float32)
        chosen = select(among_kept(step.masks, gathered.score(state, candidate)), level)
        masks = jax.tree.map(jnp.logical_and, chosen, step.masks)
        none = jax.tree.map(jnp.zeros_like, masks)
        return SparseChange(masks, none, step.updates, step.inner), state

    return SparseRule(init, gathered.update, lambda count: count % every == 0, change)
