"""The Engine: one vLLM engine in one Serve replica. The only file that starts an engine.

A request comes in as a streaming Serve call of one message, `End`, open for the whole generation: so Serve itself
queues, counts ongoing requests for autoscaling, drains and cancels. Tokens leave by the token channel.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import TYPE_CHECKING, Any

from deployments import grpc_wakeups
from deployments import messages as m
from deployments.config import FleetConfig, ModelConfig
from deployments.fleet.autoscaling import Waits
from deployments.fleet.channel import ChannelError, EngineEnd, Link, Metrics
from deployments.metrics import RayMetrics
from deployments.outcomes import Refusal, outcome_of
from deployments.outline import options

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest

    from deployments.seam.token_engine import TokenEngine

logger = logging.getLogger("ray.serve.groundswell.engine")

grpc_wakeups.install()


class EngineUnhealthy(Exception):
    """EngineCore is dead or hung; Serve replaces the replica."""


class _Run:
    """One execution: numbers its deltas and hands them to its Router's link. Satisfies `seam.token_engine.Sink`."""

    def __init__(self, stream: int, link: Link, touch: Callable[[Link], None], waits: Waits) -> None:
        from deployments.seam.wire import Delta

        self._delta = Delta
        self._waits = waits
        self.stream, self.execution = stream, secrets.randbits(62)
        self.done: asyncio.Future[m.End] = asyncio.get_running_loop().create_future()
        self._link, self._touch = link, touch
        self._indexes: dict[str, int] = {}
        self._open: set[int] = set()
        self._sequence = -1

    def adopt(self, requests: list[EngineCoreRequest]) -> list[str]:
        """Give the sequences ids that no other run in this engine has; return those."""
        for index, request in enumerate(requests):
            request.request_id = f"{request.request_id}.{self.execution:x}"
            self._indexes[request.request_id] = index
            self._waits.begin(request.request_id, len(request.prompt_token_ids or ()), request.arrival_time)
        self._open = set(self._indexes.values())
        return list(self._indexes)

    def ids(self, index: int) -> list[str]:
        """Return the ids of sequence `index`, or of all for -1."""
        return [i for i, n in self._indexes.items() if index in (-1, n)]

    def deliver(self, output: EngineCoreOutput, weight_version: str | None) -> None:
        index = self._indexes[output.request_id]
        self._waits.first_token(output.request_id, time.time())
        output.request_id = str(index)
        output.events = output.trace_headers = None  # engine-side statistics have used them
        self._sequence += 1
        self._link.pending.append((weight_version, self._delta(self.stream, self.execution, self._sequence, output)))
        self._touch(self._link)
        if output.finish_reason is not None:
            self.close(index, m.FINISHED)

    def put(self, output: Any) -> None:
        if isinstance(output, Exception):
            self.end(m.FAILED, "the engine died")

    def close(self, index: int, outcome: str) -> None:
        """One sequence (-1: all) wants no more steps; the run ends with the last of them."""
        self._open -= {index} if index >= 0 else self._open.copy()
        if not self._open:
            self.end(outcome)

    def end(self, outcome: str, message: str = "", param: str | None = None) -> None:
        if not self.done.done():
            self.done.set_result(m.End(self._sequence, outcome, message, param))


