"""Groundswell's data path without Ray: the real Engine around a STUB core in one process, the real Router or a real
Fleet in another, and in place of Serve's calls between them frames over a Unix socket.

What it leaves out is what Serve costs; `benchmarks.stubs.app` has it.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import msgspec
from ray import serve

from deployments import messages as m
from deployments import router as routers
from deployments.config import AppConfig, FleetConfig, ModelConfig
from deployments.dispatch import App
from deployments.engine import Engine
from deployments.fleet.client import Ticket
from deployments.metrics import NoMetrics
from deployments.router import Router

REPLICA = "stub"
_HEADER = 4
_encode = msgspec.msgpack.encode


class _Request(msgspec.Struct):
    call: int
    frames: list[bytes]
    channel: m.ChannelAddress
    stream: int = 0


class _Reply(msgspec.Struct):
    """One of them; `over` ends the call."""

    call: int
    end: m.End | None = None
    description: m.EngineDescription | None = None
    over: bool = False


def _write(writer: asyncio.StreamWriter, message: msgspec.Struct) -> None:
    data = _encode(message)
    writer.write(len(data).to_bytes(_HEADER) + data)


async def _read(reader: asyncio.StreamReader) -> bytes:
    return await reader.readexactly(int.from_bytes(await reader.readexactly(_HEADER)))


class LocalEngine(Engine):
    """An Engine that no Ray runs. Its `TokenEngine` is real, what that drives is a stub."""

    async def __init__(self, model: ModelConfig, fleet: FleetConfig) -> None:  # type: ignore[misc]
        from benchmarks.stubs.core import install
        from deployments.seam.args import parse_args
        from deployments.seam.token_engine import TokenEngine

        install()
        args = parse_args(model.name, model.engine_args, model.frontend_args)
        llm = await TokenEngine.start(args, num_gpus=0, on_step=self._flush, ray_metrics=False)
        self._open(model, fleet, REPLICA, llm, NoMetrics())


async def router_outside_serve(model: ModelConfig, calls: Callable[..., Any]) -> tuple[Router, App]:
    """Return a Router, and its app as Serve has it built.

    Args:
        model: The one model.
        calls: Stands for the Router's calls by way of Serve.
    """
    here = SimpleNamespace(replica_id=SimpleNamespace(unique_id="router"), app_name="")
    with (
        mock.patch.object(routers, "_ServeCalls", calls),
        mock.patch.object(serve, "get_replica_context", lambda: here),
    ):
        made = Router(AppConfig(models=(model,)), {model.name: None})  # type: ignore[dict-item]
        return made, await made.__serve_build_asgi_app__()


async def serve_engine(path: Path, model: ModelConfig) -> None:
    """Answer calls at a Unix socket, for ever."""
    engine = LocalEngine.__new__(LocalEngine)
    await engine.__init__(model, FleetConfig())  # type: ignore[misc]
    decode = msgspec.msgpack.Decoder(_Request).decode

    async def answer(request: _Request, writer: asyncio.StreamWriter) -> None:
        if not request.frames:
            _write(writer, _Reply(request.call, description=await engine.join(request.channel), over=True))
            return
        async for message in engine.generate(request.frames, request.channel, request.stream):
            _write(writer, _Reply(request.call, end=message))
        _write(writer, _Reply(request.call, over=True))

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        calls: set[asyncio.Task[None]] = set()
        try:
            while True:
                task = asyncio.create_task(answer(decode(await _read(reader)), writer))
                calls.add(task)
                task.add_done_callback(calls.discard)
        except (asyncio.IncompleteReadError, ConnectionError):
            for task in calls:
                task.cancel()

    server = await asyncio.start_unix_server(listen, path)
    await server.serve_forever()


class LocalCalls:
    """Stands in for `deployments.router._ServeCalls`: calls to one engine process at a Unix socket."""

    def __init__(
        self, path: Path, on_replicas: Callable[[frozenset[str]], None] | None = None, *, join_timeout_s: float = 10
    ) -> None:
        self._path, self._ids = path, itertools.count()
        self._calls: dict[int, LocalCall] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._reader = asyncio.get_running_loop().create_task(self._listen())
        self._connected = asyncio.Event()
        if on_replicas is not None:
            asyncio.get_running_loop().call_soon(on_replicas, frozenset({REPLICA}))

    async def _listen(self) -> None:
        decode = msgspec.msgpack.Decoder(_Reply).decode
        while not self._path.exists():  # noqa: ASYNC110  (both processes load vLLM at the same time)
            await asyncio.sleep(0.1)
        reader, self._writer = await asyncio.open_unix_connection(self._path)
        self._connected.set()
        while True:
            reply = decode(await _read(reader))
            self._calls[reply.call].replies.put_nowait(reply)

    def _send(self, frames: list[bytes], channel: m.ChannelAddress, stream: int) -> LocalCall:
        number = next(self._ids)
        call = self._calls[number] = LocalCall(lambda: self._calls.pop(number, None))
        assert self._writer is not None
        _write(self._writer, _Request(number, frames, channel, stream))
        return call

    def open(self, frames: list[bytes], channel: m.ChannelAddress, stream: int, ticket: Ticket) -> LocalCall:
        ticket.rank([REPLICA])
        ticket.taken(REPLICA)
        return self._send(frames, channel, stream)

    async def join(self, channel: m.ChannelAddress) -> list[m.EngineDescription]:
        await self._connected.wait()
        reply = await self._send([], channel, 0).replies.get()
        return [reply.description] if reply.description is not None else []


class LocalCall:
    """One open call. `cancel` only forgets it: nothing here hangs up."""

    def __init__(self, forget: Callable[[], Any]) -> None:
        self.replies: asyncio.Queue[_Reply] = asyncio.Queue()
        self.cancel = forget

    async def __aiter__(self) -> AsyncIterator[m.End]:
        while not (reply := await self.replies.get()).over:
            assert reply.end is not None
            yield reply.end
