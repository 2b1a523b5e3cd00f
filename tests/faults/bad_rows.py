"""Rows, and files of rows, that are none: texts, tables, other formats."""

import csv
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import datasets
from hypothesis import strategies as st

from .bad_inputs import DELETE, Bad, changed

GOOD: dict[str, dict[str, Any]] = {
    "demonstration": {"prompt": "p", "completion": "c"},
    "ranking": {"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2]},
    "prompt": {"prompt": "p"},
    "pretraining": {"text": "some text"},
}
FLAGS = {
    "demonstration": [("sft", "--dataset"), ("sft", "--eval_dataset"), ("reward", "--demonstrations")],
    "ranking": [("reward", "--dataset"), ("reward", "--eval_dataset")],
    "prompt": [("ppo_ptx", "--dataset"), ("ppo_ptx", "--eval_dataset")],
    "pretraining": [("sft", "--pretraining_dataset"), ("ppo_ptx", "--ptx_dataset")],
}
HALVES = st.sampled_from(["\ud800", "a\udfff", "\udc80\ud83d"])
NUMBERS = st.one_of(
    st.integers(-(10**30), 10**30), st.floats(), st.sampled_from([float("nan"), float("inf"), 1e308, -1.5, 10**400])
)
JUNK = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text("ab \n", max_size=3)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "x", ""]), inner, max_size=2),
    max_leaves=4,
)
NOT_MESSAGES = st.sampled_from(
    [
        *({}, {"role": "user"}, {"content": "x"}, {"role": "user", "content": None}, {"role": "", "content": "x"}),
        *({"role": 3, "content": "x"}, {"role": ["user"], "content": "x"}, {"role": "user", "content": ["x"]}),
        *({"role": "user", "content": 1.5}, {"role": True, "content": "x"}, "text", 7, None, ["role", "content"]),
        *({"role": "assistant", "content": " "}, {"role": "user", "content": {"text": "x"}}),
    ]
)
TALK = {"role": "user", "content": "x"}
NOT_TEXT = st.one_of(
    st.booleans(),
    NUMBERS,
    st.dictionaries(st.sampled_from(["role", "content", "x"]), JUNK),
    st.sampled_from(["", " ", "\n\t", "\u00a0", "\u2003"]),
    st.lists(JUNK.filter(lambda value: not isinstance(value, dict)), min_size=1, max_size=3),
    st.builds(lambda bad, before: [*[TALK] * before, bad], NOT_MESSAGES, st.integers(0, 2)),
)
NOT_A_RANK = st.one_of(
    st.integers(max_value=0),
    st.integers(min_value=2**31),
    st.floats().filter(lambda x: x != x or x != x // 1 or not 1 <= x < 2**31),
    st.sampled_from(["1", "first", True, None, [1], {"rank": 1}, "", 10**400]),
)


@st.composite
def bad_values(draw: st.DrawFn, kind: str) -> tuple[dict[str, Any], list[str | tuple[str, ...]]]:
    """What to change in a row (`DELETE` a column), and what the message names."""
    if kind == "ranking":
        return draw(bad_rankings())
    column = draw(st.sampled_from(list(GOOD[kind])))
    if draw(st.integers(0, 4)) == 0:
        return {column: draw(st.sampled_from([DELETE, None]))}, [f"column '{column}' is missing"]
    value = draw(NOT_TEXT if kind != "pretraining" else st.one_of(NOT_TEXT, st.just([TALK]), st.just([])))
    if value == [] or draw(st.integers(0, 9)) == 0:
        value = []
    if kind == "demonstration" and column == "completion" and draw(st.integers(0, 5)) == 0:
        return {column: [TALK]}, ["column 'completion'", "a conversation, but the prompt is a string"]
    return {column: value}, [f"column '{column}'"]


@st.composite
def bad_rankings(draw: st.DrawFn) -> tuple[dict[str, Any], list[str | tuple[str, ...]]]:
    way = draw(st.integers(0, 9))
    if way == 0:
        return {"prompt": draw(NOT_TEXT.filter(lambda x: not isinstance(x, str)))}, ["column 'prompt'"]
    if way == 1:
        column = draw(st.sampled_from(["completions", "ranks", "prompt"]))
        return {column: draw(st.sampled_from([DELETE, None]))}, [f"column '{column}' is missing"]
    if way == 2:
        few = st.one_of(st.sampled_from([[], ["a"], "a", '["a"', '{"a": 1}', "[" * 10_000]), NUMBERS, st.booleans())
        return {"completions": draw(few)}, ["column 'completions'"]
    if way == 3:
        count = draw(st.integers(0, 5).filter(lambda n: n != 2))
        return {"ranks": list(range(1, count + 1))}, ["column 'ranks'"]
    if way == 4:
        bad = st.one_of(
            st.sampled_from(["1 2", '"1, 2"', "null", "{}", "[" * 10_000, {"a": 1}]), NUMBERS, st.booleans()
        )
        return {"ranks": draw(bad)}, ["'ranks'"]
    if way in (5, 6):
        place = draw(st.integers(0, 1))
        return {"ranks": [draw(NOT_A_RANK) if k == place else 1 for k in range(2)]}, [f"rank {place}"]
    if way == 7:
        pair = {"completions": DELETE, "ranks": DELETE, "chosen": "a", "rejected": "b"}
        side = draw(st.sampled_from(["chosen", "rejected"]))
        if draw(st.booleans()):
            return {**pair, side: draw(st.sampled_from([DELETE, None]))}, ["column 'completions' is missing"]
        place = ("chosen", "rejected").index(side)
        return {**pair, side: draw(NOT_TEXT)}, [f"completion {place}"]
    if way == 8:
        extra, value = draw(
            st.tuples(st.sampled_from(["models", "scores", "ratings"]), st.lists(st.integers(1, 3))).filter(
                lambda pair: len(pair[1]) != 2
            )
        )
        return {extra: value}, [f"column '{extra}'"]
    place = draw(st.integers(0, 2))
    bad = [draw(NOT_TEXT) if k == place else "b" for k in range(3)]
    return {"completions": bad, "ranks": [1, 2, 3]}, [f"completion {place}"]


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    file = io.StringIO()
    columns = list(dict.fromkeys(column for row in rows for column in row))
    writer = csv.DictWriter(file, columns)
    writer.writeheader()
    writer.writerows(
        {key: json.dumps(x) if isinstance(x, list | dict) else x for key, x in row.items()} for row in rows
    )
    return file.getvalue().encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    with tempfile.NamedTemporaryFile(suffix=".parquet") as file:
        columns = list(dict.fromkeys(column for row in rows for column in row))
        rows = [{column: row.get(column) for column in columns} for row in rows]
        datasets.Dataset.from_list(rows).to_parquet(file.name)
        return Path(file.name).read_bytes()


def as_jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_json(rows: list[Any]) -> bytes:
    return json.dumps(rows, indent=1).encode()


def _of_rows(kind: str, which: int, name: str, content: bytes | None, names: list) -> Bad:
    stage, flag = FLAGS[kind][which % len(FLAGS[kind])]
    return Bad(stage, {flag: f"HERE/{name}"}, {name: content}, [f"HERE/{name}", *names])


@st.composite
def bad_rows(draw: st.DrawFn) -> Bad:
    """A file of good rows with a bad one among them."""
    kind, which = draw(st.sampled_from(list(GOOD))), draw(st.integers(0, 2))
    change, names = draw(bad_values(kind))
    before, after = draw(st.integers(0, 3)), draw(st.integers(0, 2))
    rows = [*[GOOD[kind]] * before, changed(GOOD[kind], change), *[GOOD[kind]] * after]
    suffix, write = draw(st.sampled_from([(".jsonl", as_jsonl), (".json", as_json)]))
    return _of_rows(kind, which, f"rows{suffix}", write(rows), [f"row {before + 1}", *names])


@st.composite
def bad_tables(draw: st.DrawFn) -> Bad:
    """CSV and Parquet, whose columns have a type."""
    kind, which = draw(st.sampled_from(list(GOOD))), draw(st.integers(0, 2))
    column = draw(st.sampled_from(list(GOOD[kind])))
    before = draw(st.integers(0, 3))
    good = [GOOD[kind]] * before
    is_csv = draw(st.booleans())
    blank = {"completions": "[]", "ranks": "[]"}.get(column, " ") if is_csv else None
    if draw(st.booleans()) and not (kind == "ranking" and column == "prompt" and blank == " "):
        rows = [*good, changed(GOOD[kind], {column: blank})]
        place = [f"row {before + 1 if is_csv else before}", f"'{column}'"]
    else:  # the column is not there, or another is
        new = draw(st.sampled_from([{"other": "x"}, {column.upper(): "x"}, {column + " ": "x"}]))
        rows = [changed(GOOD[kind], {column: DELETE, **new})] * (before + 1)
        place = [f"column '{column}' is missing"]
    name = f"rows{'.csv' if is_csv else '.parquet'}"
    return _of_rows(kind, which, name, (as_csv if is_csv else as_parquet)(rows), place)


NOT_UTF8 = st.sampled_from([b"\xff\xfe\x00p", b"\xe9t\xe9", b"\x80", b"caf\xe9\n", b"\xed\xa0\x80"])
NOT_A_ROW = JUNK.filter(lambda value: not isinstance(value, dict))
DEEP, DIGITS = b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", b'{"prompt": ' + b"9" * 5000 + b"}"


