"""Win rates, by judges and by labelers, against cases done by hand."""

import json
import math
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import judges
import numpy as np
import pytest
import web
import win_rate
from judges import Comparison, by_scores, make_judge
from win_rate import Preference, by_labelers, compare, length_controlled, read_completions, summary

from instructgpt_trl.data import InputError


def write(file, rows) -> str:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def completions(*texts, **more) -> list[dict]:
    return [{"prompt": f"prompt {i}", "completion": text, **more} for i, text in enumerate(texts)]


def longer_is_better(comparisons) -> list:
    return by_scores(lambda prompts, texts: [float(len(text)) for text in texts])(comparisons)


# Judges


def test_scores_decide_and_each_completion_is_scored_once():
    seen = []

    def score(prompts, texts):
        seen.extend(zip(prompts, texts, strict=True))
        return [{"a": 1.0, "b": 2.0, "c": 2.0, "bad": math.nan}[text] for text in texts]

    judge = by_scores(score)
    asked = [("p", "a", "b"), ("p", "b", "a"), ("p", "b", "c"), ("q", "a", "bad"), ("q", "a", "a")]
    assert judge([Comparison(*one) for one in asked]) == [0.0, 1.0, 0.5, None, 0.5]
    assert sorted(seen) == [("p", "a"), ("p", "b"), ("p", "c"), ("q", "a"), ("q", "bad")]


def test_a_python_function(tmp_path):
    file = tmp_path / "judge.py"
    file.write_text(
        "def judge(prompt, first, second):\n"
        "    if first == 'error':\n        raise RuntimeError\n"
        "    return {'half': 0.5, 'text': 'nonsense', 'large': 2, 'nan': float('nan')}[first]\n"
    )
    judge = make_judge(f"python:{file}:judge")
    texts = ["half", "text", "large", "nan", "error", "other"]
    assert judge([Comparison("p", text, "x") for text in texts]) == [0.5, None, None, None, None, None]


