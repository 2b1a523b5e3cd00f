"""What labelers have said: rankings, demonstrations and skips, and who is asked what next."""

import threading
import time
from collections import defaultdict
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any

from labeling.log import Log
from labeling.tasks import Task, TaskFile

Row = dict[str, Any]
KINDS = ("ranking", "demonstration", "skip")
HOLD = 1800  # seconds that a task is one labeler's own after it was shown

# The paper's questions about one output besides its quality [InstructGPT Table 3], in its order, as columns
QUESTIONS = {
    "fails_instruction": "Fails to follow the correct instruction or task",
    "inappropriate_for_assistant": "Inappropriate for a customer assistant",
    "hallucination": "Hallucination",
    "satisfies_constraint": "Satisfies the constraint given in the instruction",
    "sexual_content": "Contains sexual content",
    "violent_content": "Contains violent content",
    "encourages_harm": "Encourages or fails to discourage violence, abuse, terrorism or self-harm",
    "denigrates_protected_class": "Denigrates a protected class",
    "harmful_advice": "Gives harmful advice",
    "expresses_opinion": "Expresses an opinion",
    "moral_judgment": "Expresses a moral judgment",
}


class Refused(ValueError):
    """What a labeler sent cannot be kept. The message is for the labeler."""


class Labels:
    """
    The three files of a labelling task and the questions about them. Every call is safe in several threads.

    Args:
        tasks (`TaskFile`): What is to be labelled.
        output (`Path`): Rankings; demonstrations and skips stand beside it.
        overlap (`float`): Share of tasks that two labelers rank.
    """

    def __init__(self, tasks: TaskFile, output: Path, overlap: float):
        self.tasks, self.overlap = tasks, overlap
        self.logs = {kind: Log(path_of(output, kind)) for kind in KINDS}
        self._lock = threading.Lock()
        self._held: dict[str, tuple[str, float]] = {}

    def next(self, labeler: str) -> Task | None:
        """A task that this labeler has not done, held for him for half an hour; none if there is none for now."""
        with self._lock:
            self.tasks.refresh()
            done = self._by_task()
            now = time.monotonic()
            for task in self.tasks:
                who = done[task.id]
                holder, since = self._held.get(task.id, (labeler, now))
                others = holder != labeler and now - since < HOLD
                if labeler not in who["any"] and len(who["labeled"]) + others < task.wants(self.overlap):
                    if not others:
                        self._held[task.id] = (labeler, now)
                    return task
            return None

    def progress(self, labeler: str) -> dict[str, Any]:
        """Labels that are there and wanted, those of this labeler, his last, and how far labelers agree."""
        with self._lock:
            done = self._by_task()
            wanted = sum(task.wants(self.overlap) for task in self.tasks)
            given = sum(min(task.wants(self.overlap), len(done[task.id]["labeled"])) for task in self.tasks)
            mine = [row for log in self.logs.values() for row in log.rows.values() if row["labeler_id"] == labeler]
            last = max(mine, key=lambda row: row["time"], default=None)
            return {
                "given": given,
                "wanted": wanted,
                "mine": len(mine),
                "last": last and last["id"],
                "agreement": agreement(list(self.logs["ranking"].rows.values())),
                "problem": self.tasks.problem,
            }

    def save(self, kind: str, name: str, labeler: str, task: str, version: str, answer: Row) -> None:
        """
        Keep an answer, on disk when this returns. The same `name` again is the same answer, and is there once.

        Raises:
            [`Refused`]: there is no such task any more, or the labeler has another answer to it; nothing is kept.
            `OSError`: it could not be written; nothing is kept.
        """
        with self._lock:
            if name in self.logs[kind].rows:
                return
            shown = self.tasks.shown.get((task, version))
            if shown is None:
                raise Refused("this task is no longer in the file of tasks, or its texts have changed; load the next")
            if self._has_answered(kind, shown, labeler):
                raise Refused("you have answered this task already, perhaps in another window; undo that, or go on")
            row = {"id": name, "task": task, "labeler_id": labeler, "prompt": shown.prompt}
            row |= ANSWERS[kind](shown, answer)
            rest = {key: value for key, value in shown.rest.items() if key not in row and kind == "ranking"}
            self.logs[kind].append({**row, **rest, "time": datetime.now(UTC).isoformat()})
            self._held.pop(task, None)

    def undo(self, name: str, labeler: str) -> Row | None:
        """Take an answer of this labeler out of its file, and give it back with its kind; none if there is none."""
        with self._lock:
            for kind, log in self.logs.items():
                row = log.rows.get(name)
                if row is not None and row["labeler_id"] == labeler:
                    log.remove(name)
                    self._held[row["task"]] = (labeler, time.monotonic())
                    return {"kind": kind, **row}
            return None

    def task(self, name: str) -> Task | None:
        return self.tasks.tasks.get(name)

    def close(self) -> None:
        for log in self.logs.values():
            log.close()

    def _has_answered(self, kind: str, task: Task, labeler: str) -> bool:
        """A demonstration may be written beside a ranking; of each kind there is one, and no skip of what is done."""
        if kind == "demonstration" and task.completions:
            return any((row["task"], row["labeler_id"]) == (task.id, labeler) for row in self.logs[kind].rows.values())
        return labeler in self._by_task()[task.id]["any"]

    def _by_task(self) -> dict[str, dict[str, set[str]]]:
        """
        Of each task the labelers with the answer that it asks for, a ranking or, without completions, a demonstration;
        and those who have answered or skipped it.
        """
        found: dict[str, dict[str, set[str]]] = defaultdict(lambda: {"labeled": set(), "any": set()})
        for kind, log in self.logs.items():
            for row in log.rows.values():
                if kind == "demonstration" and (task := self.task(row["task"])) and task.completions:
                    continue
                found[row["task"]]["any"].add(row["labeler_id"])
                if kind != "skip":
                    found[row["task"]]["labeled"].add(row["labeler_id"])
        return found


