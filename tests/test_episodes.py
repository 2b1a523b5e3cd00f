"""Episodes as tensors, by hand; the stream of pretraining blocks."""

import random

import torch
from datasets import Dataset

from instructgpt_trl.data.episodes import (
    attention_mask,
    before_tokens,
    by_length,
    completion_labels,
    last_token,
    pad_episodes,
    take_rows,
)
from instructgpt_trl.data.pretraining import PretrainingStream, as_episodes

PAD = 9


def two_episodes():
    """Prompts [1 2] and [3 4 5 6], completions [7 9 8] (its 9 is the pad id) and [9]."""
    return pad_episodes([[1, 2], [3, 4, 5, 6]], [[7, 9, 8], [9]], PAD)


def test_pad_episodes_by_hand():
    episodes = two_episodes()
    assert episodes["input_ids"].tolist() == [[1, 2, 7, 9, 8], [3, 4, 5, 6, 9]]
    assert episodes["prompt_lengths"].tolist() == [2, 4]
    assert episodes["completion_lengths"].tolist() == [3, 1]
    assert episodes["mask"].tolist() == [[True, True, True], [True, False, False]]
    assert episodes["mask"].dtype == torch.bool and episodes["input_ids"].dtype == torch.long


def test_pitfall_08_positions_come_from_lengths_not_from_the_pad_id():
    episodes = pad_episodes([[1, 2], [3]], [[7, PAD], [PAD]], PAD)
    assert episodes["input_ids"].tolist() == [[1, 2, 7, PAD], [3, PAD, PAD, PAD]]
    assert episodes["mask"].tolist() == [[True, True], [True, False]]
    assert attention_mask(episodes).tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert last_token(episodes).tolist() == [3, 1]
    assert completion_labels(episodes).tolist() == [[7, PAD], [PAD, -100]]


def test_before_tokens_by_hand():
    """Completion token t of a prompt of P tokens stands at P + t and is predicted at P + t - 1."""
    episodes = two_episodes()
    assert before_tokens(episodes)[0].tolist() == [1, 2, 3]
    assert before_tokens(episodes)[1, 0].item() == 3
    assert before_tokens(episodes).max() < episodes["input_ids"].size(1)  # also where the mask is False


def test_take_rows_trims_to_what_is_needed_and_keeps_every_tensor():
    episodes = pad_episodes([[1] * 6, [2], [3, 3]], [[7] * 5, [8, 8], [9]], 0)
    episodes |= {"logprobs": torch.arange(15.0).view(3, 5), "ended": torch.tensor([True, False, True])}
    taken = take_rows(episodes, torch.tensor([2, 1]))
    assert taken["input_ids"].tolist() == [[3, 3, 9], [2, 8, 8]]
    assert taken["mask"].tolist() == [[True, False], [True, True]]
    assert taken["logprobs"].tolist() == [[10.0, 11.0], [5.0, 6.0]]
    assert taken["ended"].tolist() == [True, False]
    assert taken["prompt_lengths"].tolist() == [2, 1]


def test_taking_rows_one_by_one_equals_padding_them_alone():
    rng = random.Random(0)
    prompts = [[rng.randrange(9) for _ in range(rng.randrange(1, 7))] for _ in range(20)]
    completions = [[rng.randrange(9) for _ in range(rng.randrange(1, 7))] for _ in range(20)]
    episodes = pad_episodes(prompts, completions, PAD)
    for row in range(20):
        alone = pad_episodes([prompts[row]], [completions[row]], PAD)
        taken = take_rows(episodes, torch.tensor([row]))
        assert all(torch.equal(taken[name], alone[name]) for name in alone)


def test_by_length_sorts_inside_groups_and_leaves_equals_as_they_are():
    episodes = pad_episodes([[1], [1, 2], [1], [1], [1, 2, 3]], [[1], [1], [1, 2], [1], [1]], PAD)
    assert by_length(episodes, torch.tensor([0, 1, 2, 3, 4]), 3).tolist() == [1, 2, 0, 4, 3]
    assert by_length(episodes, torch.tensor([3, 0, 4, 2, 1]), 2).tolist() == [3, 0, 4, 2, 1]
    assert by_length(episodes, torch.tensor([3, 0, 4, 2, 1]), 5).tolist() == [4, 2, 1, 3, 0]


def test_a_masked_row_keeps_its_attention():
    episodes = two_episodes()
    episodes["mask"] = episodes["mask"] & torch.tensor([True, False])[:, None]
    assert attention_mask(episodes).tolist() == [[1] * 5, [1] * 5]
    assert last_token(episodes).tolist() == [4, 4]


def test_blocks_as_episodes_predict_every_token_but_the_first():
    batch = as_episodes([[5, 6, 7], [8, 9]])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert completion_labels(batch).tolist() == [[6, 7], [9, -100]]
    assert batch["mask"].tolist() == [[True, True], [True, False]]


def stream(tokenizer, seed: int = 0, rows: int = 10) -> PretrainingStream:
    texts = Dataset.from_list([{"text": f"text number {i} {'x' * i}"} for i in range(rows)])
    return PretrainingStream(texts, tokenizer, 8, seed)


def test_the_stream_holds_every_token_once_an_epoch(tokenizer):
    blocks = stream(tokenizer)
    size = len(blocks.blocks)
    expected = []
    for i in range(10):
        expected += tokenizer(f"text number {i} {'x' * i}")["input_ids"] + [tokenizer.eos_token_id]
    assert all(len(block) <= 8 for block in blocks.take(0, size))
    for epoch in range(2):
        assert sorted(sum(blocks.take(epoch * size, size), [])) == sorted(expected)
    assert blocks.take(0, size) != blocks.take(size, size)  # each epoch has an order of its own


def test_block_n_depends_on_the_seed_and_n_alone(tokenizer):
    first, again, other = stream(tokenizer), stream(tokenizer), stream(tokenizer, seed=1)
    state = torch.get_rng_state()
    whole = first.take(0, 70)
    assert [again.take(n, 1)[0] for n in (69, 3, 30)] == [whole[n] for n in (69, 3, 30)]
    assert again.take(20, 25) == whole[20:45]
    assert other.take(0, 70) != whole
    assert torch.equal(torch.get_rng_state(), state)
