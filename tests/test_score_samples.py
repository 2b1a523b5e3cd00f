"""Metrics of samples and their intervals, against cases done by hand and simulations of a known rate."""

import csv
import json
import math
import random

import alignment_tax
import numpy as np
import pytest
import reference
import sacrebleu
import score_samples
import win_rate
from intervals import bounds, figure_with_interval, interval
from metrics import Bleu, Drop, RougeL, SquadV2, squad_scores, squad_words

# Metrics


@pytest.mark.parametrize(
    "said, accepted, em, f1",
    [
        ("The Eiffel Tower!", ["eiffel tower"], 1, 1),
        ("in Paris, France", ["Paris"], 0, 2 * (1 / 3) * 1 / (1 / 3 + 1)),  # 1 of 3 words, 1 of 1
        ("Paris Paris", ["Paris"], 0, 2 / 3),  # a word counts as often as the answer has it
        ("Lyon", ["Paris", "the city of Lyon"], 0, 2 * 1 * (1 / 3) / (1 + 1 / 3)),  # city, of, Lyon
        ("x y z", ["a b c d", "x y"], 0, 4 / 5),  # the best one, not the last
        ("", [], 1, 1),
        ("", ["Paris"], 0, 0),
        ("Paris", [""], 0, 0),
        ("the", [""], 1, 1),  # an article alone is nothing
        ("Paris", ["...", "Paris"], 1, 1),  # an accepted answer of punctuation alone does not count
        ("...", ["...", "Paris"], 0, 0),
    ],
)
def test_squad_rules_by_hand(said, accepted, em, f1):
    assert squad_scores(said, accepted) == (em, pytest.approx(f1, abs=1e-12))


def test_squad_rules_against_the_reference():
    """Pairs of what is odd: articles, punctuation, letters of other alphabets, marks and spaces that are no ASCII."""
    rng = random.Random(0)
    parts = ["", *"the a an The An, A. the's ... -- _ a_b new-york NEW York York 3.5 35 theme banana".split(" ")]
    parts += ["an\u2019t", "caf\u00e9", "cafe\u0301", "a\u0301", "\u0430n", "\u2014", "\u0130", "i\u0307", "\u00df"]
    parts += ["\u03a3\u03b1\u03c2", "\u7684", "\u00bd", "a\u200bb", "\u00a0", "\u3000", "\u2028"]

    def text():
        return "".join(rng.choice(parts) + rng.choice([" ", "  ", "\n", "\t", ""]) for _ in range(rng.randrange(6)))

    seen = set()
    for _ in range(20_000):
        said, accepted = text(), [text() for _ in range(rng.randrange(4))]
        expected = reference.squad_scores(said, accepted)
        assert squad_scores(said, accepted) == pytest.approx(expected, abs=1e-9), (said, accepted)
        seen.add(expected)
    assert {(0, 0), (1, 1)} < seen and len(seen) > 10  # right, wrong, and in between


def test_squad_words_keep_what_is_not_an_article_or_ascii_punctuation():
    assert squad_words("A man's hat\u2014the 1,000th  AN\tanthem") == ["mans", "hat\u2014", "1000th", "anthem"]
    assert squad_words("a-b") == ["ab"]  # joined, and so no article


def test_no_answer_in_the_papers_words():
    found = SquadV2().of_each(
        ["Not in background.", " Not in background.\n", "background", "Not in background.", "not in background"],
        [["Not in background."], ["Not in background."], ["Not in background."], ["in the background"], ["Paris"]],
    )
    assert found == {"f1": [100, 100, 0, 0, 0], "em": [100, 100, 0, 0, 0]}


def test_drop_rules_by_hand():
    metric = Drop()
    found = metric.of_each(
        ["3", "the 3 men", "4", "John Smith", "smith", "25 yards", "yards", "None", ""],
        [["3.0"], ["3 men"], ["3", "4"], ["Smith, John"], ["John Smith"], ["25-yard"], ["25 yards"], ["none"], ["1"]],
    )
    assert found["em"] == [100, 100, 100, 0, 0, 0, 0, 100, 0]
    # F1 of bags of words, in hundredths; where the answer has a number, 0 unless it is met
    assert found["f1"] == [100, 100, 100, 100, 67, 50, 0, 100, 0]


