"""Serves the page at `/` and its files. Pure ASGI: knows no Ray and no vLLM, and no data: all of that comes by the API.

Files are read once. Their address holds a hash over all of them, so browsers may keep them for ever, and never mix
those of two versions; `/` itself is asked for each time, and answered with a 304.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Final

from deployments.dispatch import Receive, Scope, Send
from deployments.errors import MethodNotAllowed, NotFound

PREFIX: Final = "/page"
"""Where the files are. vLLM has no such route, and neither have we: the seam's test looks."""
_INDEX: Final = "index.html"
_TYPES: Final[Mapping[str, str]] = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".webmanifest": "application/manifest+json",
}
"""What is served. Other files beside them, licences say, are not."""

CONTENT_SECURITY_POLICY: Final = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "manifest-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types dompurify",
    ]
)
"""Nothing from elsewhere, nothing inline, and no text becomes HTML but through the sanitizer."""

_HEADERS: Final[Mapping[str, str]] = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "vary": "accept-encoding",
}


@dataclass(frozen=True)
class _File:
    body: bytes
    gzipped: bytes
    content_type: str
    etag: str
    cache_control: str


class Page:
    """See the module's docstring.

    Attributes:
        paths: All that it answers.
        prefixes: Those it is mounted at.
        first_load_bytes: What a first visit loads, before compression.
    """

    def __init__(self) -> None:
        found = {name: body for name, body in _read(resources.files("deployments.web") / "static") if _type(name)}
        version = hashlib.sha256(b"".join(b"%s\0%s\0" % (name.encode(), found[name]) for name in sorted(found)))
        self.version = version.hexdigest()[:16]
        base = f"{PREFIX}/{self.version}/"
        index = found.pop(_INDEX).replace(b"{{files}}", base.lstrip("/").encode())
        self._files = {"/": _file(_INDEX, index, "no-cache")}
        for name, body in found.items():
            self._files[base + name] = _file(name, body, "public, max-age=31536000, immutable")
        self.paths = frozenset(self._files)
        self.prefixes = ("/", PREFIX)
        self.first_load_bytes = sum(len(file.body) for file in self._files.values())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request.

        Raises:
            NotFound: There is no such file, or no longer.
            MethodNotAllowed: It is to be read.
        """
        path, method = scope["path"], scope["method"]
        file = self._files.get(path)
        if file is None:
            raise NotFound(f"There is no {path[:200]} here.")
        if method not in ("GET", "HEAD"):
            raise MethodNotAllowed(f"{path} takes GET.")
        asked = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        headers = {**_HEADERS, "etag": file.etag, "cache-control": file.cache_control}
        if file.etag in (tag.strip() for tag in asked.get(b"if-none-match", "").split(",")):
            return await _send(send, 304, headers, b"", method)
        headers["content-type"] = file.content_type
        body = file.body
        if _takes_gzip(asked.get(b"accept-encoding", "")) and len(file.gzipped) < len(file.body):
            headers["content-encoding"], body = "gzip", file.gzipped
        await _send(send, 200, {**headers, "content-length": str(len(body))}, body, method)


async def _send(send: Send, status: int, headers: Mapping[str, str], body: bytes, method: str) -> None:
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": b"" if method == "HEAD" else body})


def _takes_gzip(accepted: str) -> bool:
    for coding in accepted.lower().split(","):
        name, _, weight = coding.partition(";")
        if name.strip() in ("gzip", "*"):
            return weight.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    return False


def _file(name: str, body: bytes, cache_control: str) -> _File:
    etag = f'W/"{hashlib.sha256(body).hexdigest()[:32]}"'  # weak: the same for both encodings
    return _File(body, gzip.compress(body, mtime=0), _type(name) or "", etag, cache_control)


def _type(name: str) -> str | None:
    return _TYPES.get("." + name.rpartition(".")[2])


def _read(folder: Traversable, prefix: str = "") -> list[tuple[str, bytes]]:
    found: list[tuple[str, bytes]] = []
    for entry in folder.iterdir():
        if entry.is_dir():
            found += _read(entry, f"{prefix}{entry.name}/")
        else:
            found.append((prefix + entry.name, entry.read_bytes()))
    return found
