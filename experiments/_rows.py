"""The rows of one seed of an experiment: finished ones are read, others made and kept."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from experiments import _results

Row = dict[str, Any]


class Rows:
    """Rows of one seed, and facts beside them, in a file that each of them is written to at once.

    Attributes:
      same: entries that name a row.
      done: rows by their names and facts by theirs.
    """

    def __init__(
        self,
        file: Path,
        same: tuple[str, ...],
        held: Iterable[Row] = (),
        facts: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Read what is finished.

        Args:
          file: which need not be there.
          same: entries that name a row.
          held: rows that results hold; those of the file go first.
          facts: that results hold.
        """
        self.file, self.same = file, same
        self.done: dict[str, Any] = {self._key(row): row for row in held} | dict(facts)
        if file.exists():
            self.done |= json.loads(file.read_text())
        self._wanted: list[str] = []

    def _key(self, row: Row) -> str:
        return " ".join(str(row[name]) for name in self.same)

    def add(self, about: Row, make: Callable[[], Row]) -> Row:
        """Make a row that is not among the finished ones; return it in any case.

        Args:
          about: the entries that name it.
          make: returns the others.
        """
        key = self._key(about)
        self._wanted.append(key)
        return self.once(key, lambda: about | make())

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """Return a fact, made if it is not known."""
        if name not in self.done:
            self.done[name] = make()
            _results.write_atomically(self.file, json.dumps(self.done).encode())
        return self.done[name]

    def list(self) -> list[Row]:
        """Return the rows in the order in which they were asked for."""
        return [self.done[key] for key in self._wanted]
