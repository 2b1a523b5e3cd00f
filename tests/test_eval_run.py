"""The whole evaluation on tiny models: every part in the report, a failing part alone, and nothing done twice."""

import base64
import importlib.util
import json
import re
from pathlib import Path

import pytest
import report
from conftest import make_llama
from report import Panel, cells, markdown, panels, picture, shown, write_report

from instructgpt_trl.data import InputError


def load_run():
    """eval/run.py under a name of its own: the demo has a run.py too."""
    file = Path(report.__file__).with_name("run.py")
    spec = importlib.util.spec_from_file_location("eval_run", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


eval_run = load_run()
joined = eval_run.joined
FOUND = {
    "preference": {
        "baseline": "sft",
        "models": {
            "ppo": {
                "win_rate": [0.75, 0.6, 0.9], "length_controlled": 0.6, "n": 20, "ties": 0.1,
                "interval_over_labelers": [0.5, 1.0],
                "by_category": {"chat": {"n": 0}, "qa": {"win_rate": [0.8, None, None], "n": 1}},
            },
            "none": {"n": 0},
        },
        "means": {"ppo": {"rating": [5.0, 4.0, 6.0, 9], "hedges <b>": [0.1, 0.0, 0.2, 9]}},
    },
    "agreement": {
        "between labelers": {
            "agreement": [0.7, 0.6, 0.8], "agreement_untied": [0.8, 0.7, 0.9], "alpha": 0.5, "judgements": 40,
        },
        "reward model": {"folds": {"same": [[0.7, 0.6, 0.8]] * 5, "other": [[0.6, 0.5, 0.7]] * 5}},
    },
    "bias": {"sft": {"crows_pairs": {
        "basic": {"entropy": [0.4, 0.3, 0.5], "stereotype_score": [60.0, 55.0, 65.0], "n": 9},
    }}},
    "truthfulness": {"ppo": {"figures": {"QA prompt": {"true": [0.5, 0.4, 0.6], "n": 9}}}, "sft": {"answers": {}}},
    "toxicity": {"ppo": {"basic": {"toxicity": [0.2, 0.1, 0.3], "toxic_share": [0.1, 0.0, 0.2], "n": 9}}},
    "alignment tax": {
        "base": "sft",
        "tasks": {
            "sst, 0-shot": {
                "acc": {
                    "sft": {"value": [0.9, 0.8, 1.0], "n": 50},
                    "ppo": {"value": [0.7, 0.6, 0.8], "change": [-0.2, -0.3, -0.1], "n": 50},
                }
            }
        },
    },
    "overoptimisation": {
        "gold": "gold reward", "prompts": 8,
        "run": [{"step": 20, "kl": [1.5, 1.0, 2.0], "score": [2.0, 1.0, 3.0], "gold": [0.5, 0.4, 0.6]}],
        "best_of_n": [{"n": 2, "kl": 0.19, "score": [1.0, 0.5, 1.5], "gold": [0.2, 0.1, 0.3]}],
    },
}  # fmt: skip


def test_panels_of_every_part():
    found = {(panel.part, panel.title): panel for panel in panels(FOUND)}
    against = "win rate against sft"
    assert found["Preference", against].rows == {
        "all prompts": {"ppo": [0.75, 0.6, 0.9, 20]},
        "interval over labelers": {"ppo": [0.75, 0.5, 1.0]},
        "at equal length": {"ppo": [0.6]},
    }
    assert found["Preference", "share of ties with sft"].rows == {"all prompts": {"ppo": [0.1]}}
    assert found["Preference", f"{against}, by use case"].rows == {"qa": {"ppo": [0.8, None, None, 1]}}
    assert found["Preference", "rating (1 to 7)"].rows == {"rating": {"ppo": [5.0, 4.0, 6.0, 9]}}
    assert found["Alignment tax", "accuracy, change against sft"].rows == {"sst, 0-shot": {"ppo": [-0.2, -0.3, -0.1]}}
    assert found["Alignment tax", "accuracy"].rows["sst, 0-shot"]["sft"] == [0.9, 0.8, 1.0, 50]
    assert found["Truthfulness", "TruthfulQA: share true"].rows == {"QA prompt": {"ppo": [0.5, 0.4, 0.6, 9]}}
    labelers = found["Agreement", "between labelers, on pairs of completions that both ranked"]
    assert labelers.rows["all pairs"] == {"agreement": [0.7, 0.6, 0.8, 40]}
    curves = found["Overoptimisation", "checkpoints of a run, and best-of-n of its start, on 8 prompts"]
    assert list(curves.rows) == ["step 20", "best of 2"] and curves.rows["step 20"]["gold reward"] == [0.5, 0.4, 0.6]
    parts = {"Preference", "Agreement", "Bias", "Truthfulness", "Toxicity", "Alignment tax", "Overoptimisation"}
    assert {part for part, _ in found} == parts


def test_figures_as_text():
    assert shown([0.5, 0.4, 0.6, 9], 3) == "0.500 [0.400, 0.600] (9)"
    assert shown([0.12345, 0.1, 0.2], 3) == "0.123 [0.100, 0.200]"
    assert shown([0.5], 3) == "0.500" == shown([0.5, None, None], 3)
    assert shown(None, 3) == "" == shown([None, None, None], 3)
    panel = Panel("p", "t", {"x": {"a": [61.23, 55.0, 65.0]}, "y": {"a": [7.0], "b": [None, None, None]}})
    assert cells(panel, ["a", "b"]) == {"x": ["61.2 [55.0, 65.0]", ""], "y": ["7.0", ""]}


def test_the_page_is_one_file_and_escapes(tmp_path):
    found = {"models": {"sft": "a&b", "ppo": "x"}, "suite": "quick", "parts": FOUND, "notes": ["bad <script>"]}
    write_report(tmp_path, found)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and "bad &lt;script&gt;" in page and "a&amp;b" in page and "hedges &lt;b&gt;" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    pictures = re.findall(r'base64,([^"]+)"', page)
    assert len(pictures) == len(list(panels(FOUND)))
    assert all(base64.b64decode(one)[:4] == b"\x89PNG" for one in pictures)
    assert json.loads((tmp_path / "report.json").read_text()) == found
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| sst, 0-shot | 0.900 [0.800, 1.000] (50) | 0.700 [0.600, 0.800] (50) |" in text
    assert (
        "| step 20 | 1.500 [1.000, 2.000] | 2.000 [1.000, 3.000] | 0.500 [0.400, 0.600] |" in text
        and "- bad <script>" in text
    )


def test_one_model_and_many_rows_can_be_drawn():
    assert picture(Panel("p", "t", {"costs $\\frac$ or $5": {"$^": [1.0, 0.5, 2.0]}}), ["$^"])  # no formulas
    panel = Panel("p", "t", {f"row {i}": {"a": [float(i), i - 1.0, i + 1.0]} for i in range(30)})
    assert base64.b64decode(picture(panel, ["a"]))[:4] == b"\x89PNG"
    assert markdown({"models": {"a": "x"}, "notes": []}, [panel]).count("\n| row") == 30


@pytest.fixture
def stage(tmp_path, tokenizer):
    for name, seed in (("base", 0), ("sft", 1)):
        make_llama(seed, max_position_embeddings=2048).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    rows = [{"prompt": f"p{i}", "category": "qa" if i % 2 else "chat"} for i in range(6)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "judge.py").write_text(
        "def judge(prompt, first, second):\n    return 0.5 + 0.5 * (first > second) - 0.5 * (first < second)\n"
        "def toxic(text):\n    return 0.25\n"
        "def true(question, answer):\n    return 1.0\n"
    )
    (tmp_path / "q.csv").write_text("Question\nWhy?\nHow?\n")
    (tmp_path / "crows.csv").write_text("sent_more,sent_less\nab,ac\nbd,cd\n")
    (tmp_path / "rte.jsonl").write_text('{"sentence1": "a", "sentence2": "b", "label": 0}\n')
    (tmp_path / "text.txt").write_text("some text\nmore text\n")
    (tmp_path / "sst.jsonl").write_text('{"sentence": "good", "label": 1}\n{"sentence": "bad", "label": 0}\n')
    return tmp_path


def flags(stage, **changed) -> list[str]:
    python = f"python:{stage / 'judge.py'}"
    given = {
        "models": [f"base={stage / 'base'}", f"sft={stage / 'sft'}"],
        "output": [str(stage / "out")],
        "prompts": [str(stage / "prompts.jsonl")],
        "judge": [f"{python}:judge"],
        "questions": [str(stage / "q.csv")],
        "truth_judge": [f"{python}:true"],
        "scorer": [f"{python}:toxic"],
        "toxicity_prompts": [str(stage / "prompts.jsonl")],
        "crows_pairs": [str(stage / "crows.csv")],
        "data": [f"sst={stage / 'sst.jsonl'}"],
        "text": [str(stage / "text.txt")],
        "max_new_tokens": ["4"],
        **changed,
    }
    return [one for name, values in given.items() if values for one in (f"--{name}", *values)]


def test_everything_in_one_run_and_not_twice(stage, capsys, monkeypatch):
    eval_run.main(flags(stage))
    found = json.loads((stage / "out" / "report.json").read_text())
    assert list(found["parts"]) == ["preference", "truthfulness", "toxicity", "bias", "alignment tax"]
    assert (
        found["parts"]["preference"]["baseline"] == "sft" and found["parts"]["preference"]["models"]["base"]["n"] == 6
    )
    assert found["parts"]["toxicity"]["sft"]["biased"]["toxicity"] == [0.25] * 3
    assert set(found["parts"]["alignment tax"]["tasks"]) == {"sst, 0-shot", "pretraining text"}
    assert [note.split(":")[0] for note in found["notes"]] == ["agreement", "overoptimisation"]
    assert "report: " in capsys.readouterr().out
    import generate
    import language_model

    for owner in (generate.Policy, language_model.LanguageModel):
        monkeypatch.setattr(owner, "__init__", None)  # no model is loaded again, and nobody is asked again
    eval_run.main(flags(stage))
    assert json.loads((stage / "out" / "report.json").read_text()) == found


def test_a_part_that_fails_is_named_and_the_others_are_there(stage):
    changed = {"judge": ["python:gone.py:judge"], "crows_pairs": [str(stage / "q.csv")], "data": ["sst=gone.jsonl"]}
    eval_run.main(flags(stage, **changed))
    found = json.loads((stage / "out" / "report.json").read_text())
    assert list(found["parts"]) == ["truthfulness", "toxicity", "alignment tax"]
    assert set(found["parts"]["alignment tax"]["tasks"]) == {"pretraining text"}
    notes = "\n".join(found["notes"])
    for text in ("no file 'gone.py'", "no column sent_more", "gone.jsonl"):
        assert text in notes
    assert "no column sent_more" in (stage / "out" / "report.html").read_text()


def test_a_model_that_is_not_there_leaves_the_other(stage):
    models = [f"{name}={stage / name}" for name in ("base", "sft", "gone")]
    eval_run.main(flags(stage, models=models))
    found = json.loads((stage / "out" / "report.json").read_text())
    assert list(found["parts"]["preference"]["models"]) == ["base"]  # against sft
    assert list(found["parts"]["toxicity"]) == ["base", "sft"] == list(found["parts"]["bias"])
    assert sum("gone" in note for note in found["notes"]) >= 4


def test_other_settings_give_other_figures(stage):
    """Another model under the same name, other prompts, other pairs: nothing of the first run is taken for them."""

    def found() -> dict:
        eval_run.main(flags(stage))
        return json.loads((stage / "out" / "report.json").read_text())["parts"]

    before = found()
    (stage / "crows.csv").write_text("sent_more,sent_less\nab,xyz\nbd,c\n")
    after = found()
    assert after["bias"]["base"] != before["bias"]["base"] and after["preference"] == before["preference"]
    make_llama(5, max_position_embeddings=2048).save_pretrained(stage / "base")
    changed = found()
    assert changed["bias"]["base"] != after["bias"]["base"] and changed["bias"]["sft"] == after["bias"]["sft"]
    assert changed["truthfulness"]["base"]["answers"] != after["truthfulness"]["base"]["answers"]
    rows = [{"prompt": f"other {i}"} for i in range(3)]
    (stage / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert found()["preference"]["models"]["base"]["n"] == 3


def test_a_report_stays_where_nothing_runs(stage):
    eval_run.main(flags(stage))
    before = (stage / "out" / "report.html").read_bytes()
    none = dict.fromkeys(("prompts", "judge", "questions", "truth_judge", "scorer", "crows_pairs", "data", "text"), [])
    with pytest.raises(SystemExit, match="no part ran"):
        eval_run.main(flags(stage, **none))
    assert (stage / "out" / "report.html").read_bytes() == before


def test_parts_of_an_earlier_call_stay(stage):
    """Whether they fail this time or are not asked for; a report of other models is put aside."""
    eval_run.main(flags(stage))
    before = json.loads((stage / "out" / "report.json").read_text())
    eval_run.main(flags(stage, text=[], data=[f"rte={stage / 'rte.jsonl'}"]))
    tasks = json.loads((stage / "out" / "report.json").read_text())["parts"]["alignment tax"]["tasks"]
    assert {name: tasks[name] for name in before["parts"]["alignment tax"]["tasks"]} == (
        before["parts"]["alignment tax"]["tasks"]
    ) and set(tasks) == {"sst, 0-shot", "pretraining text", "rte, 0-shot"}
    eval_run.main(flags(stage, crows_pairs=[str(stage / "q.csv")], questions=[], truth_judge=[]))
    after = json.loads((stage / "out" / "report.json").read_text())
    assert {**after["parts"], "alignment tax": 0} == {**before["parts"], "alignment tax": 0}
    kept = [note for note in after["notes"] if note.endswith("the figures are of an earlier call")]
    assert [note.split(":")[0] for note in kept] == ["truthfulness", "bias", "alignment tax, rte, 0-shot"]
    assert any("no column sent_more" in note for note in after["notes"])
    make_llama(5, max_position_embeddings=2048).save_pretrained(stage / "base")  # another under the same name
    eval_run.main(flags(stage, crows_pairs=[]))
    report = json.loads((stage / "out" / "report.json").read_text())
    assert "bias" not in report["parts"]
    (note,) = (note for note in report["notes"] if note.startswith("the earlier report"))
    aside = Path(note.split(" is ")[1])
    assert json.loads(aside.with_suffix(".json").read_text()) == after
    assert "Winogender" not in aside.read_text() and "CrowS-Pairs" in aside.read_text()
    (stage / "out" / "report.json").write_text("[]")
    eval_run.main(flags(stage, crows_pairs=[]))
    assert "toxicity" in json.loads((stage / "out" / "report.json").read_text())["parts"]


def test_sections_of_an_earlier_call_stay():
    """Tasks, sets of pairs and kinds of agreement that a call did not make; never two calls' figures in one table."""
    old = {"sft": {"winogender": 1, "crows_pairs": 2}, "ppo": {"winogender": 3, "crows_pairs": 4}}
    assert joined("bias", old, {"sft": {"crows_pairs": 5}}) == (
        {"sft": {"winogender": 1, "crows_pairs": 5}, "ppo": {"winogender": 3}},
        ["bias, winogender"],
    )
    found = joined("agreement", {"between labelers": 1, "reward model": 2}, {"between labelers": 3})
    assert found == ({"between labelers": 3, "reward model": 2}, ["agreement, reward model"])
    tax = {"base": "base", "tasks": {"sst": 1, "rte": 2}, "notes": ["old"]}
    found = joined("alignment tax", tax, {"base": "base", "tasks": {"sst": 3}, "notes": []})
    assert found == ({"base": "base", "tasks": {"sst": 3, "rte": 2}, "notes": []}, ["alignment tax, rte"])
    new = {"base": "sft", "tasks": {"sst": 3}, "notes": []}
    assert joined("alignment tax", tax, new) == (new, [])
    assert joined("toxicity", {"sft": 1, "ppo": 2}, {"sft": 3}) == ({"sft": 3}, [])
    assert joined("toxicity", {"sft": 1}, None) == ({"sft": 1}, ["toxicity"])
    assert joined("toxicity", None, {"sft": 1}) == ({"sft": 1}, [])


def test_figures_without_an_interval_have_none(tmp_path):
    nan = float("nan")
    tax = {"base": "sft", "tasks": {"text": {"loss": {"sft": {"value": [6.0, nan, nan], "n": 1}}}}, "notes": []}
    write_report(tmp_path, {"models": {"sft": "sft"}, "suite": "quick", "parts": {"alignment tax": tax}, "notes": []})
    for kind in ("html", "md", "json"):
        text = re.sub(r"base64,[^\"]*", "", (tmp_path / f"report.{kind}").read_text())
        assert "nan" not in text.lower() and "6.0" in text


@pytest.mark.parametrize("given, count", [({}, 1), ({"toxicity_samples": ["3"]}, 3)])
def test_several_continuations_have_a_most_toxic_one(stage, monkeypatch, given, count):
    """Scores of a prompt's continuations rise from 0 to 1."""
    import toxicity

    asked = []
    monkeypatch.setattr(toxicity, "make_scorer", lambda *a, **k: lambda texts: asked.append(texts) or numbers(texts))

    def numbers(texts):
        return [i % count / max(count - 1, 1) for i in range(len(texts))]

    none = dict.fromkeys(("judge", "questions", "truth_judge", "crows_pairs", "data", "text"), [])
    eval_run.main(flags(stage, **none, models=[f"base={stage / 'base'}"], **given))
    found = json.loads((stage / "out" / "report.json").read_text())["parts"]
    of = found["toxicity"]["base"]["basic"]
    assert len(asked[0]) == of["n"] == 6 * count
    assert of.get("expected_maximum") == ([1.0] * 3 if count > 1 else None)
    titles = [panel.title for panel in panels(found)]
    assert ("RealToxicityPrompts: expected maximum" in titles) == (count > 1)


def test_what_a_scorer_could_not_say_is_noted(stage):
    """It fails on the first text, of six of the first model with the first prefix."""
    body = (stage / "judge.py").read_text()
    failing = "asked = []\ndef toxic(text):\n    asked.append(text)\n    return 0.25 if len(asked) > 1 else 7\n"
    (stage / "judge.py").write_text(body.replace("def toxic(text):\n    return 0.25\n", failing))
    eval_run.main(flags(stage))
    found = json.loads((stage / "out" / "report.json").read_text())
    failed = [note for note in found["notes"] if note.startswith("toxicity")]
    assert failed == ["toxicity, base, basic: 1 were not judged, or not by all judges"]
    assert found["parts"]["toxicity"]["base"]["basic"]["n"] == 5
    earlier = ["toxicity: the figures are of an earlier call", *failed]
    for changed in ({"scorer": ["nonsense"]}, {"scorer": []}):  # the note stays with its figures, through two calls
        eval_run.main(flags(stage, **changed))
        found = json.loads((stage / "out" / "report.json").read_text())
        (why, *kept) = [note for note in found["notes"] if note.startswith("toxicity")]
        assert kept == earlier and ("scorer 'nonsense'" in why or "not run" in why)


def test_a_judge_that_says_otherwise_or_is_repaired_is_asked_again(stage):
    """Under the same name: its file is looked at, and what failed in part is not kept."""

    others = dict.fromkeys(("judge", "questions", "truth_judge", "crows_pairs", "data", "text"), [])

    def toxicity() -> dict:
        eval_run.main(flags(stage, **others))
        return json.loads((stage / "out" / "report.json").read_text())["parts"]["toxicity"]["base"]["basic"]

    body = (stage / "judge.py").read_text()
    assert toxicity()["toxicity"][0] == 0.25
    (stage / "judge.py").write_text(body.replace("return 0.25", "return 0.75"))
    assert toxicity()["toxicity"][0] == 0.75
    failing = f"from pathlib import Path\ndef toxic(text):\n    seen = Path({str(stage / 'seen')!r})\n"
    failing += "    first = not seen.exists()\n    seen.touch()\n    assert not first, 'busy'\n    return 0.5\n"
    (stage / "judge.py").write_text(body.replace("def toxic(text):\n    return 0.25\n", failing))
    assert toxicity()["n"] == 5
    assert toxicity()["n"] == 6  # the file is the same


def test_a_judge_that_cannot_be_read_is_named_before_anything_is_sampled(stage):
    (stage / "judge.py").write_text("def judge(")
    eval_run.main(flags(stage, questions=[], truth_judge=[], scorer=[], data=[], text=[]))
    notes = json.loads((stage / "out" / "report.json").read_text())["notes"]
    assert any(note.startswith("preference: judge 'python:") and "SyntaxError" in note for note in notes)
    assert not (stage / "out" / "completions").exists()


def test_a_scorer_that_always_fails_is_named_and_asked_again(stage, monkeypatch):
    """Of what was sampled for it, as the judge of truth is."""
    body = (stage / "judge.py").read_text()
    failing = body.replace("return 0.25", "raise RuntimeError('no key')").replace("return 1.0", "return 'no'")
    (stage / "judge.py").write_text(failing)
    eval_run.main(flags(stage))
    found = json.loads((stage / "out" / "report.json").read_text())
    assert not {"toxicity", "truthfulness"} & {*found["parts"]} and any("no key" in note for note in found["notes"])
    (stage / "judge.py").write_text(body)
    monkeypatch.setattr("generate.Policy.__init__", None)
    eval_run.main(flags(stage))
    assert {"toxicity", "truthfulness"} < {*json.loads((stage / "out" / "report.json").read_text())["parts"]}


@pytest.mark.parametrize("shared", [True, False])
def test_one_half_of_agreement_without_the_other(stage, monkeypatch, shared):
    """Labelers who share no pair have folds all the same, and folds that fail leave their agreement."""
    folds = FOUND["agreement"]["reward model"]

    def train_folds(*args):
        if shared:
            raise InputError("no folds")
        return folds

    monkeypatch.setattr("agreement.train_folds", train_folds)
    rows = [
        {"prompt": "p" if shared else who, "completions": ["a", "b"], "ranks": [1, 2], "labeler_id": who}
        for who in ("x", "y")
    ]
    (stage / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = ("prompts", "judge", "questions", "truth_judge", "scorer", "crows_pairs", "data", "text")
    only = dict.fromkeys(names, []) | {"labels": [str(stage / "labels.jsonl")], "folds": ["--flag 1"]}
    eval_run.main(flags(stage, **only))
    found = json.loads((stage / "out" / "report.json").read_text())
    assert list(found["parts"]["agreement"]) == ["between labelers" if shared else "reward model"]
    name, reason = ("reward model", "no folds") if shared else ("between labelers", "no two labelers ranked")
    assert any(note.startswith(f"agreement, {name}: {reason}") for note in found["notes"])
    (panel,) = panels(found["parts"])
    assert panel.title.startswith("between labelers" if shared else "of reward models")


def test_one_model_has_no_win_rate_but_all_else(stage):
    eval_run.main(flags(stage, models=[f"base={stage / 'base'}"]))
    found = json.loads((stage / "out" / "report.json").read_text())
    assert "preference" not in found["parts"] and "bias" in found["parts"]
    assert any(note.startswith("preference: not run; it takes two models") for note in found["notes"])


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"models": ["base"]}, "expected NAME=VALUE"),
        ({"models": ["a=x", "a=y"]}, "each name once"),
        ({"models": ["../a=x", "b=y"]}, "without / and"),
        ({"baseline": ["ppo"]}, "--baseline ppo: expected one of base, sft"),
    ],
)
def test_wrong_calls(stage, changed, message):
    with pytest.raises(SystemExit, match=message):
        eval_run.main(flags(stage, **changed))
    assert not (stage / "out").exists()


def test_nothing_to_do(stage):
    none = dict.fromkeys(("prompts", "judge", "questions", "truth_judge", "scorer", "crows_pairs", "data", "text"), [])
    with pytest.raises(SystemExit, match="no part ran"):
        eval_run.main(flags(stage, **none))
