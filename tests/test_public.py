"""What users build on: public names, config fields and their documentation."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import trl

import instructgpt_trl
from instructgpt_trl import functional

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONFIGS = {
    instructgpt_trl.SFTConfig: trl.SFTConfig,
    instructgpt_trl.RewardConfig: trl.RewardConfig,
    instructgpt_trl.PPOConfig: trl.RLOOConfig,
}


def test_public_names_are_frozen():
    assert sorted(instructgpt_trl.__all__) == [
        "PPOConfig",
        "PPOTrainer",
        "RewardConfig",
        "RewardModel",
        "RewardTrainer",
        "SFTConfig",
        "SFTTrainer",
    ]
    for name in instructgpt_trl.__all__:
        assert inspect.isclass(getattr(instructgpt_trl, name))


def test_functional_has_exactly_the_seven_functions():
    own = {
        name: list(inspect.signature(value).parameters)
        for name, value in vars(functional).items()
        if inspect.isfunction(value) and not name.startswith("_") and value.__module__ == functional.__name__
    }
    assert own == {
        "ranking_loss": ["scores", "ranks", "group_sizes"],
        "ranking_accuracy": ["scores", "ranks", "group_sizes"],
        "token_rewards": ["scores", "logprobs", "ref_logprobs", "mask", "kl_coef"],
        "gae": ["rewards", "values", "mask", "gamma", "lam"],
        "whiten": ["x", "mask", "shift_mean"],
        "policy_loss": ["logprobs", "old_logprobs", "advantages", "mask", "cliprange"],
        "value_loss": ["values", "old_values", "returns", "mask", "cliprange"],
    }


def changed_fields(ours, parent) -> dict[str, object]:
    """Fields of `ours` that the parent does not have, or has with another default."""
    theirs = {field.name: field.default for field in dataclasses.fields(parent)}
    missing = object()
    return {f.name: f.default for f in dataclasses.fields(ours) if theirs.get(f.name, missing) != f.default}


@pytest.mark.parametrize("ours, parent", CONFIGS.items(), ids=lambda cls: cls.__module__)
def test_every_new_config_field_and_default_stands_in_the_readme(ours, parent):
    """CONFIG table: | `Config.field` | default | source |"""
    rows = dict(re.findall(rf"^\| `{ours.__name__}\.(\w+)` \| `([^`]*)` \|", README, flags=re.MULTILINE))
    assert rows == {name: str(value) for name, value in changed_fields(ours, parent).items()}


@pytest.mark.parametrize("ours, parent", CONFIGS.items(), ids=lambda cls: cls.__module__)
def test_every_new_config_field_is_documented(ours, parent):
    for name in changed_fields(ours, parent):
        assert re.search(rf"\b{name}\b", ours.__doc__), f"{ours.__name__}.{name} is not in the docstring"


def test_files_and_tests_named_in_the_readme_exist():
    for path, name in re.findall(r"`((?:instructgpt_trl|recipes|eval|tests)/[\w./]+)(?:::(\w+))?`", README):
        assert (ROOT / path).exists(), path
        if name:
            assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), name


def test_functions_in_the_table_of_the_paper_exist():
    rows = re.findall(r"^\| [^|]* \| ([^|]*) \| `tests/[^|]*::[^|]* \|$", README, flags=re.MULTILINE)
    assert len(rows) > 15
    for row in rows:
        names = re.findall(r"`([\w./]+)`", row)
        code = "".join((ROOT / name).read_text(encoding="utf-8") for name in names if "/" in name)
        assert all(re.search(rf"(def|class) {name}\b", code) for name in names if "/" not in name), row
