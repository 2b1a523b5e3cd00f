"""
Four roles on one base: policy, reference, reward model and value model.

A role is a network, the adapter that makes it this role, and for the scalar ones a head. With LoRA on a common base
all four are adapters of one network, whose weights exist once; without, each role has a network of its own. Whoever
uses a role does so inside `with role.active()`, forward and backward in one context: PEFT switches adapters in place,
and gradient checkpointing recomputes under whichever adapter is active then.
"""

import copy
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, logging

from .._trl import add_fused_lm_head, disable_dropout_in_model, get_config_model_id, lm_head_tiles
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
from .folders import check_weights, loading
from .loading import holds_weights_of, keep_gradients, same_base
from .lora import fuse_lora, without_casts
from .reward_parts import RewardParts

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


def build_roles(
    policy: Network,
    rewards: list[RewardParts],
    peft_config: PeftConfig | None = None,
    temperature: float = 1.0,
    with_reference: bool = True,
    **kwargs,
) -> Roles:
    """
    Put the four roles together around a policy that is ready to train.

    Reward adapters trained on the policy's base go onto that base; any other reward model brings its own network. The
    value model starts as a copy of the first reward model, head and bias included; without a reward model as a copy
    of the policy with a head of zeros.

    Args:
        policy (`PreTrainedModel` or `PeftModel`): the policy; a `PeftModel` has the adapter `default`, and `ref` if
            it continues an SFT adapter.
        rewards (`list[RewardParts]`): reward models, as read by `reward_parts`.
        peft_config (`PeftConfig`, *optional*): shape of the value adapter where the reward model has none.
        temperature (`float`): sampling temperature, for the reference's log-probs.
        with_reference (`bool`): whether there is a KL penalty.
        kwargs: passed to `from_pretrained` of a reward model's own base.
    """
    peft = isinstance(policy, PeftModel)
    policy_role = Role(policy, "default" if peft else None)
    reference = _reference(policy, temperature) if with_reference else None
    reward_roles = [_reward(policy, parts, index, kwargs) for index, parts in enumerate(rewards)]
    if reward_roles:
        value = _value_from_reward(reward_roles[0], peft_config or (policy.peft_config["default"] if peft else None))
    else:
        value = _value_from_policy(policy)
    roles = Roles(policy_role, reference, reward_roles, value)
    for role in roles:
        keep_gradients(role.network)
        fuse_lora(role.network)
        role.train(role is policy_role or role is value)
    if peft:
        policy.set_adapter("default")
        value.train()
    return roles


def _reference(policy: Network, temperature: float) -> Role:
    """The policy as it is now, frozen: a copy of its adapter, or the adapters off, or a copy of the whole model."""
    if isinstance(policy, PeftModel):
        if "ref" not in policy.peft_config:
            return Role(policy, None)
        # The parent's copy goes by names, and misses adapters of embeddings
        load_adapter_weights(policy, "ref", _adapter_state(policy, "default"))
        return Role(policy, "ref")
    network = copy.deepcopy(policy)
    network.__dict__.pop("forward", None)  # the policy's fused head is bound to the policy
    add_fused_lm_head(network, temperature=temperature)
    network.eval()
    return Role(network)


def _reward(policy: Network, parts: RewardParts, index: int, kwargs: dict) -> Role:
    head = _head(parts.head_weight, parts.bias)
    name = f"reward_{index}" if index else "reward"
    if isinstance(policy, PeftModel) and parts.config is not None and _on_base_of(policy, parts):
        with loading(f"the adapter {parts.path or name} on the policy's base"):
            _add_adapter(policy, name, parts.config, _without(parts.state, _weights_of_base(policy, parts.state)))
        return Role(policy, name, head)
    network = parts.load_network(**kwargs)
    if isinstance(network, PeftModel):
        return Role(network, network.active_adapter, head)
    return Role(network.base_model, None, head)


def _on_base_of(policy: PeftModel, parts: RewardParts) -> bool:
    """Whether the policy's base is the one that a reward adapter names: by name, and by its weights in memory."""
    base = policy.get_base_model()
    if not same_base(parts.base, get_config_model_id(base.config)):
        return False
    saved = _weights_of_base(policy, parts.state)
    if holds_weights_of(base, parts.base) and all(torch.equal(p.detach().cpu(), t) for p, t in saved.values()):
        return True
    logger.warning(f"The policy's base has other weights than {parts.base}, the reward model's: two bases are kept")
    return False


def _weights_of_base(
    policy: PeftModel, state: dict[str, torch.Tensor]
) -> dict[str, tuple[nn.Parameter, torch.Tensor]]:
    """Weights of the base that an adapter was saved with, by name: embeddings that had been resized."""
    own = dict(policy.named_parameters())
    return {key: (own[key], tensor.to(own[key].dtype)) for key, tensor in state.items() if key in own}


def _value_from_reward(reward: Role, peft_config: PeftConfig | None) -> Role:
    head = copy.deepcopy(reward.head)
    if isinstance(reward.network, PeftModel):
        state = _adapter_state(reward.network, reward.adapter)
        _add_adapter(reward.network, "value", _plain(reward.network.peft_config[reward.adapter]), _without_head(state))
        return Role(reward.network, "value", head)
    if peft_config is None:
        return Role(copy.deepcopy(reward.network).float(), None, head)  # bfloat16 loses steps of 9e-6
    # A fresh adapter changes nothing yet, so the value model equals the reward model, which is the base without it
    config = replace(_plain(peft_config), task_type=None, base_model_name_or_path=None)
    network = get_peft_model(reward.network, config, adapter_name="value")
    reward.network = network
    return Role(network, "value", head)


def _value_from_policy(policy: Network) -> Role:
    size = (policy.get_base_model() if isinstance(policy, PeftModel) else policy).config.get_text_config().hidden_size
    head = _head(torch.zeros(1, size), 0.0)
    if not isinstance(policy, PeftModel):
        return Role(copy.deepcopy(policy.base_model).float(), None, head)  # as above
    _add_adapter(policy, "value", _plain(policy.peft_config["default"]), _adapter_state(policy, "default"))
    return Role(policy, "value", head)


def _head(weight: torch.Tensor, bias: float) -> nn.Linear:
    head = nn.Linear(weight.size(1), 1)
    with torch.no_grad():
        head.weight.copy_(weight.float())
        head.bias.fill_(bias)
    return head


def _plain(config: PeftConfig) -> PeftConfig:
    """A config for another adapter on the same network: trainable, without the head that seq-cls configs save."""
    kept = [name for name in config.modules_to_save or [] if name not in ("score", "classifier")] or None
    return replace(config, modules_to_save=kept, task_type="CAUSAL_LM", inference_mode=False)


def _without(state: dict[str, torch.Tensor], names: Container[str]) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in state.items() if key not in names}


def _without_head(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in state.items() if ".score." not in key and ".classifier." not in key}


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


def _adapter_state(network: PeftModel, adapter: str) -> dict[str, torch.Tensor]:
    return get_peft_model_state_dict(network, adapter_name=adapter, save_embedding_layers=False)


def _add_adapter(network: PeftModel, name: str, config: PeftConfig, state: dict[str, torch.Tensor]) -> None:
    network.add_adapter(name, config)
    load_adapter_weights(network, name, state)


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
