"""Evaluation, best checkpoint, callbacks, logs and seeds inside PPO."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_tokenizer
from datasets import Dataset
from peft import PeftModel
from ppo_helpers import (
    EOS,
    assert_equal,
    chunks,
    config,
    logged,
    mean_id,
    plain_logprobs,
    plain_policy,
    store_completions,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, TrainerCallback

from instructgpt_trl import PPOTrainer
from instructgpt_trl.data.episodes import pad_episodes


@pytest.fixture
def heldout() -> Dataset:
    return Dataset.from_list([{"prompt": f"held out {i}{'?' * i}"} for i in range(7)])


def trainer_of(folders, policy, args, rows, heldout=None, function=mean_id, **kwargs) -> PPOTrainer:
    model, peft_config = folders.policy(policy)
    return PPOTrainer(
        model=model,
        reward_funcs=function,
        args=args,
        train_dataset=rows,
        eval_dataset=heldout,
        peft_config=peft_config,
        **kwargs,
    )


def weights(trainer) -> dict[str, torch.Tensor]:
    """All trained parameters of policy and value model, and the average."""
    own = {f"policy.{k}": p.detach().clone() for k, p in trainer._policy_parameters.items()}
    own |= {f"value.{k}": p.detach().clone() for k, p in trainer._value_parameters.items()}
    return own | {f"ema.{k}": p.clone() for k, p in trainer.ema.averages.items()}


def test_pitfall_17_19_evaluation_means_are_over_completions(folders, tmp_path, monkeypatch, prompts, heldout):
    """7 held-out prompts in batches of 3, the last one of 1: means over the 7, by plain passes."""
    batches = store_completions(monkeypatch)
    args = config(
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        max_steps=4,
        per_device_eval_batch_size=3,
        learning_rate=0.05,
        beta=0.3,
    )
    trainer = trainer_of(folders, "sft", args, prompts, heldout)
    trainer.train()
    evaluated = [[len(batch) for batch in batches[i : i + 4]] for i in (0, 1, 5)]
    assert evaluated[0][0] == 4 and evaluated[1] == [3, 3, 1, 4] and [len(b) for b in batches[5:8]] == [3, 3, 1]
    tokenizer = make_tokenizer()
    last = [episode for batch in batches[5:8] for episode in batch]
    assert sorted(prompt for prompt, _ in last) == sorted(tokenizer(row["prompt"])["input_ids"] for row in heldout)

    policy, sft = plain_policy(folders, "sft"), plain_policy(folders, "sft")
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if name in trainer._policy_parameters:
                parameter.copy_(trainer._policy_parameters[name])
        kl = [(plain_logprobs(policy, *e) - plain_logprobs(sft, *e)).sum().item() for e in last]
    scores = [mean_id([completion])[0] for _, completion in last]
    expected = {
        "eval_objective/scores": np.mean(scores),
        "eval_objective/kl": np.mean(kl),
        "eval_objective/rlhf_reward": np.mean(scores) - 0.3 * np.mean(kl),
        "eval_completions/mean_length": np.mean([len(completion) for _, completion in last]),
        "eval_completions/eos_rate": np.mean([completion[-1] == EOS for _, completion in last]),
        "eval_rewards/mean_id/mean": np.mean(scores),
        "eval_objective/scores_std": np.std(scores),
    }
    assert all(len(logged(trainer, name)) == 2 for name in expected)
    for name, number in expected.items():
        assert logged(trainer, name)[-1] == pytest.approx(number, rel=1e-4, abs=1e-6), name
    assert abs(np.mean(kl)) > 1e-3


@pytest.mark.parametrize("size", [1, 3])
def test_pitfall_19_explained_variance_of_an_evaluation_is_over_all_tokens(
    folders, tmp_path, monkeypatch, prompts, heldout, size
):
    """Not a mean over batches, of which those of one completion may have hardly any variance."""
    store_completions(monkeypatch)
    trainer = trainer_of(folders, "sft", config(tmp_path, per_device_eval_batch_size=size), prompts, heldout)
    rollout, rollouts = trainer.rollout, []

    def kept(inputs):
        rollouts.append(rollout(inputs))
        return rollouts[-1]

    monkeypatch.setattr(trainer, "rollout", kept)
    with torch.no_grad():
        trainer.roles.value.head.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    metrics = trainer.evaluate()
    returns, values = (
        np.concatenate([r[name][r["mask"]].numpy() for r in rollouts]) for name in ("returns", "values")
    )
    assert len(rollouts) == -(-7 // size)
    assert metrics["eval_value/explained_variance"] == pytest.approx(
        1 - np.var(returns - values) / np.var(returns), rel=1e-5
    )


def test_evaluation_on_several_sets_and_with_several_completions(folders, tmp_path, monkeypatch, prompts, heldout):
    """Each set under its own name, where TRL writes all under one; two completions of each of its prompts."""
    batches = store_completions(monkeypatch)
    args = config(tmp_path, num_generations_eval=2, per_device_eval_batch_size=4, save_completions=True)
    trainer = trainer_of(folders, "sft", args, prompts, {"a": heldout, "b": heldout.select(range(2))})
    metrics = trainer.evaluate()
    assert [len(batch) for batch in batches] == [4, 4, 4, 2, 4]
    for name, part in (("a", batches[:4]), ("b", batches[4:])):
        scores = [mean_id([completion])[0] for batch in part for _, completion in batch]
        assert metrics[f"eval_{name}_objective/scores"] == pytest.approx(np.mean(scores), rel=1e-5)
        assert logged(trainer, f"eval_{name}_objective/scores") == [metrics[f"eval_{name}_objective/scores"]]
    assert "eval_objective/scores" not in metrics
    assert [row["dataset"] for row in read_jsonl(tmp_path, "eval_completions.jsonl")] == ["a"] * 14 + ["b"] * 4
    assert trainer.evaluate(heldout.select(range(2)))["eval_objective/scores"] == metrics["eval_b_objective/scores"]


@pytest.mark.parametrize("policy", ["sft", "full"])
def test_pitfall_17_evaluation_does_not_disturb_training(folders, tmp_path, prompts, heldout, policy):
    """Same weights, bit for bit, with and without evaluations between and inside rollouts; by real sampling."""
    results, settings = [], dict(max_steps=6, learning_rate=0.01, value_learning_rate=0.01)
    for evaluation in ({}, {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}):
        trainer = trainer_of(folders, policy, config(tmp_path, **settings, **evaluation), prompts, heldout)
        trainer.train()
        results.append((weights(trainer), logged(trainer, "objective/scores"), logged(trainer, "loss")))
        assert len(logged(trainer, "eval_objective/scores")) == (7 if evaluation else 0)
    assert_equal(results[0][0], results[1][0])
    assert results[0][1:] == results[1][1:]


def test_evaluation_samples_the_same_each_time_and_restores_the_callers_generators(
    folders, tmp_path, prompts, heldout
):
    trainer = trainer_of(folders, "sft", config(tmp_path), prompts, heldout)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = trainer.evaluate()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    second = trainer.evaluate()
    for name in ("eval_objective/scores", "eval_objective/entropy", "eval_completions/mean_length"):
        assert first[name] == second[name]


def by_step(values: dict[int, float]):
    """A reward that depends on the optimizer step alone."""

    def reward(completions, trainer_state, **kwargs):
        return [values.get(trainer_state.global_step, 0.0)] * len(completions)

    return reward


@pytest.mark.parametrize("policy", ["sft", "fresh", "full"])
def test_pitfall_17_the_best_checkpoint_comes_back(folders, tmp_path, monkeypatch, prompts, heldout, policy):
    """By evaluation score, step 4 of 6: policy, average and value model of that checkpoint; the reference as ever."""
    store_completions(monkeypatch)
    args = config(
        tmp_path,
        max_steps=6,
        learning_rate=0.02,
        value_learning_rate=0.02,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_objective/scores",
        greater_is_better=True,
    )
    trainer = trainer_of(folders, policy, args, prompts, heldout, by_step({2: 1.0, 4: 5.0, 6: 2.0}))
    flags = [p.requires_grad for role in trainer.roles for p in role.network.parameters()]
    episodes = pad_episodes([[5, 6], [7]], [[8, 9, EOS], [10]], 256)
    reference = trainer.roles.reference.evaluate(trainer.roles.reference.logprobs, episodes, chunks(episodes, 2))[0]
    noted = {}

    class Note(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            noted[state.global_step] = weights(trainer)

    trainer.add_callback(Note())
    trainer.train()
    assert logged(trainer, "eval_objective/scores") == [1.0, 5.0, 2.0]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4") and trainer.state.best_metric == 5.0
    assert_equal(weights(trainer), noted[4])
    assert any(not torch.equal(noted[6][name], noted[4][name]) for name in noted[4])
    after = trainer.roles.reference.evaluate(trainer.roles.reference.logprobs, episodes, chunks(episodes, 2))[0]
    assert torch.equal(after, reference)
    assert flags == [p.requires_grad for role in trainer.roles for p in role.network.parameters()]
    trainer.save_model(str(tmp_path / "best"))
    name = "model.safetensors" if policy == "full" else "adapter_model.safetensors"
    for folder in ("", "ema"):
        saved = [load_file(tmp_path / root / folder / name) for root in ("best", "checkpoint-4")]
        assert_equal(*saved)


def test_pitfall_17_early_stopping_stops(folders, tmp_path, monkeypatch, prompts, heldout):
    store_completions(monkeypatch)
    args = config(
        tmp_path,
        max_steps=20,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="objective/scores",
        greater_is_better=True,
    )
    reward = by_step({2: 1.0, 4: 5.0, 6: 2.0, 8: 3.0, 10: 9.0})
    stop = EarlyStoppingCallback(early_stopping_patience=2)
    trainer = trainer_of(folders, "sft", args, prompts, heldout, reward, callbacks=[stop])
    trainer.train()
    assert trainer.state.global_step == 8
    assert logged(trainer, "eval_objective/scores") == [1.0, 5.0, 2.0, 3.0]


# Logs


def read_jsonl(path, name: str = "completions.jsonl") -> list[dict]:
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    lines = Path(path, name).read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_pitfall_19_every_completion_is_written_without_a_tracker(folders, tmp_path, monkeypatch, prompts, heldout):
    """Text, score, each function's score, KL and step of every episode; those of evaluations in their own file."""
    batches = store_completions(monkeypatch)

    def first_only(completions, **kwargs):
        return [1.0] + [None] * (len(completions) - 1)

    def none(completions, **kwargs):
        return ([2.0, None, None, 0.5] + [None] * len(completions))[: len(completions)]

    args = config(
        tmp_path,
        max_steps=4,
        save_completions=True,
        learning_rate=0.02,
        eval_strategy="steps",
        eval_steps=2,
        shuffle_dataset=False,
        max_completion_length=8,
    )
    rows_ = Dataset.from_list([{"prompt": f"na\u00efve {i}"} for i in range(8)])
    trainer = trainer_of(folders, "sft", args, rows_, heldout, [first_only, none])
    trainer.train()
    rows = read_jsonl(tmp_path)
    assert [row["step"] for row in rows] == [0] * 4 + [2] * 4
    assert [row["prompt"] for row in rows] == [f"na\u00efve {i}" for i in range(8)]
    tokenizer, episodes = make_tokenizer(), [*batches[0], *batches[2]]
    completions = [tokenizer.decode(completion, skip_special_tokens=True) for _, completion in episodes]
    assert [row["completion"] for row in rows] == completions
    assert [row["score"] for row in rows] == [3.0, None, None, 0.5] * 2
    assert [row["scores"] for row in rows[:2]] == [
        {"first_only": 1.0, "none": 2.0},
        {"first_only": None, "none": None},
    ]
    assert rows[0]["kl"] == 0.0 and rows[1]["kl"] is None and abs(rows[4]["kl"]) > 1e-4
    evaluated = read_jsonl(tmp_path, "eval_completions.jsonl")
    assert [row["step"] for row in evaluated] == [2] * len(heldout) + [4] * len(heldout)
    names = [row["prompt"] for row in evaluated]
    assert names[: len(heldout)] == names[len(heldout) :] and sorted(names) == sorted([*heldout["prompt"]] * 2)
    assert all(list(row) == list(rows[0]) for row in evaluated)
    # A new run in the same folder starts new files, but what it evaluates before training stays
    again = trainer_of(folders, "sft", config(tmp_path, max_steps=2, save_completions=True), rows_, heldout)
    again.evaluate()
    again.train()
    assert [row["step"] for row in read_jsonl(tmp_path, "eval_completions.jsonl")] == [0] * len(heldout)
    trainer_of(folders, "sft", config(tmp_path, max_steps=2, save_completions=True), rows_).train()
    assert len(read_jsonl(tmp_path)) == 4
    assert not read_jsonl(tmp_path, "eval_completions.jsonl")


