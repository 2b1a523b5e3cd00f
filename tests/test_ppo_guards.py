"""What `PPOTrainer` samples from, and what it refuses."""

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from conftest import make_llama, make_tokenizer
from datasets import Dataset
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from ppo_helpers import (
    EOS,
    assert_equal,
    config,
    lora,
    mean_id,
    plain_policy,
    store_completions,
    with_function,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationMixin, OPTConfig, OPTForCausalLM
from transformers.cache_utils import DynamicLayer

from instructgpt_trl import PPOConfig, PPOTrainer
from instructgpt_trl._trl import ROOM, cache_with_room, sampled_by_cdf
from instructgpt_trl.data import InputError, as_conversations
from instructgpt_trl.data.episodes import last_token
from instructgpt_trl.ppo_checks import check_evaluation
from instructgpt_trl.processes import UNTESTED

CUT = {
    "min_new_tokens": 5,
    "min_length": 20,
    "top_k": 20,
    "top_p": 0.5,
    "min_p": 0.2,
    "typical_p": 0.5,
    "epsilon_cutoff": 0.01,
    "eta_cutoff": 0.01,
    "temperature": 0.3,
    "repetition_penalty": 1.5,
    "no_repeat_ngram_size": 2,
    "suppress_tokens": [5, 6],
    "begin_suppress_tokens": [EOS],
    "bad_words_ids": [[5]],
    "sequence_bias": [[[5], -5.0]],
    "exponential_decay_length_penalty": (2, 1.5),
    "forced_eos_token_id": EOS,
    "guidance_scale": 1.5,
    "remove_invalid_values": True,
    "renormalize_logits": True,
}


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_pitfall_18_the_models_own_generation_config_does_not_cut_sampling(
    folders, tmp_path, monkeypatch, prompts, kind
):
    """`generate` fills what a config leaves open from the model's own generation_config; not here."""
    used = []
    processors = GenerationMixin._get_logits_processor

    def noted(self, *args, **kwargs):
        used.append(processors(self, *args, **kwargs))
        return used[-1]

    monkeypatch.setattr(GenerationMixin, "_get_logits_processor", noted)
    model = AutoModelForCausalLM.from_pretrained(folders.base)
    for name, value in CUT.items():
        setattr(model.generation_config, name, value)
    own = model.generation_config.to_dict()
    peft_config = lora() if kind == "lora" else None
    trainer = with_function(model, tmp_path, prompts, peft_config=peft_config, temperature=0.7, max_steps=1)
    trainer.train()
    assert len(used) == 1
    left = {type(processor).__name__: vars(processor) for processor in used[0]}
    assert left == {"TemperatureLogitsWarper": {"temperature": 0.7}}
    assert model.generation_config.to_dict() == own  # what is saved keeps the model's own


def test_pitfall_18_samples_follow_the_policy(folders, tmp_path, prompts):
    """3,000 first tokens of one prompt against the softmax, at a temperature: chi-squared of the ten likeliest."""
    trainer = with_function(
        folders.sft, tmp_path, prompts, temperature=0.5, max_completion_length=1, per_device_train_batch_size=1
    )
    trainer.model.train()
    torch.manual_seed(0)
    # Every other row is a longer prompt, so that the others are padded on the left
    ids, completions, _ = trainer._generate(["prompt 3", "a prompt that is longer"] * 3000)
    ids, completions = ids[::2], completions[::2]
    first = torch.tensor([completion[0] for completion in completions])
    plain = plain_policy(folders, "sft")
    with torch.no_grad():
        probs = (plain(torch.tensor([ids[0]])).logits[0, -1].double() / 0.5).softmax(-1)
    top, where = probs.topk(10)
    counts = (first[:, None] == where).sum(0).double()
    observed = torch.cat([counts, 3000 - counts.sum(0, keepdim=True)])
    expected = 3000 * torch.cat([top, 1 - top.sum(0, keepdim=True)])
    assert expected.min() > 20
    assert ((observed - expected) ** 2 / expected).sum() < 35  # 10 degrees of freedom: p = 1e-4


def test_numbers_drawn_by_the_sum_of_probabilities():
    """Of 4,000 rows: chi-squared of three words, none of probability 0; what torch refuses, it says."""
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    torch.manual_seed(0)
    multinomial = torch.multinomial
    with sampled_by_cdf():
        drawn = torch.multinomial(probabilities.expand(4000, 6), num_samples=1)
        assert torch.multinomial(probabilities.expand(5, 6), 3).shape == (5, 3)  # more than one is torch's own
        for wrong, said in (([0.5, torch.nan], "inf"), ([0.5, torch.inf], "inf"), ([0.0, 0.0], "sum")):
            with pytest.raises(RuntimeError, match=said):
                torch.multinomial(torch.tensor([wrong]), num_samples=1)
    assert torch.multinomial is multinomial
    assert drawn.shape == (4000, 1) and drawn.dtype == torch.int64
    counts = drawn.flatten().bincount(minlength=6).double()
    assert counts[probabilities == 0].sum() == 0
    expected = 4000 * probabilities[probabilities > 0]
    assert ((counts[probabilities > 0] - expected) ** 2 / expected).sum() < 18.4  # 2 degrees of freedom: p = 1e-4


def test_a_cache_with_room_holds_the_same():
    """Step by step, past the room, cut, repeated and in another order; its tensors are made once in `ROOM` tokens."""
    generator, addresses = torch.Generator().manual_seed(0), []
    plain, roomy, update = DynamicLayer(), DynamicLayer(), DynamicLayer.update

    def step(tokens: int = 1) -> None:
        new = torch.randn(2, *plain.keys.shape[:2] if plain.is_initialized else (3, 2), tokens, 4, generator=generator)
        expected = update(plain, *new)
        got = roomy.update(*new)
        addresses.append(got[0].data_ptr())
        for one, other in zip(got, expected, strict=True):
            assert torch.equal(one, other)
        assert roomy.get_seq_length() == plain.get_seq_length() == expected[0].size(-2)

    with cache_with_room():
        step(tokens=5)
        for _ in range(2 * (ROOM + 1)):
            step()
        assert len(set(addresses)) == 3
        for changed in (
            lambda layer: layer.crop(-3),
            lambda layer: layer.batch_repeat_interleave(2),
            lambda layer: layer.reorder_cache(torch.tensor([4, 0, 1, 1, 5, 2])),
            lambda layer: layer.batch_select_indices(torch.tensor([0, 3])),
        ):
            for layer in (plain, roomy):
                changed(layer)
            for _ in range(3):
                step(tokens=2)
    assert DynamicLayer.update is update


@pytest.mark.parametrize("checkpointing", [False, True])
def test_how_it_samples(folders, tmp_path, monkeypatch, prompts, checkpointing):
    """By the sum of probabilities; past the adapters and into a cache with room, where memory is given for time."""
    sample, multinomial, update, seen = GenerationMixin._sample, torch.multinomial, DynamicLayer.update, []

    def noted(model, *args, **kwargs):
        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        past = {"forward" in vars(layer) for layer in layers}
        seen.append((torch.multinomial is not multinomial, past, DynamicLayer.update is not update))
        return sample(model, *args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "_sample", noted)
    trainer = with_function(folders.sft, tmp_path, prompts, max_steps=1, gradient_checkpointing=checkpointing)
    trainer.train()
    assert seen == [(True, {not checkpointing}, not checkpointing)]
    assert torch.multinomial is multinomial and DynamicLayer.update is update
    assert not any("forward" in vars(m) for m in trainer.model.modules() if isinstance(m, LoraLayer))


def test_every_eos_of_the_model_ends_a_completion(folders, tmp_path, monkeypatch, prompts):
    model = AutoModelForCausalLM.from_pretrained(folders.base)
    model.generation_config.eos_token_id = [EOS, 77]
    trainer = with_function(model, tmp_path, prompts, max_completion_length=40)
    trainer.model.train()
    episodes, _ = trainer._sample([{"prompt": "a"}] * 64)
    for row in range(64):
        length = int(episodes["prompt_lengths"][row])
        ids = episodes["input_ids"][row, length : length + int(episodes["completion_lengths"][row])].tolist()
        ends = [i for i, token in enumerate(ids) if token in (EOS, 77)]
        assert ends in ([], [len(ids) - 1])
        assert bool(episodes["ended"][row]) == bool(ends)
    assert 0 < int(episodes["ended"].sum()) < 64


@pytest.mark.parametrize("conversational", [True, False])
def test_pitfall_06_the_policy_stops_where_the_templates_turn_ends(tmp_path, prompts, conversational):
    """As a base model under ChatML, whose own EOS is another token: the reward model's rows end at the turn's end."""
    tokenizer, end = make_tokenizer(extra=("<end>",)), 258
    tokenizer.chat_template = tokenizer.chat_template.replace("<eos>", "<end>")
    rows = as_conversations(prompts) if conversational else prompts
    args = config(tmp_path, max_completion_length=60)
    model = make_llama(vocab=259)
    trainer = PPOTrainer(model, mean_id, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.model.train()
    episodes, _ = trainer._sample([rows[0]] * 64)
    ids = episodes["input_ids"][0, : episodes["prompt_lengths"][0]].tolist()
    assert (end in ids) == conversational
    stops = [EOS, end] if conversational else [EOS]
    last = episodes["input_ids"].gather(1, last_token(episodes)[:, None])[:, 0]
    assert torch.equal(episodes["ended"], torch.isin(last, torch.tensor(stops)))
    ends = (last == end).sum().item()
    assert ends > 3 if conversational else ends == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("clip", [None, (-1.0, 1.0)])
def test_pitfall_18_a_score_that_is_no_number_stops_the_run(folders, tmp_path, monkeypatch, prompts, value, clip):
    store_completions(monkeypatch)
    calls = []

    def reward(completions, **kwargs):
        calls.append(len(completions))
        return [1.0, value if len(calls) == 2 else 2.0, 3.0, 4.0]

    trainer = with_function(folders.base, tmp_path, prompts, reward, max_steps=6, reward_clip_range=clip)
    with pytest.raises(RuntimeError, match="step 2.*score"):
        trainer.train()


def test_pitfall_18_an_asynchronous_function_too(folders, tmp_path, monkeypatch, prompts):
    store_completions(monkeypatch)

    async def reward(completions, **kwargs):
        return [float("nan")] * len(completions)

    with pytest.raises(RuntimeError, match="step 0.*score"):
        with_function(folders.base, tmp_path, prompts, reward).train()


@pytest.mark.parametrize("index, name", [(0, "reward_model"), (1, "reward_model_1")])
def test_pitfall_18_a_reward_model_that_says_nan_stops_the_run(folders, tmp_path, monkeypatch, prompts, index, name):
    store_completions(monkeypatch)
    rewards = [folders.reward_adapter, folders.reward_full]
    trainer = PPOTrainer(folders.sft, reward_model=rewards, args=config(tmp_path), train_dataset=prompts)
    spoiled = torch.full_like(trainer.roles.rewards[index].head.weight, torch.nan)
    trainer._check_start = lambda: None  # which sees weights that are NaN
    with torch.no_grad():
        trainer.roles.rewards[index].head.weight.copy_(spoiled)
    with pytest.raises(RuntimeError, match=f"step 0: a score of '{name}' is NaN"):
        trainer.train()


def test_weights_that_are_nan_are_refused_before_anything_is_sampled(folders, tmp_path, prompts):
    trainer = PPOTrainer(
        folders.sft, reward_model=folders.reward_adapter, args=config(tmp_path), train_dataset=prompts
    )
    with torch.no_grad():
        trainer.roles.rewards[0].head.weight.fill_(torch.nan)
    with pytest.raises(InputError, match="score.weight is NaN or infinite before the first step"):
        trainer.train()


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
@pytest.mark.parametrize("role", ["policy", "value"])
def test_pitfall_18_a_gradient_that_is_no_number_stops_the_run_before_the_step(
    folders, tmp_path, monkeypatch, prompts, role, max_grad_norm
):
    store_completions(monkeypatch)
    trainer = with_function(folders.base, tmp_path, prompts, max_grad_norm=max_grad_norm)
    weights = {f"{r} {k}": p for r in ("policy", "value") for k, p in getattr(trainer.roles, r).parameters().items()}
    hit = next(p for name, p in weights.items() if name.startswith(role) and "layers.0.mlp.down_proj" in name)
    hit.register_hook(lambda grad: grad * float("nan"))
    before = {name: p.detach().clone() for name, p in weights.items()}
    with pytest.raises(RuntimeError, match=f"step 0: the {role}.*gradient of .* is NaN"):
        trainer.train()
    assert_equal({name: p.detach() for name, p in weights.items()}, before)


def test_pitfall_18_all_eos_and_empty_completions_stop_the_run(folders, tmp_path, monkeypatch, prompts):
    store_completions(monkeypatch, lambda _: [EOS])
    with pytest.raises(RuntimeError, match="step 0: every completion is EOS alone"):
        with_function(folders.base, tmp_path, prompts).train()
    store_completions(monkeypatch, lambda _: [])
    with pytest.raises(RuntimeError, match="step 0: an empty completion"):
        with_function(folders.base, tmp_path, prompts).train()


def test_pitfall_18_an_evaluation_batch_of_one_may_be_eos_alone(folders, tmp_path, monkeypatch, prompts):
    """The last, small batch of an evaluation is no sign of a collapse."""
    completions = iter([[5, EOS]] * 8 + [[EOS]])
    store_completions(monkeypatch, lambda _: next(completions))
    trainer = with_function(folders.base, tmp_path, prompts, lambda completions, **_: [1.0] * len(completions))
    trainer.args.per_device_eval_batch_size = 8
    assert trainer.evaluate(prompts.select(range(9)))["eval_completions/mean_length"] == pytest.approx(17 / 9)


def test_pitfall_18_a_dataset_smaller_than_a_batch_is_an_error(folders, tmp_path, prompts):
    with pytest.raises(InputError, match="3 prompts, less than one batch of 4"):
        with_function(folders.base, tmp_path, prompts.select(range(3)))
    with_function(folders.base, tmp_path, prompts.select(range(4)))
    with_function(folders.base, tmp_path, prompts.select(range(2)), num_generations=2)


def test_pitfall_13_long_prompts_are_dropped_counted_and_named(folders, tmp_path, prompts, caplog):
    """`prompt i` and i dots: 8 + i bytes, from 10 on 9 + i."""
    caplog.set_level(logging.WARNING)
    logging.getLogger("transformers").propagate = True
    trainer = with_function(folders.base, tmp_path, prompts, max_prompt_length=17)
    assert trainer.train_dataset["prompt"] == prompts["prompt"][:10]
    assert "6 of 16 prompts of train_dataset over 17 tokens dropped: rows 10 (" in caplog.text
    with pytest.raises(InputError, match="raise max_prompt_length"):
        with_function(folders.base, tmp_path, prompts, max_prompt_length=3)
    with pytest.raises(InputError, match="2 prompts, less than one batch of 4"):
        with_function(folders.base, tmp_path, prompts, max_prompt_length=9)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"args": object()}, "expected a PPOConfig"),
        ({"reward_funcs": None}, "nothing to learn from"),
        ({"reward_funcs": [mean_id, 3]}, "expected functions, reward models or their folders, got int"),
        ({"model": 3}, "model: expected a folder, a hub id or a model, got int"),
        ({"train_dataset": None}, "train_dataset is missing"),
        ({"train_dataset": Dataset.from_list([{"text": "a"}])}, "column 'prompt' is missing"),
        ({"train_dataset": Dataset.from_list([{"prompt": " "}])}, "row 0.*the text is empty"),
        ({"eval_dataset": Dataset.from_list([{"text": "a"}])}, "eval_dataset, row 0"),
        ({"eval_dataset": {"x": Dataset.from_list([{"text": "a"}])}}, r"eval_dataset\['x'\], row 0"),
        ({"ptx_dataset": Dataset.from_list([{"prompt": "a"}])}, "ptx_dataset, row 0"),
        ({"model": "/no/such/folder"}, "/no/such/folder"),
        ({"reward_model": "/no/such/reward"}, "/no/such/reward"),
    ],
)
def test_bad_arguments_are_one_line(folders, tmp_path, prompts, change, named):
    arguments = dict(model=folders.base, reward_funcs=mean_id, args=config(tmp_path / "out"), train_dataset=prompts)
    with pytest.raises(InputError, match=named) as error:
        PPOTrainer(**{**arguments, **change})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_wrong_numbers_of_weights_and_an_optimizer_from_outside(folders, tmp_path, prompts):
    with pytest.raises(InputError, match="reward_weights: expected 1 numbers"):
        with_function(folders.base, tmp_path, prompts, reward_weights=[1.0, 2.0])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(InputError, match="optimizers"):
        PPOTrainer(
            model=folders.base,
            reward_funcs=mean_id,
            args=config(tmp_path),
            train_dataset=prompts,
            optimizers=(optimizer, None),
        )


