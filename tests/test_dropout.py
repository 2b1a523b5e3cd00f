"""models/dropout.py: residual dropout acts on every branch, only while training, and leaves nothing behind."""

import copy
import math

import pytest
import torch
from conftest import make_gpt2, make_llama
from peft import LoraConfig, get_peft_model
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

from instructgpt_trl.data import InputError
from instructgpt_trl.models.dropout import residual_dropout, residual_places

IDS = torch.arange(24).reshape(2, 12) * 7 % 250
DECODER = dict(
    vocab_size=258,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def make_neox(p: float) -> GPTNeoXForCausalLM:
    """One field of its config is for the embeddings too."""
    sizes = {name: DECODER[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, num_attention_heads=2, attention_dropout=0, hidden_dropout=p))
    model.gpt_neox.emb_dropout.p = 0
    return model


# Every kind of own dropout: nn.Dropout in the blocks, on the layer, and numbers on the layer and in the blocks
OWN = {
    "gpt2": lambda p: GPT2LMHeadModel(
        GPT2Config(vocab_size=258, n_embd=16, n_layer=2, n_head=2, embd_pdrop=0, attn_pdrop=0, resid_pdrop=p)
    ),
    "gpt_neox": make_neox,
    "opt": lambda p: OPTForCausalLM(
        OPTConfig(
            vocab_size=258,
            hidden_size=16,
            ffn_dim=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            word_embed_proj_dim=16,
            attention_dropout=0.0,
            dropout=p,
        )
    ),
    "bloom": lambda p: BloomForCausalLM(
        BloomConfig(vocab_size=258, hidden_size=16, n_layer=2, n_head=2, attention_dropout=0.0, hidden_dropout=p)
    ),
    "phi3": lambda p: Phi3ForCausalLM(Phi3Config(**DECODER, embd_pdrop=0.0, attention_dropout=0.0, resid_pdrop=p)),
    "starcoder2": lambda p: Starcoder2ForCausalLM(
        Starcoder2Config(**DECODER, attention_dropout=0.0, embedding_dropout=0.0, residual_dropout=p)
    ),
}


def hooks(model: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def logits(model: torch.nn.Module, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("name", OWN)
def test_own_dropout_is_what_the_architecture_does_with_that_probability(name):
    torch.manual_seed(0)
    plain = OWN[name](0.0).train()
    expected = OWN[name](0.2).train()
    expected.load_state_dict(plain.state_dict())
    before = logits(plain)
    with residual_dropout(plain, 0.2):
        assert torch.equal(logits(plain), logits(expected))
        assert hooks(plain) == 0
    assert torch.equal(logits(plain), before)
    assert not torch.equal(logits(expected), before)


def test_own_dropout_leaves_the_others_and_the_config_alone(tmp_path):
    model = make_gpt2()  # 0.1 everywhere
    with residual_dropout(model, 0.2):
        block = model.transformer.h[1]
        assert (block.attn.resid_dropout.p, block.mlp.dropout.p) == (0.2, 0.2)
        assert (block.attn.attn_dropout.p, model.transformer.drop.p) == (0.1, 0.1)
        model.save_pretrained(tmp_path)
    assert (block.attn.resid_dropout.p, block.mlp.dropout.p) == (0.1, 0.1)
    assert GPT2Config.from_pretrained(tmp_path).resid_pdrop == 0.1


def test_hooks_scale_what_is_kept_and_drop_before_the_residual_add():
    model, p = make_llama(num_hidden_layers=3).train(), 0.2
    layer, seen = model.model.layers[1], {}
    ids = torch.arange(32 * 64).reshape(32, 64) * 7 % 250

    def see(name: str):
        def hook(module, args, output):
            seen[name] = (output[0] if isinstance(output, tuple) else output).detach()

        return hook

    def see_input(name: str):
        return lambda module, args: seen.setdefault(name, args[0].detach())

    # Hooks run in the order in which they were added: these see a block's output before ours
    observers = [
        layer.register_forward_pre_hook(see_input("in")),
        layer.self_attn.register_forward_hook(see("attention")),
        layer.post_attention_layernorm.register_forward_pre_hook(see_input("between")),
        layer.mlp.register_forward_hook(see("feed_forward")),
        layer.register_forward_hook(see("out")),
    ]
    before = hooks(model)
    with residual_dropout(model, p):
        assert hooks(model) == before + 2 * 3
        observers.append(layer.self_attn.register_forward_hook(see("dropped attention")))
        observers.append(layer.mlp.register_forward_hook(see("dropped feed_forward")))
        torch.manual_seed(3)
        model(input_ids=ids, use_cache=False)
    for observer in observers:
        observer.remove()
    assert hooks(model) == 0
    for name in ("attention", "feed_forward"):
        whole, dropped = seen[name], seen[f"dropped {name}"]
        kept = dropped != 0
        assert torch.allclose(dropped[kept], whole[kept] / (1 - p), rtol=2.5e-7, atol=0)
        # 32 * 64 * 16 elements: the share dropped is p within five standard errors
        assert abs((~kept).float().mean().item() - p) < 5 * math.sqrt(p * (1 - p) / kept.numel())
    assert torch.equal(seen["between"], seen["in"] + seen["dropped attention"])
    assert torch.equal(seen["out"], seen["between"] + seen["dropped feed_forward"])


def test_every_branch_of_every_layer_drops():
    model = make_llama(num_hidden_layers=2)
    _, branches = residual_places(model)
    layers = model.model.layers
    assert branches == [layers[0].self_attn, layers[0].mlp, layers[1].self_attn, layers[1].mlp]


def test_norms_on_the_branches_come_before_dropout():
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**DECODER, head_dim=8))
    places, branches = residual_places(model)
    layer = model.model.layers[0]
    assert places == []
    assert branches[:2] == [layer.post_attention_layernorm, layer.post_feedforward_layernorm]
    assert len(branches) == 4


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
def test_eval_mode_drops_nothing(make):
    model = make().eval()
    before = logits(model)
    with residual_dropout(model, 0.5):
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
def test_zero_leaves_the_model_alone(make):
    model = make().train()
    before = logits(model)
    with residual_dropout(model, 0):
        assert hooks(model) == 0
        assert torch.equal(logits(model), before)


def test_undone_after_an_exception():
    llama, gpt2 = make_llama(), make_gpt2()
    for model in (llama, gpt2):
        with pytest.raises(RuntimeError, match="stop"), residual_dropout(model, 0.2):
            raise RuntimeError("stop")
    assert hooks(llama) == 0
    assert gpt2.transformer.h[0].mlp.dropout.p == 0.1


@pytest.mark.parametrize("with_adapter", [False, True])
@pytest.mark.parametrize("make", [make_llama, make_gpt2])
def test_pitfall_10_gradient_checkpointing_recomputes_the_same_mask(make, with_adapter):
    gradients = []
    for checkpointed in (False, True):
        model = make()
        if with_adapter:
            torch.manual_seed(5)
            model = get_peft_model(model, LoraConfig(r=4, lora_dropout=0.1, init_lora_weights=False))
            model.enable_input_require_grads()
        if checkpointed:
            model.activation_checkpointing_enable()
        model.train()
        with residual_dropout(model, 0.3):
            torch.manual_seed(1)
            model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
        assert gradient.abs().max() > 0, name


def test_adapters_on_the_branches_are_dropped_too():
    torch.manual_seed(5)
    model = get_peft_model(make_llama(), LoraConfig(r=4, init_lora_weights=False))
    model.train()
    whole = logits(model)
    with residual_dropout(model, 0.3):
        assert hooks(model) == 4
        assert not torch.equal(logits(model), whole)
    assert torch.equal(logits(model), whole)


def test_an_unknown_architecture_is_refused():
    config = MambaConfig(vocab_size=258, hidden_size=16, num_hidden_layers=2, state_size=4)
    with pytest.raises(InputError, match="residual_dropout.*'mamba'.*set residual_dropout=0"):
        residual_places(MambaForCausalLM(config))


def test_two_blocks_of_a_kind_are_refused():
    model = make_llama()
    model.model.layers[1].ffn = copy.deepcopy(model.model.layers[1].mlp)
    with pytest.raises(InputError, match="'llama'.*found 2"):
        residual_places(model)
