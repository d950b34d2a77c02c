"""The Fleet view: what `/fleet` says, as a person sees it, and what changes from one look to the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.e2e.page.conftest import Visit
from tests.e2e.page.scripted import READY, Scripted

Open = Callable[..., Visit]


def replica(name: str, state: str, **more: Any) -> dict[str, Any]:
    return {"replica": name, "state": state, "node": "0123abcd", "age_s": 90, **more}


def said(*replicas: dict[str, Any], **model: Any) -> dict[str, Any]:
    """Return an answer of `/fleet` about one model with these replicas."""
    states: dict[str, int] = {}
    for each in replicas:
        states[each["state"]] = states.get(each["state"], 0) + 1
    (plain,) = READY["models"]
    return READY | {"models": [plain | {"states": states, "replicas": list(replicas)} | model]}


def cells(page: Any, row: int) -> dict[str, str]:
    shown: dict[str, str] = (
        page.locator(".replicas tbody tr")
        .nth(row)
        .evaluate("row => Object.fromEntries([...row.cells].map(cell => [cell.dataset.label, cell.innerText]))")
    )
    return {name: text.replace("\u2009", " ").replace("\xa0", " ") for name, text in shown.items()}


def test_every_replica_is_seen_with_its_state_and_what_it_does(scripted_server: Scripted, visit: Open) -> None:
    work = {"running": 3, "waiting": 2, "tokens_per_s": 40, "ttft_s": 0.25, "kv_cache_usage": 0.5}
    states = ("ready", "starting", "hung", "lost", "draining", "dead")
    replicas = [replica(f"r-{state}", state) for state in states]
    replicas[0] |= work | {"prefix_hit_rate": 0.75, "max_running": 16}
    scripted_server.fleet_view = said(
        *replicas, **work, prefix_hit_rate=0.75, this_router={"in_flight": 6, "waiting": 1}, target=3, bounds=[1, 4]
    ) | {"deployments": [{"name": "Router", "replicas": {"ready": 2}}]}
    page = visit(scripted_server.url).open("fleet")
    page.locator(".replicas tbody tr").nth(len(states) - 1).wait_for()
    assert [cells(page, i)["State"] for i in range(len(states))] == list(states)
    assert cells(page, 0) == {
        "Replica": "r-ready on 0123abcd",
        "State": "ready",
        "Running": "3 of 16",
        "Waiting": "2",
        "Tokens/s": "40",
        "First token": "250 ms",
        "KV cache": "50 %",
        "Prefix hits": "75 %",
        "Age": "1 min",
    }
    header = page.locator(".model header").inner_text()
    assert all(f"1 {state}" in header for state in states)
    assert "3 wanted, 1 to 4 allowed" in header
    figures = page.locator(".figures").inner_text().replace("\u2009", " ").split("\n")
    shown = {text.strip() for text in figures}
    assert {"40", "3", "250 ms", "50 %", "75 %"} <= shown, shown
    waiting = page.locator('.figures div:has(dt:text-is("waiting")) dd').inner_text()
    assert waiting == "3", "those in the engines, and one in front of them"
    assert page.locator(".others li").all_inner_texts() == ["Router 2 ready"]


def test_an_engine_that_joins_and_one_that_dies_are_seen_as_it_happens(scripted_server: Scripted, visit: Open) -> None:
    scripted_server.fleet_view = said(replica("a", "ready"), replica("b", "starting"))
    page = visit(scripted_server.url).open("fleet")

    def chart_says(now: int, most: int) -> None:
        words = f"Engines ready: {now} now, {most} at most in the last 5 minutes"
        page.locator(f'.chart svg[aria-label="{words}"]').wait_for()

    chart_says(1, 1)
    scripted_server.fleet_view = said(replica("a", "ready"), replica("b", "ready"))
    chart_says(2, 2)
    scripted_server.fleet_view = said(replica("b", "ready"), replica("a", "dead"))
    chart_says(1, 2)
    page.locator('.replicas tr[data-state="dead"]', has_text="a").wait_for()
    assert page.locator(".model header .badge").all_inner_texts() == ["1 ready", "1 dead"]
    assert page.locator(".chart").count() == 3


def test_a_model_without_engines_says_what_would_start_one(scripted_server: Scripted, visit: Open) -> None:
    scripted_server.fleet_view = said(target=0, bounds=[0, 2])
    page = visit(scripted_server.url).open("fleet")
    page.locator(".model", has_text="The first request starts one").wait_for()
    scripted_server.fleet_view = said(target=1) | {"serve": "unknown"}
    page.locator(".model", has_text="No engine yet").wait_for()
    page.locator("#fleet-note", has_text="controller does not answer").wait_for()


def test_what_was_seen_stays_and_is_marked_old_while_the_server_is_away(scripted_server: Scripted, visit: Open) -> None:
    scripted_server.fleet_view = said(replica("a", "ready"))
    tab = visit(scripted_server.url)
    page = tab.open("fleet")
    page.locator(".replicas tr", has_text="ready").wait_for()
    page.context.set_offline(True)
    page.locator("#fleet-trouble", has_text="cannot be reached").wait_for()
    page.locator("#fleet-body.is-old .replicas tr", has_text="ready").wait_for()
    page.context.set_offline(False)
    page.locator("#fleet-body:not(.is-old) .replicas tr", has_text="ready").wait_for()
    assert page.locator("#fleet-trouble").is_hidden()
