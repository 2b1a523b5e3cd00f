"""
How often is a policy's completion preferred to a baseline's?

    python eval/win_rate.py --completions sft=sft.jsonl ppo=ppo.jsonl --baseline sft --judge reward_model:runs/reward \
        --output win_rate.json
    python eval/win_rate.py --completions sft=sft.jsonl ppo=ppo.jsonl --baseline sft --labels labels.jsonl \
        --output win_rate.json

Rows of a completions file have `prompt` and `completion`, and `category` for a breakdown; the n-th completion of a
prompt is compared with the n-th of the baseline. A tie counts as half. Judges: see judges.py; an endpoint is asked in
both orders, a function in one.

Rows of a labels file are rankings with `models` (names as above, one for each of `ranks`) and `labeler_id`. Without
`models` a completion is of the models in whose file it stands for its prompt, and others are left out. `group`
("training", "held_out") parts labelers. Of each completion `ratings` (1 to 7) and `metadata` (questions answered true
or false) are averaged.

Intervals are 95 %, by bootstrap over prompts, and over labelers where there are several. The length-controlled rate is
that at equal length by a logistic regression on the difference in length [Dubois et al. 2024, without their term for
how hard an instruction is].
"""

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from files import check_labeler, key_of, named, refuse_input, said, write_json
from intervals import bounds, interval, with_interval
from judges import Comparison, Judge, make_judge

from instructgpt_trl.data import InputError, load_rows

Row = dict[str, Any]
FEWEST = 50  # comparisons, of which the rate at equal length is worked out


class Preference(NamedTuple):
    """How much a model's completion was preferred to the baseline's, 0 to 1, by whom, and how much longer it was."""

    prompt: str
    value: float
    longer: int
    category: str | None = None
    labeler: str | None = None
    group: str | None = None


def read_completions(file: str) -> dict[tuple[str, int], Row]:
    """Rows by prompt and number among the rows of that prompt."""
    rows, seen, found = load_completions(file), Counter(), {}
    for row in rows:
        key = key_of(row["prompt"])
        found[key, seen[key]] = row
        seen[key] += 1
    return found


def load_completions(file: str) -> list[Row]:
    """
    Rows with `prompt` and `completion`.

    Raises:
        [`InputError`]: a row has no text for a completion, which may be empty.
    """
    try:
        rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: expected JSON Lines of completions ({error})") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not row.get("prompt") or not isinstance(row.get("completion"), str):
            raise InputError(f"{file}, row {number}: expected `prompt` and a text `completion`")
        check_category(row, f"{file}, row {number}")
    if not rows:
        raise InputError(f"{file}: no rows")
    return rows


FAILED = "judgements failed or were no answer, and are left out"


def compare(models: dict[str, dict], baseline: str, judge: Judge) -> tuple[dict[str, list[Preference]], list[str]]:
    """Preferences of each model but the baseline, and what went wrong."""
    found, problems = {}, []
    for name in models:
        if name == baseline:
            continue
        common = [key for key in models[name] if key in models[baseline]]
        left = len(models[name]) + len(models[baseline]) - 2 * len(common)
        if left:
            problems.append(
                f"{name}: {left} completions of prompts that {name} and {baseline} do not share are left out"
            )
        rows = [(models[name][key], models[baseline][key]) for key in common]
        try:
            values = judge([Comparison(own["prompt"], own["completion"], of["completion"]) for own, of in rows])
        except (Exception, SystemExit) as error:  # the other models may be judged
            problems.append(f"{name}: {said(error)}")
            found[name] = []
            continue
        failed = sum(value is None for value in values)
        if failed:
            problems.append(f"{name}: {failed} of {len(rows)} {FAILED}")
        found[name] = [
            Preference(key, value, len(own["completion"]) - len(of["completion"]), own.get("category"))
            for (key, _), (own, of), value in zip(common, rows, values, strict=True)
            if value is not None
        ]
    return found, problems


def by_labelers(
    rows: Sequence[Row], models: dict[str, dict], baseline: str
) -> tuple[dict[str, list[Preference]], list[str]]:
    """
    Preferences of each model but the baseline, of every labeler who ranked both, and what was left out. Of several
    completions of one of them each is compared with each of the other.
    """
    found: dict[str, list[Preference]] = {name: [] for name in models if name != baseline}
    lone = 0
    for row in rows:
        ranked = list(zip(row["models"], row["ranks"], map(_text, row["completions"]), strict=True))
        pairs = [(own, of) for own in ranked if own[0] in found for of in ranked if of[0] == baseline]
        lone += not pairs
        for (name, rank, text), (_, rank_of_baseline, baselines) in pairs:
            value = (rank < rank_of_baseline) + 0.5 * (rank == rank_of_baseline)
            where = (row.get("category"), row.get("labeler_id"), row.get("group"))
            found[name].append(Preference(key_of(row["prompt"]), value, len(text) - len(baselines), *where))
    return found, [f"{lone} rankings without a model and {baseline} are left out"] * bool(lone)


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else "".join(turn["content"] for turn in completion)


