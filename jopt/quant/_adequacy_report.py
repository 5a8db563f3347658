"""The adequacy of calibration data in words: a table, and what to do."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jopt.quant._adequacy import Adequacy

_TOO_SATURATED = 0.01
_TOO_FEW_CODES = 0.5
_TOO_FAR_APART = 0.25


class _Worst(NamedTuple):
    rows: float
    features: float
    saturation: float
    active: float
    codes: float
    spread: float
    drift: float


def _worst(judged: Adequacy) -> _Worst:
    """Take the worst of stacked layers, as plain numbers."""
    arrays = [np.asarray(field, np.float64).reshape(-1) for field in judged]
    rows, features, saturation, active, codes, spread, drift = arrays
    return _Worst(
        rows.min(),
        features.max(),
        saturation.max(),
        active.min(),
        codes.min(),
        spread.max(),
        drift[np.argmax(np.abs(drift))],
    )


def advice(judged: Adequacy) -> list[str]:
    """Say in words what is wrong with calibration data or a range, and what to do.

    Args:
      judged: of one layer, or of stacked layers, of which the worst is taken.

    Returns:
      Sentences; none where nothing is wrong.

    Example:
      >>> advice(Adequacy(12, 512, 0.0, 1.0, 0.9, 0.1, 0.0))
      ['12 rows for 512 features: use more batches.']
    """
    worst, said = _worst(judged), []
    if worst.rows < worst.features:
        said.append(f"{worst.rows:.0f} rows for {worst.features:.0f} features: use more batches.")
    if worst.saturation > _TOO_SATURATED:
        said.append(
            f"{worst.saturation:.1%} of the values lie outside the range: choose it from more "
            "batches, or by a method that cuts off less."
        )
    if worst.active < 1:
        dead = round((1 - worst.active) * worst.features)
        said.append(
            f"{dead} of {worst.features:.0f} features are always 0: use more varied data, or "
            "prune those inputs."
        )
    if worst.codes < _TOO_FEW_CODES:
        said.append(
            f"{worst.codes:.0%} of the codes are used: a narrower range (mse_range, "
            "percentile_range) or fewer bits would do."
        )
    return said + _stability_advice(worst)


def _stability_advice(worst: _Worst) -> list[str]:
    if np.isnan(worst.spread):
        return ["one batch cannot show whether batches agree: use more batches."]
    said = []
    if worst.spread > _TOO_FAR_APART:
        said.append(
            f"the ranges of batches differ by {worst.spread:.0%}: use more or larger batches."
        )
    if abs(worst.drift) > _TOO_FAR_APART:
        said.append(
            f"the ranges of batches drift by {worst.drift:+.0%} from first to last: shuffle the "
            "data."
        )
    return said


def _cell(value: float, form: str) -> str:
    return "-" if np.isnan(value) else format(value, form)


def format_adequacy(judged: Mapping[str, Adequacy]) -> str:
    """Write the adequacy of layers as a table, and below it what to do.

    Args:
      judged: `{path: Adequacy}`; of stacked layers the worst is shown.

    Returns:
      Text of several lines.

    Example:
      >>> print(format_adequacy({"head": Adequacy(12, 512, 0.002, 1.0, 0.9, 0.1, -0.04)}))
      layer rows features outside active codes spread drift
      head    12      512   0.20% 100.0% 90.0%  10.0% -4.0%
      <BLANKLINE>
      head: 12 rows for 512 features: use more batches.
    """
    lines = [["layer", "rows", "features", "outside", "active", "codes", "spread", "drift"]]
    for path, each in judged.items():
        worst = _worst(each)
        cells = [_cell(worst.rows, ".0f"), _cell(worst.features, ".0f")]
        cells += [_cell(worst.saturation, ".2%")]
        cells += [_cell(value, ".1%") for value in worst[3:]]
        lines.append([path, *cells])
    wide = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    table = [
        " ".join(
            [line[0].ljust(wide[0])] + [c.rjust(w) for c, w in zip(line[1:], wide[1:], strict=True)]
        )
        for line in lines
    ]
    said = [f"{path}: {line}" for path, each in judged.items() for line in advice(each)]
    return "\n".join(table + ([""] + said if said else []))
