"""
Episodes as tensors: prompt and completion in one right-padded row, and what is counted inside it.

Right padding makes every row look to the network as it does in reward-model training, whatever its neighbours, and
needs no position ids. All positions come from lengths, never from `id != pad` (the pad token may be EOS).

Shapes: B episodes, P and T prompt and completion tokens, L = longest P + T.
"""

from collections.abc import Sequence

import torch

Episodes = dict[str, torch.Tensor]  # every tensor has the episodes as its first dimension


def pad_episodes(
    prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], pad_id: int
) -> Episodes:
    """
    One dictionary of tensors from lists of token ids.

    Returns:
        `input_ids` (B, L), right-padded; `prompt_lengths` (B,), `completion_lengths` (B,); `mask` (B, T), True on the
        completion's tokens.
    """
    rows = [[*prompt, *completion] for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
    input_ids = torch.full((len(rows), max(map(len, rows))), pad_id, dtype=torch.long)
    for row, ids in zip(input_ids, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    prompt_lengths = torch.tensor([len(ids) for ids in prompt_ids])
    completion_lengths = torch.tensor([len(ids) for ids in completion_ids])
    mask = torch.arange(int(completion_lengths.max())) < completion_lengths[:, None]
    return {
        "input_ids": input_ids,
        "prompt_lengths": prompt_lengths,
        "completion_lengths": completion_lengths,
        "mask": mask,
    }


def take_rows(episodes: Episodes, rows: torch.Tensor) -> Episodes:
    """
    The episodes `rows`, padded only as far as they need: a micro-batch.

    Whoever takes the same rows gets the same tensors, so that the log-probs of a rollout and those of its first
    optimizer step come from one computation and their ratio is exactly 1.
    """
    taken = {name: tensor[rows] for name, tensor in episodes.items()}
    length = int((taken["prompt_lengths"] + taken["completion_lengths"]).max())
    tokens = int(taken["completion_lengths"].max())
    for name, tensor in taken.items():
        if name == "input_ids":
            taken[name] = tensor[:, :length]
        elif tensor.dim() == 2:
            taken[name] = tensor[:, :tokens]
    return taken


def by_length(episodes: Episodes, rows: torch.Tensor, group: int) -> torch.Tensor:
    """`rows` in groups of `group` as they come, longest first inside each: micro-batches have little padding then."""
    lengths = (episodes["prompt_lengths"] + episodes["completion_lengths"]).cpu()  # where `rows` are
    return torch.cat([some[lengths[some].argsort(descending=True, stable=True)] for some in rows.split(group)])


def attention_mask(episodes: Episodes) -> torch.Tensor:
    """(B, L), 1 on the tokens of prompt and completion."""
    lengths = episodes["prompt_lengths"] + episodes["completion_lengths"]
    positions = torch.arange(episodes["input_ids"].size(1), device=lengths.device)
    return (positions < lengths[:, None]).long()


def before_tokens(episodes: Episodes) -> torch.Tensor:
    """
    (B, T): the position just before each completion token, where the network's output predicts that token and the
    value `values[t]` is read. Positions of padding are clamped into the row; the mask leaves them out.
    """
    steps = torch.arange(episodes["mask"].size(1), device=episodes["mask"].device)
    return (episodes["prompt_lengths"][:, None] - 1 + steps).clamp(max=episodes["input_ids"].size(1) - 1)


def last_token(episodes: Episodes) -> torch.Tensor:
    """(B,): the position of the last real token, where the score is read."""
    return episodes["prompt_lengths"] + episodes["completion_lengths"] - 1


def padding(episodes: Episodes) -> torch.Tensor:
    """(B, T): True behind the end of a completion, whatever the mask leaves out besides."""
    steps = torch.arange(episodes["mask"].size(1), device=episodes["mask"].device)
    return steps >= episodes["completion_lengths"][:, None]


def completion_labels(episodes: Episodes) -> torch.Tensor:
    """(B, T): the completion's tokens, and -100 on padding."""
    steps = torch.arange(episodes["mask"].size(1), device=episodes["mask"].device)
    positions = (episodes["prompt_lengths"][:, None] + steps).clamp(max=episodes["input_ids"].size(1) - 1)
    return episodes["input_ids"].gather(1, positions).masked_fill(padding(episodes), -100)
