"""Pitfall 11: a run that was stopped at the end of a rollout goes on as if it had not been."""

import pytest
import torch
from datasets import Dataset
from ppo_helpers import Folders, assert_equal, config, logged, lora
from transformers import TrainerCallback

from instructgpt_trl.data import InputError
from instructgpt_trl.ppo_trainer import PPOTrainer


@pytest.fixture(scope="session")
def folders(base_dir, tmp_path_factory) -> Folders:
    return Folders(base_dir, tmp_path_factory.mktemp("resume"))


@pytest.fixture
def rows() -> Dataset:
    return Dataset.from_list([{"prompt": f"prompt {i}{'.' * i}"} for i in range(10)])  # 2 rollouts an epoch


def trainer_of(folders, policy, reward, args, rows, texts=None) -> PPOTrainer:
    model, peft_config = folders.policy(policy)
    return PPOTrainer(
        model=model,
        reward_model=folders.reward(reward),
        args=args,
        train_dataset=rows,
        ptx_dataset=texts,
        peft_config=peft_config,
    )


def state(trainer) -> dict[str, torch.Tensor]:
    """Weights of policy, value model and average, both optimizer moments, and the KL coefficient."""
    own = {f"policy.{k}": p.detach().clone() for k, p in trainer._policy_parameters.items()}
    own |= {f"value.{k}": p.detach().clone() for k, p in trainer._value_parameters.items()}
    own |= {f"ema.{k}": p.clone() for k, p in trainer.ema.averages.items()}
    moments = trainer.optimizer.state_dict()["state"]
    own |= {f"moment.{i}.{name}": tensor for i, group in moments.items() for name, tensor in group.items()}
    return own | {"kl_coef": torch.tensor(trainer.kl_coef)}


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize("at", [2, 4, 6])
@pytest.mark.parametrize(
    "policy, reward, iterations",
    [("sft", "adapter", 1), ("fresh", "full", 1), ("full", "full", 1), ("sft", "adapter", 2)],
)
def test_pitfall_11_resume_at_the_end_of_a_rollout_is_exact(
    folders, tmp_path, rows, texts, policy, reward, iterations, at
):
    """
    8 steps at once, and a run that stops after some of them, with another process's state of generators between; an
    epoch has 4 steps, so the stops are inside the first, at its end, and inside the second.
    """
    per_rollout = 2 * iterations
    if at % per_rollout:
        pytest.skip("inside a rollout")
    settings = dict(
        max_steps=8,
        num_iterations=iterations,
        learning_rate=0.01,
        value_learning_rate=0.01,
        warmup_updates=3,
        ptx_ratio=1,
        kl_target=0.05,
        kl_horizon=20,
        save_strategy="steps",
        save_steps=at,
        save_completions=False,
    )
    straight = trainer_of(folders, policy, reward, config(tmp_path / "straight", **settings), rows, texts)
    straight.train()
    stopped = trainer_of(folders, policy, reward, config(tmp_path / "stopped", **settings), rows, texts)
    stopped.add_callback(StopAt(at))
    stopped.train()
    assert stopped.state.global_step == at
    torch.manual_seed(123)
    torch.rand(7)
    resumed = trainer_of(folders, policy, reward, config(tmp_path / "stopped", **settings), rows, texts)
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / f"checkpoint-{at}"))
    assert resumed.state.global_step == 8
    assert_equal(state(resumed), state(straight))
    for name in ("objective/scores", "objective/kl", "loss", "loss/ptx", "objective/kl_coef", "learning_rate"):
        assert logged(resumed, name) == logged(straight, name), name


def test_resume_continues_the_file_of_completions(folders, tmp_path, rows):
    """And what a crashed run wrote behind its last checkpoint is not there twice."""
    settings = dict(max_steps=8, save_strategy="steps", save_steps=2, save_completions=True)
    straight = trainer_of(folders, "sft", "adapter", config(tmp_path / "straight", **settings), rows)
    straight.train()
    stopped = trainer_of(folders, "sft", "adapter", config(tmp_path / "stopped", **settings), rows)
    stopped.add_callback(StopAt(6))
    stopped.train()
    resumed = trainer_of(folders, "sft", "adapter", config(tmp_path / "stopped", **settings), rows)
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-4"))
    files = [(tmp_path / name / "completions.jsonl").read_text("utf-8") for name in ("straight", "stopped")]
    assert files[0] == files[1]


def test_resuming_another_set_up_is_refused(folders, tmp_path, rows):
    settings = dict(max_steps=2, save_strategy="steps", save_steps=2)
    trainer_of(folders, "fresh", "full", config(tmp_path, **settings), rows).train()
    other = PPOTrainer(
        model=folders.base,
        reward_model=folders.reward("adapter"),
        args=config(tmp_path, **{**settings, "max_steps": 4}),
        train_dataset=rows,
        peft_config=lora(),
    )
    with pytest.raises(InputError, match="value_model.safetensors"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_training_again_starts_from_a_new_rollout(folders, tmp_path, rows):
    """`train()` twice on one trainer: the second run samples anew, from the seed of the config."""
    trainer = trainer_of(folders, "sft", "adapter", config(tmp_path, max_steps=2), rows)
    trainer.train()
    first = trainer._episodes
    trainer.train()
    assert trainer.state.global_step == 2 and trainer._episodes is not first
