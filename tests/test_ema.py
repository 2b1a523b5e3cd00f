"""The moving average against its formula by hand, and that it leaves the weights alone."""

import pytest
import torch
from torch import nn

from instructgpt_trl.models.ema import EMA


def parameters(**values: float) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.full((2, 3), value)) for name, value in values.items()}


def test_formula_by_hand():
    weights = parameters(a=1.0, b=-2.0)
    ema = EMA(weights, 0.9)
    assert all(torch.equal(ema.averages[name], weights[name]) for name in weights)
    for value in (2.0, 4.0):
        with torch.no_grad():
            weights["a"].fill_(value)
        ema.update()
    # 0.9 * 1 + 0.1 * 2 = 1.1;  0.9 * 1.1 + 0.1 * 4 = 1.39
    torch.testing.assert_close(ema.averages["a"], torch.full((2, 3), 1.39))
    torch.testing.assert_close(ema.averages["b"], torch.full((2, 3), -2.0))
    assert (weights["a"] == 4.0).all() and not ema.averages["a"].requires_grad


def test_hundred_updates_equal_the_closed_form():
    """Weights 1, 2, ..., n after a start at 0: average = sum of (1 - d) d^(n-k) k."""
    weights, d, n = parameters(a=0.0), 0.992, 100
    ema = EMA(weights, d)
    for k in range(1, n + 1):
        with torch.no_grad():
            weights["a"].fill_(k)
        ema.update()
    expected = sum((1 - d) * d ** (n - k) * k for k in range(1, n + 1))
    torch.testing.assert_close(ema.averages["a"], torch.full((2, 3), expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("fails", [False, True])
def test_applied_swaps_and_puts_back_bit_for_bit(fails):
    weights = {"a": nn.Parameter(torch.randn(5, generator=torch.Generator().manual_seed(0)))}
    ema = EMA(weights, 0.5)
    with torch.no_grad():
        weights["a"] += 0.1
    ema.update()
    own, average = weights["a"].detach().clone(), ema.averages["a"].clone()
    assert not torch.equal(own, average)
    try:
        with ema.applied():
            assert torch.equal(weights["a"], average)
            if fails:
                raise OSError("disk full")
    except OSError:
        assert fails
    assert torch.equal(weights["a"], own) and torch.equal(ema.averages["a"], average)


def test_copy_from_parameters():
    weights = parameters(a=1.0)
    ema = EMA(weights, 0.5)
    with torch.no_grad():
        weights["a"].fill_(7.0)
    ema.copy_from_parameters()
    assert (ema.averages["a"] == 7.0).all()
    with torch.no_grad():
        weights["a"].fill_(8.0)  # a copy, not the same memory
    assert (ema.averages["a"] == 7.0).all()
