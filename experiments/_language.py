"""English text as rows of token numbers, for language models.

`brown` comes through TFDS where it is prepared (`TFDS_DATA_DIR` or TFDS's own folder; no TensorFlow
is needed to read it). Anywhere else the help texts that ship with CPython are taken
(`pydoc_data.topics`), and it is said. Tokens are learned from the training documents by byte-level
BPE, with the package `tokenizers`.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments import _data

END = "<end>"  # of a document; token 0
INSTALL = "pip install 'jopt[experiments]'"


@dataclasses.dataclass(frozen=True)
class Text:
    """Documents as one row of token numbers for each part, int32, with `END` after each document.

    Attributes:
      name: what was asked for.
      tag: of the results: the name, or another where other text was taken.
      source: in words.
      tokenizer: of `tokenizers`.
      train: token numbers, one document after the other.
      validation: the same; every choice is made on it.
      test: the same; looked at once, at the end.
      test_bytes: UTF-8 bytes of the test documents, so that perplexity a byte can be told.
      note: why other text was taken, or nothing.
    """

    name: str
    tag: str
    source: str
    tokenizer: Any
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    test_bytes: int
    note: str = ""

    @property
    def vocabulary(self) -> int:
        """Return how many tokens there are."""
        return self.tokenizer.get_vocab_size()


Documents = dict[str, list[str]]


def load(name: str = "brown", tokens: int = 2048) -> Text:
    """Load a set of documents with TFDS feature `text`.

    Args:
      name: of a TFDS set with splits `train`, `validation` and `test`.
      tokens: size of the vocabulary, at least 257: 256 bytes and the end of a document.

    Raises:
      DataUnavailable: it cannot be read, or `tokenizers` is not installed.
      ValueError: `tokens` is below 257.
    """
    if tokens < 257:
        raise ValueError(f"tokens must be at least 257, not {tokens}.")
    tag, note = name, ""
    try:
        documents, source = _from_tfds(name)
    except _data.DataUnavailable as reason:
        if name != "brown":
            raise
        tag, note = "pydoc", str(reason)
        documents, source = _from_pydoc()
    tokenizer = learn_tokens(documents["train"], tokens)
    rows = {part: encode(tokenizer, texts) for part, texts in documents.items()}
    size = sum(len(text.encode()) for text in documents["test"])
    counts = ", ".join(f"{len(row):,} tokens of {part}" for part, row in rows.items())
    return Text(
        name,
        tag,
        f"{source}: {counts}",
        tokenizer,
        rows["train"],
        rows["validation"],
        rows["test"],
        size,
        note,
    )


def load_or_exit(name: str, tokens: int, say: Callable[[str], Any]) -> Text:
    """Load for a command line: end with the reason, or say what was taken instead."""
    try:
        data = load(name, tokens)
    except _data.DataUnavailable as problem:
        raise SystemExit(str(problem)) from None
    if data.note:
        say(data.note)
        say(f"Taken instead: {data.source}.")
    return data


def learn_tokens(documents: Sequence[str], tokens: int) -> Any:
    """Learn a byte-level BPE vocabulary; every text can be encoded, and comes back as it was.

    Raises:
      DataUnavailable: the package `tokenizers` is not installed.
    """
    try:
        import tokenizers
    except ModuleNotFoundError:
        raise _data.DataUnavailable(
            f"Tokens are learned by the package tokenizers: {INSTALL}."
        ) from None
    found = tokenizers.Tokenizer(tokenizers.models.BPE())
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=tokens,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    found.train_from_iterator(documents, trainer)
    return found


def encode(tokenizer: Any, documents: Sequence[str]) -> np.ndarray:
    """Return the tokens of documents, one after the other, the end token after each."""
    end = tokenizer.token_to_id(END)
    found = tokenizer.encode_batch(list(documents), add_special_tokens=False)
    rows = [np.array([*each.ids, end], np.int32) for each in found]
    return np.concatenate(rows)


def windows(tokens: np.ndarray, length: int, start: int = 0) -> np.ndarray:
    """Cut a row into windows, (windows, length + 1).

    Each begins with the last token of the one before, so that every token after the first is
    predicted once. An incomplete last window is left out.

    Args:
      tokens: (tokens,).
      length: tokens that a window predicts.
      start: tokens to leave out at the beginning.

    Raises:
      ValueError: there are not enough tokens for one window.
    """
    count = (len(tokens) - start - 1) // length
    if count < 1:
        least = length + start + 1
        raise ValueError(
            f"tokens must be at least length + start + 1 = {least}, not {len(tokens)}."
        )
    places = start + length * np.arange(count)[:, None] + np.arange(length + 1)[None]
    return tokens[places]


def _from_tfds(name: str) -> tuple[Documents, str]:
    builder = _data.prepared_builder(name)
    features = dict(getattr(builder.info.features, "items", dict)())
    parts = ("train", "validation", "test")
    if "text" not in features or not set(parts) <= set(builder.info.splits):
        raise _data.DataUnavailable(
            f"TFDS's {name} is no set of texts with parts train, validation and test."
        )
    documents = {
        part: [each["text"].decode() for each in _data.examples(builder, part)] for part in parts
    }
    return documents, f"TFDS {builder.info.full_name}"


def _from_pydoc() -> tuple[Documents, str]:
    """Split the help topics of this Python by their order, a tenth to validation and to test."""
    from pydoc_data.topics import topics

    documents: Documents = {"train": [], "validation": [], "test": []}
    for number, name in enumerate(sorted(topics)):
        part = {8: "validation", 9: "test"}.get(number % 10, "train")
        documents[part].append(topics[name])
    version = ".".join(map(str, sys.version_info[:3]))
    return documents, f"help topics of Python {version}"
