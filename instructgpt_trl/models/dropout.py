"""
Residual dropout for the length of a training run, on architectures that have it and on those that do not.

Where an architecture has residual dropout of its own (GPT-2, OPT, Phi, Bloom ...), its probability is set. Where it
has none (Llama, Qwen, Mistral, Gemma ...), a forward hook drops from what each attention and each feed-forward block
adds to the residual stream. Both act on modules only, not on the config, and both are undone at the end.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..data import InputError

# Where a decoder layer keeps the probability of its own residual dropout: a `nn.Dropout`, or a number that its forward
# reads. Only architectures whose own dropout covers both branches (StableLM's and Persimmon's covers one, and is 0).
# Bloom and MPT add the residual inside the block, where a hook would drop from the residual stream itself.
_GPT = ("attn.resid_dropout", "mlp.dropout")
_IN_BLOCKS = ("self_attn.residual_dropout", "mlp.residual_dropout")
OWN_DROPOUT: dict[str, tuple[str, ...]] = {
    "biogpt": ("dropout",),
    "bloom": ("self_attention.hidden_dropout", "mlp.hidden_dropout"),
    "codegen": _GPT,
    "ctrl": ("dropout1", "dropout2"),
    "doge": ("hidden_dropout",),
    "emu3_text_model": ("dropout",),
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gpt_neo": ("attn.attention.resid_dropout", "mlp.dropout"),
    "gpt_neox": ("post_attention_dropout", "post_mlp_dropout"),
    "gpt_neox_japanese": ("hidden_dropout",),
    "gptj": _GPT,
    "mpt": ("resid_attn_dropout", "ffn.hidden_dropout"),
    "openai-gpt": _GPT,
    "opt": ("dropout",),
    "phi": ("resid_dropout",),
    "phi3": ("resid_attn_dropout", "resid_mlp_dropout"),
    "phi4_multimodal": ("resid_attn_dropout", "resid_mlp_dropout"),
    "seed_oss": _IN_BLOCKS,
    "starcoder2": _IN_BLOCKS,
    "xglm": ("dropout",),
}

_ATTENTION = ("self_attn", "self_attention", "attention", "attn", "linear_attn", "mamba", "conv")
_FEED_FORWARD = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "shared_mlp")
# Norms between a block and the residual add, feed-forward and attention. Where the first is there, the layer's
# `post_attention_layernorm` stands on the branch (Gemma 2, OLMo 2), not in front of the next block (Llama).
_OUTPUT_NORMS = (
    ("post_feedforward_layernorm", "post_attention_layernorm"),
    ("post_mlp_layernorm", "post_self_attn_layernorm"),
    ("post_mlp_layernorm", "post_attention_layernorm"),
)


@contextmanager
def residual_dropout(model: PreTrainedModel | PeftModel, p: float) -> Iterator[None]:
    r"""
    Drop from each residual branch with probability `p` inside this context: `h = h + dropout(block(h))`, in training
    mode only. Hooks and probabilities are taken back at its end, so nothing of it is ever saved. `p = 0` leaves the
    model alone, its own dropout included.

    Source: InstructGPT 3.5 (residual dropout of 0.2).

    Raises:
        [`InputError`]: the architecture's residual branches are not known.
    """
    places, branches = residual_places(model) if p else ([], [])
    before = [getattr(owner, name) for owner, name in places]
    handles = [branch.register_forward_hook(partial(_drop, p)) for branch in branches]
    for owner, name in places:
        setattr(owner, name, p)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for (owner, name), value in zip(places, before, strict=True):
            setattr(owner, name, value)


def residual_places(model: PreTrainedModel | PeftModel) -> tuple[list[tuple[nn.Module, str]], list[nn.Module]]:
    """
    Where residual dropout acts: `(module, attribute)` of each probability of the architecture's own dropout, or, if it
    has none, the two modules of each decoder layer whose output is added to the residual stream. One list is empty.

    Raises:
        [`InputError`]: neither is known for this architecture.
    """
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    config = model.config.get_text_config()
    try:
        layers = _decoder_layers(model, config.num_hidden_layers)
        if config.model_type in OWN_DROPOUT:
            places = [_place(layer, name) for layer in layers for name in OWN_DROPOUT[config.model_type]]
            return places, []
        return [], [branch for layer in layers for branch in _branches(layer)]
    except AttributeError as error:
        raise InputError(
            f"residual_dropout: where a model of type '{config.model_type}' adds to its residual stream is not known "
            f"({error}); set residual_dropout=0"
        ) from None


def _decoder_layers(model: PreTrainedModel, count: int) -> list[nn.Module]:
    """The decoder's layers: its first list of `count` modules."""
    lists = (module for module in model.get_decoder().modules() if isinstance(module, nn.ModuleList))
    layers = next((list(modules) for modules in lists if len(modules) == count), None)
    if layers is None:
        raise AttributeError(f"it has no list of {count} layers")
    return layers


def _place(layer: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, last = name.rpartition(".")
    owner = layer.get_submodule(path)
    value = getattr(owner, last)
    return (value, "p") if isinstance(value, nn.Dropout) else (owner, last)


def _branches(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The modules whose outputs a layer adds to the residual stream: attention and feed-forward, or norms on them."""
    children = dict(layer.named_children())
    for feed_forward, attention in _OUTPUT_NORMS:
        if feed_forward in children and attention in children:
            return children[attention], children[feed_forward]
    return _only(children, _ATTENTION), _only(children, _FEED_FORWARD)


def _only(children: dict[str, nn.Module], names: tuple[str, ...]) -> nn.Module:
    # Two of a kind are summed or alternate, and a list of modules is never called: better refused than half dropped
    found = [children[name] for name in names if name in children]
    if len(found) != 1 or isinstance(found[0], nn.ModuleList):
        raise AttributeError(f"expected one block of {', '.join(names)} in a layer, found {len(found)}")
    return found[0]


def _drop(p: float, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    """Forward hook: dropout on a block's output, or on the first of its outputs."""
    if not module.training:
        return output
    if isinstance(output, tuple):
        return (nn.functional.dropout(output[0], p), *output[1:])
    return nn.functional.dropout(output, p)
