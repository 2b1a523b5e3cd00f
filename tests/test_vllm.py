"""
vLLM samples from the policy as it is at each rollout, in both modes, and nothing on the common base moves by it.

vLLM itself needs a GPU; in its place are an engine and a client with a model of their own, read from the disk under
the name that vLLM gets, whose weights change by what TRL sends alone.
"""

import os
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import trl.generation.vllm_generation as generation
from conftest import make_llama, make_tokenizer
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from ppo_helpers import LLAMA_TARGETS, config, lora, nf4, plain_logprobs, randomise, with_function
from transformers import AutoModelForCausalLM, TrainerCallback

from instructgpt_trl import PPOTrainer
from instructgpt_trl.data import InputError
from instructgpt_trl.models.lora import merged_parameters


class Sampler:
    """A model from a folder, its weights set by name, and samples of it that end at `stop_token_ids`."""

    def __init__(self, folder: str):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
        self.own = dict(self.model.named_parameters())
        self.syncs: list[list[str]] = []
        self.sampled: list[list[int]] = []

    def set(self, name: str, tensor: torch.Tensor) -> None:
        assert self.own[name].shape == tensor.shape
        self.own[name].data.copy_(tensor)
        self.syncs[-1].append(name)

    @torch.no_grad()
    def sample(self, prompt: list[int], temperature: float, max_tokens: int, stop_token_ids: list[int]) -> list[int]:
        ids = list(prompt)
        while len(ids) - len(prompt) < max_tokens and (len(ids) == len(prompt) or ids[-1] not in stop_token_ids):
            logits = self.model(torch.tensor([ids])).logits[0, -1]
            ids.append(torch.multinomial((logits / temperature).softmax(-1), 1).item())
        self.sampled.append(ids[len(prompt) :])
        return ids[len(prompt) :]


class Engine(Sampler):
    """What TRL uses of `vllm.LLM`."""

    def __init__(self, model: str, **settings):
        super().__init__(model)
        worker = SimpleNamespace(model_runner=SimpleNamespace(model=self))
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))
        self.syncs.append([])
        made.append(self)

    def load_weights(self, weights) -> None:
        for name, tensor in weights:
            self.set(name, tensor)

    def reset_prefix_cache(self) -> None:
        self.syncs.append([])  # TRL's last call of a sync

    def generate(self, prompts, sampling_params, use_tqdm):
        del sampling_params.n, sampling_params.logprobs
        settings = {name: getattr(sampling_params, name) for name in ("temperature", "max_tokens", "stop_token_ids")}
        rows = [row["prompt_token_ids"] for row in prompts]
        return [
            SimpleNamespace(
                prompt_token_ids=row,
                outputs=[SimpleNamespace(token_ids=self.sample(row, **settings), logprobs=None)],
            )
            for row in rows
        ]


