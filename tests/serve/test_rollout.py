"""A new configuration is deployed while streams run: the old replicas finish theirs, and nothing is refused."""

from __future__ import annotations

import contextlib
import copy
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import psutil

from benchmarks import chaos
from tests.e2e.serving import ROOT, wait_for
from tests.serve.conftest import LIMIT_S, Stubs
from tests.serve.test_fleet_of_stubs import events, words

CLIENTS = 6
FEW_CLIENTS = 4
"""For whom there is room while no engine has joined yet: `MAX_QUEUED`."""
TOKENS = 250
"""Five seconds of them: many streams begin and end while replicas are replaced."""

_GCS = "--gcs-address="
_DEPLOY = """
import json, sys, ray
from ray.serve.context import _connect
from ray.serve.schema import ServeDeploySchema
ray.init(address=sys.argv[1], namespace="serve", log_to_driver=False)
_connect().deploy_apps(ServeDeploySchema.model_validate(json.loads(sys.argv[2])))
"""


def arguments(stubs: Stubs) -> Iterator[str]:
    for process in stubs.served.members():
        with contextlib.suppress(psutil.NoSuchProcess):  # of an earlier rollout, it has just ended
            yield from process.cmdline()


def deploy(stubs: Stubs, config: object) -> None:
    """Do as `serve deploy` does, to the cluster of a `groundswell serve`."""
    driver = psutil.Process(stubs.served.process.pid).children()[0]
    environment = driver.environ()
    address = next(a.removeprefix(_GCS) for a in arguments(stubs) if a.startswith(_GCS))
    subprocess.run(
        [sys.executable, "-c", _DEPLOY, address, json.dumps(config)],
        check=True,
        env=environment,
        cwd=ROOT,
        timeout=LIMIT_S,
    )


def rolled_out(stubs: Stubs, clients: int, deployment: dict[str, Any], token_s: float) -> None:
    """Deploy a new configuration of the model `pair` under load, until all engines are new; nothing may be lost."""
    stubs.wait_for_engines("pair", 2)
    before = set(stubs.notes("pair"))
    done = Event()
    served: list[str] = []

    def client(_: int) -> list[str]:
        lost = []
        while not done.is_set():
            answer = stubs.ask("pair", tokens=TOKENS, stream=True)
            said = list(events(answer)) if answer.status_code == 200 else [answer.text]
            if said[-1] != "[DONE]" or said[-2]["usage"]["completion_tokens"] != TOKENS:
                lost.append(str(said[-2:])[:500])
            else:
                served.append(words(said))
        return lost

    with ThreadPoolExecutor(clients) as pool:
        asking = pool.map(client, range(clients))
        try:
            deploy(stubs, changed(stubs, deployment, token_s))
            wait_for(
                lambda: before.isdisjoint(stubs.notes("pair")) and len(stubs.notes("pair")) == 2,
                "all engines are new",
                limit_s=4 * LIMIT_S,
            )
            time.sleep(2)  # and some more requests for the new ones alone
        finally:
            done.set()
        assert [lost for each in asking for lost in each] == []
    assert len(served) > clients
    assert len(set(served)) == 1


def changed(stubs: Stubs, deployment: dict[str, Any], token_s: float) -> dict[str, Any]:
    """Return the configuration with other Serve options and another pace for the model `pair`."""
    config = copy.deepcopy(stubs.config)
    (pair,) = [m for m in config["applications"][0]["args"]["app"]["models"] if m["name"] == "pair"]
    pair["deployment"] |= deployment
    pair["env"]["STUB_TOKEN_S"] = str(token_s)
    return config


def recovered(stubs: Stubs) -> int:
    """Return how many requests Routers have continued or restarted."""
    return sum(chaos.counts(stubs.get("/metrics").text).values())


def test_a_new_configuration_under_load_loses_nothing(stubs: Stubs) -> None:
    rolled_out(stubs, CLIENTS, {}, 0.021)


def test_where_no_gpu_is_spare_old_engines_go_first_and_their_streams_go_on_at_others(stubs: Stubs) -> None:
    """Old replicas keep to the grace they were started with, so the first rollout only brings some with a short one."""
    no_spare = {"max_surge_percent": 0, "graceful_shutdown_timeout_s": 1}
    rolled_out(stubs, FEW_CLIENTS, no_spare, 0.022)
    before = recovered(stubs)
    rolled_out(stubs, FEW_CLIENTS, no_spare, 0.023)
    wait_for(lambda: recovered(stubs) > before, "streams that outlasted the grace have moved", limit_s=LIMIT_S)
