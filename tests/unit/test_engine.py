"""The Engine around its engine: runs, their numbers and their ends. Its vLLM is a stub, so none is needed."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio

from deployments import messages as m
from deployments.config import FleetConfig, ModelConfig
from deployments.engine import Engine, EngineUnhealthy, Stall, _Run, cpu_environment
from deployments.fleet.autoscaling import QUEUED_TOKENS, Waits
from deployments.fleet.channel import ChannelError
from tests.unit.recording import LIMIT_S, Recorder

MODEL = ModelConfig(name="tiny", engine_args={"model": "m"})
ADDRESS = m.ChannelAddress("router", "tcp://127.0.0.1:1", None, b"secret")
TOTALS = m.Totals(generated_tokens=100, first_tokens=2, first_token_s=0.5)


class StubClientError(Exception):
    """Stands in for vLLM's `VLLMClientError`."""

    parameter = "max_tokens"


@dataclass(frozen=True)
class Delta:
    stream: int
    execution: int
    sequence: int
    output: Any


@dataclass
class Output:
    """As much of vLLM's `EngineCoreOutput` as a run looks into."""

    request_id: str
    token: int = 0
    finish_reason: str | None = None
    events: Any = "for statistics"
    trace_headers: Any = "for statistics"


@dataclass(eq=False)
class StubLink:
    router: str = "router"
    runs: dict[int, Callable[[str], None]] = field(default_factory=dict)
    pending: list[Any] = field(default_factory=list)
    sent: list[Any] = field(default_factory=list)

    def send(self, kind: bytes, frames: Any) -> bool:
        self.sent.append((kind, frames))
        return True


class StubLLM:
    """Stands in for `TokenEngine`: keeps what it is given until the test has it produce something."""

    def __init__(self) -> None:
        self.heard = Recorder()
        self.sinks: dict[str, Any] = {}
        self.aborted: list[str] = []
        self.refuse: Exception | None = None
        self.errored = False
        self.unfinished = 0
        self.seconds_since_step = 0.0
        self.stats = SimpleNamespace(running=2, waiting=1, kv_cache_usage=0.25, steps=0, totals=TOTALS)

    async def add(self, request: Any, sink: Any) -> None:
        if self.refuse is not None:
            raise self.refuse
        self.sinks[request.request_id] = sink
        self.heard.note("added", request.request_id)

    async def abort(self, request_ids: list[str]) -> None:
        self.aborted += request_ids
        self.heard.note("aborted", request_ids)

    def produce(self, request_id: str, token: int, finish_reason: str | None = None) -> None:
        self.sinks[request_id].deliver(Output(request_id, token, finish_reason), "weights-1")


class StubChannel:
    def __init__(self) -> None:
        self.links = {"router": StubLink(), "other": StubLink("other")}
        self.reachable = True

    async def link(self, address: m.ChannelAddress) -> StubLink:
        if not self.reachable:
            raise ChannelError("Router did not answer")
        return self.links[address.router]


class StubCodec:
    def decode_requests(self, frames: list[bytes]) -> list[Any]:
        if frames == [b"unreadable"]:
            raise ValueError("unreadable")
        return [
            SimpleNamespace(request_id=frame.decode(), prompt_token_ids=[1, 2, 3], arrival_time=time.time())
            for frame in frames
        ]

    def encode_deltas(self, weight_version: str | None, deltas: list[Delta]) -> Any:
        return weight_version, deltas


@pytest.fixture(autouse=True)
def without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deployments.seam.wire", SimpleNamespace(Delta=Delta))
    monkeypatch.setitem(sys.modules, "vllm.exceptions", SimpleNamespace(VLLMClientError=StubClientError))


