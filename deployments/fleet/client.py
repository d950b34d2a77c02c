"""The Fleet: all engine replicas of one model, driven as if they were one engine.

A request flies like this (`Flight`): book a place, call an Engine through Serve, hear from Serve which replica has the
call, take deltas from the token channel, hear `End`, and wait, bounded, for deltas that are still on their way. An
engine's failure places the request again, from its prompt or from what the client already has; the client's own failure
never does.

Knows no vLLM (requests are frames, outputs are opaque) and no Ray (an engine call is a function passed in).
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any, Final, Literal, Protocol

from deployments import messages as m
from deployments import request_scope
from deployments.config import FleetConfig
from deployments.errors import OPAQUE, BadRequest, EngineFailure, EngineUnavailable, PublicError
from deployments.fleet.admission import Admission, Reservation
from deployments.fleet.channel import Frames, Metrics, RouterEnd
from deployments.fleet.placement import Booking, Ledger
from deployments.fleet.vitals import Vitals

logger = logging.getLogger("ray.serve.groundswell.fleet")


_BEGUN: Final = (-(2**31), 0.0)
"""Goes before all that wait for their first token: somebody is reading."""


class _Untaken(EngineFailure):
    """The replica where a request had its place is gone, and had not taken it, as far as Serve has heard."""


class DeltaLike(Protocol):
    """`deployments.seam.wire.Delta`, as far as the Fleet looks into it."""

    stream: int
    execution: int
    sequence: int
    output: Any


class BatchLike(Protocol):
    """`deployments.seam.wire.DeltaBatch`, as far as the Fleet looks into it."""

    @property
    def weight_version(self) -> str | None: ...

    @property
    def deltas(self) -> Sequence[Any]: ...


class Submission(Protocol):
    """One request, as the seam hands it in."""

    request_id: str
    sequences: int
    order: tuple[int, float]
    """Smaller goes first among those that wait for an engine; equals in the order they came."""

    @property
    def prompt_tokens(self) -> int:
        """What an engine must prefill in the next attempt."""

    @property
    def progress(self) -> int:
        """Tokens delivered that the next attempt would keep."""

    def encode(self) -> list[bytes]:
        """Return the frames for the next attempt."""

    def deliver(self, output: Any, weight_version: str | None) -> list[int]:
        """Take one output; return indexes of sequences that ended here but still run in the engine."""

    @property
    def finished(self) -> bool:
        """Whether the client has, or can have, all it asked for."""

    def recover(self) -> Literal["restarted", "continued", "finished"]:
        """Get ready for another attempt and return how it begins; finished: nothing was missing but the end.

        Raises:
            PublicError: What has reached the client can be neither taken back nor continued.
        """

    def fail(self, error: PublicError) -> None:
        """End the request with an error the client reads."""


class EngineCall(Protocol):
    """An open Serve call, whose only message is `End`."""

    def __aiter__(self) -> AsyncIterator[m.End]: ...

    def cancel(self) -> None: ...


def _ignore(replica: str) -> None:
    pass


class Ticket:
    """Carries the Fleet's ranking to our `RequestRouter`, as an argument of the Serve call.

    It ranks when Serve asks, with the replicas Serve knows at that moment, and books the place at once. On the wire it
    becomes None: engines have no use for it.

    Args:
        avoid: Replicas that have failed this request.
        order: Smaller goes first among those that wait for an engine; equals in the order they came.
        on_taken: Called with the replica that has taken the call, on the event loop of Serve's router.
    """

    def __init__(
        self,
        ledger: Ledger,
        booking: Booking,
        avoid: frozenset[str],
        order: tuple[float, ...] = (0, 0.0),
        *,
        on_taken: Callable[[str], object] = _ignore,
    ) -> None:
        self._ledger, self._booking, self._avoid, self.order = ledger, booking, avoid, order
        self._on_taken = on_taken

    def rank(self, candidates: list[str]) -> list[str]:
        """Return replica ids, best first; those that have failed this request only where there is no other."""
        fresh = [c for c in candidates if c not in self._avoid]
        return self._ledger.place(self._booking, fresh) or self._ledger.place(self._booking, candidates)

    def would_take(self, replica: str, candidates: list[str]) -> bool:
        """Whether `replica` has not failed this request, or there is no better one among `candidates`."""
        return replica not in self._avoid or not self._ledger.fit(c for c in candidates if c not in self._avoid)

    def taken(self, replica: str) -> None:
        """Serve has heard that `replica` runs the call."""
        self._booking.settle(replica)
        self._on_taken(replica)

    def void(self) -> None:
        """The call is over. Serve may keep its arguments while others wait, and the request must not go along."""
        self._on_taken = _ignore

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()


class Flight:
    """One request on its way, once it has its places in admission; leaves them when it is over."""

    def __init__(self, fleet: Fleet, submission: Submission, reservation: Reservation) -> None:
        self._fleet = fleet
        self._submission = submission
        self._failed_replicas: frozenset[str] = frozenset()
        self._loop = asyncio.get_running_loop()
        self._started = fleet.clock()
        self._failed_at: float | None = None
        self._begun = False
        self._reset()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._places = reservation.take(submission.sequences, self._get_ready)
        self.task = self._loop.create_task(self._fly())
        self.task.add_done_callback(self._land)

    def _reset(self) -> None:
        self._booking = self._fleet.ledger.book(self._submission.prompt_tokens, self._submission.sequences)
        self.stream = secrets.randbits(62)
        self.replica: str | None = None
        self._execution: int | None = None
        self._next_sequence = 0
        self._last_sequence: int | None = None
        self._complete: asyncio.Future[None] = self._loop.create_future()

    @property
    def place(self) -> str | None:
        """The replica that runs this attempt, or was asked to and has yet to answer."""
        return self.replica or self._booking.replica

    def _get_ready(self) -> None:
        if not self._ready.done():  # cancelled, it is about to leave
            self._ready.set_result(None)

    def _land(self, task: asyncio.Task[None]) -> None:
        self._places.leave(worked=self._begun or not task.cancelled())

    async def _fly(self) -> None:
        fleet, submission = self._fleet, self._submission
        outcome = "failed"
        try:
            await self._ready
            await self._attempts()
            outcome = "finished"
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        except PublicError as error:
            outcome = "refused" if isinstance(error, BadRequest) else "failed"
            submission.fail(error)
        except Exception:
            logger.exception("Request %s failed in the Router", submission.request_id)
            submission.fail(PublicError(OPAQUE))
        finally:
            fleet.metrics.inc("fleet_requests", model=fleet.model, outcome=outcome)
            fleet.metrics.observe("fleet_request_seconds", fleet.clock() - self._started, model=fleet.model)

    async def _attempts(self) -> None:
        """Run the request until it is finished, through as many engine failures as it is allowed.

        Two bounds: attempts in a row that brought no token further, and failures in all. The first gives a long stream
        as many lives as it needs; the second keeps a request that kills its engines from killing them all. What no
        engine has taken goes on waiting, where it did; how often it moves is bounded, for it may have been on its way.
        """
        fleet, submission = self._fleet, self._submission
        failures = in_vain = moves = 0
        while True:
            progress = submission.progress
            try:
                return await self._attempt()
            except _Untaken as failure:
                moves += 1
                logger.info("Request %s moves before any engine had it (%s)", submission.request_id, failure)
                if moves >= fleet.config.max_engine_failures:
                    raise EngineUnavailable(
                        "No engine could be reached that would take this request.", retry_after_s=1
                    ) from failure
            except EngineFailure as failure:
                fleet.metrics.inc("fleet_engine_failures", model=fleet.model)
                self._failed_at = self._failed_at or fleet.clock()
                failures += 1
                logger.warning(
                    "Request %s: attempt %d at %s failed after %d tokens (%s)",
                    *(submission.request_id, failures, self.replica, submission.progress, failure),
                )
                moves = 0
                how = submission.recover()
                in_vain = 0 if submission.progress > progress else in_vain + 1
                if how == "finished":
                    return
                if in_vain >= fleet.config.max_attempts or failures >= fleet.config.max_engine_failures:
                    raise EngineUnavailable(
                        "The engines that ran this request failed before it was finished.", retry_after_s=1
                    ) from failure
                fleet.metrics.inc("fleet_recovered_requests", model=fleet.model, how=how)
                if self.replica is not None:
                    self._failed_replicas |= {self.replica}
            if in_vain > 1:  # the first was bad luck; now give what is dying the time to be known for dead
                await asyncio.sleep(fleet.config.retry_delay_s)

    async def _attempt(self) -> None:
        """Run the request once.

        Raises:
            EngineFailure: Another replica may do better.
            PublicError: No other replica would.
        """
        fleet = self._fleet
        self._reset()
        ticket = Ticket(
            fleet.ledger,
            self._booking,
            self._failed_replicas,
            (*(_BEGUN if self._submission.progress else self._submission.order), self._started),
            on_taken=partial(self._hear_taken, self.stream),
        )
        call = fleet.call(self._submission.encode(), fleet.exchange.channel.address, self.stream, ticket)
        ending = self._end_of(call)
        fleet.exchange.flights[self.stream] = self
        try:
            either: set[asyncio.Future[Any]] = {ending, self._complete}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if self._complete.done():
                self._complete.result()
                # The client has its answer; this only lets the engine say its goodbye rather than be cancelled.
                await asyncio.wait({ending}, timeout=fleet.config.completeness_timeout_s)
                return
            end = await ending
            if end is None:
                raise EngineFailure("its call ended without a word")
            await self._settle(end)
        except _Untaken:
            raise
        except EngineFailure:
            self.replica = self.place
            raise
        finally:
            call.cancel()
            if not ending.done():
                ending.cancel()
            fleet.exchange.flights.pop(self.stream, None)
            self._booking.release()
            ticket.void()

    def _end_of(self, call: EngineCall) -> asyncio.Task[m.End | None]:
        async def read() -> m.End | None:
            end = None
            try:
                async for message in call:  # to its very end, or Serve would take the call for cancelled
                    end = message
            except (EngineFailure, PublicError):
                raise
            except asyncio.CancelledError:
                current = asyncio.current_task()
                if current is not None and current.cancelling():
                    raise
                raise EngineFailure("its call was cancelled from outside") from None
            except Exception as error:
                raise EngineFailure(f"{type(error).__name__} in its call") from error
            return end

        ending = self._loop.create_task(read())
        ending.add_done_callback(_retrieve)
        return ending

    def _hear_taken(self, stream: int, replica: str) -> None:
        """Serve says which replica runs an attempt, on its own loop where that is not ours."""
        if asyncio.get_running_loop() is self._loop:
            self._taken(stream, replica)
        else:
            self._loop.call_soon_threadsafe(self._taken, stream, replica)

    def _taken(self, stream: int, replica: str) -> None:
        if stream != self.stream or self._complete.done():
            return
        if self.replica not in (None, replica):  # by its deltas; then Serve heard nothing of it, and tried another
            return self.lose("a second execution of it began")
        self.replica = replica

    async def _settle(self, end: m.End) -> None:
        """Hold the engine to its last word."""
        if end.outcome == m.REFUSED:
            raise BadRequest(end.message, param=end.param)
        if end.outcome == m.FAILED:
            raise EngineFailure(end.message)
        self._last_sequence = end.last_sequence
        if self._next_sequence <= end.last_sequence:
            timeout_s = self._fleet.config.completeness_timeout_s
            try:
                await asyncio.wait_for(self._complete, timeout_s)
            except TimeoutError:
                missing = end.last_sequence + 1 - self._next_sequence
                raise EngineFailure(f"{missing} deltas did not arrive within {timeout_s:g} s") from None
        if not self._submission.finished:
            raise EngineFailure("it ended the stream that nobody asked it to end")

    def on_delta(self, replica: str, delta: DeltaLike, weight_version: str | None) -> None:
        """Take one delta from the channel, in order or not at all."""
        if self._complete.done():
            return
        if self._execution is None and self.replica in (None, replica):
            self._execution, self.replica = delta.execution, replica
            self._booking.settle(replica)
        if replica != self.replica or delta.sequence < self._next_sequence:
            # Another's, or said before: it takes nothing from this stream, so it must not end it either.
            return self._fleet.metrics.inc("channel_dropped_messages", reason="foreign")
        if delta.execution != self._execution:
            return self.lose("deltas of another execution arrived")
        if delta.sequence != self._next_sequence:
            return self.lose(f"delta {delta.sequence} arrived in place of {self._next_sequence}")
        if self._next_sequence == 0:
            self._booking.prefilled()
            self._note_first_delta()
        self._next_sequence += 1
        try:
            surplus = self._submission.deliver(delta.output, weight_version)
        except EngineFailure as failure:
            return self.lose(str(failure))
        except Exception:
            logger.exception("Request %s: an output could not be read", self._submission.request_id)
            return self.lose("its output could not be read")
        for index in surplus:
            self._abort(index)
        if self._submission.finished or self._last_sequence == delta.sequence:
            self._complete.set_result(None)

    def _note_first_delta(self) -> None:
        fleet, now = self._fleet, self._fleet.clock()
        if self._failed_at is not None:
            fleet.metrics.observe("fleet_recovery_seconds", now - self._failed_at, model=fleet.model)
            self._failed_at = None
        if not self._begun:
            self._begun = True
            fleet.metrics.observe("fleet_time_to_first_token_seconds", now - self._started, model=fleet.model)

    def _abort(self, index: int) -> None:
        if self.replica is not None:
            self._fleet.exchange.channel.abort(self.replica, m.Abort(m.VERSION, self.stream, index))

    def lose(self, reason: str) -> None:
        """The engine failed this attempt, or can take it no more."""
        if not self._complete.done():
            self._complete.set_exception(_Untaken(reason) if self.replica is None else EngineFailure(reason))
            self._complete.exception()  # retrieved: the attempt may have ended by itself

    def is_waiting_in(self, fleet: Fleet) -> bool:
        """Whether it is this fleet's, and no engine has taken it yet."""
        return self._fleet is fleet and self.replica is None

    def close(self) -> None:
        """The client is done or gone: free whatever the request still holds."""
        if not self.task.done() and not self._submission.finished:
            self._abort(-1)
            self.task.cancel()


