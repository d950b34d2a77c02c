"""The `EngineClient` that vLLM's serving classes talk to, with a fleet behind it.

The Router's half of what `AsyncLLM` does in one process: validate and fan out a request on the way in, detokenize, find
stop strings and collect logprobs on the way out, with vLLM's own `InputProcessor` and `OutputProcessor`. Between them,
where `AsyncLLM` has EngineCore, is the Fleet.

Source: `vllm/v1/engine/async_llm.py` (`add_request`, `generate`, `encode`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import ExitStack
from copy import copy
from http import HTTPStatus
from typing import Any, Literal, NoReturn, Protocol

import msgspec
from vllm.config import VllmConfig
from vllm.engine.protocol import EngineClient
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.outputs import PoolingRequestOutput, RequestOutput
from vllm.pooling_params import PoolingParams
from vllm.renderers import renderer_from_config
from vllm.renderers.inputs.preprocess import extract_prompt_components
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.tasks import SupportedTask
from vllm.utils import length_from_prompt_token_ids_or_embeds
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest

from deployments import request_scope
from deployments.access.fair_share import Turn
from deployments.errors import EngineFailure, EngineUnavailable, NotSupportedByFleet, PublicError
from deployments.seam import continuation
from deployments.seam.args import lora_int_id
from deployments.seam.stamps import Stamps
from deployments.seam.wire import Codec

_ADMITTED = "admitted"


class PublicHTTPError(GracefulHTTPError):
    """One of our public errors, in the shape that vLLM's serving classes let through with its own status."""

    def __init__(self, error: PublicError) -> None:
        super().__init__(error.message, HTTPStatus(error.status))
        self.error = error


class Flight(Protocol):
    """A request on its way. `close` frees what it holds; safe to call twice."""

    @property
    def replica(self) -> str | None:
        """The engine that has it, as far as is known."""

    def close(self) -> None: ...


class Reservation(Protocol):
    """Places in a fleet, held for one HTTP request."""

    def release(self) -> None: ...


class FleetLike(Protocol):
    """What this client needs of `deployments.fleet.client.Fleet`."""

    def admit(self, n: int) -> Reservation: ...

    def start(self, submission: RequestSubmission, reservation: Any) -> Flight: ...


