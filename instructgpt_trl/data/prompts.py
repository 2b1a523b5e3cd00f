"""
Rules for prompts, the paper's [InstructGPT 3.2, A.1]: near-duplicates, prompts a user, splits by user, few-shot
prompts, length. They work on one row or on arrays with one number a prompt, so that a million prompts need some tens
of megabytes; `recipes/data/prepare_prompts.py` runs them over files. Personal data are in pii.py.
"""

import re
import unicodedata
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import numpy as np

from .files import InputError
from .rows import Text, check_row

__all__ = [
    "USE_CASES",
    "check_raw_prompt",
    "expand_few_shot",
    "first_of_each",
    "longest_of_each",
    "number_of",
    "prefix_key",
    "split_of",
    "text_of",
    "use_case",
]


# Cheap signs of a use case, the first that fits; a labeler's own category is better and always stays [P Table 1]
USE_CASES = {
    "summarization": r"summar(y|i[sz]e)|tl;?dr|in (one|a few) sentences?\b",
    "rewrite": r"rewrite|rephrase|paraphrase|translate|proofread|correct the (grammar|spelling)|convert (this|the)",
    "classification": r"classify|categori[sz]e|sentiment|which (category|class)|true or false",
    "extract": r"\bextract\b|find all|list all the \w+ (in|from) (the|this)",
    "closed qa": r"(based on|according to|given|from|using) (the|this) (text|passage|paragraph|article|context)",
    "brainstorming": r"brainstorm|\bideas?\b|suggest|list (of )?\w+ (ways|things|names|reasons|tips)|\bways to\b",
    "chat": r"\b(human|user|ai|assistant|bot)\s*:",
    "generation": r"\b(write|compose|create|generate|draft|story|poem|essay|letter)\b",
    "open qa": r"\?|\b(what|who|why|when|where|how|which|explain|describe)\b",
}
_USE_CASES = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in USE_CASES.items()}


def check_raw_prompt(row: Any, where: str) -> dict[str, Any]:
    """
    Check a row of raw prompts: `prompt`, or `instruction` and `examples` for a labeler's few-shot prompt; if they
    are there, `user_id` and `source` are text or whole numbers, `category` is text.

    Raises:
        [`InputError`]: what is wrong with the row, what was expected and the fix.
    """
    if isinstance(row, dict) and row.get("prompt") is None and row.get("examples") is not None:
        _check_few_shot(row, where)
    else:
        answered = isinstance(row, dict) and row.get("completion") is not None
        check_row(row, "demonstration" if answered else "prompt", where)
    user = row.get("user_id")
    if user is not None and (isinstance(user, bool) or not isinstance(user, str | int) or user == ""):
        raise InputError(
            f"{where}, column 'user_id': expected text or a whole number, got {user!r}; correct it, or leave it out"
        )
    for name, kinds in (("category", str), ("source", str | int)):
        if row.get(name) is not None and not isinstance(row[name], kinds):
            raise InputError(f"{where}, column '{name}': expected text, got {row[name]!r}; correct it")
    return row


def _check_few_shot(row: Mapping[str, Any], where: str) -> None:
    instruction, examples = row.get("instruction"), row["examples"]
    if not isinstance(instruction, str) or not instruction.strip():
        raise InputError(f"{where}, column 'instruction': expected text beside the examples, got {instruction!r}")
    if not isinstance(examples, list) or not examples:
        raise InputError(f"{where}, column 'examples': expected a list of at least one example; add some")
    for k, example in enumerate(examples):
        texts = [example.get(name) for name in ("query", "response")] if isinstance(example, dict) else []
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise InputError(
                f"{where}, example {k}: expected {{'query': ..., 'response': ...}} with texts, got "
                f"{str(example)[:60]!r}; correct it"
            )


def expand_few_shot(row: dict[str, Any]) -> list[dict[str, Any]]:
    """
    The k rows of a few-shot prompt: each example once as the one to answer, with the k - 1 others in front of it
    [InstructGPT 3.4, A.2]. Its response is the row's `completion`, which makes a demonstration of it. A row with a
    `prompt` comes back alone.
    """
    if row.get("prompt") is not None:
        return [row]
    rest = {
        name: value for name, value in row.items() if name not in ("prompt", "completion", "instruction", "examples")
    }
    shown = [f"Query: {example['query']}\nResponse: {example['response']}" for example in row["examples"]]
    rows = []
    for k, example in enumerate(row["examples"]):
        parts = [row["instruction"], *shown[:k], *shown[k + 1 :], f"Query: {example['query']}\nResponse:"]
        rows.append({"prompt": "\n\n".join(parts), "completion": f" {example['response']}", **rest})
    return rows


def text_of(prompt: Text) -> str:
    """A prompt as one text; of a conversation the contents, a line each."""
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)


def number_of(text: str) -> int:
    """64 bits that stand for a text: the same on every machine, and for a million texts different."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


def prefix_key(text: str, prefix_length: int | None) -> int:
    """
    A number that two prompts have in common if they are near-duplicates: their first `prefix_length` characters are
    the same, but for case and the amount of white space. A prompt that is shorter, or any where `prefix_length` is
    `None`, has only its like.

    The paper drops prompts "that share a long common prefix" and does not say how long.
    """
    return number_of(" ".join(unicodedata.normalize("NFC", text).casefold().split())[:prefix_length])


def longest_of_each(keys: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Of each group of equal `keys` (N,) the one with the largest of `lengths` (N,), the first of several: (N,)."""
    order = np.lexsort((-lengths.astype(np.int64), keys))  # stable: equal lengths stay in their order
    chosen = np.zeros(len(keys), dtype=bool)
    chosen[order[_starts(keys[order])]] = True
    return chosen


def first_of_each(keys: np.ndarray, most: int) -> np.ndarray:
    """Of each group of equal `keys` (N,) the first `most`: (N,) bool."""
    order = np.argsort(keys, kind="stable")
    starts = _starts(keys[order])
    place = np.arange(len(keys)) - np.maximum.accumulate(np.where(starts, np.arange(len(keys)), 0))
    chosen = np.empty(len(keys), dtype=bool)
    chosen[order] = place < most
    return chosen


def _starts(ordered: np.ndarray) -> np.ndarray:
    """Where another value begins."""
    starts = np.ones(len(ordered), dtype=bool)
    starts[1:] = ordered[1:] != ordered[:-1]
    return starts


def split_of(user: int, seed: int, valid_fraction: float, test_fraction: float) -> str:
    """
    "train", "valid" or "test", by the user's number alone: no user is in two of them, and a user stays where he is
    when others come. The fractions are of users, on average.
    """
    share = number_of(f"{seed} {user}") / 2**64
    return "test" if share < test_fraction else "valid" if share < test_fraction + valid_fraction else "train"


def use_case(text: str) -> str:
    """One of the paper's use cases, guessed by the words of a prompt; "other" where none fits."""
    return next((name for name, pattern in _USE_CASES.items() if pattern.search(text)), "other")
