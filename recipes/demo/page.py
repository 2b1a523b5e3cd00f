"""The demo's report: a table on the terminal, `report.json`, and `report.html`, one file with everything in it."""

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

POLICIES = {"base": "base model", "sft": "SFT", "ppo": "PPO", "ppo_ptx": "PPO-ptx"}
COLOURS = {"base": "#8a8f98", "sft": "#4477aa", "ppo": "#cc5a49", "ppo_ptx": "#2f8f6b", "reward_model": "#7a5ea8"}
SHOWN_SAMPLES = 16

STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa0a8",
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#e6e8eb",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.7,
    "figure.dpi": 150,
}


def print_table(results: dict[str, Any]) -> None:
    """Print the report's numbers."""
    reward, labelers = results["reward_model"], results["labelers"]
    print(f"\nlabelers agree on {_percent(labelers['agreement'])} of pairs neither ties, ", end="")
    print(f"held-out labelers on {_percent(labelers['heldout_agreement'])}")
    print(f"reward model: accuracy {_percent(reward['accuracy_train_labelers'])} on training labelers, ", end="")
    print(f"{_percent(reward['accuracy_heldout_labelers'])} on held-out labelers; ", end="")
    print(f"demonstrations score {_zero(reward['demonstration_mean'])} on average\n")
    print(f"{'policy':<12}{'win rate vs SFT':>24}{'gold reward':>13}{'RM score':>10}{'KL':>8}{'pretraining loss':>18}")
    print("-" * 85)
    for name, row in results["policies"].items():
        mean, low, high = row["win_rate_vs_sft"]
        rate = f"{100 * mean:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
        numbers = (
            f"{row['gold_reward']:>13.2f}{row['rm_score']:>10.2f}{row['kl']:>8.2f}{row['pretraining_loss']:>18.3f}"
        )
        print(f"{POLICIES[name]:<12}{rate:>24}{numbers}")
    print()


