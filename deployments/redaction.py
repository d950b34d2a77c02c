"""Keeps API keys out of logs, where somebody put one in a place it does not belong, such as a path."""

from __future__ import annotations

import re
from typing import Final

KEY_PREFIX: Final = "gs-"
_KEY: Final = re.compile(rf"{KEY_PREFIX}[A-Za-z0-9_-]{{4,}}")


def redacted(text: str) -> str:
    """Return a text for a log, without the keys in it."""
    return _KEY.sub(f"{KEY_PREFIX}…", text)
