"""Run calibration data through a model and gather what its layers see."""

import itertools
from collections.abc import Callable, Hashable, Iterable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from jopt.layers._statistics import Statistic, input_statistics
from jopt.layers._transforms import find_layers, layer_inputs
from jopt.layers._uses import Layer

Apply = Callable[..., Any]
Arrange = Callable[[Layer, jax.Array], jax.Array]


def map_over(function: Callable[..., Any], axes: int) -> Callable[..., Any]:
    """Map a function over that many leading axes of all its arguments."""
    for _ in range(axes):
        function = jax.vmap(function)
    return function


def leading_axes(statistic: Statistic, state: Any) -> int:
    """Return how many axes of stacked layers and groups come before those of one state."""
    plain = jax.tree.leaves(jax.eval_shape(lambda: statistic.init(1)))
    return jnp.ndim(jax.tree.leaves(state)[0]) - plain[0].ndim if plain else 0


def shared_axes(layer: Layer) -> tuple[int, ...] | None:
    """Return the sizes of the leading axes whose layers are all given one and the same input.

    They come from `vmap` over the kernel and not over the input, or from an einsum with an axis of
    heads in front of the inputs, and count as stacked layers. None if the kernel's axes are not
    stacked layers, inputs and outputs in this order, as where an embedding is used transposed.

    Example:
      >>> from jopt.layers import find_layers
      >>> def size(equation, *shape):
      ...     apply = lambda params, x: jnp.einsum(equation, x, params["w"])
      ...     found = find_layers(apply, {"w": jnp.ones(shape)}, jnp.ones((2, 8)))
      ...     return shared_axes(found.layers["w"][0])
      >>> size("bi,io->bo", 8, 5), size("bi,hio->bho", 4, 8, 5), size("bi,vi->bv", 9, 8)
      ((), (4,), None)
    """
    layers, inputs, last = len(layer.batch), layer.contracted, len(layer.shape) - 1
    if (
        layer.batch != tuple(range(layers))
        or inputs != tuple(range(inputs[0], inputs[0] + len(inputs)))
        or last in inputs
        or layer.grouped not in (None, last)
    ):
        return None
    return layer.shape[layers : inputs[0]]


def as_recorded(layer: Layer, rows: jax.Array) -> jax.Array:
    """Keep the leading axes of recorded rows: each stacked layer and group by itself."""
    del layer
    return rows


def scans_only(layer: Layer, rows: jax.Array) -> jax.Array:
    """Keep only the axes of scans; copies made by `vmap` and groups share one range.

    Example:
      >>> import jax.numpy as jnp
      >>> layer = Layer("w", "dot", (2, 5, 3), (1,), (0,), (), 1, None, (2,), None)
      >>> scans_only(layer, jnp.ones((2, 7, 5))).shape
      (14, 5)
    """
    leading = rows.ndim - 2
    kept = [i for i, axis in enumerate(layer.batch) if axis in layer.scanned]
    shared = [i for i in range(leading) if i not in kept]
    rows = rows.transpose(*kept, *shared, leading, leading + 1)
    return rows.reshape(*rows.shape[: len(kept)], -1, rows.shape[-1])


def subsample(rows: jax.Array, max_rows: int | None) -> jax.Array:
    """Take evenly spaced rows, the same ones every time."""
    count = rows.shape[-2]
    if max_rows is None or count <= max_rows:
        return rows
    stride = -(-count // max_rows)
    return rows[..., ::stride, :]


def _rows_function(apply: Apply, arrange: Arrange, max_rows: int | None) -> Callable[..., Any]:
    inputs = layer_inputs(apply)

    def rows_by_path(params: Any, *args: Any) -> dict[str, jax.Array]:
        recorded = inputs(params, *args)
        if arrange is not as_recorded:
            layers = find_layers(apply, params, *args).layers
            recorded = {path: arrange(layers[path][0], rows) for path, rows in recorded.items()}
        return {path: subsample(rows, max_rows) for path, rows in recorded.items()}

    return rows_by_path


def _start(statistic: Statistic, shapes: dict[str, Any]) -> Any:
    """Return a state for each layer, and for each the number of its first bad batch: -1, none."""

    def state(shape: tuple[int, ...]) -> Any:
        one = statistic.init(shape[-1])
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, shape[:-2] + leaf.shape), one)

    states = {path: state(rows.shape) for path, rows in shapes.items()}
    return states, {path: jnp.full((), -1, jnp.int32) for path in shapes}