class Bench:
    """An Engine with stubs all round. `Engine.__init__` starts vLLM, so its attributes are set by hand."""

    def __init__(self) -> None:
        self.llm, self.channel, self.metrics = StubLLM(), StubChannel(), Recorder()
        self.engine = Engine.__new__(Engine)
        vars(self.engine).update(
            _model=MODEL,
            _config=FleetConfig(engine_stall_timeout_s=60),
            _replica="e1",
            _metrics=self.metrics,
            _codec=StubCodec(),
            _stall=Stall(60),
            _runs={},
            _waits=Waits(),
            _touched=set(),
            _tasks=set(),
            _llm=self.llm,
            _channel=self.channel,
        )
        self.ends: list[m.End] = []

    @property
    def link(self) -> StubLink:
        return self.channel.links["router"]

    def run(self, *frames: bytes, stream: int = 7, router: str = "router") -> asyncio.Task[None]:
        address = m.ChannelAddress(router, ADDRESS.endpoint, None, b"secret")

        async def listen() -> None:
            async for end in self.engine.generate(list(frames) or [b"r"], address, stream):
                self.ends.append(end)

        return asyncio.get_running_loop().create_task(listen())

    async def started(self, *frames: bytes, **options: Any) -> tuple[asyncio.Task[None], int, list[str]]:
        """Start a request and wait until all of its sequences are in the engine.

        Returns:
            The call, the execution, and the sequences' ids in the engine.
        """
        before = len(self.llm.sinks)
        task = self.run(*frames, **options)
        await self.llm.heard.until(lambda: len(self.llm.sinks) == before + max(1, len(frames)))
        return task, list(self.engine._runs)[-1], list(self.llm.sinks)[before:]

    def flush(self) -> list[tuple[str, int, int]]:
        """End an engine step; return what was sent: router, sequence number and token."""
        self.engine._flush()
        sent = [(link.router, sent) for link in self.channel.links.values() for sent in link.sent]
        for link in self.channel.links.values():
            link.sent.clear()
        assert all(kind == m.DELTAS for _, (kind, _) in sent)
        return [(router, d.sequence, d.output.token) for router, (_, (_, deltas)) in sent for d in deltas]


@pytest_asyncio.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench()
    yield made
    assert made.engine._runs == {}
    assert all(link.runs == {} for link in made.channel.links.values())


async def ended(bench: Bench, task: asyncio.Task[None]) -> m.End:
    async with asyncio.timeout(LIMIT_S):
        await task
    (end,) = bench.ends
    return end


# One run.


def run_of(*ids: str) -> tuple[_Run, StubLink, list[str]]:
    link = StubLink()
    run = _Run(7, link, lambda link: None, Waits())  # type: ignore[arg-type]
    requests: Any = [SimpleNamespace(request_id=i, prompt_token_ids=[1, 2, 3], arrival_time=0.0) for i in ids]
    return run, link, run.adopt(requests)


@pytest.mark.asyncio
async def test_two_runs_of_one_request_share_no_id() -> None:
    (first, _, ids), (second, _, others) = run_of("r"), run_of("r")
    assert first.execution != second.execution
    assert not set(ids) & set(others)


@pytest.mark.asyncio
async def test_deltas_of_all_sequences_are_numbered_as_one_stream() -> None:
    run, link, ids = run_of("a", "b")
    for request_id in (ids[0], ids[1], ids[1], ids[0]):
        run.deliver(Output(request_id), None)
    deltas = [delta for _, delta in link.pending]
    assert [delta.sequence for delta in deltas] == [0, 1, 2, 3]
    assert [delta.output.request_id for delta in deltas] == ["0", "1", "1", "0"]
    assert {(delta.stream, delta.execution) for delta in deltas} == {(7, run.execution)}


@pytest.mark.asyncio
async def test_statistics_of_the_engine_do_not_travel() -> None:
    run, link, ids = run_of("a")
    run.deliver(Output(ids[0]), None)
    output = link.pending[0][1].output
    assert output.events is output.trace_headers is None


@pytest.mark.asyncio
async def test_a_run_ends_with_the_last_of_its_sequences() -> None:
    run, _, ids = run_of("a", "b")
    run.deliver(Output(ids[1], finish_reason="stop"), None)
    assert not run.done.done()
    run.deliver(Output(ids[0], finish_reason="length"), None)
    assert run.done.result() == m.End(1, m.FINISHED)


@pytest.mark.asyncio
async def test_the_first_end_counts() -> None:
    run, _, ids = run_of("a")
    run.deliver(Output(ids[0], finish_reason="stop"), None)
    run.end(m.FAILED, "the engine died")
    assert run.done.result() == m.End(0, m.FINISHED)


