"""Agreement between labelers and the folds of held-out groups, against cases done by hand."""

import itertools
import json
from pathlib import Path

import agreement
import pytest
from agreement import accuracy, folds, groups_of, judgements

from instructgpt_trl.data import InputError


def row(prompt, labeler, **ranks) -> dict:
    return {"prompt": prompt, "labeler_id": labeler, "completions": list(ranks), "ranks": list(ranks.values())}


ROWS = [
    row("p", "x", a=1, b=2, c=2),  # a > b, a > c, b = c
    row("p", "y", c=1, b=2, a=3),  # a < b, a < c, b < c; in another order
    row("p", "z", a=1, b=1),  # a = b
    row("q", "x", a=1, b=2),  # alone with this prompt
    row("q", "y", a=1, c=2),
]


def test_judgements_do_not_depend_on_the_order_shown():
    found = {pair[1:]: said for pair, said in judgements(ROWS[:3]).items()}
    assert found == {
        ('"a"', '"b"'): {"x": 1, "y": -1, "z": 0},
        ('"a"', '"c"'): {"x": 1, "y": -1},
        ('"b"', '"c"'): {"x": 0, "y": -1},
    }


def test_agreement_by_hand():
    """Of five judgements by two none is the same; with w, who says what x does, x and w agree on three of three."""
    found = agreement.agreement(ROWS)
    assert found["agreement"][0] == 0 and found["judgements"] == 5 and found["pairs"] == 3 and found["labelers"] == 3
    assert found["agreement_untied"][0] == 0  # of a-b and a-c by x and y
    found = agreement.agreement([*ROWS, row("p", "w", a=1, b=2, c=2)])
    # Judgements by two: a-b of x, y, z, w 6, 1 the same; a-c of x, y, w 3, 1 the same; b-c of x, y, w 3, 1 the same
    assert found["agreement"][0] == pytest.approx(3 / 12)
    assert found["agreement_untied"][0] == pytest.approx(2 / 6)  # a-b and a-c of x, y, w


def test_alpha_by_hand():
    """
    Two labelers, four pairs: 1 1, 1 1, -1 -1, 1 -1. Observed disagreement 1 / 4; values 5 and 3 of 8, so that the
    expected one is 2 * 5 * 3 / (8 * 7); alpha = 1 - 0.25 * 56 / 30 [Krippendorff 2011].
    """
    rows = [row(str(i), who, a=rank, b=3 - rank) for i, pair in enumerate([(1, 1), (1, 1), (2, 2), (1, 2)])
            for who, rank in zip("xy", pair, strict=True)]  # fmt: skip
    found = agreement.agreement(rows)
    assert found["alpha"] == pytest.approx(1 - 0.25 * 56 / 30)
    assert found["agreement"][0] == 0.75
    assert agreement.agreement(rows[:4])["alpha"] is None  # one answer alone


def test_labelers_who_share_nothing():
    with pytest.raises(InputError, match="no two labelers"):
        agreement.agreement(ROWS[3:])


def test_groups_hold_every_labeler_once():
    names = [f"labeler {i}" for i in range(13)] * 2
    groups = groups_of(names, 5, seed=0)
    assert sorted(map(len, groups)) == [2, 2, 3, 3, 3]
    assert sorted(itertools.chain(*groups)) == sorted(set(names))
    assert groups == groups_of(names[::-1], 5, seed=0) != groups_of(names, 5, seed=1)
    with pytest.raises(InputError, match="4 labelers for 5 groups"):
        groups_of("abcd", 5, seed=0)


def test_folds_keep_groups_and_prompts_apart():
    rows = [row(f"prompt {i}", f"labeler {i % 7}", a=1, b=2) for i in range(140)]
    held_out = None
    tested = []
    for parts in folds(rows, 5, seed=3):
        people = {name: {one["labeler_id"] for one in of} for name, of in parts.items()}
        prompts = {name: {one["prompt"] for one in of} for name, of in parts.items()}
        assert sum(map(len, parts.values())) == 140
        assert not people["train"] & people["other"] and people["same"] <= people["train"]
        assert not prompts["train"] & prompts["same"]
        held_out = prompts["same"] if held_out is None else held_out | prompts["same"]
        tested += people["other"]
    assert sorted(tested) == [f"labeler {i}" for i in range(7)]
    assert len(held_out) == 14  # a tenth, the same in every fold


