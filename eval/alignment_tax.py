"""
What did alignment cost? The paper's public sets with its prompts, and the loss on pretraining text, of each model.

    python eval/alignment_tax.py --models base=DIR sft=DIR ppo=DIR --tasks squadv2 sst --limit 200 --output tax.json
    python eval/alignment_tax.py --models ... --data squadv2=valid.jsonl,train.jsonl --text text.txt --output tax.json

Tasks are those of tasks/*.yaml (`lm_eval --include_path eval/tasks --tasks instructgpt_squadv2` runs them as well),
without examples and with as many as the paper has. Multiple choice is by the average log-probability a token. Rows
come from the hub, or from local files in the same columns, `--data TASK=EVALUATED[,EXAMPLES]`. The first model is the
base: changes against it have 95 % intervals, by bootstrap over rows that both answered. A task that cannot run is
named in `notes`, and the others go on; what is finished is not run again.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from files import cached, fingerprint, named, positive, refuse_input, said, write_json
from intervals import bounds, figure_with_interval
from metrics import Bleu
from tqdm import tqdm

from instructgpt_trl.data import InputError, load_rows

TASKS = Path(__file__).with_name("tasks")
# Examples of each task [InstructGPT, Appendix D]
SHOTS = {"squadv2": 4, "drop": 4, "quac": 2, "hellaswag": 15, "rte": 15, "sst": 15, "wsc": 15, "fr_to_en": 15}
SHOTS |= {"cnn_dm": 0, "tldr": 0}
TEXT = "pretraining text"
Figures = dict[str, list]  # by metric, one of each row


def run_task(lm: Any, task: str, shots: int, limit: int | None, data: Sequence[str]) -> Figures:
    """
    Run one public set through lm-evaluation-harness.

    Args:
        lm ([`LanguageModel`]): The model.
        task (`str`): A name of `SHOTS`.
        shots (`int`): Examples in front of a row.
        limit (`int`, *optional*): Rows at most.
        data (`Sequence[str]`): None for the hub's rows, or a local file, and one of examples (the same without).

    Returns:
        `dict`: by metric the figures of each row; for BLEU its counts, see [`Bleu`].
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    name = f"instructgpt_{task}"
    lm.per_token = True
    try:
        found = simple_evaluate(
            lm,
            tasks=[{"group": "instructgpt", "task": [{"task": name, **_local(data)}]}],
            num_fewshot=shots,
            limit=limit,
            bootstrap_iters=0,
            task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        )
    except ValueError as error:
        if "Sample larger than population" not in str(error):
            raise
        where = data[-1] if data else f"task '{task}'"
        raise InputError(f"{where}: expected {shots} rows of examples or more, as TASK=ROWS,EXAMPLES") from None
    finally:
        lm.per_token = False
    rows = sorted(found["samples"][name], key=lambda row: row["doc_id"])
    figures = {metric: [row[metric] for row in rows] for metric in rows[0]["metrics"]}
    if "bleu" in figures:
        references, predictions = zip(*figures["bleu"], strict=True)
        figures["bleu"] = Bleu.counts(predictions, [[one] for one in references]).tolist()
    return figures


def _local(data: Sequence[str]) -> dict[str, Any]:
    """What a task reads instead of the hub's rows."""
    if not data:
        return {}
    kinds = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    kind = kinds.get(Path(data[0]).suffix.lower())
    missing = [file for file in data if not Path(file).is_file()]
    if kind is None or missing:
        raise InputError(f"{(missing or data)[0]}: expected a file that is there, one of {', '.join(kinds)}")
    splits = {"test": data[0], **({"train": data[1]} if len(data) > 1 else {})}
    of_split = {"training_split": "train" if len(data) > 1 else None, "validation_split": None, "test_split": "test"}
    source = {"dataset_path": kind, "dataset_name": None, "dataset_kwargs": {"data_files": splits}}
    return {**source, **of_split, "fewshot_split": "train" if len(data) > 1 else "test"}