def with_models(rows: Sequence[Row], models: dict[str, dict]) -> tuple[list[Row], list[str]]:
    """
    Rows that name no `models` with those of their completions: each is of every model that said it to the prompt,
    once where the row has it twice, and one that none said is left out, and counted.
    """
    who: dict[tuple[str, str], set[str]] = defaultdict(set)
    for name, of in models.items():
        for (prompt, _), row in of.items():
            who[prompt, row["completion"]].add(name)
    found, unknown = [], 0
    for row in rows:
        if not row.get("models"):
            texts = list(map(_text, row["completions"]))
            said_by = [sorted(who.get((key_of(row["prompt"]), text), ())) for text in texts]
            unknown += said_by.count([])
            places = [(i, name) for i, names in enumerate(said_by) if texts.index(texts[i]) == i for name in names]
            own = [name for name in ("completions", "ranks", "ratings", "metadata") if row.get(name)]
            row = {
                **row,
                "models": [name for _, name in places],
                **{one: [row[one][i] for i, _ in places] for one in own},
            }
        found.append(row)
    return found, [f"{unknown} completions that labelers ranked are in no file, and are left out"] * bool(unknown)


def read_labels(file: str) -> list[Row]:
    """
    Rankings, of which a completion may be empty.

    Raises:
        [`InputError`]: where they are there, `models`, ratings or metadata are not one for each of the ranks.
    """
    rows = list(load_rows(file, "ranking", allow_empty=True))
    for number, row in enumerate(rows, 1):
        count = len(row["ranks"])
        where = f"{file}, row {number}"
        for name, kind in (("models", str), ("ratings", int | float | None), ("metadata", dict | None)):
            values = row.get(name)
            if values is not None and not (
                isinstance(values, list) and len(values) == count and all(isinstance(one, kind) for one in values)
            ):
                raise InputError(f"{where}: expected `{name}`, one for each of the {count} ranks")
        if len(set(row.get("models") or ())) < len(row.get("models") or ()):
            raise InputError(f"{where}: expected each of `models` once, found {', '.join(row['models'])}")
        answers = [answer for one in row.get("metadata") or () for answer in (one or {}).values()]
        if any(answer not in (True, False, None) for answer in answers):
            raise InputError(f"{where}: expected true or false for each question of `metadata`, found {answers}")
        check_category(row, where)
        check_labeler(row, where)
        if any(one is not None and not 1 <= one <= 7 for one in row.get("ratings") or ()):
            raise InputError(f"{file}, row {number}: expected `ratings` from 1 to 7, found {row['ratings']}")
    return rows


def check_category(row: Row, where: str) -> None:
    if not isinstance(row.get("category"), str | None):
        raise InputError(f"{where}: expected a text for `category`, found {row['category']}")


def summary(preferences: Sequence[Preference]) -> dict[str, Any]:
    """Win rate with intervals, ties, length-controlled rate; by category and by group of labelers."""
    found = _rate(preferences)
    for name in ("category", "group"):
        parts = defaultdict(list)
        for one in preferences:
            parts[getattr(one, name)].append(one)
        if set(parts) - {None}:
            found[f"by_{name}"] = {part or "none": _rate(of) for part, of in parts.items()}
    return found


def _rate(preferences: Sequence[Preference]) -> dict[str, Any]:
    values = [one.value for one in preferences]
    if not values:
        return {"n": 0}
    labelers = {one.labeler for one in preferences}
    return {
        "win_rate": with_interval(values, [one.prompt for one in preferences]),
        **(
            {"interval_over_labelers": list(interval(values, [one.labeler for one in preferences]))}
            if len(labelers) > 1
            else {}
        ),
        "length_controlled": length_controlled(values, [one.longer for one in preferences]),
        "ties": float(np.mean([value == 0.5 for value in values])),
        "n": len(values),
        "prompts": len({one.prompt for one in preferences}),
    }


