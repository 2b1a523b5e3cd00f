"""Moving average of the policy weights [P C.4]."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class EMA:
    """
    Exponential moving average of some parameters: `average = decay * average + (1 - decay) * parameter`.

    Holds a copy of the given parameters only, so with LoRA it costs one adapter. (torch's `AveragedModel` would copy
    the whole model.)

    Args:
        parameters (`Mapping[str, nn.Parameter]`): what is averaged, by name. The average starts at their values.
        decay (`float`): share of the old average that each `update` keeps; the paper's is 0.992.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float):
        self.parameters = dict(parameters)
        self.averages = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the parameters as they are now: once an optimizer step."""
        self._average(list(self.averages.values()), [p.detach() for p in self.parameters.values()], None)

    @torch.no_grad()
    def copy_from_parameters(self) -> None:
        """Set the average to the parameters as they are now (after a checkpoint was loaded into them)."""
        for name, parameter in self.parameters.items():
            self.averages[name].copy_(parameter)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the parameters hold the average; afterwards their own values again."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            own = parameter.detach().clone()
            parameter.copy_(self.averages[name])
            self.averages[name].copy_(own)
