"""The three stages on tiny models, eight steps each, with everything in them that a checkpoint has to hold."""

import json
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/, when this is run as a script

import torch
from conftest import make_llama, make_tokenizer
from datasets import Dataset
from ppo_helpers import config as ppo_config
from ppo_helpers import lora, save_reward_model, save_sft_adapter
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback
from transformers.trainer_pt_utils import safe_globals

from instructgpt_trl import PPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

STAGES = [(stage, kind) for stage in ("sft", "reward", "ppo") for kind in ("lora", "full")]
STEPS = 8
# What says when and not what
_TIMES = ("_runtime", "_per_second", "step_time", "_flos")


KINDS = ("lora", "full")


class World:
    """A base, an SFT adapter and reward models in a folder, made if they are not there, and rows."""

    def __init__(self, folder: Path):
        self.base, self.sft = str(folder / "base"), str(folder / "sft")
        self.reward = {kind: str(folder / kind) for kind in KINDS}
        if not Path(self.base).is_dir():
            make_llama().save_pretrained(self.base)
            make_tokenizer().save_pretrained(self.base)
            save_sft_adapter(self.base, self.sft)
            for kind, path in self.reward.items():
                save_reward_model(self.base, path, kind == "lora")
        # Twelve, with four blocks of text sixteen: epochs of whole minibatches, in one process or in two
        words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
        self.demonstrations = Dataset.from_list([{"prompt": f"say {w}: ", "completion": f"{w} {w}"} for w in words])
        self.texts = Dataset.from_list([{"text": f"plain text number {i} of the corpus"} for i in range(64)])
        self.prompts = Dataset.from_list([{"prompt": f"prompt {i}{'.' * i}"} for i in range(10)])
        draw = random.Random(0)
        self.rankings = Dataset.from_list(
            [
                {
                    "prompt": f"{word}: ",
                    "completions": [word[:k] for k in range(1, len(word) + 1)],
                    "ranks": [draw.randint(1, 4) for _ in word[1:]] + [5],
                }
                for word in words
            ]
        )

    def trainer(self, stage: str, kind: str, folder: Path, **settings: Any):
        """A new trainer of a stage, LoRA or full, as a user's script would make it."""
        shared = dict(
            max_steps=STEPS,
            save_strategy="steps",
            save_steps=1,
            save_total_limit=2,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=2,
            report_to="none",
            disable_tqdm=True,
            learning_rate=0.01,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            gradient_checkpointing=False,
        )
        peft = lora() if kind == "lora" else None
        if stage == "sft":
            shared |= dict(metric_for_best_model="loss", load_best_model_at_end=True, eval_steps=1)
            shared |= dict(residual_dropout=0.2, pretraining_fraction=0.25, max_length=32)
            own = dict(train_dataset=self.demonstrations, pretraining_dataset=self.texts)
            own |= dict(eval_dataset=self.demonstrations, callbacks=[EarlyStoppingCallback(5)])
            return SFTTrainer(self.base, SFTConfig(str(folder), **{**shared, **settings}), peft_config=peft, **own)
        if stage == "reward":
            own = dict(train_dataset=self.rankings, eval_dataset=self.rankings)
            own |= dict(demonstration_dataset=self.demonstrations)
            args = RewardConfig(str(folder), **{**shared, **settings})
            return RewardTrainer(self.base, args, peft_config=peft, **own)
        shared |= dict(per_device_train_batch_size=1, value_learning_rate=0.01, warmup_updates=3, ptx_ratio=1)
        shared |= dict(kl_target=0.05, kl_horizon=20, num_iterations=2, save_completions=True)
        return PPOTrainer(
            self.sft if kind == "lora" else self.base,
            reward_model=self.reward[kind],
            args=ppo_config(folder, **{**shared, **settings}),
            train_dataset=self.prompts,
            eval_dataset=self.prompts.select(range(3)),
            ptx_dataset=self.texts,
        )


def result_of(folder: Path) -> dict[str, Any]:
    """All that a run has left: tensors of the last checkpoint and of the model, logs and files, without times."""
    found: dict[str, Any] = {}
    for part in (folder, folder / f"checkpoint-{STEPS}"):
        for path in sorted(path for path in part.rglob("*") if path.is_file()):
            name = path.relative_to(folder).as_posix()
            if part == folder and name.startswith(("checkpoint-", ".")):
                continue
            if path.suffix == ".safetensors":
                found[name] = load_file(path)
            elif path.suffix in (".pt", ".pth"):
                with safe_globals():
                    found[name] = torch.load(path, weights_only=True)
            elif path.name == "trainer_state.json":
                found[name] = _without_times(json.loads(path.read_text(encoding="utf-8")), folder)
            elif path.suffix in (".json", ".jsonl") and path.name != "checkpoint.json":
                found[name] = path.read_text(encoding="utf-8")
    return found


def _without_times(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    state["log_history"] = [
        {name: value for name, value in row.items() if not name.endswith(_TIMES)} for row in state["log_history"]
    ]
    return json.loads(json.dumps(state).replace(str(folder), "FOLDER"))


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two results differ, bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        out = [f"{where}/{key} is on one side only" for key in a.keys() ^ b.keys()]
        return out + [line for key in a.keys() & b.keys() for line in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [line for i, pair in enumerate(zip(a, b, strict=True)) for line in differences(*pair, f"{where}/{i}")]
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5))
    else:
        same = a.tobytes() == b.tobytes() if hasattr(a, "tobytes") else a == b
    return [] if same else [f"{where}: {str(a)[:60]} and {str(b)[:60]}"]
