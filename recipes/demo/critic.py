"""
What does the value model buy? PPO beside TRL's RLOO and DPO, and the demo's PPO-ptx, in one world.

    python recipes/demo/critic.py            # after `make demo`; adds critic.json and critic.png to runs/demo

All start from the demo's SFT model, follow its reward model and have its budget: as many sampled completions,
optimizer steps and sequences a step. RLOO samples four completions a prompt, DPO two of the SFT model, of which the
reward model prefers one. Each runs with all of its `SETTINGS`; chosen is the one whose samples for prompts of valid
users have the best score less PPO's beta times KL. PPO-ptx is the demo's own, whose rate is PPO's first.
"""

import argparse
import json
import sys
import traceback
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from base import packed_batches
from datasets import Dataset
from evaluation import Samples, mean_kl, mean_with_interval, pretraining_loss, sample
from gold import gold_reward
from progress import Progress
from run import BETA, MAX_COMPLETION, PTX_LENGTH, ROLLOUT, STEP, common, ppo_config, quieten
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, RLOOConfig, RLOOTrainer
from world import World, make_world

from instructgpt_trl import PPOTrainer, RewardModel

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  behind the choice of its backend

# Learning rate and beta: RLOO's weighs the KL penalty as PPO's does, DPO's is the same in its optimum, or TRL's 0.1
SETTINGS = {
    "ppo": [(1e-4, BETA), (3e-4, BETA), (1e-3, BETA)],
    "rloo": [(1e-4, BETA), (3e-4, BETA), (1e-3, BETA)],
    "dpo": [(rate, beta) for rate in (1e-4, 3e-4, 1e-3) for beta in (BETA, 0.1)],
}
TITLES = {"sft": "SFT", "ppo": "PPO", "ppo_ptx": "PPO-ptx", "rloo": "RLOO", "dpo": "DPO"}
COLOURS = {"sft": "#4477aa", "ppo": "#cc5a49", "ppo_ptx": "#2f8f6b", "rloo": "#7a5ea8", "dpo": "#c08a2d"}


