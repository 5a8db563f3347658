"""Run a model on compressed parameters, and say what ran how."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend import core

from jopt._arrays import materialize, nbytes
from jopt._leaves import is_compressed
from jopt._trees import flatten_with_paths
from jopt.layers._interpret import How, Record
from jopt.layers._transforms import run_layers
from jopt.layers._uses import Use
from jopt.run._forms import native_here
from jopt.run._plan import NOT_LAID_OUT, Choice, run_use
from jopt.run._prepare import why_not
from jopt.run._uses import RULES, Apply, Found, dense_avals, trace_uses

ACTIVATIONS = ("float", "int8")


class Ran(NamedTuple):
    """What computes one use of a parameter.

    Attributes:
      path: of the parameter.
      kind: `"dot"`, `"conv"` or `"gather"`; empty where no product or gather uses it.
      shape: of the parameter.
      leaf: the class of the leaf; `"array"` for floats.
      nbytes: what the leaf takes in memory.
      form: what computes it.
      why: why its codes are not used as they are; empty where they are, or where it has none.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    leaf: str
    nbytes: int
    form: str
    why: str


class Explanation(NamedTuple):
    """What runs where.

    Attributes:
      backend: of XLA.
      native: why there are no native kernels, or empty.
      rows: one for each way in which a parameter is multiplied or looked up, in order of execution,
        and one for each compressed parameter that is neither.
    """

    backend: str
    native: str
    rows: tuple[Ran, ...]

    def __str__(self) -> str:
        """Write a table."""
        head = ("parameter", "kind", "leaf", "shape", "KiB", "computed by", "why not its codes")
        lines = [head] + [
            (
                row.path,
                row.kind,
                row.leaf,
                "x".join(map(str, row.shape)),
                f"{row.nbytes / 1024:.1f}",
                row.form,
                row.why,
            )
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        text = [
            "  ".join(
                cell.rjust(width) if i == 4 else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        native = f"none: {self.native}" if self.native else "at hand"
        return "\n".join([f"backend {self.backend}; native kernels {native}", *text])


def _check(activations: str) -> None:
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations must be one of {ACTIVATIONS}, not {activations!r}.")


def _found(apply: Apply, params: Any, args: tuple[Any, ...]) -> tuple[Found, dict[str, Any]]:
    """Trace a model; return the uses of its parameters, and its compressed leaves by path."""
    found = trace_uses(apply, dense_avals(params), args)
    paths, leaves, _ = flatten_with_paths(params)
    pairs = zip(paths, leaves, strict=True)
    return found, {path: leaf for path, leaf in pairs if is_compressed(leaf)}


def _run(
    found: Found, leaves: dict[str, Any], values: list[Any], rounded: bool, seen: list[Choice]
) -> Any:
    def visit(
        use: Use, equation: core.JaxprEqn, values: list[Any], extras: dict[str, Any]
    ) -> tuple[list[Any], list[Record]]:
        outs, choice = run_use(use, equation, values, extras.get(use.layer.path), rounded)
        seen.append(choice)
        return outs, []

    trace = found.trace._replace(values=values)
    return run_layers(trace, How(visit, RULES), leaves)[0]


def compressed(apply: Apply, *, activations: str = "float") -> Callable[..., Any]:
    """Make a function that runs a model on compressed parameters, each product in its fastest way.

    y = fast(prepare(apply, params, x), x) is `apply(materialize(params), x)`, the reference. Where
    a product, a convolution or a look-up of rows meets a leaf that `prepare` has laid out, codes
    are used as they are; elsewhere the leaf is restored within the program. Convolutions of floats
    that XLA computes slowly on a CPU run in other ways. What follows a product of most native
    kernels and adds, multiplies by output or bounds (a bias, a batch norm, a residual, relu, relu6)
    is computed with it. Which way is fastest is measured here, once for each shape, and remembered
    (`JOPT_CACHE`, by default the user's cache folder; `JOPT_PROBE=0` takes a fixed preference
    instead). Native kernels are compiled when first needed; without a compiler, or with
    `JOPT_NATIVE=0`, XLA alone does everything.

    Differentiable in the arguments, and in scales and what else is floating-point, as the reference
    is: derivatives are those of the product of floats, straight through where inputs are rounded.

    Args:
      apply: `(params, *args) -> outputs`, any pure function: linen, nnx or plain, with jit, scan,
        remat, vmap and derivatives of its own in it.
      activations: `"float"`: inputs of products stay as they are, and outputs differ from the
        reference by the rounding of float32 sums. `"int8"`: inputs of products with int8, int4 and
        codebook kernels are rounded to int8, in steps of each row's largest magnitude / 127 or in
        the step that `prepare` got: faster, and each output is off by at most half a step times the
        sum of magnitudes of its weights (tables of codebooks are rounded to int8 as well).
        Convolutions with a window keep their inputs.

    Returns:
      A jitted function `(params, *args) -> outputs`; keep it, as each call of `compressed` makes
      one that compiles anew. `params` may be prepared or not, and plain arrays as well.

    Raises:
      TypeError: when called, `apply` is not callable.
      ValueError: `activations` is neither of the two; when called, `params` holds no array.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import quant, run
      >>> apply = lambda params, x: x @ params["w"]
      >>> params = quant.quantize_params({"w": jnp.full((3, 2), 127.0)}, quant.QuantSpec(8))
      >>> x = jnp.ones((1, 3))
      >>> fast = run.compressed(apply)
      >>> fast(run.prepare(apply, params, x), x)
      Array([[381., 381.]], dtype=float32)
    """
    _check(activations)

    @jax.jit
    def fast(params: Any, *args: Any) -> Any:
        found, leaves = _found(apply, params, args)
        values = jax.tree.leaves((materialize(params), args))
        return _run(found, leaves, values, activations == "int8", [])

    return fast


def explain(apply: Apply, params: Any, *args: Any, activations: str = "float") -> Explanation:
    """Say what `compressed` runs where, and why codes are not used where they are not.

    Nothing of the model is computed; ways that have not been measured are.

    Args:
      apply: as for `compressed`.
      params: as for `compressed`.
      *args: arrays or `jax.ShapeDtypeStruct`s.
      activations: as for `compressed`.

    Returns:
      An `Explanation`, which prints as a table. Every compressed leaf is in it.

    Raises:
      TypeError: `apply` is not callable.
      ValueError: as `compressed`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import quant, run
      >>> params = quant.quantize_params({"w": jnp.ones((3, 2))}, quant.QuantSpec(8))
      >>> found = run.explain(lambda params, x: x @ params["w"], params, jnp.ones((1, 3)))
      >>> found.rows[0].form, found.rows[0].why
      ('XLA, dot', 'it is not laid out for products: see jopt.run.prepare')
    """
    _check(activations)
    found, leaves = _found(apply, params, args)
    seen: list[Choice] = []

    def run(params: Any, *args: Any) -> Any:
        compressed_leaves = _found(apply, params, args)[1]
        values = jax.tree.leaves((materialize(params), args))
        return _run(found, compressed_leaves, values, activations == "int8", seen)

    jax.eval_shape(run, params, *args)
    rows = [_row(choice.use.layer.path, choice.use.layer.kind, leaves, choice) for choice in seen]
    used = {row.path for row in rows}
    ends = dict(found.analysis.ends)
    for path, leaf in leaves.items():
        if path not in used:
            why = f"used by {ends[path]}" if path in ends else "never used"
            rows.append(_ran(path, "", leaf, "restored", why))
    layers = found.layers()
    rows = [
        row._replace(why=why_not(leaves[row.path], layers[row.path]) or row.why)
        if row.why == NOT_LAID_OUT
        else row
        for row in rows
    ]
    plain = dict(zip(*flatten_with_paths(params)[:2], strict=True))
    rows = [
        row._replace(nbytes=nbytes(plain[row.path]), shape=tuple(plain[row.path].shape))
        for row in rows
    ]
    return Explanation(jax.default_backend(), native_here() or "", tuple(dict.fromkeys(rows)))


def _row(path: str, kind: str, leaves: dict[str, Any], choice: Choice) -> Ran:
    return _ran(path, kind, leaves.get(path), choice.form, choice.why)


def _ran(path: str, kind: str, leaf: Any, form: str, why: str) -> Ran:
    name = "array" if leaf is None else type(leaf).__name__
    return Ran(path, kind, (), name, 0, form, why)
