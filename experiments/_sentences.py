"""Sentences on their way through a BERT: in batches of few lengths, without filling up for nothing.

Half of what a batch of sentences holds is filling where all are as long as the longest. Sorted by
length and cut to a few lengths, sentences take half the time, and a program is compiled for each
length only.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments import _bert, _data, _parts, _text

LENGTHS = (16, 24, 32, 40, 48, 64)
Run = Callable[[np.ndarray, np.ndarray], Any]  # (ids, real) to an array with a row for each


def start(call: _parts.Call) -> tuple[_text.Texts, Path, str]:
    """Load sentences and find a BERT for a command line, or end the program with the reason.

    Args:
      call: of the part; its path "checkpoint" is a folder or file, or None for MiniLM. A trial
        keeps an eighth of the usual examples.

    Returns:
      The sentences, the checkpoint, and the tag of the results: empty for the usual ones.
    """
    checkpoint = call.paths["checkpoint"]
    texts = _text.load_texts_or_exit(call.dataset or "rotten_tomatoes", call.console.print)
    texts = texts if call.head is None else _data.head(texts, call.head // 8)
    tag = "" if texts.tag == "rotten_tomatoes" and checkpoint is None else texts.tag
    tag = tag if checkpoint is None else f"{tag}-{checkpoint.stem}"
    try:
        return texts, checkpoint or _bert.minilm_folder(), tag
    except _data.DataUnavailable as problem:
        raise SystemExit(str(problem)) from None


def batches(
    tokens: _bert.Tokens, batch: int, lengths: Sequence[int] = LENGTHS
) -> Iterator[tuple[np.ndarray, _bert.Tokens]]:
    """Cut sentences into batches of one of a few lengths, all with as many rows.

    Args:
      tokens: of all sentences, filled up to one length.
      batch: rows of a batch; the last one of a length is filled up with sentences that were there.
      lengths: that a batch may have; the longest one is never exceeded by `tokens`.

    Yields:
      The places of the sentences in a batch, and the batch, whose first rows they are.
    """
    longest = tokens.real.sum(1)
    edges = [length for length in sorted(lengths) if length < tokens.ids.shape[1]]
    last = 0
    for length in (*edges, tokens.ids.shape[1]):
        own = np.flatnonzero((longest > last) & (longest <= length))
        last = length
        for at in range(0, len(own), batch):
            places = own[at : at + batch]
            rows = np.resize(places, batch)
            yield places, _bert.Tokens(*(each[rows, :length] for each in tokens))


def through(run: Run, tokens: _bert.Tokens, batch: int = 32) -> np.ndarray:
    """Run a function over sentences; returns its rows in the sentences' order."""
    found: np.ndarray | None = None
    for places, each in batches(tokens, batch):
        rows = np.asarray(run(each.ids, each.real))
        if found is None:
            found = np.zeros((len(tokens.ids), *rows.shape[1:]), rows.dtype)
        found[places] = rows[: len(places)]
    if found is None:
        raise ValueError("tokens has no sentence with a token.")
    return found


def cut_steps(longest: np.ndarray, window: int = 16) -> Callable[..., tuple[Any, Any]]:
    """Make a loop over the steps of an epoch, each with sentences of about one length, cut to it.

    Takes the place of `_train.scan_steps`. Within a window of some steps sentences are sorted by
    length and the steps run in an order drawn at random, so that short ones do not come first.

    Args:
      longest: tokens of each sentence among the examples.
      window: steps whose sentences are sorted together.
    """

    def loop(
        step: Any, carry: Any, ids: Any, labels: Any, order: Any, extras: Any
    ) -> tuple[Any, Any]:
        places = np.asarray(order)
        rng = np.random.default_rng(places[0])
        losses = []
        for at in range(0, len(places), window):
            some = places[at : at + window]
            some = some.ravel()[np.argsort(longest[some.ravel()], kind="stable")].reshape(
                some.shape
            )
            for rows in rng.permutation(some):
                length = _fitting(int(longest[rows].max()), ids.shape[1])
                carry, value = step(carry, ids[:, :length], labels, jnp.asarray(rows), extras)
                losses.append(value)
        return carry, jnp.stack(losses)

    return loop


def _fitting(longest: int, largest: int) -> int:
    return min([length for length in LENGTHS if longest <= length < largest], default=largest)


def full_rows(
    tokenizer_file: Path, sentences: Sequence[str], length: int, count: int
) -> list[np.ndarray]:
    """Return ids of sentences that fill a length, cut to it: what statistics are taken from.

    What fills sentences up would count among the inputs of layers as much as words do.

    Returns:
      `(16, length)` ids each, `count` sentences in all, or fewer if there are no more.
    """
    tokens = _bert.tokenizer(tokenizer_file, length)(sentences)
    whole = tokens.ids[tokens.real.all(1)][:count]
    return [whole[at : at + 16] for at in range(0, len(whole) - 15, 16)]


def drawn_rows(
    tokenizer_file: Path, texts: _text.Texts, seed: int, length: int, count: int
) -> list[np.ndarray]:
    """Return `full_rows` of training sentences in an order drawn by a seed, or end the program."""
    sentences = texts.train[0]
    order = np.random.default_rng(seed).permutation(len(sentences))
    rows = full_rows(tokenizer_file, [sentences[place] for place in order], length, count)
    if not rows:
        raise SystemExit(
            f"Calibration needs 16 sentences of {length} tokens; {texts.source} has fewer."
        )
    return rows
