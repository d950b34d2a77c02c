"""The page's files: what is served, how it may be kept, and what a browser is told not to do with it."""

from __future__ import annotations

import fnmatch
import gzip
import hashlib
import re
import tomllib
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from deployments.access.gate import Gate
from deployments.access.keys import KeyEntry, Keys, hash_of
from deployments.dispatch import Dispatcher, below_prefix
from deployments.web.page import PREFIX, Page
from tests.unit.recording import Recorder

ROOT = Path(__file__).parents[2]
STATIC = ROOT / "deployments/web/static"
KEY = "gs-ann-0123456789"
MOST_BYTES = 300_000
OURS = [path for path in STATIC.iterdir() if path.is_file()]


def served(page: Page, *, keys: bool = False, root_path: str = "") -> httpx.AsyncClient:
    """Return a client of the page behind dispatcher and gate, as a Router puts them together, below `root_path`."""

    async def data() -> tuple[int, str, bytes]:
        return 200, "application/json", b"{}"

    dispatcher = Dispatcher(
        lambda name: None,
        ["tiny"],
        ["/v1/chat/completions"],
        {"/fleet": data, "/health": data},
        max_body_bytes=1000,
        mounted=dict.fromkeys(page.prefixes, page),
    )
    ring = Keys([KeyEntry(name="ann", sha256=hash_of(KEY))]) if keys else None
    gate = Gate(
        dispatcher,
        ring,
        [],
        max_header_count=50,
        max_header_bytes=10_000,
        metrics=Recorder(),
        open_pages=page.paths,
    )
    transport = httpx.ASGITransport(below_prefix(gate), root_path=root_path)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


@pytest.fixture(scope="module")
def page() -> Page:
    return Page()


@pytest_asyncio.fixture
async def http(page: Page) -> httpx.AsyncClient:
    return served(page)


def policy(answer: httpx.Response) -> dict[str, str]:
    parts = (part.strip().partition(" ") for part in answer.headers["content-security-policy"].split(";"))
    return {name: value for name, _, value in parts}


@pytest.mark.asyncio
async def test_the_page_and_every_file_it_names_are_served(http: httpx.AsyncClient) -> None:
    index = await http.get("/")
    assert (index.status_code, index.headers["content-type"]) == (200, "text/html; charset=utf-8")
    named = re.findall(r'(?:src|href)="([^"#]+)"', index.text)
    assert len(named) == 3
    for name in named:
        answer = await http.get(f"/{name}")
        assert answer.status_code == 200, name
        assert answer.headers["content-type"] != "text/html; charset=utf-8"


@pytest.mark.asyncio
async def test_below_a_prefix_it_needs_its_slash_and_finds_all_it_names(page: Page) -> None:
    async with served(page, keys=True, root_path="/of/us") as http:
        bare = await http.get("/of/us")
        assert (bare.status_code, bare.headers["location"]) == (307, "us/")
        answer = await http.get("/of/us", follow_redirects=True)
        assert (answer.status_code, str(answer.url)) == (200, "http://test/of/us/")
        for name in re.findall(rb'(?:href|src)="(page/[^"]+)"', answer.content):
            assert (await http.get(answer.url.join(name.decode()))).status_code == 200
        assert (await http.get("/of/us/fleet")).status_code == 401
        assert (await http.get("/of/us/health")).status_code == 200


@pytest.mark.asyncio
async def test_every_module_imports_files_that_are_there(http: httpx.AsyncClient, page: Page) -> None:
    modules = [path for path in page.paths if path.endswith((".js", ".mjs"))]
    assert len(modules) > 10
    for module in modules:
        text = (await http.get(module)).text
        for name in re.findall(r'^import .*?["\'](\.[^"\']+)["\'];?$', text, re.MULTILINE):
            imported = str(httpx.URL(f"http://test{module}").join(name).path)
            assert imported in page.paths, f"{module} imports {name}"


@pytest.mark.asyncio
async def test_a_browser_is_told_to_run_nothing_inline_and_to_load_nothing_from_elsewhere(
    http: httpx.AsyncClient, page: Page
) -> None:
    for path in page.paths:
        answer = await http.get(path)
        rules = policy(answer)
        assert rules["default-src"] == "'none'"
        assert {rules[name] for name in ("script-src", "style-src", "connect-src", "img-src")} == {"'self'"}
        assert {rules[name] for name in ("base-uri", "form-action", "frame-ancestors")} == {"'none'"}
        assert (rules["require-trusted-types-for"], rules["trusted-types"]) == ("'script'", "dompurify")
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"


def test_the_page_has_no_inline_script_or_style_and_no_address_elsewhere() -> None:
    index = (STATIC / "index.html").read_text()
    assert re.findall(r"<script(?![^>]*\ssrc=)", index) == []
    assert re.findall(r"<style|\sstyle=|\son\w+=", index) == []
    for path in OURS:
        found = set(re.findall(r"https?://[\w.]+", path.read_text())) - {"http://www.w3.org"}  # a name, never fetched
        assert found == set(), path.name


