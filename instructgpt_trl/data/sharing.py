"""
Completions of one prompt behind one copy of it: `prompt, completion 1, ..., completion K` is one sequence, in which a
completion sees the prompt and itself. Scores are those of K sequences, for P + K * T tokens instead of K * (P + T).

Shapes: N completions, R sequences ("rows"), L their padded length. A segment is a prompt or a completion.
"""

import torch
from torch import Tensor

PADDING = -1


def share_prompts(
    prompts: list[list[int]],
    completions: list[list[list[int]]],
    pad_token_id: int,
    pad_to_multiple_of: int | None = None,
) -> tuple[dict[str, Tensor], list[int]]:
    """
    Put prompts with their completions into as few rows as hold them at the length of the longest.

    Args:
        prompts (B lists of ids, each not empty): prompts.
        completions (B lists of lists of ids): the completions of each.
        pad_token_id (`int`): what to pad with.
        pad_to_multiple_of (`int`, *optional*): round L up to a multiple of this.

    Returns:
        `dict` of `input_ids`; `position_ids`, which start behind the prompt again for each completion; `segments`, a
        number for each segment of a row; `prefixes`, the number of the segment that a token's own segment stands
        behind; (R, L) each. And `ends` (N,), where completions end in the flattened rows, prompt by prompt in the
        order of the second result: indices of `prompts`.

    Source: first-fit decreasing bin packing.
    """
    sizes = [len(prompt) + sum(map(len, own)) for prompt, own in zip(prompts, completions, strict=True)]
    length, rows = max(sizes), []
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        room = next((row for row in rows if sum(sizes[i] for i in row) + sizes[index] <= length), None)
        if room is None:
            rows.append(room := [])
        room.append(index)
    if pad_to_multiple_of:
        length = -(-length // pad_to_multiple_of) * pad_to_multiple_of
    batch = {name: [] for name in ("input_ids", "position_ids", "segments", "prefixes")}
    ends = []
    for number, row in enumerate(rows):
        ids, positions, segments, prefixes = [], [], [], []
        for index in row:
            prompt, prefix = prompts[index], segments[-1] + 1 if segments else 0
            for segment, part in enumerate([prompt, *completions[index]], start=prefix):
                start = 0 if segment == prefix else len(prompt)
                ids += part
                positions += range(start, start + len(part))
                segments += [segment] * len(part)
                prefixes += [prefix] * len(part)
                if segment != prefix:
                    ends.append(number * length + len(ids) - 1)
        padding = length - len(ids)
        batch["input_ids"].append(ids + [pad_token_id] * padding)
        batch["position_ids"].append(positions + [0] * padding)
        batch["segments"].append(segments + [PADDING] * padding)
        batch["prefixes"].append(prefixes + [PADDING] * padding)
    tensors = {name: torch.tensor(lists) for name, lists in batch.items()}
    return {**tensors, "ends": torch.tensor(ends)}, [index for row in rows for index in row]


def shared_attention_mask(segments: Tensor, prefixes: Tensor) -> Tensor:
    """
    (R, 1, L, L), True where a token (third dimension) sees another: the tokens up to itself of its own segment and of
    the prompt before that. Padding sees padding, since a row of a softmax must see something.
    """
    length = segments.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    same = segments[:, :, None] == segments[:, None, :]
    behind = prefixes[:, :, None] == segments[:, None, :]
    return (earlier & (same | behind))[:, None]
