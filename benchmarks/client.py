"""The load: chat clients, in a process of its own so that measuring costs the servers as little as it can.

    python -m benchmarks.client '{"url": "http://127.0.0.1:8000", "model": "tiny", "clients": 32, …}'

Prints one JSON line, a `Result`. Each client sends its next request when it has read the last byte of the one before;
with a `rate`, requests come at random instead, whatever has become of those before (Poisson arrivals).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import random
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import aiohttp
import uvloop

WORDS = ("harbour", "catalogue", "station", "queue", "water", "train", "bread", "library", "mountain", "wave", "storm")


@dataclass(frozen=True)
class Load:
    """What to send.

    Attributes:
        url: The server, without `/v1`.
        clients: Requests in flight at any time; with a `rate`, only a factor of their number.
        requests: Requests of each client, one after the other.
        rate: Arrivals a second; 0 for clients that wait for their answers.
        tokens: Output tokens of each request, exactly: `max_tokens` and `ignore_eos`.
        prompt_words: Length of each prompt. No two prompts of a load are the same.
        seed: Of the prompts. The same seed asks every server the same.
        stream: Read server-sent events, or one answer.
        request_timeout_s: After which a request counts as failed.
    """

    url: str
    model: str
    clients: int = 32
    requests: int = 2
    tokens: int = 128
    prompt_words: int = 40
    seed: int = 0
    stream: bool = True
    rate: float = 0.0
    request_timeout_s: float = 120.0


@dataclass
class Result:
    """What came back.

    Attributes:
        wall_s: From the first request to the end of the last answer.
        tokens: Output tokens, by the servers' own `usage`, of requests that did not fail.
        prompt_tokens: Of those, likewise.
        events: Of those, server-sent events, `[DONE]` included: fewer than tokens where a server merges them.
        completed: Requests that came back whole.
        rejected: Requests that were refused at once for overload: HTTP 429.
        errors: Requests that did not, by reason, rejected ones included.
        ttft_s: Per request whose answer has text, to the first event with some.
        tpot_s: For each of those, from there to the last event, by token after the first; 0 with one token.
        client_cpu_s: This process's own.
    """

    wall_s: float = 0.0
    tokens: int = 0
    prompt_tokens: int = 0
    events: int = 0
    completed: int = 0
    rejected: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    client_cpu_s: float = 0.0

    @property
    def not_whole(self) -> int:
        """Requests that did not come back whole, for whatever reason."""
        return sum(self.errors.values())

    @property
    def failed(self) -> int:
        """Requests that failed though nobody refused them."""
        return self.not_whole - self.rejected

    def good(self, ttft_s: float, tpot_s: float) -> int:
        """Return how many requests kept to both limits."""
        return sum(a <= ttft_s and b <= tpot_s for a, b in zip(self.ttft_s, self.tpot_s, strict=True))


class RequestFailed(Exception):
    """Not the answer that was asked for."""


class Rejected(RequestFailed):
    """The server has too much to do, and says so. A 503 only says that nobody could do it: that is a failure."""


def bodies(load: Load, client: int) -> list[bytes]:
    """Return the requests of one client."""
    rng = random.Random(f"{load.seed}/{client}")
    request: dict[str, Any] = {
        "model": load.model,
        "max_tokens": load.tokens,
        "ignore_eos": True,
        "stream": load.stream,
    }
    if load.stream:
        request["stream_options"] = {"include_usage": True}
    prompts = (" ".join(rng.choices(WORDS, k=load.prompt_words)) for _ in range(load.requests))
    return [json.dumps({**request, "messages": [{"role": "user", "content": prompt}]}).encode() for prompt in prompts]


async def run(load: Load) -> Result:
    """Send the load; return what came back. A failed request is counted, and its client goes on."""
    result = Result()
    timeout = aiohttp.ClientTimeout(total=load.request_timeout_s)
    work = [bodies(load, client) for client in range(load.clients)]
    headers = {"content-type": "application/json"}
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=timeout, headers=headers
    ) as session:
        started, cpu = time.perf_counter(), time.process_time()
        if load.rate:
            await _arrivals(session, load, [body for requests in work for body in requests], result)
        else:
            await asyncio.gather(*(_client(session, load, requests, result) for requests in work))
        result.wall_s = time.perf_counter() - started
        result.client_cpu_s = time.process_time() - cpu
    return result


async def _arrivals(session: aiohttp.ClientSession, load: Load, requests: list[bytes], result: Result) -> None:
    rng, loop = random.Random(f"{load.seed}/arrivals"), asyncio.get_running_loop()
    due = loop.time()
    async with asyncio.TaskGroup() as group:
        for body in requests:
            due += rng.expovariate(load.rate)
            await asyncio.sleep(max(0.0, due - loop.time()))
            group.create_task(_client(session, load, [body], result))


async def _client(session: aiohttp.ClientSession, load: Load, requests: list[bytes], result: Result) -> None:
    send = _streamed if load.stream else _whole
    for body in requests:
        try:
            await send(session, load, body, result)
        except (aiohttp.ClientError, TimeoutError, RequestFailed, ValueError, OSError) as error:
            reason = f"{type(error).__name__}: {error}"[:200]
            result.errors[reason] = result.errors.get(reason, 0) + 1
            result.rejected += isinstance(error, Rejected)


async def _whole(session: aiohttp.ClientSession, load: Load, body: bytes, result: Result) -> None:
    async with session.post(f"{load.url}/v1/chat/completions", data=body) as response:
        answer = await response.read()
        if response.status != 200:
            raise _refusal(response.status, answer)
        _count(usage(json.loads(answer), load.tokens), result)


async def _streamed(session: aiohttp.ClientSession, load: Load, body: bytes, result: Result) -> None:
    started = time.perf_counter()
    first = last = 0.0
    events = 0
    before, latest, rest = b"", b"", b""
    async with session.post(f"{load.url}/v1/chat/completions", data=body) as response:
        if response.status != 200:
            raise _refusal(response.status, await response.read())
        async for data in response.content.iter_any():
            last = time.perf_counter()
            *whole, rest = (rest + data).split(b"\n\n")
            for event in whole:
                events += 1
                before, latest = latest, event
                if not first and has_text(event):
                    first = last
    _count(usage_at_end(before, latest, load.tokens), result)
    result.events += events
    if first:
        result.ttft_s.append(first - started)
        result.tpot_s.append((last - first) / (load.tokens - 1) if load.tokens > 1 else 0.0)


def _refusal(status: int, answer: bytes) -> RequestFailed:
    """Return the error for an answer other than 200, the same for all that say the same."""
    if status == 429:
        return Rejected("HTTP 429")  # without its words, which count requests
    return RequestFailed(f"HTTP {status} {answer[:120].decode(errors='replace')}")


def has_text(event: bytes) -> bool:
    """Return whether an event of a chat's stream brings text."""
    choices = json.loads(event[6:]).get("choices") if event.startswith(b"data: {") else None
    return bool(choices and choices[0]["delta"].get("content"))


