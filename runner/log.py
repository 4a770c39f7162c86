"""CSV files that survive: a fixed header, one whole line an append, an offset that a checkpoint can go back to."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runner.faults import BadData, StorageError
from runner.files import NO_FOLLOW, reason, write_all


class CsvLog:
    """One CSV file of a run. Rows are dictionaries; keys that are no column are refused."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns, self.known = path, tuple(columns), tuple(columns)
        try:
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | NO_FOLLOW, 0o666)
            if os.fstat(self._handle).st_size == 0:
                self._append(",".join(self.columns))
            self.columns = self._columns_there()
        except OSError as error:
            raise StorageError(f"{path}: {reason(error)}") from error

    def _columns_there(self) -> tuple[str, ...]:
        """The columns that the file has: a run keeps those that it began with, also where the program has got more since."""
        lines = os.pread(self._handle, 1 << 16, 0).decode(errors="replace").split("\n")
        there = tuple(lines[0].split(","))
        return there if len(lines) > 1 and set(there) <= set(self.columns) else self.columns

    def row(self, values: Mapping[str, Any]) -> None:
        """Append one line."""
        unknown = set(values) - set(self.known)
        assert not unknown, f"{self.path.name} has no column {unknown}"
        try:
            self._append(",".join(cell(values.get(column)) for column in self.columns))
        except OSError as error:
            raise StorageError(f"{self.path}: {reason(error)}") from error

    def _append(self, line: str) -> None:
        before = os.fstat(self._handle).st_size
        try:
            write_all(self._handle, (line + "\n").encode())
        except OSError:
            os.ftruncate(self._handle, before)
            raise

    def mark(self) -> dict[str, Any]:
        """Make everything durable and say how far the file reaches: what a checkpoint remembers."""
        try:
            os.fdatasync(self._handle)
        except OSError as error:
            raise StorageError(f"{self.path}: {reason(error)}") from error
        size = os.fstat(self._handle).st_size
        return {"offset": size, "sha256": self._digest(size)}

    def rewind(self, mark: Mapping[str, Any]) -> None:
        """Drop what was written after a mark. Raises BadData where the file is not the one that was marked."""
        offset = int(mark["offset"])
        if os.fstat(self._handle).st_size < offset or self._digest(offset) != mark["sha256"]:
            raise BadData(
                f"{self.path}: was changed since the checkpoint; restore it, or start the run anew in another folder"
            )
        os.ftruncate(self._handle, offset)

    def clear(self) -> None:
        """Start over with the header alone."""
        try:
            os.ftruncate(self._handle, 0)
            self.columns = self.known
            self._append(",".join(self.columns))
        except OSError as error:
            raise StorageError(f"{self.path}: {reason(error)}") from error

    def _digest(self, size: int) -> str:
        digest, position = hashlib.sha256(), 0
        while position < size:
            block = os.pread(self._handle, min(1 << 20, size - position), position)
            digest.update(block)
            position += len(block)
        return digest.hexdigest()

    def close(self) -> None:
        os.close(self._handle)


def cell(value: Any) -> str:
    """A value as CSV text: floats to the last bit, text quoted where it must be and never read as a formula.

    >>> [cell(v) for v in (None, 0.1, 3, "a,b", "=1+1")]
    ['', '0.1', '3', '"a,b"', "'=1+1"]
    """
    if value is None:
        return ""
    if isinstance(value, float):
        return repr(value)
    text = str(value)
    if isinstance(value, str) and text.startswith(("=", "+", "-", "@", "\t", "\r")):
        text = "'" + text
    quoted = any(c in text for c in ',"\n\r')
    return '"' + text.replace('"', '""') + '"' if quoted else text
