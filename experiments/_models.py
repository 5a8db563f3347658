"""The networks of the experiments, in Flax linen, and the convolutions that make them fast.

Arrays at the door are (batch, height, width, channel) and kernels are always stored in the usual
(height, width, in, out) layout; which formulation computes the product is decided here and nowhere else.
Inside the convolutional networks the layout is (channel, height, width, batch): a LeNet has 1, 20 and 50
channels but 128 images in a batch, so only the batch is long enough to fill vector registers.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

Convolution = Callable[[Array, Array], Array]


# --- Convolution, (batch, height, width, channel) -------------------------------------------------------------


def conv_direct(x: Array, kernel: Array) -> Array:
    """Convolve with XLA's own convolution, the fast one on accelerators."""
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def conv_patches(x: Array, kernel: Array) -> Array:
    """Convolve as one product of all the patches (im2col) with the flattened kernel."""
    high, wide, _, out = kernel.shape
    rows, columns = x.shape[1] - high + 1, x.shape[2] - wide + 1
    patches = jnp.concatenate(
        [x[:, i : i + rows, j : j + columns] for i in range(high) for j in range(wide)], axis=-1
    )
    return patches @ kernel.reshape(-1, out)


def conv_toeplitz(x: Array, kernel: Array) -> Array:
    """Convolve as one product of whole rows with a banded matrix, wasteful but with a wide result.

    For one input channel a patch has 25 values and a row of 28 pixels makes a far better shaped product.
    """
    high, wide, _, out = kernel.shape
    batch, height, width, _ = x.shape
    rows, columns = height - high + 1, width - wide + 1
    bands = jnp.concatenate([x[:, i : i + rows].reshape(batch, rows, -1) for i in range(high)], -1)
    shifted = [jnp.pad(kernel, ((0, 0), (j, columns - 1 - j), (0, 0), (0, 0))) for j in range(columns)]
    matrix = jnp.stack(shifted, axis=3).reshape(-1, columns * out)
    return (bands @ matrix).reshape(batch, rows, columns, out)


def conv2d_valid(x: Array, kernel: Array) -> Array:
    """Convolve without padding, stride one, by the formulation that is fastest here.

    Args:
        x: (batch, height, width, in).
        kernel: (kernel height, kernel width, in, out).

    Returns:
        (batch, height - kernel height + 1, width - kernel width + 1, out).
    """
    if jax.default_backend() != "cpu":
        return conv_direct(x, kernel)
    return conv_toeplitz(x, kernel) if kernel.shape[2] == 1 else conv_patches(x, kernel)


def max_pool(x: Array) -> Array:
    """Take the maximum over disjoint 2 by 2 windows of (batch, height, width, channel); odd edges are dropped."""
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).max((2, 4))


# --- Convolution and pooling in one, (channel, height, width, batch) ------------------------------------------


def _blocked_kernel(kernel: Array) -> Array:
    """Lay the kernel at the four places of a 2 by 2 block: (out of each place in turn, patch and channel)."""
    high, wide, channels, out = kernel.shape
    places = [
        jnp.pad(kernel, ((i, 1 - i), (j, 1 - j), (0, 0), (0, 0))) for i in (0, 1) for j in (0, 1)
    ]
    flat = jnp.stack(places, axis=3).reshape((high + 1) * (wide + 1) * channels, 4 * out)
    return flat


def _blocked_patches(x: Array, high: int, wide: int) -> Array:
    """Collect the patches that feed each 2 by 2 block: (patch and channel, block row, block column, batch)."""
    channels, height, width, batch = x.shape
    rows, columns = (height - high) // 2 + 1, (width - wide) // 2 + 1
    shifts = [
        x[:, i : i + 2 * rows - 1 : 2, j : j + 2 * columns - 1 : 2]
        for i in range(high)
        for j in range(wide)
    ]
    return jnp.stack(shifts).reshape(high * wide * channels, rows, columns, batch)


def conv_pool_blocks(x: Array, kernel: Array) -> Array:
    """Convolve and pool with one product that yields the four members of each pooling window side by side.

    The patches of a 2 by 2 block overlap, so together they are 36 values and not 100 (for a 5 by 5 kernel):
    2.8 times less to copy than im2col, for 1.4 times the multiplications, and pooling needs no reordering.
    """
    high, wide, _, out = kernel.shape
    patches = _blocked_patches(x, high + 1, wide + 1)
    _, rows, columns, batch = patches.shape
    product = lax.dot_general(
        _blocked_kernel(kernel), patches.reshape(patches.shape[0], -1), (((0,), (0,)), ((), ()))
    )
    # Selects rather than max: their gradient is a select too, where that of a max counts ties and divides.
    first, second, third, fourth = lax.split(product, (out,) * 4)
    upper, lower = jnp.where(first >= second, first, second), jnp.where(third >= fourth, third, fourth)
    return jnp.where(upper >= lower, upper, lower).reshape(out, rows, columns, batch)


def conv_pool_direct(x: Array, kernel: Array) -> Array:
    """Convolve with XLA's own convolution, then pool."""
    layout = ("CHWN", "HWIO", "CHWN")
    x = lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=layout)
    out, height, width, batch = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(out, height // 2, 2, width // 2, 2, batch).max((2, 4))


def conv_pool(x: Array, kernel: Array) -> Array:
    """Convolve without padding and take the maximum over 2 by 2 windows, the fastest way here.

    Args:
        x: (in, height, width, batch).
        kernel: (kernel height, kernel width, in, out).

    Returns:
        (out, (height - kernel height + 1) // 2, (width - kernel width + 1) // 2, batch).
    """
    method = conv_pool_blocks if jax.default_backend() == "cpu" else conv_pool_direct
    return method(x, kernel)


# --- Networks -------------------------------------------------------------------------------------------------


class ConvPool(nn.Module):
    """5 by 5 convolution, 2 by 2 max-pooling, bias and ReLU on (channel, height, width, batch).

    Bias and ReLU come after pooling, on a quarter of the values: both are monotone, so the result is the same.
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


def _flatten(x: Array) -> Array:
    """Give the features of each image in (height, width, channel) order, as Flax's layers would."""
    return x.transpose(3, 1, 2, 0).reshape(x.shape[3], -1)


def _dense(features: int, name: str) -> nn.Dense:
    return nn.Dense(features, kernel_init=nn.initializers.he_normal(), name=name)


class LeNet300100(nn.Module):
    """LeNet-300-100: two hidden layers of 300 and 100 ReLUs; 266,610 parameters on 28 by 28 digits."""

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
    """Caffe's LeNet-5: 20 and 50 5 by 5 filters and 500 hidden units; 431,080 parameters on 28 by 28 digits.

    Caffe has no ReLU after the convolutions; here there is one.
    """

    num_classes: int = 10
    filters: Sequence[int] = (20, 50)
    hidden: int = 500
    conv_pool: Convolution = conv_pool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map images (batch, height, width, channel) to logits (batch, num_classes)."""
        x = x.transpose(3, 1, 2, 0)
        for number, features in enumerate(self.filters, 1):
            x = ConvPool(features, method=self.conv_pool, name=f"conv{number}")(x)
        x = nn.relu(_dense(self.hidden, "dense1")(_flatten(x)))
        return _dense(self.num_classes, "dense2")(x)


class StudentCNN(LeNet5):
    """A LeNet-5 with 8 and 16 filters and 64 hidden units: about 20 thousand parameters on 28 by 28 digits."""

    filters: Sequence[int] = (8, 16)
    hidden: int = 64
