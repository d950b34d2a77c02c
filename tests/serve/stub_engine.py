"""A STUB of the Engine: no model, no vLLM engine; invented tokens, as `tests.serve.orders` has them."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator

from deployments import messages as m
from deployments.config import FleetConfig, ModelConfig
from deployments.fleet.channel import EngineEnd
from deployments.metrics import NoMetrics
from tests.serve.orders import Notes, Settings, Wire, make, obey


class StubEngine:
    async def __init__(self, model: ModelConfig, fleet: FleetConfig) -> None:  # type: ignore[misc]
        self.set, self.wire, self.notes = Settings.of(model, fleet), Wire(), Notes.new(model)
        self.batch, self.prefill, self.stepped = asyncio.Semaphore(self.set.batch), asyncio.Lock(), time.monotonic()
        self.aborted: set[int] = set()
        self.channel = EngineEnd(fleet, self.notes.replica, beat=self.beat, on_abort=self.abort, metrics=NoMetrics())

    async def generate(
        self, frames: list[bytes], channel: m.ChannelAddress, stream: int, ticket: None = None
    ) -> AsyncIterator[m.End]:
        link, run, sent = await self.channel.link(channel), secrets.randbits(62), 0
        prompt_tokens, wanted = self.wire.read(frames)
        self.stepped = self.stepped if self.notes.running else time.monotonic()
        self.notes.begin(channel.router, prompt_tokens)
        link.runs[run] = lambda reason: self.aborted.add(stream)
        try:
            async with self.batch:
                async with self.prefill:
                    await asyncio.sleep(prompt_tokens * self.set.prefill_s)
                while sent < wanted and stream not in self.aborted:
                    await obey(self.notes, sent)
                    await make(self.notes, self.set)
                    link.send(m.DELTAS, self.wire.token(stream, run, sent, prompt_tokens, wanted))
                    self.stepped, sent = time.monotonic(), sent + 1
            yield m.End(sent - 1, m.FINISHED if sent == wanted else m.ABORTED)
        finally:
            link.runs.pop(run, None)
            self.notes.finish()

    def abort(self, abort: m.Abort) -> None:
        self.aborted.add(abort.stream)

    def beat(self) -> m.Heartbeat:
        work, idle_s = self.notes.running, time.monotonic() - self.stepped
        load = min(work, self.set.batch), max(0, work - self.set.batch), self.set.kv_cache_usage
        return m.Heartbeat(m.VERSION, self.notes.replica, self.notes.model, *load, idle_s, work)

    async def join(self, channel: m.ChannelAddress) -> m.EngineDescription:
        await self.channel.link(channel)
        self.notes.join(channel.router)
        return m.EngineDescription(self.notes.replica, 4096, self.set.batch, ("generate",))

    def check_health(self) -> None:
        assert not self.notes.running or time.monotonic() - self.stepped < self.set.stall_s, "hung"