class Client(Sampler):
    """What TRL uses of its `VLLMClient`, with the server behind it."""

    folder = ""

    def __init__(self, **settings):
        super().__init__(self.folder)
        made.append(self)

    def init_communicator(self, device) -> None:
        pass

    def update_named_params(self, metadata, parameters) -> None:
        self.syncs.append([])
        for (name, dtype, shape), (sent, tensor) in zip(metadata, parameters, strict=True):
            assert (name, dtype, shape) == (sent, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
            self.set(sent, tensor)

    def reset_prefix_cache(self) -> None:
        pass

    def generate(self, prompts, temperature, max_tokens, generation_kwargs, n, **others):
        assert n == 1
        stop = generation_kwargs["stop_token_ids"]
        sampled = [self.sample(row, temperature, max_tokens, stop) for row in prompts]
        return {"prompt_ids": prompts, "completion_ids": sampled, "logprobs": None}


made: list[Sampler] = []


@pytest.fixture(autouse=True)
def vllm(monkeypatch, folders):
    monkeypatch.setattr(generation, "is_vllm_available", lambda: True)
    monkeypatch.setattr(generation, "LLM", Engine, raising=False)
    monkeypatch.setattr(generation, "SamplingParams", SimpleNamespace, raising=False)
    monkeypatch.setattr(generation, "VLLMClient", Client)
    monkeypatch.setattr(Client, "folder", folders.base)
    with patch.dict(os.environ):  # where TRL writes what vLLM's processes go by
        yield
    made.clear()


def watched(trainer: PPOTrainer) -> list[float]:
    """Of each later rollout, how far its log-probs are from those of the model that it was sampled from, at most."""
    distances, rollout = [], trainer.rollout

    def compare(inputs):
        (sampler,) = made
        episodes = rollout(inputs)
        furthest = 0.0
        for row, logprobs in enumerate(episodes["logprobs"]):
            prompt, completion = (int(episodes[f"{name}_lengths"][row]) for name in ("prompt", "completion"))
            ids = episodes["input_ids"][row, : prompt + completion].tolist()
            assert ids[prompt:] in sampler.sampled
            with torch.no_grad():
                sampled = plain_logprobs(sampler.model, ids[:prompt], ids[prompt:], trainer.temperature)
            furthest = max(furthest, (logprobs[:completion] - sampled).abs().max().item())
        distances.append(furthest)
        return episodes

    trainer.rollout = compare
    return distances


@pytest.mark.parametrize("mode", ["colocate", "server"])
@pytest.mark.parametrize("policy", ["full", "fresh", "sft"])
def test_every_rollout_is_sampled_from_the_policy_as_it_is(folders, tmp_path, prompts, policy, mode):
    model, peft_config = folders.policy(policy)
    settings = dict(use_vllm=True, vllm_mode=mode, max_steps=6, learning_rate=0.05, temperature=0.8)
    trainer = with_function(model, tmp_path, prompts, peft_config=peft_config, **settings)
    (sampler,) = made
    start = {name: tensor.clone() for name, tensor in sampler.own.items()}
    base = trainer.model.get_base_model() if isinstance(trainer.model, PeftModel) else None
    before = {} if base is None else {n: p.clone() for n, p in base.named_parameters() if "lora_" not in n}
    distances = watched(trainer)
    trainer.train()
    trainer.evaluate(prompts.select(range(4)))
    assert len(distances) == 3 + 1 and max(distances) < 1e-4
    assert len([sync for sync in sampler.syncs if sync]) == 3 + 1
    for names in filter(None, sampler.syncs):
        assert sorted(names) == sorted(start)  # vLLM's own names, each once
    assert any((start[name] - tensor).abs().max() > 1e-3 for name, tensor in sampler.own.items())
    for name, tensor in before.items():
        assert torch.equal(dict(base.named_parameters())[name], tensor)


def test_weights_that_were_loaded_since_are_sent_before_an_evaluation(folders, tmp_path, prompts):
    """TRL sends them once a step."""
    trainer = with_function(folders.base, tmp_path, prompts, use_vllm=True, max_steps=2)
    distances = watched(trainer)
    trainer.train()
    trainer.evaluate(prompts.select(range(4)))
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight.mul_(1.5)
    trainer.evaluate(prompts.select(range(4)))
    assert len(distances) == 1 + 1 + 1 and max(distances) < 1e-4


def test_a_second_training_begins_with_its_own_weights(folders, tmp_path, prompts):
    """Also where the first one's only rollout was at the step that the second begins with."""
    trainer = with_function(folders.base, tmp_path, prompts, use_vllm=True, max_steps=2, learning_rate=0.05)
    distances = watched(trainer)
    trainer.train()
    trainer.train()
    assert len(distances) == 2 and max(distances) < 1e-4


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_completions_end_where_the_templates_turn_ends(tmp_path, prompts, monkeypatch, mode):
    """As a base model under ChatML, whose own EOS is another token."""
    tokenizer, end = make_tokenizer(extra=("<end>",)), 258
    tokenizer.chat_template = tokenizer.chat_template.replace("<eos>", "<end>")
    folder = str(tmp_path / "model")
    make_llama(vocab=259).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    monkeypatch.setattr(Client, "folder", folder)
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in prompts])
    settings = dict(use_vllm=True, vllm_mode=mode, max_completion_length=60, steps_per_generation=16, max_steps=8)
    trainer = with_function(folder, tmp_path / "run", rows, **settings)
    trainer.train()
    ended = [ids[-1] == end for ids in made[0].sampled]
    assert len(ended) == 16 and sum(ended) > 1
    assert all(end not in ids[:-1] for ids in made[0].sampled)
    assert torch.equal(
        trainer._episodes["ended"].sum(), torch.tensor(sum(ids[-1] in (257, end) for ids in made[0].sampled))
    )


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"lora_bias": True}, {"modules_to_save": ["lm_head"]}])
def test_merged_parameters_are_those_that_peft_merges(settings):
    """And in the network nothing changes: not a bit, nor what is merged."""
    network = get_peft_model(make_llama(attention_bias=True, tie_word_embeddings=False), lora(**settings))
    network.add_adapter("other", lora())
    randomise(network)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    merged = {name: tensor.clone() for name, tensor in merged_parameters(network, "default")}
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    assert not any(getattr(module, "merged", False) for module in network.modules())
    network.set_adapter("default")
    expected = dict(network.merge_and_unload(adapter_names=["default"]).named_parameters())
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor.data, rtol=0, atol=0)


def test_a_module_that_only_another_adapter_has_a_copy_of_is_the_bases():
    network = get_peft_model(make_llama(tie_word_embeddings=False), lora())
    network.add_adapter("other", lora(modules_to_save=["lm_head"]))
    names = [name for name, _ in merged_parameters(network, "default")]
    assert sorted(names) == sorted(dict(make_llama(tie_word_embeddings=False).named_parameters()))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3, 4]},
    ],
)
@pytest.mark.filterwarnings("ignore:Unsupported layer type '<class 'peft:UserWarning")
def test_adapters_of_tied_embeddings_are_refused(folders, tmp_path, prompts, settings):
    """In vLLM the head would be what the embeddings became, in PEFT it is the base's."""
    with pytest.raises(InputError, match="use_vllm: the adapter trains embeddings or the LM head"):
        with_function(folders.base, tmp_path, prompts, peft_config=lora(**settings), use_vllm=True)


def test_an_evaluation_of_other_weights_leaves_none_of_them(folders, tmp_path, prompts):
    """As of the average, at a step between two rollouts."""

    class Average(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                with trainer.ema.applied():
                    trainer.evaluate(prompts.select(range(4)))
                trainer.model.train()

    settings = dict(use_vllm=True, max_steps=4, learning_rate=0.05, ema_decay=0.9)
    trainer = with_function(folders.base, tmp_path, prompts, **settings)
    trainer.add_callback(Average())
    distances = watched(trainer)
    trainer.train()
    assert len(distances) == 3 and max(distances) < 1e-4


def test_a_quantised_base_is_refused(wide, tmp_path, prompts):
    with pytest.raises(InputError, match="use_vllm: it takes the policy's adapter merged"):
        PPOTrainer(
            wide.base,
            lambda completions, **_: [0.0] * len(completions),
            args=config(tmp_path, use_vllm=True),
            train_dataset=prompts,
            quantization_config=nf4(),
            peft_config=LoraConfig(target_modules=LLAMA_TARGETS),
        )
