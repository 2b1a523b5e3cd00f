"""Rankings from public formats and back, and merged; the recipe that does it with files."""

import json
from pathlib import Path

import convert_rankings
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instructgpt_trl.data import InputError, load_rows
from instructgpt_trl.data.merging import merge_labelers
from instructgpt_trl.data.ranking_formats import FORMATS, hh_conversation, pairs_of, ranks_of, read_ranking

HH = {"chosen": "\n\nHuman: hi\n\nAssistant: hello", "rejected": "\n\nHuman: hi\n\nAssistant: go away"}
ULTRA = {
    "source": "flan",
    "instruction": "Add.",
    "completions": [
        {"model": "a", "response": "3", "fine-grained_score": 4.5, "overall_score": 10},
        {"model": "b", "response": "4", "fine-grained_score": 2.25, "overall_score": 1},
        {"model": "c", "response": "5", "fine-grained_score": 4.5, "overall_score": 7},
    ],
}
SHP = {
    "post_id": "x1",
    "domain": "askbaking",
    "history": "Why?",
    "human_ref_A": "No.",
    "human_ref_B": "Yes.",
    "labels": 0,
}
REPLY = {"role": "assistant", "replies": []}
OASST = {
    "message_tree_id": "t",
    "prompt": {
        "message_id": "m0",
        "role": "prompter",
        "text": "hi",
        "replies": [
            {
                **REPLY,
                "text": "b",
                "rank": 1,
                "replies": [
                    {
                        "message_id": "m1",
                        "role": "prompter",
                        "text": "more",
                        "replies": [{**REPLY, "text": "x", "rank": 0}, {**REPLY, "text": "y", "rank": 1}],
                    }
                ],
            },
            {**REPLY, "text": "a", "rank": 0},
            {**REPLY, "text": "unranked", "rank": None},
        ],
    },
}
ARGILLA = {
    "id": "r1",
    "fields": {"prompt": "p", "response-1": "a", "response-2": "b", "response-3": "c"},
    "responses": {
        "ranking": [
            {
                "value": [
                    {"value": "response-2", "rank": 1},
                    {"value": "response-1", "rank": 2},
                    {"value": "response-3", "rank": 2},
                ],
                "user_id": "u1",
            },
            {"value": ["response-3", "response-1", "response-2"], "user_id": "u2", "status": "submitted"},
            {"value": ["response-3"], "user_id": "u3", "status": "draft"},
        ],
        "comment": [{"value": "fine", "user_id": "u1"}],
    },
}
ARGILLA_1 = {
    "fields": ARGILLA["fields"],
    "responses": [
        {
            "user_id": "u1",
            "status": "submitted",
            "values": {"ranking": ARGILLA["responses"]["ranking"][0], "comment": {"value": "x"}},
        }
    ],
}
STUDIO = {
    "id": 7,
    "data": {"prompt": "p", "items": [{"id": "k1", "body": "a"}, {"id": "k2", "body": "b"}]},
    "annotations": [
        {"completed_by": 3, "result": [{"type": "ranker", "value": {"ranker": {"rank": ["k2", "k1"]}}}]},
        {
            "completed_by": {"id": 4, "email": "x@y.org"},
            "result": [{"type": "ranker", "value": {"ranker": ["k1", "k2"]}}],
        },
        {"completed_by": 5, "was_cancelled": True, "result": []},
    ],
}


def test_ranks_by_hand():
    assert ranks_of([4.5, 2.25, 4.5, 7]) == [2, 4, 2, 1]
    assert pairs_of({"ranks": [2, 1, 2]}) == [(1, 0), (1, 2)]


def read(format: str, row: dict) -> list[dict]:
    return read_ranking(row, format, "here")


