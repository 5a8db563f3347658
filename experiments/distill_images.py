"""Distil an image classifier into a far smaller one: every part of the experiment.

    python -m experiments.distill_images                     # all parts, three seeds
    python -m experiments.distill_images --only methods      # one part; the others are left alone
    python -m experiments.distill_images --only classic --dataset cifar10
    python -m experiments.distill_images --smoke             # a trial in a minute or two

Part `methods` teaches one small student by every method, and by fewer labels:
`experiments._distill_comparison`. Part `classic` is the pair of convolutional networks of many
tutorials, on 32 by 32 RGB images: `experiments._distill_classic`. Part `bytes` holds distillation,
pruning and quantization, each alone and all together, against each other at equal bytes:
`experiments._distill_bytes`.

Choices are made on a validation part of the training images; the test images are looked at once, at
the end. Finished epochs are kept: a killed run goes on where it was, and `--restart` forgets them.
"""

from experiments import _distill_bytes, _distill_classic, _distill_comparison, _parts

PARTS: dict[str, _parts.Part] = {
    "classic": _distill_classic.run,
    "methods": _distill_comparison.run,
    "bytes": _distill_bytes.run,
}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    words = "another TFDS image set than fashion_mnist, such as cifar10"
    _parts.main("distill_images", PARTS, words, arguments)


if __name__ == "__main__":
    main()