@pytest.mark.parametrize("fails", [False, True])
def test_the_callers_config_is_left_as_it_was(folders, tmp_path, prompts, fails):
    """A constructor that fails, in a notebook, must not leave a config without its KL penalty behind."""
    args = config(tmp_path, beta=0.3, model_init_kwargs={"dtype": "float32"})
    kwargs = {"peft_config": "not a config"} if fails else {}
    try:
        PPOTrainer(model=folders.base, reward_funcs=mean_id, args=args, train_dataset=prompts, **kwargs)
        assert not fails
    except TypeError:
        assert fails
    assert args.beta == 0.3 and args.model_init_kwargs == {"dtype": "float32"}


@pytest.mark.parametrize("longest, warned", [(232, False), (233, True)])
def test_prompts_and_completions_beyond_the_models_context_are_warned_of(
    folders, tmp_path, prompts, caplog, longest, warned
):
    """The tiny model has 256 positions."""
    caplog.set_level(logging.WARNING)
    logging.getLogger("transformers").propagate = True
    with_function(folders.base, tmp_path, prompts, max_completion_length=longest, max_prompt_length=24)
    assert ("together exceed the model's context of 256 tokens" in caplog.text) == warned


def test_generation_that_would_change_the_shared_base_is_refused(folders, tmp_path, prompts):
    with pytest.raises(InputError, match="generation_micro_batch_size: vLLM"):
        with_function(folders.base, tmp_path, prompts, use_vllm=True, generation_micro_batch_size=2)
    with pytest.raises(InputError, match="use_transformers_continuous_batching: TRL casts"):
        args = config(tmp_path, use_transformers_continuous_batching=True)
        args.bf16 = True  # which a config refuses without a GPU
        PPOTrainer(folders.base, reward_funcs=mean_id, args=args, train_dataset=prompts)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_adapters_whose_start_changes_the_base_are_refused(folders, tmp_path, prompts, start):
    """The reference, the reward model and the value model stand on it."""
    with pytest.raises(InputError, match=f"init_lora_weights='{start}' moves a part of the base's weights"):
        with_function(folders.base, tmp_path, prompts, peft_config=lora(init_lora_weights=start))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folders.base), lora(init_lora_weights=start))
    with pytest.raises(InputError, match=f"init_lora_weights='{start}' moves"):
        with_function(model, tmp_path, prompts)


