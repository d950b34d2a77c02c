"""One end of a token channel, or a Router's HTTP side, as a program of its own for a host. Says what happens, in lines.

python -m tests.cluster.hosts.peers router ADDRESS
python -m tests.cluster.hosts.peers engine CHANNEL
python -m tests.cluster.hosts.peers http NAME
"""

from __future__ import annotations

import asyncio
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec

from deployments import messages as m
from deployments.config import FleetConfig
from deployments.fleet.channel import ChannelError, EngineEnd, RouterEnd
from deployments.metrics import NoMetrics

CONFIG = FleetConfig(heartbeat_interval_s=0.2, heartbeat_timeout_s=2, connect_timeout_s=2)
HTTP_PORT = 30000


def say(*words: Any) -> None:
    print(*words, flush=True)


async def router(address: str) -> None:
    """Bind `address`; say the channel's address, then how many deltas have come, and who has fallen silent."""
    deltas = 0

    def on_deltas(replica: str, frames: Any) -> None:
        nonlocal deltas
        deltas += 1

    end = RouterEnd(
        CONFIG,
        address,
        on_deltas=on_deltas,
        on_heartbeat=lambda beat: None,
        on_gone=lambda replica: say("gone", replica),
        metrics=NoMetrics(),
    )
    say(msgspec.json.encode(end.address).decode())
    while True:
        await asyncio.sleep(0.1)
        say("deltas", deltas)


async def engine(channel: str) -> None:
    """Connect to `channel` and send ten deltas a second; say when it is lost, and connect again."""

    def beat() -> m.Heartbeat:
        return m.Heartbeat(m.VERSION, "e", "tiny", 0, 0, 0.0, 0.0, 0)

    end = EngineEnd(CONFIG, "e", beat=beat, on_abort=lambda abort: None, metrics=NoMetrics())
    address = msgspec.json.decode(channel, type=m.ChannelAddress)
    while True:
        try:
            link = await end.link(address)
        except ChannelError:
            say("unreachable")
            continue
        lost = asyncio.Event()
        link.runs[1] = lambda reason, lost=lost: lost.set()  # type: ignore[misc]
        say("connected")
        while not lost.is_set():
            link.send(m.DELTAS, [b"delta"])
            await asyncio.sleep(0.1)
        say("lost")


class Answers(BaseHTTPRequestHandler):
    """`/-/healthz` answers at once; anything else says who answers, and on `/stream` never ends."""

    protocol_version = "HTTP/1.1"
    name = ""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        self._chunk(self.name.encode())
        while self.path == "/stream":
            time.sleep(0.2)
            self._chunk(b".")
        self._chunk(b"")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def log_message(self, format: str, *args: Any) -> None:
        pass


def http(name: str) -> None:
    """Serve as a Router would for HAProxy."""
    Answers.name = name
    ThreadingHTTPServer(("0.0.0.0", HTTP_PORT), Answers).serve_forever()


if __name__ == "__main__":
    what, argument = sys.argv[1:]
    if what == "http":
        http(argument)
    else:
        asyncio.run({"router": router, "engine": engine}[what](argument))