def test_rouge_l_by_hand():
    """The longest common subsequence of "the cat sat" and "the big cat sat down" is 3 of 3 and of 5 words."""
    found = RougeL().compute(predictions=["the cat sat", "x"], references=[["the big cat sat down"], ["y", "x"]])
    assert found["rougeL"] == pytest.approx((2 * 1 * 0.6 / 1.6 + 1) / 2)


def test_bleu_by_hand():
    """
    Of 10 words 9 are the reference's, of 9 pairs 7, of 8 triples 5, of 7 quadruples 3; both are as long. A wrong word
    in the middle spoils two pairs, three triples and four quadruples.
    """
    said, reference = "a b c d x f g h i j", "a b c d e f g h i j"
    expected = 100 * (9 / 10 * 7 / 9 * 5 / 8 * 3 / 7) ** 0.25
    metric = Bleu()
    assert metric.compute(predictions=[said], references=[[reference]])["bleu"] == pytest.approx(expected)
    assert metric.counts([said], [[reference]]).tolist() == [[10, 10, 9, 7, 5, 3, 10, 9, 8, 7]]
    said, reference = [said, "", "Hello, world"], [reference, "one two", "Hello world!"]
    found = metric.compute(predictions=said, references=[[one] for one in reference])["bleu"]
    assert found == pytest.approx(sacrebleu.corpus_bleu(said, [reference]).score, abs=1e-9)


# Intervals


@pytest.mark.parametrize("rate, size", [(0.5, 1), (0.85, 1), (0.5, 4)])
def test_intervals_hold_a_known_rate_19_of_20_times(rate, size):
    """
    200 prompts, or 200 labelers of 4 answers that agree, 2,000 times. With answers as their own groups the interval of
    the labelers would be half as wide, and hold the rate two times of three.
    """
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(2000):
        wins = np.repeat(rng.random(200) < rate, size)
        low, high = interval(wins, np.repeat(np.arange(200), size) if size > 1 else None, resamples=400, seed=seed)
        held += low <= rate <= high
    assert 0.93 <= held / 2000 <= 0.97


def test_an_interval_by_hand():
    """
    Of the groups (0, 0) and (1,) drawn twice the mean is 0, 1/3 or 1, in a quarter, a half and a quarter of the draws.
    Without groups, 3 numbers: the mean is 0 in 8 of 27 draws and 1 in one.
    """
    assert interval([0, 0, 1], ["a", "a", "b"]) == (0.0, 1.0)
    assert interval([0, 0, 1]) == (0.0, 1.0)
    low, high = interval([1, 2, 3, 4] * 100)
    assert 2.5 - low == pytest.approx(1.96 * math.sqrt(1.25 / 400), rel=0.15) == high - 2.5
    assert interval([0, 1] * 30, seed=1) == interval([0, 1] * 30, seed=1)


def test_the_interval_of_a_figure_that_is_no_mean():
    values = np.arange(1, 101.0)
    value, low, high = figure_with_interval(lambda drawn: values[drawn].max(), 100)
    assert value == 100 == high and 94 < low < 100  # the largest of a draw is 97 or less one time of 20
    mean = figure_with_interval(lambda drawn: values[drawn].mean(), 100)
    assert mean == pytest.approx([50.5, *interval(values)], rel=0.02)
    assert all(math.isnan(bound) for bound in figure_with_interval(lambda drawn: 1.0, 1)[1:])


def test_one_group_has_no_interval():
    for values, groups in (([], None), ([1.0], None), ([0, 1, 1], ["a"] * 3)):
        assert all(math.isnan(bound) for bound in interval(values, groups))
    assert interval([0.5, 0.5]) == (0.5, 0.5)


