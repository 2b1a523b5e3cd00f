"""
Rankings from public formats and back, row by row.

A format is a pair of functions. `read(row, where)` gives the rankings in a row: `prompt`, `completions`, `ranks` (1 is
best, equal ranks tie), and where the row has them `labeler_id`, `id`, `models` (who wrote each completion) and
`scores`.
`write(ranking, where)` gives rows of the format. A format that has no place for ties gets untied
pairs; conversations are refused where it has texts only.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from os.path import commonprefix
from typing import Any

from .files import InputError
from .rows import OF_COMPLETIONS, check_row

__all__ = ["FORMATS", "RankingFormat", "hh_conversation", "pairs_of", "ranks_of", "read_ranking", "without_empty"]

Row = dict[str, Any]


@dataclass(frozen=True)
class RankingFormat:
    """
    Args:
        title (`str`): What it is, and its rows.
        read (`Callable`): The rankings of a row.
        write (`Callable`): The rows of a ranking.
    """

    title: str
    read: Callable[[Row, str], list[Row]]
    write: Callable[[Row, str], list[Row]]


def read_ranking(row: Row, format: str, where: str) -> list[Row]:
    """
    The checked rankings in a row of `format`, which may have empty completions.

    Raises:
        [`InputError`]: what is wrong with the row, what was expected and the fix.
    """
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object, got {type(row).__name__}")
    try:
        rankings = FORMATS[format].read(row, where)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        problem = f"'{error.args[0]}' is missing" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{where}: not a row of {FORMATS[format].title}: {problem}") from None
    return [check_row(ranking, "ranking", where, allow_empty=True) for ranking in rankings]


def ranks_of(scores: Sequence[float]) -> list[int]:
    """One more than the number of higher scores: 1, 1, 3 where the best two are equal."""
    return [1 + sum(other > score for other in scores) for score in scores]


def _only(row: Row, *names: str) -> Row:
    """The columns of `names` that the row has."""
    return {name: row[name] for name in names if row.get(name) is not None}


def _without(row: Row, *names: str) -> Row:
    return {name: value for name, value in row.items() if name not in names}


def without_empty(ranking: Row) -> Row | None:
    """A ranking without its completions of no text; none if fewer than two are left."""
    last = [text if isinstance(text, str) else text[-1]["content"] for text in ranking["completions"]]
    kept = [k for k, text in enumerate(last) if text.strip()]
    if len(kept) == len(last):
        return ranking
    if len(kept) < 2:
        return None
    each = ("completions", "ranks", *OF_COMPLETIONS)
    parts = {name: [ranking[name][k] for k in kept] for name in each if isinstance(ranking.get(name), list)}
    return {**ranking, **parts}


def pairs_of(ranking: Row) -> list[tuple[int, int]]:
    """The better and the worse place of each untied pair, in the order of the completions."""
    ranks = ranking["ranks"]
    pairs = [(i, j) if ranks[i] < ranks[j] else (j, i) for i, j in combinations(range(len(ranks)), 2)]
    return [(better, worse) for better, worse in pairs if ranks[better] != ranks[worse]]


# Ours, and chosen and rejected


def _read_rankings(row: Row, where: str) -> list[Row]:
    return [check_row(row, "ranking", where, allow_empty=True)]


def _write_pairs(ranking: Row, where: str) -> list[Row]:
    prompt, completions = ranking["prompt"], ranking["completions"]
    rest = _without(ranking, "prompt", "completions", "ranks", "scores", "models")
    start = {"prompt": prompt} if prompt else {}  # rows that hold their prompt in both texts have an empty one
    return [
        {**start, "chosen": completions[better], "rejected": completions[worse], **rest}
        for better, worse in pairs_of(ranking)
    ]


# Anthropic's hh-rlhf: two dialogues that part at an answer

ANSWER = "\n\nAssistant:"
TURN = re.compile(r"\n\n(Human|Assistant):")


def _read_hh(row: Row, where: str) -> list[Row]:
    chosen, rejected = row["chosen"], row["rejected"]
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise InputError(f"{where}: expected 'chosen' and 'rejected' as texts with Human: and Assistant: turns")
    end = commonprefix([chosen, rejected]).rfind(ANSWER) + len(ANSWER)
    if end < len(ANSWER):
        raise InputError(
            f"{where}: 'chosen' and 'rejected' do not begin with the same turns up to '\\n\\nAssistant:'; drop the row"
        )
    rest = _without(row, "chosen", "rejected")
    return [{**rest, "prompt": chosen[:end], "completions": [chosen[end:], rejected[end:]], "ranks": [1, 2]}]


def _write_hh(ranking: Row, where: str) -> list[Row]:
    rows = _write_pairs({**ranking, "prompt": ""}, where)
    if not isinstance(ranking["prompt"], str):
        raise InputError(f"{where}: a conversation; hh-rlhf has texts")
    if not ranking["prompt"].endswith(ANSWER):
        raise InputError(f"{where}: the prompt does not end with '\\n\\nAssistant:'; hh-rlhf has dialogues")
    return [{**row, **{name: ranking["prompt"] + row[name] for name in ("chosen", "rejected")}} for row in rows]


def hh_conversation(ranking: Row, where: str) -> Row:
    """
    A ranking of hh-rlhf as conversations, for a chat model: turns as messages, without the white space around them.

    Raises:
        [`InputError`]: turns do not take turns, or a completion has more than one.
    """
    parts = TURN.split(ranking["prompt"].removesuffix(ANSWER))
    roles = ["user", "assistant"] * (len(parts) // 4 + 1)
    said = list(zip(parts[1::2], parts[2::2], strict=True))
    if parts[0].strip() or [name for name, _ in said] != ["Human", "Assistant"] * (len(said) // 2) + ["Human"]:
        raise InputError(f"{where}: its turns are not Human and Assistant by turns; drop the row")
    if any(TURN.search(text) for text in ranking["completions"]):
        raise InputError(f"{where}: a completion of more than one turn; drop the row")
    prompt = [{"role": role, "content": text.strip()} for role, (_, text) in zip(roles, said, strict=False)]
    answers = [[{"role": "assistant", "content": text.strip()}] for text in ranking["completions"]]
    return {**ranking, "prompt": prompt, "completions": answers}


# UltraFeedback: an instruction and completions with scores

SCORES = (
    "fine-grained_score",
    "overall_score",
    "score",
)  # the first is the mean of four aspects; the second has errors


def _read_ultrafeedback(row: Row, where: str) -> list[Row]:
    completions = row["completions"]
    name = next((name for name in SCORES if all(name in one for one in completions)), None)
    if name is None:
        raise InputError(f"{where}: expected every completion with one of {', '.join(SCORES)}")
    scores = [_number(one[name], f"{where}, '{name}'") for one in completions]
    models = [one.get("model") for one in completions]
    return [
        {
            "prompt": row["instruction"],
            "completions": [one["response"] for one in completions],
            "ranks": ranks_of(scores),
            "scores": scores,
            **({"models": models} if all(models) else {}),
            **_only(row, "source"),
        }
    ]


def _write_ultrafeedback(ranking: Row, where: str) -> list[Row]:
    worst = max(ranking["ranks"])
    scores = ranking.get("scores")
    if not scores or ranks_of(scores) != ranks_of([-rank for rank in ranking["ranks"]]):  # merged since, or corrected
        scores = [worst + 1 - rank for rank in ranking["ranks"]]
    models = ranking.get("models") or [None] * len(scores)
    completions = [
        {**({"model": model} if model else {}), "response": text, "fine-grained_score": score}
        for model, text, score in zip(models, ranking["completions"], scores, strict=True)
    ]
    return [{**_only(ranking, "source"), "instruction": _plain(ranking, where), "completions": completions}]


def _plain(ranking: Row, where: str) -> str:
    if not isinstance(ranking["prompt"], str) or not all(isinstance(text, str) for text in ranking["completions"]):
        raise InputError(f"{where}: a conversation; this format has texts")
    return ranking["prompt"]


def _number(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise InputError(f"{where}: expected a number, got {value!r}; correct it or drop the row")
    return number


# Stanford Human Preferences: two comments of a post


def _read_shp(row: Row, where: str) -> list[Row]:
    if row["labels"] not in (0, 1):
        raise InputError(f"{where}, column 'labels': expected 1 (A is preferred) or 0 (B is), got {row['labels']!r}")
    ranks = [1, 2] if row["labels"] == 1 else [2, 1]
    completions = [row["human_ref_A"], row["human_ref_B"]]
    rest = _without(row, "history", "human_ref_A", "human_ref_B", "labels")
    return [{**rest, "prompt": row["history"], "completions": completions, "ranks": ranks}]


def _write_shp(ranking: Row, where: str) -> list[Row]:
    rest = _without(ranking, "prompt", "completions", "ranks", "scores", "models")
    history, texts = _plain(ranking, where), ranking["completions"]
    return [
        {
            **rest,
            "history": history,
            "human_ref_A": texts[min(pair)],
            "human_ref_B": texts[max(pair)],
            "labels": int(pair[0] < pair[1]),
        }
        for pair in pairs_of(ranking)
    ]


# OpenAssistant: a tree of messages, the assistant's replies to one message ranked from 0

ROLES = {"prompter": "user", "assistant": "assistant"}


def _read_oasst(row: Row, where: str) -> list[Row]:
    found: list[Row] = []
    waiting = [([], row["prompt"])]
    while waiting:  # depth first, replies in their order
        before, message = waiting.pop()
        said = [*before, {"role": ROLES[message["role"]], "content": message["text"]}]
        replies = message.get("replies") or []
        ranked = [reply for reply in replies if reply.get("rank") is not None and reply["role"] == "assistant"]
        if message["role"] == "prompter" and len(ranked) > 1:
            found.append(
                {
                    "prompt": said,
                    "completions": [[{"role": "assistant", "content": reply["text"]}] for reply in ranked],
                    "ranks": [reply["rank"] + 1 for reply in ranked],
                    **({"id": message["message_id"]} if message.get("message_id") else {}),
                }
            )
        waiting += [(said, reply) for reply in reversed(replies)]
    return found


def _write_oasst(ranking: Row, where: str) -> list[Row]:
    prompt = ranking["prompt"]
    said = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    texts = [text if isinstance(text, str) else text[0]["content"] for text in ranking["completions"]]
    if any(len(text) != 1 for text in ranking["completions"] if isinstance(text, list)):
        raise InputError(f"{where}: a completion of more than one message; OpenAssistant ranks single ones")
    names = {role: name for name, role in ROLES.items()}
    if any(message["role"] not in names for message in said) or said[-1]["role"] != "user":
        raise InputError(
            f"{where}: expected messages of user and assistant, a user's last; OpenAssistant has no others"
        )
    replies = [
        {"text": text, "role": "assistant", "rank": rank - 1, "replies": []}
        for text, rank in zip(texts, ranking["ranks"], strict=True)
    ]
    for message in reversed(said):
        of = {"message_id": ranking["id"]} if message is said[-1] and ranking.get("id") else {}
        replies = [{**of, "text": message["content"], "role": names[message["role"]], "replies": replies}]
    return [{"prompt": replies[0]}]


# Argilla: a record's fields, and a ranking of their names by each user

RESPONSE = re.compile(r"response[-_]?\d+|completion[-_]?\d+")


def _read_argilla(row: Row, where: str) -> list[Row]:
    fields = row["fields"]
    asked = ("prompt", "instruction", "question", "input", "query", "text")
    prompt = next((fields[name] for name in asked if name in fields), None)
    names = [name for name in fields if RESPONSE.fullmatch(name)]
    if prompt is None or len(names) < 2:
        raise InputError(
            f"{where}, 'fields': expected 'prompt' and 'response-1', 'response-2' ..., found {', '.join(fields)}"
        )
    responses = row["responses"]
    if isinstance(responses, dict):  # Argilla 2: by question
        answers = [one for of in responses.values() for one in of]
    else:  # Argilla 1: by user
        answers = [{**one, **value} for one in responses for value in (one.get("values") or {}).values()]
    rankings = []
    for answer in answers:
        if answer.get("status") in ("draft", "discarded") or not _is_ranking(answer["value"], names):
            continue
        ranks = _ranks_by_name(answer["value"], names, where)
        labeler = {"labeler_id": str(answer["user_id"])} if answer.get("user_id") is not None else {}
        rankings.append(
            {
                "prompt": prompt,
                "completions": [fields[name] for name in names],
                "ranks": ranks,
                **labeler,
                **_only(row, "id"),
            }
        )
    return rankings


def _is_ranking(value: Any, names: list[str]) -> bool:
    """Whether an answer is to the question of a ranking, and not to another of the record's."""
    return isinstance(value, list) and any(
        (one.get("value") if isinstance(one, dict) else one) in names for one in value
    )


