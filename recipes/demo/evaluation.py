"""Measuring a finished model of the demo: samples, win rate, gold reward, KL, pretraining loss."""

from dataclasses import dataclass

import numpy as np
import torch
from gold import gold_reward
from labelers import Labeler
from tasks import Task
from transformers import PreTrainedModel, PreTrainedTokenizerFast

BATCH_SIZE = 128


@dataclass
class Samples:
    """One completion for each of `prompts`: as ids up to and including EOS, and as text without it."""

    prompts: list[str]
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    texts: list[str]


@torch.no_grad()
def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str], max_new_tokens: int, seed: int
) -> Samples:
    """Sample one completion for each prompt at temperature 1, from the model's own distribution."""
    torch.manual_seed(seed)
    model.eval()
    prompt_ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    # Prompts of like length together, so that little is padded
    order = sorted(range(len(prompts)), key=lambda index: len(prompt_ids[index]))
    completion_ids: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), BATCH_SIZE):
        rows = order[start : start + BATCH_SIZE]
        batch = tokenizer.pad({"input_ids": [prompt_ids[row] for row in rows]}, return_tensors="pt")
        out = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            do_sample=True,
            top_k=0,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )[:, batch["input_ids"].shape[1] :]
        for row, ids in zip(rows, out.tolist(), strict=True):
            end = ids.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in ids else len(ids)
            completion_ids[row] = ids[:end]
    texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    return Samples(prompts, prompt_ids, completion_ids, texts)


@torch.no_grad()
def sequence_logprobs(model: PreTrainedModel, samples: Samples) -> np.ndarray:
    """(N,) sums of the completions' log-probabilities, nats."""
    model.eval()
    sums = np.zeros(len(samples.prompts))
    order = sorted(range(len(sums)), key=lambda i: len(samples.prompt_ids[i]) + len(samples.completion_ids[i]))
    for start in range(0, len(order), BATCH_SIZE):
        rows = order[start : start + BATCH_SIZE]
        whole = [samples.prompt_ids[row] + samples.completion_ids[row] for row in rows]
        length = max(map(len, whole))
        ids = torch.tensor([row + [0] * (length - len(row)) for row in whole])
        # On the right of a causal model padding changes nothing before it
        logprobs = model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        for index, row in enumerate(rows):
            first = len(samples.prompt_ids[row]) - 1
            sums[row] = logprobs[index, first : first + len(samples.completion_ids[row])].sum()
    return sums


def mean_kl(model: PreTrainedModel, reference: PreTrainedModel, samples: Samples) -> float:
    """KL to the reference in nats, summed over a completion, averaged over `samples`, which are the model's own."""
    return float((sequence_logprobs(model, samples) - sequence_logprobs(reference, samples)).mean())


@torch.no_grad()
def pretraining_loss(model: PreTrainedModel, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Mean negative log-likelihood a token of held-out web text, nats; `batches` as made by `base.batches`."""
    training = model.training
    model.eval()
    total, tokens = 0.0, 0
    for ids, labels in batches:
        count = int((labels[:, 1:] != -100).sum())
        total += model(input_ids=ids, labels=labels).loss.item() * count
        tokens += count
    model.train(training)  # in the middle of a training a trainer tells by it which metrics to log
    return total / tokens


def win_rate(
    tasks: dict[str, Task], samples: Samples, opponents: Samples, labelers: list[Labeler], seed: int = 0
) -> list[float]:
    """
    How often the labelers prefer `samples` to `opponents` on the same prompts; a tie counts a half.

    Returns:
        `[mean, low, high]`: the mean over prompts of the labelers' mean, and its 95 % bootstrap interval over prompts.
    """
    wins = np.array(
        [
            np.mean([labeler.prefers(tasks[prompt], ours, theirs) for labeler in labelers])
            for prompt, ours, theirs in zip(samples.prompts, samples.texts, opponents.texts, strict=True)
        ]
    )
    return mean_with_interval(wins, seed)


def mean_with_interval(values: np.ndarray, seed: int) -> list[float]:
    """`[mean, low, high]` of the values of the prompts, (N,): their mean and its 95 % bootstrap interval."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(2000, len(values)))].mean(1)
    return [float(values.mean()), float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))]


def mean_gold(tasks: dict[str, Task], samples: Samples) -> float:
    """Mean gold reward of the samples."""
    return float(
        np.mean([gold_reward(tasks[p], text) for p, text in zip(samples.prompts, samples.texts, strict=True)])
    )
