"""
The demo's judges for eval/: `python:recipes/demo/judge.py:prefers` for win rates, `...:gold` for overoptimisation.

The demo's world is made anew from its seed, DEMO_SEED or 0: a prompt says which task it is.
"""

import os
import sys
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # a judge is loaded by its path
from gold import gold_reward  # noqa: E402
from tasks import Task  # noqa: E402
from world import make_world  # noqa: E402


@cache
def _tasks() -> dict[str, Task]:
    return make_world(int(os.environ.get("DEMO_SEED", "0"))).tasks


def gold(prompt: str, completion: str) -> float:
    """The gold reward, in standard deviations; a `KeyError` for a prompt of another world."""
    return gold_reward(_tasks()[prompt], completion)


def prefers(prompt: str, first: str, second: str) -> float:
    """Whether the gold reward of the first completion is higher; 0.5 where both are the same."""
    a, b = gold(prompt, first), gold(prompt, second)
    return 0.5 + 0.5 * (a > b) - 0.5 * (a < b)
