"""Rows of a long sweep as they are done, so that one that was interrupted goes on where it was."""

import json
import os
from pathlib import Path
from typing import Any

from gapkern import files

__all__ = ["Journal"]


class Journal:
    """Finished rows on disk, one JSON line each, below a line that says what they belong to.

    A row is there whole or not at all: a line that a kill has cut off is not taken.

    Args:
        path: the file; made where there is none.
        facts: what the rows depend on. A file of other facts is begun anew.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "rows.jsonl"
        >>> Journal(path, {"seed": 0}).add(["a", 1], {"robustness": 0.5})
        >>> Journal(path, {"seed": 0}).get(["a", 1]), Journal(path, {"seed": 1}).get(["a", 1])
        ({'robustness': 0.5}, None)
    """

    def __init__(self, path: str | os.PathLike[str], facts: dict[str, Any]):
        self.path, self._rows = Path(path), {}
        heading = json.dumps(facts, sort_keys=True)
        whole = self._whole_lines()
        if whole[:1] == [heading] and (rows := self._read(whole[1:])) is not None:
            self._rows = rows
        else:
            whole = [heading]
        files.write(self.path, lambda p: p.write_text("".join(f"{line}\n" for line in whole), encoding="utf-8"))

    def _whole_lines(self) -> list[str]:
        try:
            *whole, _ = self.path.read_text(encoding="utf-8").split("\n")
        except (OSError, ValueError):
            return []
        return whole

    @staticmethod
    def _read(lines: list[str]) -> dict[str, Any] | None:
        """Rows by their key; None where the lines are not what `add` wrote."""
        try:
            entries = [json.loads(line) for line in lines]
            return {json.dumps(key): dict(row) for key, row in entries}
        except (ValueError, TypeError, RecursionError):
            return None

    def get(self, key: list[Any]) -> dict[str, Any] | None:
        """The row of that key, if it is done."""
        return self._rows.get(json.dumps(key))

    def add(self, key: list[Any], row: dict[str, Any]) -> None:
        """Keeps a row; it is on the disk when this returns."""
        self._rows[json.dumps(key)] = row
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps([key, row]) + "\n")
            file.flush()
            os.fsync(file.fileno())
