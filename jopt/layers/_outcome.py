"""What a method after training has gained: the error of a layer's outputs on calibration data.

`gram = E[x x^T]` over the inputs of a layer is all that its squared output error needs, so a
method can be judged without running the model again.
"""

import functools
import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jopt._arrays import materialize, working_dtype
from jopt._leaves import RotatedTensor, ScaledTensor
from jopt.layers._calibrate import map_over
from jopt.layers._statistics import InputStatistics

_UNDIVIDED = 512  # features below which halving the product of a symmetric matrix saves nothing


class Unsuited(ValueError):
    """A method has no way for a kernel of this kind; the message says why.

    Over a tree such a kernel is taken the plain way, and the report says so.
    """


class Outcome(NamedTuple):
    """Say what a method after training has gained over the plain way.

    The plain way is round-to-nearest with the same spec, or for methods that prune, magnitude
    pruning to the same sparsity or pattern.

    Attributes:
      error: mean squared output error of the leaf that was returned, summed over outputs; a scalar.
      baseline: the same of the plain way.
      improved: whether the method's error was the lower one. Where it is False the plain way's
        result is what was returned, and `error` equals `baseline`.
    """

    error: jax.Array
    baseline: jax.Array
    improved: jax.Array


def row_axes(shape: tuple[int, ...], features: int) -> int:
    """Return how many leading axes of a kernel are its inputs.

    Raises:
      ValueError: no leading axes have `features` elements and leave an axis for the outputs.

    Example:
      >>> row_axes((3, 3, 8, 16), 72), row_axes((64, 4, 16), 64)
      (3, 1)
    """
    fitting = [axes for axes in range(len(shape)) if math.prod(shape[:axes]) == features]
    if not fitting:
        raise ValueError(
            f"statistics of {features} features fit no leading axes of weights of shape {shape}; "
            "stacked layers are mapped over with jax.vmap."
        )
    return max(fitting)


def to_rows(values: jax.Array, gram: jax.Array) -> jax.Array:
    """Flatten a kernel to a matrix with a row for each feature of its statistics.

    Args:
      values: a kernel, its inputs on the leading axes, its outputs on the others.
      gram: `(features, features)`, or `(groups, features, features)` where the outputs are divided
        into groups, one after the other, with inputs of their own.

    Returns:
      `(features, outputs)`, or `(groups, features, outputs / groups)`.

    Raises:
      ValueError: the shapes do not fit each other.

    Example:
      >>> import jax.numpy as jnp
      >>> to_rows(jnp.ones((3, 3, 1, 8)), jnp.ones((8, 9, 9))).shape
      (8, 9, 1)
    """
    if gram.ndim not in (2, 3) or gram.shape[-1] != gram.shape[-2]:
        raise ValueError(
            "gram must have shape (features, features) or (groups, features, features), not "
            f"{gram.shape}."
        )
    features = gram.shape[-1]
    row_axes(values.shape, features)
    rows = values.reshape(features, -1)
    if gram.ndim == 2:
        return rows
    groups = gram.shape[0]
    if rows.shape[1] % groups:
        raise ValueError(f"{groups} groups do not divide the outputs of shape {values.shape}.")
    return rows.reshape(features, groups, -1).swapaxes(0, 1)


