"""Every stage and role on one base quantised by bitsandbytes, which runs on a CPU too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer
from datasets import Dataset
from ppo_helpers import (
    assert_close,
    assert_equal,
    config,
    logged,
    lora,
    nf4,
    record,
    store_completions,
    trainer_of,
)
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from instructgpt_trl import PPOTrainer, RewardConfig, RewardModel, RewardTrainer, SFTConfig, SFTTrainer
from instructgpt_trl.data import InputError
from instructgpt_trl.data.episodes import pad_episodes
from instructgpt_trl.models.loading import keep_gradients

pytest.importorskip("bitsandbytes")

ROOT = Path(__file__).parents[1]
SMALL = dict(
    per_device_train_batch_size=2,
    max_steps=3,
    learning_rate=1e-2,
    report_to="none",
    save_strategy="no",
    gradient_checkpointing=False,
    disable_tqdm=True,
    use_cpu=True,
)


def ppo(wide, tmp_path, prompts, reward="adapter", **settings) -> PPOTrainer:
    args = config(tmp_path, **settings)
    return trainer_of(wide, "sft", reward, args, prompts, quantization_config=nf4())


def storages(*networks) -> dict[int, int]:
    """Bytes of each storage of parameters, buffers and quantisation states, counted once."""
    tensors = [t for network in networks for t in (*network.parameters(), *network.buffers())]
    for parameter in [t for t in tensors if getattr(t, "quant_state", None) is not None]:
        state = parameter.quant_state
        tensors += [state.absmax, state.code, *([state.state2.absmax, state.state2.code] if state.nested else [])]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def test_pitfall_01_four_roles_on_a_quantised_base_are_stored_once(wide, tmp_path, prompts):
    trainer = ppo(wide, tmp_path, prompts)
    roles = list(trainer.roles)
    assert len(roles) == 4 and len({id(role.network) for role in roles}) == 1
    own = {id(p): p for role in roles for p in role.parameters().values()}
    adapters = sum(p.numel() * 4 for p in own.values())
    assert {p.dtype for p in own.values()} == {torch.float32}
    heads = sum(p.numel() * 4 for role in roles if role.head is not None for p in role.head.parameters())
    base = AutoModelForCausalLM.from_pretrained(wide.base, dtype=torch.float32, quantization_config=nf4())
    assert sum(storages(trainer.model).values()) == sum(storages(base).values()) + adapters - heads


def outputs(trainer: PPOTrainer, prompts) -> dict[str, torch.Tensor]:
    """What reference and reward model say of some episodes."""
    ids = [make_tokenizer()(prompt)["input_ids"] for prompt in prompts["prompt"][:4]]
    episodes = pad_episodes(ids, [[65, 66, 257]] * 4, 256)
    reward, reference = trainer.roles.rewards[0], trainer.roles.reference
    trainer.model.eval()  # which decides how many rows go through at once
    return {
        "scores": trainer.run_role(reward, "scores", episodes)[0],
        "logprobs": trainer.run_role(reference, "logprobs", episodes)[0],
    }


@pytest.mark.parametrize(
    ("policy", "reward", "bits"),
    [("sft", "adapter", 4), ("sft", "adapter", 8), ("sft", "adapter", None), ("full", "full", None)],
)
def test_reference_and_reward_model_are_the_same_after_50_updates(
    wide, tmp_path, prompts, monkeypatch, policy, reward, bits
):
    store_completions(monkeypatch)
    settings = dict(max_steps=50, steps_per_generation=2, learning_rate=0.01, value_learning_rate=0.01)
    args = config(tmp_path, logging_steps=50, **settings)
    quantization = {4: nf4(), 8: BitsAndBytesConfig(load_in_8bit=True), None: None}[bits]
    trainer = trainer_of(wide, policy, reward, args, prompts, quantization_config=quantization)
    before = outputs(trainer, prompts)
    moved = {k: p.detach().clone() for k, p in trainer._policy_parameters.items()}
    trainer.train()
    assert trainer.state.global_step == 50
    assert_equal(outputs(trainer, prompts), before)
    assert all(not torch.equal(p, moved[k]) for k, p in trainer._policy_parameters.items())


def test_pitfall_02_03_on_a_quantised_base_the_kl_starts_at_0_and_the_ratio_at_1(wide, tmp_path, prompts):
    trainer = ppo(wide, tmp_path, prompts, learning_rate=0.0, value_learning_rate=0.0)
    trainer.train()
    assert logged(trainer, "objective/kl") == [0.0]
    assert logged(trainer, "policy/approxkl") == [0.0] * 2


@pytest.mark.parametrize("reward", ["adapter", "full"])
def test_pitfall_10_checkpointing_on_a_quantised_base_changes_no_gradient(
    wide, tmp_path, prompts, texts, monkeypatch, reward
):
    store_completions(monkeypatch)
    steps = []
    for on in (False, True):
        args = config(tmp_path, max_steps=1, gradient_checkpointing=on, ptx_ratio=1)
        quantization = dict(quantization_config=nf4())
        trainer = trainer_of(wide, "sft", reward, args, prompts, ptx_dataset=texts, **quantization)
        recorder = record(trainer)
        trainer.train()
        steps.append(recorder.steps[0])
    for name in ("policy_grad", "value_grad"):
        assert_close(steps[1][name], steps[0][name], rtol=1e-5, atol=1e-6)
        assert any(grad.abs().max() > 1e-4 for grad in steps[0][name].values())


SCORE = """
import json, sys
from instructgpt_trl import RewardModel
print(json.dumps(RewardModel.from_pretrained(sys.argv[1]).score(["p: ", "q: "], ["aaa", "abcd"])))
"""


@pytest.mark.parametrize("bits", [4, 8])
def test_a_reward_model_of_a_quantised_run_scores_the_same_in_a_new_process(wide, tmp_path, rankings, bits):
    quantization = nf4() if bits == 4 else BitsAndBytesConfig(load_in_8bit=True)
    trainer = RewardTrainer(
        wide.sft,
        RewardConfig(output_dir=str(tmp_path), **SMALL),
        train_dataset=rankings,
        quantization_config=quantization,
    )
    trainer.train()
    trainer.save_model()
    expected = trainer.reward_model.score(["p: ", "q: "], ["aaa", "abcd"])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCORE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == pytest.approx(expected, rel=1e-5)
    plain = RewardModel.from_pretrained(str(tmp_path), quantization_config=False).score(["p: "], ["aaa"])
    assert abs(plain[0] - expected[0]) > 1e-4  # the base does matter


@pytest.mark.parametrize("start", ["base", "sft"])
def test_sft_on_a_quantised_base(wide, tmp_path, demonstrations, start):
    trainer = SFTTrainer(
        getattr(wide, start),
        SFTConfig(output_dir=str(tmp_path), residual_dropout=0.1, **SMALL),
        train_dataset=demonstrations,
        quantization_config=nf4(),
        peft_config=lora() if start == "base" else None,
    )
    trained = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    trainer.train()
    now = dict(trainer.model.named_parameters())
    assert all(not torch.equal(now[name], p) for name, p in trained.items())
    assert trainer.state.log_history[-1]["train_loss"] > 0


def test_a_ppo_run_on_a_quantised_base_resumes(wide, tmp_path, prompts):
    settings = dict(max_steps=4, save_strategy="steps", save_steps=2, learning_rate=0.01)
    straight = ppo(wide, tmp_path / "straight", prompts, **settings)
    straight.train()
    resumed = ppo(wide, tmp_path / "resumed", prompts, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert_equal(resumed._policy_parameters, straight._policy_parameters)
    assert_equal(resumed._value_parameters, straight._value_parameters)


@pytest.mark.parametrize("quantized", [True, False])
def test_an_8_bit_optimizer_has_bytes_for_adapters_and_heads_alone(wide, tmp_path, prompts, monkeypatch, quantized):
    """Adam's first step is the rate in every weight whose gradient is much larger than epsilon."""
    store_completions(monkeypatch)
    args = config(tmp_path, max_steps=1, optim="adamw_8bit", learning_rate=1e-3, value_learning_rate=2e-3)
    wider = lora(r=64, task_type="CAUSAL_LM")  # bitsandbytes leaves states of less than 4,096 numbers as they are
    quantization = nf4() if quantized else None
    trainer = PPOTrainer(
        wide.base,
        None,
        args,
        prompts,
        reward_model=wide.reward_adapter,
        peft_config=wider,
        quantization_config=quantization,
    )
    rates = {"policy": (trainer._policy_parameters, 1e-3), "value": (trainer._value_parameters, 2e-3)}
    before = {name: {k: p.detach().clone() for k, p in own.items()} for name, (own, _) in rates.items()}
    recorder = record(trainer)
    trainer.train()
    states = {id(p): state for p, state in trainer.optimizer.optimizer.state.items()}
    for name, (own, rate) in rates.items():
        for k, parameter in own.items():
            state = states.pop(id(parameter))
            dtype = torch.uint8 if parameter.numel() >= 4096 else torch.float32
            assert state["state1"].dtype == state["state2"].dtype == dtype, k
            grad = recorder.steps[0][f"{name}_grad"][k]
            expected = before[name][k] - rate * grad / (grad.abs() + args.adam_epsilon)
            assert_close({k: parameter.detach()}, {k: expected}, rtol=0, atol=1e-3 * rate)
    assert states == {}  # no other weight has a state


