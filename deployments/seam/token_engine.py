"""vLLM's `AsyncLLM`, made to hand out token ids rather than text.

What differs from vLLM's own use: requests come in as finished `EngineCoreRequest`s (a Router has validated and rendered
them), and EngineCore's outputs go to a sink as they are. Text, stop strings and logprobs are made in the Router, by the
same vLLM code (`deployments.seam.engine_client`). Metrics stay vLLM's own.

Source: `vllm/v1/engine/async_llm.py` (`add_request`, `_run_output_handler`), `vllm/v1/engine/output_processor.py`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from vllm import PoolingParams
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import OutputProcessor, OutputProcessorOutput
from vllm.v1.metrics.loggers import StatLoggerBase

from deployments.messages import Totals
from deployments.seam import guard, logs
from deployments.seam.args import engine_args, import_parsers, lora_requests

logger = logging.getLogger("ray.serve.groundswell.engine")


class Sink(Protocol):
    """Where a request's outputs go. Called on the engine's event loop; must not block."""

    def put(self, output: Any) -> None:
        """Take vLLM's own notices: an exception when the engine died, or a final output when it was aborted."""

    def deliver(self, output: EngineCoreOutput, weight_version: str | None) -> None: ...


class _TokenOutputProcessor(OutputProcessor):
    """Keeps vLLM's request states and statistics; leaves detokenization to the Router."""

    def __init__(self, *, log_stats: bool, tracing: bool, on_step: Callable[[], None]) -> None:
        super().__init__(None, log_stats=log_stats, tracing_enabled=tracing)
        self._on_step = on_step

    def process_outputs(
        self,
        engine_core_outputs: list[EngineCoreOutput],
        engine_core_timestamp: float | None = None,
        iteration_stats: Any = None,
        weight_version: str | None = None,
    ) -> OutputProcessorOutput:
        for output in engine_core_outputs:
            state = self.request_states.get(output.request_id)
            if state is None:
                continue
            self._update_stats_from_output(state, output, engine_core_timestamp, iteration_stats)
            if state.is_prefilling:
                state.is_prefilling = False
                if output.prefill_stats is not None:
                    state.num_cached_tokens = output.prefill_stats.num_cached_tokens
            finish_reason = output.finish_reason
            if finish_reason is not None and self.tracing_enabled and iteration_stats is not None:
                self.do_tracing(output, state, iteration_stats)
            state.queue.deliver(output, weight_version)
            if finish_reason is not None:
                self._finish_request(state)
                self._update_stats_from_finished(state, finish_reason, iteration_stats)
        self._on_step()
        return OutputProcessorOutput([], [])


class EngineStats(StatLoggerBase):
    """What heartbeats say of EngineCore: its queues, when it last finished a step, and what it has done so far."""

    def __init__(self, vllm_config: Any = None, engine_index: int = 0) -> None:
        self.running = self.waiting = self.steps = 0
        self.kv_cache_usage = 0.0
        self._generated_tokens = self._prompt_tokens = self._first_tokens = 0
        self._first_token_s = 0.0
        self._prefix_queries = self._prefix_hits = 0
        self.last_step = time.monotonic()

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        self.last_step = time.monotonic()
        self.steps += 1
        if scheduler_stats is not None:
            self.running = scheduler_stats.num_running_reqs
            self.waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
            self.kv_cache_usage = scheduler_stats.kv_cache_usage
            self._prefix_queries += scheduler_stats.prefix_cache_stats.queries
            self._prefix_hits += scheduler_stats.prefix_cache_stats.hits
        if iteration_stats is not None:
            self._generated_tokens += iteration_stats.num_generation_tokens
            self._prompt_tokens += iteration_stats.num_prompt_tokens
            self._first_tokens += len(iteration_stats.time_to_first_tokens_iter)
            self._first_token_s += sum(iteration_stats.time_to_first_tokens_iter)

    @property
    def totals(self) -> Totals:
        return Totals(
            self._generated_tokens,
            self._prompt_tokens,
            self._first_tokens,
            self._first_token_s,
            self._prefix_queries,
            self._prefix_hits,
        )

    def log_engine_initialized(self) -> None:
        pass


