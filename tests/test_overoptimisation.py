"""Score against distance: best-of-n by enumeration, KL of known policies, the picture's figures."""

import itertools
import json
import math

import numpy as np
import overoptimisation
import pytest
from conftest import make_llama
from judges import by_scores
from overoptimisation import best_of, best_of_kl, checkpoints, draw

from instructgpt_trl.data import InputError


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_the_mean_over_all_draws(n):
    rng = np.random.default_rng(0)
    scores, gold = rng.normal(size=(4, 5)), rng.normal(size=(4, 5))
    found = best_of(scores, gold, n)
    for row in range(4):
        draws = list(itertools.combinations(range(5), n))
        best = [max(draw, key=lambda i, row=row: scores[row, i]) for draw in draws]
        assert found[0][row] == pytest.approx(np.mean(scores[row, best]))
        assert found[1][row] == pytest.approx(np.mean(gold[row, best]))


def test_kl_of_best_of_n_by_enumeration():
    """
    Of m outputs of equal probability and different scores the best of n draws is the k-th with probability
    (k / m)^n - ((k - 1) / m)^n; its KL to 1 / m comes near log n - (n - 1) / n from below as m grows.
    """
    for n in (1, 2, 16):
        k = np.arange(1, 20_001) / 20_000
        p = k**n - (k - 1 / 20_000) ** n
        exact = float((p * np.log(p * 20_000)).sum())
        assert exact == pytest.approx(best_of_kl(n), abs=1e-3)


@pytest.fixture
def stage(tmp_path, tokenizer):
    """A start, a run of two checkpoints of which the first is the start, prompts with one twice."""
    for name, seed in (("start", 0), ("run/checkpoint-2", 0), ("run/checkpoint-10", 1)):
        make_llama(seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    rows = [{"prompt": "ab"}, {"prompt": "cd"}, {"prompt": "ab"}, {"prompt": "e"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "gold.py").write_text("def gold(prompt, completion):\n    return -float(len(completion))\n")
    (tmp_path / "judge.py").write_text(
        "def judge(prompt, first, second):\n    return float(len(first) <= len(second))\n"
    )
    return tmp_path


def length(path):
    """A reward model that likes long completions."""
    return lambda prompts, completions: [float(len(text)) for text in completions]


def run(stage, *more) -> dict:
    flags = ["--run", str(stage / "run"), "--start", str(stage / "start"), "--reward_model", "x"]
    flags += ["--prompts", str(stage / "prompts.jsonl"), "--max_new_tokens", "5", "--best_of", "1", "4"]
    overoptimisation.main([*flags, "--output", str(stage / "over.json"), *more])
    return json.loads((stage / "over.json").read_text())


def test_points_of_a_run_and_of_best_of_n(stage, monkeypatch):
    monkeypatch.setattr(overoptimisation, "reward_score", length)
    found = run(stage, "--gold", f"python:{stage / 'gold.py'}:gold")
    assert found["prompts"] == 3 and [point["step"] for point in found["run"]] == [2, 10]
    same, other = found["run"]
    assert same["kl"] == pytest.approx([0, 0, 0], abs=1e-4) and other["kl"][0] > 0.1
    for point in found["run"] + found["best_of_n"]:
        assert point["gold"][0] == pytest.approx(-point["score"][0])
    one, four = found["best_of_n"]
    assert one["kl"] == 0 and four["kl"] == pytest.approx(math.log(4) - 0.75)
    assert four["score"][0] >= one["score"][0]
    assert (stage / "over.png").read_bytes()[:4] == b"\x89PNG"


def test_the_kl_is_that_of_what_was_sampled(stage, monkeypatch):
    """Of one token it is the sum over the vocabulary, here the mean over many prompts that are all the same to it."""
    import torch
    from generate import Policy

    policies = [Policy(str(stage / name), 64, 1, temperature=1.0) for name in ("run/checkpoint-10", "start")]
    prompts = ["ab"] * 4000
    sampled = policies[0].sample(prompts)
    own, start = (np.array(policy.logprobs(prompts, sampled)) for policy in policies)
    ids = torch.tensor([policies[0].tokenizer("ab")["input_ids"]])
    with torch.no_grad():
        of_own, of_start = (policy.model(ids).logits[0, -1].log_softmax(-1) for policy in policies)
    expected = (of_own.exp() * (of_own - of_start)).sum().item()
    error = (own - start).std() / math.sqrt(len(prompts))
    assert expected > 10 * error and abs((own - start).mean() - expected) < 4 * error


def test_completions_are_kept(stage, monkeypatch):
    """For another judge too; not for another run, start or seed."""
    monkeypatch.setattr(overoptimisation, "reward_score", length)
    gold = ("--gold", f"python:{stage / 'gold.py'}:gold")
    found = run(stage, *gold)
    import generate

    def sample(*args):
        raise TypeError("sampled again")

    monkeypatch.setattr(generate.Policy, "sample", sample)
    assert run(stage, *gold) == found
    assert run(stage, "--judge", f"python:{stage / 'judge.py'}:judge")["run"][0]["kl"] == found["run"][0]["kl"]
    for changed in (("--seed", "1"), ("--start", str(stage / "run/checkpoint-10")), ("--max_new_tokens", "4")):
        with pytest.raises(TypeError):
            run(stage, *gold, *changed)
    make_llama(7).save_pretrained(stage / "run/checkpoint-10")  # another run into the same folder
    with pytest.raises(TypeError):
        run(stage, *gold)


def test_the_opponent_is_none_of_the_candidates(stage, monkeypatch):
    """With a judge who says what the score says, best of n beats an independent sample n of n + 1 times."""

    class Random:
        """A score of its own for each text, by its place in the call."""

        def __init__(self):
            self.known = {}

        def score(self, prompts, completions):
            rng = np.random.default_rng(0)
            return [self.known.setdefault(text, rng.random()) for text in completions]

    scorer, count = Random(), 300
    monkeypatch.setattr(overoptimisation, "reward_score", lambda path: scorer.score)
    judge = by_scores(scorer.score)
    monkeypatch.setattr(overoptimisation, "make_judge", lambda name, keep: judge)
    (stage / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"p{i}"}) + "\n" for i in range(count)))
    found = run(stage, "--judge", "x", "--limit", str(count), "--max_new_tokens", "12")
    rates = [point["gold"][0] for point in found["best_of_n"]]
    assert rates[0] == pytest.approx(1 / 2, abs=0.06) and rates[1] == pytest.approx(4 / 5, abs=0.06)


