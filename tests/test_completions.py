"""models/completions.py: greedy completions do not depend on the batch, and end where the model ends."""

import pytest
import torch
from conftest import make_gpt2, make_llama, make_tokenizer

from instructgpt_trl.models.completions import greedy_completions, greedy_config


def by_hand(model, tokenizer, ids: list[int], max_new_tokens: int) -> list[int]:
    """One token at a time, no cache, no padding."""
    new: list[int] = []
    for _ in range(max_new_tokens):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax())
        new.append(token)
        if token == tokenizer.eos_token_id:
            break
    return new


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
@pytest.mark.parametrize("pad_token", ["<pad>", "<eos>", None])
def test_batch_equals_one_by_one(make, pad_token):
    model, tokenizer = make(seed=2).eval(), make_tokenizer(pad_token)
    # The last prompt ends at EOS itself, which is also the pad in one case
    prompts = [[65, 66, 67, 68, 69, 70], [71], [72, 73, 257]]
    expected = [by_hand(model, tokenizer, ids, 7) for ids in prompts]
    assert greedy_completions(model, tokenizer, prompts, 7) == expected
    assert expected[0] != expected[1] != expected[2]


def test_ends_at_eos_and_without_it():
    model, tokenizer = make_llama().eval(), make_tokenizer()

    def force(token: int):
        return model.lm_head.register_forward_hook(
            lambda module, args, output: (
                torch.nn.functional.one_hot(torch.tensor(token), 258).expand_as(output).float()
            )
        )

    handle = force(65)
    assert greedy_completions(model, tokenizer, [[70], [71, 72]], 3) == [[65] * 3] * 2
    handle.remove()
    force(257)
    assert greedy_completions(model, tokenizer, [[70]], 3) == [[257]]


def test_keeps_the_models_own_generation_config_and_mode():
    model, tokenizer = make_llama().train(), make_tokenizer()
    model.generation_config.update(
        do_sample=True, temperature=0.3, top_p=0.5, repetition_penalty=1.3, eos_token_id=9, max_length=20
    )
    before = model.generation_config.to_dict()
    config = greedy_config(model, tokenizer, 5, conversational=False)
    assert (config.do_sample, config.num_beams, config.max_new_tokens) == (False, 1, 5)
    assert (config.repetition_penalty, config.eos_token_id, config.pad_token_id) == (1.3, [9, 257], 256)
    greedy_completions(model, tokenizer, [[70]], 2)
    assert model.generation_config.to_dict() == before
    assert model.training


@pytest.mark.parametrize("conversational, ends", [(True, [257, 258]), (False, [257])])
def test_a_turn_ends_answers_to_conversations_only(conversational, ends):
    model, tokenizer = make_llama(vocab=259), make_tokenizer(extra=("<end>",))
    tokenizer.chat_template = tokenizer.chat_template.replace("<eos>", "<end>")
    assert greedy_config(model, tokenizer, 5, conversational).eos_token_id == ends
