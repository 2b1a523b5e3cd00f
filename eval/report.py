"""
What eval/run.py found, as one self-contained page with plots, a Markdown table and JSON.

    python eval/report.py runs/eval          # writes report.html, report.md and report.json beside the figures

Every part is shown the same way: panels of a few rows, and in a row a figure of each model with its 95 % interval.
"""

import argparse
import base64
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import matplotlib
from files import plain, write_json, write_text
from jinja2 import Environment

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  behind the choice of its backend

LEGEND = "In brackets 95 % intervals by bootstrap, drawn as lines, and behind them of how many a figure is."
COLOURS = ["#8a8f98", "#4477aa", "#cc5a49", "#2f8f6b", "#7a5ea8", "#c08a2d", "#4aa3b8", "#a64d79"]
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8eb",
    "legend.frameon": False,
    "text.parse_math": False,  # a $ in the data is a $
}


class Panel(NamedTuple):
    """
    Figures by row and column, which are the models that have any if none are named: a value, the value and its
    interval, or these and of how many it is. They are drawn as dots, with a line to see them by, if there is no other
    picture.
    """

    part: str
    title: str
    rows: dict[str, dict[str, list[float | None]]]
    line: float | None = None
    columns: list[str] | None = None
    draw: Callable[[BytesIO], None] | None = None

    def names(self, models: list[str]) -> list[str]:
        return self.columns or [name for name in models if any(name in of for of in self.rows.values())]


def panels(parts: dict[str, Any]) -> Iterator[Panel]:
    """Of each finished part of a run."""
    for name, make in PARTS.items():
        if name in parts:
            yield from make(parts[name])


def _preference(found: dict[str, Any]) -> Iterator[Panel]:
    models = {name: of for name, of in found["models"].items() if of["n"]}
    against = f"win rate against {found['baseline']}"
    rows: dict[str, dict] = {"all prompts": {name: _rate(of) for name, of in models.items()}}
    rows["interval over labelers"] = {
        name: [of["win_rate"][0], *of["interval_over_labelers"]]
        for name, of in models.items()
        if "interval_over_labelers" in of
    }
    equal = {name: [of["length_controlled"]] for name, of in models.items() if of["length_controlled"] is not None}
    rows["at equal length"] = equal
    yield Panel("Preference", against, {row: of for row, of in rows.items() if of}, 0.5)
    ties = {name: [of["ties"]] for name, of in models.items()}
    yield Panel("Preference", f"share of ties with {found['baseline']}", {"all prompts": ties})
    for breakdown, title in (("by_category", "by use case"), ("by_group", "by group of labelers")):
        rows = {}
        for name, of in models.items():
            for part, figures in of.get(breakdown, {}).items():
                if figures["n"]:
                    rows.setdefault(part, {})[name] = _rate(figures)
        if rows:
            yield Panel("Preference", f"{against}, {title}", rows, 0.5)
    asked: dict[str, dict] = {}
    for name, of in found.get("means", {}).items():
        for question, figure in of.items():
            asked.setdefault(question, {})[name] = figure
    if "rating" in asked:
        yield Panel("Preference", "rating (1 to 7)", {"rating": asked.pop("rating")})
    if asked:
        yield Panel("Preference", "share of completions of which labelers said so", asked)


def _rate(figures: dict[str, Any]) -> list[float | None]:
    return [*figures["win_rate"], figures["n"]]


def _agreement(found: dict[str, Any]) -> Iterator[Panel]:
    if of := found.get("between labelers"):  # who may have had prompts of their own
        rows = {"all pairs": {"agreement": [*of["agreement"], of["judgements"]]}}
        if of["agreement_untied"]:
            rows["pairs without a tie"] = {"agreement": of["agreement_untied"]}
        if of["alpha"] is not None:
            rows["Krippendorff's alpha"] = {"agreement": [of["alpha"]]}
        title = "between labelers, on pairs of completions that both ranked"
        yield Panel("Agreement", title, rows, columns=["agreement"])
    if folds := found.get("reward model"):
        kinds = {"labelers of the training data": "same", "labelers held out": "other"}
        rows = {row: {f"fold {i + 1}": of for i, of in enumerate(folds["folds"][name])} for row, name in kinds.items()}
        columns = [f"fold {i + 1}" for i in range(len(folds["folds"]["same"]))]
        yield Panel("Agreement", "of reward models with labelers, untied pairs", rows, 0.5, columns)


def _overoptimisation(found: dict[str, Any]) -> Iterator[Panel]:
    from overoptimisation import draw

    rows = {}
    for name, points in (("step", found["run"]), ("best of", found["best_of_n"])):
        for point in points:
            kl = point["kl"] if name == "step" else [point["kl"]]
            row = {"KL (nats)": kl, "reward-model score": point["score"], found["gold"]: point["gold"]}
            rows[f"{name} {point.get('step', point.get('n'))}"] = row
    columns = ["KL (nats)", "reward-model score", found["gold"]]
    title = f"checkpoints of a run, and best-of-n of its start, on {found['prompts']} prompts"
    yield Panel("Overoptimisation", title, rows, None, columns, partial(draw, found))


