"""
How much memory a stage takes, predicted without the model's weights.

The passes of a stage are run as the trainers run them, with the same roles and the same LM head, on tensors that have
shapes and no data, and the bytes alive at once are counted. That is done for one and for two layers (of each kind,
where a model has several in turn) and carried on to the model's number, since every layer takes the same. What is
there all the time (weights, gradients, optimizer states) is counted from shapes.
"""

import copy
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel

from ._trl import add_fused_lm_head, triton_lm_head
from .data.episodes import Episodes, attention_mask
from .models.reward_network import last_token_scores
from .models.roles import Role, adapter_parameters

__all__ = ["PARTS", "STAGES", "Load", "largest", "peak", "predict", "shortened", "traced_peak"]

STAGES = ("sft", "reward", "ppo_ptx")
PARTS = ("base", "adapters and heads", "gradients", "optimizer", "activations", "logits chunk", "sampling", "context")
_DTYPES = {32: torch.float32, 16: torch.bfloat16}


@dataclass(frozen=True)
class Load:
    """
    What a stage asks of the memory.

    Args:
        stage (`str`): "sft", "reward" or "ppo_ptx".
        rows (`int`): sequences in one training pass; those of a reward model are the completions of its prompts.
        prompt, completion (`int`): tokens of the longest sequence.
        sampled (`int`): completions sampled at a time ("ppo_ptx").
        ptx_length (`int`): tokens of a pretraining example ("ppo_ptx"); 0 without.
        lora (`PeftConfig`, *optional*): shape of the adapters; without, all weights are trained.
        bits (`int`): of a weight of the base: 32, 16, 8 or 4.
        compute (`torch.dtype`): what the passes compute in.
        checkpointing (`bool`): gradient checkpointing.
        state_bytes (`float`): of the optimizer, a trained weight: 8 for Adam, 2 for Adam in 8 bits.
        reference, ema (`bool`): whether there is a KL penalty, and an average of the policy ("ppo_ptx").
        cuda (`bool`): whether for a GPU, where the LM head has a Triton kernel.
    """

    stage: str
    rows: int
    prompt: int
    completion: int
    sampled: int = 0
    ptx_length: int = 0
    lora: PeftConfig | None = None
    bits: int = 32
    compute: torch.dtype = torch.float32
    checkpointing: bool = True
    state_bytes: float = 8
    reference: bool = True
    ema: bool = True
    cuda: bool = False


# Beside tensors, in bytes: what CUDA, cuBLAS and the allocator's rounding take (not measured by us), and what a
# process on a CPU grows by from its imports on (measured: eval/bench/README.md)
CUDA_CONTEXT = 600 * 2**20
CPU_CONTEXT = 56 * 2**20


def predict(config: PreTrainedConfig, load: Load) -> dict[str, int]:
    """
    Peak bytes of a stage by part (`PARTS`). "activations" is the most that a pass holds besides, "logits chunk" what
    the LM head adds to that, "sampling" the generation cache and what a decoding step holds. Training passes and
    sampling take turns, see [`peak`].
    """
    few, found = _carried_on(config, load)
    if load.lora is None:
        # The gradient of all embeddings can be more than a few layers hold, and would hide how these grow
        _, without = _carried_on(config, load, embeddings=False)
        found |= {name: max(few[name], without[name]) for name in ("activations", "whole")}
    found["logits chunk"] = max(0, found["whole"] - found["activations"])
    return {name: found[name] for name in PARTS}


