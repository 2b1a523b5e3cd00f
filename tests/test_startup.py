"""Pitfall 7: what does not belong together is refused before the first step, with the difference."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from faults.stages import World
from ppo_helpers import config, lora, mean_id
from transformers import TrainerCallback

from instructgpt_trl import PPOTrainer, RewardConfig, RewardModel, RewardTrainer
from instructgpt_trl.data import InputError
from instructgpt_trl.models.reward_examples import EXAMPLES, RewardExamples, read_examples

DEMONSTRATIONS = Dataset.from_list([{"prompt": f"say {i}: ", "completion": f"{i} {i}"} for i in range(12)])


@pytest.fixture(scope="module", params=["lora", "full"])
def saved(request, base_dir, tmp_path_factory, rankings_of):
    """A reward model of each kind with its examples."""
    folder = tmp_path_factory.mktemp("reward")
    args = RewardConfig(str(folder), max_steps=2, report_to="none", learning_rate=0.01, save_strategy="no")
    peft_config = lora() if request.param == "lora" else None
    rows = dict(train_dataset=rankings_of, demonstration_dataset=DEMONSTRATIONS)
    trainer = RewardTrainer(base_dir, args, peft_config=peft_config, **rows)
    trainer.train()
    trainer.save_model()
    return folder


@pytest.fixture(scope="module")
def rankings_of() -> Dataset:
    return Dataset.from_list([{"prompt": f"{i}: ", "completions": ["a", "bb"], "ranks": [1, 2]} for i in range(8)])


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def reward(saved, tmp_path) -> Path:
    shutil.copytree(saved, tmp_path / "reward")
    return tmp_path / "reward"


def ppo(folders, reward, path, prompts, model=None, **settings) -> PPOTrainer:
    args = config(path, **settings)
    return PPOTrainer(
        model or folders.base, reward_model=str(reward), args=args, train_dataset=prompts, peft_config=lora()
    )


def test_examples_are_the_first_demonstrations_with_their_scores(reward):
    examples = read_examples(str(reward))
    assert len(examples.scores) == 10 and examples.exact
    rows = DEMONSTRATIONS[:10]
    expected = RewardModel.from_pretrained(str(reward)).score(rows["prompt"], rows["completion"])
    assert torch.allclose(torch.tensor(examples.scores), torch.tensor(expected), atol=1e-6)
    assert abs(sum(RewardModel.from_pretrained(str(reward)).score(*map(list, DEMONSTRATIONS[:].values())))) < 1e-4


def test_without_demonstrations_they_are_of_the_rankings(base_dir, tmp_path, rankings_of):
    args = RewardConfig(str(tmp_path), max_steps=1, report_to="none", save_strategy="no")
    trainer = RewardTrainer(base_dir, args, train_dataset=rankings_of)
    trainer.train()
    trainer.save_model()
    examples = read_examples(str(tmp_path))
    assert len(examples.scores) == 8 == len(set(map(tuple, examples.prompt_ids)))


def test_what_belongs_together_trains(folders, reward, tmp_path, prompts):
    trainer = ppo(folders, reward, tmp_path / "ppo", prompts)
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_lost_bias_is_refused(folders, reward, tmp_path, prompts):
    known = json.loads((reward / "reward_model.json").read_text())
    (reward / "reward_model.json").write_text(json.dumps({**known, "bias": known["bias"] + 0.01}))
    with pytest.raises(
        InputError, match="another score than when it was saved, example .* are base, weights and bias"
    ):
        ppo(folders, reward, tmp_path / "ppo", prompts).train()


def test_a_bias_that_was_set_later_is_none_that_was_lost(folders, reward, tmp_path, prompts):
    model = RewardModel.from_pretrained(str(reward))
    model.calibrate(["another"], ["demonstration"])
    model.save_pretrained(str(reward))
    assert read_examples(str(reward)) is None
    ppo(folders, reward, tmp_path / "ppo", prompts).train()


def test_another_base_is_refused(folders, saved, reward, tmp_path, prompts):
    from conftest import make_llama, make_tokenizer

    other = tmp_path / "base"
    make_llama(seed=5).save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    if not (reward / "adapter_config.json").is_file():
        pytest.skip("a full reward model has no base")
    known = json.loads((reward / "adapter_config.json").read_text())
    (reward / "adapter_config.json").write_text(json.dumps({**known, "base_model_name_or_path": str(other)}))
    with pytest.raises(InputError, match="gives .* of its 10 examples another score"):
        ppo(folders, reward, tmp_path / "ppo", prompts, model=str(other)).train()


def test_rounding_is_no_difference_and_a_lost_head_is():
    scores = [0.0, 1.0, 2.0, 3.0]
    examples = RewardExamples([[1]] * 4, [[2]] * 4, scores, exact=True)
    examples.check([score + 5e-4 for score in scores], True, "RM")
    examples.check([score + 0.5 for score in scores], False, "RM")  # bfloat16, 4 bits
    for change, exact in ((2e-3, True), (0.6, False), (float("nan"), False)):
        with pytest.raises(InputError, match="RM: the reward model gives"):
            examples.check([scores[0] + change, *scores[1:]], exact, "RM")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"scores": [1]}',
        "not json",
        '{"prompt_ids": [["a"]], "completion_ids": [[1]], "scores": [1], "exact": true}',
    ],
)
def test_broken_examples_are_refused(tmp_path, text):
    (tmp_path / EXAMPLES).write_text(text)
    with pytest.raises(InputError, match=f"{EXAMPLES}: cannot be read"):
        read_examples(str(tmp_path))
    assert read_examples(str(tmp_path / "nowhere")) is None


def test_a_policy_that_is_not_its_reference_is_refused(folders, tmp_path, prompts):
    args = config(tmp_path)
    trainer = PPOTrainer(folders.sft, reward_funcs=mean_id, args=args, train_dataset=prompts)
    with torch.no_grad():
        for name, parameter in trainer._policy_parameters.items():
            if "lora_B" in name:
                parameter += 0.5
    with pytest.raises(InputError, match="before the first step a completion's KL to the reference is .* and not 0"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_ratio_that_is_not_one_is_refused(folders, tmp_path, prompts):
    """A model with noise of its own, which nobody switched off."""
    args = config(tmp_path, gradient_checkpointing=False)
    trainer = PPOTrainer(folders.base, reward_funcs=mean_id, args=args, train_dataset=prompts, peft_config=lora())
    trainer.roles.policy.take_kept = lambda batch: None
    norm = trainer.model.get_base_model().model.norm
    norm.register_forward_hook(lambda module, args, out: out + 0.5 * torch.randn_like(out) * module.training)
    trainer.roles.reference = None
    trainer.beta = 0.0
    with pytest.raises(InputError, match="the log-prob of a token changed by .* nats between rollout and training"):
        trainer.train()


def test_a_second_training_goes_on_from_other_weights(folders, tmp_path, prompts):
    trainer = PPOTrainer(
        folders.sft, reward_funcs=mean_id, args=config(tmp_path, learning_rate=0.05), train_dataset=prompts
    )
    trainer.train()
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_best_metric_is_one_that_an_evaluation_logs(world, tmp_path, stage):
    """Which transformers finds out at the first evaluation."""
    settings = dict(load_best_model_at_end=False, metric_for_best_model="nosuch")
    trainer = world.trainer(stage, "lora", tmp_path / "run", **settings)
    if stage == "sft":
        trainer.reward_model, trainer._score_prompts = Longest(), [("a", [1, 2])]
    before = {name.removeprefix("eval_") for name in trainer.evaluate()}
    may = {*trainer._metrics_of_evaluation()} - {"aux_loss"} | {"epoch", "model_preparation_time"}  # MoE's; Trainer's
    may |= {"rm_score"} if stage == "sft" else set()
    assert before == may
    with pytest.raises(InputError, match="metric_for_best_model='nosuch': no evaluation of this run logs it"):
        trainer.train()
    assert not (tmp_path / "run" / "checkpoint-1").exists()


class Longest:
    def score(self, prompts, completions):
        return [float(len(text)) for text in completions]


def test_metrics_of_the_users_own_may_be_the_best(world, tmp_path):
    def length(completions, log_metric, **_):
        log_metric("own", 1.0)
        return [float(len(text)) for text in completions]

    settings = dict(eval_steps=1, save_steps=1, metric_for_best_model="own", load_best_model_at_end=False, max_steps=1)
    trainer = world.trainer("ppo", "lora", tmp_path / "run", **settings)
    with pytest.raises(InputError, match="metric_for_best_model='own'"):
        trainer._check_best_metric()
    functions, trainer.reward_funcs = trainer.reward_funcs, [length]
    trainer._check_best_metric()
    trainer.reward_funcs = functions
    trainer.add_callback(Judge())
    trainer._check_best_metric()


class Judge(TrainerCallback):
    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_own"] = 1.0
