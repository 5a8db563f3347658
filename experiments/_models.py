"""The networks of the experiments, in Flax linen.

Images at the door are (batch, height, width, channel), kernels are always stored in the usual
(height, width, in, out) layout. Inside the convolutional networks the layout is (channel, height,
width, batch), and `experiments._convolution` decides how a convolution is computed.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax

from experiments._convolution import Convolution, conv_pool, conv_same, conv_windows, largest

Normalize = Callable[[Array, bool, str], Array]
ChangeInputs = Callable[[str, Array], Array]
EPSILON = 1e-5  # of batch norm


class ConvPool(nn.Module):
    """Convolution, 2 by 2 max-pooling, bias and ReLU on (channel, height, width, batch).

    Bias and ReLU come after pooling, on a quarter of the values: both are monotone, so the result
    is the same.
    """

    features: int
    size: int = 5
    method: Convolution = conv_pool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Return (features, pooled height, pooled width, batch)."""
        shape = (self.size, self.size, x.shape[0], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        return nn.relu(self.method(x, kernel) + bias[:, None, None, None])


class ConvWindows(nn.Module):
    """Convolution that keeps the size, given as the four members of each 2 by 2 window.

    `size` is odd; the border is padded with zeros. An odd last row or column is left out, as
    pooling would.
    """

    features: int
    size: int
    use_bias: bool
    method: Convolution

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map (channel, height, width, batch) to (4, features, height // 2, width // 2, batch)."""
        shape = (self.size, self.size, x.shape[0], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        border = (self.size // 2, self.size // 2)
        x = self.method(jnp.pad(x, ((0, 0), border, border, (0, 0))), kernel)
        if not self.use_bias:
            return x
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        return x + bias[None, :, None, None, None]


class ConvSame(nn.Module):
    """Convolution of odd size with a border of zeros: height and width stay."""

    features: int
    size: int
    use_bias: bool
    method: Convolution

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map (channel, height, width, batch) to (features, height, width, batch)."""
        shape = (self.size, self.size, x.shape[0], self.features)
        x = self.method(x, self.param("kernel", nn.initializers.he_normal(), shape))
        if not self.use_bias:
            return x
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        return x + bias[:, None, None, None]


def _flatten(x: Array) -> Array:
    """Give the features of each image in (height, width, channel) order, as Flax's layers would."""
    return x.transpose(3, 1, 2, 0).reshape(x.shape[3], -1)


def _dense(features: int, name: str, use_bias: bool = True) -> nn.Dense:
    init = nn.initializers.he_normal()
    return nn.Dense(features, kernel_init=init, use_bias=use_bias, name=name)


class LeNet300100(nn.Module):
    """Two hidden layers of 300 and 100 ReLUs: 266,610 parameters on 28 by 28 digits."""

    num_classes: int = 10
    hidden: Sequence[int] = (300, 100)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map images (batch, height, width, channel) to logits (batch, num_classes)."""
        x = x.reshape(x.shape[0], -1)
        for number, features in enumerate(self.hidden, 1):
            x = nn.relu(_dense(features, f"dense{number}")(x))
        return _dense(self.num_classes, f"dense{len(self.hidden) + 1}")(x)


class LeNet5(nn.Module):
    """Caffe's LeNet: 20 and 50 filters, 500 hidden units; 431,080 parameters on 28 by 28 digits.

    Caffe and Han et al. have no ReLU after the convolutions; here there is one, which costs nothing
    and adds nothing to the file.
    """

    num_classes: int = 10
    filters: Sequence[int] = (20, 50)
    hidden: Sequence[int] = (500,)
    conv_pool: Convolution = conv_pool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map images (batch, height, width, channel) to logits (batch, num_classes)."""
        x = x.transpose(3, 1, 2, 0)
        for number, features in enumerate(self.filters, 1):
            x = ConvPool(features, method=self.conv_pool, name=f"conv{number}")(x)
        x = _flatten(x)
        for number, features in enumerate(self.hidden, 1):
            x = nn.relu(_dense(features, f"dense{number}")(x))
        return _dense(self.num_classes, f"dense{len(self.hidden) + 1}")(x)


class StudentCNN(LeNet5):
    """A LeNet-5 with 8 and 16 filters and 64 hidden units: 20,522 parameters on 28 by 28 digits."""

    filters: Sequence[int] = (8, 16)
    hidden: Sequence[int] = (64,)


class BatchNorm(nn.Module):
    """Batch norm of the channels on axis 1, with the variables and the results of Flax's.

    scale * (x - mean) / sqrt(var + 1e-5) + bias is applied as one multiplication and one addition,
    as when it is folded: a step of `BatchNormCNN` then takes a tenth less time than with
    `nn.BatchNorm`. The running averages move a tenth of the way in each step.
    """

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Normalize by the batch's statistics in training, else by the running averages."""
        shape, others = (x.shape[1],), tuple(axis for axis in range(x.ndim) if axis != 1)
        scale = self.param("scale", nn.initializers.ones_init(), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), shape)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape)
        mean, var = running_mean.value, running_var.value
        if train:
            mean = jnp.mean(x, others)
            var = jnp.maximum(jnp.mean(x * x, others) - mean * mean, 0.0)  # rounding
            if self.is_mutable_collection("batch_stats") and not self.is_initializing():
                running_mean.value = 0.9 * running_mean.value + 0.1 * mean
                running_var.value = 0.9 * running_var.value + 0.1 * var
        factor = scale * lax.rsqrt(var + EPSILON)
        offset = bias - mean * factor
        return x * jnp.expand_dims(factor, others) + jnp.expand_dims(offset, others)


def batch_norm(x: Array, train: bool, name: str) -> Array:
    """Apply `BatchNorm` under a name."""
    return BatchNorm(name=name)(x, train)


def unchanged_inputs(layer: str, x: Array) -> Array:
    """Return the input of a layer as it is."""
    return x


class BatchNormCNN(nn.Module):
    """Three convolutions and two dense layers, all but the last with batch norm.

    A convolution is 3 by 3, then batch norm, ReLU and 2 by 2 max-pooling; 256,954 parameters on 28
    by 28 pictures. Each batch norm follows its product at once, so that it can be folded into it:
    kernel * scale / sqrt(var + 1e-5), and bias - mean * scale / sqrt(var + 1e-5). The folded
    parameters run in `BatchNormCNN(normalize=None)`, whose layers have biases.

    Parameters are `conv1/kernel`, `conv1_norm/scale`, `conv1_norm/bias`, and so on for `conv2`,
    `conv3` and `dense1`; `dense2` has kernel and bias. Collection `batch_stats` holds
    `conv1_norm/mean`, `conv1_norm/var` and so on.
    """

    num_classes: int = 10
    filters: Sequence[int] = (16, 32, 96)
    hidden: int = 256
    normalize: Normalize | None = batch_norm
    convolve: Convolution = conv_windows

    @nn.compact
    def __call__(
        self, x: Array, train: bool = False, change_inputs: ChangeInputs = unchanged_inputs
    ) -> Array:
        """Map images to logits.

        Args:
            x: (batch, height, width, channel), from 0 to 1.
            train: whether batch norm takes the batch's own statistics, and moves the running
                averages if `batch_stats` is mutable.
            change_inputs: (layer name, input of its product) -> what the product gets instead, of
                the same shape: (channel, height, width, batch) for a convolution, not yet padded,
                (batch, features) for a dense layer. Quantized activations come in here, or
                statistics are gathered; what it does to zero it does not do to the border.

        Returns:
            (batch, num_classes).
        """
        plain = self.normalize is None
        x = x.transpose(3, 1, 2, 0)
        for number, features in enumerate(self.filters, 1):
            name = f"conv{number}"
            x = change_inputs(name, x)
            x = ConvWindows(features, 3, plain, self.convolve, name=name)(x)
            x = nn.relu(largest(self._normalized(x, train, name)))
        x = _dense(self.hidden, "dense1", plain)(change_inputs("dense1", _flatten(x)))
        x = nn.relu(self._normalized(x, train, "dense1"))
        return _dense(self.num_classes, "dense2")(change_inputs("dense2", x))

    def _normalized(self, x: Array, train: bool, layer: str) -> Array:
        return x if self.normalize is None else self.normalize(x, train, f"{layer}_norm")


class Features(NamedTuple):
    """What a network says of images, and what distillation may compare on the way.

    Attributes:
      logits: (batch, classes).
      embedding: (batch, width), what the last layer sees.
      maps: (batch, height, width, channel), the last maps before they are averaged.
    """

    logits: Array
    embedding: Array
    maps: Array


class ResidualCNN(nn.Module):
    """A residual network in stages: convolution, pooling, then blocks of two convolutions.

    Every stage halves height and width. All convolutions are 3 by 3 and followed by batch norm; a
    block adds its input to what two of them make of it. Maps are averaged over places before the
    last layer. With the default widths and 28 by 28 pictures of one channel: 173,298 parameters.

    Parameters are `stage0/kernel`, `stage0_norm/scale`, ..., `stage1_block0_first/kernel`,
    `stage1_block0_first_norm/scale`, `stage1_block0_second/kernel`, ... and `classifier/kernel`.
    With the batch norms folded they run in `ResidualCNN(normalize=None)`, whose layers have biases.
    """

    num_classes: int = 10
    widths: Sequence[int] = (24, 64)
    blocks: Sequence[int] = (1, 2)
    normalize: Normalize | None = batch_norm
    convolve: Convolution = conv_windows
    convolve_same: Convolution = conv_same

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Features:
        """Map images (batch, height, width, channel) to logits and features.

        Args:
          x: images, from 0 to 1.
          train: whether batch norms take the batch's own statistics.
        """
        plain = self.normalize is None
        x = x.transpose(3, 1, 2, 0)
        for stage, (width, blocks) in enumerate(zip(self.widths, self.blocks, strict=True)):
            name = f"stage{stage}"
            windows = ConvWindows(width, 3, plain, self.convolve, name=name)(x)
            x = nn.relu(largest(self._normalized(windows, train, name)))
            for block in range(blocks):
                y = nn.relu(self._convolved(x, train, f"{name}_block{block}_first"))
                y = self._convolved(y, train, f"{name}_block{block}_second")
                x = nn.relu(x + y)
        embedding = x.mean((1, 2)).T
        logits = _dense(self.num_classes, "classifier")(embedding)
        return Features(logits, embedding, x.transpose(3, 1, 2, 0))

    def _convolved(self, x: Array, train: bool, name: str) -> Array:
        plain = self.normalize is None
        x = ConvSame(x.shape[0], 3, plain, self.convolve_same, name=name)(x)
        return self._normalized(x[None], train, name)[0]

    def _normalized(self, x: Array, train: bool, layer: str) -> Array:
        return x if self.normalize is None else self.normalize(x, train, f"{layer}_norm")