def _step_function(statistic: Statistic, rows_by_path: Callable[..., Any]) -> Callable[..., Any]:
    def step(carry: Any, index: jax.Array, params: Any, *args: Any) -> Any:
        states, spoiled = dict(carry[0]), dict(carry[1])
        for path, rows in rows_by_path(params, *args).items():
            finite = jnp.all(jnp.isfinite(rows))
            first = (spoiled[path] < 0) & ~finite
            spoiled[path] = jnp.where(first, index, spoiled[path])
            states[path] = map_over(statistic.update, rows.ndim - 2)(states[path], rows)
        return states, spoiled

    return jax.jit(step, donate_argnums=0)


@lru_cache(8)
def _shared(
    apply: Apply, arrange: Arrange, max_rows: int | None, statistic: Statistic
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the function of rows and the compiled step, for equal arguments the same.

    So that a second look at a model, with other parameters or data, compiles nothing.
    """
    rows_by_path = _rows_function(apply, arrange, max_rows)
    return rows_by_path, _step_function(statistic, rows_by_path)


def _refuse_no_layers(apply: Apply, params: Any, args: tuple[Any, ...]) -> None:
    others = find_layers(apply, params, *args).others
    reasons = "; ".join(f"{path}: {reason}" for path, reason in others.items())
    raise ValueError(
        "apply uses no parameter as the kernel of a layer"
        + (f" ({reasons})." if reasons else ": no parameter has two or more axes.")
    )


def accumulate(
    apply: Apply,
    params: Any,
    batches: Iterable[Any],
    statistic: Statistic = input_statistics,
    max_rows: int | None = None,
    arrange: Arrange = as_recorded,
) -> dict[str, Any]:
    """Gather the states of a statistic of every layer's inputs, to be merged with other shards'.

    Args:
      apply: as for `calibrate`.
      params: as for `calibrate`.
      batches: as for `calibrate`.
      statistic: as for `calibrate`.
      max_rows: as for `calibrate`.
      arrange: `(layer, rows) -> rows`, which leading axes have states of their own:
        `as_recorded` or `scans_only`.

    Returns:
      `{path: state}`; `merge_states` joins those of two shards, `finalise_states` gives figures.

    Raises:
      ValueError: as `calibrate`.
      TypeError: as `calibrate`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.layers import extremes
      >>> apply, params = lambda params, x: x @ params["w"], {"w": jnp.ones((1, 2))}
      >>> first = accumulate(apply, params, [jnp.array([[1.0]])], extremes)
      >>> second = accumulate(apply, params, [jnp.array([[-4.0]])], extremes)
      >>> finalise_states(extremes, merge_states(extremes, first, second))["w"].low
      Array(-4., dtype=float32)
    """
    if not isinstance(statistic, Statistic):
        raise TypeError(f"statistic must be a Statistic, not {statistic!r}.")
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows must be at least 1 or None, not {max_rows!r}.")
    make = _shared if isinstance(apply, Hashable) else _shared.__wrapped__
    rows_by_path, step = make(apply, arrange, max_rows, statistic)
    carry = None
    for index, batch in enumerate(batches):
        args = batch if isinstance(batch, tuple) else (batch,)
        if carry is None:
            shapes = jax.eval_shape(rows_by_path, params, *args)
            if not shapes:
                _refuse_no_layers(apply, params, args)
            # Compiled, so that no two arrays share a buffer: they are donated.
            carry = jax.jit(lambda shapes=shapes: _start(statistic, shapes))()
        carry = step(carry, jnp.int32(index), params, *args)
    if carry is None:
        raise ValueError("batches must hold at least one batch: there is nothing to calibrate on.")
    states, spoiled = carry
    for path, index in jax.device_get(spoiled).items():
        if index >= 0:
            raise ValueError(
                f"{path}: the inputs of this layer must be finite, but there is a NaN or an "
                f"infinity in batch {index}."
            )
    return states


@partial(jax.jit, static_argnames="statistic")
def _merge_states(statistic: Statistic, first: Any, second: Any) -> dict[str, Any]:
    return {
        path: map_over(statistic.merge, leading_axes(statistic, state))(state, second[path])
        for path, state in first.items()
    }


def merge_states(
    statistic: Statistic, first: dict[str, Any], second: dict[str, Any]
) -> dict[str, Any]:
    """Join the states that two shards of the data gave; see `accumulate`.

    Args:
      statistic: what both were gathered with.
      first: states by path.
      second: states of the same layers; of the later data, for a statistic that minds the order.

    Returns:
      States by path.

    Raises:
      ValueError: the shards have different layers.
    """
    if first.keys() != second.keys():
        raise ValueError(
            f"both shards must have the same layers, not {sorted(first)} and {sorted(second)}."
        )
    return _merge_states(statistic, first, second)


@partial(jax.jit, static_argnames="statistic")
def finalise_states(statistic: Statistic, states: dict[str, Any]) -> dict[str, Any]:
    """Turn gathered states into figures; see `accumulate`.

    Args:
      statistic: what they were gathered with.
      states: by path.

    Returns:
      Figures by path.
    """
    return {
        path: map_over(statistic.finalise, leading_axes(statistic, state))(state)
        for path, state in states.items()
    }


def calibrate(
    apply: Apply,
    params: Any,
    batches: Iterable[Any],
    statistic: Statistic = input_statistics,
    max_rows: int | None = None,
) -> dict[str, Any]:
    """Run data through a model and describe the inputs of each of its layers.

    One jitted step a batch; the inputs themselves are never kept. Batches of one shape compile
    once, and each other shape once more; a later call with the same `apply` compiles nothing, so
    define it once. Which parameters are layers, and why others are not, is
    what `find_layers(apply, params, *args)` says: none is passed over in silence.

    Args:
      apply: `(params, *args) -> outputs`, any pure function.
      params: its parameters, plain arrays.
      batches: an iterable of batches; a tuple holds the `*args` of apply, anything else is its one
        argument.
      statistic: what to gather: `input_statistics` for the methods after training, `extremes`,
        `moving_average(m)` or `histogram(bins)` for ranges, or any `Statistic`.
      max_rows: if given, about so many evenly spaced rows (positions) of each batch are used, at
        most, for each layer: less time where convolutions have many positions.

    Returns:
      `{path: figures}`; in the figures of stacked layers, of copies made by `vmap` and of groups of
      a convolution these come first, as leading axes. A kernel whose axes are not stacked layers,
      inputs and outputs, in this order, is left out, such as an embedding that is used transposed:
      the methods after training would take its figures for those of other inputs. `accumulate`
      keeps it.

    Raises:
      ValueError: there is no batch, no layer, or a layer's inputs hold NaN or infinity; the message
        names the layer and the batch.
      TypeError: `statistic` is not a `Statistic`, or `apply` is not callable.

    Example:
      >>> import jax.numpy as jnp
      >>> apply, params = lambda params, x: x @ params["w"], {"w": jnp.ones((2, 3))}
      >>> figures = calibrate(apply, params, [jnp.array([[1.0, -4.0]]), jnp.array([[3.0, 2.0]])])
      >>> figures["w"].mean, figures["w"].abs_max
      (Array([ 2., -1.], dtype=float32), Array([3., 4.], dtype=float32))
    """
    remaining = iter(batches)
    batches = list(itertools.islice(remaining, 1))
    states = accumulate(apply, params, itertools.chain(batches, remaining), statistic, max_rows)
    args = batches[0] if isinstance(batches[0], tuple) else (batches[0],)
    layers = find_layers(apply, params, *args).layers
    figures = {}
    for path, each in finalise_states(statistic, states).items():
        layer = layers[path][0]
        shared = shared_axes(layer)
        if shared is not None:
            figures[path] = _repeated(each, len(layer.batch), shared)
    return figures


def _repeated(figures: Any, axis: int, sizes: tuple[int, ...]) -> Any:
    """Give the figures of layers that share their inputs new axes of these sizes."""
    if not sizes:
        return figures

    def repeat(field: jax.Array) -> jax.Array:
        leading, rest = field.shape[:axis], field.shape[axis:]
        field = field.reshape(*leading, *(1 for _ in sizes), *rest)
        return jnp.broadcast_to(field, (*leading, *sizes, *rest))

    return jax.tree.map(repeat, figures)
