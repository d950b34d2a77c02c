"""What goes from one deployment to another, in pieces: gRPC between replicas refuses messages of 4 MiB. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeVar

T = TypeVar("T")

MESSAGE_BYTES: Final = 2**20
"""What one message should hold at most, give or take an item."""


def batches(items: Sequence[T], size: Callable[[T], int], *, most: int | None = None) -> Iterator[Sequence[T]]:
    """Yield runs of items, none of more than `most`, and none of more bytes than fit a message, but for single ones.

    Args:
        items: In order.
        size: Returns about how many bytes an item takes.
        most: None for any number.
    """
    first, held = 0, 0
    for i, item in enumerate(items):
        held += size(item)
        if i > first and (held > MESSAGE_BYTES or i - first == most):
            yield items[first:i]
            first, held = i, size(item)
    if first < len(items):
        yield items[first:]


def text_bytes(text: str) -> int:
    """Return how many bytes a text takes."""
    return len(text.encode())
