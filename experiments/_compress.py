"""Pruning and quantization of a trained network under a loss, and the file it ends in."""

import dataclasses
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from experiments import _distill_training, _train
from jopt import codec, is_kernel, materialize, prune, quant

Tree = Any
Filter = str | Callable[[str, Any], bool]
Scores = Callable[[Tree], Tree]
BIAS_SPEC = quant.QuantSpec(8, block=())


def rounded(params: Tree, bits: int, block: tuple[int, ...] = ()) -> Tree:
    """Round kernels and biases as `quantized` stores them, with a straight-through gradient."""
    params = quant.fake_quantize_params(params, quant.QuantSpec(bits, block=block))
    return quant.fake_quantize_params(params, BIAS_SPEC, ".*/bias")


def quantized(params: Tree, bits: int, block: tuple[int, ...] = ()) -> Tree:
    """Quantize kernels to few bits, a scale for each block, and biases to eight, one scale each."""
    params = quant.quantize_params(params, quant.QuantSpec(bits, block=block))
    return quant.quantize_params(params, BIAS_SPEC, ".*/bias")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is done to a trained network, in this order.

    Attributes:
      sparsity: of all kernels together; 0 for none.
      bits: of kernels; 0 for floats.
      prune_epochs: of pruning (the first half) and fine-tuning (the second).
      quantize_epochs: of training through the rounding.
      rate: Adam's learning rate.
      prune_every: updates between two prunings.
    """

    sparsity: float = 0.0
    bits: int = 0
    prune_epochs: int = 3
    quantize_epochs: int = 2
    rate: float = 1e-3
    prune_every: int = 20


def rate_while_pruning(rate: float, total: int) -> optax.Schedule:
    """Return a rate that stays in the first half of the steps and falls along a cosine after it."""
    falling = optax.cosine_decay_schedule(rate, max(1, total - total // 2), 0.02)
    return optax.join_schedules([optax.constant_schedule(rate), falling], [total // 2])


@lru_cache
def _pruning(
    recipe: Recipe, total: int, where: Filter, scores: Scores
) -> optax.GradientTransformation:
    """Prune along a cubic schedule at a constant rate, then fine-tune as the rate falls."""
    schedule = prune.cubic_schedule(recipe.sparsity, 0, total // 2)
    rate = rate_while_pruning(recipe.rate, total)
    every = max(1, min(recipe.prune_every, total // 8))
    select = partial(prune.global_topk_masks, where=where)
    rule = prune.gradual(schedule, every, scores, select)
    return prune.sparse_training(optax.adam(rate), rule)


def compress(
    recipe: Recipe,
    params: Tree,
    make_loss: Callable[[Callable[[Tree], Tree]], _distill_training.Loss],
    pool: _distill_training.Pool,
    batch: int,
    seed: int,
    stem: Path,
    say: Callable[[str], Any],
    where: Filter = is_kernel,
    scores: Scores = prune.magnitude_scores,
    loop: Callable[..., Any] = _train.scan_steps,
    block: tuple[int, ...] = (),
) -> Tree:
    """Prune a network step by step, quantize it by training through the rounding; return its tree.

    Args:
      recipe: what is done.
      params: the trained network.
      make_loss: from a view of the parameters (the identity, or their rounding) to a loss of them.
      pool: of examples.
      batch: examples in a step.
      seed: of the order.
      stem: of the checkpoints' names.
      say: told of each epoch.
      where: which parameters are pruned.
      scores: of parameters, by which all of them compete.
      loop: runs the steps of an epoch.
      block: of weights that share a scale; by default all of a leaf.
    """
    steps = max(1, pool.count // batch)

    def fit(name: str, view: Any, params: Tree, epochs: int, tx: Any) -> Tree:
        how = _distill_training.Fit(batch, epochs, 0.0, 0.0, loop=loop)
        file = stem.with_name(f"{stem.name}-{name}.ckpt")
        return how.run(make_loss(view), params, pool, seed, file, say, tx=tx)

    masks = None
    if recipe.sparsity:
        tx = _pruning(recipe, steps * recipe.prune_epochs, where, scores)
        params = fit(f"pruned-{recipe.sparsity:g}", unchanged, params, recipe.prune_epochs, tx)
        masks = jax.tree.map(lambda leaf: (leaf != 0) | (leaf.ndim < 2), params)
    if not recipe.bits:
        return params
    rate = optax.cosine_decay_schedule(recipe.rate / 2, steps * recipe.quantize_epochs, 0.02)
    tx = optax.adam(rate)
    if masks is not None:
        tx = optax.chain(tx, prune.keep_masked(masks))
    name = f"pruned-{recipe.sparsity:g}-bits-{recipe.bits}"
    params = fit(name, _view(recipe.bits, block), params, recipe.quantize_epochs, tx)
    return quantized(params, recipe.bits, block)


@lru_cache
def _view(bits: int, block: tuple[int, ...]) -> Callable[[Tree], Tree]:
    """Return the same function for the same bits, so that what is compiled for it is found."""
    return partial(rounded, bits=bits, block=block)


def unchanged(params: Tree) -> Tree:
    """Return the parameters as they are."""
    return params


def packed(tree: Tree, file: Path) -> tuple[int, Tree]:
    """Write a tree to a file, check it, and return its bytes and what the file holds, in codes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    size = codec.save(file, tree)
    codec.verify(file, tree)
    coded = codec.load(file)
    file.unlink()
    return size, coded


def written(tree: Tree, file: Path) -> tuple[int, Tree]:
    """Write a tree to a file, check it, and return its bytes and what the file alone gives back."""
    size, coded = packed(tree, file)
    return size, materialize(coded)


def size(params: Tree) -> int:
    """Count the parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def nonzero(params: Tree) -> int:
    """Count the parameters that are not zero."""
    return sum(int(np.count_nonzero(leaf)) for leaf in jax.tree.leaves(params))
