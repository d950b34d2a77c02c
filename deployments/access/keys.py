"""API keys: kept as hashes, compared in constant time, re-read from their file while it serves.

A key is 256 random bits, so a plain SHA-256 keeps it: there is nothing to guess that a slow hash would protect.
Knows no Ray, no vLLM and no HTTP.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from deployments.config import RouterConfig
from deployments.errors import ConfigError
from deployments.redaction import KEY_PREFIX

logger = logging.getLogger("ray.serve.groundswell.router")

VARIABLE: Final = "GROUNDSWELL_API_KEYS"
_SHAPE: Final = "it is a list of entries with `name` and `sha256`, or has such a list under `keys`"


class KeyLimits(BaseModel):
    """What a caller may use. None is no limit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests_per_minute: int | None = Field(None, ge=1)
    tokens_per_minute: int | None = Field(None, ge=1)
    max_concurrent_requests: int | None = Field(None, ge=1)


class KeyEntry(KeyLimits):
    """One key, as it stands in the file.

    Entries of one name are one caller with several keys, as while they are rotated: limits and flags may stand at any
    of them.

    Attributes:
        name: The caller's. Files and vector stores belong to it.
        sha256: The key's hash, in hexadecimal.
        may_set_priority: Whether a request's own `priority` counts.
        owns_unowned: Whether its files and vector stores are those made while there were no keys.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    may_set_priority: bool = False
    owns_unowned: bool = False

    @field_validator("sha256", mode="before")
    @classmethod
    def _lower(cls, value: Any) -> Any:
        return value.strip().lower() if isinstance(value, str) else value


class KeyHolder(KeyLimits):
    """A caller: what its entries say together."""

    name: str
    may_set_priority: bool = False
    owns_unowned: bool = False

    @property
    def owner(self) -> str | None:
        """Whose files and vector stores it sees."""
        return None if self.owns_unowned else self.name


class Keys:
    """A set of keys.

    Args:
        entries: At most one limit of each kind for a name.

    Raises:
        ConfigError: Two entries of a name disagree, or one key stands for two names.
    """

    def __init__(self, entries: Iterable[KeyEntry]) -> None:
        entries = list(entries)
        self.holders = {name: _holder(name, [e for e in entries if e.name == name]) for name in _names(entries)}
        self._hashes: list[tuple[bytes, KeyHolder]] = []
        for entry in entries:
            if any(h == bytes.fromhex(entry.sha256) and o.name != entry.name for h, o in self._hashes):
                raise ConfigError(f"API keys: {entry.name!r} and another name have the same key")
            self._hashes.append((bytes.fromhex(entry.sha256), self.holders[entry.name]))

    def find(self, key: bytes) -> KeyHolder | None:
        """Return whose key it is. Takes as long for a wrong key as for a right one."""
        asked, found = hashlib.sha256(key).digest(), None
        for known, holder in self._hashes:
            if hmac.compare_digest(asked, known):
                found = holder
        return found


def _names(entries: Sequence[KeyEntry]) -> list[str]:
    return list(dict.fromkeys(entry.name for entry in entries))


def _holder(name: str, entries: Sequence[KeyEntry]) -> KeyHolder:
    merged: dict[str, Any] = {}
    for field in KeyLimits.model_fields:
        given = {value for e in entries if (value := getattr(e, field)) is not None}
        if len(given) > 1:
            raise ConfigError(f"API keys: the entries of {name!r} disagree on {field}")
        merged[field] = given.pop() if given else None
    flags = {flag: any(getattr(e, flag) for e in entries) for flag in ("may_set_priority", "owns_unowned")}
    return KeyHolder(name=name, **merged, **flags)


class KeyRing:
    """The keys that are good now: those of a file, which may change, and those of the environment.

    Args:
        file: JSON, YAML or TOML; see `KeyEntry`.
        environment: `name:sha256`, several separated by commas or spaces.

    Raises:
        ConfigError: One of them cannot be read. Later such a file leaves the keys as they were.
    """

    def __init__(self, file: Path | None, environment: str | None = None) -> None:
        if file is None and environment is None:
            raise ConfigError(f"router.keys names no `file`, and {VARIABLE} is not set")
        self._file = file
        self._given = [] if environment is None else from_environment(environment)
        self._seen = self._stamp()
        self._keys = Keys([*self._given, *([] if file is None else read_file(file))])

    def find(self, key: bytes) -> KeyHolder | None:
        return self._keys.find(key)

    @property
    def holders(self) -> Mapping[str, KeyHolder]:
        return self._keys.holders

    def owner_of(self, name: str) -> str | None:
        """Return whose files and vector stores a key of this name sees, or saw before it was revoked."""
        holder = self.holders.get(name)
        return name if holder is None else holder.owner

    def refresh(self) -> bool:
        """Read the file again if it has changed; return whether the keys have."""
        stamp = self._stamp()
        if self._file is None or stamp == self._seen:
            return False
        try:
            self._keys = Keys([*self._given, *read_file(self._file)])
        except ConfigError as error:
            logger.error("The API keys stay as they were: %s", error)
            return False
        finally:
            self._seen = stamp
        logger.info("API keys were read anew: %d callers", len(self._keys.holders))
        return True

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            stat = self._file.stat() if self._file is not None else None
        except OSError:
            return None
        return None if stat is None else (stat.st_mtime_ns, stat.st_size, stat.st_ino)


def configured(router: RouterConfig, environ: Mapping[str, str]) -> bool:
    """Whether callers need a key. A variable that is set and empty was meant to hold some: it counts."""
    return router.keys is not None or VARIABLE in router.env or VARIABLE in environ


def key_ring(router: RouterConfig, environ: Mapping[str, str], folder: Path = Path()) -> KeyRing | None:
    """Return the keys that callers need; None where they need none.

    Args:
        router: Its configuration.
        environ: The environment of the process.
        folder: Where a relative path starts.

    Raises:
        ConfigError: They cannot be read.
    """
    if not configured(router, environ):
        return None
    file = router.keys.file if router.keys is not None else None
    path = None if file is None else folder / Path(file).expanduser()
    return KeyRing(path, router.env.get(VARIABLE, environ.get(VARIABLE)))


def from_environment(text: str) -> list[KeyEntry]:
    """Return the keys of `GROUNDSWELL_API_KEYS`.

    Raises:
        ConfigError: There are none, or one is not a name and a hash. The message repeats nothing of it.
    """
    if not text.strip():
        raise ConfigError(f"{VARIABLE} is set and empty: unset it, or put `name:sha256` in")
    entries = []
    for i, item in enumerate(re.split(r"[,\s]+", text.strip())):
        name, _, digest = item.partition(":")
        try:
            entries.append(KeyEntry(name=name, sha256=digest))
        except ValidationError:
            raise ConfigError(
                f"{VARIABLE}: item {i + 1} is not `name:sha256`; `groundswell key new` prints it"
            ) from None
    return entries


def read_file(path: Path) -> list[KeyEntry]:
    """Return the keys of a file.

    Raises:
        ConfigError: It cannot be read, or an entry is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the key file {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return parse(text, path)


def parse(text: str, path: Path) -> list[KeyEntry]:
    """Return the keys in a file's text, in the format that the path's suffix says.

    Raises:
        ConfigError: The text repeats nothing of the file: somebody may have put a key where its hash belongs.
    """
    import yaml

    try:
        content = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (yaml.YAMLError, tomllib.TOMLDecodeError):
        raise ConfigError(f"the key file {path} is not valid {path.suffix.lstrip('.').upper() or 'YAML'}") from None
    entries = content.get("keys") if isinstance(content, dict) else content
    if not isinstance(entries, list):
        raise ConfigError(f"the key file {path} has no keys: {_SHAPE}")
    result = []
    for i, entry in enumerate(entries):
        try:
            result.append(KeyEntry.model_validate(entry))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(["", *map(str, first["loc"])])
            hint = "the hash that `groundswell key new` prints" if "sha256" in first["loc"] else first["msg"]
            raise ConfigError(f"the key file {path}: keys[{i}]{place}: {hint}") from None
    return result


def new_key() -> str:
    """Return a new key."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def hash_of(key: str) -> str:
    """Return what is kept of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def entry_text(name: str, digest: str, suffix: str) -> str:
    """Return an entry as it is written into a file of this suffix."""
    if suffix == ".toml":
        return f'[[keys]]\nname = "{name}"\nsha256 = "{digest}"\n'
    if suffix == ".json":
        return json.dumps({"name": name, "sha256": digest})
    return f'- name: "{name}"\n  sha256: "{digest}"\n'


def add_to_file(path: Path, name: str, digest: str) -> None:
    """Append an entry to a file, which may not exist yet; what stands there stays as it is written.

    Raises:
        ConfigError: The file cannot be read, or an entry cannot be appended to what stands there.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    before = parse(text, path) if text.strip() else []
    if path.suffix == ".json":
        content = json.loads(text) if text.strip() else []
        entries = content["keys"] if isinstance(content, dict) else content
        entries.append({"name": name, "sha256": digest})
        after = json.dumps(content, indent=2) + "\n"
    else:
        ended = text if not text or text.endswith("\n") else text + "\n"
        after = ended + entry_text(name, digest, path.suffix)
    if parse(after, path) != [*before, KeyEntry(name=name, sha256=digest)]:
        raise ConfigError(f"an entry cannot be appended to {path}: add it by hand")
    # The old file or the new one, never half of either: a Router may read it at any moment. Whoever could read the old
    # one can read the new one.
    target = path.resolve()
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            if target.exists():
                stat = target.stat()
                os.fchown(descriptor, stat.st_uid, stat.st_gid)
                os.fchmod(descriptor, stat.st_mode & 0o777)
            file.write(after)
        temporary.replace(target)
    except PermissionError:
        raise ConfigError(f"{path} could not keep its owner and group: have root or its owner add the entry") from None
    finally:
        temporary.unlink(missing_ok=True)
