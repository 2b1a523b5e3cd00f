"""
The paper's questions about one or several policies, in one run: preferred? truthful? toxic? biased? what did it cost?

    python eval/run.py --models base=DIR sft=DIR ppo=DIR --suite quick --output runs/eval --prompts prompts.jsonl \
        --judge reward_model:DIR --text wikitext.txt --winogender sentences.tsv --crows_pairs crows_pairs.csv

Parts run as far as they are given what they need: preference (`--prompts`, and `--judge` or `--labels`), agreement
between labelers (`--labels`) and of reward models with them (`--folds`), truthfulness (`--questions`), toxicity
(`--scorer`), bias (its two files), the alignment tax (`--tasks`, `--data`, `--text`) and overoptimisation (`--run`,
`--reward_model`). `quick` takes a few rows of each and no examples in front of the public sets, `paper` the paper's
numbers. A part that fails is named in the report and the others go on; called again, the run does what is not there
yet, and parts of an earlier call with the same models stay. The report is report.html, report.md and report.json in
the output folder.
"""

import argparse
import json
import shlex
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import agreement
import alignment_tax
import bias
import overoptimisation
import toxicity
import truthful
import win_rate
from files import cached, digest, fingerprint, fingerprint_of, named, positive, said
from generate import Policy, write_completions
from language_model import LanguageModel
from report import PARTS, write_report
from tqdm import tqdm

from instructgpt_trl.data import InputError, load_rows

# Rows of each part; None is all there are
SUITES: dict[str, dict[str, int | None]] = {
    "quick": {"prompts": 64, "questions": 50, "toxicity": 50, "pairs": 120, "tasks": 100, "checkpoints": 64},
    "paper": {"prompts": None, "questions": None, "toxicity": 5000, "pairs": None, "tasks": None, "checkpoints": 256},
}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", required=True, nargs="+", metavar="NAME=DIR", help="the first is the base")
    parser.add_argument("--suite", choices=list(SUITES), default="quick")
    parser.add_argument("--output", required=True, type=Path, help="folder to write to, and to go on in")
    parser.add_argument("--baseline", help="model that win rates are against; 'sft' if there is one, else the first")
    parser.add_argument("--prompts", help="rows with `prompt` for the win rates, and `category`")
    parser.add_argument("--judge", help="who compares, see judges.py")
    parser.add_argument("--labels", help="rankings by labelers with `models`, instead of a judge")
    parser.add_argument("--folds", metavar="FLAGS", help="reward.py's flags, for five of the labels by other labelers")
    parser.add_argument("--questions", help="TruthfulQA: file, or hub id")
    parser.add_argument("--truth_judge", help="folder, hub id or python:FILE.py:FUNCTION")
    parser.add_argument("--info_judge", help="the same, for whether an answer is informative")
    parser.add_argument("--toxicity_prompts", default="allenai/real-toxicity-prompts", help="file or hub id")
    parser.add_argument(
        "--toxicity_samples",
        type=positive,
        default=1,
        help="continuations of each: 1 is greedy, as the paper's; 25, sampled, give the expected maximum toxicity too",
    )
    parser.add_argument("--scorer", help="of toxicity: perspective, classifier:DIR or python:FILE.py:FUNCTION")
    parser.add_argument("--winogender", type=Path, help="winogender_sentences.tsv")
    parser.add_argument("--crows_pairs", type=Path, help="crows_pairs_anonymized.csv")
    parser.add_argument("--tasks", nargs="*", metavar="TASK", help="public sets; those of --data if not given")
    parser.add_argument("--data", nargs="*", default=[], metavar="TASK=FILE[,FILE]", help="local rows of public sets")
    parser.add_argument("--text", help="pretraining text: .txt, or rows with `text`")
    parser.add_argument("--run", help="output folder of ppo_ptx.py with its checkpoints")
    parser.add_argument("--reward_model", help="the reward model of that run")
    parser.add_argument("--gold", help="python:FILE.py:FUNCTION that the run is held against; --judge if not given")
    parser.add_argument("--max_new_tokens", type=positive, default=128, help="tokens of a completion at most")
    parser.add_argument("--batch_size", type=positive, default=8, help="sequences at a time")
    return parser.parse_args(argv)


