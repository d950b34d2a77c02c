"""What clients get when things break under load: two real engines, one Router, and a signal.

    python -m benchmarks.chaos            # twenty losses of engines, and one of the Router; about half an hour
    python -m benchmarks.chaos --quick    # each fault once

Every prompt is asked undisturbed first. Decoding is greedy, in float32 on CPUs: what a client gets through a fault must
be the same tokens. Where it is not, the engine is asked how likely it finds both tokens at the place where the answers
part: a continuation computes in one prefill what the first run computed token by token, so that last bits differ, and
a tie may fall the other way. Faults are signals to single processes:

    actor     SIGKILL to the replica        its EngineCore and Worker die with it
    core      SIGKILL to EngineCore
    worker    SIGKILL to a Worker
    hang      SIGSTOP to EngineCore         work, and no step; noticed after `engine_stall_timeout_s`, 10 here
    silence   SIGSTOP to the replica        no heartbeat; noticed after `heartbeat_timeout_s`, 10 by default
    router    SIGKILL to the Router         its clients lose their connections, and nothing can spare them that
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import signal
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp
import psutil

from benchmarks import console
from benchmarks.client import WORDS
from benchmarks.replicas import cores, engines, routers, workers
from benchmarks.servers import MODEL_NAME, ROOT, Groundswell, ServerError, has_cuda_build, make_model, settings
from deployments.launch.environment import RUN_ID
from deployments.launch.processes import is_alive

ENGINES: Final = 2
TIE_NATS: Final = 1e-3
BACK_WITHIN_S: Final = 300.0
ANSWERED_WITHIN_S: Final = 240.0
METRICS_LAG_S: Final = 45.0
"""Ray's endpoint shows a count within this, on cores that are busy."""
FULL: Final = ("actor", "core", "worker", "hang", "actor", "core", "worker", "silence") * 2 + (
    *("actor", "core", "worker", "actor"),
    "router",
)
QUICK: Final = ("actor", "core", "worker", "hang", "silence", "router")


@dataclass
class Answer:
    """One request, as its client saw it.

    Attributes:
        tokens: Ids of the answer's tokens.
        usage: As the server counted them.
        times: When something of the answer arrived.
        status: HTTP's; 0 if none came.
        problem: Why it is not whole.
    """

    tokens: list[int] = field(default_factory=list)
    usage: int = 0
    times: list[float] = field(default_factory=list)
    status: int = 0
    problem: str | None = None
    done: bool = False


@dataclass
class Row:
    """One kind of fault, over all its injections.

    Attributes:
        injected: How often.
        in_flight: Requests under way at that moment, streams and plain ones.
        continued: Requests that went on at another engine, by the Router's count.
        restarted: Those that began again there.
        refused: Answered with an HTTP error.
        broken: Ended in an error event or a broken connection.
        tokens_off: Tokens missing, doubled or different in answers that claim to be whole.
        ties: Answers not counted there, which part at two tokens that the engine finds equally likely, within
            `TIE_NATS`.
        longest_pause_s: The longest time any client that got its answer waited for the next token.
        error_after_s: The longest time until a client was told that its stream is broken.
        whole_again_s: Until all engines, or the Router, were back.
    """

    injected: int = 0
    in_flight: int = 0
    continued: int = 0
    restarted: int = 0
    refused: int = 0
    broken: int = 0
    tokens_off: int = 0
    ties: int = 0
    longest_pause_s: float = 0.0
    error_after_s: float = 0.0
    whole_again_s: float = 0.0


class NotBack(Exception):
    """Something that was broken did not come back."""


