"""`PPOTrainer`: how its roles are set up, what it samples, how it scores, and what it refuses."""

import json
import logging
from pathlib import Path

import pytest
import torch
from conftest import make_gpt2, make_llama, make_tokenizer
from datasets import Dataset, IterableDataset
from peft import PeftModel, get_peft_model
from ppo_helpers import (
    EOS,
    Folders,
    assert_equal,
    config,
    logged,
    lora,
    mean_id,
    plain_logprobs,
    plain_policy,
    save_reward_model,
    store_completions,
)
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel

from instructgpt_trl.data import InputError
from instructgpt_trl.data.episodes import pad_episodes
from instructgpt_trl.models.reward_model import RewardModel
from instructgpt_trl.ppo_config import PPOConfig
from instructgpt_trl.ppo_trainer import PPOTrainer


@pytest.fixture(scope="session")
def folders(base_dir, tmp_path_factory) -> Folders:
    return Folders(base_dir, tmp_path_factory.mktemp("trainer"))


def trainer_of(folders, policy, reward, args, rows, **kwargs) -> PPOTrainer:
    model, peft_config = folders.policy(policy)
    path = folders.reward(reward)
    return PPOTrainer(model=model, reward_model=path, args=args, train_dataset=rows, peft_config=peft_config, **kwargs)


def with_function(model, path, rows, function=mean_id, peft_config=None, ptx_dataset=None, **settings) -> PPOTrainer:
    return PPOTrainer(
        model=model,
        reward_funcs=function,
        args=config(path, **settings),
        train_dataset=rows,
        peft_config=peft_config,
        ptx_dataset=ptx_dataset,
    )


def outputs(trainer) -> dict[str, torch.Tensor]:
    """What reference and reward models say about some fixed episodes."""
    episodes = pad_episodes([[5, 6], [7]], [[8, 9, EOS], [10]], 256)
    roles = {"ref": trainer.roles.reference} | {f"reward{i}": role for i, role in enumerate(trainer.roles.rewards)}
    methods = {name: role.logprobs if name == "ref" else role.scores for name, role in roles.items()}
    return {name: role.evaluate(methods[name], episodes, 2)[0] for name, role in roles.items()}


# Roles


@pytest.mark.parametrize(
    "policy, reward", [("sft", "adapter"), ("fresh", "adapter"), ("fresh", "full"), ("full", "full")]
)
def test_pitfall_01_reference_and_reward_model_never_change(folders, tmp_path, prompts, texts, policy, reward):
    """And everything else that is not trained, bit for bit; everything that is trained moves."""
    rates = dict(learning_rate=0.02, value_learning_rate=0.02)
    args = config(tmp_path, max_steps=6, ptx_ratio=1, **rates)
    trainer = trainer_of(folders, policy, reward, args, prompts, ptx_dataset=texts)
    trained = {id(p) for role in (trainer.roles.policy, trainer.roles.value) for p in role.parameters().values()}
    everything = {f"{i}.{n}": p for i, role in enumerate(trainer.roles) for n, p in role.network.named_parameters()}
    before = {name: p.detach().clone() for name, p in everything.items()}
    said = outputs(trainer)
    trainer.train()
    assert_equal(outputs(trainer), said)
    for name, parameter in everything.items():
        moved = not torch.equal(parameter, before[name])
        # A fresh adapter's B is 0, so that A has no gradient in the very first step, but has one later
        assert moved == (id(parameter) in trained), name


