"""Alarms: each on a run that is built to trip it, on numbers by hand, and on none of a healthy run."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_llama, make_tokenizer
from datasets import Dataset
from ppo_helpers import config
from transformers import TrainerCallback

from instructgpt_trl import PPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer, alarms
from instructgpt_trl.alarms import AlarmCallback
from instructgpt_trl.checkpoints import flaw
from instructgpt_trl.data import InputError
from instructgpt_trl.models.guards import NotFinite

ALARMS = {alarm.name: alarm for alarm in (*alarms.SFT, *alarms.REWARD, *alarms.PPO)}


def rows(**columns) -> list[dict]:
    """Logs from their columns; a column that is one number is the same in all."""
    count = max(len(column) for column in columns.values() if isinstance(column, list))
    each = {name: column if isinstance(column, list) else [column] * count for name, column in columns.items()}
    return [dict(zip(each, values, strict=True)) for values in zip(*each.values(), strict=True)]


KL, LENGTH, PTX, POLICY = "objective/kl", "completions/mean_length", "grad_norm/ptx", "grad_norm/policy"
SCORES, STD = "objective/scores", "objective/scores_std"
# Name; logs that trip it; logs that just do not
SERIES = [
    ("KL", {KL: [1, 2, 20.1], LENGTH: 20.0}, {KL: [1, 2, 20.0], LENGTH: 20.0}),
    ("KL jump", {KL: [1.0] * 10 + [5.1], LENGTH: 20.0}, {KL: [1.0] * 10 + [5.0], LENGTH: 20.0}),
    ("KL jump", {KL: [0.1] * 10 + [2.1], LENGTH: 20.0}, {KL: [0.1] * 10 + [2.0], LENGTH: 20.0}),
    (
        "entropy",
        {"objective/entropy": [1, 2, 3, 0.39, 0.39, 0.39]},
        {"objective/entropy": [1, 2, 3, 0.39, 0.41, 0.39]},
    ),
    ("length", {LENGTH: [10, 10, 10, 21, 21, 21]}, {LENGTH: [10, 10, 10, 21, 20, 21]}),
    ("length", {LENGTH: [10, 10, 10, 4, 4, 4]}, {LENGTH: [10, 10, 10, 4, 5, 4]}),
    ("EOS", {"completions/eos_rate": [0.9, 0.9, 0.9, 0.4, 0.4, 0.4]}, {"completions/eos_rate": [0.9] * 3 + [0.5] * 3}),
    ("EOS", {"completions/eos_rate": [0.1] * 3 + [0.21] * 3}, {"completions/eos_rate": [0.04] * 3 + [0.1] * 3}),
    ("value model", {"value/explained_variance": [-0.1] * 20}, {"value/explained_variance": [-0.1] * 19 + [0.01]}),
    ("value model", {"value/explained_variance": [0.5] + [-0.1] * 20}, {"value/explained_variance": [-0.1] * 19}),
    ("clipping", {"policy/clipfrac": [0.0, 0.61] * 10}, {"policy/clipfrac": [0.0, 0.59] * 10}),
    ("no movement", {KL: [0.0] * 20}, {KL: [0.0] * 19 + [1e-6]}),
    ("pretraining gradient", {PTX: [51.0] * 10, POLICY: 1.0}, {PTX: [51.0] * 9 + [50.0], POLICY: 1.0}),
    ("pretraining gradient", {PTX: [1.0] * 10, POLICY: 51.0}, {PTX: [1.0] * 9, POLICY: 51.0}),
    ("scores alike", {STD: [0.0] * 5, SCORES: 3.0}, {STD: [0.0] * 4 + [0.01], SCORES: 3.0}),
    ("loss", {"loss": [1.0] * 10 + [2.1] * 10}, {"loss": [1.0] * 10 + [2.1] * 9}),
    ("loss", {"loss": [1.0, 7.1, 7.1, 7.1]}, {"loss": [1.0, 7.1, 7.1, 6.9]}),
    ("loss", {"loss": [0.01] * 10 + [0.12] * 10}, {"loss": [0.01] * 10 + [0.1] * 10}),
    ("KL", {KL: [1, 2, 5.1], LENGTH: 1.0}, {KL: [1, 2, 5.0], LENGTH: 1.0}),
    (
        "overoptimisation",
        {SCORES: list(range(10)), "rewards/gold/mean": [1, 2, 3, 4, 5, 5, 4, 3, 2, 1]},
        {SCORES: [*range(7), 0, 0, 0], "rewards/gold/mean": [1, 2, 3, 4, 5, 5, 4, 3, 2, 1]},
    ),
    (
        "overoptimisation",
        {
            "eval_objective/scores": list(range(10)),
            "eval_win_rate": [0.5, 0.6, 0.7, 0.8, 0.8, 0.8, 0.7, 0.6, 0.5, 0.4],
        },
        {
            "eval_objective/scores": list(range(10)),
            "eval_gold_std": [0.5, 0.6, 0.7, 0.8, 0.8, 0.8, 0.7, 0.6, 0.5, 0.4],
        },
    ),
]


@pytest.mark.parametrize("name, trips, does_not", SERIES)
def test_thresholds_by_hand(name, trips, does_not):
    saw = next(alarm for alarm in (*alarms.PPO, *alarms.SFT) if alarm.name == name).saw
    for end in range(len(rows(**trips))):
        assert saw(rows(**trips)[:end]) is None  # on the last log and not before
    assert isinstance(saw(rows(**trips)), str)
    assert saw(rows(**does_not)) is None


@pytest.mark.parametrize("noise", [0.05, 0.1, 0.5])
def test_a_noisy_gold_figure_that_rises_is_no_alarm(noise):
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        golds = torch.linspace(0, 1, 60) + noise * torch.randn(60, generator=generator)
        logs = rows(**{"rewards/gold/mean": golds.tolist(), SCORES: torch.linspace(0, 5, 60).tolist()})
        assert all(alarms.overoptimised(logs[:end]) is None for end in range(60))


LOSSES = {
    "normal": lambda rng, n: np.abs(0.5 + 0.4 * rng.normal(size=n)),
    "rows of two kinds": lambda rng, n: np.where(rng.random(n) < 0.3, 3.5, 0.5) * np.linspace(1, 0.4, n),
    "a few hard rows": lambda rng, n: np.where(rng.random(n) < 0.05, 6.0, 0.5) + 0.05 * rng.normal(size=n),
    "falling": lambda rng, n: np.linspace(0.7, 0.2, n) * rng.gamma(2, 0.5, size=n),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_a_noisy_loss_is_no_alarm(kind):
    for seed in range(20):
        logs = rows(loss=LOSSES[kind](np.random.default_rng(seed), 200).tolist())
        assert all(alarms.loss_rose(logs[:end]) is None for end in range(200)), seed


def test_a_noisy_loss_that_diverges_is_one():
    for seed in range(20):
        losses = LOSSES["normal"](np.random.default_rng(seed), 200)
        losses[100:] += 3.0
        logs = rows(loss=losses.tolist())
        assert next(end for end in range(200) if alarms.loss_rose(logs[:end])) in range(101, 112)


def test_overoptimisation_of_each_evaluation_set_and_of_a_row_of_its_own():
    golds, scores = [0.5, 0.6, 0.7, 0.8, 0.8, 0.8, 0.7, 0.6, 0.5, 0.4], list(range(10))
    for names in (
        ("eval_a_rewards/gold/mean", "eval_a_objective/scores"),
        ("eval_win_rate", "eval_objective/scores"),
        ("win_rate", "eval_objective/scores"),
    ):
        apart = [
            {"step": step, name: value}
            for step, pair in enumerate(zip(golds, scores, strict=True))
            for name, value in zip(names, pair, strict=True)
        ]
        other = {"eval_b_objective/scores": 0.0}
        assert f"{names[1]} rose" in alarms.overoptimised([{**row, **other} for row in apart])


def test_nothing_is_seen_in_logs_without_numbers():
    for alarm in ALARMS.values():
        assert alarm.saw([]) is None
        for value in (None, "many", float("nan")):
            columns = (KL, LENGTH, SCORES, STD, PTX, POLICY, "loss", "eval_gold", "policy/clipfrac")
            assert alarm.saw([dict.fromkeys(columns, value)] * 30) is None


def test_the_readme_has_every_alarm():
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    for alarm in (*alarms.PPO, *alarms.SFT):
        row = rf"^\| {re.escape(alarm.name)} \| [^|]+ \| {re.escape(alarm.cause)} \| {re.escape(alarm.setting)} \|$"
        assert re.search(row, text, re.MULTILINE), alarm.name


# Runs that are built to go wrong


def given(trainer) -> dict[str, str]:
    (callback,) = [one for one in trainer.callback_handler.callbacks if isinstance(one, AlarmCallback)]
    return callback.given


PROMPTS = Dataset.from_list([{"prompt": f"prompt {i}{'.' * i}"} for i in range(16)])
TEXTS = Dataset.from_list([{"text": f"plain text number {i} of the corpus"} for i in range(64)])


def ppo(folders, path, reward, policy: str = "full", **settings) -> PPOTrainer:
    small = dict(max_steps=30, gradient_accumulation_steps=4, value_learning_rate=1e-3, beta=0.05, learning_rate=1e-3)
    model, peft_config = folders.policy(policy)
    texts = settings.pop("texts", None)
    rewards = reward if isinstance(reward, list) else [reward]
    return PPOTrainer(
        model=model,
        reward_funcs=rewards,
        args=config(path, **{**small, **settings}),
        train_dataset=PROMPTS,
        ptx_dataset=texts,
        peft_config=peft_config,
    )


def likes_a(completion_ids, **_) -> list[float]:
    """Every completion the better the more of its tokens are one and the same."""
    return [10.0 * sum(id == 64 for id in ids) / len(ids) for ids in completion_ids]


def likes_three(completion_ids, **_) -> list[float]:
    """Tokens, EOS among them: short, but not nothing."""
    return [-float(abs(len(ids) - 3)) for ids in completion_ids]


def gold(completion_ids, **_) -> list[float]:
    """What the policy is not trained on: the opposite."""
    return [-score for score in likes_a(completion_ids)]


def constant(completions, **_) -> list[float]:
    return [1.0 for _ in completions]


def noise(completions, **_) -> list[float]:
    return torch.randn(len(completions)).tolist()


HARD = dict(learning_rate=0.05, beta=0.0001)
RUNS = {
    "KL": (likes_a, HARD),
    "KL jump": (likes_a, dict(learning_rate=1e-5, beta=0.0001)),
    "entropy": (likes_a, HARD),
    "length": (likes_three, dict(learning_rate=0.02, beta=0.0001, max_completion_length=16, max_steps=60)),
    "EOS": (likes_three, dict(learning_rate=0.02, beta=0.0001, max_completion_length=16)),
    "value model": (noise, dict(value_learning_rate=0.0, learning_rate=0.0)),
    "clipping": (noise, dict(learning_rate=0.02, num_iterations=8)),
    "no movement": (likes_a, dict(learning_rate=0.0)),
    "overoptimisation": ([likes_a, gold], dict(reward_weights=[1.0, 0.0], **HARD)),
    "pretraining gradient": (likes_a, dict(ptx_coef=1e5, texts=TEXTS, ptx_ratio=1)),
    "scores alike": (constant, {}),
}


class Jump(TrainerCallback):
    """A learning rate that is suddenly a hundred thousand times as high."""

    def on_step_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        if state.global_step == 20:
            lr_scheduler.base_lrs = [1.0 for _ in lr_scheduler.base_lrs]


@pytest.mark.parametrize("name", RUNS)
def test_each_is_given_on_a_run_that_is_built_to_trip_it(folders, tmp_path, caplog, name):
    reward, settings = RUNS[name]
    trainer = ppo(folders, tmp_path, reward, **settings)
    if name == "KL jump":
        trainer.add_callback(Jump())
    if name == "value model":
        torch.nn.init.normal_(trainer.roles.value.head.weight)
    trainer.train()
    assert name in given(trainer), given(trainer)
    said = [record.message for record in caplog.records if record.message.startswith("ALARM")]
    assert len(said) == len(given(trainer)) == len(set(said))  # once
    assert any(f", {name}: " in line and ". Likely " in line and "; try " in line for line in said)


def test_a_run_that_learns_gives_none(folders, tmp_path):
    settings = dict(learning_rate=3e-4, value_learning_rate=3e-3, beta=0.2, max_steps=40, texts=TEXTS, ptx_coef=1.0)
    trainer = ppo(folders, tmp_path, likes_a, ptx_ratio=1, steps_per_generation=16, num_iterations=1, **settings)
    trainer.train()
    scores = [row[SCORES] for row in trainer.state.log_history if SCORES in row]
    assert sum(scores[-3:]) > sum(scores[:3]) and given(trainer) == {}


def test_the_level_stop_ends_the_run_with_a_checkpoint(folders, tmp_path):
    settings = dict(alarms="stop", save_strategy="steps", save_steps=100)
    trainer = ppo(folders, tmp_path, constant, **settings)
    trainer.train()
    step = trainer.state.global_step
    assert "scores alike" in given(trainer) and step < 30
    assert (tmp_path / f"checkpoint-{step}").is_dir()
    again = ppo(folders, tmp_path, likes_a, **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step > step + 5  # what was seen before is not seen again


def test_the_level_none_looks_at_nothing(folders, tmp_path, caplog):
    trainer = ppo(folders, tmp_path, constant, alarms="none")
    trainer.train()
    assert given(trainer) == {} and "ALARM" not in caplog.text
    with pytest.raises(InputError, match="alarms='loud': expected 'none', 'warn', 'stop'"):
        config(tmp_path, alarms="loud")


DEMONSTRATIONS = Dataset.from_list([{"prompt": f"say {i}: ", "completion": f"{i} {i}"} for i in range(8)])
RANKINGS = Dataset.from_list([{"prompt": f"{i}: ", "completions": ["a", "bb"], "ranks": [1, 2]} for i in range(8)])
SMALL = dict(report_to="none", disable_tqdm=True, logging_steps=1, save_strategy="no", gradient_checkpointing=False)


def sft(path, **settings) -> SFTTrainer:
    args = SFTConfig(str(path), residual_dropout=0.0, per_device_train_batch_size=4, **{**SMALL, **settings})
    return SFTTrainer(make_llama(), args, train_dataset=DEMONSTRATIONS, processing_class=make_tokenizer())


def reward(base_dir, path, **settings) -> RewardTrainer:
    args = RewardConfig(str(path), per_device_train_batch_size=4, **{**SMALL, **settings})
    return RewardTrainer(base_dir, args, train_dataset=RANKINGS)


def test_an_sft_loss_that_diverges(tmp_path):
    for jump in (False, True):
        trainer = sft(tmp_path, learning_rate=0.01, max_steps=40, lr_scheduler_type="constant_with_warmup")
        if jump:
            trainer.add_callback(Jump())
        trainer.train()
        assert set(given(trainer)) == ({"loss"} if jump else set())


def test_a_reward_model_that_says_the_same_of_everything(base_dir, tmp_path):
    trainer = reward(base_dir, tmp_path, learning_rate=0.0, max_steps=8)
    trainer.train()
    assert given(trainer) == {}
    with torch.no_grad():
        trainer.model.score.weight.zero_()
    trainer.train()
    assert set(given(trainer)) == {"scores alike"}


@pytest.mark.parametrize("kill", [2, 4])
def test_a_resumed_run_is_stopped_where_it_would_have_been(folders, tmp_path, kill):
    settings = dict(alarms="stop", save_strategy="steps", save_steps=1)
    straight = ppo(folders, tmp_path, constant, **settings)
    straight.train()
    again = ppo(folders, tmp_path, constant, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{kill}"))
    assert 5 == straight.state.global_step == again.state.global_step
    # Behind the stop, what is known is not told again
    on = ppo(folders, tmp_path, constant, **settings, max_steps=8)
    on.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert on.state.global_step == 8


# NaN and infinity


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_stops_sft_and_keeps_what_is_good(tmp_path, where):
    trainer = sft(tmp_path, learning_rate=1e-3, max_steps=8, save_strategy="steps", save_steps=2)
    calls = iter(range(100))
    if where == "gradient":
        weight = trainer.model.model.layers[0].mlp.down_proj.weight
        weight.register_hook(lambda grad: grad * float("nan") if next(calls) == 3 else grad)
        what = "the gradient of model.layers.0.mlp.down_proj.weight is NaN"
    else:
        loss = trainer.compute_loss
        trainer.compute_loss = lambda *args, **kwargs: loss(*args, **kwargs) * (torch.nan if next(calls) == 3 else 1)
        what = "the loss of micro-batch 0 is NaN or infinite"
    message = f"step 3: {what}.* the weights before this step are in .*checkpoint-3"
    with pytest.raises(NotFinite, match=message):
        trainer.train()
    assert flaw(tmp_path / "checkpoint-3") is None
    again = sft(tmp_path, learning_rate=1e-3, max_steps=8, save_strategy="steps", save_steps=2)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 8 and torch.isfinite(again.model.lm_head.weight).all()
    assert (tmp_path / "checkpoint-3").is_dir()


def test_nan_in_ppo_names_the_tensor_and_keeps_what_is_good(folders, tmp_path):
    trainer = ppo(folders, tmp_path, likes_a, max_steps=6, save_strategy="steps", save_steps=4)
    calls = iter(range(1000))
    name, hit = next((n, p) for n, p in trainer._policy_parameters.items() if "layers.1.mlp.up_proj" in n)
    hit.register_hook(lambda grad: grad * float("inf") if next(calls) == 8 else grad)
    with pytest.raises(NotFinite, match=f"step 2: the policy's gradient of {name} is NaN or infinite.*checkpoint-2"):
        trainer.train()
    assert (tmp_path / "checkpoint-2" / "checkpoint.json").is_file()


def test_weights_that_are_no_numbers_are_not_kept(tmp_path):
    trainer = sft(tmp_path, learning_rate=1e-3, max_steps=8, save_strategy="steps", save_steps=2)

    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                with torch.no_grad():
                    trainer.model.lm_head.weight[0] = float("nan")

    trainer.add_callback(Spoil())
    with pytest.raises(NotFinite, match="is not finite either, so nothing was saved; the last checkpoint is .*-2"):
        trainer.train()
    assert not (tmp_path / "checkpoint-3").exists()
