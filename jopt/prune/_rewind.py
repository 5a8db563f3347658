"""Prune, go back, train again: lottery tickets, rewound weights, rewound learning rates."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jopt._arrays import known_values
from jopt.prune._masks import apply_masks, global_topk_masks
from jopt.prune._ranking import among_kept
from jopt.prune._scores import magnitude_scores
from jopt.prune._transforms import need_params


class RememberState(NamedTuple):
    """State of `remember`.

    Attributes:
      count: updates so far.
      step: updates before the copy is taken.
      snapshot: the parameters as they were before update `step`; until then, those at `init`.
    """

    count: jax.Array
    step: jax.Array
    snapshot: Any

    @property
    def keeps_removed_weights(self) -> bool:
        """Return True: `clear_moments` leaves the snapshot whole."""
        return True


class PruningRound(NamedTuple):
    """What a round of `iterative_pruning` gives.

    Attributes:
      sparsity: that it pruned to; 0.0 for the dense training at first.
      masks: True keeps.
      params: trained, with zeros where the masks are False.
    """

    sparsity: float
    masks: Any
    params: Any


def remember(step: int) -> optax.GradientTransformation:
    """Keep a copy of the parameters as they are after `step` updates.

    Updates pass through unchanged. The copy lies in the optimizer's state, so that a scan carries
    it and a checkpoint saves it. It holds every weight: pruning does not touch it.

    Args:
      step: updates before the copy is taken, 0 or more; 0 is the initialization.

    Returns:
      An optax transform, at any place of a chain; `rewound` returns the copy.

    Raises:
      ValueError: `step` is negative, or `update` is called without parameters.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = optax.chain(remember(1), optax.sgd(1.0))
      >>> params = {"w": jnp.array([5.0])}
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     updates, state = tx.update({"w": jnp.array([1.0])}, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> rewound(state)
      {'w': Array([4.], dtype=float32)}

    References:
      Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis", 2020,
      https://arxiv.org/abs/1912.05671.
    """
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"step must be a whole number of updates, 0 or more, not {step!r}.")

    def init(params: Any) -> RememberState:
        # Copies, so that a donated buffer of the parameters is not donated twice.
        counts = jnp.zeros((), jnp.int32), jnp.asarray(step, jnp.int32)
        return RememberState(*counts, jax.tree.map(jnp.array, params))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        need_params(params, "remember")
        due = state.count == state.step
        snapshot = jax.lax.cond(due, lambda: params, lambda: state.snapshot)
        count = jnp.asarray(optax.safe_increment(state.count))
        return updates, RememberState(count, state.step, snapshot)

    return optax.GradientTransformation(init, update)


def rewound(state: Any) -> Any:
    """Return the parameters that `remember` keeps in an optimizer's state.

    Args:
      state: the state of a transform that contains `remember`.

    Returns:
      The parameters.

    Raises:
      ValueError: the state has no copy, or more than one, or it was not taken yet: the update after
        the first `step` takes it.

    Example:
      >>> import jax.numpy as jnp
      >>> rewound((remember(0).init({"w": jnp.array([2.0])}),))
      {'w': Array([2.], dtype=float32)}
    """
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, RememberState))
    found = [node for node in nodes if isinstance(node, RememberState)]
    if len(found) != 1:
        raise ValueError(f"state must hold the copy of one `remember`, not of {len(found)}.")
    count, step = known_values(found[0].count), known_values(found[0].step)
    if count is not None and step is not None and 0 < step and np.any(count <= step):
        raise ValueError(
            f"state holds no copy yet: remember({step}) takes it at the update after {step}, but "
            f"there were {count}."
        )
    return found[0].snapshot


def iterative_sparsities(final: float, rounds: int) -> list[float]:
    """Return sparsities that remove the same part of what is left in each round.

    `s_i = 1 - (1 - final)^(i / rounds)`, i = 1 .. rounds.

    Args:
      final: sparsity of the last round, at least 0 and below 1.
      rounds: at least 1.

    Returns:
      Sparsities, rising; the last is exactly `final`.

    Raises:
      ValueError: `final` or `rounds` is out of its range.

    Example:
      >>> [round(sparsity, 3) for sparsity in iterative_sparsities(0.488, 3)]
      [0.2, 0.36, 0.488]

    References:
      Frankle, Carbin, "The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks",
      2019, https://arxiv.org/abs/1803.03635, section 1.
    """
    if not 0.0 <= final < 1.0:
        raise ValueError(f"final must lie in [0, 1), not {final!r}.")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, not {rounds!r}.")
    inner = [1 - (1 - final) ** (index / rounds) for index in range(1, rounds)]
    return [*inner, final]


def rewind_weights(early: Any, trained: Any) -> Any:
    """Go back to the early weights: lottery tickets and weight rewinding.

    Example:
      >>> rewind_weights({"w": 1.0}, {"w": 2.0})
      {'w': 1.0}

    References:
      Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis", 2020,
      https://arxiv.org/abs/1912.05671.
    """
    del trained
    return early


def keep_weights(early: Any, trained: Any) -> Any:
    """Go on from the trained weights: learning-rate rewinding and fine-tuning.

    Example:
      >>> keep_weights({"w": 1.0}, {"w": 2.0})
      {'w': 2.0}

    References:
      Renda et al., "Comparing Rewinding and Fine-tuning in Neural Network Pruning", 2020,
      https://arxiv.org/abs/2003.02389.
    """
    del early
    return trained


def iterative_pruning(
    train: Callable[[Any, Any, int], Any],
    early: Any,
    start_step: int,
    sparsities: Sequence[float],
    rewind: Callable[[Any, Any], Any] = rewind_weights,
    score: Callable[[Any], Any] = magnitude_scores,
    select: Callable[[Any, Any], Any] = global_topk_masks,
) -> Iterator[PruningRound]:
    """Train, prune, rewind and train again, round by round.

    The dense network is trained first. Each round then scores the trained weights, removes more of
    those that are left, and trains what `rewind(early, trained)` gives, masked. With
    `rewind_weights` and `start_step` 0 that finds lottery tickets; with a small `start_step`,
    weights are rewound to it; with `keep_weights` only the learning rate is. For fine-tuning use
    `keep_weights`, and a `train` that ignores `start_step` and holds a small learning rate.

    Args:
      train: `(params, masks, start_step)` to trained parameters: trains from update `start_step` of
        the schedule to its end, keeping masked weights at zero, for example by `keep_masked`.
      early: the parameters after `start_step` updates; see `remember`.
      start_step: 0 or more.
      sparsities: one for each round, such as `iterative_sparsities(0.95, 10)`.
      rewind: `(early, trained)` to the parameters that a round starts from.
      score: parameters to scores, higher keeps. Removed weights never come back.
      select: `(scores, sparsity)` to masks.

    Returns:
      An iterator of `PruningRound`, the dense one first. It works as it is read: stop reading, and
      no further round is trained.

    Raises:
      ValueError: the sparsities fall or are outside [0, 1), or `start_step` is negative: at once,
        before anything is trained.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> def train(params, masks, start_step):  # adds 1 to what is kept
      ...     return apply_masks(jax.tree.map(lambda weight: weight + 1, params), masks)
      >>> rounds = iterative_pruning(train, {"w": jnp.array([[1.0, 3.0]])}, 0, [0.5])
      >>> [each.params["w"].tolist() for each in rounds]
      [[[2.0, 4.0]], [[0.0, 4.0]]]

    References:
      Frankle, Carbin, "The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks",
      2019, https://arxiv.org/abs/1803.03635. Renda et al., "Comparing Rewinding and Fine-tuning in
      Neural Network Pruning", 2020, https://arxiv.org/abs/2003.02389, algorithms 1 to 3.
    """
    if start_step < 0:
        raise ValueError(f"start_step must be 0 or more, not {start_step!r}.")
    if not all(0.0 <= sparsity < 1.0 for sparsity in sparsities):
        raise ValueError(f"sparsities must lie in [0, 1), but they are {list(sparsities)}.")
    if any(later < sooner for sooner, later in zip(sparsities, sparsities[1:], strict=False)):
        raise ValueError(f"sparsities must not fall, but they are {list(sparsities)}.")
    return _rounds(train, early, start_step, sparsities, rewind, score, select)


def _rounds(
    train: Callable[[Any, Any, int], Any],
    early: Any,
    start_step: int,
    sparsities: Sequence[float],
    rewind: Callable[[Any, Any], Any],
    score: Callable[[Any], Any],
    select: Callable[[Any, Any], Any],
) -> Iterator[PruningRound]:
    masks = jax.tree.map(jnp.ones_like, select(score(early), 0.0))
    trained = train(early, masks, start_step)
    yield PruningRound(0.0, masks, trained)
    for sparsity in sparsities:
        chosen = select(among_kept(masks, score(apply_masks(trained, masks))), sparsity)
        masks = jax.tree.map(jnp.logical_and, chosen, masks)
        trained = train(apply_masks(rewind(early, trained), masks), masks, start_step)
        yield PruningRound(float(sparsity), masks, trained)
