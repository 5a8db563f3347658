"""Convolution on (channel, height, width, batch), as matrix products where that is faster.

Which formulation computes a convolution is decided here and nowhere else. A small network has few
channels but a hundred images in a batch, so that only the batch is long enough to fill vector
registers and to copy in long runs: it comes last. Kernels are stored in the usual
(height, width, in, out) layout.

Everything is plain jax.numpy without custom gradients, so `jvp`, `vjp` and `vmap` all work.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

Convolution = Callable[[Array, Array], Array]


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
    x = _split_rows_and_columns(x)
    x = _larger(*lax.split(x, (1, 1), 4))
    x = _larger(*lax.split(x, (1, 1), 2))
    return x.reshape(x.shape[0], x.shape[1], x.shape[3], x.shape[5])


def _split_rows_and_columns(x: Array) -> Array:
    """Split both into pairs: (channel, rows, 2, columns, 2, batch)."""
    channels, height, width, batch = x.shape
    rows, columns = height // 2, width // 2
    x = x[:, : 2 * rows, : 2 * columns]
    return x.reshape(channels, rows, 2, columns, 2, batch)


def largest(members: Array) -> Array:
    """Take the largest of the four members of each window, which are the first axis."""
    first, second, third, fourth = (member[0] for member in lax.split(members, (1,) * 4))
    return _larger(_larger(first, second), _larger(third, fourth))


# --- Convolution whose result comes as the members of pooling windows ---------------------------


def conv_direct(x: Array, kernel: Array) -> Array:
    """Convolve with XLA's own convolution: (out, height, width, batch), nothing padded."""
    layout = ("CHWN", "HWIO", "CHWN")
    return lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=layout)


def conv_windows_direct(x: Array, kernel: Array) -> Array:
    """Convolve with XLA's own convolution, then split."""
    pairs = _split_rows_and_columns(conv_direct(x, kernel)).transpose(2, 4, 0, 1, 3, 5)
    return pairs.reshape(4, *pairs.shape[2:])


def conv_windows_blocks(x: Array, kernel: Array) -> Array:
    """Convolve with one product that yields the four members of each pooling window.

    The patches of a 2 by 2 block overlap, so together they are 36 values and not 100 for a 5 by 5
    kernel: 2.8 times less to copy than im2col, for 1.4 times the multiplications, in a product
    four times as wide; and pooling needs no reordering. (For a 3 by 3 kernel, 2.3 and 1.8 times.)
    """
    high, wide, _, out = kernel.shape
    rows, columns = (x.shape[1] - high + 1) // 2, (x.shape[2] - wide + 1) // 2
    blocks = max(high, wide) // 2 + 1
    x = _crop_or_pad(x, 2 * (rows + blocks - 1), 2 * (columns + blocks - 1))
    patches = _blocked_patches(x, blocks)
    product = _blocked_kernel(kernel, blocks) @ patches.reshape(patches.shape[0], -1)
    return product.reshape(4, out, rows, columns, -1)


def conv_windows(x: Array, kernel: Array) -> Array:
    """Convolve without padding into the members of 2 by 2 windows, the fastest way here.

    Batch norm goes between this and `largest`: its scale may be negative, so that it must not be
    moved behind pooling.

    Args:
        x: (in, height, width, batch).
        kernel: (kernel height, kernel width, in, out).

    Returns:
        (4, out, (height - kernel height + 1) // 2, (width - kernel width + 1) // 2, batch): the
        upper left, upper right, lower left and lower right of each window.
    """
    fastest = conv_windows_blocks if jax.default_backend() == "cpu" else conv_windows_direct
    return fastest(x, kernel)


def conv_pool_blocks(x: Array, kernel: Array) -> Array:
    """Convolve with one product for the four members of each window, then take the largest."""
    return largest(conv_windows_blocks(x, kernel))


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
    fastest = conv_pool_blocks if jax.default_backend() == "cpu" else conv_pool_direct
    return fastest(x, kernel)


# --- Convolution that keeps the size --------------------------------------------------------------


def conv_same_patches(x: Array, kernel: Array) -> Array:
    """Convolve with one product of the kernel and the patches around every pixel."""
    high, wide, _, out = kernel.shape
    x = _bordered(x, kernel)
    patches = jnp.stack(_windows(jnp.stack(_windows(x, high, 1)), wide, 3))
    product = kernel.transpose(3, 1, 0, 2).reshape(out, -1) @ patches.reshape(
        high * wide * x.shape[0], -1
    )
    return product.reshape(out, *patches.shape[3:])


def conv_same_direct(x: Array, kernel: Array) -> Array:
    """Convolve with XLA's own convolution."""
    return conv_direct(_bordered(x, kernel), kernel)


def conv_same(x: Array, kernel: Array) -> Array:
    """Convolve with a border of zeros that keeps height and width, the fastest way here.

    Args:
      x: (in, height, width, batch).
      kernel: (kernel height, kernel width, in, out), both odd.

    Returns:
      (out, height, width, batch).
    """
    fastest = conv_same_patches if jax.default_backend() == "cpu" else conv_same_direct
    return fastest(x, kernel)


def _bordered(x: Array, kernel: Array) -> Array:
    rows, columns = kernel.shape[0] // 2, kernel.shape[1] // 2
    return jnp.pad(x, ((0, 0), (rows, rows), (columns, columns), (0, 0)))


# --- The product of blocks ----------------------------------------------------------------------


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