@st.composite
def bad_files(draw: st.DrawFn) -> Bad:
    """What is no file of rows, or not one of that type."""
    kind, which = draw(st.sampled_from(list(GOOD))), draw(st.integers(0, 2))
    ways = {".jsonl": bad_jsonl, ".json": bad_json, ".csv": bad_csv, ".parquet": bad_parquet, ".txt": bad_txt}
    suffix = draw(st.sampled_from([*ways, ".jsonl", ".json", "", ".xlsx", ".tsv", ".jsonl.gz", ".zip", ".yaml"]))
    if suffix not in ways:
        return _of_rows(kind, which, f"rows{suffix}", as_jsonl([GOOD[kind]]), ["unknown file type"])
    content, names = draw(ways[suffix](kind))
    return _of_rows(kind, which, f"rows{suffix}", content, names)


@st.composite
def bad_jsonl(draw: st.DrawFn, kind: str) -> tuple[bytes, list]:
    row = GOOD[kind]
    line, good = json.dumps(row).encode(), draw(st.integers(0, 2))
    whole = line.decode()
    bad, names = draw(
        st.one_of(
            st.integers(1, len(line) - 1).map(lambda cut: (line[:cut], ["not valid JSON"])),
            NOT_UTF8.map(lambda junk: (junk, ["UTF-8"])),
            HALVES.map(lambda half: (json.dumps(changed(row, {next(iter(row)): half})).encode(), ["surrogate"])),
            st.sampled_from([(DEEP, ["nested too deep"]), (DIGITS, []), (line + b", " + line, ["not valid JSON"])]),
            st.just((line.replace(b'"', b"'"), ["not valid JSON"])),
            st.just((line[:-1] + b', "' + next(iter(row)).encode() + b'": "x"}', ["is there twice"])),
            NOT_A_ROW.map(lambda value: (json.dumps(value).encode(), ["expected an object"])),
            st.sampled_from(["utf-16", "utf-16-le"]).map(lambda name: (whole.encode(name), [("UTF-8", "NUL")])),
            st.binary(max_size=20).map(lambda junk: (b"\x1f\x8b\x08" + junk, [])),  # compressed
        )
    )
    if draw(st.integers(0, 9)) == 0:
        return draw(st.sampled_from([b"", b"\n", b" \n\n", b"\xef\xbb\xbf"])), ["no rows"]
    return (line + b"\n") * good + bad, [f"row {good + 1}", *names]


