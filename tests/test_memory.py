"""Predicted memory against what real tensors take, and measured memory against what was asked for."""

import copy
import inspect
from collections import Counter
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import cache, partial, wraps

import pytest
import torch
import trl.kernels.chunked_logprob
from conftest import make_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from ppo_helpers import config, lora, save_reward_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, Qwen2Config

from instructgpt_trl import PPOTrainer, memory
from instructgpt_trl._trl import cache_with_room, kernels_of_a_gpu, sampled_by_cdf
from instructgpt_trl.data.episodes import Episodes
from instructgpt_trl.data.sharing import share_prompts
from instructgpt_trl.memory import PARTS, Load, largest, peak, predict
from instructgpt_trl.models.lora import fuse_lora, merged_lora
from instructgpt_trl.models.packed import PackedLinear
from instructgpt_trl.models.roles import Role
from instructgpt_trl.peak_memory import PeakMemory, traced_peak

SHAPE = dict(hidden=32, num_hidden_layers=6)
LOAD = Load("ppo_ptx", rows=3, prompt=20, completion=30, sampled=3, ptx_length=64)


def test_traced_peak_is_what_is_alive_at_once():
    given = torch.zeros(10**6)

    def run():
        a = torch.zeros(1000)  # 4,000 bytes
        b = a + given[:1000]  # 8,000
        del a  # 4,000
        c = torch.zeros(500, dtype=torch.float64)  # 8,000
        d = b.view(10, 100).t()  # a view takes nothing
        e = d[:5].half()  # 50 numbers of two bytes: 8,100
        del b, c, d  # e keeps its own
        return e, torch.zeros(100)

    assert traced_peak(run) == 8100


def real_batch(load: Load) -> Episodes:
    """One row is padded, so that attention has a mask."""
    batch = memory._episodes(load.rows, load.prompt, load.completion)
    batch["completion_lengths"][0] -= 1
    batch["mask"][0, -1] = False
    return batch


