"""A token channel under fire: garbage, truncated, replayed and foreign frames disturb no stream of anybody else's."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import pytest
import pytest_asyncio
import zmq
import zmq.asyncio

pytest.importorskip("vllm")

from vllm.v1.engine import EngineCoreOutput

from deployments import messages as m
from deployments.config import FleetConfig
from deployments.errors import EngineUnavailable, PublicError
from deployments.fleet.channel import EngineEnd, Link
from deployments.fleet.client import Exchange, Fleet, Flight, Ticket
from deployments.fleet.placement import Ledger
from deployments.seam.wire import Codec, Delta
from tests.unit.recording import LIMIT_S, Recorder

pytestmark = pytest.mark.asyncio
LOOPBACK = "127.0.0.1"
CONFIG = FleetConfig(heartbeat_interval_s=0.05, heartbeat_timeout_s=LIMIT_S, connect_timeout_s=LIMIT_S)
ROUNDS = 300


@dataclass
class Submission:
    """A request whose outputs are noted."""

    heard: Recorder
    request_id: str = "r"
    prompt_tokens: int = 10
    sequences: int = 1
    order: tuple[int, float] = (0, 0.0)
    tokens: list[int] = field(default_factory=list)
    error: PublicError | None = None
    finished: bool = False

    @property
    def progress(self) -> int:
        return len(self.tokens)

    def recover(self) -> Literal["restarted", "continued", "finished"]:
        raise EngineUnavailable("It cannot go on.")

    def encode(self) -> list[bytes]:
        return [b"request"]

    def deliver(self, output: EngineCoreOutput, weight_version: str | None) -> list[int]:
        self.tokens += output.new_token_ids
        self.heard.note("token")
        return []

    def fail(self, error: PublicError) -> None:
        self.error = error
        self.heard.note("failed")


class Call:
    """A Serve call that has been taken by `e1` and stays open."""

    def __init__(self, ticket: Ticket) -> None:
        ticket.taken("e1")

    async def __aiter__(self) -> AsyncIterator[m.End]:
        await asyncio.Event().wait()
        yield m.End(-1, m.FINISHED)

    def cancel(self) -> None:
        pass


class House:
    """A Router's fleet with one stream, the engine that feeds it, and whoever else connects."""

    def __init__(self) -> None:
        self.heard = Recorder()
        self.codec = Codec()
        self.exchange = Exchange(CONFIG, LOOPBACK, Codec().decode_deltas, metrics=self.heard)
        ledger = Ledger(rng=random.Random(0))
        self.fleet = Fleet(
            "tiny", lambda *given: Call(given[-1]), self.exchange, ledger, CONFIG, max_queued=8, metrics=self.heard
        )
        self.submission = Submission(self.heard)
        self.aborts: list[m.Abort] = []
        self.engine = EngineEnd(CONFIG, "e1", beat=lambda: beat("e1"), on_abort=self.aborts.append, metrics=self.heard)
        self.context = zmq.asyncio.Context()
        self.sequence = 0

    async def start(self) -> tuple[Link, Flight]:
        link = await self.engine.link(self.exchange.channel.address)
        flight = self.fleet.start(self.submission, self.fleet.admit(0))
        await self.heard.until(lambda: flight.replica == "e1")
        return link, flight

    async def stranger(self) -> zmq.asyncio.Socket:
        bare = self.context.socket(zmq.DEALER)
        bare.connect(self.exchange.channel.address.endpoint)
        return bare

    async def peer(self, replica: str) -> zmq.asyncio.Socket:
        """Return a peer that the Router has welcomed, and that then does as the test says."""
        bare = await self.stranger()
        secret = self.exchange.channel.address.secret
        await bare.send_multipart([m.HELLO, msgspec.msgpack.encode(m.Hello(m.VERSION, replica, secret))])
        assert (await bare.recv_multipart())[0] == m.WELCOME
        return bare

    def frames(self, flight: Flight, *, sequence: int, execution: int = 7, token: int = 0) -> list[bytes]:
        output = EngineCoreOutput("0", [token])
        batch = [Delta(flight.stream, execution, sequence, output)]
        return [bytes(frame) for frame in self.codec.encode_deltas(None, batch)]

    def speak(self, link: Link, flight: Flight) -> list[bytes]:
        """Have the engine send its next token; return the frames."""
        frames = self.frames(flight, sequence=self.sequence, token=self.sequence)
        assert link.send(m.DELTAS, frames)
        self.sequence += 1
        return [m.DELTAS, *frames]

    async def undisturbed(self) -> None:
        await self.heard.until(
            lambda: len(self.submission.tokens) >= self.sequence or self.submission.error is not None
        )
        assert self.submission.error is None
        assert self.submission.tokens == list(range(self.sequence))

    def dropped(self) -> int:
        return sum(n for name, n in self.heard.counts.items() if name[0] == "channel_dropped_messages")

    def close(self) -> None:
        self.engine.close()
        self.exchange.close()
        self.context.destroy(linger=0)


