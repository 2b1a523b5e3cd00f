"""The demo's measurements on tiny models, its report, and the whole of it in its quick version."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import critic
import judge
import numpy as np
import pytest
import torch
from base import batches, make_model, make_tokenizer, packed_batches, pretrain
from evaluation import Samples, mean_kl, pretraining_loss, sample, sequence_logprobs, win_rate
from gold import gold_reward
from labelers import make_labelers
from run import QUICK, STEP, Settings
from transformers import AutoModelForCausalLM
from world import make_world

ROOT = Path(__file__).parents[1]

TEXTS = ["the fox sings.", "tom, give me the red book.", "the fox sleeps in the garden of tom.", "hello!"]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(TEXTS)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return make_model(tokenizer).eval()


def logprobs(model, ids: list[int]) -> torch.Tensor:
    """(L - 1,) log-probability of each token after the first, one row, nothing padded."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
    return logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]]


# The base model


def test_the_tokenizer_gives_texts_back(tokenizer):
    assert [tokenizer.decode(tokenizer(text)["input_ids"]) for text in TEXTS] == TEXTS
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<eos>", "<unk>"]) == [0, 1, 2]
    assert tokenizer("the wolf")["input_ids"][1] == tokenizer.unk_token_id


def test_the_model_has_about_a_million_parameters():
    world = make_world(0)
    tokenizer = make_tokenizer([*world.web(3000), *world.tasks])
    assert 0.7e6 < make_model(tokenizer).num_parameters() < 1.4e6


def test_batches_hold_every_text_once_within_their_size(tokenizer):
    made = batches(TEXTS * 5, tokenizer, 24)
    rows = [row[row != -100].tolist() for _, labels in made for row in labels]
    expected = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in TEXTS * 5]
    assert sorted(rows) == sorted(expected)
    assert all(ids.numel() <= 24 for ids, _ in made)


