"""How many engines a model needs, by how long its requests wait rather than by how many there are. Pure.

Opt-in: `models[].scaling`. Each Engine says what waits in it (`Waits`); Serve carries that to its controller, once a
second, and asks `AutoscalingPolicy` there. Serve applies bounds, delays and factors to the answer, and starts the first
engine of none by itself. It pickles this module into its controller, so nothing but the standard library is imported.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

QUANTILE: Final = 0.9
"""Of the times to the first token that are held against the target."""
NEAR: Final = 0.8
"""Share of the target from which on no engine is taken away."""
LARGEST_STEP: Final = 2.0
"""Times as many engines at once, at most: a backlog's waits say that there are too few, not by how many."""
WINDOW_S: Final = 10.0

TTFT: Final = "ttft_s"
QUEUED_TOKENS: Final = "queued_prompt_tokens"
PROMPT_TOKENS: Final = "mean_prompt_tokens"


class Waits:
    """What one engine knows of its requests' time to the first token.

    Measured from a request's arrival in its Router, the wait there included, by the clocks of two nodes: they should
    agree to a fraction of the target. Requests that still wait count with the time they have waited so far.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, tuple[int, float]] = {}
        self._served: deque[tuple[float, float]] = deque()  # when, and after how long
        self._lengths: deque[int] = deque(maxlen=64)

    def begin(self, request_id: str, prompt_tokens: int, arrived: float) -> None:
        """A request came in.

        Args:
            request_id: Unused so far.
            prompt_tokens: Length of its prompt.
            arrived: When it reached its Router, in seconds since the epoch.
        """
        self._waiting[request_id] = prompt_tokens, arrived
        self._lengths.append(prompt_tokens)

    def first_token(self, request_id: str, now: float) -> None:
        """Its first token is there. Later ones may be told too."""
        begun = self._waiting.pop(request_id, None)
        if begun is not None:
            self._served.append((now, max(0.0, now - begun[1])))
            self._forget_old(now)

    def forget(self, request_id: str) -> None:
        """It ended, with or without a token."""
        self._waiting.pop(request_id, None)

    def stats(self, now: float) -> dict[str, float]:
        """Return what Serve carries to the policy. All zero where nothing waits and nothing came lately."""
        self._forget_old(now)
        so_far = [max(0.0, now - arrived) for _, arrived in self._waiting.values()]
        return {
            TTFT: _quantile([seconds for _, seconds in self._served] + so_far),
            QUEUED_TOKENS: float(sum(tokens for tokens, _ in self._waiting.values())),
            PROMPT_TOKENS: sum(self._lengths) / len(self._lengths) if self._lengths else 0.0,
        }

    def _forget_old(self, now: float) -> None:
        while self._served and self._served[0][0] < now - WINDOW_S:
            self._served.popleft()


@dataclass(frozen=True)
class Snapshot:
    """What is known of one model when engines are counted.

    Attributes:
        running: Engines that take requests.
        target: Engines there should be by the last decision; more than run while some load.
        ongoing: Requests in engines and in Routers.
        queued: Those of them that wait in Routers.
        target_ongoing: Requests one engine should have.
        settled_s: For how long as many have run as do now.
        ttft_s: For each engine, what `Waits` says.
        queued_tokens: Likewise.
        prompt_tokens: Likewise.
    """

    running: int
    target: int
    ongoing: float
    queued: float
    target_ongoing: float
    settled_s: float = math.inf
    ttft_s: Sequence[float] = ()
    queued_tokens: Sequence[float] = ()
    prompt_tokens: Sequence[float] = ()


def engines_wanted(
    snapshot: Snapshot, *, ttft_target_s: float | None, queued_prompt_tokens: int | None
) -> tuple[float, str]:
    """Return how many engines there should be, before Serve's bounds and delays, and what says so.

    Never fewer than ongoing requests ask for: the targets only add.
    """
    demands = [(snapshot.ongoing / snapshot.target_ongoing, "ongoing requests")]
    if queued_prompt_tokens is not None:
        waiting = sum(snapshot.queued_tokens) + snapshot.queued * _mean(snapshot.prompt_tokens)
        demands.append((waiting / queued_prompt_tokens, "queued prompt tokens"))
    if ttft_target_s is not None:
        demands.append((_for_ttft(snapshot, _mean(snapshot.ttft_s) / ttft_target_s), "time to the first token"))
    return max(demands, key=lambda demand: demand[0])


def _for_ttft(snapshot: Snapshot, lateness: float) -> float:
    """Return the engines that a time to the first token asks for; `lateness` is its share of the target."""
    if lateness <= NEAR:
        return 0.0
    if lateness <= 1 or snapshot.target > snapshot.running or snapshot.settled_s < WINDOW_S:
        return float(max(snapshot.running, snapshot.target))  # those that load or are new have not had their say yet
    return snapshot.running * min(lateness, LARGEST_STEP)


class AutoscalingPolicy:
    """The class that `autoscaling_config.policy.policy_function` names where a model has `scaling`.

    Args:
        ttft_target_s: Nine of ten requests should have their first token by then.
        queued_prompt_tokens: What may wait for its first token, for each engine.
    """

    def __init__(self, *, ttft_target_s: float | None = None, queued_prompt_tokens: int | None = None) -> None:
        self._ttft_target_s, self._queued_prompt_tokens = ttft_target_s, queued_prompt_tokens

    def __call__(self, ctx: Any) -> tuple[float, dict[str, Any]]:
        """Answer Serve.

        Args:
            ctx: `ray.serve.config.AutoscalingContext`.
        """
        running, now = ctx.current_num_replicas, ctx.current_time
        before, since = ctx.policy_state.get("running", (running, -math.inf))
        state = {"running": (running, since if running == before else now)}
        if running == 0:
            return float(ctx.target_num_replicas), state
        wanted, _ = engines_wanted(
            snapshot_of(ctx, settled_s=now - state["running"][1]),
            ttft_target_s=self._ttft_target_s,
            queued_prompt_tokens=self._queued_prompt_tokens,
        )
        return wanted, state


def snapshot_of(ctx: Any, *, settled_s: float) -> Snapshot:
    """Read Serve's context. Engines that have had no request say zero, and are left out."""
    metrics: Mapping[str, Mapping[Any, float]] = ctx.aggregated_metrics or {}

    def said(name: str) -> tuple[float, ...]:
        return tuple(value for value in metrics.get(name, {}).values() if value > 0)

    return Snapshot(
        running=ctx.current_num_replicas,
        target=ctx.target_num_replicas,
        ongoing=ctx.total_num_requests,
        queued=ctx.total_queued_requests or 0.0,
        target_ongoing=ctx.config.get_target_ongoing_requests(),
        settled_s=settled_s,
        ttft_s=said(TTFT),
        queued_tokens=said(QUEUED_TOKENS),
        prompt_tokens=said(PROMPT_TOKENS),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _quantile(values: list[float]) -> float:
    """Return the smallest value that `QUANTILE` of them do not exceed; 0 without any."""
    ordered = sorted(values)
    return ordered[math.ceil(QUANTILE * len(ordered)) - 1] if ordered else 0.0
