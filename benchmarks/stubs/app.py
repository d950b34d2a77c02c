"""The real app, on Ray Serve, with Engines around a STUB core. The `import_path` of `benchmarks.data_path --serve`."""

from __future__ import annotations

from typing import Any

from ray.serve import Application

from deployments.app import assemble
from deployments.config import AppConfig, FleetConfig, ModelConfig
from deployments.engine import Engine


class StubbedEngine(Engine):
    """The real Engine; what its `AsyncLLM` drives is a stub."""

    async def __init__(self, model: ModelConfig, fleet: FleetConfig) -> None:  # type: ignore[misc]
        from deployments.seam import logs

        logs.join_serves()
        from benchmarks.stubs.core import install

        install()
        await Engine.__init__(self, model, fleet)  # type: ignore[misc]


def build(args: dict[str, Any]) -> Application:
    """Build the app of `args["app"]`: nested, so that nobody takes stubs for engines and wants memory for them."""
    return assemble(AppConfig.parse(args["app"]), StubbedEngine)
