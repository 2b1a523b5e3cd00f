"""
One side of a benchmark, in a process of its own: `python ppo_side.py SETTING.json OUT.json`.

A setting names the folders of the models, the sizes of a batch and the side: "ours" or "trl", which are PPO, or "sft"
or "reward", our other stages. What is written: bytes at the peak beyond the process's size after imports, seconds of
each update and of parts of them, generated tokens and optimizer steps.
"""

import importlib
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench import lora, prompts, texts
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationMixin,
    TrainerCallback,
)
from transformers.utils import logging

import instructgpt_trl  # loads its trainers, for which the peer's TRL is too old, when they are named
from instructgpt_trl.peak_memory import PeakMemory


class Clock(TrainerCallback):
    """Seconds of each optimizer step; with one step an update, of each update. And of parts of it, by name."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.parts: dict[str, list[float]] = {}
        self.last = 0.0

    def timed(self, name: str | Callable[..., str], method: Callable[..., Any]) -> Callable[..., Any]:
        """`method`, whose seconds are those of the part `name`, or `name(*arguments)`."""

        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                part = name if isinstance(name, str) else name(*args)
                self.parts.setdefault(part, []).append(time.perf_counter() - start)

        return run

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.last = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


def common_arguments(setting: dict[str, Any], folder: str) -> dict[str, Any]:
    return dict(
        output_dir=folder,
        per_device_train_batch_size=setting["batch"],
        gradient_accumulation_steps=1,
        gradient_checkpointing=setting["checkpointing"],
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=setting["dtype"] == "bfloat16",
        learning_rate=1e-5,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
    )


def quantized(setting: dict[str, Any]) -> BitsAndBytesConfig | None:
    if setting["bits"] is None:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=setting["bits"] == 4,
        load_in_8bit=setting["bits"] == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=setting["dtype"],
    )


def ours(setting: dict[str, Any], folder: str, clock: Clock) -> Any:
    rollout = setting.get("rollout", setting["batch"])
    args = instructgpt_trl.PPOConfig(
        **common_arguments(setting, folder),
        steps_per_generation=rollout // setting["batch"],
        max_steps=setting["updates"],
        max_prompt_length=None,
        max_completion_length=setting["completion"],
        ptx_ratio=1,
        ptx_max_length=setting["prompt"] + setting["completion"],
        save_completions=False,
        shuffle_dataset=False,
        model_init_kwargs={"dtype": setting["dtype"]},
    )
    tokenizer = AutoTokenizer.from_pretrained(setting["base"])
    length = setting["prompt"] + setting["completion"]
    text = texts(tokenizer, 4 * setting["batch"] * setting["updates"], length)
    trainer = instructgpt_trl.PPOTrainer(
        setting["sft"],
        reward_model=setting["reward"],
        args=args,
        train_dataset=prompts(tokenizer, max(rollout, setting["batch"] * setting["updates"]), setting["prompt"]),
        ptx_dataset=Dataset.from_dict({"text": text}) if setting["ptx"] else None,
        callbacks=[clock],
        quantization_config=quantized(setting),
    )
    trainer.generation_config.eos_token_id, trainer.eos_token_ids = None, [-1]  # full-length completions
    roles = trainer.roles
    names = {id(roles.policy): "policy", id(roles.reference): "reference", id(roles.value): "value model"}

    def part(role: Any, method: str, *rest: Any) -> str:
        return f"{names.get(id(role), 'reward model')}, forward"

    trainer.run_role = clock.timed(part, trainer.run_role)
    trainer._generate_single_turn = clock.timed("sampling", trainer._generate_single_turn)
    trainer._policy_backward = clock.timed("policy, backward", trainer._policy_backward)
    trainer._value_backward = clock.timed("value model, backward", trainer._value_backward)
    trainer._ptx_backward = clock.timed("pretraining, both", trainer._ptx_backward)
    return trainer


def sft(setting: dict[str, Any], folder: str, clock: Clock) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(setting["base"])
    count = 2 * setting["batch"] * setting["updates"]
    columns = {name: texts(tokenizer, count, setting[name]) for name in ("prompt", "completion")}
    args = instructgpt_trl.SFTConfig(**of_a_stage(setting, folder), residual_dropout=0)
    return instructgpt_trl.SFTTrainer(train_dataset=Dataset.from_dict(columns), args=args, **model_of(setting, clock))


def reward(setting: dict[str, Any], folder: str, clock: Clock) -> Any:
    """`setting["batch"]` completions a step, those of a prompt `setting["k"]`."""
    tokenizer, k = AutoTokenizer.from_pretrained(setting["base"]), setting["k"]
    setting = {**setting, "batch": setting["batch"] // k}
    count = 2 * setting["batch"] * setting["updates"]
    completions = texts(tokenizer, count * k, setting["completion"])
    columns = {
        "prompt": texts(tokenizer, count, setting["prompt"]),
        "completions": [completions[k * i : k * i + k] for i in range(count)],
        "ranks": [list(range(1, k + 1))] * count,
    }
    args = instructgpt_trl.RewardConfig(**of_a_stage(setting, folder))
    return instructgpt_trl.RewardTrainer(
        train_dataset=Dataset.from_dict(columns), args=args, **model_of(setting, clock)
    )


def of_a_stage(setting: dict[str, Any], folder: str) -> dict[str, Any]:
    """Two passes a step, so that gradients are there in the second, as the planner has it."""
    own = {"gradient_accumulation_steps": 2, "max_steps": setting["updates"]}
    return common_arguments(setting, folder) | own | {"model_init_kwargs": {"dtype": setting["dtype"]}}


def model_of(setting: dict[str, Any], clock: Clock) -> dict[str, Any]:
    return {
        "model": setting["base"],
        "peft_config": None if setting["full"] else lora(),
        "quantization_config": quantized(setting),
        "callbacks": [clock],
    }


def theirs(setting: dict[str, Any], folder: str, clock: Clock) -> Any:
    """TRL 1.12's trainer; on LoRA its policy alone is an adapter, and its value model is trained whole."""
    args = trl_ppo().PPOConfig(
        **common_arguments(setting, folder),
        total_episodes=setting["batch"] * setting["updates"],
        num_mini_batches=1,
        num_ppo_epochs=1,
        num_sample_generations=0,
        local_rollout_forward_batch_size=setting["batch"],
        response_length=setting["completion"],
        temperature=1.0,
    )
    tokenizer = AutoTokenizer.from_pretrained(setting["base"], padding_side="left")
    rows = prompts(tokenizer, setting["batch"] * setting["updates"], setting["prompt"])
    options = {"dtype": setting["dtype"]}

    def scalar() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(setting["base"], num_labels=1, **options)

    policy = AutoModelForCausalLM.from_pretrained(setting["base"], **options)
    return trl_ppo().PPOTrainer(
        args,
        tokenizer,
        policy,
        AutoModelForCausalLM.from_pretrained(setting["base"], **options) if setting["full"] else None,
        scalar(),
        rows.map(lambda row: {"input_ids": tokenizer(row["prompt"])["input_ids"]}, remove_columns=["prompt"]),
        scalar(),
        eval_dataset=Dataset.from_dict({"input_ids": [[2]]}),
        callbacks=[clock],
        peft_config=None if setting["full"] else lora(),
    )


