"""A Router that dies: its clients hear of it at once, its engines stop working for it, and nobody else notices."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import requests

from benchmarks.replicas import replicas
from tests.e2e.serving import wait_for
from tests.serve.conftest import ROUTERS, Stubs
from tests.serve.test_fleet_of_stubs import events

STREAMS = 8
SOME = 200
"""Four seconds of tokens."""


def goes_on(said: Iterator[Any]) -> bool:
    """Read a while; return whether the stream still lives."""
    try:
        heard = list(islice(said, SOME))
    except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError):
        return False
    return len(heard) == SOME and all("error" not in event for event in heard)


def test_only_its_own_clients_lose_their_streams_and_engines_drop_its_requests(stubs: Stubs) -> None:
    stubs.wait_for_engines("pair", 2)
    answers = [stubs.ask("pair", tokens=4000, stream=True) for _ in range(STREAMS)]
    streams = [events(answer) for answer in answers]
    for said in streams:
        next(said)
    routers = replicas(stubs.served.run_id, "Router", app="stubs")
    assert len(routers) == ROUTERS
    routers[0].kill()
    with ThreadPoolExecutor(STREAMS) as pool:
        alive = list(pool.map(goes_on, streams))
    assert 0 < sum(alive) < STREAMS
    wait_for(lambda: stubs.running("pair") == sum(alive), "engines have dropped what the dead Router asked", limit_s=30)
    assert stubs.ask("pair").status_code == 200
    for answer in answers:
        answer.close()
    wait_for(lambda: stubs.running("pair") == 0, "all places are free again")
    wait_for(lambda: len(replicas(stubs.served.run_id, "Router", app="stubs")) == ROUTERS, "another Router starts")
