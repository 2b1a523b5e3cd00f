"""The reward network's pooling and loading, and what a reward model's folder keeps."""

import copy
import json
import logging
import math
from pathlib import Path

import pytest
import torch
from conftest import make_gpt2, make_llama, make_tokenizer
from peft import (
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftModel,
    get_peft_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from instructgpt_trl import RewardModel
from instructgpt_trl.data import InputError
from instructgpt_trl.models import reward_network
from instructgpt_trl.models.reward_folder import read_reward_config, write_reward_config
from instructgpt_trl.models.reward_network import (
    head_of,
    init_head,
    last_token_scores,
    load_reward_network,
    pool_by_length,
)
from instructgpt_trl.models.reward_parts import reward_parts

EOS = 257
PROMPTS = ["p: ", "a longer prompt: ", "", "q: "]
COMPLETIONS = ["one", "t", "a whole sentence of words", "two two"]


def make_network(kind: str = "llama", seed: int = 0, **config):
    """A sequence classification model with one label, not patched, large random head."""
    causal = make_gpt2(seed) if kind == "gpt2" else make_llama(seed, **config)
    causal.config.num_labels = 1
    network = AutoModelForSequenceClassification.from_config(causal.config).eval()
    getattr(network, network.base_model_prefix).load_state_dict(causal.base_model.state_dict())
    with torch.no_grad():
        network.score.weight.normal_(generator=torch.Generator().manual_seed(seed))
    return network


def expected_score(network, ids: list[int]) -> float:
    """The head at the last position of one sequence alone, without padding, through the backbone by itself."""
    with torch.no_grad():
        hidden = getattr(network, network.base_model_prefix)(input_ids=torch.tensor([ids])).last_hidden_state
        return float(hidden[0, -1] @ network.score.weight[0])


def batch_of(rows: list[list[int]], pad_id: int, side: str, extra: int) -> dict[str, torch.Tensor]:
    length = max(map(len, rows)) + extra
    padding = [[pad_id] * (length - len(row)) for row in rows]
    ones, zeros = [[1] * len(row) for row in rows], [[0] * len(row) for row in padding]
    if side == "left":
        rows, padding, ones, zeros = padding, rows, zeros, ones
    return {
        "input_ids": torch.tensor([first + second for first, second in zip(rows, padding, strict=True)]),
        "attention_mask": torch.tensor([first + second for first, second in zip(ones, zeros, strict=True)]),
    }


@pytest.fixture
def lora_dir(tmp_path, base_dir) -> str:
    """A reward adapter on `base_dir`, all its weights random, made by PEFT alone."""
    network = AutoModelForSequenceClassification.from_pretrained(base_dir, num_labels=1)
    network = get_peft_model(network, LoraConfig(task_type="SEQ_CLS", r=4, modules_to_save=["score"]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3, generator=generator)
    path = str(tmp_path / "reward_lora")
    network.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def full_dir(tmp_path) -> str:
    """A full reward model, saved by transformers alone."""
    path = str(tmp_path / "reward_full")
    make_network().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def sft_dir(tmp_path, base_dir) -> str:
    """An SFT adapter on `base_dir`, its weights random."""
    torch.manual_seed(2)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"])
    network = get_peft_model(AutoModelForCausalLM.from_pretrained(base_dir), config)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0, 0.3)
    path = str(tmp_path / "sft")
    network.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def drop_head(path: str) -> None:
    file = next(Path(path).glob("*.safetensors"))
    weights = {key: tensor for key, tensor in load_file(file).items() if "score" not in key}
    save_file(weights, file, metadata={"format": "pt"})


# Pooling


def test_the_score_is_read_at_the_last_true_position():
    # Hidden states are (position, row); the head is 10 * first + second
    hidden = torch.tensor([[[float(t), float(n)] for t in range(4)] for n in range(4)])
    head = torch.nn.Linear(2, 1, bias=False)
    head.weight.data = torch.tensor([[10.0, 1.0]])
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]])
    # last true positions 1, 3, 3, 0
    assert last_token_scores(hidden, mask, head).tolist() == [10.0, 31.0, 32.0, 3.0]
    assert last_token_scores(hidden, mask.bool(), head).tolist() == [10.0, 31.0, 32.0, 3.0]


