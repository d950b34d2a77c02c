"""API keys in a running server: HAProxy lets everything through, and each Router knows who may come in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from deployments.access import keys
from tests.e2e.serving import wait_for
from tests.serve.conftest import ROUTERS, Stubs

OPEN = ("/health", "/ping")
GUARDED = ("/v1/models", "/v1/models/pair", "/fleet", "/metrics", "/version", "/nothing")


@pytest.fixture
def key_file(stubs: Stubs) -> Iterator[Path]:
    """The file of the keys. What a test makes of it does not stay."""
    before = stubs.key_file.read_text()
    yield stubs.key_file
    write(stubs.key_file, before)


def write(path: Path, text: str) -> None:
    """Write the file as its owner should: a Router that reads meanwhile finds the old one or the new one."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


def wait_for_answers(stubs: Stubs, key: str, status: int) -> None:
    """Wait until all Routers answer a caller with this key so."""

    def all_do() -> bool:
        return {stubs.get("/version", key).status_code for _ in range(4 * ROUTERS)} == {status}

    wait_for(all_do, f"all Routers answer {status}")


def test_without_a_key_of_ours_there_is_nothing_to_be_had(stubs: Stubs) -> None:
    for key in ("", keys.new_key()):
        refused = [stubs.get(path, key) for path in GUARDED] + [stubs.ask("pair", key=key)]
        for answer in refused:
            assert answer.status_code == 401, answer.url
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        assert {stubs.get(path, key).status_code for path in OPEN} == {200}
        assert stubs.get("/health", key).json() == {"status": "ok"}, "names and numbers are not for everybody"


def test_a_key_with_limits_is_told_them_and_refused_beyond(stubs: Stubs, key_file: Path) -> None:
    key = keys.new_key()
    entry = {"name": "limited", "sha256": keys.hash_of(key), "requests_per_minute": 1}
    write(key_file, yaml.safe_dump([*yaml.safe_load(key_file.read_text()), entry]))
    wait_for(lambda: stubs.get("/version", key).status_code != 401, "a Router knows it")
    answered = 0
    while (answer := stubs.ask("pair", key=key)).status_code in (200, 401):  # each Router counts, once it knows
        answered += answer.status_code == 200
        assert answered <= 10 * ROUTERS, "nothing is refused"
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    for said, limited in ((answer, "1"), (stubs.ask("pair"), None)):
        assert said.headers.get("x-ratelimit-limit-requests") == limited
    assert answer.headers["x-ratelimit-remaining-requests"] == "0"


def test_a_key_is_rotated_without_a_restart(stubs: Stubs, key_file: Path) -> None:
    old, new = keys.new_key(), keys.new_key()
    keys.add_to_file(key_file, "rotated", keys.hash_of(old))
    wait_for_answers(stubs, old, 200)
    keys.add_to_file(key_file, "rotated", keys.hash_of(new))
    wait_for_answers(stubs, new, 200)
    assert stubs.get("/version", old).status_code == 200, "both are good for a while"
    entries = yaml.safe_load(key_file.read_text())
    write(key_file, yaml.safe_dump([entry for entry in entries if entry["sha256"] != keys.hash_of(old)]))
    wait_for_answers(stubs, old, 401)
    assert stubs.ask("pair", key=new).status_code == 200
