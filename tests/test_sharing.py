"""Completions behind one copy of their prompt: what a row holds, who sees whom, scores of separate sequences."""

import copy
import logging

import pytest
import torch
from conftest import make_gpt2, make_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from ppo_helpers import lora
from test_reward_trainer import make_args, make_network
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

from instructgpt_trl import RewardModel, RewardTrainer
from instructgpt_trl.data import InputError
from instructgpt_trl.data.rankings import DataCollatorForRanking
from instructgpt_trl.data.sharing import share_prompts, shared_attention_mask
from instructgpt_trl.models.reward_network import pool_by_length
from instructgpt_trl.models.sharing import attention_length, network_inputs, why_not_shared


def test_rows_by_hand():
    """Prompt [1, 2] with [3], [4, 5], prompt [6] with [7]: lengths 5 and 2, so two rows of 5."""
    batch, order = share_prompts([[6], [1, 2]], [[[7]], [[3], [4, 5]]], pad_token_id=0)
    assert order == [1, 0]
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [6, 7, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 2, 3], [0, 1, 0, 0, 0]]
    assert batch["segments"].tolist() == [[0, 0, 1, 2, 2], [0, 1, -1, -1, -1]]
    assert batch["prefixes"].tolist() == [[0, 0, 0, 0, 0], [0, 0, -1, -1, -1]]
    assert batch["ends"].tolist() == [2, 4, 6]
    mask = shared_attention_mask(batch["segments"], batch["prefixes"])[0, 0].int().tolist()
    assert mask == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 1, 1]]


def test_short_prompts_fill_the_rows_of_long_ones():
    batch, order = share_prompts([[1] * 4, [2], [3] * 2], [[[5], [5, 5]], [[6]], [[7], [7]]], pad_token_id=0)
    assert order == [0, 2, 1]  # sizes 7, 2, 4: the last two share a row
    assert batch["input_ids"].tolist() == [[1, 1, 1, 1, 5, 5, 5], [3, 3, 7, 7, 2, 6, 0]]
    assert batch["prefixes"].tolist()[1] == [0, 0, 0, 0, 3, 3, -1]
    assert batch["segments"].tolist()[1] == [0, 0, 1, 2, 3, 4, -1]
    assert batch["position_ids"].tolist()[1] == [0, 1, 2, 2, 0, 1, 0]
    assert share_prompts([[1, 2]], [[[3]]], 0, pad_to_multiple_of=8)[0]["input_ids"].shape == (1, 8)


