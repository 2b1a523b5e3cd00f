"""
Texts to token ids, the one way: the reward model, the policy and the scorer see the same ids, and their tokenizers
must be one and the same.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import pack_dataset

from .files import InputError
from .rows import Text


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Text, **template_kwargs: Any) -> list[int]:
    """
    Token ids of a prompt, as generation, reward-model training, PPO and scoring all see it: a string with the
    tokenizer's own special tokens, a conversation through the chat template with the generation prompt.
    """
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt)["input_ids"])
        # Some tokenizers end every text with EOS; a prompt goes on
        if ids and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token):
            ids.pop()
        return ids
    text = render(tokenizer, prompt, add_generation_prompt=True, **template_kwargs)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_completion(
    tokenizer: PreTrainedTokenizerBase, prompt: Text, completion: Text, **template_kwargs: Any
) -> list[int]:
    """
    Token ids of a completion, encoded apart from its prompt and ending where the policy stops: at EOS, or at the
    special token that ends a turn under the chat template (Gemma's `<end_of_turn>`). What the template puts behind
    it is cut.

    Raises:
        [`InputError`]: the tokenizer has no EOS token, or the template rewrites the prompt once an answer follows.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise InputError("the tokenizer has no EOS token; set tokenizer.eos_token before training")
    if isinstance(prompt, str):
        ids = list(tokenizer(completion, add_special_tokens=False)["input_ids"])
        return ids if ids and ids[-1] == eos else [*ids, eos]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    before = render(tokenizer, prompt, add_generation_prompt=True, **template_kwargs)
    whole = render(tokenizer, prompt + completion, **template_kwargs)
    if not whole.startswith(before):
        raise InputError(
            "the chat template renders the prompt differently once an answer follows it, so prompt and completion "
            "cannot be encoded apart; use a template that only appends"
        )
    answer, has_end = _until_turn_end(tokenizer, whole[len(before) :])
    ids = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    return ids if has_end else [*ids, eos]


@contextmanager
def in_row(source: str, index: int) -> Iterator[None]:
    """An [`InputError`] inside gets the row's place in front."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{source}, row {index}: {error}") from error


def render(tokenizer: PreTrainedTokenizerBase, conversation: list[dict[str, str]], **kwargs: Any) -> str:
    """
    A conversation as text. The template is a program from the tokenizer's files: transformers runs it in jinja's
    sandbox, where it reaches nothing of Python's, and whatever it raises becomes an [`InputError`].
    """
    try:
        return tokenizer.apply_chat_template(conversation, tokenize=False, **kwargs)
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"the chat template cannot render this conversation of {len(conversation)} messages "
            f"({type(error).__name__}: {reason}); correct the row, or chat_template in the tokenizer's files"
        ) from error


def _until_turn_end(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[str, bool]:
    """
    A rendered answer up to the special tokens that end its turn, and whether there are any. What comes behind them,
    white space and further special tokens (Phi-3's newline and EOS), belongs to the template.
    """
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special = "|".join(re.escape(token) for token in added | set(tokenizer.all_special_tokens))
    end = re.search(rf"((?:{special})+)(?:\s|{special})*$", text) if special else None
    return (text, False) if end is None else (text[: end.end(1)], True)


def turn_end(tokenizer: PreTrainedTokenizerBase, **template_kwargs: Any) -> int | None:
    """The token that ends an answer under the chat template; `None` without a template."""
    if not tokenizer.chat_template:
        return None
    return encode_completion(tokenizer, [{"role": "user", "content": "a"}], "b", **template_kwargs)[-1]


def pack_texts(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    """
    Blocks of `length` token ids for the pretraining loss: the rows' texts, each followed by EOS, joined and cut, as in
    pretraining. The last block of every thousand rows may be shorter.

    Args:
        dataset (`Dataset`): rows of kind `"pretraining"`.
        tokenizer (`PreTrainedTokenizerBase`): tokenizer of the policy.
        length (`int`): tokens a block.

    Returns:
        `Dataset` with the one column `input_ids`.

    Raises:
        [`InputError`]: the tokenizer has no EOS token.
    """

    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no EOS token; set tokenizer.eos_token before training")

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": [*tokenizer(row["text"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]}

    encoded = dataset.map(encode, remove_columns=dataset.column_names, desc="Tokenizing pretraining texts")
    packed = pack_dataset(encoded, length, strategy="wrapped", map_kwargs={"desc": "Packing pretraining texts"})
    return packed.filter(lambda row: len(row["input_ids"]) >= 2, desc="Dropping one-token blocks")


def check_tokenizers(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase, names: tuple[str, str]) -> None:
    """
    Refuse two tokenizers that do not agree on vocabulary, special token ids and chat template, and say in what they
    differ. Policy and reward model exchange token ids, so a difference would go unnoticed into every score.

    Raises:
        [`InputError`]: the first differences found.
    """
    differences = list(_tokenizer_differences(first, second))
    if differences:
        raise InputError(
            f"the tokenizers of {names[0]} and {names[1]} differ: {'; '.join(differences)}; train both from models "
            f"with one tokenizer"
        )


def _tokenizer_differences(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> Iterator[str]:
    a, b = first.get_vocab(), second.get_vocab()
    if a != b:
        tokens = sorted(token for token in a.keys() | b.keys() if a.get(token) != b.get(token))
        example = ", ".join(f"{token!r} is {a.get(token)} and {b.get(token)}" for token in tokens[:3])
        yield f"vocabulary of {len(a)} and {len(b)} tokens ({example})"
    # The pad token is left out: it never reaches a model unmasked, and trainers set it when it is missing
    for name in ("bos_token_id", "eos_token_id"):
        if getattr(first, name) != getattr(second, name):
            yield f"{name} {getattr(first, name)} and {getattr(second, name)}"
    if (first.chat_template or None) != (second.chat_template or None):
        yield "chat template"
    text = "The quick brown fox, 1 2 3."
    if a == b and first(text)["input_ids"] != second(text)["input_ids"]:
        yield f"token ids of {text!r}"
