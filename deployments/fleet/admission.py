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

    A request may turn out to be more than it was let in with: a completion of many prompts, many texts to embed. What
    it is beyond that starts while engines are free or have little to draw from, or within its key's even share, and
    until then waits uncounted.

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
        """What requests of each key were let in with and have not given back, or run if that is more."""
        self.growing: dict[Reservation, None] = {}
        """Requests of which something waits to start, in the order they came."""

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
        self.start_waiting()

    @property
    def waiting(self) -> int:
        """Sequences of requests that were let in which wait for their turn."""
        return sum(each.waiting for each in self.growing)

    def check(self, n: int, key: str | None = None) -> None:
        """Raise unless `n` more sequences may start, of this key where there are keys.

        Raises:
            Overloaded: With the time after which, at the present pace, there is room again.
            BadRequest: There never is, for so many.
        """
        self._advance()
        if key is not None and self._held.get(key, 0) + n <= self._even_share(key):
            return
        drawn_from = self._drawn_from if self.growing else 0
        limit = self._capacity + self._max_queued + drawn_from
        if self._capacity and n > limit:
            raise BadRequest(f"{n} answers at once are more than this server takes: {limit}.", param="n")
        if self.in_flight + n > limit:
            raise Overloaded(
                f"This server holds {self.in_flight} requests for this model and takes {limit} at most. Retry later.",
                retry_after_s=_bounded(self._wait(self.in_flight + n - limit)),
            )
        queued = self.in_flight + n - self._capacity
        # A few always wait in each engine, so that it has something to draw from: others beside those of one request.
        few = max(4, self._capacity // 8) + drawn_from
        if self._capacity and queued > few:
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
        self.hold(n, key)
        return Reservation(self, n, key)

    def hold(self, n: int, key: str | None) -> None:
        """A key's requests hold `n` more, or less."""
        if key is not None:
            self._held[key] = self._held.get(key, 0) + n
            if not self._held[key]:
                del self._held[key]

    def is_within_share(self, n: int, key: str | None) -> bool:
        """Whether a key has its even share of what engines work on with `n` more at most."""
        return key is not None and bool(self._capacity) and self._held.get(key, 0) + n <= self._even_share(key)

    @property
    def _drawn_from(self) -> int:
        """Sequences of requests of many that engines have beyond what they work on: one that ends leaves no gap."""
        return self._capacity // 8

    def start_waiting(self, changed: Reservation | None = None) -> None:
        """Start what may start: what `changed` is entitled to, and on free engines the rest.

        There it is the turn of the request that has the least running. What else has become entitled, because others
        have left, starts when something of its own request ends: something of it always runs.
        """
        while changed is not None and changed.is_entitled:
            changed.start_next()
        while self.growing and self.in_flight < self._capacity + self._drawn_from:
            min(self.growing, key=lambda each: each.running).start_next()

    def enter(self, n: int) -> None:
        self._advance()
        self.in_flight += n

    def leave(self, n: int, of: Reservation | None = None) -> None:
        """`n` sequences have been worked on to their end."""
        self._advance()
        if self._is_busy:
            self._finished.extend([self._busy_s] * n)
        self.in_flight -= n
        self.start_waiting(of)

    def give_back(self, n: int, of: Reservation | None = None) -> None:
        """`n` places were never used."""
        self._advance()
        self.in_flight -= n
        self.start_waiting(of)

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


class Places:
    """Those of one flight, which has taken them or waits for them.

    Args:
        on_taken: Called when it has them, at once where it need not wait.
    """

    def __init__(self, reservation: Reservation, n: int, on_taken: Callable[[], object]) -> None:
        self._reservation, self.n, self.on_taken = reservation, n, on_taken
        self.taken = False

    def leave(self, *, worked: bool = True) -> None:
        """The flight is over. If it has not `worked`, it says nothing of the engines' pace."""
        self._reservation.leave(self, worked=worked)


class Reservation:
    """The places one HTTP request was let in with, before anybody knew how many sequences it becomes.

    Attributes:
        running: Sequences that have taken places and not left them.
    """

    def __init__(self, admission: Admission, n: int, key: str | None = None) -> None:
        self._admission, self._n, self._key = admission, n, key
        self._left, self.running = n, 0
        self._waiting: deque[Places] = deque()

    @property
    def waiting(self) -> int:
        """Sequences that wait for their turn."""
        return sum(places.n for places in self._waiting)

    @property
    def is_entitled(self) -> bool:
        """Whether the next that waits may start though engines are busy: the request was let in with as much."""
        if not self._waiting:
            return False
        n = self._waiting[0].n
        return not self.running or self.running + n <= self._n or self._admission.is_within_share(n, self._key)

    def take(self, n: int, on_taken: Callable[[], object] = lambda: None) -> Places:
        """Turn `n` places over to a flight, which is to leave them, as soon as there are as many for it."""
        places = Places(self, n, on_taken)
        self._waiting.append(places)
        self._admission.growing[self] = None
        self._admission.start_waiting(self)
        return places

    def start_next(self) -> None:
        places = self._waiting.popleft()
        self._forget_if_none_waits()
        reserved = min(places.n, self._left)
        self._left -= reserved
        self._admission.enter(places.n - reserved)
        self._hold(self._n, self.running + places.n)
        places.taken = True
        places.on_taken()

    def leave(self, places: Places, *, worked: bool) -> None:
        if not places.taken:
            self._waiting.remove(places)
            return self._forget_if_none_waits()
        self._hold(self._n, self.running - places.n)
        (self._admission.leave if worked else self._admission.give_back)(places.n, self)

    def release(self) -> None:
        """Give back what was never taken, when the request is over. Safe to call twice."""
        left, self._left = self._left, 0
        self._hold(0, self.running)
        self._admission.give_back(left)

    def _hold(self, n: int, running: int) -> None:
        before = max(self._n, self.running)
        self._n, self.running = n, running
        self._admission.hold(max(n, running) - before, self._key)

    def _forget_if_none_waits(self) -> None:
        if not self._waiting:
            del self._admission.growing[self]
