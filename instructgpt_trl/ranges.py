"""Numbers that a setting may be, for the configs and for the flags of recipes."""

import dataclasses
import math
import sys
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple

from .data import InputError

__all__ = ["ABOVE_0", "BELOW_1", "COUNT", "FROM_0", "SEED", "SHARE", "Range", "check_ranges", "shown"]


class Range(NamedTuple):
    """Numbers from `least` to `most`; `open` says which of the two are out, `whole` that there is nothing between."""

    least: float = -math.inf
    most: float = math.inf
    open: tuple[float, ...] = ()
    whole: bool = False
    infinite: bool = False

    def __contains__(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, Integral if self.whole else Real):
            return False
        if isinstance(value, Integral):  # which may be too large for a float
            return self.least <= value <= self.most and value not in self.open
        finite = math.isfinite(value) or (self.infinite and value == math.inf)
        return finite and self.least <= value <= self.most and value not in self.open

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        if self.least == -math.inf:
            return kind
        least = f"above {self.least:g}" if self.least in self.open else f"from {self.least:g}"
        if self.most == math.inf:
            return f"{kind} {least}" + ("" if self.least in self.open else " on")
        return f"{kind} {least} to " + (f"below {self.most:g}" if self.most in self.open else f"{self.most:g}")


COUNT = Range(1, whole=True)
FROM_0 = Range(0)
SEED = Range(0, 2**32 - 1, whole=True)
SHARE = Range(0, 1)
BELOW_1 = Range(0, 1, open=(1,))
ABOVE_0 = Range(0, open=(0,))
LARGEST = 1e30  # float32 ends a little further on


def check_ranges(config: Any, ranges: Mapping[str, Range]) -> None:
    """
    Refuse a number of a dataclass outside its range, or beyond what float32 and an index can hold.

    Raises:
        [`InputError`]: the field, its value and what was expected.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name, allowed in ranges.items():
        value = getattr(config, name, None)
        optional = defaults.get(name, 0) is None or name in ("max_length", "max_prompt_length")
        if name in defaults and value not in allowed and not (value is None and optional):
            raise InputError(f"{name}={shown(value)}: expected {allowed}{' or none' * optional}; correct it")
    for name in defaults:
        value = getattr(config, name)
        largest = sys.maxsize if isinstance(value, Integral) else LARGEST
        if isinstance(value, Real) and largest < abs(value) < math.inf:
            raise InputError(f"{name}={shown(value)}: expected a number up to {largest:g}; correct it")


def shown(value: Any) -> str:
    """A value as it is written, of 80 characters at most."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except ValueError:  # thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:80]}.."