def test_hh_by_hand():
    (row,) = read("hh", {**HH, "id": 4})
    assert row == {
        "prompt": "\n\nHuman: hi\n\nAssistant:",
        "completions": [" hello", " go away"],
        "ranks": [1, 2],
        "id": 4,
    }
    assert hh_conversation(row, "here") == {
        "prompt": [{"role": "user", "content": "hi"}],
        "completions": [[{"role": "assistant", "content": "hello"}], [{"role": "assistant", "content": "go away"}]],
        "ranks": [1, 2],
        "id": 4,
    }
    longer = read(
        "hh",
        {
            "chosen": HH["chosen"] + "\n\nHuman: b\n\nAssistant: c",
            "rejected": HH["chosen"] + "\n\nHuman: b\n\nAssistant: d",
        },
    )
    assert [m["role"] for m in hh_conversation(longer[0], "here")["prompt"]] == ["user", "assistant", "user"]
    # Dialogues that part earlier than at the last answer: the rest of them is the completion
    (row,) = read("hh", {"chosen": HH["chosen"] + "\n\nHuman: b\n\nAssistant: c", "rejected": HH["rejected"]})
    assert row["completions"] == [" hello\n\nHuman: b\n\nAssistant: c", " go away"]
    with pytest.raises(InputError, match="here: a completion of more than one turn"):
        hh_conversation(row, "here")


