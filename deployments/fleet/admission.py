"""How much work one Router takes for one model. Pure: the clock is passed in."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

from deployments.errors import Overloaded

_WINDOW: Final = 64
_UNKNOWN_WAIT_S: Final = 5.0
_LONGEST_WAIT_S: Final = 120.0


class Admission:
    """Counts sequences in this Router and refuses beyond what engines can work on plus a bounded queue.

    Args:
        max_queued: Sequences held beyond the capacity of the running engines.
        clock: Monotonic seconds.
    """

    def __init__(self, max_queued: int, *, clock: Callable[[], float]) -> None:
        self._max_queued = max_queued
        self._clock = clock
        self._finished: deque[float] = deque(maxlen=_WINDOW)
        self.capacity = 0
        self.in_flight = 0

    def check(self, n: int) -> None:
        """Raise unless `n` more sequences may start.

        Raises:
            Overloaded: With the time after which, at the present pace, there is room again.
        """
        limit = self.capacity + self._max_queued
        if self.in_flight + n > limit:
            raise Overloaded(
                f"This server holds {self.in_flight} requests for this model and takes {limit} at most. Retry later.",
                retry_after_s=self._wait(self.in_flight + n - limit),
            )

    def enter(self, n: int) -> None:
        self.in_flight += n

    def leave(self, n: int) -> None:
        self.in_flight -= n
        now = self._clock()
        self._finished.extend([now] * n)

    def _wait(self, excess: int) -> float:
        """Return how long `excess` sequences take to finish, at the pace of the latest ones."""
        if len(self._finished) < 2:
            return _UNKNOWN_WAIT_S
        elapsed = self._clock() - self._finished[0]
        return min(_LONGEST_WAIT_S, max(1.0, excess * elapsed / len(self._finished)))
