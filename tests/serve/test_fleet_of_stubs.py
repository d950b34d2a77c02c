"""Routers, Serve, HAProxy and the token channel as they are, around stub engines that do as they are told."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests

from tests.e2e.serving import wait_for
from tests.serve import orders
from tests.serve.conftest import ELASTIC_BATCH, LIMIT_S, MAX_QUEUED, PREFIX, ROUTERS, Stubs, bearer

REQUESTS = 8
"""Enough that they do not all fall on one of two engines by chance."""


def events(answer: requests.Response) -> Iterator[Any]:
    """Yield what a stream says, parsed; its last word as it is."""
    for line in answer.iter_lines():
        if line.startswith(b"data: "):
            word = line.removeprefix(b"data: ")
            yield word.decode() if word == b"[DONE]" else json.loads(word)


def words(said: list[Any]) -> str:
    return "".join(e["choices"][0]["delta"].get("content") or "" for e in said if e != "[DONE]" and e.get("choices"))


@pytest.fixture
def pair(stubs: Stubs) -> Stubs:
    """The app, once both engines of the model `pair` are there: tests before may have cost one."""
    stubs.wait_for_engines("pair", 2)
    return stubs


def test_streams_are_whole_through_two_engines_and_two_routers(pair: Stubs) -> None:
    def stream(_: int) -> list[Any]:
        answer = pair.ask("pair", tokens=20, stream=True)
        assert answer.status_code == 200
        return list(events(answer))

    with ThreadPoolExecutor(16) as pool:
        streams = list(pool.map(stream, range(32)))
    for said in streams:
        assert said[-1] == "[DONE]"
        assert said[-2]["usage"]["completion_tokens"] == 20
        assert said[-3]["choices"][0]["finish_reason"] == "length"
    assert len({words(said) for said in streams}) == 1
    notes = pair.notes("pair").values()
    assert len(notes) == 2
    assert len({router for note in notes for router in note.routers}) == ROUTERS
    wait_for(lambda: pair.running("pair") == 0, "engines have nothing left")


def test_beside_a_busy_engine_requests_go_to_the_idle_one(pair: Stubs) -> None:
    """They come through the other Router, where HAProxy finds no stream: of what is busy only heartbeats tell it."""
    answer = pair.ask("pair", tokens=4000, stream=True)  # 80 s of them
    wait_for(lambda: pair.running("pair") == 1, "an engine has it")
    (busy,) = (replica for replica, note in pair.notes("pair").items() if note.running)
    (idle,) = pair.notes("pair").keys() - {busy}
    before = pair.notes("pair")
    for _ in range(REQUESTS):
        pair.wait_until_known("pair", {busy: 1, idle: 0})
        assert pair.ask("pair").status_code == 200
    after = pair.notes("pair")
    answer.close()
    assert {replica: note.requests - before[replica].requests for replica, note in after.items()} == {
        busy: 0,
        idle: REQUESTS,
    }


def test_what_the_page_shows_of_the_fleet_is_what_serve_and_the_engines_say(pair: Stubs) -> None:
    """Over Serve's real controller: what is made of its account is unit tested on a copy of one."""

    def of_pair() -> dict[str, Any]:
        return pair.fleet("pair")

    def both_ready() -> bool:
        return pair.get("/fleet").json()["serve"] == "ok" and of_pair()["states"].get("ready") == 2

    wait_for(both_ready, "both engines are ready")

    def ready() -> set[str]:
        return {each["replica"] for each in of_pair()["replicas"] if each["state"] == "ready"}

    wait_for(lambda: ready() == set(pair.notes("pair")), "they are those that live")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(pair.ask, "pair", tokens=1000)  # 20 s of them
        wait_for(lambda: of_pair()["running"] == 1, "the request is seen to run")
        assert answer.result().status_code == 200
    wait_for(lambda: of_pair()["running"] == 0, "and to be over")


