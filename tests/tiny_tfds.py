"""Write a tiny set of images or of sentences in TFDS's own format, without TensorFlow."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def _record(**values: Any) -> bytes:
    """Serialize an example of bytes and whole numbers."""
    from tensorflow_datasets import proto

    examples: Any = proto.tf_example_pb2
    features: Any = proto.tf_feature_pb2

    def feature(value: Any) -> Any:
        if isinstance(value, bytes):
            return features.Feature(bytes_list=features.BytesList(value=[value]))
        return features.Feature(int64_list=features.Int64List(value=[int(value)]))

    found = {name: feature(value) for name, value in values.items()}
    return examples.Example(features=features.Features(feature=found)).SerializeToString()


def _png(image: np.ndarray) -> bytes:
    png = io.BytesIO()
    Image.fromarray(image if image.shape[-1] == 3 else image[..., 0]).save(png, format="PNG")
    return png.getvalue()


def make_images(count: int, shape: tuple[int, ...], classes: int, seed: int):
    """Draw images whose class is where they are bright."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    images = rng.integers(0, 60, (count, *shape), np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[:, label * shape[1] // classes : (label + 1) * shape[1] // classes] += 150
    return images, labels


def write(folder: Path, name: str, shape=(28, 28, 1), classes=10, train=80, test=40) -> Path:
    """Prepare images, `folder/name/1.0.0`, with a train and a test part; returns `folder`."""

    def records(count: int, seed: int) -> list[bytes]:
        images, labels = make_images(count, shape, classes, seed)
        pairs = zip(images, labels, strict=True)
        return [_record(image=_png(image), label=label) for image, label in pairs]

    return _write(folder, name, records, _features(shape, classes), train=train, test=test)


def write_text(folder: Path, name: str, train=80, test=40) -> Path:
    """Prepare sentences that are good or bad by one word; returns `folder`."""

    def records(count: int, seed: int) -> list[bytes]:
        rng = np.random.default_rng(seed)
        found = []
        for number in range(count):
            label = number % 2
            words = [*rng.choice(["a", "film", "of", "the", "year"], rng.integers(2, 9))]
            words.insert(int(rng.integers(len(words))), ["Bad", "Good"][label])
            found.append(_record(text=" ".join(words).encode(), label=label))
        return found

    features = _dictionary(text=_TEXT, label=_label(2))
    return _write(folder, name, records, features, train=train, test=test)


def write_documents(folder: Path, name: str, train=40, validation=6, test=6) -> Path:
    """Prepare documents, each of which counts on; returns `folder`."""

    def records(count: int, seed: int) -> list[bytes]:
        rng = np.random.default_rng(seed)
        starts = rng.integers(0, 900, count)
        texts = [" ".join(map(str, range(start, start + 60))) for start in starts]
        return [_record(text=text.encode()) for text in texts]

    parts = {"train": train, "validation": validation, "test": test}
    return _write(folder, name, records, _dictionary(text=_TEXT), **parts)


_TEXT = {"pythonClassName": "tensorflow_datasets.core.features.text_feature.Text", "text": {}}


def _write(
    folder: Path,
    name: str,
    records: Callable[[int, int], list[bytes]],
    features: dict[str, Any],
    **counts: int,
) -> Path:
    from array_record.python.array_record_module import ArrayRecordWriter

    place = folder / name / "1.0.0"
    place.mkdir(parents=True)
    splits = []
    for seed, (split, count) in enumerate(counts.items()):
        writer = ArrayRecordWriter(
            str(place / f"{name}-{split}.array_record-00000-of-00001"), "group_size:1"
        )
        found = records(count, seed)
        for record in found:
            writer.write(record)
        writer.close()
        splits.append(
            {
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "name": split,
                "numBytes": str(sum(map(len, found))),
                "shardLengths": [str(count)],
            }
        )
    info = {"fileFormat": "array_record", "name": name, "splits": splits, "version": "1.0.0"}
    (place / "dataset_info.json").write_text(json.dumps(info))
    (place / "features.json").write_text(json.dumps(features))
    return folder


def _features(shape, classes):
    package = "tensorflow_datasets.core.features"
    image = {"dtype": "uint8", "shape": {"dimensions": [str(size) for size in shape]}}
    image = {
        "pythonClassName": f"{package}.image_feature.Image",
        "image": {**image, "encodingFormat": "png"},
    }
    return _dictionary(image=image, label=_label(classes))


def _label(classes: int) -> dict[str, Any]:
    return {
        "pythonClassName": "tensorflow_datasets.core.features.class_label_feature.ClassLabel",
        "classLabel": {"numClasses": str(classes)},
    }


def _dictionary(**features: Any) -> dict[str, Any]:
    return {
        "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
        "featuresDict": {"features": features},
    }