@pytest.mark.asyncio
async def test_only_an_exception_from_vllm_ends_a_run() -> None:
    run, _, _ = run_of("a")
    run.put("a final output of an aborted request")
    assert not run.done.done()
    run.put(RuntimeError("EngineCore died"))
    assert run.done.result() == m.End(-1, m.FAILED, "the engine died")


@pytest.mark.asyncio
async def test_sequences_are_found_by_index() -> None:
    run, _, ids = run_of("a", "b")
    assert run.ids(1) == [ids[1]]
    assert run.ids(-1) == ids
    assert run.ids(5) == []


# The call.


@pytest.mark.asyncio
async def test_a_call_ends_with_the_last_delta_and_deltas_leave_once_a_step(bench: Bench) -> None:
    task, _, (request_id,) = await bench.started()
    bench.llm.produce(request_id, 11)
    assert bench.flush() == [("router", 0, 11)]
    bench.llm.produce(request_id, 12)
    bench.llm.produce(request_id, 13, "length")
    assert bench.flush() == [("router", 1, 12), ("router", 2, 13)]
    assert bench.flush() == []
    assert await ended(bench, task) == m.End(2, m.FINISHED)
    assert bench.llm.aborted == []
    assert bench.metrics.counts["engine_executions", "tiny", m.FINISHED] == 1


@pytest.mark.asyncio
async def test_a_prompt_waits_until_its_first_token_or_its_end(bench: Bench) -> None:
    async def waiting() -> float:
        return (await bench.engine._autoscaling_stats())[QUEUED_TOKENS]

    first, _, (served,) = await bench.started(b"a")
    second, _, _ = await bench.started(b"b")
    assert await waiting() == 6
    bench.llm.produce(served, 1)
    assert await waiting() == 3
    second.cancel()
    await asyncio.wait([second])
    assert await waiting() == 0
    bench.llm.produce(served, 2, "stop")
    await first


@pytest.mark.asyncio
async def test_a_step_sends_one_message_to_each_router(bench: Bench) -> None:
    tasks = []
    for router in ("router", "router", "other"):
        task, _, (request_id,) = await bench.started(router=router)
        tasks.append(task)
        bench.llm.produce(request_id, 5, "stop")
    bench.engine._flush()
    assert {name: len(link.sent) for name, link in bench.channel.links.items()} == {"router": 1, "other": 1}
    for task in tasks:
        await task


@pytest.mark.asyncio
async def test_a_request_that_vllm_refuses_is_the_clients_fault(bench: Bench) -> None:
    bench.llm.refuse = StubClientError("too long")
    assert await ended(bench, bench.run()) == m.End(-1, m.REFUSED, "too long", "max_tokens")


@pytest.mark.asyncio
@pytest.mark.parametrize("frames", [(b"unreadable",), (b"r",)])
async def test_what_else_goes_wrong_is_the_engines_fault_and_is_not_told(bench: Bench, frames: tuple[bytes]) -> None:
    bench.llm.refuse = RuntimeError("a path, a traceback")
    assert await ended(bench, bench.run(*frames)) == m.End(-1, m.FAILED, "the engine had an internal error")


@pytest.mark.asyncio
async def test_a_router_that_cannot_be_reached_is_told_so_before_any_work(bench: Bench) -> None:
    bench.channel.reachable = False
    end = await ended(bench, bench.run())
    assert (end.outcome, bench.llm.sinks) == (m.FAILED, {})


@pytest.mark.asyncio
async def test_a_cancelled_call_frees_its_place_in_the_batch(bench: Bench) -> None:
    task, _, ids = await bench.started(b"a", b"b")
    task.cancel()
    await asyncio.wait([task])
    assert bench.llm.aborted == ids
    assert bench.metrics.counts["engine_executions", "tiny", "cancelled"] == 1