def test_all_models_are_listed_and_each_is_found(stubs: Stubs) -> None:
    assert {card["id"] for card in stubs.get("/v1/models").json()["data"]} == {"pair", "elastic", "zero"}
    assert stubs.get("/v1/models/pair").json()["id"] == "pair"
    missing = stubs.get("/v1/models/nobody")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


def test_it_says_of_what_versions_it_is(stubs: Stubs) -> None:
    assert stubs.get("/version").json().keys() == {"version", "groundswell", "ray"}


def test_all_is_below_the_route_prefix_and_the_page_too(stubs: Stubs) -> None:
    def get(url: str) -> requests.Response:
        return requests.get(url, headers=bearer(stubs.key), timeout=LIMIT_S)

    page = get(stubs.url)
    assert (page.status_code, page.url) == (200, f"{stubs.url}/")
    (script,) = re.findall(r'src="(page/[^"]+)"', page.text)
    assert get(page.url + script).status_code == 200
    nowhere = get(f"{stubs.url}/nowhere")
    assert (nowhere.status_code, nowhere.json()["error"]["message"]) == (404, "There is no /nowhere here.")
    assert get(f"{stubs.url.removesuffix(PREFIX)}/v1/models").text == "elsewhere"


def test_two_prompts_in_one_completion_are_both_answered(pair: Stubs) -> None:
    answer = pair.ask("pair", tokens=6, prompt=["one", "two"]).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert all(choice["text"] for choice in answer["choices"])
    assert answer["usage"]["completion_tokens"] == 12


def test_a_client_that_hangs_up_frees_its_place_in_the_engine(pair: Stubs) -> None:
    answer = pair.ask("pair", tokens=4000, stream=True)  # 80 s of them
    next(events(answer))
    wait_for(lambda: pair.running("pair") == 1, "the stream runs")
    answer.close()
    wait_for(lambda: pair.running("pair") == 0, "the engine has dropped it", limit_s=20)


def test_a_client_of_a_plain_answer_that_hangs_up_frees_its_place(pair: Stubs) -> None:
    client = http.client.HTTPConnection(urlsplit(pair.url).netloc, timeout=LIMIT_S)
    body = json.dumps({"model": "pair", "prompt": "one", "max_tokens": 4000})
    client.request("POST", f"{PREFIX}/v1/completions", body, {"content-type": "application/json", **bearer(pair.key)})
    wait_for(lambda: pair.running("pair") == 1, "an engine has it")
    client.close()
    wait_for(lambda: pair.running("pair") == 0, "the engine has dropped it", limit_s=20)


def test_a_client_that_hangs_up_before_the_first_token_frees_its_place(pair: Stubs) -> None:
    order = orders.give(pair.folder, "pair", orders.HANG)
    answer = pair.ask("pair", tokens=40, stream=True)
    wait_for(lambda: not order.exists(), "an engine has it")
    answer.close()
    wait_for(lambda: pair.running("pair") == 0, "the engine has dropped it", limit_s=20)


def test_a_deadline_before_the_first_byte_is_answered_in_openais_shape_and_not_by_serve(pair: Stubs) -> None:
    answer = pair.ask("pair", tokens=4000, timeout_s=2)
    assert answer.status_code == 408
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("timeout_error", "request_timeout")
    wait_for(lambda: pair.running("pair") == 0, "the engine has dropped it", limit_s=20)


def test_a_deadline_ends_a_stream_with_an_error_event(pair: Stubs) -> None:
    said = list(events(pair.ask("pair", tokens=4000, stream=True, timeout_s=10)))
    assert words(said)
    (error,) = [event["error"] for event in said if "error" in event]
    assert "was not finished within 10 s" in error["message"]
    assert said[-1] == "[DONE]"
    wait_for(lambda: pair.running("pair") == 0, "the engine has dropped it", limit_s=20)


