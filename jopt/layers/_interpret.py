"""Run a traced function with its layers' inputs seen or changed.

`analyse` follows the parameters' views through a jaxpr without computing anything. `evaluate` runs
the jaxpr equation by equation and lets `visit` run the products of layers. Functions within the
jaxpr (jit, remat, scan, custom derivatives) are opened only if there is a layer inside them;
otherwise their equation is run as it is, so that their derivative rules and boundaries stay.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct as struct
import jax
import jax.numpy as jnp
from jax.extend import core

from jopt.layers._uses import Use, conv_use, dot_use
from jopt.layers._views import VIEW_RULES, View, looped, sliced

Views = list[View | None]
Rules = Mapping[str, Callable[[dict[str, Any], Views], Use | str]]
PRODUCTS: Rules = {"dot_general": dot_use, "conv_general_dilated": conv_use}
REMAT = {"remat", "remat2", "checkpoint"}
CALLS = REMAT | {
    "jit",
    "pjit",
    "core_call",
    "closed_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
}
_ELEMENTWISE_TUPLES = {"device_put", "optimization_barrier"}


@struct.dataclass
class Record:
    """The inputs of one use of a layer, `(leading..., count, features)`.

    Attributes:
      rows: the inputs.
      use: the use that they belong to.
      scans: which of the enclosing scans have still to put their steps in the right axis.
    """

    rows: jax.Array
    use: Use = struct.field(pytree_node=False)
    scans: tuple[bool, ...] = struct.field(pytree_node=False)


class Pending:
    """A value that is computed when it is needed; what follows it may be computed with it.

    `visit` may return one. It stays one only while a single operation reads it.
    """

    def then(self, equation: core.JaxprEqn, values: list[Any]) -> "Pending | None":
        """Return this with an operation after it, or None where the two are computed apart.

        Args:
          equation: the operation.
          values: its inputs, of which this is one.
        """
        raise NotImplementedError

    def value(self) -> Any:
        """Compute it."""
        raise NotImplementedError


Visit = Callable[[Use, core.JaxprEqn, list[Any], dict[str, Any]], tuple[list[Any], list[Record]]]


class How(NamedTuple):
    """What is done with layers.

    Attributes:
      visit: `(use, equation, values, extras) -> (outputs, records)`.
      rules: which operations use a view, by name: how they do, or why they do not.
    """

    visit: Visit
    rules: Rules = PRODUCTS


class Analysis(NamedTuple):
    """What happens to the parameters in a jaxpr or in one equation.

    Attributes:
      uses: the layers, in order of execution.
      ends: `(path, reason)` where a view ended in something that is no layer.
      views: the views that come out.
    """

    uses: list[Use]
    ends: list[tuple[str, str]]
    views: Views


def inner_jaxprs(value: Any) -> list[tuple[core.Jaxpr, list[Any]]]:
    """Return the jaxprs, with their constants, that a parameter of an equation holds."""
    if isinstance(value, core.ClosedJaxpr):
        return [(value.jaxpr, list(value.consts))]
    if isinstance(value, core.Jaxpr):
        return [(value, [])]
    if isinstance(value, (tuple, list)):
        return [pair for item in value for pair in inner_jaxprs(item)]
    return []


def _inner(equation: core.JaxprEqn) -> tuple[core.Jaxpr, list[Any]]:
    """Return the jaxpr that an equation calls, and the constants of it."""
    for value in equation.params.values():
        for pair in inner_jaxprs(value):
            return pair
    raise ValueError(f"{equation.primitive.name} holds no jaxpr.")


def _ended(views: Views, reason: str) -> list[tuple[str, str]]:
    return [(view.path, reason) for view in views if view is not None]


def _scan_views(equation: core.JaxprEqn, views: Views, rules: Rules) -> tuple[Views, Analysis]:
    """Return the views inside a scan's body, and what becomes of them."""
    body, _ = _inner(equation)
    consts = equation.params["num_consts"]
    xs = consts + equation.params["num_carry"]
    inside = [looped(view) for view in views[:xs]] + [sliced(view) for view in views[xs:]]
    while True:
        found = analyse(body, inside, rules)
        carried = found.views[: xs - consts]
        kept = [
            view if view == out else None
            for view, out in zip(inside[consts:xs], carried, strict=True)
        ]
        if kept == inside[consts:xs]:
            break
        inside[consts:xs] = kept  # what the loop changes is no view in its second step
    changed = [view for view, after in zip(views[consts:xs], kept, strict=True) if not after]
    ends = found.ends + _ended(changed, "scan changes it from step to step")
    origin = dict(zip(inside[xs:], views[xs:], strict=True))
    collected = [origin.get(view) for view in found.views[xs - consts :]]
    outs = [view if after else None for view, after in zip(views[consts:xs], kept, strict=True)]
    return inside, Analysis(found.uses, ends, outs + collected)