def test_pitfall_19_a_log_line_belongs_to_a_step_and_rollouts_to_their_first(folders, tmp_path, monkeypatch, prompts):
    store_completions(monkeypatch)
    fine = trainer_of(folders, "sft", config(tmp_path, max_steps=8, learning_rate=0.01), prompts)
    fine.train()
    lines = fine.state.log_history[:8]
    assert ["objective/kl" in line for line in lines] == [True, False] * 4
    assert all({"loss/policy", "policy/approxkl", "grad_norm/value", "step_time"} <= line.keys() for line in lines)
    coarse = trainer_of(folders, "sft", config(tmp_path, max_steps=8, learning_rate=0.01, logging_steps=4), prompts)
    coarse.train()
    for name in ("objective/kl", "objective/scores", "loss/policy", "policy/approxkl", "loss", "loss/value"):
        numbers = logged(fine, name)
        halves = [np.mean(numbers[: len(numbers) // 2]), np.mean(numbers[len(numbers) // 2 :])]
        assert logged(coarse, name) == pytest.approx(halves, rel=1e-5), name


def test_completions_are_printed_if_asked_for(folders, tmp_path, monkeypatch, prompts, capsys):
    pytest.importorskip("rich")
    store_completions(monkeypatch)
    trainer_of(folders, "sft", config(tmp_path, log_completions=True), prompts).train()
    assert "prompt" in capsys.readouterr().out


# Seeds


@pytest.mark.parametrize("policy", ["fresh", "full"])
def test_pitfall_20_two_runs_of_one_seed_are_identical(folders, tmp_path, prompts, texts, policy):
    """Whatever ran before; and another seed is another run."""
    results = []
    for seed, before in ((0, 1), (0, 2), (1, 1)):
        random.seed(before)
        np.random.seed(before)
        torch.manual_seed(before)
        args = config(tmp_path, max_steps=4, learning_rate=0.01, ptx_ratio=1, seed=seed)
        trainer = trainer_of(folders, policy, args, prompts, ptx_dataset=texts)
        torch.rand(before)  # between constructor and training too
        trainer.train()
        results.append(weights(trainer))
    assert_equal(results[0], results[1])
    assert any(not torch.equal(results[0][name], results[2][name]) for name in results[0])


def test_pitfall_20_the_constructor_restores_the_callers_generators(folders, tmp_path, prompts):
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    expected = (random.random(), np.random.rand(), torch.rand(1).item())
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    trainer_of(folders, "fresh", config(tmp_path), prompts)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


# Saved


@pytest.mark.parametrize("policy", ["fresh", "sft", "full"])
def test_the_saved_policy_and_its_average_load_with_other_software(folders, tmp_path, monkeypatch, prompts, policy):
    """Log-probs of the trained policy from its folder; `ema/` by its formula; only the policy is at the root."""
    store_completions(monkeypatch)
    args = config(tmp_path, max_steps=3, learning_rate=0.02, ema_decay=0.7)
    trainer = trainer_of(folders, policy, args, prompts)
    average = {name: p.detach().clone().double() for name, p in trainer._policy_parameters.items()}

    class Average(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            for name, parameter in trainer._policy_parameters.items():
                average[name] = 0.7 * average[name] + 0.3 * parameter.detach().double()

    trainer.add_callback(Average())
    trainer.train()
    out = tmp_path / "saved"
    trainer.save_model(str(out))
    trained = {name: p.detach().clone() for name, p in trainer._policy_parameters.items()}

    def load(folder):
        if policy == "full":
            return AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders.base), str(folder))

    episodes = pad_episodes([[5, 6], [7]], [[8, 9, EOS], [10]], 256)
    logprobs = trainer.roles.policy.evaluate(trainer.roles.policy.logprobs, episodes, chunks(episodes, 2))[0]
    with torch.no_grad():
        for row, (prompt, completion) in enumerate((([5, 6], [8, 9, EOS]), ([7], [10]))):
            expected = plain_logprobs(load(out), prompt, completion)
            torch.testing.assert_close(logprobs[row, : len(completion)], expected, rtol=1e-5, atol=1e-6)
    for folder, expected in ((out, trained), (out / "ema", average)):
        saved = dict(load(folder).named_parameters())
        for name, tensor in expected.items():
            torch.testing.assert_close(saved[name].double(), tensor.double(), rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(average[name].float(), trained[name]) for name in trained)
    names = {path.name for path in out.iterdir()}
    weights_ = {"model.safetensors"} if policy == "full" else {"adapter_model.safetensors", "adapter_config.json"}
    assert {"ema", "value_model.safetensors", "ppo_state.json", "tokenizer_config.json"} | weights_ <= names
    assert not names & {"ref", "value", "reward", "default"}
    assert "tokenizer_config.json" in {path.name for path in (out / "ema").iterdir()}


def test_the_policy_of_a_run_starts_another(folders, tmp_path, monkeypatch, prompts):
    """What one run saved is the SFT model of the next: KL 0 again, to the new reference."""
    store_completions(monkeypatch)
    trainer = trainer_of(folders, "fresh", config(tmp_path, learning_rate=0.02), prompts)
    trainer.train()
    trainer.save_model(str(tmp_path / "first"))
    second = PPOTrainer(
        model=str(tmp_path / "first"),
        reward_model=folders.reward("adapter"),
        args=config(tmp_path / "second", max_steps=2),
        train_dataset=prompts,
    )
    second.train()
    assert logged(second, "objective/kl") == [0.0]
    episodes = pad_episodes([[5, 6]], [[8, 9, EOS]], 256)
    scores = [
        t.roles.policy.evaluate(t.roles.policy.logprobs, episodes, chunks(episodes, 1))[0] for t in (trainer, second)
    ]
    assert not torch.equal(*scores)


def test_no_average_if_it_is_off(folders, tmp_path, monkeypatch, prompts):
    store_completions(monkeypatch)
    trainer = trainer_of(folders, "sft", config(tmp_path, ema_decay=0.0), prompts)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert trainer.ema is None and not (tmp_path / "saved" / "ema").exists()
