"""Sampled completions on disk, one JSON object a line, without any tracker (trl#2948)."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class CompletionsFile:
    """
    A JSONL file of completions, each row with the `step` that it was sampled at.

    Args:
        path (`Path`): the file; its folder is made when the first row is written.
    """

    def __init__(self, path: Path):
        self.path = path
        self.appended = False  # whether this run has written rows

    def start(self, step: int) -> None:
        """Take out the rows of an earlier run from `step` on, where this run starts, and a line cut short."""
        if not self.path.exists():
            return
        with self.path.open(encoding="utf-8") as file:
            complete = [line for line in file if line.endswith("\n")]
        kept = [line for line in complete if json.loads(line)["step"] < step]
        self.path.write_text("".join(kept), encoding="utf-8")

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write `rows` behind those that are there."""
        self.appended = True
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
