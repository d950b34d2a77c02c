"""A model whose app must ask an engine what it can do: what requests hear that come before the first engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

pytest.importorskip("vllm")

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError

from deployments import messages as m
from deployments.config import AppConfig
from deployments.errors import EngineUnavailable, Overloaded
from deployments.fleet.client import Exchange
from deployments.router import _Model
from deployments.seam.wire import Codec
from models import tiny_random
from tests.unit.recording import LIMIT_S, Recorder

pytestmark = pytest.mark.asyncio
QUEUED = 2


class Handle:
    """As much of Serve's handle to an Engine deployment as waking needs.

    Attributes:
        asked: How often a replica has been waited for.
        answer: Done once one is there, or has failed.
    """

    deployment_name = "Engine-tiny"

    def __init__(self) -> None:
        self.asked = Recorder()
        self.answer = asyncio.get_running_loop().create_future()
        self.join = self

    def options(self, **_: Any) -> None: ...

    async def remote(self, channel: m.ChannelAddress) -> Any:
        self.asked.note(channel)
        return await asyncio.shield(self.answer)


class House:
    def __init__(self, folder: Path) -> None:
        tiny = {"model": str(tiny_random.write(folder)), "dtype": "float32", "max_model_len": -1}
        config = AppConfig.parse(
            {"models": [{"name": "tiny", "engine_args": tiny}], "router": {"max_queued_requests": QUEUED}}
        )
        metrics: Any = Recorder()
        self.exchange = Exchange(config.router.fleet, "127.0.0.1", Codec().decode_deltas, metrics=metrics)
        self.handle: Any = Handle()
        self.model = _Model(config.models[0], config, self.exchange, self.handle, metrics)


@pytest_asyncio.fixture
async def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[House]:
    monkeypatch.setenv("VLLM_TARGET_DEVICE", "cpu")
    made = House(tmp_path)
    try:
        yield made
        assert made.model.fleet.admission.in_flight == 0
    finally:
        made.exchange.close()


async def test_as_many_wait_for_the_first_engine_as_may_and_then_have_the_app(house: House) -> None:
    waiting = [asyncio.create_task(house.model.app()) for _ in range(QUEUED)]
    await house.handle.asked.until(lambda: len(house.handle.asked.noted) == QUEUED)
    with pytest.raises(Overloaded):
        await asyncio.wait_for(house.model.app(), LIMIT_S)
    house.handle.answer.set_result(m.EngineDescription("e1", 2048, 16, ("generate",)))
    async with asyncio.timeout(LIMIT_S):
        first, second = await asyncio.gather(*waiting)
    assert first is second is house.model.built


@pytest.mark.parametrize(
    "error",
    [RayActorError(), BackPressureError(1, 1), asyncio.CancelledError()],
    ids=["it dies", "too many wait", "Serve cancels the call"],
)
async def test_an_engine_that_cannot_be_had_is_unavailable_and_no_error_of_ours(
    house: House, error: BaseException
) -> None:
    house.handle.answer.set_exception(error)
    with pytest.raises(EngineUnavailable) as refused:
        await house.model.app()
    assert (refused.value.status, refused.value.retry_after_s is not None) == (503, True)


async def test_who_hangs_up_waits_no_longer(house: House) -> None:
    waiting = asyncio.create_task(house.model.app())
    await house.handle.asked.until(lambda: bool(house.handle.asked.noted))
    waiting.cancel()
    await asyncio.wait({waiting})
    assert waiting.cancelled()
