"""The Chat view over a scripted model: what arrives, what is kept, and what hostile text may not do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import requests

from tests.e2e.page.conftest import PHONE, Visit
from tests.e2e.page.scripted import Scripted
from tests.e2e.serving import wait_for

Open = Callable[..., Visit]
THINKING: Any = {"skip_special_tokens": False, "chat_template_kwargs": {"thinking": True}}
HOSTILE = """# Fine <b onclick="alert(1)">so</b> far

<script>alert('script')</script><img src=x onerror="alert('img')"><svg onload="alert('svg')"></svg>
<iframe src="javascript:alert('frame')"></iframe><style>body { display: none }</style>
<form action="https://evil.example/"><input name=q><button>send</button></form>

[a link](javascript:alert('link)) [b](  jAvAsCrIpT:alert('b')) [c](data:text/html,<script>alert('c')</script>)
[good](https://example.com/) ![picture](https://evil.example/pixel.png?leak=1)

```html
<script>alert('code')</script>
```

<a href="https://example.com/" target="_self" onmouseover="alert('over')" style="position:fixed">raw</a>
<math><mtext><table><mglyph><style><!--</style><img title="--&gt;&lt;img src=1 onerror=alert('math')&gt;">
"""


def make_store(url: str, name: str, *files: Path) -> str:
    """Return the id of a store in which these files have been read."""
    ids = []
    for file in files:
        with file.open("rb") as body:
            sent = requests.post(f"{url}/v1/files", data={"purpose": "assistants"}, files={"file": (file.name, body)})
        ids.append(sent.json()["id"])
    sizes = {"max_chunk_size_tokens": 100, "chunk_overlap_tokens": 0}
    body = {"name": name, "file_ids": ids, "chunking_strategy": {"type": "static", "static": sizes}}
    store = requests.post(f"{url}/v1/vector_stores", json=body).json()["id"]
    address = f"{url}/v1/vector_stores/{store}"
    wait_for(lambda: requests.get(address).json()["status"] == "completed", "the files are read")
    return str(store)


def choose(visit: Visit, name: str) -> None:
    """Have answers drawn from a store."""
    visit.page.click(".menu summary")
    visit.page.locator("label.check", has=visit.page.get_by_text(name, exact=True)).locator("input").check()
    visit.page.keyboard.press("Escape")


def test_an_answer_streams_in_and_grows(scripted_server: Scripted, visit: Open) -> None:
    scripted_server.fleet.answers = [" ".join(f"word{i}" for i in range(40))]
    scripted_server.fleet.pause_s = 0.05  # some seconds in all, whatever else the machine does
    tab = visit(scripted_server.url)
    tab.open()
    answer = tab.ask("Say many words")
    lengths = set()
    while answer.get_attribute("data-state") != "done":
        lengths.add(len(answer.locator(".text").inner_text()))
        tab.page.wait_for_timeout(20)
    assert len(lengths) > 5
    assert answer.locator(".text").inner_text().split() == [f"word{i}" for i in range(40)]
    numbers = answer.locator(".numbers").inner_text()
    assert "to first token" in numbers and "tokens/s" in numbers and "prompt" in numbers


def test_a_citation_opens_its_passage_in_its_document(scripted_server: Scripted, visit: Open, tides: Path) -> None:
    other = tides.with_name("moon.md")
    other.write_text("The moon makes the tide turn.")
    make_store(scripted_server.url, "harbour", tides, other)
    turns = "[[tides.md|turns twice]]"  # one of several passages of that file
    scripted_server.fleet.answers = [f"It *turns* twice a day {turns}, by the moon [[moon.md]] {turns}. So."]
    tab = visit(scripted_server.url)
    tab.open()
    choose(tab, "harbour")
    answer = tab.ask("When does the tide turn?")
    tab.until(answer, "done")
    assert scripted_server.fleet.prompts[-1].count('source="tides.md"') > 1
    assert answer.locator(".text").inner_text() == "It turns twice a day1, by the moon21. So."
    assert answer.locator(".sources .name").all_inner_texts() == ["tides.md", "moon.md"]
    cite = answer.locator("button.cite", has_text="1").first
    cite.press("Enter")  # by the keyboard
    panel = tab.page.locator("#passage")
    tab.page.locator("#passage-note:empty").wait_for(state="attached")
    assert panel.locator("h2").inner_text() == "tides.md"
    assert "The tide turns twice a day" in panel.locator("mark").inner_text()
    whole = panel.locator("#passage-text").inner_text()
    assert "The harbour lies open" in whole and "Of the tide" in whole
    assert len(panel.locator("mark").inner_text()) < len(whole) / 2
    tab.page.keyboard.press("Escape")
    assert panel.is_hidden()
    assert cite.evaluate("element => element === document.activeElement")


def test_citations_are_there_after_a_reload(scripted_server: Scripted, visit: Open, tides: Path) -> None:
    make_store(scripted_server.url, "harbour again", tides)
    scripted_server.fleet.answers = ["The tide turns twice a day [[tides.md|turns twice]]."]
    tab = visit(scripted_server.url)
    tab.open()
    choose(tab, "harbour again")
    tab.until(tab.ask("When does the tide turn?"), "done")
    tab.page.reload()
    tab.page.click(".answer button.cite")
    assert "The tide turns" in tab.page.locator("#passage mark").inner_text()
    assert tab.page.locator("#passage mark strong").inner_text() == "The tide turns twice a day"


def test_what_the_model_was_given_can_be_seen_when_it_cites_nothing(
    scripted_server: Scripted, visit: Open, tides: Path
) -> None:
    make_store(scripted_server.url, "uncited", tides)
    scripted_server.fleet.answers = ["Who knows."]
    tab = visit(scripted_server.url)
    tab.open()
    choose(tab, "uncited")
    answer = tab.ask("When does the tide turn?")
    tab.until(answer, "done")
    answer.get_by_role("button", name="Show what was found").click()
    assert tab.page.locator("#passage-title").inner_text() == "tides.md"


def test_a_reload_keeps_the_conversation_and_what_had_arrived(scripted_server: Scripted, visit: Open) -> None:
    scripted_server.fleet.answers = ["The first answer."]
    tab = visit(scripted_server.url)
    tab.open()
    tab.until(tab.ask("The first question"), "done")
    scripted_server.fleet.answers, scripted_server.fleet.hangs = ["The second one."], True
    second = tab.ask("The second question")
    second.locator(".text", has_text="The").wait_for()
    tab.page.reload()
    assert tab.page.locator(".question p").all_inner_texts() == ["The first question", "The second question"]
    answers = tab.page.locator(".answer")
    assert answers.nth(0).locator(".text").inner_text() == "The first answer."
    assert answers.nth(1).locator(".text").inner_text() == "The"
    assert answers.nth(1).get_attribute("data-state") == "interrupted"
    scripted_server.fleet.hangs = False
    answers.nth(1).get_by_role("button", name="Retry").click()
    tab.until(answers.nth(1), "done")
    assert answers.nth(1).locator(".text").inner_text() == "The second one."
    assert "The first answer." in scripted_server.fleet.prompts[-1]


def test_stop_hangs_up_and_keeps_what_had_arrived(scripted_server: Scripted, visit: Open) -> None:
    scripted_server.fleet.answers, scripted_server.fleet.hangs = ["The words."], True
    tab = visit(scripted_server.url)
    tab.open()
    answer = tab.ask("Go on")
    answer.locator(".text", has_text="The").wait_for()
    tab.page.get_by_role("button", name="Stop").click()
    tab.until(answer, "stopped")
    assert answer.locator(".text").inner_text() == "The"
    wait_for(scripted_server.fleet.flights[-1].closed.is_set, "its engine is free")


def test_an_engine_that_is_lost_in_mid_answer_does_not_break_it(scripted_server: Scripted, visit: Open) -> None:
    fleet = scripted_server.fleet
    fleet.answers, fleet.pause_s, fleet.cut_after, fleet.recovered = ["one two three four five six"], 0.05, 4, []
    tab = visit(scripted_server.url)
    tab.open()
    answer = tab.ask("Count")
    tab.until(answer, "done")
    assert fleet.recovered == ["continued"], "it goes on elsewhere"
    assert answer.locator(".text").inner_text() == "one two three four five six"
    assert answer.locator(".notice").is_hidden()


def test_the_model_that_is_chosen_is_asked(scripted_server: Scripted, visit: Open) -> None:
    cards = [{"id": name, "object": "model", "created": 0, "owned_by": "vllm"} for name in ("tiny", "other")]
    tab = visit(scripted_server.url)
    tab.page.route("**/v1/models*", lambda route: route.fulfill(json={"object": "list", "data": cards}))
    tab.open()
    for name in ("other", "tiny"):
        tab.page.locator("#model").select_option(name)
        with tab.page.expect_request("**/v1/chat/completions") as sent:
            answer = tab.ask("Who are you?")
        assert sent.value.post_data_json["model"] == name
        tab.until(answer, "failed" if name == "other" else "done")  # no such model is served here


def test_conversations_are_kept_apart_and_can_be_deleted(scripted_server: Scripted, visit: Open) -> None:
    tab = visit(scripted_server.url)
    tab.open()
    tab.until(tab.ask("About boats"), "done")
    tab.page.get_by_role("button", name="New conversation").click()
    tab.until(tab.ask("About trees"), "done")
    assert "boats" not in scripted_server.fleet.prompts[-1]
    titles = tab.page.locator("#conversations .title")
    assert titles.all_inner_texts() == ["About trees", "About boats"]
    titles.nth(1).click()
    assert tab.page.locator(".question p").all_inner_texts() == ["About boats"]
    tab.page.get_by_role("button", name="Delete “About trees”").click()
    tab.page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    tab.page.locator("#conversations li").nth(1).wait_for(state="detached")
    assert titles.all_inner_texts() == ["About boats"]


def test_settings_and_the_system_prompt_go_with_the_request(scripted_server: Scripted, visit: Open) -> None:
    tab = visit(scripted_server.url)
    tab.open()
    tab.page.click("#open-settings")
    tab.page.fill("#system", "Speak like a sailor.")
    tab.page.get_by_label("Temperature").fill("0.3")
    tab.page.get_by_label("Longest answer, tokens").fill("64")
    tab.page.get_by_role("button", name="Use these").click()
    with tab.page.expect_request("**/v1/chat/completions") as sent:
        tab.until(tab.ask("Ahoy"), "done")
    body = sent.value.post_data_json
    assert (body["temperature"], body["max_tokens"], body["model"]) == (0.3, 64, "tiny")
    assert body["messages"][0] == {"role": "system", "content": "Speak like a sailor."}


def test_reasoning_and_tool_calls_are_shown_beside_the_answer(scripted_server: Scripted, visit: Open) -> None:
    scripted_server.fleet.answers = ["Let me think about it.</think>Here it is."]
    tab = visit(scripted_server.url)
    tab.page.route("**/v1/chat/completions", _with(**THINKING))
    tab.open()
    answer = tab.ask("Think")
    tab.until(answer, "done")
    assert answer.locator(".text").inner_text().startswith("Here it is.")
    answer.locator(".thinking summary").click()
    assert "Let me think" in answer.locator(".thinking").inner_text()
    scripted_server.fleet.answers = [
        'Hm.</think><tool_call>{"name": "weather", "arguments": {"where": "Aran"}}</tool_call>'
    ]
    weather = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    tab.page.unroute("**/v1/chat/completions")
    tab.page.route("**/v1/chat/completions", _with(**THINKING, tools=[weather]))
    answer = tab.ask("What is the weather?")
    tab.until(answer, "done")
    answer.locator(".call summary").click()
    shown = answer.locator(".call").inner_text()
    assert "weather" in shown and "Aran" in shown


def _with(**more: Any) -> Callable[[Any], None]:
    """Return a route that adds to requests what the page has no field for."""

    def go_on(route: Any) -> None:
        route.continue_(post_data={**route.request.post_data_json, **more})

    return go_on


def test_markdown_is_shown_as_such(scripted_server: Scripted, visit: Open) -> None:
    scripted_server.fleet.answers = [
        "# Boats\n\n- one\n- **two**\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n```py\nx = 1\n```"
    ]
    tab = visit(scripted_server.url)
    tab.open()
    answer = tab.ask("Show me")
    tab.until(answer, "done")
    text = answer.locator(".text")
    assert text.locator("h1").inner_text() == "Boats"
    assert text.locator("li strong").inner_text() == "two"
    assert text.locator("td").all_inner_texts() == ["1", "2"]
    assert text.locator("pre code").inner_text().strip() == "x = 1"


def test_hostile_text_of_a_model_runs_nothing_and_loads_nothing(scripted_server: Scripted, visit: Open) -> None:
    scripted_server.fleet.answers, scripted_server.fleet.step = [HOSTILE], 7
    tab = visit(scripted_server.url)
    tab.open()
    asked: list[str] = []
    tab.page.on("request", lambda request: asked.append(request.url))
    answer = tab.ask("Be hostile")
    tab.until(answer, "done")
    tab.page.wait_for_timeout(300)
    text = answer.locator(".text")
    assert tab.ran == []
    assert [url for url in asked if not url.startswith(scripted_server.url)] == []
    for tag in ("script", "img", "iframe", "style", "form", "input", "svg", "math", "object"):
        assert text.locator(tag).count() == 0, tag
    everything = text.evaluate("e => [...e.querySelectorAll('*')].flatMap(x => [...x.attributes].map(a => a.name))")
    assert {"style", "id", "name"}.isdisjoint(everything)
    assert not any(name.startswith("on") for name in everything)
    links = text.evaluate("e => [...e.querySelectorAll('a')].map(a => [a.getAttribute('href'), a.target, a.rel])")
    assert links
    for href, target, rel in links:
        assert href is None or href.startswith("https://"), href
        assert target == "_blank" and {"noopener", "noreferrer"} <= set(rel.split())
    assert "alert('code')" in text.inner_text()
    assert tab.page.locator("#composer").is_visible()


def test_a_script_in_a_document_does_not_run(scripted_server: Scripted, visit: Open, tmp_path: Path) -> None:
    hostile = tmp_path / "<img src=x onerror=alert('name')>.md"
    hostile.write_text("The tide turns twice.\n\n<script>alert('document')</script><img src=x onerror=alert('image')>")
    make_store(scripted_server.url, "<script>alert('store')</script>", hostile)
    scripted_server.fleet.answers = ["Twice, they say."]
    tab = visit(scripted_server.url)
    tab.open("documents")
    tab.page.locator("#store-list .open", has_text="alert('store')").click()
    tab.page.fill("#search-query", "tide script")
    tab.page.press("#search-query", "Enter")
    tab.page.locator(".result").first.click()
    tab.page.locator("#passage-note:empty").wait_for(state="attached")
    assert "<script>alert('document')</script>" in tab.page.locator("#passage-text").inner_text()
    tab.open()
    choose(tab, "<script>alert('store')</script>")
    answer = tab.ask("When does the tide turn?")
    tab.until(answer, "done")
    answer.get_by_role("button", name="Show what was found").click()
    tab.page.wait_for_timeout(300)
    assert tab.ran == []
    assert tab.page.locator("#passage script, #passage img, .answer img, #files img").count() == 0


def test_all_can_be_done_with_the_keyboard_alone(scripted_server: Scripted, visit: Open) -> None:
    scripted_server.fleet.answers, scripted_server.fleet.hangs = ["The end."], True
    tab = visit(scripted_server.url)
    tab.open()
    keyboard = tab.page.keyboard

    def tab_to(condition: str) -> None:
        for _ in range(40):
            keyboard.press("Tab")
            if tab.page.evaluate(f"document.activeElement.matches({condition!r})"):
                return
        raise AssertionError(f"the Tab key does not reach {condition}")

    tab_to("#question")
    keyboard.type("A question")
    keyboard.press("Shift+Enter")
    keyboard.type("of two lines")
    keyboard.press("Enter")
    answer = tab.page.locator(".answer")
    answer.locator(".text", has_text="The").wait_for()
    keyboard.press("Escape")
    tab.until(answer, "stopped")
    assert tab.page.locator(".question p").inner_text() == "A question\nof two lines"
    scripted_server.fleet.hangs = False
    tab_to(".answer .deeds .link:last-child")
    keyboard.press("Enter")
    tab.until(answer, "done")
    tab_to('nav a[href="#fleet"]')
    keyboard.press("Enter")
    tab.page.locator("#view-fleet").wait_for()
    tab_to("#open-key")
    keyboard.press("Enter")
    assert tab.page.locator("#key").is_visible()
    keyboard.press("Escape")
    assert tab.page.locator("#key").is_hidden()


def test_it_fits_a_phone(scripted_server: Scripted, visit: Open) -> None:
    scripted_server.fleet.answers = ["A long line of code follows.\n\n```\n" + "x" * 400 + "\n```\n\n" + "y" * 300]
    tab = visit(scripted_server.url, viewport=PHONE, has_touch=True, is_mobile=True)
    tab.open()
    tab.until(tab.ask("Be wide"), "done")
    for view in ("chat", "documents", "fleet"):
        tab.page.locator(f'nav a[href="#{view}"]').tap()
        tab.page.locator(f"#view-{view}").wait_for()
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= 390, view
    tab.page.locator('nav a[href="#chat"]').tap()
    tab.page.locator(".toggle-rail").tap()
    tab.page.locator("#conversations .open").tap()
    assert tab.page.locator("#question").is_visible()
