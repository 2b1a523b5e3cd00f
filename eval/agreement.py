"""
How far do labelers agree, with each other and with a reward model that never saw them?

    python eval/agreement.py --labels rankings.jsonl --output agreement.json
    python eval/agreement.py --labels rankings.jsonl --folds runs/folds --output agreement.json -- \
        --model_name_or_path runs/sft --num_train_epochs 1

Rows are rankings with `labeler_id`. Agreement is over pairs of completions of a prompt that two labelers ranked: the
share on which they say the same, with ties and among untied pairs (in InstructGPT 3.4 73 % between training labelers
and 77 % between held-out ones), and Krippendorff's alpha.

`--folds` is the paper's test of generalisation [4.1]: labelers in five groups, five reward models, each trained by
recipes/reward.py (with the flags behind `--`) on four groups and tested on the fifth, and on prompts held out from the
groups it was trained on. A fold that is finished is not trained again.
"""

import argparse
import itertools
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import krippendorff
import numpy as np
from files import cached, check_labeler, key_of, positive, refuse_input, write_json, write_text
from intervals import with_interval
from judges import reward_score

from instructgpt_trl.data import InputError, load_rows

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "reward.py"
HELD_OUT = 0.1  # share of prompts that no reward model of a fold is trained on
Row = dict[str, Any]


def read_labels(file: str) -> list[Row]:
    """
    Rankings, each of a labeler.

    Raises:
        [`InputError`]: a row is no ranking, or has no `labeler_id`.
    """
    rows = list(load_rows(file, "ranking", allow_empty=True))
    lone = next((n for n, row in enumerate(rows, 1) if row.get("labeler_id") is None), None)
    if lone:
        raise InputError(f"{file}, row {lone}: no `labeler_id`; every row needs one")
    for number, row in enumerate(rows, 1):
        check_labeler(row, f"{file}, row {number}")
    return rows


def judgements(rows: Sequence[Row]) -> dict[tuple, dict[str, int]]:
    """
    By pair of completions of a prompt, what each labeler said: 1 the first is better, -1 the second, 0 a tie. The
    completions of a pair are in alphabetical order, since each labeler may have seen another.
    """
    found: dict[tuple, dict[str, int]] = defaultdict(dict)
    for row in rows:
        prompt = key_of(row["prompt"])
        texts = [json.dumps(one, sort_keys=True) for one in row["completions"]]
        ranked = sorted(zip(texts, row["ranks"], strict=True))
        for (a, of_a), (b, of_b) in itertools.combinations(ranked, 2):
            if a != b:
                found[prompt, a, b][row["labeler_id"]] = int(np.sign(of_b - of_a))
    return found


def agreement(rows: Sequence[Row]) -> dict[str, Any]:
    """
    `agreement` and `agreement_untied` with 95 % intervals over prompts, `alpha` (nominal), and how many pairs of
    judgements, of labelers and of completions there were.

    Raises:
        [`InputError`]: no two labelers ranked the same pair.
    """
    same, prompts, untied, untied_prompts = [], [], [], []
    found = {pair: said for pair, said in judgements(rows).items() if len(said) > 1}
    for (prompt, *_), said in found.items():
        for a, b in itertools.combinations(said.values(), 2):
            same.append(a == b)
            prompts.append(prompt)
            if a and b:
                untied.append(a == b)
                untied_prompts.append(prompt)
    if not same:
        raise InputError("no two labelers ranked the same two completions of a prompt; agreement cannot be measured")
    labelers = sorted({name for said in found.values() for name in said}, key=str)
    table = np.array([[said.get(name, np.nan) for said in found.values()] for name in labelers], dtype=float)
    varied = (
        len(np.unique(table[~np.isnan(table)])) > 1
    )  # with one answer alone there is nothing to agree on by chance
    return {
        "agreement": with_interval(same, prompts),
        "agreement_untied": with_interval(untied, untied_prompts) if untied else None,
        "alpha": float(krippendorff.alpha(table, level_of_measurement="nominal")) if varied else None,
        "labelers": len(labelers),
        "pairs": len(found),
        "judgements": len(same),
    }


def groups_of(labelers: Sequence[str], count: int, seed: int) -> list[list[str]]:
    """
    The labelers in `count` groups of sizes that differ by one at most.

    Raises:
        [`InputError`]: there are fewer labelers than groups.
    """
    labelers = sorted(set(labelers), key=str)
    if len(labelers) < count:
        raise InputError(f"{len(labelers)} labelers for {count} groups; expected a labeler a group at least")
    order = np.random.default_rng(seed).permutation(len(labelers))
    return [[labelers[i] for i in order[start::count]] for start in range(count)]


