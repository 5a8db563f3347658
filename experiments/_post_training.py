"""After training: the methods of quantization and pruning that the language experiments compare."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jopt import layers, prune, quant

Tree = Any
Statistics = dict[str, layers.InputStatistics]

METHODS: dict[str, Any] = {
    "RTN": None,
    "HQQ": quant.hqq,
    "AWQ": quant.awq,
    "GPTQ": quant.gptq,
    "rotation + RTN": quant.hadamard_rotation,
}

IN_ORDER = "GPTQ in order, MSE"
ORDERED = (4,)  # bits: it is by far the slowest, a pass over the sentences for every kernel


def spec(bits: int, group: int) -> quant.QuantSpec:
    """Return the format of kernels: groups of inputs, each with a scale and a zero point."""
    return quant.QuantSpec(bits, (group, 1), range=quant.minmax, grid=quant.affine)


def quantized(
    params: Tree,
    statistics: Statistics,
    how: quant.QuantSpec,
    method: Any,
    kernels: str,
    tables: str,
) -> tuple[Tree, list[str]]:
    """Quantize kernels by a method and tables to 8 bits in every row.

    Args:
      params: of a trained network.
      statistics: of the inputs of its layers; without a method none are needed.
      how: the format of kernels.
      method: one of `METHODS`; None rounds to nearest.
      kernels: a regular expression for their paths.
      tables: one for the paths of tables of vectors.

    Returns:
      The tree, and the paths where the method had no statistics or did not gain by them.
    """
    params = quant.quantize_params(params, quant.QuantSpec(8, (1, -1)), tables)
    if method is None:
        return quant.quantize_params(params, how, kernels), []
    params, report = quant.quantize_calibrated_params(params, statistics, how, method, kernels)
    lost = [
        path
        for path, entry in report.items()
        if isinstance(entry, str) or not bool(entry.improved.all())
    ]
    return params, lost


def in_order(
    apply: Callable[..., Any],
    params: Tree,
    batches: Sequence[Any],
    how: quant.QuantSpec,
    kernels: str,
    tables: str,
) -> tuple[Tree, list[str]]:
    """Quantize kernel after kernel by GPTQ, each for the inputs that those before it leave.

    Args:
      apply: the network, `(params, batch)`.
      params: of a trained network.
      batches: that it is calibrated on. Twice as many as for the others are needed: what is fitted
        to errors needs more.
      how: the format of kernels, whose ranges are those of the smallest squared error.
      kernels: a regular expression for their paths.
      tables: one for the paths of tables of vectors.

    Returns:
      The tree, and the paths that could not be followed.
    """
    how = dataclasses.replace(how, range=quant.mse)
    params, report = quant.quantize_in_order(apply, params, batches, how, quant.gptq, kernels)
    lost = [path for path, entry in report.items() if isinstance(entry, str)]
    return quant.quantize_params(params, quant.QuantSpec(8, (1, -1)), tables), lost


Pattern = float | tuple[int, int]
CRITERIA = ("magnitude", "Wanda", "SparseGPT")


def pruned(
    params: Tree, statistics: Statistics, pattern: Pattern, criterion: str, kernels: str
) -> Tree:
    """Prune kernels without training.

    Args:
      params: of a trained network.
      statistics: of the inputs of its layers; magnitude needs none.
      pattern: the fraction of every kernel that goes, or how many of how many stay.
      criterion: one of `CRITERIA`: magnitude competes within a kernel, Wanda within each output.
      kernels: a regular expression for their paths.
    """
    if criterion == "SparseGPT":
        return prune.prune_calibrated_params(params, statistics, pattern, where=kernels)[0]
    if criterion == "magnitude":
        scores, topk = prune.magnitude_scores(params), prune.topk_masks
    else:
        scores, topk = prune.wanda_scores(params, statistics, kernels)[0], prune.output_topk_masks
    if isinstance(pattern, tuple):
        masks, _ = prune.n_m_masks(scores, *pattern, where=kernels)
    else:
        masks = topk(scores, pattern, kernels)
    return prune.apply_masks(params, masks)
