"""Real engines that are killed or stopped in mid-answer: clients get what they would have got, token for token.

Two replicas, one Router, greedy decoding in float32. `make chaos` does the same at length, and counts.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import psutil
import pytest
import requests
import yaml

from benchmarks import chaos
from benchmarks.replicas import cores, engines, workers
from deployments.launch.processes import is_alive
from models import tiny_random
from tests.e2e.greedy import TOKENS, Answer, assert_undisturbed, plain, stream, until_begun
from tests.e2e.serving import ROOT, Served, serving, wait_for

LIMIT_S = 240
STREAMS = 6
PROMPTS = [f"{number} boats lie in the harbour and wait for the wind" for number in range(STREAMS + 1)]


class Fleet:
    """Two engines behind one Router, and clients of theirs."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.url = f"http://127.0.0.1:{served.port}"

    def answers(self, then: Callable[[], None] = lambda: None) -> list[Answer]:
        """Ask all prompts at once, the last one without streaming; call `then` once all streams have begun."""
        begun = [Event() for _ in PROMPTS[:-1]]
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            streams = [pool.submit(stream, self.url, *each) for each in zip(PROMPTS[:-1], begun, strict=True)]
            last = pool.submit(plain, self.url, PROMPTS[-1])
            for event, answer in zip(begun, streams, strict=True):
                until_begun(event, answer)
            then()
            return [answer.result() for answer in [*streams, last]]

    def moved(self) -> int:
        """Return how many requests the Router has continued or restarted at another engine."""
        return sum(chaos.counts(requests.get(f"{self.url}/metrics", timeout=30).text).values())

    def wait_for_both(self) -> None:
        def both() -> bool:
            known = requests.get(f"{self.url}/health", timeout=30).json()["replicas"]["tiny"]
            return bool(known == 2 == len(engines(self.served.run_id)) == len(cores(self.served.run_id)))

        wait_for(both, "both engines are there", LIMIT_S)


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
    hit, moved = victims(fleet.served.run_id)[0], fleet.moved()
    try:
        assert_undisturbed(fleet.url, PROMPTS, fleet.answers(then=lambda: hit.send_signal(by)), undisturbed)
        wait_for(lambda: fleet.moved() > moved, "an answer was on that engine")
    finally:
        if by == signal.SIGSTOP:
            with contextlib.suppress(psutil.NoSuchProcess):  # Serve may have replaced it by now
                hit.kill()
    wait_for(lambda: not is_alive(hit), "it has ended", 60)
