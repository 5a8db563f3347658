"""Projectors: learned linear maps that bring the student's features to the teacher's width.

    params = {"student": student, "projector": init_projector(key, 64, 256)}

One optax chain trains both; `params["student"]` is what is kept. A chain that prunes as well must
leave the projector alone: give `jopt.prune.prune_gradually` a `topk_masks` with
`where="student/.*kernel"`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def init_projector(key: jax.Array, width: int, out: int) -> dict[str, jax.Array]:
    """Return fresh parameters of a linear map of the last axis.

    Kernels are normal with variance `1 / width` (LeCun), biases zero.

    Args:
      key: a random key.
      width: of the student's features.
      out: of the teacher's features.

    Returns:
      `{"kernel": (width, out), "bias": (out,)}`, float32.

    Raises:
      ValueError: a width is below 1.

    Example:
      >>> import jax
      >>> jax.tree.map(lambda leaf: leaf.shape, init_projector(jax.random.key(0), 2, 3))
      {'bias': (3,), 'kernel': (2, 3)}
    """
    if width < 1 or out < 1:
        raise ValueError(f"width and out must be at least 1, not {width} and {out}.")
    kernel = jax.random.normal(key, (width, out), jnp.float32) * width**-0.5
    return {"kernel": kernel, "bias": jnp.zeros((out,), jnp.float32)}


def project(projector: dict[str, jax.Array], features: jax.Array) -> jax.Array:
    """Map the last axis of features: a dense layer, or a 1 by 1 convolution of maps.

    Args:
      projector: of `init_projector`.
      features: floats, (..., width).

    Returns:
      Floats of shape (..., out).

    Raises:
      ValueError: the last axis is not the projector's width.

    Example:
      >>> import jax.numpy as jnp
      >>> both = {"kernel": jnp.array([[1.0, 2.0]]), "bias": jnp.array([0.0, 1.0])}
      >>> print(project(both, jnp.array([[3.0]])))
      [[3. 7.]]

    References:
      Romero et al., "FitNets: Hints for Thin Deep Nets", 2015, https://arxiv.org/abs/1412.6550,
      section 2.2: the regressor.
    """
    kernel, bias = projector["kernel"], projector["bias"]
    if features.ndim == 0 or features.shape[-1] != kernel.shape[0]:
        raise ValueError(
            f"features must have shape (..., {kernel.shape[0]}) for this projector, not "
            f"{features.shape}."
        )
    out = features @ kernel
    return out + bias.reshape((1,) * (out.ndim - 1) + bias.shape)


def resize_maps(features: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Bring maps to another height and width, so that the places of two networks compare.

    Down by averaging where the new size divides the old one, else by linear interpolation with
    anti-aliasing.

    Args:
      features: floats, (examples, height, width, channels).
      size: new height and width.

    Returns:
      Floats of shape (examples, *size, channels).

    Raises:
      ValueError: there are not four axes, `size` is not two numbers, or one is below 1.

    Example:
      >>> import jax.numpy as jnp
      >>> maps = jnp.arange(4.0).reshape(1, 2, 2, 1)
      >>> print(resize_maps(maps, (1, 1)).ravel())
      [1.5]
    """
    if features.ndim != 4:
        raise ValueError(
            f"features must have shape (examples, height, width, channels), not {features.shape}."
        )
    if not isinstance(size, Sequence) or len(size) != 2:
        raise ValueError(f"size must be (height, width), not {size!r}.")
    if min(size) < 1:
        raise ValueError(f"size must be at least 1 by 1, not {size}.")
    examples, height, width, channels = features.shape
    if height % size[0] == 0 and width % size[1] == 0:
        steps = (examples, size[0], height // size[0], size[1], width // size[1], channels)
        return jnp.mean(features.reshape(steps), axis=(2, 4))
    return jax.image.resize(features, (examples, *size, channels), "linear")