@st.composite
def bad_json(draw: st.DrawFn, kind: str) -> tuple[bytes, list]:
    row = GOOD[kind]
    line, good = json.dumps(row).encode(), draw(st.integers(0, 2))
    first = f"row {good + 1}"
    return draw(
        st.one_of(
            st.integers(1, len(line) - 1).map(lambda cut: (b"[" + line + b", " + line[:cut], ["not valid JSON"])),
            HALVES.map(
                lambda half: (as_json([row] * good + [changed(row, {next(iter(row)): half})]), [first, "surrogate"])
            ),
            NOT_A_ROW.map(lambda value: (as_json([row] * good + [value]), [first, "expected an object"])),
            st.just((b"[" + (line + b",") * good + DEEP + b"]", ["nested too deep"])),
            st.just((b"[" + (line + b",") * good + DIGITS + b"]", [])),
            st.sampled_from([b"", b"[]", b" \n[ ]\n"]).map(lambda text: (text, ["no rows"])),
            st.sampled_from([b"null", b"3", b'"text"', b"true", b"{", b"}"]).map(lambda text: (text, ["row 1"])),
            NOT_UTF8.map(lambda junk: (b"[" + junk + b"]", ["UTF-8"])),
            st.just((as_json([row]).decode().encode("utf-16"), ["UTF-8"])),
        )
    )


