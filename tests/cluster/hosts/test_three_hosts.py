"""The app on three hosts with addresses of their own: a head and two workers, a Router and HAProxy on each.

The order of the tests is that of a cluster's bad week: a cable is pulled, a worker dies, another joins, the head dies
and returns. Answers are greedy in float32, and compared token for token with undisturbed ones; where an answer moved, a
prompt is computed in other shapes than single tokens, and may part from the other at two that are equally likely.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
import requests

from tests.cluster.hosts import cluster, machines
from tests.cluster.hosts.cluster import Cluster
from tests.e2e.greedy import LIMIT_S, TOKENS, Answer, assert_undisturbed, stream, until_begun
from tests.e2e.serving import wait_for

PROMPTS = [f"{number} boats lie in the harbour and wait for the wind" for number in range(6)]
LATE = [f"{number} birds sit on the wall and look at the boats" for number in range(4)]
"""Asked when an engine has been lost and nobody knows it yet."""
IN_A_ROW = 8

why_not = machines.missing() or cluster.missing()
pytestmark = pytest.mark.skipif(why_not is not None, reason=f"no hosts on this machine: {why_not}")


class Clients:
    """Ask the cluster at chosen hosts."""

    def __init__(self, running: Cluster) -> None:
        self.cluster = running
        self.headers = {"authorization": f"Bearer {running.key}"}

    def get(self, host: str, path: str) -> requests.Response:
        return requests.get(self.cluster.url(host) + path, headers=self.headers, timeout=30)

    def stream(self, host: str, prompt: str, begun: Event | None = None) -> Answer:
        """Read a stream that comes in at `host` to its end; set `begun` after some tokens."""
        return stream(self.cluster.url(host), prompt, begun, headers=self.headers)

    def answers(self, at: Sequence[str], then: Callable[[], None] = lambda: None) -> list[Answer]:
        """Ask all prompts at once, at these hosts in turn; once they have begun call `then`, and ask the late ones."""
        begun = [Event() for _ in PROMPTS]
        with ThreadPoolExecutor(len(PROMPTS) + len(LATE)) as pool:
            asked = [pool.submit(self.stream, at[i % len(at)], PROMPTS[i], begun[i]) for i in range(len(PROMPTS))]
            for event, answer in zip(begun, asked, strict=True):
                until_begun(event, answer)
            then()
            asked += [pool.submit(self.stream, at[i % len(at)], LATE[i]) for i in range(len(LATE))]
            return [answer.result() for answer in asked]

    def same_answers(
        self, undisturbed: list[Answer], at: Sequence[str], then: Callable[[], None] = lambda: None
    ) -> list[Answer]:
        """Ask all prompts, and assert that the answers are the undisturbed ones, or part from them at a tie."""
        answers = self.answers(at, then)
        url = self.cluster.url(at[0])
        assert_undisturbed(url, [*PROMPTS, *LATE], answers, undisturbed, headers=self.headers)
        return answers

    def engines(self, host: str) -> int:
        """Return how many engines the Router on `host` has on its token channel."""
        try:
            return int(self.get(host, "/health").json()["replicas"]["tiny"])
        except (requests.RequestException, ValueError, KeyError):  # nobody listens, or Serve answers for a Router
            return 0

    def moved(self, *at: str) -> float:
        """Return how many requests the Routers on these hosts have moved away from an engine."""
        lines = [line for host in at for line in self.get(host, "/metrics").text.splitlines()]
        return sum(float(li.split()[-1]) for li in lines if li.startswith("ray_groundswell_fleet_recovered_requests"))

    def connected(self, host: str) -> list[float]:
        """Return how many engines each Router on `host` has on its channel, as Ray exports it there."""
        lines = self.get(host, "/metrics").text.splitlines()
        return [float(li.split()[-1]) for li in lines if li.startswith("ray_groundswell_channel_connected_engines{")]

    def wait_for_engines(self, number: int, *at: str) -> None:
        wait_for(lambda: all(self.engines(host) == number for host in at), f"{number} engines at {at}", LIMIT_S)

    def wait_for_own_routers(self, *at: str) -> None:
        """Wait until what comes in at these hosts goes to the Router there: another is lost with its own host."""
        in_a_row = 0

        def own() -> bool:
            nonlocal in_a_row
            in_a_row = in_a_row + 1 if all(self._answers_itself(host) for host in at) else 0
            return in_a_row >= IN_A_ROW

        wait_for(own, f"HAProxy at {at} has found its own node's Router", LIMIT_S)

    def _answers_itself(self, host: str) -> bool:
        try:
            text = self.get(host, "/metrics").text  # of the node whose Router answers
        except requests.RequestException:
            return False
        return set(re.findall(r'NodeAddress="([^"]+)"', text)) == {self.cluster.hosts[host].address}


@pytest.fixture(scope="module")
def running() -> Iterator[Cluster]:
    with machines.hosts() as hosts, cluster.cluster(hosts, workers=("w1", "w2")) as made:
        yield made


@pytest.fixture(scope="module")
def clients(running: Cluster) -> Clients:
    running.deploy()
    wait_for(running.is_up, "the app runs", LIMIT_S)
    made = Clients(running)
    made.wait_for_engines(2, "head", "w1", "w2")
    made.wait_for_own_routers("head", "w1", "w2")
    return made


@pytest.fixture(scope="module")
def undisturbed(clients: Clients) -> list[Answer]:
    answers = clients.answers(["head"])
    assert all(len(answer.tokens) == TOKENS for answer in answers)
    assert len({answer.tokens for answer in answers}) == len(answers), "no answer could be taken for another"
    return answers


def test_engines_are_on_both_workers_and_a_router_and_haproxy_on_each_node(running: Cluster, clients: Clients) -> None:
    assert running.replicas("Engine-tiny").keys() == {"w1", "w2"}
    assert running.replicas("Router").keys() == {"head", "w1", "w2"}
    wait_for(lambda: running.proxies() == {"head", "w1", "w2"}, "HAProxy is on each node", LIMIT_S)


def test_a_request_that_comes_in_at_any_node_is_served_by_engines_on_others(
    clients: Clients, undisturbed: list[Answer]
) -> None:
    for host in ("head", "w1", "w2"):
        assert requests.get(clients.cluster.url(host) + "/v1/models", timeout=30).status_code == 401
        clients.same_answers(undisturbed, [host])
    # No engine is on the head: what came in there was answered over the network, and not in one piece.
    wait_for(lambda: clients.connected("head") == [2], "the head's metrics show its Router both engines", LIMIT_S)
    begun, whole = Event(), Event()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(clients.stream, "head", PROMPTS[0], begun)
        asked.add_done_callback(lambda _: whole.set())
        assert begun.wait(LIMIT_S) and not whole.is_set()


def test_a_worker_that_is_cut_off_in_mid_answer_costs_nobody_a_token_and_takes_requests_again(
    running: Cluster, clients: Clients, undisturbed: list[Answer]
) -> None:
    before, worker = running.replicas("Engine-tiny"), running.hosts["w2"]
    try:
        answers = clients.same_answers(undisturbed, ["head", "w1"], then=worker.cut_off)
    finally:
        worker.plug_in_again()
    begun, late = answers[: len(PROMPTS)], answers[len(PROMPTS) :]
    assert max(a.pause_s for a in begun) > 5 and max(a.pause_s for a in late) > 5, "or none was on that worker"
    clients.wait_for_engines(2, "head", "w1", "w2")
    assert running.replicas("Engine-tiny") == before, "nothing was started anew"


def test_a_worker_that_dies_in_mid_answer_costs_nobody_a_token(
    running: Cluster, clients: Clients, undisturbed: list[Answer]
) -> None:
    moved = clients.moved("head", "w1")
    clients.same_answers(undisturbed, ["head", "w1"], then=running.hosts["w2"].kill)
    wait_for(lambda: clients.moved("head", "w1") > moved, "a request was on that worker")
    clients.same_answers(undisturbed, ["head", "w1"])


def test_a_worker_that_joins_gets_an_engine_a_router_and_haproxy(
    running: Cluster, clients: Clients, undisturbed: list[Answer]
) -> None:
    running.start_worker("w3")
    wait_for(lambda: running.replicas("Engine-tiny").keys() == {"w1", "w3"}, "it has an engine", LIMIT_S)
    wait_for(lambda: running.replicas("Router").keys() == {"head", "w1", "w3"}, "it has a Router", LIMIT_S)
    clients.wait_for_engines(2, "head", "w1", "w3")
    clients.wait_for_own_routers("head", "w1", "w3")
    clients.same_answers(undisturbed, ["w3"])
    assert running.nodes()[running.hosts["w2"].address] == "DEAD"


def test_while_the_head_is_gone_workers_serve_and_it_finds_them_when_it_returns(
    running: Cluster, clients: Clients, undisturbed: list[Answer]
) -> None:
    engines = running.replicas("Engine-tiny")
    clients.same_answers(undisturbed, ["w1", "w3"], then=running.hosts["head"].kill)
    gone = time.monotonic()
    while time.monotonic() - gone < 20:
        clients.same_answers(undisturbed, ["w1", "w3"])
    running.start_head()
    wait_for(
        lambda: running.is_up() and running.replicas("Router").keys() == {"head", "w1", "w3"},
        "the head has taken the app over",
        LIMIT_S,
    )
    assert running.replicas("Engine-tiny") == engines, "no engine was started anew"
    clients.wait_for_engines(2, "head", "w1", "w3")
    clients.same_answers(undisturbed, ["head", "w1", "w3"])
