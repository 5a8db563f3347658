"""Reading and writing the small numbers of a file."""

from jopt.codec._errors import CodecError


class Cursor:
    """Read bytes from the front, refusing to read past the end."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes."""
        if self._at + count > len(self._data):
            short = self._at + count - len(self._data)
            raise CodecError(f"truncated by {short} bytes.")
        self._at += count
        return self._data[self._at - count : self._at]

    def byte(self) -> int:
        """Return the next byte."""
        return self.take(1)[0]

    def varint(self) -> int:
        """Return the next number in base 128, lowest digits first."""
        value, shift = 0, 0
        while True:
            digit = self.byte()
            value |= (digit & 127) << shift
            shift += 7
            if digit < 128:
                return value
            if shift > 63:
                raise CodecError("a length is longer than 64 bits.")

    def rest(self) -> bytes:
        """Return all that is left."""
        return self.take(len(self._data) - self._at)


def varint(value: int) -> bytes:
    """Write a number in base 128, lowest digits first.

    Example:
      >>> varint(300).hex()
      'ac02'
    """
    digits = bytearray()
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])