def length_controlled(values: Sequence[float], longer: Sequence[int]) -> float | None:
    """
    Win rate at equal length: sigmoid(a) of the logistic regression P(preferred) = sigmoid(a + b tanh(d / s)), where d
    is how much longer the completion is and s the standard deviation of d. A tie is half a win and half a loss. None
    of fewer than 50 values, where everything was won or lost, where lengths never differ, and where length alone tells
    wins from losses, so that there is no such rate to be found.

    Source: https://github.com/tatsu-lab/alpaca_eval/blob/v0.6.6/src/alpaca_eval/metrics/glm_winrate.py
    """
    from sklearn.linear_model import LogisticRegression

    values, longer = np.asarray(values, dtype=float), np.asarray(longer, dtype=float)
    spread = longer.std()
    if len(values) < FEWEST or not spread or min(values.sum(), (1 - values).sum()) == 0:
        return None
    x = np.tanh(longer / spread)
    won, lost = x[values > 0], x[values < 1]
    if won.min() >= lost.max() or won.max() <= lost.min():
        return None
    both = np.concatenate([x, x])[:, None]
    wins = np.repeat([1, 0], len(values))
    fitted = LogisticRegression(C=1e4).fit(both, wins, sample_weight=np.concatenate([values, 1 - values]))
    return float(1 / (1 + np.exp(-fitted.intercept_[0])))


def ratings_and_metadata(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Of each model: the mean rating and the share of `true` answers to each question, with intervals over prompts."""
    found: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        key = key_of(row["prompt"])
        for i, name in enumerate(row["models"]):
            if row.get("ratings") and row["ratings"][i] is not None:
                found[name]["rating"].append((row["ratings"][i], key))
            for question, answer in ((row.get("metadata") or {}) and row["metadata"][i] or {}).items():
                if answer is not None:
                    found[name][question].append((float(answer), key))
    return {
        name: {what: [*with_interval(*zip(*of, strict=True)), len(of)] for what, of in parts.items()}
        for name, parts in found.items()
    }


def table(found: dict[str, Any], baseline: str) -> str:
    lines = [f"{'model':<16} {'n':>5} {'win rate':>9}  {'95 % interval':<16} {'ties':>5}  at equal length"]
    for name, of in found.items():
        if not of["n"]:
            lines.append(f"{name:<16} {0:5}  nothing to compare")
            continue
        value, low, high = of["win_rate"]
        equal = "" if of["length_controlled"] is None else f"{of['length_controlled']:.3f}"
        lines.append(f"{name:<16} {of['n']:5} {value:9.3f}  {bounds(low, high):<16} {of['ties']:5.2f}  {equal}")
    return "\n".join([*lines, f"against {baseline}; a tie counts as half"])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--completions", required=True, nargs="+", metavar="NAME=FILE", help="two or more")
    parser.add_argument("--baseline", required=True, help="name of one of them")
    parser.add_argument("--judge", help="reward_model:DIR, openai:MODEL@URL or python:FILE.py:FUNCTION (not swapped)")
    parser.add_argument("--labels", help="rankings by labelers, instead of a judge")
    parser.add_argument("--output", required=True, type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    try:
        write_json(run(args), args.output)
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"win rates: {args.output}")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Read, compare, and print the table; what is written."""
    files = named(args.completions, "--completions")
    if len(files) < 2 or args.baseline not in files:
        raise InputError(f"--baseline {args.baseline}: expected one of two or more --completions ({', '.join(files)})")
    if (args.judge is None) == (args.labels is None):
        raise InputError("expected --judge or --labels, one of them")
    refuse_input(args.output, *files.values(), args.labels, args.judge)
    models = {name: read_completions(file) for name, file in files.items()}
    more: dict[str, Any] = {}
    if args.labels:
        rows, unknown = with_models(read_labels(args.labels), models)
        preferences, problems = by_labelers(rows, models, args.baseline)
        problems = [*unknown, *problems]
        if means := ratings_and_metadata(rows):
            more["means"] = means
    else:
        judge = make_judge(args.judge, keep=args.output.with_suffix(".judgements.jsonl"))
        preferences, problems = compare(models, args.baseline, judge)
    found = {name: summary(of) for name, of in preferences.items()}
    print(table(found, args.baseline))
    for problem in problems:
        print(f"note: {problem}")
    if not any(of["n"] for of in found.values()):
        raise InputError(f"nothing to compare: {'; '.join(problems) or 'no labeler ranked a model and the baseline'}")
    failed = any(FAILED in problem for problem in problems) or any(not of["n"] for of in found.values())
    of = {"baseline": args.baseline, "judge": args.judge or args.labels, "models": found, **more}
    return {**of, "notes": problems, "failed": failed}


if __name__ == "__main__":
    main()
