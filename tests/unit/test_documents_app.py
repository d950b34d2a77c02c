"""How documents become part of the app: deployments, options, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm")

from deployments.app import assemble
from deployments.config import AppConfig
from deployments.errors import ConfigError
from models import tiny_random
from tests.serve.stub_engine import StubEngine


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("model") / "tiny-random"
    tiny_random.write(folder)
    args = {"model": str(folder), "dtype": "float32", "max_model_len": 512}
    return [{"name": "tiny", "engine_args": args}, {"name": "embedder", "engine_args": {**args, "runner": "pooling"}}]


def bound(app: Any) -> tuple[Any, ...]:
    return app._bound_deployment.init_args


def test_without_documents_there_is_neither_indexer_nor_retriever(models: list[dict[str, Any]]) -> None:
    assert bound(assemble(AppConfig.parse({"models": models}), StubEngine))[2] is None


def test_the_indexer_is_one_also_while_it_is_replaced(models: list[dict[str, Any]]) -> None:
    config = {"models": models, "documents": {"uri": "store", "embedding_model": "embedder"}}
    _, engines, (indexer, retriever) = bound(assemble(AppConfig.parse(config), StubEngine))
    options = indexer._bound_deployment._deployment_config
    assert (indexer._bound_deployment.name, options.num_replicas, options.max_surge_percent) == ("Indexer", 1, 0)
    assert options.autoscaling_config is None
    _, reader_model, embedder = bound(indexer)
    assert (reader_model.name, embedder) == ("embedder", engines["embedder"])
    scaling = retriever._bound_deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 4, 8)
    assert bound(retriever)[1:] == (indexer, engines["embedder"], None, None)


def test_the_rerank_model_is_the_retrievers(models: list[dict[str, Any]]) -> None:
    config = {"models": models, "documents": {"uri": "store", "rerank_model": "embedder"}}
    _, engines, (indexer, retriever) = bound(assemble(AppConfig.parse(config), StubEngine))
    assert bound(retriever)[1:] == (indexer, None, engines["embedder"], None)
    assert bound(indexer)[2] is None


def test_the_retriever_can_be_scaled_and_the_indexer_cannot(models: list[dict[str, Any]]) -> None:
    documents: dict[str, Any] = {
        "uri": "store",
        "retriever": {"num_replicas": 3},
        "indexer": {"max_ongoing_requests": 7},
    }
    _, _, (indexer, retriever) = bound(
        assemble(AppConfig.parse({"models": models, "documents": documents}), StubEngine)
    )
    assert retriever._bound_deployment._deployment_config.num_replicas == 3
    assert indexer._bound_deployment._deployment_config.max_ongoing_requests == 7
    documents["indexer"] = {"num_replicas": 2}
    with pytest.raises(ConfigError, match="one Indexer"):
        assemble(AppConfig.parse({"models": models, "documents": documents}), StubEngine)
