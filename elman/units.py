"""Numbers as people write them: counts (50m), durations (1h30m), and back."""

from __future__ import annotations

import math
import re

from elman.errors import UsageError

_COUNT = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([kmbg]?)", re.IGNORECASE)
_COUNT_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}
_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?", re.IGNORECASE)


def parse_count(text: str, option: str) -> int:
    """``"50m"`` -> 50_000_000. Suffixes k, m, b (or g), or none.

    Raises:
        UsageError: not such a number, or not at least 1; ``option`` is named in the message.
    """
    match = _COUNT.fullmatch(text.strip())
    if match:
        value = round(float(match[1]) * _COUNT_UNITS[match[2].lower()])
        if 1 <= value < 10**15:
            return value
    raise UsageError(f"{option} {text!r} is no count: give a number with an optional k, m or b, such as 50m")


def parse_duration(text: str, option: str) -> float:
    """``"10m"``, ``"90s"``, ``"1h30m"``, ``"45"`` -> seconds.

    Raises:
        UsageError: not such a duration, or not above zero; ``option`` is named in the message.
    """
    match = _DURATION.fullmatch(text.strip())
    if match and any(match.groups()):
        hours, minutes, seconds = (float(group or 0) for group in match.groups())
        value = hours * 3600 + minutes * 60 + seconds
        if 0 < value <= 365 * 24 * 3600:
            return value
    raise UsageError(f"{option} {text!r} is no duration: give something like 90s, 10m or 1h30m, up to a year")


def format_count(value: float) -> str:
    """49_490_000 -> ``"49.5M"``."""
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= 0.9995 * size:  # 999,900 is 1M, not 1000K
            return f"{value / size:.3g}{suffix}"
    return f"{value:.0f}"


def format_bytes(value: float) -> str:
    """2_147_483_648 -> ``"2.0 GiB"``."""
    for size, suffix in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(value) >= size:
            return f"{value / size:.1f} {suffix}"
    return f"{value:.0f} B"


def format_duration(seconds: float) -> str:
    """5400 -> ``"1h30m"``."""
    seconds = round(seconds)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds % 60:02d}s" if minutes else f"{seconds}s"


def bits(nats: float) -> float:
    """Nats to bits."""
    return nats / math.log(2)
