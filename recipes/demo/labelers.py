"""Simulated labelers: the gold reward, plus a taste of their own, plus noise."""

import random
from dataclasses import dataclass, replace
from itertools import combinations

from gold import WEIGHTS, ingredients, utility
from tasks import Task

# Two labelers of a group agree on about this share of the pairs that neither ties; `set_noise` sees to it. In the
# paper: 72.6 % for training labelers, 77.3 % for held-out labelers
AGREEMENT = {"train": 0.76, "heldout": 0.77}
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
        noise (`float`, *optional*, defaults to 0.5): standard deviation of the noise, in standard deviations of the
            gold reward.
    """

    name: str
    weights: dict[str, float]
    noise: float = 0.5

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
        labelers.append(Labeler(f"{group}_{k} of {seed}", weights))
    return labelers


def set_noise(
    labelers: list[Labeler], tasks: dict[str, Task], samples: dict[str, list[str]], target: float
) -> list[Labeler]:
    """
    The labelers with the noise at which two of them agree on a share `target` of the untied pairs of `samples`, found
    by bisection: more noise, less agreement.
    """
    low, high = 0.0, 3.0
    for _ in range(8):
        noise = (low + high) / 2
        noisy = [replace(labeler, noise=noise) for labeler in labelers]
        low, high = (noise, high) if agreement(tasks, samples, noisy) > target else (low, noise)
    return noisy


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
