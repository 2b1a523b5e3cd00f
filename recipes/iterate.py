r"""
Collect, label, reward model, PPO, and again: the paper's steps 2 and 3 in rounds [InstructGPT 3.1].

    python recipes/iterate.py --sft runs/sft --dataset prompts.jsonl --rounds 2 --num_prompts 200 \
        --reward_config reward.yaml --ppo_config ppo_ptx.yaml --output_dir runs/loop

A round draws completions for prompts that no round before had, from the SFT model, later ones in equal parts from it
and from the last round's policy (the paper's are of supervised policies too, most of them); waits until they are
labelled on recipes/label.py, whose command it prints; trains a reward model from the SFT model on all rankings so
far, those of `--rankings` too; and a policy from the SFT model on all prompts. With `--labeler FILE.py:FUNCTION`, a
function of a task that returns its ranks (1 is best), nobody is waited for.

The YAML files are those of recipes/collect.py, reward.py and ppo_ptx.py, with all their keys but the models, the
dataset and the output. Every round has a folder with `tasks.jsonl`, `rankings.jsonl`, `reward` and `policy`. Run
again, it goes on with what is not finished, a training from its last checkpoint if it wrote one.
"""

import argparse
import hashlib
import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instructgpt_trl.checkpoints import last_checkpoint
from instructgpt_trl.data import InputError, check_output_dir, check_row, load_rows, parse_json, read_rows, write_rows
from instructgpt_trl.data.ranking_formats import without_empty

Row = dict[str, Any]
RECIPES = Path(__file__).parent
LOOK = 5  # seconds between looks at the labels