def _analyse_equation(equation: core.JaxprEqn, views: Views, rules: Rules) -> Analysis:
    name = equation.primitive.name
    nothing: Views = [None] * len(equation.outvars)
    if all(view is None for view in views):
        return Analysis([], [], nothing)
    if name in VIEW_RULES and views[0] is not None:
        view = VIEW_RULES[name](views[0], equation.params)
        return Analysis([], [] if view else _ended(views, name), [view])
    if name in _ELEMENTWISE_TUPLES:
        return Analysis([], [], views)
    if name in rules:
        use = rules[name](equation.params, views)
        if isinstance(use, str):
            return Analysis([], _ended(views, use), nothing)
        return Analysis([use], [], nothing)
    if name == "scan":
        return _scan_views(equation, views, rules)[1]
    if name in CALLS:
        return analyse(_inner(equation)[0], views, rules)
    return Analysis([], _ended(views, name), nothing)


def analyse(jaxpr: core.Jaxpr, views: Sequence[View | None], rules: Rules = PRODUCTS) -> Analysis:
    """Follow views through a jaxpr.

    Args:
      jaxpr: the program.
      views: for each of its inputs a view, or None for what is no parameter.
      rules: which operations use a view, by name: how they do, or why they do not.

    Returns:
      The layers, the ends of other views, and the views among the outputs.
    """
    known = {var: view for var, view in zip(jaxpr.invars, views, strict=True) if view is not None}
    uses: list[Use] = []
    ends: list[tuple[str, str]] = []
    for equation in jaxpr.eqns:
        found = _analyse_equation(equation, _look_up(known, equation.invars), rules)
        uses += found.uses
        ends += found.ends
        known |= _present(equation.outvars, found.views)
    return Analysis(uses, ends, _look_up(known, jaxpr.outvars))


def _variables(atoms: Sequence[Any]) -> list[Any]:
    return [atom for atom in atoms if not isinstance(atom, core.Literal)]


def _look_up(known: dict[Any, View], atoms: Sequence[Any]) -> Views:
    return [None if isinstance(atom, core.Literal) else known.get(atom) for atom in atoms]


def _present(variables: Sequence[Any], views: Sequence[View | None]) -> dict[Any, View]:
    pairs = zip(variables, views, strict=True)
    return {variable: view for variable, view in pairs if view is not None}


def bind(
    equation: core.JaxprEqn, values: Sequence[Any], params: dict[str, Any] | None = None
) -> list[Any]:
    """Run one equation.

    Args:
      equation: which operation.
      values: its inputs.
      params: its parameters, if they are not those of the equation.

    Returns:
      Its outputs.
    """
    bound = equation.primitive.get_bind_params(equation.params if params is None else params)
    functions, named = bound if isinstance(bound, tuple) else ((), bound)  # older jax: a pair
    with equation.ctx.manager:
        out = equation.primitive.bind(*functions, *values, **named)
    return list(out) if equation.primitive.multiple_results else [out]


def _fold(record: Record) -> Record:
    """Put the steps of a finished scan where they belong: a leading axis, or more rows."""
    rows = record.rows
    if not record.scans[-1]:
        rows = jnp.moveaxis(rows, 0, -3)
        *leading, steps, count, features = rows.shape
        rows = rows.reshape(*leading, steps * count, features)
    return Record(rows, record.use, record.scans[:-1])


def _check_leading(extras: dict[str, Any], length: int) -> None:
    for path, extra in extras.items():
        for leaf in jax.tree.leaves(extra):
            if jnp.shape(leaf)[:1] != (length,):
                raise ValueError(
                    f"extras[{path!r}] has shape {jnp.shape(leaf)}; a scan slices this parameter, "
                    f"so the leading axis must have {length} entries."
                )