class Run:
    """One call: models, rows, and the folder in which what is finished stands."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.rows, self.folder = args, SUITES[args.suite], args.output
        self.kept = self.folder / "completions"
        self.models = named(args.models, "--models")
        self.data = alignment_tax.read_data(args.data)
        self.tasks = args.tasks if args.tasks is not None else list(self.data)
        unknown = [task for task in self.tasks if task not in alignment_tax.SHOTS]
        if unknown:
            raise InputError(f"task '{unknown[0]}': expected one of {', '.join(alignment_tax.SHOTS)}")
        self.baseline = args.baseline or ("sft" if "sft" in self.models else next(iter(self.models)))
        if self.baseline not in self.models:
            raise InputError(f"--baseline {self.baseline}: expected one of {', '.join(self.models)}")
        self.fingerprints = {name: fingerprint(path) for name, path in self.models.items()}
        self.notes: list[str] = []
        self.notes_by_part: dict[str, list[str]] = {}  # of those that are in the report

    def parts(self) -> dict[str, Any]:
        """Every part that has what it needs; why another did not run, or failed, is in `notes`."""
        args = self.args
        judged, pairs = args.judge or args.labels, args.winogender or args.crows_pairs
        run = args.run and args.reward_model and args.prompts and (args.gold or args.judge)
        two = len(self.models) > 1
        todo: dict[str, tuple[Any, str, Callable[[], Any]]] = {
            "preference": (
                two and args.prompts and judged,
                "two models, --prompts, --judge or --labels",
                self.preference,
            ),
            "agreement": (args.labels, "--labels", self.agreement),
            "truthfulness": (args.questions, "--questions", self.truthfulness),
            "toxicity": (args.scorer, "--scorer", self.toxicity),
            "bias": (pairs, "--winogender or --crows_pairs", self.bias),
            "alignment tax": (self.tasks or args.text, "--tasks, --data or --text", self.tax),
            "overoptimisation": (run, "--run, --reward_model, --prompts, --gold or --judge", self.overoptimisation),
        }
        found = {}
        for name, (given, needed, make) in todo.items():
            before = len(self.notes)
            if not given:
                self.notes.append(f"{name}: not run; it takes {needed}")
            elif (part := self.attempt(name, make)) is not None:
                found[name], self.notes_by_part[name] = part, self.notes[before:]
        return found

    def earlier(self, parts: dict[str, Any]) -> dict[str, Any]:
        """
        `parts` with what the report that is there has besides, of the same models and rows, and its notes. A report of
        others is put aside.
        """
        file = self.folder / "report.json"
        try:
            report = json.loads(file.read_text(encoding="utf-8"))
            of = [list(report["fingerprints"].items()), report["suite"]]
            old = {name: part for name, part in report["parts"].items() if name in PARTS}
            notes = dict(report.get("notes_by_part", {}))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or no report
            return parts
        if of != [list(self.fingerprints.items()), self.args.suite]:
            for kind in ("html", "md", "json"):
                if (known := file.with_suffix(f".{kind}")).exists():
                    known.replace(aside := known.with_stem(f"report_{digest(of)}"))
            self.notes.append(f"the earlier report, of other models or another suite, is {aside.with_suffix('.html')}")
            return parts
        found = {}
        for name in sorted({*old, *parts}, key=list(PARTS).index):
            found[name], stayed = joined(name, old.get(name), parts.get(name))
            self.notes += [f"{one}: the figures are of an earlier call" for one in stayed]
            if name not in parts:
                self.notes_by_part[name] = notes.get(name, [])
                self.notes += self.notes_by_part[name]
        return found

    def attempt(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gives; None where it fails, which is noted."""
        try:
            return make()
        except (Exception, SystemExit) as error:
            if not isinstance(error, InputError | OSError):
                traceback.print_exc()
            self.notes.append(f"{name}: {said(error)}")
            return None

    def of_each_model(self, name: str, settings: dict[str, Any], make: Callable[[str], Any]) -> dict[str, Any] | None:
        """By model what `make(path)` gives, or gave in an earlier call with these settings; None without any."""
        found = {}
        for model, path in tqdm(self.models.items(), desc=name):
            own = {**settings, "model": fingerprint(path)}
            file = self.folder / name / f"{model}.json"
            made = self.attempt(f"{name}, {model}", partial(cached, file, own, partial(make, path), _complete))
            if made is not None:
                found[model] = made
                self.notes += [
                    f"{name}, {model}, {kind}: {of['failed']} were not judged, or not by all judges"
                    for kind, of in _failures(made).items()
                ]
        return found or None

    def preference(self) -> dict[str, Any]:
        args = self.args
        if args.judge and not args.labels:
            win_rate.make_judge(args.judge)  # what is wrong with it is said before hours of sampling
        rows = list(load_rows(args.prompts, "prompt"))[: self.rows["prompts"]]
        files = {}
        for model, path in self.models.items():
            if file := self.attempt(f"preference, {model}", partial(self.completions, model, path, rows)):
                files[model] = file
        if self.baseline not in files or len(files) < 2:
            raise InputError(
                f"completions of {', '.join(files) or 'no model'}; needed are {self.baseline}'s and another's"
            )
        given = argparse.Namespace(
            completions=[f"{model}={file}" for model, file in files.items()],
            baseline=self.baseline,
            judge=None if args.labels else args.judge,
            labels=args.labels,
            output=self.folder / "preference.json",
        )
        settings = {"files": [fingerprint(file) for file in files.values()], **vars(given), "output": None}
        settings["who"] = fingerprint_of(args.labels or args.judge)
        found = cached(given.output, settings, lambda: win_rate.run(given), lambda found: not found["failed"])
        self.notes += [f"preference: {note}" for note in found["notes"]]
        return found

    def agreement(self) -> dict[str, Any] | None:
        rows = agreement.read_labels(self.args.labels)
        todo: dict[str, Callable[[], Any]] = {"between labelers": partial(agreement.agreement, rows)}
        if self.args.folds is not None:
            flags = shlex.split(self.args.folds)
            todo["reward model"] = partial(agreement.train_folds, rows, self.folder / "folds", 5, 0, flags)
        found = {name: self.attempt(f"agreement, {name}", make) for name, make in todo.items()}
        return {name: of for name, of in found.items() if of is not None} or None

    def completions(self, model: str, path: str, rows: list[dict[str, Any]]) -> Path:
        """The file of a model's completions; other settings have other files."""
        settings = {"model": fingerprint(path), "rows": rows, "tokens": self.args.max_new_tokens}
        number = digest(settings)
        file = self.kept / f"{model}_{number}.jsonl"
        if not file.exists():
            policy = Policy(path, self.args.batch_size, self.args.max_new_tokens)
            write_completions(rows, file, {"digest": number}, policy)
        return file

    def truthfulness(self) -> dict[str, Any] | None:
        args = self.args
        questions = truthful.read_questions(args.questions)[: self.rows["questions"]]
        judges = {"True": args.truth_judge, "Helpful": args.info_judge}
        judges = {word: truthful.make_judge(name, word) for word, name in judges.items() if name}
        if "True" not in judges:
            self.notes.append("truthfulness: answers without figures; they take --truth_judge and --info_judge")

        def measure(path: str) -> dict[str, Any]:
            return truthful.measure(truthful.answers(self.kept, path, args.batch_size), judges, questions)

        settings = {
            "questions": questions,
            "judges": [fingerprint_of(args.truth_judge), fingerprint_of(args.info_judge)],
        }
        return self.of_each_model("truthfulness", settings, measure)

    def toxicity(self) -> dict[str, Any] | None:
        args = self.args
        score = toxicity.make_scorer(args.scorer, keep=self.folder / "toxicity" / "scores.jsonl")
        prompts = toxicity.read_prompts(args.toxicity_prompts)[: self.rows["toxicity"]]

        def measure(path: str) -> dict[str, Any]:
            complete = toxicity.continuations(self.kept, path, args.toxicity_samples, args.batch_size)
            return toxicity.measure(complete, score, prompts, args.toxicity_samples)

        settings = {"prompts": prompts, "samples": args.toxicity_samples, "scorer": fingerprint_of(args.scorer)}
        return self.of_each_model("toxicity", settings, measure)

    def bias(self) -> dict[str, Any] | None:
        args = self.args
        files = {"winogender": (args.winogender, bias.read_winogender)}
        files |= {"crows_pairs": (args.crows_pairs, bias.read_crows_pairs)}
        pairs = {name: read(file)[: self.rows["pairs"]] for name, (file, read) in files.items() if file}

        def measure(path: str) -> dict[str, Any]:
            lm = LanguageModel(path, args.batch_size, dtype="auto")
            return {name: bias.measure(lm, of, stereotypes=name == "crows_pairs") for name, of in pairs.items()}

        return self.of_each_model("bias", {"pairs": pairs}, measure)

    def tax(self) -> dict[str, Any] | None:
        args = self.args
        todo = alignment_tax.plan(self.tasks, args.suite == "paper", args.text)
        folder, limit = self.folder / "alignment_tax", self.rows["tasks"]
        found = alignment_tax.measure(self.models, todo, folder, limit, self.data, args.text, args.batch_size)
        self.notes += [f"alignment tax: {note}" for note in found["notes"]]
        return found if found["tasks"] else None

    def overoptimisation(self) -> dict[str, Any]:
        args = self.args
        given = argparse.Namespace(
            run=args.run,
            start=self.models[self.baseline],
            reward_model=args.reward_model,
            prompts=args.prompts,
            judge=None if args.gold else args.judge,
            gold=args.gold,
            best_of=[1, 2, 4, 8] if args.suite == "quick" else [1, 2, 4, 8, 16, 32],
            limit=self.rows["checkpoints"],
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            seed=0,
        )
        found = overoptimisation.measure(given, self.folder / "overoptimisation.rows")
        self.notes += [f"overoptimisation: {note}" for note in found["notes"]]
        return found


