"""Rows of the SFT stage, around TRL's preparation: checked before it, then reported on and mixed with pretraining."""

from typing import Any

from datasets import Dataset, IterableDataset, concatenate_datasets

from .formats import InputError, check_rows, listed

# Columns of TRL's other forms of rows for SFT, which pass unchecked
OTHER_FORMS = {"input_ids", "messages", "conversations"}
IMAGES = {"image", "images"}
# Columns of rows that are encoded
RESERVED = {"input_ids", "labels", "completion_mask", "assistant_masks"}


def columns_of(dataset: Dataset | IterableDataset) -> set[str]:
    """Column names, from the first row where a stream does not know them."""
    return set(dataset.column_names or next(iter(dataset), {}))


def check_demonstrations(
    dataset: Dataset | IterableDataset, name: str, text_column: str = "text"
) -> Dataset | IterableDataset:
    """
    Refuse wrong demonstrations. Rows in another of TRL's forms (`messages`, `text`, token ids, images) pass.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): rows for training or evaluation.
        name (`str`): what messages call it.
        text_column (`str`): column of rows that are plain text.

    Raises:
        [`InputError`]: no rows, or the first wrong one, what was expected and the fix.
    """
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise InputError(f"{name}: no rows; expected demonstrations (columns prompt, completion); add some")
    columns = columns_of(dataset)
    encoded = "input_ids" in columns and columns & RESERVED - {"input_ids"}  # by TRL, which keeps the text
    taken = sorted(columns & RESERVED) if {"prompt", "completion"} <= columns and not encoded else []
    if taken:
        raise InputError(
            f"{name}: the column '{taken[0]}' beside prompt and completion would be taken for token ids, or theirs; "
            f"rename or remove it"
        )
    is_other = not {"prompt", "completion"} <= columns and columns & {*OTHER_FORMS, text_column}
    if is_other or columns & IMAGES:
        return dataset
    dataset = check_rows(dataset, "demonstration", name)
    first = next(iter(dataset))
    if isinstance(first["completion"], str) and not isinstance(first["prompt"], str):
        raise InputError(
            f"{name}, row 0: the prompt is a conversation and the completion a string; expected both alike; use "
            f"instructgpt_trl.data.as_conversations"
        )
    return dataset


def cut_report(encoded: Dataset, kept: slice | None, drops_masked: bool) -> str | None:
    """
    One line on the rows that a cut to `max_length` shortens or drops, `None` if there are none.

    Args:
        encoded (`Dataset`): columns `input_ids` and `labels`, not cut yet.
        kept (`slice`, *optional*): what the cut keeps of a row; `None` for no cut.
        drops_masked (`bool`): rows are dropped if the cut leaves them no label but -100.
    """
    if kept is None:
        return None
    shortened, dropped = [], []
    for index, (ids, labels) in enumerate(zip(encoded["input_ids"], encoded["labels"], strict=True)):
        if drops_masked and all(label == -100 for label in labels[kept]):
            dropped.append(index)
        elif len(ids[kept]) < len(ids):
            shortened.append(index)
    parts = []
    if shortened:
        parts.append(f"{len(shortened)} of {len(encoded)} rows shortened: rows {listed(shortened)}")
    if dropped:
        parts.append(f"{len(dropped)} of {len(encoded)} rows dropped, no label left: rows {listed(dropped)}")
    return "; ".join(parts) or None


def mix(demonstrations: Dataset, blocks: Dataset, fraction: float) -> Dataset:
    """
    Prepared demonstrations followed by pretraining blocks, the blocks being `fraction` of all examples:
    `n = round(fraction / (1 - fraction) * len(demonstrations))`. The first n blocks are taken; if there are fewer,
    they are repeated in order. Every token of a block counts in the loss. Source: InstructGPT C.3.

    Args:
        demonstrations (`Dataset`): columns `input_ids`, `labels` and, if packed, `seq_lengths`; others are left out.
        blocks (`Dataset`): column `input_ids`.
        fraction (`float`): from 0 to below 1.
    """
    count = round(fraction / (1 - fraction) * len(demonstrations))
    columns = [name for name in ("input_ids", "labels", "seq_lengths") if name in demonstrations.column_names]
    demonstrations = demonstrations.select_columns(columns)
    if count == 0:
        return demonstrations

    def as_example(block: dict[str, Any]) -> dict[str, Any]:
        ids = block["input_ids"]
        example = {"input_ids": ids, "labels": ids, "seq_lengths": [len(ids)]}
        return {name: example[name] for name in columns}

    blocks = blocks.select(range(min(count, len(blocks)))).map(as_example, desc="Preparing pretraining blocks")
    blocks = blocks.select([index % len(blocks) for index in range(count)]).cast(demonstrations.features)
    return concatenate_datasets([demonstrations, blocks])
