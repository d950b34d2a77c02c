"""How much one caller may use: token buckets for requests and tokens, and a count of open requests.

Pure: the clock is passed in. Each Router replica has its own, so with N of them a caller gets up to N times as much.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from deployments.access.keys import KeyLimits
from deployments.errors import RateLimited, TokensLimited

_RETRY_WHEN_BUSY_S: Final = 1.0
"""When a request of one's own ends is not ours to know."""


class Bucket:
    """Holds a minute's worth, and fills evenly. What was used beyond it is a debt that fills first.

    Args:
        per_minute: What it holds, and what flows in each minute.
        clock: Monotonic seconds.
    """

    def __init__(self, per_minute: float, *, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._level, self._at = float(per_minute), clock()
        self._per_minute = float(per_minute)

    @property
    def per_minute(self) -> float:
        return self._per_minute

    def resize(self, per_minute: float) -> None:
        """Change the limit; what was used stays used."""
        used = self._per_minute - self.level
        self._per_minute = float(per_minute)
        self._level = self._per_minute - used

    @property
    def level(self) -> float:
        now = self._clock()
        self._level = min(self._per_minute, self._level + (now - self._at) * self._per_minute / 60)
        self._at = now
        return self._level

    def wait_s(self, n: float) -> float:
        """Return how long until `n` can be taken. More than it holds can be taken when it is full."""
        return max(0.0, (min(n, self._per_minute) - self.level) * 60 / self._per_minute)

    def take(self, n: float) -> None:
        """Take `n`, or give back a negative one."""
        self._level = min(self._per_minute, self.level - n)

    @property
    def reset_s(self) -> float:
        """Return how long until it is full."""
        return (self._per_minute - self.level) * 60 / self._per_minute


class Meter:
    """One caller's use, measured against its limits."""

    def __init__(self, limits: KeyLimits, *, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._requests: Bucket | None = None
        self._tokens: Bucket | None = None
        self._open = 0
        self._most_open: int | None = None
        self.update(limits)

    def update(self, limits: KeyLimits) -> None:
        """Take over limits that may have changed."""
        self._requests = self._resized(self._requests, limits.requests_per_minute)
        self._tokens = self._resized(self._tokens, limits.tokens_per_minute)
        self._most_open = limits.max_concurrent_requests

    def _resized(self, bucket: Bucket | None, per_minute: int | None) -> Bucket | None:
        if per_minute is None:
            return None
        if bucket is None:
            return Bucket(per_minute, clock=self._clock)
        if bucket.per_minute != per_minute:
            bucket.resize(per_minute)
        return bucket

    def enter(self, tokens: int | None) -> None:
        """Let a request in. A refused one uses nothing up.

        Args:
            tokens: What it will use, as far as can be said now; None for one that uses none.

        Raises:
            RateLimited: With the time after which it would be let in.
        """
        if self._most_open is not None and self._open >= self._most_open:
            raise RateLimited(
                f"This key has {self._open} requests open, and may have {self._most_open} at once.",
                retry_after_s=_RETRY_WHEN_BUSY_S,
            )
        if self._requests is not None and (wait_s := self._requests.wait_s(1)) > 0:
            raise RateLimited(
                f"This key may send {self._requests.per_minute:.0f} requests per minute. Try again in {wait_s:.1f} s.",
                retry_after_s=wait_s,
            )
        bucket = self._tokens if tokens is not None else None
        if bucket is not None and tokens is not None and (wait_s := bucket.wait_s(max(1, tokens))) > 0:
            raise TokensLimited(
                f"This key may use {bucket.per_minute:.0f} tokens per minute, and this request needs about {tokens}. "
                f"Try again in {wait_s:.1f} s.",
                retry_after_s=wait_s,
            )
        self._open += 1
        if self._requests is not None:
            self._requests.take(1)
        if bucket is not None and tokens is not None:
            bucket.take(tokens)

    def leave(self, estimated: int | None, used: int) -> None:
        """A request that was let in is over: what was estimated gives way to what it used."""
        self._open -= 1
        if self._tokens is not None:
            self._tokens.take(used - (estimated or 0))

    def headers(self) -> dict[str, str]:
        """Return OpenAI's `x-ratelimit-*` headers, for what is limited."""
        result = {}
        for what, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                result[f"x-ratelimit-limit-{what}"] = f"{bucket.per_minute:.0f}"
                result[f"x-ratelimit-remaining-{what}"] = str(max(0, int(bucket.level)))
                result[f"x-ratelimit-reset-{what}"] = duration(bucket.reset_s)
        return result


def duration(seconds: float) -> str:
    """Return a time as OpenAI's headers write it: `250ms`, `12s`, `1m30s`."""
    if seconds < 1:
        return f"{max(0, round(seconds * 1000))}ms"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
