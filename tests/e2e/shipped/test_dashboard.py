"""The dashboard and the alerts over the running app, in a real Prometheus: what they ask for is there to be found."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests
import yaml

from tests.cluster.test_monitoring import MONITORING, dashboard, rules
from tests.e2e.serving import Served, free_port, wait_for

PROMETHEUS = shutil.which("prometheus")
LIMIT_S = 90
pytestmark = pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is in Debian's package of that name")

NOT_WHEN_ALL_IS_WELL = {
    "fleet_rejected_requests": "nothing was refused for overload",
    "fleet_engine_failures": "no engine failed",
    "fleet_recovered_requests": "so none had to be survived",
    "channel_lost_routers": "no Router was lost",
    "channel_aborted_streams": "so no stream with it",
    "channel_dropped_messages": "every message was wanted",
    "vllm_num_preemptions": "there is room for every prompt",
    'grounding_searches_total{model=~"$model",outcome="failed"}': "no search failed",
    "router_key_requests": "there are no keys",
    "router_key_tokens": "there are no keys",
    "router_refused_requests": "so nobody was refused for one",
    "node_gpus_utilization": "there may be no GPU",
}
"""Why these are not there. A counter is not before it counts."""

MAY_BE_ON = {"FirstTokensAreLate"}
"""They are, on a machine that is busy enough."""


class Asked:
    """A Prometheus that scrapes the app every few seconds."""

    def __init__(self, url: str) -> None:
        self._url = url

    def get(self, path: str, **parameters: str) -> Any:
        answer = requests.get(f"{self._url}/api/v1/{path}", params=parameters, timeout=30)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def is_up(self) -> bool:
        try:
            ready = requests.get(f"{self._url}/-/ready", timeout=30).status_code == 200
            return ready and bool(self.numbers('up{job="ray"} == 1'))
        except requests.ConnectionError:
            return False

    def numbers(self, query: str) -> list[float]:
        """Return the values of a query for all models, but for those that are not a number."""
        query = query.replace("$model", ".*").replace("$__rate_interval", "1m")
        values = [float(each["value"][1]) for each in self.get("query", query=query)["result"]]
        return [value for value in values if math.isfinite(value)]

    def alerts(self) -> dict[str, tuple[str, str]]:
        """Return health and state of each alert."""
        known = [rule for group in self.get("rules")["groups"] for rule in group["rules"]]
        return {rule["name"]: (rule["health"], rule["state"]) for rule in known}

    def names(self) -> set[str]:
        return set(self.get("label/__name__/values"))


@pytest.fixture(scope="module")
def prometheus(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    folder = tmp_path_factory.mktemp("prometheus")
    endpoint = re.search(r"http://(\S+)/metrics", served.output)
    assert endpoint is not None and PROMETHEUS is not None
    targets = folder / "targets.json"  # as Ray writes them on a cluster's head
    targets.write_text(json.dumps([{"labels": {"job": "ray"}, "targets": [endpoint[1]]}]))
    config = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "3s", "evaluation_interval": "3s"}
    config["rule_files"] = [str(MONITORING / name) for name in config["rule_files"]]
    config["scrape_configs"][0]["file_sd_configs"][0]["files"] = [str(targets)]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    options = [f"--config.file={folder / 'prometheus.yaml'}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [PROMETHEUS, *options, f"--web.listen-address={address}"], stdout=log, stderr=subprocess.STDOUT
        )
    try:
        asked = Asked(f"http://{address}")
        wait_for(asked.is_up, "Prometheus has scraped the app", LIMIT_S)
        yield asked
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def visit(served: Served) -> Callable[[], None]:
    """Return what a user does: asks, asks documents, asks for what is not there."""
    base = f"http://127.0.0.1:{served.port}/v1"

    def post(path: str, status: int = 200, **body: Any) -> Any:
        answer = requests.post(f"{base}/{path}", timeout=LIMIT_S, **body)
        assert answer.status_code == status, answer.text
        return answer.json()

    file = post("files", files={"file": ("tide.md", b"The tide turns at noon.")}, data={"purpose": "assistants"})
    store = post("vector_stores", json={"name": "tides", "file_ids": [file["id"]]})
    tool = {"type": "file_search", "vector_store_ids": [store["id"]], "max_num_results": 1}

    def visit() -> None:
        question = {"model": "groundling", "input": "When does the tide turn?", "max_output_tokens": 32}
        post("responses", json=question)
        post("responses", json={**question, "tools": [tool]})
        post("vector_stores", json={"name": "tides", "file_ids": [file["id"]]})
        post("responses", 404, json={**question, "model": "nobody"})

    return visit


def may_be_empty(query: str) -> bool:
    return any(f"_{name}" in query for name in NOT_WHEN_ALL_IS_WELL)


def test_every_panel_has_something_to_draw(prometheus: Asked, visit: Callable[[], None]) -> None:
    queries = {
        f"{panel['title']}: {target['expr']}": target["expr"]
        for panel in dashboard()["panels"]
        for target in panel.get("targets", [])
        if not may_be_empty(target["expr"])
    }
    deadline = time.monotonic() + LIMIT_S
    while True:  # a rate needs events between scrapes
        visit()
        empty = [title for title, query in queries.items() if not prometheus.numbers(query)]
        if not empty or time.monotonic() > deadline:
            break
    assert empty == []


def test_what_alerts_ask_for_is_there_and_none_of_them_is_on(prometheus: Asked, visit: Callable[[], None]) -> None:
    names = {name for rule in rules() for name in re.findall(r"\bray_[a-z_]+", rule["expr"]) if not may_be_empty(name)}
    visit()
    wait_for(lambda: names <= prometheus.names(), "all that alerts ask for has been scraped", LIMIT_S)
    assert prometheus.alerts().keys() == {rule["alert"] for rule in rules()}
    quiet = dict.fromkeys(prometheus.alerts().keys() - MAY_BE_ON, ("ok", "inactive"))
    # Not `pending` either, which most are for minutes before they fire. One may be for a moment: a file has just come.
    wait_for(lambda: quiet.items() <= prometheus.alerts().items(), "all alerts are evaluated, and none is on", LIMIT_S)


def test_the_choice_of_models_is_of_those_that_are_served(prometheus: Asked) -> None:
    (variable,) = (v for v in dashboard()["templating"]["list"] if v["type"] == "query")
    query = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
    assert query is not None
    assert prometheus.get(f"label/{query[2]}/values", **{"match[]": query[1]}) == ["groundling"]
