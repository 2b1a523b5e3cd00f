"""What a completion is worth to `PPOTrainer`: reward models, functions, and what is done to their scores."""

import json
from pathlib import Path

import pytest
import torch
from conftest import make_llama, make_tokenizer
from datasets import Dataset
from ppo_helpers import (
    EOS,
    assert_equal,
    config,
    known,
    logged,
    lora,
    mean_id,
    plain_logprobs,
    plain_policy,
    save_reward_model,
    scores_of,
    store_completions,
    trainer_of,
    with_function,
)

from instructgpt_trl import PPOTrainer, RewardConfig, RewardModel, RewardTrainer
from instructgpt_trl.data import InputError

CHAT = [{"prompt": [{"role": "user", "content": f"question {i}{'!' * i}"}]} for i in range(8)]


@pytest.mark.parametrize("kind", ["adapter", "full"])
@pytest.mark.parametrize("rows", ["text", "chat"])
def test_pitfall_06_the_reward_model_sees_the_ids_of_its_training(folders, tmp_path, monkeypatch, prompts, rows, kind):
    """
    Scores of a rollout are those of the reward model for the same texts, which end at EOS (this template puts a
    newline behind it), and of plain transformers for the same ids.
    """
    text = {"chat": [[{"role": "assistant", "content": f"answer {i}"}] for i in range(4)]}
    text["text"] = [row[0]["content"] for row in text["chat"]]
    tokenizer = make_tokenizer()
    ids = iter([[*tokenizer(answer)["input_ids"], EOS] for answer in text["text"]])
    batches = store_completions(monkeypatch, lambda _: next(ids))
    rows_ = prompts if rows == "text" else Dataset.from_list(CHAT)
    args = config(tmp_path, max_steps=1, save_completions=True, shuffle_dataset=False)
    trainer = trainer_of(folders, "sft", kind, args, rows_)
    trainer.train()
    path, plain = folders.reward(kind), folders.plain_reward(kind)
    written = [json.loads(line) for line in Path(tmp_path, "completions.jsonl").read_text("utf-8").strip().split("\n")]
    scores = [row["score"] for row in written]
    assert scores == pytest.approx([plain(*episode) for episode in batches[0]], rel=1e-5, abs=1e-6)
    prompts_ = [rows_[i]["prompt"] for i in range(4)]
    assert [row["prompt"] for row in written] == prompts_
    assert [row["completion"] for row in written] == text[rows]
    expected = RewardModel.from_pretrained(path).score(prompts_, text[rows])
    assert scores == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_pitfall_06_ids_are_not_encoded_again(folders, tmp_path, monkeypatch, prompts):
    """Sampled ids that decode to a text whose ids are others: `a`, `b` and the token `ab`."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["ab"])
    base = str(tmp_path / "base")
    make_llama(vocab=259).save_pretrained(base)
    tokenizer.save_pretrained(base)
    reward = save_reward_model(base, str(tmp_path / "reward"), adapter=True, tokenizer=tokenizer)
    sampled = [*tokenizer("a")["input_ids"], *tokenizer("b")["input_ids"]]
    assert tokenizer(tokenizer.decode(sampled))["input_ids"] == [258] != sampled
    batches = store_completions(monkeypatch, lambda _: [*sampled, EOS])
    trainer = PPOTrainer(
        model=base, reward_model=reward, args=config(tmp_path / "out"), train_dataset=prompts, peft_config=lora()
    )
    trainer.train()
    ids = [list(column) for column in zip(*batches[0], strict=True)]
    expected = RewardModel.from_pretrained(reward).score_ids(*ids).mean().item()
    assert logged(trainer, "objective/scores")[0] == pytest.approx(expected, rel=1e-5)


def test_pitfall_07_a_reward_model_of_another_tokenizer_is_refused(folders, tmp_path, prompts):
    other = make_tokenizer(extra=("<end>",))
    other.chat_template = other.chat_template.replace("<assistant>", "<bot>")
    other.eos_token = "<end>"
    reward = save_reward_model(folders.base, str(tmp_path / "reward"), adapter=True, tokenizer=other)
    with pytest.raises(InputError) as error:
        PPOTrainer(model=folders.sft, reward_model=reward, args=config(tmp_path / "out"), train_dataset=prompts)
    message = str(error.value)
    assert "258 and 259 tokens" in message and "'<end>'" in message
    assert "eos_token_id 257 and 258" in message and "chat template" in message
    assert "\n" not in message and not (tmp_path / "out").exists()


@pytest.mark.parametrize("start", ["sft", "base"])
def test_what_reward_trainer_saved(folders, tmp_path, prompts, rankings, demonstrations, start):
    """The issue's calls, one after the other: one base for all, and the scores of `RewardModel`, bias included."""
    folder = str(tmp_path / "reward")
    args = RewardConfig(
        output_dir=folder,
        max_steps=2,
        learning_rate=0.01,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        per_device_train_batch_size=2,
        gradient_checkpointing=False,
    )
    model, peft_config = (folders.sft, None) if start == "sft" else (folders.base, lora())
    reward_trainer = RewardTrainer(
        model=model,
        args=args,
        train_dataset=rankings,
        demonstration_dataset=demonstrations,
        peft_config=peft_config,
    )
    reward_trainer.train()
    reward_trainer.save_model()
    trainer = PPOTrainer(
        model=folders.sft,
        reward_model=folder,
        args=config(tmp_path / "ppo", max_steps=2, save_completions=True, max_completion_length=12),
        train_dataset=prompts,
    )
    assert len({id(role.network) for role in trainer.roles}) == 1
    model = RewardModel.from_pretrained(folder)
    assert model.bias != 0.0 and trainer.roles.value.head.bias.item() == pytest.approx(model.bias)
    episodes, metrics = scores_of(trainer, prompts)
    rows = zip(episodes["input_ids"], episodes["prompt_lengths"], episodes["completion_lengths"], strict=True)
    ids = [(row[:p].tolist(), row[p : p + c].tolist()) for row, p, c in rows]
    expected = model.score_ids([p for p, _ in ids], [c for _, c in ids]).tolist()
    assert metrics["objective/scores"] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    trainer.train()
    assert logged(trainer, "objective/kl") == [0.0]


