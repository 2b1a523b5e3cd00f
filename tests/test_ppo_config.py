"""`PPOConfig`: the paper's numbers, what it refuses, and that it needs no flags and no GPU."""

import dataclasses

import pytest
import torch
from conftest import make_tokenizer
from datasets import Dataset
from trl import RLOOConfig, TrlParser

from instructgpt_trl import PPOConfig
from instructgpt_trl.data import InputError
from instructgpt_trl.ppo_checks import check_template

# New fields and changed defaults, each with its source in paper.md
DEFAULTS = {
    "beta": 0.02,  # [P C.4]
    "num_generations": 1,  # [P 3.5] bandit: a prompt, a response
    "max_prompt_length": 1024,  # [P App. A]
    "max_completion_length": 1024,  # [P App. A]
    "learning_rate": 8.05e-6,  # [P C.4] the highest that did not diverge without ptx
    "value_learning_rate": 9e-6,  # [P C.4]
    "lr_scheduler_type": "constant",  # [P C.4]
    "warmup_updates": 10,  # [P C.4]
    "epsilon": 0.2,  # [P C.4]
    "temperature": 1.0,  # [P C.4]
    "num_iterations": 1,  # [P C.4]
    "gamma": 1.0,  # [P C.4]
    "lam": 0.95,  # [L], [S]
    "vf_coef": 0.1,  # [L], [N+]
    "cliprange_value": 0.2,  # [L], [N+]
    "normalize_advantages": True,  # [L]
    "adam_beta1": 0.9,  # [P C.1]
    "adam_beta2": 0.95,  # [P C.1]
    "adam_epsilon": 1e-5,  # [L], [N+]
    "weight_decay": 0.0,
    "ptx_coef": 27.8,  # [P C.4]
    "ptx_ratio": 8,  # [P C.4]
    "ptx_max_length": None,
    "ema_decay": 0.992,  # [P C.4]
    "missing_eos_score": None,  # off
    "kl_target": None,  # [P C.4] fixed beta
    "kl_horizon": 10_000,  # [L]
    "disable_dropout": True,  # pitfall 3
    "restore_callback_states_from_checkpoint": True,  # pitfall 11
    "generation_micro_batch_size": None,  # neutral
    "save_completions": True,  # pitfall 19
    "alarms": "warn",
}


def test_defaults():
    args = PPOConfig("x")
    assert {name: getattr(args, name) for name in DEFAULTS} == DEFAULTS


def test_every_new_field_and_changed_default_is_in_the_table():
    parent = {field.name: field.default for field in dataclasses.fields(RLOOConfig)}
    ours = {field.name: field.default for field in dataclasses.fields(PPOConfig)}
    assert {name for name, value in ours.items() if name not in parent or value != parent[name]} <= DEFAULTS.keys()


def test_pitfall_12_no_flags_on_a_machine_without_a_gpu():
    args = PPOConfig("x")
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        assert args.device.type == "cpu"
        assert not args.bf16 and not args.fp16


