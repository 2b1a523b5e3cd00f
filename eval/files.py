"""Files that are there whole or not at all."""

import argparse
import csv
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

from instructgpt_trl.data import InputError

# Of a model's folder what its outputs depend on, and of rows
_CONTENT = (
    ".json",
    ".jsonl",
    ".safetensors",
    ".bin",
    ".model",
    ".pt",
    ".csv",
    ".tsv",
    ".txt",
    ".parquet",
    ".jinja",
    ".py",
)


def named(given: Sequence[str], flag: str) -> dict[str, str]:
    """
    NAME=VALUE arguments.

    Raises:
        [`InputError`]: one is something else, or a name is there twice.
    """
    found = dict(one.partition("=")[::2] for one in given)
    if len(found) < len(given) or not all(found.values()) or "" in found or any({*name} & {*"/\\"} for name in found):
        raise InputError(f"{flag} {' '.join(given)}: expected NAME=VALUE, each name once and without / and \\")
    return found


def positive(text: str) -> int:
    """An argument that is a whole number, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number, 1 or more, found '{text}'")
    return int(text)


def not_negative(text: str) -> float:
    """An argument that is a number, 0 or more."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number, 0 or more, found '{text}'")
    return number


@contextmanager
def loading(path: str) -> Iterator[None]:
    """
    Raises:
        [`InputError`]: what is loaded inside, from this folder or hub id, is no model or none that fits.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # transformers', safetensors' and torch's, of many kinds
        raise InputError(
            f"{path}: cannot be loaded ({said(error)}); expected the folder of a model or a hub id"
        ) from None


def said(error: Exception) -> str:
    """An error in one line; of what kind it is, where it is none of ours."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"


def key_of(prompt: Any) -> str:
    """A prompt, string or conversation, as text by which rows are told apart."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, ensure_ascii=False)


def fingerprint(path: str | Path) -> Any:
    """
    Of a file or folder its path with names, sizes and times of change, by which another model or data under the same
    name is noticed, folders in it aside (checkpoints, reports); of anything else, such as a hub id, the name.
    """
    path = Path(path)
    files = [path] if path.is_file() else []
    if path.is_dir():
        files = [file for file in sorted(path.glob("*")) if file.is_file() and file.suffix.lower() in _CONTENT]
    found = [str(path), *([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files)]
    try:
        adapter = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        found.append(fingerprint(adapter["base_model_name_or_path"]))
    except (OSError, ValueError, KeyError, TypeError):  # none, or a broken one, which is named where it is loaded
        pass
    return found


def fingerprint_of(name: str | None) -> Any:
    """Of a judge or scorer, KIND:PATH or PATH, its name and what its file or folder holds."""
    return [name, *(fingerprint(part) for part in (name or "").split(":") if part and Path(part).exists())]


def digest(settings: Any) -> str:
    """Twelve letters that tell settings apart, for the name of a file."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def cached(
    file: Path, settings: dict[str, Any], make: Callable[[], Any], complete: Callable[[Any], bool] = lambda found: True
) -> Any:
    """
    What `make` gave in an earlier call with the same settings, which stands in `file` with a digest of them in its
    name, or gives now. It is not written where it is not `complete`, so that another call tries again.
    """
    settings = json.loads(json.dumps(plain(settings)))
    file = file.with_name(f"{file.stem}_{digest(settings)}{file.suffix}")
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        if known["settings"] == settings:
            return known["found"]
    except (OSError, ValueError, KeyError, TypeError):  # none, or half of one
        pass
    found = make()
    if complete(found):
        write_json({"settings": settings, "found": found}, file)
    return json.loads(json.dumps(plain(found)))


def kept(function: Callable[..., float], file: Path | None, who: str) -> Callable[..., float]:
    """
    `function(*item)`, whose answers from 0 to 1 stand in `file`, a line each, so that a later call does not ask `who`
    again.
    """
    if file is None:
        return function
    known: dict[str, float] = {}
    lines = file.read_text(encoding="utf-8").split("\n") if file.exists() else []
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
            known[key_of([row["who"], *row["item"]])] = row["answer"]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{file}, row {number}: is no answer; take the row out, or delete the file") from None
    if lines[-1:] != [""]:  # none yet, or a line that was cut off
        write_text("".join(line + "\n" for line in lines[:-1]), file)
    lock = Lock()

    def ask(*item: Any) -> float:
        key = key_of([who, *item])
        if key not in known:
            answer = function(*item)
            if not (isinstance(answer, int | float) and 0 <= answer <= 1):
                return answer
            line = json.dumps({"who": who, "item": item, "answer": answer}, ensure_ascii=False)
            with lock, file.open("a", encoding="utf-8") as out:
                out.write(line + "\n")
            known[key] = answer
        return known[key]

    return ask


