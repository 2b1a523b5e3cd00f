"""Datasets of prompts, checked and fitted for PPO. The rules for raw prompts are in prompts.py, without torch."""

from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .demonstrations import IMAGES, columns_of
from .encoding import encode_prompt, in_row
from .files import InputError
from .formats import by_prompt, check_rows, split_by_length
from .rows import Text

logger = logging.get_logger(__name__)


def check_prompts(dataset: Dataset | IterableDataset, name: str) -> Dataset | IterableDataset:
    """
    Rows of kind "prompt", of text alone.

    Raises:
        [`InputError`]: a wrong row, none, or a column of images.
    """
    dataset = check_rows(dataset, "prompt", name)
    images = IMAGES & columns_of(dataset)
    if images:
        raise InputError(f"{name}: column '{min(images)}': PPOTrainer trains on text; remove it")
    return dataset


def drop_long_prompts(
    dataset: Dataset | IterableDataset,
    name: str,
    *,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None,
    **template_kwargs,
) -> Dataset | IterableDataset:
    """
    The rows whose prompt has at most `limit` tokens [P C: prompts over 1,024 are filtered]; the chat template gets
    `template_kwargs`. The others are counted and named in one warning; of an `IterableDataset`, which is read once,
    each is named when it is read.

    Raises:
        [`InputError`]: no row is left, or a prompt has no tokens.
    """

    def length_of(prompt: Text, index: int) -> int:
        with in_row(name, index):
            length = len(encode_prompt(tokenizer, prompt, **template_kwargs))
            if length == 0:
                raise InputError("the prompt has no tokens; fill it in or drop the row")
            return length

    if isinstance(dataset, IterableDataset):

        def fits(row: dict[str, Any], index: int) -> bool:
            length = length_of(row["prompt"], index)
            if limit is not None and length > limit:
                logger.warning(f"{name}, row {index}: prompt of {length} tokens dropped, over {limit}")
                return False
            return True

        return dataset.filter(fits, with_indices=True)
    lengths = [length_of(prompt, index) for index, prompt in enumerate(dataset["prompt"])]
    keep, report = split_by_length(lengths, limit, f"prompts of {name}", by_prompt(dataset["prompt"]))
    if report is None:
        return dataset
    if not keep:
        raise InputError(f"{name}: {report}; raise max_prompt_length")
    logger.warning(report)
    return dataset.select(keep)


def longest_prompt(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, behind: int = 0, **template_kwargs) -> int:
    """In tokens, with those `behind` it."""
    return behind + max(len(encode_prompt(tokenizer, prompt, **template_kwargs)) for prompt in dataset["prompt"])