def joined(name: str, old: Any, new: Any) -> tuple[Any, list[str]]:
    """
    The part of that name with the sections of the earlier call that this one did not make (tasks, sets of pairs, kinds
    of agreement), which are named. Other parts are of one call.
    """
    if new is None or old is None:
        return (new, []) if old is None else (old, [name])
    if name == "agreement":
        stayed = [kind for kind in old if kind not in new]
        found = {**old, **new}
    elif name == "alignment tax" and old["base"] == new["base"]:
        stayed = [task for task in old["tasks"] if task not in new["tasks"]]
        found = {**new, "tasks": {**old["tasks"], **new["tasks"]}}
    elif name == "bias":
        stayed = sorted({data for of in old.values() for data in of} - {data for of in new.values() for data in of})
        found = {
            model: {data: of for data, of in old.get(model, {}).items() if data in stayed} | new.get(model, {})
            for model in {**old, **new}
        }
    else:
        return new, []
    return found, [f"{name}, {section}" for section in stayed]


def _failures(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The figures by prompt or prefix of which some could not be judged."""
    figures = found.get("figures", found)
    return {kind: of for kind, of in figures.items() if isinstance(of, dict) and of.get("failed")}


def _complete(found: dict[str, Any]) -> bool:
    return not _failures(found)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    try:
        run = Run(args)
        parts = run.parts()
        if parts:  # else an earlier report stays
            parts = run.earlier(parts)
            found = {"models": run.models, "suite": args.suite, "parts": parts, "notes": run.notes}
            own = {"fingerprints": run.fingerprints, "notes_by_part": run.notes_by_part}
            write_report(args.output, {**found, **own})
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    for note in run.notes:
        print(f"note: {note}")
    if not parts:
        sys.exit("error: no part ran; see the notes above")
    print(f"report: {args.output / 'report.html'}")


if __name__ == "__main__":
    main()