def _tax(found: dict[str, Any]) -> Iterator[Panel]:
    by_metric: dict[str, dict] = {}
    changes: dict[str, dict] = {}
    for task, metrics in found["tasks"].items():
        for metric, models in metrics.items():
            by_metric.setdefault(metric, {})[task] = {name: [*of["value"], of["n"]] for name, of in models.items()}
            changed = {name: of["change"] for name, of in models.items() if "change" in of}
            if changed:
                changes.setdefault(metric, {})[task] = changed
    names = {"f1": "F1", "em": "exact match", "acc": "accuracy", "bleu": "BLEU", "rougeL": "ROUGE-L"}
    names |= {"loss": "loss (nats a token)"}
    for metric, rows in by_metric.items():
        yield Panel("Alignment tax", names.get(metric, metric), rows)
        if metric in changes:
            title = f"{names.get(metric, metric)}, change against {found['base']}"
            yield Panel("Alignment tax", title, changes[metric], 0.0)


def _bias(found: dict[str, Any]) -> Iterator[Panel]:
    for data, title in (("winogender", "Winogender"), ("crows_pairs", "CrowS-Pairs")):
        for metric, what, line in (
            ("entropy", "entropy of pairs (bits; 1 is no preference)", None),
            ("stereotype_score", "stereotype score (%; 50 is no preference)", 50.0),
        ):
            rows = _by_row(found, lambda of, data=data: of.get(data, {}), metric)
            if rows:
                yield Panel("Bias", f"{title}: {what}", rows, line)


def _truthfulness(found: dict[str, Any]) -> Iterator[Panel]:
    for metric, title in (("true", "true"), ("true_and_informative", "true and informative")):
        rows = _by_row(found, lambda of: of.get("figures", {}), metric)
        if rows:
            yield Panel("Truthfulness", f"TruthfulQA: share {title}", rows)


def _toxicity(found: dict[str, Any]) -> Iterator[Panel]:
    titles = {"toxicity": "mean toxicity", "toxic_share": "share above 0.5", "expected_maximum": "expected maximum"}
    for metric, title in titles.items():
        rows = _by_row(found, lambda of: of, metric, "prompts" if metric == "expected_maximum" else "n")
        if rows:
            yield Panel("Toxicity", f"RealToxicityPrompts: {title}", rows)


def _by_row(found: dict[str, Any], of: Callable[[dict], dict], metric: str, count: str = "n") -> dict[str, dict]:
    """Of figures by model, row and metric, those of one metric by row and model, with the `count` of what they are."""
    rows: dict[str, dict] = {}
    for model, figures in found.items():
        for row, metrics in of(figures).items():
            if metrics.get(metric) is not None:
                rows.setdefault(row, {})[model] = [*metrics[metric], metrics[count]]
    return rows


PARTS: dict[str, Callable[[dict[str, Any]], Iterator[Panel]]] = {
    "preference": _preference,
    "agreement": _agreement,
    "truthfulness": _truthfulness,
    "toxicity": _toxicity,
    "bias": _bias,
    "alignment tax": _tax,
    "overoptimisation": _overoptimisation,
}


def picture(panel: Panel, models: list[str]) -> str:
    """PNG in base64: the panel's own, or dots with intervals for each row, a colour for each column."""
    buffer = BytesIO()
    if panel.draw:
        panel.draw(buffer)
    else:
        _dots(panel, models, buffer)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _dots(panel: Panel, models: list[str], file: BytesIO) -> None:
    shown, known = panel.names(models), panel.columns or models
    with plt.rc_context(STYLE):
        height = 0.75 + len(panel.rows) * (0.16 * len(shown) + 0.16)
        figure, axis = plt.subplots(figsize=(5.4, height), layout="constrained")
        for number, name in enumerate(shown):
            offset = 0.7 * ((number + 0.5) / len(shown) - 0.5)
            points = [(y + offset, of[name]) for y, of in enumerate(panel.rows.values()) if name in of]
            colour = COLOURS[known.index(name) % len(COLOURS)]
            axis.plot(
                [value for _, (value, *_) in points], [y for y, _ in points], "o", color=colour, ms=5, label=name
            )
            for y, (_, *bounds) in points:
                if len(bounds := bounds[:2]) == 2 and None not in bounds:
                    axis.plot(bounds, [y, y], color=colour, linewidth=1.6)
        if panel.line is not None:
            axis.axvline(panel.line, color="#22262b", linewidth=1, linestyle=(0, (4, 3)))
        axis.set_yticks(range(len(panel.rows)), [fill(row, 26) for row in panel.rows])
        axis.set_ylim(len(panel.rows) - 0.5, -0.5)
        axis.grid(axis="y", visible=False)
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1), borderaxespad=0)
        figure.savefig(file, format="png", dpi=140)
        plt.close(figure)


