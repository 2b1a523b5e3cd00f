"""Stops for numbers that would spoil a model."""

from collections.abc import Iterable

import torch
from torch import nn


class RunStopped(RuntimeError):
    """A run that cannot go on. The message is one line: the step, what was seen, what to do."""


class NotFinite(RunStopped):
    """A number that would spoil a model. No weight has moved by it."""


def stop_unless_finite(tensor: torch.Tensor, what: str, step: int, hint: str) -> None:
    """
    Raise [`NotFinite`] if `tensor` holds NaN or infinity, with the step and what to do. TRL and Trainer log a NaN
    loss as 0 and go on.

    Args:
        tensor (`torch.Tensor`): any shape.
        what (`str`): what it is, as in "the loss".
        step (`int`): optimizer steps done so far.
        hint (`str`): where to look first.
    """
    if not torch.isfinite(tensor).all():
        raise NotFinite(
            f"step {step}: {what} is NaN or infinite, so the run stops: {hint}, lower learning_rate, or use float32"
        )


def first_not_finite(named: Iterable[tuple[str, torch.Tensor | None]]) -> str | None:
    """Name of the first tensor with NaN or infinity in it, if there is one; of a byte an element none is looked at."""
    found = ((name, x) for name, x in named if x is not None and x.dtype.itemsize > 1)
    return next((name for name, x in found if not torch.isfinite(x).all()), None)


def stop_unless_gradients_finite(model: nn.Module, step: int, hint: str) -> None:
    """[`stop_unless_finite`] of all gradients, with the first that is to blame; before clipping, which spreads NaN."""
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    if not norm.isfinite():
        name = first_not_finite((name, parameter.grad) for name, parameter in model.named_parameters())
        stop_unless_finite(norm, f"the gradient of {name or 'all together'}", step, hint)
