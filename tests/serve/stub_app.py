"""The real app around a stub engine. The `import_path` of these tests' Serve config."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application

from deployments.app import assemble
from deployments.config import AppConfig
from tests.serve.stub_engine import StubEngine


def build(args: dict[str, Any]) -> Application:
    """Build the app of `args["app"]`: nested, so that nobody takes stubs for engines and wants memory for them."""
    return assemble(AppConfig.parse(args["app"]), StubEngine)


def at_the_root(args: dict[str, Any]) -> Application:
    """Build another application, for the address above ours: it answers everything, and is not ours."""
    return serve.deployment(Elsewhere, ray_actor_options={"num_cpus": 0}).bind()


class Elsewhere:
    async def __call__(self, request: Any) -> str:
        return "elsewhere"
