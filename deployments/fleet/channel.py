"""The token channel: deltas from engines to Routers, past Serve's own response path.

Each Router replica binds one socket; each Engine replica connects to it when that Router first calls, introduces
itself, and from then on sends one message per engine step with the deltas of all of that Router's streams. Why not
Serve's streaming responses: about 11 times the chunks per second, measured (docs/architecture.md).

Promises: an engine never blocks on a Router (a full or silent socket costs that Router its streams, nobody else
anything); buffers are bounded; nothing is unpickled; peers that cannot show the secret are ignored. Off loopback the
socket is CURVE-encrypted, and its key travels only inside Serve calls.

Knows nothing of Ray or vLLM. Everything here runs on one event loop.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import math
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec
import zmq

from deployments import messages as m
from deployments.config import FleetConfig

logger = logging.getLogger("ray.serve.groundswell.channel")

Frames = Sequence[bytes | bytearray | memoryview]
_READ_BUDGET = 256
_PAUSE_S = 1.0
_encode = msgspec.msgpack.encode


class Metrics(Protocol):
    """Where counts go. See `deployments.metrics`."""

    def inc(self, name: str, value: float = 1, **tags: str) -> None: ...

    def set(self, name: str, value: float, **tags: str) -> None: ...

    def observe(self, name: str, value: float, **tags: str) -> None: ...


class ChannelError(Exception):
    """The other end cannot be reached."""


class _Rounds:
    """Tells whether it is fair to ask who was silent: not right after a pause of our own, with words still unread."""

    def __init__(self, interval_s: float, clock: Callable[[], float]) -> None:
        self._longest_s, self._clock, self._last = interval_s + _PAUSE_S, clock, clock()

    def fair(self) -> bool:
        last, self._last = self._last, self._clock()
        return self._last - last <= self._longest_s


class _Socket:
    """A ZeroMQ socket driven by asyncio's readers: no task switch per message, as `zmq.asyncio` would cost.

    ZeroMQ's descriptor is edge-triggered, so every read drains, and every send looks for messages whose edge it ate.
    """

    def __init__(self, socket: zmq.Socket[bytes], on_message: Callable[[list[bytes]], None]) -> None:
        self._socket = socket
        self._on_message = on_message
        self._loop = asyncio.get_running_loop()
        self._scheduled = False
        self._closed = False
        self._fd = int(socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self._read)
        self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled and not self._closed:
            self._scheduled = True
            self._loop.call_soon(self._read)

    def _read(self) -> None:
        self._scheduled = False
        for _ in range(_READ_BUDGET):
            if self._closed:
                return
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._on_message(frames)
            except Exception:
                # The descriptor signals edges: leaving this loop early would leave messages unread for good.
                logger.exception("A message on the token channel could not be handled")
        self._schedule()

    def send(self, frames: Frames) -> bool:
        """Queue a message; False when the buffer is full or nobody is connected."""
        if self._closed:
            return False
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except (zmq.Again, zmq.ZMQError):
            return False
        if int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._schedule()
        return True

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._fd)
            self._socket.close(linger=0)


def is_loopback(host: str) -> bool:
    """Whether `host` is reachable from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class RouterEnd:
    """The Router's end of the channel.

    Args:
        host: Address to bind: the node's own, where there is one.
        on_deltas: Called with the frames of a delta message and the replica that sent it.
        on_heartbeat: Called with each heartbeat.
        on_gone: Called with a replica that has fallen silent.
    """

    def __init__(
        self,
        config: FleetConfig,
        host: str,
        *,
        on_deltas: Callable[[str, Frames], None],
        on_heartbeat: Callable[[m.Heartbeat], None],
        on_gone: Callable[[str], None],
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._on_deltas, self._on_heartbeat, self._on_gone = on_deltas, on_heartbeat, on_gone
        self._metrics, self._clock = metrics, clock
        self._context = zmq.Context()
        socket = self._context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.RCVHWM, config.max_unread_messages)
        socket.setsockopt(zmq.SNDHWM, config.max_unread_messages)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        server_key = None
        if not is_loopback(host):
            server_key, secret_key = zmq.curve_keypair()
            socket.curve_secretkey, socket.curve_server = secret_key, True
        bracketed = f"[{host}]" if ":" in host else host
        if ":" in host:
            socket.setsockopt(zmq.IPV6, 1)
        port = socket.bind_to_random_port(f"tcp://{bracketed}")
        self.address = m.ChannelAddress(
            router=secrets.token_hex(8),
            endpoint=f"tcp://{bracketed}:{port}",
            server_key=server_key,
            secret=secrets.token_bytes(16),
        )
        self._peers: dict[bytes, str] = {}
        self._heard: dict[bytes, float] = {}
        self._hello = msgspec.msgpack.Decoder(m.Hello)
        self._heartbeat = msgspec.msgpack.Decoder(m.Heartbeat)
        self._socket = _Socket(socket, self._on_message)
        self._rounds = _Rounds(config.heartbeat_interval_s, clock)
        self._ping_task = asyncio.get_running_loop().create_task(self._ping())

    def _on_message(self, frames: list[bytes]) -> None:
        try:
            identity, kind, *rest = frames
            if kind == m.HELLO:
                self._welcome(identity, rest[0])
                return
            replica = self._peers.get(identity)
            if replica is None:
                self._metrics.inc("channel_dropped_messages", reason="stranger")
                self._socket.send([identity, m.STRANGER])  # an engine we gave up may not have noticed
                return
            self._heard[identity] = self._clock()
            if kind == m.DELTAS:
                self._on_deltas(replica, rest)
            elif kind == m.HEARTBEAT:
                self._on_heartbeat(self._heartbeat.decode(rest[0]))
            else:
                self._metrics.inc("channel_dropped_messages", reason="unknown_kind")
        except (msgspec.MsgspecError, IndexError, ValueError) as error:
            self._metrics.inc("channel_dropped_messages", reason="malformed")
            logger.warning("A malformed message on the token channel was dropped: %s", error)

    def _welcome(self, identity: bytes, payload: bytes) -> None:
        hello = self._hello.decode(payload)
        if hello.version != m.VERSION or not hmac.compare_digest(hello.secret, self.address.secret):
            self._metrics.inc("channel_dropped_messages", reason="stranger")
            return
        for old in [i for i, replica in self._peers.items() if replica == hello.replica and i != identity]:
            self._forget(old)
        self._peers[identity], self._heard[identity] = hello.replica, self._clock()
        self._socket.send([identity, m.WELCOME])

    def abort(self, replica: str, abort: m.Abort) -> None:
        """Ask `replica` to drop a stream. Best effort: the Serve call is cancelled as well."""
        for identity, name in self._peers.items():
            if name == replica:
                self._socket.send([identity, m.ABORT, _encode(abort)])
                return

    @property
    def replicas(self) -> frozenset[str]:
        """Engine replicas that are connected now."""
        return frozenset(self._peers.values())

    async def _ping(self) -> None:
        while True:
            await asyncio.sleep(self._config.heartbeat_interval_s)
            try:
                self._ping_all()
            except Exception:
                logger.exception("The engines could not all be pinged")

    def _ping_all(self) -> None:
        silent_before = self._clock() - self._config.heartbeat_timeout_s if self._rounds.fair() else -math.inf
        for identity, heard in list(self._heard.items()):
            if heard < silent_before or not self._socket.send([identity, m.PING]):
                replica = self._forget(identity)
                if replica is not None:
                    self._on_gone(replica)
        self._metrics.set("channel_connected_engines", len(self._peers))

    def _forget(self, identity: bytes) -> str | None:
        self._heard.pop(identity, None)
        return self._peers.pop(identity, None)

    def close(self) -> None:
        self._ping_task.cancel()
        self._socket.close()
        self._context.term()


