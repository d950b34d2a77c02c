"""`python -m benchmarks.overload` against a server that runs, which is a stub of one."""

from __future__ import annotations

import json

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from benchmarks.overload import Options, measure
from benchmarks.servers import ServerError

KEY = "gs-a"
CHUNK = {"choices": [{"delta": {"content": "a"}}]}


async def answer(request: web.Request) -> web.Response:
    if request.headers.get("authorization") != f"Bearer {KEY}":
        return web.Response(status=401)
    text = "data: " + json.dumps(CHUNK, separators=(",", ":")) + "\n\ndata: [DONE]\n\n"
    return web.Response(text=text, content_type="text/event-stream")


@pytest.mark.asyncio
async def test_a_server_with_keys_is_measured_with_one_and_not_without() -> None:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    async with TestServer(app) as server:
        options = Options(str(server.make_url("")).rstrip("/"), capacity=2, tokens=1, seconds=0.1)
        with pytest.raises(ServerError, match="401"):
            await measure(options, lambda line: None)
        phases = await measure(options, lambda line: None, KEY)
    assert set(phases) == {"1x", "4x", "1x after"}
    assert all(phase.ttft_s and not phase.broken for phase in phases.values())
