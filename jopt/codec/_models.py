"""Probabilities of bits and symbols, learned while coding, in exact arithmetic.

Nothing of a model is stored in the file: encoder and decoder learn it from the symbols they share.
Every number here is an integer, held in a float64 where that is faster (sums and products stay
below 2^53, so they are exact in any order, on any machine, under any BLAS); the few divisions are
single IEEE operations followed by a floor. Log-odds are in units of 1/256 nat.
"""

import numpy as np

from jopt.codec._coder import ONE, Coder

UNIT = 256
"""One nat of log-odds, or the number 1 as a feature."""

_LIMIT = 11 * UNIT  # beyond 11 nats a probability falls under 1/ONE
_FEATURE_LIMIT = 4 * UNIT - 1  # keeps the sums of squares exact
_WEIGHT = 1 << 16  # the weight 1
_MANTISSAS = 1 << 12


def _exponentials(count: int) -> list[int]:
    """Compute exp(k / UNIT) * 2^40 for k < count by integers alone."""
    step, term = 1 << 60, 1 << 60
    for order in range(1, 12):
        term //= UNIT * order
        step += term
    values, power = [], 1 << 60
    for _ in range(count):
        values.append(power >> 20)
        power = power * step >> 60
    return values


def _squash_table() -> np.ndarray:
    powers = _exponentials(_LIMIT + 1)
    upper = [(value * ONE) // (value + (1 << 40)) for value in powers]
    chances = [ONE - value for value in upper[:0:-1]] + upper
    return np.clip(np.array(chances, np.float64), 1, ONE - 1)


def _log_table() -> np.ndarray:
    """Tabulate UNIT * ln(m) for m in [1/2, 1), which frexp yields, less ln(1/2)."""
    powers = np.array(_exponentials(UNIT), np.int64)
    mantissas = (np.arange(_MANTISSAS // 2, dtype=np.int64) + _MANTISSAS // 2) << 29
    return np.searchsorted(powers, mantissas, side="right") - 1.0


_SQUASH = _squash_table()
_LOGS = _log_table()
_LN2_NUMERATOR = 181704  # UNIT * ln(2) * 1024


def tables() -> tuple[np.ndarray, np.ndarray]:
    """Return what `squash` and `log_ratio` look up."""
    return _SQUASH, _LOGS


def squash(odds: np.ndarray) -> np.ndarray:
    """Turn log-odds into probabilities in units of 1/ONE, never 0 or 1."""
    index = odds.astype(np.intp)
    index += _LIMIT
    np.maximum(index, 0, out=index)
    np.minimum(index, 2 * _LIMIT, out=index)
    return _SQUASH[index]


def log_ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Take `ln(above / below)` of positive numbers in units of 1/UNIT, to about one unit.

    The result is clipped to the range of a feature.
    """
    mantissas, exponents = np.frexp(above / below)
    index = (mantissas * _MANTISSAS).astype(np.intp)
    index -= _MANTISSAS // 2
    logs = np.floor((exponents - 1) * (_LN2_NUMERATOR / 1024))
    logs += _LOGS[index]
    np.maximum(logs, -_FEATURE_LIMIT, out=logs)
    return np.minimum(logs, _FEATURE_LIMIT, out=logs)


class Logistic:
    """Predict bits by a logistic regression that takes one Newton step per batch.

    The chance of a one is `squash(weights . features)`. After each batch every weight moves by the
    batch's gradient over the curvature summed so far (diagonal Newton), so early batches move it
    far and late ones hardly.
    """

    def __init__(self, weights: list[float], firmness: int = 25) -> None:
        self._weights = np.floor(np.array(weights, np.float64) * _WEIGHT)
        self._curvature = np.full(len(weights), float(firmness << 12))

    def weight(self, index: int) -> float:
        """Return a weight as it stands, a multiple of 2^-16."""
        return self._weights[index] / _WEIGHT

    def code(self, coder: Coder, truth: np.ndarray | None, features: np.ndarray) -> tuple:
        """Code one batch of bits and learn from it.

        Args:
          coder: writes or reads.
          truth: the bits when writing, None when reading.
          features: one row a weight, one column a bit; integers in units of 1/UNIT,
            none beyond 4 * UNIT in size.

        Returns:
          The bits, and the log-odds that predicted them.
        """
        odds = np.floor(self._weights @ features / _WEIGHT)
        chances = squash(odds)
        bits = coder.flags(truth, chances)
        gradient = features @ (bits * float(ONE) - chances)
        spread = np.floor(chances * (ONE - chances) / ONE)
        self._curvature += np.floor((features * features) @ spread / (1 << 20))
        self._weights += np.floor(gradient * 16 / self._curvature)
        np.clip(self._weights, -16 * _WEIGHT, 16 * _WEIGHT, out=self._weights)
        return bits, odds


RATES = (1, 4, 32)
"""What a sighting weighs against the 1 that every symbol starts with."""


def code_histogram(
    coder: Coder, truth: np.ndarray | None, count: int, alphabet: int, rate: int
) -> np.ndarray:
    """Code symbols by how often each was seen so far, in blocks that grow with what was seen.

    Every symbol starts with weight 1 and gains `RATES[rate]` per sighting; a block is an eighth
    of what came before, so the model lags little and there are few blocks.

    Args:
      coder: writes or reads.
      truth: the symbols when writing, None when reading.
      count: how many.
      alphabet: symbols are below this, at most 256.
      rate: index of the gain; a high one suits few symbols in use.

    Returns:
      The symbols.
    """
    if alphabet < 2:
        return np.zeros(count, np.int64)
    weights = np.ones(alphabet, np.int64)
    parts, start = [], 0
    while start < count:
        stop = min(count, start + max(8, start // 8))
        known = None if truth is None else truth[start:stop]
        part = coder.symbols(known, stop - start, weights)
        weights = weights + RATES[rate] * np.bincount(part, minlength=alphabet)
        parts.append(part)
        start = stop
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)
