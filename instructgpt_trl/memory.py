"""
How much memory a stage takes, predicted without the model's weights.

The passes of a stage are run as the trainers run them, with the same roles and the same LM head, on tensors that have
shapes and no data, and the bytes alive at once are counted. That is done for models of a few layers and carried on to
the model's number, since every layer takes the same (or every block of layers, where a model has several kinds in
turn). What is there all the time (weights, gradients, optimizer states) is counted from shapes.
"""

import copy
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from peft import PeftConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel

from ._trl import add_fused_lm_head, cache_with_room, kernels_of_a_gpu, one_tile_read
from .data.episodes import Episodes, attention_mask
from .data.sharing import share_prompts, shared_attention_mask
from .models.lora import fuse_lora, mergeable
from .models.packed import pack_linear_layers
from .models.reward_network import last_token_scores
from .models.roles import Role, adapter_parameters, disable_dropout
from .models.sharing import why_not_by_config
from .peak_memory import traced_peak

__all__ = ["CUDA_CONTEXT", "PARTS", "STAGES", "Load", "largest", "peak", "predict", "predict_sampling", "shortened"]

STAGES = ("sft", "reward", "ppo_ptx")
PARTS = ("base", "adapters and heads", "gradients", "optimizer", "activations", "logits chunk", "sampling", "context")


@dataclass(frozen=True)
class Load:
    """
    What a stage asks of the memory.

    Args:
        stage (`str`): "sft", "reward" or "ppo_ptx".
        rows (`int`): sequences in one training pass; those of a reward model are the completions of its prompts.
        prompt, completion (`int`): tokens of the longest sequence.
        shared (`int`): completions that stand behind one copy of their prompt ("reward"), where the architecture can
            do that; 1 for sequences of their own.
        sampled (`int`): completions sampled at a time ("ppo_ptx").
        rollout (`int`): episodes of a rollout ("ppo_ptx"). No more than `rows` of them are one pass, of which two
            graphs are kept where PPO gives memory for time.
        ptx_length (`int`): tokens of a pretraining example ("ppo_ptx"); 0 without.
        lora (`PeftConfig`, *optional*): shape of the adapters, and their dropout, which PPO turns off; without, all
            weights are trained.
        dtype (`torch.dtype`): of the base's weights, and of what quantised layers compute in.
        bits (`int`, *optional*): 8 or 4, of a weight of the base's linear layers where these are quantised.
        compute (`torch.dtype`): what the passes compute in; not float32: mixed precision.
        checkpointing (`bool`): gradient checkpointing.
        state_bytes (`float`): of the optimizer, a trained weight: 8 for Adam, 2 for Adam in 8 bits.
        reference, ema (`bool`): whether there is a KL penalty, and an average of the policy ("ppo_ptx").
        reward_base (`bool`): whether the reward model is a network of its own and not an adapter on the policy's base;
            it counts as if it had the policy's shape ("ppo_ptx" with adapters).
        cuda (`bool`): whether for a GPU, where the LM head and dropout have kernels of their own.
    """

    stage: str
    rows: int
    prompt: int
    completion: int
    shared: int = 1
    sampled: int = 0
    rollout: int = 0
    ptx_length: int = 0
    lora: PeftConfig | None = None
    dtype: torch.dtype = torch.float32
    bits: int | None = None
    compute: torch.dtype = torch.float32
    checkpointing: bool = True
    state_bytes: float = 8
    reference: bool = True
    ema: bool = True
    reward_base: bool = False
    cuda: bool = False

    @property
    def spends_memory(self) -> bool:
        """Whether PPO gives memory for time."""
        return not self.checkpointing and not self.cuda


# Beside tensors, in bytes: what CUDA and cuBLAS are taken to need (on an H100 it was 0.72 GB), and what a process on a
# CPU grows by from its imports on (eval/bench/README.md)
CUDA_CONTEXT = 600 * 2**20
CPU_CONTEXT = 30 * 2**20


