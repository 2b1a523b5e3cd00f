"""Rows as datasets: loaded from files, folders and the hub, checked, turned into conversations."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from .files import READERS, InputError, load_arrow
from .rows import KINDS, Text, check_row


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
        return _from_list(rows, kind, str(source))
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


def _has_lists(dataset: Dataset) -> bool:
    return all(isinstance(dataset[0][column], list) for column in ("completions", "ranks"))


def _from_list(rows: list[dict[str, Any]], kind: str, source: str) -> Dataset:
    if not rows:
        raise InputError(f"{source}: no rows; expected at least one; add some")
    columns = list(dict.fromkeys(column for row in rows for column in row))  # `from_list` takes the first row's only
    whole = [{column: row.get(column) for column in columns} for row in rows]
    try:
        return Dataset.from_list(whole)
    except Exception:  # pyarrow: a column has values of several types
        pass
    try:  # that of a column which nobody trains on is no reason to refuse the rows: its values become text
        return Dataset.from_list(
            [{name: value if name in KINDS[kind] else _as_text(value) for name, value in row.items()} for row in whole]
        )
    except Exception as error:  # text in one row and a conversation in another
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"{source}: rows of different types cannot be mixed in one file ({reason}); make them alike"
        ) from None


def _as_text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


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