@dataclass(frozen=True)
class Loop:
    """
    Args:
        sft (`str`): Folder of the SFT model, from which every reward model and policy starts.
        dataset (`Path`): Prompts.
        output_dir (`Path`): Folder of the rounds.
        rounds (`int`): How many.
        num_prompts (`int`): Prompts labelled in a round.
        reward_config, ppo_config, collect_config (`Path`): YAML files of the recipes.
        rankings (`Path`, *optional*): Rankings from before.
        rank (`Callable`, *optional*): Ranks of a task; without it people are waited for.
    """

    sft: str
    dataset: Path
    output_dir: Path
    rounds: int
    num_prompts: int
    reward_config: Path
    ppo_config: Path
    collect_config: Path | None = None
    rankings: Path | None = None
    rank: Callable[[Row], list[int]] | None = None

    def run(self) -> None:
        """All rounds, each stage unless it is finished."""
        rows = list(load_rows(str(self.dataset), "prompt"))
        if len(rows) < self.rounds * self.num_prompts:
            raise InputError(
                f"{self.dataset}: {len(rows)} prompts, of which {self.rounds} rounds of {self.num_prompts} want "
                f"{self.rounds * self.num_prompts}; give more, or take fewer"
            )
        self._begin(rows)
        for number in range(1, self.rounds + 1):
            print(f"round {number} of {self.rounds}: {self.folder(number)}", flush=True)
            self.collect(number, rows)
            self.label(number)
            self.reward(number)
            self.policy(number)

    def _begin(self, rows: list[Row]) -> None:
        """Refuse to go on with a loop that was begun with other settings."""
        settings = {
            "sft": self.sft,
            "num_prompts": self.num_prompts,
            "prompts": hashlib.sha256(json.dumps([row["prompt"] for row in rows]).encode()).hexdigest(),
            "rankings": self.rankings and hashlib.sha256(self.rankings.read_bytes()).hexdigest(),
            **{name: path and _text(path) for name, path in self._configs().items()},
        }
        file = self.output_dir / "loop.json"
        if file.is_file():
            known = parse_json(_text(file), str(file))
            if not isinstance(known, dict):
                raise InputError(f"{file}: expected the settings of a loop; choose another --output_dir")
            other = [name for name in settings if known.get(name) != settings[name]]
            if other:
                raise InputError(
                    f"{file}: was begun with other {', '.join(other)}; choose another --output_dir, or the same"
                )
        else:
            write_rows([settings], file)

    def _configs(self) -> dict[str, Path | None]:
        return {name: getattr(self, name) for name in ("collect_config", "reward_config", "ppo_config")}

    def folder(self, number: int) -> Path:
        return self.output_dir / f"round_{number}"

    def policies(self, number: int) -> list[str]:
        """
        Whom a round draws from, in equal parts. A reward model has to know the SFT model's completions, with which PPO
        starts, and the policy's own, which it is led to.
        """
        return [self.sft] if number == 1 else [self.sft, str(self.folder(number - 1) / "policy")]

    def collect(self, number: int, rows: list[Row]) -> None:
        """Tasks, from prompts that are this round's own."""
        tasks, prompts = self.folder(number) / "tasks.jsonl", self.folder(number) / "prompts.jsonl"
        if tasks.is_file():
            return
        if not prompts.is_file():
            write_rows(rows[(number - 1) * self.num_prompts : number * self.num_prompts], prompts)
        flags = ["--policies", *self.policies(number), "--dataset", str(prompts), "--output", str(tasks)]
        recipe("collect.py", self.collect_config, flags)

    def label(self, number: int) -> None:
        """Rankings of the tasks, by `rank` or by people."""
        tasks, rankings = self.folder(number) / "tasks.jsonl", self.folder(number) / "rankings.jsonl"
        rows, places = read_rows(str(tasks))
        for row, place in zip(rows, places, strict=True):
            if not isinstance(row, dict) or row.get("id") is None:
                raise InputError(f"{place}: a task has an 'id', and this has none; delete the file, it is made anew")
        if self.rank is not None:
            if not rankings.is_file():
                write_rows([self._ranked(*one) for one in zip(rows, places, strict=True)], rankings)
            return
        left = unlabeled(rows, rankings)
        if left:
            flags = ["--tasks", str(tasks), "--output", str(rankings), "--overlap", "0"]
            print("label them: ", shlex.join(["python", str(RECIPES / "label.py"), *flags]))
        while left:
            print(f"\rwaiting for {left} of {len(rows)} labels  ", end="", flush=True)
            time.sleep(LOOK)
            left = unlabeled(rows, rankings)
        print()

    def _ranked(self, row: Row, where: str) -> Row:
        try:
            ranks = self.rank(row)
        except Exception as error:  # of the user's function
            raise InputError(f"{where}: --labeler failed with {type(error).__name__}: {error}; correct it") from error
        return check_row({**row, "ranks": ranks}, "ranking", where, allow_empty=True)

    def reward(self, number: int) -> None:
        """A reward model from the SFT model on all rankings so far."""
        files = [self.folder(k) / "rankings.jsonl" for k in range(1, number + 1)]
        files = ([self.rankings] if self.rankings else []) + files
        all_rankings = self.folder(number) / "all_rankings.jsonl"
        if not all_rankings.is_file():
            # Of a round in which every task was skipped there is nothing
            files = [file for file in files if file.is_file() and file.read_bytes().strip()]
            rows = [row for file in files for row in load_rows(str(file), "ranking", allow_empty=True)]
            rows = [kept for row in rows if (kept := without_empty(row))]  # reward.py refuses completions of no text
            if not rows:
                raise InputError(f"{self.folder(number)}: no rankings so far; label some of its tasks")
            kept = ("prompt", "completions", "ranks", "labeler_id")
            write_rows([{name: row[name] for name in kept if row.get(name) is not None} for row in rows], all_rankings)
        flags = ["--model_name_or_path", self.sft, "--dataset", str(all_rankings)]
        train("reward.py", self.reward_config, flags, self.folder(number) / "reward")

    def policy(self, number: int) -> None:
        """A policy from the SFT model, by the round's reward model, on all prompts."""
        flags = ["--model_name_or_path", self.sft, "--reward_model", str(self.folder(number) / "reward")]
        flags += ["--dataset", str(self.dataset)]
        train("ppo_ptx.py", self.ppo_config, flags, self.folder(number) / "policy")


