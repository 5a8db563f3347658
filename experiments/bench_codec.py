"""Writing and reading `.jopt` files: the native coder against NumPy's, byte for byte the same.

    python -m experiments.bench_codec           # two minutes on a core
    python -m experiments.bench_codec --smoke

Each case is a file of one layer: normal weights, pruned by magnitude and quantized as said. Both
coders write and read it in turns; recorded are the medians and how many times faster the native one
is. NumPy's coder calls constriction for the entropy coding itself.
"""

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax

from experiments import _results, _timing
from jopt import codec, prune, quant
from jopt.codec import _coding, _native

Tree = Any


@contextlib.contextmanager
def coder(native: bool) -> Iterator[None]:
    """Code natively, or not."""
    with mock.patch.object(_coding, "_is_native", lambda size: native):
        yield


def layer(shape: tuple[int, ...], sparsity: float, bits: int | None) -> Tree:
    """Make a layer whose smallest weights are zero, of so many bits or of floats."""
    params = {"kernel": jax.random.normal(jax.random.key(0), shape)}
    if sparsity:
        masks = prune.topk_masks(prune.magnitude_scores(params), sparsity)
        params = prune.apply_masks(params, masks)
    return params if bits is None else quant.quantize_params(params, quant.QuantSpec(bits))


def cases(smoke: bool) -> dict[str, Tree]:
    """Return what is written and read, by name."""
    if smoke:
        return {"60x40, 90 % zeros, 4 bits": layer((60, 40), 0.9, 4)}
    return {
        "784x300, 90 % zeros, 4 bits": layer((784, 300), 0.9, 4),
        "3x3x64x128, 90 % zeros, 4 bits": layer((3, 3, 64, 128), 0.9, 4),
        "1024x1024, 90 % zeros, 4 bits": layer((1024, 1024), 0.9, 4),
        "2048x2048, 50 % zeros, 4 bits": layer((2048, 2048), 0.5, 4),
        "2048x2048, no zeros, 8 bits": layer((2048, 2048), 0.0, 8),
        "1024x1024, 70 % zeros, floats": layer((1024, 1024), 0.7, None),
    }


def measure(tree: Tree, folder: Path, repeats: int) -> dict[str, Any]:
    """Write and read one file by both coders in turns."""

    def side(verb: str, native: bool) -> Any:
        file = folder / f"{native}.jopt"

        def run() -> Any:
            with coder(native):
                return codec.save(file, tree) if verb == "write" else codec.load(file)

        return run

    found: dict[str, Any] = {}
    for verb in ("write", "read"):
        sides = {name: side(verb, name == "native") for name in ("native", "numpy")}
        rows = _timing.interleaved(sides, repeats)
        seconds = {name: row["median_s"] for name, row in rows.items()}
        found[verb] = {f"{name}_ms": round(1e3 * each, 3) for name, each in seconds.items()}
        found[verb]["faster"] = round(seconds["numpy"] / seconds["native"], 2)
    files = [(folder / f"{native}.jopt").read_bytes() for native in (True, False)]
    return {"bytes": len(files[0]), "same_bytes": files[0] == files[1], **found}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.bench_codec")
    parser.add_argument("--smoke", action="store_true", help="one small file")
    parser.add_argument("--repeats", type=int, default=9, help="of each coder")
    parser.add_argument("--out", type=Path, default=_results.RESULTS, help="where results go")
    options = parser.parse_args(arguments)
    if isinstance(problem := _native.load(), str):
        parser.error(f"there is no native coder to compare with: {problem}")
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, tree in cases(options.smoke).items():
            row = measure(tree, Path(folder), 1 if options.smoke else options.repeats)
            figures[name] = row
            write, read = row["write"], row["read"]
            print(
                f"{name}: {row['bytes']:,} bytes; written in {write['native_ms']} ms, "
                f"{write['faster']}x; read in {read['native_ms']} ms, {read['faster']}x"
            )
    same = sum(row["same_bytes"] for row in figures.values())
    results = {
        "command": _results.command("experiments.bench_codec"),
        **_results.environment(),
        "data": "normal weights",
        "settings": {"repeats": options.repeats},
        "figures": figures,
        "targets": [_results.target("files with the same bytes", same, len(figures), "higher")],
    }
    name = "bench_codec-smoke" if options.smoke else "bench_codec"
    print(f"Results: {_results.write_results(name, results, options.out)}")


if __name__ == "__main__":
    main()
