"""`PPOTrainer`: how its roles are set up, its interface, its optimizer, and a toy with a known answer."""

from pathlib import Path

import pytest
import torch
from conftest import make_gpt2, make_llama, make_tokenizer
from datasets import Dataset, IterableDataset
from peft import PeftModel, get_peft_model
from ppo_helpers import (
    EOS,
    assert_equal,
    chunks,
    config,
    logged,
    lora,
    mean_id,
    plain_logprobs,
    store_completions,
    trainer_of,
    with_function,
)
from transformers import AutoModelForCausalLM, PreTrainedModel

from instructgpt_trl import PPOConfig, PPOTrainer
from instructgpt_trl.data import InputError
from instructgpt_trl.data.episodes import pad_episodes


def outputs(trainer) -> dict[str, torch.Tensor]:
    """What reference and reward models say about some fixed episodes."""
    episodes = pad_episodes([[5, 6], [7]], [[8, 9, EOS], [10]], 256)
    roles = {"ref": trainer.roles.reference} | {f"reward{i}": role for i, role in enumerate(trainer.roles.rewards)}
    methods = {name: role.logprobs if name == "ref" else role.scores for name, role in roles.items()}
    return {name: role.evaluate(methods[name], episodes, chunks(episodes, 2))[0] for name, role in roles.items()}


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


def test_trls_signature_and_no_flags(folders, tmp_path, monkeypatch, prompts):
    """Pitfall 12 and the issue's call: positional, without a config, on whatever there is."""
    monkeypatch.chdir(tmp_path)
    trainer = PPOTrainer(folders.base, mean_id, None, prompts)
    assert isinstance(trainer.args, PPOConfig) and trainer.args.output_dir == "base0-PPO"
    assert (trainer.roles.value.head.weight == 0).all() and (trainer.roles.value.head.bias == 0).all()


def test_columns_with_names_of_trls_own_arguments(folders, tmp_path, monkeypatch, prompts):
    """Rankings as prompts: their `completions` are not those of the policy."""
    store_completions(monkeypatch)
    rows = prompts.add_column("completions", [["a", "b"]] * 16).add_column("completion", ["c"] * 16)
    seen = []

    def reward(completions, ranks=None, **kwargs):
        seen.extend(completions)
        return [1.0] * len(completions)

    with_function(folders.base, tmp_path, rows, reward).train()
    assert len(seen) == 4 and not {"a", "b", "c"} & set(seen) and all(isinstance(text, str) for text in seen)


def test_functions_of_one_name_are_told_apart(folders, tmp_path, monkeypatch, prompts):
    store_completions(monkeypatch)
    trainer = with_function(
        folders.base,
        tmp_path,
        prompts,
        [lambda completions, **_: [1.0] * len(completions), lambda completions, **_: [2.0] * len(completions)],
        max_steps=1,
    )
    trainer.train()
    assert logged(trainer, "rewards/<lambda>/mean") == [1.0]
    assert logged(trainer, "rewards/<lambda>_1/mean") == [2.0]


def test_paths_may_be_path_objects(folders, tmp_path, prompts):
    trainer = PPOTrainer(
        model=Path(folders.sft),
        reward_model=Path(folders.reward_adapter),
        args=config(tmp_path),
        train_dataset=prompts,
    )
    assert len(trainer.roles.rewards) == 1


def test_an_iterable_dataset(folders, tmp_path, monkeypatch, prompts):
    store_completions(monkeypatch)
    rows = IterableDataset.from_generator(lambda: iter(prompts))
    trainer = with_function(folders.base, tmp_path, rows, max_steps=4)
    trainer.train()
    assert trainer.state.global_step == 4 and len(logged(trainer, "objective/scores")) == 2


def test_pitfall_18_an_iterable_dataset_smaller_than_a_batch_is_an_error(folders, tmp_path, monkeypatch, prompts):
    store_completions(monkeypatch)
    rows = IterableDataset.from_generator(lambda: iter(prompts.select(range(3))))
    trainer = with_function(folders.base, tmp_path, rows, max_steps=4)
    with pytest.raises((InputError, RuntimeError), match="less than one batch of 4"):
        trainer.train()


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


@pytest.mark.parametrize("policy", ["sft", "full"])
def test_a_reward_model_on_a_base_of_its_own_is_loaded_as_the_policy_is(folders, tmp_path, prompts, policy):
    """But for a value model that is trained in full: it is float32. What names a part of the policy's folder stays."""
    kwargs = {"dtype": "bfloat16", "revision": "main", "subfolder": ""}
    args = config(tmp_path, model_init_kwargs=kwargs)
    trainer = trainer_of(folders, policy, "full", args, prompts)
    assert len({id(role.model) for role in trainer.roles}) == (4 if policy == "full" else 2)
    for role in trainer.roles:
        own = {p.dtype for name, p in role.network.named_parameters() if "lora_" not in name}
        in_full = policy == "full" and role is trainer.roles.value
        assert own == {torch.float32 if in_full else torch.bfloat16}
        assert role.head is None or role.head.weight.dtype == torch.float32
    assert args.model_init_kwargs == kwargs


def test_a_value_model_that_starts_from_the_policy_is_float32_too(folders, tmp_path, prompts):
    trainer = with_function(folders.base, tmp_path, prompts, model_init_kwargs={"dtype": "bfloat16"})
    assert {p.dtype for p in trainer.roles.policy.parameters().values()} == {torch.bfloat16}
    assert {p.dtype for p in trainer.roles.value.parameters().values()} == {torch.float32}
