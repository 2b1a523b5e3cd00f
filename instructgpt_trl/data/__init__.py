"""Rows of demonstrations, rankings, prompts and texts: loading, checking, encoding."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .encoding import check_tokenizers, encode_completion, encode_prompt, pack_texts
    from .files import InputError, check_output_dir, parse_json, read_rows, write_rows
    from .formats import as_conversations, check_rows, load_rows
    from .rows import check_row

# Loaded when first used: what reads and checks plain rows does not wait for torch
_HOMES = {
    "InputError": "files",
    "as_conversations": "formats",
    "check_output_dir": "files",
    "check_row": "rows",
    "check_rows": "formats",
    "check_tokenizers": "encoding",
    "encode_completion": "encoding",
    "encode_prompt": "encoding",
    "load_rows": "formats",
    "pack_texts": "encoding",
    "parse_json": "files",
    "read_rows": "files",
    "write_rows": "files",
}

__all__ = [
    "InputError",
    "as_conversations",
    "check_output_dir",
    "check_row",
    "check_rows",
    "check_tokenizers",
    "encode_completion",
    "encode_prompt",
    "load_rows",
    "pack_texts",
    "parse_json",
    "read_rows",
    "write_rows",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
