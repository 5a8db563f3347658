"""`QuantSpec`, the one bundle of options that every quantizer shares."""

import dataclasses

from jopt.quant._grids import Grid, symmetric
from jopt.quant._ranges import Range, absmax


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """Say how an array is quantized: how many bits, over which blocks, which range, which levels.

    Attributes:
      bits: bits of a code, 1 to 8.
      block: how many elements share a scale along each of the last axes; axes before them are
        whole. `()` is one scale for the tensor, `(1,)` one for each index of the last axis (the
        output channels of a kernel), `(64, 1)` one for each 64 inputs of each output; -1 is the
        whole axis.
      range: `absmax`, `minmax` or any function `(values, axes, restore) -> (low, high)`.
      grid: the number format: `symmetric`, `affine`, `affine_zero` or any other `Grid`.

    Raises:
      ValueError: `bits` or `block` is out of range.
      TypeError: `range` is not a function or `grid` is not a `Grid`.

    Example:
      >>> from jopt import quant
      >>> quant.QuantSpec(bits=4, block=(64, 1)).bits
      4
      >>> minmax8 = quant.QuantSpec(bits=8, range=quant.minmax, grid=quant.affine)
    """

    bits: int = 8
    block: tuple[int, ...] = (1,)
    range: Range = absmax
    grid: Grid = symmetric

    def __post_init__(self) -> None:
        """Refuse options that no array could satisfy."""
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 1 <= self.bits <= 8:
            raise ValueError(f"bits must be a whole number from 1 to 8, not {self.bits!r}.")
        if not isinstance(self.block, tuple) or any(
            isinstance(n, bool) or not isinstance(n, int) or n < -1 or n == 0 for n in self.block
        ):
            raise ValueError(
                f"block must be a tuple of positive whole numbers or -1, not {self.block!r}."
            )
        if not callable(self.range):
            raise TypeError(f"range must be a function, not {self.range!r}.")
        if not isinstance(self.grid, Grid):
            raise TypeError(f"grid must be a Grid, not {self.grid!r}.")


def block_sizes(shape: tuple[int, ...], block: tuple[int, ...]) -> tuple[int, ...]:
    """Return the size of a block along every axis of `shape`.

    Raises:
      ValueError: `block` has more axes than `shape`, or does not divide it.

    Example:
      >>> block_sizes((5, 5, 128, 32), (64, 1))
      (5, 5, 64, 1)
    """
    if len(block) > len(shape):
        raise ValueError(f"block {block} has more axes than shape {shape}.")
    whole = (-1,) * (len(shape) - len(block))
    sizes = tuple(n if size == -1 else size for n, size in zip(shape, whole + block, strict=True))
    if any(n % size for n, size in zip(shape, sizes, strict=True) if size):
        raise ValueError(f"block {block} does not divide shape {shape}.")
    return sizes
