"""
Rankings as token ids and as batches: all completions of a prompt stay together.

An encoded ranking has the columns `prompt_ids`, `completions_ids` (a list a completion), `ranks` and `shortened` (how
many over-long completions were taken out). B prompts, K completions of one, N their sum, L the padded length.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from .encoding import encode_completion, encode_prompt, in_row
from .files import parse_json
from .formats import InputError, by_prompt, check_rows, listed
from .sharing import share_prompts

logger = logging.getLogger(__name__)

ENCODED = ("prompt_ids", "completions_ids", "ranks", "shortened")
# Named, not inferred: a first thousand rows without a prompt would make it a list of nulls
FEATURES = Features(
    {
        "prompt_ids": List(Value("int64")),
        "completions_ids": List(List(Value("int64"))),
        "ranks": List(Value("int64")),
        "shortened": Value("int64"),
        "removed": Value("int64"),
    }
)
PAIRS = ("chosen_ids", "rejected_ids")  # TRL's own encoded rows, read as K = 2


@dataclass
class DataCollatorForRanking:
    """
    Batch of rankings: the completions of all prompts, each behind its prompt, right-padded.

    Args:
        pad_token_id (`int`): what to pad with. The attention mask, not this id, says what counts.
        pad_to_multiple_of (`int`, *optional*): round L up to a multiple of this.
        attention_length (`float`, *optional*): with it, completions stand behind one copy of their prompt, see
            [`share_prompts`], in batches where that takes fewer operations. It is the length at which the attention of
            a layer takes as many as its matrix products.

    Returns:
        `dict` of `input_ids`, `attention_mask` (N, L), or what [`share_prompts`] returns; `ranks` (N,); `group_sizes`,
        a list of B ints, each prompt's K; `shortened`, `tokens` (B,), completions taken out of each ranking and tokens
        of its texts; `places` (B,), which row each prompt was: a batch that shares them may have another order.

    Example:

    ```python
    >>> collator = DataCollatorForRanking(pad_token_id=0)
    >>> collator([{"prompt_ids": [5], "completions_ids": [[6, 7], [8]], "ranks": [1, 2], "shortened": 0}])
    {'input_ids': tensor([[5, 6, 7],
                          [5, 8, 0]]),
     'attention_mask': tensor([[1, 1, 1],
                               [1, 1, 0]]),
     'ranks': tensor([1, 2]),
     'group_sizes': [2],
     'shortened': tensor([0]),
     'tokens': tensor([5]),
     'places': tensor([0])}
    ```
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    attention_length: float | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        texts = [row["prompt_ids"] + ids for row in rows for ids in row["completions_ids"]]
        length = max(map(len, texts))
        if self.pad_to_multiple_of:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch, order = None, range(len(rows))
        if self.attention_length is not None:
            shared, packed = share_prompts(
                [row["prompt_ids"] for row in rows],
                [row["completions_ids"] for row in rows],
                self.pad_token_id,
                self.pad_to_multiple_of,
            )
            if self._operations(*shared["input_ids"].shape) < self._operations(len(texts), length):
                batch, order, rows = shared, packed, [rows[index] for index in packed]
        return {
            **(batch or self._separate(texts, length)),
            "ranks": torch.tensor([rank for row in rows for rank in row["ranks"]]),
            "group_sizes": [len(row["completions_ids"]) for row in rows],
            "shortened": torch.tensor([row["shortened"] for row in rows]),
            "tokens": torch.tensor(
                [sum(len(row["prompt_ids"] + ids) for ids in row["completions_ids"]) for row in rows]
            ),
            "places": torch.tensor(list(order)),
        }

    def _operations(self, rows: int, length: int) -> float:
        """Those of a layer, in units of what its matrix products take for a token."""
        return rows * length * (1 + length / self.attention_length)

    def _separate(self, texts: list[list[int]], length: int) -> dict[str, torch.Tensor]:
        return {
            "input_ids": torch.tensor([text + [self.pad_token_id] * (length - len(text)) for text in texts]),
            "attention_mask": torch.tensor([[1] * len(text) + [0] * (length - len(text)) for text in texts]),
        }


def is_encoded(dataset: Dataset | IterableDataset) -> bool:
    """Whether rows are token ids already: ours, or TRL's pairs."""
    columns = _columns(dataset)
    return columns >= set(ENCODED) or columns >= set(PAIRS)


def check_rankings(dataset: Dataset | IterableDataset, source: str = "dataset") -> Dataset | IterableDataset:
    """
    [`check_rows`] for rankings. Rows that are encoded already pass.

    Raises:
        [`InputError`]: the first wrong row; or a column `margin`, which TRL's trainer knows and a ranking has no place
            for.
    """
    if "margin" in _columns(dataset):
        raise InputError(
            f"{source}: the column 'margin' is not supported, since a ranking has more than one pair; remove it"
        )
    if is_encoded(dataset):
        return dataset
    taken = sorted(_columns(dataset) & {"completions_ids", "chosen_ids"})
    if taken:
        raise InputError(f"{source}: the column '{taken[0]}' is of encoded rankings; rename or remove it")
    return check_rows(dataset, "ranking", source)


