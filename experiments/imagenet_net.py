"""EfficientNet-Lite0, trained on ImageNet, quantized after training: does it say what it said?

    python -m experiments.imagenet_net                       # three draws of crops
    python -m experiments.imagenet_net --smoke               # a trial in two minutes

Batch norms are folded. Weights get 8 or 4 bits, with one scale for a kernel or one for each of its
outputs, inputs of layers 8 bits in ranges fixed beforehand or none. Cross-layer equalization,
bias correction, HQQ and GPTQ are added one at a time: depthwise kernels, whose channels differ a
hundredfold once batch norms are folded into them, are what they are for.

There are 20 photos with labels. Some are cut at random into views that set ranges and statistics,
the others into views on which the quantized network is compared with the float one: how often the
first answers agree, and the ratio of signal to noise of the logits. Nothing is chosen by them.
Finished rows are kept: a killed run goes on where it was.
"""

import dataclasses
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

import jopt
from experiments import (
    _checkpoint,
    _compress,
    _data,
    _efficientnet,
    _imagenet_report,
    _parts,
    _results,
    _rows,
)
from jopt import layers, quant

Tree = Any
KERNELS = "params/.*/kernel"
INPUTS = quant.QuantSpec(8, (), grid=quant.affine_zero)
SURE_DB, SURE_AGREEMENT = 25.0, 0.97  # of W8A8 with a scale for each output


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides the outcome, written into the results."""

    seeds: tuple[int, ...] = (0, 1, 2)
    calibrating: int = 10  # photos
    calibrating_crops: int = 16  # views of each
    crops: int = 16  # views of each of the other photos
    batch: int = 16
    max_rows: int = 2048  # of a layer's inputs in a batch, for statistics


@dataclasses.dataclass(frozen=True)
class Row:
    """One way of quantizing.

    Attributes:
      bits: of weights.
      block: `()` for one scale for a kernel, `(1,)` for one for each output.
      inputs: whether inputs of layers have 8 bits.
      equalized: whether channels are equalized before.
      method: None to round to nearest, or a method after training.
      corrected: whether biases are corrected after.
    """

    bits: int
    block: tuple[int, ...]
    inputs: bool
    equalized: bool = False
    method: Any = None
    corrected: bool = False

    @property
    def form(self) -> str:
        """Return what has how many bits."""
        scales = "a scale for each output" if self.block else "one scale"
        return f"W{self.bits}{'A8' if self.inputs else ''}, {scales}"

    @property
    def how(self) -> str:
        """Return what is done beside rounding."""
        parts = [
            "equalized" * self.equalized,
            getattr(self.method, "__name__", "").upper(),
            "biases corrected" * self.corrected,
        ]
        return ", ".join(filter(None, parts)) or "rounded"


ROWS = (
    Row(8, (), True),
    Row(8, (), True, corrected=True),
    Row(8, (), True, equalized=True),
    Row(8, (), True, equalized=True, corrected=True),
    Row(8, (1,), False),
    Row(8, (1,), True),
    Row(8, (1,), True, equalized=True, corrected=True),
    Row(8, (1,), True, corrected=True),
    Row(8, (1,), True, method=quant.gptq, corrected=True),
    Row(4, (1,), False),
    Row(4, (1,), False, corrected=True),
    Row(4, (1,), False, equalized=True, corrected=True),
    Row(4, (1,), False, method=quant.hqq, corrected=True),
    Row(4, (1,), False, method=quant.gptq),
    Row(4, (1,), False, method=quant.gptq, corrected=True),
    Row(4, (1,), True, method=quant.gptq, corrected=True),
)
TRIED = (ROWS[0], ROWS[5])  # in a trial
BEST = ROWS[8]  # everything that helps a layer with a scale for each output


class Run:
    """The network, folded, and what both versions of it need; views are drawn by a seed."""

    def __init__(self, settings: Settings, work: Path, say: Any) -> None:
        """Load the network and the photos."""
        self.settings, self.say = settings, say
        model, variables = _efficientnet.load()
        self.photos, self.labels = _efficientnet.photos()
        self.model, self.folded = _efficientnet.fold(model, variables)
        about = [jopt.__version__, dataclasses.asdict(settings) | {"seeds": None}]
        self.work = work / _checkpoint.digest(about)
        self.quantized = quant.quantize_inputs(self.apply, INPUTS)
        self.plain = jax.jit(self.apply)

    def apply(self, variables: Tree, images: Array) -> Array:
        """Return logits."""
        return self.model.apply(variables, images)  # pyright: ignore[reportReturnType]

    @cached_property
    def versions(self) -> dict[bool, Tree]:
        """Return the folded network as it is, and equalized."""
        return {False: self.folded, True: _efficientnet.equalize(self.folded)}


class Views:
    """What one seed draws, and what calibration makes of it."""

    def __init__(self, run: Run, seed: int) -> None:
        """Draw views."""
        self.run, settings = run, run.settings
        drawn = np.random.default_rng(seed)
        order = drawn.permutation(len(run.photos))
        few, others = order[: settings.calibrating], order[settings.calibrating :]
        self.seen = _batches(
            _efficientnet.crops(drawn, few, settings.calibrating_crops), settings.batch
        )
        self.images = _batches(_efficientnet.crops(drawn, others, settings.crops), settings.batch)
        self.known: dict[Any, Any] = {}

    def statistics(self, equalized: bool) -> dict[str, layers.InputStatistics]:
        """Return the statistics of the inputs of every layer."""
        run = self.run
        if ("statistics", equalized) not in self.known:
            self.known["statistics", equalized] = layers.calibrate(
                run.apply, run.versions[equalized], self.seen, max_rows=run.settings.max_rows
            )
        return self.known["statistics", equalized]

    def ranges(self, equalized: bool) -> dict[str, Any]:
        """Return the range of the inputs of every layer."""
        run = self.run
        if ("ranges", equalized) not in self.known:
            self.known["ranges", equalized] = quant.activation_ranges(
                run.apply,
                run.versions[equalized],
                self.seen,
                INPUTS,
                max_rows=run.settings.max_rows,
            )
        return self.known["ranges", equalized]

    @cached_property
    def whole(self) -> np.ndarray:
        """Return the logits of the float network."""
        return self.logits(self.run.folded, None)

    def logits(self, variables: Tree, ranges: Any) -> np.ndarray:
        """Return logits of all views, with inputs of layers quantized in given ranges."""
        run = self.run
        found = [
            run.plain(variables, each) if ranges is None else run.quantized(variables, ranges, each)
            for each in self.images
        ]
        return np.concatenate([np.asarray(each) for each in found])


def _batches(images: np.ndarray, batch: int) -> list[Array]:
    """Cut views into full batches; what is left over is left out."""
    batch = min(batch, len(images))
    return [
        _efficientnet.normalize(images[at : at + batch])
        for at in range(0, len(images) - batch + 1, batch)
    ]


def quantized(row: Row, views: Views) -> tuple[Tree, list[str]]:
    """Quantize the network; also says which kernels were rounded though a method was wanted."""
    variables = views.run.versions[row.equalized]
    spec = quant.QuantSpec(row.bits, row.block)
    lost: list[str] = []
    if row.method is None:
        tree = quant.quantize_params(variables, spec, KERNELS)
    else:
        tree, report = quant.quantize_calibrated_params(
            variables, views.statistics(row.equalized), spec, row.method, KERNELS
        )
        lost = [path for path, entry in report.items() if isinstance(entry, str)]
    if row.corrected:
        tree, report = quant.correct_biases(variables, tree, views.statistics(row.equalized))
        lost += [path for path, entry in report.items() if not entry.endswith("/bias")]
    return tree, lost


def compared(whole: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    """Compare logits with the float network's: agreement of answers, and signal to noise in dB."""
    noise = float(np.sum((whole - logits).astype(np.float64) ** 2))
    signal = float(np.sum(whole.astype(np.float64) ** 2))
    return {
        "agreement": round(float(np.mean(whole.argmax(1) == logits.argmax(1))), 6),
        "sqnr_db": round(10 * np.log10(signal / max(noise, 1e-30)), 4),
    }