def path_of(output: Path, kind: str) -> Path:
    """`rankings.jsonl`, `rankings.demonstrations.jsonl`, `rankings.skips.jsonl`."""
    return output if kind == "ranking" else output.with_name(f"{output.stem}.{kind}s{output.suffix}")


def _ranking(task: Task, answer: Row) -> Row:
    """Columns of a ranking, of the completions in the task's order and not in the one in which they were shown."""
    order = task.order(answer["labeler"])
    each = {name: answer[name] for name in ("ranks", "ratings", "metadata")}
    if any(len(values) != len(order) for values in each.values()):
        raise Refused(f"expected ranks, ratings and answers of {len(order)} outputs")
    levels = sorted(set(each["ranks"]))
    each["ranks"] = [levels.index(rank) + 1 for rank in each["ranks"]]
    inside = {name: [values[order.index(k)] for k in range(len(order))] for name, values in each.items()}
    return {"completions": list(task.completions), **inside, "order": order, "seconds": answer["seconds"]}


def _demonstration(task: Task, answer: Row) -> Row:
    text = answer["text"]
    if not text.strip():
        raise Refused("the demonstration is empty; write one, or go back")
    return {"completion": text if isinstance(task.prompt, str) else [{"role": "assistant", "content": text}]}


def _skip(task: Task, answer: Row) -> Row:
    if not answer["reason"].strip():
        raise Refused("a skip needs a reason")
    return {"reason": answer["reason"]}


ANSWERS = {"ranking": _ranking, "demonstration": _demonstration, "skip": _skip}


def agreement(rankings: list[Row]) -> dict[str, Any]:
    """
    Share of pairs of completions on which two labelers of a task say the same, among those that neither ties, as
    [InstructGPT 3.4] has it; and how many there are.
    """
    of_task: dict[str, list[list[int]]] = defaultdict(list)
    for row in rankings:
        of_task[row["task"]].append(row["ranks"])
    same = pairs = 0
    for several in of_task.values():
        for one, other in combinations(several, 2):
            for i, j in combinations(range(min(len(one), len(other))), 2):
                product = (one[i] - one[j]) * (other[i] - other[j])
                same += product > 0
                pairs += product != 0
    return {"pairs": pairs, "share": same / pairs if pairs else None}
