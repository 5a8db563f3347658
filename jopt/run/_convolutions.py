"""Convolutions of floats that XLA computes slowly on a CPU, in other ways.

A depthwise convolution is shifted multiply-adds, one with a window of one element is a product of
matrices, one of few channels a product of matrices of patches. All of them sum the same products as
the convolution, in another order.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jopt.layers import Layer, Window
from jopt.layers._rows import patches
from jopt.run import _native
from jopt.run._forms import native_here
from jopt.run._matrices import Int8Matrix
from jopt.run._native import AS_IT_IS, After

PLAIN = "XLA, convolution"
_PATCH = 160  # elements of a patch up to which patches are tried: beyond, copies cost too much


class Shapes(NamedTuple):
    """A convolution of channels last: what decides how it is computed.

    Attributes:
      x: `(images, ..., channels)`.
      kernel: `(..., channels of a group, outputs)`.
      window: how the kernel moves; there is one.
    """

    x: tuple[int, ...]
    kernel: tuple[int, ...]
    window: Any

    @property
    def is_depthwise(self) -> bool:
        """Return whether each channel has one output, of its own, in two dimensions."""
        channels = self.x[-1]
        alone = self.window.feature_group_count == channels and self.kernel[-1] == channels
        return alone and is_plain(self.window)


Way = Callable[[Shapes, jax.Array, jax.Array], jax.Array]


def channels_last(window: Window) -> bool:
    """Return whether input, kernel and output have their channels last, as flax has them."""
    numbers, rank = window.dimension_numbers, len(window.size) + 2
    last = (0, rank - 1, *range(1, rank - 1))
    own = (rank - 1, rank - 2, *range(rank - 2))
    return (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec) == (last, own, last)


def is_plain(window: Window) -> bool:
    """Return whether a convolution has two dimensions, no dilation and no negative padding."""
    cut = any(low < 0 or high < 0 for low, high in window.padding)
    dilated = any(step != 1 for step in window.input_dilation + window.kernel_dilation)
    return len(window.size) == 2 and not cut and not dilated


def takes_codes(window: Window) -> bool:
    """Return whether a native kernel convolves by int8 codes."""
    together = window.feature_group_count == 1
    return native_here() is None and is_plain(window) and together and channels_last(window)


def is_product(window: Window) -> bool:
    """Return whether a convolution multiplies each element's channels by one matrix."""
    edges = any(low or high for low, high in window.padding)
    spread = any(step != 1 for step in window.input_dilation + window.kernel_dilation)
    alone = math.prod(window.size) == 1 and window.feature_group_count == 1
    return alone and not edges and not spread and channels_last(window)


def wide_window(layer: Layer) -> Window | None:
    """Return the window of a convolution that is more than a product of matrices, else None."""
    window = layer.window
    return None if window is None or is_product(window) else window