class RequestSubmission:
    """One request as the Fleet sees it: frames to send, outputs to deliver, an error to end with.

    vLLM's `OutputProcessor` holds the state of its answer, which an engine's failure leaves as it is: what another
    engine adds is delivered into it.

    Args:
        request: As vLLM processed it; becomes `n` sequences.
        prompt: Its text, where there is one.
        queue: Where vLLM's generator waits.
        tied: What keeps any request from going on at another engine (`continuation.why_no_request`).
        turn: Its place among other keys' requests, where there is one.
    """

    def __init__(
        self,
        request: EngineCoreRequest,
        prompt: str | None,
        queue: RequestOutputCollector,
        outputs: OutputProcessor,
        codec: Codec,
        *,
        max_model_len: int,
        tied: str | None = None,
        turn: Turn | None = None,
    ) -> None:
        self.request_id = request.external_req_id or request.request_id
        self.order = (0, 0.0) if turn is None else turn.order
        self._caller, self._turn, self._charged = request_scope.caller(), turn, False
        self._request, self._prompt, self._queue = request, prompt, queue
        self._outputs, self._codec = outputs, codec
        self._max_model_len, self._tied = max_model_len, tied
        self._requests: list[EngineCoreRequest] = []
        self._open: set[str] = set()
        self._begin()
        self.sequences = len(self._requests)

    def _begin(self) -> None:
        """Set up an answer from its beginning."""
        parent, self._requests = _fan_out(self._request)
        for index, child in enumerate(self._requests):
            self._outputs.add_request(child, self._prompt, parent, index, self._queue)
        self._open = {child.request_id for child in self._requests}
        self._tokens: list[int] = []
        self._shown = self._torn = False

    @property
    def prompt_tokens(self) -> int:
        """What an engine would have to prefill now."""
        request = self._requests[0]
        length = length_from_prompt_token_ids_or_embeds(request.prompt_token_ids, request.prompt_embeds)
        return length + len(self._tokens)

    @property
    def progress(self) -> int:
        """Tokens delivered that a further attempt would keep."""
        return len(self._tokens)

    def encode(self) -> list[bytes]:
        if self._tokens:
            return self._codec.encode_requests([continuation.rest_of(self._requests[0], self._tokens)])
        return self._codec.encode_requests(self._requests)

    def deliver(self, output: EngineCoreOutput, weight_version: str | None) -> list[int]:
        """Make text of one output; return sequences that ended here and still run there. Raises `EngineFailure`."""
        if output.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
            raise EngineFailure(f"it ended the request with {output.finish_reason!s}, which nobody asked for")
        index = int(output.request_id)
        output.request_id = self._requests[index].request_id
        self._torn = True
        self.charge(len(output.new_token_ids))
        processed = self._outputs.process_outputs([output], weight_version=weight_version)
        self._torn = False
        self._tokens += output.new_token_ids
        # Until the end, a request that is not streamed puts nothing into its queue.
        self._shown = self._shown or self._request.params.output_kind != RequestOutputKind.FINAL_ONLY
        if not self._outputs.has_request(output.request_id):
            self._open.discard(output.request_id)
        return [index] if processed.reqs_to_abort else []

    def charge(self, tokens: int) -> None:
        """Count tokens as they come, so whoever hangs up pays for what was done until then; the prompt is paid once."""
        if self._caller is not None:
            self._caller.tokens += tokens + (0 if self._charged else self.prompt_tokens)
            self._charged = True
        if self._turn is not None:
            self._turn.serve(tokens)

    @property
    def finished(self) -> bool:
        return not self._open

    def recover(self) -> Literal["restarted", "continued", "finished"]:
        """Get ready for another attempt, and return how it begins.

        Raises:
            EngineUnavailable: What has reached the client can be neither taken back nor continued.
        """
        request, begun = self._requests[0], bool(self._tokens) or self._torn
        if not begun:
            return "restarted"
        tie = self._tied or continuation.why_not(self._requests) or ("an output that is torn" if self._torn else None)
        if not self._shown and (tie or continuation.reproducible(request)):
            self._forget()
            self._begin()
            return "restarted"
        if tie:
            raise EngineUnavailable(
                f"The engine that ran this request failed, and an answer with {tie} cannot go on at another. "
                "Send the request again.",
                retry_after_s=1,
            )
        end = continuation.end_of(request, self._tokens, self._max_model_len)
        if end is None:
            return "continued"
        self.deliver(end, None)
        return "finished"

    def fail(self, error: PublicError) -> None:
        try:
            self.abort()
        finally:  # whatever state the request is in, its client must hear
            self._queue.put(PublicHTTPError(error))

    def abort(self) -> None:
        """Forget the request's state in the Router."""
        if self._open:
            self._outputs.abort_requests(self._open.copy(), internal=True)
            self._outputs.parent_requests.pop(self._request.request_id, None)  # vLLM drops it with the last to end
            self._open.clear()

    def _forget(self) -> None:
        """As `abort`, and unheard: vLLM would put a last word into the queue."""
        if self._caller is not None:
            self._caller.tokens -= len(self._tokens)  # nobody has them
        for request_id in self._open:
            self._outputs.request_states[request_id].queue = None
        self.abort()


