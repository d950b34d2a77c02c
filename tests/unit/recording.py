"""What tests of the channel and the Fleet hear: everything is noted, and whoever waits for it wakes."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

LIMIT_S = 10.0
"""Nothing here takes as long; what does is lost."""


class Recorder:
    """Notes what it is told, counts as `deployments.fleet.channel.Metrics` does, and wakes those who wait."""

    def __init__(self) -> None:
        self.noted: list[Any] = []
        self.counts: Counter[tuple[str, ...]] = Counter()
        self._changed = asyncio.Event()

    def note(self, *what: Any) -> None:
        self.noted.append(what[0] if len(what) == 1 else what)
        self._changed.set()

    def inc(self, name: str, value: float = 1, **tags: str) -> None:
        self.counts[(name, *tags.values())] += int(value)
        self._changed.set()

    def set(self, name: str, value: float, **tags: str) -> None:
        self._changed.set()

    def observe(self, name: str, value: float, **tags: str) -> None:
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something that was noted or counted makes `condition` true."""
        async with asyncio.timeout(LIMIT_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now
