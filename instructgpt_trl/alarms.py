"""
Alarms: what goes wrong in a run without an error. Each looks at the metrics logged so far and, if it sees its symptom,
says what it saw, the likely cause and the setting to try, once.

Thresholds are ours: a healthy run of the demo or of SmolLM2 stays well away from them. Logs, not steps, are counted.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback
from transformers.utils import logging

logger = logging.get_logger(__name__)

FIRST, LAST = 3, 3  # logs that a start, and a change that is no chance, are measured over
KL_A_TOKEN, KL_LEAST = 1.0, 5.0  # nats: e times as likely as under the reference, token by token; a completion
JUMP, JUMP_LEAST = 5.0, 0.1  # times the highest of ten logs before, and nats a token
COLLAPSED = 0.2  # of the entropy at the start
EOS_LEAST = 0.1  # change of the share of completions that end
NEGATIVE = 20  # logs of a value model that is worse than a constant
CLIPPED, CLIPPED_LONG = 0.3, 20  # mean share of tokens, logs; the first step of a rollout clips nothing
STILL, STILL_LONG = 1e-7, 20  # nats a completion, logs
DROWNED, DROWNED_LONG = 50.0, 10  # times the other gradient, logs
ALIKE, ALIKE_LONG = 1e-4, 5  # of the scores' own size, logs
FELL, NOISES, KNOWN = 0.1, 6.0, 10  # of what the gold figure has moved over, of its noise; logs to know that by
DIVERGED, ROSE, WINDOW = 2.0, 0.1, 10  # times the lowest mean of so many logs, and nats above it
SWINGS = 12.0  # of such a mean's noise, of which it takes five from the lowest to the highest of a hundred
AT_ONCE, AT_ONCE_LEAST = 5.0, 2.0  # times the first loss, and nats above it

History = list[dict[str, Any]]  # of each log its metrics, the oldest first


@dataclass(frozen=True)
class Alarm:
    """
    Args:
        name (`str`): What the alarm is called.
        saw (`Callable`): From the logs so far, what is wrong in numbers, or none.
        cause (`str`): What it is most often.
        setting (`str`): What to try.
    """

    name: str
    saw: Callable[[History], str | None]
    cause: str
    setting: str


class AlarmCallback(TrainerCallback):
    """
    Looks at every log. Each alarm is given once a run, as a warning; at the level "stop" the run also ends behind that
    step, with a checkpoint.

    Args:
        alarms (`tuple[Alarm, ...]`): [`SFT`], [`REWARD`] or [`PPO`].
        level (`str`): "none", "warn" or "stop".
    """

    def __init__(self, alarms: tuple[Alarm, ...], level: str):
        self.alarms, self.level = alarms if level != "none" else (), level
        self.given: dict[str, str] = {}  # name and message
        self.begun = 0  # logs that are not looked at: a run that an alarm has ended can go on, with other settings

    def on_train_begin(self, args, state, control, **kwargs):
        self.given.clear()

    def on_log(self, args, state, control, **kwargs):
        for alarm in self.alarms:
            if alarm.name in self.given or not (saw := alarm.saw(state.log_history[self.begun :])):
                continue
            self.given[alarm.name] = f"{alarm.name}: {saw}. Likely {alarm.cause}; try {alarm.setting}"
            if state.is_world_process_zero:
                logger.warning(f"ALARM at step {state.global_step}, {self.given[alarm.name]}")
        if self.given and self.level == "stop" and not control.should_training_stop:
            control.should_training_stop = control.should_save = True
            self.begun = len(state.log_history)


def _values(history: History, name: str) -> list[float]:
    return [row[name] for row in history if _is_number(row.get(name))]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _each(history: History, *names: str) -> list[tuple[float, ...]]:
    """Of the logs that have all of them."""
    return [tuple(row[name] for name in names) for row in history if all(_is_number(row.get(name)) for name in names)]


def _by_step(history: History) -> History:
    """One row a step: what a callback logs has a row of its own."""
    rows: dict[Any, dict[str, Any]] = {}
    for number, row in enumerate(history):
        rows.setdefault(row.get("step", f"row {number}"), {}).update(row)
    return list(rows.values())


def _against_start(values: list[float], lower: float, upper: float) -> tuple[float, float] | None:
    """Start and last value, if the last few are all below `lower` or all above `upper` times the start."""
    if len(values) < FIRST + LAST:
        return None
    start, last = sum(values[:FIRST]) / FIRST, values[-LAST:]
    out = all(value < lower * start for value in last) or all(value > upper * start for value in last)
    return (start, last[-1]) if out else None


def kl_over_limit(history: History) -> str | None:
    for kl, length in _each(history, "objective/kl", "completions/mean_length")[-1:]:
        if kl > max(KL_A_TOKEN * length, KL_LEAST):
            return f"objective/kl is {kl:.1f} nats over {length:.1f} tokens, more than {KL_A_TOKEN} a token"
    return None


def kl_jump(history: History) -> str | None:
    found = _each(history, "objective/kl", "completions/mean_length")
    before = [kl for kl, _ in found[-11:-1]]
    if len(before) == 10 and found[-1][0] > max(JUMP * max(before), JUMP_LEAST * found[-1][1]):
        return f"objective/kl went from at most {max(before):.2f} in ten logs to {found[-1][0]:.2f} nats"
    return None


def entropy_collapse(history: History) -> str | None:
    found = _against_start(_values(history, "objective/entropy"), COLLAPSED, float("inf"))
    return found and f"objective/entropy went from {found[0]:.3f} to {found[1]:.3f} nats"


def length_changed(history: History) -> str | None:
    found = _against_start(_values(history, "completions/mean_length"), 0.5, 2.0)
    return found and f"completions/mean_length went from {found[0]:.1f} to {found[1]:.1f} tokens"


def eos_rate_changed(history: History) -> str | None:
    found = _against_start(_values(history, "completions/eos_rate"), 0.5, 2.0)
    if found is None or abs(found[1] - found[0]) < EOS_LEAST:
        return None
    return f"completions/eos_rate went from {found[0]:.0%} to {found[1]:.0%}"


def values_explain_nothing(history: History) -> str | None:
    last = _values(history, "value/explained_variance")[-NEGATIVE:]
    if len(last) == NEGATIVE and max(last) < 0:
        return f"value/explained_variance was below 0 in the last {NEGATIVE} logs, now {last[-1]:.2f}"
    return None


def clipping(history: History) -> str | None:
    last = _values(history, "policy/clipfrac")[-CLIPPED_LONG:]
    mean = sum(last) / max(len(last), 1)
    if len(last) == CLIPPED_LONG and mean >= CLIPPED:
        return f"policy/clipfrac was {mean:.0%} in the mean of the last {CLIPPED_LONG} logs"
    return None


def policy_still(history: History) -> str | None:
    last = _values(history, "objective/kl")[-STILL_LONG:]
    if len(last) == STILL_LONG and max(map(abs, last)) < STILL:
        return f"objective/kl was 0 in the last {STILL_LONG} logs: the policy is the reference"
    return None


def overoptimised(history: History) -> str | None:
    """
    The score rises while a figure that the policy is not trained on, by its name gold or a win rate, falls: means of a
    few logs, and by more than its noise. Of several evaluation sets each figure goes with the scores of its own.
    """
    history = _by_step(history)
    names = {name for row in history for name in row}
    all_scores = sorted(name for name in names if name.endswith("objective/scores"))
    for name in sorted(name for name in names if ("gold" in name or "win_rate" in name) and "std" not in name):
        of = {score: found for score in all_scores if len(found := _each(history, name, score)) >= KNOWN}
        own = [score for score in of if name.startswith(score.removesuffix("objective/scores"))]
        for score in [max(own, key=len)] if own else of:  # without any, it is what was logged at the same steps
            if said := _fell_while_it_rose(of[score]):
                return f"{score} rose from {said[0]} while {name} fell from {said[1]} (means of {LAST} logs)"
    return None


def _fell_while_it_rose(found: list[tuple[float, ...]]) -> tuple[str, str] | None:
    """Of gold figures and scores, from where to where the scores and the figures went; none if neither did."""
    golds, scores = (
        [sum(column[i : i + LAST]) / LAST for i in range(len(found) - LAST + 1)] for column in zip(*found, strict=True)
    )
    best = golds.index(max(golds))
    noise = _noise([gold for gold, _ in found])
    limit = golds[best] - max(NOISES * noise, FELL * (max(golds) - min(golds)))
    if golds[-1] < limit and scores[-1] > scores[best]:
        return f"{scores[best]:.2f} to {scores[-1]:.2f}", f"{golds[best]:.2f} to {golds[-1]:.2f}"
    return None


def gradient_drowned(history: History) -> str | None:
    last = _each(history, "grad_norm/ptx", "grad_norm/policy")[-DROWNED_LONG:]
    if len(last) < DROWNED_LONG:
        return None
    ptx, policy = last[-1]
    if all(a > DROWNED * b for a, b in last):
        return f"grad_norm/ptx is {ptx:.2g} and grad_norm/policy {policy:.2g}: pretraining alone is learned"
    if all(b > DROWNED * a for a, b in last):
        return f"grad_norm/policy is {policy:.2g} and grad_norm/ptx {ptx:.2g}: pretraining has no say"
    return None


def scores_alike(history: History) -> str | None:
    last = _each(history, "objective/scores_std", "objective/scores")[-ALIKE_LONG:]
    if len(last) == ALIKE_LONG and all(std <= ALIKE * max(1.0, abs(mean)) for std, mean in last):
        return f"objective/scores_std was 0 in the last {ALIKE_LONG} logs, at a mean of {last[-1][1]:.2f}"
    return None


def reward_model_alike(history: History) -> str | None:
    last = _each(history, "score_std", "mean_reward")[-ALIKE_LONG:]
    if len(last) == ALIKE_LONG and all(std <= ALIKE * max(1.0, abs(mean)) for std, mean in last):
        return f"score_std was 0 in the last {ALIKE_LONG} logs, at a mean of {last[-1][1]:.2f}"
    return None


def loss_rose(history: History) -> str | None:
    losses = _values(history, "loss")
    if LAST < len(losses) <= 2 * WINDOW and min(losses[-LAST:]) > AT_ONCE * losses[0] + AT_ONCE_LEAST:
        return f"the loss of {LAST} logs is {min(losses[-LAST:]):.2f} and more, and the first was {losses[0]:.2f}"
    means = [sum(losses[i : i + WINDOW]) / WINDOW for i in range(len(losses) - WINDOW + 1)]
    if not means:
        return None
    lowest = min(means)
    last = min(means[-1], statistics.median(losses[-WINDOW:]))  # and not a few rows that are hard
    noise = _noise(losses) / math.sqrt(WINDOW)
    if last > max(DIVERGED * lowest, lowest + ROSE, lowest + SWINGS * noise):
        return f"the mean loss of {WINDOW} logs went from {lowest:.2f} to {means[-1]:.2f}"
    return None


def _noise(values: list[float]) -> float:
    """Standard deviation of normal noise on any slow trend, which second differences leave out."""
    bends = [abs(a - 2 * b + c) for a, b, c in zip(values, values[1:], values[2:], strict=False)]
    return sum(bends) / len(bends) / 1.954  # sqrt(6) sqrt(2 / pi), by which a normal one has this mean


_DIVERGES = Alarm("loss", loss_rose, "a learning rate that is too high", "a tenth of learning_rate, or warm-up")
SFT = (_DIVERGES,)
REWARD = (
    _DIVERGES,
    Alarm(
        "scores alike",
        reward_model_alike,
        "a collapsed reward model: a learning rate that is too high, or completions that are all the same",
        "a tenth of learning_rate, and a look at the rankings",
    ),
)
PPO = (
    Alarm(
        "KL",
        kl_over_limit,
        "a policy that has left the reference for the reward model's mistakes",
        "a higher beta, a lower learning_rate, or an earlier checkpoint",
    ),
    Alarm("KL jump", kl_jump, "an update that was too large", "a lower learning_rate, or a lower max_grad_norm"),
    Alarm(
        "entropy",
        entropy_collapse,
        "a policy that says the same whatever it is asked",
        "a higher beta, a lower learning_rate, and a look at completions.jsonl",
    ),
    Alarm(
        "length",
        length_changed,
        "a reward model that likes long or short answers",
        "a look at the held-out accuracy of 'the longer one wins' (recipes/reward.py), or a higher beta",
    ),
    Alarm(
        "EOS",
        eos_rate_changed,
        "answers that are cut off, or that end at once",
        "missing_eos_score=-1, or another max_completion_length",
    ),
    Alarm(
        "value model",
        values_explain_nothing,
        "a value model that does not learn",
        "another value_learning_rate, or num_iterations above 1",
    ),
    Alarm(
        "clipping",
        clipping,
        "steps that are too large for the clip range",
        "a lower learning_rate, fewer num_iterations, or larger minibatches",
    ),
    Alarm("no movement", policy_still, "a learning rate of nothing, or frozen weights", "a higher learning_rate"),
    Alarm(
        "overoptimisation",
        overoptimised,
        "a policy that learns the reward model's mistakes",
        "the checkpoint where the figure was highest, a higher beta, or newer rankings (recipes/iterate.py)",
    ),
    Alarm(
        "pretraining gradient",
        gradient_drowned,
        "a factor that does not fit this model or these texts",
        "another ptx_coef",
    ),
    Alarm(
        "scores alike",
        scores_alike,
        "a reward that does not depend on the answer, or a reward model that has collapsed",
        "a look at the reward model's held-out accuracy, and at completions.jsonl",
    ),
)
