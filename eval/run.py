"""
The paper's questions about one or several policies, in one run: preferred? truthful? toxic? biased? what did it cost?

    python eval/run.py --models base=DIR sft=DIR ppo=DIR --suite quick --output runs/eval --prompts prompts.jsonl \
        --judge reward_model:DIR --text wikitext.txt --winogender sentences.tsv --crows_pairs crows_pairs.csv

Parts run as far as they are given what they need: preference (`--prompts`, and `--judge` or `--labels`), truthfulness
(`--questions`), toxicity (`--scorer`), bias (its two files), the alignment tax (`--tasks`, `--data`, `--text`) and
overoptimisation (`--run`, `--reward_model`). `quick` takes a few rows of each and no examples in front of the public
sets, `paper` the paper's numbers. A part that fails is named in the report and the others go on; called again, the run
does what is not there yet. The report is report.html, report.md and report.json in the output folder.
"""

import argparse
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import alignment_tax
import bias
import overoptimisation
import toxicity
import truthful
import win_rate
from files import write_json
from report import write_report
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
    parser.add_argument("--questions", help="TruthfulQA: file, or hub id")
    parser.add_argument("--truth_judge", help="folder, hub id or python:FILE.py:FUNCTION")
    parser.add_argument("--info_judge", help="the same, for whether an answer is informative")
    parser.add_argument("--toxicity_prompts", default="allenai/real-toxicity-prompts", help="file or hub id")
    parser.add_argument("--scorer", help="of toxicity: perspective, classifier:DIR or python:FILE.py:FUNCTION")
    parser.add_argument("--winogender", type=Path, help="winogender_sentences.tsv")
    parser.add_argument("--crows_pairs", type=Path, help="crows_pairs_anonymized.csv")
    parser.add_argument("--tasks", nargs="*", metavar="TASK", help="public sets; those of --data if not given")
    parser.add_argument("--data", nargs="*", default=[], metavar="TASK=FILE[,FILE]", help="local rows of public sets")
    parser.add_argument("--text", help="pretraining text: .txt, or rows with `text`")
    parser.add_argument("--run", help="output folder of ppo_ptx.py with its checkpoints")
    parser.add_argument("--reward_model", help="the reward model of that run")
    parser.add_argument("--gold", help="python:FILE.py:FUNCTION that the run is held against; --judge if not given")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="tokens of a completion at most")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences at a time")
    return parser.parse_args(argv)


