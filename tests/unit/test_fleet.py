"""The Fleet and a request's flight, with engines played by the test. No Ray, no vLLM."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import weakref
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import pytest
import pytest_asyncio

from deployments import messages as m
from deployments.config import FleetConfig
from deployments.errors import BadRequest, EngineUnavailable, Overloaded, PublicError
from deployments.fleet.channel import EngineEnd, Frames
from deployments.fleet.client import EngineFailure, Exchange, Fleet, Flight, Ticket
from deployments.fleet.placement import Ledger, ReplicaLoad
from tests.unit.recording import LIMIT_S, Clock, Recorder

pytestmark = pytest.mark.asyncio
CONFIG = FleetConfig(
    max_attempts=3,
    heartbeat_interval_s=0.01,
    heartbeat_timeout_s=LIMIT_S,
    connect_timeout_s=LIMIT_S,
    completeness_timeout_s=LIMIT_S,
    engine_stall_timeout_s=60,
    retry_delay_s=0.01,
    max_engine_failures=6,
)
HURRIED = CONFIG.model_copy(update={"completeness_timeout_s": 0.02})


class Delta(msgspec.Struct):
    stream: int
    execution: int
    sequence: int
    output: Any


class Batch(msgspec.Struct):
    weight_version: str | None
    deltas: list[Delta]


@dataclass
class StubSubmission:
    """A stub request: complete after `wants` outputs. An output "stop" is its last, though the engine goes on.

    Attributes:
        tied: Whether it cannot go on elsewhere once it has begun.
        plain: Whether its client sees nothing before the end.
    """

    wants: int = 3
    sequences: int = 1
    prompt_tokens: int = 100
    order: tuple[int, float] = (0, 0.0)
    request_id: str = "r"
    outputs: list[Any] = field(default_factory=list)
    error: PublicError | None = None
    stopped: bool = False
    tied: bool = False
    plain: bool = False

    def encode(self) -> list[bytes]:
        return [b"request", *(output.encode() for output in self.outputs)]

    def deliver(self, output: Any, weight_version: str | None) -> list[int]:
        if output == "unreadable":
            raise ValueError(output)
        self.outputs.append(output)
        self.stopped = output == "stop"
        return [0] if self.stopped else []

    @property
    def finished(self) -> bool:
        return self.stopped or len(self.outputs) >= self.wants

    @property
    def progress(self) -> int:
        return len(self.outputs)

    def recover(self) -> Literal["restarted", "continued", "finished"]:
        if self.tied and self.plain:
            self.outputs.clear()
        if self.tied and self.outputs:
            raise EngineUnavailable("It cannot go on.")
        return "continued" if self.outputs else "restarted"

    def fail(self, error: PublicError) -> None:
        self.error = error


class StubCall:
    """A stub Serve call: says what the test has it say, through the replica that the ticket ranks first."""

    def __init__(self, fleet: Fleet, frames: list[bytes], stream: int, ticket: Ticket, candidates: list[str]) -> None:
        self.frames, self.order, self.ticket = frames, ticket.order, ticket
        self.replica = ticket.rank(candidates)[0]
        self.execution = random.getrandbits(62)
        self.cancelled = False
        self._fleet, self._stream = fleet, stream
        self._said: asyncio.Queue[Any] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[m.End]:
        while True:
            said = await self._said.get()
            if isinstance(said, BaseException):
                raise said
            yield said
            self._said.task_done()
            if isinstance(said, m.End):
                return

    def cancel(self) -> None:
        self.cancelled = True

    def accept(self) -> None:
        self.ticket.taken(self.replica)

    async def heard(self) -> None:
        """Wait until the Fleet has heard all that was said."""
        async with asyncio.timeout(LIMIT_S):
            await self._said.join()

    def deltas(self, *outputs: Any, first: int = 0, execution: int | None = None) -> None:
        for sequence, output in enumerate(outputs, first):
            delta = Delta(self._stream, execution or self.execution, sequence, output)
            self._flight().on_delta(self.replica, delta, "weights-1")

    def _flight(self) -> Flight:
        flight = self._fleet.exchange.flights.get(self._stream)
        assert flight is not None, "the Router has forgotten this stream"
        return flight

    def end(self, last_sequence: int, outcome: str = m.FINISHED, message: str = "", param: str | None = None) -> None:
        self._said.put_nowait(m.End(last_sequence, outcome, message, param))

    def fail(self, error: BaseException) -> None:
        self._said.put_nowait(error)


class House:
    """A Fleet whose engine replicas are played by the test.

    Attributes:
        candidates: Replicas that Serve runs.
        calls: All calls the Fleet has opened.
        refuse: Raised in place of the next calls.
    """

    def __init__(self, config: FleetConfig) -> None:
        self.metrics = Recorder()
        self.clock = Clock()
        self.candidates = ["e1", "e2"]
        self.calls: list[StubCall] = []
        self.refuse: Exception | None = None
        self.flights: list[Flight] = []
        self._opened = Recorder()
        self.exchange = Exchange(config, "127.0.0.1", self._decode, metrics=self.metrics)
        self.ledger = Ledger(rng=random.Random(0))
        self.fleet = Fleet(
            *("tiny", self._open, self.exchange, self.ledger, config),
            max_queued=8,
            metrics=self.metrics,
            clock=self.clock,
        )

    @staticmethod
    def _decode(frames: Frames) -> Batch:
        return msgspec.msgpack.decode(frames[0], type=Batch)

    def _open(self, frames: list[bytes], channel: m.ChannelAddress, stream: int, ticket: Ticket) -> StubCall:
        if self.refuse is not None:
            raise self.refuse
        call = StubCall(self.fleet, frames, stream, ticket, self.candidates)
        self.calls.append(call)
        self._opened.note(call)
        return call

    def start(self, submission: StubSubmission) -> Flight:
        flight = self.fleet.start(submission, self.fleet.admit(submission.sequences))
        self.flights.append(flight)
        return flight

    async def call(self, number: int = 1) -> StubCall:
        """Wait for the call of that number, counted from 1."""
        await self._opened.until(lambda: len(self.calls) >= number)
        return self.calls[number - 1]

    async def finish(self, number: int, *outputs: Any) -> StubCall:
        """Have the call of that number accepted, and say all that is missing through it."""
        call = await self.call(number)
        call.accept()
        call.deltas(*outputs)
        call.end(len(outputs) - 1)
        return call

    async def flown(self, submission: StubSubmission) -> tuple[Flight, StubCall]:
        """Start a request and have its first call accepted."""
        flight = self.start(submission)
        call = await self.call(len(self.calls) + 1)
        call.accept()
        return flight, call

    def outcomes(self) -> dict[str, int]:
        return {tags[2]: n for tags, n in self.metrics.counts.items() if tags[0] == "fleet_requests"}

    def booked(self) -> list[str]:
        return [replica for replica, load in self.ledger.loads().items() if load.streams]


def failures(house: House) -> int:
    return house.metrics.counts["fleet_engine_failures", "tiny"]


async def landed(*flights: Flight) -> None:
    async with asyncio.timeout(LIMIT_S):
        await asyncio.wait([flight.task for flight in flights])


async def nothing_left(house: House) -> None:
    """A request that is over has left no stream, no booking, no place in admission, no call and no task."""
    assert all(flight.task.done() for flight in house.flights)
    assert house.exchange.flights == {}
    for call in house.calls:
        call.ticket.rank(house.candidates)  # as Serve does whose client has gone while it looked for a place
    assert all(load.streams == load.prefill_tokens == 0 for load in house.ledger.loads().values())
    assert house.fleet.admission.in_flight == 0
    assert all(call.cancelled for call in house.calls)


async def lived(config: FleetConfig) -> AsyncIterator[House]:
    lost: list[str] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: lost.append(context["message"]))
    gc.freeze()  # what was here before need not be searched afterwards
    house = House(config)
    try:
        yield house
        await nothing_left(house)
    finally:
        house.exchange.close()
    house.flights.clear()
    gc.collect()
    gc.unfreeze()
    assert lost == [], "asyncio lost an exception"


@pytest_asyncio.fixture
async def house() -> AsyncIterator[House]:
    async for made in lived(CONFIG):
        yield made


@pytest_asyncio.fixture
async def hurried() -> AsyncIterator[House]:
    """A house that waits for late deltas no longer than a test may."""
    async for made in lived(HURRIED):
        yield made


# The way it goes.


async def test_a_request_is_delivered_in_order_and_finishes(house: House) -> None:
    submission = StubSubmission()
    flight, call = await house.flown(submission)
    call.deltas("a", "b", "c")
    call.end(2)
    await landed(flight)
    assert (submission.outputs, submission.error) == (["a", "b", "c"], None)
    assert house.outcomes() == {"finished": 1}


async def test_the_client_need_not_wait_for_the_engines_goodbye(house: House) -> None:
    submission = StubSubmission()
    flight, call = await house.flown(submission)
    call.deltas("a", "b", "c")
    assert submission.finished
    assert not call.cancelled, "the engine is to end by itself"
    call.end(2)
    await landed(flight)


async def test_an_engine_that_never_says_goodbye_is_cancelled(hurried: House) -> None:
    flight, call = await hurried.flown(StubSubmission())
    call.deltas("a", "b", "c")
    await landed(flight)
    assert call.cancelled
    assert hurried.outcomes() == {"finished": 1}


async def test_an_engine_that_dies_after_the_last_delta_spoils_nothing(house: House) -> None:
    submission = StubSubmission()
    flight, call = await house.flown(submission)
    call.deltas("a", "b", "c")
    call.fail(EngineFailure("died"))
    await landed(flight)
    assert (submission.error, len(house.calls)) == (None, 1)


async def test_the_prompt_weighs_until_the_first_delta_and_the_stream_until_the_end(house: House) -> None:
    flight, call = await house.flown(StubSubmission(prompt_tokens=100, sequences=2))
    assert house.ledger.loads()[call.replica] == ReplicaLoad(prefill_tokens=100, streams=2)
    call.deltas("a")
    assert house.ledger.loads()[call.replica] == ReplicaLoad(prefill_tokens=0, streams=2)
    call.deltas("b", "c", first=1)
    call.end(2)
    await landed(flight)
    assert house.ledger.loads() == {}


async def test_a_delta_may_overtake_what_serve_says(house: House) -> None:
    submission = StubSubmission()
    flight = house.start(submission)
    call = await house.call()
    assert house.fleet.waiting == 1
    call.deltas("a", "b")
    assert house.fleet.waiting == 0
    call.accept()
    call.deltas("c", first=2)
    call.end(2)
    await landed(flight)
    assert submission.outputs == ["a", "b", "c"]


async def test_a_booking_follows_the_replica_that_accepts(house: House) -> None:
    flight = house.start(StubSubmission())
    call = await house.call()
    call.replica = next(c for c in house.candidates if c != call.replica)
    call.accept()
    assert house.booked() == [call.replica]
    call.deltas("a", "b", "c")
    call.end(2)
    await landed(flight)


async def test_a_stop_found_in_the_text_aborts_the_engines_side(house: House) -> None:
    sent: list[tuple[str, m.Abort]] = []
    house.exchange.channel.abort = lambda replica, abort: sent.append((replica, abort))  # type: ignore[method-assign]
    flight, call = await house.flown(StubSubmission(wants=100))
    call.deltas("a", "stop")
    assert sent == [(call.replica, m.Abort(m.VERSION, flight.stream, 0))]
    call.end(1, m.ABORTED)
    await landed(flight)
    assert house.outcomes() == {"finished": 1}


# The engine's last word.


async def test_end_waits_for_a_delta_that_is_still_on_its_way(house: House) -> None:
    submission = StubSubmission()
    flight, call = await house.flown(submission)
    call.deltas("a", "b")
    call.end(2)
    await call.heard()
    assert not flight.task.done()
    call.deltas("c", first=2)
    await landed(flight)
    assert submission.outputs == ["a", "b", "c"]
    assert house.outcomes() == {"finished": 1}


async def test_a_delta_that_never_arrives_is_a_failure(hurried: House) -> None:
    submission = StubSubmission()
    flight, call = await hurried.flown(submission)
    call.deltas("a", "b")
    call.end(2)
    await hurried.finish(2, "c")
    await landed(flight)
    assert (submission.outputs, submission.error) == (["a", "b", "c"], None)
    assert failures(hurried) == 1


async def test_a_stream_whose_only_delta_never_arrives_is_run_again(hurried: House) -> None:
    submission = StubSubmission(wants=1)
    flight, call = await hurried.flown(submission)
    call.end(0)
    second = await hurried.call(2)
    second.accept()
    second.deltas("a")
    second.end(0)
    await landed(flight)
    assert (submission.outputs, submission.error) == (["a"], None)


@pytest.mark.parametrize("outcome", [m.FINISHED, m.ABORTED])
async def test_an_end_that_nobody_asked_for_is_a_failure(house: House, outcome: str) -> None:
    submission = StubSubmission()
    flight, call = await house.flown(submission)
    call.deltas("a")
    call.end(0, outcome)
    await house.finish(2, "b", "c")
    await landed(flight)
    assert (submission.outputs, submission.error) == (["a", "b", "c"], None)
    assert failures(house) == 1


async def test_a_gap_is_a_failure_and_nothing_after_it_is_delivered(house: House) -> None:
    submission = StubSubmission()
    flight, call = await house.flown(submission)
    call.deltas("a")
    call.deltas("c", first=2)
    call.deltas("b", first=1)
    await house.call(2)
    assert submission.outputs == ["a"]
    await house.finish(2, "b", "c")
    await landed(flight)
    assert (submission.outputs, failures(house)) == (["a", "b", "c"], 1)


async def test_a_delta_of_another_execution_is_a_failure(house: House) -> None:
    submission = StubSubmission()
    flight, call = await house.flown(submission)
    call.deltas("a")
    call.deltas("b", first=1, execution=call.execution + 1)
    await house.finish(2, "b", "c")
    await landed(flight)
    assert (submission.outputs, failures(house)) == (["a", "b", "c"], 1)


async def test_a_call_that_serve_gave_to_another_replica_too_is_a_failure(house: House) -> None:
    submission = StubSubmission()
    flight = house.start(submission)
    call = await house.call()
    call.deltas("a")
    call.ticket.taken(next(c for c in house.candidates if c != call.replica))
    await house.finish(2, "b", "c")
    await landed(flight)
    assert (submission.outputs, failures(house)) == (["a", "b", "c"], 1)


async def test_deltas_of_a_replica_that_serve_gave_up_are_not_taken(house: House) -> None:
    submission = StubSubmission(wants=1)
    flight = house.start(submission)
    call = await house.call()
    first, second = call.replica, next(c for c in house.candidates if c != call.replica)
    call.ticket.taken(second)
    call.deltas("lost")
    assert (submission.outputs, house.metrics.counts["channel_dropped_messages", "foreign"]) == ([], 1)
    assert flight.place == second != first
    call.replica = second
    call.deltas("a")
    call.end(0)
    await landed(flight)
    assert (submission.outputs, submission.error) == (["a"], None)


async def test_serve_may_say_so_late_and_from_another_thread(house: House) -> None:
    submission = StubSubmission()
    flight, first = await house.flown(submission)
    first.fail(EngineFailure("died"))
    second = await house.call(2)

    async def taken() -> None:
        first.ticket.taken("e3")
        second.ticket.taken(second.replica)

    serves = threading.Thread(target=asyncio.run, args=(taken(),))
    serves.start()
    serves.join()
    assert (flight.replica, house.booked()) == (None, [second.replica])
    await asyncio.sleep(0)
    assert (flight.replica, house.fleet.waiting) == (second.replica, 0)
    await house.finish(2, "a", "b", "c")
    await landed(flight)
    assert (submission.outputs, failures(house)) == (["a", "b", "c"], 1)


async def test_an_output_that_cannot_be_read_is_a_failure(house: House) -> None:
    submission = StubSubmission()
    flight, call = await house.flown(submission)
    call.deltas("a", "unreadable")
    await house.finish(2, "b", "c")
    await landed(flight)
    assert (submission.outputs, failures(house)) == (["a", "b", "c"], 1)


# Engines that fail.


@pytest.mark.parametrize("accepted", [True, False])
async def test_before_the_first_delta_a_failed_request_runs_again_on_another_replica(
    house: House, accepted: bool
) -> None:
    submission = StubSubmission()
    flight = house.start(submission)
    first = await house.call()
    if accepted:
        first.accept()
    first.fail(EngineFailure("died"))
    second = await house.call(2)
    assert second.replica != first.replica
    assert house.booked() == [second.replica]
    second.accept()
    second.deltas("a", "b", "c")
    second.end(2)
    await landed(flight)
    assert (submission.outputs, submission.error) == (["a", "b", "c"], None)
    assert first.cancelled
    assert house.metrics.counts["fleet_engine_failures", "tiny"] == 1
    assert house.outcomes() == {"finished": 1}


async def test_a_failed_replica_is_tried_again_when_there_is_no_other(house: House) -> None:
    house.candidates = ["e1"]
    flight, call = await house.flown(StubSubmission())
    call.fail(EngineFailure("died"))
    second = await house.call(2)
    assert second.replica == "e1"
    second.accept()
    second.deltas("a", "b", "c")
    second.end(2)
    await landed(flight)


async def test_after_the_first_delta_a_request_goes_on_where_it_was_on_another_replica(house: House) -> None:
    submission = StubSubmission()
    flight, first = await house.flown(submission)
    first.deltas("a", "b")
    first.fail(EngineFailure("died"))
    second = await house.finish(2, "c")
    await landed(flight)
    assert second.replica != first.replica
    assert (first.frames, second.frames) == ([b"request"], [b"request", b"a", b"b"])
    assert (submission.outputs, submission.error) == (["a", "b", "c"], None)
    assert house.metrics.counts["fleet_recovered_requests", "tiny", "continued"] == 1
    assert house.outcomes() == {"finished": 1}


async def test_a_request_that_goes_on_goes_before_those_that_have_not_begun(house: House) -> None:
    flight, first = await house.flown(StubSubmission())
    first.fail(EngineFailure("died"))
    second = await house.call(2)
    assert second.order == first.order, "nothing is out yet"
    second.accept()
    second.deltas("a")
    second.fail(EngineFailure("died"))
    third = await house.finish(3, "b", "c")
    assert third.order < (-1000, 0.0)
    await landed(flight)


async def test_what_cannot_go_on_fails_and_is_not_tried_again(house: House) -> None:
    submission = StubSubmission(tied=True)
    flight, call = await house.flown(submission)
    call.deltas("a")
    call.fail(EngineFailure("died"))
    await landed(flight)
    assert isinstance(submission.error, EngineUnavailable)
    assert submission.error.status == 503
    assert len(house.calls) == 1
    assert house.outcomes() == {"failed": 1}


async def test_what_cannot_go_on_starts_again_while_its_client_has_seen_nothing(house: House) -> None:
    submission = StubSubmission(tied=True, plain=True)
    flight, call = await house.flown(submission)
    call.deltas("a")
    call.fail(EngineFailure("died"))
    second = await house.finish(2, "a", "b", "c")
    await landed(flight)
    assert second.frames == [b"request"]
    assert (submission.outputs, submission.error) == (["a", "b", "c"], None)
    assert house.metrics.counts["fleet_recovered_requests", "tiny", "restarted"] == 1


async def test_a_stream_outlives_more_failures_than_attempts_if_each_gets_it_further(house: House) -> None:
    lives = CONFIG.max_attempts + 2
    submission = StubSubmission(wants=lives + 1)
    flight = house.start(submission)
    for number in range(1, lives + 1):
        call = await house.call(number)
        call.accept()
        call.deltas(f"{number}")
        call.fail(EngineFailure("died"))
    await house.finish(lives + 1, "last")
    await landed(flight)
    assert submission.outputs == [*(f"{number}" for number in range(1, lives + 1)), "last"]


async def test_a_request_that_gets_further_and_kills_every_engine_is_given_up(house: House) -> None:
    submission = StubSubmission(wants=100)
    flight = house.start(submission)
    for number in range(1, CONFIG.max_engine_failures + 1):
        call = await house.call(number)
        call.accept()
        call.deltas(f"{number}")
        call.fail(EngineFailure("died of it"))
    await landed(flight)
    assert isinstance(submission.error, EngineUnavailable)
    assert len(house.calls) == CONFIG.max_engine_failures


async def test_a_continued_request_weighs_as_its_engine_will_find_it(house: House) -> None:
    submission = StubSubmission(prompt_tokens=100)
    flight, first = await house.flown(submission)
    first.deltas("a")
    submission.prompt_tokens += 1
    first.fail(EngineFailure("died"))
    second = await house.call(2)
    assert house.ledger.loads()[second.replica] == ReplicaLoad(prefill_tokens=101, streams=1)
    await house.finish(2, "b", "c")
    await landed(flight)


@pytest.mark.parametrize(
    "error", [RuntimeError("anything"), asyncio.CancelledError(), EngineFailure("its replica died")]
)
async def test_whatever_a_call_raises_is_the_engines_failure(house: House, error: BaseException) -> None:
    submission = StubSubmission()
    flight, call = await house.flown(submission)
    call.fail(error)
    second = await house.call(2)
    second.accept()
    second.deltas("a", "b", "c")
    second.end(2)
    await landed(flight)
    assert submission.error is None


async def test_an_engine_that_says_failed_is_not_asked_again_for_ever(house: House) -> None:
    submission = StubSubmission()
    flight = house.start(submission)
    for attempt in range(1, CONFIG.max_attempts + 1):
        call = await house.call(attempt)
        call.accept()
        call.end(-1, m.FAILED, "out of luck")
    await landed(flight)
    assert isinstance(submission.error, EngineUnavailable)
    assert "luck" not in submission.error.message, "an engine's words are for the log"
    assert len(house.calls) == CONFIG.max_attempts
    assert house.metrics.counts["fleet_engine_failures", "tiny"] == CONFIG.max_attempts


async def test_a_refused_request_is_a_bad_request_and_never_runs_again(house: House) -> None:
    submission = StubSubmission()
    flight, call = await house.flown(submission)
    call.end(-1, m.REFUSED, "max_tokens is too large", "max_tokens")
    await landed(flight)
    assert isinstance(submission.error, BadRequest)
    assert (submission.error.status, submission.error.param) == (400, "max_tokens")
    assert submission.error.message == "max_tokens is too large"
    assert len(house.calls) == 1
    assert house.outcomes() == {"refused": 1}


async def test_what_serve_refuses_for_overload_reaches_the_client_and_is_not_tried_again(house: House) -> None:
    submission = StubSubmission()
    flight = house.start(submission)
    overload = EngineUnavailable("Too many requests wait.", retry_after_s=5)
    (await house.call()).fail(overload)
    await landed(flight)
    assert submission.error is overload
    assert len(house.calls) == 1


async def test_a_call_that_cannot_be_opened_is_an_opaque_error(house: House) -> None:
    house.refuse = RuntimeError("a path, a traceback")
    submission = StubSubmission()
    await landed(house.start(submission))
    assert isinstance(submission.error, PublicError)
    assert "path" not in submission.error.message


async def test_late_deltas_of_a_failed_attempt_are_not_taken_for_the_next(house: House) -> None:
    submission = StubSubmission()
    flight, first = await house.flown(submission)
    old_stream = flight.stream
    first.fail(EngineFailure("slow"))
    second = await house.call(2)
    assert flight.stream != old_stream
    assert old_stream not in house.exchange.flights
    second.accept()
    second.deltas("a", "b", "c")
    second.end(2)
    await landed(flight)
    assert submission.outputs == ["a", "b", "c"]


# Replicas that are gone or hung.


def beat(replica: str, *, unfinished: int, seconds_since_step: float, model: str = "tiny") -> m.Heartbeat:
    return m.Heartbeat(m.VERSION, replica, model, 1, 0, 0.5, seconds_since_step, unfinished)


async def test_a_hung_replica_loses_its_streams_and_only_its_own(house: House) -> None:
    hung_submission, other_submission = StubSubmission(), StubSubmission()
    hung, first = await house.flown(hung_submission)
    other, neighbour = await house.flown(other_submission)
    assert neighbour.replica != first.replica
    house.fleet.on_heartbeat(beat(first.replica, unfinished=1, seconds_since_step=61))
    again = await house.call(3)
    assert again.replica == neighbour.replica
    again.accept()
    for call in (again, neighbour):
        call.deltas("a", "b", "c")
        call.end(2)
    await landed(hung, other)
    assert hung_submission.error is other_submission.error is None


@pytest.mark.parametrize(("unfinished", "seconds_since_step"), [(0, 3600.0), (5, 59.0)])
async def test_a_replica_that_idles_or_makes_a_long_step_is_not_hung(
    house: House, unfinished: int, seconds_since_step: float
) -> None:
    flight, call = await house.flown(StubSubmission())
    house.fleet.on_heartbeat(beat(call.replica, unfinished=unfinished, seconds_since_step=seconds_since_step))
    call.deltas("a", "b", "c")
    call.end(2)
    await landed(flight)
    assert len(house.calls) == 1


async def test_a_hung_replica_gets_no_new_request_while_there_is_another(house: House) -> None:
    house.fleet.on_heartbeat(beat("e1", unfinished=1, seconds_since_step=61))
    flights = []
    for number in range(1, 5):
        flights.append(house.start(StubSubmission(wants=1)))
        await house.call(number)
    assert {call.replica for call in house.calls} == {"e2"}
    for call in house.calls:
        call.accept()
        call.deltas("a")
        call.end(0)
    await landed(*flights)


async def test_while_all_replicas_are_hung_a_request_waits_for_another(house: House) -> None:
    for replica in house.candidates:
        house.fleet.on_heartbeat(beat(replica, unfinished=1, seconds_since_step=61))
    ticket = Ticket(house.ledger, house.ledger.book(10, 1), frozenset({"e3"}))
    assert ticket.rank(house.candidates) == []
    assert ticket.rank([*house.candidates, "e3"]) == ["e3"], "it failed this request, and is better than a hung one"
    ticket._booking.release()


async def test_a_replica_that_fell_silent_gets_nothing_until_it_has_joined_again(house: House) -> None:
    missing = Recorder()
    house.fleet._on_missing = lambda: missing.note("missing")
    house.fleet.set_replicas(frozenset(house.candidates))
    descriptions = [m.EngineDescription(replica, 2048, 16, ("generate",)) for replica in house.candidates]
    for description in descriptions:
        house.fleet.joined(description)
    house.fleet.lose_replica("e1", "it is silent")
    assert (house.fleet.missing, missing.noted) == ({"e1"}, ["missing"])
    assert house.fleet.admission.capacity == 16
    ticket = Ticket(house.ledger, house.ledger.book(10, 1), frozenset())
    assert ticket.rank(["e1", "e2"]) == ["e2"]
    house.fleet.joined(descriptions[0])
    assert set(ticket.rank(["e1", "e2"])) == {"e1", "e2"}
    ticket._booking.release()


async def test_a_ranking_after_the_first_delta_books_the_prompt_no_second_time(house: House) -> None:
    flight = house.start(StubSubmission(wants=2))
    call = await house.call()
    call.deltas("a")
    call.ticket.rank(house.candidates)
    assert house.ledger.loads()[call.replica] == ReplicaLoad(streams=1)
    call.deltas("b", first=1)
    call.end(1)
    await landed(flight)


async def test_a_request_that_a_silent_replica_has_not_answered_goes_elsewhere(house: House) -> None:
    submission = StubSubmission(wants=1)
    house.fleet.set_replicas(frozenset(house.candidates))
    flight = house.start(submission)
    silent = await house.call()
    house.fleet.lose_replica(silent.replica, "it is silent")
    again = await house.finish(2, "a")
    await landed(flight)
    assert (silent.cancelled, submission.error) == (True, None)
    assert again.replica != silent.replica


async def test_a_request_that_only_waits_outlives_all_replicas_it_was_to_go_to(house: House) -> None:
    """Serve has it in its queue, and it is booked where it would go next."""
    house.candidates = [f"e{i}" for i in range(CONFIG.max_attempts + 2)]
    house.fleet.set_replicas(frozenset(house.candidates))
    submission = StubSubmission(wants=1)
    flight = house.start(submission)
    for number in range(1, len(house.candidates)):
        call = await house.call(number)
        house.clock.now += 1
        house.fleet.lose_replica(call.replica, "it is silent")
    call = await house.finish(len(house.candidates), "a")
    await landed(flight)
    assert (submission.outputs, submission.error) == (["a"], None)
    assert failures(house) == 0
    assert flight._failed_replicas == frozenset(), "they had no part in it"
    assert len({call.replica for call in house.calls}) == len(house.candidates)


async def test_a_request_that_waits_again_waits_where_it_was(house: House) -> None:
    house.fleet.set_replicas(frozenset(house.candidates))
    first, later = house.start(StubSubmission()), StubSubmission()
    call = await house.call()
    house.clock.now += 1
    second = house.start(later)
    behind = await house.call(2)
    house.fleet.lose_replica(call.replica, "it is silent")
    again = await house.call(3)
    assert call.order == again.order < behind.order
    for each in (again, behind):
        each.accept()
        each.deltas("a", "b", "c")
        each.end(2)
    await landed(first, second)


async def test_a_request_that_silences_whatever_it_is_sent_to_is_given_up(house: House) -> None:
    submission = StubSubmission()
    flight = house.start(submission)
    for number in range(1, CONFIG.max_engine_failures + 1):
        house.fleet.lose_replica((await house.call(number)).replica, "it is silent")
    await landed(flight)
    assert isinstance(submission.error, EngineUnavailable)
    assert len(house.calls) == CONFIG.max_engine_failures


async def test_a_replica_that_steps_again_gets_requests_again(house: House) -> None:
    house.candidates = ["e1"]
    house.fleet.on_heartbeat(beat("e1", unfinished=1, seconds_since_step=61))
    house.fleet.on_heartbeat(beat("e1", unfinished=0, seconds_since_step=0))
    house.candidates = ["e1", "e2"]
    house.fleet.on_heartbeat(m.Heartbeat(m.VERSION, "e2", "tiny", 9, 9, 0.5, 0, 18))
    flight, call = await house.flown(StubSubmission(wants=1))
    assert call.replica == "e1"
    call.deltas("a")
    call.end(0)
    await landed(flight)


async def test_a_replica_that_has_left_takes_no_part_in_capacity(house: House) -> None:
    fleet = house.fleet
    fleet.set_replicas(frozenset({"e1", "e2"}))
    assert fleet.missing == {"e1", "e2"}
    for replica in ("e1", "e2"):
        fleet.joined(m.EngineDescription(replica, 2048, 16, ("generate",)))
    assert fleet.missing == frozenset()
    assert fleet.admission.capacity == 32
    fleet.set_replicas(frozenset({"e2"}))
    assert fleet.admission.capacity == 16
    fleet.joined(m.EngineDescription("e1", 2048, 16, ("generate",)))  # a late answer
    assert fleet.admission.capacity == 16


async def test_a_draining_replica_finishes_its_streams(house: House) -> None:
    submission = StubSubmission()
    flight, call = await house.flown(submission)
    house.fleet.set_replicas(frozenset(house.candidates))
    house.fleet.joined(m.EngineDescription(call.replica, 2048, 16, ("generate",)))
    house.fleet.set_replicas(frozenset())
    call.deltas("a", "b", "c")
    call.end(2)
    await landed(flight)
    assert submission.error is None


# Clients.


async def test_a_client_that_hangs_up_cancels_the_call_and_frees_its_place(house: House) -> None:
    sent: list[m.Abort] = []
    house.exchange.channel.abort = lambda replica, abort: sent.append(abort)  # type: ignore[method-assign]
    submission = StubSubmission()
    flight, call = await house.flown(submission)
    call.deltas("a")
    flight.close()
    await landed(flight)
    assert call.cancelled
    assert sent == [m.Abort(m.VERSION, flight.stream, -1)]
    assert submission.error is None
    assert house.outcomes() == {"cancelled": 1}


async def test_a_client_may_hang_up_before_any_engine_has_accepted(house: House) -> None:
    flight = house.start(StubSubmission())
    await house.call()
    flight.close()
    flight.close()
    await landed(flight)


async def test_a_client_may_hang_up_before_the_first_token(house: House) -> None:
    sent: list[tuple[str, m.Abort]] = []
    house.exchange.channel.abort = lambda replica, abort: sent.append((replica, abort))  # type: ignore[method-assign]
    flight, call = await house.flown(StubSubmission())
    flight.close()
    await landed(flight)
    assert sent == [(call.replica, m.Abort(m.VERSION, flight.stream))]
    assert call.cancelled


async def test_a_call_that_is_over_holds_nothing_of_its_request(house: House) -> None:
    flight, call = await house.flown(StubSubmission())
    flight.close()
    await landed(flight)
    house.flights.clear()
    gone = weakref.ref(flight)
    del flight
    gc.collect()
    assert gone() is None
    call.ticket.taken("e1")
    assert house.booked() == []


async def test_a_request_that_is_lost_stays_so_though_serve_finds_it_a_replica_at_that_moment(house: House) -> None:
    house.fleet.set_replicas(frozenset(house.candidates))
    flight = house.start(StubSubmission())
    call = await house.call()
    house.fleet.lose_replica(call.replica, "it is silent")
    call.ticket.taken(next(c for c in house.candidates if c != call.replica))
    again = await house.finish(2, "a", "b", "c")
    await landed(flight)
    assert again.replica != call.replica


async def test_a_client_may_hang_up_at_once(house: House) -> None:
    flight = house.start(StubSubmission())
    flight.close()
    await landed(flight)
    assert house.calls == []


async def test_closing_a_finished_request_lets_its_engine_say_goodbye(house: House) -> None:
    flight, call = await house.flown(StubSubmission())
    call.deltas("a", "b", "c")
    flight.close()
    call.end(2)
    await landed(flight)
    assert house.outcomes() == {"finished": 1}


async def test_every_sequence_of_a_request_takes_a_place(house: House) -> None:
    flight, call = await house.flown(StubSubmission(sequences=8))
    with pytest.raises(Overloaded):
        house.fleet.admit(1)
    assert house.metrics.counts["fleet_rejected_requests", "tiny"] == 1
    call.deltas("a", "b", "c")
    call.end(2)
    await landed(flight)
    house.fleet.admit(8).release()


async def test_prompts_of_one_request_beyond_what_engines_take_wait_for_those_before(house: House) -> None:
    reservation = house.fleet.admit(1)
    submissions = [StubSubmission(wants=1) for _ in range(3)]
    house.flights += [house.fleet.start(submission, reservation) for submission in submissions]
    for number in (1, 2, 3):
        await house.call(number)
        assert (len(house.calls), house.fleet.admission.in_flight) == (number, 1)
        await house.finish(number, "a")
        await landed(house.flights[number - 1])
    reservation.release()
    assert [submission.outputs for submission in submissions] == [["a"]] * 3


async def test_a_client_may_hang_up_while_prompts_of_its_request_wait(house: House) -> None:
    reservation = house.fleet.admit(1)
    house.flights += [house.fleet.start(StubSubmission(), reservation) for _ in range(3)]
    await house.call()
    for flight in house.flights:
        flight.close()
    reservation.release()
    await landed(*house.flights)
    assert len(house.calls) == 1
    assert house.outcomes() == {"cancelled": 3}


# Over the wire.


async def linked(house: House, replica: str, aborts: list[m.Abort] | None = None) -> tuple[EngineEnd, Any]:
    heard = Recorder()
    end = EngineEnd(
        *(CONFIG, replica),
        beat=lambda: beat(replica, unfinished=0, seconds_since_step=0),
        on_abort=(aborts if aborts is not None else []).append,
        metrics=heard,
    )
    return end, await end.link(house.exchange.channel.address)


async def test_deltas_of_unknown_streams_are_counted_and_known_ones_delivered(house: House) -> None:
    submission = StubSubmission(wants=1)
    flight, call = await house.flown(submission)
    engine, link = await linked(house, call.replica)
    deltas = [Delta(1, 1, 0, "x"), Delta(flight.stream, call.execution, 0, "a"), Delta(2, 2, 0, "x")]
    link.send(m.DELTAS, [msgspec.msgpack.encode(Batch(None, deltas))])
    await house.metrics.until(lambda: house.metrics.counts["channel_unknown_stream_deltas",] == 2)
    call.end(0)
    await landed(flight)
    assert submission.outputs == ["a"]
    engine.close()


async def test_an_engine_whose_connection_breaks_loses_its_streams(house: House) -> None:
    flight, call = await house.flown(StubSubmission())
    engine, _ = await linked(house, call.replica)
    engine.close()
    second = await house.call(2)
    assert second.replica != call.replica
    second.accept()
    second.deltas("a", "b", "c")
    second.end(2)
    await landed(flight)


async def test_heartbeats_reach_the_fleet_of_their_model(house: House) -> None:
    engine, _ = await linked(house, "e1")
    await house.metrics.until(lambda: "e1" in house.fleet.heartbeats)
    assert house.ledger.loads()["e1"].other_streams == 1
    engine.close()


async def test_an_abort_reaches_the_engine(house: House) -> None:
    aborts: list[m.Abort] = []
    flight, call = await house.flown(StubSubmission())
    engine, _ = await linked(house, call.replica, aborts)
    call.deltas("a")
    flight.close()
    await landed(flight)
    await house.metrics.until(lambda: bool(aborts))
    assert aborts == [m.Abort(m.VERSION, flight.stream, -1)]
    engine.close()