def prompts(number: int, seed: int) -> list[str]:
    """Return prompts of which no two are the same."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=30)) for _ in range(number)]


async def ask(session: aiohttp.ClientSession, url: str, prompt: str, tokens: int, stream: bool, answer: Answer) -> None:
    """Fill `answer` as it comes; whatever goes wrong is its `problem`."""
    body: dict[str, Any] = {
        "model": MODEL_NAME,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": stream,
        "return_token_ids": True,
    }
    if stream:
        body["stream_options"] = {"include_usage": True}
    answer.times.append(time.monotonic())
    try:
        async with session.post(f"{url}/v1/completions", json=body) as response:
            answer.status = response.status
            if response.status != 200:
                answer.problem = (await response.text())[:200]
                return
            if stream:
                await _read_events(response, answer)
            else:
                _take(await response.json(), answer)
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
        answer.problem = f"{type(error).__name__}: {error}"
    finally:
        answer.times.append(time.monotonic())
        answer.done = True


async def _read_events(response: aiohttp.ClientResponse, answer: Answer) -> None:
    async for line in response.content:
        if not line.startswith(b"data:"):
            continue
        if line.strip() == b"data: [DONE]":
            return
        event = json.loads(line[5:])
        if "error" in event:
            answer.problem = event["error"]["message"]
            return
        answer.times.append(time.monotonic())
        _take(event, answer)
    answer.problem = "the stream ended without [DONE]"


def _take(event: dict[str, Any], answer: Answer) -> None:
    for choice in event["choices"]:
        answer.tokens += choice.get("token_ids") or []
    if event.get("usage"):
        answer.usage = event["usage"]["completion_tokens"]


class House:
    """The server under test, and its processes."""

    def __init__(self, server: Groundswell, rng: random.Random) -> None:
        self.url, self._rng = server.url, rng
        ids = {p.environ().get(RUN_ID) for p in server.processes()} - {None}
        self.run_id = str(next(iter(ids)))

    def victim(self, fault: str) -> tuple[psutil.Process, int, list[psutil.Process]]:
        """Choose whom a fault hits: the process, its signal, and all that end by it."""
        candidates, number = {
            "actor": (engines, signal.SIGKILL),
            "core": (cores, signal.SIGKILL),
            "worker": (workers, signal.SIGKILL),
            "hang": (cores, signal.SIGSTOP),
            "silence": (engines, signal.SIGSTOP),
            "router": (routers, signal.SIGKILL),
        }[fault]
        victim = self._rng.choice(candidates(self.run_id))
        replicas = [each for each in victim.parents() if any("ServeReplica:" in word for word in each.cmdline())]
        return victim, number, [victim, *replicas]

    async def whole(self, since: float, victims: Sequence[psutil.Process] = ()) -> float:
        """Wait until those are gone and the Router knows all engines; return how long that took."""
        while time.monotonic() - since < BACK_WITHIN_S:
            if not any(map(is_alive, victims)) and await asyncio.to_thread(self._engines) == ENGINES == len(
                cores(self.run_id)
            ):
                return time.monotonic() - since
            await asyncio.sleep(0.5)
        raise NotBack(f"not whole again within {BACK_WITHIN_S:.0f} s")

    def _engines(self) -> int:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as response:
                return int(json.load(response)["replicas"][MODEL_NAME])
        except (OSError, ValueError, KeyError):
            return 0

    def gap(self, prompt: str, said: Sequence[int], one: int, other: int) -> float:
        """Return how much likelier, in nats, the engine finds one token than another after a prompt and an answer."""
        asked = self._post("/tokenize", {"model": MODEL_NAME, "prompt": prompt})["tokens"]
        body = {"prompt": [*asked, *said], "max_tokens": 1, "temperature": 0, "logprobs": 5}
        answer = self._post("/v1/completions", {**body, "model": MODEL_NAME, "return_tokens_as_token_ids": True})
        (likely,) = answer["choices"][0]["logprobs"]["top_logprobs"]
        return float(likely.get(f"token_id:{one}", -100.0) - likely.get(f"token_id:{other}", -100.0))

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)

    def recovered(self) -> Counter[str]:
        """Return how many requests were continued and restarted so far, by the Router's own count."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=20) as response:
            text = response.read().decode()
        found: Counter[str] = Counter()
        for line in text.splitlines():
            if line.startswith("ray_groundswell_fleet_recovered_requests_total{") and (
                how := re.search(r'how="(\w+)"', line)
            ):
                found[how[1]] += int(float(line.rsplit(" ", 1)[1]))
        return found


