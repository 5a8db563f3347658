"""Weights in few bits after training: the methods that the language experiments compare."""

from typing import Any

from jopt import layers, quant

Tree = Any
Statistics = dict[str, layers.InputStatistics]

METHODS: dict[str, Any] = {
    "RTN": None,
    "HQQ": quant.hqq,
    "AWQ": quant.awq,
    "GPTQ": quant.gptq,
    "rotation + RTN": quant.hadamard_rotation,
}


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