class FleetClient(EngineClient):
    """vLLM's `EngineClient` over a fleet. Lives in a Router; needs no device.

    Args:
        fleet: The engines.
        vllm_config: From `frontend_config`.
        supported_tasks: What they can do.
        stamps: What is written on requests.
        speculates: Whether they draft tokens, and so cannot honour every parameter.
    """

    def __init__(
        self,
        fleet: FleetLike,
        vllm_config: VllmConfig,
        supported_tasks: tuple[SupportedTask, ...],
        stamps: Stamps | None = None,
        *,
        speculates: bool = False,
    ) -> None:
        self.vllm_config = vllm_config
        self.model_config = vllm_config.model_config
        self.renderer = renderer_from_config(vllm_config)
        self.input_processor = InputProcessor(vllm_config, self.renderer)
        self.input_processor.speculative_config = speculates or None  # all it asks is whether there is one
        self.supported_tasks = supported_tasks
        self._fleet, self._stamps = fleet, stamps or Stamps()
        self._codec = Codec()
        self._tied = continuation.why_no_request(vllm_config)
        self._outputs = OutputProcessor(
            self.renderer.tokenizer,
            log_stats=False,
            stream_interval=vllm_config.scheduler_config.stream_interval,
        )

    # The request path.

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """Let an HTTP request in, or refuse it: called before anything is rendered, once is enough."""
        scope = request_scope.current()
        if scope is None or _ADMITTED not in scope.kept:
            self._admit(scope, n)

    def let_in(self, n: int) -> None:
        """As `check_admission`, for what stands above vLLM's app. Raises `PublicError`."""
        try:
            self.check_admission(n)
        except PublicHTTPError as error:
            raise error.error from None

    def _admit(self, scope: request_scope.RequestScope | None, n: int) -> Reservation:
        if scope is not None and scope.over:  # while a handler was at something before this
            raise asyncio.CancelledError
        try:
            reservation = self._fleet.admit(n)
        except PublicError as error:
            raise PublicHTTPError(error) from None
        if scope is None:
            reservation.release()
        else:
            scope.kept[_ADMITTED] = reservation
            scope.at_end(reservation.release)
        return reservation

    def _reservation(self, n: int) -> Reservation:
        """Return what the HTTP request was let in with; pooling requests are not asked in before they get here."""
        scope = request_scope.current()
        if scope is not None and not scope.over and _ADMITTED in scope.kept:
            reservation: Reservation = scope.kept[_ADMITTED]
            return reservation
        return self._admit(scope, n)

    async def generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams,
        request_id: str,
        *,
        prompt_text: str | None = None,
        reasoning_ended: bool | None = None,
        reasoning_parser_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        if isinstance(prompt, AsyncGenerator):
            raise PublicHTTPError(NotSupportedByFleet("Streaming input is not supported: it would live in one engine."))
        if self.vllm_config.cache_config.kv_sharing_fast_prefill and sampling_params.prompt_logprobs:
            raise VLLMValidationError(
                "This model's engines run with --kv-sharing-fast-prefill, with which prompt logprobs are incorrect.",
                parameter="prompt_logprobs",
            )
        request = await self._process(request_id, prompt, sampling_params, **options)
        request.reasoning_ended = reasoning_ended
        request.reasoning_parser_kwargs = reasoning_parser_kwargs
        async for output in self._run(request, prompt, prompt_text):
            assert isinstance(output, RequestOutput)
            yield output

    async def encode(
        self,
        prompt: Any,
        pooling_params: PoolingParams,
        request_id: str,
        lora_request: LoRARequest | None = None,
        trace_headers: Mapping[str, str] | None = None,
        priority: int = 0,
        tokenization_kwargs: dict[str, Any] | None = None,
        reasoning_ended: bool | None = None,
    ) -> AsyncGenerator[PoolingRequestOutput, None]:
        request = await self._process(
            request_id,
            prompt,
            pooling_params,
            lora_request=lora_request,
            trace_headers=trace_headers,
            priority=priority,
            tokenization_kwargs=tokenization_kwargs,
        )
        request.reasoning_ended = reasoning_ended
        async for output in self._run(request, prompt, None):
            assert isinstance(output, PoolingRequestOutput)
            yield output

    async def _process(self, request_id: str, prompt: Any, params: Any, **options: Any) -> EngineCoreRequest:
        if lora := options.get("lora_request"):
            options["lora_request"] = msgspec.structs.replace(lora, lora_int_id=lora_int_id(lora.lora_name))
        rendered = isinstance(prompt, dict) and "type" in prompt
        process: Any = self.input_processor.process_inputs
        if not rendered:
            process = self.input_processor.process_inputs_async
        request = process(request_id, prompt, params, supported_tasks=self.supported_tasks, **options)
        if not rendered:
            request = await request
        self.input_processor.assign_request_id(request)
        assert isinstance(request, EngineCoreRequest)
        return request

    async def _run(
        self, request: EngineCoreRequest, prompt: Any, prompt_text: str | None
    ) -> AsyncGenerator[RequestOutput | PoolingRequestOutput, None]:
        scope, waiting = request_scope.current(), asyncio.current_task()
        reservation = self._reservation(getattr(request.params, "n", 1))
        turn = self._stamps.put(request)
        # Left by a finished answer, a client that hung up, and a generator that was dropped alike.
        with ExitStack() as held:
            if turn is not None:
                held.callback(turn.leave)
            queue = RequestOutputCollector(request.params.output_kind, request.request_id)
            submission = RequestSubmission(
                request,
                prompt_text or extract_prompt_components(self.model_config, prompt)[0],
                queue,
                self._outputs,
                self._codec,
                max_model_len=self.model_config.max_model_len,
                tied=self._tied,
                turn=turn,
            )
            held.callback(submission.abort)
            flight = self._fleet.start(submission, reservation)
            held.callback(_leave, flight, submission)
            timer = _at_deadline(flight, submission)
            if timer is not None:
                held.callback(timer.cancel)
            if scope is not None:

                def end() -> None:
                    # Who waits for this generation ends with its HTTP request. vLLM runs the handlers of plain requests
                    # in tasks of their own, which hear of `http.disconnect` and not of a cancelled request: and that is
                    # all that deadlines make of it, and Serve where it receives for us.
                    held.close()
                    if waiting is not None and waiting is not asyncio.current_task():
                        waiting.cancel()

                scope.at_end(end)
                held.callback(scope.not_at_end, end)
            finished = False
            while not finished:
                output = queue.get_nowait() or await queue.get()
                finished = output.finished
                yield output

    async def abort(self, request_id: str | Iterable[str]) -> None:
        ids = [request_id] if isinstance(request_id, str) else list(request_id)
        self._outputs.abort_requests(ids, internal=False)

    # What one engine could answer, and a fleet answers for all of its engines.

    @property
    def is_running(self) -> bool:
        return True

    @property
    def is_stopped(self) -> bool:
        return False

    @property
    def errored(self) -> bool:
        return False

    @property
    def dead_error(self) -> BaseException:
        return PublicHTTPError(EngineUnavailable("No engine is running for this model."))

    async def get_supported_tasks(self) -> tuple[SupportedTask, ...]:
        return self.supported_tasks

    async def is_tracing_enabled(self) -> bool:
        return self.vllm_config.observability_config.otlp_traces_endpoint is not None

    async def do_log_stats(self) -> None:
        """Engines log their own."""

    async def check_health(self) -> None:
        """A Router is healthy without engines: requests wait for them."""

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        """Accept an adapter: each engine has loaded it as it started."""
        return True

    def shutdown(self, timeout: float | None = None) -> None:
        self.renderer.shutdown()

    # State that would live in one engine: refused by name. The routes that lead here are not mounted either.

    async def notify_kv_transfer_request_rejected(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise _refused("KV transfer")

    async def start_profile(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise _refused("Profiling")

    async def stop_profile(self) -> NoReturn:
        raise _refused("Profiling")

    async def reset_mm_cache(self) -> NoReturn:
        raise _refused("Resetting the multi-modal cache")

    async def reset_encoder_cache(self) -> NoReturn:
        raise _refused("Resetting the encoder cache")

    async def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise _refused("Resetting the prefix cache")

    async def sleep(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise _refused("Sleep mode")

    async def wake_up(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise _refused("Sleep mode")

    async def is_sleeping(self) -> bool:
        return False

    async def release_kv_cache_memory(self) -> NoReturn:
        raise _refused("Sleep mode")

    async def pause_generation(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise _refused("Pausing generation")

    async def resume_generation(self) -> NoReturn:
        raise _refused("Pausing generation")

    async def is_paused(self) -> bool:
        return False


def _leave(flight: Flight, submission: RequestSubmission) -> None:
    """Close a flight. Whoever does not wait for its end pays for a prompt that an engine has."""
    if flight.replica is not None and not submission.finished:
        submission.charge(0)
    flight.close()


def _at_deadline(flight: Flight, submission: RequestSubmission) -> asyncio.TimerHandle | None:
    """Have the request fail when its HTTP request's deadline comes, if it has one."""
    scope = request_scope.current()
    if scope is None or scope.deadline is None:
        return None
    when, error = scope.deadline

    def give_up() -> None:
        _leave(flight, submission)
        submission.fail(error)

    return asyncio.get_running_loop().call_at(when, give_up)


def _refused(feature: str) -> PublicHTTPError:
    return PublicHTTPError(NotSupportedByFleet(f"{feature} is not supported over a fleet of engines."))


def _fan_out(request: EngineCoreRequest) -> tuple[ParentRequest | None, list[EngineCoreRequest]]:
    """Return the sequences of a request, as `AsyncLLM.add_request` would make them."""
    if not isinstance(request.params, SamplingParams) or request.params.n == 1:
        return None, [request]
    parent = ParentRequest(request)
    children = []
    for index in range(request.params.n):
        child = copy(request)
        child.request_id, child.sampling_params = parent.get_child_info(index)
        children.append(child)
    return parent, children
