"""The entropy coder: a writer and a reader that run the same models.

A model is a function that asks its coder for symbols and says how probable each is. The `Writer`
answers with the true symbols and keeps them; the `Reader` answers with what it decodes. So each
model is written once and the two sides cannot drift apart. Beneath both is constriction's ANS
coder (Duda 2013, https://arxiv.org/abs/1311.2540), a stack: at the end the writer pushes in
reverse.

Probabilities come from integers by exact arithmetic only, so every machine computes the same ones:
that of a flag is a multiple of 2^-16, and the weights of a symbol are integers whose sum a float64
holds exactly.
"""

import itertools
from collections.abc import Callable
from typing import Any, NoReturn

import constriction
import numpy as np

from jopt.codec._errors import CodecError

ONE = 1 << 16
"""The probability 1 in the units of `flags`."""

_stream: Any = constriction.stream  # pyright: ignore[reportAttributeAccessIssue]
_AnsCoder = _stream.stack.AnsCoder
_BERNOULLI = _stream.model.Bernoulli(perfect=False)


def _categorical(weights: np.ndarray) -> Any:
    return _stream.model.Categorical(weights.astype(np.float64), perfect=False)


def stream_bytes(words: np.ndarray) -> bytes:
    """Return the bytes of a stream; its last word is never 0, so nothing is lost."""
    return words.astype("<u4").tobytes().rstrip(b"\0")


def stream_words(data: bytes) -> np.ndarray:
    """Return the words of what `stream_bytes` wrote.

    Raises:
      CodecError: it cannot have written that.
    """
    if data.endswith(b"\0"):
        raise CodecError("the coded stream ends in a zero byte.")
    padded = data + bytes(-len(data) % 4)
    return np.frombuffer(padded, "<u4").astype(np.uint32)


def refuse_rest(empty: bool) -> None:
    """Refuse a stream that is not used up, which a wrong decoding hardly ever achieves.

    Raises:
      CodecError: something is left.
    """
    if not empty:
        raise CodecError("the coded stream holds more than its symbols.")


class Writer:
    """Collect symbols with their models, then encode them all."""

    def __init__(self) -> None:
        self._events: list[tuple[np.ndarray, np.ndarray, np.ndarray | None]] = []

    def flags(self, truth: np.ndarray | None, chances: np.ndarray) -> np.ndarray:
        """Take bits; `chances[i] / ONE` is the probability that bit `i` is 1."""
        assert truth is not None
        self._events.append((truth != 0, chances.astype(np.uint16), None))
        return truth

    def symbols(self, truth: np.ndarray | None, count: int, weights: np.ndarray) -> np.ndarray:
        """Take `count` symbols that follow one distribution, given by integer weights."""
        assert truth is not None and len(truth) == count
        self._events.append((truth, weights, weights))
        return truth

    def finish(self) -> bytes:
        """Encode what was collected; the first symbol taken is the first that a Reader yields."""
        coder = _AnsCoder()
        for truth, chances, weights in reversed(_join_flags(self._events)):
            if weights is None:
                coder.encode_reverse(truth.astype(np.int32), _BERNOULLI, chances / ONE)
            else:
                coder.encode_reverse(truth.astype(np.int32), _categorical(weights))
        return stream_bytes(coder.get_compressed())


def _join_flags(events: list) -> list[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """Merge neighbouring calls for flags into one: a call costs as much as hundreds of bits."""
    joined: list = []
    for is_flags, group in itertools.groupby(events, lambda event: event[2] is None):
        if is_flags:
            truths, chances, _ = zip(*group, strict=True)
            joined.append((np.concatenate(truths), np.concatenate(chances), None))
        else:
            joined.extend(group)
    return joined


class Reader:
    """Decode symbols in the order in which a Writer took them."""

    def __init__(self, data: bytes) -> None:
        words = stream_words(data)
        self._coder = _guard(lambda: _AnsCoder(words))

    def flags(self, truth: np.ndarray | None, chances: np.ndarray) -> np.ndarray:
        """Decode one bit for each of `chances`."""
        if not len(chances):
            return np.zeros(0, np.int32)
        return _guard(lambda: self._coder.decode(_BERNOULLI, chances / ONE))

    def symbols(self, truth: np.ndarray | None, count: int, weights: np.ndarray) -> np.ndarray:
        """Decode `count` symbols that follow one distribution."""
        return _guard(lambda: self._coder.decode(_categorical(weights), count))

    def bits_left(self) -> int:
        """Return how many bits of the stream are still to be decoded."""
        return int(self._coder.num_valid_bits())

    def finish(self) -> None:
        """Check that the stream is used up.

        Raises:
          CodecError: something is left.
        """
        refuse_rest(self._coder.is_empty())


Coder = Writer | Reader


def _guard(action: Callable[[], Any]) -> Any:
    """Run constriction and turn its refusals, Rust panics included, into a CodecError."""
    try:
        return action()
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a Rust panic is a BaseException, not an Exception
        _refuse(error)


def _refuse(error: BaseException) -> NoReturn:
    raise CodecError(f"the entropy decoder refused the stream: {error}") from error