def plain(shapes: Shapes, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve as XLA does."""
    window = shapes.window
    return lax.conv_general_dilated(
        x,
        kernel,
        window.strides,
        window.padding,
        window.input_dilation,
        window.kernel_dilation,
        window.dimension_numbers,
        window.feature_group_count,
        preferred_element_type=jnp.float32,
    )


def seen(x: jax.Array, strides: tuple[int, ...]) -> jax.Array:
    """Return the elements that a window of one element sees, channels last."""
    if all(step == 1 for step in strides):
        return x
    return x[(slice(None), *(slice(None, None, step) for step in strides))]


def _by_matrix(
    product: Callable[..., jax.Array],
    shapes: Shapes,
    x: jax.Array,
    kernel: jax.Array,
    *after: After,
) -> jax.Array:
    """Multiply every element's channels by one matrix."""
    x = seen(x, shapes.window.strides)
    out = product(x.reshape(-1, x.shape[-1]), kernel.reshape(kernel.shape[-2:]), *after)
    return out.reshape(*x.shape[:-1], kernel.shape[-1])


pointwise = partial(_by_matrix, jnp.dot)


def by_patches(shapes: Shapes, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiply patches of the input by the kernel as one matrix."""
    rows = patches(x, shapes.window)[0]
    out = rows @ kernel.reshape(-1, kernel.shape[-1])
    sizes = jax.eval_shape(partial(plain, shapes), x, kernel).shape
    return out.reshape(sizes)


def shifted(shapes: Shapes, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Add the input times one element of the window after another, shifted."""
    window = shapes.window
    sizes = jax.eval_shape(partial(plain, shapes), x, kernel).shape
    padded = jnp.pad(x, [(0, 0), *window.padding, (0, 0)])
    total = jnp.zeros(sizes, x.dtype)
    down, along = window.strides
    for row in range(window.size[0]):
        for column in range(window.size[1]):
            stop = row + down * (sizes[1] - 1) + 1, column + along * (sizes[2] - 1) + 1
            part = padded[:, row : stop[0] : down, column : stop[1] : along, :]
            total = total + part * kernel[row, column].reshape(1, 1, 1, -1)
    return total


def _derived_from(reference: Way, native: Way) -> Way:
    """Give a native kernel the derivatives of a way of XLA's that computes the same."""

    @partial(jax.custom_jvp, nondiff_argnums=(0,))
    def way(shapes: Shapes, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return native(shapes, x, kernel)

    @way.defjvp
    def _way_jvp(shapes: Shapes, primals: Any, tangents: Any) -> tuple[Any, Any]:
        tangent = jax.jvp(partial(reference, shapes), primals, tangents)[1]
        return way(shapes, *primals), tangent

    return way


def _depthwise(shapes: Shapes, x: jax.Array, kernel: jax.Array, *after: After) -> jax.Array:
    window = shapes.window
    return _native.depthwise(x, kernel[:, :, 0], window.strides, window.padding, *after)


def _convolution(shapes: Shapes, x: jax.Array, kernel: jax.Array, *after: After) -> jax.Array:
    window = shapes.window
    return _native.convolution(x, kernel, window.strides, window.padding, *after)


_pointwise = partial(_by_matrix, _native.floats_product)
ENDED: dict[str, Callable[..., jax.Array]] = {  # with what becomes of the outputs, last
    "native depthwise": _depthwise,
    "native product of matrices": _pointwise,
    "native convolution": _convolution,
}
_REFERENCES: tuple[Way, ...] = (shifted, pointwise, plain)  # of each, in XLA
NATIVE: dict[str, Way] = {
    name: _derived_from(reference, ENDED[name])
    for name, reference in zip(ENDED, _REFERENCES, strict=True)
}


def int8_convolution(
    shapes: Shapes, leaf: Int8Matrix, x: jax.Array, after: After = AS_IT_IS
) -> jax.Array:
    """Convolve by the codes of a kernel that is laid out by outputs."""
    zero = None if leaf.zero_point is None else leaf.zero_point[:, 0]
    window = shapes.window
    about = {"size": window.size, "strides": window.strides, "padding": window.padding}
    return _native.int8_convolution(x, leaf.codes, leaf.scale[:, 0], zero, after=after, **about)


def ways_of(shapes: Shapes) -> dict[str, Way]:
    """Return the ways to compute a convolution, the one that is preferred unmeasured first."""
    ways: dict[str, Way] = {}

    def add_native(name: str) -> None:
        if native_here() is None:
            ways[name] = NATIVE[name]

    if 0 in shapes.x or 0 in shapes.kernel:
        return {PLAIN: plain}
    groups = shapes.window.feature_group_count
    if shapes.is_depthwise:
        add_native("native depthwise")
        ways["XLA, shifted multiply-adds"] = shifted
    elif is_product(shapes.window):
        add_native("native product of matrices")
        ways["XLA, product of matrices"] = pointwise
    elif groups == 1:
        if is_plain(shapes.window):
            add_native("native convolution")
        if math.prod(shapes.kernel[:-1]) <= _PATCH:
            return ways | {PLAIN: plain, "XLA, product of patches": by_patches}
    return ways | {PLAIN: plain}