@pytest.mark.parametrize(
    "capability, bf16, fp16", [((7, 5), False, True), ((8, 0), True, False), ((9, 0), True, False)]
)
def test_pitfall_12_precision_by_what_the_gpu_has(monkeypatch, capability, bf16, fp16):
    monkeypatch.setattr(RLOOConfig, "__post_init__", lambda self: None)
    monkeypatch.setattr(PPOConfig, "_check_ranges", lambda self: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    args = PPOConfig("x")
    assert (args.bf16, args.fp16) == (bf16, fp16)
    chosen = PPOConfig("x", bf16=False)
    assert (chosen.bf16, chosen.fp16) == (False, False)
    on_cpu = PPOConfig("x", use_cpu=True)
    assert (on_cpu.bf16, on_cpu.fp16) == (False, False)


def test_the_paper_batches():
    """512 episodes in minibatches of 64, 8 of them a micro-batch."""
    args = PPOConfig("x", per_device_train_batch_size=8, gradient_accumulation_steps=8, steps_per_generation=64)
    assert args.generation_batch_size == 512
    assert args.gradient_accumulation_steps * args.per_device_train_batch_size == 64


def test_one_completion_a_prompt_is_allowed_on_odd_batches():
    args = PPOConfig("x", per_device_train_batch_size=3, gradient_accumulation_steps=1)
    assert args.num_generations == 1 and args.generation_batch_size == 3


@pytest.mark.parametrize("settings", [{"num_generations": 0}, {"num_generations": 3}, {"num_generations": -1}])
def test_the_parents_checks_of_groups_stay(settings):
    with pytest.raises((ValueError, ZeroDivisionError)):
        PPOConfig("x", per_device_train_batch_size=4, **settings)


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"gamma": 1.5}, "gamma=1.5"),
        ({"lam": -0.1}, "lam=-0.1"),
        ({"ema_decay": 2.0}, "ema_decay=2.0"),
        ({"beta": -0.1}, "beta=-0.1"),
        ({"beta": float("nan")}, "beta=nan"),
        ({"vf_coef": -1.0}, "vf_coef=-1.0"),
        ({"ptx_coef": -1.0}, "ptx_coef=-1.0"),
        ({"ptx_coef": float("nan")}, "ptx_coef=nan"),
        ({"ptx_ratio": 0}, "ptx_ratio=0"),
        ({"cliprange_value": 0.0}, "cliprange_value=0.0"),
        ({"epsilon": 0.0}, "epsilon=0.0"),
        ({"kl_horizon": 0}, "kl_horizon=0"),
        ({"kl_target": 0.0}, "kl_target=0.0"),
        ({"kl_target": 6.0, "beta": 0.0}, "kl_target"),
        ({"ptx_max_length": 1}, "ptx_max_length=1"),
        ({"max_prompt_length": 0}, "max_prompt_length=0"),
        ({"max_completion_length": None}, "max_completion_length"),
        ({"max_completion_length": 0}, "max_completion_length=0"),
        ({"warmup_updates": -1}, "warmup_updates=-1"),
        ({"lr_scheduler_type": "cosine"}, "warmup_updates"),
        ({"epsilon_high": 0.3}, "epsilon_high"),
        ({"sync_ref_model": True}, "sync_ref_model"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 6}, "steps_per_generation=6"),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 2}, "steps_per_generation=2"),
    ],
)
def test_wrong_values_are_named(settings, named):
    with pytest.raises(InputError, match=named) as error:
        PPOConfig("x", **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 20},
        {"top_p": 0.9},
        {"min_p": 0.1},
        {"repetition_penalty": 1.1},
        {"temperature": 0.0},
        {"generation_kwargs": {"min_new_tokens": 5}},
        {"generation_kwargs": {"top_k": 20}},
        {"generation_kwargs": {"temperature": 0.5}},
        {"generation_kwargs": {"do_sample": False}},
        {"generation_kwargs": {"num_beams": 2}},
        {"generation_kwargs": {"suppress_tokens": [3]}},
        {"generation_kwargs": {"bad_words_ids": [[3]]}},
        {"generation_kwargs": {"no_repeat_ngram_size": 2}},
        {"generation_kwargs": {"typical_p": 0.9}},
        {"generation_kwargs": {"forced_eos_token_id": 2}},
    ],
)
def test_pitfall_18_sampling_that_cuts_the_distribution_is_refused(settings):
    with pytest.raises(InputError, match="own distribution|sampling|temperature"):
        PPOConfig("x", **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 0},
        {"top_p": 1.0},
        {"min_p": 0.0},
        {"temperature": 0.7},
        {"generation_kwargs": {"do_sample": True, "cache_implementation": "dynamic"}},
        {"epsilon_high": 0.2},
        {"lr_scheduler_type": "cosine", "warmup_updates": 0},
        {"kl_target": 6.0},
        {"ema_decay": 0.0},
        {"max_prompt_length": None},
    ],
)
def test_neutral_settings_are_allowed(settings):
    args = PPOConfig("x", **settings)
    assert all(getattr(args, name) == value for name, value in settings.items())


def test_command_line():
    flags = "--output_dir x --kl_target 6 --missing_eos_score -1 --max_prompt_length 12 --ptx_max_length 33 --beta 0.1"
    (args,) = TrlParser((PPOConfig,)).parse_args_and_config(flags.split())
    assert (args.kl_target, args.missing_eos_score, args.max_prompt_length, args.ptx_max_length) == (6.0, -1.0, 12, 33)
    assert args.beta == 0.1 and args.num_generations == 1


def test_a_variable_that_the_chat_template_never_reads_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% if enable_thinking %}hm{% endif %}{{ messages }}"
    talk = Dataset.from_list([{"prompt": [{"role": "user", "content": "hi"}]}])
    given = {"enable_thinking": False, "add_generation_prompt": True}
    check_template(PPOConfig("x", chat_template_kwargs=given), tokenizer, talk)
    misspelt = PPOConfig("x", chat_template_kwargs={"enable_thinkng": False})
    with pytest.raises(InputError, match="enable_thinkng"):
        check_template(misspelt, tokenizer, talk)
    check_template(misspelt, tokenizer, Dataset.from_list([{"prompt": "hi"}]))  # plain text has no template
