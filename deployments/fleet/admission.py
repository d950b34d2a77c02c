"""How much work one Router takes for one model. Pure: the clock is passed in."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Final

from deployments.errors import BadRequest, Overloaded

_WINDOW: Final = 64
_UNKNOWN_WAIT_S: Final = 5.0
_LONGEST_WAIT_S: Final = 120.0


class Admission:
    """Counts sequences in this Router and refuses beyond what engines can work on plus a bounded queue.

    The queue has two bounds: how many wait, and for how long the last of them will, at the pace at which engines finish
    when all of them are busy. Engines that are not busy say nothing about what they could do.

    A key that holds less than its even share of what engines work on is let in whatever others have queued: its turn
    comes first, and a greedy one's queue must not shut it out. That adds no more to the bound than engines work on, or
    one for each key.

    Args:
        max_queued: Sequences held beyond the capacity of the running engines.
        max_wait_s: How long one of them may have to wait for an engine.
        clock: Monotonic seconds.
    """

    def __init__(self, max_queued: int, *, max_wait_s: float = math.inf, clock: Callable[[], float]) -> None:
        self._max_queued, self._max_wait_s = max_queued, max_wait_s
        self._clock = clock
        self._capacity = 0
        self.in_flight = 0
        self._busy_s, self._at = 0.0, clock()
        self._finished: deque[float] = deque(maxlen=_WINDOW)
        """When sequences have ended, in seconds that engines had been busy for by then."""
        self._held: dict[str, int] = {}
        """What requests of each key were let in with and have not given back."""

    @property
    def capacity(self) -> int:
        """Sequences that the running engines work on at once."""
        return self._capacity

    @capacity.setter
    def capacity(self, sequences: int) -> None:
        self._advance()
        self._capacity = sequences
        # At least two batches of engines that work in step.
        self._finished = deque(self._finished, maxlen=max(_WINDOW, 2 * sequences))

    def check(self, n: int, key: str | None = None) -> None:
        """Raise unless `n` more sequences may start, of this key where there are keys.

        Raises:
            Overloaded: With the time after which, at the present pace, there is room again.
            BadRequest: There never is, for so many.
        """
        self._advance()
        if key is not None and self._held.get(key, 0) + n <= self._even_share(key):
            return
        limit = self._capacity + self._max_queued
        if self._capacity and n > limit:
            raise BadRequest(f"{n} answers at once are more than this server takes: {limit}.", param="n")
        if self.in_flight + n > limit:
            raise Overloaded(
                f"This server holds {self.in_flight} requests for this model and takes {limit} at most. Retry later.",
                retry_after_s=_bounded(self._wait(self.in_flight + n - limit)),
            )
        queued = self.in_flight + n - self._capacity
        # A few always wait in each engine, so that it has something to draw from.
        if self._capacity and queued > max(4, self._capacity // 8):
            wait_s = self._wait(queued)
            if wait_s is not None and wait_s > self._max_wait_s:
                raise Overloaded(
                    f"All engines of this model are busy: this request would wait for about {wait_s:.0f} s.",
                    retry_after_s=_bounded(wait_s - self._max_wait_s),
                )

    def _even_share(self, key: str) -> int:
        return max(1, (self._capacity or self._max_queued) // len(self._held.keys() | {key}))

    def reserve(self, n: int, key: str | None = None) -> Reservation:
        """Let `n` sequences in, at once: what is asked next already finds their places taken.

        Raises:
            Overloaded: As `check`.
        """
        self.check(n, key)
        self.enter(n)
        if key is not None:
            self._held[key] = self._held.get(key, 0) + n
        return Reservation(self, n, key)

    def over(self, n: int, key: str) -> None:
        """A key's request that was let in with `n` is over."""
        self._held[key] -= n
        if not self._held[key]:
            del self._held[key]

    def enter(self, n: int) -> None:
        self._advance()
        self.in_flight += n

    def leave(self, n: int) -> None:
        """`n` sequences have been worked on to their end."""
        self._advance()
        if self._is_busy:
            self._finished.extend([self._busy_s] * n)
        self.in_flight -= n

    def give_back(self, n: int) -> None:
        """`n` places were never used."""
        self._advance()
        self.in_flight -= n

    @property
    def _is_busy(self) -> bool:
        return self.in_flight >= max(1, self._capacity)

    def _advance(self) -> None:
        now = self._clock()
        if self._is_busy:
            self._busy_s += now - self._at
        self._at = now

    def _wait(self, sequences: int) -> float | None:
        """Return how long so many sequences take to finish at the pace of the latest ones; None where none is known.

        Engines that begin together end together: the first few of a batch say nothing about the pace of all of it.
        """
        whole = len(self._finished) == self._finished.maxlen
        finished = len(self._finished) - whole
        elapsed = self._busy_s - (self._finished[0] if whole else 0.0)
        enough = max(2, self._capacity)
        return sequences * elapsed / finished if finished >= enough and elapsed > 0 else None


def _bounded(wait_s: float | None) -> float:
    return _UNKNOWN_WAIT_S if wait_s is None else min(_LONGEST_WAIT_S, max(1.0, wait_s))


class Reservation:
    """The places one HTTP request was let in with, before anybody knew how many sequences it becomes.

    What it needs beyond them it gets: a request that was let in is let in whole.
    """

    def __init__(self, admission: Admission, n: int, key: str | None = None) -> None:
        self._admission, self._left = admission, n
        self._n, self._key = n, key

    def take(self, n: int) -> None:
        """Turn `n` places over to a flight, which will leave them."""
        taken = min(n, self._left)
        self._left -= taken
        self._admission.enter(n - taken)

    def release(self) -> None:
        """Give back what was never taken, when the request is over. Safe to call twice."""
        self._admission.give_back(self._left)
        self._left = 0
        if self._key is not None:
            self._admission.over(self._n, self._key)
            self._key = None
