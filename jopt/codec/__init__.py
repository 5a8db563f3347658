"""Store a whole tree of parameters in one small file, and read it back bit for bit.

    jopt.codec.save("model.jopt", params)
    params = jopt.codec.load("model.jopt")
    print(jopt.codec.inspect("model.jopt"))

Pruned and quantized leaves are entropy-coded: codes, and where the zeros are, by models that learn
from rows, columns and neighbours while they code, so that the file holds no tables and no bitmask.
Nothing in a file is executed or unpickled; a damaged one raises a `CodecError`.
"""

from jopt.codec._errors import CodecError
from jopt.codec._file import inspect, load, read_metadata, save, verify
from jopt.codec._ledger import Entry, Ledger

__all__ = ["CodecError", "Entry", "Ledger", "inspect", "load", "read_metadata", "save", "verify"]
