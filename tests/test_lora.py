"""Fused adapters against PEFT's own: the same numbers, the same weights when merged, nothing else changed."""

import copy
from contextlib import nullcontext

import pytest
import torch
from conftest import make_llama
from peft import LoraConfig, get_peft_model
from ppo_helpers import lora, nf4, randomise
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import AutoModelForCausalLM

from instructgpt_trl.models import lora as lora_module
from instructgpt_trl.models.lora import FusedLora, fuse_lora, mergeable, merged_lora, without_casts

IDS = torch.arange(3, 27).view(2, 12)


def pair(dtype=torch.float32, **settings):
    """A network with the random adapters `default` and `other`, and a fused copy."""
    settings = {"target_modules": "all-linear", "lora_alpha": 6, "r": 4, **settings}
    network = get_peft_model(make_llama(hidden=32).to(dtype), LoraConfig(**settings))
    network.add_adapter("other", LoraConfig(**settings))
    randomise(network, 1.0)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    fused = copy.deepcopy(network)
    fuse_lora(fused)
    return network, fused


def fused_layers(network) -> list:
    return [m for m in network.modules() if isinstance(getattr(m, "lora_variant", {}).get("default"), FusedLora)]


def logits_and_gradients(network, **context):
    torch.manual_seed(0)
    network.zero_grad()
    with torch.autocast("cpu", **(context or {"enabled": False})):
        logits = network(IDS).logits
    logits.float().pow(2).mean().backward()
    return logits.detach(), {n: p.grad for n, p in network.named_parameters() if p.grad is not None}


@pytest.fixture
def added(monkeypatch) -> list:
    """Types of `x` where the adapter is added in place, within the base's own step of the graph."""
    seen, apply = [], lora_module._AddLoRA.apply
    monkeypatch.setattr(lora_module._AddLoRA, "apply", lambda x, *rest: seen.append(x.dtype) or apply(x, *rest))
    return seen


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("adapter", ["default", "other"])
def test_equals_peft_in_float32(adapter, dropout, added):
    network, fused = pair(lora_dropout=dropout)
    for one in (network, fused):
        one.set_adapter(adapter)
    assert len(fused_layers(fused)) == 14
    expected, gradients = logits_and_gradients(network)
    logits, own = logits_and_gradients(fused)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert own.keys() == gradients.keys() and len(own) == 28
    for name in own:
        torch.testing.assert_close(own[name], gradients[name], rtol=1e-4, atol=1e-6)
    assert len(added) == (0 if dropout else 14)
    with fused.disable_adapter(), network.disable_adapter():
        assert torch.equal(fused(IDS).logits, network(IDS).logits)


@pytest.mark.parametrize("casts", [True, False])
@pytest.mark.parametrize("context", [{}, {"dtype": torch.bfloat16}])
def test_bfloat16_is_no_further_from_float32_than_peft_is(context, casts, added):
    """With mixed precision and without, on a bfloat16 base; types of outputs and gradients are PEFT's."""
    network, fused = pair(torch.bfloat16)
    exact, gradients = logits_and_gradients(copy.deepcopy(network).float())
    expected, theirs = logits_and_gradients(network, **context)
    if not casts and not context:  # against PEFT in mixed precision, which computes in bfloat16 too
        expected, theirs = logits_and_gradients(network, dtype=torch.bfloat16)
    with nullcontext() if casts else without_casts(fused):
        logits, own = logits_and_gradients(fused, **context)
    assert len(added) == (0 if casts else 14)
    assert logits.dtype == expected.dtype
    assert (logits - exact).norm() <= 1.1 * (expected - exact).norm()
    assert {n: g.dtype for n, g in own.items()} == {n: g.dtype for n, g in theirs.items()}
    off, others = (
        torch.stack([(found[n] - gradients[n]).norm() for n in gradients]).norm() for found in (own, theirs)
    )
    assert off <= 1.1 * others


@pytest.mark.parametrize("context", [{}, {"dtype": torch.bfloat16}])
def test_nothing_is_copied_into_float32_without_casts(context, added):
    """Under autocast the numbers are the same; without, they are those under it."""
    _, fused = pair(torch.bfloat16)
    expected = logits_and_gradients(fused, dtype=torch.bfloat16)[0]
    assert added == []
    with without_casts(fused):
        logits, _ = logits_and_gradients(fused, **context)
    assert added == [torch.bfloat16] * 14
    assert torch.equal(logits, expected)
    assert all(getattr(m, "cast_input_dtype_enabled", True) for m in fused.modules())


def hooked(layer):
    layer.register_forward_hook(lambda module, args, output: output * 2)


def hooked_backward(layer):
    layer.register_full_backward_hook(lambda module, of_inputs, of_outputs: (of_inputs[0] * 2,))


def replaced(layer):
    forward = layer.forward
    layer.forward = lambda x: forward(x) * 2


def trained(layer):
    layer.weight.requires_grad_()


