"""PACT: activations clipped at a learned level, then rounded."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jopt._arrays import working_dtype
from jopt.quant._code_ranges import magnitude
from jopt.quant._spec import QuantSpec


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _clip_and_round(values: jax.Array, clip: jax.Array, top: int) -> jax.Array:
    step = clip / top
    return step * jnp.round(jnp.clip(values / step, 0, top))


@_clip_and_round.defjvp
def _clip_and_round_jvp(top: int, primals: Any, tangents: Any) -> Any:
    values, clip = primals
    above = values >= clip
    change, clip_change = tangents
    passed = jnp.where(above, jnp.broadcast_to(clip_change, change.shape), change)
    inside = jnp.where(values >= 0, passed, jnp.zeros_like(passed))
    return _clip_and_round(values, clip, top), inside


@partial(jax.jit, static_argnames="top")
def _pact(values: jax.Array, clip: jax.Array, top: int) -> jax.Array:
    exact = working_dtype(values.dtype)
    rounded = _clip_and_round(values.astype(exact), magnitude(clip.astype(exact)), top)
    return rounded.astype(values.dtype)


def pact(values: ArrayLike, clip: ArrayLike, bits: int) -> jax.Array:
    """Clip activations to a learned level and round them to evenly spaced levels.

    `y = clip(x, 0, alpha)`, `y_q = round(y (2^k - 1) / alpha) alpha / (2^k - 1)`; this takes the
    place of a ReLU. The gradient for x is 1 where `0 <= x < alpha` and 0 elsewhere; that for alpha
    is 1 where `x >= alpha` and 0 elsewhere. So alpha only ever sees what it clips: nothing makes it
    smaller but a penalty, and the paper adds `lambda alpha^2` to the loss with the lambda of the
    weights' own decay. The level used is `|alpha|`, at least the smallest normal float.

    Args:
      values: floating-point array, activations before the ReLU.
      clip: alpha, floating-point: a scalar, or as many axes as `values`, each of size one or as
        many as there.
      bits: k, 1 to 8.

    Returns:
      An array of the shape and dtype of `values`. Its step is `alpha / (2^k - 1)`.

    Raises:
      ValueError: `bits` is out of range, or `clip` does not broadcast against `values`.
      TypeError: one of them is not floating-point.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jopt.quant import pact
      >>> values, clip = jnp.array([-1.0, 0.4, 2.0, 5.0]), jnp.array(3.0)
      >>> pact(values, clip, 2)
      Array([0., 0., 2., 3.], dtype=float32)
      >>> jax.grad(lambda v, c: pact(v, c, 2).sum(), argnums=(0, 1))(values, clip)
      (Array([0., 1., 1., 0.], dtype=float32), Array(1., dtype=float32, weak_type=True))

    References:
      Choi et al., "PACT: Parameterized Clipping Activation for Quantized Neural Networks", 2018,
      https://arxiv.org/abs/1805.06085, equations 1 to 3.
    """
    array, level = jnp.asarray(values), jnp.asarray(clip)
    top = 2 ** QuantSpec(bits).bits - 1  # QuantSpec refuses bits that are out of range
    for name, given in (("values", array), ("clip", level)):
        if not jnp.issubdtype(given.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating-point, not {given.dtype}.")
    fits = level.ndim == array.ndim and all(
        n in (1, size) for n, size in zip(level.shape, array.shape, strict=True)
    )
    if level.ndim and not fits:
        raise ValueError(f"clip of shape {level.shape} does not broadcast to {array.shape}.")
    return _pact(array, level, top)


@jax.jit
def pact_init(values: jax.Array) -> jax.Array:
    """Return the clipping level to start PACT from: the largest of a batch of activations.

    So nothing is clipped at first, as with the large start of the paper, and the penalty brings the
    level down. 1 if nothing is above zero.

    Args:
      values: floating-point array, a batch of activations.

    Returns:
      A scalar of the dtype of `values`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.quant import pact_init
      >>> pact_init(jnp.array([-2.0, 1.5])), pact_init(jnp.array([-2.0]))
      (Array(1.5, dtype=float32), Array(1., dtype=float32))
    """
    largest = jnp.max(values, initial=0)
    return jnp.where(largest > 0, largest, jnp.ones_like(largest))