def test_packed_batches_are_the_texts_joined(tokenizer):
    made = packed_batches(TEXTS * 5, tokenizer, 24, length=6)
    stream = [i for text in TEXTS * 5 for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    joined = [i for ids, _ in made for i in ids.flatten().tolist()]
    assert joined == stream[: len(joined)] and len(stream) - len(joined) < 6
    assert [tuple(ids.shape) for ids, _ in made[:-1]] == [(4, 6)] * (len(made) - 1)


def test_pretraining_learns_a_text_by_heart(tokenizer, tmp_path):
    steps = packed_batches(TEXTS * 200, tokenizer, 240, length=24)
    before = pretraining_loss(make_model(tokenizer), steps[:3])
    pretrain(steps, tokenizer, tmp_path)
    after = pretraining_loss(AutoModelForCausalLM.from_pretrained(tmp_path), steps[:3])
    assert before > math.log(len(tokenizer)) - 0.5 and after < 0.3


# Measurements


def test_sums_of_logprobs_do_not_depend_on_the_padding(model):
    samples = Samples(["a", "b", "c"], [[4, 5], [6], [7, 8, 9]], [[5, 1], [9, 9, 9, 9, 1], [4]], ["", "", ""])
    expected = []
    for prompt, completion in zip(samples.prompt_ids, samples.completion_ids, strict=True):
        expected.append(float(logprobs(model, prompt + completion)[len(prompt) - 1 :].sum()))
    np.testing.assert_allclose(sequence_logprobs(model, samples), expected, atol=1e-5)
    assert mean_kl(model, model, samples) == 0


def test_pretraining_loss_is_the_mean_over_real_tokens(model, tokenizer):
    made = batches(TEXTS, tokenizer, 24)
    rows = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in TEXTS]
    each = torch.cat([-logprobs(model, row) for row in rows])
    assert pretraining_loss(model, made) == pytest.approx(float(each.mean()), abs=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_pretraining_loss_leaves_the_models_mode_alone(model, tokenizer, training):
    pretraining_loss(model.train(training), batches(TEXTS, tokenizer, 24))
    assert model.training == training
    model.eval()


def test_samples_are_the_models_own_and_end_at_eos(model, tokenizer):
    prompts = ["the fox", "tom, give me the"] * 40
    first, again, other = (sample(model, tokenizer, prompts, 6, seed) for seed in (0, 0, 1))
    assert first == again and first.completion_ids != other.completion_ids
    assert all(1 <= len(ids) <= 6 and tokenizer.eos_token_id not in ids[:-1] for ids in first.completion_ids)
    assert first.prompts == prompts and first.prompt_ids[0] == tokenizer("the fox")["input_ids"]
    # The first token of many samples of one prompt has the model's own distribution: no top-k, no top-p
    draws = [ids[0] for ids in sample(model, tokenizer, ["the fox"] * 4000, 1, 2).completion_ids]
    ids = tokenizer("the fox")["input_ids"]
    probabilities = torch.stack([logprobs(model, [*ids, token])[-1] for token in range(len(tokenizer))]).exp()
    found = np.bincount(draws, minlength=len(tokenizer)) / 4000
    # five standard deviations of a share of 4,000
    assert np.all(np.abs(found - probabilities.numpy()) < 5 * np.sqrt(probabilities.numpy() / 4000) + 1e-3)


def test_win_rate_of_a_model_against_itself_is_a_half_and_against_silence_is_one():
    world = make_world(0)
    rows = world.demonstrations(world.splits["test"][:50])
    prompts, texts = ([row[name] for row in rows] for name in ("prompt", "completion"))
    ours, silent = (Samples(prompts, [], [], answers) for answers in (texts, [""] * 50))
    judges = make_labelers("heldout")
    assert win_rate(world.tasks, ours, ours, judges) == [0.5, 0.5, 0.5]
    mean, low, high = win_rate(world.tasks, ours, silent, judges)
    assert mean > 0.97 and 0.9 < low <= mean <= high <= 1
    assert win_rate(world.tasks, silent, ours, judges)[0] == pytest.approx(1 - mean)


# The whole


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Folder of a quick run, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    command = [
        sys.executable,
        str(ROOT / "recipes/demo/run.py"),
        "--quick",
        "--seed",
        "3",
        "--output_dir",
        str(folder),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=ROOT, env=env, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_quick_run_writes_the_whole_report(quick):
    folder, printed = quick
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert list(report) == ["seed", "ppo_steps", "seconds", "labelers", "reward_model", "policies"]
    assert report["seed"] == 3 and report["ppo_steps"] == QUICK.ppo_steps
    stages = ["pretraining", "sft", "rankings", "reward_model", "ppo", "ppo_ptx", "evaluation"]
    assert list(report["seconds"]) == [*stages, "total"]
    assert report["seconds"]["total"] >= sum(report["seconds"][stage] for stage in stages) - 1
    assert list(report["labelers"]) == ["agreement", "heldout_agreement"]
    assert 0.5 < report["labelers"]["agreement"] < 1 and 0.5 < report["labelers"]["heldout_agreement"] < 1
    keys = ["accuracy_train_labelers", "accuracy_heldout_labelers", "demonstration_mean"]
    assert list(report["reward_model"]) == keys
    assert abs(report["reward_model"]["demonstration_mean"]) < 1e-4
    assert list(report["policies"]) == ["base", "sft", "ppo", "ppo_ptx"]
    for policy in report["policies"].values():
        assert list(policy) == ["win_rate_vs_sft", "gold_reward", "rm_score", "kl", "pretraining_loss"]
        mean, low, high = policy["win_rate_vs_sft"]
        assert 0 <= low <= mean <= high <= 1
        assert all(math.isfinite(policy[name]) for name in ("gold_reward", "rm_score", "kl", "pretraining_loss"))
    assert report["policies"]["sft"]["kl"] == 0
    assert "report.html" in printed and "PPO-ptx" in printed


def test_quick_run_writes_a_page_that_needs_no_other_file(quick):
    page = (quick[0] / "report.html").read_text(encoding="utf-8")
    assert page.count("<img ") == 8 and page.count('src="data:image/png;base64,') == 8
    assert "http" not in page
    assert page.count('<table class="samples">') == 1


@pytest.mark.slow
def test_what_the_critic_buys(quick, monkeypatch, capsys):
    """The demo's policies have its figures, PPO too when it is trained anew; RLOO and DPO start from its SFT model."""
    folder = quick[0]
    settings = {"ppo": [(1e-4, 0.02)], "rloo": [(1e-4, 0.02)], "dpo": [(1e-9, 0.1), (1e-4, 0.1)]}
    monkeypatch.setattr(critic, "SETTINGS", settings)
    critic.main(["--demo", str(folder)])
    rows = json.loads((folder / "critic.json").read_text(encoding="utf-8"))
    assert [row["policy"] for row in rows] == ["sft", "ppo_ptx", "ppo", "rloo", "dpo", "dpo"]
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))["policies"]
    for row in rows[:3]:
        of_demo = report[row["policy"]]
        assert row["gold_reward"][0] == pytest.approx(of_demo["gold_reward"], abs=1e-6)
        for figure in ("rm_score", "kl", "pretraining_loss"):
            assert row[figure] == pytest.approx(of_demo[figure], abs=1e-5)
    rloo, still, dpo = rows[3:]
    assert rloo["kl"] > 0.01 < dpo["kl"] and abs(still["kl"]) < 1e-3  # a rate of 1e-9 changes nothing
    assert [row["chosen"] for row in rows] == [True] * 4 + [
        row["objective"] >= max(still["objective"], dpo["objective"]) for row in rows[4:]
    ]
    assert (folder / "critic.png").read_bytes()[:4] == b"\x89PNG"
    assert "RLOO" in capsys.readouterr().out


