"""
The paper in miniature, offline, on two CPU cores, in minutes: a generated world, a language model pretrained on its
web, demonstrations (SFT), K-way rankings by simulated labelers (reward model), PPO and PPO-ptx, and a report.

    python recipes/demo/run.py --seed 0 --output_dir runs/demo
    python recipes/demo/run.py --quick        # a smaller version in under 90 seconds, for tests
"""

import argparse
import json
import logging
import os
import random
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of missing kernels when imported
# ruff: noqa: E402

import datasets
import transformers
from base import batches, make_tokenizer, packed_batches, pretrain
from datasets import Dataset
from evaluation import mean_gold, mean_kl, pretraining_loss, sample, win_rate
from gold import gold_reward
from labelers import AGREEMENT, accuracy, agreement, make_labelers, rank_all, set_noise
from page import print_table, write_report
from progress import Bar, Progress
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from world import World, make_world

from instructgpt_trl import PPOConfig, PPOTrainer, RewardConfig, RewardModel, RewardTrainer, SFTConfig, SFTTrainer
from instructgpt_trl.data import InputError, check_output_dir

BATCH_TOKENS = 1024  # of a pretraining step
PTX_LENGTH = 64  # tokens of a pretraining example
MAX_COMPLETION = 48  # tokens; the longest demonstration has 36
STEP, ROLLOUT = 32, 64  # completions of an optimizer step of PPO, and of a rollout
BETA = 0.02  # of the KL penalty [InstructGPT E.8: 0.01 to 0.02]


