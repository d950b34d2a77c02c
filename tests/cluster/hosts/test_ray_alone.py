"""What the app takes from Ray on several nodes, without the app: who may join, and a head that may die and return."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.cluster.hosts import cluster, machines
from tests.cluster.hosts.cluster import Cluster, ray_start

LIMIT_S = 240
ACTOR = """
@ray.remote(lifetime="detached", name="worker", num_cpus=1)
class Worker:
    def where(self):
        return os.getpid(), ray.util.get_node_ip_address()
"""

why_not = machines.missing() or cluster.missing()
pytestmark = pytest.mark.skipif(why_not is not None, reason=f"no hosts on this machine: {why_not}")


@pytest.fixture(scope="module")
def running() -> Iterator[Cluster]:
    with machines.hosts() as hosts, cluster.cluster(hosts, workers=("w1",)) as made:
        yield made


def driver(running: Cluster, code: str) -> str:
    """Run a driver on the worker; return the last line it prints."""
    program = f"import os, ray\nray.init('{running.gcs}', namespace='test', log_to_driver=False)\n{code}"
    done = running.hosts["w1"].run(sys.executable, "-c", program, limit_s=LIMIT_S)
    assert done.returncode == 0, done.stdout
    return done.stdout.strip().splitlines()[-1]


def test_whoever_lacks_the_token_can_neither_join_nor_run_nor_look(running: Cluster) -> None:
    stranger = running.boot("stranger")
    node = [*ray_start(stranger), "--address", running.gcs]
    program = [sys.executable, "-c", f"import ray; ray.init('{running.gcs}')"]
    briefly = {"RAY_NUM_REDIS_GET_RETRIES": "2"}
    tokens = [briefly | {"RAY_AUTH_MODE": "disabled"}, briefly | {"RAY_AUTH_TOKEN": "0" * 64}]  # none, and a wrong one
    tried = [
        stranger.start(*what, environment=token, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for what in (node, program)
        for token in tokens
    ]
    for process in tried:
        output, _ = process.communicate(timeout=LIMIT_S)
        assert process.returncode != 0 and "Authentication token is missing or incorrect" in output, output
    assert running.nodes() == {running.hosts[name].address: "ALIVE" for name in ("head", "w1")}
    codes = {token: running.ask_dashboard("/api/serve/applications/", token).status_code for token in (None, "0" * 64)}
    assert codes == {None: 401, "0" * 64: 403}


def test_what_runs_on_a_worker_outlives_the_head_and_is_found_when_the_head_returns(running: Cluster) -> None:
    before = driver(running, f"{ACTOR}print(ray.get(Worker.remote().where.remote()))")
    assert running.hosts["w1"].address in before, "Ray tells a replica its node's own address"
    running.hosts["head"].kill()
    running.start_head()
    assert driver(running, "print(ray.get(ray.get_actor('worker').where.remote()))") == before
    assert set(running.nodes().values()) == {"ALIVE"}
