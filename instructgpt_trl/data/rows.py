"""
Rows: which columns each stage reads, and how one row is checked. Every stage takes its rows through here.

A mistake in the input raises [`InputError`] with one line: where it is, what was expected, and the fix.
"""

import math
from typing import Any

from .files import InputError, parse_json

# Required columns of each kind of row. `chosen`/`rejected` rows are read as rankings with K = 2.
KINDS: dict[str, tuple[str, ...]] = {
    "demonstration": ("prompt", "completion"),
    "ranking": ("prompt", "completions", "ranks"),
    "prompt": ("prompt",),
    "pretraining": ("text",),
}

# Optional columns of a ranking with a value for each completion, if they are lists
OF_COMPLETIONS = ("models", "scores", "ratings", "metadata")

Text = str | list[dict[str, str]]  # a string, or a conversation: [{"role": ..., "content": ...}, ...]


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
            from trl import extract_prompt  # here, since it brings torch and seconds, and few rows want it

            row = extract_prompt(row)
        rest = {key: value for key, value in row.items() if key not in ("prompt", "chosen", "rejected")}
        prompt = "" if row.get("prompt") is None else row["prompt"]
        return {"prompt": prompt, "completions": [row["chosen"], row["rejected"]], "ranks": [1, 2], **rest}
    parsed = dict(row)
    for column in ("completions", "ranks"):
        if isinstance(row.get(column), str):
            try:
                parsed[column] = parse_json(row[column], where)
            except InputError:
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
        if completion == []:  # one that said nothing has a message of no text
            raise InputError(
                f"{where}, completion {k}: the conversation is empty; expected at least one message; drop it"
            )
        _check_text(completion, f"{where}, completion {k}", allow_empty, empty_turns=allow_empty)
        _check_forms(row["prompt"], completion, f"{where}, completion {k}")
    if not isinstance(ranks, list) or len(ranks) != len(completions):
        got = f"{len(ranks)}" if isinstance(ranks, list) else type(ranks).__name__
        raise InputError(
            f"{where}, column 'ranks': expected a list of {len(completions)} ranks, one a completion, got {got}; "
            f"give every completion its rank (1 is best, equal ranks tie)"
        )
    for k, rank in enumerate(ranks):
        number = isinstance(rank, int) or isinstance(rank, float) and math.isfinite(rank)
        if not number or isinstance(rank, bool) or rank != int(rank) or not 1 <= rank < 2**31:
            raise InputError(
                f"{where}, rank {k}: expected an integer >= 1 (1 is best, equal ranks tie), got {rank!r}; "
                f"correct the rank or drop the completion"
            )
    labeler = row.get("labeler_id")
    if labeler is not None and (isinstance(labeler, bool) or not isinstance(labeler, str | int)):
        raise InputError(f"{where}, column 'labeler_id': expected text or a whole number, got {labeler!r}; correct it")
    for name in OF_COMPLETIONS:
        if isinstance(row.get(name), list) and len(row[name]) != len(completions):
            raise InputError(
                f"{where}, column '{name}': expected one for each of {len(completions)} completions, got "
                f"{len(row[name])}; correct it"
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
        texts = [message.get("role"), message.get("content")] if isinstance(message, dict) else [None]
        if not all(isinstance(text, str) for text in texts) or not message["role"]:
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