def test_pitfall_01_the_base_is_loaded_once(folders, tmp_path, monkeypatch, prompts):
    """From an SFT adapter's folder and a reward adapter's folder: one base from the disk, and one in memory."""
    loaded, from_pretrained = [], PreTrainedModel.from_pretrained.__func__

    def counted(cls, path, *args, **kwargs):
        loaded.append(str(path))
        return from_pretrained(cls, path, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(counted))
    trainer = trainer_of(folders, "sft", "adapter", config(tmp_path), prompts)
    assert loaded == [folders.base]
    networks = [p for role in trainer.roles for p in role.network.parameters()]
    stored = {p.untyped_storage().data_ptr(): p.numel() for p in networks}
    adapters = 2 * 2 * 2 * (16 + 16 + 16 + 8) + 2 * 3 * 2 * (16 + 16 + 16 + 8)  # ranks 2, 2, 3, 3
    assert sum(stored.values()) == sum(p.numel() for p in make_llama().parameters()) + adapters


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("policy", ["full", "fresh", "sft", "sft object", "changed object", "gpt2", "changed + lora"])
def test_pitfall_02_kl_is_0_at_step_0(folders, tmp_path, prompts, gpt2_dir, policy, temperature):
    """Exactly, on sampled completions; and the reference is the model that was passed, not what its folder holds."""
    model, peft_config = folders.policy(policy) if policy in ("full", "fresh", "sft") else (folders.base, None)
    if policy == "sft object":
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), folders.sft, is_trainable=True)
    if policy.startswith("changed"):
        model = AutoModelForCausalLM.from_pretrained(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        peft_config = lora() if "lora" in policy else None
    if policy == "gpt2":
        model = gpt2_dir
    settings = dict(temperature=temperature, max_steps=3, learning_rate=0.05)
    trainer = with_function(model, tmp_path, prompts, peft_config=peft_config, **settings)
    start = outputs(trainer)["ref"]
    trainer.train()
    first, second = logged(trainer, "objective/kl")
    assert first == 0.0 and abs(second) > 1e-3
    if policy.startswith("changed"):
        folder, passed = make_llama(), make_llama()
        with torch.no_grad():
            for parameter in passed.parameters():
                parameter.mul_(1.1)
            for plain, same in ((folder, False), (passed, True)):
                expected = plain_logprobs(plain, [5, 6], [8, 9, EOS], temperature)
                assert torch.allclose(start[0], expected, rtol=1e-5, atol=1e-6) == same


def test_beta_0_needs_no_reference(folders, tmp_path, monkeypatch, prompts):
    store_completions(monkeypatch)
    trainer = trainer_of(folders, "full", "full", config(tmp_path, beta=0.0), prompts)
    assert trainer.roles.reference is None
    trainer.train()
    assert logged(trainer, "objective/rlhf_reward") == logged(trainer, "objective/scores")
    assert logged(trainer, "objective/kl") in ([], [None])  # nothing was penalised, and nothing is known


# Scores

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


def known(values):
    """A reward function that gives these values, whatever the completions."""

    def reward(completions, **kwargs):
        return values

    return reward


def scores_of(trainer, rows, n: int = 4):
    trainer.model.train()
    episodes = trainer.rollout([rows[i] for i in range(n)])
    return episodes, trainer._metrics["train"]


def test_reward_models_and_functions_are_summed_by_weight(folders, tmp_path, monkeypatch, prompts):
    """Reward models first, whatever argument they came in; strings among `reward_funcs` are reward models."""
    batches = store_completions(monkeypatch)

    async def later(completion_ids, **kwargs):
        return [float(len(ids)) for ids in completion_ids]

    rewards = dict(reward_model=folders.reward_full, reward_funcs=[mean_id, folders.reward_adapter, later])
    args = config(tmp_path, reward_weights=[1.0, 0.5, 10.0, -2.0])
    trainer = PPOTrainer(model=folders.sft, args=args, train_dataset=prompts, **rewards)
    assert len(trainer.roles.rewards) == 2
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
    completions = iter([[5, EOS], [5, 6], [EOS], [EOS, 7]])
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


def test_reward_clip_range(folders, tmp_path, monkeypatch, prompts):
    store_completions(monkeypatch)
    function = known([-5.0, 0.5, 2.0, 9.0])
    trainer = with_function(folders.base, tmp_path, prompts, function, reward_clip_range=(-1.0, 2.0))
    assert scores_of(trainer, prompts)[1]["objective/scores"] == [-1.0, 0.5, 2.0, 2.0]


def test_the_kl_coefficient_adapts_by_its_formula(folders, tmp_path, monkeypatch, prompts):
    """[L]: beta *= 1 + clip(kl / target - 1, -0.2, 0.2) * episodes / horizon, once a rollout, after it was used."""
    store_completions(monkeypatch)
    settings = dict(beta=0.5, kl_target=0.7, kl_horizon=20, max_steps=8, learning_rate=0.02)
    trainer = with_function(folders.sft, tmp_path, prompts, **settings)
    trainer.train()
    kl, used = logged(trainer, "objective/kl"), logged(trainer, "objective/kl_coef")
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


# Sampling

CUT = {
    "min_new_tokens": 5,
    "min_length": 20,
    "top_k": 20,
    "top_p": 0.5,
    "min_p": 0.2,
    "typical_p": 0.5,
    "epsilon_cutoff": 0.01,
    "eta_cutoff": 0.01,
    "temperature": 0.3,
    "repetition_penalty": 1.5,
    "no_repeat_ngram_size": 2,
    "suppress_tokens": [5, 6],
    "begin_suppress_tokens": [EOS],
    "bad_words_ids": [[5]],
    "sequence_bias": [[[5], -5.0]],
    "exponential_decay_length_penalty": (2, 1.5),
    "forced_eos_token_id": EOS,
    "guidance_scale": 1.5,
    "remove_invalid_values": True,
    "renormalize_logits": True,
}


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_pitfall_18_the_models_own_generation_config_does_not_cut_sampling(
    folders, tmp_path, monkeypatch, prompts, kind
):
    """`generate` fills what a config leaves open from the model's own generation_config; not here."""
    used = []
    processors = GenerationMixin._get_logits_processor

    def noted(self, *args, **kwargs):
        used.append(processors(self, *args, **kwargs))
        return used[-1]

    monkeypatch.setattr(GenerationMixin, "_get_logits_processor", noted)
    model = AutoModelForCausalLM.from_pretrained(folders.base)
    for name, value in CUT.items():
        setattr(model.generation_config, name, value)
    own = model.generation_config.to_dict()
    peft_config = lora() if kind == "lora" else None
    trainer = with_function(model, tmp_path, prompts, peft_config=peft_config, temperature=0.7, max_steps=1)
    trainer.train()
    assert len(used) == 1
    left = {type(processor).__name__: vars(processor) for processor in used[0]}
    assert left == {"TemperatureLogitsWarper": {"temperature": 0.7}}
    assert model.generation_config.to_dict() == own  # what is saved keeps the model's own


def test_pitfall_18_samples_follow_the_policy(folders, tmp_path, prompts):
    """3,000 first tokens of one prompt against the softmax, at a temperature: chi-squared of the ten likeliest."""
    trainer = with_function(
        folders.sft, tmp_path, prompts, temperature=0.5, max_completion_length=1, per_device_train_batch_size=1
    )
    trainer.model.train()
    torch.manual_seed(0)
    ids, completions, _ = trainer._generate(["prompt 3"] * 3000)
    first = torch.tensor([completion[0] for completion in completions])
    plain = plain_policy(folders, "sft")
    with torch.no_grad():
        probs = (plain(torch.tensor([ids[0]])).logits[0, -1].double() / 0.5).softmax(-1)
    top, where = probs.topk(10)
    counts = (first[:, None] == where).sum(0).double()
    observed = torch.cat([counts, 3000 - counts.sum(0, keepdim=True)])
    expected = 3000 * torch.cat([top, 1 - top.sum(0, keepdim=True)])
    assert expected.min() > 20
    assert ((observed - expected) ** 2 / expected).sum() < 35  # 10 degrees of freedom: p = 1e-4


def test_every_eos_of_the_model_ends_a_completion(folders, tmp_path, monkeypatch, prompts):
    model = AutoModelForCausalLM.from_pretrained(folders.base)
    model.generation_config.eos_token_id = [EOS, 77]
    trainer = with_function(model, tmp_path, prompts, max_completion_length=40)
    trainer.model.train()
    episodes, _ = trainer._sample([{"prompt": "a"}] * 64)
    for row in range(64):
        length = int(episodes["prompt_lengths"][row])
        ids = episodes["input_ids"][row, length : length + int(episodes["completion_lengths"][row])].tolist()
        ends = [i for i, token in enumerate(ids) if token in (EOS, 77)]
        assert ends in ([], [len(ids) - 1])
        assert bool(episodes["ended"][row]) == bool(ends)
    assert 0 < int(episodes["ended"].sum()) < 64


# Guards


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("clip", [None, (-1.0, 1.0)])
def test_pitfall_18_a_score_that_is_no_number_stops_the_run(folders, tmp_path, monkeypatch, prompts, value, clip):
    store_completions(monkeypatch)
    calls = []

    def reward(completions, **kwargs):
        calls.append(len(completions))
        return [1.0, value if len(calls) == 2 else 2.0, 3.0, 4.0]

    trainer = with_function(folders.base, tmp_path, prompts, reward, max_steps=6, reward_clip_range=clip)
    with pytest.raises(RuntimeError, match="step 2.*score"):
        trainer.train()


def test_pitfall_18_an_asynchronous_function_too(folders, tmp_path, monkeypatch, prompts):
    store_completions(monkeypatch)

    async def reward(completions, **kwargs):
        return [float("nan")] * len(completions)

    with pytest.raises(RuntimeError, match="step 0.*score"):
        with_function(folders.base, tmp_path, prompts, reward).train()


def test_pitfall_18_a_reward_model_that_says_nan_stops_the_run(folders, tmp_path, monkeypatch, prompts):
    store_completions(monkeypatch)
    trainer = trainer_of(folders, "sft", "adapter", config(tmp_path), prompts)
    with torch.no_grad():
        trainer.roles.rewards[0].head.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="step 0.*score"):
        trainer.train()


