"""A real browser, and the two servers it is shown: one whose model is a script, and one start of the whole app.

Chromium is Debian's (`make browser` installs it where it can) or the one that GROUNDSWELL_CHROMIUM names. Without one,
or without playwright, these tests are skipped.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from models import tiny_random
from tests.e2e.page.scripted import Scripted, scripted
from tests.e2e.serving import Served, serving

ARGUMENTS = [
    "--no-sandbox",  # as root it would not start otherwise; it is shown nothing but these servers
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
DESKTOP: Any = {"width": 1280, "height": 800}
PHONE: Any = {"width": 390, "height": 844}


def chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("GROUNDSWELL_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    executable = chromium()
    if executable is None:
        pytest.skip("no Chromium here: `make browser` installs Debian's, as root; or set GROUNDSWELL_CHROMIUM")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make test installs it")
    with api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=executable, args=ARGUMENTS)
        yield launched
        launched.close()


@pytest.fixture(scope="package")
def script(tmp_path_factory: pytest.TempPathFactory, browser: Any) -> Iterator[Scripted]:
    with scripted(tmp_path_factory.mktemp("scripted")) as server:
        yield server


@pytest.fixture
def scripted_server(script: Scripted) -> Scripted:
    script.reset()
    return script


@pytest.fixture(scope="package")
def served(tmp_path_factory: pytest.TempPathFactory, browser: Any) -> Iterator[Served]:
    """Two engines of the tiny model behind one Router, and an empty document store."""
    folder = tmp_path_factory.mktemp("app")
    tiny_random.write(folder / "tiny")
    model = {
        "name": "tiny",
        "engine_args": {
            "model": str(folder / "tiny"),
            "dtype": "float32",
            "max_model_len": 4096,
            "max_num_seqs": 4,
            "enforce_eager": True,
        },
        "deployment": {"num_replicas": 2},
    }
    args = {"models": [model], "documents": {"uri": str(folder / "documents")}}
    application = {"name": "groundswell", "route_prefix": "/", "import_path": "deployments.app:build", "args": args}
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump({"applications": [application]}))
    with serving(config, tmp_path_factory.mktemp("state")) as app:
        _draw_first_tokens(app)
        yield app


def _draw_first_tokens(app: Served) -> None:
    """Have both engines draw a token: on a CPU, vLLM compiles that at the first request, which takes its seconds."""
    url = f"http://127.0.0.1:{app.port}/v1/completions"
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": 2, "temperature": 1}
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: requests.post(url, json=body, timeout=120), range(4)))
    assert [answer.status_code for answer in answers] == [200] * 4


class Visit:
    """One tab, and all that went wrong in it."""

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.url = page, url
        self.problems: list[str] = []
        self.ran: list[str] = []
        page.set_default_timeout(30_000)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("console", self._console)
        page.on("dialog", self._dialog)

    def _console(self, message: Any) -> None:
        expected = "Failed to load resource" in message.text  # a status that is not 200: what tests are about
        if message.type == "error" and not expected:
            self.problems.append(message.text)

    def _dialog(self, dialog: Any) -> None:
        self.ran.append(dialog.message)
        dialog.dismiss()

    def open(self, view: str = "chat") -> Any:
        self.page.goto(f"{self.url}/#{view}")
        self.page.wait_for_selector("body:not(.is-loading)")
        return self.page

    def ask(self, question: str) -> Any:
        """Ask, and return the answer's element."""
        before = self.page.locator(".answer").count()
        self.page.fill("#question", question)
        self.page.press("#question", "Enter")
        return self.page.locator(".answer").nth(before)

    def until(self, answer: Any, state: str, timeout_s: float = 60) -> None:
        """Wait for an answer's state."""
        handle = answer.element_handle()
        self.page.wait_for_function(
            "([element, state]) => element.dataset.state === state", arg=[handle, state], timeout=1000 * timeout_s
        )


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Visit]]:
    """Return what opens a tab of its own, with nothing stored; at the end nothing may have gone wrong in it."""
    contexts, visits = [], []

    def open_(url: str, *, viewport: Any = DESKTOP, **options: Any) -> Visit:
        contexts.append(browser.new_context(viewport=viewport, **options))
        visits.append(Visit(contexts[-1].new_page(), url))
        return visits[-1]

    yield open_
    for context in contexts:
        context.close()
    assert [problem for each in visits for problem in each.problems] == []


@pytest.fixture
def tides(tmp_path: Path) -> Path:
    path = tmp_path / "tides.md"
    path.write_text(
        "# The harbour\n\n"
        + "The harbour lies open to the west and dries at low water. " * 12
        + "\n\n# Tides\n\nThe tide turns twice a day, and twice a day the ferry waits for it.\n\n"
        + "Of the tide and the weather nothing more is said here. " * 24
    )
    return path
