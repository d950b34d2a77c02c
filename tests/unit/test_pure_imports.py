"""Policies, messages and the channel load nothing heavy: they are testable, and importable anywhere, without it."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("ray", "torch", "vllm")
PURE = (
    "deployments.config",
    "deployments.errors",
    "deployments.messages",
    "deployments.outline",
    "deployments.access.fair_share",
    "deployments.access.gate",
    "deployments.dispatch",
    "deployments.time_limits",
    "deployments.request_body",
    "deployments.metrics",
    "deployments.fleet.placement",
    "deployments.fleet.admission",
    "deployments.fleet.autoscaling",
    "deployments.fleet.channel",
    "deployments.fleet.client",
    "deployments.fleet.view",
    "deployments.fleet.vitals",
    "deployments.grounding.asgi",
    "deployments.grounding.layout",
    "deployments.outcomes",
    "deployments.serve_calls",
    "deployments.indexer",
    "deployments.retriever",
    "deployments.retrieval.api",
    "deployments.retrieval.chunking",
    "deployments.retrieval.child",
    "deployments.retrieval.filters",
    "deployments.retrieval.fusion",
    "deployments.retrieval.ingestion",
    "deployments.retrieval.records",
    "deployments.retrieval.search",
    "deployments.web.page",
)


@pytest.mark.parametrize("module", PURE)
def test_a_pure_module_loads_neither_ray_nor_torch_nor_vllm(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({set(HEAVY)} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (answer.returncode, answer.stdout.split()) == (0, []), answer.stderr


@pytest.mark.parametrize(
    "module", ["deployments.retrieval.api", "deployments.serve_calls", "deployments.documents_cli"]
)
def test_what_a_router_needs_of_documents_loads_no_database(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{'lancedb', 'pyarrow', 'numpy', 'pypdf'}} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (answer.returncode, answer.stdout.split()) == (0, []), answer.stderr