def test_scored_and_paired_formats_by_hand():
    (row,) = read("ultrafeedback", ULTRA)
    assert (row["ranks"], row["scores"], row["models"]) == ([1, 3, 1], [4.5, 2.25, 4.5], ["a", "b", "c"])
    (row,) = read("shp", SHP)
    assert (row["prompt"], row["completions"], row["ranks"], row["post_id"]) == ("Why?", ["No.", "Yes."], [2, 1], "x1")
    assert read("pairs", {"prompt": "p", "chosen": "a", "rejected": "b"}) == [
        {"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2]}
    ]


def test_trees_by_hand():
    first, second = read("oasst", OASST)
    assert first["prompt"] == [{"role": "user", "content": "hi"}] and first["id"] == "m0"
    assert first["ranks"] == [2, 1] and first["completions"][1] == [{"role": "assistant", "content": "a"}]
    assert [m["content"] for m in second["prompt"]] == ["hi", "b", "more"] and second["ranks"] == [1, 2]


def test_annotation_tools_by_hand():
    rows = read("argilla", ARGILLA)
    assert [(row["labeler_id"], row["ranks"]) for row in rows] == [("u1", [2, 1, 2]), ("u2", [2, 3, 1])]
    assert [row["ranks"] for row in read("argilla", ARGILLA_1)] == [[2, 1, 2]]
    rows = read("label_studio", STUDIO)
    assert [(row["labeler_id"], row["ranks"]) for row in rows] == [("3", [2, 1]), ("x@y.org", [1, 2])]
    tied = {**STUDIO, "annotations": [{"completed_by": 1, "result": [{"value": {"ranker": [["k1", "k2"]]}}]}]}
    assert read("label_studio", tied)[0]["ranks"] == [1, 1]


@pytest.mark.parametrize(
    ("format", "row"),
    [
        ("hh", HH),
        ("shp", SHP),
        ("pairs", {"prompt": "p", "chosen": "a", "rejected": "b"}),
        ("rankings", {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [1, 1, 2]}),
    ],
)
def test_rows_come_back_unchanged(format, row):
    back = [one for ranking in read(format, row) for one in FORMATS[format].write(ranking, "here")]
    assert back == [row]


TEXT = st.text(min_size=1).filter(str.strip)
RANKING = st.integers(2, 6).flatmap(
    lambda k: st.fixed_dictionaries(
        {
            "prompt": TEXT,
            "completions": st.lists(TEXT, min_size=k, max_size=k),
            "ranks": st.lists(st.integers(1, k), min_size=k, max_size=k).map(lambda r: ranks_of([-x for x in r])),
        }
    )
)


@pytest.mark.parametrize("format", ["rankings", "ultrafeedback", "oasst", "argilla", "label_studio"])
@given(ranking=RANKING)
def test_rankings_survive_a_format_with_ties(format, ranking):
    """All of a ranking comes back; of OpenAssistant as conversations."""
    (row,) = FORMATS[format].write({**ranking, "id": "n", "labeler_id": "ann"}, "here")
    (back,) = read(format, json.loads(json.dumps(row)))
    texts = [one if isinstance(one, str) else one[0]["content"] for one in back["completions"]]
    prompt = back["prompt"] if isinstance(back["prompt"], str) else back["prompt"][0]["content"]
    assert {"prompt": prompt, "completions": texts, "ranks": back["ranks"]} == ranking


@given(ranking=RANKING)
def test_pairs_are_all_the_untied_ones(ranking):
    rows = FORMATS["pairs"].write(ranking, "here")
    texts, ranks = ranking["completions"], ranking["ranks"]
    expected = [(texts[i], texts[j]) for i in range(len(texts)) for j in range(len(texts)) if ranks[i] < ranks[j]]
    assert sorted((row["chosen"], row["rejected"]) for row in rows) == sorted(expected)


TALK = [{"role": "user", "content": "p"}]


@pytest.mark.parametrize(
    ("format", "row", "message"),
    [
        ("hh", {"chosen": "a"}, "'rejected' is missing"),
        ("hh", {"chosen": "a", "rejected": "b"}, "do not begin with the same turns"),
        ("hh", {"chosen": 3, "rejected": "b"}, "expected 'chosen' and 'rejected' as texts"),
        ("ultrafeedback", {"instruction": "a", "completions": [{"response": "b"}]}, "every completion with one of"),
        (
            "ultrafeedback",
            {"instruction": "a", "completions": [{"response": "b", "score": "high"}] * 2},
            "expected a number",
        ),
        (
            "ultrafeedback",
            {"instruction": "a", "completions": [{"response": "b", "score": float("nan")}] * 2},
            "a number",
        ),
        ("ultrafeedback", {"instruction": "a", "completions": [{"response": "b", "score": 1}]}, "K >= 2"),
        ("shp", {**SHP, "labels": 2}, "column 'labels': expected 1"),
        ("oasst", {"prompt": "a"}, "not a row of OpenAssistant"),
        ("argilla", {"fields": {"prompt": "a"}, "responses": []}, "'response-1'"),
        ("argilla", {**ARGILLA, "responses": {"r": [{"value": ["response-1"]}]}}, "expected each of response-1"),
        ("label_studio", {**STUDIO, "data": {"prompt": "p"}}, "a list of items"),
        (
            "label_studio",
            {**STUDIO, "annotations": [{"result": [{"value": {"ranker": ["k1"]}}]}]},
            "expected each of k1",
        ),
        (
            "label_studio",
            {**STUDIO, "annotations": [{"result": [{"value": {"ranker": {"a": [], "b": []}}}]}]},
            "no order",
        ),
        ("label_studio", {**STUDIO, "data": {"prompt": "p", "i": [{"id": "k1"}, {"id": "k2"}]}}, "'body', 'html' or"),
        (
            "ultrafeedback",
            {"instruction": "a", "completions": [{"response": "b", "score": float("inf")}] * 2},
            "a number",
        ),
        ("rankings", [], "expected an object"),
        ("rankings", {"prompt": "p", "completions": [[], []], "ranks": [1, 2]}, "completion 0: the conv"),
        ("rankings", {"prompt": TALK, "completions": [[], []], "ranks": [1, 2]}, "completion 0: the conversation is"),
        ("rankings", {"prompt": "p", "completions": ["a", "b"], "ranks": [1, 10**400]}, "rank 1: expected an integer"),
        ("rankings", {"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2], "labeler_id": []}, "'labeler_id'"),
        ("rankings", {"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2], "models": ["m"]}, "'models'"),
    ],
)
def test_wrong_rows_say_what_is_wrong(format, row, message):
    with pytest.raises(InputError, match=f"^here.*{message}"):
        read(format, row)


@pytest.mark.parametrize(
    ("format", "change", "message"),
    [
        ("hh", {}, "does not end with"),
        ("argilla", {"prompt": [{"role": "user", "content": "p"}]}, "a conversation"),
        ("oasst", {"prompt": [{"role": "system", "content": "p"}]}, "expected messages of user and assistant"),
    ],
)
def test_what_a_format_has_no_place_for_is_refused(format, change, message):
    with pytest.raises(InputError, match=f"^here.*{message}"):
        FORMATS[format].write({"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2], **change}, "here")


# Several labelers


def ranked(ranks, labeler=None, completions=("a", "b", "c"), prompt="p"):
    return {"prompt": prompt, "completions": list(completions), "ranks": ranks, "labeler_id": labeler}


def test_merging_by_hand():
    """a beats 1, 1/2 and 1 of the others in the three rankings, b 1/4, 1 and 1/4, c 1/4, 0 and 1/4."""
    rows = [ranked([1, 2, 2], "x"), ranked([2, 1, 3], "y"), ranked([2, 2, 1], "z", completions=("b", "c", "a"))]
    (row,) = merge_labelers(rows)
    assert (row["completions"], row["ranks"], row["labeler_ids"]) == (["a", "b", "c"], [1, 2, 3], ["x", "y", "z"])
    # Two that say the opposite of each other leave a tie
    (row,) = merge_labelers([ranked([1, 2, 3], "x"), ranked([3, 2, 1], "y")])
    assert row["ranks"] == [1, 1, 1]


def test_what_is_merged_and_what_is_not():
    rows = [
        ranked([1, 2, 3], "x"),
        ranked([1, 2], "y", completions=("a", "b")),
        ranked([1, 2, 3], "y", prompt="q"),
        ranked([3, 2, 1], "x"),  # the same labeler again: the later counts
        ranked([1, 2, 3]),
        ranked([1, 2, 3]),  # unknown labelers are two
    ]
    merged = merge_labelers(rows)
    assert len(merged) == 3 and merged[1] == rows[1] and merged[2] == rows[2]
    # c beats both others for x, neither for the two unknown: a 2/3, b 1/2, c 1/3
    assert merged[0]["ranks"] == [1, 2, 3] and merged[0]["labeler_ids"] == ["x"]
    own = {"ratings": [1, 2, 3], "metadata": [{}] * 3, "order": [0, 1, 2], "seconds": 3.0, "models": ["a", "b", "c"]}
    (row,) = merge_labelers([{**ranked([1, 2, 3], "x"), **own}, ranked([1, 2, 3], "y")])
    assert set(row) == {"prompt", "completions", "ranks", "labeler_ids", "models"}
    twice = merge_labelers([ranked([1, 2], "x", completions=("a", "a")), ranked([1, 2], "y", completions=("a", "a"))])
    assert twice[0]["ranks"] == [1, 2]


# The recipe


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def convert(*args: str) -> None:
    convert_rankings.main(list(args))


def test_lines_that_are_not_json_are_bad_rows_too(tmp_path, capsys):
    good = json.dumps(HH)
    lines = [good, "{", good, '{"chosen": "\\ud800"}', '{"x": ' + "1" * 5000 + "}", "[" * 100_000, good]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    args = ["--from", "hh", "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    with pytest.raises(SystemExit):
        convert(*args)
    error = capsys.readouterr().err
    assert "4 bad rows" in error and all(f"row {n}: " in error for n in (2, 4, 5, 6))
    convert(*args, "--skip_bad_rows")
    assert len(read_json(tmp_path / "out.jsonl")) == 3 and "rows: 7" in capsys.readouterr().out


def test_columns_of_its_own_do_not_change_a_row():
    (row,) = read("hh", {**HH, "prompt": "hi"})
    assert row["prompt"] == "\n\nHuman: hi\n\nAssistant:"
    (row,) = read("shp", {**SHP, "prompt": "x", "ranks": [3, 3]})
    assert (row["prompt"], row["ranks"]) == ("Why?", [2, 1])


def test_what_contradicts_itself():
    twice = {**STUDIO, "annotations": [{"result": [{"value": {"ranker": ["k1", "k2", "k1"]}}]}]}
    same = {**STUDIO, "data": {"prompt": "p", "items": [{"id": "k", "body": "a"}, {"id": "k", "body": "b"}]}}
    same["annotations"] = [{"result": [{"value": {"ranker": ["k", "k"]}}]}]
    for row in (twice, same):
        with pytest.raises(InputError, match="expected each of"):
            read("label_studio", row)
    with pytest.raises(InputError, match="expected a number"):
        read("ultrafeedback", {"instruction": "a", "completions": [{"response": "b", "score": 10**400}] * 2})
    ranking = {"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2], "scores": [1.0, 5.0]}
    (row,) = FORMATS["ultrafeedback"].write(ranking, "here")
    assert read("ultrafeedback", row)[0]["ranks"] == [1, 2]  # the ranks count


def test_argilla_records_with_answers_that_are_none():
    answers = [*ARGILLA_1["responses"], {"user_id": "u2", "status": "discarded", "values": None}]
    assert len(read("argilla", {**ARGILLA_1, "responses": answers})) == 1
    order = [{"value": f"response-{n}"} for n in (3, 1, 2)]
    fields = {("input" if name == "prompt" else name): text for name, text in ARGILLA["fields"].items()}
    record = {"fields": fields, "responses": {"ranking": [{"value": order, "user_id": "u"}]}}
    assert read("argilla", record)[0]["ranks"] == [2, 3, 1]


def test_every_bad_row_is_named_and_nothing_written(tmp_path, capsys):
    rows = [HH, {"chosen": "a"}, HH, {"chosen": "a", "rejected": "b"}, []]
    source, output = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    args = ["--from", "hh", "--input", source, "--output", str(output)]
    with pytest.raises(SystemExit):
        convert(*args)
    error = capsys.readouterr().err
    for number in (2, 4, 5):
        assert f"row {number}: " in error
    assert "3 bad rows" in error and not output.exists()
    convert(*args, "--skip_bad_rows")
    assert len(load_rows(str(output), "ranking")) == 2
    with pytest.raises(SystemExit):
        convert(*args, "--skip_bad_rows")
    assert "is there already" in capsys.readouterr().err


def test_empty_completions_and_merging_by_command(tmp_path, capsys):
    rows = [ranked([1, 2, 3], "x", completions=("a", "", "c")), ranked([2, 1], "y", completions=("", "b"))]
    source = write(tmp_path / "in.jsonl", rows)
    convert("--input", source, "--output", str(tmp_path / "kept.jsonl"))
    assert len(load_rows(str(tmp_path / "kept.jsonl"), "ranking", allow_empty=True)) == 2
    convert("--input", source, "--output", str(tmp_path / "dropped.jsonl"), "--drop_empty")
    (row,) = load_rows(str(tmp_path / "dropped.jsonl"), "ranking")
    assert (row["completions"], row["ranks"]) == (["a", "c"], [1, 3])
    source = write(tmp_path / "two.jsonl", [ranked([1, 2, 3], "x"), ranked([1, 2, 3], "y")])
    convert("--input", source, "--output", str(tmp_path / "merged.jsonl"), "--merge", "--to", "pairs")
    assert len((tmp_path / "merged.jsonl").read_text().splitlines()) == 3
    with pytest.raises(SystemExit):
        convert("--input", source, "--output", str(tmp_path / "x.jsonl"), "--conversational")
    with pytest.raises(SystemExit):
        convert("--input", str(tmp_path / "nowhere.jsonl"), "--output", str(tmp_path / "x.jsonl"))
    assert "no such file" in capsys.readouterr().err


def test_files_come_back_unchanged(tmp_path):
    """Dialogues that part late, early and in an empty answer; rankings with ties and odd texts."""
    turns = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: why?\n\nAssistant:"
    pairs = [
        HH,
        {"chosen": turns + " because", "rejected": turns},
        {"chosen": turns + "  two  spaces\n", "rejected": turns + " no\n\nHuman: ?\n\nAssistant: yes"},
        {"chosen": "\n\nHuman: hi\n\nAssistant: a\u2028b", "rejected": "\n\nHuman: hi\n\nAssistant: \U0001f600"},
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs), encoding="utf-8")
    convert("--from", "hh", "--input", str(tmp_path / "pairs.jsonl"), "--output", str(tmp_path / "rankings.jsonl"))
    convert("--to", "hh", "--input", str(tmp_path / "rankings.jsonl"), "--output", str(tmp_path / "back.jsonl"))
    assert read_json(tmp_path / "back.jsonl") == pairs
    rows = [
        {
            "prompt": f"p{k}",
            "completions": [f"{n}\u2028" for n in range(k)],
            "ranks": ranks_of([n // 2 for n in range(k)]),
        }
        for k in range(4, 10)
    ]
    (tmp_path / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for format in ("rankings", "ultrafeedback", "argilla", "label_studio"):
        there, back = tmp_path / f"{format}-there.jsonl", tmp_path / f"{format}-back.jsonl"
        convert("--to", format, "--input", str(tmp_path / "ranked.jsonl"), "--output", str(there))
        convert("--from", format, "--input", str(there), "--output", str(back))
        assert [{name: row[name] for name in rows[0]} for row in read_json(back)] == rows


def read_json(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
