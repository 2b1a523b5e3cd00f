"""
Rows: which columns each stage reads, and how they are loaded and checked. Every stage takes its rows through here.

A mistake in the input raises [`InputError`] with one line: where it is, what was expected, and the fix.
"""

import json
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from trl import extract_prompt

from .files import READERS, InputError, load_arrow

# Required columns of each kind of row. `chosen`/`rejected` rows are read as rankings with K = 2.
KINDS: dict[str, tuple[str, ...]] = {
    "demonstration": ("prompt", "completion"),
    "ranking": ("prompt", "completions", "ranks"),
    "prompt": ("prompt",),
    "pretraining": ("text",),
}

Text = str | list[dict[str, str]]  # a string, or a conversation: [{"role": ..., "content": ...}, ...]


def load_rows(source: str, kind: str, split: str = "train", allow_empty: bool = False) -> Dataset:
    """
    Load and check the rows of one kind.

    Args:
        source (`str`):
            A `.jsonl`, `.json`, `.csv`, `.parquet` or `.txt` file in UTF-8 (`.txt` has one text a line, kind
            `"pretraining"` only), a folder written by `save_to_disk`, or the id of a dataset on the hub.
        kind (`str`):
            `"demonstration"`, `"ranking"`, `"prompt"` or `"pretraining"`.
        split (`str`, *optional*, defaults to `"train"`):
            Split to take, for a hub id or a folder of several.
        allow_empty (`bool`, *optional*, defaults to `False`):
            Take rankings with an empty completion: a policy may have said nothing, and labelers rank that too.

    Returns:
        `Dataset` with the columns of `kind` (see `KINDS`) and whatever other columns the rows have.

    Raises:
        [`InputError`]: the file, row and column that is wrong, what was expected and the fix.
    """
    path = Path(source)
    suffix = path.suffix.lower()
    if path.is_file() and suffix not in {*READERS, ".parquet"}:
        raise InputError(f"{source}: unknown file type '{suffix}'; use .jsonl, .json, .csv, .parquet or .txt")
    if not path.exists() and suffix in {*READERS, ".parquet"}:
        raise InputError(f"{source}: no such file; check the path (working directory: {os.getcwd()})")
    if suffix in READERS and path.is_file():
        # Read row by row, so that a wrong row is named by its place and not by a column type of the whole file
        rows, places = READERS[suffix](path)
        rows = [check_row(row, kind, place, allow_empty) for row, place in zip(rows, places, strict=True)]
        return _from_list(rows, str(source))
    return check_rows(load_arrow(str(source), split), kind, str(source), allow_empty)


