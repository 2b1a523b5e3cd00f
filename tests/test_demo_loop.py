"""recipes/demo/loop.py without its trainings: settings that the recipes take, labelers, the picture."""

from types import SimpleNamespace

import collect
import common
import loop
import ppo_ptx
import pytest
import reward
from labelers import make_labelers
from run import QUICK
from run import common as common_arguments
from trl import ModelConfig
from world import make_world

from instructgpt_trl import PPOConfig, RewardConfig


@pytest.fixture(scope="module")
def demo():
    world = make_world(0)
    return SimpleNamespace(seed=0, settings=QUICK, world=world, labelers=make_labelers("train", seed=0))


def test_the_recipes_take_the_demos_settings(demo, tmp_path):
    files = loop.settings_of(demo, tmp_path)
    rows = ["--dataset", "D.jsonl"]
    args, _ = common.parse_arguments(
        ["--config", str(files["collect_config"]), "--policies", "P", *rows, "--output", "T.jsonl"],
        (collect.Arguments, ModelConfig),
    )
    assert (args.completions, args.max_new_tokens) == (loop.COMPLETIONS, loop.MAX_COMPLETION)
    args, config, _ = common.parse_arguments(
        ["--config", str(files["reward_config"]), *rows, "--output_dir", "O"],
        (reward.Arguments, RewardConfig, ModelConfig),
    )
    assert config.learning_rate == 5e-4 and args.demonstrations == str(tmp_path / "demonstrations.jsonl")
    args, config, _ = common.parse_arguments(
        ["--config", str(files["ppo_config"]), *rows, "--output_dir", "O", "--reward_model", "R"],
        (ppo_ptx.Arguments, PPOConfig, ModelConfig),
    )
    ours = loop.ppo_config(1e-4, **common_arguments("O", 0), max_steps=QUICK.ppo_steps)
    names = ("learning_rate", "value_learning_rate", "beta", "ptx_coef", "steps_per_generation", "max_steps", "seed")
    assert [getattr(config, name) for name in names] == [getattr(ours, name) for name in names]
    assert args.ptx_dataset == str(tmp_path / "web.jsonl")


def test_one_labeler_ranks_a_prompt_whenever_asked(demo):
    rank = loop.labeler_of(demo)
    prompts = list(demo.world.tasks)[:30]
    said = ["hello there, friend.", "no!", "the fox sleeps in the garden.", ""]
    found = [rank({"prompt": prompt, "completions": said}) for prompt in prompts]
    assert found == [rank({"prompt": prompt, "completions": said}) for prompt in prompts]
    assert all(len(ranks) == 4 and min(ranks) == 1 for ranks in found) and len(set(map(tuple, found))) > 1
    backwards = rank({"prompt": prompts[0], "completions": said[::-1]})
    assert backwards == found[0][::-1]


def test_the_picture(tmp_path):
    figures = {"win_rate_vs_sft": [0.7, 0.6, 0.8], "win_rate_vs_one_round": [0.5, 0.4, 0.6]}
    loop.draw({"one round": figures, "two rounds": figures}, 400, tmp_path / "loop.png")
    assert (tmp_path / "loop.png").read_bytes()[:4] == b"\x89PNG"
