"""Fine-tuning of codebooks: the values of shared weights are trained, their codes stay."""

from typing import Any

import jax
import jax.numpy as jnp

from jopt._leaves import CodebookTensor


def _is_codebook_tensor(leaf: Any) -> bool:
    return isinstance(leaf, CodebookTensor)


def codebooks(params: Any) -> Any:
    """Return the codebooks of a compressed tree, to be trained by any optimizer.

    The gradient of a loss of `materialize(with_codebooks(params, trained))` with respect to
    `trained` is, for each entry, the sum of the gradients of all the weights that share it (times
    their scale). Everything that is not in a codebook counts as a constant.

    Args:
      params: a tree with `CodebookTensor` leaves, from `quantize_params` with a grid such as
        `kmeans`.

    Returns:
      The same tree with each `CodebookTensor` replaced by its codebook and no other leaf (None).

    Raises:
      ValueError: there is no CodebookTensor.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import CodebookTensor, quant
      >>> leaf = CodebookTensor(jnp.array([2, 0, 2], jnp.uint2), jnp.array([[-1.0, 0.0, 4.0]]))
      >>> quant.codebooks({"w": leaf, "b": jnp.ones(2)})
      {'b': None, 'w': Array([[-1.,  0.,  4.]], dtype=float32)}

    References:
      Han, Mao, Dally, "Deep Compression", 2016, https://arxiv.org/abs/1510.00149, equation 3.
    """
    if not any(map(_is_codebook_tensor, jax.tree.leaves(params, is_leaf=_is_codebook_tensor))):
        raise ValueError("params have no CodebookTensor: there is no codebook to train.")
    return jax.tree.map(
        lambda leaf: leaf.codebook if _is_codebook_tensor(leaf) else None,
        params,
        is_leaf=_is_codebook_tensor,
    )


def with_codebooks(params: Any, trained: Any) -> Any:
    """Put trained codebooks back into a compressed tree.

    Entries that are zero in `params` stay zero, whatever `trained` holds there, and get no
    gradient: pruned weights stay pruned under any optimizer.

    Args:
      params: the tree that `codebooks` was called with.
      trained: a tree as `codebooks` returns it.

    Returns:
      The tree `params` with the new codebooks.

    Raises:
      ValueError: the two trees do not fit together.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jopt import CodebookTensor, materialize, quant
      >>> leaf = CodebookTensor(jnp.array([2, 0, 2], jnp.uint2), jnp.array([[-1.0, 0.0, 4.0]]))
      >>> loss = lambda table: materialize(quant.with_codebooks(leaf, table)).sum()
      >>> jax.grad(loss)(quant.codebooks(leaf))
      Array([[1., 0., 2.]], dtype=float32)

    References:
      Han, Mao, Dally, "Deep Compression", 2016, https://arxiv.org/abs/1510.00149, section 3.3.
    """
    expected = jax.tree.structure(codebooks(params))
    if jax.tree.structure(trained) != expected:
        raise ValueError(
            f"trained must have the structure {expected}, not {jax.tree.structure(trained)}."
        )
    tables = iter(jax.tree.leaves(trained))

    def put(leaf: Any) -> Any:
        if not _is_codebook_tensor(leaf):
            return leaf
        table = next(tables)
        if table.shape != leaf.codebook.shape:
            raise ValueError(
                f"trained codebook of shape {table.shape} where one is {leaf.codebook.shape}."
            )
        return leaf.replace(codebook=jnp.where(leaf.codebook == 0, 0.0, table.astype(leaf.dtype)))

    return jax.tree.map(put, params, is_leaf=_is_codebook_tensor)
