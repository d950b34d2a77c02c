"""The page over real engines: what it shows of them, and what becomes of an answer when one is killed."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import requests

from benchmarks.replicas import engines
from tests.e2e.page.conftest import Visit
from tests.e2e.serving import Served, wait_for

pytestmark = pytest.mark.skipif(
    os.environ.get("GROUNDSWELL_TEST_LONG") != "1", reason="takes minutes: make test LONG=1"
)
Open = Callable[..., Visit]
REPLACED_WITHIN_S = 240


def address(served: Served) -> str:
    return f"http://127.0.0.1:{served.port}"


def fleet(served: Served) -> dict[str, Any]:
    (model,) = requests.get(f"{address(served)}/fleet", timeout=30).json()["models"]
    return dict(model)


def endless(tab: Visit) -> None:
    """Have the model, which is random, not end by chance."""
    tab.page.route(
        "**/v1/chat/completions",
        lambda route: route.continue_(post_data={**route.request.post_data_json, "ignore_eos": True}),
    )


def press_stop(page: Any) -> None:
    """Press it at once: playwright's own click first waits until nothing moves, and the page is being written."""
    page.get_by_role("button", name="Stop").evaluate("button => button.click()")


def said(page: Any) -> str:
    """Return what of the latest answer has arrived, as the page keeps it."""
    return str(
        page.evaluate(
            """() => {
              const name = Object.keys(localStorage).find((key) => key.startsWith('groundswell.conversation.'));
              return JSON.parse(localStorage.getItem(name)).messages.at(-1).content;
            }"""
        )
    )


def length(answer: Any) -> int:
    return len(answer.locator(".text").inner_text())


def test_an_answer_of_the_engine_streams_in_with_its_numbers(served: Served, visit: Open) -> None:
    tab = visit(address(served))
    endless(tab)
    page = tab.open()
    page.locator(".status", has_text="2 engines ready").wait_for()
    page.click("#open-settings")
    page.get_by_label("Longest answer, tokens").fill("1500")
    page.get_by_role("button", name="Use these").click()
    answer = tab.ask("Hello there")
    lengths = set()
    while answer.get_attribute("data-state") in ("waiting", "streaming"):
        lengths.add(length(answer))
        page.wait_for_timeout(20)
    assert len(lengths) > 4
    assert answer.get_attribute("data-state") == "done"
    assert re.search(
        r"to first token.*tokens/s.*1\u2009500 tokens.*prompt \d+", answer.locator(".numbers").inner_text()
    )
    assert "longest answer" in answer.locator(".notice").inner_text()


def test_the_fleet_is_seen_at_work(served: Served, visit: Open) -> None:
    tab = visit(address(served))
    endless(tab)
    page = tab.open()
    tab.ask("Tell me a long story")
    wait_for(lambda: fleet(served)["running"] == 1, "the request runs", 20)
    page.click('nav a[href="#fleet"]')
    page.locator(".replicas tbody tr").nth(1).wait_for()
    running = page.locator('.figures div:has(dt:text-is("running")) dd')
    page.wait_for_function("e => e.textContent === '1'", arg=running.element_handle())
    rows = [row.inner_text() for row in page.locator(".replicas tbody tr").all()]
    assert all("ready" in row for row in rows)
    assert page.locator(".others", has_text="Router").count() == 1
    wait_for(lambda: (fleet(served)["tokens_per_s"] or 0) > 1, "tokens per second", 10)
    seen = fleet(served)
    assert seen["ttft_s"] > 0 and seen["kv_cache_usage"] >= 0 and seen["prefix_hit_rate"] is not None
    assert sum(replica["running"] for replica in seen["replicas"]) == seen["running"] == 1
    page.click('nav a[href="#chat"]')
    press_stop(page)
    wait_for(lambda: cancelled(served) > 0, "that is counted", 30)


def test_stop_frees_the_engine(served: Served, visit: Open) -> None:
    wait_for(lambda: fleet(served)["running"] == 0, "engines without work", 30)
    tab = visit(address(served))
    endless(tab)
    page = tab.open()
    answer = tab.ask("Never end")
    wait_for(lambda: fleet(served)["running"] == 1, "the request runs", 20)
    before = cancelled(served)
    press_stop(page)
    tab.until(answer, "stopped", 5)
    wait_for(lambda: fleet(served)["running"] == 0, "the engine is free", 5)
    wait_for(lambda: cancelled(served) == before + 1, "it was cancelled, and had not ended by itself", 30)
    assert length(answer) > 0


def cancelled(served: Served) -> int:
    """Return how many requests have ended as their client hung up."""
    text = requests.get(f"{address(served)}/metrics", timeout=30).text
    lines = re.findall(r"^ray_groundswell_fleet_requests(?:_total)?\{(.*)\} (\S+)$", text, re.MULTILINE)
    return int(sum(float(value) for tags, value in lines if 'outcome="cancelled"' in tags))


def replica_process(served: Served, replica: str) -> psutil.Process:
    """Return the process of a replica, by the log it writes: all have the same name."""
    for process in engines(served.run_id):
        if any(replica in file.path for file in process.open_files()):
            return process
    raise AssertionError(f"no process writes the log of {replica}")


def test_a_killed_engine_does_not_break_the_answer_on_screen(served: Served, visit: Open) -> None:
    wait_for(lambda: fleet(served)["running"] == 0, "engines without work", 30)
    tab = visit(address(served))
    endless(tab)
    page = tab.open()
    page.click("#open-settings")
    page.get_by_label("Longest answer, tokens").fill("1500")
    page.get_by_role("button", name="Use these").click()
    answer = tab.ask("Tell me of the sea")
    wait_for(lambda: fleet(served)["running"] == 1 and length(answer) > 40, "the answer has begun", 30)
    (at_work,) = [replica["replica"] for replica in fleet(served)["replicas"] if replica["running"]]
    victim = replica_process(served, at_work)
    arrived = said(page)
    assert answer.get_attribute("data-state") == "streaming"
    victim.kill()
    watcher = visit(address(served)).open("fleet")
    tab.until(answer, "done", REPLACED_WITHIN_S)
    text = said(page)
    assert text.startswith(arrived)
    assert len(text) > len(arrived) + 100
    assert "1\u2009500 tokens" in answer.locator(".numbers").inner_text()
    watcher.locator(".model header .badge", has_text=re.compile("starting|dead")).first.wait_for(timeout=30_000)
    deadline = time.monotonic() + REPLACED_WITHIN_S
    while fleet(served)["states"].get("ready") != 2:
        assert time.monotonic() < deadline, fleet(served)
        time.sleep(0.5)
    watcher.locator(".status", has_text="2 engines ready").wait_for()
