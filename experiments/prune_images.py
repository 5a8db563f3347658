"""Prune image classifiers as far as they go: every part of the pruning experiment.

    python -m experiments.prune_images                       # all parts, three seeds
    python -m experiments.prune_images --only extreme        # one part; the others are left alone
    python -m experiments.prune_images --smoke               # a trial in a minute or two

Part `criteria` prunes LeNet-5 and a network with batch norms on Fashion-MNIST by every criterion,
to 80, 90, 95, 98 and 99 %: `experiments._prune_criteria`. Part `extreme` takes LeNet-5 to one of
280 weights and LeNet-300-100 to one of 68 on MNIST: `experiments._prune_extreme`. Part `channels`
removes channels until less than a quarter of the multiply-adds is left:
`experiments._prune_channels`.

Choices are made on a validation part of the training images; the test images are looked at once, at
the end. Finished epochs are kept: a killed run goes on where it was, and `--restart` forgets them.
"""

from experiments import _parts, _prune_channels, _prune_criteria, _prune_extreme

PARTS: dict[str, _parts.Part] = {
    "channels": _prune_channels.run,
    "criteria": _prune_criteria.run,
    "extreme": _prune_extreme.run,
}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    words = "another 28 by 28 TFDS image set than the part's own"
    _parts.main("prune_images", PARTS, words, arguments)


if __name__ == "__main__":
    main()
