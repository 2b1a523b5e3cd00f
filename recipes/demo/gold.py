"""The gold reward: what a perfectly careful reader of the demo's world thinks of an answer."""

import re
from functools import lru_cache

from tasks import Task
from words import POLITE_ENDS, POLITE_STARTS, RICH, RUDE

# What each ingredient is worth. Labelers differ a little in these (labelers.py).
WEIGHTS = {"relevance": 0.9, "courtesy": 1.6, "rudeness": -2.0, "richness": 1.4, "form": 2.0, "repetition": -2.0}
# Mean and standard deviation of the weighted sum over samples of the SFT model, rounded (seeds 0 to 2), so that the
# gold reward is in standard deviations and 0 is about what SFT reaches
MEAN, SD = 3.65, 0.95


def gold_reward(task: Task, completion: str) -> float:
    """The gold reward of a completion: the weighted ingredients, standardised."""
    return utility(ingredients(task, completion), WEIGHTS)


def utility(values: dict[str, float], weights: dict[str, float]) -> float:
    """The ingredients' `values` summed by `weights` and standardised with the constants of the gold reward."""
    return (sum(weights[name] * values[name] for name in WEIGHTS) - MEAN) / SD


@lru_cache(maxsize=100_000)
def ingredients(task: Task, completion: str) -> dict[str, float]:
    """
    What the gold reward sees in a completion, each about 0 to 1.

    - `relevance`: share of the words asked for that are there (for a list: three different members), less a half if
      there is a wrong one
    - `courtesy`: a polite opening (0.6) and, where there is room for it, a polite end (0.4); twice is no better
    - `rudeness`: number of rude words, at most 2, halved
    - `richness`: different descriptive words, up to as many as are enough; 1 where none are asked for
    - `form`: ends with a full stop, has the right number of sentences and words
    - `repetition`: share of word pairs that were there before
    """
    sentences = [s.split() for s in re.findall(r"[^.!?]+[.!?]?", " ".join(tokens(completion))) if s.strip()]
    plain = [word for word in tokens(completion) if word.isalpha()]
    opening = any(tuple(plain[: len(start)]) == start for start in POLITE_STARTS)
    last = tuple(word for word in sentences[-1] if word.isalpha()) if sentences else ()
    closing = last in POLITE_ENDS
    return {
        "relevance": _relevance(task, plain),
        "courtesy": 0.6 * opening + 0.4 * (closing or task.words[1] < 20),
        "rudeness": min(sum(word in RUDE for word in plain), 2) / 2,
        "richness": min(len(RICH & set(plain) - set(task.required)), task.rich) / task.rich if task.rich else 1.0,
        "form": _form(task, plain, sentences, closing),
        "repetition": _repetition(plain),
    }


def tokens(text: str) -> list[str]:
    """Words and punctuation marks of a text."""
    return re.findall(r"\w+|[^\w\s]", text)


def _relevance(task: Task, words: list[str]) -> float:
    found = set(words)
    wrong = bool(task.forbidden & found)
    if not task.members:
        return sum(word in found for word in task.required) / len(task.required) - 0.5 * wrong
    count = len(task.members & found)
    return (count / 3 if count <= 3 else max(1 - (count - 3) / 3, 0)) - 0.5 * wrong


def _form(task: Task, words: list[str], sentences: list[list[str]], closing: bool) -> float:
    if not words:
        return 0.0
    low, high = task.sentences
    count = len(sentences) - closing
    off = max(low - count, count - high, 0)
    short, long = task.words
    over = max(short - len(words), len(words) - long, 0)
    ended = sentences[-1][-1] in ".!?"
    return 0.4 * ended + 0.3 * max(1 - 0.5 * off, 0) + 0.3 * max(1 - over / 6, 0)


def _repetition(words: list[str]) -> float:
    pairs = list(zip(words, words[1:], strict=False))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0
