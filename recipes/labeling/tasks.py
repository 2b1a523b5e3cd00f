"""Labelling tasks from a file that may change while people work on them."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instructgpt_trl.data import InputError, check_row, parse_json, read_rows

MOST = 9  # completions, which have a key each [InstructGPT 3.4: K = 4 to 9]


@dataclass(frozen=True)
class Task:
    """
    A prompt and its completions.

    Args:
        id (`str`): From the file, else a hash of the texts.
        version (`str`): A hash of the texts, so that what was shown and what is ranked are the same.
        prompt (`str` or `list`): Text or conversation.
        completions (`tuple`): K texts or conversations; none where only a demonstration is wanted.
        rest (`dict`): Other columns of the row: `models`, `category` and so on. They are not shown.
    """

    id: str
    version: str
    prompt: Any
    completions: tuple[Any, ...]
    rest: dict[str, Any]

    def order(self, labeler: str) -> list[int]:
        """The order in which this labeler sees the completions: shuffled, and the same after a reload."""
        places = range(len(self.completions))
        return sorted(places, key=lambda k: hashlib.sha256(f"{labeler} {self.version} {k}".encode()).digest())

    def wants(self, overlap: float) -> int:
        """Labelers: two for a share `overlap` of tasks, chosen by the id, one for the others."""
        share = int.from_bytes(hashlib.sha256(f"overlap {self.id}".encode()).digest()[:8], "big") / 2**64
        return 1 + (share < overlap)


def task_of(row: Any, where: str) -> Task:
    """
    Raises:
        [`InputError`]: what is wrong with the row, what was expected and the fix.
    """
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object with columns prompt, completions, got {type(row).__name__}")
    completions = row.get("completions") or []
    if isinstance(completions, str):  # a cell of a CSV file
        completions = parse_json(completions, f"{where}, column 'completions'")
    if not completions:
        check_row(row, "prompt", where)
    else:
        ranks = [1] * len(completions) if isinstance(completions, list) else []
        check_row({**row, "completions": completions, "ranks": ranks}, "ranking", where, allow_empty=True)
    if len(completions) > MOST:
        raise InputError(f"{where}: {len(completions)} completions; the page ranks {MOST} at most; split the row")
    texts = json.dumps([row["prompt"], completions], ensure_ascii=False, sort_keys=True)
    try:
        version = hashlib.sha256(texts.encode()).hexdigest()[:16]
    except UnicodeEncodeError:
        raise InputError(f"{where}: half a surrogate pair, which is no character; correct it") from None
    name = row.get("id")
    if name is not None and (isinstance(name, bool) or not isinstance(name, str | int) or name == ""):
        raise InputError(f"{where}, column 'id': expected text or a whole number, got {name!r}; correct it")
    rest = {key: value for key, value in row.items() if key not in ("id", "prompt", "completions", "ranks")}
    models = rest.get("models")
    if models is not None and (not isinstance(models, list) or len(models) != len(completions)):
        raise InputError(f"{where}, column 'models': expected a name for each of {len(completions)} completions")
    return Task(version if name is None else str(name), version, row["prompt"], tuple(completions), rest)


def read_tasks(path: Path) -> dict[str, Task]:
    """
    The tasks of a file, by id.

    Raises:
        [`InputError`]: the first wrong row, two rows with one id, texts and conversations, or no row.
    """
    tasks: dict[str, Task] = {}
    of: dict[str, str] = {}
    forms: dict[bool, str] = {}  # whether text, and where
    for row, where in zip(*read_rows(str(path)), strict=True):
        task = task_of(row, where)
        if task.id in tasks:
            raise InputError(f"{where}: the id '{task.id}' is also that of {of[task.id]}; every task needs its own")
        forms[isinstance(task.prompt, str)] = where
        if len(forms) > 1:
            raise InputError(
                f"{where}: texts in one row and conversations in another ({forms[not isinstance(task.prompt, str)]}), "
                f"which cannot be trained on from one file; give each kind a file and an --output of its own"
            )
        tasks[task.id], of[task.id] = task, where
    if not tasks:
        raise InputError(f"{path}: no tasks; expected rows with columns prompt, completions")
    return tasks


class TaskFile:
    """
    The tasks of a file, read again when it changes. A file that has become wrong leaves the tasks as they were, and
    its mistake in `problem`.
    """

    def __init__(self, path: Path):
        self.path, self.problem = path, None
        self._state = self._look()
        self.tasks = read_tasks(path)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks.values())

    def refresh(self) -> None:
        state = self._look()
        if state == self._state:
            return
        self._state = state
        try:
            self.tasks = read_tasks(self.path)
            self.problem = None
        except (InputError, OSError) as error:
            self.problem = f"the file of tasks has changed and cannot be read; those from before go on. {error}"

    def _look(self) -> tuple[int, ...] | None:
        try:
            state = os.stat(self.path)
        except OSError:
            return None
        return state.st_mtime_ns, state.st_size, state.st_ino