def _carried_on(
    config: PreTrainedConfig, load: Load, embeddings: bool = True
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes by part of a model of few layers, and of all, carried on from two models of few."""
    text = config.get_text_config()
    layers, kinds = text.num_hidden_layers, len(set(getattr(text, "layer_types", None) or ["one"]))
    few, more = (_parts(config, load, min(n * kinds, layers), embeddings) for n in (1, 2))
    slope = max(layers - 2 * kinds, 0) / kinds
    return few, {name: int(more[name] + slope * (more[name] - few[name])) for name in more}


def peak(parts: dict[str, int]) -> int:
    """Bytes of the parts that are there at once."""
    always = sum(parts[name] for name in PARTS if name not in ("activations", "logits chunk", "sampling"))
    return always + max(parts["activations"] + parts["logits chunk"], parts["sampling"])


def largest(config: PreTrainedConfig, limit: int, load_of: Callable[[int], Load], most: int = 4096) -> int:
    """The largest `n` up to `most` whose load, `load_of(n)`, fits `limit` bytes; 0 if not even 1 does."""
    known: dict[int, int] = {}
    below, above, guess = 0, most + 1, 1  # `below` fits, `above` does not
    while above - below > 1:
        known[guess] = peak(predict(config, load_of(guess)))
        below, above = (guess, above) if known[guess] <= limit else (below, guess)
        guess = min(max(_next_guess(known, limit), below + 1), above - 1)
    return below


def _next_guess(known: dict[int, int], limit: int) -> int:
    """
    Where to look next: where a line through two that are known meets `limit`, since bytes grow as a line does once one
    part is the largest. Best are two that do not fit. With one, the line cuts a corner where another part takes over,
    so that after two neighbours that fit the middle is next.
    """
    if len(known) == 1:
        return 2
    over = sorted(n for n in known if known[n] > limit)
    under = sorted(n for n in known if known[n] <= limit)
    if len(over) == 1 and under[-2:] == [under[-1] - 1, under[-1]]:
        return (under[-1] + over[0]) // 2
    first, second = over[:2] if len(over) > 1 else (under + over)[-2:]
    slope = (known[second] - known[first]) / (second - first)
    return first + int((limit - known[first]) // slope) if slope > 0 else 4 * second


# Weights


def _parts(config: PreTrainedConfig, load: Load, layers: int, embeddings: bool) -> dict[str, int]:
    """
    Bytes by part of a model of so many layers, and "whole", those of a pass with the LM head. Without `embeddings` no
    gradient of these is made.
    """
    config = shortened(config, layers)
    if not embeddings:
        config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
    network, model = _build(config, load)
    if not embeddings:
        model.get_input_embeddings().requires_grad_(False)
        model.enable_input_require_grads()
    always = _always(network, model, load)  # before the passes put other tensors in
    return {**always, **_passes(network, model, load), "context": CUDA_CONTEXT if load.cuda else CPU_CONTEXT}


def _always(network: nn.Module, model: PreTrainedModel, load: Load) -> dict[str, int]:
    """Bytes of what is there all the time."""
    hidden = model.config.get_text_config().hidden_size
    whole, backbone = _size(model), _size(model.base_model)
    own = list(adapter_parameters(network, "default").values()) if load.lora else list(model.parameters())
    trained = sum(p.numel() * p.element_size() for p in own)
    states = sum(p.numel() * load.state_bytes * p.element_size() / 4 for p in own)
    head = 4 * (hidden + 1)
    ppo = load.stage == "ppo_ptx"
    loaded = backbone if load.stage == "reward" else whole  # a reward model has no LM head
    if load.lora:
        base = loaded - trained
        copies = trained * ((3 + load.reference + load.ema) if ppo else 1)
    else:
        base = loaded
        copies = whole * (load.reference + load.ema) + 2 * backbone if ppo else 0
    gradients = trained * ((2 + bool(load.ptx_length)) if ppo else 1)
    heads = head * {"sft": 0, "reward": 1, "ppo_ptx": 2}[load.stage]
    return {
        "base": base,
        "adapters and heads": copies + heads,
        "gradients": gradients + min(heads, head),
        "optimizer": int(states * (2 if ppo else 1)) + 2 * min(heads, head),
    }


def _size(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, each counted once."""
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _build(config: PreTrainedConfig, load: Load) -> tuple[nn.Module, PreTrainedModel]:
    """The network of a role as the trainers make it, and the model inside, both without data."""
    with torch.device("meta"):
        dtype = _DTYPES.get(load.bits, load.compute)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
        if load.bits < 16:
            _quantize(model, load)
        network = model if load.lora is None else get_peft_model(model, copy.deepcopy(load.lora))
        if load.lora is not None:
            for parameter in adapter_parameters(network, "default").values():
                parameter.data = parameter.data.float()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    return network, model


def _quantize(model: PreTrainedModel, load: Load) -> None:
    """Every linear layer but the LM head, as bitsandbytes does."""
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if isinstance(linear, nn.Linear) and linear is not head:
                setattr(parent, name, _Packed(linear, load))


class _Packed(nn.Linear):
    """A frozen layer in 4 bits (NF4 with double quantisation) or 8, unpacked for each product and forgotten."""

    def __init__(self, linear: nn.Linear, load: Load):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        count = self.weight.numel()
        # 4 bits: a byte of scale for 64 weights, and four for 256 of those
        size = count // 2 + count // 64 + 4 * (count // 64 // 256) if load.bits == 4 else count + 4 * self.out_features
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), requires_grad=False)
        self.compute = load.compute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (self.out_features, self.in_features)
        return _Unpacked.apply(x.to(self.compute), self.weight, shape, self.bias).to(x.dtype)


class _Unpacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, packed, shape, bias):
        ctx.shape = shape
        return F.linear(x, packed.new_empty(shape, dtype=x.dtype), bias)

    @staticmethod
    def backward(ctx, grad):
        return grad @ grad.new_empty(ctx.shape), None, None, None