def folds(rows: Sequence[Row], count: int, seed: int) -> Iterator[dict[str, list[Row]]]:
    """
    For each group of labelers: "train", rows of the others but for a tenth of prompts; "same", rows of the others
    on that tenth; "other", rows of the group on prompts that are not in "train". Empty completions are left out.
    """
    rows = [row for row in map(_without_empty, rows) if len(row["ranks"]) > 1]
    groups = groups_of([row["labeler_id"] for row in rows], count, seed)
    prompts = sorted({key_of(row["prompt"]) for row in rows})
    order = np.random.default_rng(seed).permutation(len(prompts))
    held_out = {prompts[i] for i in order[: max(1, round(HELD_OUT * len(prompts)))]}
    for group in groups:
        parts: dict[str, list[Row]] = {"train": [], "same": [], "other": []}
        for row in rows:
            new = key_of(row["prompt"]) in held_out
            if row["labeler_id"] in group:
                parts["other"].append(row)
            else:
                parts["same" if new else "train"].append(row)
        trained_on = {key_of(row["prompt"]) for row in parts["train"]}
        parts["other"] = [row for row in parts["other"] if key_of(row["prompt"]) not in trained_on]
        empty = [name for name, of in parts.items() if not of]
        if empty:
            raise InputError(
                f"a group of {len(group)} labelers leaves no rows of kind {', '.join(empty)}; add prompts"
            )
        yield parts


def _without_empty(row: Row) -> Row:
    """A reward model is trained on texts only, and what is left out is left out of the test too."""
    texts = [one if isinstance(one, str) else "".join(turn["content"] for turn in one) for one in row["completions"]]
    there = [i for i, text in enumerate(texts) if text.strip()]
    return {"labeler_id": row["labeler_id"], "prompt": row["prompt"]} | {
        name: [row[name][i] for i in there] for name in ("completions", "ranks")
    }


def accuracy(score: Any, rows: Sequence[Row]) -> list[float]:
    """Share of untied pairs on which scores say the same, equal ones as half, with its interval over prompts."""
    right, prompts = [], []
    for row in rows:
        scores = score([row["prompt"]] * len(row["completions"]), row["completions"])
        for i, j in itertools.combinations(range(len(scores)), 2):
            better = np.sign(row["ranks"][j] - row["ranks"][i])
            if better:
                right.append(0.5 + 0.5 * better * np.sign(scores[i] - scores[j]))
                prompts.append(key_of(row["prompt"]))
    return with_interval(right, prompts)


def train_folds(rows: Sequence[Row], folder: Path, count: int, seed: int, flags: Sequence[str]) -> dict[str, Any]:
    """Accuracy of each fold's reward model on labelers of its training data and on the others, and their means."""
    found: dict[str, list] = {"same": [], "other": []}
    for number, parts in enumerate(folds(rows, count, seed)):
        of_fold = folder / str(number)

        def measured(parts: dict[str, list[Row]] = parts, of_fold: Path = of_fold) -> dict[str, list[float]]:
            of_fold.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in parts["train"]]
            write_text("".join(lines), of_fold / "train.jsonl")
            given = ["--dataset", str(of_fold / "train.jsonl"), "--output_dir", str(of_fold / "reward"), *flags]
            subprocess.run([sys.executable, str(RECIPE), *given], check=True)
            score = reward_score(str(of_fold / "reward"))
            return {name: accuracy(score, parts[name]) for name in ("same", "other")}

        settings = {"rows": parts, "flags": list(flags)}
        for name, value in cached(of_fold / "accuracy.json", settings, measured).items():
            found[name].append(value)
    return {
        "labelers of the training data": _mean_and_error([value for value, *_ in found["same"]]),
        "labelers held out": _mean_and_error([value for value, *_ in found["other"]]),
        "folds": found,
    }


def _mean_and_error(values: Sequence[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "standard_error": float(np.std(values, ddof=1) / np.sqrt(len(values)))}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", required=True, help="rankings with `labeler_id`: .jsonl, .parquet or a hub id")
    parser.add_argument("--output", required=True, type=Path, help="JSON file to write")
    parser.add_argument("--folds", type=Path, help="folder for the reward models of five-fold cross-validation")
    parser.add_argument("--groups", type=positive, default=5, help="groups of labelers, and so folds")
    parser.add_argument("--seed", type=int, default=0, help="of the groups and of the prompts that are held out")
    parser.add_argument("flags", nargs="*", help="behind `--`: for recipes/reward.py")
    args = parser.parse_args(argv)
    try:
        refuse_input(args.output, args.labels)
        rows = read_labels(args.labels)
        found: dict[str, Any] = {}
        try:
            found["between labelers"] = agreement(rows)
        except InputError as error:  # labelers may have had prompts of their own
            if not args.folds:
                raise
            print(f"note: {error}")
        if args.folds:
            found["reward model"] = train_folds(rows, args.folds, args.groups, args.seed, args.flags)
        write_json(found, args.output)
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(
            f"error: a fold's reward model was not trained (exit status {error.returncode}); see its message above"
        )
    print(json.dumps({k: {n: v for n, v in of.items() if n != "folds"} for k, of in found.items()}, indent=1))
    print(f"agreement: {args.output}")


if __name__ == "__main__":
    main()