def unlabeled(tasks: list[Row], rankings: Path) -> int:
    """Tasks that nobody has ranked or skipped."""
    files = [rankings, rankings.with_name(f"{rankings.stem}.skips.jsonl")]
    lines = [line for file in files if file.is_file() for line in file.read_bytes().split(b"\n")[:-1] if line.strip()]
    rows = [parse_json(line.decode("utf-8", "replace"), str(rankings)) for line in lines]
    done = {str(row.get("task")) for row in rows if isinstance(row, dict)}
    return sum(str(task["id"]) not in done for task in tasks)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error.reason}); convert the file to UTF-8") from None


def train(name: str, config: Path, flags: list[str], output: Path) -> None:
    """A training recipe into `output`, with a mark beside it when it is finished."""
    done = output.with_name(f".{output.name}.finished")
    if done.is_file():
        return
    if last_checkpoint(output):
        flags = [*flags, "--resume_from_checkpoint", "true"]
    elif output.is_dir():
        shutil.rmtree(output)  # ours, and of no use
    recipe(name, config, [*flags, "--output_dir", str(output)])
    done.touch()


def recipe(name: str, config: Path | None, flags: list[str]) -> None:
    """
    Run another recipe.

    Raises:
        [`InputError`]: it failed; what it printed says why.
    """
    command = [sys.executable, str(RECIPES / name), *(["--config", str(config)] if config else []), *flags]
    print("$", " ".join(command[1:]), flush=True)
    code = subprocess.run(command).returncode
    if code:
        raise InputError(
            f"{name} ended with {code}, see above; mend it and run the same command again, it goes on here"
        )


def function_from(name: str) -> Callable[[Row], list[int]]:
    """FUNCTION of FILE.py."""
    file, _, function = name.rpartition(":")
    if not Path(file).is_file() or Path(file).suffix != ".py" or not function:
        raise InputError(f"--labeler {name}: expected FILE.py:FUNCTION, with a file that is there")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise InputError(f"--labeler {name}: {type(error).__name__}: {error}; correct the file") from error
    if not callable(getattr(module, function, None)):
        raise InputError(f"--labeler {name}: {file} has no function {function}")
    return getattr(module, function)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sft", required=True, help="folder of the SFT model, full or an adapter")
    parser.add_argument("--dataset", required=True, type=Path, help="prompts")
    parser.add_argument("--output_dir", required=True, type=Path, help="folder of the rounds")
    parser.add_argument("--reward_config", required=True, type=Path, help="YAML file for reward.py")
    parser.add_argument("--ppo_config", required=True, type=Path, help="YAML file for ppo_ptx.py")
    parser.add_argument("--collect_config", type=Path, help="YAML file for collect.py")
    parser.add_argument("--rankings", type=Path, help="rankings from before, for every reward model")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--num_prompts", type=int, default=200, help="prompts labelled in a round")
    parser.add_argument("--labeler", help="FILE.py:FUNCTION that ranks a task; people do if not given")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    try:
        if min(args.rounds, args.num_prompts) < 1:
            raise InputError(f"--rounds {args.rounds} --num_prompts {args.num_prompts}: expected 1 or more of each")
        for name in ("dataset", "reward_config", "ppo_config", "collect_config", "rankings"):
            path = getattr(args, name)
            if path is not None and not path.is_file():
                raise InputError(f"--{name} {path}: no such file")
        check_output_dir(args.output_dir)
        if args.sft.startswith((".", "/")) and not Path(args.sft).is_dir():
            raise InputError(f"--sft {args.sft}: no such folder")
        given = {name: value for name, value in vars(args).items() if name != "labeler"}
        Loop(**given, rank=args.labeler and function_from(args.labeler)).run()
    except (InputError, OSError) as error:
        print("error:", error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on here", file=sys.stderr)
        sys.exit(130)
    print(f"\npolicy: {args.output_dir / f'round_{args.rounds}' / 'policy'}")


if __name__ == "__main__":
    main()