@pytest.mark.asyncio
async def test_a_lost_router_ends_its_runs_and_frees_their_places(bench: Bench) -> None:
    task, execution, ids = await bench.started()
    bench.llm.produce(ids[0], 1)
    bench.link.runs[execution]("its token channel is full or gone")
    end = await ended(bench, task)
    assert (end.outcome, end.last_sequence) == (m.ABORTED, 0)
    assert bench.llm.aborted == ids


@pytest.mark.asyncio
async def test_an_abort_of_one_sequence_leaves_the_others(bench: Bench) -> None:
    task, _, ids = await bench.started(b"a", b"b")
    bench.engine._on_abort(m.Abort(m.VERSION, 7, 0))
    await bench.llm.heard.until(lambda: bool(bench.llm.aborted))
    assert bench.llm.aborted == [ids[0]]
    bench.llm.produce(ids[1], 1, "stop")
    assert await ended(bench, task) == m.End(0, m.FINISHED)


@pytest.mark.asyncio
async def test_an_abort_of_all_sequences_ends_the_run(bench: Bench) -> None:
    task, _, ids = await bench.started(b"a", b"b")
    bench.engine._on_abort(m.Abort(m.VERSION, 7))
    assert (await ended(bench, task)).outcome == m.ABORTED
    assert set(bench.llm.aborted) == set(ids)


@pytest.mark.asyncio
async def test_an_abort_of_another_stream_is_ignored(bench: Bench) -> None:
    task, _, ids = await bench.started()
    bench.engine._on_abort(m.Abort(m.VERSION, 8))
    assert bench.engine._tasks == set()
    bench.llm.produce(ids[0], 1, "stop")
    assert (await ended(bench, task)).outcome == m.FINISHED


# Health.


def test_a_heartbeat_says_what_the_engine_says() -> None:
    bench = Bench()
    bench.llm.unfinished, bench.llm.seconds_since_step = 3, 0.5
    assert bench.engine._beat() == m.Heartbeat(m.VERSION, "e1", "tiny", 2, 1, 0.25, 0.5, 3, TOTALS)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("errored", "unfinished", "seconds_since_step", "words"),
    [(True, 0, 0.0, "dead"), (False, 2, 61.0, "owes a step and made none for 61 s")],
)
async def test_a_dead_or_hung_engine_is_unhealthy(
    errored: bool, unfinished: int, seconds_since_step: float, words: str
) -> None:
    bench = Bench()
    bench.llm.errored, bench.llm.unfinished, bench.llm.seconds_since_step = errored, unfinished, seconds_since_step
    with pytest.raises(EngineUnhealthy, match=words):
        await bench.engine.check_health()


@pytest.mark.asyncio
@pytest.mark.parametrize(("unfinished", "seconds_since_step"), [(0, 9999.0), (200, 59.0)])
async def test_an_idle_or_busy_engine_is_healthy(unfinished: int, seconds_since_step: float) -> None:
    bench = Bench()
    bench.llm.unfinished, bench.llm.seconds_since_step = unfinished, seconds_since_step
    await bench.engine.check_health()


@pytest.mark.asyncio
async def test_a_hung_engine_stays_hung_when_its_work_is_taken_away_and_until_it_makes_a_step() -> None:
    bench = Bench()
    bench.llm.unfinished, bench.llm.seconds_since_step = 2, 61.0
    assert bench.engine._beat().seconds_since_step >= 61
    bench.llm.unfinished, bench.llm.seconds_since_step = 0, 0.0  # as after new work that was taken away again
    beat = bench.engine._beat()
    assert beat.unfinished == 1
    assert beat.seconds_since_step >= 61
    with pytest.raises(EngineUnhealthy):
        await bench.engine.check_health()
    bench.llm.stats.steps += 1
    await bench.engine.check_health()
    assert (bench.engine._beat().unfinished, bench.engine._beat().seconds_since_step) == (0, 0.0)


# What an engine on CPUs needs.


def test_a_cpu_engine_computes_on_all_cores_and_pins_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    assert cpu_environment(6) == {
        "OMP_NUM_THREADS": "6",
        "OMP_WAIT_POLICY": "PASSIVE",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }


def test_a_cache_size_that_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    assert cpu_environment(len(os.sched_getaffinity(0)))["VLLM_CPU_KVCACHE_SPACE"] == "7"