def test_empty_completions_are_no_rows_of_a_reward_model():
    turns = [{"role": "assistant", "content": ""}]
    rows = [
        {"prompt": f"prompt {i}", "labeler_id": i % 5, "completions": ["a", " ", "b", turns], "ranks": [1, 2, 3, 4]}
        for i in range(50)
    ]
    rows.append({"prompt": "prompt 0", "labeler_id": 0, "completions": ["", "a"], "ranks": [1, 2]})
    for parts in folds(rows, 5, seed=0):
        of = [one for part in parts.values() for one in part]
        assert len(of) == 50 and all(one["completions"] == ["a", "b"] and one["ranks"] == [1, 3] for one in of)


def test_where_labelers_share_prompts_none_is_trained_and_tested_on():
    rows = [row(f"prompt {i}", f"labeler {j}", a=1, b=2) for i in range(20) for j in range(10)]
    for parts in folds(rows, 5, seed=0):
        prompts = {name: {one["prompt"] for one in of} for name, of in parts.items()}
        assert {name: len(of) for name, of in parts.items()} == {"train": 18 * 8, "same": 2 * 8, "other": 2 * 2}
        assert prompts["same"] == prompts["other"] and not prompts["train"] & prompts["other"]
    with pytest.raises(InputError, match="no rows of kind train"):
        list(folds([row("one", f"labeler {j}", a=1, b=2) for j in range(10)], 5, seed=0))


def test_accuracy_of_scores():
    scores = {"a": 2.0, "b": 1.0, "c": 1.0}
    found = accuracy(lambda prompts, texts: [scores[text] for text in texts], [row("p", "x", a=1, b=2, c=3)] * 2)
    assert found[0] == pytest.approx(2.5 / 3)  # b and c score the same: half


def test_from_the_command_line(tmp_path, capsys):
    file, output = tmp_path / "labels.jsonl", tmp_path / "out.json"
    file.write_text("".join(json.dumps(one) + "\n" for one in ROWS))
    agreement.main(["--labels", str(file), "--output", str(output)])
    assert json.loads(output.read_text())["between labelers"]["judgements"] == 5
    assert "agreement: " in capsys.readouterr().out
    file.write_text(json.dumps({**ROWS[0], "labeler_id": None}) + "\n")
    with pytest.raises(SystemExit, match="row 1: no `labeler_id`"):
        agreement.main(["--labels", str(file), "--output", str(output)])


def test_five_reward_models_by_the_recipe_and_not_twice(tmp_path, monkeypatch):
    """The recipe is called with each fold's rows; a finished fold is read again."""
    calls = []

    def train(command, check):
        data, out = (command[command.index(flag) + 1] for flag in ("--dataset", "--output_dir"))
        calls.append((command[-1], Path(data).read_text().count("\n"), out))

    def score(prompts, texts):
        return [float(text == "a") for text in texts]

    monkeypatch.setattr(agreement.subprocess, "run", train)
    monkeypatch.setattr(agreement, "reward_score", lambda path: score)
    rows = [row(f"prompt {i}", f"labeler {i % 5}", a=1 + (i % 5 == 0), b=2 - (i % 5 == 0)) for i in range(100)]
    for _ in range(2):
        found = agreement.train_folds(rows, tmp_path, 5, 0, ["--flag"])
    assert len(calls) == 5 and {call[0] for call in calls} == {"--flag"}
    assert all(65 < lines < 80 for _, lines, _ in calls)  # 80 less the tenth of the prompts
    # The labeler who prefers b is alone in one group, of which nothing is right
    assert found["labelers held out"]["mean"] == pytest.approx(4 / 5)
    assert found["labelers held out"]["standard_error"] == pytest.approx(0.2)
    assert 0.7 < found["labelers of the training data"]["mean"] < 0.9
