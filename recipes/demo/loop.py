"""
Do two rounds of collecting, labelling and training beat one with as many labels? recipes/iterate.py in the demo's
world.

    python recipes/demo/loop.py --seed 0 --labels 400 --output_dir runs/loop

One round: all labels on samples of the SFT model. Two rounds: half of them, a reward model, a policy; the other half
on samples of that policy; and again from the SFT model, by all labels. The last PPO has as many steps in both. The
labelers are the demo's training group; held-out labelers say which policy they prefer, on held-out prompts. Writes
`loop.json` and `loop.png`.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import yaml
from evaluation import mean_gold, mean_kl, sample, win_rate
from labelers import AGREEMENT, set_noise
from run import MAX_COMPLETION, PTX_LENGTH, QUICK, Run, Settings, common, ppo_config, quieten
from transformers import AutoModelForCausalLM, AutoTokenizer

from instructgpt_trl import RewardModel
from instructgpt_trl.data import InputError, check_output_dir, write_rows

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from iterate import Loop  # noqa: E402  recipes/, one folder up

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  behind the choice of its backend

COMPLETIONS = 4
ARMS = {"one round": 1, "two rounds": 2}


def settings_of(demo: Run, folder: Path) -> dict[str, Path]:
    """The YAML files of the recipes, with the demo's values."""
    shared = {name: value for name, value in common("unused", demo.seed).items() if name != "output_dir"}
    ppo = ppo_config(1e-4, output_dir="unused")
    names = ("learning_rate", "value_learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps")
    names += ("steps_per_generation", "max_completion_length", "max_prompt_length", "beta", "ptx_coef", "ptx_ratio")
    names += ("ptx_max_length", "save_completions")
    values = {
        "collect_config": {"completions": COMPLETIONS, "max_new_tokens": MAX_COMPLETION, "batch_size": 128},
        "reward_config": {
            **shared,
            "per_device_train_batch_size": 4,
            "learning_rate": 5e-4,
            "num_train_epochs": 1,
            "max_length": PTX_LENGTH,
            "demonstrations": str(folder / "demonstrations.jsonl"),
        },
        "ppo_config": {
            **shared,
            **{name: getattr(ppo, name) for name in names},
            "max_steps": demo.settings.ppo_steps,
            "ptx_dataset": str(folder / "web.jsonl"),
        },
    }
    files = {name: folder / f"{name}.yaml" for name in values}
    for name, file in files.items():
        file.write_text(yaml.safe_dump(values[name]), encoding="utf-8")
    return files


def labeler_of(demo: Run) -> Callable[[dict[str, Any]], list[int]]:
    """Ranks of a task by one of the training labelers, drawn for each prompt."""
    tasks = demo.world.tasks

    def rank(row: dict[str, Any]) -> list[int]:
        labeler = random.Random(f"{demo.seed} {row['prompt']}").choice(demo.labelers)
        return labeler.rank(tasks[row["prompt"]], row["completions"])

    return rank


def begin(demo: Run, folder: Path, labels: int) -> Path:
    """Base and SFT model, labelers with their noise, files of rows; the file of prompts."""
    demo.pretrain()
    demo.sft()
    prompts = [row["prompt"] for row in demo.train]
    random.Random(f"loop {demo.seed}").shuffle(prompts)
    some = demo.sample_many(demo.load("sft"), {prompt: COMPLETIONS for prompt in prompts[:150]}, seed=1)
    demo.labelers = set_noise(demo.labelers, demo.world.tasks, some, AGREEMENT["train"])
    demo.judges = set_noise(demo.judges, demo.world.tasks, some, AGREEMENT["heldout"])
    if labels > len(prompts):
        raise InputError(f"--labels {labels}: the world has {len(prompts)} training prompts; take fewer")
    write_rows(({"prompt": prompt} for prompt in prompts), folder / "prompts.jsonl")
    write_rows(({"text": text} for text in demo.web["text"]), folder / "web.jsonl")
    rows = ({name: row[name] for name in ("prompt", "completion")} for row in demo.demonstrations)
    write_rows(rows, folder / "demonstrations.jsonl")
    return folder / "prompts.jsonl"


