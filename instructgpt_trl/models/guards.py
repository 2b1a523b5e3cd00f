"""Stops for numbers that would spoil a model."""

import torch


def stop_unless_finite(tensor: torch.Tensor, what: str, step: int, hint: str) -> None:
    """
    Raise `RuntimeError` if `tensor` holds NaN or infinity, with the step and what to do. TRL and Trainer log a NaN
    loss as 0 and go on.

    Args:
        tensor (`torch.Tensor`): any shape.
        what (`str`): what it is, as in "the loss".
        step (`int`): optimizer steps done so far.
        hint (`str`): where to look first.
    """
    if not torch.isfinite(tensor).all():
        raise RuntimeError(
            f"step {step}: {what} is NaN or infinite, so the run stops: {hint}, lower learning_rate, or use float32"
        )
