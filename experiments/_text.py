"""Sentences with labels, as rows of word numbers.

Sets that are prepared already (in `TFDS_DATA_DIR` or TFDS's default folder) are read without
TensorFlow. Preparing one for the first time needs a network and TensorFlow.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from experiments import _data

PADDING, UNKNOWN = 0, 1
_WORD = re.compile(r"[a-z0-9']+|[^\sa-z0-9']")


@dataclasses.dataclass(frozen=True)
class Sentences:
    """Sentences as word numbers (examples, length), int32, and labels (examples,), int32.

    The most frequent word has number 2; 1 stands for words that are not in the vocabulary, 0 fills
    up. `validation` is a fixed part of the training data: every choice is made on it, and the test
    sentences are looked at once.
    """

    name: str
    tag: str
    source: str
    num_classes: int
    vocabulary: tuple[str, ...]
    train: tuple[np.ndarray, np.ndarray]
    validation: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


def words(text: str) -> list[str]:
    """Split a sentence into words and punctuation, in lower case."""
    return _WORD.findall(text.lower())


def vocabulary(sentences: Iterable[Sequence[str]], least: int) -> tuple[str, ...]:
    """Return the words that occur at least so often, the most frequent first."""
    counts = collections.Counter(word for sentence in sentences for word in sentence)
    kept = sorted((-count, word) for word, count in counts.items() if count >= least)
    return tuple(word for _, word in kept)


def numbers(
    sentences: Sequence[Sequence[str]], vocabulary: Sequence[str], length: int
) -> np.ndarray:
    """Number the words of sentences, cut to a length and filled up with zeros."""
    places = {word: number for number, word in enumerate(vocabulary, 2)}
    found = np.full((len(sentences), length), PADDING, np.int32)
    for row, sentence in zip(found, sentences, strict=True):
        taken = [places.get(word, UNKNOWN) for word in sentence[:length]]
        row[: len(taken)] = taken
    return found


def load(
    name: str = "rotten_tomatoes", length: int = 40, least: int = 2, validation: float = 1 / 12
) -> Sentences:
    """Load a set of sentences with TFDS features `text` and `label`.

    Args:
      name: of a TFDS set with splits `train` and `test`.
      length: words of a sentence that are kept.
      least: how often a word must occur in training to be in the vocabulary.
      validation: fraction of the training examples kept for validation.

    Raises:
      DataUnavailable: it is neither prepared nor to be had, or has no such features.
    """
    builder = _data.prepared_builder(name)
    features = dict(getattr(builder.info.features, "items", dict)())
    if not {"text", "label"} <= set(features) or not {"train", "test"} <= set(builder.info.splits):
        raise _data.DataUnavailable(
            f"TFDS's {name} is no set of labelled sentences with parts train and test."
        )
    parts = {split: _read(builder, split) for split in ("train", "test")}
    train, labels = parts["train"]
    order = np.random.default_rng(0).permutation(len(labels))
    held = int(len(order) * validation)
    held_out, rest = order[:held], np.sort(order[held:])
    known = vocabulary([train[n] for n in rest], least)
    rows = numbers(train, known, length)
    return Sentences(
        name,
        name,
        f"TFDS {builder.info.full_name}, {len(labels):,} to train and "
        f"{len(parts['test'][1]):,} to test",
        int(features["label"].num_classes),
        known,
        (rows[rest], labels[rest]),
        (rows[held_out], labels[held_out]),
        (numbers(parts["test"][0], known, length), parts["test"][1]),
    )


def _read(builder: Any, split: str) -> tuple[list[list[str]], np.ndarray]:
    examples = _data.examples(builder, split)
    found = [(words(each["text"].decode()), each["label"]) for each in examples]
    return [text for text, _ in found], np.array([label for _, label in found], np.int32)


def head(data: Sentences, count: int) -> Sentences:
    """Keep the first `count` examples of each part, for trials that must end in seconds."""
    train, validation, test = (
        (rows[:count], labels[:count]) for rows, labels in (data.train, data.validation, data.test)
    )
    source = f"the first {count} of each part of: {data.source}"
    return dataclasses.replace(
        data,
        tag=f"{data.tag}-head",
        source=source,
        train=train,
        validation=validation,
        test=test,
    )