def predict(config: PreTrainedConfig, load: Load) -> dict[str, int]:
    """
    Peak bytes of a stage by part (`PARTS`). "activations" is the most that a pass holds besides, "logits chunk" what
    the LM head adds to that, "sampling" the generation cache and what a decoding step holds. Training passes and
    sampling take turns, see [`peak`].
    """
    few, found = _carried_on(config, partial(_parts, load=load))
    if load.lora is None:
        # The gradient of all embeddings can be more than a few layers hold, and would hide how these grow
        _, without = _carried_on(config, partial(_parts, load=load, embeddings=False))
        found |= {name: max(few[name], without[name]) for name in ("activations", "whole")}
    found["logits chunk"] = max(0, found["whole"] - found["activations"])
    # While two graphs are there no gradients are yet
    found["activations"] += max(0, found["kept"] - found["gradients"])
    found["sampling"] = predict_sampling(config, load) if load.sampled else 0
    return {name: found[name] for name in PARTS}


def predict_sampling(config: PreTrainedConfig, load: Load) -> int:
    """The part "sampling" of [`predict`] alone, which is the only one that depends on `load.sampled`."""
    # While the first block reads the prompts it holds more than it leaves in the cache, and hides how that grows
    _, found = _carried_on(config, partial(_sampling, load=load), blocks=2)
    return max(found.values())


