"""What labelers have said: rankings, demonstrations and skips, and who is asked what next."""

import json
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
Key = tuple[str, str]  # id and version of a task
KINDS = ("ranking", "demonstration", "skip")
SHOWN = "shown"
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
    The files of a labelling task and the questions about them. Every call is safe in several threads.

    What a labeler was shown is kept too, with its texts: after a restart, and whatever becomes of the file of tasks,
    it is still his to answer, and not another's for half an hour.

    Args:
        tasks (`TaskFile`): What is to be labelled.
        output (`Path`): Rankings; demonstrations, skips and what was shown stand beside it.
        overlap (`float`): Share of tasks that two labelers rank.
    """

    def __init__(self, tasks: TaskFile, output: Path, overlap: float):
        self.tasks, self.overlap = tasks, overlap
        self.logs: dict[str, Log] = {}
        try:
            for kind in (*KINDS, SHOWN):
                self.logs[kind] = Log(path_of(output, kind))
        except BaseException:
            self.close()
            raise
        self._lock = threading.Lock()
        self._held: dict[Key, dict[str, float]] = defaultdict(dict)  # who was shown it, and when
        for row in self.logs[SHOWN].rows.values():
            since = datetime.fromisoformat(row["time"]).timestamp()
            self._held[key_of(row)][row["labeler_id"]] = since

    def next(self, labeler: str) -> Task | None:
        """A task that this labeler has not done, held for him for half an hour; none if there is none for now."""
        with self._lock:
            self.tasks.refresh()
            done = self._by_task()
            now = time.time()
            # What he was at first, so that a reload goes on with it
            for task in sorted(self.tasks, key=lambda one: labeler not in self._held.get((one.id, one.version), ())):
                key = (task.id, task.version)
                if labeler in done[key]["any"]:
                    continue
                held = self._held[key]
                others = {who for who, since in held.items() if now - since < HOLD} - {labeler} - done[key]["any"]
                if len(done[key]["labeled"]) + len(others) < task.wants(self.overlap):
                    self._show(task, labeler)
                    held[labeler] = now
                    return task
            return None

    def _show(self, task: Task, labeler: str) -> None:
        own = {"task": task.id, "labeler_id": labeler, "version": task.version, "time": _now()}
        texts = {"prompt": task.prompt, "completions": list(task.completions), "rest": task.rest}
        self.logs[SHOWN].append({"id": _shown_id(task.id, task.version, labeler), **own, **texts})

    def shown(self, task: str, version: str, labeler: str) -> Task | None:
        """What this labeler was shown under these names."""
        row = self.logs[SHOWN].rows.get(_shown_id(task, version, labeler))
        return row and Task(task, version, row["prompt"], tuple(row["completions"]), row["rest"])

    def progress(self, labeler: str) -> dict[str, Any]:
        """Labels that are there and wanted, those of this labeler, his last, and how far labelers agree."""
        with self._lock:
            done = self._by_task()
            wanted = sum(task.wants(self.overlap) for task in self.tasks)
            given = sum(
                min(task.wants(self.overlap), len(done[task.id, task.version]["labeled"])) for task in self.tasks
            )
            mine = [row for kind in KINDS for row in self.logs[kind].rows.values() if row["labeler_id"] == labeler]
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
            [`Refused`]: the labeler was never shown this task, or has another answer to it; nothing is kept.
            `OSError`: it could not be written; nothing is kept.
        """
        with self._lock:
            if name in self.logs[kind].rows:
                return
            shown = self.shown(task, version, labeler)
            if shown is None:
                raise Refused("you were not shown this task here; load the next")
            if self._has_answered(kind, shown, labeler):
                raise Refused("you have answered this task already, perhaps in another window; undo that, or go on")
            row = {"id": name, "task": task, "version": version, "labeler_id": labeler, "prompt": shown.prompt}
            row |= ANSWERS[kind](shown, answer)
            rest = {key: value for key, value in shown.rest.items() if key not in row and kind == "ranking"}
            row = {**row, **rest, "time": _now()}
            try:
                json.dumps(row, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise Refused(
                    "half a surrogate pair, which is no character, is in what you wrote; correct it"
                ) from None
            self.logs[kind].append(row)
            self._held[task, version].pop(labeler, None)

    def answer(self, name: str, labeler: str) -> Row | None:
        """An answer of this labeler, with its kind; none if there is none."""
        with self._lock:
            return self._find(name, labeler)

    def undo(self, name: str, labeler: str) -> None:
        """Take an answer of this labeler out of its file, if it is there."""
        with self._lock:
            row = self._find(name, labeler)
            if row is not None:
                self._held[key_of(row)][labeler] = time.time()
                self.logs[row["kind"]].remove(name)

    def _find(self, name: str, labeler: str) -> Row | None:
        for kind in KINDS:
            row = self.logs[kind].rows.get(name)
            if row is not None and row["labeler_id"] == labeler:
                return {**row, "kind": kind}
        return None

    def close(self) -> None:
        for log in self.logs.values():
            log.close()

    def _has_answered(self, kind: str, task: Task, labeler: str) -> bool:
        """A demonstration may be written beside a ranking; of each kind there is one, and no skip of what is done."""
        key = (task.id, task.version)
        if kind == "demonstration" and task.completions:
            return any((key_of(row), row["labeler_id"]) == (key, labeler) for row in self.logs[kind].rows.values())
        return labeler in self._by_task()[key]["any"]

    def _by_task(self) -> dict[Key, dict[str, set[str]]]:
        """
        Of each task the labelers with the answer that it asks for, a ranking or, without completions, a demonstration;
        and those who have answered or skipped it.
        """
        found: dict[Key, dict[str, set[str]]] = defaultdict(lambda: {"labeled": set(), "any": set()})
        for kind in KINDS:
            for row in self.logs[kind].rows.values():
                if kind == "demonstration" and row["beside"]:
                    continue
                found[key_of(row)]["any"].add(row["labeler_id"])
                if kind != "skip":
                    found[key_of(row)]["labeled"].add(row["labeler_id"])
        return found


def key_of(row: Row) -> Key:
    """A task and its texts: with other texts it is another one."""
    return row["task"], row["version"]


def _shown_id(task: str, version: str, labeler: str) -> str:
    return json.dumps([version, task, labeler], ensure_ascii=False)


def _now() -> str:
    return datetime.now(UTC).isoformat()


def path_of(output: Path, kind: str) -> Path:
    """`rankings.jsonl`, `rankings.demonstrations.jsonl`, `rankings.skips.jsonl`, `rankings.shown.jsonl`."""
    if kind == "ranking":
        return output
    return output.with_name(f"{output.stem}.{kind}{'' if kind == SHOWN else 's'}{output.suffix}")


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
    completion = text if isinstance(task.prompt, str) else [{"role": "assistant", "content": text}]
    return {"completion": completion, "beside": bool(task.completions)}  # beside a ranking, or what was asked for


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
    of_task: dict[Key, list[list[int]]] = defaultdict(list)
    for row in rankings:
        of_task[key_of(row)].append(row["ranks"])
    same = pairs = 0
    for several in of_task.values():
        for one, other in combinations(several, 2):
            for i, j in combinations(range(len(one)), 2):
                product = (one[i] - one[j]) * (other[i] - other[j])
                same += product > 0
                pairs += product != 0
    return {"pairs": pairs, "share": same / pairs if pairs else None}