def test_pitfall_18_a_gradient_that_is_no_number_stops_the_run_before_the_step(
    folders, tmp_path, monkeypatch, prompts
):
    store_completions(monkeypatch)
    trainer = with_function(folders.base, tmp_path, prompts)
    weight = trainer.model.model.layers[0].mlp.down_proj.weight
    weight.register_hook(lambda grad: grad * float("nan"))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(RuntimeError, match="step 0.*NaN"):
        trainer.train()
    assert_equal({name: p.detach() for name, p in trainer.model.named_parameters()}, before)


def test_pitfall_18_all_eos_and_empty_completions_stop_the_run(folders, tmp_path, monkeypatch, prompts):
    store_completions(monkeypatch, lambda _: [EOS])
    with pytest.raises(RuntimeError, match="step 0: every completion is EOS alone"):
        with_function(folders.base, tmp_path, prompts).train()
    store_completions(monkeypatch, lambda _: [])
    with pytest.raises(RuntimeError, match="step 0: an empty completion"):
        with_function(folders.base, tmp_path, prompts).train()


def test_pitfall_18_an_evaluation_batch_of_one_may_be_eos_alone(folders, tmp_path, monkeypatch, prompts):
    """The last, small batch of an evaluation is no sign of a collapse."""
    completions = iter([[5, EOS]] * 8 + [[EOS]])
    store_completions(monkeypatch, lambda _: next(completions))
    trainer = with_function(folders.base, tmp_path, prompts, lambda completions, **_: [1.0] * len(completions))
    trainer.args.per_device_eval_batch_size = 8
    assert trainer.evaluate(prompts.select(range(9)))["eval_completions/mean_length"] == pytest.approx(17 / 9)