class TokenEngine:
    """One running vLLM engine. Start with `await TokenEngine.start(…)`."""

    def __init__(self, llm: AsyncLLM, stats: EngineStats, on_step: Callable[[], None], owner: threading.Event) -> None:
        self._llm = llm
        self.stats = stats
        self._owner = owner
        llm.output_processor = self._outputs = _TokenOutputProcessor(
            log_stats=llm.log_stats,
            tracing=llm.vllm_config.observability_config.otlp_traces_endpoint is not None,
            on_step=on_step,
        )

    @classmethod
    async def start(
        cls, args: Namespace, *, num_gpus: float, on_step: Callable[[], None], ray_metrics: bool = True
    ) -> TokenEngine:
        """Load the model and start EngineCore.

        Args:
            args: From `parse_args`.
            num_gpus: The actor's share of GPUs.
            on_step: Called after each engine step, when all of its outputs have reached their sinks.
            ray_metrics: Send vLLM's metrics to Ray's endpoint.
        """
        stats = EngineStats()
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[AsyncLLM] = loop.create_future()
        owner = threading.Event()

        def own() -> None:
            # EngineCore asks the kernel to die with the *thread* that forked it, so this one lives as long as we do.
            try:
                llm = cls._build(args, num_gpus, stats, ray_metrics)
            except BaseException as error:
                logger.exception("The engine did not start")
                loop.call_soon_threadsafe(ready.set_exception, _picklable(error))
                return
            loop.call_soon_threadsafe(ready.set_result, llm)
            owner.wait()

        threading.Thread(target=own, name="engine-owner", daemon=True).start()
        engine = cls(await ready, stats, on_step, owner)
        for adapter in lora_requests(args):  # a path that is wrong fails here, not in somebody's request
            await engine._llm.add_lora(adapter)
        return engine

    @staticmethod
    def _build(args: Namespace, num_gpus: float, stats: EngineStats, ray_metrics: bool) -> AsyncLLM:
        loggers: list[Any] = [lambda vllm_config, engine_index: stats]
        if ray_metrics:
            from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger

            loggers.append(RayPrometheusStatLogger)
        os.environ[guard.REPLICA_PID] = str(os.getpid())
        import_parsers(args)
        parsed = engine_args(args, num_gpus=num_gpus)
        logs.leave_as_is(parsed)
        config = parsed.create_engine_config(UsageContext.OPENAI_API_SERVER)
        return AsyncLLM.from_vllm_config(
            config,
            usage_context=UsageContext.OPENAI_API_SERVER,
            enable_log_requests=parsed.enable_log_requests,
            disable_log_stats=parsed.disable_log_stats,
            stat_loggers=loggers,
        )

    async def add(self, request: EngineCoreRequest, sink: Sink) -> None:
        """Run a request; its outputs go to `sink`. Its `request_id` must be unused in this engine.

        Raises:
            VLLMClientError: The request is at fault.
            EngineDeadError: EngineCore is dead.
        """
        if self.idle:
            self.stats.last_step = time.monotonic()  # nothing was owed before now
        request.external_req_id = request.external_req_id or request.request_id
        self._llm._run_output_handler()
        await self._llm._add_request(request, None, None, 0, sink)

    async def pooling_request(self, request_id: str, prompt: Any, params: PoolingParams) -> EngineCoreRequest:
        """Return a request for a text, or for a prompt that has been rendered; what is too long is cut off.

        Raises:
            VLLMClientError: The prompt is at fault.
        """
        processor, tasks = self._llm.input_processor, await self.supported_tasks()
        if isinstance(prompt, dict):
            return processor.process_inputs(request_id, prompt, params, tasks)
        cut = {"truncate_prompt_tokens": -1}
        return await processor.process_inputs_async(request_id, prompt, params, tasks, tokenization_kwargs=cut)

    async def supported_tasks(self) -> tuple[str, ...]:
        return tuple(await self._llm.get_supported_tasks())

    @property
    def vllm_config(self) -> Any:
        return self._llm.vllm_config

    @property
    def renderer(self) -> Any:
        return self._llm.renderer

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Forget requests, and free their place in the batch."""
        known = [i for i in request_ids if self._outputs.has_request(i)]
        if known and not self._llm.errored:
            await self._llm.abort(known, internal=True)

    @property
    def idle(self) -> bool:
        return not self._outputs.has_unfinished_requests()

    @property
    def unfinished(self) -> int:
        return int(self._outputs.get_num_unfinished_requests())

    @property
    def seconds_since_step(self) -> float:
        return time.monotonic() - self.stats.last_step

    @property
    def errored(self) -> bool:
        """Whether EngineCore is dead."""
        return bool(self._llm.errored)

    async def describe(self) -> dict[str, Any]:
        """Return what only a running engine knows, as fields of `EngineDescription`."""
        config = self._llm.vllm_config
        return {
            "max_model_len": config.model_config.max_model_len,
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "supported_tasks": await self.supported_tasks(),
        }

    def shutdown(self) -> None:
        self._llm.shutdown(timeout=5)
        self._owner.set()


def _picklable(error: BaseException) -> RuntimeError:
    """Return the error as one that crosses Ray: several of vLLM's cannot be unpickled."""
    return RuntimeError(f"{type(error).__name__}: {error}")
