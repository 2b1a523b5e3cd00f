"""
Generated bad inputs: rows, configs and folders that are wrong in one way each, as command lines of the recipes.

Only what is really wrong is generated: a flipped bit inside weights makes another legal number, and is not here.
"""

import csv
import hashlib
import io
import json
import pickle
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st


@dataclass
class Bad:
    """
    Args:
        stage: the recipe, `"sft"`, `"reward"` or `"ppo_ptx"`.
        flags: of its command line; `HERE` in them is the folder of the case, into which `files` are written.
        files: contents by name; none is a folder of that name.
        names: what its message has to say, all of them; of a tuple one.
        what: what is wrong, where `files` does not show it.
    """

    stage: str
    flags: dict[str, str]
    files: dict[str, bytes | None] = field(default_factory=dict)
    names: list[str | tuple[str, ...]] = field(default_factory=list)
    what: str = ""


def examples(strategy: st.SearchStrategy[Bad], count: int) -> list[Bad]:
    """So many different cases, the same each time."""
    found: dict[str, Bad] = {}

    @settings(
        max_examples=4 * count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(case: Bad) -> None:
        if len(found) < count:
            found.setdefault(repr(case), case)

    collect()
    return list(found.values())


# Rows

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
DELETE = object()
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


def changed(row: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in {**row, **change}.items() if value is not DELETE}


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


# Configs

NOT_FINITE = st.sampled_from([float("nan"), float("inf"), -float("inf")])
BELOW_0 = st.one_of(NOT_FINITE, st.floats(-1e6, -1e-9), st.integers(-100, -1))
NO_SHARE = st.one_of(BELOW_0, st.floats(1.0, 1e6, exclude_min=True), st.integers(2, 9))
AT_MOST_0 = st.one_of(BELOW_0, st.sampled_from([0, 0.0]))
NO_COUNT = st.one_of(AT_MOST_0, st.floats(0.001, 99).filter(lambda x: x != int(x)))
ALL, PPO = ("sft", "reward", "ppo_ptx"), ("ppo_ptx",)
# Fields of numbers: the recipes that have them, and what they cannot be
NUMBERS_OF: dict[str, tuple[tuple[str, ...], st.SearchStrategy]] = {
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_epsilon", "warmup_steps"), (ALL, BELOW_0)),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (ALL, st.one_of(NO_SHARE, st.just(1.0)))),
    **dict.fromkeys(("num_train_epochs", "logging_steps", "save_steps"), (ALL, AT_MOST_0)),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), (ALL, NO_COUNT)),
    **dict.fromkeys(("gradient_accumulation_steps", "dataset_num_proc"), (("sft", "reward"), NO_COUNT)),
    "max_steps": (ALL, st.one_of(st.integers(-99, -2), st.sampled_from([0, 1.5]), NOT_FINITE)),
    "max_grad_norm": (ALL, st.sampled_from([float("nan"), -float("inf"), -1, -0.5])),
    "seed": (ALL, st.sampled_from([-1, 2**32, 10**30, 1.5, float("nan")])),
    "dataloader_num_workers": (ALL, st.sampled_from([-1, 0.5, float("inf")])),
    "label_smoothing_factor": (("sft", "reward"), st.one_of(NO_SHARE, st.just(1))),
    "max_length": (("sft", "reward"), NO_COUNT),
    **dict.fromkeys(("residual_dropout", "pretraining_fraction"), (("sft",), st.one_of(NO_SHARE, st.just(1.0)))),
    "rm_score_max_new_tokens": (("sft",), NO_COUNT),
    "center_rewards_coefficient": (("reward",), BELOW_0),
    **dict.fromkeys(("gamma", "lam", "ema_decay"), (PPO, NO_SHARE)),
    **dict.fromkeys(("beta", "vf_coef", "ptx_coef", "value_learning_rate"), (PPO, BELOW_0)),
    **dict.fromkeys(("temperature", "kl_target"), (PPO, AT_MOST_0)),
    **dict.fromkeys(("cliprange_value", "epsilon"), (PPO, st.sampled_from([float("nan"), 0, 0.0, -0.2, -3]))),
    **dict.fromkeys(("ptx_ratio", "kl_horizon", "max_prompt_length", "max_completion_length"), (PPO, NO_COUNT)),
    **dict.fromkeys(("num_iterations", "num_generations", "generation_micro_batch_size"), (PPO, NO_COUNT)),
    **dict.fromkeys(("steps_per_generation", "ptx_max_length"), (PPO, NO_COUNT)),
    "warmup_updates": (PPO, st.sampled_from([-1, 0.5, float("nan"), float("inf")])),
    "missing_eos_score": (PPO, NOT_FINITE),
    "eval_fraction": (ALL, st.one_of(NO_SHARE, st.just(1), st.just(0.999))),
    **dict.fromkeys(("lora_r", "lora_alpha"), (ALL, NO_COUNT)),
    "lora_dropout": (ALL, st.one_of(NO_SHARE, st.just(1))),
}
NO_NUMBER = st.sampled_from(["fast", "1e", "0x1g", "", "1,5", [1], [], {"a": 1}, True, None, [[]]])
CHOICES_OF: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("eval_strategy", "logging_strategy", "save_strategy", "lr_scheduler_type", "optim"), ALL),
    **dict.fromkeys(("dtype", "bnb_4bit_quant_type", "attn_implementation"), ALL),
    **dict.fromkeys(("packing_strategy", "loss_type", "truncation_mode"), ("sft",)),
    "prefix_sharing": ("reward",),
    "lora_task_type": ALL,
}
FLAGS_OF = (
    "bf16",
    "fp16",
    "gradient_checkpointing",
    "use_peft",
    "load_in_4bit",
    "trust_remote_code",
    "conversational",
)
OBJECTS_OF: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("model_init_kwargs", "lr_scheduler_kwargs", "gradient_checkpointing_kwargs"), ALL),
    **dict.fromkeys(("generation_kwargs", "chat_template_kwargs"), PPO),
    "dataset_kwargs": ("sft",),
}
TEXTS_OF = ("dataset", "model_name_or_path", "output_dir", "model_revision", "run_name")
# Settings that contradict each other or the rows, and what is named
CONTRADICTIONS: list[tuple[tuple[str, ...], dict[str, Any], str | tuple[str, ...]]] = [
    (ALL, {"bf16": True, "fp16": True}, "bf16"),
    (ALL, {"load_in_4bit": True, "load_in_8bit": True}, "8 bit and 4 bit"),
    (ALL, {"eval_strategy": "steps", "eval_steps": 1}, "eval_strategy"),
    (ALL, {"eval_strategy": "epoch"}, "eval_strategy"),
    (ALL, {"load_best_model_at_end": True, "save_strategy": "steps"}, "load_best_model_at_end"),
    (ALL, {"dataloader_prefetch_factor": 2}, "dataloader_prefetch_factor"),
    (ALL, {"logging_steps": 2.5}, "logging_steps"),
    (ALL, {"save_steps": 7.5}, "save_steps"),
    (ALL, {"resume_from_checkpoint": "nowhere"}, "resume_from_checkpoint"),
    (ALL, {"resume_from_checkpoint": True}, "resume_from_checkpoint"),
    (ALL, {"use_peft": True, "lora_target_modules": "nosuch"}, ("nosuch", "target_modules")),
    (ALL, {"use_peft": True, "lora_target_modules": ["nosuch", "nor_this"]}, ("nosuch", "target_modules")),
    (ALL, {"model_init_kwargs": {"nosuch": 1}}, "nosuch"),
    (ALL, {"model_init_kwargs": {"dtype": "float13"}}, "dtype"),
    (ALL, {"model_init_kwargs": '{"dtype": '}, "model_init_kwargs"),
    (ALL, {"model_name_or_path": "nowhere"}, "nowhere"),
    (ALL, {"model_name_or_path": "/"}, "config.json"),
    (ALL, {"dataset": "nowhere.jsonl"}, "nowhere.jsonl"),
    (ALL, {"dataset": "no/such-dataset"}, "no/such-dataset"),
    (ALL, {"eval_dataset": "nowhere.csv"}, "nowhere.csv"),
    (ALL, {"output_dir": "/dev/null/out"}, "/dev/null/out"),
    (("sft",), {"metric_for_best_model": "eval_rm_score"}, "eval_rm_score"),
    (("sft",), {"reward_model": "nowhere"}, "reward_model"),
    (("sft",), {"eos_token": "<nope>"}, "<nope>"),
    (("sft",), {"assistant_only_loss": True}, "assistant_only_loss"),
    (("sft",), {"lr_scheduler_type": "reduce_lr_on_plateau"}, "reduce_lr_on_plateau"),
    (("sft",), {"max_length": 1}, "max_length"),
    (("reward",), {"max_length": 2}, "max_length=2"),
    (PPO, {"kl_target": 1.0, "beta": 0.0}, "kl_target"),
    (PPO, {"steps_per_generation": 3}, "steps_per_generation"),
    (PPO, {"steps_per_generation": 4, "generation_batch_size": 4}, "generation_batch_size"),
    (PPO, {"steps_per_generation": 400}, "less than one batch"),
    (PPO, {"generation_batch_size": 7}, ("generation_batch_size", "steps_per_generation")),
    (PPO, {"num_generations": 3}, "num_generations"),
    (PPO, {"epsilon_high": 0.3}, "epsilon_high"),
    (PPO, {"sync_ref_model": True}, "sync_ref_model"),
    (PPO, {"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
    (PPO, {"lr_scheduler_type": "cosine"}, "lr_scheduler_type"),
    (PPO, {"auto_find_batch_size": True}, "auto_find_batch_size"),
    (PPO, {"top_p": 0.9}, "top_p"),
    (PPO, {"top_k": 50}, "top_k"),
    (PPO, {"min_p": 0.1}, "min_p"),
    (PPO, {"repetition_penalty": 1.1}, "repetition_penalty"),
    (PPO, {"generation_kwargs": {"num_beams": 4}}, "num_beams"),
    (PPO, {"generation_kwargs": {"temperature": 0.5}}, "temperature"),
    (PPO, {"generation_kwargs": {"do_sample": False}}, "do_sample"),
    (PPO, {"reward_weights": [1.0, 2.0]}, "reward_weights"),
    (PPO, {"max_prompt_length": 2}, "2 tokens"),
    (PPO, {"reward_model": "nowhere"}, "nowhere"),
    (PPO, {"reward_model": "/"}, "/"),
]
NO_YAML = [
    *(
        b"",
        b"null",
        b"3",
        b"text",
        b"- learning_rate",
        b"a: [1",
        b"a: b: c",
        b"\tx: 1",
        b"a: {",
        b"'open",
        b"&a *b",
        b"%",
    ),
    *(b"\xff\xfe\x00", b"\x00\x01", b"caf\xe9: 1", b"a: !!python/object/apply:os.getcwd []", b"1: 2", b"null: 1"),
    *(b"? [a]\n: 1", b"{[1]: 2}", b"[" * 3000, b"a: 1\n---\nb: 2", b"true: 1", b"env: 3", b"@", b"`x"),
]


@st.composite
def bad_configs(draw: st.DrawFn) -> Bad:
    way = draw(st.integers(0, 14))
    if way <= 4:
        name = draw(st.sampled_from(list(NUMBERS_OF)))
        stages, values = NUMBERS_OF[name]
        return _of_setting(draw, stages, name, draw(st.one_of(values, values, NO_NUMBER.filter(_is_wrong(name)))))
    if way == 5:
        name = draw(st.sampled_from(list(CHOICES_OF)))
        word = draw(st.sampled_from(["nosuch", "", "float13", "Steps ", "8", 3, [1], False, {"a": 1}]))
        return _of_setting(draw, CHOICES_OF[name], name, word)
    if way == 6:
        name = draw(st.sampled_from(list(OBJECTS_OF)))
        return _of_setting(
            draw, OBJECTS_OF[name], name, draw(st.sampled_from(["x", "{", "[1]", '{"a"}', "{1: 2}", 3]))
        )
    if way == 7:
        value = draw(st.sampled_from(["maybe", "2", "", 3, [True], {"a": 1}, 1.5]))
        return _of_setting(draw, ALL, draw(st.sampled_from(FLAGS_OF)), value)
    if way == 8:
        name, value = draw(st.sampled_from(TEXTS_OF)), draw(st.sampled_from([3, [1], {"a": 1}, True, 1.5]))
        return Bad(
            draw(st.sampled_from(ALL)), {"--config": "HERE/x.yaml"}, _yaml({name: value}), ["HERE/x.yaml", name]
        )
    if way == 9:
        key = draw(
            st.sampled_from(["learning_rte", "datset", "Seed", "lr", "output-dirs", "help", "config", "_n_gpu"])
        )
        in_file = draw(st.booleans())
        flags, files = ({"--config": "HERE/x.yaml"}, _yaml({key: 1})) if in_file else ({f"--{key}x": "1"}, {})
        return Bad(draw(st.sampled_from(ALL)), flags, files, ["unknown key", key])
    if way == 10:
        content = draw(st.one_of(st.sampled_from(NO_YAML), st.binary(max_size=9).map(lambda junk: b"\xff" + junk)))
        return Bad(draw(st.sampled_from(ALL)), {"--config": "HERE/x.yaml"}, {"x.yaml": content}, ["HERE/x.yaml"])
    stages, values, named = draw(st.sampled_from(CONTRADICTIONS))
    flags = {"--config": "HERE/x.yaml"}
    return Bad(draw(st.sampled_from(stages)), flags, _yaml(values), [named])


def _is_wrong(name: str) -> Callable[[Any], bool]:
    """`None` is a setting where it is the default, or means without a limit."""
    nothing = ("max_length", "dataset_num_proc", "center_rewards_coefficient", "kl_target", "max_prompt_length")
    nothing += ("generation_micro_batch_size", "steps_per_generation", "ptx_max_length", "missing_eos_score")
    nothing += ("num_generations", "max_completion_length")  # by TRL's types, but not here
    return lambda value: value is not None or name not in nothing


def _yaml(values: dict[str, Any]) -> dict[str, bytes | None]:
    return {"x.yaml": yaml.safe_dump(values).encode()}


def _of_setting(draw: st.DrawFn, stages: tuple[str, ...], name: str, value: Any) -> Bad:
    """As a flag, which is text, or in a YAML file."""
    stage = draw(st.sampled_from(stages))
    peft = {"--use_peft": "true"} if name.startswith("lora_") else {}
    if isinstance(value, int | float | str) and not isinstance(value, bool) and draw(st.booleans()):
        text = str(value) if value != "" else "''"
        return Bad(stage, {**peft, f"--{name}": f"{text}"}, {}, [name])
    return Bad(stage, {**peft, "--config": "HERE/x.yaml"}, _yaml({name: value}), [name])


CONFIGS = bad_configs()


# Folders of models


class Folders(dict[str, dict[str, bytes]]):
    """Folders by name, each with its files by name. Hypothesis shows what it gives to strategies."""

    def __repr__(self) -> str:
        return f"folders {list(self)}"


MODEL, REWARD = "--model_name_or_path", "--reward_model"
SCORED = {"--eval_fraction": "0.5", REWARD: "HERE/it"}
# What is read from each folder of the world, by whom
READERS: dict[str, list[tuple[str, dict[str, str]]]] = {
    "base": [("sft", {MODEL: "HERE/it"}), ("reward", {MODEL: "HERE/it"}), ("ppo_ptx", {MODEL: "HERE/it"})],
    "sft": [("sft", {MODEL: "HERE/it"}), ("reward", {MODEL: "HERE/it"}), ("ppo_ptx", {MODEL: "HERE/it"})],
    **{
        kind: [("ppo_ptx", {REWARD: "HERE/it"}), ("reward", {MODEL: "HERE/it"}), ("sft", SCORED)]
        for kind in ("lora", "full")
    },
}
BAD_JSON = st.sampled_from([b"", b"{", b"[]", b"3", b"null", b'"text"', b"\xff\xfe{}", b"{'r': 2}", b"{}}"])
# Of each JSON file: keys, values that they cannot have, and what the message names besides the folder
WRONG_CONFIG: dict[str, list[Any]] = {
    "hidden_size": ["big", -16, 0, 24, 16.5, None, [16], DELETE],
    "num_attention_heads": ["two", 0, -2, 3, None],
    "vocab_size": ["many", -1, 100, 300, None, DELETE],
    "num_hidden_layers": ["two", 3, 4, 2.5, None, DELETE],
    "intermediate_size": [40, "x", -1, DELETE],
    "model_type": ["nosuch", 3, None, "gpt2", "bert", DELETE],
    "hidden_act": ["nosuch", 3],
    "rms_norm_eps": ["x", None],
}
WRONG_ADAPTER: dict[str, list[Any]] = {
    "r": [0, -1, "x", 5, 2.5, None, True, DELETE],
    "lora_alpha": [0, "x", None, float("nan"), [4], DELETE],
    "target_modules": [["nosuch"], ["k_proj"], "nosuch", ["q_proj"], DELETE],
    "peft_type": ["NOSUCH", None, 3, DELETE],
    "base_model_name_or_path": ["nowhere", None, 3, "", ["x"], DELETE],
    "lora_dropout": ["x", 7, -1],
}
WRONG_REWARD: dict[str, list[Any]] = {
    "format": [2, 0, "1", None, [1], True, DELETE],
    "bias": ["x", "0.5", float("nan"), float("inf"), None, [1], True, {}, DELETE],
    "kind": ["other", 3, None],
    "calibrated": ["yes", 1, None],
    "quantization": [[1], "4bit", 3, True],
    "base": [3, ["x"], {}],
}
WRONG_TOKENIZER: dict[str, list[Any]] = {
    "model": [DELETE, None, {}, {"type": "Nope"}, "BPE", {"type": "BPE", "vocab": [1], "merges": []}],
    "added_tokens": [3, [{"id": "x"}], [1], "x"],
    "version": [3, []],
}
WRONG = {
    "config.json": WRONG_CONFIG,
    "adapter_config.json": WRONG_ADAPTER,
    "reward_model.json": WRONG_REWARD,
    "tokenizer.json": WRONG_TOKENIZER,
}


@st.composite
def bad_folders(draw: st.DrawFn, folders: Folders) -> Bad:
    """One of the folders, its files by name, with one of them broken."""
    source = draw(st.sampled_from(list(folders)))
    files = folders[source]
    stage, flags = draw(st.sampled_from(READERS[source]))
    name = draw(st.sampled_from([n for n in files if n.endswith(".safetensors") or n in WRONG]))
    if name.endswith(".safetensors"):
        bad, what = bad_weights(draw, files[name])
    else:
        bad, what = bad_objects(draw, name, files[name])
    broken = {f"it/{n}": text for n, text in files.items() if n != name}
    if bad is not None:
        broken[f"it/{name}"] = bad
    return Bad(stage, flags, broken, ["HERE/it"], f"{source}/{name}: {what}")


def bad_objects(draw: st.DrawFn, name: str, text: bytes) -> tuple[bytes | None, str]:
    """A JSON file that is missing (`None`), none, or has a wrong value or none at a key, and which of it."""
    way = draw(st.integers(0, 6))
    if way == 0 and name != "reward_model.json":  # without which it is a reward model of others
        return None, "missing"
    if way == 1:
        return draw(BAD_JSON), "no JSON object"
    if way == 2:
        return text[: draw(st.integers(0, len(text.rstrip()) - 1))], "cut short"
    key = draw(st.sampled_from(list(WRONG[name])))
    value = draw(st.sampled_from(WRONG[name][key]))
    words = f"no {key}" if value is DELETE else f"{key}={value!r}"
    return json.dumps(changed(json.loads(text), {key: value})).encode(), words


def bad_weights(draw: st.DrawFn, data: bytes) -> tuple[bytes | None, str]:
    """A safetensors file: missing (`None`), cut short, without a header, with another tensor, and which of it."""
    size = struct.unpack("<Q", data[:8])[0]
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    way = draw(st.integers(0, 6))
    if way == 0:
        return None, "missing"
    if way == 1:
        return data[: draw(st.integers(0, len(data) - 1))], "cut short"
    if way == 2:
        at = draw(st.integers(8, 8 + size - 1))
        return data[:at] + b"\xff" + data[at + 1 :], "no UTF-8 in the header"
    if way == 3:
        return struct.pack("<Q", draw(st.sampled_from([0, 1, size - 1, 2**31, 2**63]))) + data[8:], "header's size"
    if way == 4:
        junk = [b"", b"\0" * 100, b"PK\x03\x04" + data[4:], json.dumps(header).encode()]
        return draw(st.sampled_from(junk)), "another format"
    key = draw(st.sampled_from(sorted(key for key in header if key != "__metadata__")))
    if way == 5:
        header[key + ".nosuch"] = header.pop(key)
    else:
        shape = header[key]["shape"]
        header[key]["shape"] = [shape[0] // 2, 2, *shape[1:]] if shape[0] % 2 == 0 else [1, *shape]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest, f"{key} has another {('name', 'shape')[way - 5]}"


# Checkpoints

MANIFEST, STATE = "checkpoint.json", "trainer_state.json"
WRONG_STATE: dict[str, list[Any]] = {
    "global_step": ["one", -1, None, 1.5, [1], True, DELETE],
    "max_steps": ["x", None, DELETE],
    "log_history": [3, None, {"a": 1}, DELETE],
    "stateful_callbacks": [3, [1], DELETE],
}
LOADED = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


@st.composite
def bad_checkpoints(draw: st.DrawFn, runs: Folders) -> Bad:
    """A damaged checkpoint of one of the stages, in its seal, sealed again, or without a seal."""
    stage = draw(st.sampled_from(list(runs)))
    files = dict(runs[stage])
    known = json.loads(files[MANIFEST])
    name = draw(st.sampled_from(sorted(files)))
    way, what = draw(st.integers(0, 4)), ""
    if way == 0 or name == MANIFEST and way < 3:
        files[MANIFEST] = draw(st.one_of(BAD_JSON, st.integers(0, 99).map(lambda n: runs[stage][MANIFEST][:n])))
        name = MANIFEST
    elif way == 1:
        del files[name]
    elif way == 2:
        at = draw(st.integers(0, len(files[name]) - 1))
        cut = draw(st.booleans())
        flipped = bytes([files[name][at] ^ 1 << draw(st.integers(0, 7))])
        files[name] = files[name][:at] if cut else files[name][:at] + flipped + files[name][at + 1 :]
    else:
        weights = [n for n in files if n.endswith(".safetensors") and "/" not in n]
        name = draw(st.sampled_from([STATE, *LOADED, *weights]))
        files[name], what = _bad_part(draw, name, files[name])
        if way == 3:
            del files[MANIFEST]
        else:
            known["files"][name] = {"bytes": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}
            files[MANIFEST] = json.dumps(known).encode()
        words = {"optimizer.pt": "optimizer", "scheduler.pt": "scheduler", "rng_state.pth": "random states"}
        name = (name, "HERE/checkpoint-1: ") if name.endswith(".safetensors") else words.get(name, name)
    flags, names = {"--resume_from_checkpoint": "HERE/checkpoint-1"}, ["HERE/checkpoint-1", name]
    files = {f"checkpoint-1/{n}": text for n, text in files.items()}
    return Bad(stage, flags, files, names, f"way {way}, {name}: {what}")


def _bad_part(draw: st.DrawFn, name: str, data: bytes) -> tuple[bytes, str]:
    if name in LOADED:
        junk = [b"", b"text", b"PK\x03\x04", pickle.dumps({"a": 1}), b"\x80\x04."]
        cut = draw(st.integers(0, len(data) - 30))
        return draw(st.sampled_from([data[:cut], data[: cut // 2], *junk])), "cut short or junk"
    if name != STATE:
        bad, what = bad_weights(draw, data)
        return (data[: len(data) // 2], "half") if bad is None else (bad, what)
    if draw(st.booleans()):
        return draw(BAD_JSON), "no JSON object"
    key = draw(st.sampled_from(list(WRONG_STATE)))
    value = draw(st.sampled_from(WRONG_STATE[key]))
    return json.dumps(changed(json.loads(data), {key: value})).encode(), f"{key}={value!r}"
