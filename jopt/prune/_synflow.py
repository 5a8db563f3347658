"""Synaptic flow: scores and masks before training, without data."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jopt._trees import is_floating
from jopt.prune._masks import apply_masks, global_topk_masks
from jopt.prune._scores import map_floating, map_products, split_floating

Apply = Callable[..., Any]


def _flow_scores(apply: Apply, params: Any, inputs: tuple[Any, ...]) -> Any:
    """Return `|w dR/dw|` with R the sum of the outputs for absolute weights; inputs are given."""
    leaves, rebuild = split_floating(params)

    def flow(leaves: list[jax.Array]) -> jax.Array:
        outputs = jax.tree.leaves(apply(rebuild(leaves), *inputs))
        return jnp.stack(
            [jnp.sum(each).astype(jnp.float32) for each in outputs if is_floating(each)]
        ).sum()

    magnitudes = [jnp.abs(leaf) for leaf in leaves]
    gradients = jax.grad(flow)(magnitudes)
    return map_products(lambda w, g: jnp.abs(w * g), params, rebuild(gradients))


def _all_finite(scores: Any) -> jax.Array:
    return jnp.stack([jnp.all(jnp.isfinite(each)) for each in split_floating(scores)[0]]).all()


def _ones(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return jax.tree.map(lambda each: jnp.ones(each.shape, each.dtype), inputs)


def _refuse_overflow(finite: jax.Array) -> None:
    try:
        overflow = not finite
    except jax.errors.ConcretizationTypeError:  # under jit the values are not known
        return
    if overflow:
        raise ValueError(
            "apply must give finite synaptic flow, but the product of the layers' absolute weights "
            "leaves the range of the parameters' dtype; take float64 parameters and inputs under "
            "jax.enable_x64(True)."
        )


def synflow_scores(apply: Apply, params: Any, *inputs: Any) -> Any:
    """Score every weight by the synaptic flow through it: no data, no labels.

    `s = |w dR/dw|` with `R = sum of apply(|params|, ones)`. In a network of linear layers and ReLU
    that is the sum over all paths through the weight of the product of absolute weights, so that
    what goes into a unit equals what comes out of it. A batch norm has to be the identity or a
    positive scaling: close apply over its initial averages (mean 0, variance 1), in use and not in
    training.

    R is a product over the layers. He's initialisation makes each layer of n inputs multiply it by
    about `1.1 sqrt(n)`: twenty layers stay far inside float32, hundred do not. What overflows is
    not rescaled, since that would change the shares of paths that skip layers: outside jit it is an
    error, under jit scores are infinite or NaN. Take float64 then, as the authors do.

    Args:
      apply: `(params, *inputs) -> outputs`; all floating-point outputs are summed. Compiled once
        for each such function: define it once.
      params: any pytree of arrays.
      *inputs: trees of arrays or of `jax.ShapeDtypeStruct`; only shapes and dtypes matter, as ones
        take their place. A batch of one is enough.

    Returns:
      A tree of scores in float32 or wider; infinity for leaves that are not floating-point.

    Raises:
      ValueError: the flow is not finite (outside jit).

    Example:
      >>> import jax.numpy as jnp
      >>> def apply(params, x):
      ...     return x @ params["a"] @ params["b"]
      >>> params = {"a": jnp.array([[1.0, -2.0]]), "b": jnp.array([[3.0], [1.0]])}
      >>> scores = synflow_scores(apply, params, jnp.zeros((1, 1)))
      >>> scores["a"], scores["b"].ravel()
      (Array([[3., 2.]], dtype=float32), Array([3., 2.], dtype=float32))

    References:
      Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic
      flow", 2020, https://arxiv.org/abs/2006.05467, section 6.
    """
    scores, finite = _scores_once(apply, params, _ones(inputs))
    _refuse_overflow(finite)
    return scores


@partial(jax.jit, static_argnames="apply")
def _scores_once(apply: Apply, params: Any, inputs: tuple[Any, ...]) -> tuple[Any, jax.Array]:
    scores = _flow_scores(apply, params, inputs)
    return scores, _all_finite(scores)


def synflow_masks(
    apply: Apply,
    params: Any,
    sparsity: float | jax.Array,
    *inputs: Any,
    rounds: int = 100,
    select: Callable[[Any, Any], Any] = global_topk_masks,
) -> Any:
    """Prune by synaptic flow in many rounds, so that no layer is cut off before all others.

    In round k of n the weights left are scored and the best of them kept: `(1 - sparsity)^(k / n)`
    of all. A weight once pruned stays pruned. All rounds are one loop of one compiled program.

    Args:
      apply: as for `synflow_scores`.
      params: any pytree of arrays; it is not changed.
      sparsity: fraction to prune, 0 to 1; a Python number or a traced scalar.
      *inputs: as for `synflow_scores`.
      rounds: n, at least 1; the paper takes 100. In one round layers may be lost whole.
      select: `(scores, sparsity) -> masks`; `global_topk_masks` by default. To prune some leaves
        only: `functools.partial(jopt.prune.global_topk_masks, where="conv.*kernel")`. Define it
        once.

    Returns:
      A tree of booleans, True keeps: those that `select` makes.

    Raises:
      ValueError: sparsity lies outside [0, 1], `rounds` is below 1, or the flow is not finite
        (outside jit).

    Example:
      >>> import jax.numpy as jnp
      >>> def apply(params, x):
      ...     return x @ params["a"] @ params["b"]
      >>> params = {"a": jnp.array([[1.0, -2.0]]), "b": jnp.array([[3.0], [1.0]])}
      >>> masks = synflow_masks(apply, params, 0.5, jnp.zeros((1, 1)))
      >>> masks["a"], masks["b"].ravel()
      (Array([[ True, False]], dtype=bool), Array([ True, False], dtype=bool))

    References:
      Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic
      flow", 2020, https://arxiv.org/abs/2006.05467, algorithm 1.
    """
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"rounds must be a whole number, at least 1, not {rounds!r}.")
    if isinstance(sparsity, (int, float)) and not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity must lie in [0, 1], not {sparsity!r}.")
    level = jnp.asarray(sparsity, jnp.float32)
    scores, finite = _scores_in_rounds(apply, params, level, _ones(inputs), rounds, select)
    _refuse_overflow(finite)
    # With the number as it was given: in float32 large networks would miss it by a weight or two.
    return select(scores, sparsity)


@partial(jax.jit, static_argnames=("apply", "rounds", "select"))
def _scores_in_rounds(
    apply: Apply,
    params: Any,
    sparsity: jax.Array,
    inputs: tuple[Any, ...],
    rounds: int,
    select: Callable[[Any, Any], Any],
) -> tuple[Any, jax.Array]:
    """Return the scores of the last round, -1 where pruned before, and whether all are finite."""

    def score(masks: Any) -> Any:
        flow = _flow_scores(apply, apply_masks(params, masks), inputs)
        return map_floating(lambda each, mask: jnp.where(mask, each, -1), flow, masks)

    def one_round(index: jax.Array, carry: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
        scores, finite = carry
        left = (1 - sparsity) ** (index.astype(jnp.float32) / rounds)
        masks = jax.tree.map(jnp.logical_and, select(scores, 1 - left), kept(scores))
        scores = score(masks)
        return scores, finite & _all_finite(scores)

    def kept(scores: Any) -> Any:
        return jax.tree.map(lambda each: each >= 0, scores)

    # Before the first round all are kept, whatever their scores.
    shapes = jax.eval_shape(lambda: _flow_scores(apply, params, inputs))
    start = jax.tree.map(lambda each: jnp.ones(each.shape, each.dtype), shapes)
    return jax.lax.fori_loop(0, rounds, one_round, (start, jnp.array(True)))