def measure(demo: Run, policies: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """Of each policy, with its reward model: win rates against SFT and against one round, gold reward, score, KL."""
    sft = demo.load("sft")
    tokenizer = AutoTokenizer.from_pretrained(demo.path("sft"))
    models = {name: AutoModelForCausalLM.from_pretrained(path).eval() for name, (path, _) in policies.items()}
    samples = {name: sample(model, tokenizer, demo.test, MAX_COMPLETION, seed=3) for name, model in models.items()}
    others = {name: sample(model, tokenizer, demo.test, MAX_COMPLETION, seed=4) for name, model in models.items()}
    opponents = sample(sft, tokenizer, demo.test, MAX_COMPLETION, seed=4)
    found = {}
    for name, model in models.items():
        of = samples[name]
        judged = (demo.world.tasks, of)
        scorer = RewardModel.from_pretrained(policies[name][1])
        found[name] = {
            "win_rate_vs_sft": win_rate(*judged, opponents, demo.judges, demo.seed),
            "win_rate_vs_one_round": win_rate(*judged, others["one round"], demo.judges, demo.seed),
            "gold_reward": mean_gold(*judged),
            "score": float(scorer.score_ids(of.prompt_ids, of.completion_ids, batch_size=16).mean()),
            "kl": mean_kl(model, sft, of),
        }
    return found


def draw(found: dict[str, Any], labels: int, file: Path) -> None:
    """Win rates with their intervals, side by side."""
    fig, axes = plt.subplots(1, 2, figsize=(8, 3), sharey=True, layout="constrained")
    for ax, key, title in zip(
        axes, ("win_rate_vs_sft", "win_rate_vs_one_round"), ("against SFT", "against one round"), strict=True
    ):
        for place, of in enumerate(found.values()):
            mean, low, high = of[key]
            ax.plot([low, high], [place, place], color="#2f8f6b", linewidth=3, solid_capstyle="round")
            ax.plot(mean, place, "o", color="#2f8f6b", markersize=8)
            ax.annotate(f"{mean:.1%}", (mean, place), xytext=(0, 9), textcoords="offset points", ha="center")
        ax.axvline(0.5, color="#9aa0a8", linewidth=1)
        ax.set_title(f"held-out labelers prefer it {title}", fontsize=9)
        ax.set_yticks(range(len(found)), list(found))
        ax.set_ylim(len(found) - 0.4, -0.6)
        ax.xaxis.set_major_formatter("{x:.0%}")
        ax.spines[["top", "right"]].set_visible(False)
    fig.suptitle(f"{labels} rankings of {COMPLETIONS} completions, 95 % intervals over prompts", fontsize=9)
    fig.savefig(file, dpi=150)
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--labels", type=int, default=400, help="rankings in all, of either arm; an even number")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/loop"))
    parser.add_argument("--quick", action="store_true", help="a smaller version, for tests")
    args = parser.parse_args()
    quieten()
    settings = QUICK if args.quick else Settings()
    try:
        if args.labels < 2 or args.labels % 2:
            raise InputError(f"--labels {args.labels}: expected an even number, half of it for each round")
        check_output_dir(args.output_dir)
        args.output_dir.mkdir(parents=True, exist_ok=True)
        demo = Run(args.seed, args.output_dir, settings)
        prompts = begin(demo, args.output_dir, args.labels)
        files, rank = settings_of(demo, args.output_dir), labeler_of(demo)
        policies = {}
        for name, rounds in ARMS.items():
            folder = args.output_dir / name.replace(" ", "_")
            loop = Loop(
                sft=demo.path("sft"),
                dataset=prompts,
                output_dir=folder,
                rounds=rounds,
                num_prompts=args.labels // rounds,
                rank=rank,
                **files,
            )
            loop.run()
            for number in range(1, rounds + 1):
                shown = name if number == rounds else f"{name}, the first"
                policies[shown] = tuple(str(loop.folder(number) / part) for part in ("policy", "reward"))
    except InputError as error:
        sys.exit(f"error: {error}")
    found = measure(demo, policies)
    (args.output_dir / "loop.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    draw(found, args.labels, args.output_dir / "loop.png")
    print(f"{'':<24}{'vs SFT':>22}{'vs one round':>22}{'gold':>8}{'score':>8}{'KL':>7}")
    for name, of in found.items():
        rates = [of[key] for key in ("win_rate_vs_sft", "win_rate_vs_one_round")]
        shown = [f"{mean:.1%} [{low:.1%}, {high:.1%}]" for mean, low, high in rates]
        print(f"{name:<24}{shown[0]:>22}{shown[1]:>22}{of['gold_reward']:>8.2f}{of['score']:>8.2f}{of['kl']:>7.1f}")
    print(f"pictures: {args.output_dir / 'loop.png'}")


if __name__ == "__main__":
    main()