def trl_ppo() -> Any:
    return importlib.import_module("trl.experimental.ppo")


def count_generated() -> list[int]:
    """A list that gets the number of tokens of each call of `generate`, whoever calls it."""
    counts, generate = [], GenerationMixin.generate

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        out = generate(self, *args, **kwargs)
        sequences = getattr(out, "sequences", out)
        counts.append((sequences.shape[1] - given.shape[1]) * len(sequences))
        return out

    GenerationMixin.generate = counted
    return counts


def main(setting: dict[str, Any]) -> dict[str, Any]:
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    torch.manual_seed(0)
    clock, generated = Clock(), count_generated()
    if setting["side"] == "trl":  # imports are not what is measured
        trl_ppo()
    else:
        _ = instructgpt_trl.PPOTrainer, instructgpt_trl.RewardTrainer, instructgpt_trl.SFTTrainer
    with tempfile.TemporaryDirectory() as folder, PeakMemory(setting["anonymous"]) as memory:
        sides = {"ours": ours, "trl": theirs, "sft": sft, "reward": reward}
        trainer = sides[setting["side"]](setting, folder, clock)
        built = memory.bytes
        trainer.train()
        steps = trainer.state.global_step
    found = {"bytes": memory.bytes, "built": built, "seconds": clock.seconds, "parts": clock.parts, "steps": steps}
    return {**found, "generated": sum(generated)}


if __name__ == "__main__":
    result = main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")
