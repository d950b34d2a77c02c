"""What tests hear and wait by: everything is noted, whoever waits for it wakes, and time passes when a test says so."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

LIMIT_S = 60.0
"""Nothing here takes as long, on a machine that stands still for seconds either; what does is lost."""


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

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Leaps:
    """Leaps of the clock by which event loops and timeouts go, which goes on by itself besides.

    For what compares two times: a test leaps over the longer one, instead of waiting and hoping to wait long enough.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._leapt_s = 0.0
        monotonic = time.monotonic
        patch.setattr(time, "monotonic", lambda: monotonic() + self._leapt_s)

    async def over(self, seconds: float) -> None:
        """Leap, and let what is due by then happen."""
        self._leapt_s += seconds
        for _ in range(3):  # the loop looks at its timers, a timer cancels a task, the task hears of it
            await asyncio.sleep(0)


async def until(condition: Callable[[], object]) -> None:
    """Let others run until `condition` holds, for what tells nobody when it does."""
    async with asyncio.timeout(LIMIT_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)
