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

    def reserve(self, n: int) -> Reservation:
        """Let `n` sequences in, at once: what is asked next already finds their places taken.

        Raises:
            Overloaded: As `check`.
        """
        self.check(n)
        self.enter(n)
        return Reservation(self, n)

    def enter(self, n: int) -> None:
        self.in_flight += n

    def leave(self, n: int) -> None:
        """`n` sequences have been worked on to their end."""
        self.in_flight -= n
        now = self._clock()
        self._finished.extend([now] * n)

    def give_back(self, n: int) -> None:
        """`n` places were never used."""
        self.in_flight -= n

    def _wait(self, excess: int) -> float:
        """Return how long `excess` sequences take to finish, at the pace of the latest ones."""
        if len(self._finished) < 2:
            return _UNKNOWN_WAIT_S
        elapsed = self._clock() - self._finished[0]
        return min(_LONGEST_WAIT_S, max(1.0, excess * elapsed / len(self._finished)))


class Reservation:
    """The places one HTTP request was let in with, before anybody knew how many sequences it becomes.

    What it needs beyond them it gets: a request that was let in is let in whole.
    """

    def __init__(self, admission: Admission, n: int) -> None:
        self._admission, self._left = admission, n

    def take(self, n: int) -> None:
        """Turn `n` places over to a flight, which will leave them."""
        taken = min(n, self._left)
        self._left -= taken
        self._admission.enter(n - taken)

    def release(self) -> None:
        """Give back what was never taken. Safe to call twice."""
        self._admission.give_back(self._left)
        self._left = 0
