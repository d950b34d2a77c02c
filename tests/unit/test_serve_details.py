"""Asking Serve's controller how the app is: what it says, and what becomes of silence. The controller is a stub."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from deployments.serve_calls import ServeDetails

pytestmark = pytest.mark.asyncio


def controller(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    from ray.serve import context

    method = SimpleNamespace(remote=answer)
    client = SimpleNamespace(_controller=SimpleNamespace(get_serve_instance_details=method))
    monkeypatch.setattr(context, "_get_global_client", lambda: client)


async def test_what_the_controller_says_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async def says() -> dict[str, Any]:
        return {"applications": {}}

    controller(monkeypatch, says)
    assert await ServeDetails(timeout_s=10).get() == {"applications": {}}


async def test_a_controller_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    controller(monkeypatch, asyncio.Event().wait)
    assert await ServeDetails(timeout_s=0.01).get() is None


async def test_a_controller_that_has_died_is_nobodys_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.exceptions import RayActorError

    async def fails() -> None:
        raise RayActorError

    controller(monkeypatch, fails)
    assert await ServeDetails(timeout_s=10).get() is None