def usage(answer: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Return the `usage` of an answer.

    Raises:
        RequestFailed: It is not of so many tokens.
    """
    said: dict[str, Any] = answer.get("usage") or {}
    if said.get("completion_tokens", 0) != tokens:
        raise RequestFailed(f"{said.get('completion_tokens', 0)} tokens in place of {tokens}")
    return said


def usage_at_end(before: bytes, last: bytes, tokens: int) -> dict[str, Any]:
    """Return the `usage` of a stream, which the last event but one brings.

    Raises:
        RequestFailed: The stream did not come to its end, or is not of so many tokens.
    """
    if last != b"data: [DONE]" or not before.startswith(b'data: {"id"'):
        raise RequestFailed(f"the stream ended with {before[:120]!r} {last[:120]!r}")
    return usage(json.loads(before[6:]), tokens)


def _count(said: dict[str, Any], result: Result) -> None:
    result.tokens += said["completion_tokens"]
    result.prompt_tokens += said.get("prompt_tokens", 0)
    result.completed += 1


def go_first() -> None:
    """Have this process, and not what it starts, be woken before others, where it may: only root can.

    On a machine whose cores are all busy a client is woken late, and its wait would be taken for the server's.
    """
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))


def main() -> None:
    """Run the load that the command line names; print the result."""
    load = Load(**json.loads(sys.argv[1]))
    go_first()
    gc.disable()  # short-lived, and its pauses would be taken for the server's
    print(json.dumps(asdict(uvloop.run(run(load)))))


if __name__ == "__main__":
    main()
