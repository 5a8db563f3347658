"""Write a tiny image classification set in TFDS's own format, without TensorFlow."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def _example(image: np.ndarray, label: int) -> bytes:
    from tensorflow_datasets import proto

    examples: Any = proto.tf_example_pb2
    features: Any = proto.tf_feature_pb2
    png = io.BytesIO()
    Image.fromarray(image if image.shape[-1] == 3 else image[..., 0]).save(png, format="PNG")
    values = {
        "image": features.Feature(bytes_list=features.BytesList(value=[png.getvalue()])),
        "label": features.Feature(int64_list=features.Int64List(value=[label])),
    }
    whole = examples.Example(features=features.Features(feature=values))
    return whole.SerializeToString()


def make_images(count: int, shape: tuple[int, ...], classes: int, seed: int):
    """Draw images whose class is where they are bright."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    images = rng.integers(0, 60, (count, *shape), np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[:, label * shape[1] // classes : (label + 1) * shape[1] // classes] += 150
    return images, labels


def write(folder: Path, name: str, shape=(28, 28, 1), classes=10, train=80, test=40) -> Path:
    """Prepare `folder/name/1.0.0` with a train and a test part; returns `folder`."""
    from array_record.python.array_record_module import ArrayRecordWriter

    place = folder / name / "1.0.0"
    place.mkdir(parents=True)
    splits = []
    for seed, (split, count) in enumerate({"train": train, "test": test}.items()):
        writer = ArrayRecordWriter(
            str(place / f"{name}-{split}.array_record-00000-of-00001"), "group_size:1"
        )
        images, labels = make_images(count, shape, classes, seed)
        records = [_example(image, int(label)) for image, label in zip(images, labels, strict=True)]
        for record in records:
            writer.write(record)
        writer.close()
        splits.append(
            {
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "name": split,
                "numBytes": str(sum(map(len, records))),
                "shardLengths": [str(count)],
            }
        )
    info = {"fileFormat": "array_record", "name": name, "splits": splits, "version": "1.0.0"}
    (place / "dataset_info.json").write_text(json.dumps(info))
    (place / "features.json").write_text(json.dumps(_features(shape, classes)))
    return folder


def _features(shape, classes):
    package = "tensorflow_datasets.core.features"
    image = {"dtype": "uint8", "shape": {"dimensions": [str(size) for size in shape]}}
    return {
        "pythonClassName": f"{package}.features_dict.FeaturesDict",
        "featuresDict": {
            "features": {
                "image": {
                    "pythonClassName": f"{package}.image_feature.Image",
                    "image": {**image, "encodingFormat": "png"},
                },
                "label": {
                    "pythonClassName": f"{package}.class_label_feature.ClassLabel",
                    "classLabel": {"numClasses": str(classes)},
                },
            }
        },
    }
