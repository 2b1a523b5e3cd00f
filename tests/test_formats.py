"""data/formats.py and data/files.py: what loads, and what is refused and how it is named."""

import json
import os
import re
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from instructgpt_trl.data import (
    InputError,
    as_conversations,
    check_output_dir,
    check_rows,
    load_rows,
)
from instructgpt_trl.data.formats import KINDS, listed, split_by_length

USER, ASSISTANT = [{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "ho"}]
GOOD = {
    "demonstration": {"prompt": "p", "completion": "c"},
    "ranking": {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [1, 2, 2]},
    "prompt": {"prompt": "p"},
    "pretraining": {"text": "t"},
}


def write(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# ---- loading ----


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_type_gives_the_same_rows(tmp_path, kind):
    rows = [{**GOOD[kind], "labeler_id": f"l{i}"} for i in range(2)]
    write(tmp_path / "lines.jsonl", *rows)
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "folder"))
    DatasetDict(train=Dataset.from_list(rows)).save_to_disk(str(tmp_path / "splits"))
    as_text = [{k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows]
    Dataset.from_list(as_text).to_csv(tmp_path / "rows.csv")
    for name in ("lines.jsonl", "list.json", "rows.parquet", "folder", "splits", "rows.csv"):
        assert load_rows(str(tmp_path / name), kind).to_list() == rows, name


def test_text_file_is_one_text_a_line(tmp_path):
    (tmp_path / "t.txt").write_text("\ufeffone two\n\n  three\u2028\x0c four \r\n", encoding="utf-8")
    assert load_rows(str(tmp_path / "t.txt"), "pretraining").to_list() == [
        {"text": "one two"},
        {"text": "three\u2028\x0c four"},
    ]


def test_pitfall_12_utf8_whatever_the_locale(tmp_path, monkeypatch):
    monkeypatch.setenv("LC_ALL", "C")
    text = "na\u00efve \u4f60\u597d \U0001f600 \u2028 end"
    for name, content in {
        "a.jsonl": json.dumps({"prompt": text}, ensure_ascii=False),
        "b.jsonl": "\ufeff" + json.dumps({"prompt": text}, ensure_ascii=False) + "\r\n",
        "c.csv": f'prompt\n"{text}"\n',
    }.items():
        (tmp_path / name).write_bytes(content.encode("utf-8"))
        assert load_rows(str(tmp_path / name), "prompt").to_list() == [{"prompt": text}], name


def test_columns_of_later_rows_are_kept(tmp_path):
    path = write(tmp_path / "r.jsonl", {"prompt": "a"}, {"prompt": "b", "user_id": "u"})
    assert load_rows(path, "prompt").to_list() == [{"prompt": "a", "user_id": None}, {"prompt": "b", "user_id": "u"}]


def test_csv_values_are_text_and_may_hold_anything(tmp_path):
    (tmp_path / "r.csv").write_text('prompt,completion,user_id\n42,"a, ""b""\nc",\n"x",007,u1\n')
    assert load_rows(str(tmp_path / "r.csv"), "demonstration").to_list() == [
        {"prompt": "42", "completion": 'a, "b"\nc', "user_id": None},
        {"prompt": "x", "completion": "007", "user_id": "u1"},
    ]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_chosen_and_rejected_are_a_ranking_of_two(tmp_path, suffix):
    rows = Dataset.from_list([{"prompt": "p", "chosen": "good", "rejected": "bad", "labeler_id": "l"}])
    path = tmp_path / f"r.{suffix}"
    {"jsonl": rows.to_json, "csv": rows.to_csv, "parquet": rows.to_parquet}[suffix](path)
    assert load_rows(str(path), "ranking").to_list() == [
        {"prompt": "p", "completions": ["good", "bad"], "ranks": [1, 2], "labeler_id": "l"}
    ]


def test_chosen_and_rejected_that_hold_the_prompt():
    text = check_rows(Dataset.from_list([{"chosen": "Human: hi AI: yes", "rejected": "Human: hi AI: no"}]), "ranking")
    assert text.to_list() == [
        {"prompt": "", "completions": ["Human: hi AI: yes", "Human: hi AI: no"], "ranks": [1, 2]}
    ]
    bad = [{"role": "assistant", "content": "bad"}]
    talk = check_rows(Dataset.from_list([{"chosen": USER + ASSISTANT, "rejected": USER + bad}]), "ranking")
    assert talk.to_list() == [{"prompt": USER, "completions": [ASSISTANT, bad], "ranks": [1, 2]}]


def test_rows_that_need_no_change_come_back_as_they_are(rankings, demonstrations):
    assert check_rows(rankings, "ranking") is rankings
    assert check_rows(demonstrations, "demonstration") is demonstrations


def test_conversations_pass():
    row = {"prompt": USER, "completion": ASSISTANT}
    for rows, kind in (
        ([row], "demonstration"),
        ([{"prompt": USER, "completions": [ASSISTANT] * 2, "ranks": [1, 1]}], "ranking"),
        ([{"prompt": USER, "completions": ["a", "b"], "ranks": [1, 1]}], "ranking"),
    ):
        assert check_rows(Dataset.from_list(rows), kind).to_list() == rows


@pytest.mark.parametrize("rows", [[{"prompt": "p"}], DatasetDict(train=Dataset.from_list([{"prompt": "p"}]))])
def test_what_is_no_dataset_is_one_line(rows):
    with pytest.raises(InputError, match=r"train_dataset: expected a datasets.Dataset, got .*rows\['train'\]"):
        check_rows(rows, "prompt", "train_dataset")


def test_as_conversations():
    rows = Dataset.from_list([{"prompt": "p", "completion": "c", "completions": ["a", "b"], "id": 3}])
    assert as_conversations(rows).to_list() == [
        {
            "prompt": [{"role": "user", "content": "p"}],
            "completion": [{"role": "assistant", "content": "c"}],
            "completions": [[{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]],
            "id": 3,
        }
    ]
    talk = Dataset.from_list([{"prompt": USER, "completion": ASSISTANT}])
    assert as_conversations(talk).to_list() == talk.to_list()


# ---- wrong rows ----

NO_ROLE = [{"content": "hi"}]
WRONG = [
    (
        "demonstration",
        {"prompt": "p"},
        "column 'completion' is missing; expected columns prompt, completion, found prompt",
    ),
    ("demonstration", {"question": "p"}, "column 'prompt' is missing.*found question; add it"),
    ("demonstration", {"prompt": "p", "completion": None}, "column 'completion' is missing"),
    ("demonstration", {"prompt": "p", "completion": " \n"}, "column 'completion': the text is empty.*drop the row"),
    ("demonstration", {"prompt": "", "completion": "c"}, "column 'prompt': the text is empty"),
    (
        "demonstration",
        {"prompt": "p", "completion": 7},
        "column 'completion': expected a string.*got int '7'; correct it",
    ),
    ("demonstration", {"prompt": float("nan"), "completion": "c"}, "column 'prompt': expected a string.*float 'nan'"),
    ("demonstration", {"prompt": "p", "completion": ["c"]}, "column 'completion': expected .*got the message 'c'"),
    ("demonstration", {"prompt": "p", "completion": []}, "column 'completion': the conversation is empty"),
    ("demonstration", {"prompt": NO_ROLE, "completion": ASSISTANT}, "column 'prompt': expected .*got the message"),
    (
        "demonstration",
        {"prompt": USER, "completion": [{"role": "assistant", "content": " "}]},
        "an assistant message is empty",
    ),
    ("demonstration", {"prompt": "p", "completion": ASSISTANT}, "a conversation, but the prompt is a string"),
    ("demonstration", ["p", "c"], "expected an object with columns prompt, completion, got list"),
    ("prompt", {"prompt": ""}, "column 'prompt': the text is empty"),
    ("prompt", {"prompt": 3}, "column 'prompt': expected a string or a conversation.*got int"),
    ("pretraining", {"prompt": "p"}, "column 'text' is missing; expected columns text, found prompt; add it"),
    ("pretraining", {"text": ""}, "column 'text': the text is empty"),
    ("pretraining", {"text": USER}, "column 'text': expected a string, got list"),
    ("ranking", {"prompt": "p"}, "column 'completions' is missing; expected .* or chosen, rejected, found prompt"),
    ("ranking", {"prompt": "p", "completions": ["a", "b"]}, "column 'ranks' is missing"),
    ("ranking", {"completions": ["a", "b"], "ranks": [1, 2]}, "column 'prompt' is missing"),
    ("ranking", {"prompt": "p", "completions": ["a"], "ranks": [1]}, "expected a list of K >= 2 completions, got 1"),
    ("ranking", {"prompt": "p", "completions": 5, "ranks": [1]}, "expected a list of K >= 2 completions, got int"),
    ("ranking", {"prompt": "p", "completions": "a b", "ranks": [1]}, "expected a list, got the text 'a b'"),
    ("ranking", {"prompt": "p", "completions": ["a", ""], "ranks": [1, 2]}, "completion 1: the text is empty"),
    ("ranking", {"prompt": "p", "completions": ["a", 4], "ranks": [1, 2]}, "completion 1: expected a string.*got int"),
    ("ranking", {"prompt": "p", "completions": ["a", None], "ranks": [1, 2]}, "completion 1: .*got NoneType"),
    ("ranking", {"prompt": "p", "completions": ["a", "b"], "ranks": [1]}, "expected a list of 2 ranks.*got 1"),
    ("ranking", {"prompt": "p", "completions": ["a", "b"], "ranks": 1}, "expected a list of 2 ranks.*got int"),
    ("ranking", {"prompt": "p", "completions": ["a", "b"], "ranks": [1, float("nan")]}, "rank 1: .*>= 1.*got nan"),
    ("ranking", {"prompt": "p", "completions": ["a", "b"], "ranks": [1, float("inf")]}, "rank 1: .*>= 1.*got inf"),
    ("ranking", {"prompt": "p", "completions": ["a", "b"], "ranks": [0, 1]}, "rank 0: .*>= 1.*got 0"),
    ("ranking", {"prompt": "p", "completions": ["a", "b"], "ranks": [1, 1.5]}, "rank 1: .*got 1.5"),
    ("ranking", {"prompt": "p", "completions": ["a", "b"], "ranks": [1, None]}, "rank 1: .*got None"),
    ("ranking", {"prompt": "p", "completions": ["a", "b"], "ranks": [1, "2"]}, "rank 1: .*got '2'"),
    ("ranking", {"prompt": "p", "completions": ["a", "b"], "ranks": [True, 2]}, "rank 0: .*got True"),
    ("ranking", {"prompt": "p", "chosen": "a", "rejected": ""}, "completion 1: the text is empty"),
    ("ranking", {"prompt": "p", "chosen": "a"}, "column 'completions' is missing.*or chosen, rejected"),
    ("ranking", {"chosen": [], "rejected": []}, "completion 0: the conversation is empty"),
    ("ranking", {"prompt": "p", "completions": [ASSISTANT] * 2, "ranks": [1, 2]}, "completion 0: a conversation, but"),
]


def test_labelers_rank_empty_completions_too(tmp_path):
    """Texts and turns, where it is asked for; turns of a prompt are never empty."""
    silent = [{"role": "assistant", "content": ""}]
    rows = [
        {"prompt": "p", "completions": ["a", ""], "ranks": [1, 2]},
        {"prompt": USER, "completions": [ASSISTANT, silent], "ranks": [2, 1]},
        {"prompt": USER + silent + USER, "completions": [ASSISTANT, ASSISTANT], "ranks": [1, 1]},
    ]
    for n, row in enumerate(rows):
        file = tmp_path / f"{n}.jsonl"
        file.write_text(json.dumps(row) + "\n")
        with pytest.raises(InputError, match="empty"):
            load_rows(str(file), "ranking")
        if n < 2:
            assert load_rows(str(file), "ranking", allow_empty=True)[0]["completions"] == row["completions"]
    with pytest.raises(InputError, match="column 'prompt': an assistant message is empty"):
        load_rows(str(file), "ranking", allow_empty=True)


@pytest.mark.parametrize(("kind", "row", "message"), WRONG, ids=range(len(WRONG)))
def test_pitfall_16_a_wrong_row_is_named(tmp_path, kind, row, message):
    path = tmp_path / "r.jsonl"
    good = json.dumps(GOOD[kind])
    path.write_text(f"{good}\n\n{good}\n{json.dumps(row)}\n")
    # Lines as an editor counts them, the empty one included
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}, row 4.*{message}") as error:
        load_rows(str(path), kind)
    assert "\n" not in str(error.value)


def test_pitfall_16_rows_of_a_dataset_are_counted_from_0(demonstrations):
    rows = Dataset.from_list([*demonstrations.to_list(), {"prompt": "p", "completion": ""}])
    with pytest.raises(InputError, match="^dataset, row 4, column 'completion': the text is empty"):
        check_rows(rows, "demonstration")
    stream = check_rows(IterableDataset.from_generator(lambda: iter(rows.to_list())), "demonstration", "mine")
    with pytest.raises(InputError, match="^mine, row 4, column 'completion': the text is empty"):
        list(stream)


def test_pitfall_16_wrong_files_are_named(tmp_path):
    def refused(name: str, content: bytes | None, message: str, kind: str = "demonstration") -> None:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message) as error:
            load_rows(str(tmp_path / name), kind)
        assert str(error.value).startswith(str(tmp_path / name)) and "\n" not in str(error.value)

    refused("none.jsonl", None, "no such file; check the path")
    refused("r.xlsx", b"", "unknown file type '.xlsx'; use .jsonl")
    refused("empty.jsonl", b"\n", "no rows; expected at least one")
    refused("empty.json", b"[]", "no rows; expected at least one")
    refused("empty.csv", b"prompt,completion\n", "no rows; expected at least one")
    refused("empty.txt", b" \n", "no rows; expected at least one", "pretraining")
    refused(
        "cut.jsonl", b'{"prompt": "p", "completion": "c"}\n{"prompt": "p", ', r"row 2: not valid JSON \(.*column 17"
    )
    refused("cut.json", b'[{"prompt": "p",', r": not valid JSON \(.*correct it")
    refused("latin.jsonl", b'{"prompt": "p"}\n{"prompt": "caf\xe9"}', "row 2: not UTF-8.*convert the file to UTF-8")
    refused("cell.csv", b"prompt,completion\np,c\np,\n", "row 2: column 'completion' is missing.*found prompt")
    refused("wide.csv", b"prompt,completion\np,a, b\n", "row 1: more values than the header has columns; quote")
    refused("open.csv", b'prompt,completion\np,"c\n', r"row 1: not valid CSV \(.*correct the quotes")
    refused("no.parquet", b"PAR1 not", "expected a Parquet file, but it cannot be read")
    refused("t.txt", b"text\n", "row 1: column 'prompt' is missing", "prompt")
    mixed = [{"prompt": "p", "completion": "c"}, {"prompt": USER, "completion": ASSISTANT}]
    refused(
        "m.json", json.dumps(mixed).encode(), "rows of different types cannot be mixed in one file.*make them alike"
    )
    (tmp_path / "folder").mkdir()
    refused("folder", None, "expected a folder written by save_to_disk")
    DatasetDict(test=Dataset.from_list(mixed[:1])).save_to_disk(str(tmp_path / "splits"))
    refused("splits", None, "with a split 'train' if it has several.*train")
    with pytest.raises(InputError, match="^nobody/nothing: expected a file, a folder or a hub dataset with a split"):
        load_rows("nobody/nothing", "prompt")
    with pytest.raises(InputError, match="^dataset: no rows; expected rows of kind 'prompt'"):
        check_rows(Dataset.from_list([]), "prompt")
    with pytest.raises(InputError, match="unknown kind of rows 'prompts'; expected one of demonstration"):
        check_rows(Dataset.from_list([{"prompt": "p"}]), "prompts")