def test_pitfall_18_a_dataset_smaller_than_a_batch_is_an_error(folders, tmp_path, prompts):
    with pytest.raises(InputError, match="3 prompts, less than one batch of 4"):
        with_function(folders.base, tmp_path, prompts.select(range(3)))
    with_function(folders.base, tmp_path, prompts.select(range(4)))
    with_function(folders.base, tmp_path, prompts.select(range(2)), num_generations=2)


def test_pitfall_13_long_prompts_are_dropped_counted_and_named(folders, tmp_path, prompts, caplog):
    """`prompt i` and i dots: 8 + i bytes, from 10 on 9 + i."""
    caplog.set_level(logging.WARNING)
    logging.getLogger("transformers").propagate = True
    trainer = with_function(folders.base, tmp_path, prompts, max_prompt_length=17)
    assert trainer.train_dataset["prompt"] == prompts["prompt"][:10]
    assert "6 of 16 prompts of train_dataset over 17 tokens dropped: rows 10, 11, 12, 13, 14, 15" in caplog.text
    with pytest.raises(InputError, match="raise max_prompt_length"):
        with_function(folders.base, tmp_path, prompts, max_prompt_length=3)
    with pytest.raises(InputError, match="2 prompts, less than one batch of 4"):
        with_function(folders.base, tmp_path, prompts, max_prompt_length=9)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"args": object()}, "expected a PPOConfig"),
        ({"reward_funcs": None}, "nothing to learn from"),
        ({"train_dataset": None}, "train_dataset is missing"),
        ({"train_dataset": Dataset.from_list([{"text": "a"}])}, "column 'prompt' is missing"),
        ({"train_dataset": Dataset.from_list([{"prompt": " "}])}, "row 0.*the text is empty"),
        ({"eval_dataset": Dataset.from_list([{"text": "a"}])}, "eval_dataset, row 0"),
        ({"eval_dataset": {"x": Dataset.from_list([{"text": "a"}])}}, r"eval_dataset\['x'\], row 0"),
        ({"ptx_dataset": Dataset.from_list([{"prompt": "a"}])}, "ptx_dataset, row 0"),
        ({"model": "/no/such/folder"}, "/no/such/folder"),
        ({"reward_model": "/no/such/reward"}, "/no/such/reward"),
    ],
)
def test_bad_arguments_are_one_line(folders, tmp_path, prompts, change, named):
    arguments = dict(model=folders.base, reward_funcs=mean_id, args=config(tmp_path / "out"), train_dataset=prompts)
    with pytest.raises(InputError, match=named) as error:
        PPOTrainer(**{**arguments, **change})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_wrong_numbers_of_weights_and_an_optimizer_from_outside(folders, tmp_path, prompts):
    with pytest.raises(InputError, match="reward_weights: expected 1 numbers"):
        with_function(folders.base, tmp_path, prompts, reward_weights=[1.0, 2.0])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(InputError, match="optimizers"):
        PPOTrainer(
            model=folders.base,
            reward_funcs=mean_id,
            args=config(tmp_path),
            train_dataset=prompts,
            optimizers=(optimizer, None),
        )