token_lists = st.lists(st.integers(2, 255), min_size=1, max_size=6)
groups = st.lists(st.tuples(token_lists, st.lists(token_lists, min_size=1, max_size=4)), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(groups)
def test_the_scores_are_those_of_separate_sequences(rows):
    network = make_network().eval()
    pool_by_length(network)
    prompts, completions = (list(column) for column in zip(*rows, strict=True))
    batch, order = share_prompts(prompts, completions, pad_token_id=0)
    with torch.no_grad():
        shared = network(**network_inputs(network, batch), use_cache=False).logits[:, 0]
        alone = [
            network(input_ids=torch.tensor([prompts[i] + ids])).logits[0, 0] for i in order for ids in completions[i]
        ]
    torch.testing.assert_close(shared, torch.stack(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adapters", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_gradient_is_that_of_separate_sequences(tmp_path, rankings, tokenizer, adapters, checkpointing):
    found = {}
    for sharing in ("on", "off"):
        network = make_network(intermediate_size=64)
        args = make_args(tmp_path, prefix_sharing=sharing, gradient_checkpointing=checkpointing)
        peft_config = lora(task_type="SEQ_CLS", target_modules="all-linear") if adapters else None
        torch.manual_seed(0)
        trainer = RewardTrainer(
            network, args=args, train_dataset=rankings, processing_class=tokenizer, peft_config=peft_config
        )
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])
        assert ("segments" in batch) == (sharing == "on")
        loss = trainer.compute_loss(trainer.model.train(), batch)
        loss.backward()
        grads = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
        found[sharing] = loss.item(), grads, trainer._window["train"][0].sum(0)
    (loss, grads, stats), (expected, expected_grads, expected_stats) = found["on"], found["off"]
    assert loss == pytest.approx(expected, rel=1e-5)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(stats, expected_stats, rtol=1e-4, atol=1e-5)


# Which networks, and which batches


def test_networks_that_cannot_share_are_found_out(tmp_path, rankings, tokenizer, caplog):
    network = make_network().eval()
    pool_by_length(network)
    assert why_not_shared(network) is None
    eager = make_network(attn_implementation="eager").eval()
    pool_by_length(eager)
    assert why_not_shared(eager) is None
    for setting, value, reason in (
        ("_attn_implementation", "flash_attention_2", "'flash_attention_2' takes no mask"),
        ("layer_types", ["full_attention", "sliding_attention"], "layers of sliding_attention"),
        ("sliding_window", 8, "sliding window"),
    ):
        other = copy.deepcopy(network)
        setattr(other.config, setting, value)
        assert reason in why_not_shared(other)


def test_what_28_layers_round_is_let_pass():
    """Behind the last one in bfloat16 that is more than what a network without positions does in a layer."""
    for seed in range(6):
        network = make_network(seed, num_hidden_layers=28).eval().bfloat16()
        pool_by_length(network)
        assert why_not_shared(network) is None


BROKEN = {
    "no such mask": "refused: ValueError: no such mask",
    "no positions": "come out otherwise",
    "no mask": "come out otherwise",  # a completion sees those before it
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("broken", BROKEN)
def test_a_network_that_does_otherwise_is_found_out(monkeypatch, broken, dtype):
    network = make_network(num_hidden_layers=2 if dtype == torch.float32 else 28).eval().to(dtype)
    pool_by_length(network)
    assert why_not_shared(network) is None
    forward = network.model.forward

    def ignores(*args, **kwargs):
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 4:
            if broken == "no such mask":
                raise ValueError("no such mask")
            kwargs["position_ids" if broken == "no positions" else "attention_mask"] = None
        return forward(*args, **kwargs)

    monkeypatch.setattr(network.model, "forward", ignores)
    assert BROKEN[broken] in why_not_shared(network)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_to_8_bits_is_let_pass(tmp_path, dtype):
    pytest.importorskip("bitsandbytes")
    make_network(hidden=64, num_hidden_layers=8).save_pretrained(tmp_path)
    network = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, dtype=dtype, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    ).eval()
    pool_by_length(network)
    assert why_not_shared(network) is None


def test_the_trainer_says_why_it_does_not_share(tmp_path, rankings, tokenizer, caplog):
    def trainer(sharing: str) -> RewardTrainer:
        network = make_network()
        network.config.sliding_window = 8
        args = make_args(tmp_path, prefix_sharing=sharing)
        return RewardTrainer(network, args, train_dataset=rankings, processing_class=tokenizer)

    with caplog.at_level(logging.WARNING):
        assert trainer("auto").data_collator.attention_length is None
    assert "behind a prompt of its own (prefix_sharing): its attention has a sliding window" in caplog.text
    with pytest.raises(InputError, match="prefix_sharing='on' is not possible with this model, its attention has"):
        trainer("on")
    with pytest.raises(InputError, match="prefix_sharing='perhaps': expected 'auto', 'on' or 'off'"):
        trainer("perhaps")


def test_gpt2_with_learned_positions_shares():
    config = make_gpt2().config
    config.num_labels = 1
    network = AutoModelForSequenceClassification.from_config(config).eval()
    pool_by_length(network)
    assert why_not_shared(network) is None


def test_attention_costs_as_much_as_the_matrices_at_this_length():
    """A layer of H = 16: q and o 16 x 16, k and v 16 x 8, three of 16 x 32: 2,304 weights; 2 * 2304 = 4 * L * 16."""
    assert attention_length(make_network()) == 2304 / 32
    adapted = get_peft_model(make_llama(), lora(target_modules="all-linear"))
    assert attention_length(adapted) > 2304 / 32


def test_prompts_are_shared_where_that_takes_fewer_operations():
    def row(prompt: int, completion: int, k: int) -> dict:
        return {
            "prompt_ids": [1] * prompt,
            "completions_ids": [[2] * completion] * k,
            "ranks": [*range(k)],
            "shortened": 0,
        }

    collator = DataCollatorForRanking(0, attention_length=100)
    # 100 + 9 * 4 = 136 tokens that see up to 136, against 9 * 104 that see up to 104
    assert "segments" in collator([row(100, 4, 9)])
    # 904 tokens of up to 904 against 9 * 104 of up to 104: nearly as many, and five times the operations
    assert "segments" not in collator([row(4, 100, 9)])
    assert "segments" not in DataCollatorForRanking(0)([row(100, 4, 9)])


# Scoring


def test_samples_of_one_prompt_are_scored_behind_one_copy(tokenizer):
    network, sizes = make_network(), []
    model = RewardModel(network.eval(), tokenizer, bias=0.5)
    prompts = [
        "a long prompt of many letters",
        "b",
        "a long prompt of many letters",
        "c",
        "a long prompt of many letters",
    ]
    completions = ["one", "two", "three", "four", "six"]
    expected = [model.score([p], [c])[0] for p, c in zip(prompts, completions, strict=True)]
    network.model.register_forward_hook(
        lambda module, args, kwargs, out: sizes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    for batch_size in (2, 3, 8):
        sizes.clear()
        assert model.score(prompts, completions, batch_size) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert sizes[-1] == (2, 29 + 4 + 6 + 4)  # the others share the second row
    sizes.clear()
    model.score(prompts[:2], completions[:2])
    assert sizes == [(2, 33)]  # as ever where no prompt repeats


def test_an_empty_completion_is_read_at_the_end_of_its_prompt(tokenizer):
    model = RewardModel(make_network().eval(), tokenizer)
    scores = model.score_ids([[5, 6], [5, 6]], [[], [7]])
    assert scores.tolist() == pytest.approx([model.score_ids([[5, 6]], [ids]).item() for ids in ([], [7])], rel=1e-5)
