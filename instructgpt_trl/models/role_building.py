"""Four roles from a policy and reward models: which share the base, and what each of them starts from."""

import copy
from collections.abc import Container
from dataclasses import replace

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers.utils import logging

from .._trl import add_fused_lm_head, get_config_model_id
from ..data import InputError
from .folders import loading
from .loading import holds_weights_of, keep_gradients, same_base
from .lora import fuse_lora
from .reward_parts import RewardParts
from .roles import Network, Role, Roles, load_adapter_weights

logger = logging.get_logger(__name__)


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
        _check_head(head, policy, parts.path or name)
        with loading(f"the adapter {parts.path or name} on the policy's base"):
            _add_adapter(policy, name, parts.config, _without(parts.state, _weights_of_base(policy, parts.state)))
        return Role(policy, name, head)
    network = parts.load_network(**kwargs)
    _check_head(head, network, parts.path or name)
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
    head = _head(torch.zeros(1, _width(policy)), 0.0)
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


def _check_head(head: nn.Linear, network: Network, name: str) -> None:
    if head.in_features != _width(network):
        raise InputError(
            f"{name}: its head ('score') takes {head.in_features} numbers, and its network gives {_width(network)}; "
            f"they are of different models, copy the reward model again"
        )


def _width(network: Network) -> int:
    """Of what a head takes; OPT's smallest projects its hidden states before."""
    model = network.get_base_model() if isinstance(network, PeftModel) else network
    config = model.config.get_text_config()
    return getattr(config, "word_embed_proj_dim", None) or config.hidden_size


def _plain(config: PeftConfig) -> PeftConfig:
    """A config for another adapter on the same network: trainable, without the head that seq-cls configs save."""
    kept = [name for name in config.modules_to_save or [] if name not in ("score", "classifier")] or None
    return replace(config, modules_to_save=kept, task_type="CAUSAL_LM", inference_mode=False)


def _without(state: dict[str, torch.Tensor], names: Container[str]) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in state.items() if key not in names}


def _without_head(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in state.items() if ".score." not in key and ".classifier." not in key}


def _adapter_state(network: PeftModel, adapter: str) -> dict[str, torch.Tensor]:
    return get_peft_model_state_dict(network, adapter_name=adapter, save_embedding_layers=False)


def _add_adapter(network: PeftModel, name: str, config: PeftConfig, state: dict[str, torch.Tensor]) -> None:
    network.add_adapter(name, config)
    load_adapter_weights(network, name, state)
