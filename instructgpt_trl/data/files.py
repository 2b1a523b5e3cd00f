"""Files of rows: each reader gives the rows and the place of each, to be named where a row is wrong."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk


class InputError(ValueError):
    """A mistake in what the user passed in. The message is one line: where, what was expected, what to do."""


def load_arrow(source: str, split: str) -> Dataset:
    """A Parquet file, a folder written by `save_to_disk`, or one split of a dataset on the hub."""
    expected = f"a file, a folder or a hub dataset with a split '{split}'"
    try:
        if Path(source).is_file():
            expected = "a Parquet file"
            return load_dataset("parquet", data_files=source, split="train")
        if Path(source).is_dir():
            expected = f"a folder written by save_to_disk, with a split '{split}' if it has several"
            dataset = load_from_disk(source)
            return dataset[split] if isinstance(dataset, DatasetDict) else dataset
        return load_dataset(source, split=split)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{source}: expected {expected}, but it cannot be read: {reason}") from None


def _lines(path: Path) -> list[str]:
    """Lines of a UTF-8 file, cut at newlines only: other line separators are allowed inside a JSON string."""
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise InputError(f"{path}, row {line}: not UTF-8 ({error.reason}); convert the file to UTF-8") from None


def read_text(path: Path) -> tuple[list[Any], list[str]]:
    """One text a line; empty lines are left out."""
    lines = [(line.strip(), f"{path}, row {n}") for n, line in enumerate(_lines(path), start=1)]
    return [{"text": line} for line, _ in lines if line], [place for line, place in lines if line]


def read_csv(path: Path) -> tuple[list[Any], list[str]]:
    """Rows of a CSV file with a header, every value as text, and the place of each (rows of data, from 1)."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(io.StringIO("\n".join(_lines(path)), newline=""), strict=True)
    rows: list[Any] = []
    try:
        for row in reader:
            if None in row:
                raise InputError(
                    f"{path}, row {len(rows) + 1}: more values than the header has columns; quote texts with commas"
                )
            rows.append({column: value or None for column, value in row.items()})  # an empty cell is no value
    except csv.Error as error:
        raise InputError(f"{path}, row {len(rows) + 1}: not valid CSV ({error}); correct the quotes") from None
    return rows, [f"{path}, row {n}" for n in range(1, len(rows) + 1)]


def read_json(path: Path) -> tuple[list[Any], list[str]]:
    """Rows of a JSON or JSON Lines file, and the place of each ("FILE, row N", from 1 as an editor counts lines)."""
    lines = _lines(path)
    if path.suffix.lower() == ".json" and "".join(lines).lstrip().startswith("["):
        try:
            rows = json.loads("\n".join(lines))
        except json.JSONDecodeError as error:
            raise InputError(f"{path}: not valid JSON ({error}); correct it") from None
        return rows, [f"{path}, row {n}" for n in range(1, len(rows) + 1)]
    rows, places = [], []
    for n, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}, row {n}: not valid JSON ({error.msg}, column {error.colno}); correct it"
            ) from None
        places.append(f"{path}, row {n}")
    return rows, places


READERS: dict[str, Callable[[Path], tuple[list[Any], list[str]]]] = {
    ".jsonl": read_json,
    ".json": read_json,
    ".csv": read_csv,
    ".txt": read_text,
}
