"""Pretraining text as an endless stream of blocks."""

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .encoding import pack_texts
from .episodes import Episodes, pad_episodes


class PretrainingStream:
    """
    Blocks of token ids in shuffled epochs without end. Block number n depends on the seed and n alone, so that a
    resumed run goes on where it stopped without any state of its own.

    Args:
        dataset (`Dataset`): rows of kind "pretraining".
        tokenizer (`PreTrainedTokenizerBase`): tokenizer of the policy.
        length (`int`): tokens a block.
        seed (`int`): seed of the order.
    """

    def __init__(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, length: int, seed: int):
        self.blocks = pack_texts(dataset, tokenizer, length)
        self.seed = seed

    def take(self, first: int, count: int) -> list[list[int]]:
        """Blocks `first` to `first + count` of the stream."""
        size, orders, taken = len(self.blocks), {}, []
        for number in range(first, first + count):
            epoch, index = divmod(number, size)
            if epoch not in orders:
                generator = torch.Generator().manual_seed(self.seed + epoch)
                orders[epoch] = torch.randperm(size, generator=generator).tolist()
            taken.append(self.blocks[orders[epoch][index]]["input_ids"])
        return taken


def as_episodes(blocks: list[list[int]]) -> Episodes:
    """Blocks as episodes whose prompt is the first token, which nothing predicts."""
    return pad_episodes([block[:1] for block in blocks], [block[1:] for block in blocks], pad_id=0)
