"""
Ten examples with their scores beside a reward model, `reward_examples.json`: whoever puts it onto a base scores them
again, and knows whether it is the same reward model (pitfall 7).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..data import InputError

EXAMPLES = "reward_examples.json"
COUNT = 10
# In float32 on both sides; else of the scores' own spread, and at least of that
CLOSE, ROUNDED, LEAST = 1e-3, 0.5, 0.2


@dataclass
class RewardExamples:
    """
    Args:
        prompt_ids, completion_ids (N lists of ids): the examples.
        scores (N floats): their scores, bias included.
        exact (`bool`): whether they were computed in float32, on a base that is not quantised.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    scores: list[float]
    exact: bool

    def write(self, folder: str) -> None:
        Path(folder, EXAMPLES).write_text(json.dumps(asdict(self)), encoding="utf-8")

    def check(self, scores: Sequence[float], exact: bool, path: str) -> None:
        """
        Refuse a reward model that does not give its own examples their scores.

        Args:
            scores (N floats): as they are here.
            exact (`bool`): whether they were computed in float32.
            path (`str`): the reward model's folder, for the message.

        Raises:
            [`InputError`]: the example with the largest difference, and what to look at.
        """
        now, then = torch.tensor(scores, dtype=torch.double), torch.tensor(self.scores, dtype=torch.double)
        change = (now - then).abs()
        if exact and self.exact:
            limit = CLOSE * (1 + then.abs())
        else:
            limit = torch.full_like(then, max(LEAST, ROUNDED * then.std(correction=0).item()))
        worst = int((change - limit).argmax())
        if not change[worst] <= limit[worst]:
            raise InputError(
                f"{path}: the reward model gives {int((~(change <= limit)).sum())} of its {len(then)} examples "
                f"another score than when it was saved, example {worst} {now[worst]:.4f} and not {then[worst]:.4f} "
                f"({EXAMPLES}): are base, weights and bias those that belong together? Train or save it again, or "
                f"remove that file"
            )


def read_examples(folder: str) -> RewardExamples | None:
    """
    The examples of a folder, if it has any.

    Raises:
        [`InputError`]: the file is broken.
    """
    file = Path(folder, EXAMPLES)
    if not file.is_file():
        return None
    try:
        read = RewardExamples(**json.loads(file.read_text(encoding="utf-8")))
        lengths = {len(read.prompt_ids), len(read.completion_ids), len(read.scores)}
        ids = [id for one in (*read.prompt_ids, *read.completion_ids) for id in one]
        if len(lengths) > 1 or not read.scores or not all(isinstance(id, int) for id in ids):
            raise ValueError("expected as many prompts, completions and scores")
        return RewardExamples(read.prompt_ids, read.completion_ids, list(map(float, read.scores)), bool(read.exact))
    except (ValueError, TypeError) as error:
        raise InputError(f"{file}: cannot be read ({error}); remove it, or save the reward model again") from None
