"""The one exception of the codec."""


class CodecError(ValueError):
    """Say that a file cannot be read or a tree cannot be stored, and which part is at fault.

    Example:
      >>> issubclass(CodecError, ValueError)
      True
    """