def trained_bias(layer):
    layer.bias = nn.Parameter(torch.ones(layer.out_features))


def as_subclass(layer):
    class Weight(nn.Parameter):
        pass

    layer.weight = Weight(layer.weight.data, requires_grad=False)


@pytest.mark.parametrize("change", [hooked, hooked_backward, replaced, trained, trained_bias, as_subclass])
def test_a_base_that_does_more_keeps_its_graph(change, added):
    network, fused = pair()
    for one in (network, fused):
        for module in one.modules():
            if hasattr(module, "lora_A"):
                change(module.base_layer)
    assert_same(network, fused)
    assert added == []


def assert_same(network, fused):
    """Logits and gradients but for rounding, and of the same parameters."""
    logits, own = logits_and_gradients(fused)
    expected, gradients = logits_and_gradients(network)
    assert own.keys() == gradients.keys()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    for name in own:
        torch.testing.assert_close(own[name], gradients[name], rtol=1e-4, atol=2e-6)


def test_on_a_frozen_bias(added):
    network, fused = pair()
    for one in (network, fused):
        for module in one.modules():
            if hasattr(module, "lora_A"):
                module.base_layer.bias = nn.Parameter(torch.ones(module.out_features), requires_grad=False)
    assert_same(network, fused)
    assert len(added) == 14


def test_dropout_counts_where_it_drops(added):
    """In training, not with a probability of 0, as PPO has it."""
    _, fused = pair(lora_dropout=0.25)
    assert fused.training
    logits_and_gradients(fused)
    assert added == []
    for module in fused.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0
    logits_and_gradients(fused)
    assert len(added) == 14


def test_frozen_adapters_pass_the_gradient_on(added):
    """Of two adapters on a layer's input one is frozen: it gets no gradient, and what is below it the right one."""
    network, fused = pair()
    for one in (network, fused):
        for name, parameter in one.named_parameters():
            parameter.requires_grad_("lora_" in name and "layers.0" in name and "default" in name)
    assert_same(network, fused)
    assert len(added) == 14


def test_a_global_hook_sees_the_base_as_it_is(added):
    seen = []
    _, fused = pair()
    layer = fused_layers(fused)[0]
    handle = register_module_forward_hook(
        lambda module, args, output: seen.append((args[0], output)) if module is layer.base_layer else None
    )
    try:
        logits_and_gradients(fused)
        with torch.no_grad():
            fused(IDS)
    finally:
        handle.remove()
    assert added == [] and len(seen) == 2
    for x, output in seen:
        assert torch.equal(output, nn.functional.linear(x, layer.base_layer.weight))


