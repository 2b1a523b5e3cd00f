"""
Four roles on one base: policy, reference, reward model and value model.

A role is a network, the adapter that makes it this role, and for the scalar ones a head. With LoRA on a common base
all four are adapters of one network, whose weights exist once; without, each role has a network of its own. Whoever
uses a role does so inside `with role.active()`, forward and backward in one context: PEFT switches adapters in place,
and gradient checkpointing recomputes under whichever adapter is active then.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, logging

from .._trl import disable_dropout_in_model, lm_head_tiles
from ..data import InputError
from ..data.episodes import (
    Episodes,
    attention_mask,
    before_tokens,
    completion_labels,
    last_token,
    padding,
    take_rows,
)
from .folders import check_weights
from .lora import without_casts

logger = logging.get_logger(__name__)

Network = PreTrainedModel | PeftModel


@dataclass
class Role:
    """
    Args:
        network (`PreTrainedModel` or `PeftModel`): what is run.
        adapter (`str`, *optional*): the adapter that is on; `None` on a `PeftModel` means all adapters off.
        head (`nn.Linear`, *optional*): float32, H to 1, of a scalar role. A reward model's bias is the head's bias.
        autocast: what mixed precision runs in, `Accelerator.autocast`.
        kept (*optional*): the episodes of a pass and what it gave, with its graph, for [`take_kept`].

    Methods take episodes (see `data/episodes.py`) and are called inside `active()`. Shapes: b episodes of a
    micro-batch, t completion tokens, L prompt and completion tokens.
    """

    network: Network
    adapter: str | None = None
    head: nn.Linear | None = None
    autocast: Callable[[], AbstractContextManager] = nullcontext
    kept: tuple[Episodes, tuple[torch.Tensor, ...]] | None = None

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model inside, with whatever adapters are on."""
        return self.network.get_base_model() if isinstance(self.network, PeftModel) else self.network

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the network is this role. Which parameters require gradients does not change, inside or after."""
        if not isinstance(self.network, PeftModel):
            yield
            return
        if self.adapter is not None and self.network.active_adapter == self.adapter:
            with without_casts(self.network):  # without a switch, which takes a tenth of a second
                yield
            return
        # PEFT's switches set and clear `requires_grad` as a side effect
        flags = [(p, p.requires_grad) for p in self.network.parameters()]
        before = self.network.active_adapter
        try:
            if self.adapter is None:
                with self.network.disable_adapter():
                    _restore(flags)
                    yield
            else:
                self.network.set_adapter(self.adapter)
                _restore(flags)
                try:
                    with without_casts(self.network):
                        yield
                finally:
                    self.network.set_adapter(before)
        finally:
            _restore(flags)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The role's own parameters by name: its adapter, or all of a full network, and its head."""
        own = dict(self.network.named_parameters())
        if isinstance(self.network, PeftModel):
            own = {} if self.adapter is None else adapter_parameters(self.network, self.adapter)
        if self.head is not None:
            own |= {f"head.{name}": parameter for name, parameter in self.head.named_parameters()}
        return own

    def train(self, mode: bool = True) -> None:
        """Train or freeze the role's own parameters. An adapter is float32: bfloat16 loses steps of 9e-6."""
        for parameter in self.parameters().values():
            parameter.requires_grad_(mode)
            if isinstance(self.network, PeftModel) and parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()

    def logprobs(self, batch: Episodes, model: PreTrainedModel | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """
        (b, t) log-probs of the completion's tokens, and (b, t) entropies of the distributions they come from, in nats.
        They come from TRL's fused head, which holds one chunk of logits at a time and here sees the positions before
        the completion's tokens only: without a GPU it would work on those of the prompt too.
        """
        model = model or self.model
        before, length = before_tokens(batch), batch["input_ids"].size(1)
        rows = length * torch.arange(len(before), device=before.device)[:, None]

        def read_by_head(backbone: nn.Module, args: tuple, out: ModelOutput) -> ModelOutput:
            hidden = out.last_hidden_state.flatten(0, 1).index_select(0, (rows + before).flatten())
            out.last_hidden_state = hidden.view(*before.shape, -1)  # a `gather` takes twice as long, both ways
            return out

        with self.autocast(), lm_head_tiles(batch["input_ids"].device):
            with model.base_model.register_forward_hook(read_by_head):
                out = model(
                    input_ids=batch["input_ids"],
                    attention_mask=attention_mask(batch),
                    shift_labels=completion_labels(batch),
                    fused_lm_head=True,
                )
        return out.log_probs, torch.zeros_like(out.log_probs) if out.entropy is None else out.entropy

    def values(self, batch: Episodes) -> tuple[torch.Tensor]:
        """(b, t): the value before each completion token, 0 on padding."""
        return (self._scalars(batch).gather(1, before_tokens(batch)).masked_fill(padding(batch), 0.0),)

    def scores(self, batch: Episodes) -> tuple[torch.Tensor]:
        """(b, 1): the scalar at the last real token, wherever the padding is."""
        return (self._scalars(batch).gather(1, last_token(batch)[:, None]),)

    def _scalars(self, batch: Episodes) -> torch.Tensor:
        """(b, L): the head's output at every position, in float32 whatever the network computes in."""
        with self.autocast():
            hidden = self.model.base_model(
                input_ids=batch["input_ids"], attention_mask=attention_mask(batch), use_cache=False
            ).last_hidden_state
        return F.linear(hidden.float(), self.head.weight, self.head.bias).squeeze(-1)

    def evaluate(
        self, method: Callable, episodes: Episodes, chunks: Sequence[torch.Tensor], keep: bool = False
    ) -> list[torch.Tensor]:
        """
        Apply one of the methods above to all episodes without gradients, the rows of a chunk at a time: (B, t) each,
        in the order of the episodes. `keep` keeps the graph of the first chunk, which is to be trained on next.
        """
        self.kept, outputs = None, []
        with self.active():
            for chunk in chunks:
                batch = take_rows(episodes, chunk)
                with torch.set_grad_enabled(keep and not outputs):
                    output = method(batch)
                if output[0].requires_grad:
                    self.kept = batch, output
                outputs.append([tensor.detach() for tensor in output])
        back = torch.cat(list(chunks)).argsort()
        # Micro-batches are padded only as far as they need
        return [
            torch.cat([F.pad(tensor, (0, max(t.size(1) for t in column) - tensor.size(1))) for tensor in column])[back]
            for column in zip(*outputs, strict=True)
        ]

    def take_kept(self, batch: Episodes) -> tuple[torch.Tensor, ...] | None:
        """What a pass over these episodes gave, if [`evaluate`] kept it; from here on nothing is kept."""
        kept, self.kept = self.kept, None
        if kept is None or not all(torch.equal(tensor, batch[name]) for name, tensor in kept[0].items()):
            return None
        return kept[1]


@dataclass
class Roles:
    """Who is who in a PPO run. `rewards` may be empty (plain reward functions); `reference` is absent at `beta=0`."""

    policy: Role
    reference: Role | None
    rewards: list[Role]
    value: Role

    def __iter__(self) -> Iterator[Role]:
        yield from (role for role in (self.policy, self.reference, *self.rewards, self.value) if role is not None)


def adapter_parameters(network: PeftModel, adapter: str) -> dict[str, nn.Parameter]:
    """
    An adapter's parameters by name. PEFT keeps adapters in dictionaries by their names, whatever their kind; the name
    alone does not tell, since a base may have a module called `value`.
    """
    own = tuple(
        f"{name}.{adapter}."
        for name, module in network.named_modules()
        if isinstance(module, nn.ModuleDict | nn.ParameterDict) and adapter in module
    )
    return {name: parameter for name, parameter in network.named_parameters() if f"{name}.".startswith(own)}


def load_adapter_weights(network: PeftModel, name: str, state: dict[str, torch.Tensor]) -> None:
    """Set the weights of the adapter `name`. Raises [`InputError`] unless every weight finds its place."""
    result = set_peft_model_state_dict(network, state, adapter_name=name)
    own = adapter_parameters(network, name)
    keys = [*(key for key in result.missing_keys if key in own), *result.unexpected_keys]
    if keys:
        raise InputError(f"adapter '{name}' does not fit the base: {len(keys)} weights differ, first {keys[0]}")


def _restore(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


def disable_dropout(network: nn.Module) -> None:
    """
    Switch off all dropout of a network, whatever mode it is in: old and new log-probs must come from one function.
    TRL's own does so for modules; Llama's attention, and layerdrop, read their probability from a number.
    """
    disable_dropout_in_model(network)
    for module in network.modules():
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def save_parameters(parameters: dict[str, nn.Parameter], path: str) -> None:
    """Write a role's own parameters, by name, as safetensors."""
    save_file({name: p.detach().contiguous().clone() for name, p in parameters.items()}, path)


@torch.no_grad()
def load_parameters(parameters: dict[str, nn.Parameter], path: str) -> None:
    """Read what `save_parameters` wrote into the parameters, which must be the same by name."""
    check_weights(path)
    saved = load_file(path)
    if {name: tensor.shape for name, tensor in saved.items()} != {name: p.shape for name, p in parameters.items()}:
        raise InputError(f"{path}: its weights are those of another model; resume with the settings of that run")
    for name, parameter in parameters.items():
        parameter.copy_(saved[name])
