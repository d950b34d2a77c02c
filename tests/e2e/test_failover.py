"""Real engines that are killed or stopped in mid-answer: clients get what they would have got, token for token.

Two replicas, one Router, greedy decoding in float32. `make chaos` does the same at length, and counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import psutil
import pytest
import requests
import yaml

from benchmarks.replicas import cores, engines, workers
from deployments.launch.processes import is_alive
from models import tiny_random
from tests.e2e.serving import ROOT, Served, serving, wait_for

LIMIT_S = 240
STREAMS = 6
TOKENS = 200
BEGUN = 20
PROMPTS = [f"{number} boats lie in the harbour and wait for the wind" for number in range(STREAMS + 1)]


@dataclass(frozen=True)
class Answer:
    """What a client must get, however it gets it."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: str | None
    usage: dict[str, int]


def body(prompt: str, stream: bool) -> dict[str, Any]:
    asked: dict[str, Any] = {"model": "tiny", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
    asked |= {"ignore_eos": True, "stream": stream, "return_token_ids": True}
    return asked | ({"stream_options": {"include_usage": True}} if stream else {})


class Fleet:
    """Two engines behind one Router, and clients of theirs."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.url = f"http://127.0.0.1:{served.port}"

    def stream(self, prompt: str, begun: Event) -> Answer:
        """Read a stream to its end; set `begun` after some tokens."""
        text, tokens, reason, usage = "", [], None, {}
        with requests.post(
            f"{self.url}/v1/completions", json=body(prompt, True), stream=True, timeout=LIMIT_S
        ) as answer:
            assert answer.status_code == 200
            last = ""
            for line in answer.iter_lines():
                if not line.startswith(b"data: "):
                    continue
                last = line.removeprefix(b"data: ").decode()
                if last == "[DONE]":
                    break
                event = json.loads(last)
                assert "error" not in event, event
                usage = event.get("usage") or usage
                for choice in event["choices"]:
                    text += choice["text"]
                    tokens += choice.get("token_ids") or []
                    reason = choice["finish_reason"] or reason
                if len(tokens) >= BEGUN:
                    begun.set()
            assert last == "[DONE]"
        return Answer(text, tuple(tokens), reason, counted(usage))

    def plain(self, prompt: str) -> Answer:
        answer = requests.post(f"{self.url}/v1/completions", json=body(prompt, False), timeout=LIMIT_S).json()
        (choice,) = answer["choices"]
        return Answer(choice["text"], tuple(choice["token_ids"]), choice["finish_reason"], counted(answer["usage"]))

    def answers(self, then: Callable[[], None] = lambda: None) -> list[Answer]:
        """Ask all prompts at once, the last one without streaming; call `then` once all streams have begun."""
        begun = [Event() for _ in PROMPTS[:-1]]
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            asked: list[Future[Answer]] = [
                pool.submit(self.stream, prompt, event) for prompt, event in zip(PROMPTS[:-1], begun, strict=True)
            ]
            asked.append(pool.submit(self.plain, PROMPTS[-1]))
            for event in begun:
                assert event.wait(LIMIT_S)
            then()
            return [answer.result() for answer in asked]

    def wait_for_both(self) -> None:
        def both() -> bool:
            known = requests.get(f"{self.url}/health", timeout=30).json()["replicas"]["tiny"]
            return bool(known == 2 == len(engines(self.served.run_id)) == len(cores(self.served.run_id)))

        wait_for(both, "both engines are there", LIMIT_S)


def counted(usage: dict[str, Any]) -> dict[str, int]:
    return {key: usage[key] for key in ("prompt_tokens", "completion_tokens", "total_tokens")}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("failover")
    tiny_random.write(folder / "model")
    engine_args = {"model": str(folder / "model"), "dtype": "float32", "max_model_len": 1024, "enforce_eager": True}
    engine_args["distributed_executor_backend"] = "mp"  # a Worker to kill: on a CPU there would be none
    model = {"name": "tiny", "engine_args": engine_args, "deployment": {"num_replicas": 2}}
    router = {
        "deployment": {"num_replicas": 1},
        "fleet": {"engine_stall_timeout_s": 10, "heartbeat_timeout_s": 10},
    }
    application = {
        "name": "groundswell",
        "route_prefix": "/",
        "import_path": "deployments.app:build",
        "args": {"models": [model], "router": router},
    }
    config = Path(folder / "config.yaml")
    config.write_text(yaml.safe_dump({"applications": [application]}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])))
        with serving(config, tmp_path_factory.mktemp("state")) as served:
            yield Fleet(served)


@pytest.fixture(scope="module")
def undisturbed(fleet: Fleet) -> list[Answer]:
    answers = fleet.answers()
    assert all(len(answer.tokens) == TOKENS for answer in answers)
    assert len({answer.tokens for answer in answers}) == len(PROMPTS), "no answer could be taken for another"
    return answers


@pytest.mark.parametrize(
    ("victims", "by"),
    [
        (engines, signal.SIGKILL),
        (cores, signal.SIGKILL),
        (workers, signal.SIGKILL),
        (cores, signal.SIGSTOP),  # it hangs, and its replica's heartbeats say so
        (engines, signal.SIGSTOP),  # no heartbeat any more
    ],
    ids=["replica", "engine-core", "worker", "hang", "silence"],
)
def test_an_engine_that_is_lost_in_mid_answer_costs_nobody_a_token(
    fleet: Fleet, undisturbed: list[Answer], victims: Callable[[str], list[psutil.Process]], by: signal.Signals
) -> None:
    fleet.wait_for_both()
    hit = victims(fleet.served.run_id)[0]
    try:
        assert fleet.answers(then=lambda: hit.send_signal(by)) == undisturbed
    finally:
        if by == signal.SIGSTOP:
            with contextlib.suppress(psutil.NoSuchProcess):  # Serve may have replaced it by now
                hit.kill()
    wait_for(lambda: not is_alive(hit), "it has ended", 60)