def _ranks_by_name(value: list[Any], names: list[str], where: str) -> list[int]:
    """From [{"value": name, "rank": r}, ...], or from names, in objects or not, with the best first."""
    each = [one if isinstance(one, dict) else {"value": one} for one in value]
    return _in_order([(one["value"], one.get("rank", place)) for place, one in enumerate(each, start=1)], names, where)


def _in_order(ranks: list[tuple[str, int]], names: list[str], where: str) -> list[int]:
    """The ranks in the order of the names, each of which has to have one."""
    ranked = [name for name, _ in ranks]
    if sorted(ranked, key=str) != sorted(names) or len(set(names)) < len(names):
        raise InputError(
            f"{where}: the ranking has {', '.join(map(str, ranked))}; expected each of {', '.join(names)} once; "
            f"drop it"
        )
    return [dict(ranks)[name] for name in names]


def _write_argilla(ranking: Row, where: str) -> list[Row]:
    names = [f"response-{k}" for k in range(1, len(ranking["ranks"]) + 1)]
    value = [{"value": name, "rank": rank} for name, rank in zip(names, ranking["ranks"], strict=True)]
    prompt = _plain(ranking, where)
    return [
        {
            **_only(ranking, "id"),
            "fields": {"prompt": prompt, **dict(zip(names, ranking["completions"], strict=True))},
            "responses": {
                "ranking": [{"value": value, "user_id": ranking.get("labeler_id"), "status": "submitted"}],
            },
        }
    ]


