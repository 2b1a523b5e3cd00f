"""What only a CUDA GPU can show: `TEST_GPU=1 python -m pytest tests/test_gpu.py`. Everywhere else it is skipped."""

import os
from dataclasses import replace

import pytest
import torch
from conftest import make_llama, make_tokenizer
from datasets import Dataset
from ppo_helpers import (
    Folders,
    assert_close,
    assert_equal,
    config,
    logged,
    lora,
    nf4,
    record,
    save_reward_model,
    store_completions,
    trainer_of,
)
from transformers import AutoConfig, BitsAndBytesConfig, TrainerCallback
from trl.kernels import chunked_logprob

from instructgpt_trl import RewardConfig, RewardModel, RewardTrainer, SFTConfig, SFTTrainer
from instructgpt_trl.data.episodes import pad_episodes
from instructgpt_trl.memory import Load, peak, predict

pytestmark = pytest.mark.skipif(
    not os.environ.get("TEST_GPU") or not torch.cuda.is_available(), reason="TEST_GPU is not set, or there is no GPU"
)
FLOAT32 = dict(bf16=False, fp16=False)
SET_UPS = pytest.mark.parametrize("policy, reward", [("sft", "adapter"), ("fresh", "full"), ("full", "full")])


def on_cpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().float().cpu() for name, tensor in tensors.items()}


@SET_UPS
def test_two_updates_are_those_of_a_cpu(wide, tmp_path, prompts, texts, monkeypatch, policy, reward):
    """Rollout, gradients of policy, value model and pretraining text, and weights, with TRL's kernels for a GPU."""
    store_completions(monkeypatch)
    settings = dict(learning_rate=1e-3, value_learning_rate=1e-3, ptx_ratio=1, max_steps=4, **FLOAT32)
    settings |= dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, steps_per_generation=4)
    runs = []
    for use_cpu in (True, False):
        args = config(tmp_path, use_cpu=use_cpu, **settings)
        trainer = trainer_of(wide, policy, reward, args, prompts, ptx_dataset=texts)
        assert {p.device.type for role in trainer.roles for p in role.parameters().values()} == {
            "cpu" if use_cpu else "cuda"
        }
        recorder = record(trainer)
        trainer.train()
        runs.append((trainer, [{kind: on_cpu(tensors) for kind, tensors in step.items()} for step in recorder.steps]))
    for ours, expected in zip(runs[1][1], runs[0][1], strict=True):
        for kind in ("policy_grad", "value_grad", "policy", "value"):
            for name, tensor in expected[kind].items():
                apart = torch.linalg.vector_norm(ours[kind][name] - tensor)
                assert apart <= 1e-3 * torch.linalg.vector_norm(tensor) + 1e-6, (kind, name, apart)
    for name in ("objective/kl", "objective/scores", "objective/entropy", "loss/policy", "loss/value", "loss/ptx"):
        assert logged(runs[1][0], name) == pytest.approx(logged(runs[0][0], name), rel=1e-4, abs=1e-5), name


@SET_UPS
def test_without_settings_it_computes_in_bfloat16_and_starts_at_kl_0_and_ratio_1(
    wide, tmp_path, prompts, monkeypatch, policy, reward
):
    for stand_in in ("_forward_tile", "_backward_tile"):  # of the Triton kernels, where there is no GPU
        monkeypatch.delattr(chunked_logprob, stand_in)
    args = config(tmp_path, learning_rate=0.0, value_learning_rate=0.0, per_device_train_batch_size=2)
    assert args.bf16 and not args.fp16
    trainer = trainer_of(wide, policy, reward, args, prompts)
    trainer.train()
    assert logged(trainer, "objective/kl") == [0.0]
    assert logged(trainer, "policy/approxkl") == pytest.approx([0.0] * 2, abs=1e-6)
    assert {p.dtype for p in trainer._policy_parameters.values()} == {torch.float32}