class Strike:
    """Breaks one thing when it is called, at once: who it is has been looked up before, which takes its time.

    Attributes:
        victim: The process it hits.
        lost: All that end by it.
    """

    def __init__(self, house: House, fault: str) -> None:
        self.victim, self._signal, self.lost = house.victim(fault)

    def __call__(self) -> None:
        self.victim.send_signal(self._signal)


async def load(
    url: str, asked: Sequence[str], tokens: int, plain: int, wait_for: int, then: Callable[[], None]
) -> tuple[list[Answer], list[Answer], float]:
    """Ask everything at once, the last `plain` prompts without streaming; call `then` when all streams have begun.

    Returns:
        All answers; those that were under way when `then` was called; that moment.
    """
    answers = [Answer() for _ in asked]
    streams = answers[: len(asked) - plain]
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=ANSWERED_WITHIN_S)
    ) as session:
        jobs = [
            asyncio.create_task(ask(session, url, prompt, tokens, i < len(streams), answer))
            for i, (prompt, answer) in enumerate(zip(asked, answers, strict=True))
        ]
        while any(len(a.tokens) < wait_for and not a.done for a in streams):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        under_way = [answer for answer in answers if not answer.done]
        moment = time.monotonic()
        then()
        await asyncio.gather(*jobs)
    return answers, under_way, moment


def judge(
    row: Row,
    answers: Sequence[Answer],
    undisturbed: Sequence[Answer],
    moment: float,
    gap: Callable[[int, int, int, int], float],
) -> None:
    """Add what clients got to a row.

    `gap(index, place, one, other)` returns how much likelier, in nats, the engine finds one token than another, behind
    the first `place` undisturbed tokens of the answer with that index.
    """
    for index, (answer, model) in enumerate(zip(answers, undisturbed, strict=True)):
        if answer.status not in (0, 200):
            row.refused += 1
        elif answer.problem is not None:
            row.broken += 1
            row.error_after_s = max(row.error_after_s, answer.times[-1] - moment)
        else:
            place = parting(answer, model)
            whole = len(answer.tokens) == len(model.tokens) and answer.usage == model.usage
            if whole and place < len(model.tokens):
                tie = abs(gap(index, place, model.tokens[place], answer.tokens[place])) < TIE_NATS
                row.ties += tie
                row.tokens_off += 0 if tie else off(answer, model)
            else:
                row.tokens_off += off(answer, model)
            if len(answer.times) > 2:  # a plain answer comes at once, however long that takes
                pauses = [b - a for a, b in zip(answer.times, answer.times[1:], strict=False) if b > moment]
                row.longest_pause_s = max([row.longest_pause_s, *pauses])


def off(answer: Answer, model: Answer) -> int:
    """Return how many tokens of a whole answer are not as they were undisturbed, `usage` included."""
    same = parting(answer, model)
    return max(len(answer.tokens), len(model.tokens)) - same + abs(answer.usage - model.usage)


def parting(answer: Answer, model: Answer) -> int:
    """Return how many tokens two answers have in common at their beginning."""
    pairs = enumerate(zip(answer.tokens, model.tokens, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(answer.tokens), len(model.tokens)))