class PretrainingLoss(TrainerCallback):
    """Measures the policy's loss on held-out web text about a dozen times in a training; `points` is the curve."""

    def __init__(self, batches: list):
        self.batches = batches
        self.points: list[dict[str, float]] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % max(1, state.max_steps // 12) == 0 or state.global_step == state.max_steps:
            loss = pretraining_loss(model, self.batches)
            self.points.append({"step": state.global_step, "pretraining_loss": loss})


@dataclass(frozen=True)
class Settings:
    """How much of everything. Learning rates are those of a small model; the paper's are for 1.3B and up."""

    primer_texts: int = 9_000
    web_texts: int = 16_000
    demonstrations: int = 500
    ranked_prompts: int = 1_800
    test_prompts: int = 400  # of 350 to 398 that there are
    ppo_steps: int = 140


TITLES = {"ppo": "PPO", "ppo_ptx": "PPO-ptx"}
QUICK = Settings(
    primer_texts=600, web_texts=1_500, demonstrations=100, ranked_prompts=60, test_prompts=40, ppo_steps=12
)


def common(output_dir: str, seed: int) -> dict[str, Any]:
    """Arguments that every trainer gets."""
    return {
        "output_dir": output_dir,
        "seed": seed,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 5,
        "disable_tqdm": True,
        "use_cpu": True,  # the same numbers everywhere; a GPU is no faster at a million parameters
        "dataloader_pin_memory": False,
    }


def ppo_config(learning_rate: float, **given: Any) -> PPOConfig:
    """PPO in this world."""
    return PPOConfig(
        **given,
        learning_rate=learning_rate,
        value_learning_rate=5e-4,
        per_device_train_batch_size=STEP,
        gradient_accumulation_steps=1,
        steps_per_generation=ROLLOUT // STEP,
        max_completion_length=MAX_COMPLETION,
        max_prompt_length=48,
        beta=BETA,
        ptx_coef=0.3,
        ptx_ratio=1,
        ptx_max_length=PTX_LENGTH,
        save_completions=False,
    )


class Run:
    """
    One run of the demo: each method is a stage, writes its model to a folder and adds to `results`.

    Args:
        seed (`int`): seed of the world, the models and the labelers.
        output_dir (`Path`): folder for models and the report.
        settings (`Settings`): how much of everything.
    """

    def __init__(self, seed: int, output_dir: Path, settings: Settings):
        self.seed, self.dir, self.settings = seed, output_dir, settings
        self.results: dict[str, Any] = {
            "seed": seed,
            "ppo_steps": settings.ppo_steps,
            "seconds": {},
            "labelers": {},
            "reward_model": {},
            "policies": {},
        }
        self.curves: dict[str, list[dict[str, float]]] = {}
        self.world: World = make_world(seed)
        self.labelers = make_labelers("train", seed=seed)
        self.judges = make_labelers("heldout", seed=seed)
        self.train = self.world.splits["train"]
        self.test = [row["prompt"] for row in self.world.splits["test"]][: settings.test_prompts]

    def path(self, name: str) -> str:
        """Folder of a model."""
        return str(self.dir / name)

    def pretrain(self) -> None:
        """The base model, on web text."""
        web = self.world.web(self.settings.web_texts)
        held_out = self.world.web(300, "heldout")
        prompts = [row["prompt"] for rows in self.world.splits.values() for row in rows]
        self.demonstrations = self.world.demonstrations(self.train[: self.settings.demonstrations])
        primer = self.world.primer(self.settings.primer_texts)
        completions = [row["completion"] for row in self.demonstrations]
        tokenizer = make_tokenizer([*primer, *web, *held_out, *prompts, *completions])
        bar = Bar("pretraining")
        # First text by text, where words are easiest to copy, then joined and cut, as in PPO's pretraining gradients
        half = len(web) // 2
        steps = [
            *batches(primer, tokenizer, BATCH_TOKENS, self.seed),
            *batches(web[:half], tokenizer, BATCH_TOKENS, self.seed),
            *packed_batches(web[half:], tokenizer, BATCH_TOKENS, PTX_LENGTH),
        ]
        pretrain(steps, tokenizer, self.path("base"), self.seed, show=bar.loss)
        self.tokenizer = AutoTokenizer.from_pretrained(self.path("base"))
        self.web = Dataset.from_dict({"text": web})
        self.held_out_batches = packed_batches(held_out, self.tokenizer, 8192, PTX_LENGTH)
        (self.dir / "held_out.txt").write_text("\n".join(held_out) + "\n", encoding="utf-8")

    def sft(self) -> None:
        """Supervised fine-tuning on demonstrations."""
        args = SFTConfig(
            **common(self.path("sft"), self.seed),
            per_device_train_batch_size=16,
            learning_rate=5e-4,
            num_train_epochs=2,
            residual_dropout=0.1,
            pretraining_fraction=0.1,  # as in the paper's start of RLHF (C.3)
            max_length=PTX_LENGTH,
        )
        demonstrations = Dataset.from_list(self.demonstrations).select_columns(["prompt", "completion"])
        trainer = SFTTrainer(
            model=self.path("base"), args=args, train_dataset=demonstrations, pretraining_dataset=self.web
        )
        Progress.attach(trainer, "SFT", {"loss": "loss"})
        trainer.train()
        trainer.save_model()

    def collect_rankings(self) -> None:
        """K = 4 to 9 samples of the SFT model for each prompt, ranked by one labeler each; and the agreement."""
        model = self.load("sft")
        rng = random.Random(f"K {self.seed}")
        prompts = [row["prompt"] for row in self.train]
        prompts = rng.sample(prompts, min(self.settings.ranked_prompts, len(prompts)))
        ranked = self.sample_many(model, {prompt: rng.randint(4, 9) for prompt in prompts}, seed=1)
        # A labeler's noise is set on answers to training prompts, his agreement measured on held-out ones
        some = dict(list(ranked.items())[:150])
        self.labelers = set_noise(self.labelers, self.world.tasks, some, AGREEMENT["train"])
        self.judges = set_noise(self.judges, self.world.tasks, some, AGREEMENT["heldout"])
        self.rankings = rank_all(self.world.tasks, ranked, self.labelers, self.seed)
        self.test_samples = self.sample_many(model, {prompt: 4 for prompt in self.test}, seed=2)
        for name, group in (("agreement", self.labelers), ("heldout_agreement", self.judges)):
            self.results["labelers"][name] = round(agreement(self.world.tasks, self.test_samples, group), 4)

    def sample_many(self, model, counts: dict[str, int], seed: int) -> dict[str, list[str]]:
        """Some completions for each prompt, as many as `counts` says; empty ones, which nobody could rank, are out."""
        prompts = [prompt for prompt, count in counts.items() for _ in range(count)]
        samples = sample(model, self.tokenizer, prompts, MAX_COMPLETION, seed)
        found: dict[str, list[str]] = {prompt: [] for prompt in counts}
        for prompt, text in zip(samples.prompts, samples.texts, strict=True):
            if text.strip():
                found[prompt].append(text)
        return {prompt: texts for prompt, texts in found.items() if len(texts) >= 2}

    def reward_model(self) -> None:
        """The reward model, from the SFT model, on the rankings; demonstrations then score 0 on average."""
        args = RewardConfig(
            **common(self.path("rm"), self.seed),
            per_device_train_batch_size=4,
            learning_rate=5e-4,
            num_train_epochs=1,
            max_length=PTX_LENGTH,
        )
        trainer = RewardTrainer(
            model=self.path("sft"),
            args=args,
            train_dataset=Dataset.from_list(self.rankings).select_columns(["prompt", "completions", "ranks"]),
            demonstration_dataset=Dataset.from_list(self.demonstrations).select_columns(["prompt", "completion"]),
        )
        Progress.attach(trainer, "reward model", {"loss": "loss", "accuracy": "accuracy"})
        trainer.train()
        trainer.save_model()
        self.curves["reward_model"] = trainer.state.log_history
        self.rm = RewardModel.from_pretrained(self.path("rm"))
        scores = {}
        for prompt, completions in self.test_samples.items():
            scores[prompt] = self.rm.score([prompt] * len(completions), completions, batch_size=16)
        for name, group in (("train", self.labelers), ("heldout", self.judges)):
            value = accuracy(self.world.tasks, self.test_samples, scores, group)
            self.results["reward_model"][f"accuracy_{name}_labelers"] = round(value, 4)
        columns = [[row[name] for row in self.demonstrations] for name in ("prompt", "completion")]
        shown = self.rm.score(*columns, batch_size=64)
        self.results["reward_model"]["demonstration_mean"] = sum(shown) / len(shown)

    def ppo(self, name: str, ptx: bool) -> None:
        """PPO, with pretraining gradients if `ptx`; the same prompts, steps and rates either way."""
        args = ppo_config(1e-4, **common(self.path(name), self.seed), max_steps=self.settings.ppo_steps)
        trainer = PPOTrainer(
            model=self.path("sft"),
            reward_model=self.path("rm"),
            args=args,
            train_dataset=Dataset.from_list(self.train).select_columns(["prompt"]),
            ptx_dataset=self.web if ptx else None,
        )
        Progress.attach(trainer, TITLES[name], {"objective/scores": "score", "objective/kl": "KL"})
        held_out = PretrainingLoss(self.held_out_batches)
        trainer.add_callback(held_out)
        trainer.train()
        trainer.save_model()
        self.curves[name] = trainer.state.log_history + held_out.points

    def load(self, name: str):
        """A saved language model, for evaluation."""
        return AutoModelForCausalLM.from_pretrained(self.path(name)).eval()

    def evaluate(self) -> None:
        """Every policy on held-out prompts, judged by held-out labelers."""
        tasks = self.world.tasks
        sft = self.load("sft")
        opponents = sample(sft, self.tokenizer, self.test, MAX_COMPLETION, seed=4)
        rows = [{"prompt": prompt, "category": tasks[prompt].use_case} for prompt in self.test]
        lines = [json.dumps(row) + "\n" for row in rows]
        (self.dir / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")
        for name in ("base", "sft", "ppo", "ppo_ptx"):
            model = self.load(name)
            samples = sample(model, self.tokenizer, self.test, MAX_COMPLETION, seed=3)
            scores = self.rm.score_ids(samples.prompt_ids, samples.completion_ids, batch_size=16)
            self.results["policies"][name] = {
                "win_rate_vs_sft": win_rate(tasks, samples, opponents, self.judges, self.seed),
                "gold_reward": mean_gold(tasks, samples),
                "rm_score": float(scores.mean()),
                "kl": mean_kl(model, sft, samples),
                "pretraining_loss": pretraining_loss(model, self.held_out_batches),
            }
            for row, text in zip(rows, samples.texts, strict=True):
                row[name] = (text, gold_reward(tasks[row["prompt"]], text))
        self.samples = _one_each(rows)


def _one_each(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows in an order in which the use cases take turns, so that the first of them show every kind."""
    turn: dict[str, int] = {}
    keys = []
    for index, row in enumerate(rows):
        turn[row["category"]] = turn.get(row["category"], 0) + 1
        keys.append((turn[row["category"]], index))
    return [rows[index] for _, index in sorted(keys)]


def run(seed: int, output_dir: Path, settings: Settings) -> dict[str, Any]:
    """All stages in order; writes models and report to `output_dir` and returns what `report.json` holds."""
    start = time.perf_counter()
    demo = Run(seed, output_dir, settings)
    stages: dict[str, Callable[[], None]] = {
        "pretraining": demo.pretrain,
        "sft": demo.sft,
        "rankings": demo.collect_rankings,
        "reward_model": demo.reward_model,
        "ppo": lambda: demo.ppo("ppo", ptx=False),
        "ppo_ptx": lambda: demo.ppo("ppo_ptx", ptx=True),
        "evaluation": demo.evaluate,
    }
    for name, stage in stages.items():
        begin = time.perf_counter()
        stage()
        demo.results["seconds"][name] = round(time.perf_counter() - begin, 1)
    demo.results["seconds"]["total"] = round(time.perf_counter() - start, 1)
    write_report(demo.results, demo.curves, demo.samples, output_dir)
    return demo.results


def main() -> None:
    """Read the command line, run, and say where the report is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--quick", action="store_true", help="a smaller version in under 90 seconds, for tests")
    options = parser.parse_args()
    quieten()
    try:
        check_output_dir(options.output_dir)
    except InputError as error:
        sys.exit(f"error: {error}")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    print(f"The paper in miniature, seed {options.seed}: a world, its web, five models, two CPU cores, a few minutes.")
    results = run(options.seed, options.output_dir, QUICK if options.quick else Settings())
    print_table(results)
    print(f"report: {options.output_dir / 'report.html'}   ({results['seconds']['total']:.0f} s)")


def quieten() -> None:
    """Turn off the libraries' progress bars and notices: the demo prints one line a stage of its own."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


if __name__ == "__main__":
    main()