@pytest.mark.parametrize("fails", [False, True])
def test_the_callers_config_is_left_as_it_was(folders, tmp_path, prompts, fails):
    """A constructor that fails, in a notebook, must not leave a config without its KL penalty behind."""
    args = config(tmp_path, beta=0.3, model_init_kwargs={"dtype": "float32"})
    kwargs = {"peft_config": "not a config"} if fails else {}
    try:
        PPOTrainer(model=folders.base, reward_funcs=mean_id, args=args, train_dataset=prompts, **kwargs)
        assert not fails
    except TypeError:
        assert fails
    assert args.beta == 0.3 and args.model_init_kwargs == {"dtype": "float32"}


# The rest of the interface


def test_trls_signature_and_no_flags(folders, tmp_path, monkeypatch, prompts):
    """Pitfall 12 and the issue's call: positional, without a config, on whatever there is."""
    monkeypatch.chdir(tmp_path)
    trainer = PPOTrainer(folders.base, mean_id, None, prompts)
    assert isinstance(trainer.args, PPOConfig) and trainer.args.output_dir == "base0-PPO"
    assert (trainer.roles.value.head.weight == 0).all() and (trainer.roles.value.head.bias == 0).all()


def test_an_iterable_dataset(folders, tmp_path, monkeypatch, prompts):
    store_completions(monkeypatch)
    rows = IterableDataset.from_generator(lambda: iter(prompts))
    trainer = with_function(folders.base, tmp_path, rows, max_steps=4)
    trainer.train()
    assert trainer.state.global_step == 4 and len(logged(trainer, "objective/scores")) == 2


def test_a_model_in_memory_needs_its_tokenizer(tmp_path, monkeypatch, prompts):
    store_completions(monkeypatch)
    trainer = PPOTrainer(
        model=make_gpt2(),
        reward_funcs=mean_id,
        args=config(tmp_path),
        train_dataset=prompts,
        processing_class=make_tokenizer(),
    )
    trainer.train()
    assert trainer.state.global_step == 2


