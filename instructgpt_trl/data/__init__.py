"""Rows of demonstrations, rankings, prompts and texts: loading, checking, encoding."""

from .encoding import check_tokenizers, encode_completion, encode_prompt, pack_texts
from .files import InputError
from .formats import as_conversations, check_output_dir, check_rows, load_rows

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