def test_an_engine_that_dies_before_the_first_token_costs_the_client_nothing(pair: Stubs) -> None:
    order = orders.give(pair.folder, "pair", orders.DIE_FIRST)
    before = set(pair.notes("pair"))
    answer = pair.ask("pair", tokens=5)
    assert (answer.status_code, answer.json()["usage"]["completion_tokens"]) == (200, 5)
    assert not order.exists(), "no engine died"
    assert len(before & set(pair.notes("pair"))) == 1


def test_an_engine_that_dies_costs_its_streams_nothing(pair: Stubs) -> None:
    undisturbed = words(list(events(pair.ask("pair", tokens=100, stream=True))))
    order = orders.give(pair.folder, "pair", orders.DIE_LATER)
    before = set(pair.notes("pair"))
    with ThreadPoolExecutor(8) as pool:
        streams = list(pool.map(lambda _: list(events(pair.ask("pair", tokens=100, stream=True))), range(8)))
    assert not order.exists(), "no engine died"
    assert len(before & set(pair.notes("pair"))) == 1
    for said in streams:
        assert said[-1] == "[DONE]"
        assert not [event for event in said if "error" in event]
        assert words(said) == undisturbed
        assert said[-2]["usage"]["completion_tokens"] == 100
        assert said[-2]["usage"]["prompt_tokens"] == streams[0][-2]["usage"]["prompt_tokens"] < 100


def test_a_plain_request_whose_engine_dies_halfway_is_answered_whole(pair: Stubs) -> None:
    ask: dict[str, Any] = {"tokens": 20, "prompt": "one two three"}
    order = orders.give(pair.folder, "pair", orders.DIE_LATER)
    answer = pair.ask("pair", **ask)
    assert not order.exists(), "no engine died"
    assert (answer.status_code, answer.json()["usage"]["completion_tokens"]) == (200, 20)
    pair.wait_for_engines("pair", 2)
    assert answer.json()["choices"][0]["text"] == pair.ask("pair", **ask).json()["choices"][0]["text"]


def test_a_stream_that_cannot_go_on_elsewhere_ends_in_an_error_event(pair: Stubs) -> None:
    order = orders.give(pair.folder, "pair", orders.DIE_LATER)
    said = list(events(pair.ask("pair", tokens=20, stream=True, presence_penalty=0.5)))
    assert not order.exists(), "no engine died"
    assert words(said)
    (error,) = [event["error"] for event in said if "error" in event]
    assert {"message", "type", "param", "code"} <= set(error)
    assert "presence penalty" in error["message"]
    assert said[-1] == "[DONE]"


@pytest.mark.parametrize("order", [orders.HANG_LATER, orders.FREEZE])
def test_a_stream_on_an_engine_that_stands_still_goes_on_at_the_other(pair: Stubs, order: str) -> None:
    undisturbed = words(list(events(pair.ask("pair", tokens=20, stream=True))))
    left = orders.give(pair.folder, "pair", order)
    said = list(events(pair.ask("pair", tokens=20, stream=True)))
    assert not left.exists(), "no engine stood still"
    assert words(said) == undisturbed
    assert said[-2]["usage"]["completion_tokens"] == 20


def test_a_request_on_a_hung_engine_is_served_by_the_other(pair: Stubs) -> None:
    order = orders.give(pair.folder, "pair", orders.HANG)
    answer = pair.ask("pair", tokens=5)
    assert (answer.status_code, answer.json()["usage"]["completion_tokens"]) == (200, 5)
    assert not order.exists(), "no engine hung"


