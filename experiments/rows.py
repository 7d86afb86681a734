"""A table of finished runs that grows row by row, is shared by processes, and is whole again after any of them died."""

import csv
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path


class Rows:
    """A CSV file; cells are JSON, texts as they are."""

    def __init__(self, path: Path, fields: Sequence[str]):
        self.path, self.fields = path, tuple(fields)

    def read(self) -> list[dict]:
        """All whole rows. ValueError where the file has other columns."""
        if not self.path.is_file():
            return []
        # Line by line: a quotation that a cut left open ends with its line.
        lines = [next(csv.reader([line]), []) for line in self.path.read_text().splitlines()]
        if (columns := tuple(lines[0] if lines else ())) != self.fields:
            unlike = sorted(set(columns) ^ set(self.fields))
            raise ValueError(f"{self.path} has other columns ({', '.join(unlike)}): give another --out")
        return [dict(zip(columns, map(_value, row))) for row in lines[1:] if len(row) == len(columns)]

    def add(self, row: dict) -> None:
        """Appends a row in one write. A line that a dying process cut short is ended first."""
        self._begin()
        with self.path.open("rb+") as file:
            file.seek(-1, os.SEEK_END)
            cut = file.read() != b"\n"
        with self.path.open("a", newline="") as file:
            file.write("\n" * cut + _line([_cell(row[field]) for field in self.fields]))

    def _begin(self) -> None:
        """Makes the file with its head, whole or not at all: several processes may begin at once."""
        if not self.path.is_file():
            part = self.path.with_suffix(f".{os.getpid()}.part")
            part.write_text(_line(self.fields))
            try:
                os.link(part, self.path)
            except FileExistsError:
                pass
            part.unlink()


def _line(cells: Sequence[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _cell(value) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _value(cell: str):
    try:
        return json.loads(cell)
    except json.JSONDecodeError:
        return cell
