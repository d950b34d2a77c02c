"""How long each stage of the store's work takes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from deployments.retrieval.ports import Metrics


@asynccontextmanager
async def staged(metrics: Metrics, metric: str, stage: str, times: dict[str, float]) -> AsyncIterator[None]:
    """Count the seconds of a stage that succeeds in `metric`, and note them in `times` for a line in the log."""
    started = time.monotonic()
    yield
    times[stage] = time.monotonic() - started
    metrics.observe(metric, times[stage], stage=stage)
