"""How fast an engine replica has been working lately, from the totals in its heartbeats. Pure: times are passed in."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

from deployments.messages import Totals

PACE_S: Final = 5.0
"""Tokens per second are those of so long."""
RECENT_S: Final = 60.0
"""Times to the first token, and hits in the prefix cache, are those of so long."""
NOTHING: Final = Totals()
_MOST: Final = 256


@dataclass(frozen=True)
class Recent:
    """What a replica, or several, have done lately.

    Attributes:
        tokens_per_s: Generated, over `PACE_S`.
        prompt_tokens_per_s: Likewise.
        work: All that was done in `RECENT_S`.
    """

    tokens_per_s: float = 0.0
    prompt_tokens_per_s: float = 0.0
    work: Totals = NOTHING

    def __add__(self, other: Recent) -> Recent:
        return Recent(
            self.tokens_per_s + other.tokens_per_s,
            self.prompt_tokens_per_s + other.prompt_tokens_per_s,
            self.work + other.work,
        )

    @property
    def ttft_s(self) -> float | None:
        """Mean time to the first token; None where there was none."""
        return self.work.first_token_s / self.work.first_tokens if self.work.first_tokens else None

    @property
    def prefix_hit_rate(self) -> float | None:
        """Share of prompt tokens found in the prefix cache, 0 to 1; None where none was looked up."""
        return self.work.prefix_hits / self.work.prefix_queries if self.work.prefix_queries else None


class Vitals:
    """The totals of one replica's last heartbeats."""

    def __init__(self) -> None:
        self._heard: deque[tuple[float, Totals]] = deque(maxlen=_MOST)

    def note(self, totals: Totals, now: float) -> None:
        """Take over a heartbeat's totals, at monotonic seconds `now`."""
        self._heard.append((now, totals))
        while len(self._heard) > 2 and self._heard[1][0] <= now - RECENT_S:
            self._heard.popleft()

    def recent(self) -> Recent:
        """Return what the replica did up to its last heartbeat."""
        if len(self._heard) < 2:
            return Recent()
        last, totals = self._heard[-1]
        earlier = (pair for pair in reversed(self._heard) if pair[0] <= last - PACE_S)
        then, before = next(earlier, self._heard[0])
        elapsed_s, done = max(last - then, 1e-3), totals - before
        return Recent(done.generated_tokens / elapsed_s, done.prompt_tokens / elapsed_s, totals - self._heard[0][1])
