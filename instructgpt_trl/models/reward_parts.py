"""A reward model in the parts that PPO puts together, from its folder without loading a base, or from an object."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .._trl import get_config_model_id
from ..data import InputError
from .folders import adapter_base, check_folder, loading
from .loading import fit_vocabulary, is_adapter, load_tokenizer
from .reward_folder import quantization_for, read_reward_config
from .reward_model import RewardModel, base_name
from .reward_network import (
    HEAD_PREFIX,
    head_of,
    load_adapter_state,
    load_reward_network,
    read_adapter,
    scalar_config,
)


@dataclass
class RewardParts:
    """
    A reward model in the parts that PPO puts together, so that an adapter goes onto a base that is already there.

    Args:
        config (`PeftConfig`, *optional*): shape of the adapter for a causal base, without a head; `None` for a full
            model.
        state (`dict[str, Tensor]`, *optional*): its weights by their saved names, without the head.
        head_weight (`torch.Tensor` of shape `(1, H)`): the head, float32.
        bias (`float`): added to every score; the head's own bias, if it has one, included.
        base (`str`, *optional*): the adapter's base; `None` for a full model.
        tokenizer (`PreTrainedTokenizerBase`): the reward model's tokenizer.
        path (`str`, *optional*): folder it was read from.
        model (`PreTrainedModel` or `PeftModel`, *optional*): the network, if an object was given. Never changed.
    """

    config: PeftConfig | None
    state: dict[str, Tensor] | None
    head_weight: Tensor
    bias: float
    base: str | None
    tokenizer: PreTrainedTokenizerBase
    path: str | None = None
    model: PreTrainedModel | PeftModel | None = None

    def __post_init__(self):
        if self.head_weight.dim() != 2 or self.head_weight.size(0) != 1:
            raise InputError(
                f"{self.path or 'reward model'}: its head ('score') has the shape {list(self.head_weight.shape)}; "
                f"expected one row of the hidden size"
            )

    def load_network(self, **kwargs: Any) -> PreTrainedModel | PeftModel:
        """
        The network on a base of its own, frozen and in eval mode: a full model, or a plain `PeftModel` with the
        adapter `default` and no head in it. Its head is `head_weight`, not the network's `score`. From an object, a
        copy of it.

        Args:
            kwargs: passed to `from_pretrained` of the base (`dtype`, `quantization_config`, ...).
        """
        if self.model is not None:
            network = copy.deepcopy(self.model)
            network = network.unload() if isinstance(network, PeftModel) else network
        else:
            saved = read_reward_config(self.path)
            quantization = quantization_for(self.path, saved, kwargs.pop("quantization_config", None))
            # seed: an adapter's base has no head, and none is needed
            name, seed = (self.path, None) if self.config is None else (self.base, 0)
            network = load_reward_network(name, quantization_config=quantization, seed=seed, **kwargs)
        if self.config is not None:
            fit_vocabulary(network, {key: tensor.shape for key, tensor in self.state.items()}, self.tokenizer)
            config = copy.deepcopy(self.config)
            config.task_type, config.base_model_name_or_path = None, network.name_or_path
            with loading(f"the adapter {self.path or 'of the reward model'} on its base"):
                network = get_peft_model(network, config)
            network = load_adapter_state(network, self.state, self.path or "reward model")
        return network.requires_grad_(False).eval()


def reward_parts(source: "str | RewardModel | PreTrainedModel | PeftModel", **kwargs: Any) -> RewardParts:
    """
    Take a reward model apart, from its folder without loading a base, or from an object. `kwargs` go to
    `from_pretrained` of its tokenizer.

    Raises:
        [`InputError`]: the folder holds no reward model, or its head is missing.
    """
    if isinstance(source, RewardModel):
        return _parts_of_object(source)
    if not isinstance(source, str):
        name = get_config_model_id(source.config)
        if not name:
            raise InputError("the reward model was made in memory; pass RewardModel(model, tokenizer) instead")
        return _parts_of_object(RewardModel(source, load_tokenizer(name, **kwargs)))
    if Path(source).is_dir():
        check_folder(source)
    saved = read_reward_config(source)
    if not is_adapter(source):
        weight, head_bias = _read_head(source)
        return RewardParts(
            None, None, weight, saved["bias"] + head_bias, None, load_tokenizer(source, **kwargs), path=source
        )
    config, state = read_adapter(source)
    tokenizer = load_tokenizer(source, adapter_base(source), **kwargs)
    return _adapter_parts(config, state, saved["bias"], adapter_base(source), tokenizer, path=source)


def _parts_of_object(source: RewardModel) -> RewardParts:
    if not isinstance(source.model, PeftModel):
        head = head_of(source.model)
        head_bias = 0.0 if head.bias is None else head.bias.item()
        weight = head.weight.detach().cpu().float().clone()
        return RewardParts(None, None, weight, source.bias + head_bias, None, source.tokenizer, model=source.model)
    name = source.model.active_adapter
    state = get_peft_model_state_dict(source.model, adapter_name=name, save_embedding_layers=False)
    state = {key: tensor.detach().cpu().clone() for key, tensor in state.items()}
    config = source.model.peft_config[name]
    return _adapter_parts(config, state, source.bias, base_name(source.model), source.tokenizer, model=source.model)


def _adapter_parts(
    config: PeftConfig,
    state: dict[str, Tensor],
    bias: float,
    base: str | None,
    tokenizer: PreTrainedTokenizerBase,
    **origin: Any,
) -> RewardParts:
    if f"{HEAD_PREFIX}weight" not in state:
        raise InputError(
            f"{origin.get('path', 'reward model')}: the weights of the reward head ('score') are missing from the "
            f"adapter; train it with RewardTrainer, or put 'score' into modules_to_save"
        )
    config = scalar_config(config)
    config.task_type = "CAUSAL_LM"
    config.modules_to_save = [name for name in config.modules_to_save if name != "score"] or None
    head = {key.removeprefix(HEAD_PREFIX): state.pop(key) for key in list(state) if key.startswith(HEAD_PREFIX)}
    bias += head["bias"].item() if "bias" in head else 0.0
    return RewardParts(config, state, head["weight"].float(), bias, base, tokenizer, **origin)


def _read_head(path: str) -> tuple[Tensor, float]:
    """Weight and bias of a full model's head, without loading the rest where the weights are safetensors."""
    folder = Path(path)
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.is_file():
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {key: folder / name for key, name in places.items() if key.startswith("score.")}
    elif single.is_file():
        with safe_open(single, "pt") as weights:
            files = {key: single for key in weights.keys() if key.startswith("score.")}
    else:  # a hub id
        head = head_of(load_reward_network(path))
        return head.weight.detach().float(), 0.0 if head.bias is None else head.bias.item()
    if "score.weight" not in files:
        raise InputError(f"{path}: the weights of the reward head ('score') are missing; train it with RewardTrainer")
    tensors = {}
    for key, file in files.items():
        with safe_open(file, "pt") as weights:
            tensors[key] = weights.get_tensor(key).float()
    return tensors["score.weight"], tensors["score.bias"].item() if "score.bias" in tensors else 0.0
