"""Files that are there whole or not at all."""

import json
import math
import os
from pathlib import Path
from typing import Any


def plain(value: Any) -> Any:
    """For JSON, which has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: plain(of) for key, of in value.items()}
    if isinstance(value, list | tuple):
        return [plain(of) for of in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(value: Any, file: Path) -> None:
    write_text(json.dumps(plain(value), indent=1, ensure_ascii=False) + "\n", file)


def write_text(text: str, file: Path) -> None:
    """Whole or not at all: an earlier file stays until the new one is complete."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
