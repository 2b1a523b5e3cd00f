r"""
Rankings from public formats into rows for recipes/reward.py and back, checked, and merged where several labelers
ranked.

    python recipes/data/convert_rankings.py --from hh --drop_empty --input pairs.jsonl --output rankings.jsonl
    python recipes/data/convert_rankings.py --to hh --input rankings.jsonl --output pairs.jsonl
    python recipes/data/convert_rankings.py --from argilla --merge --input records.json --output rankings.jsonl

Formats are listed by --help. Rows are read from .jsonl, .json, .csv or .parquet and written as JSON Lines. Every bad
row is named, and nothing is written then unless `--skip_bad_rows` leaves them out. From rankings to rankings, the rows
are checked and, if asked for, merged.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from instructgpt_trl.data import InputError, check_output_dir, read_rows, write_rows
from instructgpt_trl.data.merging import merge_labelers
from instructgpt_trl.data.ranking_formats import FORMATS, hh_conversation, read_ranking, without_empty

Row = dict[str, Any]


def arguments(argv: list[str] | None) -> argparse.Namespace:
    formats = "\n".join(f"  {name:<14}{of.title}" for name, of in FORMATS.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nformats:\n{formats}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--from", dest="source", choices=FORMATS, default="rankings", help="format of --input")
    parser.add_argument("--to", dest="target", choices=FORMATS, default="rankings", help="format of --output")
    parser.add_argument("--input", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path, help="JSON Lines file to write")
    parser.add_argument("--merge", action="store_true", help="one ranking for all labelers of the same completions")
    parser.add_argument("--conversational", action="store_true", help="--from hh: turns as messages, for chat models")
    parser.add_argument("--drop_empty", action="store_true", help="leave out completions of no text")
    parser.add_argument("--skip_bad_rows", action="store_true", help="leave wrong rows out, and name them")
    return parser.parse_args(argv)


def convert(args: argparse.Namespace) -> dict[str, int]:
    """Counts of what was read, and of what became of it."""
    bad: list[str] = []
    rows, places = read_rows(str(args.input), bad)
    unread = len(bad)
    rankings: list[tuple[Row, str]] = []
    without = 0
    for row, where in zip(tqdm(rows, desc=f"reading {args.input.name}"), places, strict=True):
        try:
            found = read_ranking(row, args.source, where)
            if args.conversational:
                found = [hh_conversation(ranking, where) for ranking in found]
            rankings += [(ranking, where) for ranking in found]
            without += not found
        except InputError as error:
            bad.append(str(error))
    counts = {
        "rows": len(rows) + unread,
        "bad rows": len(bad),
        "rows without a ranking": without,
        "rankings": len(rankings),
    }
    counts["with a completion of no text"] = sum(without_empty(ranking) != ranking for ranking, _ in rankings)
    if args.drop_empty:
        rankings = [(kept, where) for ranking, where in rankings if (kept := without_empty(ranking))]
        counts["rankings of two texts or more"] = len(rankings)
    if args.merge:
        rankings = [(ranking, str(args.input)) for ranking in merge_labelers(ranking for ranking, _ in rankings)]
        counts["merged rankings"] = len(rankings)
    counts["with ties only, in no pair"] = sum(len(set(ranking["ranks"])) == 1 for ranking, _ in rankings)
    out: list[Row] = []
    for ranking, where in rankings:
        try:
            out += FORMATS[args.target].write(ranking, where)
        except InputError as error:
            bad.append(str(error))
    counts |= {"bad rows": len(bad), "rows written": len(out)}
    _tell(bad, args)
    if not out:
        raise InputError(f"{args.input}: no rankings in its {len(rows)} rows; is it of the format {args.source}?")
    write_rows(out, args.output)
    return counts


def _tell(bad: list[str], args: argparse.Namespace) -> None:
    if not bad:
        return
    print(*bad, sep="\n", file=sys.stderr)
    if not args.skip_bad_rows:
        raise InputError(
            f"{args.input}: {len(bad)} bad rows, named above; correct them, or leave them out with --skip_bad_rows"
        )


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    try:
        if args.conversational and args.source != "hh":
            raise InputError(
                "--conversational is for --from hh; recipes/reward.py turns texts into messages by itself"
            )
        if args.output.exists():
            raise InputError(f"{args.output}: is there already; delete it or choose another --output")
        check_output_dir(args.output.parent)
        counts = convert(args)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(*(f"{name}: {count:,}" for name, count in counts.items()), sep="\n")
    if counts["with a completion of no text"] and not args.drop_empty:
        print("recipes/reward.py refuses completions of no text; --drop_empty leaves them out")
    print(f"written: {args.output}")


if __name__ == "__main__":
    main()