# Passes


def _passes(network: nn.Module, model: PreTrainedModel, load: Load) -> dict[str, int]:
    """Bytes that the passes of a stage make, at their peak."""
    head = nn.Linear(model.config.get_text_config().hidden_size, 1, device="meta")
    if load.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        if load.lora is not None:
            network.enable_input_require_grads()
    network.train()
    autocast = nullcontext if load.compute == torch.float32 else partial(torch.autocast, "cpu", load.compute)
    with FakeTensorMode(), triton_lm_head() if load.cuda else nullcontext():
        for module in (network, head):
            _without_data(module)
        role = Role(network, "default" if load.lora is not None else None, head, autocast)
        batch = _episodes(load.rows, load.prompt, load.completion)
        if load.stage == "reward":
            scored = _training_peak(role, partial(_scores, role, batch))
            return {"activations": scored, "whole": scored, "sampling": 0}
        backbone = _training_peak(role, lambda: role.values(batch)[0])
        if load.ptx_length > load.prompt + load.completion:
            batch = _episodes(load.rows, 1, load.ptx_length - 1)
        whole = _training_peak(role, lambda: role.logprobs(batch)[0])
        sampling = _sampling_peak(role, load) if load.stage == "ppo_ptx" else 0
        return {"activations": backbone, "whole": whole, "sampling": sampling}


def shortened(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """A copy of `config` with its first `layers` layers only."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return config


def _without_data(module: nn.Module) -> None:
    """Replace what is on the meta device by tensors that say they are on a CPU; give what is trained a gradient."""
    made: dict[int, torch.Tensor] = {}
    kept = []  # so that no id is used twice
    for part in module.modules():
        for store in (part._parameters, part._buffers):
            for name, tensor in store.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    if isinstance(tensor, nn.Parameter):
                        new = nn.Parameter(new, tensor.requires_grad)
                        new.grad = torch.empty_like(new) if tensor.requires_grad else None
                    made[id(tensor)] = new
                    kept.append(tensor)
                store[name] = made[id(tensor)]


def _episodes(rows: int, prompt: int, completion: int) -> Episodes:
    return {
        "input_ids": torch.zeros(rows, prompt + completion, dtype=torch.long),
        "prompt_lengths": torch.full((rows,), prompt),
        "completion_lengths": torch.full((rows,), completion),
        "mask": torch.ones(rows, completion, dtype=torch.bool),
    }


def _scores(role: Role, batch: Episodes) -> torch.Tensor:
    mask = attention_mask(batch)
    with role.autocast():
        hidden = role.model.base_model(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False)
    return last_token_scores(hidden.last_hidden_state, mask, role.head)


def _training_peak(role: Role, method: Callable[[], torch.Tensor]) -> int:
    def step() -> None:
        with role.active():
            method().sum().backward()

    return traced_peak(step)


def _sampling_peak(role: Role, load: Load) -> int:
    """Of reading the prompts and of the last decoding step, when the cache is full."""
    model, rows = role.model, load.sampled
    model.activation_checkpointing_disable()
    model.eval()
    shapes = []

    def step(tokens: int, before: int) -> None:
        cache = DynamicCache(config=model.config)
        for index, shape in enumerate(shapes):
            cache.update(torch.empty(shape, dtype=dtypes[0]), torch.empty(shape, dtype=dtypes[0]), index)
        out = model(
            input_ids=torch.zeros(rows, tokens, dtype=torch.long),
            attention_mask=torch.ones(rows, before + tokens, dtype=torch.long),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        torch.multinomial(out.logits[:, -1].float().softmax(-1), 1)
        if not shapes:
            full = load.prompt + load.completion - 1
            shapes.extend((*layer.keys.shape[:2], full, layer.keys.shape[3]) for layer in cache.layers)
            dtypes.append(cache.layers[0].keys.dtype)

    dtypes: list[torch.dtype] = []
    with torch.no_grad(), role.active(), role.autocast():
        read = traced_peak(lambda: step(load.prompt, 0))
        return max(read, traced_peak(lambda: step(1, load.prompt + load.completion - 1)))


def traced_peak(run: Callable[[], Any]) -> int:
    """The most bytes alive at once of what `run` makes, what it was given aside."""
    with _Live() as live:
        run()
    return live.peak


class _Live(TorchDispatchMode):
    """Counts the bytes that operations inside it have made and that are still alive; `peak` is the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            self._note(tensor, made=False)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            self._note(tensor, made=True)
        return out

    def _note(self, tensor: Any, made: bool) -> None:
        if not isinstance(tensor, torch.Tensor):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if made else 0
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
