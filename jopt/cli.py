"""The command line: look into a `.jopt` file, or check it.

jopt inspect model.jopt
jopt verify model.jopt
"""

import argparse
import sys

from jopt import codec


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status: 0, or 1 when a file cannot be read.

    Example:
      >>> main(["inspect", "no/such/file.jopt"])  # writes the reason to stderr
      1
    """
    parser = argparse.ArgumentParser(prog="jopt", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, words in (
        ("inspect", "print where the bytes of a file go, leaf by leaf"),
        ("verify", "decode a whole file and check every checksum"),
    ):
        command = commands.add_parser(name, help=words, description=words)
        command.add_argument("file", help="a .jopt file")
    options = parser.parse_args(arguments)
    try:
        if options.command == "inspect":
            print(codec.inspect(options.file))
            metadata = codec.read_metadata(options.file)
            if metadata:
                print("metadata: " + ", ".join(f"{key}={value}" for key, value in metadata.items()))
        else:
            ledger = codec.verify(options.file)
            print(f"{options.file}: all {len(ledger.entries)} leaves decode and match their sums.")
    except (codec.CodecError, OSError) as error:
        print(f"jopt: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