def write_report(
    results: dict[str, Any],
    curves: dict[str, list[dict[str, float]]],
    samples: list[dict[str, Any]],
    output_dir: Path,
) -> None:
    """
    Write `report.json` and `report.html`.

    Args:
        results (`dict`): what goes into `report.json`: `seed`, `seconds`, `labelers`, `reward_model`, `policies`.
        curves (`dict[str, list[dict]]`): logs of the stages `reward_model`, `ppo` and `ppo_ptx`, a dictionary a log
            line, with `step` in each.
        samples (`list[dict]`): `prompt`, `category`, and for each policy its text and gold reward, as
            `(text, gold)` under the policy's name.
        output_dir (`Path`): folder to write to.
    """
    (output_dir / "report.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (output_dir / "report.html").write_text(_page(results, curves, samples), encoding="utf-8")


# Figures


def _figure(draw, width: float = 4.2, height: float = 2.7) -> str:
    """An `<img>` with the picture that `draw(axes)` makes."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
        draw(axes)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        title = axes.get_title(loc="left")
        plt.close(figure)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'


def _smooth(values: list[float], width: int) -> list[float]:
    """Mean over the last `width` values."""
    return [
        sum(values[max(0, i - width + 1) : i + 1]) / len(values[max(0, i - width + 1) : i + 1])
        for i in range(len(values))
    ]


def _points(curves, metric: str, name: str) -> list[tuple[int, float]]:
    """(step, value) of a metric in the log of a stage."""
    return [(row["step"], row[metric]) for row in curves.get(name, []) if row.get(metric) is not None]


def _curve(curves, metric: str, title: str, names: tuple[str, ...], level: tuple[float, str] | None = None):
    """A drawing of one logged metric against the optimizer steps, one line a stage, smoothed over a pale original."""

    def draw(axes) -> None:
        for name in names:
            points = _points(curves, metric, name)
            if not points:
                continue
            steps, values = zip(*points, strict=True)
            width = max(1, len(values) // 12)
            if width > 1:
                axes.plot(steps, values, color=COLOURS[name], alpha=0.22, linewidth=1)
            label = POLICIES.get(name, "reward model")
            axes.plot(steps, _smooth(list(values), width), color=COLOURS[name], label=label)
        if level is not None:
            axes.axhline(level[0], color=COLOURS["sft"], linewidth=1, linestyle=(0, (4, 3)), label=level[1])
        axes.set_title(title)
        axes.set_xlabel("optimizer step")
        axes.legend(fontsize=8)

    return draw


def _win_rates(policies: dict[str, Any]):
    def draw(axes) -> None:
        names = [name for name in POLICIES if name in policies]
        for row, name in enumerate(names):
            mean, low, high = (100 * value for value in policies[name]["win_rate_vs_sft"])
            axes.barh(row, mean, height=0.58, color=COLOURS[name])
            axes.plot([low, high], [row, row], color="#22262b", linewidth=1.6)
            axes.text(high + 1.5, row, f"{mean:.0f} %", va="center", fontsize=9)
        axes.axvline(50, color="#22262b", linewidth=1, linestyle=(0, (4, 3)))
        axes.set_yticks(range(len(names)), [POLICIES[name] for name in names])
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.grid(axis="y", visible=False)
        axes.set_title("win rate against SFT, held-out labelers (%)")

    return draw


def _tax(policies: dict[str, Any]):
    def draw(axes) -> None:
        names = [name for name in ("sft", "ppo", "ppo_ptx") if name in policies]
        start = policies["sft"]["pretraining_loss"]
        rises = [policies[name]["pretraining_loss"] - start for name in names]
        axes.bar(range(len(names)), rises, width=0.58, color=[COLOURS[name] for name in names])
        for place, rise in enumerate(rises):
            axes.annotate(
                f"{rise:+.3f}", (place, rise), (0, 3 if rise >= 0 else -11), textcoords="offset points", ha="center"
            )
        axes.axhline(0, color="#22262b", linewidth=1)
        axes.set_xticks(range(len(names)), [POLICIES[name] for name in names])
        axes.grid(axis="x", visible=False)
        axes.margins(y=0.18)
        axes.set_title("rise of pretraining loss over SFT (nats a token)")

    return draw


# Page


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _zero(value: float) -> str:
    """Four decimals, without the sign of a rounded zero."""
    return f"{round(value, 4) + 0.0:.4f}"


def _page(results: dict[str, Any], curves: dict[str, list[dict[str, float]]], samples: list[dict[str, Any]]) -> str:
    policies, reward = results["policies"], results["reward_model"]
    start = (policies["sft"]["pretraining_loss"], "SFT")
    both = ("ppo", "ppo_ptx")
    curve_plots = [
        ("objective/scores", "reward-model score of the samples", both),
        ("objective/kl", "KL to SFT (nats a completion)", both),
        ("pretraining_loss", "pretraining loss on held-out text (nats a token)", both, start),
        ("value/explained_variance", "value model: explained variance", both),
        ("accuracy", "reward model: accuracy on its rankings", ("reward_model",)),
        ("completions/mean_length", "mean length of the samples (tokens)", both),
    ]
    tiles = [
        (_percent(policies["ppo_ptx"]["win_rate_vs_sft"][0]), "PPO-ptx beats SFT"),
        (_percent(policies["ppo"]["win_rate_vs_sft"][0]), "PPO beats SFT"),
        (_percent(reward["accuracy_heldout_labelers"]), "reward model agrees with held-out labelers"),
        (f"{policies['ppo']['pretraining_loss'] - start[0]:+.3f}", "pretraining loss, PPO over SFT"),
        (f"{policies['ppo_ptx']['pretraining_loss'] - start[0]:+.3f}", "the same, PPO-ptx"),
    ]
    return TEMPLATE.format(
        seed=results["seed"],
        seconds=f"{results['seconds'].get('total', 0):.0f}",
        tiles="".join(
            f"<div class=tile><b>{value}</b><span>{html.escape(text)}</span></div>" for value, text in tiles
        ),
        table=_table(policies),
        bars=_figure(_win_rates(policies), 5.6, 2.5) + _figure(_tax(policies), 5.6, 2.5),
        figures="".join(
            _figure(_curve(curves, metric, title, names, *level))
            for metric, title, names, *level in curve_plots
            if any(_points(curves, metric, name) for name in names)
        ),
        facts=_facts(results),
        samples=_samples(samples),
        stages=_stages(results["seconds"]),
    )


def _table(policies: dict[str, Any]) -> str:
    rows = []
    for name, row in policies.items():
        mean, low, high = row["win_rate_vs_sft"]
        cells = [
            f"{100 * mean:.1f} <small>[{100 * low:.1f}, {100 * high:.1f}]</small>",
            f"{row['gold_reward']:.2f}",
            f"{row['rm_score']:.2f}",
            f"{row['kl']:.2f}",
            f"{row['pretraining_loss']:.3f}",
        ]
        dot = f'<i style="background:{COLOURS[name]}"></i>'
        rows.append(f"<tr><th>{dot}{POLICIES[name]}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return "".join(rows)


def _facts(results: dict[str, Any]) -> str:
    reward, labelers = results["reward_model"], results["labelers"]
    facts = [
        ("two training labelers agree on", _percent(labelers["agreement"]), "72.6 %"),
        ("two held-out labelers agree on", _percent(labelers["heldout_agreement"]), "77.3 %"),
        ("reward model, training labelers", _percent(reward["accuracy_train_labelers"]), "72.4 %"),
        ("reward model, held-out labelers", _percent(reward["accuracy_heldout_labelers"]), "69.6 %"),
        ("mean score of demonstrations", _zero(reward["demonstration_mean"]), "0"),
    ]
    return "".join(f"<tr><th>{name}</th><td>{here}</td><td>{paper}</td></tr>" for name, here, paper in facts)


def _samples(samples: list[dict[str, Any]]) -> str:
    rows = []
    for row in samples[:SHOWN_SAMPLES]:
        cells = []
        for name in POLICIES:
            text, gold = row[name]
            shown = html.escape(text) if text.strip() else "<em>(nothing)</em>"
            cells.append(f"<td>{shown}<small>{gold:+.1f}</small></td>")
        prompt = (
            f"<th>{html.escape(row['prompt'])}<small>{html.escape(row['category'].replace('_', ' '))}</small></th>"
        )
        rows.append(f"<tr>{prompt}{''.join(cells)}</tr>")
    return "".join(rows)


def _stages(seconds: dict[str, float]) -> str:
    parts = [
        f"{html.escape(name.replace('_', ' '))} {value:.0f} s" for name, value in seconds.items() if name != "total"
    ]
    return ", ".join(parts)


TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>InstructGPT in miniature, seed {seed}</title>
<style>
:root {{ color-scheme: light; }}
body {{ font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  color: #22262b; background: #f6f7f9; margin: 0; }}
main {{ max-width: 1180px; margin: 0 auto; padding: 32px 24px 64px; }}
h1 {{ font-size: 28px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }}
h2 {{ font-size: 18px; margin: 40px 0 10px; }}
p {{ max-width: 78ch; margin: 0 0 10px; }}
.lead {{ color: #555c66; }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px; margin: 22px 0 8px; }}
.tile {{ background: #fff; border: 1px solid #e3e6ea; border-radius: 8px; padding: 14px 16px; }}
.tile b {{ display: block; font-size: 24px; line-height: 1.2; font-variant-numeric: tabular-nums; }}
.tile span {{ color: #555c66; font-size: 13px; }}
.card {{ background: #fff; border: 1px solid #e3e6ea; border-radius: 8px; padding: 8px 16px; overflow-x: auto; }}
.grid {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(330px, 1fr)); gap: 12px; }}
.grid img {{ width: 100%; background: #fff; border: 1px solid #e3e6ea; border-radius: 8px; box-sizing: border-box;
  padding: 8px; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ text-align: left; vertical-align: top; padding: 7px 14px 7px 0; border-bottom: 1px solid #edeff2;
  font-weight: normal; }}
tr:last-child th, tr:last-child td {{ border-bottom: 0; }}
thead th {{ color: #555c66; font-size: 13px; }}
.numbers td, .numbers thead th + th {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }}
.numbers tbody th {{ font-weight: 600; white-space: nowrap; }}
i {{ display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 8px; }}
small {{ color: #6b727c; font-size: 12px; }}
.samples td, .samples tbody th {{ width: 20%; min-width: 150px; font-size: 13.5px; line-height: 1.42; }}
.samples tbody th {{ font-weight: 600; }}
.samples small {{ display: block; margin-top: 2px; font-weight: normal; }}
</style>
<main>
<h1>InstructGPT in miniature</h1>
<p class="lead">Seed {seed}, {seconds} seconds on this machine's CPU. Everything here was made by one command, from
code: the world, its text, the labelers and five models of about a million parameters.</p>
<div class="tiles">{tiles}</div>

<h2>Policies</h2>
<p>Win rates are on prompts of users whom no model has seen, judged by labelers who ranked nothing for training, with
the 95&nbsp;% bootstrap interval over prompts; a tie counts a half. The gold reward is the labelers' common ground
before their taste and noise, in standard deviations. KL is to the SFT model, in nats a completion.</p>
<div class="card"><table class="numbers"><thead><tr><th>policy</th><th>win rate vs SFT, %</th><th>gold reward</th>
<th>RM score</th><th>KL</th><th>pretraining loss</th></tr></thead><tbody>{table}</tbody></table></div>
<p></p>
<div class="grid">{bars}</div>

<h2>Training</h2>
<p>PPO and PPO-ptx start from the same SFT model, follow the same reward model for the same number of steps and differ
in one thing: PPO-ptx adds the gradient of the pretraining loss to each step. Reward rises in both; in PPO alone the
model also forgets the text that it was pretrained on, the paper's alignment tax. Pale lines are single log lines.</p>
<div class="grid">{figures}</div>

<h2>Labelers and reward model</h2>
<p>Each labeler scores with the gold reward by weights of his own, plus noise, which is set on answers to training
prompts so that two of them agree about as often as people do; near-equal answers tie. Agreement, measured on held-out
prompts, counts the pairs that neither ties. The paper's numbers are for people and a model of 6B parameters.</p>
<div class="card"><table class="numbers"><thead><tr><th></th><th>here</th><th>paper</th></tr></thead>
<tbody>{facts}</tbody></table></div>

<h2>Samples</h2>
<p>One sample each at temperature 1 for held-out prompts, with its gold reward.</p>
<div class="card"><table class="samples"><thead><tr><th>prompt</th><th>base model</th><th>SFT</th><th>PPO</th>
<th>PPO-ptx</th></tr></thead><tbody>{samples}</tbody></table></div>

<h2>Time</h2>
<p>{stages}.</p>
</main>
</html>
"""