def test_text_becomes_markup_in_one_place_only() -> None:
    """Where the sanitizer is. All else makes elements and text."""
    risky = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|\beval\(")
    for path in OURS:
        if path.suffix == ".js":
            assert risky.findall(path.read_text()) == [], path.name
    users = [path.name for path in OURS if path.suffix == ".js" and "vendor/" in path.read_text()]
    assert users == ["markdown.js"]


@pytest.mark.asyncio
async def test_files_are_kept_for_ever_and_the_page_is_asked_for_each_time(http: httpx.AsyncClient, page: Page) -> None:
    assert (await http.get("/")).headers["cache-control"] == "no-cache"
    for path in page.paths - {"/"}:
        assert path.startswith(f"{PREFIX}/{page.version}/")
        assert (await http.get(path)).headers["cache-control"] == "public, max-age=31536000, immutable"


@pytest.mark.asyncio
async def test_what_a_browser_has_already_is_not_sent_again(http: httpx.AsyncClient) -> None:
    first = await http.get("/")
    again = await http.get("/", headers={"if-none-match": f'"other", {first.headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == first.headers["etag"]
    assert "content-security-policy" in again.headers
    assert (await http.get("/", headers={"if-none-match": '"other"'})).status_code == 200


def test_another_content_has_another_address(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Page()
    original = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: original(path) + (b"\n" if path.name == "words.js" else b""))
    after = Page()
    assert before.paths & after.paths == {"/"}


@pytest.mark.asyncio
async def test_files_are_compressed_for_those_who_take_it(http: httpx.AsyncClient, page: Page) -> None:
    path = next(path for path in page.paths if path.endswith("style.css"))
    plain = await http.get(path, headers={"accept-encoding": "identity"})
    assert "content-encoding" not in plain.headers
    async with http.stream("GET", path, headers={"accept-encoding": "br, gzip;q=0.5"}) as answer:
        raw = b"".join([chunk async for chunk in answer.aiter_raw()])
    assert answer.headers["content-encoding"] == "gzip"
    assert int(answer.headers["content-length"]) == len(raw) < len(plain.content) / 2
    assert gzip.decompress(raw) == plain.content
    assert answer.headers["vary"] == plain.headers["vary"] == "accept-encoding"
    refused = await http.get(path, headers={"accept-encoding": "gzip;q=0"})
    assert "content-encoding" not in refused.headers


@pytest.mark.asyncio
async def test_head_says_what_get_would_send(http: httpx.AsyncClient) -> None:
    got = await http.get("/", headers={"accept-encoding": "identity"})
    head = await http.head("/", headers={"accept-encoding": "identity"})
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(got.content))


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "path",
    [
        PREFIX,
        f"{PREFIX}/",
        f"{PREFIX}/0123456789abcdef/main.js",
        "/index.html",
        "http://test//",
        "/main.js",
        f"{PREFIX}/../deployments/config.py",
    ],
)
async def test_nothing_else_is_served(http: httpx.AsyncClient, path: str) -> None:
    answer = await http.get(path)
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.asyncio
async def test_licences_and_notes_are_not_served(http: httpx.AsyncClient, page: Page) -> None:
    assert {Path(path).suffix for path in page.paths} <= {"", ".js", ".mjs", ".css", ".svg"}
    assert (await http.get(f"{PREFIX}/{page.version}/vendor/VENDORED.toml")).status_code == 404


@pytest.mark.asyncio
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
async def test_the_page_is_only_read(http: httpx.AsyncClient, method: str) -> None:
    assert (await http.request(method, "/")).status_code == 405


@pytest.mark.asyncio
async def test_with_keys_the_page_needs_none_and_what_it_shows_does(page: Page) -> None:
    http = served(page, keys=True)
    for path in page.paths:
        for method in ("GET", "HEAD"):
            assert (await http.request(method, path)).status_code == 200, path
        for method in ("POST", "OPTIONS"):
            assert (await http.request(method, path)).status_code == 401, path
    closed = [
        "/fleet",
        "/v1/models",
        PREFIX,
        f"{PREFIX}/{page.version}",
        f"{PREFIX}/{page.version}/main.js/",
        "http://test//",
    ]
    for path in closed:
        assert (await http.get(path)).status_code == 401, path
    assert (await http.get("/fleet", headers={"authorization": f"Bearer {KEY}"})).status_code == 200


@pytest.mark.asyncio
async def test_a_first_visit_loads_at_most_300_kb_before_compression(http: httpx.AsyncClient, page: Page) -> None:
    sizes = [len((await http.get(path)).content) for path in page.paths]
    assert page.first_load_bytes == sum(sizes) <= MOST_BYTES


def test_vendored_files_are_those_of_the_registry() -> None:
    folder = STATIC / "vendor"
    listed = tomllib.loads((folder / "VENDORED.toml").read_text())["vendored"]
    for each in listed:
        body = (folder / each["file"]).read_bytes()
        assert hashlib.sha256(body).hexdigest() == each["sha256"], each["package"]
        assert each["license"] and (folder / each["license_file"]).read_text().strip()
    named = {each["file"] for each in listed} | {each["license_file"] for each in listed} | {"VENDORED.toml"}
    assert {path.name for path in folder.iterdir()} == named


def test_every_file_ships_with_the_package() -> None:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = setup["package-data"]["deployments.web"]
    for path in STATIC.rglob("*"):
        if path.is_file():
            name = path.relative_to(STATIC.parent).as_posix()
            assert any(fnmatch.fnmatch(name, p) and name.count("/") == p.count("/") for p in patterns), name