def test_a_setting_that_fails_leaves_the_others(monkeypatch):
    """Of PPO the first of three, of RLOO all; the best of those that are there is chosen."""
    world = critic.Comparison.__new__(critic.Comparison)
    monkeypatch.setattr(critic.Comparison, "load", lambda self, name: name)
    monkeypatch.setattr(critic.Comparison, "measure", lambda self, model: {"kl": 1.0})

    def trained(self, name, rate, beta):
        if name == "rloo" or rate == 1e-4:
            raise RuntimeError("out of memory")
        return {"policy": name, "objective": -rate}

    monkeypatch.setattr(critic.Comparison, "trained", trained)
    monkeypatch.setattr(critic, "SETTINGS", {name: critic.SETTINGS[name] for name in ("ppo", "rloo")})
    rows, failed = world.compare()
    found = [(row["policy"], row.get("objective"), row["chosen"]) for row in rows]
    assert found == [("sft", None, True), ("ppo_ptx", None, True), ("ppo", -3e-4, True), ("ppo", -1e-3, False)]
    assert [one.split(" ")[0] for one in failed] == ["PPO", "RLOO", "RLOO", "RLOO"]
    assert failed[0] == "PPO 0.0001 0.02: RuntimeError: out of memory"


def test_pairs_of_the_comparison(quick):
    """As many completions as PPO samples; the better one by the reward model is chosen."""
    world = critic.Comparison(quick[0], 3, steps=2)
    pairs = world.pairs
    assert len(pairs) == 2 * STEP // 2 and set(pairs["prompt"]) <= set(world.train)
    better, worse = (np.array(world.rm.score(pairs["prompt"], pairs[name])) for name in ("chosen", "rejected"))
    assert (better >= worse - 1e-5).all() and (better > worse).any()
    for row in pairs:
        together = world.tokenizer(row["prompt"] + row["chosen"])["input_ids"]
        assert together == world.tokenizer(row["prompt"])["input_ids"] + world.tokenizer(row["chosen"])["input_ids"]


def test_the_judge_knows_the_world(monkeypatch):
    monkeypatch.setenv("DEMO_SEED", "3")
    judge._tasks.cache_clear()
    world = make_world(3)
    row = world.demonstrations(world.splits["train"][:1])[0]
    prompt, good, bad = row["prompt"], row["completion"], "the"
    assert judge.gold(prompt, good) == gold_reward(world.tasks[prompt], good) > judge.gold(prompt, bad)
    preferences = [judge.prefers(prompt, *pair) for pair in ((good, bad), (bad, good), (bad, bad))]
    assert preferences == [1.0, 0.0, 0.5]
    with pytest.raises(KeyError):
        judge.gold("not of this world", good)
    judge._tasks.cache_clear()


def test_the_quick_version_is_smaller_in_everything():
    assert all(getattr(QUICK, name) < getattr(Settings(), name) for name in vars(QUICK))
