"""A teacher's answers in few bytes: its k best classes, each in eight bits, and the rest as one."""

import jax
import jax.numpy as jnp
from flax import struct

from jopt.distill._checks import Scalar, check_positive, check_range
from jopt.distill._divergences import log_distribution

_LEVELS = 255
_LOWEST = -100.0  # log-probability: e^-100 is zero to float32


@struct.dataclass
class TopKLogits:
    """The k highest classes of every example, with quantized log-probabilities.

    A plain pytree of arrays: it can be stored, indexed by example (`jax.tree.map(lambda leaf:
    leaf[rows], top)`), scanned over and passed through jit. An example takes `3 k + 8` bytes where
    classes fit 16 bits; full float32 logits take `4 classes`.

    Attributes:
      indices: uint16, or uint32 for more than 65,536 classes, (..., k); highest first.
      codes: uint8, (..., k); log-probability = -step * code.
      step: float32, (...).
      rest: float32, (...), the log-probability of all other classes together; -inf if there are
        none.
    """

    indices: jax.Array
    codes: jax.Array
    step: jax.Array
    rest: jax.Array


def top_k_logits(teacher_logits: jax.Array, k: int, temperature: Scalar = 1.0) -> TopKLogits:
    """Keep the k most probable classes of every example in eight bits each.

    The log-probabilities of the softened distribution are divided by `step`, a 255th of the lowest
    kept, and rounded: an error of at most `step / 2` each. One below -100, such as that of a class
    forbidden by a logit of -inf, is kept as -100, so that it does not coarsen the others. What all
    the other classes have together is kept exactly.

    Args:
      teacher_logits: floats, (..., classes).
      k: classes to keep, 1 to classes.
      temperature: positive; the distribution that is stored is the softened one, so that the rest
        is right for the loss it is used in.

    Returns:
      A `TopKLogits`.

    Raises:
      ValueError: k is out of range, or a known temperature is not positive.
      TypeError: k is no whole number.

    Example:
      >>> import jax.numpy as jnp
      >>> top = top_k_logits(jnp.log(jnp.array([0.5, 0.125, 0.25, 0.125])), k=2)
      >>> print(top.indices, top.codes, jnp.exp(top.rest).round(4))
      [0 2] [128 255] 0.25

    References:
      Sparse teacher logits as in Anshumann et al., "Sparse Logit Sampling: Accelerating Knowledge
      Distillation in LLMs", 2025, https://arxiv.org/abs/2503.16870, who discuss what is lost.
    """
    classes = teacher_logits.shape[-1] if teacher_logits.ndim else 0
    if not isinstance(k, int):
        raise TypeError(f"k must be a whole number, not {k!r}.")
    if not 1 <= k <= classes:
        raise ValueError(f"k must lie between 1 and the {classes} classes, not {k}.")
    check_positive("temperature", temperature)
    log_probs = log_distribution(teacher_logits, temperature).astype(jnp.float32)
    values, indices = jax.lax.top_k(log_probs, k)
    values = jnp.maximum(values, _LOWEST)
    step = jnp.maximum(-values[..., -1] / _LEVELS, jnp.finfo(jnp.float32).tiny)
    codes = jnp.round(-values / step[..., None])
    others = jnp.put_along_axis(log_probs, indices, -jnp.inf, axis=-1, inplace=False)
    rest = jax.nn.logsumexp(others, axis=-1)
    small = jnp.uint16 if classes <= 65536 else jnp.uint32
    return TopKLogits(indices.astype(small), codes.astype(jnp.uint8), step, rest)


def expand_top_k(top: TopKLogits, classes: int) -> jax.Array:
    """Return logits over all classes; those that were not kept share the rest evenly.

    Args:
      top: of `top_k_logits`.
      classes: number of classes, as it was then.

    Returns:
      Float32 log-probabilities, (..., classes), at the temperature they were stored with. To use
      them in a loss of that temperature, multiply them by it.

    Raises:
      ValueError: there are fewer classes than were kept, or a known index of one is no class.

    Example:
      >>> import jax.numpy as jnp
      >>> top = top_k_logits(jnp.log(jnp.array([0.5, 0.125, 0.25, 0.125])), k=2)
      >>> print(jnp.exp(expand_top_k(top, 4)).round(3))
      [0.499 0.125 0.25  0.125]
    """
    k = top.indices.shape[-1]
    if classes < k:
        raise ValueError(f"classes must be at least the {k} that were kept, not {classes}.")
    check_range("top.indices", top.indices, classes)
    values = -top.step[..., None] * top.codes.astype(jnp.float32)
    if classes == k:
        filled = jnp.full((*top.rest.shape, classes), -jnp.inf, jnp.float32)
    else:
        share = top.rest - jnp.log(float(classes - k))
        filled = jnp.broadcast_to(share[..., None], (*share.shape, classes))
    places = top.indices.astype(jnp.int32)
    return jnp.put_along_axis(filled, places, values, axis=-1, inplace=False)
