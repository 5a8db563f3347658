"""How codes lie: 4-bit codes and signs in bytes, and rows of bytes in panels.

Native kernels add up a sum for each of sixteen outputs in the lanes of a vector, so that what
sixteen outputs hold of the same inputs lies in one run of memory: a panel.
"""

import jax
import jax.numpy as jnp

BLOCK = 64  # 4-bit codes that are packed together, into 32 bytes
SIGNS = 32  # signs that are packed together
PANEL = 16  # rows that lie side by side
BYTES = 4  # of a row that lie together in a panel


def pack4(codes: jax.Array) -> jax.Array:
    """Pack codes 0 to 15 in blocks of 64; what fills up the last block is 8.

    Args:
      codes: `(..., inputs)`, any integers 0 to 15.

    Returns:
      uint8, `(..., 32 * ceil(inputs / 64))`.

    Example:
      >>> import jax.numpy as jnp
      >>> [hex(byte) for byte in pack4(jnp.arange(16))[:3].tolist()]
      ['0x80', '0x81', '0x82']
    """
    *before, inputs = codes.shape
    fill = -inputs % BLOCK
    edges = [(0, 0)] * len(before) + [(0, fill)]
    filled = jnp.pad(codes.astype(jnp.uint8), edges, constant_values=8)
    halves = filled.reshape(*before, (inputs + fill) // BLOCK, 2, BLOCK // 2)
    return (halves[..., 0, :] | (halves[..., 1, :] << 4)).reshape(*before, (inputs + fill) // 2)


def unpack4(packed: jax.Array, inputs: int) -> jax.Array:
    """Undo `pack4`.

    Example:
      >>> import jax.numpy as jnp
      >>> unpack4(pack4(jnp.arange(5)), 5).tolist()
      [0, 1, 2, 3, 4]
    """
    *before, width = packed.shape
    blocks = packed.reshape(*before, width // (BLOCK // 2), 1, BLOCK // 2)
    halves = jnp.concatenate([blocks & 15, blocks >> 4], axis=-2)
    return halves.reshape(*before, 2 * width)[..., :inputs]


def pack_bits(flags: jax.Array) -> jax.Array:
    """Pack booleans along the last axis into bytes, the lowest bit first, whole words of 32.

    Example:
      >>> import jax.numpy as jnp
      >>> pack_bits(jnp.array([True, False, True])).tolist()
      [5, 0, 0, 0]
    """
    fill = -flags.shape[-1] % SIGNS
    filled = jnp.pad(flags, [(0, 0)] * (flags.ndim - 1) + [(0, fill)])
    return jnp.packbits(filled, axis=-1, bitorder="little")


def unpack_bits(bits: jax.Array, inputs: int) -> jax.Array:
    """Undo `pack_bits`: uint8, 0 or 1.

    Example:
      >>> import jax.numpy as jnp
      >>> unpack_bits(jnp.array([5, 0, 0, 0], jnp.uint8), 3).tolist()
      [1, 0, 1]
    """
    return jnp.unpackbits(bits, axis=-1, count=inputs, bitorder="little")


def into_panels(rows: jax.Array, item: int) -> jax.Array:
    """Turn `(..., rows, count * item)` into `(..., panels, count, 16, item)`, filled up with zeros.

    Example:
      >>> into_panels(jnp.arange(6).reshape(2, 3), 1)[0, 1, :3, 0]
      Array([1, 4, 0], dtype=int32)
    """
    *stacked, count, width = rows.shape
    filled = jnp.pad(rows, [(0, 0)] * len(stacked) + [(0, -count % PANEL), (0, 0)])
    panels = filled.reshape(*stacked, -(-count // PANEL), PANEL, width // item, item)
    return panels.swapaxes(-2, -3)


def out_of_panels(panels: jax.Array, rows: int) -> jax.Array:
    """Turn panels back into `(..., rows, count * item)`.

    Example:
      >>> out_of_panels(into_panels(jnp.arange(6).reshape(2, 3), 1), 2)
      Array([[0, 1, 2],
             [3, 4, 5]], dtype=int32)
    """
    *stacked, count, items, _, item = panels.shape
    spread = panels.swapaxes(-2, -3).reshape(*stacked, count * PANEL, items * item)
    return spread[..., :rows, :]


def rows_at(panels: jax.Array, index: jax.Array) -> jax.Array:
    """Return rows of panels that are not stacked, `(index, count * item)`.

    Example:
      >>> rows_at(into_panels(jnp.arange(6).reshape(2, 3), 1), jnp.array([1]))
      Array([[3, 4, 5]], dtype=int32)
    """
    found = panels[index // PANEL, :, index % PANEL]
    return found.reshape(len(index), panels.shape[1] * panels.shape[3])