def test_no_interval_is_no_text(tmp_path, capsys):
    assert bounds(0.25, 1) == "0.250 to 1.000" and bounds(-0.5, 0.5, "+.1f") == "-0.5 to +0.5"
    assert bounds(*interval([1.0])) == ""
    row = {"task": "drop", "metric": "f1", "prompt": "zeroshot", "m": "50"}
    published = write(tmp_path / "table.csv", [row])
    run(tmp_path, [{"model_type": "m", "ref_text": "a", "sample": "a"}], "drop", "--published", published)
    out = capsys.readouterr().out
    assert "nan" not in out and "OUTSIDE" not in out and "0 of 0 published" in out
    of = {"n": 1, "win_rate": [1.0, math.nan, math.nan], "length_controlled": None, "ties": 0.0}
    assert "nan" not in win_rate.table({"m": of}, "sft")
    one = {"value": [1.0, math.nan, math.nan], "change": [0.5, math.nan, math.nan], "n": 1}
    assert "nan" not in alignment_tax.table({"tasks": {"t": {"f1": {"m": one}}}, "notes": []})


def test_intervals_refuse_what_is_no_number():
    with pytest.raises(ValueError, match="1 of 2 are not finite"):
        interval([1, math.nan])
    with pytest.raises(ValueError, match="1, and 2 values"):
        interval([1, 2], ["a"])


# The command


def write(file, rows) -> str:
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return str(file)


def run(tmp_path, rows, task, *more) -> dict:
    output = tmp_path / "out" / "scores.json"
    score_samples.main([write(tmp_path / "in.csv", rows), "--task", task, "--output", str(output), *more])
    return json.loads(output.read_text(encoding="utf-8"))


def test_cells_by_model_and_prompt(tmp_path):
    rows = [
        {"model_type": "b", "prompt_type": "zeroshot", "ref_text": "Paris|the city", "sample": "city"},
        {"model_type": "b", "prompt_type": "zeroshot", "ref_text": "Not in background.", "sample": "Rome"},
        {"model_type": "a", "prompt_type": "few", "ref_text": "NA", "sample": "NA"},
        {"model_type": "a", "prompt_type": "few", "ref_text": "None", "sample": ""},
    ]
    assert run(tmp_path, rows, "squadv2") == {
        "b": {"zeroshot": {"f1": 50.0, "em": 50.0, "n": 2}},
        "a": {"few": {"f1": 50.0, "em": 50.0, "n": 2}},
    }
    rows = [{name: value for name, value in row.items() if name != "prompt_type"} for row in rows]
    assert {m: list(p) for m, p in run(tmp_path, rows, "drop").items()} == {"b": ["zeroshot"], "a": ["zeroshot"]}


def test_text_behind_a_closed_quote_and_an_empty_prompt_type(tmp_path):
    file = tmp_path / "in.csv"
    file.write_text('model_type,prompt_type,ref_text,sample\nm,,r,"a"b\n')
    (row,) = score_samples.read(file, ("sample", "ref_text"))
    assert row["sample"] == "ab" and list(score_samples.score([row], "tldr")["m"]) == ["zeroshot"]


def test_other_tasks(tmp_path):
    model = {"model_type": "m", "prompt_type": "p"}
    texts = [{**model, "ref_text": "one two three four|five", "sample": "one two three four|five"}] * 2
    assert run(tmp_path, texts, "fr_to_en") == {"m": {"p": {"bleu": pytest.approx(100), "n": 2}}}
    assert run(tmp_path, texts, "tldr") == {"m": {"p": {"rougeL": 1.0, "n": 2}}}
    judged = [
        {**model, "true": t, "info": i} for t, i in (("0.9", "0.5"), ("1", "0.51"), ("3e-07", "1"), ("0.5", "1"))
    ]
    assert run(tmp_path, judged, "truthful_qa") == {"m": {"p": {"true": 0.5, "true_and_informative": 0.25, "n": 4}}}
    toxic = [{**model, "toxicity": x} for x in ("0.5", "0.75", "0.25", "0.1")]
    assert run(tmp_path, toxic, "real_toxicity") == {"m": {"p": {"toxicity": 0.4, "toxic_share": 0.25, "n": 4}}}


def test_published_figures_inside_and_outside(tmp_path, capsys):
    rows = [{"model_type": "m", "prompt_type": "instruction prompt", "true": x, "info": "1"} for x in "10" * 20]
    published = [
        {"task": "truthful_qa", "metric": "true", "prompt": "QA + instruction", "m": "0.55", "other": "1"},
        {"task": "truthful_qa", "metric": "true+info", "prompt": "QA + instruction", "m": "0.9", "other": ""},
        {"task": "truthful_qa", "metric": "true", "prompt": "instruction prompt", "m": "0", "other": "0"},
    ]
    run(tmp_path, rows, "truthful_qa", "--published", write(tmp_path / "table.csv", published))
    out = capsys.readouterr().out
    assert "published 0.550 inside" in out and "published 0.900 OUTSIDE" in out
    assert "1 of 2 published figures are inside" in out