@pytest.mark.parametrize("bits", [4, 8, None])
def test_reference_and_reward_model_are_the_same_after_20_updates(wide, tmp_path, prompts, bits):
    quantization = {4: nf4(torch.bfloat16), 8: BitsAndBytesConfig(load_in_8bit=True), None: None}[bits]
    args = config(tmp_path, max_steps=20, steps_per_generation=2, learning_rate=0.01, value_learning_rate=0.01)
    trainer = trainer_of(wide, "sft", "adapter", args, prompts, quantization_config=quantization)

    def outputs() -> dict[str, torch.Tensor]:
        ids = [make_tokenizer()(prompt)["input_ids"] for prompt in prompts["prompt"][:4]]
        episodes = pad_episodes(ids, [[65, 66, 257]] * 4, 256)
        episodes = {name: tensor.cuda() for name, tensor in episodes.items()}
        trainer.model.eval()
        scores = trainer.run_role(trainer.roles.rewards[0], "scores", episodes)[0]
        return {"scores": scores, "logprobs": trainer.run_role(trainer.roles.reference, "logprobs", episodes)[0]}

    before = outputs()
    moved = {name: p.detach().clone() for name, p in trainer._policy_parameters.items()}
    trainer.train()
    assert_equal(outputs(), before)
    assert all(not torch.equal(p, moved[name]) for name, p in trainer._policy_parameters.items())


@pytest.mark.parametrize("bits", [4, None])
def test_checkpointing_changes_no_gradient(wide, tmp_path, prompts, texts, monkeypatch, bits):
    store_completions(monkeypatch)
    steps = []
    for on in (False, True):
        args = config(tmp_path, max_steps=1, gradient_checkpointing=on, ptx_ratio=1, **FLOAT32)
        quantization = nf4(torch.float32) if bits else None
        trainer = trainer_of(
            wide, "sft", "adapter", args, prompts, ptx_dataset=texts, quantization_config=quantization
        )
        recorder = record(trainer)
        trainer.train()
        steps.append(recorder.steps[0])
    for kind in ("policy_grad", "value_grad"):
        assert_close(steps[1][kind], steps[0][kind], rtol=1e-4, atol=1e-6)


def test_a_pass_that_does_not_fit_is_done_in_halves_with_the_same_gradient(
    tmp_path_factory, tmp_path, monkeypatch, caplog
):
    """On a card with less memory than a pass takes, which a limit on this process makes of any."""
    path = tmp_path_factory.mktemp("large")
    make_llama(hidden=256, intermediate_size=4096, max_position_embeddings=4096).save_pretrained(path / "base")
    make_tokenizer().save_pretrained(path / "base")
    large = Folders(str(path / "base"), path)
    store_completions(monkeypatch, lambda ids: [66] * 300 + [257])
    rows = Dataset.from_list([{"prompt": f"{i:03}" * 100} for i in range(64)])
    settings = dict(per_device_train_batch_size=32, gradient_accumulation_steps=1, steps_per_generation=1, max_steps=1)
    steps, peaks = [], []
    for limited in (False, True):
        args = config(tmp_path, max_completion_length=301, **settings, **FLOAT32)
        trainer = trainer_of(large, "sft", "adapter", args, rows)
        recorder = record(trainer)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        own = torch.cuda.memory_allocated()
        if limited:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 0.6 * peaks[0]) / total)
        try:
            trainer.train()
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        peaks.append(torch.cuda.max_memory_allocated() - own)
        steps.append(recorder.steps[0])
        del trainer
    assert "rows at a time now" in caplog.text
    assert peaks[1] < 0.65 * peaks[0]
    for kind in ("policy_grad", "value_grad"):
        assert_close(steps[1][kind], steps[0][kind], rtol=1e-3, atol=1e-6)


class StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


def test_a_run_resumes_exactly(wide, tmp_path, prompts):
    """Sampling on the GPU goes on with the generator that the checkpoint holds."""
    settings = dict(max_steps=4, steps_per_generation=4, learning_rate=1e-3, save_strategy="steps", save_steps=2)
    ends = []
    for stop in (False, True):
        folder = tmp_path / str(stop)
        trainer = trainer_of(wide, "sft", "adapter", config(folder, **settings), prompts)
        if stop:
            trainer.add_callback(StopAt())
            trainer.train()
            trainer = trainer_of(wide, "sft", "adapter", config(folder, **settings), prompts)
        trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-2" if stop else None)
        assert trainer.state.global_step == 4
        ends.append({name: p.detach().clone() for name, p in trainer._policy_parameters.items()})
    assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sharing", ["on", "off"])