# Label Studio: a task's items, and a ranker's result by each annotator


def _read_label_studio(row: Row, where: str) -> list[Row]:
    data = row["data"]
    items = next((value for value in data.values() if isinstance(value, list)), [])
    names = [str(item["id"]) for item in items]
    prompt = next((data[name] for name in ("prompt", "instruction", "text") if isinstance(data.get(name), str)), None)
    texts = [next((item[name] for name in ("body", "html", "text") if name in item), None) for item in items]
    if prompt is None or len(names) < 2 or None in texts:
        raise InputError(
            f"{where}, 'data': expected 'prompt' and a list of items with 'body', 'html' or 'text' each, found "
            f"{', '.join(data)}"
        )
    rankings = []
    for annotation in row["annotations"]:
        values = [one["value"]["ranker"] for one in annotation["result"] if "ranker" in one.get("value", {})]
        if annotation.get("was_cancelled") or not values:
            continue
        rankings.append(
            {
                "prompt": prompt,
                "completions": texts,
                "ranks": _ranks_by_item(values[0], names, where),
                **_labeler(annotation.get("completed_by")),
                **_only(row, "id"),
            }
        )
    return rankings


def _ranks_by_item(value: Any, names: list[str], where: str) -> list[int]:
    """From ids with the best first, which may stand in one named bucket; ids in one list of a list tie."""
    order = next(iter(value.values())) if isinstance(value, dict) and len(value) == 1 else value
    if not isinstance(order, list):
        raise InputError(f"{where}: expected a ranking in one list, got {str(value)[:60]}; buckets are no order")
    levels = [tied if isinstance(tied, list) else [tied] for tied in order]
    before = [sum(map(len, levels[:level])) for level in range(len(levels))]
    ranks = [(str(name), 1 + better) for level, better in zip(levels, before, strict=True) for name in level]
    return _in_order(ranks, names, where)