def _carried_on(
    config: PreTrainedConfig, parts_of: Callable[[PreTrainedConfig], dict[str, int]], blocks: int = 1
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes by part of a model of so many blocks, and of all layers, carried on from that and one of a block more."""
    text = config.get_text_config()
    layers, size = text.num_hidden_layers, _block(getattr(text, "layer_types", None) or [""])
    few, more = (parts_of(shortened(config, min(n * size, layers))) for n in (blocks, blocks + 1))
    slope = max(layers - (blocks + 1) * size, 0) / size
    return few, {name: int(more[name] + slope * (more[name] - few[name])) for name in more}


def _block(kinds: list[str]) -> int:
    """Length of the shortest beginning of which a list of kinds is repetitions, the last one perhaps cut off."""
    return next(n for n in range(1, len(kinds) + 1) if all(kinds[i] == kinds[i % n] for i in range(len(kinds))))


def peak(parts: dict[str, int]) -> int:
    """Bytes of the parts that are there at once."""
    always = sum(parts[name] for name in PARTS if name not in ("activations", "logits chunk", "sampling"))
    return always + max(parts["activations"] + parts["logits chunk"], parts["sampling"])


def largest(peak_of: Callable[[int], int], limit: int, most: int = 4096) -> int:
    """The largest `n` up to `most` of which `peak_of(n)` bytes, more with each `n`, are at most `limit`, or 0."""
    known: dict[int, int] = {}
    below, above, guess = 0, most + 1, 1  # `below` fits, `above` does not
    while above - below > 1:
        known[guess] = peak_of(guess)
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


def _parts(config: PreTrainedConfig, load: Load, embeddings: bool = True) -> dict[str, int]:
    """
    Bytes by part but sampling, "whole", those of a pass with the LM head, and "kept", a graph that waits for its turn.
    `embeddings` says whether these get a gradient.
    """
    if not embeddings:
        config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
    network, model = _build(config, load)
    if not embeddings:
        model.get_input_embeddings().requires_grad_(False)
        model.enable_input_require_grads()
    always = _always(network, model, load)  # before the passes put other tensors in
    return {
        **always,
        **_passes(network, model, load),
        "context": CUDA_CONTEXT if load.cuda else CPU_CONTEXT,
    }


def _always(network: nn.Module, model: PreTrainedModel, load: Load) -> dict[str, int]:
    """Bytes of what is there all the time."""
    hidden = model.config.get_text_config().hidden_size
    whole, backbone = _size(model), _size(model.base_model)
    ppo = load.stage == "ppo_ptx"
    loaded = backbone if load.stage == "reward" else whole  # a reward model has no LM head
    if load.lora is not None:
        policy = value = _Trained(list(adapter_parameters(network, "default").values()), load)
        base = loaded - policy.bytes + (backbone - policy.bytes) * (ppo and load.reward_base)
        copies = policy.bytes * ((3 - load.reward_base + load.reference + load.ema) if ppo else 1)
    else:
        policy = _Trained(list((model if load.stage != "reward" else model.base_model).parameters()), load)
        value = _Trained([p.float() for p in model.base_model.parameters()], load)  # as build_roles makes it
        base = loaded
        copies = whole * (load.reference + load.ema) + backbone + value.bytes if ppo else 0
    head = 4 * (hidden + 1)
    heads = head * {"sft": 0, "reward": 1, "ppo_ptx": 2}[load.stage]
    with_ptx = policy.bytes * bool(load.ptx_length)
    return {
        "base": base,
        "adapters and heads": copies + heads,
        "gradients": policy.bytes + (value.bytes + with_ptx if ppo else 0) + min(heads, head),
        "optimizer": policy.states + (value.states if ppo else 0) + 2 * min(heads, head),
    }


class _Trained:
    """Bytes of what is trained, and of the optimizer's states of it."""

    def __init__(self, parameters: list[torch.Tensor], load: Load):
        self.bytes = sum(p.numel() * p.element_size() for p in parameters)
        self.states = int(self.bytes * load.state_bytes / 4)


def _size(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, each counted once."""
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _build(config: PreTrainedConfig, load: Load) -> tuple[nn.Module, PreTrainedModel]:
    """The network of a role as the trainers make it, and the model inside, both without data."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=load.dtype)
        if load.bits is not None:
            pack_linear_layers(model, load.bits, load.dtype, load.cuda)
        network = model if load.lora is None else get_peft_model(model, copy.deepcopy(load.lora))
        if load.lora is not None:
            for parameter in adapter_parameters(network, "default").values():
                parameter.data = parameter.data.float()
            fuse_lora(network)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    return network, model


# Passes


def _passes(network: nn.Module, model: PreTrainedModel, load: Load) -> dict[str, int]:
    """Bytes that the training passes of a stage make, at their peak, and those of the value model's that waits."""
    if load.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        if load.lora is not None:
            network.enable_input_require_grads()
    network.train()
    if load.stage == "ppo_ptx":
        disable_dropout(network)
    with FakeTensorMode(), kernels_of_a_gpu() if load.cuda else one_tile_read():
        role = _role(network, model, load)
        batch = _episodes(load.rows, load.prompt, load.completion)
        if load.stage == "reward":
            if load.shared > 1 and why_not_by_config(model.config) is None:
                groups = [[[0] * load.completion] * load.shared] * (load.rows // load.shared)
                batch, _ = share_prompts([[0] * load.prompt] * len(groups), groups, pad_token_id=0)
            scored = _training_peak(role, partial(_scores, role, batch))
            return {"activations": scored, "whole": scored, "kept": 0}
        backbone = _training_peak(role, lambda: role.values(batch)[0])
        length = load.prompt + load.completion
        if load.stage == "sft":  # the head may see prompts there too
            batches = [_episodes(load.rows, 1, length - 1)]
        elif load.ptx_length < length:
            batches = [batch]
        else:
            batches = []
        if load.ptx_length:
            batches.append(_episodes(load.rows, 1, load.ptx_length - 1))
        whole = max(_training_peak(role, partial(_logprobs, role, some)) for some in batches)
        kept = 0
        if load.spends_memory and 0 < load.rollout <= load.rows:
            kept = _training_peak(role, partial(_logprobs_beside, role, batch, [])) - whole
        return {"activations": backbone, "whole": whole, "kept": kept}


def _logprobs(role: Role, batch: Episodes) -> torch.Tensor:
    return role.logprobs(batch)[0]


def _logprobs_beside(role: Role, batch: Episodes, waiting: list) -> torch.Tensor:
    """As above, while the value model's graph waits in a list of the caller's."""
    waiting.append(role.values(batch))
    return _logprobs(role, batch)


def _role(network: nn.Module, model: PreTrainedModel, load: Load) -> Role:
    """A network that says it is on a CPU, and a head on it, inside `FakeTensorMode`."""
    head = nn.Linear(model.config.get_text_config().hidden_size, 1, device="meta")
    for module in (network, head):
        _without_data(module)
    autocast = nullcontext if load.compute == torch.float32 else partial(torch.autocast, "cpu", load.compute)
    return Role(network, "default" if load.lora is not None else None, head, autocast)


def _sampling(config: PreTrainedConfig, load: Load) -> dict[str, int]:
    """Bytes that reading the prompts makes, and the last decoding step with the cache full."""
    network, model = _build(config, load)
    network.eval()
    with FakeTensorMode(), torch.no_grad(), ExitStack() as inside:
        role = _role(network, model, load)
        rows, full = load.sampled, load.prompt + load.completion - 1
        new = partial(DynamicCache, config=model.config)
        draw = _drawn_on_a_gpu if load.cuda else _drawn_on_a_cpu
        # `generate` is called on the model inside the adapters, past accelerate's mixed precision
        with role.active(), role.autocast() if load.lora is None else nullcontext():
            if load.spends_memory:
                inside.enter_context(cache_with_room())
            _decode(model, first := new(), rows, draw, tokens=1)
            reading = traced_peak(lambda: _decode(model, new(), rows, draw, load.prompt))
            decoding = traced_peak(lambda: _decode(model, _filled(new(), first, full - 1), rows, draw, 1, full - 1))
        copies = 0
        if load.spends_memory:
            weights = [layer.get_base_layer().weight for layer in mergeable(network, role.adapter)]
            copies = sum(weight.numel() * weight.element_size() for weight in weights)
    return {"reading": copies + reading, "decoding": copies + decoding}


def _drawn_on_a_gpu(probabilities: torch.Tensor) -> None:
    torch.multinomial(probabilities, 1)


def _drawn_on_a_cpu(probabilities: torch.Tensor) -> None:
    """As `sampled_by_cdf` does, which looks at numbers."""
    probabilities[0].to(torch.float64, copy=True).cumsum_(0)


def _decode(
    model: PreTrainedModel, cache: DynamicCache, rows: int, draw: Callable, tokens: int, before: int = 0
) -> None:
    """
    Two steps of `generate` behind the `before` tokens that the cache holds. It keeps scores and probabilities of one
    step until it has those of the next.
    """
    for new in (tokens, 1):
        before += new
        out = model(
            input_ids=torch.zeros(rows, new, dtype=torch.long),
            attention_mask=torch.ones(rows, before, dtype=torch.long),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        scores = out.logits[:, -1].to(torch.float32, copy=True)
        probabilities = scores.softmax(-1)
        draw(probabilities)
        del out


def _filled(cache: DynamicCache, like: DynamicCache, tokens: int) -> DynamicCache:
    """With so many tokens in it, in the shapes of `like`."""
    for index, layer in enumerate(like.layers):
        one = (layer.keys, layer.values)
        cache.update(*(t.new_empty(*t.shape[:2], tokens, t.shape[3]) for t in one), index)
    return cache


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


def _scores(role: Role, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of episodes, or of completions behind one copy of their prompt."""
    shared = "segments" in batch
    inputs = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
    mask = shared_attention_mask(batch["segments"], batch["prefixes"]) if shared else attention_mask(batch)
    with role.autocast():
        hidden = role.model.base_model(**inputs, attention_mask=mask, use_cache=False).last_hidden_state
    return role.head(hidden.flatten(0, 1)[batch["ends"]]) if shared else last_token_scores(hidden, mask, role.head)


def _training_peak(role: Role, method: Callable[[], torch.Tensor]) -> int:
    def step() -> None:
        with role.active():
            method().sum().backward()

    return traced_peak(step)