def cells(panel: Panel, models: list[str]) -> dict[str, list[str]]:
    """By row the texts of its columns: to three places, or to one where a figure of the panel is 20 or more."""
    columns = panel.names(models)
    values = [abs(of[name][0] or 0) for of in panel.rows.values() for name in columns if name in of]
    digits = 1 if max(values, default=0) >= 20 else 3
    return {row: [shown(of.get(name), digits) for name in columns] for row, of in panel.rows.items()}


def shown(figure: list[float | None] | None, digits: int) -> str:
    """A figure, its interval, and of how many it is, as text."""
    if not figure or figure[0] is None:
        return ""
    value, bounds, count = figure[0], figure[1:3], figure[3:]
    text = f"{value:.{digits}f}"
    if len(bounds) == 2 and None not in bounds:
        text += f" [{bounds[0]:.{digits}f}, {bounds[1]:.{digits}f}]"
    return text + "".join(f" ({number})" for number in count)


def markdown(found: dict[str, Any], all_panels: list[Panel]) -> str:
    lines = ["# Evaluation", "", *(f"- {name}: `{path}`" for name, path in found["models"].items())]
    lines += ["", LEGEND]
    for panel in all_panels:
        columns = panel.names(list(found["models"]))
        lines += ["", f"## {panel.part}: {panel.title}", "", f"| | {' | '.join(map(_cell, columns))} |"]
        lines.append("|---" * (len(columns) + 1) + "|")
        lines += [f"| {_cell(row)} | {' | '.join(texts)} |" for row, texts in cells(panel, columns).items()]
    if found["notes"]:
        lines += ["", "## Notes", "", *(f"- {note}" for note in found["notes"])]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def write_report(folder: Path, found: dict[str, Any]) -> None:
    """
    Write `report.json`, `report.md` and `report.html`.

    Args:
        found (`dict`): `models`, paths by name; `suite`; `parts`, by name what each script wrote; `notes`.
    """
    found = plain(found)
    all_panels = list(panels(found["parts"]))
    models = list(found["models"])
    page = Environment(autoescape=True).from_string(TEMPLATE)
    rendered = page.render(
        found=found,
        models=models,
        parts=list(dict.fromkeys(panel.part for panel in all_panels)),
        panels=[(panel, picture(panel, models), cells(panel, models)) for panel in all_panels],
        legend=LEGEND,
    )
    write_text(rendered, folder / "report.html")
    write_text(markdown(found, all_panels), folder / "report.md")
    write_json(found, folder / "report.json")


TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Evaluation</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #22262b; background: #f6f7f9; margin: 0 }
main { max-width: 1180px; margin: 0 auto; padding: 32px 24px 64px }
h1 { font-size: 28px; margin: 0 } h2 { font-size: 20px; margin: 36px 0 8px } h3 { font-size: 15px; margin: 0 0 8px }
section { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 520px), 1fr)); gap: 14px }
article { background: #fff; border: 1px solid #e3e6ea; border-radius: 8px; padding: 14px 16px; overflow-x: auto }
img { width: 100%; max-width: 620px } .wide img { max-width: 900px }
table { border-collapse: collapse; width: 100%; font-size: 12.5px; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: 4px 10px 4px 0; border-bottom: 1px solid #edeff2; font-weight: normal }
thead th { color: #555c66 } .wide { grid-column: 1 / -1 } code { overflow-wrap: anywhere }
</style>
<main>
<h1>Evaluation</h1>
<p>{% for name, path in found.models.items() %}{{ name }}: <code>{{ path }}</code><br>{% endfor %}
{{ legend }}</p>
{% if found.notes %}<h2>What did not run, or not in full</h2><article><ul>
{% for note in found.notes %}<li>{{ note }}</li>{% endfor %}</ul></article>{% endif %}
{% for part in parts %}<h2>{{ part }}</h2><section>
{% for panel, png, rows in panels if panel.part == part %}
<article{% if panel.draw %} class="wide"{% endif %}><h3>{{ panel.title }}</h3>
<img alt="{{ panel.title }}" src="data:image/png;base64,{{ png }}">
<table><thead><tr><th></th>{% for name in panel.names(models) %}<th>{{ name }}</th>{% endfor %}</tr></thead><tbody>
{% for row, texts in rows.items() %}<tr><th>{{ row }}</th>
{% for text in texts %}<td>{{ text }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table></article>{% endfor %}</section>{% endfor %}
</main>
</html>
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what eval/run.py wrote")
    folder = parser.parse_args().folder
    file = folder / "report.json"
    if not file.is_file():
        sys.exit(f"error: {file} is not there; expected the output folder of eval/run.py")
    write_report(folder, json.loads(file.read_text(encoding="utf-8")))
    print(f"report: {folder / 'report.html'}")


if __name__ == "__main__":
    main()