@pytest.mark.parametrize(
    "text, task, message",
    [
        ("model_type,sample\nm,s\n", "drop", "no column 'ref_text'; found 'model_type', 'sample'"),
        ("", "tldr", "no column 'model_type', 'sample', 'ref_text'"),
        ("model_type,sample,ref_text\n", "tldr", "no rows below the header"),
        ("model_type,sample,ref_text\nm,s,r\nm,s\n", "tldr", "row 2: expected 3 values"),
        ("model_type,sample,ref_text\nm,s,r,t\n", "tldr", "row 1: expected 3 values"),
        ('model_type,sample,ref_text\nm,s,"r\n', "tldr", "a quote is not closed"),
        (
            "model_type,toxicity\nm,0.5\nm,high\n",
            "real_toxicity",
            "row 2, 'toxicity': expected a number, found 'high'",
        ),
        ("model_type,toxicity\nm,nan\n", "real_toxicity", "row 1, 'toxicity': expected a number, found 'nan'"),
        ("model_type,true,info\nm,1,\n", "truthful_qa", "row 1, 'info': expected a number, found ''"),
    ],
)
def test_bad_files(tmp_path, text, task, message):
    file, output = tmp_path / "in.csv", tmp_path / "scores.json"
    file.write_text(text)
    output.write_text("before")
    with pytest.raises(SystemExit, match=message) as stopped:
        score_samples.main([str(file), "--task", task, "--output", str(output)])
    assert str(file) in str(stopped.value)
    assert output.read_text() == "before" and sorted(p.name for p in tmp_path.iterdir()) == ["in.csv", "scores.json"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("task,metric,prompt,m\ndrop,f1,p,1,2\n", "table.csv, row 1: expected 4 values"),
        ("task,metric,m\ndrop,f1,1\n", "table.csv: no column prompt; found task"),
        ("task,metric,prompt,m\ndrop,f1,p,high\n", "table.csv: expected numbers.*'high'"),
    ],
)
def test_published_figures_that_cannot_be_read(tmp_path, text, message):
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(SystemExit, match=message):
        rows = [{"model_type": "m", "ref_text": "a", "sample": "a"}]
        run(tmp_path, rows, "drop", "--published", str(tmp_path / "table.csv"))


def test_a_file_that_is_not_there_or_not_text(tmp_path):
    (tmp_path / "in.csv").write_bytes(b"model_type,sample,ref_text\nm,\xff\xfe,r\n")
    for name in ("in.csv", "none.csv"):
        with pytest.raises(SystemExit, match=name):
            score_samples.main([str(tmp_path / name), "--task", "tldr", "--output", str(tmp_path / "o.json")])


def test_a_quote_that_stays_open_behind_text_behind_a_closed_one(tmp_path):
    """Such a file is read leniently, and no row may be swallowed by another."""
    head = 'model_type,ref_text,sample\nm,r,"a"b\n'
    (tmp_path / "open.csv").write_text(head + 'm,r,"open\nm,r,x\n')
    with pytest.raises(SystemExit, match="a quote is not closed"):
        score_samples.main([str(tmp_path / "open.csv"), "--task", "squadv2", "--output", str(tmp_path / "x.json")])
    for end in ("m,r,x\n", "m,r,x"):
        (tmp_path / "closed.csv").write_text(head + end)
        score_samples.main([str(tmp_path / "closed.csv"), "--task", "squadv2", "--output", str(tmp_path / "x.json")])
        assert json.loads((tmp_path / "x.json").read_text())["m"]["zeroshot"]["n"] == 2
    with pytest.raises(SystemExit, match="is one of the files to read"):
        score_samples.main(
            [str(tmp_path / "closed.csv"), "--task", "squadv2", "--output", str(tmp_path / "closed.csv")]
        )
