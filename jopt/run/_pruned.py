"""Kernels with zeros: in compressed rows, or without the inputs and outputs that are zeros."""

from typing import Any

import flax.struct as struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jopt._arrays import known_values, on_host
from jopt.run._axes import Axes
from jopt.run._matrices import Int4Matrix, Int8Matrix, Matrix, TurnedMatrix
from jopt.run._packing import BLOCK, pack4

SPARSE = 0.75  # zeros from which compressed rows are read faster than all weights
SPARSE_CODES = 0.88  # the same of codes of 8 bits or fewer, which are read faster themselves
SPARSE_STREAMED = 8 << 20  # bytes of a network's codes beyond which they are read from memory
SPARSE_BLOCK = 256  # inputs that a byte counts
NARROW = 0.5  # of the weights, in whole inputs and outputs: so few are faster, however many rows


@struct.dataclass
class FloatMatrix(Matrix):
    """Hold a kernel as it is.

    Attributes:
      kernel: floats; inputs and outputs lie as `contracted` says.
      contracted: as in `Matrix`.

    Example:
      >>> import jax.numpy as jnp
      >>> FloatMatrix(jnp.array([[1.0, 2.0], [3.0, 4.0]])).rows().tolist()
      [[1.0, 3.0], [2.0, 4.0]]
    """

    kernel: jax.Array
    contracted: tuple[int, ...] = struct.field(pytree_node=False, default=(-2,))

    @property
    def trailing(self) -> tuple[int, ...]:
        """Return the shape of the kernel."""
        return self.kernel.shape

    @property
    def stacked(self) -> tuple[int, ...]:
        """Return the sizes of the axes that stack kernels: none."""
        return ()

    @property
    def dtype(self) -> Any:
        """Return the dtype of the kernel."""
        return self.kernel.dtype

    def rows(self) -> jax.Array:
        """Return the matrix, `(outputs, inputs)`."""
        rank = self.kernel.ndim
        return Axes(0, tuple(axis + rank for axis in self.contracted)).as_matrix(self.kernel)


