"""API keys: what is kept of them, where they stand, how they change, and who is told what."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from deployments import cli
from deployments.access.keys import KeyRing, add_to_file, from_environment, hash_of, key_ring, new_key, read_file
from deployments.config import KeysConfig, RouterConfig
from deployments.errors import ConfigError
from deployments.redaction import redacted

OLD, NEW, OTHER = "gs-old-key", "gs-new-key", "gs-other-key"


def written(path: Path, *entries: dict[str, object]) -> Path:
    path.write_text(json.dumps(list(entries)))
    return path


def entry(name: str, key: str, **more: object) -> dict[str, object]:
    return {"name": name, "sha256": hash_of(key), **more}


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        (".yaml", "- name: a\n  sha256: {0}\n  requests_per_minute: 3\n"),
        (".yaml", "keys:\n  - {{name: a, sha256: {0}, requests_per_minute: 3}}\n"),
        (".json", '[{{"name": "a", "sha256": "{0}", "requests_per_minute": 3}}]'),
        (".toml", '[[keys]]\nname = "a"\nsha256 = "{0}"\nrequests_per_minute = 3\n'),
    ],
)
def test_a_key_file_is_json_yaml_or_toml(tmp_path: Path, suffix: str, text: str) -> None:
    path = tmp_path / f"keys{suffix}"
    path.write_text(text.format(hash_of(OLD)))
    holder = KeyRing(path).find(OLD.encode())
    assert holder is not None
    assert (holder.name, holder.requests_per_minute, holder.tokens_per_minute) == ("a", 3, None)


def test_a_wrong_key_is_nobodys(tmp_path: Path) -> None:
    ring = KeyRing(written(tmp_path / "k.json", entry("a", OLD)))
    assert ring.find(NEW.encode()) is None
    assert ring.find(b"") is None
    assert ring.find(hash_of(OLD).encode()) is None


def test_a_name_may_have_several_keys_at_once_and_is_one_caller(tmp_path: Path) -> None:
    ring = KeyRing(written(tmp_path / "k.json", entry("a", OLD, tokens_per_minute=9), entry("a", NEW)))
    assert ring.find(OLD.encode()) is ring.find(NEW.encode())
    holder = ring.find(NEW.encode())
    assert holder is not None
    assert holder.tokens_per_minute == 9


def test_a_rotation_needs_no_restart(tmp_path: Path) -> None:
    path = written(tmp_path / "k.json", entry("a", OLD))
    ring = KeyRing(path)
    assert not ring.refresh()
    written(path, entry("a", OLD), entry("a", NEW))
    assert ring.refresh()
    assert ring.find(OLD.encode()) and ring.find(NEW.encode())
    written(path, entry("a", NEW))
    assert ring.refresh()
    assert ring.find(OLD.encode()) is None


@pytest.mark.parametrize("text", ["", "{", "- name: a\n", "keys: 3\n"])
def test_a_file_that_cannot_be_read_again_leaves_the_keys_as_they_were(tmp_path: Path, text: str) -> None:
    path = written(tmp_path / "k.yaml", entry("a", OLD))
    ring = KeyRing(path)
    path.write_text(text)
    assert not ring.refresh()
    assert ring.find(OLD.encode())
    path.unlink()
    assert not ring.refresh()
    assert ring.find(OLD.encode())


def test_an_empty_list_lets_nobody_in(tmp_path: Path) -> None:
    path = written(tmp_path / "k.json", entry("a", OLD))
    ring = KeyRing(path)
    path.write_text("[]")
    assert ring.refresh()
    assert ring.find(OLD.encode()) is None


def test_whose_things_a_name_sees_is_known_of_any_name(tmp_path: Path) -> None:
    ring = KeyRing(written(tmp_path / "k.json", entry("a", OLD), entry("heir", NEW, owns_unowned=True)))
    assert [ring.owner_of(name) for name in ("a", "heir", "revoked")] == ["a", None, "revoked"]


def test_keys_of_the_environment_stand_beside_those_of_the_file(tmp_path: Path) -> None:
    path = written(tmp_path / "k.json", entry("a", OLD))
    ring = KeyRing(path, f"b:{hash_of(OTHER)}, c:{hash_of(NEW)}")
    found = [ring.find(key.encode()) for key in (OLD, OTHER, NEW)]
    assert [holder and holder.name for holder in found] == ["a", "b", "c"]


@pytest.mark.parametrize("text", ["", "gs-plain", "a:gs-plain", "a:" + "0" * 63])
def test_a_variable_that_holds_no_hashes_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(ConfigError, match="GROUNDSWELL_API_KEYS") as caught:
        from_environment(text)
    assert "gs-plain" not in str(caught.value)


def test_a_key_in_the_place_of_its_hash_is_not_repeated(tmp_path: Path) -> None:
    path = written(tmp_path / "k.json", {"name": "a", "sha256": "gs-plain"})
    with pytest.raises(ConfigError, match=r"keys\[0\]\.sha256") as caught:
        KeyRing(path)
    assert "gs-plain" not in str(caught.value)


@pytest.mark.parametrize(
    ("entries", "word"),
    [
        ([entry("a", OLD, tokens_per_minute=1), entry("a", NEW, tokens_per_minute=2)], "disagree on tokens_per_minute"),
        ([entry("a", OLD), entry("b", OLD)], "same key"),
        ([entry("a b", OLD)], r"keys\[0\]\.name"),
        ([entry("a", OLD, requests_per_minute=0)], "requests_per_minute"),
        ([entry("a", OLD, requests=1)], "requests"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path: Path, entries: list[dict[str, object]], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        KeyRing(written(tmp_path / "k.json", *entries))


def test_keys_are_needed_where_either_source_is_named(tmp_path: Path) -> None:
    assert key_ring(RouterConfig(), {}) is None
    written(tmp_path / "k.json", entry("a", OLD))
    assert key_ring(RouterConfig(keys=KeysConfig(file="k.json")), {}, tmp_path)
    assert key_ring(RouterConfig(), {"GROUNDSWELL_API_KEYS": f"a:{hash_of(OLD)}"})
    assert key_ring(RouterConfig(env={"GROUNDSWELL_API_KEYS": f"a:{hash_of(OLD)}"}), {})
    for router, environ in ((RouterConfig(keys=KeysConfig()), {}), (RouterConfig(), {"GROUNDSWELL_API_KEYS": ""})):
        with pytest.raises(ConfigError):
            key_ring(router, environ)


@pytest.mark.parametrize("suffix", [".yaml", ".json", ".toml"])
def test_a_key_is_made_shown_once_and_only_its_hash_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    path = tmp_path / f"keys{suffix}"
    made = []
    for name in ("ann", "bob", "ann"):
        assert cli.main(["key", "new", "--name", name, "--file", str(path)]) == 0
        out, err = capsys.readouterr()
        made.append(out.strip())
        assert made[-1].startswith("gs-") and made[-1] not in err + path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    ring = KeyRing(path)
    assert [(holder := ring.find(key.encode())) and holder.name for key in made] == ["ann", "bob", "ann"]
    assert os.listdir(tmp_path) == [path.name]


def test_without_a_file_the_entry_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["key", "new", "--name", "ann"]) == 0
    out, err = capsys.readouterr()
    assert f"GROUNDSWELL_API_KEYS=ann:{hash_of(out.strip())}" in err


def test_what_stands_in_the_file_stays_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(f"# ours\n- {{name: a, sha256: {hash_of(OLD)}}}  # old")
    before = path.read_text()
    add_to_file(path, "b", hash_of(NEW))
    assert path.read_text().startswith(before)
    nested = tmp_path / "nested.yaml"
    nested.write_text(f"keys:\n  - {{name: a, sha256: {hash_of(OLD)}}}\n")
    with pytest.raises(ConfigError):
        add_to_file(nested, "b", hash_of(NEW))
    assert [e.name for e in read_file(nested)] == ["a"]


def test_whoever_could_read_the_file_still_can(tmp_path: Path) -> None:
    path = tmp_path / "real" / "keys.yaml"
    path.parent.mkdir()
    path.touch()
    is_root = os.getuid() == 0
    if is_root:
        os.chown(path, 1234, 4321)
    path.chmod(0o640)
    link = tmp_path / "keys.yaml"
    link.symlink_to(path)
    before = os.umask(0o077)
    try:
        add_to_file(link, "a", hash_of(OLD))
    finally:
        os.umask(before)
    stat = path.stat()
    assert [e.name for e in read_file(path)] == ["a"] and link.is_symlink()
    assert stat.st_mode & 0o777 == 0o640
    assert not is_root or (stat.st_uid, stat.st_gid) == (1234, 4321)


def test_a_file_whose_owner_cannot_stay_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise PermissionError

    path = tmp_path / "keys.yaml"
    add_to_file(path, "a", hash_of(OLD))
    monkeypatch.setattr(os, "fchown", refuse)
    with pytest.raises(ConfigError, match="keep its owner and group"):
        add_to_file(path, "b", hash_of(NEW))
    assert [e.name for e in read_file(path)] == ["a"] and os.listdir(tmp_path) == [path.name]


def test_keys_are_random_and_long() -> None:
    assert len({new_key() for _ in range(100)}) == 100
    assert len(new_key()) >= 46


def test_a_key_in_a_text_is_redacted() -> None:
    assert redacted(f"GET /v1/files/{new_key()}?x") == "GET /v1/files/gs-…?x"
