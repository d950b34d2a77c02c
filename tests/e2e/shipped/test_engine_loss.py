"""An engine that dies takes nothing with it: not its processes' memory, not the server, not the next request."""

from __future__ import annotations

from typing import Any

import requests

from benchmarks.replicas import cores, engines, workers
from deployments.launch.processes import is_alive
from tests.e2e.serving import Served, wait_for

REPLACED_WITHIN_S = 240
ASK: dict[str, Any] = {
    "model": "groundling",
    "messages": [{"role": "user", "content": "Hello there"}],
    "max_tokens": 4,
}


def answers(served: Served) -> bool:
    reply = requests.post(f"http://127.0.0.1:{served.port}/v1/chat/completions", json=ASK, timeout=REPLACED_WITHIN_S)
    return reply.status_code == 200


def test_vllms_processes_do_not_outlive_killed_replicas_and_a_waiting_request_is_served(served: Served) -> None:
    def all_there() -> bool:
        return all(len(of(served.run_id)) == 2 for of in (engines, cores))

    wait_for(all_there, "two engines, each with an EngineCore", REPLACED_WITHIN_S)
    replicas, vllm = engines(served.run_id), cores(served.run_id)
    assert not workers(served.run_id), "on a CPU the model runs in EngineCore itself"
    for replica in replicas:
        replica.kill()
    wait_for(lambda: not any(map(is_alive, vllm)), "EngineCores are gone", 60)
    assert answers(served)


def test_a_replica_whose_engine_core_died_is_replaced(served: Served) -> None:
    wait_for(lambda: len(cores(served.run_id)) == 2, "both engines are back", REPLACED_WITHIN_S)
    core = cores(served.run_id)[0]
    replica = core.parent()
    assert replica is not None
    core.kill()
    wait_for(lambda: not is_alive(replica), "the replica has left", 60)
    assert answers(served)