@struct.dataclass
class SparseMatrix(Matrix):
    """Hold the weights of a pruned kernel that are not zero, in compressed rows by output.

    `x ~ scale * values`.

    Attributes:
      values: float32, or int8 codes, `(entries,)`: those of output 0, then of output 1, and so on.
      columns: uint8, `(entries,)`: which input of its block each is multiplied by.
      starts: int32, `(outputs * blocks + 1,)`: where those of each output's blocks of 256 inputs
        begin.
      scale: float32, `(outputs,)`, or None for 1.
      trailing: as in `Matrix`.
      contracted: as in `Matrix`.
      dtype: static; that of the restored array.

    Example:
      >>> import jax.numpy as jnp
      >>> leaf = SparseMatrix(
      ...     jnp.array([5.0]),
      ...     jnp.array([1], jnp.uint8),
      ...     jnp.array([0, 1], jnp.int32),
      ...     trailing=(3, 1),
      ...     contracted=(-2,),
      ... )
      >>> leaf.restore().ravel()
      Array([0., 5., 0.], dtype=float32)
    """

    values: jax.Array
    columns: jax.Array
    starts: jax.Array
    scale: jax.Array | None = None
    trailing: tuple[int, ...] = struct.field(pytree_node=False, default=())
    contracted: tuple[int, ...] = struct.field(pytree_node=False, default=(-2,))
    dtype: Any = struct.field(pytree_node=False, default=jnp.dtype(jnp.float32))

    @property
    def stacked(self) -> tuple[int, ...]:
        """Return the sizes of the axes that stack kernels: none."""
        return ()

    def rows(self) -> jax.Array:
        """Return the matrix as floats, `(outputs, inputs)`."""
        segments = len(self.starts) - 1
        count, blocks = self.values.shape[0], -(-self.inputs // SPARSE_BLOCK)
        counts = jnp.diff(self.starts)
        segment = jnp.repeat(jnp.arange(segments), counts, total_repeat_length=count)
        columns = self.columns.astype(jnp.int32) + SPARSE_BLOCK * (segment % blocks)
        dense = jnp.zeros((self.outputs, self.inputs), jnp.float32)
        dense = dense.at[segment // blocks, columns].set(self.values.astype(jnp.float32))
        if self.scale is not None:
            dense = self.scale[:, None] * dense
        return dense.astype(self.dtype)


@struct.dataclass
class NarrowMatrix(Matrix):
    """Hold a kernel of which whole inputs or outputs are zeros by what is left of it.

    Attributes:
      matrix: what is left, another matrix.
      kept: int32, ascending: which inputs that has, or None for all. Of a kernel with a window
        these are channels.
      places: int32, `(outputs,)`: which output of it each output is, one beyond the last for a
        zero; or None where it has all.
      trailing: as in `Matrix`.
      contracted: as in `Matrix`.

    Example:
      >>> import jax.numpy as jnp
      >>> left = FloatMatrix(jnp.array([[5.0]]))
      >>> NarrowMatrix(left, jnp.array([1]), jnp.array([1, 0]), (2, 2)).restore().tolist()
      [[0.0, 0.0], [0.0, 5.0]]
    """

    matrix: Any
    kept: jax.Array | None
    places: jax.Array | None
    trailing: tuple[int, ...] = struct.field(pytree_node=False, default=())
    contracted: tuple[int, ...] = struct.field(pytree_node=False, default=(-2,))

    @property
    def stacked(self) -> tuple[int, ...]:
        """Return the sizes of the axes that stack kernels: none."""
        return ()

    @property
    def dtype(self) -> Any:
        """Return the dtype of the array that this leaf stands for."""
        return self.matrix.dtype

    def in_panels(self) -> "NarrowMatrix":
        """Return the matrix with the inner one as native kernels read it."""
        inner = self.matrix.in_panels()
        return self.replace(matrix=inner)  # pyright: ignore[reportAttributeAccessIssue]

    def left(self, x: jax.Array) -> jax.Array:
        """Return the inputs that the inner matrix has, of all in the last axis of `x`."""
        if self.kept is None:
            return x
        at = x.at[..., self.kept]
        found = at.get(mode="promise_in_bounds", indices_are_sorted=True, unique_indices=True)
        return lax.optimization_barrier(found)  # within a product each would be looked up often

    def spread(self, y: jax.Array) -> jax.Array:
        """Return all outputs, with those of the inner matrix in the last axis of `y`."""
        if self.places is None:
            return y
        padded = jnp.pad(y, [(0, 0)] * (y.ndim - 1) + [(0, 1)])
        return padded.at[..., self.places].get(mode="promise_in_bounds")

    def rows(self) -> jax.Array:
        """Return the matrix as floats, `(outputs, inputs)`."""
        values = self.matrix.rows()
        if self.kept is not None:
            window = self.matrix.inputs // len(self.kept)
            whole = jnp.zeros((len(values), window, self.inputs // window), values.dtype)
            parts = values.reshape(len(values), window, -1)
            values = whole.at[..., self.kept].set(parts).reshape(len(values), -1)
        return self.spread(values.swapaxes(0, 1)).swapaxes(0, 1)


def sparse_matrix(kernel: ArrayLike, axes: Axes) -> SparseMatrix:
    """Keep the weights of a kernel that are not zero.

    Args:
      kernel: floats whose values are known.
      axes: what its axes are; none stacks kernels.

    Example:
      >>> import numpy as np
      >>> sparse_matrix(np.array([[0.0, 2.0], [3.0, 0.0]], np.float32), Axes(0, (0,))).values
      Array([3., 2.], dtype=float32)
    """
    array = np.asarray(kernel)
    rows = axes.as_matrix(array)
    about = axes.statics(array.shape, array.dtype)
    return _compressed_rows(rows.astype(np.float32), about)


def _compressed_rows(rows: np.ndarray, about: dict[str, Any]) -> SparseMatrix:
    """Keep the floats or int8 codes that are not zero of `(outputs, inputs)`."""
    outputs, columns = np.nonzero(rows)
    blocks = -(-rows.shape[1] // SPARSE_BLOCK)
    segments = outputs * blocks + columns // SPARSE_BLOCK
    starts = np.append(0, np.cumsum(np.bincount(segments, minlength=len(rows) * blocks)))
    return SparseMatrix(
        jnp.asarray(rows[outputs, columns]),
        jnp.asarray((columns % SPARSE_BLOCK).astype(np.uint8)),
        jnp.asarray(starts.astype(np.int32)),
        **about,
    )


class _Units:
    """Which inputs and outputs of a matrix are not all zeros: at least one of each.

    Attributes:
      inputs: which inputs, or which channels of a window of `window` elements.
      outputs: which outputs.
      part: how many of the weights these have.
    """

    def __init__(self, used: np.ndarray, window: int = 1) -> None:
        def units(used: Any) -> np.ndarray:
            found = np.flatnonzero(used)
            return found if found.size else np.zeros(1, found.dtype)

        self._outputs, channels = used.shape[0], used.shape[1] // window
        self._all = channels
        self.outputs = units(used.any(axis=1))
        self.inputs = units(used.reshape(-1, window, channels).any(axis=(0, 1)))
        self.part = self.outputs.size * self.inputs.size / (self._outputs * channels)

    def around(
        self, matrix: Matrix, trailing: tuple[int, ...], contracted: tuple[int, ...]
    ) -> NarrowMatrix:
        """Return the whole of a kernel, of which `matrix` has these units."""
        kept = None if self.inputs.size == self._all else jnp.asarray(self.inputs, jnp.int32)
        places = None
        if self.outputs.size < self._outputs:
            found = np.full(self._outputs, self.outputs.size, np.int32)
            found[self.outputs] = np.arange(self.outputs.size)
            places = jnp.asarray(found)
        return NarrowMatrix(matrix, kept, places, trailing, contracted)


def pruned(leaf: Any, axes: Axes, window: int, sparse: float | None) -> Matrix | None:
    """Lay a kernel of floats out without its zeros, where enough of it is zero.

    Args:
      leaf: an array.
      axes: what its axes are.
      window: how many elements the window of its convolution has; 1 for a product of matrices.
      sparse: a part of the weights: as many zeros anywhere are worth compressed rows; or None.

    Returns:
      A `NarrowMatrix` or a `SparseMatrix`, or None.
    """
    values = known_values(leaf)
    if values is None or axes.stacked or leaf.dtype != jnp.float32 or not values.size:
        return None
    rows = axes.as_matrix(values)
    used = rows != 0
    units, count = _Units(used, window), np.count_nonzero(used)
    within = 1 - count / (units.part * rows.size)
    if units.part <= NARROW and (window > 1 or sparse is None or within < sparse):
        contracted = axes.statics(values.shape, values.dtype)["contracted"]
        if window > 1:
            left = values[..., units.inputs, :][..., units.outputs]
            inner = FloatMatrix(jnp.asarray(left), contracted)
        else:
            inner = FloatMatrix(jnp.asarray(rows[units.outputs][:, units.inputs].T.copy()))
        return units.around(inner, values.shape, contracted)
    enough = window == 1 and sparse is not None and 1 - count / rows.size >= sparse
    return sparse_matrix(values, axes) if enough else None


def narrowed(matrix: Matrix) -> Matrix:
    """Leave out inputs and outputs of a matrix of codes that are zeros, where enough are.

    Inputs are left out where each output has one scale. A matrix of another kind, one that is
    stacked, or whose values are not known, comes back as it is.

    Args:
      matrix: by rows.
    """
    codes = isinstance(matrix, (Int8Matrix, Int4Matrix))
    if not codes or matrix.stacked or not all(map(on_host, jax.tree.leaves(matrix))):
        return matrix
    used = np.asarray(matrix.rows()) != 0
    if matrix.scale.shape[-1] != 1:  # groups of inputs stay whole
        used |= used.any(1, keepdims=True)
        used[0] |= not used.any()  # of a kernel of zeros one output stays, with all its inputs
    units = _Units(used)
    if units.part > NARROW:
        return matrix
    inner: Any = matrix.at(jnp.asarray(units.outputs))
    size = units.inputs.size
    about: dict[str, Any] = {"trailing": (units.outputs.size, size)}
    if isinstance(matrix, Int8Matrix):
        about |= {"codes": inner.codes[:, units.inputs], "input_scale": matrix.input_scale}
    elif size < matrix.inputs:
        about["packed"] = pack4(inner.codes()[:, units.inputs].astype(jnp.int32))
        about["group"] = -(-size // BLOCK) * BLOCK
    return units.around(inner.replace(**about), matrix.trailing, matrix.contracted)


def thinned(matrix: Matrix, sparse: float) -> Matrix:
    """Keep the codes of a matrix that are not zeros, in compressed rows, where enough are zeros.

    A matrix of another kind, one whose outputs have several scales or whose inputs have a step, one
    that is stacked, or whose values are not known, comes back as it is.

    Args:
      matrix: by rows.
      sparse: a part of the weights: so many zeros are enough.
    """
    if isinstance(matrix, TurnedMatrix):
        return TurnedMatrix(thinned(matrix.matrix, sparse), matrix.factor, matrix.signs)
    if not isinstance(matrix, (Int8Matrix, Int4Matrix)) or matrix.scale.shape[-1] != 1:
        return matrix
    more = matrix.input_scale if isinstance(matrix, Int8Matrix) else matrix.table
    if more is not None or matrix.stacked or not all(map(on_host, jax.tree.leaves(matrix))):
        return matrix
    alone: Any = matrix.replace(  # pyright: ignore[reportAttributeAccessIssue]
        scale=jnp.ones_like(matrix.scale), dtype=jnp.dtype(jnp.float32)
    )
    levels = np.asarray(alone.rows())
    codes = np.clip(levels, -128, 127).astype(np.int8)
    if np.any(codes != levels) or 1 - np.count_nonzero(codes) / codes.size < sparse:
        return matrix
    about = {"trailing": matrix.trailing, "contracted": matrix.contracted, "dtype": matrix.dtype}
    return _compressed_rows(codes, about | {"scale": matrix.scale[:, 0]})
