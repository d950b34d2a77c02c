"""The page's pure modules, called in the browser that runs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from deployments.web.page import PREFIX, Page
from tests.e2e.page.conftest import Visit
from tests.e2e.page.scripted import Scripted

Call = Callable[..., Any]


@pytest.fixture
def call(scripted_server: Scripted, visit: Callable[..., Visit]) -> Call:
    """Return what calls a function of a module: `call("words", "bytes", 1000)`, or evaluates JavaScript over it."""
    tab = visit(scripted_server.url)
    page = tab.open()
    base = f"{scripted_server.url}{PREFIX}/{Page().version}/"

    def evaluate(module: str, function: str, *arguments: Any) -> Any:
        if "=>" in function:
            script = f"async (args) => ({function})(await import('{base}{module}.js'), ...args)"
        else:
            script = f"async (args) => (await import('{base}{module}.js')).{function}(...args)"
        return page.evaluate(script, list(arguments))

    return evaluate


STREAM = 'data: {"a": 1}\n\n: a comment\r\ndata: one\r\ndata: two\r\n\r\nevent: error\ndata: bad\n\ndata: [DONE]\n\n'
EVENTS = [("message", '{"a": 1}'), ("message", "one\ntwo"), ("error", "bad"), ("message", "[DONE]")]


def test_events_are_the_same_however_the_stream_is_cut(call: Call) -> None:
    read = """(module, stream, size) => {
      const reader = new module.EventReader();
      const found = [];
      for (let i = 0; i < stream.length; i += size) found.push(...reader.feed(stream.slice(i, i + size)));
      return found.map(({ event, data }) => [event, data]);
    }"""
    for size in (1, 2, 3, 5, 7, 11, 1000):
        assert [tuple(each) for each in call("sse", read, STREAM, size)] == EVENTS, size


def test_conversations_are_bounded_in_number_and_size_and_the_oldest_go(call: Call) -> None:
    kept = """(module, number, chars) => {
      const storage = new module.MemoryStorage();
      const conversations = new module.Conversations(storage);
      for (let i = 0; i < number; i += 1) {
        conversations.put({ id: `c${i}`, at: i, messages: [{ role: 'user', content: `${i} ${'x'.repeat(chars)}` }] });
      }
      return conversations.list().map(({ id }) => id);
    }"""
    assert call("store", kept, 3, 10) == ["c2", "c1", "c0"]
    assert call("store", kept, 100, 10) == [f"c{i}" for i in range(99, 39, -1)]
    assert call("store", kept, 5, 1_000_000) == ["c4", "c3"]


def test_what_a_browser_refuses_to_store_makes_room_and_is_said(call: Call) -> None:
    full = """(module, room) => {
      const storage = new module.MemoryStorage();
      const set = storage.setItem.bind(storage);
      storage.setItem = (name, value) => {
        if (storage.length >= room) throw new DOMException('full', 'QuotaExceededError');
        set(name, value);
      };
      const conversations = new module.Conversations(storage);
      for (let i = 0; i < 3; i += 1) conversations.put({ id: `c${i}`, at: i, messages: [] });
      return [conversations.list().map(({ id }) => id), conversations.isKept];
    }"""
    assert call("store", full, 2) == [["c2", "c1"], True]
    assert call("store", full, 0) == [[], False]


def test_what_is_no_conversation_is_left_alone(call: Call) -> None:
    odd = """(module) => {
      const storage = new module.MemoryStorage();
      storage.setItem('groundswell.conversation.x', 'no JSON');
      storage.setItem('groundswell.conversation.y', 'null');
      storage.setItem('another', '{}');
      return new module.Conversations(storage).list();
    }"""
    assert call("store", odd) == []


@pytest.mark.parametrize(
    ("text", "passage", "found"),
    [
        ("One. Two three. Four.", "Two three.", "Two three."),
        ("One.\n\nTwo\n three.\n", "Two three.", "Two\n three."),
        ("One. Two.", "Three.", None),
        ("One.", " \n", None),
        ("a a b", "a b", "a b"),
    ],
)
def test_a_passage_is_found_whatever_white_space_there_is(
    call: Call, text: str, passage: str, found: str | None
) -> None:
    place = call("locate", "locate", text, passage)
    assert (None if place is None else text[place[0] : place[1]]) == found


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("Two  three.", "Two\nthree."),
        ("It says: **Two three.**", None),
        ("In short. Two three.", "Two\nthree."),
        ("Two four.", None),
        (".", None),
    ],
)
def test_what_an_answer_quotes_of_a_passage_is_found(call: Call, said: str, found: str | None) -> None:
    passage = "One. Two\nthree. Four."
    place = call("locate", "quoted", passage, said)
    assert (None if place is None else passage[place[0] : place[1]]) == found


def test_a_document_in_pieces_becomes_one_text(call: Call) -> None:
    assert call("locate", "joined", ["One.", "Two", " three.", "\nFour."]) == "One.\nTwo three.\nFour."


@pytest.mark.parametrize(
    ("function", "argument", "text"),
    [
        ("count", 1234567, "1 234 567"),
        ("count", None, "\u2013"),
        ("rate", 3.14159, "3.1"),
        ("rate", 0, "0"),
        ("percent", 0.256, "26 %"),
        ("seconds", 0.234, "234 ms"),
        ("seconds", 2.34, "2.3 s"),
        ("age", 3725, "1 h 2 min"),
        ("bytes", 1536000, "1.5 MB"),
        ("bytes", 12, "12 bytes"),
    ],
)
def test_numbers_are_written_for_people(call: Call, function: str, argument: Any, text: str) -> None:
    assert call("words", function, argument).replace("\u2009", " ") == text


@pytest.mark.parametrize(
    ("status", "ours", "kind"),
    [
        (401, True, "key"),
        (429, True, "limit"),
        (503, True, "unavailable"),
        (503, False, "away"),
        (500, False, "away"),
        (500, True, "server"),
        (501, True, "refused"),
        (408, True, "late"),
        (400, True, "refused"),
    ],
)
def test_a_status_says_what_kind_of_trouble_it_is(call: Call, status: int, ours: bool, kind: str) -> None:
    assert call("words", "kindOf", status, ours) == kind


def test_retry_after_is_read_in_both_its_forms(call: Call) -> None:
    now = 1_700_000_000_000
    assert call("words", "retryAfter", "7", now) == 7
    assert call("words", "retryAfter", "Tue, 14 Nov 2023 22:13:30 GMT", now) == 10
    assert call("words", "retryAfter", "soon", now) is None
    assert call("words", "retryAfter", None, now) is None


def test_citations_stand_where_they_are_counted_in_code_points(call: Call) -> None:
    draw = """(module, text, marks) => {
      const box = document.createElement('div');
      box.append(module.render(text, marks.map(([index, number]) => ({ index, number, label: 'a', onopen() {} }))));
      return box.innerText.trim();
    }"""
    assert call("markdown", draw, "\U0001f30a sea. More.", [[6, 1], [12, 2], [12, 3], [99, 4]]) == "🌊 sea.1 More.234"
    forged = "x \ue0000\ue001 y"
    assert "0" in call("markdown", draw, forged, [[1, 1]])
    assert call("markdown", draw, forged, [[1, 1]]).startswith("x1 ")
