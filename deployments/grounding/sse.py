"""Server-sent events as vLLM writes them, cut apart and put together. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import msgspec

_END: Final = b"\n\n"


class EventSplitter:
    """Cuts a stream of bytes into events, wherever the bytes are cut."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Return the events that are whole now, each with the empty line that ends it."""
        *events, self._rest = (self._rest + data).split(_END)
        return (event + _END for event in events)

    def end(self) -> bytes:
        """Return what is left of an event that never ended."""
        rest, self._rest = self._rest, b""
        return rest


def data_of(event: bytes) -> dict[str, Any] | None:
    """Return an event's data as JSON; None where it has none, is no object (`[DONE]`) or no JSON."""
    for line in event.splitlines():
        if line.startswith(b"data:"):
            try:
                data = msgspec.json.decode(line[5:])
            except msgspec.DecodeError:
                return None
            return data if isinstance(data, dict) else None
    return None


def event_of(data: dict[str, Any], *, named: bool = False) -> bytes:
    """Return data as an event, with its `type` as the event's name where `named`."""
    name = b"event: " + data["type"].encode() + b"\n" if named else b""
    return name + b"data: " + msgspec.json.encode(data) + _END
