"""
Personal data in texts, by the patterns and check sums of Presidio's recognisers: no model, no network.

The paper filters them from the prompts of the training split [InstructGPT 3.2].
"""

import math
import re
from bisect import bisect
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

from .files import InputError

__all__ = ["LEAST_SCORE", "SIGNS", "PersonalData"]

# What is looked for, and a cheap question to the text without which Presidio cannot find it: a recogniser takes up to
# a millisecond a prompt, and most prompts have nothing
SIGNS: dict[str, str] = {
    "EMAIL_ADDRESS": r"@",
    "PHONE_NUMBER": r"\d(?:\D{0,6}\d){6}",
    "CREDIT_CARD": r"\d(?:[- ]?\d){11}",
    "IBAN_CODE": r"(?i:[a-z]{2}\s?-?\d{2})",
    "IP_ADDRESS": r"\d\.\d{1,3}\.\d|:[0-9A-Fa-f.]*:",
    "US_SSN": r"\d{3}[- .]\d{2}[- .]\d{4}",
}
# Presidio's scores are of one pattern: below this, as of nine plain digits, it wants words around that speak for it
LEAST_SCORE = 0.4
NUMBERS = {"PHONE_NUMBER", "CREDIT_CARD", "US_SSN"}
LOCAL_PART, DOMAIN = 80, 260  # characters of an address before and behind its @: 64 and 255 are allowed
DECIMAL = re.compile(r"(?<![\d.])\d+\.\d+(?![\d.]*\d)")
NORTH_AMERICA = r"(?<!\d)(?:\+?1[-. ]?)?(?:\(\d{3}\) ?|\d{3}[-. ])\d{3}[-. ]\d{4}(?!\d)"


class PersonalData:
    """
    Finds e-mail addresses, phone numbers, credit cards, IBANs, IP addresses and US social security numbers.

    Raises:
        [`InputError`]: presidio-analyzer is not installed.

    Example:

    ```python
    >>> PersonalData().mask("Write to ann@example.com.")
    'Write to <EMAIL_ADDRESS>.'
    ```
    """

    def __init__(self):
        self._signs = {kind: re.compile(pattern) for kind, pattern in SIGNS.items()}

    @cached_property
    def _recognizers(self) -> dict[str, Callable[[str], list[Any]]]:
        """Loaded when the first text has a sign of something."""
        try:
            import presidio_analyzer.predefined_recognizers as presidio
            import tldextract
            from presidio_analyzer import Pattern, PatternRecognizer
        except ImportError:
            raise InputError("personal data: pip install -c constraints.txt -e '.[data]' for presidio") from None
        # The list it came with, not the network's
        domains = tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None)

        class Email(presidio.EmailRecognizer):
            def validate_result(self, pattern_text: str) -> bool:
                return domains(pattern_text).top_domain_under_public_suffix != ""

        # Presidio's wants a number that is in use, and people write others, such as those of area code 555
        written = PatternRecognizer("PHONE_NUMBER", patterns=[Pattern("North America", NORTH_AMERICA, 0.5)])
        recognizers = {
            "EMAIL_ADDRESS": [Email()],
            "PHONE_NUMBER": [presidio.PhoneRecognizer(), written],
            "CREDIT_CARD": [presidio.CreditCardRecognizer()],
            "IBAN_CODE": [presidio.IbanRecognizer()],
            "IP_ADDRESS": [presidio.IpRecognizer()],
            "US_SSN": [presidio.UsSsnRecognizer()],
        }
        return {
            kind: lambda text, kind=kind, each=each: [hit for one in each for hit in one.analyze(text, [kind], None)]
            for kind, each in recognizers.items()
        }

    def load(self) -> "PersonalData":
        """Load Presidio now: processes that are forked later share it, where each would load its own."""
        _ = self._recognizers
        return self

    def suspects(self, text: str) -> bool:
        """Whether there is a sign of something; without one [`find`] finds nothing."""
        return any(sign.search(text) for sign in self._signs.values())

    def find(self, text: str) -> list[tuple[int, int, str]]:
        """Start, end and kind of each, in their order; of two that overlap the more certain, then the longer."""
        decimals = [number.span() for number in DECIMAL.finditer(text)]
        found = {
            (-result.score, result.start - result.end, result.start, result.end, kind)
            for kind, sign in self._signs.items()
            if sign.search(text)
            for result in self._hits(kind, text)
            if result.score >= LEAST_SCORE and not (kind in NUMBERS and _inside(decimals, result.start))
        }
        chosen: list[tuple[int, int, str]] = []  # apart from each other, in their order
        for _, _, start, end, kind in sorted(found):
            place = bisect(chosen, (start, end, kind))
            before_ends = chosen[place - 1][1] if place else 0
            next_starts = chosen[place][0] if place < len(chosen) else len(text)
            if before_ends <= start and end <= next_starts:
                chosen.insert(place, (start, end, kind))
        return chosen

    def _hits(self, kind: str, text: str) -> Iterator[Any]:
        """What Presidio finds; of e-mail addresses around each @ alone, since its pattern is cubic in the text."""
        if kind != "EMAIL_ADDRESS":
            yield from self._recognizers[kind](text)
            return
        for sign in re.finditer("@", text):
            start = max(0, sign.start() - LOCAL_PART)
            for hit in self._recognizers[kind](text[start : sign.start() + DOMAIN]):
                hit.start, hit.end = hit.start + start, hit.end + start
                yield hit

    def mask(self, text: str) -> str:
        """The text with the kind in place of each, in angle brackets, also of what overlapped a more certain one."""
        while found := self.find(text):  # what is put in has no digit and no @, of which there are fewer each time
            for start, end, kind in reversed(found):
                text = f"{text[:start]}<{kind}>{text[end:]}"
        return text


def _inside(spans: list[tuple[int, int]], place: int) -> bool:
    """Whether the digits there are of a number like 0.2916667, which is nobody's to call or to pay from."""
    before = bisect(spans, (place, math.inf))
    return bool(before) and place < spans[before - 1][1]