async def run(
    house: House, faults: Sequence[str], clients: int, tokens: int, say: Callable[[str], None]
) -> dict[str, Row]:
    """Ask undisturbed, then break one thing after the other, always under load and always from a whole house."""
    rows: dict[str, Row] = {}
    asked = prompts(clients, seed=1)
    plain = clients // 4
    await house.whole(time.monotonic())
    undisturbed, _, _ = await load(house.url, asked, tokens, plain, 0, lambda: None)
    again, _, _ = await load(house.url, asked, tokens, plain, 0, lambda: None)
    lost = [answer.problem for answer in [*undisturbed, *again] if answer.problem]
    if lost:
        raise NotBack(f"undisturbed requests failed: {lost[0]}")
    say(f"undisturbed, twice: {sum(off(a, b) for a, b in zip(again, undisturbed, strict=True))} tokens differ")
    for number, fault in enumerate(faults, 1):
        row = rows.setdefault(fault, Row())
        before = await asyncio.to_thread(house.recovered)
        strike = Strike(house, fault)
        answers, under_way, moment = await load(
            house.url,
            asked,
            tokens,
            plain,
            tokens // 20,
            strike,
        )
        row.injected += 1
        row.in_flight += len(under_way)
        if fault == "silence":  # it would wake up, or be replaced after three health checks of 30 s
            strike.victim.kill()
        row.whole_again_s = max(row.whole_again_s, await house.whole(moment, strike.lost))

        def gap(index: int, place: int, one: int, other: int) -> float:
            nats = house.gap(asked[index], undisturbed[index].tokens[:place], one, other)
            say(f"answer {index} parts after {place} tokens, where the two tokens are {nats:.6f} nats apart")
            return nats

        judge(row, answers, undisturbed, moment, gap)
        if fault != "router":  # which takes its counts with it
            gained = await _gained(house, before)
            row.continued += gained["continued"]
            row.restarted += gained["restarted"]
        problems = [answer.problem for answer in answers if answer.problem]
        say(f"{number:3} of {len(faults)}  {fault:8} {asdict(row)} {problems[:1] or ''}")
    return rows


async def _gained(house: House, before: Counter[str]) -> Counter[str]:
    """Return the requests recovered since, once their number is known and has stopped growing."""
    since, gained = time.monotonic(), Counter[str]()
    while time.monotonic() - since < METRICS_LAG_S:
        await asyncio.sleep(METRICS_LAG_S / 4)
        now = await asyncio.to_thread(house.recovered) - before
        if gained and now == gained:
            break
        gained = now
    return gained


def table(rows: dict[str, Row]) -> str:
    """Return the rows as Markdown."""
    head = (
        "| fault | injected | in flight | continued | restarted | refused | broken | tokens off | ties "
        "| longest pause, s | error after, s | whole again, s |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
    )
    lines = [
        f"| {fault} | {r.injected} | {r.in_flight} | {r.continued} | {r.restarted} | {r.refused} | {r.broken} "
        f"| {r.tokens_off} | {r.ties} | {r.longest_pause_s:.1f} | {f'{r.error_after_s:.1f}' if r.broken else ''} "
        f"| {r.whole_again_s:.0f} |"
        for fault, r in rows.items()
    ]
    return "\n".join([head, *lines])


def good(rows: dict[str, Row]) -> bool:
    """Whether nothing was lost but what a Router's death must lose."""
    return all(
        row.tokens_off == 0 and row.refused == 0 and (row.broken == 0 or fault == "router")
        for fault, row in rows.items()
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 1 if a request was lost that should not have been."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description="Break things under load.")
    parser.add_argument("--quick", action="store_true", help="each fault once")
    parser.add_argument("--faults", help="which, separated by commas")
    parser.add_argument("--clients", type=int, default=16, help="requests at once, a quarter of them without streaming")
    parser.add_argument("--tokens", type=int, default=1200, help="of each answer")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of victims")
    console.add_json(parser)
    given = parser.parse_args(arguments)
    faults = tuple(given.faults.split(",")) if given.faults else QUICK if given.quick else FULL
    console.stop_in_order()
    model = ROOT / "models" / "tiny-random"
    make_model(model)
    with tempfile.TemporaryDirectory(prefix="groundswell-chaos-") as folder:
        server = Groundswell(
            settings(model, gpu=has_cuda_build()), Path(folder), engines=ENGINES, fleet={"engine_stall_timeout_s": 10}
        )
        try:
            server.start()
            console.say(f"ready after {server.startup_s:.0f} s")
            house = House(server, random.Random(given.seed))
            rows = asyncio.run(run(house, faults, given.clients, given.tokens, console.say))
        except (ServerError, NotBack) as problem:
            print(f"chaos: {problem}", file=sys.stderr)
            return 1
        finally:
            server.stop()
    console.say(f"\n{table(rows)}")
    console.report({fault: asdict(row) for fault, row in rows.items()}, given.json)
    return 0 if good(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