def test_an_adapter_of_the_embeddings_learns_and_starts_at_kl_0(folders, tmp_path, monkeypatch, prompts):
    store_completions(monkeypatch)
    peft_config = lora(task_type="CAUSAL_LM", target_modules=["q_proj", "embed_tokens"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folders.base), peft_config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(tmp_path / "sft")
    make_tokenizer().save_pretrained(tmp_path / "sft")
    trainer = with_function(str(tmp_path / "sft"), tmp_path, prompts, learning_rate=0.05)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "embedding_B" in name}
    trainer.train()
    assert logged(trainer, "objective/kl") == [0.0]
    after = {name: p for name, p in trainer.model.named_parameters() if name in before}
    changed = {name.split(".")[-1] for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"default", "value"}


def test_warm_up_is_linear_from_a_tenth_for_both_rates(folders, tmp_path, monkeypatch, prompts):
    """3 rollouts of 2 steps: 0.1, 0.25, ... 0.85 of the peak in the first 6 steps, then the peak."""
    store_completions(monkeypatch)
    rates = dict(learning_rate=8e-6, value_learning_rate=3e-6)
    trainer = with_function(folders.sft, tmp_path, prompts, max_steps=8, warmup_updates=3, **rates)
    used = []
    trainer.create_optimizer()
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda *a, **k: (used.append([g["lr"] for g in trainer.optimizer.param_groups]), step())[
        1
    ]
    trainer.train()
    factors = [0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0, 1.0]
    for factor, lr in zip(factors, used, strict=True):
        assert sorted(set(lr)) == pytest.approx([3e-6 * factor, 8e-6 * factor], rel=1e-9)


def test_another_scheduler_is_transformers_own(folders, tmp_path, monkeypatch, prompts):
    store_completions(monkeypatch)
    settings = dict(learning_rate=1e-3, value_learning_rate=1e-4, lr_scheduler_type="linear", max_steps=4)
    trainer = with_function(folders.sft, tmp_path, prompts, **settings)
    trainer.train()
    assert logged(trainer, "learning_rate") == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


@pytest.mark.parametrize("policy, reward", [("sft", "adapter"), ("full", "full")])
def test_the_optimizer_holds_every_trained_parameter_once(folders, tmp_path, prompts, policy, reward):
    """Each with its model's rate; biases and norms without decay."""
    args = config(tmp_path, learning_rate=1e-3, value_learning_rate=2e-3, weight_decay=0.1)
    trainer = trainer_of(folders, policy, reward, args, prompts)
    optimizer = trainer.create_optimizer()
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(groups)
    expected = 0
    for role, rate in ((trainer.roles.policy, 1e-3), (trainer.roles.value, 2e-3)):
        for name, parameter in role.parameters().items():
            expected += 1
            assert groups[id(parameter)]["lr"] == rate
            assert groups[id(parameter)]["weight_decay"] == (0.0 if parameter.dim() < 2 else 0.1), name
            assert groups[id(parameter)]["betas"] == (0.9, 0.95) and groups[id(parameter)]["eps"] == 1e-5
    assert len(groups) == expected


def test_a_toy_with_a_known_answer(folders, tmp_path):
    """
    The reward is the share of one token in a completion; the best policy says nothing else. PPO goes from about 1/70
    to more than 3/4 in 20 rollouts of 32 episodes, by real sampling.
    """

    def share(completion_ids, **kwargs):
        return [sum(token == 128 for token in ids) / len(ids) for ids in completion_ids]

    settings = dict(
        learning_rate=0.01,
        value_learning_rate=0.01,
        per_device_train_batch_size=32,
        gradient_accumulation_steps=1,
        steps_per_generation=1,
        num_iterations=2,
        max_steps=40,
        max_completion_length=5,
        max_grad_norm=1.0,
    )
    rows = Dataset.from_list([{"prompt": f"prompt {i}{'.' * i}"} for i in range(32)])
    trainer = with_function(folders.base, tmp_path, rows, share, **settings)
    trainer.train()
    scores = logged(trainer, "objective/scores")
    assert sum(scores[:2]) / 2 < 0.05 and sum(scores[-2:]) / 2 > 0.75
    assert logged(trainer, "objective/kl")[-1] > 5  # it left the reference for it
    assert logged(trainer, "value/explained_variance")[-1] > 0.2  # and the value model saw it coming
