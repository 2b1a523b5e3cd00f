"""Several labelers' rankings of one prompt as one."""

import json
from collections.abc import Iterable
from typing import Any

from .ranking_formats import ranks_of

__all__ = ["merge_labelers"]

Row = dict[str, Any]
# Columns of one labeler's ranking, which say nothing of several
OF_A_LABELER = {"labeler_id", "scores", "ratings", "metadata", "order", "seconds", "time", "id", "version"}


def merge_labelers(rankings: Iterable[Row]) -> list[Row]:
    """
    One ranking for all labelers who ranked the same completions of a prompt, in whatever order: by each completion's
    mean share of the others that it beats, a tie being half. Rankings of other completions stay apart. Where a labeler
    ranked the same twice, the later counts. `labeler_ids` names all.
    """
    groups: dict[str, dict[Any, Row]] = {}
    for number, row in enumerate(rankings):
        key = json.dumps([row["prompt"], sorted(map(_text, row["completions"]))], ensure_ascii=False)
        labeler = row.get("labeler_id")
        groups.setdefault(key, {})[("unknown", number) if labeler is None else labeler] = row
    return [_merged(list(of.values())) for of in groups.values()]


def _merged(rows: list[Row]) -> Row:
    first = rows[0]
    if len(rows) == 1:
        return first
    texts = list(map(_text, first["completions"]))
    # A text that is there twice has two places, taken in turn
    sums = [0.0] * len(texts)
    for row in rows:
        places = _places(texts, list(map(_text, row["completions"])))
        for place, share in zip(places, _shares(row["ranks"]), strict=True):
            sums[place] += share
    labelers = [row["labeler_id"] for row in rows if row.get("labeler_id") is not None]
    rest = {name: value for name, value in first.items() if name not in OF_A_LABELER}
    scores = [round(total / len(rows), 9) for total in sums]
    return {**rest, "ranks": ranks_of(scores), "labeler_ids": labelers}


def _places(texts: list[str], others: list[str]) -> list[int]:
    """Where each of `others` stands in `texts`, which holds the same."""
    free: dict[str, list[int]] = {}
    for place, text in reversed(list(enumerate(texts))):
        free.setdefault(text, []).append(place)
    return [free[text].pop() for text in others]


def _shares(ranks: list[int]) -> list[float]:
    """Share of the others that each beats; a tie is half."""
    return [(sum((other > rank) + (other == rank) / 2 for other in ranks) - 0.5) / (len(ranks) - 1) for rank in ranks]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