def from_rows(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Undo `to_rows`.

    Example:
      >>> import jax.numpy as jnp
      >>> from_rows(jnp.ones((8, 9, 1)), (3, 3, 1, 8)).shape
      (3, 3, 1, 8)
    """
    return (rows.swapaxes(0, 1) if rows.ndim == 3 else rows).reshape(shape)


def stacked_axes(shape: tuple[int, ...], gram_shape: tuple[int, ...]) -> int:
    """Return how many leading axes of a kernel count layers with statistics of their own.

    Leading axes of the statistics that are not layers are groups. Where both readings fit, layers
    come first.

    Raises:
      ValueError: the statistics fit the kernel in no way.

    Example:
      >>> stacked_axes((12, 64, 32), (12, 64, 64)), stacked_axes((3, 3, 1, 8), (8, 9, 9))
      (1, 0)
    """
    leading, gram = gram_shape[:-2], gram_shape[-2:]
    reason = f"statistics of shape {gram_shape} do not fit a kernel of shape {shape}."
    for depth in range(len(leading), max(len(leading) - 2, -1), -1):
        if leading[:depth] != shape[:depth]:
            continue
        try:
            jax.eval_shape(
                to_rows,
                jax.ShapeDtypeStruct(shape[depth:], "float32"),
                jax.ShapeDtypeStruct((*leading[depth:], *gram), "float32"),
            )
        except ValueError as error:
            reason = str(error)
        else:
            return depth
    raise ValueError(reason)


@functools.lru_cache(maxsize=256)
def mapped(method: Callable[..., Any], options: Hashable, depth: int) -> Callable[..., Any]:
    """Return `method(weights, statistics, options)` compiled once, mapped over stacked layers.

    Args:
      method: what is done to one layer.
      options: its last argument, static.
      depth: how many leading axes of both other arguments count layers.

    Returns:
      A function of weights and statistics, the same one for the same arguments.

    Example:
      >>> mapped(len, 3, 0) is mapped(len, 3, 0)
      True
    """

    def function(weights: jax.Array, statistics: Any) -> Any:
        return method(weights, statistics, options)

    return jax.jit(map_over(function, depth))


def _quadratic_form(delta: jax.Array, gram: jax.Array) -> jax.Array:
    """Return the trace of `delta^T gram delta`, with half of the products: gram is symmetric."""
    features = gram.shape[0]
    if features <= _UNDIVIDED:
        return jnp.sum(delta * jnp.matmul(gram, delta, precision="highest"))
    half = features // 2
    first, last = delta[:half], delta[half:]
    crossed = jnp.sum(first * jnp.matmul(gram[:half, half:], last, precision="highest"))
    squares = _quadratic_form(first, gram[:half, :half]) + _quadratic_form(last, gram[half:, half:])
    return squares + 2 * crossed


def output_error(weights: jax.Array, leaf: Any, statistics: InputStatistics) -> jax.Array:
    """Return the mean squared error that replacing a kernel makes in its layer's outputs.

    `sum over outputs of (w - v)^T gram (w - v)`, w and v the kernels' columns; summed over groups
    where there are any. Rounding can make an error of zero slightly negative.

    Args:
      weights: the kernel W, its inputs on the leading axes.
      leaf: what takes its place, a compressed leaf or an array of the same shape.
      statistics: of the layer's inputs; only `gram` is used.

    Returns:
      A floating-point scalar.

    Raises:
      ValueError: the shapes do not fit each other.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.layers import _statistics
      >>> statistics = _statistics.InputStatistics(
      ...     None, None, None, None, jnp.diag(jnp.array([1.0, 4.0]))
      ... )
      >>> output_error(jnp.array([[1.0], [1.0]]), jnp.array([[0.0], [0.5]]), statistics)
      Array(2., dtype=float32)
    """
    exact = working_dtype(weights.dtype)
    other = materialize(leaf)
    if other.shape != weights.shape:
        raise ValueError(f"leaf has shape {other.shape}, and weights {weights.shape}.")
    gram = statistics.gram.astype(exact)
    delta = to_rows(weights.astype(exact) - other.astype(exact), gram)
    if gram.ndim == 2:
        return _quadratic_form(delta, gram)
    return jax.vmap(_quadratic_form)(delta, gram).sum()


def _in_the_form_of(leaf: Any, form: Any) -> Any:
    """Wrap round-to-nearest as the method wraps its result, changing nothing."""
    if type(leaf) is type(form):
        return leaf
    if isinstance(form, ScaledTensor):
        return ScaledTensor(_in_the_form_of(leaf, form.tensor), jnp.ones_like(form.factor))
    if isinstance(form, RotatedTensor):  # signs of zero mean that nothing was rotated
        return RotatedTensor(_in_the_form_of(leaf, form.tensor), jnp.zeros_like(form.signs))
    raise TypeError(
        f"a {type(leaf).__name__} cannot take the place of a {type(form).__name__}: both outcomes "
        "need one structure under jit."
    )


def keep_lower(
    candidate: Any, nearest: Any, error: jax.Array, baseline: jax.Array
) -> tuple[Any, Outcome]:
    """Return the leaf with the lower of two errors, as `keep_better` does with the output error.

    Example:
      >>> import jax.numpy as jnp
      >>> keep_lower(jnp.ones(1), jnp.zeros(1), jnp.float32(jnp.nan), jnp.float32(3.0))[0]
      Array([0.], dtype=float32)
    """
    nearest = _in_the_form_of(nearest, candidate)
    improved = error < baseline
    leaf = jax.tree.map(lambda new, old: jnp.where(improved, new, old), candidate, nearest)
    return leaf, Outcome(jnp.where(improved, error, baseline), baseline, improved)


def keep_better(
    weights: jax.Array, candidate: Any, nearest: Any, statistics: InputStatistics
) -> tuple[Any, Outcome]:
    """Return what a method made, or round-to-nearest where that is no worse.

    An error that is not a number counts as worse.

    Args:
      weights: the kernel.
      candidate: the compressed leaf of the method.
      nearest: that of round-to-nearest, of the same class and dtypes; where the method has scaled
        the inputs (`ScaledTensor`) it is given factors of one, where it has rotated them
        (`RotatedTensor`) signs of zero.
      statistics: of the layer's inputs.

    Returns:
      The leaf, in the form of `candidate`, and its `Outcome`.

    Raises:
      TypeError: the two leaves have different forms.
      ValueError: the shapes do not fit each other.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import quant
      >>> from jopt.layers import _statistics
      >>> weights, spec = jnp.array([[1.0], [0.4]]), quant.QuantSpec(2)
      >>> statistics = _statistics.InputStatistics(None, None, None, None, jnp.eye(2))
      >>> nearest = quant.quantize(weights, spec)
      >>> keep_better(weights, nearest, nearest, statistics)[1].improved
      Array(False, dtype=bool)
    """
    error = output_error(weights, candidate, statistics)
    baseline = output_error(weights, nearest, statistics)
    return keep_lower(candidate, nearest, error, baseline)
