"""Text for terminals: nothing in it can move the cursor."""

from __future__ import annotations

# Control characters become their Unicode pictures; C1 controls have none.
_CONTROLS = {code: 0x2400 + code for code in range(32)} | {127: 0x2421} | dict.fromkeys(range(128, 160), 0xFFFD)
_IN_TEXT = {code: picture for code, picture in _CONTROLS.items() if chr(code) not in "\t\n"}


def readable(text: str) -> str:
    """Control characters but tab and newline shown as pictures, the document delimiter among them."""
    return text.translate(_IN_TEXT)


def one_line(text: str) -> str:
    """All control characters shown as pictures, and what cannot be encoded (a file's name, say) escaped."""
    return text.translate(_CONTROLS).encode("utf-8", "backslashreplace").decode()
