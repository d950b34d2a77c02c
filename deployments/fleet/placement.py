"""Which engine replica takes a request. Pure: no Ray, no vLLM, no clock and no random source of its own.

The cost of a replica is the work it must finish before it is as free as an idle one, in tokens of prefill: what this
Router has booked there and not seen finished, this prompt, the streams it decodes, and the load that heartbeats report
beyond what is booked (other Routers'). The lowest cost wins. Own bookkeeping comes first because it is never stale:
polled loads make every Router rush to the same idle replica (as NVIDIA Dynamo's router and llm-d's scheduler found).
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

DECODE_STREAM_TOKENS = 256.0
"""What one running stream costs the next request, in prefill tokens: it takes its share of every step to come.

About the context of a chat, which each step reads (NVIDIA Dynamo's router counts it so, in blocks). With less, short
prompts outweigh streams: the engine whose chats end together does not get all of the next ones, but another gets some.
"""
QUEUED_REQUEST_TOKENS = 512.0
"""What a request that waits in an engine is taken for, when another Router placed it and its prompt is unknown."""
KV_PRESSURE_FROM = 0.9
"""KV cache use above which a replica is about to preempt: recomputation, the costliest thing a placement can cause."""
KV_PRESSURE_TOKENS = 16384.0


@dataclass(frozen=True)
class ReplicaLoad:
    """One replica, as one Router knows it.

    Attributes:
        prefill_tokens: Prompt tokens this Router booked there whose first token has not come back.
        streams: Sequences this Router has there, prefilling ones included.
        other_streams: Requests of other Routers that ran there at its last heartbeat.
        other_waiting: Those that waited inside its engine.
        kv_cache_usage: 0 to 1, by its last heartbeat.
        unfit: It owes work and makes no step, or has fallen silent. It gets nothing: whatever must wait waits better in
            the Router, from where the next replica takes it.
    """

    prefill_tokens: int = 0
    streams: int = 0
    other_streams: int = 0
    other_waiting: int = 0
    kv_cache_usage: float = 0.0
    unfit: bool = False


def cost(load: ReplicaLoad, prompt_tokens: int) -> float:
    """Return the cost of placing a prompt of `prompt_tokens` on a replica with this load."""
    pressure = max(0.0, load.kv_cache_usage - KV_PRESSURE_FROM) / (1 - KV_PRESSURE_FROM)
    return (
        prompt_tokens
        + load.prefill_tokens
        + DECODE_STREAM_TOKENS * (load.streams + load.other_streams)
        + QUEUED_REQUEST_TOKENS * load.other_waiting
        + KV_PRESSURE_TOKENS * pressure
    )


def rank(
    candidates: Iterable[str], loads: Mapping[str, ReplicaLoad], prompt_tokens: int, *, rng: random.Random
) -> list[str]:
    """Return `candidates` that are fit, best first; ties fall at random, so that Routers do not agree on a favourite.

    A candidate without a load is one nobody has heard of yet: new, and so idle.
    """
    idle = ReplicaLoad()
    known = ((c, loads.get(c, idle)) for c in candidates)
    keyed = [(cost(load, prompt_tokens), rng.random(), c) for c, load in known if not load.unfit]
    return [candidate for _, _, candidate in sorted(keyed)]


@dataclass
class _Account:
    prefill_tokens: int = 0
    streams: int = 0
    other_streams: int = 0
    other_waiting: int = 0
    kv_cache_usage: float = 0.0
    unfit: bool = False

    def load(self) -> ReplicaLoad:
        return ReplicaLoad(**vars(self))


@dataclass
class Booking:
    """One placed request's share of its replica's load. `settle`, `prefilled` and `release` keep it true.

    Attributes:
        replica: Where it is booked, if anywhere.
        prefilling: Whether the prompt still counts.
        fixed: Whether rankings no longer move it. Serve goes on asking where to place a request for a moment after
            another of its tasks has placed it, or its client has gone.
    """

    ledger: Ledger
    prompt_tokens: int
    streams: int
    replica: str | None = None
    prefilling: bool = field(default=True, init=False)
    fixed: bool = field(default=False, init=False)

    def move(self, replica: str) -> None:
        """Book on `replica`, and no longer where it was, unless that is fixed."""
        with self.ledger.lock:
            if self.fixed or replica == self.replica:
                return
            self.leave()
            self.replica, self.prefilling = replica, True
            account = self.ledger.account(replica)
            account.prefill_tokens += self.prompt_tokens
            account.streams += self.streams

    def settle(self, replica: str) -> None:
        """`replica` has taken the request: book there, for good."""
        with self.ledger.lock:
            self.move(replica)
            self.fixed = True

    def prefilled(self) -> None:
        """The first token came back: the prompt costs nothing more."""
        with self.ledger.lock:
            if self.replica is not None and self.prefilling:
                self.prefilling = False
                self.ledger.account(self.replica).prefill_tokens -= self.prompt_tokens

    def release(self) -> None:
        """The request has left its replica, or wants none any more. Safe to call twice."""
        with self.ledger.lock:
            self.fixed = True
            self.leave()

    def leave(self) -> None:
        """Book nowhere for now."""
        with self.ledger.lock:
            if self.replica is not None:
                self.prefilled()
                self.ledger.account(self.replica).streams -= self.streams
                self.ledger.tidy(self.replica)
                self.replica = None


class Ledger:
    """What one Router has booked on each replica, and what the replicas report.

    Guarded by `lock`: Serve may rank on a thread of its own.
    """

    def __init__(self, *, rng: random.Random) -> None:
        self.lock = threading.RLock()
        self._rng = rng
        self._accounts: dict[str, _Account] = {}

    def account(self, replica: str) -> _Account:
        return self._accounts.setdefault(replica, _Account())

    def tidy(self, replica: str) -> None:
        """Drop an account that says nothing, as of a replica that was forgotten while something was booked there."""
        if self._accounts.get(replica) == _Account():
            del self._accounts[replica]

    def report(self, replica: str, *, running: int, waiting: int, kv_cache_usage: float, hung: bool = False) -> None:
        """Take over a heartbeat.

        What is not ours in it is found now: by the next one, ours may have ended, and would pass for others'. What is
        booked and has yet to reach the replica hides as many of the others' until then.
        """
        with self.lock:
            account = self.account(replica)
            others = max(0, running + waiting - account.streams)
            account.other_waiting = min(others, waiting)
            account.other_streams = others - account.other_waiting
            account.kv_cache_usage, account.unfit = kv_cache_usage, hung

    def suspend(self, replica: str) -> None:
        """A replica has fallen silent: it is unfit until it reports again, or is forgotten."""
        with self.lock:
            self.forget(replica)
            self.account(replica).unfit = True

    def forget(self, replica: str) -> None:
        """Drop what a replica reported, and its account unless something is booked there."""
        with self.lock:
            account = self._accounts.pop(replica, None)
            if account is not None and account.streams:
                self._accounts[replica] = _Account(account.prefill_tokens, account.streams)

    def book(self, prompt_tokens: int, streams: int) -> Booking:
        return Booking(self, prompt_tokens, streams)

    def place(self, booking: Booking, candidates: Iterable[str]) -> list[str]:
        """Rank `candidates` for a booking and book it on the best, at once: the next request sees it there."""
        candidates = list(candidates)
        with self.lock:
            if booking.fixed:
                return rank(candidates, self.loads(), booking.prompt_tokens, rng=self._rng)
            booking.leave()
            ranked = rank(candidates, self.loads(), booking.prompt_tokens, rng=self._rng)
            if ranked:
                booking.move(ranked[0])
        return ranked

    def fit(self, candidates: Iterable[str]) -> list[str]:
        """Return those of `candidates` that may get anything."""
        with self.lock:
            return [c for c in candidates if c not in self._accounts or not self._accounts[c].unfit]

    def loads(self) -> dict[str, ReplicaLoad]:
        return {replica: account.load() for replica, account in self._accounts.items()}
