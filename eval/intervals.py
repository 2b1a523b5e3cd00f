"""95 % intervals by bootstrap, with scipy's."""

from collections.abc import Callable, Hashable, Sequence

import numpy as np
from scipy.stats import bootstrap

RESAMPLES = 2000


def interval(
    values: Sequence[float], groups: Sequence[Hashable] | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """
    95 % percentile interval of a mean, by drawing anew, with replacement, what the values belong to.

    Args:
        values (`Sequence[float]`): n numbers, for example 1, 0.5 and 0 of a prompt that was won, tied and lost.
        groups (`Sequence[Hashable]`, *optional*): what each value belongs to: a prompt with several answers, or a
            labeler. Groups are drawn whole; the mean stays one over values. Without, each value is its own.

    Returns:
        `tuple[float, float]`: the bounds, in the unit of the values. Of one group or none both are NaN: one prompt or
        one labeler says nothing of how much others would differ.

    Raises:
        `ValueError`: `groups` has another length than `values`, or a value is not a finite number.

    Source: InstructGPT Figure 1 ("error bars are 95 % confidence intervals"); Efron and Tibshirani (1993), chapter 13.
    """
    values = np.asarray(values, dtype=float)
    if not np.isfinite(values).all():
        raise ValueError(f"values: {int((~np.isfinite(values)).sum())} of {len(values)} are not finite numbers")
    sums, counts = _by_group(values, groups)
    if len(sums) < 2:
        return float("nan"), float("nan")

    def mean(sums: np.ndarray, counts: np.ndarray, axis: int) -> np.ndarray:
        return sums.sum(axis) / counts.sum(axis)

    found = bootstrap(
        (sums, counts),
        mean,
        paired=True,
        n_resamples=resamples,
        method="percentile",
        vectorized=True,
        batch=200,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def _by_group(values: np.ndarray, groups: Sequence[Hashable] | None) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of each group's values, (groups,) each."""
    if groups is None:
        return values, np.ones_like(values)
    if len(groups) != len(values):
        raise ValueError(f"groups: {len(groups)}, and {len(values)} values; expected one for each")
    number = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    index = [number[group] for group in groups]
    return np.bincount(index, values), np.bincount(index).astype(float)


def bounds(low: float, high: float, form: str = ".3f") -> str:
    """An interval as text; nothing where there is none."""
    return "" if np.isnan([low, high]).any() else f"{low:{form}} to {high:{form}}"


def with_interval(values: Sequence[float], groups: Sequence[Hashable] | None = None) -> list[float]:
    """Mean of the values, and its [`interval`]: three numbers."""
    values = [float(value) for value in values]
    return [float(np.mean(values)), *interval(values, groups)]


def figure_with_interval(
    figure: Callable[[np.ndarray], float], n: int, resamples: int = RESAMPLES, seed: int = 0
) -> list[float]:
    """`figure(which)` of all `n` samples and its 95 % interval, for what is no mean: `which` (n,) are drawn anew."""
    everything = np.arange(n)
    if n < 2:
        return [float(figure(everything)), float("nan"), float("nan")]
    found = bootstrap(
        (everything,),
        figure,
        n_resamples=resamples,
        method="percentile",
        vectorized=False,
        batch=200,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return [float(figure(everything)), float(found.low), float(found.high)]