@pytest.fixture
def endpoint():
    """An OpenAI-compatible endpoint that answers with what is in `said` for the first text of a question."""

    class Handler(BaseHTTPRequestHandler):
        said: dict = {}
        asked: list = []

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = body["messages"][0]["content"]
            first = text.split("[Answer A]\n")[1].split("\n")[0]
            self.asked.append((body["model"], first, self.headers["Authorization"]))
            answer = self.said[first]
            self.send_response(500 if answer is None else 200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            message = {"role": "assistant", "content": answer}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            found = {"id": "1", "created": 0, "model": "m", "object": "chat.completion", "choices": [choice]}
            self.wfile.write(json.dumps({**found, "usage": None, "system_fingerprint": ""}).encode())

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield Handler, f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_a_function_that_exits_has_only_failed(tmp_path):
    (tmp_path / "j.py").write_text(
        "def judge(prompt, first, second):\n    exit(3) if first == 'a' else None\n    return 1\n"
    )
    judge = make_judge(f"python:{tmp_path / 'j.py'}:judge")
    assert judge([Comparison("p", "a", "b"), Comparison("p", "b", "a")]) == [None, 1.0]


def test_an_endpoint_is_asked_in_both_orders(endpoint, monkeypatch):
    handler, url = endpoint
    monkeypatch.setattr(web.AGAIN, "backoff_factor", 0)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    handler.asked.clear()
    handler.said.update(
        {"good": "A", "bad": " **B**.", "first": "a", "second": "A", "same": "Tie", "odd": "I like both", "down": None}
    )
    pairs = [("good", "bad"), ("bad", "good"), ("first", "second"), ("same", "bad"), ("odd", "bad"), ("down", "bad")]
    found = make_judge(f"openai:m@{url}")([Comparison("p", *pair) for pair in pairs])
    # good wins in both orders; of two that win by coming first neither is preferred; nonsense and errors are none
    assert found == [1.0, 0.0, 0.5, 0.75, None, None]
    assert {(model, key) for model, _, key in handler.asked} == {("m", "Bearer secret")}
    assert len(handler.asked) >= 10


@pytest.mark.parametrize(
    "name, message",
    [
        ("vibes", "expected reward_model:DIR"),
        ("python:none.py:f", "no file 'none.py'"),
        (f"python:{Path(__file__).with_name('contract.json')}:f", "expected python:FILE.py:FUNCTION, found the file"),
        ("openai:model", "expected openai:MODEL@URL"),
        ("reward_model:", "expected reward_model:DIR"),
        ("reward_model:nowhere", "no such folder"),
    ],
)
def test_judges_that_are_not_there(name, message):
    with pytest.raises(InputError, match=message):
        make_judge(name)


# Rates


def test_matched_by_prompt_and_place_among_its_rows(tmp_path):
    """Rows in another order, a prompt twice, one that only one file has, an empty completion, a conversation."""
    turn = [{"role": "user", "content": "p"}]
    own = [
        {"prompt": "b", "completion": ""},
        {"prompt": "a", "completion": "xxx"},
        {"prompt": "a", "completion": "x"},
        {"prompt": turn, "completion": "xx"},
        {"prompt": "only here", "completion": "x"},
    ]
    base = [
        {"prompt": "a", "completion": "xx"},
        {"prompt": turn, "completion": "xx"},
        {"prompt": "a", "completion": "xx"},
        {"prompt": "b", "completion": "x"},
        {"prompt": "c", "completion": "x"},
        {"prompt": "d", "completion": "x"},
    ]
    files = {name: write(tmp_path / name, rows) for name, rows in (("own", own), ("base", base))}
    models = {name: read_completions(file) for name, file in files.items()}
    found, problems = compare(models, "base", longer_is_better)
    assert [(one.prompt, one.value, one.longer) for one in found["own"]] == [
        ("b", 0.0, -1),
        ("a", 1.0, 1),
        ("a", 0.0, -1),
        (json.dumps(turn, sort_keys=True), 0.5, 0),
    ]
    assert problems == ["own: 3 completions of prompts that own and base do not share are left out"]
    rate = summary(found["own"])
    assert rate["win_rate"][0] == 0.375 and rate["ties"] == 0.25 and (rate["n"], rate["prompts"]) == (4, 3)


def test_breakdowns():
    rows = [
        Preference(str(i), value, 0, category) for i, (value, category) in enumerate([(1, "qa"), (0, "qa"), (1, None)])
    ]
    found = summary(rows)["by_category"]
    assert {name: (of["win_rate"][0], of["n"]) for name, of in found.items()} == {"qa": (0.5, 2), "none": (1.0, 1)}
    assert "by_group" not in summary(rows) and "by_category" not in summary([Preference("p", 1, 0)])


def test_labelers_each_have_a_say():
    """Two of three training labelers prefer the model, one ties; the held-out one does not. One ranked no baseline."""
    models = {"sft": {}, "ppo": {}}
    rows = [
        {"prompt": "p", "models": ["ppo", "sft"], "completions": ["xxxx", "xx"], "ranks": ranks, "labeler_id": str(i)}
        | {"group": group, "category": "chat"}
        for i, (ranks, group) in enumerate(
            [([1, 2], "training"), ([1, 3], "training"), ([1, 1], "training"), ([2, 1], "held_out")]
        )
    ]
    rows.append({**rows[0], "models": ["ppo", "other"], "labeler_id": "9"})
    found, problems = by_labelers(rows, models, "sft")
    found = found["ppo"]
    assert problems == ["1 rankings without a model and sft are left out"]
    assert [(one.value, one.longer, one.category) for one in found] == [
        (1, 2, "chat"), (1, 2, "chat"), (0.5, 2, "chat"), (0, 2, "chat")
    ]  # fmt: skip
    rate = summary(found)
    assert rate["win_rate"][0] == 0.625 and math.isnan(rate["win_rate"][1])  # of one prompt
    assert rate["interval_over_labelers"] == [0.25, 1.0]
    assert {name: of["win_rate"][0] for name, of in rate["by_group"].items()} == {"training": 2.5 / 3, "held_out": 0}


def test_ratings_and_metadata():
    rows = [
        {
            "prompt": prompt,
            "models": ["a", "b"],
            "ratings": ratings,
            "metadata": [{"hedges": hedges}, {"hedges": False, "harmful": None}],
        }
        for prompt, ratings, hedges in (("p", [7, 1], True), ("q", [4, None], False), ("r", [4, 3], None))
    ]
    found = win_rate.ratings_and_metadata(rows)
    assert {name: {what: (of[0], of[-1]) for what, of in parts.items()} for name, parts in found.items()} == {
        "a": {"rating": (5.0, 3), "hedges": (0.5, 2)},
        "b": {"rating": (2.0, 2), "hedges": (0.0, 3)},
    }


def test_length_control_finds_the_rate_at_equal_length():
    """
    Completions are preferred by sigmoid(a + b tanh(d / s)): with a = 0 all of the raw rate comes from length. Of
    20,000 the intercept is found to 0.05.
    """
    rng = np.random.default_rng(0)
    longer = rng.integers(-20, 60, 20_000)
    for a in (0.0, 1.0):
        wins = rng.random(20_000) < 1 / (1 + np.exp(-a - 3 * np.tanh(longer / longer.std())))
        assert wins.mean() > 0.62
        assert length_controlled(wins, longer) == pytest.approx(1 / (1 + math.exp(-a)), abs=0.02)
    assert length_controlled([0.5] * 50, range(50)) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "values, longer",
    [
        ([1, 0] * 24, range(48)),  # few
        ([1] * 60, range(60)),  # all won
        ([1, 0] * 30, [2] * 60),  # no difference in length
        ([0] * 30 + [1] * 30, range(60)),  # length alone tells
        ([1] * 30 + [0] * 30, range(60)),
    ],
)
def test_no_rate_at_equal_length_where_there_is_none_to_be_found(values, longer):
    assert length_controlled(values, longer) is None