def beat(replica: str) -> m.Heartbeat:
    return m.Heartbeat(m.VERSION, replica, "tiny", 1, 0, 0.1, 0.1, 1)


@pytest_asyncio.fixture
async def house() -> AsyncIterator[House]:
    made = House()
    yield made
    for flight in list(made.exchange.flights.values()):
        flight.close()
        await asyncio.wait({flight.task})
    made.close()


def garbage(rng: random.Random) -> list[bytes]:
    """Return frames that mean nothing: no farewell (`STRANGER`), which an engine would rightly take at its word."""
    unknown = rng.choice([byte for byte in range(256) if byte != m.STRANGER[0]]).to_bytes()
    kinds = [m.HELLO, m.WELCOME, m.DELTAS, m.HEARTBEAT, m.ABORT, m.PING, b"", unknown, rng.randbytes(40)]
    return [rng.choice(kinds), *(rng.randbytes(rng.choice([0, 1, 7, 300])) for _ in range(rng.randrange(4)))]


def truncated(rng: random.Random, frames: list[bytes]) -> list[bytes]:
    cut = [frames[0], *(frame[: rng.randrange(len(frame) + 1)] for frame in frames[1:])]
    return cut if cut != frames else [frames[0]]


def bent(rng: random.Random, frames: list[bytes]) -> list[bytes]:
    """Return frames with a byte changed, which may well decode."""
    result = [bytearray(frame) for frame in frames]
    frame = result[rng.randrange(1, len(result))]
    if frame:
        frame[rng.randrange(len(frame))] = rng.randrange(256)
    return [bytes(frame) for frame in result]


@pytest.mark.parametrize("seed", range(3))
async def test_a_stranger_disturbs_nobody(house: House, seed: int) -> None:
    rng = random.Random(seed)
    link, flight = await house.start()
    bare = await house.stranger()
    forged = msgspec.msgpack.encode(m.Hello(m.VERSION, "e1", b"guessed"))
    sent = house.speak(link, flight)
    makers: list[Callable[[], list[bytes]]] = [
        lambda: garbage(rng),
        lambda: truncated(rng, sent),
        lambda: bent(rng, sent),
        lambda: sent,
        lambda: [m.HELLO, forged],
        lambda: [m.DELTAS, *house.frames(flight, sequence=house.sequence, token=999)],
    ]
    for _ in range(ROUNDS):
        await bare.send_multipart(rng.choice(makers)())
        sent = house.speak(link, flight)
    await house.undisturbed()
    await house.heard.until(lambda: house.dropped() == ROUNDS)
    assert house.exchange.channel.replicas == {"e1"}


@pytest.mark.parametrize("seed", range(3))
async def test_a_replica_gone_mad_disturbs_no_stream_of_another(house: House, seed: int) -> None:
    rng = random.Random(seed)
    link, flight = await house.start()
    mad = await house.peer("mad")
    sent = house.speak(link, flight)
    await house.undisturbed()
    makers: list[Callable[[], list[bytes]]] = [
        lambda: garbage(rng),
        lambda: truncated(rng, sent),
        lambda: bent(rng, sent),
        lambda: sent,
        lambda: [m.DELTAS, *house.frames(flight, sequence=house.sequence, token=999)],
        lambda: [m.DELTAS, *house.frames(flight, sequence=house.sequence, execution=8, token=999)],
        lambda: [m.HEARTBEAT, msgspec.msgpack.encode(beat("mad"))],
    ]
    for _ in range(ROUNDS):
        await mad.send_multipart(rng.choice(makers)())
        sent = house.speak(link, flight)
    await house.undisturbed()
    assert house.dropped() > 0


async def test_what_its_own_engine_repeats_is_heard_once(house: House) -> None:
    link, flight = await house.start()
    said = [house.speak(link, flight) for _ in range(20)]
    for frames in said:
        assert link.send(frames[0], frames[1:])
    house.speak(link, flight)
    await house.undisturbed()


@pytest.mark.parametrize("seed", range(3))
async def test_an_engine_reads_past_what_a_router_cannot_have_meant(house: House, seed: int) -> None:
    rng = random.Random(seed)
    bare: Any = house.context.socket(zmq.ROUTER)
    port = bare.bind_to_random_port(f"tcp://{LOOPBACK}")
    linking = asyncio.create_task(house.engine.link(m.ChannelAddress("bare", f"tcp://{LOOPBACK}:{port}", None, b"s")))
    identity, *_ = await bare.recv_multipart()
    await bare.send_multipart([identity, m.WELCOME])
    link = await linking
    good = m.Abort(m.VERSION, 1)
    whole = [m.ABORT, msgspec.msgpack.encode(good)]
    for _ in range(ROUNDS):
        await bare.send_multipart([identity, *rng.choice([garbage(rng), truncated(rng, whole)])])
    await bare.send_multipart([identity, *whole])
    await house.heard.until(lambda: good in house.aborts)
    assert link.send(m.DELTAS, [b"still here"])