class Run:
    """One call: models, rows and where what is finished stands."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.rows, self.folder = args, SUITES[args.suite], args.output
        self.models = dict(one.partition("=")[::2] for one in args.models)
        if len(self.models) < len(args.models) or not all(self.models.values()):
            raise InputError(f"--models {' '.join(args.models)}: expected NAME=DIR, each name once")
        self.baseline = args.baseline or ("sft" if "sft" in self.models else next(iter(self.models)))
        if self.baseline not in self.models:
            raise InputError(f"--baseline {self.baseline}: expected one of {', '.join(self.models)}")
        self.notes: list[str] = []

    def part(self, name: str, needed: bool, missing: str, make: Callable[[], Any]) -> Any:
        """What `make` gives, from an earlier call if it is there; None, and a note, if it cannot run or fails."""
        if not needed:
            self.notes.append(f"{name}: not run; {missing}")
            return None
        try:
            return make()
        except Exception as error:
            if not isinstance(error, InputError | OSError):
                traceback.print_exc()
            self.notes.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            return None

    def of_each_model(self, name: str, settings: dict[str, Any], make: Callable[[str], Any]) -> dict[str, Any]:
        """By model what `make(path)` gives; a model that fails is noted."""
        found = {}
        for model, path in tqdm(self.models.items(), desc=name):
            file = self.folder / name / f"{model}.json"
            known = _read(file)
            settings = {**settings, "model": path}
            if known is None or known["settings"] != settings:
                made = self.part(f"{name}, {model}", True, "", lambda path=path: make(path))
                if made is None:
                    continue
                write_json({"settings": settings, "found": made}, file)
                known = _read(file)
            found[model] = known["found"]
        return found

    def parts(self) -> dict[str, Any]:
        args = self.args
        tasks = args.tasks if args.tasks is not None else [one.partition("=")[0] for one in args.data]
        found = {
            "preference": self.part(
                "preference",
                len(self.models) > 1 and bool(args.prompts) and bool(args.judge or args.labels),
                "it takes two models, --prompts, and --judge or --labels",
                self.preference,
            ),
            "truthfulness": self.part("truthfulness", bool(args.questions), "it takes --questions", self.truthfulness),
            "toxicity": self.part("toxicity", bool(args.scorer), "it takes --scorer", self.toxicity),
            "bias": self.part(
                "bias", bool(args.winogender or args.crows_pairs), "it takes --winogender or --crows_pairs", self.bias
            ),
            "alignment tax": self.part(
                "alignment tax",
                bool(tasks or args.text),
                "it takes --tasks, --data or --text",
                lambda: self.tax(tasks),
            ),
            "overoptimisation": self.part(
                "overoptimisation",
                bool(args.run and args.reward_model and args.prompts and (args.gold or args.judge)),
                "it takes --run, --reward_model, --prompts, and --gold or --judge",
                self.overoptimisation,
            ),
        }
        return {name: of for name, of in found.items() if of}

    def preference(self) -> dict[str, Any]:
        from generate import Policy, write_completions

        args = self.args
        rows = list(load_rows(args.prompts, "prompt"))[: self.rows["prompts"]]
        files = {}
        for model, path in self.models.items():
            file = self.folder / "completions" / f"{model}.jsonl"
            if not file.exists():
                settings = {"model": path, "prompts": args.prompts, "rows": len(rows), "tokens": args.max_new_tokens}
                policy = Policy(path, args.batch_size, args.max_new_tokens)
                write_completions(rows, file, settings, policy)
            files[model] = file
        completions = [f"{model}={file}" for model, file in files.items()]
        given = argparse.Namespace(
            completions=completions, baseline=self.baseline, judge=args.judge, labels=args.labels
        )
        if args.labels:
            given.judge = None
        found = win_rate.run(given)
        self.notes += [f"preference: {note}" for note in found["notes"]]
        return found

    def truthfulness(self) -> dict[str, Any]:
        from generate import Policy

        args = self.args
        questions = truthful.read_questions(args.questions)[: self.rows["questions"]]
        judges = {"True": args.truth_judge, "Helpful": args.info_judge}
        judges = {word: truthful.make_judge(name, word) for word, name in judges.items() if name}
        if "True" not in judges:
            self.notes.append("truthfulness: answers without figures; they take --truth_judge and --info_judge")
        return self.of_each_model(
            "truthfulness",
            {"questions": args.questions, "rows": len(questions), "judges": [args.truth_judge, args.info_judge]},
            lambda path: truthful.measure(
                Policy(path, args.batch_size, 64, cut_at_newline=True).complete, judges, questions
            ),
        )

    def toxicity(self) -> dict[str, Any]:
        from generate import Policy

        args = self.args
        score = toxicity.make_scorer(args.scorer)
        prompts = toxicity.read_prompts(args.toxicity_prompts)[: self.rows["toxicity"]]
        return self.of_each_model(
            "toxicity",
            {"prompts": args.toxicity_prompts, "rows": len(prompts), "scorer": args.scorer},
            lambda path: toxicity.measure(
                Policy(path, args.batch_size, 64, cut_at_newline=True).complete, score, prompts, samples=1
            ),
        )

    def bias(self) -> dict[str, Any]:
        from language_model import LanguageModel

        args = self.args
        files = {"winogender": (args.winogender, bias.read_winogender)}
        files |= {"crows_pairs": (args.crows_pairs, bias.read_crows_pairs)}
        pairs = {name: read(file)[: self.rows["pairs"]] for name, (file, read) in files.items() if file}

        def measure(path: str) -> dict[str, Any]:
            lm = LanguageModel(path, args.batch_size, dtype="auto")
            return {name: bias.measure(lm, of, stereotypes=name == "crows_pairs") for name, of in pairs.items()}

        return self.of_each_model("bias", {"pairs": {name: len(of) for name, of in pairs.items()}}, measure)

    def tax(self, tasks: list[str]) -> dict[str, Any]:
        args = self.args
        data = {name: files.split(",") for name, _, files in (one.partition("=") for one in args.data)}
        unknown = [task for task in [*tasks, *data] if task not in alignment_tax.SHOTS]
        if unknown:
            raise InputError(f"task '{unknown[0]}': expected one of {', '.join(alignment_tax.SHOTS)}")
        todo = alignment_tax.plan(tasks, args.suite == "paper", args.text)
        folder = self.folder / "alignment_tax"
        found = alignment_tax.measure(self.models, todo, folder, self.rows["tasks"], data, args.text, args.batch_size)
        self.notes += [f"alignment tax: {note}" for note in found["notes"]]
        return found

    def overoptimisation(self) -> dict[str, Any]:
        args, file = self.args, self.folder / "overoptimisation.json"
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
            output=file,
            png=file.with_suffix(".png"),
        )
        found = overoptimisation.measure(given, file.with_suffix(".rows"))
        overoptimisation.draw(found, given.png)
        return {**found, "png": str(given.png)}


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    try:
        run = Run(args)
        parts = run.parts()
        write_report(args.output, {"models": run.models, "suite": args.suite, "parts": parts, "notes": run.notes})
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    for note in run.notes:
        print(f"note: {note}")
    if not parts:
        sys.exit("error: no part ran; see the notes above")
    print(f"report: {args.output / 'report.html'}")


if __name__ == "__main__":
    main()