def read_table(file: str | Path, columns: Sequence[str], delimiter: str = ",") -> list[dict[str, str]]:
    """
    Rows of a CSV file with a header, every value as it stands.

    Raises:
        [`InputError`]: a column is missing, a row is too short or too long, a quote is not closed, or there is no row.
        `OSError`: it cannot be opened.
    """
    csv.field_size_limit(2**31 - 1)
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
            rows, header = list(reader), reader.fieldnames or []
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{file}: expected CSV in UTF-8 ({error}); correct it") from None
    missing = [name for name in columns if name not in header]
    if missing:
        raise InputError(f"{file}: no column {', '.join(missing)}; found {', '.join(header) or 'none'}")
    if not rows:
        raise InputError(f"{file}: no rows below the header")
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise InputError(
                f"{file}, row {number}: expected {len(header)} values, as many as there are columns; quote texts with "
                f"'{delimiter}'"
            )
    return rows


def read_texts(source: str, columns: Sequence[str], name: str | None = None, split: str = "train") -> list[str]:
    """
    The texts of a column, the first of `columns` that is there; one may stand in {"text": ...}.

    Args:
        source (`str`): A .csv, .jsonl, .json or .parquet file, or a hub id with its `name` and `split`.

    Raises:
        [`InputError`]: it cannot be read, has no such column, or a row has no text.
    """
    from datasets import load_dataset

    kinds = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
    suffix = Path(source).suffix.lower()
    try:
        if suffix == ".csv":  # not by pandas, to which "NA" and "None" are missing and "007" is a number
            rows: Any = read_table(source, ())
        elif suffix in kinds:
            rows = load_dataset(kinds[suffix], data_files=source, split="train")
        else:
            rows = load_dataset(source, name, split=split)
    except InputError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"{source}: expected rows with `{columns[0]}`, a .csv, .jsonl or .parquet file or a hub id ({reason})"
        ) from None
    known = list(rows[0]) if len(rows) else ["no rows"]
    column = next((name for name in columns if name in known), None)
    if column is None:
        raise InputError(f"{source}: no column `{columns[0]}`; found {', '.join(known)}")
    values = [row[column].get("text") if isinstance(row[column], dict) else row[column] for row in rows]
    for number, value in enumerate(values, 1):
        if not isinstance(value, str) or not value.strip():
            raise InputError(
                f"{source}, row {number}: `{column}` is {value!r}; expected a text; fill it in or drop the row"
            )
    return values


def refuse_input(output: Path, *inputs: Any, flag: str = "--output") -> None:
    """
    Raises:
        [`InputError`]: the output is a folder, or one of the files that are read; of a judge, KIND:PATH or
            python:FILE.py:FUNCTION, too.
    """
    if output.is_dir():
        raise InputError(f"{flag} {output}: is a folder; expected a file")
    paths = [part for one in inputs if one for part in (str(one), *str(one).split(":")) if part]
    if any(output.resolve() == Path(path).resolve() for path in paths):
        raise InputError(f"{flag} {output}: is one of the files to read; choose another")


def check_labeler(row: dict[str, Any], where: str) -> None:
    """
    Raises:
        [`InputError`]: `labeler_id` or `group` is neither text nor a whole number.
    """
    for name in ("labeler_id", "group"):
        if not isinstance(row.get(name), str | int | None):
            raise InputError(f"{where}: expected text or a whole number for `{name}`, found {row[name]}")


def plain(value: Any) -> Any:
    """For JSON, which has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: plain(of) for key, of in value.items()}
    if isinstance(value, list | tuple):
        return [plain(of) for of in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(value: Any, file: Path) -> None:
    write_text(json.dumps(plain(value), indent=1, ensure_ascii=False) + "\n", file)


def write_text(text: str, file: Path) -> None:
    """Whole or not at all: an earlier file stays until the new one is complete."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
