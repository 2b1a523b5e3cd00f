"""
A million synthetic prompts through recipes/data/prepare_prompts.py: seconds, memory, and whether every rule is right.

    python eval/bench/prompts.py                 # a million; --rows 20000 for a look

Planted are prompts that begin alike in another case and with other white space, users with far more prompts than are
kept, and personal data of six kinds. What has to come out is counted again by plain dictionaries, row by row; but for
the split of each user, which is read from the output and has to be one. The recipe runs twice, with as many processes
as there are cores and with one, and has to write the same bytes.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "data" / "prepare_prompts.py"
SPLITS = ("train", "valid", "test")
LIMIT, PREFIX = 200, 100  # the recipe's own
Row = dict[str, Any]


def words(rng: random.Random, count: int) -> str:
    """Made-up words, so that nothing is like another by chance."""
    return " ".join("".join(rng.choices("abcdefghijklmnop", k=5)) for _ in range(count))


def personal(rng: random.Random) -> tuple[str, str]:
    """A kind of personal data and one of it."""
    four = [rng.randint(1, 254) for _ in range(4)]
    return rng.choice(
        [
            ("EMAIL_ADDRESS", f"{words(rng, 1)}.{rng.randrange(10**6)}@example.com"),
            ("PHONE_NUMBER", f"({rng.randint(201, 989)}) {rng.randint(200, 999)}-{rng.randint(0, 9999):04d}"),
            ("CREDIT_CARD", rng.choice(["4111 1111 1111 1111", "5500-0000-0000-0004", "378282246310005"])),
            ("IBAN_CODE", rng.choice(["DE89 3704 0044 0532 0130 00", "GB82WEST12345698765432"])),
            ("IP_ADDRESS", ".".join(map(str, four))),
            ("US_SSN", f"{rng.randint(100, 660)}-{rng.randint(10, 99)}-{rng.randint(1000, 9999)}"),
        ]
    )


def rows_of(count: int) -> list[Row]:
    """Twentieths: near-duplicates, of which the second is the longer; heavy users; and some with personal data."""
    rng = random.Random(0)
    rows: list[Row] = []
    while len(rows) < count:
        start, more = words(rng, 20), words(rng, rng.choice([5, 20, 40, 60]))
        user = f"user {rng.randrange(max(1, count // 15))}"
        kind = rng.random()
        if kind < 0.05:
            rows.append({"prompt": f"{start} {more[:3]}", "user_id": user})
            rows.append({"prompt": f" {start.title().replace(' ', '  ')} {more}", "user_id": f"{user}0"})
        elif kind < 0.08:
            name, value = personal(rng)
            rows.append({"prompt": f"{start} {value} {more}", "user_id": user, "planted": name})
        elif kind < 0.13:
            rows.append({"prompt": f"{start} {more}", "user_id": f"heavy {rng.randrange(1 + count // 50_000)}"})
        else:
            rows.append({"prompt": f"{start} {more} {rng.randrange(3000)}", "user_id": user})
    return rows


def run(raw: Path, output: Path, *flags: str) -> tuple[float, float]:
    """Seconds, and the most MB of all processes (a page that several share counts once)."""
    begin, most = time.perf_counter(), 0
    command = [sys.executable, str(RECIPE), "--input", str(raw), "--output_dir", str(output), *flags]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        family = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                several = [family, *family.children(recursive=True)]
                most = max(most, sum(one.memory_full_info().pss for one in several))
            except psutil.Error:  # one of them has just ended
                pass
            time.sleep(0.2)
    if process.returncode:
        sys.exit(f"error: the recipe ended with {process.returncode}")
    return time.perf_counter() - begin, most / 1e6


def expected(rows: list[Row], splits: dict[str, str]) -> tuple[dict[str, list[Row]], Counter]:
    """Rows of each split, and how many each rule takes, by plain dictionaries."""
    longest: dict[str, int] = {}
    for place, row in enumerate(rows):
        key = " ".join(row["prompt"].lower().split())[:PREFIX]
        if key not in longest or len(row["prompt"]) > len(rows[longest[key]]["prompt"]):
            longest[key] = place
    of_user, out, dropped = Counter(), {split: [] for split in SPLITS}, Counter()
    dropped["near-duplicate"] = len(rows) - len(longest)
    for place in sorted(longest.values()):
        row = rows[place]
        of_user[row["user_id"]] += 1
        split = splits.get(row["user_id"], "train")  # of whom nothing is left, personal data were all he had
        if of_user[row["user_id"]] > LIMIT:
            dropped["over the user's limit"] += 1
        elif split == "train" and "planted" in row:
            dropped["personal data"] += 1
        else:
            out[split].append(row)
    return out, dropped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = rows_of(args.rows)
        raw = folder / "raw.jsonl"
        with raw.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        figures = dict(zip(("seconds", "mb"), run(raw, folder / "out"), strict=True))
        run(raw, folder / "again", "--num_proc", "1")
        written = {split: (folder / "out" / f"{split}.jsonl").read_bytes() for split in SPLITS}
        figures["same_twice"] = all((folder / "again" / f"{s}.jsonl").read_bytes() == written[s] for s in SPLITS)
        report = json.loads((folder / "out" / "report.json").read_text(encoding="utf-8"))
    found = {split: [json.loads(line) for line in lines.split(b"\n")[:-1]] for split, lines in written.items()}
    places = {(row["user_id"], split) for split, of in found.items() for row in of}
    splits = dict(places)
    wanted, dropped = expected(rows, splits)
    figures |= {
        "rows": len(rows),
        "users_in_two_splits": len(places) - len(splits),
        "right": found == wanted and all(report["dropped"][rule] == count for rule, count in dropped.items()),
    }
    print(f"{len(rows):,} prompts: {figures['seconds']:.0f} s, {figures['mb']:.0f} MB in all processes")
    for rule, count in dropped.items():
        print(f"  {rule}: {report['dropped'][rule]:,} dropped, {count:,} to be dropped")
    print(
        f"  users in two splits: {figures['users_in_two_splits']}; every row of every split right: {figures['right']}"
    )
    print(f"  the same bytes with one process: {figures['same_twice']}")
    if args.json:
        Path(args.json).write_text(json.dumps(figures), encoding="utf-8")
    if not (figures["right"] and figures["same_twice"]) or figures["users_in_two_splits"]:
        sys.exit("error: that is not what the rules say")


if __name__ == "__main__":
    main()
