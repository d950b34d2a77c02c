"""The token channel, both ends, over real sockets on this machine. No Ray, no vLLM."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable

import msgspec
import psutil
import pytest
import pytest_asyncio
import zmq
import zmq.asyncio

from deployments import messages as m
from deployments.config import FleetConfig
from deployments.fleet import channel
from deployments.fleet.channel import ChannelError, EngineEnd, Frames, Link, RouterEnd
from tests.unit.recording import LIMIT_S, Clock, Recorder, until

pytestmark = pytest.mark.asyncio
LOOPBACK = "127.0.0.1"
CONFIG = FleetConfig(
    heartbeat_interval_s=0.01,
    heartbeat_timeout_s=10,  # by the test's own clock
    connect_timeout_s=LIMIT_S,
    max_unsent_messages=8192,
)
IMPATIENT = CONFIG.model_copy(update={"connect_timeout_s": 0.2})


class Ends:
    """Makes ends of the channel, and closes them. All tell `heard` what reaches them."""

    def __init__(self) -> None:
        self.heard = Recorder()
        self.clock = Clock()
        self.context = zmq.asyncio.Context()
        self._closes: list[Callable[[], None]] = []

    def router(self, host: str = LOOPBACK, config: FleetConfig = CONFIG) -> RouterEnd:
        def on_deltas(replica: str, frames: Frames) -> None:
            if bytes(frames[0]) == b"unreadable":
                raise msgspec.ValidationError("unreadable")
            self.heard.note("delta", replica, bytes(frames[0]))

        end = RouterEnd(
            config,
            host,
            on_deltas=on_deltas,
            on_heartbeat=lambda beat: self.heard.note("beat", beat),
            on_gone=lambda replica: self.heard.note("gone", replica),
            metrics=self.heard,
            clock=self.clock,
        )
        self._closes.append(end.close)
        return end

    def engine(self, replica: str = "e1", config: FleetConfig = CONFIG) -> EngineEnd:
        end = EngineEnd(
            config,
            replica,
            beat=lambda: m.Heartbeat(m.VERSION, replica, "tiny", 3, 2, 0.5, 0.1, 5),
            on_abort=lambda abort: self.heard.note("abort", abort),
            metrics=self.heard,
            clock=self.clock,
        )
        self._closes.append(end.close)
        return end

    def socket(self, kind: int, **options: int) -> zmq.asyncio.Socket:
        """Return a bare socket, to play a peer that misbehaves."""
        bare = self.context.socket(kind)
        for name, value in options.items():
            bare.setsockopt(getattr(zmq, name), value)
        return bare

    def deltas(self) -> list[bytes]:
        return [what[2] for what in self.heard.noted if what[0] == "delta"]

    def dropped(self, reason: str) -> int:
        return self.heard.counts["channel_dropped_messages", reason]

    def close(self) -> None:
        for close in self._closes:
            close()
        self.context.destroy(linger=0)


@pytest_asyncio.fixture
async def ends() -> AsyncIterator[Ends]:
    made = Ends()
    yield made
    made.close()


async def dealer(ends: Ends, router: RouterEnd, *hello: bytes) -> zmq.asyncio.Socket:
    """Return a bare peer of `router` that has said `hello`."""
    bare = ends.socket(zmq.DEALER)
    bare.connect(router.address.endpoint)
    if hello:
        await bare.send_multipart([m.HELLO, *hello])
    return bare


def hello(router: RouterEnd, replica: str = "bare", version: int = m.VERSION) -> bytes:
    return msgspec.msgpack.encode(m.Hello(version, replica, router.address.secret))


class BareRouter:
    """A Router that welcomes an engine and then neither speaks nor reads."""

    def __init__(self, ends: Ends) -> None:
        self._ends = ends
        self.socket = ends.socket(zmq.ROUTER, RCVHWM=1, RCVBUF=4096)
        port = self.socket.bind_to_random_port(f"tcp://{LOOPBACK}")
        self.address = m.ChannelAddress("bare", f"tcp://{LOOPBACK}:{port}", None, b"secret")

    async def linked(self, engine: EngineEnd) -> Link:
        linking = asyncio.create_task(engine.link(self.address))
        self.identity, _, _ = await self.socket.recv_multipart()
        await self.say(m.WELCOME)
        return await linking

    async def say(self, *frames: bytes) -> None:
        await self.socket.send_multipart([self.identity, *frames])


# Who may speak.


async def test_an_engine_that_knows_the_secret_is_welcomed(ends: Ends) -> None:
    router, engine = ends.router(), ends.engine()
    await engine.link(router.address)
    assert router.replicas == {"e1"}


async def test_a_link_that_fails_as_it_is_welcomed_is_not_handed_out(ends: Ends) -> None:
    router, engine = ends.router(), ends.engine()
    linking = asyncio.create_task(engine.link(router.address))
    await until(lambda: engine._links)
    (link,) = engine._links.values()
    link.welcome.add_done_callback(lambda _: link.fail("its buffer is full"))
    with pytest.raises(ChannelError, match="lost as soon"):
        await linking


async def test_callers_share_one_connection(ends: Ends) -> None:
    router, engine = ends.router(), ends.engine()
    links = await asyncio.gather(*(engine.link(router.address) for _ in range(8)))
    assert len(set(map(id, links))) == 1


async def test_a_peer_with_a_wrong_secret_is_ignored_and_counted(ends: Ends) -> None:
    router, engine = ends.router(), ends.engine(config=IMPATIENT)
    with pytest.raises(ChannelError):
        await engine.link(msgspec.structs.replace(router.address, secret=b"guessed"))
    await ends.heard.until(lambda: ends.dropped("stranger") == 1)
    assert router.replicas == frozenset()


async def test_a_peer_of_another_version_is_ignored_and_counted(ends: Ends) -> None:
    router = ends.router()
    await dealer(ends, router, hello(router, version=m.VERSION + 1))
    await ends.heard.until(lambda: ends.dropped("stranger") == 1)
    assert router.replicas == frozenset()


async def test_deltas_of_a_peer_that_did_not_introduce_itself_are_ignored_and_counted(ends: Ends) -> None:
    router = ends.router()
    bare = await dealer(ends, router)
    await bare.send_multipart([m.DELTAS, b"forged"])
    await ends.heard.until(lambda: ends.dropped("stranger") == 1)
    assert ends.deltas() == []


async def test_a_router_that_does_not_answer_is_given_up_and_may_be_tried_again(ends: Ends) -> None:
    engine = ends.engine(config=IMPATIENT)
    mute = ends.socket(zmq.ROUTER)
    port = mute.bind_to_random_port(f"tcp://{LOOPBACK}")
    address = m.ChannelAddress("mute", f"tcp://{LOOPBACK}:{port}", None, b"secret")
    answers = await asyncio.gather(engine.link(address), engine.link(address), return_exceptions=True)
    assert [type(answer) for answer in answers] == [ChannelError, ChannelError]
    engine._config = CONFIG  # now it has time for an answer
    again = asyncio.create_task(engine.link(address))
    hellos = [await mute.recv_multipart() for _ in range(2)]
    await mute.send_multipart([hellos[1][0], m.WELCOME])
    assert (await again).router == "mute"


async def test_a_replica_that_connects_anew_takes_the_place_of_its_old_connection(ends: Ends) -> None:
    router = ends.router()
    old = await dealer(ends, router, hello(router, "e1"))
    await old.recv_multipart()
    new = await dealer(ends, router, hello(router, "e1"))
    await new.recv_multipart()
    await old.send_multipart([m.DELTAS, b"late"])
    await ends.heard.until(lambda: ends.dropped("stranger") == 1)
    await new.send_multipart([m.DELTAS, b"fresh"])
    await ends.heard.until(lambda: bool(ends.deltas()))
    assert ends.deltas() == [b"fresh"]
    assert router.replicas == {"e1"}


async def test_an_engine_that_was_given_up_is_told_so_and_connects_anew(ends: Ends) -> None:
    router, engine = ends.router(), ends.engine()
    link = await engine.link(router.address)
    link.runs[1] = lambda reason: ends.heard.note("ended", reason)
    (identity,) = router._peers
    router._forget(identity)  # as after a silence that only the Router has noticed
    link.send(m.DELTAS, [b"late"])
    await ends.heard.until(lambda: any(what[0] == "ended" for what in ends.heard.noted))
    assert ends.deltas() == []
    assert await engine.link(router.address) is not link
    assert router.replicas == {"e1"}


async def test_a_second_hello_on_one_connection_changes_nothing(ends: Ends) -> None:
    router = ends.router()
    bare = await dealer(ends, router, hello(router, "e1"))
    await bare.send_multipart([m.HELLO, hello(router, "e1")])
    await bare.recv_multipart()
    await bare.recv_multipart()
    assert router.replicas == {"e1"}


# What is said.


async def test_deltas_arrive_in_order(ends: Ends) -> None:
    router, engine = ends.router(), ends.engine()
    link = await engine.link(router.address)
    sent = [b"%d" % i for i in range(3000)]
    assert all([link.send(m.DELTAS, [delta]) for delta in sent])
    await ends.heard.until(lambda: len(ends.deltas()) == len(sent))
    assert ends.deltas() == sent


async def test_a_heartbeat_reaches_the_router(ends: Ends) -> None:
    router, engine = ends.router(), ends.engine()
    await engine.link(router.address)
    await ends.heard.until(lambda: any(what[0] == "beat" for what in ends.heard.noted))
    beat = next(what[1] for what in ends.heard.noted if what[0] == "beat")
    assert beat == m.Heartbeat(m.VERSION, "e1", "tiny", 3, 2, 0.5, 0.1, 5)


async def test_an_abort_reaches_the_replica_it_is_for_and_no_other(ends: Ends) -> None:
    router = ends.router()
    abort = m.Abort(m.VERSION, stream=7, index=1)
    others: list[m.Abort] = []
    e1, e2 = ends.engine("e1"), ends.engine("e2")
    e2.on_abort = others.append
    await asyncio.gather(e1.link(router.address), e2.link(router.address))
    router.abort("e1", abort)
    router.abort("nobody", abort)
    await ends.heard.until(lambda: ("abort", abort) in ends.heard.noted)
    assert others == []


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([b"?"], "unknown_kind"),
        ([b""], "unknown_kind"),
        ([m.HEARTBEAT], "malformed"),
        ([m.HEARTBEAT, b"\xc1"], "malformed"),
        ([m.HEARTBEAT, msgspec.msgpack.encode([1, 2])], "malformed"),
        ([m.HELLO], "malformed"),
        ([m.HELLO, b"\xc1"], "malformed"),
        ([m.DELTAS, b"unreadable"], "malformed"),
    ],
)
async def test_what_a_router_cannot_read_is_dropped_and_counted(ends: Ends, frames: list[bytes], reason: str) -> None:
    router = ends.router()
    bare = await dealer(ends, router, hello(router))
    await bare.send_multipart(frames)
    await bare.send_multipart([m.DELTAS, b"good"])
    await ends.heard.until(lambda: ends.deltas() == [b"good"])
    assert ends.dropped(reason) == 1


async def test_what_an_engine_cannot_read_is_dropped_and_counted(ends: Ends) -> None:
    bare, engine = BareRouter(ends), ends.engine()
    await bare.linked(engine)
    abort = m.Abort(m.VERSION, 1)
    await bare.say(m.ABORT)
    await bare.say(m.ABORT, b"\xc1")
    await bare.say(b"?")
    await bare.say(m.ABORT, msgspec.msgpack.encode(abort))
    await ends.heard.until(lambda: ("abort", abort) in ends.heard.noted)
    assert ends.dropped("malformed") == 2
    assert ends.dropped("unknown_kind") == 1


# Who falls silent.


def streams_of(ends: Ends, link: Link, *runs: int) -> None:
    link.runs.update({run: lambda reason, run=run: ends.heard.note("ended", run) for run in runs})  # type: ignore[misc]


async def test_a_silent_router_loses_its_streams_and_only_its_own(ends: Ends) -> None:
    router, bare, engine = ends.router(), BareRouter(ends), ends.engine()
    alive, silent = await engine.link(router.address), await bare.linked(engine)
    streams_of(ends, alive, 1)
    streams_of(ends, silent, 2, 3)
    ends.clock.now += 6
    beats = len(ends.heard.noted)
    await ends.heard.until(lambda: len(ends.heard.noted) > beats and alive.heard == ends.clock.now)
    ends.clock.now += 6
    await ends.heard.until(lambda: ends.heard.counts["channel_lost_routers",] == 1)
    assert [what for what in ends.heard.noted if what[0] == "ended"] == [("ended", 2), ("ended", 3)]
    assert ends.heard.counts["channel_aborted_streams",] == 2
    assert not silent.send(m.DELTAS, [b"x"])
    assert alive.send(m.DELTAS, [b"still here"])
    await ends.heard.until(lambda: ends.deltas() == [b"still here"])


async def test_a_full_socket_costs_its_router_the_streams_and_never_blocks_the_engine(ends: Ends) -> None:
    engine = ends.engine(config=CONFIG.model_copy(update={"max_unsent_messages": 16}))
    router, bare = ends.router(), BareRouter(ends)
    alive, full = await engine.link(router.address), await bare.linked(engine)
    streams_of(ends, alive, 1)
    streams_of(ends, full, 2)
    sent = 0
    while full.send(m.DELTAS, [bytes(2**16)]):  # in one go: the event loop does nothing else meanwhile
        sent += 1
        assert sent < 10_000, "the buffer has no bound"
    assert [what for what in ends.heard.noted if what[0] == "ended"] == [("ended", 2)]
    assert full.runs == {}
    assert alive.send(m.DELTAS, [b"still here"])
    await ends.heard.until(lambda: ends.deltas() == [b"still here"])


async def test_a_silent_engine_is_reported_gone(ends: Ends) -> None:
    router, engine = ends.router(), ends.engine("alive")
    link = await engine.link(router.address)
    bare = await dealer(ends, router, hello(router, "silent"))
    await bare.recv_multipart()
    ends.clock.now += 6
    beats = len(ends.heard.noted)
    await ends.heard.until(lambda: len(ends.heard.noted) > beats and link.heard == ends.clock.now)
    ends.clock.now += 6
    await ends.heard.until(lambda: ("gone", "silent") in ends.heard.noted)
    assert router.replicas == {"alive"}


async def test_after_a_pause_of_its_own_a_router_listens_before_it_calls_anybody_silent(ends: Ends) -> None:
    router, engine = ends.router(config=CONFIG.model_copy(update={"heartbeat_interval_s": 5})), ends.engine()
    await engine.link(router.address)
    ends.clock.now += 60
    router._ping_all()
    assert router.replicas == {"e1"}
    beats = len(ends.heard.noted)
    await ends.heard.until(lambda: len(ends.heard.noted) > beats)
    router._ping_all()
    assert router.replicas == {"e1"}


async def test_an_engine_whose_connection_is_closed_is_reported_gone_before_it_counts_as_silent(ends: Ends) -> None:
    router, engine = ends.router(), ends.engine()
    await engine.link(router.address)
    engine.close()
    await ends.heard.until(lambda: ("gone", "e1") in ends.heard.noted)
    assert router.replicas == frozenset()


# Who listens.


@pytest.fixture
def off_loopback(monkeypatch: pytest.MonkeyPatch) -> str:
    """Return an address of this machine that others could reach; where it has none, loopback passes for one."""
    for addresses in psutil.net_if_addrs().values():
        for address in addresses:
            if address.family == socket.AF_INET and not channel.is_loopback(address.address):
                return str(address.address)
    monkeypatch.setattr(channel, "is_loopback", lambda host: False)
    return LOOPBACK


async def test_off_loopback_the_channel_is_encrypted(ends: Ends, off_loopback: str) -> None:
    router, engine = ends.router(off_loopback), ends.engine()
    assert router.address.server_key is not None
    assert (await engine.link(router.address)).send(m.DELTAS, [b"secret words"])
    await ends.heard.until(lambda: ends.deltas() == [b"secret words"])


@pytest.mark.parametrize("key", [None, zmq.curve_keypair()[0]])
async def test_off_loopback_nobody_connects_without_the_key(ends: Ends, off_loopback: str, key: bytes | None) -> None:
    router, engine = ends.router(off_loopback), ends.engine(config=IMPATIENT)
    with pytest.raises(ChannelError):
        await engine.link(msgspec.structs.replace(router.address, server_key=key))
    assert router.replicas == frozenset()


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("198.51.100.7", False),
        ("0.0.0.0", False),
        ("h", False),
    ],
)
async def test_only_loopback_goes_without_encryption(host: str, loopback: bool) -> None:
    assert channel.is_loopback(host) is loopback
