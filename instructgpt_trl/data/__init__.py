"""Rows of demonstrations, rankings, prompts and texts: loading, checking, encoding."""

from .formats import (
    InputError,
    as_conversations,
    check_output_dir,
    check_rows,
    check_tokenizers,
    encode_completion,
    encode_prompt,
    load_rows,
    pack_texts,
)

__all__ = [
    "InputError",
    "as_conversations",
    "check_output_dir",
    "check_rows",
    "check_tokenizers",
    "encode_completion",
    "encode_prompt",
    "load_rows",
    "pack_texts",
]