class Link:
    """An engine's connection to one Router. `runs` are the streams that end with it."""

    def __init__(self, end: EngineEnd, address: m.ChannelAddress, socket: zmq.Socket[bytes]) -> None:
        self._end = end
        self.router = address.router
        self.runs: dict[int, Callable[[str], None]] = {}
        self.pending: list[Any] = []
        self.heard = end.clock()
        self.welcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._abort = msgspec.msgpack.Decoder(m.Abort)
        self._socket = _Socket(socket, self._on_message)
        self._socket.send([m.HELLO, _encode(m.Hello(m.VERSION, end.replica, address.secret))])

    def _on_message(self, frames: list[bytes]) -> None:
        self.heard = self._end.clock()
        if frames[0] == m.WELCOME:
            if not self.welcome.done():
                self.welcome.set_result(None)
        elif frames[0] == m.ABORT:
            try:
                self._end.on_abort(self._abort.decode(frames[1]))
            except (msgspec.MsgspecError, IndexError) as error:
                self._end.metrics.inc("channel_dropped_messages", reason="malformed")
                logger.warning("A malformed message on the token channel was dropped: %s", error)
        elif frames[0] == m.STRANGER:
            self.fail("it has given this engine up")
        elif frames[0] != m.PING:
            self._end.metrics.inc("channel_dropped_messages", reason="unknown_kind")

    def send(self, kind: bytes, frames: Frames) -> bool:
        """Send without ever waiting; a link whose buffer is full fails at once."""
        if self._socket.send([kind, *frames]):
            return True
        self.fail("its token channel is full or gone")
        return False

    def fail(self, reason: str) -> None:
        """Drop the connection and end its runs: that Router is gone, slow beyond the bound, or stuck."""
        if self._end.drop(self):
            runs, self.runs, self.pending = list(self.runs.values()), {}, []
            self._end.metrics.inc("channel_lost_routers")
            self._end.metrics.inc("channel_aborted_streams", len(runs))
            logger.warning("Router %s was dropped with %d streams: %s", self.router, len(runs), reason)
            if not self.welcome.done():
                self.welcome.set_exception(ChannelError(reason))
                self.welcome.exception()  # retrieved: nobody may be waiting
            for end_run in runs:
                end_run(reason)
            self._socket.close()

    def close(self) -> None:
        self._socket.close()