@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_a_head_of_another_width_is_refused(folders, tmp_path, prompts, kind):
    reward = Path(shutil.copytree(folders.reward(kind), tmp_path / "reward"))
    file = reward / {"adapter": "adapter_model.safetensors", "full": "model.safetensors"}[kind]
    weights = load_file(file)
    (name,) = [name for name in weights if name.endswith("score.weight")]
    save_file({**weights, name: weights[name][:, :8].contiguous()}, file, {"format": "pt"})
    with pytest.raises(InputError, match="reward.*score.*(takes 8 numbers, and its network gives 16|\\[1, 8\\])"):
        args = config(tmp_path / "run")
        PPOTrainer(folders.sft, reward_model=str(reward), args=args, train_dataset=prompts)


def test_a_head_of_a_model_that_projects_its_states_fits(tmp_path, prompts):
    """OPT's smallest: a width of 16 inside, of 8 at both ends."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=258, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2)
    model = OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=8, max_position_embeddings=64, pad_token_id=256))
    args = config(tmp_path)
    trainer = PPOTrainer(model, mean_id, args=args, train_dataset=prompts, processing_class=make_tokenizer())
    assert trainer.roles.value.head.in_features == 8
    trainer.train()


@pytest.mark.parametrize(("processes", "count", "refused"), [(2, 2, True), (2, 1, False), (1, 2, False)])
def test_several_completions_a_prompt_are_evaluated_in_one_process(tmp_path, prompts, processes, count, refused):
    args = SimpleNamespace(world_size=processes, num_generations_eval=count, num_generations=2)
    check_evaluation(args, None)
    if not refused:
        check_evaluation(args, prompts)
        return
    with pytest.raises(InputError, match="num_generations_eval: 2 completions a prompt .* set it to 1"):
        check_evaluation(args, prompts)


def test_several_gpus_in_one_process_are_refused(folders, tmp_path, prompts, monkeypatch):
    monkeypatch.setattr(PPOConfig, "n_gpu", 2)
    with pytest.raises(InputError, match="on one GPU, got 2; .*CUDA_VISIBLE_DEVICES=0"):
        with_function(folders.base, tmp_path, prompts)


def test_images_are_refused(folders, tmp_path, prompts):
    with pytest.raises(InputError, match="column 'image': PPOTrainer trains on text"):
        with_function(folders.base, tmp_path, prompts.add_column("image", ["x.png"] * len(prompts)))


def test_pitfall_13_long_prompts_of_a_stream_are_named(folders, tmp_path, prompts, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    logging.getLogger("transformers").propagate = True
    store_completions(monkeypatch)
    stream = prompts.to_iterable_dataset()
    with_function(folders.base, tmp_path, stream, max_prompt_length=12, max_steps=2).train()
    assert "train_dataset, row 5: prompt of 13 tokens dropped, over 12" in caplog.text
    assert "row 4: prompt" not in caplog.text


def test_pitfall_13_rows_given_to_evaluate_are_checked_and_fitted(folders, tmp_path, prompts, monkeypatch):
    batches = store_completions(monkeypatch)
    trainer = with_function(folders.base, tmp_path, prompts, max_prompt_length=17)
    trainer.evaluate(prompts)
    assert sorted(len(ids) for batch in batches for ids, _ in batch) == [8 + i for i in range(10)]
    with pytest.raises(InputError, match="eval_dataset.*row 1"):
        trainer.evaluate(Dataset.from_list([{"prompt": "good"}, {"prompt": ""}]))


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.FSDP])
def test_deepspeed_and_fsdp_are_refused(folders, tmp_path, monkeypatch, prompts, kind):
    """Also to those who would try what nobody has tried."""
    monkeypatch.setenv(UNTESTED, "1")
    args = config(tmp_path)
    args.distributed_state = SimpleNamespace(**{**vars(args.distributed_state), "distributed_type": kind})
    with pytest.raises(InputError, match=f"does not run under {kind.value}"):
        PPOTrainer(folders.base, reward_funcs=mean_id, args=args, train_dataset=prompts)


def test_streamed_pretraining_text_is_refused_before_a_model_is_loaded(tmp_path, prompts, texts):
    with pytest.raises(InputError, match="ptx_dataset: .* load it without streaming"):
        with_function("no such model", tmp_path, prompts, ptx_dataset=texts.to_iterable_dataset())