def check_rows(
    dataset: Dataset | IterableDataset, kind: str, source: str = "dataset", allow_empty: bool = False
) -> Dataset | IterableDataset:
    """
    Check every row of `dataset` against its kind. Rankings come back with `prompt`, `completions` and `ranks`,
    whatever they came as (`chosen`/`rejected`, or lists written as JSON text). An `IterableDataset` is checked while
    it is read.

    Raises:
        [`InputError`]: the first wrong row (counted from 0), what was expected and the fix; or the dataset is empty.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        raise InputError(
            f"{source}: expected a datasets.Dataset, got {type(dataset).__name__}; of a DatasetDict take a split, as "
            f"in rows['train']; a list becomes one by Dataset.from_list"
        )
    if isinstance(dataset, IterableDataset):
        return dataset.map(
            lambda row, index: check_row(row, kind, f"{source}, row {index}", allow_empty), with_indices=True
        )
    if len(dataset) == 0:
        raise InputError(f"{source}: no rows; expected rows of kind '{kind}' ({', '.join(KINDS[kind])}); add some")
    checked = (check_row(row, kind, f"{source}, row {index}", allow_empty) for index, row in enumerate(dataset))
    if kind != "ranking" or set(KINDS["ranking"]) <= set(dataset.column_names) and _has_lists(dataset):
        for _ in checked:  # nothing to convert: keep the dataset as it is
            pass
        return dataset
    return Dataset.from_list(list(checked))


def check_row(row: dict[str, Any], kind: str, where: str, allow_empty: bool = False) -> dict[str, Any]:
    """
    Check one row of `kind`, named `where` in messages, and return it (a ranking in its one form). With `allow_empty`
    a ranking's completions may be empty texts.

    Raises:
        [`InputError`]: what is wrong with the row, what was expected and the fix.
    """
    if kind not in KINDS:
        raise InputError(f"unknown kind of rows '{kind}'; expected one of {', '.join(KINDS)}")
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object with {_columns(kind)}, got {type(row).__name__}")
    if kind == "ranking":
        row = _as_ranking(row, where)
    for column in KINDS[kind]:
        if row.get(column) is None:
            hint = " or chosen, rejected" if kind == "ranking" else ""
            raise InputError(
                f"{where}: column '{column}' is missing; expected {_columns(kind)}{hint}, "
                f"found {', '.join(key for key, value in row.items() if value is not None) or 'none'}; add it"
            )
    if "prompt" in KINDS[kind]:
        # chosen/rejected rows may hold the prompt inside both texts; their prompt is then the empty string
        _check_text(row["prompt"], f"{where}, column 'prompt'", allow_empty=kind == "ranking")
    if kind == "demonstration":
        _check_text(row["completion"], f"{where}, column 'completion'")
        _check_forms(row["prompt"], row["completion"], f"{where}, column 'completion'")
    if kind == "pretraining":
        _check_text(row["text"], f"{where}, column 'text'", conversation=False)
    if kind == "ranking":
        _check_ranking(row, where, allow_empty)
    return row


def _as_ranking(row: dict[str, Any], where: str) -> dict[str, Any]:
    """A ranking row from `chosen`/`rejected`, or from lists written as JSON text; other rows as they are."""
    if row.get("completions") is None and row.get("chosen") is not None and row.get("rejected") is not None:
        both_talk = all(isinstance(row[key], list) and row[key] for key in ("chosen", "rejected"))
        if row.get("prompt") is None and both_talk:
            row = extract_prompt(row)
        rest = {key: value for key, value in row.items() if key not in ("prompt", "chosen", "rejected")}
        prompt = "" if row.get("prompt") is None else row["prompt"]
        return {"prompt": prompt, "completions": [row["chosen"], row["rejected"]], "ranks": [1, 2], **rest}
    parsed = dict(row)
    for column in ("completions", "ranks"):
        if isinstance(row.get(column), str):
            try:
                parsed[column] = json.loads(row[column])
            except json.JSONDecodeError:
                raise InputError(
                    f"{where}, column '{column}': expected a list, got the text {row[column][:40]!r}; "
                    f"write a JSON list"
                ) from None
    return parsed


def _check_ranking(row: dict[str, Any], where: str, allow_empty: bool) -> None:
    completions, ranks = row["completions"], row["ranks"]
    if not isinstance(completions, list) or len(completions) < 2:
        got = f"{len(completions)}" if isinstance(completions, list) else type(completions).__name__
        raise InputError(
            f"{where}, column 'completions': expected a list of K >= 2 completions, got {got}; "
            f"add completions or drop the row"
        )
    for k, completion in enumerate(completions):
        _check_text(completion, f"{where}, completion {k}", allow_empty, empty_turns=allow_empty)
        _check_forms(row["prompt"], completion, f"{where}, completion {k}")
    if not isinstance(ranks, list) or len(ranks) != len(completions):
        got = f"{len(ranks)}" if isinstance(ranks, list) else type(ranks).__name__
        raise InputError(
            f"{where}, column 'ranks': expected a list of {len(completions)} ranks, one a completion, got {got}; "
            f"give every completion its rank (1 is best, equal ranks tie)"
        )
    for k, rank in enumerate(ranks):
        number = isinstance(rank, int | float) and not isinstance(rank, bool) and math.isfinite(rank)
        if not number or rank != int(rank) or rank < 1:
            raise InputError(
                f"{where}, rank {k}: expected an integer >= 1 (1 is best, equal ranks tie), got {rank!r}; "
                f"correct the rank or drop the completion"
            )


def _check_text(
    value: Any, where: str, allow_empty: bool = False, conversation: bool = True, empty_turns: bool = False
) -> None:
    if isinstance(value, str):
        if not value.strip() and not allow_empty:
            raise InputError(f"{where}: the text is empty; expected some text; fill it in or drop the row")
        return
    expected = "a string" + (" or a conversation [{'role': ..., 'content': ...}, ...]" if conversation else "")
    if not conversation or not isinstance(value, list):
        raise InputError(f"{where}: expected {expected}, got {type(value).__name__} {str(value)[:40]!r}; correct it")
    if not value and not allow_empty:
        raise InputError(f"{where}: the conversation is empty; expected at least one message; drop the row")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str) or not message.get("role"):
            raise InputError(f"{where}: expected {expected}, got the message {str(message)[:60]!r}; correct it")
        if not message["content"].strip() and message["role"] == "assistant" and not empty_turns:
            raise InputError(f"{where}: an assistant message is empty; expected some text; fill it in or drop the row")


def _check_forms(prompt: Text, completion: Text, where: str) -> None:
    if isinstance(prompt, str) and not isinstance(completion, str):
        raise InputError(
            f"{where}: a conversation, but the prompt is a string; expected both alike; write the prompt as a "
            f"conversation too"
        )


def _columns(kind: str) -> str:
    return "columns " + ", ".join(KINDS[kind])


def _has_lists(dataset: Dataset) -> bool:
    return all(isinstance(dataset[0][column], list) for column in ("completions", "ranks"))


def _from_list(rows: list[dict[str, Any]], source: str) -> Dataset:
    if not rows:
        raise InputError(f"{source}: no rows; expected at least one; add some")
    columns = list(dict.fromkeys(column for row in rows for column in row))  # `from_list` takes the first row's only
    try:
        return Dataset.from_list([{column: row.get(column) for column in columns} for row in rows])
    except Exception as error:  # pyarrow: a column that is text in one row and a conversation in another
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"{source}: rows of different types cannot be mixed in one file ({reason}); make them alike"
        ) from None


def as_conversations(dataset: Dataset) -> Dataset:
    """Plain-text prompts and completions as conversations of a user and an assistant message, for chat models."""

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        if isinstance(row["prompt"], str):
            out["prompt"] = [{"role": "user", "content": row["prompt"]}]
        if isinstance(row.get("completion"), str):
            out["completion"] = [{"role": "assistant", "content": row["completion"]}]
        if row.get("completions") and isinstance(row["completions"][0], str):
            out["completions"] = [[{"role": "assistant", "content": text}] for text in row["completions"]]
        return out

    rows = [{**row, **convert(row)} for row in dataset]
    return Dataset.from_list(rows)


def split_by_length(
    lengths: list[int], limit: int | None, what: str, names: Callable[[int], str] = str
) -> tuple[list[int], str | None]:
    """
    Indices of `lengths` within `limit`, and a one-line report of the others (`None` if there are none), so that
    nothing is dropped silently.
    """
    if limit is None:
        return list(range(len(lengths))), None
    keep = [index for index, length in enumerate(lengths) if length <= limit]
    dropped = [index for index, length in enumerate(lengths) if length > limit]
    if not dropped:
        return keep, None
    return keep, f"{len(dropped)} of {len(lengths)} {what} over {limit} tokens dropped: rows {listed(dropped, names)}"


def by_prompt(prompts: Sequence[Text]) -> Callable[[int], str]:
    """Names rows by number and start of the prompt, since after a split or a shuffle a number does not find a row."""

    def name(index: int) -> str:
        prompt = prompts[index]
        text = prompt if isinstance(prompt, str) else str(prompt[-1].get("content", ""))
        start = " ".join(text.split())
        return f"{index} ({start if len(start) <= 32 else start[:30].rstrip() + '..'})"

    return name


def listed(indices: list[int], names: Callable[[int], str] = str, most: int = 20) -> str:
    """`"3, 7, 9 and 12 more"`: the first `most` of `indices` by name."""
    shown = ", ".join(names(index) for index in indices[:most])
    return shown if len(indices) <= most else f"{shown} and {len(indices) - most} more"


def check_output_dir(output_dir: str | os.PathLike | None) -> None:
    """
    Refuse an output folder that cannot be written, before any work is done. Leaves nothing behind.

    Raises:
        [`InputError`]: the folder and why it cannot be written.
    """
    if output_dir is None:
        return
    parent = Path(output_dir).absolute()
    while not parent.exists():
        parent = parent.parent
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise InputError(
            f"output folder {output_dir}: cannot be written ({error.strerror}); choose another output_dir"
        ) from None