def test_reward_models_and_functions_are_summed_by_weight(folders, tmp_path, monkeypatch, prompts):
    """`reward_model` first, then `reward_funcs` as they stand; strings among these are reward models."""
    batches = store_completions(monkeypatch)

    async def later(completion_ids, **kwargs):
        return [float(len(ids)) for ids in completion_ids]

    rewards = dict(reward_model=folders.reward_full, reward_funcs=[mean_id, folders.reward_adapter, later])
    args = config(tmp_path, reward_weights=[1.0, 10.0, 0.5, -2.0])
    trainer = PPOTrainer(model=folders.sft, args=args, train_dataset=prompts, **rewards)
    assert len(trainer.roles.rewards) == 2
    assert trainer.reward_func_names == ["reward_model", "mean_id", "reward_model_1", "later"]
    metrics = scores_of(trainer, prompts)[1]
    full, adapter = folders.plain_reward("full"), folders.plain_reward("adapter")
    expected = []
    for prompt, completion in batches[0]:
        parts = (full(prompt, completion), adapter(prompt, completion), mean_id([completion])[0], len(completion))
        expected.append(sum(w * part for w, part in zip((1.0, 0.5, 10.0, -2.0), parts, strict=True)))
    assert metrics["objective/scores"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["path", "object", "network", "adapter object"])
