"""Which axes of a kernel are the inputs and outputs of its products."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp

from jopt.layers import Layer


class Axes(NamedTuple):
    """What the axes of a kernel are.

    Attributes:
      stacked: how many axes in front stack kernels.
      contracted: the inputs, ascending.
    """

    stacked: int
    contracted: tuple[int, ...]

    def order(self, rank: int) -> list[int]:
        """Return the axes in the order of the matrix: stacked, outputs, inputs."""
        return [axis for axis in range(rank) if axis not in self.contracted] + [*self.contracted]

    def as_matrix(self, array: Any) -> Any:
        """Lay an array of the kernel's shape out as `(stacked..., outputs, inputs)`.

        What NumPy holds stays with NumPy.
        """
        inputs = math.prod(array.shape[axis] for axis in self.contracted)
        stacked = array.shape[: self.stacked]
        outputs = math.prod(
            size
            for axis, size in enumerate(array.shape)
            if axis >= self.stacked and axis not in self.contracted
        )
        moved = array.transpose(self.order(array.ndim))
        return moved.reshape(*stacked, outputs, inputs)

    def statics(self, shape: tuple[int, ...], dtype: Any) -> dict[str, Any]:
        """Return what a matrix says of the kernel."""
        return {
            "trailing": tuple(shape[self.stacked :]),
            "contracted": tuple(axis - len(shape) for axis in self.contracted),
            "dtype": jnp.dtype(dtype),
        }


def axes_of(layers: tuple[Layer, ...]) -> Axes | str:
    """Return what the axes of a kernel are in all of its uses, or why there is no one matrix."""
    found = {(layer.contracted, layer.batch, layer.groups) for layer in layers}
    if len(found) > 1:
        return "its uses sum over different axes"
    contracted, batch, groups = found.pop()
    if groups > 1:
        return "its outputs are in groups with inputs of their own"
    if batch != tuple(range(len(batch))):
        return "the axes that stack kernels are not its first"
    return Axes(len(batch), contracted)
