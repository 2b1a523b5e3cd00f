r"""
Raw prompts with user ids in, the three splits out, by the paper's rules [InstructGPT 3.2, A.1].

    python recipes/data/prepare_prompts.py --input raw.jsonl --output_dir prompts

writes `train.jsonl`, `valid.jsonl`, `test.jsonl` and `report.json`. In this order: few-shot prompts of labelers become
their k examples; prompts over the length limits go; of prompts that begin alike the longest stays; a user keeps his
first 200; users, not prompts, are split; prompts with personal data leave the training split, or these are masked.

A row of JSON Lines has `prompt` (a string or a conversation), or `instruction` and `examples` ([{"query": ...,
"response": ...}, ...]) where it is few-shot; `user_id`, `category` and `source` ("customer", "labeler") if known.
Other columns stay as they are and are not searched for personal data. A prompt without `user_id` is a user of its own.

The file is read twice, row by row: first for some numbers of each prompt, then to write those that stay. The same
input gives the same output. Prompts that begin alike share their first `--prefix_length` characters, whatever the case
and white space; shorter ones are the same. Examples of one few-shot prompt, which begin alike by nature, go only where
they are the same.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache, partial
from multiprocessing import Pool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from instructgpt_trl.data import InputError, check_output_dir, parse_json
from instructgpt_trl.data.pii import PersonalData
from instructgpt_trl.data.prompts import (
    check_raw_prompt,
    expand_few_shot,
    first_of_each,
    longest_of_each,
    number_of,
    prefix_key,
    split_of,
    text_of,
    use_case,
)

Row = dict[str, Any]
SPLITS = ("train", "valid", "test")
RULES = ("too short", "too long", "near-duplicate", "over the user's limit")  # what becomes of the others
FATES = {name: code for code, name in enumerate((*SPLITS, *RULES))}
BLOCK, BLOCK_CHARACTERS = 20_000, 20_000_000  # prompts that are searched at a time, by all processes


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, type=Path, help="JSON Lines of raw prompts")
    parser.add_argument("--output_dir", required=True, type=Path, help="folder for the splits and the report")
    parser.add_argument("--prefix_length", type=int, default=100, help="characters that near-duplicates share")
    parser.add_argument("--max_per_user", type=int, default=200, help="prompts of one user [InstructGPT 3.2]")
    parser.add_argument("--valid_fraction", type=float, default=0.1, help="of users")
    parser.add_argument("--test_fraction", type=float, default=0.1, help="of users")
    parser.add_argument("--min_characters", type=int, default=1, help="of a prompt")
    parser.add_argument("--max_characters", type=int, help="of a prompt; PPO drops those over 1,024 tokens by itself")
    parser.add_argument("--pii", choices=["drop", "mask", "keep"], default="drop", help="in the training split")
    parser.add_argument("--assign_categories", action="store_true", help="guess a use case where a row has none")
    parser.add_argument("--skip_bad_rows", action="store_true", help="leave wrong rows out, and count them")
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    parser.add_argument("--num_proc", type=int, default=os.cpu_count(), help="processes that search personal data")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise [`InputError`] for settings that cannot be meant, and for output that is there already."""
    for name in ("prefix_length", "max_per_user", "num_proc"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: expected a whole number of 1 or more")
    most = args.max_characters
    if args.min_characters < 0 or (most is not None and most < max(args.min_characters, 1)):
        raise InputError(
            f"--min_characters {args.min_characters} --max_characters {most}: expected numbers from 0 and from 1 on, "
            f"the first not above the second"
        )
    if min(args.valid_fraction, args.test_fraction) < 0 or not args.valid_fraction + args.test_fraction < 1:
        raise InputError(
            f"--valid_fraction {args.valid_fraction} --test_fraction {args.test_fraction}: expected two shares of at "
            f"least 0 that leave something to train on"
        )
    if not args.input.is_file():
        raise InputError(f"--input {args.input}: no such file (working directory: {os.getcwd()})")
    there = [name for name in outputs() if (args.output_dir / name).exists()]
    if there:
        raise InputError(f"{args.output_dir}: {there[0]} is there already; delete it or choose another --output_dir")
    check_output_dir(args.output_dir)


def outputs() -> list[str]:
    return [*(f"{split}.jsonl" for split in SPLITS), "report.json"]


class Prompt(NamedTuple):
    """A prompt's row, a number of its user, and whether it is an example of a few-shot prompt."""

    row: Row
    user: int
    few_shot: bool


class RawPrompts:
    """The prompts of a file of raw rows, few-shot rows expanded. Reading it twice gives the same or an error."""

    def __init__(self, path: Path, skip_bad_rows: bool):
        self.path, self.skip = path, skip_bad_rows
        self.bad: list[str] = []
        self.rows = self.few_shot = 0
        self.state = self._state()

    def __iter__(self) -> Iterator[Prompt]:
        self.bad, self.rows, self.few_shot = [], 0, 0
        talks = None  # whether prompts are conversations: other tools read a file of one kind only
        with (
            self.path.open("rb") as file,
            tqdm(total=self.state[1], unit="B", unit_scale=True, desc=f"reading {self.path.name}") as bar,
        ):
            for number, line in enumerate(file, start=1):
                bar.update(len(line))
                if line.isspace():
                    continue
                self.rows += 1
                try:
                    row = self._row(line, f"{self.path}, row {number}", talks)
                except InputError as error:
                    self.bad.append(str(error))
                    continue
                talks = isinstance(row.get("prompt"), list)
                several = row.get("prompt") is None
                self.few_shot += several
                user = user_of(row)
                if row.get("user_id") is not None:
                    row["user_id"] = str(row["user_id"])  # a column of text and numbers is none
                for one in expand_few_shot(row):
                    yield Prompt(one, user, several)
        if self._state() != self.state:
            raise InputError(f"{self.path}: was changed while it was read; run again")
        if self.bad and not self.skip:
            shown = "\n  ".join(self.bad[:20])
            more = f"\n  and {len(self.bad) - 20} more" if len(self.bad) > 20 else ""
            raise InputError(
                f"{self.path}: {len(self.bad)} of {self.rows} rows are wrong; correct them, or leave them out with "
                f"--skip_bad_rows:\n  {shown}{more}"
            )
        if not self.rows:
            raise InputError(f"{self.path}: no rows; expected JSON Lines with a column 'prompt'")

    def _row(self, line: bytes, where: str, talks: bool | None) -> Row:
        try:
            row = check_raw_prompt(parse_json(line.decode("utf-8-sig"), where), where)
        except UnicodeDecodeError as error:
            raise InputError(f"{where}: not UTF-8 ({error.reason}); convert the file to UTF-8") from None
        if talks is not None and talks != isinstance(row.get("prompt"), list):
            kinds = ("a text", "conversations") if talks else ("a conversation", "texts")
            raise InputError(f"{where}: {kinds[0]} among {kinds[1]}; put them into files of their own")
        return row

    def _state(self) -> tuple[int, int]:
        state = self.path.stat()
        return state.st_mtime_ns, state.st_size


def fates_of(prompts: RawPrompts, args: argparse.Namespace) -> np.ndarray:
    """What becomes of each prompt, a number of `FATES`: (N,)."""
    keys, lengths, users = array("Q"), array("Q"), array("Q")
    for prompt in prompts:
        text = text_of(prompt.row["prompt"])
        # All of it where the beginning is shared by nature
        keys.append(prefix_key(text, None if prompt.few_shot else args.prefix_length))
        lengths.append(len(text))
        users.append(prompt.user)
    key, length, user = (np.frombuffer(numbers, dtype=np.uint64) for numbers in (keys, lengths, users))
    fates = np.zeros(len(key), dtype=np.uint8)
    fates[length < args.min_characters] = FATES["too short"]
    if args.max_characters is not None:
        fates[length > args.max_characters] = FATES["too long"]
    fates = among_kept(fates, longest_of_each, key, length, fate="near-duplicate")
    fates = among_kept(fates, partial(first_of_each, most=args.max_per_user), user, fate="over the user's limit")
    kept = np.flatnonzero(fates == 0)
    known, place = np.unique(user[kept], return_inverse=True)
    split = [FATES[split_of(int(one), args.seed, args.valid_fraction, args.test_fraction)] for one in known]
    fates[kept] = np.array(split, dtype=np.uint8)[place]
    return fates


def among_kept(fates: np.ndarray, rule: Any, *numbers: np.ndarray, fate: str) -> np.ndarray:
    """`fates` after `rule` has chosen among the prompts that no rule before has taken out."""
    kept = np.flatnonzero(fates == 0)
    out = fates.copy()
    out[kept[~rule(*(each[kept] for each in numbers))]] = FATES[fate]
    return out


def user_of(row: Row) -> int:
    """A number of a raw row's user; a prompt without one has its own, the examples of a few-shot prompt together."""
    if row.get("user_id") is not None:
        return number_of(f"user {row['user_id']}")
    return number_of("prompt " + json.dumps([row.get("prompt"), row.get("instruction"), row.get("examples")]))


@cache
def personal_data() -> PersonalData:
    """One of a process."""
    return PersonalData()


def searched(row: Row, masked: bool) -> tuple[Row, list[str]]:
    """A row and the kinds of personal data in its prompt and completion, which are masked if asked for."""
    kinds = [kind for text in texts_of(row) for _, _, kind in personal_data().find(text)]
    if kinds and masked:
        row = {**row, **{name: masked_text(row[name]) for name in ("prompt", "completion") if row.get(name)}}
    return row, kinds


def masked_text(value: Any) -> Any:
    """A text or a conversation with personal data masked."""
    if isinstance(value, str):
        return personal_data().mask(value)
    return [{**message, "content": personal_data().mask(message["content"])} for message in value]


def texts_of(row: Row) -> list[str]:
    """Texts of prompt and completion, of a conversation each message's."""
    values = [row[name] for name in ("prompt", "completion") if row.get(name)]
    return [
        text for value in values for text in ([value] if isinstance(value, str) else [m["content"] for m in value])
    ]


class Writer:
    """The files of the splits, and the counts of the report."""

    def __init__(self, folder: Path, stack: ExitStack, args: argparse.Namespace):
        self.files = {
            split: stack.enter_context((folder / f"{split}.jsonl").open("w", encoding="utf-8", newline="\n"))
            for split in SPLITS
        }
        self.args = args
        self.counts: dict[str, dict[str, Counter]] = {
            split: {"source": Counter(), "category": Counter(), "user": Counter()} for split in SPLITS
        }
        self.personal, self.kinds = 0, Counter()

    def write(self, split: str, row: Row, user: int, kinds: list[str]) -> None:
        if kinds:
            self.personal += 1
            self.kinds.update(kinds)
            if self.args.pii == "drop":
                return
        if self.args.assign_categories and row.get("category") is None:
            row = {**row, "category": use_case(text_of(row["prompt"]))}
        self.files[split].write(json.dumps(row, ensure_ascii=False) + "\n")
        counts = self.counts[split]
        counts["source"][str(row.get("source") or "not given")] += 1
        counts["category"][row.get("category") or "not given"] += 1
        counts["user"][user] += 1


def those_that_stay(prompts: RawPrompts, fates: bytes) -> Iterator[tuple[Prompt, int]]:
    for place, prompt in enumerate(prompts):  # which tells at its end if there are others than before
        if place < len(fates) and fates[place] < len(SPLITS):
            yield prompt, fates[place]


def in_blocks(chosen: Iterator[tuple[Prompt, int]]) -> Iterator[list[tuple[Prompt, int]]]:
    """So many at a time, or so many characters."""
    block, size = [], 0
    for prompt, fate in chosen:
        block.append((prompt, fate))
        size += sum(map(len, texts_of(prompt.row)))
        if len(block) == BLOCK or size > BLOCK_CHARACTERS:
            yield block
            block, size = [], 0
    yield block


def write_splits(prompts: RawPrompts, fates: np.ndarray, writer: Writer, args: argparse.Namespace) -> None:
    """Write every prompt that stays into its split, in the order of the input."""
    search = partial(searched, masked=args.pii == "mask")
    if args.pii != "keep":
        personal_data().load()
    with Pool(args.num_proc) as pool:
        for block in in_blocks(those_that_stay(prompts, fates.tobytes())):
            # Only those of the training split are searched, and only those with a sign of something leave this process
            asked = {
                place: prompt.row
                for place, (prompt, fate) in enumerate(block)
                if args.pii != "keep"
                and fate == FATES["train"]
                and any(map(personal_data().suspects, texts_of(prompt.row)))
            }
            answers = dict(zip(asked, pool.map(search, asked.values(), chunksize=64), strict=True))
            for place, (prompt, fate) in enumerate(block):
                row, kinds = answers.get(place, (prompt.row, []))
                writer.write(SPLITS[fate], row, prompt.user, kinds)


def report_of(prompts: RawPrompts, fates: np.ndarray, writer: Writer, args: argparse.Namespace) -> Row:
    """Counts of every rule, and the prompts of each split by where they come from, as the paper's Table 6."""
    counts = {name: int((fates == code).sum()) for name, code in FATES.items()}
    settings = {name: value for name, value in vars(args).items() if name not in ("input", "output_dir", "num_proc")}
    return {
        "input": args.input.name,
        "settings": settings,
        "rows": prompts.rows,
        "bad rows left out": len(prompts.bad),
        "few-shot rows expanded": prompts.few_shot,
        "prompts": len(fates),
        "dropped": {
            **{name: counts[name] for name in RULES},
            "personal data": writer.personal if args.pii == "drop" else 0,
        },
        "masked": writer.personal if args.pii == "mask" else 0,
        "personal data found": dict(sorted(writer.kinds.items())),
        "splits": {
            split: {
                "prompts": counts["user"].total(),
                "users": len(counts["user"]),
                "most of a user": max(counts["user"].values(), default=0),
                "by source": dict(sorted(counts["source"].items())),
                "by category": dict(sorted(counts["category"].items())),
            }
            for split, counts in writer.counts.items()
        },
    }


def print_report(report: Row) -> None:
    print(f"{report['rows']:,} rows, {report['prompts']:,} prompts")
    for name, count in {**report["dropped"], "masked": report["masked"]}.items():
        print(f"  {'' if name == 'masked' else 'dropped, '}{name}: {count:,}")
    print(f"{'split':<8}{'prompts':>12}{'users':>10}  by source")
    for split, of in report["splits"].items():
        sources = ", ".join(f"{name} {count:,}" for name, count in of["by source"].items())
        print(f"{split:<8}{of['prompts']:>12,}{of['users']:>10,}  {sources}")
    empty = [split for split, of in report["splits"].items() if not of["prompts"]]
    if empty:
        print(f"no prompts in {', '.join(empty)}: few users, or a fraction of 0", file=sys.stderr)


def prepare(args: argparse.Namespace) -> Row:
    """Write the splits and the report, all of them or none."""
    check(args)
    prompts = RawPrompts(args.input, args.skip_bad_rows)
    fates = fates_of(prompts, args)
    if not (fates < len(SPLITS)).any():
        counts = ", ".join(f"{name} {count}" for name in RULES if (count := int((fates == FATES[name]).sum())))
        raise InputError(f"{args.input}: none of its {len(fates)} prompts is left: {counts}; change the rules' flags")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=args.output_dir))
    try:
        with ExitStack() as stack:
            writer = Writer(folder, stack, args)
            write_splits(prompts, fates, writer, args)
        report = report_of(prompts, fates, writer, args)
        (folder / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for name in outputs():
            (folder / name).replace(args.output_dir / name)
    finally:
        shutil.rmtree(folder)
    return report


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    try:
        print_report(prepare(args))
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