def text_loss(lm: Any, file: str, limit: int | None) -> Figures:
    """Of each row of `text`: negative log-likelihood in nats, and tokens; the loss is their quotient."""
    from lm_eval.api.instance import Instance

    texts = [row["text"] for row in load_rows(file, "pretraining")][:limit]
    found = lm.loglikelihood_rolling(
        [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    )
    return {"loss": [[-total, len(lm.tok_encode(text))] for total, text in zip(found, texts, strict=True)]}


def figure_of(metric: str, rows: np.ndarray) -> float:
    """A metric of all rows from the figures of each: a mean, but for BLEU's counts and for loss over tokens."""
    if metric == "bleu":
        return Bleu.of_counts(rows.sum(0))
    if metric == "loss":
        return float(rows[:, 0].sum() / rows[:, 1].sum())
    return float(rows.mean())


def with_change(metric: str, own: Sequence, base: Sequence | None) -> dict[str, Any]:
    """Value with interval and number of rows, and the change against the base on the same rows."""
    own = np.array(own, dtype=float)
    found = {"value": figure_with_interval(lambda which: figure_of(metric, own[which]), len(own)), "n": len(own)}
    if base is not None and len(base) == len(own):
        of = np.array(base, dtype=float)
        found["change"] = figure_with_interval(
            lambda which: figure_of(metric, own[which]) - figure_of(metric, of[which]), len(own)
        )
    return found


def plan(tasks: Sequence[str], few_shot: bool, text: str | None) -> list[tuple[str, int]]:
    """Tasks with numbers of examples: none, and the paper's."""
    found = [(task, shots) for task in tasks for shots in sorted({0, SHOTS[task] if few_shot else 0})]
    return found + [(TEXT, 0)] * (text is not None)


def measure(
    models: dict[str, str],
    todo: Sequence[tuple[str, int]],
    folder: Path,
    limit: int | None = None,
    data: dict[str, Sequence[str]] | None = None,
    text: str | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """
    All models on all tasks, one model at a time.

    Args:
        models (`dict[str, str]`): Folders or hub ids by name; the first is the base.
        todo (`Sequence[tuple]`): Tasks with numbers of examples, see [`plan`].
        folder (`Path`): For the figures of each row.

    Returns:
        `dict`: "tasks", by "task, n-shot", metric and model what [`with_change`] gives; "notes", what did not run.
    """
    from language_model import LanguageModel

    found: dict[tuple[str, int, str], Figures] = {}
    notes = []
    for model, path in models.items():
        load = cache(partial(LanguageModel, path, batch_size, dtype="auto"))
        for task, shots in tqdm(todo, desc=model):
            source = [text] if task == TEXT else list((data or {}).get(task, ()))

            def run(load: Any = load, task: str = task, shots: int = shots, source: Sequence = source) -> Figures:
                return text_loss(load(), text, limit) if task == TEXT else run_task(load(), task, shots, limit, source)

            file = folder / f"{model}_{task.replace(' ', '_')}_{shots}.json"
            settings = {"model": fingerprint(path), "limit": limit, "data": [fingerprint(one) for one in source]}
            try:
                found[task, shots, model] = cached(file, settings, run)
            except Exception as error:  # the hub, a file, memory: the other tasks can still run
                notes.append(f"{model}, {task}, {shots} examples: {said(error)}")
    base = next(iter(models))
    tasks: dict[str, dict] = {}
    for (task, shots, model), figures in found.items():
        of_base = found.get((task, shots, base), {}) if model != base else {}
        name = task if task == TEXT else f"{task}, {shots}-shot"
        for metric, rows in figures.items():
            tasks.setdefault(name, {}).setdefault(metric, {})[model] = with_change(metric, rows, of_base.get(metric))
    return {"base": base, "tasks": tasks, "notes": notes}


def table(found: dict[str, Any]) -> str:
    lines = [f"{'task':<24} {'metric':<8} {'model':<12} {'n':>5} {'value':>8}  {'95 % interval':<18} change"]
    for task, metrics in found["tasks"].items():
        for metric, models in metrics.items():
            for model, of in models.items():
                value, low, high = of["value"]
                line = f"{task:<24} {metric:<8} {model:<12} {of['n']:>5} {value:8.3f}  {bounds(low, high):<18}"
                if "change" in of:
                    change, low, high = of["change"]
                    line += f" {change:+.3f} {bounds(low, high, '+.3f')}"
                lines.append(line)
    return "\n".join([*lines, *(f"note: {note}" for note in found["notes"])])


def read_data(given: Sequence[str]) -> dict[str, list[str]]:
    """
    Files of tasks, of TASK=FILE[,FILE].

    Raises:
        [`InputError`]: one is something else, or there is no such task.
    """
    found = {name: files.split(",") for name, files in named(given, "--data").items()}
    unknown = [name for name in found if name not in SHOTS]
    if unknown:
        raise InputError(f"--data {unknown[0]}=...: expected one of {', '.join(SHOTS)}")
    return found


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", required=True, nargs="+", metavar="NAME=DIR", help="the first is the base")
    parser.add_argument("--tasks", nargs="*", default=list(SHOTS), choices=list(SHOTS), metavar="TASK")
    parser.add_argument("--data", nargs="*", default=[], metavar="TASK=FILE[,FILE]", help="local rows, and examples")
    parser.add_argument("--text", help="pretraining text: .txt, or rows with `text`")
    parser.add_argument("--limit", type=positive, help="rows of a task at most")
    parser.add_argument("--zero_shot_only", action="store_true", help="leave out the paper's examples")
    parser.add_argument("--batch_size", type=positive, default=8, help="sequences at a time")
    parser.add_argument("--output", required=True, type=Path, help="JSON file to write; figures of rows beside it")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    try:
        models, data = named(args.models, "--models"), read_data(args.data)
        refuse_input(args.output, args.text, *(file for files in data.values() for file in files))
        todo = plan(args.tasks, not args.zero_shot_only, args.text)
        rows = args.output.with_suffix(".rows")
        found = measure(models, todo, rows, args.limit, data, args.text, args.batch_size)
        print(table(found))
        if not found["tasks"]:
            raise InputError("no task ran; see the notes above")
        write_json(found, args.output)
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"alignment tax: {args.output}")


if __name__ == "__main__":
    main()
