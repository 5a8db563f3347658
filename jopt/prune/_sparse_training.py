"""Train with masks that change on the way: the wrapper, which any rule plugs into."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jopt.prune._masks import masks_like
from jopt.prune._moments import clear_moments
from jopt.prune._transforms import need_params, project


class SparseStep(NamedTuple):
    """What a rule sees of one update.

    Attributes:
      count: updates before this one.
      params: the parameters before this update.
      gradients: raw and dense, as they came in: those of removed weights too.
      masks: before this update, True keeps.
      updates: what the inner transform makes of the gradients of the kept weights.
      inner: its state after that.
      inner_before: its state before that; a rule that returns it, and updates of zero, has the step
        not taken.
    """

    count: jax.Array
    params: Any
    gradients: Any
    masks: Any
    updates: Any
    inner: Any
    inner_before: Any


class SparseChange(NamedTuple):
    """What a rule makes of it.

    Attributes:
      masks: of the same structure and shapes as before, True keeps.
      grown: booleans like the masks: weights that start anew, whose moments are cleared.
      updates: to be added to the parameters; those of removed weights do not matter.
      inner: the state of the inner transform to go on with.
    """

    masks: Any
    grown: Any
    updates: Any
    inner: Any


class SparseRule(NamedTuple):
    """Say when and how masks change: four pure functions, with a state of the rule's own.

    Attributes:
      init: `params -> (masks, state)`.
      observe: `(state, params, gradients) -> state`, called at every update before the others.
      due: `count -> bool scalar`, whether the masks change at this update.
      change: `(state, SparseStep) -> (SparseChange, state)`, run only when due.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> def change(state, step):  # keep the positive ones
      ...     masks = jax.tree.map(lambda weight: weight > 0, step.params)
      ...     none = jax.tree.map(jnp.zeros_like, masks)
      ...     return SparseChange(masks, none, step.updates, step.inner), state
      >>> rule = SparseRule(
      ...     init=lambda params: (jax.tree.map(lambda w: jnp.ones(w.shape, bool), params), ()),
      ...     observe=lambda state, params, gradients: state,
      ...     due=lambda count: count == 0,
      ...     change=change,
      ... )
      >>> params = {"w": jnp.array([2.0, -1.0])}
      >>> tx = sparse_training(optax.sgd(0.5), rule)
      >>> updates, _ = tx.update({"w": jnp.ones(2)}, tx.init(params), params)
      >>> optax.apply_updates(params, updates)
      {'w': Array([1.5, 0. ], dtype=float32)}
    """

    init: Callable[[Any], tuple[Any, Any]]
    observe: Callable[[Any, Any, Any], Any]
    due: Callable[[jax.Array], Any]
    change: Callable[[Any, SparseStep], tuple[SparseChange, Any]]


class SparseTrainingState(NamedTuple):
    """State of `sparse_training`.

    Attributes:
      count: updates so far.
      masks: True keeps.
      inner: state of the inner transform.
      rule: state of the rule.
    """

    count: jax.Array
    masks: Any
    inner: Any
    rule: Any


def _masked_gradients(gradients: Any, masks: Any) -> Any:
    return jax.tree.map(
        lambda gradient, mask: jnp.where(mask, gradient, jnp.zeros((), gradient.dtype)),
        gradients,
        masks,
    )


def sparse_training(
    inner: optax.GradientTransformation, rule: SparseRule
) -> optax.GradientTransformation:
    """Wrap an optimizer so that it trains with masks which a rule changes on the way.

    Removed weights are exactly zero after every update, as with `keep_masked`, and nothing may come
    after it in a chain. The inner transform sees the gradients of the kept weights only (so does a
    clip by global norm), the rule sees all of them. Where the rule removes weights or grows them
    anew, their moments are cleared. Masks, counts and the rule's state are arrays in the state: one
    trace serves the whole training, and a checkpoint holds everything. When no change is due, the
    rule costs what its `observe` costs.

    Let the first gradients be those at masked parameters:
    `params = apply_masks(params, current_masks(tx.init(params)))`.

    Args:
      inner: the whole optimizer: weight decay, clipping and learning rate included.
      rule: when and how the masks change: `gradual`, `set_rule`, `rigl`, or your own.

    Returns:
      An optax transform whose state is a `SparseTrainingState`; `current_masks` finds the masks.

    Raises:
      ValueError: the rule's masks do not fit the parameters (at `init`), or `update` is called
        without parameters.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jopt.prune import gradual
      >>> params = {"w": jnp.array([[1.0, 0.2]])}
      >>> tx = sparse_training(optax.sgd(0.1), gradual(optax.constant_schedule(0.5)))
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"w": jnp.array([[1.0, 1.0]])}, state, params)
      >>> optax.apply_updates(params, updates)
      {'w': Array([[0.9, 0. ]], dtype=float32)}
    """

    def init(params: Any) -> SparseTrainingState:
        masks, state = rule.init(params)
        masks = masks_like(params, masks)
        return SparseTrainingState(jnp.zeros((), jnp.int32), masks, inner.init(params), state)

    @jax.jit  # eager, every step would compile the branches of `cond` again
    def update(updates: Any, state: Any, params: Any = None) -> Any:
        need_params(params, "sparse_training")
        observed = rule.observe(state.rule, params, updates)
        kept = _masked_gradients(updates, state.masks)
        stepped, inner_state = inner.update(kept, state.inner, params)
        step = SparseStep(
            state.count, params, updates, state.masks, stepped, inner_state, state.inner
        )

        def change() -> Any:
            made, rule_state = rule.change(observed, step)
            settled = jax.tree.map(lambda mask, grown: mask & ~grown, made.masks, made.grown)
            cleared = clear_moments(made.inner, params, settled)
            return made.updates, made.masks, cleared, rule_state

        def leave() -> Any:
            return stepped, state.masks, inner_state, observed

        changed = jax.lax.cond(rule.due(state.count), change, leave)
        updates, masks, inner_state, rule_state = changed
        count = jnp.asarray(optax.safe_increment(state.count))
        new = SparseTrainingState(count, masks, inner_state, rule_state)
        return project(updates, params, masks), new

    return optax.GradientTransformation(init, update)


def regularly(every: int, end: int | None = None) -> Callable[[jax.Array], jax.Array]:
    """Return what says whether a rule is due: at updates `every`, 2 `every`, ... before `end`.

    Example:
      >>> [count for count in range(9) if regularly(2, 7)(count)]
      [2, 4, 6]
    """

    def due(count: jax.Array) -> jax.Array:
        regular = (count > 0) & (count % every == 0)
        return regular if end is None else regular & (count < end)

    return due
