"""
The curves of a finished run as one picture, from the `trainer_state.json` that every recipe leaves.

    python eval/curves.py runs/ppo_ptx        # writes runs/ppo_ptx/curves.png

Works for all three stages: a panel for each metric below that the run logged, training and evaluation in one panel.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Logged metric: what it is, and its unit
PANELS = {
    "objective/scores": "score of the completions",
    "objective/kl": "KL to the reference (nats a completion)",
    "objective/entropy": "entropy (nats a token)",
    "value/explained_variance": "value model: explained variance",
    "loss/ptx": "pretraining loss (nats a token)",
    "grad_norm/policy": "norm of the policy's gradient",
    "grad_norm/ptx": "norm of the pretraining gradient",
    "completions/mean_length": "length of the completions (tokens)",
    "accuracy": "accuracy on untied pairs",
    "margin": "margin of the better completion",
    "score_std": "standard deviation of the scores",
    "rm_score": "reward-model score of greedy completions",
    "loss": "loss (nats)",
}
TRAIN, EVAL = "#4477aa", "#cc5a49"
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e8eb",
    "legend.frameon": False,
}


def curve(log: list[dict], metric: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric where it was logged, and is a number."""
    points = [(row["step"], row[metric]) for row in log if isinstance(row.get(metric), int | float)]
    points = [(step, value) for step, value in points if math.isfinite(value)]
    return [step for step, _ in points], [value for _, value in points]


def draw(log: list[dict], output: Path) -> list[str]:
    """
    Draw a panel for each metric of `PANELS` that `log` holds, under its own name or with `eval_`.

    Args:
        log (`list[dict]`): `log_history` of a `TrainerState`: a dictionary a log line, each with `step`.
        output (`Path`): PNG file to write.

    Returns:
        `list[str]`: the metrics that were drawn. Without any nothing is written.
    """
    found = [name for name in PANELS if curve(log, name)[0] or curve(log, f"eval_{name}")[0]]
    if "objective/scores" in found and "loss" in found:
        found.remove("loss")  # PPO's loss is a sum of parts that have their own panels
    if not found:
        return found
    columns = min(3, len(found))
    rows = math.ceil(len(found) / columns)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            rows, columns, figsize=(4.2 * columns, 2.7 * rows), layout="constrained", squeeze=False
        )
        for panel, name in zip(axes.flat, found, strict=False):
            for metric, colour, label, marker in (
                (name, TRAIN, "training", None),
                (f"eval_{name}", EVAL, "held out", "o"),
            ):
                steps, values = curve(log, metric)
                if steps:
                    panel.plot(steps, values, color=colour, label=label, marker=marker, markersize=4, linewidth=1.6)
            panel.set_title(PANELS[name])
            panel.set_xlabel("optimizer step")
            panel.legend()
        for panel in axes.flat[len(found) :]:
            panel.axis("off")
        figure.savefig(output, dpi=130)
        plt.close(figure)
    return found


def main() -> None:
    """Read the command line, draw, and say where the picture is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output folder of a recipe")
    parser.add_argument("--output", type=Path, help="PNG file; curves.png in the run's folder if not given")
    options = parser.parse_args()
    state = options.run / "trainer_state.json"
    if not state.is_file():
        sys.exit(f"error: {state} is not there; expected the output folder of a recipe, or of trainer.save_state()")
    output = options.output or options.run / "curves.png"
    if not draw(json.loads(state.read_text(encoding="utf-8"))["log_history"], output):
        sys.exit(f"error: {state} holds none of the metrics {', '.join(PANELS)}")
    print(f"curves: {output}")


if __name__ == "__main__":
    main()
