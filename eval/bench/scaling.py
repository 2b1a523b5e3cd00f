"""
How time and memory grow: of a reward-model step with K, prompt and completion length, of a PPO update with batch,
completion length, model size and vocabulary. Prints a table of exponents and draws the measurements, log against log.

    python eval/bench/scaling.py --png scaling.png --json scaling.json
    python eval/bench/scaling.py --quick

One size is changed at a time from a Llama of 13M weights (LoRA in PPO, all weights in the reward model, both with
gradient checkpointing, float32). Time is the median of the repeats behind a first one; memory is the most bytes of
tensors alive at once, weights that were loaded aside (`instructgpt_trl.peak_memory.traced_peak`). An exponent is the
slope of the straight line through the logarithms: 1 where twice the size takes twice as much, less where something
does not grow.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from bench import make_model, make_stages
from datasets import disable_progress_bars
from ppo_side import Clock, ours
from reward_step import ranking, step_of, trainer_of
from tqdm import tqdm
from transformers import PrinterCallback

from instructgpt_trl import RewardConfig, RewardTrainer
from instructgpt_trl.peak_memory import traced_peak

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  behind the choice of its backend

MB = 2**20
SHAPE = {"vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6}
SHAPE |= {"num_attention_heads": 6, "num_key_value_heads": 2}
REWARD = {"k": 4, "prompt": 128, "completion": 64}
PPO = {"batch": 8, "prompt": 64, "completion": 32}
AXES = {
    "reward step": {"k": [3, 6, 12, 24], "prompt": [128, 256, 512, 1024], "completion": [32, 64, 128, 256]},
    "PPO update": {
        "batch": [4, 8, 16, 32],
        "completion": [32, 64, 128, 256],
        "layers": [3, 6, 12, 24],
        "vocabulary": [8192, 16384, 32768, 65536],
    },
}
QUICK = {"reward step": {"k": [2, 4]}, "PPO update": {"batch": [2, 4]}}
Measured = tuple[float, int]  # seconds, bytes


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each size")
    parser.add_argument("--quick", action="store_true", help="two sizes of two axes, a model of one layer")
    parser.add_argument("--png", default="runs/bench/scaling.png", help="picture")
    parser.add_argument("--json", help="file for the figures")
    return parser.parse_args()


def reward_step(shape: dict[str, int], folder: Path, repeats: int, k: int, prompt: int, completion: int) -> Measured:
    row = ranking(shape["vocab_size"], k, prompt, completion)
    trainer = trainer_of(RewardTrainer, RewardConfig, make_model(folder, shape), [row], "float32", prefix_sharing="on")
    step = step_of(trainer, 1)
    return median_seconds(step, repeats), traced_peak(step)


def median_seconds(step: Callable[[], Any], repeats: int) -> float:
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def ppo_update(
    shape: dict[str, int], folder: Path, repeats: int, batch: int, prompt: int, completion: int
) -> Measured:
    base = make_model(folder / "base", shape)
    sft, reward = make_stages(base, folder, full=False)
    setting = {"base": str(base), "sft": sft, "reward": reward, "full": False, "bits": None, "ptx": False}
    setting |= {"checkpointing": True, "dtype": "float32", "batch": batch, "prompt": prompt, "completion": completion}
    clock = Clock()
    timed, traced = (ours({**setting, "updates": n}, str(folder), clock) for n in (repeats + 1, 1))
    for trainer in (timed, traced):
        trainer.remove_callback(PrinterCallback)
    timed.train()
    seconds = statistics.median(clock.seconds[1:])
    return seconds, traced_peak(traced.train)


def measure(step: str, axis: str, size: int, args: argparse.Namespace) -> Measured:
    """One size of a step, all others as they are without."""
    shape = {**SHAPE, "num_hidden_layers": 1 if args.quick else SHAPE["num_hidden_layers"]}
    shape |= {name: size for name in [{"layers": "num_hidden_layers", "vocabulary": "vocab_size"}.get(axis)] if name}
    sizes = REWARD if step == "reward step" else PPO
    sizes = {**sizes, **({axis: size} if axis in sizes else {})}
    with tempfile.TemporaryDirectory() as folder:
        run = reward_step if step == "reward step" else ppo_update
        return run(shape, Path(folder), 1 if args.quick else args.repeats, **sizes)


def exponent(sizes: list[int], amounts: list[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(amounts), 1)[0])


def draw(found: dict[tuple[str, str], tuple[list[int], list[Measured]]], file: Path) -> None:
    figure, panels = plt.subplots(2, len(found), figsize=(3 * len(found), 6), squeeze=False, layout="constrained")
    for column, ((step, axis), (sizes, measured)) in enumerate(found.items()):
        for row, (what, scale) in enumerate((("seconds", 1), ("MB", MB))):
            amounts = [one[row] / scale for one in measured]
            panel = panels[row, column]
            panel.loglog(sizes, amounts, "o-", color="C0")
            start = amounts[-1] / sizes[-1]
            panel.loglog(sizes, [start * size for size in sizes], ":", color="0.6")  # as the size
            panel.set_xticks(sizes, [f"{size:,}" for size in sizes])
            panel.minorticks_off()
            panel.set_xlabel(axis)
            panel.set_ylabel(what)
            panel.set_title(f"{step}: {exponent(sizes, amounts):.2f}")
    figure.suptitle("Growth and its exponents; dotted: as the size")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def main() -> None:
    args = arguments()
    disable_progress_bars()
    axes = QUICK if args.quick else AXES
    todo = [(step, axis, size) for step, of in axes.items() for axis, sizes in of.items() for size in sizes]
    found: dict[tuple[str, str], tuple[list[int], list[Measured]]] = {}
    for step, axis, size in tqdm(todo, desc="sizes"):
        sizes, measured = found.setdefault((step, axis), ([], []))
        sizes.append(size)
        measured.append(measure(step, axis, size, args))
    print(f"{'':>12}  {'grows with':<10}  {'from':>6} {'to':>6}  {'seconds':>14}  {'MB':>12}  exponents")
    rows = []
    for (step, axis), (sizes, measured) in found.items():
        seconds, memory = zip(*measured, strict=True)
        row = {"step": step, "axis": axis, "sizes": sizes, "seconds": seconds, "bytes": memory}
        rows.append(row | {"of_time": exponent(sizes, seconds), "of_memory": exponent(sizes, memory)})
        print(
            f"{step:>12}  {axis:<10}  {sizes[0]:6} {sizes[-1]:6}  {seconds[0]:6.2f} {seconds[-1]:7.2f}  "
            f"{memory[0] / MB:5.0f} {memory[-1] / MB:6.0f}  {rows[-1]['of_time']:.2f} {rows[-1]['of_memory']:.2f}"
        )
    draw(found, Path(args.png))
    print(f"picture: {args.png}")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