def packs(network) -> set[bool]:
    """Whether bitsandbytes may pack the 4-bit weights of a network for evaluation, on a CPU with bf16 instructions."""
    layers = [m for m in network.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    assert layers
    return {m.support_avx512bf16_for_cpu for m in layers}


def test_no_stage_lets_bitsandbytes_pack_weights_that_gradients_must_pass(wide, tmp_path, prompts, monkeypatch):
    """As on a CPU with bf16 instructions, whatever this one has."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    for role in ppo(wide, tmp_path, prompts).roles:
        assert packs(role.network) == {False}
    assert packs(RewardModel.from_pretrained(wide.reward_adapter, quantization_config=nf4()).model) == {False}
    rows = Dataset.from_list([{"prompt": "p", "completion": "c"}] * 2)
    args = SFTConfig(str(tmp_path), **SMALL)
    sft = SFTTrainer(wide.base, args, train_dataset=rows, quantization_config=nf4(), peft_config=lora())
    assert packs(sft.model) == {False}
    ranked = Dataset.from_list([{"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2]}] * 2)
    model = AutoModelForSequenceClassification.from_pretrained(wide.base, num_labels=1, quantization_config=nf4())
    args = RewardConfig(str(tmp_path), **SMALL)
    tokenizer = make_tokenizer()
    reward = RewardTrainer(model, args, train_dataset=ranked, processing_class=tokenizer, peft_config=lora())
    assert packs(reward.model) == {False}


def test_weights_that_are_packed_already_are_refused(wide):
    model = AutoModelForCausalLM.from_pretrained(wide.base, quantization_config=nf4())
    keep_gradients(model)
    model.model.layers[1].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(InputError, match="layers.1.mlp.up_proj: bitsandbytes has packed its 4-bit weights"):
        keep_gradients(model)
