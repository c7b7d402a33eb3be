"""Lengths as people write them: 4096, 64K, 1M, 128Ki, 2^20."""

from __future__ import annotations

import re
from fractions import Fraction

from consilience.conf.errors import ConfigError

UNITS = {"": 1, "k": 10**3, "m": 10**6, "ki": 1 << 10, "mi": 1 << 20}
MOST = 1 << 40
NUMBER = re.compile(r"(\d{1,15}(?:\.\d{1,9})?)(?:(?:\^|\*\*)(\d{1,2})|(ki|mi|k|m))?", re.IGNORECASE)


def token_count(text: str, key: str) -> int:
    """Tokens that `text` stands for: K and M are powers of ten, Ki and Mi powers of two.

    ConfigError, naming the setting `key`, if it is not a whole number from 1 to 2^40.
    """
    match = NUMBER.fullmatch(re.sub(r"[ ,_]", "", text))
    if match:
        base, exponent, unit = match.groups()
        count = Fraction(base) ** int(exponent or 1) * UNITS[(unit or "").lower()]
        if count.denominator == 1 and 1 <= count <= MOST:
            return int(count)
    raise ConfigError(
        f"{key} is '{text}', but a number of tokens from 1 to 2^40 is needed: "
        "4096, 64K (64,000), 64Ki (65,536), 1M or 2^20"
    )
