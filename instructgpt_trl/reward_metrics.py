"""What a reward model logs of its prompts: what each adds, and the metrics of many."""

import torch
from torch import Tensor

from .functional import _untied_pairs

# What one prompt adds to the log, see `prompt_stats`. squares: sum over its completions of (score - its mean)^2
STATS = "completions tokens mean squares lowest highest pairs ordered margin ties shortened".split()


def prompt_stats(scores: Tensor, ranks: Tensor, group_sizes: list[int], tokens: Tensor, shortened: Tensor) -> Tensor:
    """(B, len(STATS)): each prompt's part in the metrics, so that sums over prompts are sums over everything."""
    sizes = torch.tensor(group_sizes, device=scores.device)
    prompt = torch.arange(len(sizes), device=scores.device).repeat_interleave(sizes)
    better, worse, group = _untied_pairs(ranks, group_sizes)
    zero = scores.new_zeros(len(sizes))

    def total(values: Tensor, index: Tensor = prompt) -> Tensor:
        return zero.index_add(0, index, values.to(zero.dtype))

    mean = total(scores) / sizes
    margin = scores[better] - scores[worse]
    pairs = torch.bincount(group, minlength=len(sizes))
    columns = {
        "completions": sizes,
        "tokens": tokens,
        "mean": mean,
        "squares": total((scores - mean[prompt]) ** 2),
        "lowest": zero.scatter_reduce(0, prompt, scores, "amin", include_self=False),
        "highest": zero.scatter_reduce(0, prompt, scores, "amax", include_self=False),
        "pairs": pairs,
        "ordered": total((margin > 0).float() + 0.5 * (margin == 0), group),
        "margin": total(margin, group),
        "ties": sizes * (sizes - 1) // 2 - pairs,
        "shortened": shortened > 0,
    }
    return torch.stack([columns[name].to(zero.dtype) for name in STATS], dim=1)


def metrics_of(stats: Tensor) -> dict[str, float]:
    """Metrics from the rows of `prompt_stats`, float64. Without a pair, those of pairs are left out."""
    of = dict(zip(STATS, stats.unbind(1), strict=True))
    completions, pairs = of["completions"].sum(), of["pairs"].sum()
    mean = (of["completions"] * of["mean"]).sum() / completions
    squares = (of["squares"] + of["completions"] * (of["mean"] - mean) ** 2).sum()
    metrics = {
        "min_reward": of["lowest"].min(),
        "mean_reward": mean,
        "max_reward": of["highest"].max(),
        "score_std": (squares / completions).sqrt(),
        "tied_pairs": of["ties"].sum(),
        "shortened_rows": of["shortened"].sum(),
    }
    if pairs > 0:
        compared = of["pairs"] > 0
        metrics["accuracy"] = of["ordered"].sum() / pairs
        metrics["prompt_accuracy"] = (of["ordered"][compared] / of["pairs"][compared]).mean()
        metrics["margin"] = of["margin"].sum() / pairs
    return {name: value.item() for name, value in metrics.items()}