def _retrieve(ending: asyncio.Task[Any]) -> None:
    """Look at what became of a call that nobody waits for any more, or asyncio would log it as an error."""
    if not ending.cancelled():
        ending.exception()


class Exchange:
    """One Router's end of the token channel: brings deltas to their flights and heartbeats to their fleets.

    Args:
        host: The address the channel binds.
        decode: Turns a delta message into a batch; raises ValueError for what is none.
    """

    def __init__(
        self, config: FleetConfig, host: str, decode: Callable[[Frames], BatchLike], *, metrics: Metrics
    ) -> None:
        self.flights: dict[int, Flight] = {}
        self.fleets: dict[str, Fleet] = {}
        self._decode, self._metrics = decode, metrics
        self.channel = RouterEnd(
            config,
            host,
            on_deltas=self._on_deltas,
            on_heartbeat=self._on_heartbeat,
            on_gone=self._on_gone,
            metrics=metrics,
        )

    def _on_deltas(self, replica: str, frames: Frames) -> None:
        batch = self._decode(frames)
        flights, unknown = self.flights, 0
        for delta in batch.deltas:
            flight = flights.get(delta.stream)
            if flight is None:
                unknown += 1
            else:
                flight.on_delta(replica, delta, batch.weight_version)
        if unknown:
            self._metrics.inc("channel_unknown_stream_deltas", unknown)

    def _on_heartbeat(self, heartbeat: m.Heartbeat) -> None:
        fleet = self.fleets.get(heartbeat.model)
        if fleet is not None:
            fleet.on_heartbeat(heartbeat)

    def _on_gone(self, replica: str) -> None:
        for fleet in self.fleets.values():
            fleet.lose_replica(replica, "it has fallen silent")

    def close(self) -> None:
        self.channel.close()