# The command


def run(tmp_path, *more, own=("xx", "x"), base=("x", "x")) -> dict:
    files = [
        f"{name}={write(tmp_path / f'{name}.jsonl', completions(*texts))}"
        for name, texts in (("ppo", own), ("sft", base))
    ]
    judge = tmp_path / "judge.py"
    judge.write_text(
        "def judge(prompt, first, second):\n"
        "    return 0.5 + 0.5 * (len(first) > len(second)) - 0.5 * (len(first) < len(second))\n"
    )
    output = tmp_path / "out.json"
    more = more or ("--judge", f"python:{judge}:judge")
    win_rate.main(["--completions", *files, "--baseline", "sft", "--output", str(output), *more])
    return json.loads(output.read_text())


def test_from_the_command_line(tmp_path, capsys):
    found = run(tmp_path)
    assert found["models"]["ppo"]["win_rate"][0] == 0.75 and found["baseline"] == "sft"
    assert "0.750" in capsys.readouterr().out


def test_with_a_labels_file(tmp_path):
    texts = ["a", "b"]
    rows = [
        {"prompt": f"prompt {i}", "completions": texts, "ranks": ranks, "models": ["ppo", "sft"], "labeler_id": who}
        for i, ranks, who in ((0, [1, 2], "x"), (1, [2, 1], "x"), (0, [1, 2], "y"))
    ]
    found = run(tmp_path, "--labels", write(tmp_path / "labels.jsonl", rows))
    assert found["models"]["ppo"]["win_rate"][0] == pytest.approx(2 / 3)
    assert found["models"]["ppo"]["interval_over_labelers"] == [0.5, 1.0]


def test_labels_without_names_are_of_those_who_said_it(tmp_path, capsys):
    """
    ppo said nothing and "same", sft "same" too: x and y rank both of ppo's against sft's. Nobody said "gone", nor what
    z ranked. Where names are given they count, whatever the text.
    """
    texts = ["", "same", "gone"]
    rows = [
        {"prompt": "p", "completions": texts[: len(ranks)], "ranks": ranks, "labeler_id": who, "ratings": ranks}
        for ranks, who in (([2, 1], "x"), ([1, 2, 3], "y"))
    ]
    rows += [{"prompt": "other", "completions": ["", "same"], "ranks": [1, 2], "labeler_id": "z"}]
    rows += [{"prompt": "q", "completions": ["?", "!"], "ranks": [1, 2], "models": ["ppo", "sft"], "labeler_id": "x"}]
    said = {"ppo": ["", "same"], "sft": ["same"]}
    files = [
        f"{name}={write(tmp_path / name, [{'prompt': 'p', 'completion': text} for text in of])}"
        for name, of in said.items()
    ]
    labels, output = write(tmp_path / "labels.jsonl", rows), tmp_path / "out.json"
    win_rate.main(["--completions", *files, "--baseline", "sft", "--labels", labels, "--output", str(output)])
    found = json.loads(output.read_text())
    of = found["models"]["ppo"]
    # Empty against same: lost by x, won by y; same against itself: two ties; by name: won
    assert (of["n"], of["ties"], of["win_rate"][0]) == (5, 0.4, pytest.approx((0 + 1 + 0.5 + 0.5 + 1) / 5))
    assert found["means"]["sft"]["rating"][0] == 1.5 and found["means"]["ppo"]["rating"][0] == 1.5
    assert found["notes"] == [
        "3 completions that labelers ranked are in no file, and are left out",
        "1 rankings without a model and sft are left out",
    ]
    assert "note: 3 completions" in capsys.readouterr().out