def test_only_the_last_true_position_gets_a_gradient():
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    head = torch.nn.Linear(4, 1)
    last_token_scores(hidden, torch.tensor([[1, 1, 0], [0, 1, 1]]), head).sum().backward()
    assert (hidden.grad.abs().sum(-1) > 0).tolist() == [[False, True, False], [False, False, True]]
    assert torch.equal(hidden.grad[0, 1], head.weight[0])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("pad_id", [256, EOS], ids=["pad", "pad_is_eos"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("extra", [0, 7])
def test_pitfall_08_the_score_does_not_depend_on_padding_or_batch_mates(kind, pad_id, side, extra):
    network = make_network(kind)
    # Ends at EOS; EOS inside; ends without EOS; EOS alone; a pad token that counts
    rows = [[5, 6, EOS], [7, EOS, 8, 9, EOS], [10, 11, 12, 13, 14, 15], [EOS], [20, 256, 256]]
    expected = torch.tensor([expected_score(network, row) for row in rows])
    pool_by_length(network)
    with torch.no_grad():
        together = network(**batch_of(rows, pad_id, side, extra)).logits
        alone = torch.cat([network(**batch_of([row], pad_id, side, extra)).logits for row in rows])
    assert together.shape == (5, 1) and together.dtype == torch.float32
    torch.testing.assert_close(together[:, 0], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(alone[:, 0], expected, atol=1e-5, rtol=0)


def test_without_a_mask_every_position_counts():
    network = make_network()
    expected = expected_score(network, [5, EOS, EOS])
    pool_by_length(network)
    with torch.no_grad():
        assert network(input_ids=torch.tensor([[5, EOS, EOS]])).logits.item() == pytest.approx(expected, abs=1e-5)


def test_the_head_computes_in_float32_under_autocast():
    network = make_network()
    pool_by_length(network)
    batch = batch_of([[5, 6, 7], [8, 9]], 256, "right", 0)
    seen = []
    network.model.register_forward_hook(lambda *arguments: seen.append(arguments[-1].last_hidden_state))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = network(**batch).logits
    hidden = seen[0].float()
    expected = torch.stack([hidden[0, 2], hidden[1, 1]]) @ network.score.weight[0]
    torch.testing.assert_close(logits[:, 0], expected, atol=1e-6, rtol=0)


def test_the_head_of_a_bfloat16_model_becomes_float32():
    network = make_network().to(torch.bfloat16)
    pool_by_length(network)
    assert network.score.weight.dtype == torch.float32
    assert network.model.embed_tokens.weight.dtype == torch.bfloat16
    assert network(input_ids=torch.tensor([[5, 6]])).logits.dtype == torch.float32


def test_a_copy_pools_with_its_own_weights():
    network = make_network()
    pool_by_length(network)
    pool_by_length(network)
    twin = copy.deepcopy(network)
    twin.score.weight.data.zero_()
    ids = torch.tensor([[5, 6, 7]])
    assert twin(input_ids=ids).logits.item() == 0
    assert network(input_ids=ids).logits.item() != 0


def test_gradients_are_those_of_checkpointed_layers():
    batch = batch_of([[5, 6, 7], [8, 9]], 256, "right", 0)
    gradients = []
    for checkpointing in (False, True):
        network = make_network().train()
        pool_by_length(network)
        if checkpointing:
            network.activation_checkpointing_enable({"use_reentrant": False})
        network(**batch, use_cache=False).logits.sum().backward()
        gradients.append({name: parameter.grad for name, parameter in network.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=0)


def test_a_model_without_a_scalar_head_is_refused():
    with pytest.raises(InputError, match="no linear head named 'score'"):
        pool_by_length(make_llama())
    config = make_llama().config
    config.num_labels = 2
    with pytest.raises(InputError, match="gives 2 numbers"):
        pool_by_length(AutoModelForSequenceClassification.from_config(config))
    network = make_network()
    pool_by_length(network)
    with pytest.raises(ValueError, match="no labels"):
        network(input_ids=torch.tensor([[5]]), labels=torch.tensor([1]))


# Head


def test_the_head_starts_normal_with_deviation_one_over_root_h_plus_one():
    network = make_network(hidden=16).to(torch.bfloat16)
    state = torch.get_rng_state()
    init_head(network, seed=7)
    assert torch.equal(torch.get_rng_state(), state)  # a generator of its own
    normal = torch.randn(1, 16, generator=torch.Generator().manual_seed(7))
    assert network.score.weight.dtype == torch.float32
    torch.testing.assert_close(network.score.weight.detach(), normal / math.sqrt(17), atol=1e-7, rtol=0)


def test_a_head_with_a_bias_starts_at_bias_zero():
    network = make_network()
    network.score = torch.nn.Linear(16, 1)
    init_head(network, seed=0)
    assert network.score.bias.item() == 0


# Loading


def test_pitfall_04_a_missing_head_is_an_error(base_dir, full_dir, lora_dir, sft_dir):
    for path in (base_dir, sft_dir):  # never a reward model
        with pytest.raises(InputError, match="reward head"):
            RewardModel.from_pretrained(path)
    for path in (full_dir, lora_dir):
        drop_head(path)
        for load in (RewardModel.from_pretrained, reward_parts, lambda p: load_reward_network(p, seed=0)):
            with pytest.raises(InputError, match=f"{path}: the weights of the reward head"):
                load(path)


def test_a_causal_model_gets_a_seeded_head(base_dir, caplog):
    network = load_reward_network(base_dir, seed=3)
    normal = torch.randn(1, 16, generator=torch.Generator().manual_seed(3)) / math.sqrt(17)
    torch.testing.assert_close(network.score.weight.detach(), normal, atol=1e-7, rtol=0)
    base = AutoModelForCausalLM.from_pretrained(base_dir).base_model.state_dict()
    for name, tensor in network.model.state_dict().items():
        assert torch.equal(tensor, base[name]), name
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_an_sft_adapter_is_continued_under_a_new_head(sft_dir, base_dir):
    network = load_reward_network(sft_dir, seed=3, trainable=True)
    ids = torch.tensor([[5, 6, 7, 8]])
    sft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_dir), sft_dir)
    with torch.no_grad():
        expected = sft.get_base_model().model(input_ids=ids).last_hidden_state
        plain = AutoModelForCausalLM.from_pretrained(base_dir).model(input_ids=ids).last_hidden_state
        hidden = network.get_base_model().model(input_ids=ids).last_hidden_state
    assert torch.equal(hidden, expected)
    assert (hidden - plain).abs().max() > 0.1  # the adapter does something
    normal = torch.randn(1, 16, generator=torch.Generator().manual_seed(3)) / math.sqrt(17)
    torch.testing.assert_close(head_of(network).weight.detach(), normal, atol=1e-7, rtol=0)
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2 * 2 + 1  # two layers, two targets, A and B; the head
    assert all("lora_" in name or "score.modules_to_save" in name for name in trained)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_the_lm_head_of_an_sft_adapter_is_left_out_and_named(tmp_path, caplog):
    make_llama(tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "lm_head"])
    causal = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(causal, config).save_pretrained(tmp_path / "sft")
    with caplog.at_level(logging.WARNING, logger="instructgpt_trl"):
        network = load_reward_network(str(tmp_path / "sft"), seed=0)
    assert "3 weights of the LM head left out" in caplog.text  # A, B, and the layer that PEFT saves with them
    assert network.peft_config["default"].target_modules == {"q_proj"}


def test_an_adapter_that_does_not_fit_is_refused(sft_dir, tmp_path):
    file = Path(sft_dir) / "adapter_model.safetensors"
    weights = load_file(file)
    key = next(iter(weights))
    wrong = {
        "missing": {k: t for k, t in weights.items() if k != key},
        "left over": weights | {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.zeros(4, 16)},
        "misshapen": weights | {key: torch.zeros(3, 16)},
    }
    for state in wrong.values():
        save_file(state, file)
        with pytest.raises(InputError, match="does not fit its base"):
            load_reward_network(sft_dir, seed=0)
    file.rename(file.with_name("adapter_model.bin"))
    with pytest.raises(InputError, match="no adapter_model.safetensors"):
        load_reward_network(sft_dir, seed=0)


def test_what_cannot_be_loaded_is_named(tmp_path, sft_dir, lora_dir, base_dir):
    with pytest.raises(InputError, match=r"model '.*nowhere' cannot be loaded"):
        load_reward_network(str(tmp_path / "nowhere"), seed=0)
    with pytest.raises(InputError, match="neither config.json nor adapter_config.json"):
        load_reward_network(str(tmp_path), seed=0)
    file = Path(sft_dir) / "adapter_config.json"
    config = json.loads(file.read_text())
    for base, message in (
        ("nowhere", "base model 'nowhere' of the adapter"),
        (lora_dir, "is itself an adapter"),
        (None, "names no base model"),
    ):
        file.write_text(json.dumps({**config, "base_model_name_or_path": base}))
        with pytest.raises(InputError, match=message):
            load_reward_network(sft_dir, seed=0)


def test_missing_backbone_weights_are_an_error(full_dir):
    file = Path(full_dir) / "model.safetensors"
    weights = {key: tensor for key, tensor in load_file(file).items() if "layers.1.mlp" not in key}
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match="3 weights are missing, first model.layers.1.mlp"):
        load_reward_network(full_dir)


