"""Methods after training over whole trees of parameters, with a report of every leaf."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from jopt._trees import Filter, is_kernel, map_selected, naming_leaf
from jopt.layers._outcome import Outcome, Unsuited, mapped, stacked_axes
from jopt.layers._statistics import InputStatistics
from jopt.quant._by_path import refuse_non_finite
from jopt.quant._grids import Leaf
from jopt.quant._quantize import check_values, quantize
from jopt.quant._spec import QuantSpec

Method = Callable[[jax.Array, InputStatistics, QuantSpec], tuple[Leaf, Outcome]]
Report = dict[str, Outcome | str]


def quantize_leaf(
    leaf: jax.Array, statistics: InputStatistics | None, spec: QuantSpec, method: Method
) -> tuple[Leaf, Outcome | str]:
    """Quantize one leaf by a method, or to nearest with the reason in words.

    Example:
      >>> import jax.numpy as jnp
      >>> quantize_leaf(jnp.ones((2, 2)), None, QuantSpec(), len)[1]
      'rounded to nearest: no statistics'
    """
    check_values(leaf, spec)
    if statistics is None:
        return quantize(leaf, spec), "rounded to nearest: no statistics"
    try:
        depth = stacked_axes(leaf.shape, statistics.gram.shape)
    except ValueError as error:
        return quantize(leaf, spec), f"rounded to nearest: {error}"
    try:
        return mapped(method, spec, depth)(leaf, statistics)
    except Unsuited as error:
        return quantize(leaf, spec), f"rounded to nearest: {error}"


def quantize_calibrated_params(
    params: Any,
    statistics: Mapping[str, InputStatistics],
    spec: QuantSpec,
    method: Method,
    where: Filter = is_kernel,
) -> tuple[Any, Report]:
    """Replace the chosen leaves of a tree by what a method after training makes of them.

    Leaves of equal shape are compiled once; layers stacked on leading axes, as a scan over layers
    keeps them, are mapped over. A leaf without statistics, or whose statistics are not those of its
    leading axes (an embedding that is used transposed), or for which the method has no way (a
    depthwise kernel cannot be rotated), is rounded to nearest, and the report says so.

    Args:
      params: a linen dict, an `nnx.State` or any other pytree; it is not changed.
      statistics: by path, of the inputs of layers, as calibration gives them.
      spec: bits, block, range and grid.
      method: `(weights, statistics, spec) -> (leaf, Outcome)`: `gptq`, `awq`, `smooth_quant`,
        `adaround`, or one with its own options. Define such a function once: each new one
        compiles anew.
      where: a regex on the path or a predicate `(path, leaf) -> bool`; by default
        those that `is_kernel` takes.

    Returns:
      The tree with a compressed leaf at each chosen place, and a report: for each chosen path its
      `Outcome` (with an axis for stacked layers), or the reason why it was rounded to nearest.

    Raises:
      ValueError: the filter matches nothing, a block does not divide a leaf, or a leaf holds NaN
        or infinity (outside jit). The message names the leaf.
      TypeError: a chosen leaf is compressed already or is not floating-point.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import quant
      >>> from jopt.quant import gptq
      >>> params = {"dense": {"kernel": jnp.array([[0.4], [0.3]])}, "table": jnp.ones((3, 2))}
      >>> rows = jnp.array([[1.0, 0.9], [0.5, 0.6]])
      >>> from jopt import layers
      >>> statistics = layers.input_statistics.finalise(
      ...     layers.input_statistics.update(layers.input_statistics.init(2), rows)
      ... )
      >>> small, report = quantize_calibrated_params(
      ...     params, {"dense/kernel": statistics}, quant.QuantSpec(2), gptq
      ... )
      >>> sorted(report), report["table"]
      (['dense/kernel', 'table'], 'rounded to nearest: no statistics')
    """
    refuse_non_finite(params, where)
    report: Report = {}
    quantize_named = naming_leaf(quantize_leaf, spec, method)

    def replace(path: str, leaf: Any) -> Leaf:
        small, report[path] = quantize_named(path, leaf, statistics.get(path))
        return small

    return map_selected(replace, params, where), report


def _row(path: str, entry: Outcome | str) -> tuple[str, str, str, str]:
    if isinstance(entry, str):
        return path, "", "", entry
    error, baseline = float(entry.error.sum()), float(entry.baseline.sum())
    if not entry.improved.any():
        return path, f"{error:.4g}", f"{baseline:.4g}", "rounded to nearest: not improved"
    share = f"{error / baseline:.1%} of the error" if baseline > 0 else ""
    if entry.improved.ndim:
        share += f", {int(entry.improved.sum())} of {entry.improved.size} layers improved"
    return path, f"{error:.4g}", f"{baseline:.4g}", share


def format_report(report: Report) -> str:
    """Write a report as a table: the output error of each leaf, and of round-to-nearest.

    Args:
      report: from `quantize_calibrated_params`.

    Returns:
      Text, a line for each leaf after a line of titles; stacked layers are summed.

    Example:
      >>> import jax.numpy as jnp
      >>> outcome = Outcome(jnp.float32(1.0), jnp.float32(4.0), jnp.bool_(True))
      >>> print(format_report({"a/kernel": outcome, "table": "rounded to nearest: no statistics"}))
      leaf      error  to nearest  result
      a/kernel      1           4  25.0% of the error
      table                        rounded to nearest: no statistics
    """
    rows = [("leaf", "error", "to nearest", "result")]
    rows += [_row(path, entry) for path, entry in report.items()]
    first, second, third = (max(len(row[column]) for row in rows) for column in range(3))
    return "\n".join(
        f"{name:<{first}}  {error:>{second}}  {baseline:>{third}}  {result}".rstrip()
        for name, error, baseline, result in rows
    )
