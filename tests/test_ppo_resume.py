"""Pitfall 11: a run that was stopped goes on as if it had not been, inside a rollout too."""

import logging

import pytest
import torch
from datasets import Dataset
from ppo_helpers import assert_equal, config, logged, lora
from transformers import TrainerCallback

from instructgpt_trl import PPOTrainer
from instructgpt_trl.data import InputError


@pytest.fixture
def rows() -> Dataset:
    """Two rollouts of 4 an epoch."""
    return Dataset.from_list([{"prompt": f"prompt {i}{'.' * i}"} for i in range(10)])


def trainer_of(folders, policy, reward, args, rows, texts=None, eval_rows=None) -> PPOTrainer:
    model, peft_config = folders.policy(policy)
    return PPOTrainer(
        model=model,
        reward_model=folders.reward(reward),
        args=args,
        train_dataset=rows,
        eval_dataset=eval_rows,
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


SET_UPS = [("sft", "adapter", 1), ("fresh", "full", 1), ("full", "full", 1), ("sft", "adapter", 2)]


@pytest.mark.parametrize("policy, reward, iterations", SET_UPS)
def test_pitfall_11_resume_is_exact(folders, tmp_path, rows, texts, policy, reward, iterations):
    """
    Four rollouts at once, and the same from checkpoints at the end of a rollout and inside one: inside the first epoch
    of the data, at its end and, with one inner epoch, inside the second; with other generators' states between.
    """
    settings = dict(
        max_steps=8 * iterations,
        num_iterations=iterations,
        learning_rate=0.01,
        value_learning_rate=0.01,
        warmup_updates=3,
        ptx_ratio=1,
        kl_target=0.05,
        kl_horizon=20,
        save_strategy="steps",
        save_steps=1,
    )
    straight = trainer_of(folders, policy, reward, config(tmp_path / "straight", **settings), rows, texts)
    straight.train()
    metrics = ("objective/scores", "objective/kl", "loss", "loss/ptx", "objective/kl_coef", "learning_rate")
    for step in (2, 3, 4, 5, 6) if policy == "sft" else (5,):
        torch.manual_seed(123 + step)
        resumed = trainer_of(folders, policy, reward, config(tmp_path / "resumed", **settings), rows, texts)
        resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{step}"))
        assert resumed.state.global_step == 8 * iterations
        assert_equal(state(resumed), state(straight))
        for name in metrics:
            assert logged(resumed, name) == logged(straight, name), name


def test_resume_continues_the_file_of_completions(folders, tmp_path, rows):
    """And what a crashed run wrote behind its last checkpoint is not there twice."""
    settings = dict(max_steps=8, save_strategy="steps", save_steps=2, save_completions=True)
    settings |= dict(eval_strategy="steps", eval_steps=2)
    held_out = rows.select(range(4))
    straight = trainer_of(folders, "sft", "adapter", config(tmp_path / "straight", **settings), rows, None, held_out)
    straight.train()
    stopped = trainer_of(folders, "sft", "adapter", config(tmp_path / "stopped", **settings), rows, None, held_out)
    stopped.add_callback(StopAt(6))
    stopped.train()
    resumed = trainer_of(folders, "sft", "adapter", config(tmp_path / "stopped", **settings), rows, None, held_out)
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-4"))
    for file in ("completions.jsonl", "eval_completions.jsonl"):
        straight, stopped = ((tmp_path / name / file).read_text("utf-8") for name in ("straight", "stopped"))
        assert straight == stopped and straight.count("\n") > 8, file


@pytest.mark.parametrize("step, lost", [(2, False), (3, True), (3, False)])
def test_a_rollout_that_is_not_there_is_warned_of(folders, tmp_path, rows, caplog, step, lost):
    """As of an earlier version's checkpoint, which had none and knew no sums either."""
    settings = dict(max_steps=4, save_strategy="steps", save_steps=1)
    trainer_of(folders, "fresh", "full", config(tmp_path, **settings), rows).train()
    checkpoint = tmp_path / f"checkpoint-{step}"
    if lost:
        (checkpoint / "rollout.safetensors").unlink()
        (checkpoint / "checkpoint.json").unlink()
    logging.getLogger("transformers").propagate = True
    resumed = trainer_of(folders, "fresh", "full", config(tmp_path, **settings), rows)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert (f"step {step} is inside a rollout of 2 steps" in caplog.text) == lost


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


def test_resuming_an_adapter_of_another_shape_is_refused(folders, tmp_path, rows):
    """With the same reward model, so that the value model's file fits."""

    def trainer(target: str, steps: int) -> PPOTrainer:
        args = config(tmp_path, max_steps=steps, save_strategy="steps", save_steps=2)
        reward = folders.reward("adapter")
        shape = lora(target_modules=[target])
        return PPOTrainer(folders.base, reward_model=reward, args=args, train_dataset=rows, peft_config=shape)

    trainer("q_proj", 2).train()
    with pytest.raises(InputError, match="checkpoint-2: the adapter does not fit"):
        trainer("o_proj", 4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_training_again_starts_from_a_new_rollout(folders, tmp_path, rows):
    """`train()` twice on one trainer: the second run samples anew, from the seed of the config."""
    trainer = trainer_of(folders, "sft", "adapter", config(tmp_path, max_steps=2), rows)
    trainer.train()
    first = trainer._episodes
    trainer.train()
    assert trainer.state.global_step == 2 and trainer._episodes is not first
