"""Greedy completions of prompts, for scoring a model between training steps."""

import copy

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data.encoding import turn_end
from .loading import fold_last_position


def greedy_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[list[int]],
    max_new_tokens: int,
    conversational: bool = False,
) -> list[list[int]]:
    """
    Greedy completions as token ids, up to and including the token that ends them; the model's training mode is left
    as it was.

    Args:
        model (`PreTrainedModel`): unwrapped causal language model.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer; without a pad token EOS pads.
        prompt_ids (`list[list[int]]`): B prompts, padded on the left here.
        max_new_tokens (`int`): longest completion in tokens.
        conversational (`bool`): whether the prompts are conversations, so that the end of a turn ends a completion.

    Returns:
        `list[list[int]]` of length B, at most `max_new_tokens` ids each.
    """
    rows = [torch.tensor(ids) for ids in prompt_ids]
    config = greedy_config(model, tokenizer, max_new_tokens, conversational)
    input_ids = pad_sequence(rows, batch_first=True, padding_value=config.pad_token_id, padding_side="left")
    # From lengths, not from `id != pad`: pad may be EOS
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    training = model.training
    model.eval()
    try:
        with fold_last_position(model):
            output = model.generate(
                input_ids=input_ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=config,
            )
    finally:
        model.train(training)
    ends = set(config.eos_token_id)
    return [_until(row, ends) for row in output[:, input_ids.shape[1] :].tolist()]


def _until(ids: list[int], ends: set[int]) -> list[int]:
    end = next((index for index, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: end + 1]


def greedy_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, conversational: bool
) -> GenerationConfig:
    """The model's own generation config, but greedy, and ending at the tokenizer's EOS, and at a turn's end, too."""
    end = turn_end(tokenizer) if conversational else None
    config = copy.deepcopy(model.generation_config)
    own = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    config.update(
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        max_new_tokens=max_new_tokens,
        max_length=None,
        use_cache=True,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        eos_token_id=sorted({*own, tokenizer.eos_token_id, end} - {None}),
    )
    return config
