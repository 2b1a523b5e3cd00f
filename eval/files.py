"""Files that are there whole or not at all."""

import json
import math
import os
from collections.abc import Callable, Sequence
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
    name is noticed; of anything else, such as a hub id, the name.
    """
    path = Path(path)
    files = [path] if path.is_file() else []
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.suffix.lower() in _CONTENT]
    found = [str(path), *([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files)]
    adapter = path / "adapter_config.json"
    if adapter.is_file():
        found.append(fingerprint(json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]))
    return found


def fingerprint_of(name: str | None) -> Any:
    """Of a judge or scorer, KIND:PATH or PATH, its name and what its file or folder holds."""
    return [name, *(fingerprint(part) for part in (name or "").split(":") if part and Path(part).exists())]


def cached(
    file: Path, settings: dict[str, Any], make: Callable[[], Any], complete: Callable[[Any], bool] = lambda found: True
) -> Any:
    """
    What `make` gave in an earlier call with the same settings, which stands in `file`, or gives now. It is not written
    where it is not `complete`, so that another call tries again.
    """
    settings = json.loads(json.dumps(plain(settings)))
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
    """`function(*item)`, whose answers stand in `file`, a line each, so that a later call does not ask `who` again."""
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
            line = json.dumps({"who": who, "item": item, "answer": answer}, ensure_ascii=False)
            with lock, file.open("a", encoding="utf-8") as out:
                out.write(line + "\n")
            known[key] = answer
        return known[key]

    return ask


def refuse_input(output: Path, *inputs: Any) -> None:
    """
    Raises:
        [`InputError`]: the output is a folder, or one of the files that are read.
    """
    if output.is_dir():
        raise InputError(f"--output {output}: is a folder; expected a file")
    if any(one and output.resolve() == Path(one).resolve() for one in inputs):
        raise InputError(f"--output {output}: is one of the files to read; choose another")


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