def _scan(
    equation: core.JaxprEqn, values: list[Any], views: Views, how: How, extras: dict[str, Any]
) -> tuple[list[Any], list[Record]]:
    params = equation.params
    body, body_consts = _inner(equation)
    inside, _ = _scan_views(equation, views, how.rules)
    first, last = params["num_consts"], params["num_consts"] + params["num_carry"]
    sliced_extras = {
        view.path: extras[view.path]
        for view in views[last:]
        if view is not None and view.path in extras
    }
    _check_leading(sliced_extras, params["length"])

    def step(carry: list[Any], scanned: Any) -> tuple[list[Any], Any]:
        slices, slices_of_extras = scanned
        outs, records = evaluate(
            body,
            body_consts,
            [*values[:first], *carry, *slices],
            inside,
            how,
            extras | slices_of_extras,
        )
        return outs[: last - first], (outs[last - first :], records)

    carry, (collected, records) = jax.lax.scan(
        step,
        values[first:last],
        (values[last:], sliced_extras),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return carry + collected, [_fold(record) for record in records]


def _call(
    equation: core.JaxprEqn, values: list[Any], views: Views, how: How, extras: dict[str, Any]
) -> tuple[list[Any], list[Record]]:
    jaxpr, consts = _inner(equation)

    def run(values: list[Any], extras: dict[str, Any]) -> tuple[list[Any], list[Record]]:
        return evaluate(jaxpr, consts, values, views, how, extras)

    if equation.primitive.name in REMAT:
        params = equation.params
        run = jax.checkpoint(run, prevent_cse=params["prevent_cse"], policy=params["policy"])
    return run(values, extras)


def _computed(value: Any) -> Any:
    return value.value() if isinstance(value, Pending) else value


def _joined(equation: core.JaxprEqn, values: list[Any]) -> Pending | None:
    """Return an operation with the pending value that it reads, if they are computed together."""
    pending = next((value for value in values if isinstance(value, Pending)), None)
    return None if pending is None else pending.then(equation, values)


def _run_equation(
    equation: core.JaxprEqn, values: list[Any], views: Views, how: How, extras: dict[str, Any]
) -> tuple[list[Any], list[Record], Views]:
    found = _analyse_equation(equation, views, how.rules)
    name = equation.primitive.name
    if not found.uses:
        return bind(equation, values), [], found.views
    if name in how.rules:
        outs, records = how.visit(found.uses[0], equation, values, extras)
        return outs, records, found.views
    runner = _scan if name == "scan" else _call
    outs, records = runner(equation, values, views, how, extras)
    return outs, records, found.views


def evaluate(
    jaxpr: core.Jaxpr,
    consts: Sequence[Any],
    values: Sequence[Any],
    views: Sequence[View | None],
    how: How,
    extras: dict[str, Any],
) -> tuple[list[Any], list[Record]]:
    """Run a jaxpr and let `how.visit` run the products of its layers.

    Args:
      jaxpr: the program.
      consts: the values of its constants.
      values: the values of its inputs.
      views: for each input a view, or None for what is no parameter.
      how: what runs the products, and which operations are products.
      extras: by path what `visit` may want; sliced by a scan that slices the parameter.

    Returns:
      The outputs, and the records of all layers.
    """
    known = {var: view for var, view in zip(jaxpr.invars, views, strict=True) if view is not None}
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env |= zip(jaxpr.invars, values, strict=True)

    def read(atoms: Sequence[Any]) -> list[Any]:
        return [atom.val if isinstance(atom, core.Literal) else env[atom] for atom in atoms]

    read_by = Counter(atom for equation in jaxpr.eqns for atom in _variables(equation.invars))
    read_by.update(2 * _variables(jaxpr.outvars))  # an output is needed as it is

    records: list[Record] = []
    for equation in jaxpr.eqns:
        values, in_views = read(equation.invars), _look_up(known, equation.invars)
        joined = _joined(equation, values)
        if joined is not None:
            outs, seen, out_views = [joined], [], [None]
        else:
            values = [_computed(value) for value in values]
            outs, seen, out_views = _run_equation(equation, values, in_views, how, extras)
        alone = [read_by[variable] == 1 for variable in equation.outvars]
        outs = [out if one else _computed(out) for out, one in zip(outs, alone, strict=True)]
        records += seen
        env |= zip(equation.outvars, outs, strict=True)
        known |= _present(equation.outvars, out_views)
    return read(jaxpr.outvars), records