def test_mixed_batches_of_adapters(added):
    """PEFT's `adapter_names`, one for each row, with an active adapter that a layer does not have."""
    found = []
    for one in pair():
        one.add_adapter("few", LoraConfig(target_modules=["q_proj"], r=4))
        one.set_adapter("few")
        one.eval()
        for name, parameter in one.named_parameters():
            parameter.requires_grad_("lora_" in name)
        logits = one(IDS, adapter_names=["default", "other"]).logits
        logits.pow(2).mean().backward()
        found.append([logits.detach(), *(p.grad for p in one.parameters() if p.grad is not None)])
    (expected, *gradients), (logits, *own) = found
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    for one, other in zip(own, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_two_adapters_at_once(added):
    network, fused = pair()
    for one in (network, fused):
        one.base_model.set_adapter(["default", "other"])
    assert_same(network, fused)
    assert added == [] and sum(p.grad is not None for p in fused.parameters()) == 56


def test_without_gradients_the_sum_is_the_same_bit_for_bit():
    """It is made in place then."""
    for dtype in (torch.float32, torch.bfloat16):
        _, fused = pair(dtype)
        with without_casts(fused):
            expected = logits_and_gradients(fused)[0]
            with torch.no_grad():
                assert torch.equal(fused(IDS).logits, expected)


def test_adapters_that_are_not_fused_run_beside_fused_ones_without_casts():
    """One with a bias, one added later, on a bfloat16 base outside autocast: PEFT's own casts stay."""
    settings = dict(target_modules="all-linear", r=4)
    biased = get_peft_model(make_llama(attention_bias=True, mlp_bias=True).bfloat16(), LoraConfig(**settings))
    biased.add_adapter("later", LoraConfig(**settings, lora_bias=True))
    fuse_lora(biased)
    biased.add_adapter("last", LoraConfig(**settings))
    for name, fused in (("default", True), ("later", False), ("last", False)):
        biased.set_adapter(name)
        layer = next(m for m in biased.modules() if hasattr(m, "lora_variant"))
        assert isinstance(layer.lora_variant.get(name), FusedLora) == fused
        with without_casts(biased):
            assert getattr(layer, "cast_input_dtype_enabled", True) != fused
            assert biased(IDS).logits.isfinite().all()


def test_merged_and_unmerged_as_peft_does():
    network, fused = pair()
    before = {name: parameter.detach().clone() for name, parameter in fused.named_parameters()}
    for safe in (False, True):
        fused.merge_adapter(safe_merge=safe)
        expected = copy.deepcopy(network)
        expected.merge_adapter(safe_merge=safe)
        for one, other in zip(fused.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
        fused.unmerge_adapter()
    for name, parameter in fused.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=1e-5, atol=1e-5)
    own, theirs = fused.merge_and_unload().state_dict(), network.merge_and_unload().state_dict()
    assert own.keys() == theirs.keys()
    for name in own:
        torch.testing.assert_close(own[name], theirs[name], rtol=1e-5, atol=1e-5)


def test_what_is_saved_is_peft_own(tmp_path):
    network, fused = pair()
    for one, name in ((network, "theirs"), (fused, "ours")):
        one.save_pretrained(tmp_path / name)
    for file in ("adapter_model.safetensors", "other/adapter_model.safetensors"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()


def test_other_kinds_of_adapters_stay_as_they_are():
    for settings in ({"use_dora": True}, {"target_modules": ["embed_tokens"]}):
        network, fused = pair(**settings)
        assert fused_layers(fused) == []
        with without_casts(fused):
            assert torch.equal(fused(IDS).logits, network(IDS).logits)


def test_on_four_bits_as_peft(wide):
    pytest.importorskip("bitsandbytes")
    base = AutoModelForCausalLM.from_pretrained(wide.base, quantization_config=nf4(torch.float32))
    network = get_peft_model(base, lora(task_type="CAUSAL_LM", target_modules="all-linear"))
    randomise(network, 1.0)
    for parameter in network.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    expected, gradients = logits_and_gradients(network.train())
    fuse_lora(network)
    assert len(fused_layers(network)) == 14
    logits, own = logits_and_gradients(network)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(network(IDS).logits, logits)
    for name in gradients:
        torch.testing.assert_close(own[name], gradients[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_for_sampling_and_put_back_bit_for_bit(dtype):
    """Inside, copies of the weights with the adapter in them; behind it, and behind an error, all is as it was."""
    _, fused = pair(dtype)
    weights = [layer.get_base_layer().weight for layer in fused_layers(fused)]
    tensors, copies = [weight.data for weight in weights], [weight.detach().clone() for weight in weights]
    seen = []
    for layer in fused_layers(fused):
        layer.lora_dropout["default"].register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        expected = fused(IDS).logits
        assert len(seen) == 14
        with merged_lora(fused, "default"):
            logits = fused(IDS).logits
            assert len(seen) == 14  # no adapter is run
        close = 1e-5 if dtype == torch.float32 else 0.05
        assert (logits - expected).norm() < close * expected.norm()
        with pytest.raises(RuntimeError, match="out of"), merged_lora(fused, "default"):
            raise RuntimeError("out of memory")
        assert torch.equal(fused(IDS).logits, expected)
    for weight, tensor, copied in zip(weights, tensors, copies, strict=True):
        assert weight.data_ptr() == tensor.data_ptr() and torch.equal(weight, copied)
    assert not any("forward" in vars(layer) for layer in fused_layers(fused))


@pytest.mark.parametrize("rows", [(8,), (9,), (16, 1), (3, 21), (64,)])
def test_few_rows_are_multiplied_the_other_way_round(rows):
    x, weight, bias = torch.randn(*rows, 5, dtype=torch.float64), torch.randn(7, 5), torch.randn(7)
    for added in (None, bias):
        product = lora_module._linear(x.float(), weight, added)
        expected = x @ weight.double().t() + (0 if added is None else added)
        assert product.shape == (*rows, 7) and product.is_contiguous()
        torch.testing.assert_close(product.double(), expected, rtol=1e-5, atol=1e-5)


def test_what_is_not_merged(wide):
    """Packed weights, other kinds of adapters, one tensor as embeddings and head, whole models, hooked layers."""
    base = AutoModelForCausalLM.from_pretrained(wide.base, quantization_config=nf4())
    packed = get_peft_model(base, lora(task_type="CAUSAL_LM"))
    tied = get_peft_model(make_llama(), lora(target_modules=["lm_head"], task_type="CAUSAL_LM"))
    assert tied.get_base_model().config.tie_word_embeddings
    for network, adapter in ((packed, "default"), (tied, "default"), (pair(use_dora=True)[1], "default")):
        fuse_lora(network)
        assert mergeable(network, adapter) == []
    assert mergeable(make_llama(), None) == mergeable(pair()[1], None) == []
    hooked = pair()[1]
    assert len(mergeable(hooked, "other")) == 14
    first, second, *_ = fused_layers(hooked)
    first.base_layer.register_forward_hook(lambda *_: None)
    second.forward = second.forward  # as accelerate does, to move weights
    assert len(mergeable(hooked, "other")) == 12
