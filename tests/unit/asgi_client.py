"""A client of ASGI apps whose side of the channels is a test's own: it may hang up, and leave an answer unread."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from deployments.dispatch import App, Message, Scope


class AsgiClient:
    """One request, as a server hands it to an app, and what the app has sent.

    Args:
        body: Its parts.
        ends: Whether the last of them says that it is the last.

    Attributes:
        waiting: Set once all of them have been taken, and more is asked for.
        gone: To be set when the client hangs up.
    """

    def __init__(
        self,
        *body: bytes,
        method: str = "POST",
        path: str = "/v1/chat/completions",
        headers: Sequence[tuple[bytes, bytes]] = (),
        ends: bool = True,
    ) -> None:
        self.scope: Scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": b"",
            "headers": list(headers),
        }
        self._inbox: list[Message] = [
            {"type": "http.request", "body": part, "more_body": i < len(body) or not ends}
            for i, part in enumerate(body, start=1)
        ]
        self.sent: list[Message] = []
        self.waiting, self.gone = asyncio.Event(), asyncio.Event()

    async def receive(self) -> Message:
        if self._inbox:
            return self._inbox.pop(0)
        self.waiting.set()
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    async def ask(self, app: App) -> tuple[int, bytes, dict[str, str]]:
        """Return the answer's status, body and headers; 0 and nothing if there was none."""
        await app(self.scope, self.receive, self.send)
        return self.answer

    @property
    def answer(self) -> tuple[int, bytes, dict[str, str]]:
        if not self.sent:
            return 0, b"", {}
        start, *rest = self.sent
        headers = {name.decode(): value.decode() for name, value in start["headers"]}
        return start["status"], b"".join(message.get("body", b"") for message in rest), headers
