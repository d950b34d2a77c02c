"""What goes wrong is said in plain words, and what passes by itself is waited for."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import requests

from tests.e2e.page.conftest import Visit
from tests.e2e.page.scripted import KEY, READY, Scripted
from tests.e2e.page.test_chat import choose, make_store
from tests.e2e.serving import wait_for

Open = Callable[..., Visit]
CHAT = "**/v1/chat/completions"


def notice(answer: Any) -> Any:
    return answer.locator(".notice")


def left_s(answer: Any) -> int:
    """Return how many seconds the page says it still waits."""
    said = re.search(r"Asking again in (\d+) s", notice(answer).inner_text())
    assert said, notice(answer).inner_text()
    return int(said[1])


def test_an_overloaded_server_is_asked_again_after_a_countdown(scripted_server: Scripted, visit: Open) -> None:
    scripted_server.fleet.full, scripted_server.fleet.retry_after_s = True, 15
    tab = visit(scripted_server.url)
    tab.open()
    answer = tab.ask("Now, please")
    tab.until(answer, "retrying")
    assert "Too much is asked of it" in notice(answer).inner_text()
    at_first = left_s(answer)
    assert 3 < at_first <= 15, "its Retry-After: without one the first pause is a second"
    wait_for(lambda: left_s(answer) < at_first, "it counts down")
    scripted_server.fleet.full = False
    tab.until(answer, "done")
    assert answer.locator(".text").inner_text() == "An answer."
    assert notice(answer).is_hidden()


def test_who_does_not_want_to_wait_asks_at_once_or_stops(scripted_server: Scripted, visit: Open) -> None:
    scripted_server.fleet.full, scripted_server.fleet.retry_after_s = True, 3600  # the page waits a minute at most
    tab = visit(scripted_server.url)
    tab.open()
    answer = tab.ask("Now")
    tab.until(answer, "retrying")
    tab.page.get_by_role("button", name="Stop").click()
    tab.until(answer, "stopped")
    answer.get_by_role("button", name="Retry").click()
    tab.until(answer, "retrying")
    scripted_server.fleet.full = False
    answer.get_by_role("button", name="Ask now").click()
    tab.until(answer, "done", 40)  # less than a minute: it was asked at once


def test_a_connection_that_is_lost_before_the_answer_is_made_again(scripted_server: Scripted, visit: Open) -> None:
    tab = visit(scripted_server.url)
    tab.open()
    tab.page.context.set_offline(True)
    answer = tab.ask("Is anybody there?")
    tab.until(answer, "retrying")
    assert "cannot be reached" in notice(answer).inner_text()
    tab.page.locator(".status", has_text="Cannot be reached").wait_for()
    tab.page.context.set_offline(False)
    tab.until(answer, "done")
    tab.page.locator(".status", has_text="1 engine ready").wait_for()


def test_a_proxys_own_error_is_taken_for_a_server_that_is_away(scripted_server: Scripted, visit: Open) -> None:
    tab = visit(scripted_server.url)
    tab.open()
    answers = [503, 500]

    def proxy(route: Any) -> None:
        if not answers:
            return route.continue_()
        return route.fulfill(status=answers.pop(), content_type="text/plain", body="Service unavailable")

    tab.page.route(CHAT, proxy)
    answer = tab.ask("Hello?")
    tab.until(answer, "done")
    assert answers == []


def test_an_error_in_mid_stream_keeps_what_had_arrived(scripted_server: Scripted, visit: Open) -> None:
    scripted_server.fleet.answers = ["So far so good and then nothing more."]
    scripted_server.fleet.fails_after = 4
    tab = visit(scripted_server.url)
    tab.open()
    answer = tab.ask("Tell me")
    tab.until(answer, "failed")
    assert answer.locator(".text").inner_text().startswith("So far")
    assert "ended in an error" in notice(answer).inner_text()
    assert "The engines failed." in notice(answer).inner_text()
    tab.page.reload()
    assert tab.page.locator(".answer .text").inner_text().startswith("So far")
    scripted_server.fleet.fails_after = None
    tab.page.get_by_role("button", name="Retry").click()
    tab.until(tab.page.locator(".answer"), "done")
    assert tab.page.locator(".answer .text").inner_text() == "So far so good and then nothing more."


def test_a_stream_that_breaks_off_keeps_what_had_arrived(scripted_server: Scripted, visit: Open) -> None:
    tab = visit(scripted_server.url)
    tab.open()
    chunk = 'data: {"choices": [{"index": 0, "delta": {"content": "Half of"}}]}\n\n'
    tab.page.route(CHAT, lambda route: route.fulfill(content_type="text/event-stream", body=chunk))
    answer = tab.ask("All of it")
    tab.until(answer, "failed")
    assert answer.locator(".text").inner_text() == "Half of"
    assert "broke off" in notice(answer).inner_text()


def test_a_request_that_is_refused_says_why_and_is_not_sent_again(scripted_server: Scripted, visit: Open) -> None:
    tab = visit(scripted_server.url)
    tab.open()
    answer = tab.ask("word " * 3000)
    tab.until(answer, "failed")
    assert "2048" in notice(answer).inner_text()


def test_what_is_chosen_is_asked_for_until_the_server_says_it_is_gone(
    scripted_server: Scripted, visit: Open, tides: Path
) -> None:
    store = make_store(scripted_server.url, "fading", tides)
    tab = visit(scripted_server.url)
    tab.open()
    choose(tab, "fading")
    tab.page.route(re.compile(r"/v1/vector_stores\?"), lambda route: route.fulfill(status=503, body="not now"))
    tab.page.reload()
    tab.page.locator("#stores-chosen", has_text="unknown store").wait_for()
    tab.until(tab.ask("When does the tide turn?"), "done")
    assert 'source="tides.md"' in scripted_server.fleet.prompts[-1]
    requests.delete(f"{scripted_server.url}/v1/vector_stores/{store}").raise_for_status()
    asked = len(scripted_server.fleet.prompts)
    answer = tab.ask("And now?")
    tab.until(answer, "failed")
    assert f"No vector store with id '{store}'. It is no longer chosen." in notice(answer).inner_text()
    assert len(scripted_server.fleet.prompts) == asked, "nothing was answered without documents"
    tab.page.locator("#stores-chosen", has_text="no documents").wait_for()
    answer.get_by_role("button", name="Retry").click()
    tab.until(answer, "done")
    assert "<passage" not in scripted_server.fleet.prompts[-1]


def test_stop_also_ends_the_search_for_stores_that_are_gone(
    scripted_server: Scripted, visit: Open, tides: Path
) -> None:
    store = make_store(scripted_server.url, "stalled", tides)
    tab = visit(scripted_server.url)
    tab.open()
    choose(tab, "stalled")
    requests.delete(f"{scripted_server.url}/v1/vector_stores/{store}").raise_for_status()
    looked_up = re.compile(f"/v1/vector_stores/{store}$")
    tab.page.route(looked_up, lambda route: None)  # it gets no answer
    with tab.page.expect_request(looked_up):
        answer = tab.ask("When does the tide turn?")
    tab.page.get_by_role("button", name="Stop").click()
    tab.until(answer, "failed")
    assert f"No vector store with id '{store}'." in notice(answer).inner_text()
    assert "no longer chosen" not in notice(answer).inner_text(), "nobody has said that it is this one"
    tab.page.unroute(looked_up)
    answer.get_by_role("button", name="Retry").click()
    tab.page.locator("#stores-chosen", has_text="no documents").wait_for()


def test_while_an_engine_loads_the_wait_says_so(scripted_server: Scripted, visit: Open) -> None:
    (model,) = READY["models"]
    scripted_server.fleet_view = READY | {"models": [model | {"states": {"starting": 1}}]}
    tab = visit(scripted_server.url)
    tab.open()
    tab.page.locator(".status", has_text="Loading tiny").wait_for()
    held: list[Any] = []
    tab.page.route(CHAT, lambda route: held.append(route))
    answer = tab.ask("Are you there?")
    notice(answer).get_by_text("1 engine of tiny is loading").wait_for()
    scripted_server.fleet_view = READY
    held[0].continue_()
    tab.until(answer, "done")


def test_a_key_is_asked_for_and_the_question_is_asked_with_it(scripted_server: Scripted, visit: Open) -> None:
    scripted_server.need_key(True)
    tab = visit(scripted_server.url)
    page = tab.open()
    dialog = page.locator("#key")
    dialog.wait_for()
    assert "answers only with a key" in page.locator("#key-problem").inner_text()
    page.get_by_role("button", name="Cancel").last.click()
    answer = tab.ask("May I?")
    tab.until(answer, "key")
    dialog.wait_for()
    page.fill("#key-field", "gs-wrong")
    page.press("#key-field", "Enter")
    page.locator("#key-problem", has_text="does not know this key").wait_for()
    page.fill("#key-field", KEY)
    page.press("#key-field", "Enter")
    tab.until(answer, "done")
    assert dialog.is_hidden()
    page.reload()
    page.locator(".status", has_text="1 engine ready").wait_for()
    assert dialog.is_hidden()


def test_a_key_that_is_not_to_be_kept_is_not_stored(scripted_server: Scripted, visit: Open) -> None:
    scripted_server.need_key(True)
    tab = visit(scripted_server.url)
    page = tab.open()
    page.locator("#key").wait_for()
    page.get_by_label("Keep it in this browser").uncheck()
    page.fill("#key-field", KEY)
    page.press("#key-field", "Enter")
    page.locator("#key").wait_for(state="hidden")
    page.locator(".status", has_text="1 engine ready").wait_for()
    assert KEY not in page.evaluate("JSON.stringify(localStorage)")
    page.click("#open-key")
    page.get_by_role("button", name="Forget the key").click()
    assert KEY not in page.evaluate("JSON.stringify(sessionStorage)")


def test_a_key_goes_nowhere_but_into_headers(scripted_server: Scripted, visit: Open) -> None:
    scripted_server.need_key(True)
    tab = visit(scripted_server.url)
    sent: list[Any] = []
    tab.page.on("request", lambda request: sent.append((request.url, request.post_data or "")))
    page = tab.open()
    page.locator("#key").wait_for()
    page.fill("#key-field", KEY)
    page.press("#key-field", "Enter")
    page.locator("#key").wait_for(state="hidden")
    tab.until(tab.ask("Hello"), "done")
    assert sent
    assert not any(KEY in url or KEY in body for url, body in sent)
