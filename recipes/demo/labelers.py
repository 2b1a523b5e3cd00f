"""Simulated labelers: the gold reward, plus a taste of their own, plus noise."""

import random
from dataclasses import dataclass
from itertools import combinations

from gold import WEIGHTS, ingredients, utility
from tasks import Task

# Standard deviation of a labeler's noise, by group, in standard deviations of the gold reward. Two of a group then
# agree on 73 to 78 % of the pairs that neither ties (InstructGPT: 72.6 % training labelers, 77.3 % held-out labelers)
NOISE = {"train": 0.6, "heldout": 0.5}
TIE_WIDTH = 0.25  # utilities in the same interval of this width tie
TASTE = 0.2  # spread of the log weights among the labelers of a group
# The held-out group as a whole looks more at whether an answer is right, less at whether it is polite
HELDOUT_TASTE = {"relevance": 1.2, "courtesy": 0.8, "richness": 0.9}


@dataclass(frozen=True)
class Labeler:
    """
    A labeler who judges by his own weights of the gold reward's ingredients and with noise.

    Args:
        name (`str`): goes into `labeler_id` and into the noise.
        weights (`dict[str, float]`): his taste, in place of `gold.WEIGHTS`.
        noise (`float`): standard deviation of the noise, in standard deviations of the gold reward.
    """

    name: str
    weights: dict[str, float]
    noise: float

    def grade(self, task: Task, completion: str) -> int:
        """His utility of a completion as an interval's number; the same for the same completion, whenever asked."""
        noise = random.Random(f"{self.name} {task.prompt} {completion}").gauss(0, self.noise)
        return round((utility(ingredients(task, completion), self.weights) + noise) / TIE_WIDTH)

    def rank(self, task: Task, completions: list[str]) -> list[int]:
        """Ranks of the completions of one prompt: 1 is best, equal ranks tie."""
        grades = [self.grade(task, completion) for completion in completions]
        order = sorted(set(grades), reverse=True)
        return [order.index(grade) + 1 for grade in grades]

    def prefers(self, task: Task, first: str, second: str) -> float:
        """1 if he prefers `first`, 0 if he prefers `second`, 0.5 if they tie."""
        difference = self.grade(task, first) - self.grade(task, second)
        return 0.5 if difference == 0 else float(difference > 0)


def make_labelers(group: str, count: int = 5, seed: int = 0) -> list[Labeler]:
    """`count` labelers of the group `"train"` or `"heldout"`; the groups share no labeler and differ in taste."""
    rng = random.Random(f"labelers {group} {seed}")
    shared = HELDOUT_TASTE if group == "heldout" else {}
    labelers = []
    for k in range(count):
        weights = {name: weight * shared.get(name, 1.0) * 2 ** rng.gauss(0, TASTE) for name, weight in WEIGHTS.items()}
        labelers.append(Labeler(f"{group}_{k} of {seed}", weights, NOISE[group]))
    return labelers


def rank_all(
    tasks: dict[str, Task], samples: dict[str, list[str]], labelers: list[Labeler], seed: int = 0
) -> list[dict]:
    """Rows of kind ranking: every prompt's completions ranked by one labeler, drawn for each prompt."""
    rng = random.Random(f"rankings {seed}")
    rows = []
    for prompt, completions in samples.items():
        labeler = rng.choice(labelers)
        ranks = labeler.rank(tasks[prompt], completions)
        rows.append(
            {"prompt": prompt, "completions": completions, "ranks": ranks, "labeler_id": labeler.name.split()[0]}
        )
    return rows


def agreement(tasks: dict[str, Task], samples: dict[str, list[str]], labelers: list[Labeler]) -> float:
    """
    Share of pairs on which two labelers agree: over all prompts, all pairs of completions of one prompt and all pairs
    of labelers who both do not tie them.
    """
    agreed = judged = 0
    for prompt, completions in samples.items():
        ranks = [labeler.rank(tasks[prompt], completions) for labeler in labelers]
        for i, j in combinations(range(len(completions)), 2):
            signs = [(r[i] > r[j]) - (r[i] < r[j]) for r in ranks]
            for first, second in combinations([sign for sign in signs if sign], 2):
                agreed += first == second
                judged += 1
    return agreed / judged


def accuracy(
    tasks: dict[str, Task], samples: dict[str, list[str]], scores: dict[str, list[float]], labelers: list[Labeler]
) -> float:
    """
    Share of the labelers' untied pairs that `scores` orders as they do, over all labelers; an equal score counts a
    half.

    Args:
        tasks (`dict[str, Task]`): the task of each prompt.
        samples (`dict[str, list[str]]`): completions of each prompt.
        scores (`dict[str, list[float]]`): the score of each completion.
        labelers (`list[Labeler]`): whose rankings are the truth.
    """
    right = pairs = 0.0
    for prompt, completions in samples.items():
        for labeler in labelers:
            ranks = labeler.rank(tasks[prompt], completions)
            for i, j in combinations(range(len(completions)), 2):
                if ranks[i] == ranks[j]:
                    continue
                better, worse = (i, j) if ranks[i] < ranks[j] else (j, i)
                difference = scores[prompt][better] - scores[prompt][worse]
                right += 0.5 if difference == 0 else float(difference > 0)
                pairs += 1
    return right / pairs
