"""An answer cut at every place: what the client gets is what it would have got, by vLLM's own output processor."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
import pytest
import pytest_asyncio

pytest.importorskip("vllm")

import torch
from vllm import PoolingParams, SamplingParams
from vllm.outputs import RequestOutput
from vllm.sampling_params import RepetitionDetectionParams, RequestOutputKind, StructuredOutputsParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.metrics.stats import PrefillStats
from vllm.v1.outputs import LogprobsLists, LogprobsTensors

from deployments import request_scope
from deployments.errors import BadRequest, EngineFailure, EngineUnavailable, RequestTimeout
from deployments.seam import continuation
from deployments.seam.args import frontend_config, parse_args
from deployments.seam.engine_client import FleetClient, PublicHTTPError, RequestSubmission
from models import tiny_random
from tests.unit.recording import LIMIT_S, Leaps, until
from tests.unit.scripted_fleet import StubReservation

pytestmark = pytest.mark.asyncio
PROMPT = "Name the source of every statement."
UNENDING = 10_000
MAX_MODEL_LEN = 2048


class StubEngine:
    """A stub engine that says one answer, from wherever its prompt says the answer has got to."""

    def __init__(self, answer: Sequence[int], prompt: Sequence[int], step: int) -> None:
        self.answer, self.prompt, self.step = answer, list(prompt), step
        self.asked: list[EngineCoreRequest] = []

    def run(self, submission: RequestSubmission, *, until: int = UNENDING) -> None:
        """Run a request until it is finished, or `until` tokens of the answer are out and the engine dies."""
        (request,) = submission._codec.decode_requests(submission.encode())
        self.asked.append(request)
        params, prompt = request.sampling_params, request.prompt_token_ids
        assert params is not None and params.max_tokens is not None and prompt is not None
        position = len(prompt) - len(self.prompt)
        assert prompt == [*self.prompt, *self.answer[:position]], "tokens are missing or doubled"
        last = min(position + params.max_tokens, len(self.answer))
        first = True
        while position < min(last, until) and not submission.finished:
            said = list(self.answer[position : min(position + self.step, last, until)])
            position += len(said)
            submission.deliver(self._output(said, params, position == last, first), None)
            first = False

    def _output(self, said: list[int], params: SamplingParams, last: bool, first: bool) -> EngineCoreOutput:
        reason = None
        if last:
            ended = said[-1] == params.eos_token_id
            reason = FinishReason.STOP if ended else FinishReason.LENGTH
        output = EngineCoreOutput("0", said, finish_reason=reason)
        if params.logprobs is not None:
            ids = np.array(said)[:, None]
            output.new_logprobs = LogprobsLists(ids, -ids.astype(np.float32) / 100, np.ones(len(said), dtype=np.int32))
        if first:
            output.prefill_stats = PrefillStats(num_cached_tokens=len(self.asked))
            if params.prompt_logprobs is not None:
                rows = torch.tensor(self.prompt[1:])[:, None]
                output.new_prompt_logprobs_tensors = LogprobsTensors(
                    rows, -rows / 100, torch.ones(len(rows), dtype=torch.int32)
                )
        return output


class StubFlight:
    closed = False
    replica: str | None = None

    def close(self) -> None:
        self.closed = True


class Stage:
    """A `FleetClient` whose requests the test takes in hand."""

    def __init__(self, client: FleetClient) -> None:
        self.client = client
        self.tokenizer: Any = client.renderer.tokenizer
        self._taken: asyncio.Queue[RequestSubmission] = asyncio.Queue()
        client._fleet = self

    def admit(self, n: int) -> StubReservation:
        return StubReservation()

    def start(self, submission: RequestSubmission, reservation: Any) -> StubFlight:
        self._taken.put_nowait(submission)
        self.flight = StubFlight()
        return self.flight

    def tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    async def ask(
        self, params: SamplingParams, outputs: list[RequestOutput]
    ) -> tuple[RequestSubmission, asyncio.Task[None]]:
        """Send a request; return it, and the task that collects what its client gets into `outputs`."""

        async def collect() -> None:
            prompt = {"type": "token", "prompt_token_ids": self.tokens(PROMPT)}
            async for output in self.client.generate(prompt, params, "r"):
                outputs.append(output)

        collecting = asyncio.create_task(collect())
        return await self._taken.get(), collecting

    async def answered(
        self, answer: Sequence[int], params: dict[str, Any], cuts: Sequence[int] = (), *, step: int = 1
    ) -> dict[str, Any]:
        """Return what a client gets of an answer whose engine dies after each of `cuts` tokens."""
        outputs: list[RequestOutput] = []
        submission, collecting = await self.ask(sampling(**params), outputs)
        engine = StubEngine(answer, self.tokens(PROMPT), step)
        for cut in cuts:
            engine.run(submission, until=cut)
            await asyncio.sleep(0)  # the client reads
            if submission.finished or submission.recover() == "finished":
                break
        else:
            engine.run(submission)
        await asyncio.wait_for(collecting, LIMIT_S)
        return summary(outputs)


def sampling(**params: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 200, "output_kind": RequestOutputKind.DELTA} | params)


def summary(outputs: list[RequestOutput]) -> dict[str, Any]:
    """Return what of an answer must not depend on where it was cut: everything but the sizes of its pieces."""
    pieces, last = [output.outputs[0] for output in outputs], outputs[-1]
    logprobs = [position for piece in pieces for position in piece.logprobs or []]
    return {
        "text": "".join(piece.text for piece in pieces),
        "tokens": [token for piece in pieces for token in piece.token_ids],
        "logprobs": [{i: (p.logprob, p.decoded_token) for i, p in position.items()} for position in logprobs],
        "cumulative": None if pieces[-1].cumulative_logprob is None else round(pieces[-1].cumulative_logprob, 4),
        "ended": (pieces[-1].finish_reason, pieces[-1].stop_reason, last.finished),
        "prompt": last.prompt_token_ids,
        "prompt_logprobs": [len(o.prompt_logprobs) for o in outputs if o.prompt_logprobs],
        "cached": last.num_cached_tokens,
        "id": {output.request_id for output in outputs},
    }


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> FleetClient:
    model = tiny_random.write(tmp_path_factory.mktemp("continuation") / "model")
    with mock.patch.dict(os.environ, VLLM_TARGET_DEVICE="cpu"):  # as in a Router
        args = parse_args("tiny", {"model": str(model), "dtype": "float32", "max_model_len": MAX_MODEL_LEN}, {})
        return FleetClient(mock.Mock(), frontend_config(args), ("generate",))


@pytest_asyncio.fixture
async def stage(client: FleetClient) -> AsyncIterator[Stage]:
    yield Stage(client)
    assert client._outputs.request_states == {}
    assert client._outputs.external_req_ids == {}
    assert client._outputs.parent_requests == {}


CASES: list[tuple[str, dict[str, Any]]] = [
    ("A broad deep wave of the open sea.", {}),
    ("Übergröße, naïve 東京 🌊🌊 and an end", {}),
    ("It lifts every boat in the harbour at once, and more.", {"stop": ["harbour at"]}),
    ("It lifts every boat in the harbour.", {"stop": ["harbour"], "include_stop_str_in_output": True}),
    ("Steam takes up far more room than water.", {"logprobs": 0, "prompt_logprobs": 0}),
    ("東京 and a stop 🌊 here", {"stop": ["🌊 h"], "logprobs": 0}),
    ("The train leaves at seven in the morning.", {"max_tokens": 7, "min_tokens": 5}),
    ("A return ticket is cheaper, a return ticket.", {"stop": ["return"], "min_tokens": 6}),
    ("One two three.", {"detokenize": False}),
    ("Red, orange, yellow.", {"repetition_penalty": 1.3, "logit_bias": {5: 1.0}, "seed": 3, "temperature": 1.0}),
]


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize(("text", "params"), CASES, ids=[text[:12] for text, _ in CASES])
async def test_wherever_a_stream_is_cut_its_client_gets_the_undisturbed_answer(
    stage: Stage, text: str, params: dict[str, Any], step: int
) -> None:
    answer = [*stage.tokens(text), stage.tokenizer.eos_token_id]
    whole = await stage.answered(answer, params, step=step)
    assert whole["text"] or not params.get("detokenize", True)
    for cut in range(1, len(answer)):
        assert await stage.answered(answer, params, [cut], step=step) == whole
        assert await stage.answered(answer, params, [cut, cut, cut + 1], step=step) == whole


@pytest.mark.parametrize("kind", [RequestOutputKind.FINAL_ONLY, RequestOutputKind.CUMULATIVE])
async def test_a_plain_answer_is_whole_too(stage: Stage, kind: RequestOutputKind) -> None:
    answer = [*stage.tokens("A broad 🌊 wave."), stage.tokenizer.eos_token_id]
    outputs: list[RequestOutput] = []
    for cut in range(len(answer)):
        outputs.clear()
        submission, collecting = await stage.ask(sampling(output_kind=kind, logprobs=0), outputs)
        engine = StubEngine(answer, stage.tokens(PROMPT), 1)
        engine.run(submission, until=cut)
        assert submission.recover() == ("continued" if cut else "restarted")
        engine.run(submission)
        await collecting
        (piece,) = outputs[-1].outputs
        assert (piece.text, list(piece.token_ids)) == ("A broad 🌊 wave.", answer)
        assert piece.logprobs is not None and len(piece.logprobs) == len(answer)


async def test_the_second_engine_is_asked_for_the_rest_and_nothing_twice(stage: Stage) -> None:
    submission, collecting = await stage.ask(
        sampling(max_tokens=50, min_tokens=10, prompt_logprobs=0, stop=["end"], stop_token_ids=[7]), []
    )
    engine = StubEngine(stage.tokens("A broad deep wave of the open sea"), stage.tokens(PROMPT), 1)
    engine.run(submission, until=4)
    assert submission.recover() == "continued"
    assert submission.prompt_tokens == len(stage.tokens(PROMPT)) + 4
    (first,), (rest,) = engine.asked, submission._codec.decode_requests(submission.encode())
    assert rest.prompt_token_ids == [*engine.prompt, *engine.answer[:4]]
    before, after = first.sampling_params, rest.sampling_params
    assert before is not None and after is not None
    assert (before.max_tokens, before.min_tokens, before.prompt_logprobs) == (50, 10, 0)
    assert (after.max_tokens, after.min_tokens, after.prompt_logprobs) == (46, 6, None)
    assert (before.skip_reading_prefix_cache, after.skip_reading_prefix_cache) == (True, False)
    for kept in ("stop", "stop_token_ids", "eos_token_id", "all_stop_token_ids", "temperature"):
        assert getattr(before, kept) == getattr(after, kept)
    assert rest.external_req_id == first.external_req_id == "r"
    submission.abort()
    await collecting


async def test_the_last_place_of_the_context_is_neither_lost_nor_passed(stage: Stage) -> None:
    prompt = stage.tokens(PROMPT)
    submission, collecting = await stage.ask(sampling(max_tokens=None), [])
    room = MAX_MODEL_LEN - len(prompt)
    answer = [stage.tokens("a")[0]] * room
    engine = StubEngine(answer, prompt, 97)
    engine.run(submission, until=room - 1)
    assert submission.recover() == "continued"
    engine.run(submission)
    params = engine.asked[1].sampling_params
    assert params is not None and params.max_tokens == 1
    assert submission.finished
    await collecting


@pytest.mark.parametrize(
    ("said", "params", "reason"),
    [
        ("one two", {"max_tokens": 2}, FinishReason.LENGTH),
        ("one two", {"stop_token_ids": "last"}, FinishReason.STOP),
        ("one <|im_end|>", {}, FinishReason.STOP),
        ("one two", {}, None),
    ],
)
async def test_nothing_is_asked_for_beyond_the_end(
    stage: Stage, said: str, params: dict[str, Any], reason: FinishReason | None
) -> None:
    """An engine says the end with its last token; should it ever die in between, no token may be added."""
    tokens, stop = stage.tokens(said)[-2:], None
    if params.get("stop_token_ids"):
        stop = tokens[-1]
        params = {"stop_token_ids": [stop]}
    outputs: list[RequestOutput] = []
    submission, collecting = await stage.ask(sampling(**params), outputs)
    submission.deliver(EngineCoreOutput("0", tokens), None)
    assert submission.recover() == ("continued" if reason is None else "finished")
    assert submission.finished == (reason is not None)
    submission.abort()
    await collecting
    assert outputs[-1].outputs[0].finish_reason == ("abort" if reason is None else str(reason))
    assert outputs[-1].outputs[0].stop_reason == stop


TIED: list[tuple[str, dict[str, Any]]] = [
    ("structured outputs", {"structured_outputs": StructuredOutputsParams(regex="a+")}),
    ("presence", {"presence_penalty": 0.5}),
    ("frequency", {"frequency_penalty": -0.5}),
    ("bad_words", {"bad_words": ["storm"]}),
    ("repetition", {"repetition_detection": RepetitionDetectionParams(max_pattern_size=3, min_count=3)}),
    ("choices", {"n": 2, "temperature": 1.0}),
]


@pytest.mark.parametrize(("reason", "params"), TIED, ids=[reason for reason, _ in TIED])
async def test_what_an_engine_counts_over_the_answer_cannot_go_on_once_it_is_seen(
    stage: Stage, reason: str, params: dict[str, Any]
) -> None:
    submission, collecting = await stage.ask(sampling(**params), [])
    assert submission.recover() == "restarted", "nothing is out yet"
    submission.deliver(EngineCoreOutput("0", [1000]), None)
    with pytest.raises(EngineUnavailable, match=reason) as raised:
        submission.recover()
    submission.fail(raised.value)
    with pytest.raises(PublicHTTPError):
        await collecting


@pytest.mark.parametrize(("reason", "params"), TIED, ids=[reason for reason, _ in TIED])
async def test_what_cannot_go_on_begins_again_where_nothing_is_streamed(
    stage: Stage, reason: str, params: dict[str, Any]
) -> None:
    outputs: list[RequestOutput] = []
    params = params | {"output_kind": RequestOutputKind.FINAL_ONLY, "logprobs": 0}
    submission, collecting = await stage.ask(sampling(**params), outputs)
    engine = StubEngine([1000, 1001, 1002], stage.tokens(PROMPT), 1)
    plan = [(index, [token]) for index in range(submission.sequences) for token in (1000, 1001, 1002)]
    for index, said in plan[:-1]:  # with several choices, one of them was finished
        submission.deliver(output(engine, index, said), None)
    assert submission.recover() == "restarted"
    assert submission.progress == 0
    assert len(submission._codec.decode_requests(submission.encode())) == submission.sequences
    for index, said in plan:
        submission.deliver(output(engine, index, said), None)
    await collecting
    assert len(outputs) == 1
    for choice in outputs[0].outputs:
        assert list(choice.token_ids) == [1000, 1001, 1002]
        assert choice.logprobs is not None and len(choice.logprobs) == 3
        assert choice.cumulative_logprob == pytest.approx(-30.03)


def output(engine: StubEngine, index: int, said: list[int]) -> EngineCoreOutput:
    made = engine._output(said, sampling(logprobs=0), said[-1] == 1002, first=False)
    made.request_id = str(index)
    return made


async def test_a_plain_answer_with_a_seed_begins_again_and_so_says_the_same(stage: Stage) -> None:
    submission, collecting = await stage.ask(
        sampling(seed=1, temperature=1.0, output_kind=RequestOutputKind.FINAL_ONLY), []
    )
    submission.deliver(EngineCoreOutput("0", [1000]), None)
    assert submission.recover() == "restarted"
    submission.deliver(EngineCoreOutput("0", [1000], finish_reason=FinishReason.LENGTH), None)
    await collecting


@pytest.mark.parametrize("reason", [FinishReason.ABORT, FinishReason.ERROR])
async def test_an_end_that_only_an_engine_wanted_is_its_failure(stage: Stage, reason: FinishReason) -> None:
    submission, collecting = await stage.ask(sampling(), [])
    submission.deliver(EngineCoreOutput("0", [1000]), None)
    with pytest.raises(EngineFailure):
        submission.deliver(EngineCoreOutput("0", [1001], finish_reason=reason), None)
    assert submission.recover() == "continued"
    assert submission.progress == 1
    submission.abort()
    await collecting


async def test_an_answer_whose_state_is_torn_does_not_go_on(stage: Stage) -> None:
    submission, collecting = await stage.ask(sampling(logprobs=0), [])
    submission.deliver(EngineCoreOutput("0", [1000]), None)
    ids = np.array([[1001]])
    with pytest.raises(AttributeError):  # its text is out, its logprobs are garbage
        submission.deliver(EngineCoreOutput("0", [1001], LogprobsLists(ids, [[0.0]], [1])), None)  # type: ignore[arg-type]
    with pytest.raises(EngineUnavailable, match="torn") as raised:
        submission.recover()
    submission.fail(raised.value)
    with pytest.raises(PublicHTTPError):
        await collecting


async def test_at_its_deadline_a_generation_ends_in_an_error_of_its_own_api(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs: list[RequestOutput] = []
    leaps, moment = Leaps(monkeypatch), asyncio.get_running_loop().time() + 600
    with request_scope.request_scope(deadline=(moment, RequestTimeout("Too late."))):
        submission, collecting = await stage.ask(sampling(), outputs)
        submission.deliver(EngineCoreOutput("0", [1000]), None)
        await until(lambda: outputs)
        await leaps.over(500)
        assert not collecting.done()
        await leaps.over(100)
        with pytest.raises(PublicHTTPError, match="Too late") as raised:
            await asyncio.wait_for(collecting, LIMIT_S)
    assert raised.value.error.status == 408
    assert len(outputs) == 1
    assert stage.flight.closed, "its place in the engine is free"


@pytest.mark.parametrize("replica", [None, "r0"])
async def test_a_deadline_in_prefill_does_not_make_a_prompt_free(
    stage: Stage, replica: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaps, moment = Leaps(monkeypatch), asyncio.get_running_loop().time() + 600
    caller = request_scope.Caller("ann", "ann")
    with request_scope.request_scope(caller, deadline=(moment, RequestTimeout("Too late."))):
        _, collecting = await stage.ask(sampling(), [])
        stage.flight.replica = replica
        await leaps.over(600)
        with pytest.raises(PublicHTTPError):
            await asyncio.wait_for(collecting, LIMIT_S)
    assert caller.tokens == (len(stage.tokens(PROMPT)) if replica else 0)


async def test_a_request_that_its_engine_refuses_costs_nothing(stage: Stage) -> None:
    caller = request_scope.Caller("ann", "ann")
    with request_scope.request_scope(caller):
        submission, collecting = await stage.ask(sampling(), [])
        stage.flight.replica = "r0"
        submission.fail(BadRequest("It is too long."))
        with pytest.raises(PublicHTTPError):
            await asyncio.wait_for(collecting, LIMIT_S)
    assert caller.tokens == 0


@pytest.mark.parametrize(
    ("reason", "params"),
    [
        ("a thinking budget", {"thinking_token_budget": 0}),
        ("a watermark", {"watermarking": True}),
        ("a replayed trace", {"trace_decode_token_ids": [1, 2]}),
    ],
)
async def test_what_vllm_takes_only_with_options_of_its_own_is_named_too(reason: str, params: dict[str, Any]) -> None:
    request = EngineCoreRequest("g", [1], None, sampling(), None, 0.0, None, None, None)
    assert continuation.why_not([request]) is None
    for name, value in params.items():
        setattr(request.sampling_params, name, value)
    assert continuation.why_not([request]) == reason


COUNTS_OVER_THE_ANSWER = {
    *("n", "structured_outputs", "presence_penalty", "frequency_penalty", "bad_words", "_bad_words_token_ids"),
    *("repetition_detection", "thinking_token_budget", "watermarking", "trace_decode_token_ids"),
}
REWRITTEN = {
    *("max_tokens", "min_tokens", "prompt_logprobs", "prompt_logprob_token_ids", "prompt_logprob_start"),
    "skip_reading_prefix_cache",
}
LOOKS_AT_ONE_TOKEN = {
    *("temperature", "top_p", "top_k", "min_p", "logit_bias", "allowed_token_ids", "logprobs", "logprob_token_ids"),
    *("stop_token_ids", "ignore_eos", "_eos_token_id", "_all_stop_token_ids", "_watermarking_skipped"),
}
OF_THE_ROUTER = {
    *("stop", "flat_logprobs", "detokenize", "skip_special_tokens", "spaces_between_special_tokens"),
    *("include_stop_str_in_output", "output_kind", "stream_interval", "skip_clone", "output_text_buffer_length"),
}
KNOWN_TO_BE_SAFE = {
    "repetition_penalty": "it counts the prompt too",
    "seed": "not reproduced, as the docs say; a plain request begins again",
    "extra_args": "read by logits processors, which are named by `why_no_request`, and by KV connectors",
    "routed_experts_prompt_start": "it counts only for engines that return them, which `why_no_request` names",
}


async def test_every_option_of_vllms_either_goes_on_or_is_named() -> None:
    """A new one is to be looked at: does an engine count it over the answer's own tokens?"""
    known = COUNTS_OVER_THE_ANSWER | REWRITTEN | LOOKS_AT_ONE_TOKEN | OF_THE_ROUTER | KNOWN_TO_BE_SAFE.keys()
    assert set(SamplingParams.__struct_fields__) == known


async def test_pooling_and_prompt_embeddings_are_named() -> None:
    pooling = EngineCoreRequest("p", [1], None, None, PoolingParams(task="embed"), 0.0, None, None, None)
    assert continuation.why_not([pooling]) == "pooling"
    embeds = EngineCoreRequest("e", None, None, sampling(), None, 0.0, None, None, None, torch.zeros(2, 4))
    assert continuation.why_not([embeds]) == "prompt embeddings"


async def test_engines_with_logits_processors_of_their_own_keep_every_answer(stage: Stage) -> None:
    config = stage.client.vllm_config
    assert continuation.why_no_request(config) is None
    with mock.patch.object(config.model_config, "logits_processors", ["mine:Processor"]):
        assert continuation.why_no_request(config) == "custom logits processors"


async def test_engines_that_return_routed_experts_keep_every_answer(stage: Stage) -> None:
    """vLLM's output processor strings them together: those of a first part would be there twice."""
    options = {"model": stage.client.model_config.model, "dtype": "float32", "enable_return_routed_experts": True}
    with mock.patch.dict(os.environ, VLLM_TARGET_DEVICE="cpu"):
        config = frontend_config(parse_args("tiny", options, {}))
    assert continuation.why_no_request(config) == "routed experts returned"
