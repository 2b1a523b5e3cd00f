"""
Generated bad inputs: rows, configs and folders that are wrong in one way each, as command lines of the recipes.

Only what is really wrong is generated: a flipped bit inside weights makes another legal number, and is not here.
"""

from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st


@dataclass
class Bad:
    """
    Args:
        stage: the recipe, `"sft"`, `"reward"` or `"ppo_ptx"`.
        flags: of its command line; `HERE` in them is the folder of the case, into which `files` are written.
        files: contents by name; none is a folder of that name.
        names: what its message has to say, all of them; of a tuple one.
        what: what is wrong, where `files` does not show it.
    """

    stage: str
    flags: dict[str, str]
    files: dict[str, bytes | None] = field(default_factory=dict)
    names: list[str | tuple[str, ...]] = field(default_factory=list)
    what: str = ""


def examples(strategy: st.SearchStrategy[Bad], count: int) -> list[Bad]:
    """So many different cases, the same each time."""
    found: dict[str, Bad] = {}

    @settings(
        max_examples=4 * count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(case: Bad) -> None:
        if len(found) < count:
            found.setdefault(repr(case), case)

    collect()
    return list(found.values())


DELETE = object()


def changed(row: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in {**row, **change}.items() if value is not DELETE}