class Stall:
    """Whether EngineCore has owed a step for too long. Pure.

    Once it has, that holds until it makes one: its requests are moved away at once, and a hung engine without work
    would pass for an idle one, and get new requests.

    Args:
        limit_s: How long is too long.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._at: tuple[int, float] | None = None

    def seconds(self, *, steps: int, unfinished: int, since_step_s: float, now: float) -> float | None:
        """Return for how long it has stalled, if it has.

        Args:
            steps: Steps it has made so far.
            unfinished: Requests that want one.
            since_step_s: How long ago the last one was, or the first of those requests came.
            now: Monotonic seconds.
        """
        if self._at is not None and self._at[0] != steps:
            self._at = None
        if self._at is None and unfinished and since_step_s > self._limit_s:
            self._at = steps, now - since_step_s
        return None if self._at is None else now - self._at[1]


def cpu_environment(cores: int) -> dict[str, str]:
    """Return what an engine on CPUs needs of its environment; a model's own `env` wins.

    Ray sets `OMP_NUM_THREADS` from `num_cpus`, so an engine with half a CPU would prefill on one thread. vLLM pins its
    threads one engine at a time, so two engines would share some cores and leave others idle; and it wants 92% of a
    NUMA node's memory, or refuses to start, unless told how many GiB the KV cache may have. Threads that spin at a
    barrier keep the very thread they wait for from running, where Routers and engines share the cores.
    """
    return {
        "OMP_NUM_THREADS": str(cores),
        "OMP_WAIT_POLICY": "PASSIVE",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
    }


def gpus_of(assigned: Mapping[str, float]) -> float:
    """Return the GPUs that Ray assigned to an actor, which have another name in a placement group."""
    return float(max((n for name, n in assigned.items() if name == "GPU" or name.startswith("GPU_group_")), default=0))


def has_workers_elsewhere(model: ModelConfig) -> bool:
    """Whether its GPUs are held by Ray actors of vLLM's, and not by the replica's own."""
    return options(model).get("distributed_executor_backend") == "ray"


class Engine:
    """Made a deployment in `app.py`.

    Args:
        model: The model to serve.
        fleet: Bounds and timeouts.
    """

    async def __init__(self, model: ModelConfig, fleet: FleetConfig) -> None:  # type: ignore[misc]
        import ray

        num_gpus = gpus_of(ray.get_runtime_context().get_assigned_resources())
        on_gpus = num_gpus > 0 or has_workers_elsewhere(model)
        os.environ.update(model.env if on_gpus else {**cpu_environment(len(os.sched_getaffinity(0))), **model.env})
        from ray import serve

        from deployments.seam import logs

        logs.join_serves()
        from deployments.seam.args import parse_args
        from deployments.seam.pooling import Pooling
        from deployments.seam.token_engine import TokenEngine

        logger.info("Loading model %s (%s)", model.name, model.engine_args["model"])
        args = parse_args(model.name, model.engine_args, model.frontend_args)
        llm = await TokenEngine.start(args, num_gpus=num_gpus, on_step=self._flush)
        self._open(model, fleet, serve.get_replica_context().replica_id.unique_id, llm, RayMetrics())
        self._pooling = Pooling(llm, args)
        logger.info("Model %s is ready", model.name)

    def _open(self, model: ModelConfig, fleet: FleetConfig, replica: str, llm: TokenEngine, metrics: Metrics) -> None:
        """Take requests for a running engine."""
        from deployments.seam.wire import Codec

        self._model, self._config, self._replica, self._metrics = model, fleet, replica, metrics
        self._codec = Codec()
        self._stall = Stall(fleet.engine_stall_timeout_s)
        self._runs: dict[int, _Run] = {}
        self._waits = Waits()
        if model.scaling is not None:  # by this name Serve finds it; it pushes nothing where there is none
            self.record_autoscaling_stats = self._autoscaling_stats
        self._touched: set[Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._llm = llm
        self._channel = EngineEnd(fleet, replica, beat=self._beat, on_abort=self._on_abort, metrics=metrics)
        self._watch = asyncio.get_running_loop().create_task(self._exit_with_engine_core())

    async def generate(
        self, frames: list[bytes], channel: m.ChannelAddress, stream: int, ticket: None = None
    ) -> AsyncIterator[m.End]:
        """Run one request, generation or pooling alike.

        Args:
            frames: The request's sequences, as `seam.wire.Codec` made them.
            channel: Where the deltas go.
            stream: The Router's name for this attempt.
            ticket: The Fleet's ranking, used up on the way here.
        """
        from vllm.exceptions import VLLMClientError

        try:
            link = await self._channel.link(channel)
        except ChannelError as error:
            yield m.End(-1, m.FAILED, str(error))
            return
        run = _Run(stream, link, lambda link: self._touched.add(link), self._waits)
        self._runs[run.execution] = run
        link.runs[run.execution] = lambda reason: run.end(m.ABORTED, reason)
        ids: list[str] = []
        outcome = "cancelled"
        try:
            requests = self._codec.decode_requests(frames)
            ids = run.adopt(requests)
            for request in requests:
                await self._llm.add(request, run)
            end = await run.done
            outcome = end.outcome
            yield end
        except VLLMClientError as error:
            outcome = m.REFUSED
            yield m.End(-1, m.REFUSED, str(error), getattr(error, "parameter", None))
        except Exception:
            outcome = m.FAILED
            logger.exception("Request %s failed in the engine", ids[0] if ids else "?")
            yield m.End(-1, m.FAILED, "the engine had an internal error")
        finally:
            self._runs.pop(run.execution, None)
            link.runs.pop(run.execution, None)
            for sequence in ids:
                self._waits.forget(sequence)
            self._metrics.inc("engine_executions", model=self._model.name, outcome=outcome)
            if outcome != m.FINISHED:
                await asyncio.shield(self._llm.abort(ids))

    async def embed(self, texts: list[str]) -> npt.NDArray[np.float32] | Refusal:
        """Return one vector a row, or why not. A plain call, for other deployments of the app."""
        return await outcome_of(self._pooling.embed(texts))

    async def score(self, query: str, texts: list[str]) -> list[float] | Refusal:
        """Return how well each text answers the query (0 to 1), or why not. Likewise."""
        return await outcome_of(self._pooling.score(query, texts))

    def _flush(self) -> None:
        """Send what this engine step produced: one message to each Router that has a stream in it."""
        touched, self._touched = self._touched, set()
        for link in touched:
            pending, link.pending = link.pending, []
            if pending:
                link.send(m.DELTAS, self._codec.encode_deltas(pending[0][0], [delta for _, delta in pending]))

    def _on_abort(self, abort: m.Abort) -> None:
        for run in [run for run in self._runs.values() if run.stream == abort.stream]:
            task = asyncio.get_running_loop().create_task(self._abort(run, abort.index))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _abort(self, run: _Run, index: int) -> None:
        await self._llm.abort(run.ids(index))
        run.close(index, m.ABORTED)

    def _beat(self) -> m.Heartbeat:
        stats, stalled_s = self._llm.stats, self._stalled_s()
        return m.Heartbeat(
            m.VERSION,
            self._replica,
            self._model.name,
            stats.running,
            stats.waiting,
            stats.kv_cache_usage,
            self._llm.seconds_since_step if stalled_s is None else stalled_s,
            self._llm.unfinished if stalled_s is None else max(1, self._llm.unfinished),
            stats.totals,
        )

    def _stalled_s(self) -> float | None:
        llm = self._llm
        return self._stall.seconds(
            steps=llm.stats.steps,
            unfinished=llm.unfinished,
            since_step_s=llm.seconds_since_step,
            now=time.monotonic(),
        )

    async def _autoscaling_stats(self) -> dict[str, float]:
        """For `fleet.autoscaling.AutoscalingPolicy`, by way of Serve's controller.

        A coroutine, as `check_health` is: Serve runs plain methods in another thread, beside the loop that changes what
        they read.
        """
        return self._waits.stats(time.time())

    async def join(self, channel: m.ChannelAddress) -> m.EngineDescription:
        """Connect to a Router's channel ahead of its first request; return what only a running engine knows."""
        await self._channel.link(channel)
        return m.EngineDescription(replica=self._replica, **await self._llm.describe())

    async def check_health(self) -> None:
        """Called by Serve. A busy engine is healthy: only death, or work without a step for too long, is not.

        Raises:
            EngineUnhealthy: Serve replaces this replica.
        """
        if self._llm.errored:
            raise EngineUnhealthy("EngineCore is dead")
        stalled_s = self._stalled_s()
        if stalled_s is not None:
            raise EngineUnhealthy(f"EngineCore owes a step and made none for {stalled_s:.0f} s")

    async def _exit_with_engine_core(self) -> None:
        """Leave as soon as EngineCore is dead: health checks would take seconds to notice, and requests with them."""
        while not self._llm.errored:  # noqa: ASYNC110  (vLLM keeps it as a flag)
            await asyncio.sleep(0.2)
        logger.error("EngineCore of model %s is dead; this replica exits", self._model.name)
        for run in list(self._runs.values()):
            run.end(m.FAILED, "the engine died")
        await asyncio.sleep(0.5)  # lets the last `End` leave
        os._exit(1)

    def __del__(self) -> None:
        """Called by Serve after the replica has drained."""
        if hasattr(self, "_watch"):
            self._watch.cancel()
            self._channel.close()
            self._llm.shutdown()
