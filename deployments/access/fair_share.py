"""Whose request is next when engines are scarce: each key's turn comes as if all keys shared the engines evenly.

Start-time fair queueing (Goyal, Vin and Cheng, 1996; with several requests in service, SFQ(D), Jin et al., 2004), in
tokens: a request starts, virtually, when its key's previous one ends, or now if that is later; virtual time is the
latest such start among requests that have begun. In this Router, requests go to engines in the order of their starts.

Those that wait in an engine come from several Routers, whose virtual times do not compare. So what is virtually ahead
of a request becomes, at the pace of the last seconds, a time of day, and that is its `priority`. Nobody waits there
for ever: once that time has come, nothing new overtakes.

Pure: the clock is passed in. One per Router and model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

MOST_AHEAD_S: Final = 300.0
"""No request is put off for longer than this, whatever its key has queued."""
LEVEL: Final = 2**43
"""Above every time in milliseconds for the next two hundred years: what a level of `priority` weighs."""
_MOST_LEVELS: Final = 2**18
_OUTPUT_WEIGHT: Final = 2.0
"""An output token costs about twice a prompt token (VTC, Sheng et al., 2024)."""
_EXPECTED_OUTPUT: Final = 128.0
_MEMORY: Final = 0.05
_SLOWEST: Final = 100.0
_WINDOW_S: Final = 10


class FairShare:
    """See the module's docstring.

    Args:
        clock: Seconds since the epoch, much the same on all nodes.
    """

    def __init__(self, *, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._virtual = 0.0
        self._flows: dict[str, _Flow] = {}
        self._open = 0
        self._output = _EXPECTED_OUTPUT
        self._served: deque[tuple[int, float]] = deque()

    def join(
        self, name: str, prompt_tokens: int, max_tokens: int | None, sequences: int = 1, *, level: int = 0
    ) -> Turn:
        """Queue a request of a key.

        Args:
            name: The key's.
            prompt_tokens: Of its prompt.
            max_tokens: What each sequence may have at most; 0 for what generates nothing.
            sequences: How many are generated.
            level: A `priority` that the request may set itself, smaller first: it comes before every share.
        """
        flow = self._flows.setdefault(name, _Flow())
        start = max(self._virtual, flow.finish)
        output = self._output if max_tokens is None else min(max_tokens, self._output)
        cost = prompt_tokens + _OUTPUT_WEIGHT * output * sequences
        flow.finish = start + cost
        flow.open += 1
        self._open += 1
        keys = sum(1 for other in self._flows.values() if other.open)
        ahead_s = (start - self._virtual) * keys / self._pace()
        starts_at = self._clock() + min(ahead_s, MOST_AHEAD_S)
        return Turn(self, flow, (bounded(level), start), cost, starts_at, prompt_tokens)

    def _pace(self) -> float:
        """Return what engines have lately done a second."""
        now = int(self._clock())
        while self._served and self._served[0][0] < now - _WINDOW_S:
            self._served.popleft()
        if not self._served:
            return _SLOWEST
        return max(_SLOWEST, sum(cost for _, cost in self._served) / (now - self._served[0][0] + 1))

    def _serve(self, cost: float) -> None:
        now = int(self._clock())
        if self._served and self._served[-1][0] == now:
            cost += self._served.pop()[1]
        self._served.append((now, cost))

    def _leave(self, turn: Turn) -> None:
        flow = turn.flow
        flow.finish += turn.used - turn.cost
        flow.open -= 1
        self._open -= 1
        if turn.generated:
            self._output += _MEMORY * (turn.generated - self._output)
        if not self._open:
            self._flows.clear()
            self._virtual = 0.0
        else:
            idle = [name for name, f in self._flows.items() if not f.open and f.finish <= self._virtual]
            for name in idle:
                del self._flows[name]


def bounded(level: int) -> int:
    """Return a request's own `priority`, as far as it counts."""
    return max(-_MOST_LEVELS, min(_MOST_LEVELS, level))


class _Flow:
    """What one key has in this Router. `finish` is the virtual time at which all of it would be done."""

    __slots__ = ("finish", "open")

    def __init__(self) -> None:
        self.finish, self.open = 0.0, 0


class Turn:
    """One request's place.

    Attributes:
        order: What its Router orders by, smaller first: its level, and when it starts virtually.
        starts_at: When that would be if all keys shared evenly.
    """

    def __init__(
        self,
        share: FairShare,
        flow: _Flow,
        order: tuple[int, float],
        cost: float,
        starts_at: float,
        prompt_tokens: int,
    ) -> None:
        self._share, self.flow, self.cost = share, flow, cost
        self.order, self.starts_at = order, starts_at
        self._prompt_tokens = prompt_tokens
        self.used, self.generated = 0.0, 0
        self._begun = self._left = False

    @property
    def priority(self) -> int:
        """VLLM's `priority`, smaller first."""
        return self.order[0] * LEVEL + int(1000 * self.starts_at)

    def serve(self, tokens: int) -> None:
        """Its engine has generated so many tokens more; the first time, it has worked on the prompt too."""
        cost = _OUTPUT_WEIGHT * tokens
        if not self._begun:
            self._begun = True
            self._share._virtual = max(self._share._virtual, self.order[1])
            cost += self._prompt_tokens
        self.generated += tokens
        self.used += cost
        self._share._serve(cost)

    def leave(self) -> None:
        """It has ended. Safe to call twice."""
        if not self._left:
            self._left = True
            self._share._leave(self)
