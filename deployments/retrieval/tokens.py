"""Counting tokens as the model that will read them does, without loading the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

CountTokens = Callable[[Sequence[str]], list[int]]
"""Returns the number of tokens of each text, without special ones."""

_PIECES = re.compile(r"\w+|[^\w\s]")


def tokenizer_file(model: str) -> Path | None:
    """Return the `tokenizer.json` of a model's folder, or of a Hugging Face id that has been downloaded already."""
    if (path := Path(model) / "tokenizer.json").is_file():
        return path.resolve()
    if Path(model).exists():
        return None
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(model, "tokenizer.json")
    except ValueError:
        return None
    return Path(found) if isinstance(found, str) else None


def counter(tokenizer: Path | None) -> CountTokens:
    """Return a counter by a `tokenizer.json`; without one, an estimate that errs towards more."""
    if tokenizer is None:
        return estimate
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(str(tokenizer))
    loaded.no_truncation()
    loaded.no_padding()

    def count(texts: Sequence[str]) -> list[int]:
        return [len(encoding.ids) for encoding in loaded.encode_batch_fast(list(texts), add_special_tokens=False)]

    return count


def estimate(texts: Sequence[str]) -> list[int]:
    """Count words by fours of UTF-8 bytes, and marks one by one."""
    return [sum(1 + (len(piece.encode()) - 1) // 4 for piece in _PIECES.findall(text)) for text in texts]
