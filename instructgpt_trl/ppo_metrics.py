"""What PPO logs of a rollout, as functions of its tensors. Shapes: B completions, T tokens of the longest."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .data.episodes import Episodes


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


def spread(scores: list[float]) -> float | None:
    """Population standard deviation of those that are not NaN; `None` without any."""
    found = torch.tensor(scores)
    found = found[~found.isnan()]
    return found.std(correction=0).item() if len(found) else None


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
