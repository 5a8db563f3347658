"""Second-order scores with the diagonal of the empirical Fisher matrix in place of the Hessian."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jopt._arrays import working_dtype
from jopt.prune._scores import map_products, split_floating


def fisher_scores(params: Any, squared_gradients: Any) -> Any:
    """Score every weight by how much the loss grows without it, to second order: `w^2 E[g^2] / 2`.

    Optimal brain damage takes the diagonal h of the Hessian at a minimum, `h w^2 / 2`. Here h is
    the mean of the squared gradients of single examples, the diagonal of the empirical Fisher
    matrix, which equals the Hessian's on average where the model's probabilities are those of the
    data.

    Args:
      params: any pytree of arrays.
      squared_gradients: a tree of the same structure, of `E[g^2]`, as `squared_gradients` gives it.

    Returns:
      A tree of scores in float32 or wider; infinity for leaves that are not floating-point.

    Raises:
      ValueError: the trees differ in paths or shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> fisher_scores({"w": jnp.array([2.0, -1.0])}, {"w": jnp.array([0.5, 6.0])})
      {'w': Array([1., 3.], dtype=float32)}

    References:
      LeCun, Denker, Solla, "Optimal Brain Damage", 1989,
      https://papers.nips.cc/paper/1989/hash/6c9882bbac1c7093bd25041881277658-Abstract.html,
      section 2.
      Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018,
      https://arxiv.org/abs/1801.05787, section 2.
    """
    return map_products(lambda w, h: jnp.square(w) * h / 2, params, squared_gradients)


@partial(jax.jit, static_argnames=("loss", "chunk"))
def squared_gradients(
    loss: Callable[..., jax.Array], params: Any, *examples: Any, chunk: int = 32
) -> Any:
    """Average the squared gradients of single examples, `E[g^2]`, by weight.

    The gradient of a batch's mean loss will not do: its square is smaller by up to the size of the
    batch. Gradients of `chunk` examples are held at a time, never those of all.

    Args:
      loss: `(params, *example) -> scalar`, of one example, without a batch axis. Compiled once for
        each such function: define it once.
      params: any pytree of arrays.
      *examples: trees of arrays whose leading axis counts the examples, the same for all.
      chunk: examples whose gradients are held at the same time, at least 1.

    Returns:
      A tree like params of means in float32 or wider; leaves that are not floating-point are as
      they were.

    Raises:
      ValueError: there are no examples, their numbers differ, or `chunk` is below 1.

    Example:
      >>> import jax.numpy as jnp
      >>> def loss(params, x):
      ...     return params["w"] * x
      >>> squared_gradients(loss, {"w": jnp.ones(())}, jnp.array([1.0, -3, 2, 2]), chunk=3)["w"]
      Array(4.5, dtype=float32)

    References:
      Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018,
      https://arxiv.org/abs/1801.05787, section 2.
    """
    count = _count(examples)
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, not {chunk!r}.")
    leaves, rebuild = split_floating(params)
    gradient = jax.grad(lambda leaves, example: loss(rebuild(leaves), *example))
    chunk = min(chunk, count)
    # The last chunk is filled up with the last example, which does not count there.
    positions = jnp.arange(-(-count // chunk) * chunk).reshape(-1, chunk)

    def add(sums: list[jax.Array], places: jax.Array) -> tuple[list[jax.Array], None]:
        batch = jax.tree.map(lambda leaf: leaf[jnp.minimum(places, count - 1)], examples)
        gradients = jax.vmap(gradient, in_axes=(None, 0))(leaves, batch)
        counted = places < count
        return [
            total + _sum_of_squares(each, counted)
            for total, each in zip(sums, gradients, strict=True)
        ], None

    start = [jnp.zeros(leaf.shape, working_dtype(leaf.dtype)) for leaf in leaves]
    sums, _ = jax.lax.scan(add, start, positions)
    return rebuild([total / count for total in sums])


def _sum_of_squares(gradients: jax.Array, counted: jax.Array) -> jax.Array:
    wide = gradients.astype(working_dtype(gradients.dtype))
    shape = (-1,) + (1,) * (wide.ndim - 1)
    return jnp.sum(jnp.where(counted.reshape(shape), jnp.square(wide), 0), axis=0)


def _count(examples: Any) -> int:
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(examples)]
    sizes = sorted({shape[0] if shape else 0 for shape in shapes})
    if len(sizes) != 1 or sizes[0] < 1:
        raise ValueError(
            f"examples must be arrays with one leading axis of examples in common, not of {sizes}."
        )
    return sizes[0]
