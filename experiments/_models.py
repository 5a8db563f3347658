"""The networks of the experiments, in Flax linen, and the convolutions that make them fast.

Images at the door are (batch, height, width, channel), kernels are always stored in the usual
(height, width, in, out) layout, and which formulation computes a product is decided here and
nowhere else. Inside the convolutional networks the layout is (channel, height, width, batch):
a LeNet has 1, 20 and 50 channels but a hundred images in a batch, so that only the batch is long
enough to fill vector registers and to copy in long runs.

Everything is plain jax.numpy without custom gradients, so `jvp`, `vjp` and `vmap` all work.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

Convolution = Callable[[Array, Array], Array]


# --- Convolution: one function, several formulations --------------------------------------------


def conv_direct(x: Array, kernel: Array) -> Array:
    """Convolve with XLA's own convolution."""
    layout = ("CHWN", "HWIO", "CHWN")
    return lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=layout)


def conv_patches(x: Array, kernel: Array) -> Array:
    """Convolve as one product of the flattened kernel with all the patches (im2col)."""
    high, wide, channels, out = kernel.shape
    patches = jnp.stack([jnp.stack(_windows(row, wide, 2)) for row in _windows(x, high, 1)])
    rows, columns, batch = patches.shape[3:]
    flat = kernel.transpose(3, 0, 1, 2).reshape(out, high * wide * channels)
    return (flat @ patches.reshape(flat.shape[1], -1)).reshape(out, rows, columns, batch)


def conv2d_valid(x: Array, kernel: Array) -> Array:
    """Convolve without padding at stride one, by the formulation that is fastest here.

    Args:
        x: (in, height, width, batch).
        kernel: (kernel height, kernel width, in, out).

    Returns:
        (out, height - kernel height + 1, width - kernel width + 1, batch).
    """
    return (conv_patches if jax.default_backend() == "cpu" else conv_direct)(x, kernel)


def _larger(first: Array, second: Array) -> Array:
    """Take the elementwise maximum, the first where they tie.

    The gradient of a select is a select too; that of a maximum over an axis counts the ties and
    divides by their number, which made convolution and pooling together six times slower.
    """
    return jnp.where(first >= second, first, second)


def max_pool(x: Array) -> Array:
    """Take the maximum over disjoint 2 by 2 windows of (channel, height, width, batch).

    An odd last row or column is left out.
    """
    channels, height, width, batch = x.shape
    rows, columns = height // 2, width // 2
    x = x[:, : 2 * rows, : 2 * columns].reshape(channels, rows, 2, columns, 2, batch)
    x = _larger(*lax.split(x, (1, 1), 4))
    x = _larger(*lax.split(x, (1, 1), 2))
    return x.reshape(channels, rows, columns, batch)


# --- Convolution and pooling in one -------------------------------------------------------------


def _windows(x: Array, size: int, axis: int) -> list[Array]:
    """Return what each of `size` neighbouring taps sees along an axis: size overlapping slices.

    They are split and joined rather than sliced: so the gradient is sums, joined once, where that
    of overlapping slices is a sum of zero-padded arrays, many times slower on a CPU.
    """
    length = x.shape[axis] - size + 1
    slices = lax.split(x, (1,) * x.shape[axis], axis)
    return [lax.concatenate(slices[start : start + length], axis) for start in range(size)]


def _blocked_kernel(kernel: Array, blocks: int) -> Array:
    """Lay the kernel at the four places of a 2 by 2 block: (place and out, patch and channel).

    A patch is blocks by blocks of 2 by 2 pixels, in the order of block row, block column, row,
    column, channel.
    """
    high, wide, channels, out = kernel.shape
    spare_rows, spare_columns = 2 * blocks - high, 2 * blocks - wide
    places = [
        jnp.pad(kernel, ((i, spare_rows - i), (j, spare_columns - j), (0, 0), (0, 0)))
        for i in (0, 1)
        for j in (0, 1)
    ]
    split = jnp.stack(places).reshape(4, blocks, 2, blocks, 2, channels, out)
    return split.transpose(0, 6, 1, 3, 2, 4, 5).reshape(4 * out, -1)


def _blocked_patches(x: Array, blocks: int) -> Array:
    """Collect the patch of every 2 by 2 block: (patch and channel, rows, columns, batch)."""
    channels, height, width, batch = x.shape
    x = x.reshape(channels, height // 2, 2, width // 2, 2, batch).transpose(2, 4, 0, 1, 3, 5)
    x = jnp.stack(_windows(x, blocks, 4))
    x = jnp.stack(_windows(x, blocks, 4))
    return x.reshape(-1, *x.shape[5:])


def _crop_or_pad(x: Array, height: int, width: int) -> Array:
    """Bring (channel, height, width, batch) to a size, at the bottom and the right."""
    x = x[:, :height, :width]
    return jnp.pad(x, ((0, 0), (0, height - x.shape[1]), (0, width - x.shape[2]), (0, 0)))


def conv_pool_blocks(x: Array, kernel: Array) -> Array:
    """Convolve and pool with one product that yields the four members of each pooling window.

    The patches of a 2 by 2 block overlap, so together they are 36 values and not 100 for a 5 by 5
    kernel: 2.8 times less to copy than im2col, for 1.4 times the multiplications, in a product
    four times as wide; and pooling needs no reordering.
    """
    high, wide, _, out = kernel.shape
    rows, columns = (x.shape[1] - high + 1) // 2, (x.shape[2] - wide + 1) // 2
    blocks = max(high, wide) // 2 + 1
    x = _crop_or_pad(x, 2 * (rows + blocks - 1), 2 * (columns + blocks - 1))
    patches = _blocked_patches(x, blocks)
    product = _blocked_kernel(kernel, blocks) @ patches.reshape(patches.shape[0], -1)
    first, second, third, fourth = lax.split(product, (out,) * 4)
    largest = _larger(_larger(first, second), _larger(third, fourth))
    return largest.reshape(out, rows, columns, -1)


def conv_pool_direct(x: Array, kernel: Array) -> Array:
    """Convolve with XLA's own convolution, then pool."""
    return max_pool(conv_direct(x, kernel))


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


# --- Networks -----------------------------------------------------------------------------------


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


def _flatten(x: Array) -> Array:
    """Give the features of each image in (height, width, channel) order, as Flax's layers would."""
    return x.transpose(3, 1, 2, 0).reshape(x.shape[3], -1)


def _dense(features: int, name: str) -> nn.Dense:
    return nn.Dense(features, kernel_init=nn.initializers.he_normal(), name=name)


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
    """A LeNet-5 with 8 and 16 filters and 64 hidden units: 20,522 parameters on 28 by 28 digits."""

    filters: Sequence[int] = (8, 16)
    hidden: int = 64
