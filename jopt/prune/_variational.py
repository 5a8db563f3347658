"""Variational dropout: weights learn how much noise they bear; those drowned in it are pruned."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jopt._arrays import working_dtype
from jopt._trees import Filter, is_kernel
from jopt.prune._by_path import Entries, Shape, init_entries, map_entries, masks_of, one_each

_EPSILON = 1e-8
_LIMIT = 8.0
_K1, _K2, _K3 = 0.63576, 1.87320, 1.48695


def dropout_log_alpha(weights: jax.Array, log_sigma2: jax.Array) -> jax.Array:
    """Return the logarithm of noise over signal, `log sigma^2 - log w^2`, clipped to [-8, 8].

    Args:
      weights: the means, a floating-point array.
      log_sigma2: logarithm of the variances; broadcasts against the weights.

    Returns:
      An array of the shape of the weights, float32 or wider. 1e-8 is added to `w^2`; this and the
      clip are those of the authors' code.

    Example:
      >>> import jax.numpy as jnp
      >>> dropout_log_alpha(jnp.array([1.0, 0.0]), jnp.array([-2.0, -2.0]))
      Array([-2.,  8.], dtype=float32)

    References:
      Molchanov et al., "Variational Dropout Sparsifies Deep Neural Networks", 2017,
      https://arxiv.org/abs/1701.05369, equation 11.
    """
    exact = working_dtype(weights.dtype)
    signal = jnp.log(jnp.square(weights.astype(exact)) + _EPSILON)
    return jnp.clip(log_sigma2.astype(exact) - signal, -_LIMIT, _LIMIT)


def dropout_divergence(log_alpha: jax.Array) -> jax.Array:
    """Approximate the divergence from the log-uniform prior, weight by weight.

    `KL ~ k1 + log(1 + 1 / alpha) / 2 - k1 sigmoid(k2 + k3 log alpha)`, with k1 = 0.63576,
    k2 = 1.87320, k3 = 1.48695. It falls with log alpha, towards 0.

    Args:
      log_alpha: a floating-point array.

    Returns:
      An array of the same shape and dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> [round(float(each), 3) for each in dropout_divergence(jnp.array([0.0, 8.0]))]
      [0.431, 0.0]

    References:
      Molchanov et al., "Variational Dropout Sparsifies Deep Neural Networks", 2017,
      https://arxiv.org/abs/1701.05369, equation 14.
    """
    likely = jax.nn.sigmoid(_K2 + _K3 * log_alpha)
    return _K1 + 0.5 * jax.nn.softplus(-log_alpha) - _K1 * likely


def variational_init(
    params: Any, initial: float = -10.0, where: Filter = is_kernel, shape: Shape = one_each
) -> dict[str, jax.Array]:
    """Make the trainable log sigma^2 of `variational_params`.

    Args:
      params: any pytree of arrays; they become the means.
      initial: log sigma^2 at the start; -10 in the authors' code: hardly any noise.
      where: which leaves, a regex on the path or a predicate; by default
        those that `is_kernel` takes.
      shape: from a leaf to the shape of its variances: `one_each` weight as in the paper, or one
        that broadcasts against the leaf.

    Returns:
      log sigma^2 by path, of the dtype of their leaves.

    Raises:
      ValueError: nothing was chosen, or a shape does not broadcast.
      TypeError: a chosen leaf is not a floating-point array.

    Example:
      >>> import jax.numpy as jnp
      >>> variational_init({"w": jnp.ones((1, 2))})
      {'w': Array([[-10., -10.]], dtype=float32)}
    """
    return init_entries(
        params, where, shape, lambda index, size, dtype: jnp.full(size, initial, dtype)
    )


def variational_params(key: jax.Array, params: Any, log_sigma2s: Entries) -> Any:
    """Add noise to weights for a step of training, `w + sigma epsilon`, epsilon normal.

    The additive form has gradients of low variance in sigma. The noise of a weight is the same for
    the whole batch; `local_reparameterization` draws it for each example, but needs the layer's
    inputs.

    Args:
      key: a key from `jax.random.key`, a new one for each step.
      params: any pytree of arrays: the means.
      log_sigma2s: by path, from `variational_init`.

    Returns:
      Parameters to run the model with; leaves without an entry are unchanged.

    Raises:
      ValueError: an entry has no leaf, or does not broadcast to it.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params = {"w": jnp.array([[2.0, 3.0]])}
      >>> variational_params(jax.random.key(0), params, {"w": jnp.array([[-200.0, -200.0]])})
      {'w': Array([[2., 3.]], dtype=float32)}

    References:
      Molchanov et al., "Variational Dropout Sparsifies Deep Neural Networks", 2017,
      https://arxiv.org/abs/1701.05369, equation 10.
    """

    def noisy(index: int, leaf: jax.Array, log_sigma2: jax.Array) -> jax.Array:
        exact = working_dtype(leaf.dtype)
        noise = jax.random.normal(jax.random.fold_in(key, index), leaf.shape, exact)
        return (leaf.astype(exact) + jnp.exp(0.5 * log_sigma2.astype(exact)) * noise).astype(
            leaf.dtype
        )

    return map_entries(noisy, params, log_sigma2s)


def local_reparameterization(
    key: jax.Array,
    product: Callable[[jax.Array, jax.Array], jax.Array],
    inputs: jax.Array,
    weights: jax.Array,
    log_sigma2: jax.Array,
) -> jax.Array:
    """Draw a layer's outputs with noise of their own for each example and position.

    `product(x, w) + sqrt(product(x^2, sigma^2)) epsilon`: mean and variance of the outputs if the
    weights had independent noise of variance `sigma^2`.

    Args:
      key: a key from `jax.random.key`, a new one for each step and layer.
      product: `(inputs, weights)` to outputs, linear in each, without bias: a matrix product or a
        convolution.
      inputs: of the layer.
      weights: the means.
      log_sigma2: logarithm of the variances; broadcasts against the weights.

    Returns:
      Outputs, of the shape and dtype of `product(inputs, weights)`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> inputs, weights = jnp.array([[1.0, 2.0]]), jnp.array([[3.0], [4.0]])
      >>> tiny = jnp.full((2, 1), -200.0)
      >>> local_reparameterization(jax.random.key(0), jnp.matmul, inputs, weights, tiny).round(2)
      Array([[11.]], dtype=float32)

    References:
      Molchanov et al., "Variational Dropout Sparsifies Deep Neural Networks", 2017,
      https://arxiv.org/abs/1701.05369, equation 17.
    """
    mean = product(inputs, weights)
    spread = jnp.broadcast_to(jnp.exp(log_sigma2), weights.shape)
    variance = product(jnp.square(inputs), spread)
    # Convolutions by fast transforms may fall a little below zero; the root has no slope at zero.
    deviation = jnp.sqrt(jnp.maximum(variance, 0) + jnp.asarray(_EPSILON, variance.dtype))
    return mean + deviation * jax.random.normal(key, mean.shape, mean.dtype)


def variational_penalty(params: Any, log_sigma2s: Entries) -> jax.Array:
    """Sum the divergence over all weights that bear noise.

    Add it to the loss of the whole training set; to the mean loss of n examples, divided by n. At
    first its weight should rise from 0 to 1, or weights are pruned before they are learned: any
    `optax.Schedule`, such as `optax.linear_schedule(0.0, 1.0, steps)`.

    Args:
      params: any pytree of arrays: the means.
      log_sigma2s: by path, from `variational_init`.

    Returns:
      A float32 scalar.

    Raises:
      ValueError: an entry has no leaf, or does not broadcast to it.

    Example:
      >>> import jax.numpy as jnp
      >>> penalty = variational_penalty({"w": jnp.ones((2, 2))}, {"w": jnp.zeros((2, 2))})
      >>> round(float(penalty), 3)  # four times dropout_divergence(0)
      1.725

    References:
      Molchanov et al., "Variational Dropout Sparsifies Deep Neural Networks", 2017,
      https://arxiv.org/abs/1701.05369, equation 14.
    """

    def divergence(index: int, leaf: jax.Array, log_sigma2: jax.Array) -> jax.Array:
        each = dropout_divergence(dropout_log_alpha(leaf, log_sigma2))
        return each.sum().astype(jnp.float32)

    terms = map_entries(divergence, params, log_sigma2s, lambda leaf: jnp.zeros(()))
    return sum(jax.tree.leaves(terms), jnp.zeros(()))


def variational_masks(params: Any, log_sigma2s: Entries, threshold: float = 3.0) -> Any:
    """Keep the weights with `log alpha < threshold`; the others are noise.

    At 3, the paper's, a removed weight would be dropped out with a rate above 0.95. After training
    use `apply_masks(params, masks)`: the means, without noise.

    Args:
      params: any pytree of arrays: the means.
      log_sigma2s: by path, from `variational_init`.
      threshold: of log alpha, between -8 and 8.

    Returns:
      A tree of booleans: full-shape masks where there is an entry, a scalar True elsewhere.

    Raises:
      ValueError: an entry has no leaf or does not broadcast to it, or `threshold` is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> variational_masks({"w": jnp.array([[1.0, 0.01]])}, {"w": jnp.array([[-2.0, -2.0]])})
      {'w': Array([[ True, False]], dtype=bool)}

    References:
      Molchanov et al., "Variational Dropout Sparsifies Deep Neural Networks", 2017,
      https://arxiv.org/abs/1701.05369, section 5.
    """
    if not -_LIMIT < threshold < _LIMIT:
        raise ValueError(f"threshold must lie between -8 and 8, not {threshold!r}.")
    return masks_of(
        lambda leaf, entry: dropout_log_alpha(leaf, entry) < threshold, params, log_sigma2s
    )