@st.composite
def bad_csv(draw: st.DrawFn, kind: str) -> tuple[bytes, list]:
    row, good = GOOD[kind], draw(st.integers(1, 3))
    table, column = as_csv([row] * good), next(iter(row))
    header = table.split(b"\r\n")[0]
    twice = b"\r\n".join([column.encode() + b"," + header, *[b"x," + line for line in table.split(b"\r\n")[1:-1]]])
    return draw(
        st.one_of(
            st.sampled_from([b"", header, header + b"\n\n"]).map(lambda text: (text, ["no rows"])),
            st.just((table + b'"open', [f"row {good + 1}", "not valid CSV"])),
            st.integers(4, 8).map(lambda n: (table + b"a," * n, [f"row {good + 1}", "more values"])),
            NOT_UTF8.map(lambda junk: (table + junk, ["UTF-8"])),
            st.just((table.decode().encode("utf-16-le"), ["row 1", "NUL"])),
            st.just((table.replace(b",", b";").replace(b"prompt", b"p;").replace(b"text", b"t"), ["is missing"])),
            st.just((twice, [f"'{column}' twice"])),
        )
    )


@st.composite
def bad_parquet(draw: st.DrawFn, kind: str) -> tuple[bytes, list]:
    row, way = GOOD[kind], draw(st.integers(0, 3))
    if way == 0:
        return draw(st.binary(max_size=40)), ["Parquet"]
    if way == 1:
        return as_jsonl([row]), ["Parquet"]
    if way == 2:
        table = as_parquet([row])
        return table[: draw(st.integers(1, len(table) - 1))], ["Parquet"]
    column = draw(st.sampled_from(list(row)))
    value = draw(st.one_of(st.integers(-9, 9), st.booleans(), st.floats(-1, 1), st.just({"a": 1}), st.just([[1.5]])))
    return as_parquet([{**row, column: value}]), ["row 0", f"'{column}'" if value != [[1.5]] else ""]


@st.composite
def bad_txt(draw: st.DrawFn, kind: str) -> tuple[bytes, list]:
    good = draw(st.integers(0, 3))
    if kind != "pretraining" and draw(st.booleans()):
        return b"a text\n" * (good + 1), ["row 1", "is missing"]
    return draw(
        st.one_of(
            NOT_UTF8.map(lambda junk: (b"a text\n" * good + junk, [f"row {good + 1}", "UTF-8"])),
            st.just(("some text\n".encode("utf-16-le"), ["row 1", "NUL"])),
            st.just((b"text\n" * good + b"a\x00b", [f"row {good + 1}", "NUL"])),
            st.just((b" \n" * good, ["no rows"])),
        )
    )


@st.composite
def no_files(draw: st.DrawFn) -> Bad:
    kind, which = draw(st.sampled_from(list(GOOD))), draw(st.integers(0, 2))
    stage, flag = FLAGS[kind][which % len(FLAGS[kind])]
    suffix = draw(st.sampled_from([".jsonl", ".json", ".csv", ".parquet", ".txt"]))
    if draw(st.booleans()):  # a folder, which save_to_disk did not write
        return Bad(stage, {flag: f"HERE/rows{suffix}"}, {f"rows{suffix}": None}, [f"HERE/rows{suffix}"])
    return Bad(stage, {flag: f"HERE/nowhere{suffix}"}, {}, [f"HERE/nowhere{suffix}: no such file"])


@st.composite
def mixed_rows(draw: st.DrawFn) -> Bad:
    """Texts in one row and conversations in another."""
    kind = draw(st.sampled_from(["demonstration", "prompt", "ranking"]))
    said = [{"role": "assistant", "content": "x"}]
    talk = {
        "demonstration": {"prompt": [TALK], "completion": said},
        "prompt": {"prompt": [TALK]},
        "ranking": {"prompt": [TALK], "completions": [said, said], "ranks": [1, 2]},
    }[kind]
    rows = [*[GOOD[kind]] * draw(st.integers(1, 3)), *[talk] * draw(st.integers(1, 3))]
    rows = draw(st.permutations(rows))
    return _of_rows(kind, draw(st.integers(0, 2)), "rows.jsonl", as_jsonl(rows), ["cannot be mixed"])


ROWS = st.one_of(bad_rows(), bad_rows(), bad_files(), bad_files(), bad_tables(), mixed_rows(), no_files())