def test_against_a_judge(stage, monkeypatch):
    monkeypatch.setattr(overoptimisation, "reward_score", length)
    found = run(stage, "--judge", f"python:{stage / 'judge.py'}:judge")
    assert found["gold"] == "win rate against the start"
    assert all(0 <= point["gold"][0] <= 1 for point in found["run"])


def test_curves_are_of_the_same_prompts():
    """Gold is minus the score, and fails on a candidate of one prompt and on a checkpoint's answer to another."""
    rng = np.random.default_rng(0)
    kl, of_start, scores = rng.random((2, 6)), rng.random((6, 4)), rng.random((2, 6))
    gold_of_start, golds = -of_start, -scores
    gold_of_start[1, of_start[1].argmin()] = golds[1, 4] = np.nan  # the worst candidate, which best of 4 never takes
    of_run = {step: np.array([kl[i], scores[i], golds[i]]) for i, step in enumerate((2, 10))}
    found = overoptimisation.curves(of_run, np.array([of_start, gold_of_start]), [1, 4])
    assert (found["prompts"], found["left_out"]) == (4, 2)
    there = [0, 2, 3, 5]
    for point in found["run"] + found["best_of_n"]:
        assert point["gold"][0] == pytest.approx(-point["score"][0])
    assert [point["score"][0] for point in found["run"]] == pytest.approx(scores[:, there].mean(1))
    assert [point["kl"][0] for point in found["run"]] == pytest.approx(kl[:, there].mean(1))
    assert found["best_of_n"][1]["score"][0] == pytest.approx(of_start[there].max(1).mean())
    with pytest.raises(InputError, match="none of 6 prompts"):
        overoptimisation.curves(of_run, np.array([of_start, np.full((6, 4), np.nan)]), [1])


def test_a_gold_that_fails_on_some_leaves_the_others(stage, monkeypatch, capsys):
    monkeypatch.setattr(overoptimisation, "reward_score", length)
    (stage / "gold.py").write_text(
        "def gold(prompt, completion):\n    assert prompt != 'cd'\n    return 5.0\n"
        "def never(prompt, completion):\n    raise RuntimeError('no key')\n"
    )
    found = run(stage, "--gold", f"python:{stage / 'gold.py'}:gold")
    assert all(point["gold"] == [5.0] * 3 for point in found["run"] + found["best_of_n"])
    assert (found["prompts"], found["left_out"], found["failed"]) == (2, 1, 4 + 2)
    note = "gold reward failed on 6 of 18 completions; 1 of 3 prompts are left out of all points"
    assert found["notes"] == [note] and f"note: {note}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="failed on 12 of 12.*no key"):
        run(stage, "--gold", f"python:{stage / 'gold.py'}:never")


def test_best_of_none_is_refused(stage, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(stage, "--gold", "x", "--best_of", "0")
    assert "argument --best_of: expected a whole number, 1 or more, found '0'" in capsys.readouterr().err


def test_what_is_missing_is_named(stage, monkeypatch):
    monkeypatch.setattr(overoptimisation, "reward_score", length)
    with pytest.raises(SystemExit, match="expected --gold or --judge"):
        run(stage)
    with pytest.raises(SystemExit, match=r"expected python:FILE.py:FUNCTION"):
        run(stage, "--gold", "gold.py")
    with pytest.raises(InputError, match="no checkpoint-"):
        checkpoints(stage / "start")


def test_a_picture_with_kl_below_zero_and_without_intervals(tmp_path):
    """An estimate of a KL may be negative; of one prompt there is no interval."""
    nothing = [1.0, None, None]
    point = {"kl": [-0.1, None, None], "score": nothing, "gold": nothing}
    found = {"gold": "gold", "run": [{**point, "step": 1}], "best_of_n": [{**point, "n": 1, "kl": 0.0}]}
    draw(found, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000
