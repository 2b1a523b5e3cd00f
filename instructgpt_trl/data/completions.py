"""Sampled completions on disk, one JSON object a line, without any tracker (trl#2948)."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .files import InputError


class CompletionsFile:
    """
    A JSONL file of completions, each row with the `step` that it was sampled at.

    Args:
        path (`Path`): the file; its folder is made when the first row is written.
    """

    def __init__(self, path: Path):
        self.path = path
        self.own = 0  # rows that this object has written; they are the last ones

    def start(self, step: int, keep_baseline: bool = False) -> None:
        """
        Take out the rows of an earlier run from `step` on, where this run starts, and a line cut short. With
        `keep_baseline`, what this object wrote of step 0, an evaluation before the training, stays.
        """
        if not self.path.exists():
            return
        complete, steps = self.read()
        first_own = len(complete) - (self.own if keep_baseline else 0)
        kept = [line for i, line in enumerate(complete) if steps[i] < step or (i >= first_own and steps[i] == 0)]
        unfinished = self.path.with_name(f".unfinished-{self.path.name}")  # a run that is killed here loses nothing
        unfinished.write_text("".join(kept), encoding="utf-8")
        os.replace(unfinished, self.path)
        self.own = sum(i >= first_own and steps[i] == 0 for i in range(len(complete)))

    def read(self) -> tuple[list[str], list[int]]:
        """
        The lines that are there, without one cut short, and the step of each.

        Raises:
            [`InputError`]: a file that something else has written.
        """
        try:
            with self.path.open(encoding="utf-8") as file:
                complete = [line for line in file if line.endswith("\n")]
            steps = [json.loads(line)["step"] for line in complete]
            if not all(isinstance(step, int) for step in steps):
                raise ValueError("a step is no number")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"{self.path}: not a file of completions that a run has written ({type(error).__name__}: {error}); "
                f"move it away, or give another output_dir"
            ) from None
        return complete, steps

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write `rows` behind those that are there."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                self.own += 1