def test_pitfall_12_bitsandbytes_asked_for_but_absent(base_dir, monkeypatch):
    from transformers import BitsAndBytesConfig

    monkeypatch.setattr(reward_network, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(InputError, match="bitsandbytes, which is not installed"):
        load_reward_network(base_dir, quantization_config=BitsAndBytesConfig(load_in_4bit=True), seed=0)


# Scores


def scores_by_hand(network, tokenizer, prompts=PROMPTS, completions=COMPLETIONS) -> list[float]:
    pairs = zip(prompts, completions, strict=True)
    rows = [tokenizer(prompt)["input_ids"] + tokenizer(text)["input_ids"] + [EOS] for prompt, text in pairs]
    return [expected_score(network, row) for row in rows]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_scores_are_in_order_whatever_the_batches(batch_size, tokenizer):
    network = make_network()
    expected = scores_by_hand(network, tokenizer)
    model = RewardModel(network, tokenizer, bias=0.25)
    scores = model.score(PROMPTS, COMPLETIONS, batch_size=batch_size)
    assert scores == pytest.approx([score + 0.25 for score in expected], abs=1e-5)
    prompt_ids, completion_ids = model.encode(PROMPTS, COMPLETIONS)
    by_ids = model.score_ids(prompt_ids, completion_ids, batch_size)
    assert by_ids.tolist() == scores and by_ids.dtype == torch.float32


def test_conversations_are_scored(tokenizer):
    network = make_network()
    ids = [*tokenizer("<user>hi")["input_ids"], EOS, *tokenizer("\n<assistant>yes")["input_ids"], EOS]
    expected = expected_score(network, ids)
    prompt = [{"role": "user", "content": "hi"}]
    model = RewardModel(network, tokenizer)
    assert model.score([prompt], ["yes"]) == pytest.approx([expected], abs=1e-5)
    assert model.score([prompt], [[{"role": "assistant", "content": "yes"}]]) == pytest.approx([expected], abs=1e-5)


def test_scoring_leaves_the_network_as_it_was(tokenizer):
    network = make_network("gpt2").train()  # GPT-2 has dropout
    expected = scores_by_hand(copy.deepcopy(network).eval(), tokenizer)
    model = RewardModel(network, tokenizer)
    assert model.score(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-5)
    assert network.training
    assert all(parameter.grad is None for parameter in network.parameters())


def test_wrong_arguments_of_score(tokenizer):
    model = RewardModel(make_network(), tokenizer)
    with pytest.raises(InputError, match="prompts: expected a list of texts, got one string"):
        model.score("p", ["c"])
    with pytest.raises(InputError, match="1 prompts but 2 completions"):
        model.score(["p"], ["c", "d"])
    with pytest.raises(InputError, match="no token at all"):
        model.score_ids([[]], [[]])
    assert model.score([], []) == []


# Bias and folder


def test_calibrate_returns_the_old_mean_and_makes_the_new_one_zero(tokenizer):
    network = make_network()
    mean = sum(scores_by_hand(network, tokenizer)) / 4
    model = RewardModel(network, tokenizer, bias=2.0)
    assert not model.calibrated
    assert model.calibrate(PROMPTS, COMPLETIONS) == pytest.approx(mean + 2.0, abs=1e-5)
    assert model.bias == pytest.approx(-mean, abs=1e-5)
    assert model.calibrated
    assert sum(model.score(PROMPTS, COMPLETIONS)) / 4 == pytest.approx(0, abs=1e-6)
    bias = model.bias
    assert model.calibrate(PROMPTS, COMPLETIONS) == pytest.approx(0, abs=1e-6)
    assert model.bias == bias  # applied once: calibrating a calibrated model changes nothing


def test_calibrate_refuses_what_has_no_mean(tokenizer):
    model = RewardModel(make_network(), tokenizer, bias=1.5)
    with pytest.raises(InputError, match="no demonstrations"):
        model.calibrate([], [])
    model.model.score.weight.data.fill_(float("nan"))
    with pytest.raises(InputError, match="mean score of the demonstrations is nan"):
        model.calibrate(PROMPTS, COMPLETIONS)
    assert model.bias == 1.5


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_pitfall_05_the_bias_survives_save_and_load_and_is_applied_once(kind, full_dir, lora_dir, base_dir, tmp_path):
    source = full_dir if kind == "full" else lora_dir
    model = RewardModel.from_pretrained(source)
    assert (model.bias, model.calibrated) == (0.0, False)
    raw = model.score(PROMPTS, COMPLETIONS)
    model.calibrate(PROMPTS, COMPLETIONS)
    path = tmp_path / "saved"
    for _ in range(2):  # a second round of saving and loading adds nothing
        model.save_pretrained(str(path))
        model = RewardModel.from_pretrained(str(path))
        expected = [score - sum(raw) / 4 for score in raw]
        assert model.score(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-6)
    assert json.loads((path / "reward_model.json").read_text()) == {
        "format": 1,
        "kind": kind,
        "base": None if kind == "full" else base_dir,
        "bias": model.bias,
        "calibrated": True,
        "quantization": None,
    }
    assert not list(path.glob("*.tmp"))


def test_a_saved_model_loads_with_transformers_and_peft(full_dir, lora_dir, tmp_path):
    for source, loader in (
        (full_dir, AutoModelForSequenceClassification.from_pretrained),
        (lora_dir, lambda path: AutoPeftModelForSequenceClassification.from_pretrained(path, num_labels=1)),
    ):
        model = RewardModel.from_pretrained(source)
        model.calibrate(PROMPTS, COMPLETIONS)
        path = str(tmp_path / "saved" / Path(source).name)
        model.save_pretrained(path)
        theirs = loader(path)
        prompt_ids, completion_ids = model.encode(PROMPTS, COMPLETIONS)
        rows = [prompt + text for prompt, text in zip(prompt_ids, completion_ids, strict=True)]
        batch = batch_of(rows, 256, "right", 0)
        with torch.no_grad():
            logits = theirs(**batch).logits[:, 0]  # transformers' own pooling: pad and EOS differ here
        ours = torch.tensor(model.score(PROMPTS, COMPLETIONS)) - model.bias
        torch.testing.assert_close(logits, ours, atol=1e-5, rtol=0)


def test_a_broken_or_later_reward_json_is_refused(full_dir):
    file = Path(full_dir) / "reward_model.json"
    for text in ("{", "[]", '{"bias": "x"}', '{"format": 2, "bias": 0}', '{"format": 1, "bias": NaN}'):
        file.write_text(text)
        with pytest.raises(InputError, match="reward_model.json: "):
            RewardModel.from_pretrained(full_dir)


def test_a_model_of_others_has_bias_zero(full_dir, caplog):
    with caplog.at_level(logging.INFO, logger="instructgpt_trl"):
        assert read_reward_config(full_dir)["bias"] == 0.0
    assert "its bias is 0" in caplog.text


def test_reward_json_is_written_at_once_or_not_at_all(full_dir, monkeypatch):
    write_reward_config(full_dir, bias=1.0)
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        write_reward_config(full_dir, bias=2.0)
    assert read_reward_config(full_dir)["bias"] == 1.0


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is(tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        RewardModel(make_network(), tokenizer).save_pretrained(str(tmp_path / "file" / "model"))


# Parts


def parts_sources(full_dir, lora_dir):
    for path, bias in ((full_dir, 0.5), (lora_dir, -0.75)):
        write_reward_config(path, bias=bias, kind="adapter" if path == lora_dir else "full")
        yield path, bias, path
        yield path, bias, RewardModel.from_pretrained(path)


def test_parts_come_from_a_folder_and_from_an_object_alike(full_dir, lora_dir, base_dir):
    for path, bias, source in parts_sources(full_dir, lora_dir):
        parts = reward_parts(source)
        saved = load_file(next(Path(path).glob("*.safetensors")))
        (head,) = (tensor for key, tensor in saved.items() if "score" in key)
        assert torch.equal(parts.head_weight, head) and parts.head_weight.shape == (1, 16)
        assert parts.bias == bias
        assert parts.tokenizer.get_vocab() == make_tokenizer().get_vocab()
        if path == full_dir:
            assert (parts.config, parts.state, parts.base) == (None, None, None)
            continue
        assert parts.base == base_dir
        assert parts.config.task_type == "CAUSAL_LM" and parts.config.modules_to_save is None
        assert not parts.config.inference_mode and parts.config.r == 4
        rest = {key: tensor for key, tensor in saved.items() if "score" not in key}
        assert parts.state.keys() == rest.keys()
        assert all(torch.equal(parts.state[key], tensor) for key, tensor in rest.items())


def test_an_adapter_goes_onto_a_causal_base_and_scores_the_same(lora_dir, base_dir, tokenizer):
    write_reward_config(lora_dir, bias=-0.75, kind="adapter")
    model = RewardModel.from_pretrained(lora_dir)
    for source in (lora_dir, model):
        parts = reward_parts(source)
        causal = get_peft_model(AutoModelForCausalLM.from_pretrained(base_dir), parts.config)
        result = set_peft_model_state_dict(causal, parts.state)
        assert not result.unexpected_keys
        ids = tokenizer("p: one")["input_ids"] + [EOS]
        with torch.no_grad():
            hidden = causal.get_base_model().model(input_ids=torch.tensor([ids])).last_hidden_state
            score = float(hidden[0, -1] @ parts.head_weight[0]) + parts.bias
        assert score == pytest.approx(model.score(["p: "], ["one"])[0], abs=1e-5)


def test_a_network_of_its_own_scores_the_same_and_leaves_the_object_alone(full_dir, lora_dir, tokenizer):
    ids = tokenizer("p: one")["input_ids"] + [EOS]
    for path, _, source in parts_sources(full_dir, lora_dir):
        expected = RewardModel.from_pretrained(path).score(["p: "], ["one"])[0]
        parts = reward_parts(source)
        network = parts.load_network()
        assert not any(parameter.requires_grad for parameter in network.parameters())
        backbone = (network.get_base_model() if isinstance(network, PeftModel) else network).base_model
        with torch.no_grad():
            hidden = backbone(input_ids=torch.tensor([ids])).last_hidden_state
        assert float(hidden[0, -1] @ parts.head_weight[0]) + parts.bias == pytest.approx(expected, abs=1e-5)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.zero_()
        if isinstance(network, PeftModel):  # what PPO does with it: a second adapter, without a head
            network.add_adapter("value", parts.config)
        if not isinstance(source, str):
            assert source.score(["p: "], ["one"])[0] == pytest.approx(expected, abs=1e-6)


def test_parts_of_a_bare_network(full_dir, tokenizer):
    network = AutoModelForSequenceClassification.from_pretrained(full_dir)
    parts = reward_parts(network)
    assert torch.equal(parts.head_weight, network.score.weight)
    assert parts.tokenizer.get_vocab() == tokenizer.get_vocab()
    with pytest.raises(InputError, match="made in memory"):
        reward_parts(make_network())