class EngineEnd:
    """The Engine's end of the channel: one link per Router that has called.

    Args:
        replica: This replica's id in Serve.
        beat: Returns the heartbeat to send.
        on_abort: Called when a Router wants no more of a stream.
    """

    def __init__(
        self,
        config: FleetConfig,
        replica: str,
        *,
        beat: Callable[[], m.Heartbeat],
        on_abort: Callable[[m.Abort], None],
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.replica, self.on_abort, self.metrics, self.clock = replica, on_abort, metrics, clock
        self._config, self._beat = config, beat
        self._context = zmq.Context()
        self._links: dict[str, Link] = {}
        self._rounds = _Rounds(config.heartbeat_interval_s, clock)
        self._beat_task = asyncio.get_running_loop().create_task(self._heartbeats())

    async def link(self, address: m.ChannelAddress) -> Link:
        """Return the link to a Router, connecting at its first call.

        Raises:
            ChannelError: The Router cannot be reached from here within `connect_timeout_s`.
        """
        link = self._links.get(address.router)
        if link is None:
            link = self._links[address.router] = Link(self, address, self._connect(address))
        if link.welcome.done():
            return link
        try:
            await asyncio.wait_for(asyncio.shield(link.welcome), self._config.connect_timeout_s)
        except TimeoutError:
            link.fail("it did not answer on the token channel")
            raise ChannelError(f"Router {address.router} did not answer on the token channel") from None
        if self._links.get(address.router) is not link:
            raise ChannelError(f"Router {address.router} was lost as soon as it had answered")
        return link

    def _connect(self, address: m.ChannelAddress) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.SNDHWM, self._config.max_unsent_messages)
        socket.setsockopt(zmq.RCVHWM, self._config.max_unsent_messages)
        socket.setsockopt(zmq.ROUTING_ID, b"e" + secrets.token_bytes(15))
        # A reconnecting socket would be a stranger to the Router; the link fails on silence instead.
        if address.server_key is not None:
            socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
            socket.curve_serverkey = address.server_key
        if "[" in address.endpoint:
            socket.setsockopt(zmq.IPV6, 1)
        socket.connect(address.endpoint)
        return socket

    async def _heartbeats(self) -> None:
        while True:
            await asyncio.sleep(self._config.heartbeat_interval_s)
            try:
                self._beat_all()
            except Exception:
                logger.exception("Not every Router got a heartbeat")

    def _beat_all(self) -> None:
        payload = _encode(self._beat())
        silent_before = self.clock() - self._config.heartbeat_timeout_s if self._rounds.fair() else -math.inf
        for link in list(self._links.values()):
            if link.heard < silent_before:
                link.fail("it has fallen silent")
            elif link.welcome.done():
                link.send(m.HEARTBEAT, [payload])
        self.metrics.set("channel_connected_routers", len(self._links))

    def drop(self, link: Link) -> bool:
        """Forget a link; False when it was forgotten before."""
        if self._links.get(link.router) is not link:
            return False
        del self._links[link.router]
        return True

    def close(self) -> None:
        self._beat_task.cancel()
        for link in self._links.values():
            link.close()
        self._links.clear()
        self._context.term()