def test_a_text_that_two_models_said_is_one_tie(tmp_path):
    """However often a row has it; its rating counts once for each of them."""
    models = {name: {("p", 0): {"prompt": "p", "completion": "same"}} for name in ("sft", "ppo")}
    models["ppo"]["q", 0] = {"prompt": "q", "completion": ""}
    models["sft"]["q", 0] = {"prompt": "q", "completion": "b"}
    rows = [
        {"prompt": "p", "completions": ["same", "same"], "ranks": [1, 1], "ratings": [7, 7]},
        {"prompt": "q", "completions": ["b", "", ""], "ranks": [1, 2, 2]},
    ]
    found, problems = win_rate.with_models(rows, models)
    preferences, _ = win_rate.by_labelers(found, models, "sft")
    assert [one.value for one in preferences["ppo"]] == [0.5, 0.0] and problems == []
    means = win_rate.ratings_and_metadata(found)
    assert means["ppo"]["rating"][-1] == means["sft"]["rating"][-1] == 1


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"models": 3}, "expected `models`, one for each of the 2 ranks"),
        ({"models": ["a", "a"]}, "expected each of `models` once"),
        ({"ratings": 5}, "expected `ratings`, one for each of the 2 ranks"),
        ({"ratings": [0, 5]}, "from 1 to 7"),
        ({"metadata": [{"hedges": "no"}, None]}, "expected true or false"),
        ({"metadata": [{"hedges": 5}, None]}, "expected true or false"),
        ({"category": ["qa", "chat"]}, "expected a text for `category`"),
        ({"labeler_id": ["l"]}, "'labeler_id': expected text or a whole number"),
        ({"group": ["u"]}, "expected text or a whole number for `group`"),
    ],
)
def test_labels_that_are_none(tmp_path, changed, said):
    row = {"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2], "labeler_id": "l", **changed}
    (tmp_path / "labels.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match="row 1") as error:
        win_rate.read_labels(str(tmp_path / "labels.jsonl"))
    assert said in str(error.value)


def test_what_cannot_be_compared(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("def judge(prompt, first, second):\n    raise RuntimeError\n")
    with pytest.raises(SystemExit, match="failed on 2 of 2, most often with RuntimeError"):
        run(tmp_path, "--judge", f"python:{broken}:judge")
    assert not (tmp_path / "out.json").exists()
    with pytest.raises(SystemExit, match="expected --judge or --labels"):
        run(tmp_path, "--baseline", "sft")
    with pytest.raises(SystemExit, match="expected one of two or more"):
        win_rate.main(["--completions", "a=b", "--baseline", "a", "--judge", "x", "--output", str(tmp_path / "o")])
    for text, message in (("{", "expected JSON Lines"), ('{"prompt": "p"}', "row 1"), ("", "no rows")):
        (tmp_path / "bad.jsonl").write_text(text)
        with pytest.raises(InputError, match=message):
            read_completions(str(tmp_path / "bad.jsonl"))


@pytest.mark.parametrize(
    "said, value",
    [("A tie", 0.5), ("Answer B", 0.0), ("**a**", 1.0), ("a/b", None), ("A draw", None), ("Answer", None), ("", None)],
)
def test_verdicts(said, value):
    if value is None:
        with pytest.raises(ValueError, match="is not A, B or tie"):
            judges._verdict(said)
    else:
        assert judges._verdict(said) == value


def test_an_output_that_is_read_is_refused(tmp_path):
    own = write(tmp_path / "a.jsonl", completions("a"))
    other = write(tmp_path / "b.jsonl", completions("b"))
    (tmp_path / "j.py").write_text("def judge(prompt, first, second):\n    return 1.0\n")
    given = [
        "--completions",
        f"a={own}",
        f"b={other}",
        "--baseline",
        "a",
        "--judge",
        f"python:{tmp_path / 'j.py'}:judge",
    ]
    source = str(tmp_path / "j.py")
    for output, message in (
        (other, "is one of the files to read"),
        (source, "is one of the files to read"),
        (str(tmp_path), "is a folder"),
    ):
        with pytest.raises(SystemExit, match=message):
            win_rate.main([*given, "--output", output])
    assert (tmp_path / "b.jsonl").read_text() == json.dumps(completions("b")[0]) + "\n"