def prepare_rankings(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    source: str = "dataset",
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """
    Encode checked rankings and fit them to `max_length`: a completion that is too long behind its prompt is taken out
    of its ranking, and a ranking that has fewer than two completions or no untied pair left is dropped. Whatever
    happens is logged as a warning, one line a cause, with the numbers of the rows. Encoded rows are only fitted, so a
    second call changes nothing.

    Args:
        dataset (`Dataset` or `IterableDataset`): rows of [`check_rankings`].
        tokenizer (`PreTrainedTokenizerBase`): tokenizer of the reward model.
        max_length (`int`, *optional*): most tokens of prompt and completion together.
        source (`str`, *optional*): what messages call the dataset.
        num_proc (`int`, *optional*): processes to encode with; not for an `IterableDataset`.

    Returns:
        The dataset with the columns of `ENCODED`. An `IterableDataset` is encoded, and its losses logged row by row,
        while it is read.

    Raises:
        [`InputError`]: no ranking is left.

    Differs from TRL: `RewardTrainer` drops a pair if one of its texts is too long, without saying so.
    """

    def prepare(row: dict[str, Any], index: int) -> dict[str, Any]:
        with in_row(source, index):
            return _fit(_encode(row, tokenizer), max_length)

    if isinstance(dataset, IterableDataset):
        dataset = dataset.map(
            lambda row, index: _told(prepare(row, index), f"{source}, row {index}"),
            with_indices=True,
            remove_columns=sorted(_columns(dataset)),
            features=FEATURES,
        )
        return dataset.filter(lambda row: _fate(row["ranks"]) is None).select_columns(list(ENCODED))
    rows = dataset.map(
        prepare,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=FEATURES,
        num_proc=num_proc,
        desc=f"Tokenizing {source} rankings",
    )
    if len(rows) and all(len(set(map(tuple, texts))) == 1 for texts in rows["completions_ids"]):
        raise InputError(
            f"{source}: in every ranking all completions are the same token ids, so that nothing can be learned: the "
            f"chat template leaves them out, or their texts are alike; correct it, or the roles of the messages"
        )
    names = by_prompt(dataset["prompt"]) if "prompt" in dataset.column_names else str
    removed, fates = rows["removed"], [_fate(ranks) for ranks in rows["ranks"]]
    kept = [index for index, fate in enumerate(fates) if fate is None]
    shortened = [index for index in kept if removed[index]]
    if shortened:
        count = sum(removed[index] for index in shortened)
        _warn(
            f"{source}: {count} completions over {max_length} tokens taken out of {len(shortened)} of {len(rows)} "
            f"rankings: rows {listed(shortened, names)}"
        )
    for fate in ("fewer than 2 completions within the length limit", "no untied pair"):
        dropped = [index for index in range(len(rows)) if fates[index] == fate]
        if dropped:
            _warn(f"{source}: {len(dropped)} of {len(rows)} rankings dropped, {fate}: rows {listed(dropped, names)}")
    if not kept:
        raise InputError(
            f"{source}: none of its {len(rows)} rankings is left, each is over max_length={max_length} or has only "
            f"ties; raise max_length or check the ranks"
        )
    rows = rows.select_columns(list(ENCODED))
    return rows if len(kept) == len(rows) else rows.select(kept)


def _columns(dataset: Dataset | IterableDataset) -> set[str]:
    """Column names; those of the first row where a stream does not say."""
    return set(dataset.column_names or next(iter(dataset), {}))


def _encode(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    if row.get("completions_ids") is not None:
        return {column: row[column] for column in ENCODED}
    if row.get("chosen_ids") is not None:
        return {"prompt_ids": [], "completions_ids": [row[c] for c in PAIRS], "ranks": [1, 2], "shortened": 0}
    template = dict(row.get("chat_template_kwargs") or {})
    if row.get("tools") is not None:
        template["tools"] = parse_json(row["tools"], "tools") if isinstance(row["tools"], str) else row["tools"]
    prompt = row["prompt"]
    return {
        "prompt_ids": encode_prompt(tokenizer, prompt, **template),
        "completions_ids": [encode_completion(tokenizer, prompt, text, **template) for text in row["completions"]],
        "ranks": [int(rank) for rank in row["ranks"]],
        "shortened": 0,
    }


def _fit(row: dict[str, Any], max_length: int | None) -> dict[str, Any]:
    room = None if max_length is None else max_length - len(row["prompt_ids"])
    kept = [k for k, ids in enumerate(row["completions_ids"]) if room is None or len(ids) <= room]
    removed = len(row["completions_ids"]) - len(kept)
    return {
        "prompt_ids": row["prompt_ids"],
        "completions_ids": [row["completions_ids"][k] for k in kept],
        "ranks": [row["ranks"][k] for k in kept],
        "shortened": row["shortened"] + removed,
        "removed": removed,
    }


def _fate(ranks: list[int]) -> str | None:
    """Why a ranking is dropped, `None` if it is not."""
    if len(ranks) < 2:
        return "fewer than 2 completions within the length limit"
    return None if len(set(ranks)) > 1 else "no untied pair"


def _told(row: dict[str, Any], where: str) -> dict[str, Any]:
    fate = _fate(row["ranks"])
    if fate is not None:
        _warn(f"{where}: ranking dropped, {fate}")
    elif row["removed"]:
        _warn(f"{where}: {row['removed']} over-long completions taken out of the ranking")
    return row


def _warn(message: str) -> None:
    if PartialState().is_main_process:
        logger.warning(message)