def test_a_reward_model_may_be_a_folder_or_an_object(folders, tmp_path, monkeypatch, prompts, kind):
    batches = store_completions(monkeypatch)
    path = folders.reward_adapter if "adapter" in kind else folders.reward_full
    reward = {
        "path": lambda: path,
        "object": lambda: RewardModel.from_pretrained(path),
        "network": lambda: RewardModel.from_pretrained(path).model,
        "adapter object": lambda: RewardModel.from_pretrained(path),
    }[kind]()
    trainer = PPOTrainer(model=folders.sft, reward_model=reward, args=config(tmp_path), train_dataset=prompts)
    metrics = scores_of(trainer, prompts)[1]
    plain = folders.plain_reward("adapter" if "adapter" in kind else "full")
    bias = plain.bias if kind == "network" else 0.0  # a bare network knows of no bias
    expected = [plain(*episode) - bias for episode in batches[0]]
    assert metrics["objective/scores"] == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_a_row_without_any_score_carries_no_signal(folders, tmp_path, monkeypatch, prompts):
    """`None` from one function leaves that function out; `None` from all leaves the row out, of metrics too."""
    store_completions(monkeypatch)
    functions = [known([1.0, None, None, 4.0]), known([10.0, 20.0, None, None])]
    trainer = with_function(folders.base, tmp_path, prompts, functions)
    episodes, metrics = scores_of(trainer, prompts)
    assert episodes["mask"].any(1).tolist() == [True, True, False, True]
    assert (episodes["advantages"][2] == 0).all()
    scores = metrics["objective/scores"]
    assert [scores[i] for i in (0, 1, 3)] == [11.0, 20.0, 4.0] and not scores[2] == scores[2]
    mean, std = 35 / 3, ((11 - 35 / 3) ** 2 + (20 - 35 / 3) ** 2 + (4 - 35 / 3) ** 2) ** 0.5 / 3**0.5
    trainer.log(logs := {})
    assert logs["objective/scores"] == pytest.approx(mean) and logs["objective/scores_std"] == pytest.approx(std)
    assert logs["objective/rlhf_reward"] == pytest.approx(mean)


def test_the_whole_batch_without_scores_trains_nothing_but_ptx(folders, tmp_path, monkeypatch, prompts):
    store_completions(monkeypatch)
    trainer = with_function(folders.base, tmp_path, prompts, known([None] * 4), learning_rate=0.1)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert_equal({name: p.detach() for name, p in trainer.model.named_parameters()}, before)


def test_functions_get_what_trl_gives_them(folders, tmp_path, monkeypatch, prompts):
    """Columns of the rows, ids, the trainer's state, and the two logging helpers, whose numbers arrive in the log."""
    store_completions(monkeypatch)
    seen = {}

    def reward(prompts, completions, completion_ids, answer, trainer_state, log_metric, log_extra, **kwargs):
        seen.update(prompts=prompts, completions=completions, answer=answer, step=trainer_state.global_step)
        log_metric("own/metric", 0.25)
        log_extra("own_column", [len(ids) for ids in completion_ids])
        return [1.0] * len(prompts)

    rows = prompts.add_column("answer", [f"answer {i}" for i in range(16)])
    trainer = with_function(folders.base, tmp_path, rows, reward, max_steps=1, shuffle_dataset=False)
    trainer.train()
    assert seen["prompts"] == prompts["prompt"][:4] and seen["answer"] == [f"answer {i}" for i in range(4)]
    assert all(isinstance(completion, str) for completion in seen["completions"]) and seen["step"] == 0
    assert logged(trainer, "own/metric") == [0.25]
    assert len(trainer._logs["extra"]["own_column"]) == 4


def test_means_of_each_reward_are_logged_as_in_trl(folders, tmp_path, monkeypatch, prompts):
    store_completions(monkeypatch)

    def other(completions, **kwargs):
        return [5.0, 7.0, None, None]

    trainer = with_function(folders.base, tmp_path, prompts, [known([1.0, 2.0, 3.0, 4.0]), other], max_steps=1)
    trainer.train()
    assert logged(trainer, "rewards/reward/mean") == [2.5]
    assert logged(trainer, "rewards/other/mean") == [6.0]


def test_missing_eos_score_replaces_the_score(folders, tmp_path, monkeypatch, prompts):
    completions = iter([[5, EOS], [5, 256], [EOS], [EOS, 7]])  # a sampled pad token does not end a completion
    store_completions(monkeypatch, lambda _: next(completions))
    trainer = with_function(folders.base, tmp_path, prompts, known([4.0] * 4), missing_eos_score=-1.0)
    metrics = scores_of(trainer, prompts)[1]
    assert metrics["objective/scores"] == [4.0, -1.0, 4.0, -1.0]
    assert metrics["completions/eos_rate"] == [1.0, 0.0, 1.0, 0.0]