def test_a_step_of_the_reward_model_is_that_of_a_cpu(wide, tmp_path, rankings, sharing):
    runs = []
    for use_cpu in (True, False):
        options = dict(report_to="none", save_strategy="no", disable_tqdm=True, gradient_checkpointing=False)
        args = RewardConfig(
            str(tmp_path), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-3, prefix_sharing=sharing,
            use_cpu=use_cpu, dataloader_pin_memory=False, logging_steps=1, **options, **FLOAT32,
        )  # fmt: skip
        trainer = RewardTrainer(wide.base, args, train_dataset=rankings, demonstration_dataset=None)
        trainer.train()
        runs.append((trainer, on_cpu(dict(trainer.model.named_parameters()))))
    assert_close(runs[1][1], runs[0][1], rtol=1e-4, atol=1e-4)
    losses = [[row["loss"] for row in trainer.state.log_history if "loss" in row] for trainer, _ in runs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_reward_model_scores_as_on_a_cpu(wide, tmp_path):
    path = save_reward_model(wide.base, str(tmp_path / "rm"), adapter=True)
    prompts, completions = ["a prompt", "another"] * 3, ["one", "two", "a longer one", "x", "one", "three"]
    there = RewardModel.from_pretrained(path, device_map={"": 0}).score(prompts, completions)
    assert there == pytest.approx(RewardModel.from_pretrained(path).score(prompts, completions), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("bits", [4, None])
def test_sft_trains_with_a_score_at_each_evaluation(wide, tmp_path, demonstrations, texts, bits):
    args = SFTConfig(
        str(tmp_path), max_steps=8, learning_rate=1e-2, eval_strategy="steps", eval_steps=8, report_to="none",
        save_strategy="no", disable_tqdm=True, max_length=64, logging_steps=1, pretraining_fraction=0.1,
        eval_on_start=True, residual_dropout=0,
    )  # fmt: skip
    trainer = SFTTrainer(
        wide.base,
        args,
        train_dataset=demonstrations,
        eval_dataset=demonstrations,
        pretraining_dataset=texts,
        reward_model=RewardModel.from_pretrained(wide.reward_adapter, device_map={"": 0}),
        peft_config=lora(task_type="CAUSAL_LM"),
        quantization_config=nf4(torch.bfloat16) if bits else None,
    )
    trainer.train()
    evaluated = [row for row in trainer.state.log_history if "eval_loss" in row]
    assert len(evaluated) == 2 and all("eval_rm_score" in row for row in evaluated)
    assert evaluated[1]["eval_loss"] < evaluated[0]["eval_loss"]


@pytest.mark.parametrize("bits", [4, 8, None])
def test_the_planner_predicts_what_tensors_take(tmp_path_factory, tmp_path, bits):
    """SFT of an adapter with dropout, under mixed precision; a product's workspace is all that is not counted."""
    base = str(tmp_path_factory.mktemp("planned"))
    make_llama(hidden=512, intermediate_size=4096, max_position_embeddings=1024).save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    quantization = {4: nf4(torch.bfloat16), 8: BitsAndBytesConfig(load_in_8bit=True), None: None}[bits]
    adapter = lora(r=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    args = SFTConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=16, gradient_accumulation_steps=2, max_length=1024,
        gradient_checkpointing=True, residual_dropout=0, report_to="none", save_strategy="no", disable_tqdm=True,
        model_init_kwargs={"dtype": "bfloat16"},
    )  # fmt: skip
    rows = Dataset.from_dict({"prompt": ["p" * 512] * 64, "completion": ["c" * 511] * 64})
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    trainer = SFTTrainer(base, args, train_dataset=rows, peft_config=adapter, quantization_config=quantization)
    trainer.train()
    measured = torch.cuda.max_memory_allocated() - before
    load = Load("sft", rows=16, prompt=512, completion=512, lora=adapter, dtype=torch.bfloat16, bits=bits, cuda=True)
    parts = predict(AutoConfig.from_pretrained(base), replace(load, compute=torch.bfloat16))
    assert peak(parts) - parts["context"] == pytest.approx(measured, rel=0.1)