def measure(run: Run, rows: tuple[Row, ...], seed: int) -> list[dict[str, Any]]:
    """Make and compare every network of one seed that is not among the finished ones."""
    done = _rows.Rows(run.work / f"rows-{seed}.json", ("form", "how"))
    views = Views(run, seed)

    def make(row: Row) -> dict[str, Any]:
        tree, lost = quantized(row, views)
        size, variables = _compress.written(tree, run.work / "packed.jopt")
        logits = views.logits(variables, views.ranges(row.equalized) if row.inputs else None)
        found = compared(views.whole, logits)
        run.say(
            f"seed {seed}: {row.form}, {row.how}: {size:,} bytes, "
            f"{found['agreement']:.1%} agree, {found['sqnr_db']:.1f} dB"
        )
        return {"bytes": size, "left": lost} | found

    for row in rows:
        done.add({"form": row.form, "how": row.how}, partial(make, row))
    return done.list()


def joined(by_seed: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Join the rows of all seeds."""
    found = []
    for own in zip(*by_seed, strict=True):
        lists = {key: [row[key] for row in own] for key in ("bytes", "agreement", "sqnr_db")}
        means = {
            f"mean_{key}": round(float(np.mean(lists[key])), 6) for key in ("agreement", "sqnr_db")
        }
        found.append({key: own[0][key] for key in ("form", "how", "left")} | lists | means)
    return found


def targets_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Hold W8A8 against what is asked for, and say what equalizing and correcting gain."""
    by_name = {(row["form"], row["how"]): row for row in rows}
    form, one = BEST.form, ROWS[0].form
    best = by_name[form, BEST.how]
    whole = by_name[one, ROWS[0].how]["mean_sqnr_db"]
    gains = {row.how: by_name[one, row.how]["mean_sqnr_db"] - whole for row in ROWS[1:4]}
    words = f"{form}, {best['how']}"
    return [
        _results.target(f"{words}: SQNR, dB", best["mean_sqnr_db"], SURE_DB, "higher"),
        _results.target(f"{words}: agreement", best["mean_agreement"], SURE_AGREEMENT, "higher"),
        *(
            _results.target(f"{one}: dB gained by {how}", round(gain, 4), 0.0, "higher")
            for how, gain in gains.items()
        ),
    ]


def run(call: _parts.Call) -> dict[str, Any]:
    """Run or resume the experiment; returns its tag, data, settings, figures and targets."""
    if call.dataset is not None:
        raise SystemExit("imagenet_net has its own photos, of the package foolbox: no --dataset.")
    settings, rows = Settings(seeds=call.seeds), ROWS
    if call.head is not None:
        rows = TRIED
        settings = dataclasses.replace(
            settings, calibrating=1, calibrating_crops=2, crops=1, batch=2
        )
    try:
        each = Run(settings, call.work, call.console.print)
    except (_data.DataUnavailable, ValueError) as problem:
        raise SystemExit(str(problem)) from None
    found = joined([measure(each, rows, seed) for seed in call.seeds])
    logits = each.plain(each.folded, _efficientnet.normalize(each.photos))
    right = int((np.asarray(logits).argmax(1) == each.labels).sum())
    targets = [] if call.head is not None else targets_of(found)
    _imagenet_report.table(found, targets, call.console)
    _imagenet_report.plot(found, call.plot("head" if call.head is not None else ""))
    return {
        "tag": "head" if call.head is not None else "",
        "data": {"name": "foolbox", "source": "20 photos of ImageNet, of the package foolbox"},
        "settings": dataclasses.asdict(settings),
        "figures": {"rows": found, "photos_right_of_20": right},
        "targets": targets,
    }


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    words = "not taken: the photos are those of the package foolbox"
    _parts.main("imagenet_net", {"photos": run}, words, arguments)


if __name__ == "__main__":
    main()