Call = Callable[[list[bytes], m.ChannelAddress, int, Ticket], EngineCall]


class Fleet:
    """See the module's docstring.

    Args:
        model: The model's name, for logs and metrics.
        call: Opens a Serve call to an Engine.
        exchange: This Router's end of the token channel, shared by its fleets.
        max_queued: Bound of what waits here beyond the engines' capacity.
        on_missing: Called when a running replica should join the channel again.
        max_queue_wait_s: Bound of how long that takes.
    """

    def __init__(
        self,
        model: str,
        call: Call,
        exchange: Exchange,
        ledger: Ledger,
        config: FleetConfig,
        *,
        max_queued: int,
        max_queue_wait_s: float = math.inf,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        on_missing: Callable[[], object] = lambda: None,
    ) -> None:
        self.model, self.call, self.exchange, self.ledger, self.config = model, call, exchange, ledger, config
        self.metrics, self.clock, self._on_missing = metrics, clock, on_missing
        self.admission = Admission(max_queued, max_wait_s=max_queue_wait_s, clock=clock)
        exchange.fleets[model] = self
        self._running: frozenset[str] = frozenset()
        self.replicas: dict[str, m.EngineDescription] = {}
        self.heartbeats: dict[str, m.Heartbeat] = {}
        self.vitals: dict[str, Vitals] = {}
        """Of a running replica also when it has been lost: until it is heard again, or Serve gives it up."""

    def admit(self, n: int) -> Reservation:
        """Let `n` sequences of a request in, or raise `Overloaded`."""
        caller = request_scope.caller()
        try:
            return self.admission.reserve(n, None if caller is None else caller.name)
        except PublicError:
            self.metrics.inc("fleet_rejected_requests", model=self.model)
            raise

    def start(self, submission: Submission, reservation: Reservation) -> Flight:
        """Send a request on its way; its outputs and its failure reach `submission`."""
        return Flight(self, submission, reservation)

    def set_replicas(self, running: frozenset[str]) -> None:
        """Take over Serve's set of running replicas.

        One that left the set may be draining, so its streams stay: its death is told by its calls and heartbeats.
        """
        for gone in self._running - running:
            self.replicas.pop(gone, None)
            self.heartbeats.pop(gone, None)
            self.vitals.pop(gone, None)
            self.ledger.forget(gone)
        self._running = running
        self._count_capacity()

    @property
    def running(self) -> frozenset[str]:
        """Replicas that Serve says run."""
        return self._running

    @property
    def waiting(self) -> int:
        """What no engine has taken yet: attempts, and sequences whose turn to become one has not come."""
        return sum(flight.is_waiting_in(self) for flight in self.exchange.flights.values()) + self.admission.waiting

    @property
    def missing(self) -> frozenset[str]:
        """Running replicas that have yet to join the channel."""
        return self._running - self.replicas.keys()

    def joined(self, description: m.EngineDescription) -> None:
        """A replica is connected to the channel."""
        if description.replica in self._running:
            if description.replica not in self.replicas:
                self.ledger.forget(description.replica)  # it may have been suspended
            self.replicas[description.replica] = description
            self._count_capacity()

    def _count_capacity(self) -> None:
        self.admission.capacity = sum(replica.max_num_seqs for replica in self.replicas.values())

    def on_heartbeat(self, heartbeat: m.Heartbeat) -> None:
        """Take over what a replica says of itself; a hung one loses its streams here, at once."""
        replica, hung = heartbeat.replica, self.is_hung(heartbeat)
        self.heartbeats[replica] = heartbeat
        self.vitals.setdefault(replica, Vitals()).note(heartbeat.totals, self.clock())
        self.ledger.report(
            replica,
            running=heartbeat.running,
            waiting=heartbeat.waiting,
            kv_cache_usage=heartbeat.kv_cache_usage,
            hung=hung,
        )
        if hung:
            self._lose_flights(replica, f"no engine step for {heartbeat.seconds_since_step:.0f} s")

    def is_hung(self, heartbeat: m.Heartbeat) -> bool:
        """Whether a replica owes a step and has made none for too long."""
        return bool(heartbeat.unfinished) and heartbeat.seconds_since_step > self.config.engine_stall_timeout_s

    def lose_replica(self, replica: str, reason: str) -> None:
        """A replica cannot be heard: its requests go elsewhere now, and it gets no other until it has joined again."""
        self.heartbeats.pop(replica, None)
        self.ledger.forget(replica)
        if replica in self._running:
            self.ledger.suspend(replica)
            self.replicas.pop(replica, None)
            self._count_capacity()
            self._on_missing()
        else:
            self.vitals.pop(replica, None)
        self._lose_flights(replica, reason)

    def _lose_flights(self, replica: str, reason: str) -> None:
        for flight in [f for f in self.exchange.flights.values() if f.place == replica]:
            flight.lose(reason)
