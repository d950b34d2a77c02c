"""The Documents view over a real document store: stores, uploads with their progress and reasons, search, deletion."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import requests

from tests.e2e.page.conftest import Visit
from tests.e2e.page.scripted import Scripted
from tests.e2e.serving import wait_for

Open = Callable[..., Visit]


def make(tab: Visit, name: str) -> Any:
    page = tab.open("documents")
    page.fill("#new-store-name", name)
    page.press("#new-store-name", "Enter")
    page.locator("#store-name", has_text=name).wait_for()
    return page


def row(page: Any, name: str) -> Any:
    return page.locator("#files tr", has_text=name)


def test_from_a_new_store_to_a_passage(scripted_server: Scripted, visit: Open, tides: Path) -> None:
    page = make(visit(scripted_server.url), "the harbour")
    page.set_input_files("#drop input", str(tides))
    row(page, "tides.md").locator(".badge", has_text="ready").wait_for()
    page.locator("#store-list small", has_text="1 file").first.wait_for()
    page.fill("#search-query", "when does the ferry wait")
    page.press("#search-query", "Enter")
    page.locator(".result .snippet mark", has_text="ferry").first.wait_for()
    page.locator(".result").first.click()
    assert "ferry waits" in page.locator("#passage mark").inner_text()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Ask from it").click()
    page.locator("#stores-chosen", has_text="the harbour").wait_for()
    page.locator("#question:focus").wait_for()


def test_files_are_taken_by_drop(scripted_server: Scripted, visit: Open) -> None:
    page = make(visit(scripted_server.url), "dropped")
    page.evaluate(
        """() => {
          const data = new DataTransfer();
          data.items.add(new File(['# One'], 'one.md'));
          data.items.add(new File(['Two.'], 'two.txt'));
          const drop = document.querySelector('#drop');
          drop.dispatchEvent(new DragEvent('dragover', { dataTransfer: data, bubbles: true, cancelable: true }));
          drop.dispatchEvent(new DragEvent('drop', { dataTransfer: data, bubbles: true, cancelable: true }));
        }"""
    )
    for name in ("one.md", "two.txt"):
        row(page, name).locator(".badge", has_text="ready").wait_for()


def test_a_file_that_cannot_be_read_says_why_and_the_others_are_not_held_up(
    scripted_server: Scripted, visit: Open, tmp_path: Path
) -> None:
    broken, fine = tmp_path / "broken.pdf", tmp_path / "fine.txt"
    broken.write_bytes(b"%PDF-1.4 nothing of a PDF")
    fine.write_text("Fine.")
    page = make(visit(scripted_server.url), "mixed")
    page.set_input_files("#drop input", [str(broken), str(fine)])
    row(page, "fine.txt").locator(".badge", has_text="ready").wait_for()
    row(page, "broken.pdf").locator(".badge", has_text="failed").wait_for()
    assert len(row(page, "broken.pdf").locator(".reason").inner_text()) > 10
    assert row(page, "broken.pdf").locator(".number").inner_text().startswith("25")
    page.locator("#store-list small", has_text="2 files, 1 failed").wait_for()


def test_an_upload_that_is_refused_says_why_and_one_that_meets_a_busy_server_waits(
    scripted_server: Scripted, visit: Open, tmp_path: Path
) -> None:
    big, small = tmp_path / "big.txt", tmp_path / "small.txt"
    big.write_text("x")
    small.write_text("y")
    tries = []

    def answer(route: Any) -> None:
        if b'filename="big.txt"' in route.request.post_data_buffer:
            error = {"message": "The file is larger than 5 bytes.", "type": "invalid_request_error"}
            return route.fulfill(status=413, json={"error": error})
        tries.append(1)
        if len(tries) == 1:
            error = {"message": "Too many uploads.", "type": "overloaded_error"}
            return route.fulfill(status=429, headers={"retry-after": "1"}, json={"error": error})
        return route.continue_()

    tab = visit(scripted_server.url)
    page = make(tab, "refused")
    page.route("**/v1/files", answer)
    page.set_input_files("#drop input", [str(big), str(small)])
    row(page, "big.txt").locator(".reason", has_text="larger than 5 bytes").wait_for()
    row(page, "small.txt").locator(".badge", has_text="ready").wait_for()
    assert len(tries) == 2
    row(page, "big.txt").get_by_role("button").click()
    row(page, "big.txt").wait_for(state="detached")


def test_a_file_shows_how_far_it_is(scripted_server: Scripted, visit: Open, tides: Path) -> None:
    tab = visit(scripted_server.url)
    page = make(tab, "slow")
    held: list[Any] = []
    page.route("**/v1/files", lambda route: held.append(route))
    page.set_input_files("#drop input", str(tides))
    row(page, "tides.md").locator(".badge", has_text="uploading").wait_for()
    assert row(page, "tides.md").get_by_role("progressbar").is_visible()
    wait_for(lambda: page.evaluate("1") == 1 and len(held) == 1, "the upload is sent")
    held[0].continue_()
    row(page, "tides.md").locator(".badge", has_text="ready").wait_for()
    assert row(page, "tides.md").get_by_role("progressbar").count() == 0


def test_files_and_stores_can_be_deleted(scripted_server: Scripted, visit: Open, tides: Path) -> None:
    page = make(visit(scripted_server.url), "short-lived")
    page.set_input_files("#drop input", str(tides))
    row(page, "tides.md").locator(".badge", has_text="ready").wait_for()
    row(page, "tides.md").get_by_role("button").click()
    page.get_by_role("dialog").get_by_role("button", name="Keep").click()
    assert row(page, "tides.md").count() == 1
    row(page, "tides.md").get_by_role("button").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    row(page, "tides.md").wait_for(state="detached")
    page.click("#delete-store")
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    page.locator("#store-list", has_text="short-lived").wait_for(state="detached")
    stores = requests.get(f"{scripted_server.url}/v1/vector_stores").json()["data"]
    assert "short-lived" not in [store["name"] for store in stores]


def test_a_server_without_documents_says_so(scripted_server: Scripted, visit: Open) -> None:
    tab = visit(scripted_server.url)
    error = {"message": "There is no /v1/vector_stores here.", "type": "invalid_request_error"}
    tab.page.route("**/v1/vector_stores*", lambda route: route.fulfill(status=404, json={"error": error}))
    page = tab.open("documents")
    page.locator("#documents-trouble", has_text="no document store").wait_for()
    assert page.locator("#documents-body").is_hidden()
