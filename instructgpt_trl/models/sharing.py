"""Whether a network can score the completions of a prompt behind one copy of it (`data/sharing.py`), and the call."""

from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel

from ..data.sharing import share_prompts, shared_attention_mask

# Of a hidden state behind one layer, in parts of its norm, by type of the weights; else 1e-4
ROUNDING = {torch.float16: 4e-3, torch.bfloat16: 1.5e-2}
ROUNDING_TO_8_BITS = 3e-2


def network_inputs(model: PreTrainedModel | PeftModel, batch: dict[str, Any]) -> dict[str, Any]:
    """What a network that pools by length takes of a batch of `DataCollatorForRanking`."""
    if "segments" not in batch:
        return {name: batch[name] for name in ("input_ids", "attention_mask")}
    mask = shared_attention_mask(batch["segments"], batch["prefixes"])
    if _base(model).config.get_text_config()._attn_implementation == "eager":  # added to the scores there
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, torch.finfo(torch.float32).min)
    return {"attention_mask": mask, **{name: batch[name] for name in ("input_ids", "position_ids", "ends")}}


def attention_length(model: PreTrainedModel | PeftModel) -> float:
    """
    The length of a sequence at which the attention of a layer, 4 * L * H operations a token, costs as much as its
    matrix products, 2 * parameters.
    """
    config = _base(model).config.get_text_config()
    embeddings = {id(parameter) for parameter in _base(model).get_input_embeddings().parameters()}
    matrices = [p for p in _base(model).base_model.parameters() if p.dim() == 2 and id(p) not in embeddings]
    packed = [getattr(p, "quant_state", None) for p in matrices]  # 4 bits: a column of bytes
    size = sum(p.numel() if state is None else state.shape.numel() for p, state in zip(matrices, packed, strict=True))
    return size / config.num_hidden_layers / (2 * config.hidden_size)


@torch.no_grad()
def why_not_shared(model: PreTrainedModel | PeftModel) -> str | None:
    """
    Why the completions of a prompt cannot share it in this network, or `None` if they can: by its config, and by the
    hidden states of two made-up prompts in one row, which must be those of sequences of their own. They are compared
    layer by layer, since rounding adds up on the way through the network: a mask or positions that are not obeyed
    stand out from it in the first layers. Call it in eval mode.
    """
    config = _base(model).config.get_text_config()
    if reason := why_not_by_config(config):
        return reason
    generator = torch.Generator().manual_seed(0)

    def made_up(*lengths: int) -> list[list[int]]:
        return [torch.randint(config.vocab_size, (n,), generator=generator).tolist() for n in lengths]

    prompts, completions = made_up(7, 4), [made_up(3, 1, 5), made_up(2, 3)]
    batch, order = share_prompts(prompts, completions, pad_token_id=0)
    alone = [[*prompts[i], *ids] for i in order for ids in completions[i]]
    try:
        inputs = network_inputs(model, {name: tensor.to(model.device) for name, tensor in batch.items()})
        shared = _hidden_states(model, inputs.pop("ends"), **inputs)
        rows = [torch.tensor([ids], device=model.device) for ids in alone]
        separate = [_hidden_states(model, torch.tensor([row.numel() - 1]), input_ids=row) for row in rows]
    except (TypeError, ValueError, RuntimeError, IndexError) as error:  # what a network says that cannot
        return f"it refused: {type(error).__name__}: {' '.join(str(error).split())[:100]}"
    rounding = ROUNDING.get(next(_base(model).parameters()).dtype, 1e-4)
    if getattr(_base(model), "is_loaded_in_8bit", False):
        rounding = max(rounding, ROUNDING_TO_8_BITS)
    for layer, (together, *apart) in enumerate(zip(shared, *separate, strict=True)):
        own = torch.cat(apart)
        difference = ((together - own).norm(dim=-1) / own.norm(dim=-1).clamp_min(1e-9)).max().item()
        if not difference <= rounding * max(layer, 1) ** 0.5:
            return f"hidden states come out otherwise, behind layer {layer} by {difference:.2g} of their norm"
    return None


def _hidden_states(
    model: PreTrainedModel | PeftModel, ends: torch.Tensor, **inputs: torch.Tensor
) -> list[torch.Tensor]:
    """(N, H) each, float32: before the first layer and behind each, at N positions of the flattened batch."""
    out = _base(model).base_model(**inputs, use_cache=False, output_hidden_states=True, return_dict=True)
    states = out.hidden_states or (out.last_hidden_state,)  # on several devices, perhaps
    return [hidden.flatten(0, 1).cpu()[ends.cpu()].float() for hidden in states]


def why_not_by_config(config: PreTrainedConfig) -> str | None:
    """The part of [`why_not_shared`] that needs no weights."""
    config = config.get_text_config()
    attention = config._attn_implementation
    if attention not in (None, "sdpa", "eager"):  # None: not loaded yet
        return f"the attention '{attention}' takes no mask of this kind"
    other = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
    if other:
        return f"it has layers of {', '.join(other)}"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return "its attention has a sliding window"
    return None


def _base(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    return model.get_base_model() if isinstance(model, PeftModel) else model
