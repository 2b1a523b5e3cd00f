"""Files of rows: each reader gives the rows and the place of each, to be named where a row is wrong."""

import csv
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset


class InputError(ValueError):
    """A mistake in what the user passed in. The message is one line: where, what was expected, what to do."""


def load_arrow(source: str, split: str) -> "Dataset":
    """A Parquet file, a folder written by `save_to_disk`, or one split of a dataset on the hub."""
    # Here, since it takes seconds, which who reads JSON Lines need not wait for
    from datasets import DatasetDict, load_dataset, load_from_disk

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
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise InputError(f"{path}, row {line}: not UTF-8 ({error.reason}); convert the file to UTF-8") from None
    if "\0" in text:  # English in UTF-16 is UTF-8 too, byte by byte
        line = text[: text.index("\0")].count("\n") + 1
        raise InputError(
            f"{path}, row {line}: a NUL character, as in UTF-16 or a binary file; convert the file to UTF-8"
        )
    return text.split("\n")


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
        for column in reader.fieldnames or []:
            if list(reader.fieldnames).count(column) > 1:
                raise InputError(f"{path}: the header names the column '{column}' twice; rename one")
        for row in reader:
            if None in row:
                raise InputError(
                    f"{path}, row {len(rows) + 1}: more values than the header has columns; quote texts with commas"
                )
            rows.append({column: value or None for column, value in row.items()})  # an empty cell is no value
    except csv.Error as error:
        raise InputError(f"{path}, row {len(rows) + 1}: not valid CSV ({error}); correct the quotes") from None
    return rows, [f"{path}, row {n}" for n in range(1, len(rows) + 1)]


def read_json(path: Path, bad: list[str] | None = None) -> tuple[list[Any], list[str]]:
    """
    Rows of a JSON or JSON Lines file, and the place of each ("FILE, row N", from 1 as an editor counts lines). Lines
    that are not JSON are told in `bad`, if it is given, and left out.
    """
    lines = _lines(path)
    if path.suffix.lower() == ".json" and "".join(lines).lstrip().startswith("["):
        text = "\n".join(lines)
        rows = parse_json(text, str(path), characters=False)
        places = [f"{path}, row {n}" for n in range(1, len(rows) + 1)]
        if "\\ud" in text.lower():
            for row, place in zip(rows, places, strict=True):
                check_characters(row, place)
        return rows, places
    rows, places = [], []
    for n, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(parse_json(line, f"{path}, row {n}"))
            places.append(f"{path}, row {n}")
        except InputError as error:
            if bad is None:
                raise
            bad.append(str(error))
    return rows, places


def parse_json(text: str, where: str, characters: bool = True) -> Any:
    """
    Raises:
        [`InputError`]: it is not JSON, or unless `characters` is false, a text in it cannot be written in UTF-8.
    """
    try:
        value = json.loads(text, object_pairs_hook=unique_keys)
        if characters and "\\ud" in text.lower():
            check_characters(value, where)
        return value
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text else ""
        reason = f"not valid JSON ({error.msg}, {line}column {error.colno})"
    except RecursionError:
        reason = "nested too deep"
    except InputError:
        raise
    except ValueError as error:  # a number of thousands of digits, a key twice
        reason = f"not to be read ({error})"
    raise InputError(f"{where}: {reason}; correct it")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`, which takes the last of several values of a key without a word. Raises `ValueError`."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return value


def check_characters(value: Any, where: str) -> None:
    """Raise [`InputError`] if a text in it cannot be written in UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: half a surrogate pair, which is no character; correct it") from None


READERS: dict[str, Callable[[Path], tuple[list[Any], list[str]]]] = {
    ".jsonl": read_json,
    ".json": read_json,
    ".csv": read_csv,
    ".txt": read_text,
}


def read_rows(source: str, bad: list[str] | None = None) -> tuple[list[Any], list[str]]:
    """
    Rows of a `.jsonl`, `.json`, `.csv` or `.parquet` file as they are, and the place of each, to be named in messages.
    Lines that are not JSON are told in `bad`, if it is given, and left out.

    Raises:
        [`InputError`]: no such file, or it cannot be read.
    """
    path = Path(source)
    if not path.is_file():
        raise InputError(f"{source}: no such file; check the path (working directory: {os.getcwd()})")
    if path.suffix.lower() == ".parquet":
        rows = load_arrow(source, "train").to_list()
        return rows, [f"{source}, row {n}" for n in range(len(rows))]
    if path.suffix.lower() not in READERS:
        raise InputError(f"{source}: unknown file type '{path.suffix}'; use .jsonl, .json, .csv or .parquet")
    reader = READERS[path.suffix.lower()]
    return reader(path, bad) if reader is read_json else reader(path)


def write_rows(rows: Iterable[dict[str, Any]], output: str | os.PathLike) -> None:
    """Write JSON Lines in UTF-8: all of them under the name, or nothing."""
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=output.parent, prefix=".unfinished-", encoding="utf-8", delete=False
    ) as f:
        try:
            f.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)  # dates
            f.flush()
            os.fsync(f.fileno())
            os.replace(f.name, output)
        except BaseException:
            os.unlink(f.name)
            raise


def check_output_dir(output_dir: str | os.PathLike | None) -> None:
    """
    Refuse an output folder that cannot be written, before any work is done. Leaves nothing behind.

    Raises:
        [`InputError`]: the folder and why it cannot be written.
    """
    if output_dir is None:
        return
    parent = Path(output_dir).absolute()
    try:
        while not parent.exists():
            if parent.is_symlink():
                raise InputError(f"output folder {output_dir}: {parent} is a link to nowhere; remove it")
            parent = parent.parent
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise InputError(
            f"output folder {output_dir}: cannot be written ({error.strerror}); choose another output_dir"
        ) from None
