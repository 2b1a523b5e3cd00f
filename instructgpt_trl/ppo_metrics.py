"""
What PPO logs of a rollout: functions of its tensors, and the part of the trainer that brings them to its logs.

Shapes: B completions, T tokens of the longest, F reward functions.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from .data.episodes import Episodes
from .models.rewards import ModelReward
from .processes import of_all

_OF_LENGTHS = ("mean", "min", "max")


def per_completion(
    episodes: Episodes, entropies: Tensor, kl: Tensor, scores: Tensor, kl_coef: float
) -> dict[str, Tensor]:
    """
    Metrics that are means over completions: (B,) each.

    Args:
        episodes: their `mask`, `ended` and `completion_lengths`.
        entropies (B, T): of the sampling distribution, nats.
        kl (B,): summed over a completion, nats; NaN where no token counts.
        scores (B,): NaN where there is none.
    """
    mask = episodes["mask"]
    return {
        "objective/kl": kl,
        "objective/scores": scores,
        "objective/rlhf_reward": scores - kl_coef * kl,
        "objective/entropy": torch.where(mask, entropies, 0.0).sum(1) / mask.sum(1),
        "completions/eos_rate": episodes["ended"].float(),
        "completions/mean_length": episodes["completion_lengths"].float(),
    }


def lengths_of(lengths: tuple[float, ...], ended: tuple[float, ...]) -> dict[str, float]:
    """TRL's metrics of the lengths of a batch's completions, all of them and those that ended with EOS."""
    ends = [length for length, end in zip(lengths, ended, strict=True) if end] or [0.0]
    return {
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": 1 - sum(ended) / len(ended),
        "completions/mean_terminated_length": sum(ends) / len(ends),
        "completions/min_terminated_length": min(ends),
        "completions/max_terminated_length": max(ends),
    }


def spread(scores: list[float]) -> float | None:
    """Population standard deviation of those that are not NaN; `None` of fewer than two, which says nothing."""
    found = torch.tensor(scores)
    found = found[~found.isnan()]
    return found.std(correction=0).item() if len(found) > 1 else None


def explained_variance(returns: Tensor, values: Tensor) -> float | None:
    """1 - Var(returns - values) / Var(returns) over tokens, (N,) each; `None` where all returns are the same."""
    if not len(returns) or returns.var(correction=0) == 0:
        return None
    return (1 - (returns - values).var(correction=0) / returns.var(correction=0)).item()


def completion_rows(
    where: dict[str, Any],
    rows: list[dict[str, Any]],
    scores: Tensor,
    kl: Tensor | None,
    parts: dict[str, Tensor],
) -> Iterator[dict[str, Any]]:
    """
    Lines of completions.jsonl.

    Args:
        where: what all of them begin with, as the step.
        rows: `prompt` and `completion` of each.
        scores, kl (B,): NaN is written as null; no `kl` without a reference.
        parts: of each reward function, (B,).
    """
    for i, row in enumerate(rows):
        yield {
            **where,
            "prompt": row["prompt"],
            "completion": row["completion"],
            "score": _number(scores[i]),
            "kl": None if kl is None else _number(kl[i]),
            "scores": {name: _number(column[i]) for name, column in parts.items()},
        }


def _number(x: Tensor) -> float | None:
    return None if x.isnan() else x.item()


class RolloutLog:
    """The part of [`PPOTrainer`] that logs rollouts, of all processes together. Overrides: `log`."""

    EVALUATION = ("objective/kl", "objective/scores", "objective/scores_std", "objective/rlhf_reward")
    EVALUATION += ("objective/entropy", "objective/kl_coef", "value/explained_variance", "num_tokens")
    EVALUATION += ("completions/eos_rate", "completions/clipped_ratio")
    EVALUATION += tuple(f"completions/{of}_{kind}" for kind in ("length", "terminated_length") for of in _OF_LENGTHS)

    def _metrics_of_evaluation(self) -> tuple[str, ...] | None:
        known = super()._metrics_of_evaluation()
        if known is None or not all(isinstance(function, ModelReward) for function in self.reward_funcs):
            return None  # they may have a `log_metric`
        return (*(f"rewards/{name}/mean" for name in self.reward_func_names), *known)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the parent's, but several evaluation sets have names of their own: `eval_<set>_objective/scores`."""
        self._log_spread("train" if self.model.training else "eval")
        if self._evaluated and not self.model.training:
            renamed = {f"{self._evaluated}_{name}": rows for name, rows in self._metrics["eval"].items()}
            self._metrics["eval"] = defaultdict(list, renamed)
        super().log(logs, start_time)

    def _log_rollout(self, episodes, rows, entropies, kl, scores, parts, values, returns, advantages) -> None:
        mode = "train" if self.model.training else "eval"
        metrics, mask = self._metrics[mode], episodes["mask"]
        of_functions = dict(zip(self.reward_func_names, parts.T, strict=True))
        metrics["completions/mean_length"].pop()  # the parent's, a mean of the batch, which may be the small last one
        per_row = per_completion(episodes, entropies, kl, scores, self.kl_coef)
        if self.roles.reference is None:
            kl = None
            del per_row["objective/kl"]
        where = {"step": self.state.global_step}
        if mode == "eval" and self._evaluated:
            where["dataset"] = self._evaluated
        columns = per_row | {f"rewards/{name}/mean": x for name, x in of_functions.items()}
        columns = zip(*(column.tolist() for column in (*columns.values(), advantages.sum(1))), strict=True)
        lines = completion_rows(where, rows, scores, kl, of_functions)
        tokens = [torch.stack([r[m], v[m]]).cpu() for r, v, m in zip(returns, values, mask, strict=True)]
        own = list(zip(columns, lines, tokens, strict=True))
        columns, lines, tokens = zip(*of_all(self.accelerator, own, self.model.training), strict=True)
        *columns, summed = zip(*columns, strict=True)
        names = [*per_row, *(f"rewards/{name}/mean" for name in of_functions)]
        for name, column in zip(names, columns, strict=True):
            metrics[name].extend(column)  # the parent's mean over entries is the mean over completions
        if mode == "eval":  # the parent's have the rows of the last batch twice that fill it up
            of = dict(zip(names, columns, strict=True))
            for name, value in lengths_of(of["completions/mean_length"], of["completions/eos_rate"]).items():
                metrics[name][-1] = value
        metrics["objective/kl_coef"].append(self.kl_coef)
        self._tokens[mode].extend(tokens)
        for name in sorted(set(gather_object(list(self._pending_metrics)))):  # what functions gave to `log_metric`
            metrics[name].extend(gather_object(list(self._pending_metrics.get(name, []))))
        self._pending_metrics.clear()
        self._logs["prompt"].extend(line["prompt"] for line in lines)
        self._logs["completion"].extend(line["completion"] for line in lines)
        self._logs["advantages"].extend(summed)
        for name, column in zip(of_functions, columns[len(per_row) :], strict=True):
            self._logs["rewards"][name].extend(column)
        for name in sorted(set(gather_object(list(self._pending_extra_logs)))):  # and to `log_extra`
            column = self._pending_extra_logs.get(name, [None] * len(rows))
            self._logs["extra"][name].extend(gather_object(list(column)))
        self._pending_extra_logs.clear()
        if self.args.save_completions and self.is_world_process_zero():
            self._files[mode].append(lines)

    def _log_spread(self, mode: str) -> None:
        """What is not a mean: these two are of all completions since the last log, not means over batches."""
        metrics = self._metrics[mode]
        found = {"objective/scores_std": spread(metrics.get("objective/scores", []))}
        if self._tokens[mode]:
            found["value/explained_variance"] = explained_variance(*torch.cat(self._tokens[mode], dim=1))
            self._tokens[mode].clear()
        metrics.update({name: [value] for name, value in found.items() if value is not None})