def real_training_peak(role: Role, load: Load, method) -> int:
    """Bytes of a pass on real tensors, behind a first one that made the gradients."""
    batch = real_batch(load)
    for _ in range(2):
        found = memory._training_peak(role, lambda: method(role, batch))
    return found


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("adapters", [True, False])
@pytest.mark.parametrize("stage", ["reward", "ppo_ptx"])
def test_passes_without_data_take_what_real_ones_take(stage, adapters, checkpointing):
    """Six layers, carried on from one and two."""
    shape = lora(target_modules="all-linear", task_type="CAUSAL_LM") if adapters else None
    load = replace(LOAD, stage=stage, lora=shape, checkpointing=checkpointing, ptx_length=0)
    model = make_llama(**SHAPE, vocab=5000)
    settings = copy.deepcopy(model.config)
    memory.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    network = with_adapters(model, shape) if adapters else model
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        if adapters:
            network.enable_input_require_grads()
    network.train()
    methods = {
        "reward": [memory._scores],
        "ppo_ptx": [lambda role, batch: role.values(batch)[0], lambda role, batch: role.logprobs(batch)[0]],
    }[stage]
    role = Role(network, "default" if load.lora is not None else None, nn.Linear(SHAPE["hidden"], 1))
    expected = max(real_training_peak(role, load, method) for method in methods)
    parts = predict(settings, load)
    assert parts["activations"] + parts["logits chunk"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("adapters, rows", [(True, 3), (False, 40), (False, 1)])
def test_a_graph_that_waits_is_there_before_the_gradients(adapters, rows):
    """Without checkpointing the value model's graph waits for the policy's pass; gradients come when graphs go."""
    shape = lora(target_modules="all-linear", task_type="CAUSAL_LM") if adapters else None
    load = replace(LOAD, lora=shape, checkpointing=False, ptx_length=0, rows=rows, rollout=rows)
    model = make_llama(**SHAPE, vocab=5000)
    settings = copy.deepcopy(model.config)
    memory.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    network = with_adapters(model, shape) if adapters else model
    role = Role(network.train(), "default" if adapters else None, nn.Linear(SHAPE["hidden"], 1))
    batch = real_batch(load)

    def update():
        waits = role.values(batch)[0]
        role.logprobs(batch)[0].sum().backward()
        waits.sum().backward()

    update()
    network.zero_grad()
    parts = predict(settings, load)
    in_turns = predict(settings, replace(load, rollout=2 * rows))
    found = traced_peak(update)
    predicted = sum(parts[name] for name in ("gradients", "activations", "logits chunk"))
    if rows == 1:  # gradients are larger than a graph, and hide it
        assert parts == in_turns and found < predicted
    else:
        assert parts["activations"] > 1.5 * in_turns["activations"] and predicted == pytest.approx(found, rel=0.01)


def with_adapters(model: PreTrainedModel, shape: LoraConfig) -> PeftModel:
    network = get_peft_model(model, shape)
    fuse_lora(network)
    return network


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> str:
    """A folder of a model that is wide enough to be quantised."""
    pytest.importorskip("bitsandbytes")
    path = str(tmp_path_factory.mktemp("packed"))
    make_llama(hidden=64, num_hidden_layers=4).save_pretrained(path)
    return path


def quantised_peak(path: str, load: Load) -> int:
    """Bytes of a value model's pass in which bitsandbytes and PEFT work on real tensors."""
    options = {4: dict(load_in_4bit=True, bnb_4bit_compute_dtype=load.dtype), 8: dict(load_in_8bit=True)}[load.bits]
    quantization = BitsAndBytesConfig(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, **options)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=load.dtype, quantization_config=quantization)
    network = with_adapters(model, load.lora)
    if load.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        network.enable_input_require_grads()
    autocast = nullcontext if load.compute == torch.float32 else partial(torch.autocast, "cpu", load.compute)
    role = Role(network.train(), "default", nn.Linear(64, 1), autocast)
    return real_training_peak(role, load, lambda role, batch: role.values(batch)[0])


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_passes_without_data_take_what_bitsandbytes_takes(packed, bits, checkpointing):
    shape = lora(target_modules="all-linear", task_type="CAUSAL_LM")
    load = replace(LOAD, bits=bits, lora=shape, checkpointing=checkpointing, sampled=0, ptx_length=0)
    found = predict(AutoConfig.from_pretrained(packed), load)["activations"]
    assert found == pytest.approx(quantised_peak(packed, load), rel=1e-3)


