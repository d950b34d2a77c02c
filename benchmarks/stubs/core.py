"""A STUB of vLLM's EngineCore: no model, no scheduler, no process of its own; every token is invented.

It takes EngineCore's place under vLLM's own `AsyncLLM`, so that everything above it is the real thing: in the bare
server vLLM's API server, in Groundswell the Engine, the token channel and the Router. One step gives each running
request a token.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, Final

STEP_S: Final = "STUB_STEP_S"
"""In the environment: seconds between two steps; 0 is as fast as the process can."""
_TOKENS: Final = 1000, 900
"""The first of the pieces of words that answers are made of, and their number."""


class StubCore:
    """Satisfies as much of `vllm.v1.engine.core_client.AsyncMPClient` as `AsyncLLM` uses to generate."""

    engine_ranks_managed = (0,)

    def __init__(self, step_s: float) -> None:
        from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
        from vllm.v1.metrics.stats import SchedulerStats

        self._step_s = step_s
        self._output, self._outputs, self._length = EngineCoreOutput, EngineCoreOutputs, FinishReason.LENGTH
        self._stats = SchedulerStats
        self._running: dict[str, tuple[int, int]] = {}
        self._work = asyncio.Event()
        self.resources = SimpleNamespace(engine_dead=False)

    async def add_request_async(self, request: Any) -> None:
        self._running[request.request_id] = 0, request.sampling_params.max_tokens or 1
        self._work.set()

    async def abort_requests_async(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._running.pop(request_id, None)

    async def get_output_async(self) -> Any:
        """Make a step, as soon as there is something to do."""
        while True:
            await asyncio.sleep(self._step_s)
            if self._running:
                return self._step()
            self._work.clear()
            await self._work.wait()

    def _step(self) -> Any:
        outputs, (first, number) = [], _TOKENS
        for request_id, (done, wanted) in list(self._running.items()):
            reason = self._length if done + 1 >= wanted else None
            outputs.append(self._output(request_id, [first + done * 7 % number], finish_reason=reason))
            if reason is None:
                self._running[request_id] = done + 1, wanted
            else:
                del self._running[request_id]
        return self._outputs(outputs=outputs, scheduler_stats=self._stats(num_running_reqs=len(self._running)))

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        return ("generate",)

    async def reset_mm_cache_async(self) -> None:
        pass

    def shutdown(self, timeout: float | None = None) -> None:
        self._running.clear()


def install() -> None:
    """From now on, engines of this process are made around a stub."""
    from vllm.v1.engine.core_client import EngineCoreClient

    def stub(*args: Any, **kwargs: Any) -> StubCore:
        return StubCore(float(os.environ.get(STEP_S, "0")))

    EngineCoreClient.make_async_mp_client = staticmethod(stub)
