"""The Router's app and vLLM's own, called in one process without a network: what each costs in CPU time.

    python -m benchmarks.in_process

Both stand on the STUB of EngineCore that `benchmarks.data_path` describes. The Router's side includes the Engine's half
and the token channel between them, over loopback; Serve's calls and its HTTP server are missing. CPU time depends less
than wall time on what else the machine does: this is for comparing before and after. Medians over rounds, in turns.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import uvloop

from benchmarks import console
from benchmarks.client import Load, RequestFailed, bodies, usage_at_end
from benchmarks.compare import quantile
from benchmarks.servers import MODEL_NAME, make_model
from benchmarks.stubs.__main__ import model_config
from benchmarks.stubs.core import STEP_S
from benchmarks.stubs.local import REPLICA, LocalEngine, router_outside_serve
from deployments import messages as m
from deployments.config import FleetConfig, ModelConfig
from deployments.dispatch import App

CASES = {"short": (32, 10, 1), "chat": (32, 2, 128)}
"""Clients, requests of each, tokens of each request."""


@dataclass(frozen=True)
class Cost:
    """One load on one app.

    Attributes:
        request_us: CPU microseconds of the whole process per request.
        events: Per request; fewer than tokens where a client was behind.
        ttft_ms: Median of those whose answers have text.
    """

    request_us: float
    events: float
    ttft_ms: float


class DirectCalls:
    """Stands in for `deployments.router._ServeCalls`: calls to an Engine in this process."""

    def __init__(self, engine: LocalEngine, on_replicas: Callable[[frozenset[str]], None]) -> None:
        self._engine = engine
        asyncio.get_running_loop().call_soon(on_replicas, frozenset({REPLICA}))

    def open(self, frames: list[bytes], channel: m.ChannelAddress, stream: int, ticket: Any) -> DirectCall:
        ticket.rank([REPLICA])
        ticket.taken(REPLICA)
        return DirectCall(self._engine.generate(frames, channel, stream))

    async def join(self, channel: m.ChannelAddress) -> list[m.EngineDescription]:
        return [await self._engine.join(channel)]


class DirectCall:
    """One open call. `cancel` does nothing: nobody hangs up here."""

    def __init__(self, messages: AsyncIterator[m.End]) -> None:
        self._messages = messages

    def __aiter__(self) -> AsyncIterator[m.End]:
        return self._messages

    def cancel(self) -> None:
        pass


async def router(model: ModelConfig) -> App:
    """Return the Router's app over an Engine in this process."""
    engine = LocalEngine.__new__(LocalEngine)
    await engine.__init__(model, FleetConfig())  # type: ignore[misc]

    def calls(handle: object, on_replicas: Any, *, join_timeout_s: float) -> DirectCalls:
        return DirectCalls(engine, on_replicas)

    made, app = await router_outside_serve(model, calls)
    while not made._models[0].fleet.replicas:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    return app


async def bare(model: ModelConfig) -> App:
    """Return vLLM's own app over its own `AsyncLLM`."""
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    from deployments.seam.args import engine_args, parse_args

    args = parse_args(model.name, model.engine_args, model.frontend_args)
    config = engine_args(args).create_engine_config(UsageContext.OPENAI_API_SERVER)
    llm = AsyncLLM.from_vllm_config(config)
    app = build_app(args, ("generate",), llm.model_config)
    await init_app_state(llm, app.state, args, ("generate",))
    return app


async def ask(app: App, body: bytes, tokens: int) -> tuple[int, float | None]:
    """Send one request; return the events of its answer, and seconds to the first with text.

    Raises:
        RequestFailed: The answer is not a whole one of so many tokens.
    """
    begin, first, events, status = time.perf_counter(), None, 0, 0
    answer = bytearray()
    bodies, hung_up = [body], asyncio.Event()

    async def receive() -> dict[str, Any]:
        if bodies:
            return {"type": "http.request", "body": bodies.pop(), "more_body": False}
        await hung_up.wait()
        return {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        nonlocal first, events, status
        status = message.get("status", status)
        data = message.get("body", b"")
        events += data.count(b"data: ")
        answer.extend(data)
        if first is None and b'"content":"' in data and b'"role"' not in data:
            first = time.perf_counter() - begin

    path = "/v1/chat/completions"
    headers = [(b"host", b"h"), (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    scope: dict[str, Any] = {"type": "http", "http_version": "1.1", "method": "POST", "path": path, "scheme": "http"}
    scope |= {"raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": headers, "state": {}}
    await app({**scope, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2)}, receive, send)
    hung_up.set()
    if status != 200:
        raise RequestFailed(f"HTTP {status} {answer[:120].decode(errors='replace')}")
    *_, before, last, _ = [b"", b"", *bytes(answer).rsplit(b"\n\n", 3)]
    usage_at_end(before, last, tokens)
    return events, first


async def load(app: App, clients: int, requests: int, tokens: int, seed: int) -> Cost:
    """Run closed-loop clients; return what that cost."""
    what = Load("", MODEL_NAME, clients, requests, tokens, seed=seed)

    async def client(index: int) -> list[tuple[int, float | None]]:
        return [await ask(app, body, tokens) for body in bodies(what, index)]

    spent = time.process_time()
    answers = [answer for each in await asyncio.gather(*map(client, range(clients))) for answer in each]
    spent = time.process_time() - spent
    ttft = [first for _, first in answers if first is not None]
    return Cost(1e6 * spent / len(answers), sum(n for n, _ in answers) / len(answers), 1000 * quantile(ttft, 50))


async def run(rounds: int) -> dict[str, Any]:
    """Measure both apps in turns; return medians."""
    model = model_config(str(make_model()))
    apps = {"router": await router(model), "bare": await bare(model)}
    for app in apps.values():
        await load(app, 32, 3, 4, seed=-1)
    gc.collect()
    gc.freeze()
    costs: dict[tuple[str, str], list[Cost]] = defaultdict(list)
    for turn in range(rounds):
        for case, (clients, requests, tokens) in CASES.items():
            for name, app in apps.items():
                costs[case, name].append(await load(app, clients, requests, tokens, turn))
    return {
        case: {
            name: {
                field: round(statistics.median(getattr(cost, field) for cost in costs[case, name]), 1)
                for field in ("request_us", "events", "ttft_ms")
            }
            for name in apps
        }
        for case in CASES
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 1 if an answer did not come whole: nothing may fail here."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.in_process", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    console.add_json(parser)
    given = parser.parse_args(arguments)
    os.environ |= {"VLLM_TARGET_DEVICE": "cpu", STEP_S: "0"}
    try:
        with contextlib.redirect_stdout(sys.stderr):  # vLLM's log
            cases = uvloop.run(run(given.rounds))
    except RequestFailed as problem:
        print(f"benchmarks: {problem}", file=sys.stderr)
        return 1
    print(f"{'':<34}{'router':>10}{'bare':>10}{'ratio':>8}")
    for case, by_app in cases.items():
        clients, _, tokens = CASES[case]
        print(f"{clients} clients, {tokens} tokens")
        for field, label in (
            ("request_us", "CPU us per request"),
            ("events", "events per request"),
            ("ttft_ms", "TTFT p50, ms"),
        ):
            ours, theirs = by_app["router"][field], by_app["bare"][field]
            print(f"    {label:<30}{ours:>10.1f}{theirs:>10.1f}{ours / theirs:>8.2f}")
    console.report({"benchmark": "in_process", "rounds": given.rounds, "cases": cases}, given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
