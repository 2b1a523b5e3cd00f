"""Rows of the public sets as the paper's prompts want them, and the figures of one answer. Columns are the hub's."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset
from lm_eval.tasks.drop.utils import process_docs as drop  # noqa: F401  named in drop.yaml
from lm_eval.tasks.drop.utils import process_results

sys.path.insert(0, str(Path(__file__).parents[1]))  # lm-evaluation-harness loads this file by its path
from metrics import NO_ANSWER, RougeL, SquadV2, squad_words  # noqa: E402

DONT_KNOW = "I don't know."
Doc = dict[str, Any]


def squadv2(rows: Dataset) -> Dataset:
    """A question comes behind the earlier ones of its paragraph and their answers, as in the released samples."""
    earlier, accepted, before = [], [], {}
    for row in rows:
        answers = row["answers"]["text"] or [NO_ANSWER]
        earlier.append(before.get(row["context"], ""))
        accepted.append(answers)
        before[row["context"]] = earlier[-1] + _asked(row["question"], answers[0])
    return rows.add_column("earlier", earlier).add_column("accepted", accepted)


def quac(rows: Dataset) -> Dataset:
    """A row for each question of a dialogue, behind the earlier ones and their answers."""

    def questions(row: Doc) -> list[Doc]:
        found, earlier = [], ""
        for question, texts in zip(row["questions"], row["answers"]["texts"], strict=True):
            accepted = [DONT_KNOW if text == "CANNOTANSWER" else text for text in texts]
            found.append({"question": question, "accepted": accepted, "earlier": earlier})
            earlier += _asked(question, accepted[0])
        about = {"title": row["wikipedia_page_title"], "context": row["context"].removesuffix("CANNOTANSWER").strip()}
        return [about | one for one in found]

    return Dataset.from_list([one for row in rows for one in questions(row)])


def _asked(question: str, answer: str) -> str:
    return f"Q: {question}\n\nA: {answer}\n\n"


def wsc(rows: Dataset) -> Dataset:
    """The pronoun stands between asterisks."""

    def mark(row: Doc) -> Doc:
        words = row["text"].split(" ")
        words[row["span2_index"]] = words[row["span2_index"]].replace(row["span2_text"], f"*{row['span2_text']}*")
        return {"marked": " ".join(words)}

    return rows.map(mark)


# Scores: `results` is a list of the one answer


def score_squadv2(doc: Doc, results: list[str]) -> dict[str, float]:
    return _first(SquadV2().of_each([results[0].strip()], [doc["accepted"]]))


def score_quac(doc: Doc, results: list[str]) -> dict[str, float]:
    """SQuAD's F1, where "I don't know." is the empty answer."""
    said, *accepted = (NO_ANSWER if text.strip() == DONT_KNOW else text for text in (results[0], *doc["accepted"]))
    return {"f1": _first(SquadV2().of_each([said], [accepted]))["f1"]}


def score_drop(doc: Doc, results: list[str]) -> dict[str, float]:
    """DROP's official rules, of answers of one or several spans."""
    found = process_results(doc, [results[0].strip()])
    return {name: 100 * float(found[name]) for name in ("f1", "em")}


def score_wsc(doc: Doc, results: list[str]) -> dict[str, float]:
    """Whether the noun that was named is the candidate, or not, as the row says [GPT-3, Appendix G]."""
    said, candidate = squad_words(results[0]), squad_words(doc["span1_text"])
    if not said:
        return {"acc": 0.0}
    same = set(said) <= set(candidate) or set(candidate) <= set(said)
    return {"acc": float(same == bool(doc["label"]))}


def score_fr_to_en(doc: Doc, results: list[str]) -> dict[str, tuple[str, str]]:
    return {"bleu": (doc["translation"]["en"], results[0].strip())}


def _rouge(column: str) -> Callable[[Doc, list[str]], dict[str, float]]:
    return lambda doc, results: _first(RougeL().of_each([results[0].strip()], [[doc[column].strip()]]))


score_cnn_dm, score_tldr = _rouge("highlights"), _rouge("completion")


def _first(found: dict[str, list[float]]) -> dict[str, float]:
    return {name: values[0] for name, values in found.items()}
