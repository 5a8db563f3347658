"""Scores of channels by what the next layer sees of them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jopt.layers import Statistic


class Activity(NamedTuple):
    """Say how active the inputs of one layer are.

    Attributes:
      nonzero: the fraction of rows in which a feature is not zero, (features,): what is left of 1
        by the average percentage of zeros (APoZ).
      mean_abs: the mean of `|x|`, (features,).
    """

    nonzero: jax.Array
    mean_abs: jax.Array


class _Sums(NamedTuple):
    count: jax.Array
    nonzero: jax.Array
    absolute: jax.Array


def _init(features: int) -> _Sums:
    zeros = jnp.zeros(features, jnp.float32)
    return _Sums(jnp.zeros((), jnp.float32), zeros, zeros)


def _update(state: _Sums, rows: jax.Array) -> _Sums:
    rows = rows.astype(jnp.float32)
    return _Sums(
        state.count + rows.shape[0],
        state.nonzero + jnp.sum(rows != 0, axis=0).astype(jnp.float32),
        state.absolute + jnp.sum(jnp.abs(rows), axis=0),
    )


def _merge(first: _Sums, second: _Sums) -> _Sums:
    return jax.tree.map(jnp.add, first, second)


def _finalise(state: _Sums) -> Activity:
    count = jnp.maximum(state.count, 1)
    return Activity(state.nonzero / count, state.absolute / count)


activity = Statistic(_init, _update, _merge, _finalise)
"""How often and how strongly the inputs of a layer differ from zero: figures are `Activity`.

`jopt.layers.calibrate(apply, params, batches, statistic=activity)` gathers it for every layer; the
inputs of a layer are the activations of the one before. Both fractions rise with what a channel
does, so that either is a score that keeps; `channel_scores` takes them from features to channels.

Hu et al., "Network Trimming: A Data-Driven Neuron Pruning Approach towards Efficient Deep
Architectures", 2016, https://arxiv.org/abs/1607.03250, equation 1, and for the mean Molchanov et
al., "Pruning Convolutional Neural Networks for Resource Efficient Inference", 2017,
https://arxiv.org/abs/1611.06440, section 2.2.
"""


def channel_scores(values: jax.Array, channels: int) -> jax.Array:
    """Average a figure of a layer's input features over positions: one score a channel.

    A convolution sees every channel at each position of its kernel, and a dense layer behind a
    flattened image at each position of the image; in both channels run fastest. The zeros of
    padding count as inactive, the same for all channels.

    Args:
      values: `(features,)` or with axes of stacked layers in front, as `Activity.nonzero`,
        `Activity.mean_abs` or `InputStatistics.mean_abs`.
      channels: how many outputs the layer before has; divides the features.

    Returns:
      `(channels,)`, with the same axes in front: higher keeps the channel.

    Raises:
      ValueError: `channels` does not divide the features.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import layers
      >>> apply = lambda p, x: jnp.maximum(x @ p["a"], 0) @ p["b"]
      >>> params = {"a": jnp.array([[1.0, -1.0]]), "b": jnp.ones((2, 1))}
      >>> batch = jnp.array([[1.0], [2.0], [-6.0]])
      >>> figures = layers.calibrate(apply, params, [batch], statistic=activity)["b"]
      >>> channel_scores(figures.mean_abs, 2)
      Array([1., 2.], dtype=float32)
    """
    features = values.shape[-1]
    if channels < 1 or features % channels:
        raise ValueError(f"channels {channels} do not divide {features} features.")
    return values.reshape(*values.shape[:-1], -1, channels).mean(-2)