def test_from_zero_requests_are_held_until_an_engine_is_up_and_what_is_too_many_is_refused_at_once(
    stubs: Stubs,
) -> None:
    stubs.wait_for_engines("zero", 0)
    held: list[requests.Response] = []
    while (answer := stubs.ask("zero", tokens=5, stream=True)).status_code == 200:
        held.append(answer)
        assert len(held) < 2 * ROUTERS * MAX_QUEUED, "nothing is refused"
    assert MAX_QUEUED <= len(held) <= ROUTERS * MAX_QUEUED
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert stubs.notes("zero") == {}, "all of that came before any engine was there"
    for answer in held:
        assert [event for event in events(answer) if event != "[DONE]"][-1]["usage"]["completion_tokens"] == 5
    assert len(stubs.notes("zero")) == 1


def test_without_work_the_last_engine_leaves(stubs: Stubs) -> None:
    stubs.wait_for_engines("zero", 0)
    assert stubs.notes("zero") == {}


def test_a_client_that_hangs_up_while_its_request_waits_frees_its_place(stubs: Stubs) -> None:
    stubs.wait_for_engines("elastic", 1)
    answers: list[requests.Response] = []
    while max(note.running for note in stubs.notes("elastic").values()) <= ELASTIC_BATCH:
        assert len(answers) <= 2 * ELASTIC_BATCH, "nothing waits"
        answers.append(stubs.ask("elastic", tokens=3000, stream=True))
        wait_for(lambda: stubs.running("elastic") == len(answers), "an engine has it")
    wait_for(lambda: stubs.fleet("elastic")["waiting"] == 1, "the last one waits there")
    answers.pop().close()
    wait_for(lambda: stubs.running("elastic") == len(answers), "the engine has dropped it", limit_s=20)
    wait_for(lambda: stubs.in_flight("elastic") == len(answers), "and so has its Router")
    for answer in answers:
        answer.close()
    wait_for(lambda: stubs.in_flight("elastic") == stubs.running("elastic") == 0, "all places are free again")


def test_engines_come_and_go_with_the_load_and_no_stream_is_cut(stubs: Stubs) -> None:
    """One that is to go finishes what it has: its stream is whole, and has not moved."""
    stubs.wait_for_engines("elastic", 1)
    answers = [stubs.ask("elastic", tokens=3000, stream=True) for _ in range(4)]
    streams = [events(answer) for answer in answers]
    said = [[next(stream)] for stream in streams]
    wait_for(lambda: stubs.engines("elastic") == 2, "a second engine", limit_s=200)
    for heard, stream in zip(said, streams, strict=True):
        heard += [next(stream) for _ in range(20)]
    while min(note.running for note in stubs.notes("elastic").values()) == 0:
        assert len(answers) < 8, "the second engine gets nothing"
        answers.append(stubs.ask("elastic", tokens=3000, stream=True))
        streams.append(events(answers[-1]))
        said.append([next(streams[-1])])
    assert not [event for heard in said for event in heard if "error" in event]

    for answer in answers[1:-1]:
        answer.close()
    wait_for(lambda: {n.running for n in stubs.notes("elastic").values()} == {1}, "a stream is left on each engine")
    before = stubs.notes("elastic")
    wait_for(lambda: all(stubs.engines("elastic") == 1 for _ in range(2 * ROUTERS)), "one is to go", limit_s=200)
    assert {note.running for note in stubs.notes("elastic").values()} == {1}, "it has ended, and with it its stream"
    assert len(stubs.notes("elastic")) == 2
    hurry = orders.give(stubs.folder, "elastic", orders.HURRY)
    try:
        for heard, stream in ((said[0], streams[0]), (said[-1], streams[-1])):
            heard += stream
        wait_for(lambda: len(stubs.notes("elastic")) == 1, "it goes when its stream is over")
        ((replica, left),) = stubs.notes("elastic").items()
        assert left.requests == before[replica].requests, "the other has taken its stream over"
        undisturbed = list(events(stubs.ask("elastic", tokens=3000, stream=True)))
    finally:
        hurry.unlink()
    for heard in (said[0], said[-1]):
        assert heard[-1] == "[DONE]"
        assert heard[-2]["usage"]["completion_tokens"] == 3000
        assert words(heard) == words(undisturbed)
