"""The base model: a word-level tokenizer and a language model of about a million parameters, pretrained on the web."""

import math
import random
import re
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

MAX_LENGTH = 128  # tokens of prompt and completion together; nothing in this world is longer


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """
    A tokenizer whose tokens are the words and punctuation marks of `texts`, and `<pad>`, `<eos>` and `<unk>`.
    Decoding joins words by spaces, punctuation without.
    """
    words = sorted({token for text in texts for token in re.findall(r"\w+|[^\w\s]", text)})
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.Sequence([decoders.WordPiece(cleanup=True), decoders.Replace(" :", ":")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=MAX_LENGTH,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """
    A Llama with random weights. Two wide layers learn to copy words out of a prompt in a fraction of the steps that
    four narrow ones need, and the larger initial weights (about one over the root of the width) help as much.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.08,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def batches(
    texts: list[str], tokenizer: PreTrainedTokenizerFast, tokens: int, seed: int = 0
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """
    Batches of about `tokens` tokens, in random order: (input ids, labels), texts of like length together, one a row.
    """
    rng = random.Random(seed)
    rows = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    rows.sort(key=lambda ids: len(ids) + 6 * rng.random())
    groups: list[list[list[int]]] = [[]]
    for ids in rows:
        if groups[-1] and (len(groups[-1]) + 1) * max(map(len, [*groups[-1], ids])) > tokens:
            groups.append([])
        groups[-1].append(ids)
    rng.shuffle(groups)
    made = []
    for group in groups:
        length = max(map(len, group))
        # On the right of a causal model padding changes nothing before it
        ids = torch.tensor([ids + [tokenizer.pad_token_id] * (length - len(ids)) for ids in group])
        made.append((ids, torch.where(ids == tokenizer.pad_token_id, -100, ids)))
    return made


def packed_batches(
    texts: list[str], tokenizer: PreTrainedTokenizerFast, tokens: int, length: int = 64
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of `tokens` tokens in rows of `length`: the texts, each followed by EOS, joined and cut."""
    stream: list[int] = []
    for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        stream += [*ids, tokenizer.eos_token_id]
    rows = torch.tensor(stream[: len(stream) // length * length]).view(-1, length)
    return [(ids, ids) for ids in rows.split(tokens // length)]


def pretrain(
    steps: list[tuple[torch.Tensor, torch.Tensor]],
    tokenizer: PreTrainedTokenizerFast,
    output_dir: str | Path,
    seed: int = 0,
    learning_rate: float = 3e-3,
    show: Callable[[int, int, float], None] | None = None,
) -> None:
    """
    Pretrain a new model, a step a batch, and save it with its tokenizer.

    Args:
        steps (`list[tuple[Tensor, Tensor]]`): the batches, input ids and labels, in the order of training.
        tokenizer (`PreTrainedTokenizerFast`): made by `make_tokenizer`.
        output_dir (`str` or `Path`): folder to save to.
        seed (`int`, *optional*, defaults to 0): of the weights.
        learning_rate (`float`, *optional*, defaults to 3e-3): peak; warm-up over 50 steps, cosine to 5 %.
        show (callable, *optional*): called after each step with the step, the number of steps and the loss.
    """
    set_seed(seed)
    model = make_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_cosine(step, len(steps)))
    for number, (ids, labels) in enumerate(steps, start=1):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if show is not None:
            show(number, len(steps), loss.item())
    model.generation_config.update(max_length=None, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


def _warm_cosine(step: int, steps: int, warmup: int = 50) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