def test_truncated_completions_are_left_out_of_losses_not_of_attention(folders, tmp_path, monkeypatch, prompts):
    """Their scores are those of the whole completion; they teach nothing, and no metric counts them as 0."""
    completions = [[5, 8, EOS], [5, 6], [7, EOS], [9, 8, 7]]
    todo = iter(completions)
    batches = store_completions(monkeypatch, lambda _: next(todo))
    trainer = trainer_of(
        folders, "sft", "adapter", config(tmp_path, mask_truncated_completions=True, shuffle_dataset=False), prompts
    )
    with torch.no_grad():
        for parameter in trainer.roles.policy.parameters().values():
            parameter.mul_(1.5)  # away from the reference
    episodes, metrics = scores_of(trainer, prompts)
    plain = folders.plain_reward("adapter")
    assert metrics["objective/scores"] == pytest.approx([plain(*episode) for episode in batches[0]], rel=1e-5)
    assert episodes["mask"].sum(1).tolist() == [3, 0, 2, 0]
    trainer.log(logs := {})
    policy, sft = plain_policy(folders, "sft"), plain_policy(folders, "sft")
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.mul_(1.5)
        kl = [(plain_logprobs(policy, *batches[0][i]) - plain_logprobs(sft, *batches[0][i])).sum() for i in (0, 2)]
    assert logs["objective/kl"] == pytest.approx(torch.stack(kl).mean().item(), rel=1e-4)


def test_the_reward_leaves_out_what_counts_nothing_without_a_reference_too(folders, tmp_path, monkeypatch, prompts):
    completions = iter([[5, 8, EOS], [5, 6], [7, EOS], [9, 8, 7]])
    store_completions(monkeypatch, lambda _: next(completions))
    settings = dict(beta=0.0, mask_truncated_completions=True)
    trainer = with_function(folders.base, tmp_path, prompts, known([1.0, 20.0, 4.0, 30.0]), **settings)
    scores_of(trainer, prompts)
    trainer.log(logs := {})
    assert logs["objective/scores"] == 55 / 4 and logs["objective/rlhf_reward"] == 2.5
    assert "objective/kl" not in logs


def test_reward_clip_range(folders, tmp_path, monkeypatch, prompts):
    store_completions(monkeypatch)
    function = known([-5.0, 0.5, 2.0, 9.0])
    trainer = with_function(folders.base, tmp_path, prompts, function, reward_clip_range=(-1.0, 2.0))
    assert scores_of(trainer, prompts)[1]["objective/scores"] == [-1.0, 0.5, 2.0, 2.0]


def test_the_kl_coefficient_adapts_by_its_formula(folders, tmp_path, monkeypatch, prompts):
    """[L]: beta *= 1 + clip(kl / target - 1, -0.2, 0.2) * episodes / horizon, once a rollout, after it was used."""
    store_completions(monkeypatch)
    settings = dict(beta=0.5, kl_target=0.7, kl_horizon=20, max_steps=8, learning_rate=0.02, lam=1.0)
    trainer = with_function(folders.sft, tmp_path, prompts, **settings)
    trainer.train()
    kl, used = logged(trainer, "objective/kl"), logged(trainer, "objective/kl_coef")
    # It is the coefficient of the rewards: at gamma = lambda = 1 the first return is the score minus the whole penalty
    last = logged(trainer, "objective/scores")[-1] - used[-1] * kl[-1]
    assert trainer._episodes["returns"][:, 0].mean().item() == pytest.approx(last, rel=1e-4)
    assert abs((used[-1] - 0.5) * kl[-1]) > 1e-3 * abs(last)
    expected = [0.5]
    for number in kl:
        error = min(max(number / 0.7 - 1, -0.2), 0.2)
        expected.append(expected[-1] * (1 + error * 4 / 20))
    assert len(kl) == 4 and used == pytest.approx(expected[:4], rel=1e-9)
    assert trainer.kl_coef == pytest.approx(expected[4], rel=1e-9)
    assert expected[1] == pytest.approx(0.48)  # KL 0 at first: 0.5 * (1 - 0.2 * 4 / 20)
    evaluation = trainer.evaluate(prompts.select(range(2)))
    assert trainer.kl_coef == pytest.approx(expected[4], rel=1e-9)
    assert evaluation["eval_objective/kl_coef"] == trainer.kl_coef


def test_two_completions_a_prompt(folders, tmp_path, prompts):
    seen = []

    def reward(prompts, completions, **kwargs):
        seen.append(prompts)
        return [float(i) for i in range(len(prompts))]

    trainer = with_function(folders.base, tmp_path, prompts, reward, num_generations=2, max_steps=4)
    trainer.train()
    assert len(seen) == 2
    for batch in seen:
        assert batch[0] == batch[1] and batch[2] == batch[3] and batch[0] != batch[2]