# ---- lengths and folders ----


def test_pitfall_13_split_by_length():
    assert split_by_length([1, 5, 2, 6], 4, "rows") == ([0, 2], "2 of 4 rows over 4 tokens dropped: rows 1, 3")
    assert split_by_length([1, 5], 5, "rows") == ([0, 1], None)
    assert split_by_length([1, 5], None, "rows") == ([0, 1], None)
    _, report = split_by_length([9], 4, "prompts", lambda index: f"f.jsonl:{index + 1}")
    assert report == "1 of 1 prompts over 4 tokens dropped: rows f.jsonl:1"
    assert listed([3, 7, 9], most=2) == "3, 7 and 1 more"


def test_output_dir(tmp_path):
    check_output_dir(None)
    check_output_dir(tmp_path / "new" / "deeper")
    check_output_dir(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "file" / "far" / "below"):
        with pytest.raises(InputError, match=f"^output folder {path}: cannot be written .*choose another output_dir"):
            check_output_dir(path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@contextmanager
def no_root():
    """Root may write anywhere; as another user it may not."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_output_dir_without_permission():
    with TemporaryDirectory() as folder:  # which another user can enter, unlike pytest's
        for mode, refused in ((0o555, True), (0o777, False)):
            Path(folder).chmod(mode)
            denied = pytest.raises(InputError, match="cannot be written .Permission denied.")
            with no_root(), denied if refused else nullcontext():
                check_output_dir(Path(folder, "out"))