class Comparison:
    """The demo in `folder`, made by seed `seed` in so many PPO steps, and what is trained and measured beside it."""

    def __init__(self, folder: Path, seed: int, steps: int):
        self.folder, self.seed, self.steps = folder, seed, steps
        self.world: World = make_world(seed)
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "base")
        self.rm = RewardModel.from_pretrained(str(folder / "rm"))
        held_out = (folder / "held_out.txt").read_text(encoding="utf-8").split("\n")[:-1]
        self.held_out = packed_batches(held_out, self.tokenizer, 8192, PTX_LENGTH)
        self.sft = self.load("sft")
        self.train = [row["prompt"] for row in self.world.splits["train"]]
        rows = (folder / "prompts.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        self.test = [json.loads(row)["prompt"] for row in rows]

    def load(self, name: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.folder / name).eval()

    def common(self, name: str, rate: float) -> dict[str, Any]:
        """What every trainer gets, the demo's too."""
        folder = str(self.folder / "critic" / name)
        return {**common(folder, self.seed), "learning_rate": rate, "max_steps": self.steps}

    def name(self, name: str, rate: float, beta: float) -> str:
        return f"{TITLES[name]} {rate:g} {beta:g}"

    def ppo(self, rate: float, beta: float) -> Any:
        trainer = PPOTrainer(
            model=str(self.folder / "sft"),
            reward_model=str(self.folder / "rm"),
            args=ppo_config(**self.common("ppo", rate)),
            train_dataset=Dataset.from_dict({"prompt": self.train}),
        )
        Progress.attach(trainer, self.name("ppo", rate, beta), {"objective/scores": "score", "objective/kl": "KL"})
        trainer.train()
        return trainer.model

    def rloo(self, rate: float, beta: float) -> Any:
        args = RLOOConfig(
            **self.common("rloo", rate),
            beta=beta,
            per_device_train_batch_size=STEP,
            gradient_accumulation_steps=1,
            steps_per_generation=ROLLOUT // STEP,
            num_generations=4,
            max_completion_length=MAX_COMPLETION,
        )

        def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
            return self.rm.score(prompts, completions, batch_size=16)

        prompts = Dataset.from_dict({"prompt": self.train})
        trainer = RLOOTrainer(str(self.folder / "sft"), reward, args=args, train_dataset=prompts)
        Progress.attach(trainer, self.name("rloo", rate, beta), {"reward": "score", "kl": "KL a token"})
        trainer.train()
        return trainer.model

    def dpo(self, rate: float, beta: float) -> Any:
        args = DPOConfig(
            **self.common("dpo", rate),
            beta=beta,
            per_device_train_batch_size=STEP // 2,
            gradient_accumulation_steps=1,
        )
        trainer = DPOTrainer(str(self.folder / "sft"), args=args, train_dataset=self.pairs)
        Progress.attach(trainer, self.name("dpo", rate, beta), {"rewards/margins": "margin"})
        trainer.train()
        return trainer.model

    @cached_property
    def pairs(self) -> Dataset:
        """
        Two samples of the SFT model for each of so many prompts that as many are sampled as in PPO. A space stands
        before each, since DPO reads it as one text with its prompt: the words are then those of PPO.
        """
        count = self.steps * STEP // 2
        prompts = [self.train[i % len(self.train)] for i in range(count)]
        texts = [sample(self.sft, self.tokenizer, prompts, MAX_COMPLETION, seed).texts for seed in (11, 12)]
        scores = np.array([self.rm.score(prompts, of, batch_size=64) for of in texts])
        order = scores.argsort(axis=0)
        worse, better = ([f" {texts[which][i]}" for i, which in enumerate(of)] for of in order)
        return Dataset.from_dict({"prompt": prompts, "chosen": better, "rejected": worse})

    def compare(self) -> tuple[list[dict[str, Any]], list[str]]:
        """
        A row for each policy and setting, of which `chosen` is the best of a method by prompts of valid users; and
        what failed.
        """
        rows = [{"policy": name, "chosen": True, **self.measure(self.load(name))} for name in ("sft", "ppo_ptx")]
        failed = []
        for name, settings in SETTINGS.items():
            of_method = []
            for rate, beta in settings:
                try:
                    of_method.append(self.trained(name, rate, beta))
                except Exception as error:  # the others are worth their minutes
                    traceback.print_exc()
                    failed.append(f"{self.name(name, rate, beta)}: {type(error).__name__}: {error}")
            best = max(of_method, key=lambda row: row["objective"], default=None)
            rows += [{**row, "chosen": row is best} for row in of_method]
        return rows, failed

    def trained(self, name: str, rate: float, beta: float) -> dict[str, Any]:
        """The row of a setting, with the `objective` by which it may be chosen."""
        model = getattr(self, name)(rate, beta).eval()
        prompts = [row["prompt"] for row in self.world.splits["valid"]]
        samples = sample(model, self.tokenizer, prompts, MAX_COMPLETION, seed=5)
        objective = float(self.scores(samples).mean() - BETA * mean_kl(model, self.sft, samples))
        return {"policy": name, "learning_rate": rate, "beta": beta, "objective": objective, **self.measure(model)}

    def scores(self, samples: Samples) -> np.ndarray:
        return self.rm.score_ids(samples.prompt_ids, samples.completion_ids, batch_size=16).numpy()

    def gold(self, samples: Samples) -> np.ndarray:
        pairs = zip(samples.prompts, samples.texts, strict=True)
        return np.array([gold_reward(self.world.tasks[prompt], text) for prompt, text in pairs])

    def measure(self, model: Any) -> dict[str, Any]:
        """On the demo's test prompts, with the demo's seeds."""
        samples = sample(model, self.tokenizer, self.test, MAX_COMPLETION, seed=3)
        opponents = sample(self.sft, self.tokenizer, self.test, MAX_COMPLETION, seed=4)
        own, other = self.gold(samples), self.gold(opponents)
        wins = (own > other) + 0.5 * (own == other)
        return {
            "win_rate_vs_sft": mean_with_interval(wins, self.seed),
            "gold_reward": mean_with_interval(own, self.seed),
            "rm_score": float(self.scores(samples).mean()),
            "kl": mean_kl(model, self.sft, samples),
            "pretraining_loss": pretraining_loss(model, self.held_out),
        }


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Gold reward, score and pretraining loss of each policy against its KL; those not chosen are hollow."""
    panels = {"gold_reward": "gold reward", "rm_score": "reward-model score", "pretraining_loss": "pretraining loss"}
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.3), layout="constrained")
    for axis, (metric, title) in zip(axes, panels.items(), strict=True):
        for row in rows:
            colour = COLOURS[row["policy"]]
            x = np.sqrt(max(row["kl"], 0))  # an estimate, which may be less than 0
            value, *bounds = np.atleast_1d(row[metric])
            if bounds:
                axis.plot([x] * 2, bounds, color=colour, linewidth=1.2, zorder=1)
            style = {"label": TITLES[row["policy"]]} if row["chosen"] else {"markerfacecolor": "white"}
            axis.plot(x, value, "o", color=colour, **style)
        axis.set_title(title, loc="left", fontsize=9, fontweight="bold")
        axis.set_xlabel("sqrt(KL to SFT, nats a completion)")
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(file, dpi=130)
    plt.close(figure)


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown, the chosen settings in bold."""
    lines = ["| policy | rate, beta | beats SFT | gold reward | RM score | KL | pretraining loss |", "|---" * 7 + "|"]
    for row in rows:
        (win, a, b), (gold, c, d) = row["win_rate_vs_sft"], row["gold_reward"]
        name = f"**{TITLES[row['policy']]}**" if row["chosen"] else TITLES[row["policy"]]
        setting = f"{row['learning_rate']:g}, {row['beta']:g}" if "beta" in row else ""
        lines.append(
            f"| {name} | {setting} | {100 * win:.1f} % [{100 * a:.1f}, {100 * b:.1f}] | {gold:.2f} [{c:.2f}, {d:.2f}] "
            f"| {row['rm_score']:.2f} | {row['kl']:.2f} | {row['pretraining_loss']:.3f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="what the demo wrote")
    args = parser.parse_args(argv)
    quieten()
    report = args.demo / "report.json"
    if not report.is_file():
        sys.exit(f"error: {report} is not there; run `make demo` first, or give its folder as --demo")
    demo = json.loads(report.read_text(encoding="utf-8"))
    world = Comparison(args.demo, demo["seed"], demo["ppo_steps"])
    rows, failed = world.compare()
    (args.demo / "critic.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    draw(rows, args.demo / "critic.png")
    print(f"\n{table(rows)}\n")
    for setting in failed:
        print(f"note: {setting}")
    print(f"figures: {args.demo / 'critic.json'}, {args.demo / 'critic.png'}")


if __name__ == "__main__":
    main()
