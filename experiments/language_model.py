"""A language model, compressed: quantized and pruned after training, and taught to a smaller one.

    python -m experiments.language_model                     # both parts, three seeds
    python -m experiments.language_model --only compress     # one part; the other is left alone
    python -m experiments.language_model --smoke             # a trial in a minute or two

A decoder-only transformer of 3.7 million parameters is trained on the Brown corpus, by byte-level
BPE tokens. Part `compress` quantizes and prunes it after training by every method:
`experiments._language_compress`. Part `distill` teaches one four times smaller, on text and on what
it says itself: `experiments._language_distill`.

The corpus comes through TFDS; where it is not prepared, the help texts of CPython are taken and it
is said. Finished trainings and rows are kept: a killed run goes on where it was.
"""

from experiments import _language_compress, _language_distill, _parts

PARTS: dict[str, _parts.Part] = {
    "compress": _language_compress.run,
    "distill": _language_distill.run,
}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    words = "another TFDS set of texts than brown, with parts train, validation and test"
    _parts.main("language_model", PARTS, words, arguments)


if __name__ == "__main__":
    main()