def _labeler(who: Any) -> Row:
    """`completed_by` is a number, or an object with one and an e-mail address."""
    who = who.get("email") or who.get("id") if isinstance(who, dict) else who
    return {} if who is None else {"labeler_id": str(who)}


def _write_label_studio(ranking: Row, where: str) -> list[Row]:
    ranks, prompt = ranking["ranks"], _plain(ranking, where)
    items = [{"id": str(k), "body": text} for k, text in enumerate(ranking["completions"], start=1)]
    order = [[str(k) for k, rank in enumerate(ranks, start=1) if rank == level] for level in sorted(set(ranks))]
    result = {
        "from_name": "rank",
        "to_name": "list",
        "type": "ranker",
        "value": {"ranker": {"rank": [tied[0] if len(tied) == 1 else tied for tied in order]}},
    }
    annotation = {"completed_by": ranking.get("labeler_id"), "result": [result]}
    return [{**_only(ranking, "id"), "data": {"prompt": prompt, "items": items}, "annotations": [annotation]}]


FORMATS: dict[str, RankingFormat] = {
    "rankings": RankingFormat("rankings: prompt, completions, ranks", _read_rankings, lambda row, where: [row]),
    "pairs": RankingFormat("pairs: prompt, chosen, rejected", _read_rankings, _write_pairs),
    "hh": RankingFormat("hh-rlhf: chosen, rejected, dialogues as text", _read_hh, _write_hh),
    "ultrafeedback": RankingFormat(
        "UltraFeedback: instruction, completions with scores", _read_ultrafeedback, _write_ultrafeedback
    ),
    "shp": RankingFormat("SHP: history, human_ref_A, human_ref_B, labels", _read_shp, _write_shp),
    "oasst": RankingFormat("OpenAssistant: trees of messages, with ranks", _read_oasst, _write_oasst),
    "argilla": RankingFormat("Argilla: records with fields and responses", _read_argilla, _write_argilla),
    "label_studio": RankingFormat(
        "Label Studio: tasks with data and annotations", _read_label_studio, _write_label_studio
    ),
}