@pytest.mark.parametrize("cuda", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_in_mixed_precision_adapters_of_4_bits_take_what_real_ones_take(packed, checkpointing, cuda):
    """PEFT looks at a flag of CUDA's that can be set without any; operations are a CPU's."""
    shape = lora(target_modules="all-linear", task_type="CAUSAL_LM")
    load = replace(LOAD, bits=4, lora=shape, checkpointing=checkpointing, sampled=0, ptx_length=0, rows=16)
    load = replace(load, dtype=torch.bfloat16, compute=torch.bfloat16, cuda=cuda)
    torch.set_autocast_enabled("cuda", cuda)
    try:
        measured = quantised_peak(packed, load)
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert predict(AutoConfig.from_pretrained(packed), load)["activations"] == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("on_a_gpu, bytes_an_element", [(True, 4 + 1), (False, 4 + 4)])
def test_dropout_keeps_a_byte_an_element_on_a_gpu(on_a_gpu, bytes_an_element):
    """Its output, and what it dropped."""
    x = torch.ones(1000, requires_grad=True)
    with kernels_of_a_gpu() if on_a_gpu else nullcontext():
        kept = []
        assert traced_peak(lambda: kept.append(nn.Dropout(0.1)(x))) == 1000 * bytes_an_element
    assert torch.nn.functional.dropout.__name__ == "dropout"


@pytest.mark.parametrize("shape", [None, lora(task_type="CAUSAL_LM")])
def test_one_tile_of_the_head_stands_for_all(shape, monkeypatch):
    """Ten tiles of 512 words: the same prediction whether all of them are read, forward and back, or the first."""
    settings, load = make_llama(**{**SHAPE, "vocab": 5000}).config, replace(LOAD, lora=shape, sampled=0)
    kernels, read = trl.kernels.chunked_logprob, Counter()

    def counted(name):
        fold = getattr(kernels, name)
        signature = inspect.signature(fold)

        @wraps(fold)
        def count(*args, **kwargs):
            read[name, signature.bind(*args, **kwargs).arguments["vocab_start"]] += 1
            fold(*args, **kwargs)

        monkeypatch.setattr(kernels, name, count)

    for name in ("_forward_tile", "_backward_tile"):
        counted(name)
    found, first = predict(settings, load), dict(read)
    assert {start for _, start in first} == {0} and len(first) == 2
    read.clear()
    monkeypatch.setattr(memory, "one_tile_read", nullcontext)
    assert predict(settings, load) == found
    assert read == {(name, start): first[name, 0] for name, _ in first for start in range(0, 5000, 512)}


def test_ppo_is_predicted_without_dropout_and_what_trains_with_it():
    settings = make_llama(**SHAPE).config
    shapes = [lora(target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=p) for p in (0.0, 0.1)]
    for stage, same in (("ppo_ptx", True), ("reward", False)):
        without, with_it = (predict(settings, replace(LOAD, stage=stage, lora=shape, sampled=0)) for shape in shapes)
        assert (without["activations"] == with_it["activations"]) == same


def test_completions_that_share_a_prompt_take_what_real_ones_take():
    """Two prompts of four completions: 2 x (20 + 4 * 30) tokens and not 8 * 50."""
    shape = lora(target_modules="all-linear", task_type="CAUSAL_LM")
    load = replace(LOAD, stage="reward", rows=8, shared=4, sampled=0, lora=shape)
    model = make_llama(**SHAPE)
    settings = copy.deepcopy(model.config)
    network = with_adapters(model, shape)
    model.activation_checkpointing_enable({"use_reentrant": False})
    network.enable_input_require_grads()
    role = Role(network.train(), "default", nn.Linear(SHAPE["hidden"], 1))
    batch, _ = share_prompts([[0] * 20] * 2, [[[0] * 30] * 4] * 2, 0)
    for _ in range(2):
        expected = memory._training_peak(role, lambda: memory._scores(role, batch))
    assert predict(settings, load)["activations"] == pytest.approx(expected, rel=1e-3)
    alone = predict(settings, replace(load, shared=1))
    assert predict(settings, load)["activations"] < 0.85 * alone["activations"]
    settings.sliding_window = 8
    assert predict(settings, load) == alone


@pytest.mark.parametrize("prompt, completion", [(20, 30), (60, 4)])
@pytest.mark.parametrize("vocab", [300, 5000])
@pytest.mark.parametrize("adapters, checkpointing", [(True, True), (True, False), (False, True)])
def test_sampling_without_data_takes_what_generate_takes(adapters, checkpointing, vocab, prompt, completion):
    """Six layers, carried on from two and three. Few are the bytes of masks and ids, which are not counted."""
    shape = lora(target_modules="all-linear", task_type="CAUSAL_LM") if adapters else None
    load = replace(LOAD, lora=shape, sampled=8, prompt=prompt, completion=completion, checkpointing=checkpointing)
    model = make_llama(**SHAPE, vocab=vocab)
    predicted = predict(model.config, load)["sampling"]
    network = with_adapters(model, shape) if adapters else model
    ids = torch.randint(3, 250, (8, prompt))
    options = dict(do_sample=True, top_k=0, eos_token_id=None, pad_token_id=0, max_new_tokens=completion)

    def sample() -> None:
        role = Role(network.eval(), "default")
        with torch.no_grad(), role.active(), sampled_by_cdf(), ExitStack() as inside:
            if not checkpointing:
                inside.enter_context(merged_lora(network, "default"))
                inside.enter_context(cache_with_room())
            role.model.generate(input_ids=ids, **options)

    assert predicted == pytest.approx(traced_peak(sample), rel=0.05)


@pytest.mark.parametrize(
    "kinds, checkpointing", [(None, True), (["sliding_attention", "sliding_attention", "full_attention"] * 3, False)]
)
def test_all_layers_are_carried_on_from_few_exactly(kinds, checkpointing):
    """As many layers as it takes, all of them traced, against few."""
    kinds_ = {} if kinds is None else {"layer_types": kinds, "sliding_window": 16, "use_sliding_window": True}
    config = Qwen2Config(hidden_size=32, num_hidden_layers=9, num_attention_heads=2, num_key_value_heads=1, **kinds_)
    shape = lora(target_modules="all-linear", task_type="CAUSAL_LM")
    load = replace(LOAD, lora=shape, checkpointing=checkpointing)
    every = memory._parts(config, load) | memory._sampling(config, load)
    every["sampling"] = max(every["reading"], every["decoding"])
    every["logits chunk"] = every["whole"] - every["activations"]
    assert predict(config, load) == {name: every[name] for name in PARTS}


@pytest.mark.parametrize(
    "policy, reward, dtype",
    [
        ("sft", "adapter", torch.float32),
        ("sft", "adapter", torch.bfloat16),
        ("sft", "full", torch.float32),
        ("base", "full", torch.float32),
        ("base", "full", torch.bfloat16),
    ],
)
def test_what_is_always_there_is_what_the_trainer_holds(folders, tmp_path, prompts, texts, policy, reward, dtype):
    adapters, own_base = policy == "sft", policy == "sft" and reward == "full"
    if reward == "full":
        reward = folders.reward_full
    else:
        reward = save_reward_model(folders.base, tmp_path / "reward", adapter=True, r=2)
    policy = getattr(folders, policy)
    args = config(tmp_path, max_steps=1, model_init_kwargs={"dtype": dtype})
    trainer = PPOTrainer(policy, reward_model=reward, args=args, train_dataset=prompts, ptx_dataset=texts)
    trainer.train()
    held = {id(t): t for role in trainer.roles for t in (*role.network.parameters(), *role.network.buffers())}
    held |= {id(p): p for role in trainer.roles if role.head is not None for p in role.head.parameters()}
    held |= {id(t): t for t in trainer.ema.averages.values()}
    trained = [*trainer._policy_parameters.values(), *trainer._value_parameters.values()]
    before_ptx = [p for p in trainer._policy_parameters.values()]
    states = [t for state in trainer.optimizer.state.values() for t in state.values() if t.dim()]
    load = replace(LOAD, lora=lora(task_type="CAUSAL_LM") if adapters else None, dtype=dtype, reward_base=own_base)
    parts = predict(make_llama().config, load)
    # A copied network shares a buffer of its rotary embedding, of 16 bytes
    assert parts["base"] + parts["adapters and heads"] == pytest.approx(size(held.values()), rel=1e-3)
    assert parts["gradients"] == size(trained) + size(before_ptx)
    assert parts["optimizer"] == size(states)


def size(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def test_a_quantised_base_takes_what_bitsandbytes_takes():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(256, 512)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    scales = state.absmax.numel() + state.state2.absmax.numel() * 4
    shape = lora(target_modules="all-linear", task_type="CAUSAL_LM")
    linear = PackedLinear(nn.Linear(512, 256, bias=False, device="meta"), 4, torch.float32, cuda=False)
    assert linear.weight.numel() == packed.numel() + scales
    model = make_llama(**SHAPE, vocab=5000)
    whole, less = (predict(model.config, replace(LOAD, lora=shape, bits=bits))["base"] for bits in (None, 4))
    linears = sum(m.weight.numel() for m in model.model.modules() if isinstance(m, nn.Linear))
    assert whole - less == pytest.approx(linears * (4 - 0.5 - 1 / 64), rel=1e-3)


@pytest.mark.parametrize("adapters", [True, False])
def test_a_reward_model_has_no_head_of_the_language_model(adapters):
    shape = lora(target_modules="all-linear", task_type="CAUSAL_LM") if adapters else None
    untied = make_llama(**SHAPE, vocab=5000, tie_word_embeddings=False).config
    sft, reward = (predict(untied, replace(LOAD, stage=stage, lora=shape))["base"] for stage in ("sft", "reward"))
    assert sft - reward == 5000 * SHAPE["hidden"] * 4


def test_the_vocabulary_costs_the_head_and_what_sampling_needs():
    """Issue: beyond the head itself, no tensor of batch x time x vocabulary."""
    shape = lora(target_modules="all-linear", task_type="CAUSAL_LM")
    small, large = (
        predict(make_llama(hidden=32, vocab=vocab).config, replace(LOAD, lora=shape)) for vocab in (4096, 65536)
    )
    assert large["activations"] == small["activations"]
    assert large["logits chunk"] == small["logits chunk"]
    buffers = LOAD.sampled * (65536 - 4096) * 4
    # Logits, scores, probabilities new and old, and the sums of a row of them
    assert large["sampling"] - small["sampling"] <= 4 * buffers + 8 * (65536 - 4096) + 2**12


def test_the_largest_load_fits_and_the_next_one_does_not():
    shape_config = make_llama(hidden=32).config
    shape = lora(target_modules="all-linear", task_type="CAUSAL_LM")

    def load(n: int) -> Load:
        return replace(LOAD, stage="reward", rows=n, lora=shape, checkpointing=False)

    @cache
    def peak_of(n: int) -> int:
        return peak(predict(shape_config, load(n)))

    for rows in (1, 50):
        assert largest(peak_of, peak_of(rows) + 1) == rows
    assert largest(peak_of, 1000) == 0
    assert largest(peak_of, 10**9, most=5) == 5


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 500)), min_size=1, max_size=3),
    st.integers(0, 1),
    st.integers(0, 20_000),
    st.sampled_from([1, 5, 64, 512]),
)
def test_the_largest_is_found_in_few_steps_wherever_another_part_takes_over(lines, bent, limit, most):
    def size(n: int) -> int:
        return max(slope * n + start for slope, start in lines) + bent * n * n

    asked = []

    def peak_of(n: int) -> int:
        asked.append(n)
        return size(n)

    found = largest(peak_of, limit, most)
    assert found == max((n for n in range(1, most + 1) if size(n) <= limit), default=0)
    assert len(asked) == len(set(asked)) <= 12


def test_measured_memory_is_what_was_taken_and_the_peak_of_it():
    with PeakMemory(interval=0.002) as measured:
        taken = torch.ones(64 * 2**20 // 4)
        torch.mm(torch.ones(800, 800), torch.ones(800, 800))
        del taken
        for _ in range(30):
            torch.mm(torch.ones(800, 800), torch.ones(800, 800))
    assert 64 <= measured.bytes / 2**20 <= 100


def test_on_a_gpu_the_head_has_trls_tile_and_there_is_a_context():
    """A tile of 32,768 words for each of 3 x 49 positions, and the gradient of their hidden states."""
    shape = lora(target_modules="all-linear", task_type="CAUSAL_LM")
    here, gpu = (
        predict(make_llama(vocab=65536).config, replace(LOAD, lora=shape, cuda=cuda)) for cuda in (False, True)
    )
    assert gpu["context"] > here["context"] > 0
    assert gpu["logits chunk"] >= LOAD.rows * 49 * 32768 * 4
    assert {part: gpu[part] for part in PARTS[:5]} == {part: here[part] for part in PARTS[:5]}
